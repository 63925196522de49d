"""Which fields the files of a run have, and of what type: what a program that reads them may rely on."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

# A type, a mapping of fields (those that are there are checked; "*" stands for all others), or a pattern of texts.
Fields = Mapping[str, Any]

ANYTHING: Fields = MappingProxyType({})

COUNTS = {name: float for name in ("flops", "nfe", "backward", "images", "reward_calls", "optimizer_steps")}
LEDGER: Fields = {**COUNTS, "phases": {"*": COUNTS}}
VOLATILE: Fields = {"seconds": {"*": float}, "memory_mb": float, "micro_batch": int, "wasted_nfe": int}
METRICS: Fields = {
    "iteration": int,
    "optimizer_steps": int,
    "fraction": float,
    "ledger": LEDGER,
    "volatile": VOLATILE,
    "*": float,
}
EVALUATION: Fields = {
    "evaluation": int,
    "fraction": float,
    "iteration": int,
    "optimizer_steps": int,
    "protocol": str,
    "protocol_hash": str,
    "weights": str,
    "guidance": float,
    "prompts": int,
    "images": int,
    "metrics": {"*": float},
    "standard_errors": {"*": float},
    "cost": COUNTS,
    "scores": re.compile(r"scores/\w[\w.@+-]*\.json"),
    "grid": re.compile(r"images/\w[\w.@+-]*\.png"),
    "ledger": LEDGER,
    "volatile": VOLATILE,
}
RUN: Fields = {
    **dict.fromkeys(("experiment", "model", "method", "reward", "variant", "kind", "config_hash"), str),
    **dict.fromkeys(("protocol_hash", "final_protocol_hash"), str),
    **dict.fromkeys(("protocol", "final_protocol", "targets", "normalisation", "budget", "parameters"), ANYTHING),
    **dict.fromkeys(("git", "packages", "hardware"), ANYTHING),
    **dict.fromkeys(("seed", "threads", "processes"), int),
    "inputs": {"*": str},
}
STATUS: Fields = {
    "status": re.compile("running|done|failed|out_of_memory|interrupted"),
    "message": str,
    "fraction": float,
    "volatile": VOLATILE,
}
REQUIRED = {  # by the first word of a file's name
    "metrics": (METRICS, ("iteration",)),
    "evaluations": (EVALUATION, ("evaluation", "fraction", "protocol_hash", "weights", "guidance", "metrics")),
    "run": (RUN, ()),
    "status": (STATUS, ("status",)),
}
NULLABLE = ("scores", "grid", "kind", "reused_from")  # records are shared without some of their files

WORDS = {int: "a whole number", float: "a finite number", str: "text"}


def wrong(kind: str, row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row or file, in words; None if nothing is.

    Args:
        kind: ``"metrics"``, ``"evaluations"``, ``"run"`` or ``"status"``.
    """
    fields, required = REQUIRED[kind]
    missing = [name for name in required if name not in row]
    return f"it has no {missing[0]!r}" if missing else mismatch(row, fields)


def mismatch(value: object, wanted: Any, key: str = "") -> str | None:
    """Where a value is not of the wanted type or fields, in words."""
    if isinstance(wanted, Mapping):
        if not isinstance(value, Mapping):
            return f"{key or 'it'} is {_shown(value)}, expected an object"
        for name, each in value.items():
            own = wanted.get(name, wanted.get("*", Any))
            if (own in (int, float) and _is(each, own)) or (each is None and name in NULLABLE):
                continue  # most values: the report reads thousands of rows
            if told := mismatch(each, own, f"{key}.{name}" if key else str(name)):
                return told
        return None
    if isinstance(wanted, re.Pattern):
        fits = isinstance(value, str) and wanted.fullmatch(value) is not None
        return None if fits else f"{key} is {_shown(value)}, expected {wanted.pattern}"
    return None if wanted is Any or _is(value, wanted) else f"{key} is {_shown(value)}, expected {WORDS[wanted]}"


def wrong_cost(cost: object) -> str | None:
    """What is wrong with the cost of an evaluation, in words; None if nothing is."""
    names = set(COUNTS) - {"optimizer_steps"}
    if not isinstance(cost, Mapping) or set(cost) != names or not all(_is(each, int) for each in cost.values()):
        return f"cost is {_shown(cost)}, expected whole numbers of {', '.join(sorted(names))}"
    return None if min(cost.values()) >= 0 else f"cost is {_shown(cost)}, expected no negative numbers"


def _is(value: object, wanted: type) -> bool:
    if wanted is str:
        return isinstance(value, str)
    number = isinstance(value, int if wanted is int else int | float) and not isinstance(value, bool)
    try:
        return number and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float holds
        return wanted is int


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def wrong_scores(table: Mapping[str, Any], images: int) -> str | None:
    """What is wrong with a table of per-image scores, in words; None if nothing is.

    Args:
        images: how many it must have.
    """
    ids, tags, counts, metrics = (table.get(name, []) for name in ("prompt_ids", "tags", "images", "metrics"))
    if not (_all(ids, str) and _all(tags, str) and _all(counts, int) and isinstance(metrics, Mapping)):
        return "expected lists prompt_ids, tags and images, and metrics by name"
    if not len(ids) == len(tags) == len(counts) or min(counts, default=0) < 1 or sum(counts) != images:
        return f"{len(ids)} prompts, {len(tags)} tags and {sum(counts)} images, expected {images} images"
    grid = table.get("grid", [])
    if not isinstance(grid, list) or not all(
        isinstance(line, Mapping) and all(isinstance(line.get(name), str) for name in ("id", "prompt")) for line in grid
    ):
        return "grid is no list of prompts with an id"
    for name, values in metrics.items():
        if not _all(values, float) or len(values) != images:
            return f"metrics.{name} is no list of {images} finite numbers"
    return None


def tag_means(table: Mapping[str, Any]) -> dict[str, float]:
    """The mean over tags of each score of a table that ``wrong_scores`` finds nothing wrong with."""
    of_image = [tag for tag, count in zip(table["tags"], table["images"], strict=True) for _ in range(count)]
    means = {}
    for name, values in table["metrics"].items():
        by_tag: dict[str, list[float]] = {}
        for tag, value in zip(of_image, values, strict=True):
            by_tag.setdefault(tag, []).append(value)
        means[name] = sum(sum(each) / len(each) for each in by_tag.values()) / len(by_tag)
    return means


def _all(values: object, wanted: type) -> Any:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(_is(each, wanted) for each in values)
