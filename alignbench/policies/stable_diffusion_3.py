"""Stable Diffusion 3 and 3.5 as a policy: any diffusers checkpoint, with or without T5.

The model: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.policies.diffusers_policy import (
    DiffusersPolicy,
    check_trainable,
    compute_dtypes,
    latent_side,
    master_dtype,
)
from alignbench.policies.policy import Condition
from alignbench.policies.saved_pipeline import (
    Weights,
    check_components,
    check_flow_scheduler,
    load_pipeline,
    read_index,
)
from alignbench.sampling.flow import FlowPath, pipeline_grid, shifted_linspace

LORA_TARGETS = (  # with the prefix: bare names would also hit attn2, the second attention of SD3.5-Medium
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class StableDiffusion3Policy(DiffusersPolicy):
    """A `StableDiffusion3Pipeline` whose transformer is trained."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    path: FlowPath

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, *, max_sequence_length: int, resolution: int | None, **options: Any
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
        revision: str | None = None,
        weights: Weights = "pretrained",
        dtype: str = "float32",
        vae_dtype: str | None = None,
        device: str | torch.device = "cpu",
        trainable: Literal["lora", "full"] = "lora",
        rank: int = 32,
        alpha: float = 64.0,
        targets: Sequence[str] = LORA_TARGETS,
        seed: int = 0,
        max_sequence_length: int = 256,
        resolution: int | None = None,
        gradient_checkpointing: bool = False,
        vae_gradient_checkpointing: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        offload_text_encoders: bool = False,
        compile: bool = False,
    ) -> StableDiffusion3Policy:
        """Loads a checkpoint and makes its transformer trainable.

        Args:
            source: folder of a saved pipeline, or a hub id ``owner/name``.
            revision: commit, tag or branch on the hub.
            weights: ``random`` needs the checkpoint's configurations and tokenizers alone, to measure what it costs.
            dtype: compute dtype of the transformer: float32, bfloat16 (autocast) or float64 (everything in double).
                With bfloat16 the T5 encoder is bfloat16 as well, the two CLIP encoders stay float32.
            vae_dtype: compute dtype of the autoencoder; default float32 (float64 for a float64 policy).
            device: of models, latents and images.
            trainable: ``lora`` (rank, alpha, targets, seed of the initial A) or ``full``.
            max_sequence_length: T5 tokens; without T5 that many zero embeddings are appended, as in the pipeline.
            resolution: side of the images in pixels; default what the transformer was made for.
            gradient_checkpointing: recompute transformer blocks in the backward pass.
            vae_gradient_checkpointing: the same for the autoencoder, where losses reach through decoded images.
            vae_slicing: decode images one at a time: less memory.
            vae_tiling: decode large images in overlapping tiles: still less, with another result at the seams.
            offload_text_encoders: keep the text encoders in main memory while they have nothing to read.
            compile: compile the denoiser for each batch size it meets.

        Raises:
            CheckpointError: the folder is absent, incomplete, truncated or of another pipeline; nothing was loaded yet.
            ConfigError: an argument that this checkpoint cannot work with.
        """
        check_trainable(trainable)
        compute, vae_compute = compute_dtypes(dtype, vae_dtype)
        pipeline = load_pipeline(
            StableDiffusion3Pipeline,
            source,
            revision,
            weights,
            check_checkpoint,
            {"default": master_dtype(compute), "text_encoder_3": compute},
        )
        return cls(
            pipeline,
            dtype=compute,
            vae_dtype=vae_compute,
            device=torch.device(device),
            trainable=trainable,
            rank=rank,
            alpha=alpha,
            targets=targets,
            seed=seed,
            max_sequence_length=max_sequence_length,
            resolution=resolution,
            gradient_checkpointing=gradient_checkpointing,
            vae_gradient_checkpointing=vae_gradient_checkpointing,
            vae_slicing=vae_slicing,
            vae_tiling=vae_tiling,
            offload_text_encoders=offload_text_encoders,
            compile=compile,
        )

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


def check_checkpoint(folder: Path, weights: Weights = "pretrained") -> dict[str, Any]:
    """Checks a saved Stable Diffusion 3 pipeline by its indexes and safetensors headers, without loading weights.

    Returns:
        What to load: the content of ``model_index.json``, library and class by component; None where there is none.

    Raises:
        CheckpointError: naming the file, what was expected and what is there.
    """
    index = read_index(folder, "StableDiffusion3Pipeline", "Stable Diffusion 3 or 3.5")
    check_flow_scheduler(folder, dynamic_shift=False)
    if weights == "pretrained":
        check_components(
            folder,
            index,
            ("transformer", "vae", *StableDiffusion3Policy.text_encoders),
            models={"transformer": SD3Transformer2DModel, "vae": AutoencoderKL},
            optional=("text_encoder_3",),
        )
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
    return index | absent


def _latent_shape(pipeline: StableDiffusion3Pipeline, resolution: int | None) -> tuple[int, int, int]:
    config, pixels = pipeline.transformer.config, pipeline.vae_scale_factor
    side = latent_side(resolution, config.sample_size, pixels, config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size * pixels
    if side * pixels > largest:
        raise ConfigError(f"this checkpoint has positions for up to {largest} pixels, got resolution {resolution}")
    return config.in_channels, side, side
