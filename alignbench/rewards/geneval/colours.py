"""Naming the colour of a detected object: the interface of a classifier, and the crop it looks at."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignbench.rewards.geneval.rules import Box, Detection

BACKGROUND = 0x99
"""Grey level of everything outside an object's mask."""


class ColourClassifier(Protocol):
    """Names colours; with the image bound it is the ``ColourOf`` that the rules ask for."""

    def __call__(self, image: NDArray[np.uint8], detections: Sequence[Detection]) -> list[str]:
        """The colours of detections of one class in an image.

        Args:
            image: uint8 RGB [H, W, 3].
            detections: objects of one class in this image.

        Returns:
            A colour for each detection, in their order.
        """


def masked_crop(image: NDArray[np.uint8], box: Box, mask: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """An object alone: grey #999 outside its mask, cut to its box without a margin.

    Args:
        image: uint8 RGB [H, W, 3]; left unchanged.
        box: ``(x1, y1, x2, y2)`` in pixels, rounded to integers and clipped to the image.
        mask: bool [H, W]; None keeps everything in the box.

    Returns:
        uint8 RGB [h, w, 3].

    Raises:
        ValueError: no pixel lies in the box.
    """
    x1, y1, x2, y2 = (max(round(coordinate), 0) for coordinate in box)
    visible = image if mask is None else np.where(mask[..., None], image, np.uint8(BACKGROUND))
    crop = visible[y1:y2, x1:x2]
    if crop.size == 0:
        raise ValueError(f"expected a box with pixels of the {image.shape[1]} x {image.shape[0]} image, got {box}")
    return crop
