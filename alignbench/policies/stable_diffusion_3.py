"""Stable Diffusion 3 and 3.5 as a policy: any diffusers checkpoint, with or without T5.

The model: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alignbench.errors import CheckpointError, ConfigError
from alignbench.policies.policy import Condition, Policy
from alignbench.policies.weights import Weights, add_lora
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class StableDiffusion3Policy(Policy):
    """A `StableDiffusion3Pipeline` whose transformer is trained.

    Weights that are trained are float32 whatever the compute dtype; frozen linear and convolution weights are stored in
    the compute dtype, which is what autocast would make of them in every call.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        device: torch.device,
        trainable: Literal["lora", "full"],
        rank: int,
        alpha: float,
        targets: Sequence[str],
        seed: int,
        max_sequence_length: int,
        resolution: int | None,
        gradient_checkpointing: bool,
        vae_gradient_checkpointing: bool,
    ) -> None:
        """Takes over a loaded pipeline; `from_pretrained` explains the arguments."""
        super().__init__()
        self.pipeline = pipeline
        self.transformer: Any = pipeline.transformer
        self.vae: Any = pipeline.vae
        self.device, self.dtype, self.vae_dtype = device, dtype, vae_dtype
        self.max_sequence_length = max_sequence_length
        self.latent_shape = _latent_shape(pipeline, resolution)
        scheduler = pipeline.scheduler.config
        self.path = FlowPath(scheduler.num_train_timesteps, scheduler.shift)
        self.shift: float = scheduler.shift
        self.trainable = trainable

        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval().to(device)
        if dtype == torch.float64:
            _use_double_norms(self.transformer)
        if trainable == "lora":
            add_lora(self.transformer, targets, rank, alpha, seed)
            _store_frozen(self.transformer, dtype)
        else:
            self.transformer.requires_grad_(True)
        _store_frozen(self.vae, vae_dtype)
        self.lora_scale = alpha / rank
        self.weights = Weights(self.transformer, base_is_reference=trainable == "lora")
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(self._checkpoint)
        if vae_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self._unconditional: Condition | None = None
        self._flops: dict[str, float] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
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
    ) -> StableDiffusion3Policy:
        """Loads a checkpoint and makes its transformer trainable.

        Args:
            source: folder of a saved pipeline, or a hub id ``owner/name``.
            revision: commit, tag or branch on the hub.
            dtype: compute dtype of the transformer: float32, bfloat16 (autocast) or float64 (everything in double).
                With bfloat16 the T5 encoder is bfloat16 as well, the two CLIP encoders stay float32.
            vae_dtype: compute dtype of the autoencoder; default float32 (float64 for a float64 policy).
            device: of models, latents and images.
            trainable: ``lora`` (rank, alpha, targets, seed of the initial A) or ``full``.
            max_sequence_length: T5 tokens; without T5 that many zero embeddings are appended, as in the pipeline.
            resolution: side of the images in pixels; default what the transformer was made for.
            gradient_checkpointing: recompute transformer blocks in the backward pass.
            vae_gradient_checkpointing: the same for the autoencoder, where losses reach through decoded images.

        Raises:
            CheckpointError: the folder is absent, incomplete, truncated or of another pipeline; nothing was loaded yet.
            ConfigError: an argument that this checkpoint cannot work with.
        """
        if trainable not in ("lora", "full"):
            raise ConfigError(f"trainable must be 'lora' or 'full', got {trainable!r}")
        compute = _parse_dtype(dtype)
        vae_compute = _parse_dtype(vae_dtype or ("float64" if dtype == "float64" else "float32"))
        if (compute == torch.float64) != (vae_compute == torch.float64):
            raise ConfigError(f"dtype and vae_dtype must both be float64 or neither, got {dtype} and {vae_dtype}")
        folder = _local_folder(source, revision)
        index = check_checkpoint(folder)
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
        master = torch.float64 if compute == torch.float64 else torch.float32
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, dtype={"default": master, "text_encoder_3": compute}, local_files_only=True, **absent
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
        )

    @torch.no_grad()
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the pipeline's own `encode_prompt`.

        ``prompt`` [1, tokens, channels] in the compute dtype (the first layer it meets is a linear one) and ``pooled``
        [1, channels] in `latent_dtype`.
        """
        prompt, _, pooled, _ = self.pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.latent_dtype)}

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
        """See `Policy.predict`.

        Guidance is one call of 2B, unconditional half first, as in the pipeline. Where gradients are recorded and
        `detach_uncond` is set, it is a call of B without gradient and one of B with, which saves the backward pass of
        the half whose gradient is thrown away.
        """
        if guidance_embedding is not None:
            raise ConfigError(
                f"Stable Diffusion 3 has no guidance input, got guidance_embedding={guidance_embedding}; use guidance"
            )
        if sigma.shape != latents.shape[:1] or len(condition) != len(latents):
            raise ValueError(
                f"expected one sigma and one condition for each of {len(latents)} latents, "
                f"got sigma of shape {list(sigma.shape)} and {len(condition)} conditions"
            )
        with self.weights.using(view):
            if guidance == 1.0:
                return self._velocity(latents, sigma, condition)
            if self._unconditional is None:
                self._unconditional = self.encode([""])
            unconditional = self._unconditional.expand(len(latents))
            if detach_uncond and torch.is_grad_enabled():
                with torch.no_grad():
                    v_uncond = self._velocity(latents, sigma, unconditional)
                v_cond = self._velocity(latents, sigma, condition)
            else:
                both = Condition.cat([unconditional, condition])
                v_uncond, v_cond = self._velocity(latents.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
            return v_uncond + guidance * (v_cond - v_uncond)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Policy.decode`."""
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        with self._autocast(self.vae_dtype):
            images: Tensor = self.vae.decode(unscaled, return_dict=False)[0]
        return (images.to(self.latent_dtype) / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """See `Policy.encode_images`."""
        config = self.vae.config
        with self._autocast(self.vae_dtype):
            latents: Tensor = self.vae.encode(images.to(self.latent_dtype) * 2 - 1, return_dict=False)[0].mode()
        shift: float = config.shift_factor or 0.0
        scale: float = config.scaling_factor
        return (latents.to(self.latent_dtype) - shift) * scale

    def grid(self, steps: int, name: str = "pipeline") -> Tensor:
        """See `Policy.grid`: ``pipeline`` or ``shifted_linspace``, both with the scheduler's shift."""
        if name == "pipeline":
            grid = pipeline_grid(steps, shift=self.shift, num_train_timesteps=self.path.num_train_timesteps)
        elif name == "shifted_linspace":
            grid = shifted_linspace(steps, self.shift)
        else:
            raise ConfigError(f"grid must be 'pipeline' or 'shifted_linspace', got {name!r}")
        return grid.to(self.device, self.latent_dtype)

    def flops(self) -> Mapping[str, float]:
        """See `Policy.flops`; counted once by running each model on one sample (a multiply-add is two)."""
        if self._flops is None:
            latents = torch.zeros(1, *self.latent_shape, device=self.device, dtype=self.latent_dtype)
            sigma, condition = latents.new_ones(1), self.encode([""])
            with torch.no_grad():
                with FlopCounterMode(display=False) as denoiser:
                    self.predict(latents, sigma, condition)
                with FlopCounterMode(display=False) as decode:
                    images = self.decode(latents)
                with FlopCounterMode(display=False) as encode:
                    self.encode_images(images)
            counters = {"denoiser": denoiser, "decode": decode, "encode": encode}
            self._flops = {name: float(counter.get_total_flops()) for name, counter in counters.items()}
        return dict(self._flops)

    def export(self, folder: Path | str, view: str = "evaluation") -> None:
        """Writes a view for diffusers.

        LoRA: ``pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights(folder)``. The scale alpha / rank is
        multiplied into B, so that every reader gets the same images, also one that ignores a stored alpha.
        Full: a transformer folder, for ``SD3Transformer2DModel.from_pretrained(folder)``.
        """
        if self.trainable == "full":
            with self.weights.using(view):
                self.transformer.save_pretrained(folder)
            return
        layers = {
            f"{name}.weight": (tensor * self.lora_scale if name.endswith("lora_B") else tensor).detach().float().cpu()
            for name, tensor in self.weights.tensors(view).items()
        }
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        with self._autocast(self.dtype):
            velocity: Tensor = self.transformer(
                hidden_states=latents,
                timestep=self.path.model_time(sigma),
                encoder_hidden_states=condition.tensors["prompt"],
                pooled_projections=condition.tensors["pooled"],
                return_dict=False,
            )[0]
        return velocity.to(self.latent_dtype)

    def _autocast(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def _checkpoint(self, block: nn.Module, *arguments: Any) -> Any:
        """Checkpoints a block so that its second run, in the backward pass, uses the weights of its first."""
        view = self.weights.active
        return checkpoint(
            block,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # no dropout anywhere
            context_fn=lambda: (nullcontext(), self.weights.using(view)),
        )


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Checks a saved Stable Diffusion 3 pipeline by its indexes and safetensors headers, without loading weights.

    Returns:
        The content of ``model_index.json``: library and class by component.

    Raises:
        CheckpointError: naming the file, what was expected and what is there.
    """
    index = _read_json(folder / "model_index.json", "a pipeline saved with save_pretrained has one")
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise CheckpointError(
            f"{folder} holds a {index.get('_class_name')}, expected a StableDiffusion3Pipeline; "
            "use a Stable Diffusion 3 or 3.5 checkpoint in diffusers format"
        )
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "the time grid is read from it")
    unsupported = [
        key
        for key in ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
                    "shift_terminal", "invert_sigmas")
        if scheduler.get(key)
    ]  # fmt: skip
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or unsupported:
        raise CheckpointError(
            f"{folder / 'scheduler'} is a {scheduler.get('_class_name')} with {unsupported or 'no special settings'}, "
            "expected a FlowMatchEulerDiscreteScheduler with a constant shift; set those options to false"
        )
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if index.get(component, [None, None])[1] is None:
            if component == "text_encoder_3":
                continue
            raise CheckpointError(
                f"{folder / 'model_index.json'} has no {component}; only text_encoder_3 may be absent"
            )
        shapes = _safetensors_shapes(folder / component)
        if component in ("transformer", "vae"):
            config = _read_json(folder / component / "config.json", "it says how the weights are to be read")
            _check_shapes(folder / component, config, shapes)
    return index


def _check_shapes(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    model_class = SD3Transformer2DModel if folder.name == "transformer" else AutoencoderKL
    with torch.device("meta"):
        model = model_class.from_config(config)
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            raise CheckpointError(f"{folder} has no weights for {name}; its files do not belong to its config.json")
        if shapes[name] != list(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, expected {list(tensor.shape)}; "
                "its files do not belong to its config.json"
            )


def _safetensors_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a component, whose files are complete."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        files = sorted({folder / name for name in _read_json(indexes[0], "")["weight_map"].values()})
    else:
        files = [
            path
            for path in (folder / "diffusion_pytorch_model.safetensors", folder / "model.safetensors")
            if path.exists()
        ]
    if not files:
        raise CheckpointError(f"{folder} has no safetensors weights; save or download the checkpoint again")
    return {name: shape for path in files for name, shape in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, list[int]]:
    """Shapes in a safetensors file: 8 bytes little-endian length, JSON header of that length, then the tensors."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing, its index lists it; download the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated: its header does not fit into {size} bytes; download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} is not a safetensors file ({error}); download it again") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise CheckpointError(f"{path} is truncated or damaged: {size} bytes, expected {expected}; download it again")
    return {name: entry["shape"] for name, entry in header.items()}


def _read_json(path: Path, why: str) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {why}")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save or download the checkpoint again") from error
    return content


