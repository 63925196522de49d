"""Rendered scenes through the detector, in the terms of the rules."""

import numpy as np
import pytest

from alignbench.rewards.geneval.detectors.shapes import DetectedScene, ShapesGenevalDetector
from alignbench.rewards.geneval.rules import relations
from alignbench.shapes.render import render
from alignbench.shapes.scenes import PALETTE, Object


@pytest.fixture(scope="module")
def detector() -> ShapesGenevalDetector:
    return ShapesGenevalDetector()


def detect(detector: ShapesGenevalDetector, *objects: Object) -> DetectedScene:
    (scene,) = detector.detect(render([objects]))
    return scene


def test_objects_become_detections_of_score_one(detector: ShapesGenevalDetector) -> None:
    scene = detect(detector, Object("circle", "red", 8, 9, 5), Object("square", "blue", 24, 22, 4))
    assert set(scene.found) == {"circle", "square"}
    (circle,), (square,) = scene.found["circle"], scene.found["square"]
    assert circle.class_name == "circle"
    assert circle.score == square.score == 1.0
    # Edges on whole pixels: the boxes are those of the scene.
    assert circle.box == pytest.approx((3, 4, 13, 14), abs=1)
    assert square.box == (20, 18, 28, 26)
    assert square.mask is not None
    expected = np.zeros((32, 32), dtype=bool)
    expected[18:26, 20:28] = True
    np.testing.assert_array_equal(square.mask, expected)
    assert relations(circle.box, square.box) == {"left of", "above"}
    assert scene.colour_of([circle]) == ["red"]
    assert scene.colour_of([square]) == ["blue"]
    assert (len(scene.objects), scene.invalid) == (2, 0)


def test_the_largest_comes_first(detector: ShapesGenevalDetector) -> None:
    small, large = Object("circle", "red", 7, 7, 4), Object("circle", "green", 24, 24, 6)
    scene = detect(detector, small, large)
    assert scene.colour_of(scene.found["circle"]) == ["green", "red"]


def test_equal_areas_go_from_the_top_left(detector: ShapesGenevalDetector) -> None:
    places = {"red": (24, 24), "green": (8, 24), "blue": (24, 8), "yellow": (8, 8)}
    scene = detect(detector, *(Object("square", colour, x, y, 4) for colour, (x, y) in places.items()))
    assert scene.colour_of(scene.found["square"]) == ["yellow", "blue", "green", "red"]


def test_colours_follow_the_order_asked_for(detector: ShapesGenevalDetector) -> None:
    scene = detect(detector, Object("cross", "white", 8, 8, 5), Object("cross", "purple", 24, 24, 5))
    crosses = scene.found["cross"]
    assert scene.colour_of(crosses) == scene.colour_of(crosses[::-1])[::-1]
    assert sorted(scene.colour_of(crosses)) == ["purple", "white"]


def test_a_blob_that_is_no_shape_is_invalid(detector: ShapesGenevalDetector) -> None:
    image = render([(Object("triangle", "yellow", 9, 9, 6),)])
    image[0, 26:28, 4:28] = PALETTE["blue"]  # a bar, 12 times as long as wide
    (scene,) = detector.detect(image)
    assert (list(scene.found), len(scene.objects), scene.invalid) == (["triangle"], 1, 1)


def test_images_stay_apart(detector: ShapesGenevalDetector) -> None:
    empty, full = detector.detect(render([(), (Object("circle", "red", 16, 16, 6),)]))
    assert (dict(empty.found), list(empty.objects), empty.invalid) == ({}, [], 0)
    assert full.colour_of(full.found["circle"]) == ["red"]


def test_other_images_are_refused(detector: ShapesGenevalDetector) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        detector.detect(np.zeros((1, 64, 64, 3), dtype=np.uint8))
