"""What every policy over a diffusers pipeline shares: weights, guidance, the autoencoder, costs, export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alignbench.errors import ConfigError
from alignbench.foreign import reading
from alignbench.policies.policy import Condition, Policy
from alignbench.policies.saved_pipeline import WHOLE, WeightSource, load_pipeline, local_folder, model_without_weights
from alignbench.policies.weights import Weights, add_lora

MOST_GRAPHS = 64  # of a compiled denoiser; torch would run what comes after 8 without compiling it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Options(TypedDict, total=False):
    """What `from_pretrained` of every family takes beside the source and what is its own.

    Attributes:
        revision: commit, tag or branch on the hub.
        weights: ``pretrained``, or ``random``, which needs configurations and tokenizers alone, to measure costs.
        dtype: compute dtype of the denoiser: float32 (default), bfloat16 (autocast) or float64 (everything in double).
        vae_dtype: compute dtype of the autoencoder; default float32 (float64 for a float64 policy).
        device: of models, latents and images; default cpu.
        trainable: ``lora`` (default) or ``full``.
        rank: of LoRA; default 32.
        alpha: LoRA's outputs are scaled by alpha / rank; default 64.
        targets: names of the layers that LoRA is added to; default the family's `lora_targets`.
        seed: of the values that LoRA starts from; default 0.
        resolution: side of the images in pixels; default what the checkpoint was made for.
        gradient_checkpointing: recompute the denoiser's blocks in the backward pass.
        vae_gradient_checkpointing: the same for the autoencoder, where losses reach through decoded images.
        vae_slicing: decode images one at a time: less memory.
        vae_tiling: decode large images in overlapping tiles: still less, with another result at the seams.
        offload_text_encoders: keep the text encoders in main memory while they have nothing to read.
        compile: compile the denoiser for each batch size it meets.
    """

    revision: str | None
    weights: WeightSource
    dtype: str
    vae_dtype: str | None
    device: str | torch.device
    trainable: Literal["lora", "full"]
    rank: int
    alpha: float
    targets: Sequence[str] | None
    seed: int
    resolution: int | None
    gradient_checkpointing: bool
    vae_gradient_checkpointing: bool
    vae_slicing: bool
    vae_tiling: bool
    offload_text_encoders: bool
    compile: bool


class DiffusersPolicy(Policy):
    """A diffusers pipeline whose denoiser is trained.

    Weights that are trained are float32 whatever the compute dtype; frozen linear and convolution weights are stored in
    the compute dtype, which is what autocast would make of them in every call.

    Attributes:
        pipeline_class: of diffusers.
        denoiser_name: the pipeline's component that is trained.
        text_encoders: its components that read text.
        lora_targets: names of the layers that LoRA is added to where nothing else is said.
    """

    pipeline_class: ClassVar[Any]
    denoiser_name: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        pipeline: Any,
        *,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        device: torch.device,
        trainable: Literal["lora", "full"],
        latent_shape: tuple[int, int, int],
        rank: int = 32,
        alpha: float = 64.0,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        vae_gradient_checkpointing: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        offload_text_encoders: bool = False,
        compile: bool = False,
    ) -> None:
        """Takes over a loaded pipeline; `Options` explains the arguments."""
        super().__init__()
        self.pipeline = pipeline
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.vae: Any = pipeline.vae
        self.device, self.dtype, self.vae_dtype = device, dtype, vae_dtype
        self.latent_shape = latent_shape
        self.trainable = trainable
        self.offload_text_encoders = offload_text_encoders

        modules = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
        for module in modules.values():
            module.requires_grad_(False).eval()
        if dtype == torch.float64:
            _use_double_norms(self.denoiser)
        if trainable == "lora":
            add_lora(self.denoiser, self.lora_targets if targets is None else targets, rank, alpha, seed)
            _store_frozen(self.denoiser, dtype)
        else:
            self.denoiser.requires_grad_(True)
        _store_frozen(self.vae, vae_dtype)
        for name, module in modules.items():
            if not (offload_text_encoders and name in self.text_encoders):
                _move(module, device)
        self.lora_scale = alpha / rank
        self.weights = Weights(self.denoiser, base_is_reference=trainable == "lora")
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing(self._checkpoint)
        if vae_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if vae_slicing:
            self.vae.enable_slicing()
        if vae_tiling:
            self.vae.enable_tiling()
        if compile:
            limit = torch._dynamo.config.recompile_limit  # graphs: batch sizes x with and without gradients x views
            torch._dynamo.config.recompile_limit = max(limit, MOST_GRAPHS)
            self.denoiser.compile(dynamic=False)
        self._unconditional: Condition | None = None
        self._flops: dict[str, float] | None = None
        self._encoders_ready = not offload_text_encoders

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Unpack[Options]) -> Self:
        """Loads a checkpoint and makes its denoiser trainable; see `load`."""
        return cls.load(source, **options)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        weights: WeightSource = "pretrained",
        dtype: str = "float32",
        vae_dtype: str | None = None,
        device: str | torch.device = "cpu",
        trainable: Literal["lora", "full"] = "lora",
        **options: Any,
    ) -> Self:
        """What every family's `from_pretrained` ends in.

        Args:
            source: folder of a saved pipeline, or a hub id ``owner/name``.
            options: see `Options`, and what is the family's own.

        Raises:
            CheckpointError: the folder is absent, incomplete, truncated or of another pipeline; nothing was loaded yet.
            ConfigError: an argument that this checkpoint cannot work with.
        """
        if trainable not in ("lora", "full"):
            raise ConfigError(f"trainable must be 'lora' or 'full', got {trainable!r}")
        compute, vae_compute = _compute_dtypes(dtype, vae_dtype)
        dtypes = cls.weight_dtypes(compute, torch.float64 if compute == torch.float64 else torch.float32, trainable)
        pipeline = load_pipeline(cls.pipeline_class, source, revision, weights, cls.check_checkpoint, dtypes)
        device = torch.device(device)
        return cls(pipeline, dtype=compute, vae_dtype=vae_compute, device=device, trainable=trainable, **options)

    @classmethod
    def check_source(cls, source: str | Path, revision: str | None = None) -> None:
        """Checks a checkpoint that is to be loaded later; one of the hub is downloaded. Raises as `load` does."""
        folder = local_folder(source, revision, cls.pipeline_class, weights="pretrained")
        with reading(folder, WHOLE):
            cls.check_checkpoint(folder)

    @classmethod
    def denoiser_without_weights(cls, source: str | Path, revision: str | None = None) -> Any:
        """The denoiser of a checkpoint on the meta device: its layers and their shapes, from its configuration.

        Raises:
            CheckpointError: there is no such checkpoint, or its configuration is not one of the denoiser's class.
        """
        folder = local_folder(source, revision, cls.pipeline_class, weights="pretrained") / cls.denoiser_name
        (kind,) = cls.pipeline_class._get_signature_types()[cls.denoiser_name]
        return model_without_weights(folder / "config.json", kind)

    @classmethod
    @abstractmethod
    def check_checkpoint(cls, folder: Path, weights: WeightSource = "pretrained") -> dict[str, Any]:
        """Checks a saved pipeline by its indexes and safetensors headers, without loading weights.

        Returns:
            What to load: the content of ``model_index.json``, library and class by component; None where there is none.

        Raises:
            CheckpointError: naming the file, what was expected and what is there.
        """

    @classmethod
    def weight_dtypes(cls, compute: torch.dtype, master: torch.dtype, trainable: str) -> dict[str, torch.dtype]:
        """What the weights are loaded in, by component or ``default``.

        Args:
            compute: dtype of the denoiser's calls.
            master: of weights that are trained: float32, or float64 for a float64 policy.
        """
        return {"default": master}

    # Text

    def encode(self, texts: Sequence[str]) -> Condition:
        """See `Policy.encode`."""
        if all(text in self._embeddings for text in texts):
            return super().encode(texts)
        with self._encoders_on_device():  # once for all texts
            return super().encode(texts)

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        """Text encoders are on the device inside, and in main memory outside if they are offloaded."""
        if self._encoders_ready:
            yield
            return
        encoders = [getattr(self.pipeline, name) for name in self.text_encoders]
        encoders = [encoder for encoder in encoders if encoder is not None]
        for encoder in encoders:
            _move(encoder, self.device)
        self._encoders_ready = True
        try:
            yield
        finally:
            self._encoders_ready = False
            for encoder in encoders:
                _move(encoder, torch.device("cpu"))

    def unconditional(self) -> Condition:
        """What guidance contrasts a text with, one row: the empty text."""
        return self.encode([""])

    # Images

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

        Guidance is one call of 2B, unconditional half first, as in the pipelines. Where gradients are recorded and
        `detach_uncond` is set, it is a call of B without gradient and one of B with, which saves the backward pass of
        the half whose gradient is thrown away.
        """
        if sigma.shape != latents.shape[:1] or len(condition) != len(latents):
            raise ValueError(
                f"expected one sigma and one condition for each of {len(latents)} latents, "
                f"got sigma of shape {list(sigma.shape)} and {len(condition)} conditions"
            )
        self.check_guidance_embedding(guidance_embedding)
        with self.weights.using(view):
            if guidance == 1.0:
                return self._output(latents, sigma, condition, guidance_embedding)
            if self._unconditional is None:
                self._unconditional = self.unconditional()
            unconditional = self._unconditional.expand(len(latents))
            if detach_uncond and torch.is_grad_enabled():
                with torch.no_grad():
                    uncond = self._output(latents, sigma, unconditional, guidance_embedding)
                cond = self._output(latents, sigma, condition, guidance_embedding)
            else:
                both = Condition.cat([unconditional, condition])
                twice = latents.repeat(2, 1, 1, 1), sigma.repeat(2), both
                uncond, cond = self._output(*twice, guidance_embedding).chunk(2)
            return uncond + guidance * (cond - uncond)

    def check_guidance_embedding(self, guidance_embedding: float | None) -> None:
        """Refuse a guidance input where the model has none.

        Raises:
            ConfigError: it was given.
        """
        if guidance_embedding is not None:
            raise ConfigError(
                f"this model has no guidance input, got guidance_embedding={guidance_embedding}; use guidance"
            )

    def _output(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance_embedding: float | None) -> Tensor:
        with self._autocast(self.dtype):
            output = self.denoise(latents, sigma, condition, guidance_embedding)
        return output.to(self.latent_dtype)

    @abstractmethod
    def denoise(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance_embedding: float | None) -> Tensor:
        """One pass of the denoiser with the weights that are installed, under autocast."""

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

    def flops(self) -> Mapping[str, float]:
        """See `Policy.flops`; counted once by running each model on one sample (a multiply-add is two)."""
        if self._flops is None:
            latents = torch.zeros(1, *self.latent_shape, device=self.device, dtype=self.latent_dtype)
            sigma, condition = latents.new_full((1,), 0.5), self.encode([""])
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

    # Weights

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the models that stay on the device, by component of the pipeline."""
        return {
            name: sum(each.numel() * each.element_size() for each in [*module.parameters(), *module.buffers()])
            for name, module in self.pipeline.components.items()
            if isinstance(module, nn.Module) and not (self.offload_text_encoders and name in self.text_encoders)
        }

    def export(self, folder: Path | str, view: str = "evaluation") -> None:
        """Writes a view for diffusers.

        LoRA: ``pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights(folder)``. The scale alpha / rank is
        multiplied into B, so that every reader gets the same images, also one that ignores a stored alpha.
        Full: a folder of the denoiser, for the ``from_pretrained`` of its class.
        """
        if self.trainable == "full":
            with self.weights.using(view):
                self.denoiser.save_pretrained(folder)
            return
        layers = {
            f"{name}.weight": (tensor * self.lora_scale if name.endswith("lora_B") else tensor).detach().float().cpu()
            for name, tensor in self.weights.tensors(view).items()
        }
        self.pipeline_class.save_lora_weights(folder, **{f"{self.denoiser_name}_lora_layers": layers})

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


def _compute_dtypes(dtype: str, vae_dtype: str | None) -> tuple[torch.dtype, torch.dtype]:
    """The compute dtypes of denoiser and autoencoder; null is float32, or float64 for a float64 policy.

    Raises:
        ConfigError: an unknown name, or only one of both is float64.
    """
    compute = _parse_dtype(dtype)
    vae_compute = _parse_dtype(vae_dtype or ("float64" if dtype == "float64" else "float32"))
    if (compute == torch.float64) != (vae_compute == torch.float64):
        raise ConfigError(f"dtype and vae_dtype must both be float64 or neither, got {dtype} and {vae_dtype}")
    return compute, vae_compute


def latent_side(resolution: int | None, default: int, pixels: int, multiple: int) -> int:
    """Side of the latents.

    Args:
        resolution: side of the images in pixels; None takes the `default` side of the latents.
        pixels: image pixels a latent.
        multiple: latents that a side must be a multiple of.

    Raises:
        ConfigError: a side that the model cannot work on.
    """
    if resolution is None:
        return default
    if resolution < 1 or resolution % (pixels * multiple):
        raise ConfigError(f"resolution must be a multiple of {pixels * multiple} pixels, got {resolution}")
    return resolution // pixels


def _parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _move(module: nn.Module, device: torch.device) -> None:
    """Moves a module that is elsewhere; tensors without memory cannot be moved, and need not be."""
    if next(module.parameters()).device != device:
        module.to(device)


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
