"""FLUX.1 as a policy: any diffusers checkpoint of `FluxPipeline`.

The model: Black Forest Labs, FLUX.1; a rectified flow over packed latents (2 x 2 latents are one token), distilled so
that guidance is an input. Packing stays inside: latents here are [B, C, h, w], as the autoencoder has them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.policies.diffusers_policy import DiffusersPolicy, Options, latent_side
from alignbench.policies.policy import Condition
from alignbench.policies.saved_pipeline import WeightSource, check_components, check_flow_scheduler, read_index
from alignbench.sampling.flow import FlowPath, dynamic_grid, shifted_linspace


class FluxPolicy(DiffusersPolicy):
    """A `FluxPipeline` whose transformer is trained.

    Guidance is the model's input, `guidance_embedding`, in one pass; classifier-free guidance on top of it
    (``guidance`` above 1, the pipeline's ``true_cfg_scale``) takes two.
    """

    pipeline_class = FluxPipeline
    denoiser_name = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2")
    lora_targets = (  # those of Flow-GRPO's official code for FLUX.1-dev
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    path: FlowPath

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        guidance_embedding: float | None,
        max_sequence_length: int,
        resolution: int | None = None,
        **options: Any,
    ) -> None:
        """Takes over a loaded pipeline; `from_pretrained` explains the arguments."""
        takes_guidance = pipeline.transformer.config.guidance_embeds
        if takes_guidance != (guidance_embedding is not None):
            raise ConfigError(
                f"guidance_embedding is {guidance_embedding}, but this model "
                + ("takes guidance as an input: give a number (3.5 is usual)" if takes_guidance else
                   "has no guidance input: use null")
            )  # fmt: skip
        side = latent_side(resolution, pipeline.default_sample_size, pipeline.vae_scale_factor, multiple=2)
        super().__init__(pipeline, latent_shape=(pipeline.transformer.config.in_channels // 4, side, side), **options)
        self.guidance_embedding = guidance_embedding
        self.max_sequence_length = max_sequence_length
        scheduler = pipeline.scheduler.config
        self.linspace_shift: float = scheduler.shift
        self.mu = dynamic_shift(
            (side // 2) ** 2,
            (scheduler.base_image_seq_len, scheduler.max_image_seq_len),
            (scheduler.base_shift, scheduler.max_shift),
        )
        self.path = FlowPath(scheduler.num_train_timesteps, math.exp(self.mu))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        guidance_embedding: float | None = 3.5,
        max_sequence_length: int = 512,
        **options: Unpack[Options],
    ) -> Self:
        """Loads a checkpoint and makes its transformer trainable; see `DiffusersPolicy.load`.

        With bfloat16 the T5 encoder is bfloat16 as well, and with LoRA so are all frozen weights of the transformer;
        the CLIP encoder stays float32. With float64 the rotary embedding stays float32, as diffusers applies it.

        Args:
            source: folder of a saved pipeline, or a hub id ``owner/name``.
            guidance_embedding: the model's guidance input, in sampling and in training; null for a model without one.
            max_sequence_length: T5 tokens.
            options: see `Options`.
        """
        own = {"guidance_embedding": guidance_embedding, "max_sequence_length": max_sequence_length}
        return cls.load(source, **own, **options)

    @classmethod
    def check_checkpoint(cls, folder: Path, weights: WeightSource = "pretrained") -> dict[str, Any]:
        """See `DiffusersPolicy.check_checkpoint`."""
        index = read_index(folder, cls.pipeline_class, "FLUX.1")
        check_flow_scheduler(folder, dynamic_shift=True)
        if weights == "pretrained":
            models = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
            check_components(folder, index, ("transformer", "vae", *cls.text_encoders), models)
        return index

    @classmethod
    def weight_dtypes(cls, compute: torch.dtype, master: torch.dtype, trainable: str) -> dict[str, torch.dtype]:
        """See `DiffusersPolicy.weight_dtypes`."""
        frozen = compute if trainable == "lora" else master  # the weights are published in bfloat16
        return {"default": master, "transformer": frozen, "text_encoder_2": compute}

    @torch.no_grad()
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the pipeline's own `encode_prompt`.

        ``prompt`` [1, tokens, channels] of T5 in the compute dtype and ``pooled`` [1, channels] of CLIP in
        `latent_dtype`.
        """
        with self._encoders_on_device():
            prompt, pooled, _ = self.pipeline.encode_prompt(
                text, device=self.device, max_sequence_length=self.max_sequence_length
            )
        return {"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.latent_dtype)}

    def check_guidance_embedding(self, guidance_embedding: float | None) -> None:
        """See `DiffusersPolicy.check_guidance_embedding`."""
        if self.guidance_embedding is None:
            super().check_guidance_embedding(guidance_embedding)

    def denoise(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance_embedding: float | None) -> Tensor:
        """The velocity. `guidance_embedding` None takes the policy's own."""
        prompt = condition.tensors["prompt"]
        guidance = self.guidance_embedding if guidance_embedding is None else guidance_embedding
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        velocity = self.denoiser(
            hidden_states=pack(latents),
            timestep=sigma,  # the model multiplies by 1000
            guidance=None if guidance is None else sigma.new_full(sigma.shape, guidance),
            encoder_hidden_states=prompt,
            pooled_projections=condition.tensors["pooled"],
            txt_ids=latents.new_zeros(prompt.shape[1], 3),
            img_ids=positions(height, width).to(latents),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def grid(self, steps: int, name: str = "pipeline") -> Tensor:
        """See `Policy.grid`: ``pipeline``, shifted by the image's size, or ``shifted_linspace``, by a constant."""
        if name == "pipeline":
            grid = dynamic_grid(steps, self.mu)
        elif name == "shifted_linspace":
            grid = shifted_linspace(steps, self.linspace_shift)
        else:
            raise ConfigError(f"grid must be 'pipeline' or 'shifted_linspace', got {name!r}")
        return grid.to(self.device, self.latent_dtype)


def pack(latents: Tensor) -> Tensor:
    """Tokens ``[B, h w / 4, 4 C]`` of latents ``[B, C, h, w]``: each 2 x 2 square is one."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents ``[B, C, 2 height, 2 width]`` of tokens ``[B, height width, 4 C]``."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height, width), 2)


def positions(height: int, width: int) -> Tensor:
    """``(0, row, column)`` of each token; int64 [height width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=2).flatten(0, 1)


def dynamic_shift(tokens: int, lengths: tuple[int, int], shifts: tuple[float, float]) -> float:
    """``mu``, linear in the number of image tokens through (shortest, smallest shift) and (longest, largest shift)."""
    slope = (shifts[1] - shifts[0]) / (lengths[1] - lengths[0])
    return shifts[0] + slope * (tokens - lengths[0])
