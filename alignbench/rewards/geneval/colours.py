"""Naming the colour of a detected object: the interface of a classifier, the crop it looks at, and CLIP as one."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from alignbench.rewards.clip import OpenClip
from alignbench.rewards.geneval.rules import Box, Detection
from alignbench.rewards.geneval.suite import COLOURS

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


TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
"""What a colour of an object is called; always "a", never "an"."""


class ClipColours:
    """The benchmark's classifier on photographs: the colour whose texts are most similar to the masked crop.

    A colour of a class is the mean direction of its three texts; there is no threshold and no answer "none of them".

    Args:
        clip: the benchmark's own is ``ViT-L-14-quickgelu`` with the weights ``openai``.
    """

    def __init__(self, clip: OpenClip) -> None:
        self._clip = clip
        self._classifiers: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], detections: Sequence[Detection]) -> list[str]:
        """See `ColourClassifier`."""
        if not detections:
            return []
        crops = [masked_crop(image, detection.box, detection.mask) for detection in detections]
        with torch.autocast(self._clip.device.type, enabled=False):
            classifier = self.classifier(detections[0].class_name)
            similarities = self._clip.embed_pictures(crops) @ classifier.T
        return [COLOURS[index] for index in similarities.argmax(dim=1).tolist()]

    @torch.no_grad()
    def classifier(self, name: str) -> Tensor:
        """Unit vectors ``[colours, features]`` of a class, kept once they are made."""
        if name not in self._classifiers:
            with torch.autocast(self._clip.device.type, enabled=False):
                texts = [
                    [self._clip.embed_text(template.format(colour=colour, name=name)) for template in TEMPLATES]
                    for colour in COLOURS
                ]
            means = torch.stack([torch.stack(directions).mean(dim=0) for directions in texts])
            self._classifiers[name] = functional.normalize(means, dim=-1)
        return self._classifiers[name]
