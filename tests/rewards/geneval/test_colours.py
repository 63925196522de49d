"""The crop that a colour classifier looks at."""

import numpy as np
import pytest

from alignbench.rewards.geneval.colours import masked_crop

# Every pixel tells its place: red = x, green = y.
IMAGE = np.stack([*np.meshgrid(np.arange(8), np.arange(6)), np.full((6, 8), 7)], axis=-1).astype(np.uint8)
GREY = [153, 153, 153]


def test_without_a_mask_the_box_is_cut_out() -> None:
    crop = masked_crop(IMAGE, (2, 1, 5, 3), None)
    assert crop.shape == (2, 3, 3)
    assert crop.dtype == np.uint8
    assert crop[0, 0].tolist() == [2, 1, 7]
    assert crop[-1, -1].tolist() == [4, 2, 7]


def test_everything_outside_the_mask_is_grey() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[1, 2] = mask[2, 3] = True
    before = IMAGE.copy()
    crop = masked_crop(IMAGE, (2, 1, 4, 3), mask)
    assert crop.tolist() == [[[2, 1, 7], GREY], [GREY, [3, 2, 7]]]
    np.testing.assert_array_equal(IMAGE, before)


@pytest.mark.parametrize(
    ("box", "corner", "shape"),
    [
        ((1.4, 0.6, 3.6, 2.4), [1, 1, 7], (1, 3, 3)),  # 1, 1, 4, 2
        ((-3.0, -1.0, 2.0, 2.0), [0, 0, 7], (2, 2, 3)),
        ((6.0, 4.0, 20.0, 9.0), [6, 4, 7], (2, 2, 3)),
    ],
)
def test_the_box_is_rounded_and_clipped(
    box: tuple[float, float, float, float], corner: list[int], shape: tuple[int, int, int]
) -> None:
    crop = masked_crop(IMAGE, box, None)
    assert crop.shape == shape
    assert crop[0, 0].tolist() == corner


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (9, 0, 12, 4), (3, 3, 3.4, 5), (-5, 0, -2, 4)])
def test_a_box_without_pixels_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="pixels of the 8 x 6 image"):
        masked_crop(IMAGE, box, None)
