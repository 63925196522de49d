"""GenEval on photographs: Mask2Former finds the objects, CLIP names their colours, the shared rules decide.

The detector's weights are not those of the official scorer, so every number is called ``geneval_hf``;
``python -m alignbench.rewards.geneval.calibrate`` measures how far the two agree on the same images.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.clip import OpenClip
from alignbench.rewards.geneval.colours import ClipColours
from alignbench.rewards.geneval.detectors.mask2former import Mask2FormerDetector
from alignbench.rewards.geneval.reward import REWARDS, Mode
from alignbench.rewards.geneval.rules import (
    COUNTING_THRESHOLD,
    MAX_OBJECTS,
    THRESHOLD,
    ColourOf,
    Found,
    Record,
    keep_detections,
    official,
    soft,
    soft_released,
    strict,
)
from alignbench.rewards.geneval.suite import COLOURS, OBJECTS
from alignbench.rewards.reward import Reward, as_shown

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP, CLIP_WEIGHTS = "ViT-L-14-quickgelu", "openai"

PHOTO_SCORES = ("geneval_hf", "geneval_hf_strict", "geneval_hf_soft", "objects_per_image")
"""The scores of a detection pass; ``geneval_hf`` is the official decision, whatever rule is trained on."""

RULES: dict[str, Callable[[Record, Found, ColourOf], float]] = {
    "geneval_hf": lambda record, found, colour_of: float(official(record, found, colour_of).correct),
    "geneval_hf_strict": strict,
    "geneval_hf_soft": soft,
    "geneval_hf_soft_released": soft_released,
    "objects_per_image": lambda record, found, colour_of: float(sum(map(len, found.values()))),
}
"""Each score from a record, the detections and the colours."""


class PhotoJudge:
    """What is in photographs, in the terms of the rules.

    Args:
        detector: folder or hub id of a Mask2Former for COCO instances.
        clip: the open_clip model that names colours.
        clip_weights: its weights; see `OpenClip`.
        threshold: confidence that a detection must exceed.
        counting_threshold: the same for prompts that count.
        max_objects: how many detections of a class are kept.
        max_overlap: IoU at which a worse detection of the same class is dropped; 1 keeps all.
        device: where both models live.

    Raises:
        ConfigError: a value is out of range, or open_clip is not installed.
        CheckpointError: weights that cannot be used.
    """

    def __init__(
        self,
        detector: str = DETECTOR,
        clip: str = CLIP,
        clip_weights: str | None = CLIP_WEIGHTS,
        *,
        threshold: float = THRESHOLD,
        counting_threshold: float = COUNTING_THRESHOLD,
        max_objects: int = MAX_OBJECTS,
        max_overlap: float = 1.0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (
            ("threshold", threshold),
            ("counting_threshold", counting_threshold),
            ("max_overlap", max_overlap),
        ):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}: it must be in [0, 1]")
        if max_objects < 1:
            raise ConfigError(f"max_objects is {max_objects}: it must be 1 or more")
        self._threshold = threshold
        self._counting_threshold = counting_threshold
        self._max_objects = max_objects
        self._max_overlap = max_overlap
        self._detector = Mask2FormerDetector(detector, device)
        self.colours = ClipColours(OpenClip(clip, clip_weights, device))

    def find(self, images: NDArray[np.uint8], records: Sequence[Record]) -> list[Found]:
        """The detections that count for each image's prompt.

        Args:
            images: uint8 RGB [n, H, W, 3].
            records: one per image; counting has a threshold of its own.
        """
        thresholds = [
            self._counting_threshold if record["tag"] == "counting" else self._threshold for record in records
        ]
        candidates = self._detector.detect(images, min(thresholds, default=self._threshold))
        return [
            keep_detections(found, threshold=each, max_objects=self._max_objects, max_overlap=self._max_overlap)
            for found, each in zip(candidates, thresholds, strict=True)
        ]

    def colour_of(self, image: NDArray[np.uint8]) -> ColourOf:
        """The colours of detections in an image, uint8 RGB [H, W, 3]."""
        return partial(self.colours, image)


class PhotoGenevalReward(Reward):
    """GenEval by one of its rules, on photographs; see `PhotoJudge` for the settings.

    Beside the reward it reports ``PHOTO_SCORES``, all float32 [batch]. An image with a pixel that is not finite has NaN
    for all of them.
    """

    differentiable = False

    def __init__(
        self,
        mode: Mode,
        detector: str,
        clip: str,
        clip_weights: str | None,
        *,
        threshold: float,
        counting_threshold: float,
        max_objects: int,
        max_overlap: float,
        device: str | torch.device = "cpu",
    ) -> None:
        name, score = REWARDS[mode]
        self.name, self._score = (text.replace("geneval", "geneval_hf") for text in (name, score))
        self._judge = PhotoJudge(
            detector,
            clip,
            clip_weights,
            threshold=threshold,
            counting_threshold=counting_threshold,
            max_objects=max_objects,
            max_overlap=max_overlap,
            device=device,
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt needs a GenEval record of the 80 classes; see ``photo_record``."""
        for prompt in prompts:
            photo_record(prompt)

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """Make the colour classifiers of the prompts' classes: 30 texts a class, once a run."""
        for prompt in prompts:
            for clause in photo_record(prompt)["include"]:
                if "color" in clause:
                    self._judge.colours.classifier(clause["class"])

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Scores images as a user would see them, rounded to uint8; see :class:`Reward`.

        Raises:
            DataError: a prompt has no record of the 80 classes.
        """
        records = [photo_record(prompt) for prompt in prompts]
        pixels, finite = as_shown(images)
        reported = list(dict.fromkeys((*PHOTO_SCORES, self._score)))
        parts = []
        for image, record, found in zip(pixels, records, self._judge.find(pixels, records), strict=True):
            colour_of = self._judge.colour_of(image)
            parts.append([RULES[name](record, found, colour_of) for name in reported])
        table = torch.tensor(parts, dtype=torch.float32, device=images.device).view(-1, len(reported))
        scores = dict(zip(reported, table.where(finite[:, None], torch.nan).unbind(1), strict=True))
        return {"reward": scores[self._score]} | {name: scores[name] for name in PHOTO_SCORES}


def photo_record(prompt: Prompt) -> Record:
    """The GenEval record of a prompt.

    Raises:
        DataError: there is none, or it names an object or colour that is not in the benchmark's vocabulary.
    """
    record = prompt.metadata
    if not record.get("include") or "tag" not in record:
        raise DataError(
            f"prompt {prompt.id} ({prompt.text!r}) has no GenEval record: expected metadata with a tag and include "
            "clauses; python -m alignbench.rewards.geneval.suite writes a file of them for prompts=file"
        )
    for clause in [*record["include"], *record.get("exclude", ())]:
        if clause["class"] not in OBJECTS or clause.get("color", COLOURS[0]) not in COLOURS:
            raise DataError(
                f"prompt {prompt.id} ({prompt.text!r}) asks for {dict(clause)}: expected one of GenEval's 80 objects, "
                f"such as {', '.join(OBJECTS[:3])}, and a color of {', '.join(COLOURS)}"
            )
    return record
