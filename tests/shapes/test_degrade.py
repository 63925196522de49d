import numpy as np
import pytest
from numpy.typing import NDArray

from alignbench.shapes.captions import CONTROL_WORDS
from alignbench.shapes.degrade import DEGRADATIONS, WORDS, blur, chip, degrade, fade, noise, tint, warp
from alignbench.shapes.render import render
from alignbench.shapes.scenes import BACKGROUND, Object

SQUARE = (Object("square", "white", 16.0, 16.0, 6.0),)
STRENGTHS = np.array([0.0, 1.0], dtype=np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def squares(count: int) -> NDArray[np.float32]:
    return render([SQUARE] * count).astype(np.float32) / 255


def test_blur_of_a_point_is_the_gaussian() -> None:
    point = np.zeros((2, 33, 33, 3), dtype=np.float32)
    point[:, 16, 16] = 1
    blurred = blur(point, STRENGTHS, rng())
    for image, sigma in zip(blurred, (0.9, 2.0), strict=True):
        y, x = np.mgrid[-16:17, -16:17]
        expected = np.exp(-(x**2 + y**2) / (2 * sigma**2))
        assert np.allclose(image[..., 1], expected / expected.sum(), atol=1e-6)


def test_blur_leaves_a_flat_image_alone() -> None:
    flat = np.full((2, 32, 32, 3), 0.3, dtype=np.float32)
    assert np.allclose(blur(flat, STRENGTHS, rng()), flat, atol=1e-6)


def test_noise_has_the_stated_deviation() -> None:
    flat = np.full((2, 256, 256, 3), 0.5, dtype=np.float32)
    difference = noise(flat, STRENGTHS, rng()) - flat
    # The standard error of a deviation from 196,608 numbers is 0.16 percent.
    assert difference.std(axis=(1, 2, 3)) == pytest.approx([0.08, 0.25], rel=0.01)
    assert abs(difference.mean()) < 0.003


def test_tint_mixes_one_saturated_colour_into_every_pixel() -> None:
    images = squares(2)
    tinted = tint(images, STRENGTHS, rng())
    for image, result, opacity in zip(images, tinted, (0.15, 0.40), strict=True):
        colour = (result - (1 - opacity) * image) / opacity
        assert np.allclose(colour, colour[0, 0], atol=1e-5)
        assert colour[0, 0].min() == pytest.approx(0, abs=1e-5)
        assert colour[0, 0].max() == pytest.approx(1, abs=1e-5)


def test_fade_scales_contrast_and_keeps_the_mean() -> None:
    images = squares(2)
    faded = fade(images, STRENGTHS, rng())
    assert np.allclose(faded.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=1e-5)
    assert faded.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3)) == pytest.approx([0.6, 0.25], rel=1e-4)


def test_chip_takes_a_part_of_an_object_and_nothing_else() -> None:
    images = squares(200)
    chipped = chip(images, rng().random(200, dtype=np.float32), rng())
    changed = (chipped != images).any(axis=-1)
    background = np.array(BACKGROUND, dtype=np.float32) / 255
    assert np.allclose(chipped[changed], background)
    assert changed.any(axis=(1, 2)).all()
    assert changed.sum(axis=(1, 2)).max() <= 64  # an 8 x 8 square, of the object's 144 pixels
    assert max((np.ptp(np.argwhere(image), axis=0) + 1).max() for image in changed) <= 8


def test_chip_leaves_an_empty_image_alone() -> None:
    empty = np.full((1, 32, 32, 3), BACKGROUND, dtype=np.float32) / 255
    assert np.array_equal(chip(empty, STRENGTHS[1:], rng()), empty)


def test_warp_moves_pixels_by_no_more_than_its_amplitude() -> None:
    column, row = np.meshgrid(np.arange(32, dtype=np.float32), np.arange(32, dtype=np.float32))
    # A picture whose values are its own coordinates shows after warping from where each pixel was taken.
    coordinates = np.stack([row, column, np.zeros_like(row)], axis=-1)[None] / 31
    moved = np.abs(warp(np.repeat(coordinates, 2, axis=0), STRENGTHS, rng()) - coordinates)[..., :2] * 31
    assert moved[0].max() == pytest.approx(0.7, abs=0.02)
    assert moved[1].max() == pytest.approx(1.5, abs=0.04)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_every_degradation_is_visible_and_leaves_its_input_alone(name: str) -> None:
    images = render([SQUARE] * 20)
    before = images.copy()
    result = degrade(images, [name] * 20, rng())
    assert result.dtype == np.uint8
    assert result.shape == images.shape
    assert np.array_equal(images, before)
    largest = np.abs(result.astype(int) - images).max(axis=(1, 2, 3))
    assert largest.min() > 20  # grey levels


def test_each_image_gets_its_own_degradation_and_the_seed_decides() -> None:
    images = render([SQUARE] * 4)
    names = ["chip", "noise", "chip", "blur"]
    result = degrade(images, names, rng())
    assert np.array_equal(result, degrade(images, names, rng()))
    changed = (result != images).any(axis=-1).mean(axis=(1, 2))
    assert changed[0] < 0.1
    assert changed[1] > 0.9
    assert changed[2] < 0.1
    assert 0.05 < changed[3] < 0.9


def test_the_number_of_names_must_match() -> None:
    with pytest.raises(ValueError, match="4 images and 3 names"):
        degrade(render([SQUARE] * 4), ["blur"] * 3, rng())


def test_every_negative_control_word_has_a_degradation() -> None:
    assert sorted(WORDS.values()) == sorted(CONTROL_WORDS["negative"])
    assert set(WORDS) <= set(DEGRADATIONS)
