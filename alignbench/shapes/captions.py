"""The captions of the embedded world: GenEval's grammar over four shapes and six colours, and the held-out split.

GenEval: Ghosh et al. 2023. A record is ``{"tag", "include", "exclude" (counting only), "prompt"}``; in a position
record the reference object comes first in ``include``. The world has 460 distinct records.

The split holds out *elements*, not captions: a colour-shape pair, a spatial relation of two shapes, or a pair of shapes
that is held out of reinforcement learning occurs in no training caption of any tag. "A left of B" and "B right of A"
are the same element, as are "A and B" and "B and A".
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any, Literal

import numpy as np

from alignbench.errors import ConfigError
from alignbench.prompts.prompt import Prompt
from alignbench.shapes.scenes import COLOURS, SHAPES

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {2: "two", 3: "three", 4: "four"}

CONTROL_WORDS: dict[str, tuple[str, ...]] = {
    "positive": ("sharp", "clean", "vivid"),
    "negative": ("blurred", "noisy", "faded"),
}
"""Words that may stand before a caption, as in "sharp. a photo of a circle"; words of the same place are opposites.

The negative ones name the degradations ``blur``, ``noise`` and ``fade`` of :mod:`alignbench.shapes.degrade`.
"""

HELD_OUT_COLOURED: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "triangle"),
        ("green", "cross"),
        ("blue", "circle"),
        ("yellow", "square"),
        ("purple", "triangle"),
        ("white", "circle"),
    }
)
"""Colour-shape pairs held out of training: 6 of 24, one of each colour."""

HELD_OUT_PAIRS: frozenset[frozenset[str]] = frozenset(
    {frozenset({"circle", "cross"}), frozenset({"square", "triangle"})}
)
"""Pairs of shapes held out of training: 2 of 6; every shape is still seen with two others."""

HELD_OUT_RELATIONS: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("circle", "left of", "square"),
        ("triangle", "above", "circle"),
        ("cross", "left of", "triangle"),
        ("square", "above", "cross"),
    }
)
"""Relations held out of training, with their mirror images: 1 of 4 for each of the pairs of shapes that are trained."""

_TUNING_SHARE = 6  # one in this many meanings of a tag's trainable captions goes to the tuning set
_TUNING_SEED = 20

Record = dict[str, Any]
Split = Literal["train", "tuning", "test", "all"]


# ------------------------------------------------------------------------------------------------ records


def single_object(shape: str) -> Record:
    return _record("single_object", [_clause(shape)])


def two_object(first: str, second: str) -> Record:
    return _record("two_object", [_clause(first), _clause(second)])


def counting(shape: str, count: int) -> Record:
    return _record("counting", [_clause(shape, count)], exclude=[_clause(shape, count + 1)])


def coloured(colour: str, shape: str) -> Record:
    return _record("colors", [_clause(shape, colour=colour)])


def position(shape: str, relation: str, reference: str) -> Record:
    return _record("position", [_clause(reference), _clause(shape) | {"position": [relation, 0]}])


def colour_attribution(first: tuple[str, str], second: tuple[str, str]) -> Record:
    """The record of two (colour, shape) pairs that differ in both."""
    return _record("color_attr", [_clause(shape, colour=colour) for colour, shape in (first, second)])


def records() -> list[Record]:
    """Every distinct record of the world, in a fixed order: by tag, then shapes, relations and colours as listed."""
    return list(_all_records())


def caption_of(record: Mapping[str, Any]) -> str:
    """The caption of a record in GenEval's grammar; it reads the clauses, not ``prompt``."""
    include = record["include"]
    if record["tag"] == "counting":
        return f"a photo of {COUNTS[include[0]['count']]} {_plural(include[0]['class'])}"
    if record["tag"] == "position":
        reference, thing = include
        return f"a photo of {_noun_phrase(thing)} {thing['position'][0]} {_noun_phrase(reference)}"
    return "a photo of " + " and ".join(_noun_phrase(clause) for clause in include)


def _all_records() -> Iterator[Record]:
    yield from (single_object(shape) for shape in SHAPES)
    yield from (two_object(a, b) for a, b in permutations(SHAPES, 2))
    yield from (counting(shape, count) for shape in SHAPES for count in COUNTS)
    yield from (coloured(colour, shape) for shape in SHAPES for colour in COLOURS)
    yield from (position(a, relation, b) for a, b in permutations(SHAPES, 2) for relation in RELATIONS)
    for a, b in permutations(SHAPES, 2):
        yield from (colour_attribution((first, a), (second, b)) for first, second in permutations(COLOURS, 2))


def _record(tag: str, include: list[Record], exclude: list[Record] | None = None) -> Record:
    record: Record = {"tag": tag, "include": include}
    if exclude is not None:
        record["exclude"] = exclude
    return record | {"prompt": caption_of(record)}


def _clause(shape: str, count: int = 1, colour: str | None = None) -> Record:
    clause: Record = {"class": shape, "count": count}
    return clause if colour is None else clause | {"color": colour}


def _noun_phrase(clause: Mapping[str, Any]) -> str:
    words = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


# ------------------------------------------------------------------------------------------------ split


