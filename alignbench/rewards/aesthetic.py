"""The LAION aesthetic predictor: how much people liked an image, whatever its prompt.

Source: C. Schuhmann 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor: a regression of ratings
from 1 to 10 (SAC, LAION-Logos, AVA) on the normalised image embedding of OpenAI's CLIP ViT-L/14. Used as a reward by
DDPO (arXiv 2305.13301).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignbench.foreign import read_tensors, reading
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.checkpoints import weights_file
from alignbench.rewards.clip import OpenClip
from alignbench.rewards.reward import Reward


class AestheticScore(Reward):
    """A linear multi-layer perceptron on the unit image embedding of a CLIP model, about 1 to 10; differentiable.

    Args:
        weights: file of the predictor, ``sac+logos+ava1-l14-linearMSE.pth``; see ``weights_file``.
        clip: an open_clip model; see `OpenClip`.
        clip_weights: its weights.
        device: where both models live; images are moved there.

    Raises:
        ConfigError: open_clip is not installed.
        CheckpointError: weights are missing, truncated, or made for another CLIP model.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(
        self, weights: str, *, clip: str, clip_weights: str | None, device: str | torch.device = "cpu"
    ) -> None:
        held = read_tensors(weights_file(weights))
        self.clip = OpenClip(clip, clip_weights, device)
        features = self.clip.embed_text("").shape[0]
        self.predictor = predictor(features)
        with reading(weights, f"a predictor of {features} features, those of {clip}"):
            self.predictor.load_state_dict({name.removeprefix("layers."): value for name, value in held.items()})
        self.predictor.float().to(self.clip.device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score images ``[batch, 3, height, width]`` in [0, 1]; prompts are not read."""
        with torch.autocast(self.clip.device.type, enabled=False):
            return {"reward": self.predictor(self.clip.embed_images(images))[:, 0].float()}


def predictor(features: int) -> nn.Sequential:
    """The published architecture: five linear layers and no activation between them, dropout in training only."""
    return nn.Sequential(
        nn.Linear(features, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
