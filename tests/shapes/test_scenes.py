"""Scenes hold what their record says, nothing else, apart from each other and inside the image."""

import itertools

import numpy as np
import pytest

from alignbench.shapes.captions import TAGS, counting, position, records, single_object
from alignbench.shapes.scenes import (
    BACKGROUND,
    COLOURS,
    GAP,
    MAX_RADIUS,
    MIN_RADIUS,
    PALETTE,
    SHAPES,
    SIZE,
    Object,
    random_scene,
    sample_scene,
)


def assert_well_formed(scene):
    for thing in scene:
        assert MIN_RADIUS <= thing.radius <= MAX_RADIUS
        assert thing.radius < thing.x < SIZE - thing.radius
        assert thing.radius < thing.y < SIZE - thing.radius
    for a, b in itertools.combinations(scene, 2):
        distance = max(abs(a.x - b.x), abs(a.y - b.y))
        assert distance >= a.radius + b.radius + GAP


@pytest.mark.parametrize("tag", TAGS)
def test_a_scene_has_exactly_the_objects_of_its_record(tag):
    rng = np.random.default_rng(0)
    for record in 2 * [record for record in records() if record["tag"] == tag]:
        scene = sample_scene(record, rng)
        assert_well_formed(scene)
        wanted = [clause for clause in record["include"] for _ in range(clause["count"])]
        assert [thing.shape for thing in scene] == [clause["class"] for clause in wanted]
        for thing, clause in zip(scene, wanted, strict=True):
            assert thing.colour == clause.get("color", thing.colour)


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1)]
)
def test_a_relation_holds_with_twice_the_threshold_of_geneval(relation, axis, sign):
    rng = np.random.default_rng(1)
    for _ in range(200):
        reference, thing = sample_scene(position("cross", relation, "circle"), rng)
        assert (thing.shape, reference.shape) == ("cross", "circle")
        offset = np.array([thing.x - reference.x, thing.y - reference.y])
        sizes = 2 * thing.radius + 2 * reference.radius
        assert (sign * offset[axis] - 0.2 * sizes) / np.hypot(*offset) > 0.5


def test_colours_that_the_record_leaves_open_are_uniform():
    rng = np.random.default_rng(2)
    drawn = [thing.colour for _ in range(1000) for thing in sample_scene(counting("square", 3), rng)]
    # 3,000 draws of probability 1/6: mean 500, standard deviation 20.4
    assert all(abs(drawn.count(colour) - 500) < 5 * 20.4 for colour in COLOURS)
    assert len({tuple(thing.colour for thing in sample_scene(counting("square", 2), rng)) for _ in range(500)}) == 36


def test_single_objects_use_all_sizes_and_places():
    rng = np.random.default_rng(3)
    scenes = [sample_scene(single_object("circle"), rng)[0] for _ in range(2000)]
    radius = np.array([thing.radius for thing in scenes])
    assert radius.mean() == pytest.approx(5.5, abs=5 * (3 / np.sqrt(12)) / np.sqrt(2000))
    assert radius.min() < 4.1
    assert radius.max() > 6.9
    # at a given radius x is uniform on (r + 0.5, 31.5 - r)
    place = [(thing.x - thing.radius - 0.5) / (31 - 2 * thing.radius) for thing in scenes]
    assert np.mean(place) == pytest.approx(0.5, abs=5 / np.sqrt(12 * 2000))


def test_four_objects_always_find_room():
    rng = np.random.default_rng(4)
    for _ in range(300):
        scene = sample_scene(counting("circle", 4), rng)
        assert len(scene) == 4
        assert_well_formed(scene)


def test_random_scenes_cover_the_world():
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng) for _ in range(1200)]
    for scene in scenes:
        assert_well_formed(scene)
    counts = np.bincount([len(scene) for scene in scenes], minlength=5)
    assert counts[0] == 0
    assert all(abs(counts[1:] - 300) < 5 * np.sqrt(1200 * 0.25 * 0.75))
    assert {(t.shape, t.colour) for scene in scenes for t in scene} == set(itertools.product(SHAPES, COLOURS))


def test_the_same_generator_state_gives_the_same_scene():
    for record in records()[::40]:
        assert sample_scene(record, np.random.default_rng(7)) == sample_scene(record, np.random.default_rng(7))
    assert random_scene(np.random.default_rng(8)) == random_scene(np.random.default_rng(8))


def test_box():
    assert Object("square", "red", 10.0, 20.5, 4.0).box == (6.0, 16.5, 14.0, 24.5)


def test_palette_directions_are_well_apart():
    """The detector tells colours by their direction from the background: at least 29 degrees between any two."""
    offsets = np.array([PALETTE[colour] for colour in COLOURS], dtype=float) - BACKGROUND
    unit = offsets / np.linalg.norm(offsets, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(COLOURS), 1)]
    assert np.degrees(np.arccos(cosines.max())) > 29
