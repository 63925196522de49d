"""GenEval as a reward in the embedded world.

One detection pass gives every score, so that training on one shows the others beside it: GenEval does not punish extra
objects, and only ``exact_scene`` tells whether it is being hacked by them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.geneval.detectors.shapes import DetectedScene, ShapesGenevalDetector
from alignbench.rewards.geneval.rules import Record, official, soft, soft_released, strict
from alignbench.rewards.reward import Reward, as_shown
from alignbench.shapes.detector import exact_scene
from alignbench.shapes.scenes import COLOURS, SHAPES

Mode = Literal["soft", "soft_released", "strict", "official"]

SCORES = ("geneval", "geneval_strict", "geneval_soft", "exact_scene", "objects_per_image", "invalid_share")
"""The scores of a detection pass; ``geneval`` is the official decision, whatever rule is trained on."""

REWARDS: dict[Mode, tuple[str, str]] = {
    "soft": ("geneval", "geneval_soft"),
    "soft_released": ("geneval_soft_released", "geneval_soft_released"),
    "strict": ("geneval_strict", "geneval_strict"),
    "official": ("geneval_official", "geneval"),
}
"""The name of the reward, and its score, by rule."""


class _SceneReward(Reward):
    """A reward that reads detected scenes; subclasses choose which score is the reward.

    Beside the reward it reports ``SCORES``, all float32 [batch]; see :func:`score_scene`. An image with a pixel that is
    not finite has NaN for all of them.

    Args:
        name: of the reward.
        score: which of ``SCORES`` it is, or ``geneval_soft_released``.
    """

    differentiable = False

    def __init__(self, name: str, score: str) -> None:
        self.name = name
        self._score = score
        self._detector = ShapesGenevalDetector()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt needs a GenEval record of the embedded world; see ``scene_record``."""
        for prompt in prompts:
            scene_record(prompt)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Scores images as a user would see them, rounded to uint8; see :class:`Reward`.

        Args:
            images: float [batch, 3, 32, 32] in [0, 1].
            prompts: one per image, each with a GenEval record of the embedded world.

        Raises:
            DataError: a prompt has no such record.
        """
        records = [scene_record(prompt) for prompt in prompts]
        pixels, finite = as_shown(images)
        scenes = self._detector.detect(pixels)
        parts = [score_scene(record, scene) for record, scene in zip(records, scenes, strict=True)]
        scores = {
            name: torch.tensor([part[name] for part in parts], dtype=torch.float32, device=images.device).where(
                finite, torch.nan
            )
            for name in {*SCORES, self._score}
        }
        return {"reward": scores[self._score]} | {name: scores[name] for name in SCORES}


class GenevalReward(_SceneReward):
    """GenEval by one of its rules; ``soft``, partial credit, is the one that methods are published with."""

    def __init__(self, mode: Mode = "soft") -> None:
        if mode not in REWARDS:
            raise ConfigError(f"reward mode is {mode!r}: expected one of {', '.join(REWARDS)}")
        super().__init__(*REWARDS[mode])


class ExactSceneReward(_SceneReward):
    """1 if the scene is right and nothing else is in the image, otherwise 0."""

    def __init__(self) -> None:
        super().__init__("exact_scene", "exact_scene")


def score_scene(record: Record, scene: DetectedScene) -> dict[str, float]:
    """The scores of one image, with the keys ``SCORES`` and ``geneval_soft_released``.

    ``geneval``, ``geneval_strict`` and ``geneval_soft`` are the official, strict and partial-credit rules;
    ``exact_scene`` is 1 if the strict rule holds and nothing else is there; ``objects_per_image`` counts the accepted
    objects; ``invalid_share`` is the share of the image's blobs that are no object of the world, 0 in an empty image.
    """
    blobs = len(scene.objects) + scene.invalid
    return {
        "geneval": float(official(record, scene.found, scene.colour_of).correct),
        "geneval_strict": strict(record, scene.found, scene.colour_of),
        "geneval_soft": soft(record, scene.found, scene.colour_of),
        "geneval_soft_released": soft_released(record, scene.found, scene.colour_of),
        "exact_scene": float(exact_scene(record, scene.objects, scene.invalid)),
        "objects_per_image": float(len(scene.objects)),
        "invalid_share": scene.invalid / blobs if blobs else 0.0,
    }


def scene_record(prompt: Prompt) -> Record:
    """The GenEval record of a prompt of the embedded world.

    Raises:
        DataError: there is none, or it names a shape or colour that the world does not have.
    """
    record = prompt.metadata
    if not record.get("include"):
        raise DataError(
            f"prompt {prompt.id} ({prompt.text!r}) has no GenEval record: expected metadata with include clauses; "
            "prompts without them can be scored by a preference reward"
        )
    for clause in [*record["include"], *record.get("exclude", ())]:
        if clause["class"] not in SHAPES or clause.get("color", COLOURS[0]) not in COLOURS:
            raise DataError(
                f"prompt {prompt.id} ({prompt.text!r}) asks for {dict(clause)}: expected a class of "
                f"{', '.join(SHAPES)} and a color of {', '.join(COLOURS)}"
            )
    return record
