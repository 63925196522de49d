"""What every reward offers: named scores for a batch of images."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignbench.errors import ConfigError, RewardError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards import foreign


class Reward(ABC):
    """Scores images against their prompts; never sees a method.

    Attributes:
        name: how tables and records call it.
        differentiable: whether ``score`` passes gradients to the images.
    """

    name: str
    differentiable: bool = False

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - optional
        """Refuse prompts that cannot be scored, before any work (``DataError``)."""

    def encode(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - optional
        """Encode and keep the texts that are new, where the reward has a text encoder; ``score`` finds them then.

        It is called before ``score``, so that texts, which are encoded once, are counted apart from images. Every text
        costs the same: encode each one alone and padded to one length.
        """

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score images.

        Args:
            images: float32 ``[batch, 3, height, width]`` in [0, 1].
            prompts: one record per image.

        Returns:
            Named real numbers of shape ``[batch]`` on the raw scale, the key ``reward`` among them: tensors, NumPy
            arrays or lists. The reward alone may come without a name.
        """


class EmbedsImages(Protocol):
    """A scorer whose image embeddings can measure diversity."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``[batch, features]`` of images in [0, 1]."""


class WeightedSum(Reward):
    """A weighted sum of rewards; every part is reported under its own name.

    Weights are non-negative and at least one is positive. A part with weight 0 is not computed.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]) -> None:
        for name, (_, weight) in parts.items():
            if weight < 0:
                raise ConfigError(
                    f"reward.{name}.weight is {weight}: weights must be 0 or more; "
                    "to punish a score, define a reward that falls with it"
                )
        self.parts = {name: part for name, part in parts.items() if part[1] > 0}
        if not self.parts:
            raise ConfigError("every reward has weight 0: give at least one of them a positive weight")
        self.name = "+".join(self.parts)
        self.differentiable = all(reward.differentiable for reward, _ in self.parts.values())

    def check(self, prompts: Sequence[Prompt]) -> None:
        for reward, _ in self.parts.values():
            foreign.check(reward, prompts)

    def encode(self, prompts: Sequence[Prompt]) -> None:
        for reward, _ in self.parts.values():
            foreign.encode(reward, prompts)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        total = torch.zeros(len(prompts), device=images.device)
        scores: dict[str, Tensor] = {}
        for name, (reward, weight) in self.parts.items():
            part = foreign.score(reward, images, prompts)
            total = total + weight * part["reward"]
            scores |= {f"{name}/{key}": value for key, value in part.items()}
        return {"reward": total} | scores


def as_shown(images: Tensor) -> tuple[NDArray[np.uint8], Tensor]:
    """Images as a user would see them, for rewards without gradient.

    Args:
        images: float ``[batch, 3, height, width]`` in [0, 1].

    Returns:
        uint8 RGB ``[batch, height, width, 3]``, and bool ``[batch]`` on the images' device: whether all pixels of an
        image were finite.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    pixels = (images.detach().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), finite


def check_finite(scores: Mapping[str, Tensor], prompts: Sequence[Prompt], images: Sequence[object]) -> None:
    """Refuse a reward that is NaN or infinite.

    Args:
        scores: what a reward returned.
        prompts: one record per image.
        images: a name or number per image for the message.

    Raises:
        RewardError: names the score, the image and its prompt.
    """
    for name, values in scores.items():
        bad = (~torch.isfinite(values.detach())).nonzero().flatten().tolist()
        if bad:
            first = bad[0]
            raise RewardError(
                f"{name} is {values[first].item()} for image {images[first]} of prompt {prompts[first].id} "
                f"({prompts[first].text!r}); {len(bad)} of {len(values)} values of this batch are not finite"
            )
