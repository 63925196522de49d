"""What the generator is trained on: captions, the scenes they are shown with, and how often these are wrong on purpose.

A caption is drawn by the weight of its tag, a scene from the caption's record, and a stated share of the scenes is
drawn from a *wrong* record instead. `Corruption` holds the shares; all zero is the capacity check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignbench.shapes.captions import (
    COUNTS,
    RELATIONS,
    Record,
    colour_attribution,
    coloured,
    counting,
    position,
    records,
    single_object,
    two_object,
)
from alignbench.shapes.scenes import COLOURS, SHAPES, Scene, sample_scene

TAG_WEIGHTS: dict[str, float] = {
    "single_object": 1.0,
    "two_object": 2.0,
    "counting": 2.0,
    "colors": 1.5,
    "position": 4.0,
    "color_attr": 4.0,
}
"""How often a tag's captions are drawn: the harder the binding, the more often."""


@dataclass(frozen=True)
class Corruption:
    """Probabilities, in [0, 1], that an image shows something else than its caption. They act one after the other.

    Attributes:
        mismatch: a scene of an unrelated caption (then nothing below acts).
        shape: one of the named shapes is another one.
        colour: one of the named colours is another one.
        missing: one of two named objects is not there.
        count: another number of objects than the one named.
        relation: another relation than the one named.
        swap: the two colours of an attribution are exchanged.
        extra: one object that nobody named is there too.
        binding: factor on all rates for the captions that bind an attribute or a place to one of two objects
            (position, color_attr): they are hard enough without.
    """

    mismatch: float = 0.0
    shape: float = 0.0
    colour: float = 0.0
    missing: float = 0.0
    count: float = 0.0
    relation: float = 0.0
    swap: float = 0.0
    extra: float = 0.0
    binding: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"expected a probability for {field.name}, got {getattr(self, field.name)}")

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def of_tag(self, tag: str) -> "Corruption":
        """The rates for captions of one tag."""
        if tag not in ("position", "color_attr"):
            return self
        rates = self.as_dict()
        factor = rates.pop("binding")
        return Corruption(**{name: factor * rate for name, rate in rates.items()})


def depicted(record: Mapping[str, Any], corruption: Corruption, rng: np.random.Generator) -> Record:
    """The record whose scene is shown under the caption of ``record``: often, but not always, the record itself."""
    corruption = corruption.of_tag(record["tag"])
    if rng.random() < corruption.mismatch:
        return draw_record(rng)
    shapes = [clause["class"] for clause in record["include"]]
    colours = [clause.get("color") for clause in record["include"]]
    tag = record["tag"]
    if rng.random() < corruption.shape:
        shapes = _with_another(shapes, SHAPES, rng)
    if tag == "counting":
        count = record["include"][0]["count"]
        if rng.random() < corruption.count:
            count = _other((1, *COUNTS), [count], rng)
        return single_object(shapes[0]) if count == 1 else counting(shapes[0], count)
    if colours[0] is not None and rng.random() < corruption.colour:
        colours = _with_another(colours, COLOURS, rng)
    if len(shapes) == 2 and rng.random() < corruption.missing:
        kept = int(rng.integers(2))
        shapes, colours = [shapes[kept]], [colours[kept]]
    if len(shapes) == 1:
        return single_object(shapes[0]) if colours[0] is None else coloured(colours[0], shapes[0])
    if tag == "position":
        relation = record["include"][1]["position"][0]
        if rng.random() < corruption.relation:
            relation = _other(RELATIONS, [relation], rng)
        return position(shapes[1], relation, shapes[0])
    if tag == "color_attr":
        if rng.random() < corruption.swap:
            colours = colours[::-1]
        return colour_attribution((colours[0], shapes[0]), (colours[1], shapes[1]))
    return two_object(*shapes)


def draw_record(rng: np.random.Generator, weights: Mapping[str, float] = TAG_WEIGHTS) -> Record:
    """A record of the world: its tag by weight, then uniform."""
    tags, shares, members = _record_table(tuple(weights.items()))
    of_tag = members[tags[int(np.searchsorted(shares, rng.random(), side="right"))]]
    return of_tag[int(rng.integers(len(of_tag)))]


def depicted_scene(record: Mapping[str, Any], corruption: Corruption, rng: np.random.Generator) -> Scene:
    """A scene to show under the caption of ``record``."""
    shown = depicted(record, corruption, rng)
    if rng.random() >= corruption.of_tag(record["tag"]).extra:
        return sample_scene(shown, rng)
    return with_extra_object(shown, rng)


def with_extra_object(record: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """A scene of ``record`` with one object more, of another shape; a record of four objects stays as it is."""
    named = [clause["class"] for clause in record["include"]]
    if sum(clause["count"] for clause in record["include"]) == 4:
        return sample_scene(record, rng)
    extra = {"class": _other(SHAPES, named, rng), "count": 1}
    return sample_scene({**record, "include": [*record["include"], extra]}, rng)


@cache
def _record_table(
    weights: tuple[tuple[str, float], ...],
) -> tuple[tuple[str, ...], NDArray[np.float64], dict[str, list[Record]]]:
    tags = tuple(tag for tag, _ in weights)
    shares = np.cumsum([weight for _, weight in weights]) / sum(weight for _, weight in weights)
    return tags, shares[:-1], {tag: [record for record in records() if record["tag"] == tag] for tag in tags}


def _other(names: Sequence[Any], used: Sequence[Any], rng: np.random.Generator) -> Any:
    free = [name for name in names if name not in used]
    return free[int(rng.integers(len(free)))]


def _with_another(names: Sequence[Any], choice: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    """The names with one of them replaced by an unused one."""
    changed = list(names)
    changed[int(rng.integers(len(names)))] = _other(choice, names, rng)
    return changed
