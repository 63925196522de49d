"""Settings against the signature that takes them: unknown names, missing names, values of another type."""

import difflib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

from alignbench.errors import ConfigError

T = TypeVar("T")

LONGEST_VALUE = 120  # characters of a value that a message quotes
PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path", NoneType: "null"}


def construct(target: Callable[..., T], settings: Mapping[str, Any], where: str, **more: Any) -> T:
    """Call ``target`` with settings, and with those of ``more`` that it takes.

    The types are those of the signature's annotations; annotations that say nothing about plain data are not checked.

    Args:
        where: key of the settings in the configuration, for messages; empty at the top.

    Raises:
        ConfigError: a setting that the target does not have, one that it lacks, or a value of another type.
    """
    return target(**arguments(target, settings, where, **more))


def arguments(target: Callable[..., Any], settings: Mapping[str, Any], where: str, **more: Any) -> dict[str, Any]:
    """What ``construct`` calls the target with; errors as there."""
    parameters = _parameters(target)
    known = [name for name in parameters if name not in more]
    unknown = [name for name in settings if name not in known]
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        hint = f"{nearest(str(unknown[0]), known)} It has: {', '.join(known)}" if known else " It has none"
        raise ConfigError(f"{where or 'the configuration'} has no setting {unknown[0]!r}.{hint}")
    given = {name: value for name, value in more.items() if name in parameters}
    for name, parameter in parameters.items():
        key = f"{where}.{name}" if where else name
        if name in settings:
            given[name] = checked(settings[name], parameter.annotation, key)
        elif name not in given and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise ConfigError(f"{key} is missing: it must be {wanted(parameter.annotation)}")
    return dict(settings) | given


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except NameError:  # a name that is imported for type checkers only: such a signature's types stay unchecked
        return inspect.signature(target).parameters
    named = {}
    for name, each in parameters.items():
        if get_origin(each.annotation) is Unpack:  # ``**options`` whose names and types a TypedDict gives, all optional
            for key, hint in get_type_hints(get_args(each.annotation)[0]).items():
                named[key] = each.replace(name=key, kind=each.KEYWORD_ONLY, default=None, annotation=hint)
        else:
            named[name] = each
    return named


def checked(value: Any, hint: Any, key: str) -> Any:
    """The value of a setting; a list becomes a tuple where the annotation asks for one.

    Raises:
        ConfigError: the value does not fit the annotation; names the key, the value and what works.
    """
    if not fits(value, hint):
        given = repr(value) if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)
        given = given if len(given) <= LONGEST_VALUE else f"{given[:LONGEST_VALUE]}..."
        verb = "choose" if any(get_origin(each) is Literal for each in _members(hint)) else "it must be"
        unquoted = ", without quotes" if isinstance(value, str) and _is_number(value, hint) else ""
        raise ConfigError(f"{key} is {given}: {verb} {wanted(hint)}{unquoted}")
    wants_tuple = any(get_origin(each) is tuple for each in _members(hint))
    return tuple(value) if wants_tuple and isinstance(value, list) else value


def between(value: float, least: float, most: float, key: str, otherwise: str = "") -> None:
    """Refuse a number outside [least, most].

    Args:
        otherwise: what else the message may say that works.

    Raises:
        ConfigError: names the key, the value and the range.
    """
    if not least <= value <= most:
        given = str(value) if -1e20 < value < 1e20 else "too large a number"
        raise ConfigError(f"{key} is {given}: it must be between {least:,} and {most:,}{otherwise}")


def _is_number(text: str, hint: Any) -> bool:
    """Whether text reads as a number that would fit."""
    for kind in (int, float):
        try:
            if fits(kind(text), hint):
                return True
        except ValueError:
            continue
    return False


def fits(value: Any, hint: Any) -> bool:
    """Whether plain data (of YAML) fits an annotation. An integer is a number; infinities and NaN are none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if hint is float:
        largest = sys.float_info.max  # an integer may be larger
        return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | Path)
    if hint in PLAIN:
        return isinstance(value, hint)
    if origin is tuple and ... not in arguments:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(fits(each, arguments[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(each, arguments[1]) for each in value.values())
    return True


def wanted(hint: Any) -> str:
    """What fits an annotation, in words."""
    *others, last = [choice for each in _members(hint) for choice in _choices(each)]
    return f"{', '.join(others)} or {last}" if others else last


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [each if isinstance(each, str) else json.dumps(each) for each in arguments]
    if origin is tuple and ... not in arguments:
        return [f"a list of {len(arguments)} ({', '.join(map(wanted, arguments))})"]
    if origin in (tuple, list, Sequence):
        return [f"a list (of each {wanted(arguments[0])})"]
    if origin in (dict, Mapping):
        return ["a mapping"]
    return [PLAIN.get(hint, "given")]


def nearest(asked: str, known: Sequence[str]) -> str:
    """`` Did you mean ...?``, or nothing if no other known name is close."""
    known = [each for each in known if each != asked]
    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    if not close:
        last = asked.rsplit(".", 1)[-1]
        ends = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [ends[end] for end in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.5)]
    return f" Did you mean {close[0]!r}?" if close else ""
