"""The embedded world's detector in the terms of GenEval: every accepted shape is a detection of score 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignbench.rewards.geneval.rules import Detection, Found, keep_detections
from alignbench.shapes.detector import FoundObject, ShapesDetector


@dataclass(frozen=True)
class DetectedScene:
    """Everything that one detection pass says about one image.

    Attributes:
        found: kept detections by shape, largest first, then from the top left.
        colours: the palette colour of every detection in ``found``.
        objects: the accepted objects, in the same order but over all shapes.
        invalid: number of blobs that are no object of the world.
    """

    found: Found
    colours: Mapping[Detection, str]
    objects: Sequence[FoundObject]
    invalid: int

    def colour_of(self, detections: Sequence[Detection]) -> list[str]:
        """The palette colours of detections of this image."""
        return [self.colours[detection] for detection in detections]


class ShapesGenevalDetector:
    """Finds the shapes of the embedded world for the rules of GenEval.

    All scores are 1, so the thresholds of the rules never act and detection needs no prompt.
    """

    def __init__(self) -> None:
        self._detector = ShapesDetector()

    def detect(self, images: NDArray[np.uint8]) -> list[DetectedScene]:
        """The objects of every image.

        Args:
            images: uint8 RGB [n, 32, 32, 3].

        Raises:
            ValueError: the images have another shape or type.
        """
        objects, invalid = self._detector.survey(images)
        return [_detected_scene(*scene) for scene in zip(objects, invalid, strict=True)]


def _detected_scene(objects: Sequence[FoundObject], invalid: int) -> DetectedScene:
    colours = {Detection(thing.shape, thing.box, 1.0, thing.mask): thing.colour for thing in objects}
    return DetectedScene(keep_detections(colours), colours, objects, invalid)
