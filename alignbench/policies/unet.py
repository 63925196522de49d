"""Stable Diffusion 1.5 and XL as policies: any diffusers checkpoint whose U-Net predicts the noise.

The models: Rombach et al., arXiv 2112.10752; Podell et al., arXiv 2307.01952. Latents here are points of
`DiffusionPath`, in a rectified flow's coordinates; the U-Net is given DDPM's.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from alignbench.errors import CheckpointError, ConfigError
from alignbench.foreign import read_json
from alignbench.policies.diffusers_policy import DiffusersPolicy, latent_side
from alignbench.policies.policy import Condition
from alignbench.policies.saved_pipeline import (
    WeightSource,
    check_components,
    check_diffusion_scheduler,
    read_index,
)
from alignbench.sampling.flow import DiffusionPath

SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "timestep_spacing",
    "steps_offset",
)


class UNetPolicy(DiffusersPolicy):
    """A pipeline of the Stable Diffusion family whose U-Net is trained. A safety checker is left out.

    Attributes:
        model: what checkpoints hold, in words.
    """

    denoiser_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # self- and cross-attention
    model: ClassVar[str]
    path: DiffusionPath

    def __init__(self, pipeline: Any, *, resolution: int | None = None, **options: Any) -> None:
        """Takes over a loaded pipeline; `from_pretrained` explains the arguments."""
        unet = pipeline.unet.config
        side = latent_side(resolution, unet.sample_size, pipeline.vae_scale_factor, multiple=1)
        super().__init__(pipeline, latent_shape=(unet.in_channels, side, side), **options)
        self.pixels = side * pipeline.vae_scale_factor
        schedule = pipeline.scheduler.config
        self.scheduler = DDIMScheduler(**{key: schedule[key] for key in SCHEDULE if key in schedule})
        self.path = DiffusionPath(self.scheduler.alphas_cumprod)

    @classmethod
    def check_checkpoint(cls, folder: Path, weights: WeightSource = "pretrained") -> dict[str, Any]:
        """See `DiffusersPolicy.check_checkpoint`. What judges or takes images is left out."""
        index = read_index(folder, cls.pipeline_class, cls.model, ignored=("safety_checker", "feature_extractor"))
        check_diffusion_scheduler(folder)
        if weights == "pretrained":
            models = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
            check_components(folder, index, ("unet", "vae", *cls.text_encoders), models)
        inputs = read_json(folder / "unet" / "config.json", "it says what the model takes").get("in_channels", 4)
        latents = read_json(folder / "vae" / "config.json", "it says what latents are").get("latent_channels", 4)
        if inputs != latents:
            raise CheckpointError(
                f"{folder / 'unet'} takes {inputs} channels, expected the {latents} of a latent; "
                "models that take an image beside it (inpainting) are another task"
            )
        unused: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        unused["requires_safety_checker"] = False
        return index | {name: value for name, value in unused.items() if name in index}

    def denoise(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance_embedding: float | None) -> Tensor:
        """The noise."""
        noise: Tensor = self.denoiser(
            self.path.unit_variance(latents, sigma),
            self.path.model_time(sigma),
            encoder_hidden_states=condition.tensors["prompt"],
            added_cond_kwargs=self.added_conditions(condition),
            return_dict=False,
        )[0]
        return noise

    @abstractmethod
    def added_conditions(self, condition: Condition) -> dict[str, Tensor] | None:
        """What the U-Net takes beside the text."""

    def grid(self, steps: int, name: str = "pipeline") -> Tensor:
        """See `Policy.grid`: only ``pipeline``, the steps of the DDIM scheduler with the checkpoint's settings."""
        if name != "pipeline":
            raise ConfigError(
                f"grid {name!r} is made for flow models; set method.rollout.grid to pipeline, the steps of DDIM"
            )
        if not 2 <= steps <= len(self.path.times) // 2:
            raise ConfigError(f"expected 2 to {len(self.path.times) // 2} sampling steps, got {steps}")
        self.scheduler.set_timesteps(steps)
        return self.path.grid(self.scheduler.timesteps.tolist()).to(self.device, self.latent_dtype)


class StableDiffusionPolicy(UNetPolicy):
    """A `StableDiffusionPipeline`: Stable Diffusion 1.4, 1.5 and fine-tunes of them."""

    pipeline_class = StableDiffusionPipeline
    text_encoders = ("text_encoder",)
    model = "Stable Diffusion 1"

    @torch.no_grad()
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """``prompt`` [1, tokens, channels] of the pipeline's own `encode_prompt`, in the compute dtype."""
        with self._encoders_on_device():
            prompt, _ = self.pipeline.encode_prompt(text, self.device, 1, False)
        return {"prompt": prompt.to(self.dtype)}

    def added_conditions(self, condition: Condition) -> None:
        """Nothing."""


class StableDiffusionXLPolicy(UNetPolicy):
    """A `StableDiffusionXLPipeline`, without a refiner."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    model = "Stable Diffusion XL"

    @torch.no_grad()
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the pipeline's own `encode_prompt`.

        ``prompt`` [1, tokens, channels] in the compute dtype and ``pooled`` [1, channels] in `latent_dtype`.
        """
        with self._encoders_on_device():
            prompt, _, pooled, _ = self.pipeline.encode_prompt(
                text, device=self.device, do_classifier_free_guidance=False
            )
        return {"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.latent_dtype)}

    def unconditional(self) -> Condition:
        """The empty text; zeros where the checkpoint's index says so, as that of SDXL does."""
        empty = super().unconditional()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Condition({name: torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def added_conditions(self, condition: Condition) -> dict[str, Tensor]:
        """The pooled text and ``time_ids``: original size, crop and target size, of an image that is not cropped."""
        pooled = condition.tensors["pooled"]
        sizes = pooled.new_tensor([self.pixels, self.pixels, 0, 0, self.pixels, self.pixels])
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
