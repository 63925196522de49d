"""The command line before Hydra reads it: what Hydra would answer with a traceback, a pickle or no end is refused here.

A user's folder of configurations is looked at event by event, so that aliases are counted instead of expanded.
"""

import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from alignbench.configuration import CONF
from alignbench.errors import ConfigError

NEEDED = ("model", "method", "reward", "prompts", "evaluation", "budget")  # groups that no run can do without
GROUPS = tuple(sorted(path.name for path in CONF.iterdir() if path.is_dir()))
LARGEST_FILE = 2**20  # bytes; the largest of conf/ has 10,000
MOST_VALUES = 100_000  # of a file once its aliases are expanded
DEEPEST = 50  # levels of a file; conf/ has 6


def check(arguments: Sequence[str]) -> None:
    """Refuse a command line that Hydra cannot be given.

    Raises:
        ConfigError: ``--experimental-rerun``; a file of a folder of configurations that has no end, or is none; a value
            that must be quoted; a group without a choice.
    """
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if given.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun loads a pickle, which can run any code: give the settings on the command line, as "
            "config.yaml of the run has them"
        )
    for path in (path for folder in _folders(arguments) for path in files(folder)):
        if problem := endless(path):
            raise ConfigError(f"{path} {problem}")
    multirun = given.multirun or any(text.startswith("hydra.mode=") for text in given.overrides)
    check_overrides(given.overrides, multirun=multirun)


def check_overrides(overrides: Sequence[str], *, multirun: bool = False) -> None:
    """Refuse settings of a command line that cannot be read, or that leave a group without a choice.

    Raises:
        ConfigError: names the setting, and how it is written.
    """
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException as error:
            raise ConfigError(_unreadable(text, error)) from error
        if override.is_sweep_override() and not multirun:
            key, _, value = text.partition("=")
            raise ConfigError(
                f"{text} has several values. One text with commas is quoted: {quoted(text) or text}; a list stands in "
                f"brackets: {shlex.quote(f'{key}=[{value}]')}; -m runs every value"
            )
        _check_group(text, override)


def _check_group(text: str, override: Override) -> None:
    group = override.key_or_group
    if "/" not in group and group not in GROUPS:
        return
    names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
    known = f"; choose one of: {names}" if names else ""
    if override.is_delete():
        if group in NEEDED:
            raise ConfigError(f"{text}: a run needs a {group}{known}")
    elif not override.is_sweep_override() and not (isinstance(override.value(), str | list) and override.value()):
        raise ConfigError(f"{text}: {group} takes the name of a configuration{known}")


def _unreadable(text: str, error: HydraException) -> str:
    if "=" not in text:
        return f"{text!r} is no setting: write KEY=VALUE, or ~KEY to delete one"
    if (form := quoted(text)) is not None:
        return (
            f"{text} cannot be read: a value with any of = , : # [ ] {{ }} ( ) or quotes in it, or with letters beyond "
            f"ASCII, stands in quotes: {form}"
        )
    return f"{text} cannot be read ({str(error).splitlines()[0]}): write KEY=VALUE"


def quoted(text: str) -> str | None:
    """``key=value`` with the value in quotes, as one types it into a shell; None where the key is not one either."""
    key, _, value = text.partition("=")
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    form = f'{key}="{escaped}"'
    try:
        read = OverridesParser.create().parse_override(form)
    except HydraException:
        return None
    return shlex.quote(form) if read.value() == value else None


def files(folder: Path) -> Iterator[Path]:
    """Files of a folder of configurations that Hydra could read: those of the folder itself, and of known groups."""
    yield from sorted(folder.glob("*.yaml"))
    for group in (*GROUPS, "hydra"):
        yield from sorted((folder / group).rglob("*.yaml"))


def endless(path: Path) -> str | None:
    """What is wrong with a YAML file that must not even be read, as the end of a sentence; None if it may be.

    A file that is merely broken passes: it says nothing as long as no setting names it.
    """
    try:
        known = path.stat()
        if not stat.S_ISREG(known.st_mode):
            return None if path.is_dir() else "is no regular file: a configuration is a YAML file"
        if known.st_size > LARGEST_FILE:
            return f"has {known.st_size:,} bytes: a configuration has at most {LARGEST_FILE:,}"
        return _endless(yaml.parse(path.read_bytes(), Loader=yaml.SafeLoader))
    except (OSError, UnicodeError, yaml.YAMLError):
        return None


def _endless(events: Any) -> str | None:
    sizes: dict[str, int] = {}  # values below each anchor
    above: list[tuple[str | None, int]] = [(None, 0)]  # (anchor, values so far) of the nodes that are open
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, 1))
            if len(above) > DEEPEST:
                return f"is nested more than {DEEPEST} levels deep"
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = above.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [name for name, _ in above]:
                return f"refers to itself: *{event.anchor} stands inside &{event.anchor}"
            anchor, size = None, sizes.get(str(event.anchor), 0)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        above[-1] = above[-1][0], above[-1][1] + size
        if above[-1][1] > MOST_VALUES:
            return f"has more than {MOST_VALUES:,} values once its aliases are expanded"
    return None


def misread(error: yaml.YAMLError | UnicodeDecodeError, arguments: Sequence[str]) -> str | None:
    """Which configuration file an error of Hydra's is about, and what is wrong with it; None if it is about no file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, is no configuration: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.name} is no configuration: a YAML file is text, without the character {error.character!r}"
    for path in (path for folder in _folders(arguments) for path in files(folder)):
        with suppress(OSError):
            try:
                path.read_bytes().decode()
            except UnicodeDecodeError as there:
                return f"{path} is no configuration: a YAML file is text in UTF-8, and byte {there.start} is none"
    return None


def _folders(arguments: Sequence[str]) -> list[Path]:
    given, _ = get_args_parser().parse_known_args(list(arguments))
    return [Path(folder) for folder in (given.config_dir, given.config_path) if folder]