def split(name: Split) -> list[Prompt]:
    """The prompts of a split, in a fixed order, with ids such as ``"shapes/test/0012"``.

    ``test`` has every caption with a held-out element, ``train`` those without, less ``tuning``, which is disjoint in
    meaning from both and for choosing settings. Single objects and counts have no held-out element and stand in all
    three. The metadata is the record with one more key, ``seen``: whether the caption is one of ``train``.

    Raises:
        ConfigError: unknown split.
    """
    if name not in ("train", "tuning", "test", "all"):
        raise ConfigError(f"expected the split train, tuning, test or all of the shapes captions, got {name!r}")
    members = [record for record in records() if name == "all" or name in _splits_of(record)]
    return [
        Prompt(f"shapes/{name}/{k:04d}", record["prompt"], record | {"seen": "train" in _splits_of(record)})
        for k, record in enumerate(members)
    ]


def held_out(record: Mapping[str, Any]) -> bool:
    """Whether a record has an element that is held out of training."""
    include = record["include"]
    if any((clause.get("color"), clause["class"]) in HELD_OUT_COLOURED for clause in include):
        return True
    if frozenset(clause["class"] for clause in include) in HELD_OUT_PAIRS:
        return True
    if record["tag"] != "position":
        return False
    reference, thing = include
    relation = thing["position"][0]
    return bool(
        {(thing["class"], relation, reference["class"]), (reference["class"], OPPOSITE[relation], thing["class"])}
        & HELD_OUT_RELATIONS
    )


def meaning(record: Mapping[str, Any]) -> frozenset[tuple[Any, ...]]:
    """What a record says, equal for captions that say the same ("A and B", "B and A"; "A above B", "B below A")."""
    include = record["include"]
    if record["tag"] != "position":
        return frozenset((clause["class"], clause["count"], clause.get("color")) for clause in include)
    reference, thing = include
    relation = thing["position"][0]
    return frozenset(
        {(thing["class"], relation, reference["class"]), (reference["class"], OPPOSITE[relation], thing["class"])}
    )


def _splits_of(record: Record) -> tuple[str, ...]:
    if record["tag"] in ("single_object", "counting"):
        return ("train", "tuning", "test")
    if held_out(record):
        return ("test",)
    return ("tuning",) if meaning(record) in _tuning_meanings() else ("train",)


@cache
def _tuning_meanings() -> frozenset[frozenset[tuple[Any, ...]]]:
    """One sixth of the meanings of each tag that may be trained, at least one, drawn with a fixed seed."""
    rng = np.random.default_rng(_TUNING_SEED)
    chosen: list[frozenset[tuple[Any, ...]]] = []
    for tag in ("two_object", "colors", "position", "color_attr"):
        trainable = [meaning(record) for record in records() if record["tag"] == tag and not held_out(record)]
        distinct = list(dict.fromkeys(trainable))
        picks = rng.choice(len(distinct), size=max(1, len(distinct) // _TUNING_SHARE), replace=False)
        chosen.extend(distinct[k] for k in picks)
    return frozenset(chosen)


# ------------------------------------------------------------------------------------------------ hard negatives


def near_miss(record: Mapping[str, Any], rng: np.random.Generator) -> Record:
    """A record of the same tag that differs in one shape, colour, count, relation or binding.

    It is false, officially and strictly, of every scene in which ``record`` is true and nothing else is there.
    Relations change into their opposite only, since "left of" and "above" can both be true.
    """
    candidates = _near_misses(record)
    return candidates[int(rng.integers(len(candidates)))]


def _near_misses(record: Mapping[str, Any]) -> list[Record]:
    tag, include = record["tag"], record["include"]
    shapes = [clause["class"] for clause in include]
    absent = _others(SHAPES, shapes)
    if tag == "single_object":
        return [single_object(shape) for shape in absent]
    if tag == "two_object":
        return [two_object(*pair) for pair in _with_one_replaced(shapes, absent)]
    if tag == "counting":
        counts = [counting(shapes[0], count) for count in COUNTS if count != include[0]["count"]]
        return counts + [counting(shape, include[0]["count"]) for shape in absent]
    colours = [clause.get("color") for clause in include]
    if tag == "colors":
        recoloured = [coloured(colour, shapes[0]) for colour in _others(COLOURS, colours)]
        return recoloured + [coloured(colours[0], shape) for shape in absent]
    if tag == "position":
        reference, thing = shapes
        relation = include[1]["position"][0]
        turned = [position(thing, OPPOSITE[relation], reference), position(reference, relation, thing)]
        return turned + [position(a, relation, b) for a, b in _with_one_replaced([thing, reference], absent)]
    swapped = [(colours[1], shapes[0]), (colours[0], shapes[1])]
    recolourings = _with_one_replaced(colours, _others(COLOURS, colours))
    replacements = _with_one_replaced(shapes, absent)
    return [
        colour_attribution(*swapped),
        *(colour_attribution((a, shapes[0]), (b, shapes[1])) for a, b in recolourings),
        *(colour_attribution((colours[0], a), (colours[1], b)) for a, b in replacements),
    ]


def _others(names: Sequence[str], used: Sequence[str]) -> list[str]:
    return [name for name in names if name not in used]


def _with_one_replaced(pair: Sequence[str], replacements: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs in which one of the two names is one of the replacements."""
    first, second = pair
    return [(name, second) for name in replacements] + [(first, name) for name in replacements]
