"""What files say of a prompt: its text, and the GenEval record or whatever else stands beside it.

One schema for all of them: prompt files, GenEval's own files, indices and folders of images.

A GenEval record has ``include``, a list of clauses that must all hold, and may have ``exclude``, clauses none of which
may hold, and a ``tag``. A clause is ``{"class": name, "count": n}`` with n of 1 or more; in ``include`` it may have a
``color``, and a ``position``, ``[relation, k]``, relative to the objects of the earlier clause k, counted from 0. null
is as good as nothing for all but ``class`` and ``count``. Which classes and colours there are is for the reward to say.
"""

from collections.abc import Mapping
from typing import Any

from alignbench.errors import DataError
from alignbench.outside import shown

LONGEST_PROMPT = 2_000  # characters; the longest text encoders read 512 tokens
RELATIONS = ("left of", "right of", "above", "below")
CLAUSE = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}


def read(value: object, where: str) -> tuple[str, dict[str, Any]]:
    """The text of a prompt, stripped, and its metadata: the record as it came, without what is null in it.

    Metadata of a text alone is empty.

    Args:
        value: JSON data.
        where: file and line, for the messages.

    Raises:
        DataError: no object with a text of 1 to ``LONGEST_PROMPT`` characters under ``prompt``, or a GenEval record
            that the schema refuses; prompt and clause are named.
    """
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
        raise DataError(f'{where}: expected an object with a non-empty "prompt", got {shown(value)}')
    text = value["prompt"].strip()
    if len(text) > LONGEST_PROMPT:
        raise DataError(f"{where}: the prompt has {len(text)} characters; at most {LONGEST_PROMPT} are accepted")
    record = {key: item for key, item in value.items() if item is not None or key not in ("tag", "include", "exclude")}
    if set(record) == {"prompt"}:
        return text, {}
    try:
        return text, record | {"prompt": text} | _checked(record)
    except _Fault as fault:
        raise DataError(f"{where}: the GenEval record of {text!r}: {fault}") from fault


class _Fault(ValueError):
    """What is wrong with a record."""


def _checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The clauses of a record; empty for metadata of another kind."""
    if "tag" in record and not (isinstance(record["tag"], str) and record["tag"].strip()):
        raise _Fault(f'expected a non-empty text under "tag", got {shown(record["tag"])}')
    if "exclude" in record and "include" not in record:
        raise _Fault('"exclude" stands beside "include", which is missing')
    found: dict[str, Any] = {}
    for key in CLAUSE:
        if key not in record:
            continue
        clauses = record[key]
        if not isinstance(clauses, list) or (key == "include" and not clauses):
            raise _Fault(
                f'expected a list of clauses such as [{{"class": "dog", "count": 1}}] under "{key}", got '
                f"{shown(clauses)}"
            )
        found[key] = [_clause(clause, key, place) for place, clause in enumerate(clauses)]
    return found


def _clause(clause: object, key: str, place: int) -> dict[str, Any]:
    where = f"{key}[{place}]"
    if not isinstance(clause, dict):
        raise _Fault(f'{where}: expected an object such as {{"class": "dog", "count": 1}}, got {shown(clause)}')
    foreign = [name for name in clause if name not in CLAUSE[key]]
    if foreign:
        raise _Fault(f"{where}: has {shown(foreign[0])}; a clause of {key} has {', '.join(CLAUSE[key])}")
    if not isinstance(clause.get("class"), str) or not clause["class"]:
        raise _Fault(f'{where}: expected the name of an object under "class", got {_value(clause, "class")}')
    if type(clause.get("count")) is not int or clause["count"] < 1:
        raise _Fault(f'{where}: expected a whole number of 1 or more under "count", got {_value(clause, "count")}')
    clause = {name: value for name, value in clause.items() if value is not None}
    if not isinstance(clause.get("color", ""), str):
        raise _Fault(f'{where}: expected the name of a colour under "color", got {_value(clause, "color")}')
    if "position" in clause:
        match clause["position"]:
            case [str(relation), int(reference)] if (
                relation in RELATIONS and type(reference) is int and 0 <= reference < place
            ):
                pass
            case other:
                raise _Fault(
                    f"{where}: expected a position [relation, k] with a relation of {', '.join(RELATIONS)} and k the "
                    f"index of an earlier clause, got {shown(other)}"
                )
    return clause


def _value(clause: Mapping[str, Any], key: str) -> str:
    return shown(clause[key]) if key in clause else "nothing"
