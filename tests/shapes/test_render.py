"""Pixels against hand-computed images and closed-form areas."""

import numpy as np
import pytest

from alignbench.shapes.render import coverage, half_width, render
from alignbench.shapes.scenes import BACKGROUND, COLOURS, PALETTE, SHAPES, Object, random_scene

AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 4 - 4 * 0.6**2}


def blend(colour, share):
    return np.rint(np.array(BACKGROUND) * (1 - share) + np.array(PALETTE[colour]) * share)


def test_an_aligned_square_has_sharp_edges():
    image = render([(Object("square", "green", 16.0, 12.0, 4.0),)])[0]
    expected = np.full((32, 32, 3), BACKGROUND)
    expected[8:16, 12:20] = PALETTE["green"]
    assert np.array_equal(image, expected)


def test_a_shifted_square_covers_its_border_pixels_in_part():
    image = render([(Object("square", "blue", 16.25, 12.5, 4.0),)])[0]
    assert np.array_equal(image[12, 12], blend("blue", 0.75))  # columns 12.25 to 20.25
    assert np.array_equal(image[12, 20], blend("blue", 0.25))
    assert np.array_equal(image[8, 16], blend("blue", 0.5))  # rows 8.5 to 16.5
    assert np.array_equal(image[16, 16], blend("blue", 0.5))
    assert np.array_equal(image[16, 20], blend("blue", 0.125))
    assert np.array_equal(image[12, 16], PALETTE["blue"])
    assert np.array_equal(image[12, 21], BACKGROUND)


def test_a_triangle_points_up():
    image = render([(Object("triangle", "white", 16.0, 16.0, 6.0),)])[0]
    # radius 6: rows 10 to 22, the width grows by one pixel a row; centre of row i (i + 0.5 - 10) from the apex
    share = (image[..., 0].astype(float) - BACKGROUND[0]) / (PALETTE["white"][0] - BACKGROUND[0])
    assert share[10:22].sum(axis=1) == pytest.approx(np.arange(12) + 0.5, abs=0.02)
    assert share.sum(axis=1)[[9, 22]] == pytest.approx([0, 0])


def test_a_cross_has_two_arms():
    image = render([(Object("cross", "red", 16.0, 16.0, 5.0),)])[0]
    lit = (image == PALETTE["red"]).all(axis=-1)
    expected = np.zeros((32, 32), dtype=bool)
    expected[11:21, 14:18] = True  # arms are 0.8 radii wide: 4 pixels
    expected[14:18, 11:21] = True
    assert np.array_equal(lit, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [4.0, 5.3, 7.0])
def test_coverage_sums_to_the_area_and_centres_on_the_shape(shape, radius):
    share = coverage(shape, np.float32([10.3]), np.float32([9.8]), np.float32([radius]), 20)[0].astype(np.float64)
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-5
    # rows are sampled: the top and the bottom edge are within an eighth of a pixel of their place
    assert share.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.02)
    centres = np.arange(20) + 0.5
    assert share.sum(axis=0) @ centres / share.sum() == pytest.approx(10.3, abs=0.02)
    below = radius / 3 if shape == "triangle" else 0.0  # a triangle's centroid is a third of its height above its base
    assert share.sum(axis=1) @ centres / share.sum() == pytest.approx(9.8 + below, abs=0.1)


def test_half_width_is_zero_outside_and_unknown_shapes_are_named():
    for shape in SHAPES:
        assert half_width(shape, np.float32([-1.01, 1.01])).tolist() == [0, 0]
    assert half_width("circle", np.float32([0.6])) == pytest.approx([0.8])
    with pytest.raises(ValueError, match="expected one of circle, square, triangle, cross, got 'star'"):
        half_width("star", np.float32([0.0]))


def test_an_image_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(150)]
    images = render(scenes)
    assert images.shape == (150, 32, 32, 3)
    assert images.dtype == np.uint8
    for k in (0, 63, 64, 149):
        assert np.array_equal(images[k], render([scenes[k]])[0])


def test_the_order_of_apart_objects_does_not_matter_and_later_ones_lie_on_top():
    rng = np.random.default_rng(1)
    scene = random_scene(rng)
    assert np.array_equal(render([scene]), render([scene[::-1]]))
    lower, upper = Object("square", "red", 16.0, 16.0, 6.0), Object("square", "white", 16.0, 16.0, 4.0)
    assert np.array_equal(render([(lower, upper)])[0, 16, 16], PALETTE["white"])
    assert np.array_equal(render([(upper, lower)])[0, 16, 16], PALETTE["red"])


def test_an_empty_scene_is_background_and_no_scenes_are_no_images():
    assert (render([()]) == BACKGROUND).all()
    assert render([]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_those_of_the_palette(colour):
    image = render([(Object("circle", colour, 16.0, 16.0, 7.0),)])[0]
    assert image[16, 16].tolist() == list(PALETTE[colour])


@pytest.mark.parametrize("thing", [Object("circle", "red", 16.0, 16.0, 7.5), Object("circle", "red", 33.0, 16.0, 5.0)])
def test_objects_that_do_not_fit_are_refused(thing):
    with pytest.raises(ValueError, match=r"expected radii up to 7.0 and centres in \[0, 32\]"):
        render([(thing,)])
