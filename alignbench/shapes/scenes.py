"""What a scene of the embedded world holds, and how scenes are drawn at random.

A scene is one to four objects on a dark background. Their bounding boxes are apart by at least ``GAP`` pixels, so that
connected components never merge, and at least ``MARGIN`` pixels from the border.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.rewards.geneval.rules import POSITION_THRESHOLD, relations

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PALETTE = {
    "red": (224, 40, 40),
    "green": (32, 192, 72),
    "blue": (40, 80, 230),
    "yellow": (240, 214, 34),
    "purple": (180, 50, 210),
    "white": (240, 240, 240),
}
BACKGROUND = (24, 24, 24)

MAX_OBJECTS = 4
MIN_RADIUS, MAX_RADIUS = 4.0, 7.0
GAP = 2.0  # pixels between bounding boxes: wider than the soft edges of two neighbours together
MARGIN = 0.5  # pixels between a bounding box and the border of the image

_TRIES = 8  # draws of a layout before the largest allowed radius is reduced
_SHRINK = 0.5  # pixels by which it is reduced


@dataclass(frozen=True)
class Object:
    """One object. ``x`` and ``y`` are the centre of its bounding box, ``radius`` half the box's side, all in pixels.

    Pixel ``i`` covers the interval ``[i, i + 1]``; y points down.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box ``(x1, y1, x2, y2)``."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


Scene = tuple[Object, ...]
Layout = list[tuple[float, float, float]]  # x, y, radius


def sample_scene(record: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """Draws a scene of which a GenEval record is true, strictly, and in which nothing else is.

    Attributes that the record leaves open (colours, places, sizes) are uniform. A position holds with a margin: the
    offset is shrunk by twice the threshold of GenEval, so that the relation survives a soft edge. The order of the
    objects is that of the record's clauses.
    """
    objects: list[tuple[str, str]] = []
    demands: list[tuple[int, str, int]] = []
    for clause in record["include"]:
        if "position" in clause:
            relation, reference = clause["position"]
            demands.append((len(objects), relation, reference))  # clauses with a position have one object each
        for _ in range(clause["count"]):
            objects.append((clause["class"], clause["color"] if "color" in clause else _random_colour(rng)))

    def holds(layout: Layout) -> bool:
        return all(_has_relation(layout[a], relation, layout[b]) for a, relation, b in demands)

    return _compose(objects, _draw_layout(len(objects), rng, holds))


def random_scene(rng: np.random.Generator) -> Scene:
    """Draws one to four objects of arbitrary shapes and colours."""
    count = int(rng.integers(1, MAX_OBJECTS, endpoint=True))
    objects = [(SHAPES[int(rng.integers(len(SHAPES)))], _random_colour(rng)) for _ in range(count)]
    return _compose(objects, _draw_layout(count, rng, lambda layout: True))


def _compose(objects: list[tuple[str, str]], layout: Layout) -> Scene:
    return tuple(Object(shape, colour, *place) for (shape, colour), place in zip(objects, layout, strict=True))


def _random_colour(rng: np.random.Generator) -> str:
    return COLOURS[int(rng.integers(len(COLOURS)))]


def _draw_layout(count: int, rng: np.random.Generator, accept: Callable[[Layout], bool]) -> Layout:
    """Draws layouts until one has no overlap and is accepted.

    The largest radius shrinks with the draws down to the smallest; there, four objects fit in about one draw of eight
    and two are in a given relation in about one of five, so that this ends.
    """
    largest = MAX_RADIUS
    while True:
        for _ in range(_TRIES):
            layout = _draw_places(rng.random(3 * count).tolist(), largest)
            if _are_apart(layout) and accept(layout):
                return layout
        largest = max(MIN_RADIUS, largest - _SHRINK)


def _draw_places(uniform: list[float], largest: float) -> Layout:
    """Maps three uniform numbers an object to its place, fully inside the image."""
    layout = []
    for k in range(0, len(uniform), 3):
        radius = MIN_RADIUS + uniform[k] * (largest - MIN_RADIUS)
        free = SIZE - 2 * (MARGIN + radius)
        layout.append((MARGIN + radius + uniform[k + 1] * free, MARGIN + radius + uniform[k + 2] * free, radius))
    return layout


def _are_apart(layout: Layout) -> bool:
    for k, (x, y, radius) in enumerate(layout):
        for other_x, other_y, other_radius in layout[:k]:
            if max(abs(x - other_x), abs(y - other_y)) < radius + other_radius + GAP:
                return False
    return True


def _has_relation(a: tuple[float, float, float], relation: str, b: tuple[float, float, float]) -> bool:
    box_a, box_b = ((x - radius, y - radius, x + radius, y + radius) for x, y, radius in (a, b))
    return relation in relations(box_a, box_b, position_threshold=2 * POSITION_THRESHOLD)