def _local_folder(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or the local copy of a hub checkpoint."""
    if Path(source).is_dir():
        return Path(source)
    expected = f"expected a folder saved with save_pretrained or a hub id owner/name, got {str(source)!r}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise CheckpointError(f"{expected}, and there is no such folder")
    try:
        return Path(StableDiffusion3Pipeline.download(str(source), revision=revision))
    except OSError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{expected}: there is no such folder, and the hub gave nothing ({reason})") from error


def _parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _latent_shape(pipeline: StableDiffusion3Pipeline, resolution: int | None) -> tuple[int, int, int]:
    config, pixels = pipeline.transformer.config, pipeline.vae_scale_factor
    side = config.sample_size if resolution is None else resolution // pixels
    if resolution is not None and resolution % (pixels * config.patch_size):
        raise ConfigError(f"resolution must be a multiple of {pixels * config.patch_size} pixels, got {resolution}")
    largest = config.pos_embed_max_size * config.patch_size * pixels
    if side * pixels > largest:
        raise ConfigError(f"this checkpoint has positions for up to {largest} pixels, got resolution {resolution}")
    return config.in_channels, side, side


def _use_double_norms(module: nn.Module) -> None:
    """Puts torch's RMS norm in place of diffusers', which computes the variance in float32 whatever the dtype."""
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, RMSNorm):
                double = nn.RMSNorm(norm.dim, eps=norm.eps, elementwise_affine=norm.weight is not None)
                double.weight = norm.weight
                setattr(parent, name, double)


def _store_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Stores frozen linear and convolution weights in `dtype`: autocast would cast them to it in every call."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
