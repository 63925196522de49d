"""The size of an image as a JPEG file, a reward that needs no model and is not differentiable."""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import Reward, as_shown

QUALITY = 95
SIGNS = {"compressibility": -1.0, "incompressibility": 1.0}


class JpegSize(Reward):
    """Kilobytes of 1000 bytes at quality 95: negative for compressibility, positive for incompressibility.

    Source: Black et al. 2023, DDPO (arXiv 2305.13301), section 5.1. An image with a pixel that is not finite has NaN.
    """

    differentiable = False

    def __init__(self, mode: Literal["compressibility", "incompressibility"]) -> None:
        self.name = f"jpeg_{mode}"
        self._sign = SIGNS[mode]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score images as a user would see them, rounded to uint8; prompts are not read."""
        pixels, finite = as_shown(images)
        sizes = torch.tensor([kilobytes(picture) for picture in pixels], dtype=torch.float32, device=images.device)
        return {"reward": (self._sign * sizes).where(finite, torch.nan)}


def kilobytes(picture: NDArray[np.uint8]) -> float:
    """Size of a picture, uint8 RGB [h, w, 3], as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
