"""Stable Diffusion 3 and 3.5 as a policy: any diffusers checkpoint, with or without T5.

The model: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, Unpack

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.policies.diffusers_policy import DiffusersPolicy, Options, latent_side
from alignbench.policies.policy import Condition
from alignbench.policies.saved_pipeline import WeightSource, check_components, check_flow_scheduler, read_index
from alignbench.sampling.flow import FlowPath, pipeline_grid, shifted_linspace


class StableDiffusion3Policy(DiffusersPolicy):
    """A `StableDiffusion3Pipeline` whose transformer is trained."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = (  # with the prefix: bare names would also hit attn2, the second attention of SD3.5-Medium
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    path: FlowPath

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        max_sequence_length: int,
        resolution: int | None = None,
        **options: Any,
    ) -> None:
        """Takes over a loaded pipeline; `from_pretrained` explains the arguments."""
        super().__init__(pipeline, latent_shape=_latent_shape(pipeline, resolution), **options)
        self.max_sequence_length = max_sequence_length
        scheduler = pipeline.scheduler.config
        self.path = FlowPath(scheduler.num_train_timesteps, scheduler.shift)

    @property
    def transformer(self) -> Any:
        """The denoiser."""
        return self.denoiser

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        max_sequence_length: int = 256,
        **options: Unpack[Options],
    ) -> Self:
        """Loads a checkpoint and makes its transformer trainable; see `DiffusersPolicy.load`.

        With bfloat16 the T5 encoder is bfloat16 as well, the two CLIP encoders stay float32.

        Args:
            source: folder of a saved pipeline, or a hub id ``owner/name``.
            max_sequence_length: T5 tokens; without T5 that many zero embeddings are appended, as in the pipeline.
            options: see `Options`.
        """
        return cls.load(source, max_sequence_length=max_sequence_length, **options)

    @classmethod
    def check_checkpoint(cls, folder: Path, weights: WeightSource = "pretrained") -> dict[str, Any]:
        """See `DiffusersPolicy.check_checkpoint`."""
        index = read_index(folder, cls.pipeline_class, "Stable Diffusion 3 or 3.5")
        check_flow_scheduler(folder, dynamic_shift=False)
        if weights == "pretrained":
            check_components(
                folder,
                index,
                ("transformer", "vae", *cls.text_encoders),
                models={"transformer": SD3Transformer2DModel, "vae": AutoencoderKL},
                optional=("text_encoder_3",),
            )
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
        return index | absent

    @classmethod
    def weight_dtypes(cls, compute: torch.dtype, master: torch.dtype, trainable: str) -> dict[str, torch.dtype]:
        """See `DiffusersPolicy.weight_dtypes`."""
        return {"default": master, "text_encoder_3": compute}

    @torch.no_grad()
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the pipeline's own `encode_prompt`.

        ``prompt`` [1, tokens, channels] in the compute dtype (the first layer it meets is a linear one) and ``pooled``
        [1, channels] in `latent_dtype`.
        """
        with self._encoders_on_device():
            prompt, _, pooled, _ = self.pipeline.encode_prompt(
                text,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.latent_dtype)}

    def denoise(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance_embedding: float | None) -> Tensor:
        """The velocity."""
        velocity: Tensor = self.denoiser(
            hidden_states=latents,
            timestep=self.path.model_time(sigma),
            encoder_hidden_states=condition.tensors["prompt"],
            pooled_projections=condition.tensors["pooled"],
            return_dict=False,
        )[0]
        return velocity

    def grid(self, steps: int, name: str = "pipeline") -> Tensor:
        """See `Policy.grid`: ``pipeline`` or ``shifted_linspace``, both with the scheduler's shift."""
        if name == "pipeline":
            grid = pipeline_grid(steps, shift=self.path.shift, num_train_timesteps=self.path.num_train_timesteps)
        elif name == "shifted_linspace":
            grid = shifted_linspace(steps, self.path.shift)
        else:
            raise ConfigError(f"grid must be 'pipeline' or 'shifted_linspace', got {name!r}")
        return grid.to(self.device, self.latent_dtype)


def _latent_shape(pipeline: StableDiffusion3Pipeline, resolution: int | None) -> tuple[int, int, int]:
    config, pixels = pipeline.transformer.config, pipeline.vae_scale_factor
    side = latent_side(resolution, config.sample_size, pixels, config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size * pixels
    if side * pixels > largest:
        raise ConfigError(f"this checkpoint has positions for up to {largest} pixels, got resolution {resolution}")
    return config.in_channels, side, side
