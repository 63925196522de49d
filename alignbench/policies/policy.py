"""The interface between a trainable generator and everything that samples from it or trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from alignbench.policies.weights import Weights
from alignbench.sampling.flow import ProbabilityPath


@dataclass(frozen=True)
class Condition:
    """Text embeddings of a batch, in the form the denoiser takes them.

    Attributes:
        tensors: by name, each ``[batch, ...]`` with one batch size and one device.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """The samples of a slice or of an integer (or boolean) index tensor, in that order."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat_interleave(self, repeats: int) -> Condition:
        """Each sample `repeats` times in a row: a, b -> a, a, b, b."""
        return Condition({name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """A single sample seen `batch` times, without a copy."""
        return Condition({name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The samples of all conditions, in order."""
        names = conditions[0].tensors
        return Condition({name: torch.cat([condition.tensors[name] for condition in conditions]) for name in names})


class Policy(ABC):
    """A trainable generator.

    Attributes:
        path: the probability path of the model (interpolation, target, clean estimate, grids).
        weights: trainable weights and their views.
        device: where latents and conditions live.
        dtype: compute dtype: float32, bfloat16 (autocast over float32 master weights) or float64 (everything double).
        latent_shape: channels, height, width of one latent.
    """

    path: ProbabilityPath
    weights: Weights
    device: torch.device
    dtype: torch.dtype
    latent_shape: tuple[int, int, int]

    def __init__(self) -> None:
        self._embeddings: dict[str, dict[str, Tensor]] = {}
        self._generator = torch.Generator(device="cpu")

    @property
    def latent_dtype(self) -> torch.dtype:
        """dtype of latents and predictions: float64 for a float64 policy, otherwise float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    # Text

    @abstractmethod
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """Runs the text encoders on one text: tensors ``[1, ...]`` without gradient. `encode` is the cached form."""

    def encode(self, texts: Sequence[str]) -> Condition:
        """Embeddings of `texts`, one row a text, on the policy's device.

        Each distinct text goes through the text encoders once in the life of the policy, and alone, so that its
        embedding does not depend on the texts beside it (a resumed run meets them in other company). Embeddings are
        kept in main memory.
        """
        rows = {text: position for position, text in enumerate(dict.fromkeys(texts))}
        for text in rows:
            if text not in self._embeddings:
                self._embeddings[text] = {name: tensor.cpu() for name, tensor in self.encode_text(text).items()}
        distinct = Condition.cat([Condition(self._embeddings[text]) for text in rows]).to(self.device)
        if len(rows) == len(texts):
            return distinct
        return distinct[torch.tensor([rows[text] for text in texts], device=self.device)]

    # Images

    @abstractmethod
    def predict(
        self,
        latents: Tensor,
        sigma: Tensor,
        condition: Condition,
        *,
        guidance: float = 1.0,
        guidance_embedding: float | None = None,
        detach_uncond: bool = False,
        view: str = "current",
    ) -> Tensor:
        """The model's native output, what `path` says it predicts: the velocity of the flow, or the noise.

        Args:
            latents: ``[B, C, h, w]`` in `latent_dtype`.
            sigma: ``[B]`` in [0, 1], a noise level per sample. A flow's network is given ``1000 * sigma``, not rounded;
                that of a diffusion model the nearest training step.
            condition: embeddings of B texts.
            guidance: classifier-free guidance g of ``v_uncond + g (v_cond - v_uncond)``; 1 is a single pass of B.
            guidance_embedding: the guidance *input* of guidance-distilled models; an error for models without one.
            detach_uncond: no gradient flows through the unconditional branch.
            view: which weights.

        Returns:
            ``[B, C, h, w]`` in `latent_dtype`, differentiable with respect to the latents and, for ``current``, the
            trainable weights.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] of latents ``[B, C, h, w]``; differentiable, clamped plainly."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [0, 1]: the mode of the encoder's distribution."""

    @abstractmethod
    def grid(self, steps: int, name: str = "pipeline") -> Tensor:
        """The named grid: ``[steps + 1]`` decreasing sigmas that end in 0, float32 (float64 for a float64 policy)."""

    @abstractmethod
    def flops(self) -> Mapping[str, float]:
        """Forward FLOPs of one sample: ``denoiser`` (guidance 1, current view), ``decode``, ``encode`` (an image)."""

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Initial noise ``[len(seeds), C, h, w]`` in `latent_dtype`.

        Row i depends on ``seeds[i]`` alone: drawn on the CPU in float32 from a generator of its own, whatever the
        batch, the device or the dtype.
        """
        noise = torch.empty(len(seeds), *self.latent_shape)
        for row, seed in zip(noise, seeds, strict=True):
            self._generator.manual_seed(seed)
            row.normal_(generator=self._generator)
        return noise.to(self.device, self.latent_dtype)

    # Weights

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, ``current`` and ``reference`` first."""
        return self.weights.views

    def add_view(self, name: str, copy_of: str = "current") -> None:
        """Adds a view that starts as a copy of another one; see `Weights.add`."""
        self.weights.add(name, copy_of)

    def blend(self, name: str, decay: float, source: str = "current") -> None:
        """``name <- decay * name + (1 - decay) * source``; see `Weights.blend`."""
        self.weights.blend(name, decay, source)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Master weights of ``current`` by stable name: the same objects for the life of the policy."""
        return dict(self.weights.current)

    def state_dict(self) -> dict[str, Tensor]:
        """Every view but ``reference``, as ``view/parameter``; the tensors are shared, not copied."""
        return self.weights.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave, in place; see `Weights.load_state_dict`."""
        self.weights.load_state_dict(state)

    @abstractmethod
    def export(self, folder: Path | str, view: str = "evaluation") -> None:
        """Writes a view in the format that the public pipeline loads."""
