"""LoRA files of others: diffusers' and PEFT's layouts, as the uniform low-rank updates that a policy takes.

A file may give every layer a rank and an alpha of its own. Here the scale alpha / rank is multiplied into B and smaller
ranks are padded with zeros, so that one rank R and alpha = R hold for all layers; the update ``B A`` stays the same.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignbench.errors import CheckpointError, ConfigError
from alignbench.hub import refusal
from alignbench.policies.policy import Policy

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, in the file's header
KEY = re.compile(
    r"(?:base_model\.model\.|transformer\.|unet\.)?(?P<layer>.+?)\."
    r"(?:(?P<down>lora_A(?:\.default)?\.weight|lora[._]down\.weight)"
    r"|(?P<up>lora_B(?:\.default)?\.weight|lora[._]up\.weight)|(?P<alpha>alpha))"
)


KOHYA = re.compile(r"lora_(?:unet|te\d?|transformer)_")  # the layers' paths have _ for ., as their names do


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of linear layers, scaled: a layer's weight becomes ``W + B A``.

    Attributes:
        source: the file.
        layers: by path within the denoiser: A ``[rank, in]`` and B ``[out, rank]``, float32.
    """

    source: Path
    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(len(a) for a, _ in self.layers.values())

    def settings(self) -> dict[str, Any]:
        """What a policy must be made with to take these updates."""
        return {"trainable": "lora", "rank": self.rank, "alpha": float(self.rank), "targets": sorted(self.layers)}

    def install(self, policy: Policy, view: str) -> None:
        """Put the updates into a new view of a policy that was made with ``settings``.

        Raises:
            CheckpointError: a layer has another shape.
        """
        current = policy.trainable_parameters()
        tensors = {}
        for layer, (a, b) in self.layers.items():
            missing = self.rank - len(a)
            padded = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
            for name, tensor in zip((f"{layer}.lora_A", f"{layer}.lora_B"), padded, strict=True):
                if tensor.shape != current[name].shape:
                    raise CheckpointError(
                        f"{self.source}: {name} has shape {list(tensor.shape)}, the model's layer takes "
                        f"{list(current[name].shape)}: a LoRA of another model"
                    )
                tensors[name] = tensor
        state = policy.state_dict()
        policy.load_state_dict(state | {f"{view}/{name}": tensor for name, tensor in tensors.items()})


def read_lora(source: str) -> Lora:
    """Read a LoRA: a ``.safetensors`` file, a folder of diffusers or PEFT with one, or a hub id.

    Raises:
        CheckpointError: nothing there, a damaged file, or updates that are more than ``B A`` on linear layers of the
            denoiser (text encoders, convolutions, DoRA).
    """
    path = _file(source)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file that can be read ({error}); download it again"
        ) from error
    if any(map(KOHYA.match, tensors)):
        raise CheckpointError(
            f"{path} is in kohya's format; diffusers converts it: pipe.load_lora_weights(FILE), then "
            "pipe.transformer.save_lora_adapter(FOLDER), or pipe.unet for a U-Net; evaluate FOLDER"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or match["layer"].startswith("text_encoder"):
            raise CheckpointError(
                f"{path}: cannot use {key}; expected LoRA layers of the denoiser in diffusers' or PEFT's format, such "
                "as transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
            )
        kind = next(name for name in ("down", "up", "alpha") if match[name])
        found.setdefault(match["layer"], {})[kind] = tensor
    if not found:
        raise CheckpointError(f"{path}: no tensors in this file")
    config = _peft_config(path, header)
    return Lora(path, {layer: _scaled(path, layer, parts, config) for layer, parts in found.items()})


def _scaled(path: Path, layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if "down" not in parts or "up" not in parts:
        raise CheckpointError(f"{path}: {layer} has only {' and '.join(parts)} of its two matrices")
    a, b = parts["down"].float(), parts["up"].float()
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise CheckpointError(
            f"{path}: {layer} has matrices of shapes {list(a.shape)} and {list(b.shape)}; expected [rank, in] and "
            "[out, rank] of a linear layer"
        )
    rank = len(a)
    if "alpha" in parts:
        alpha = float(parts["alpha"])
    else:
        patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        own = [value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)]
        alpha = float(own[0] if own else config.get("lora_alpha", rank))
    return a, b * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _peft_config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration beside the file or, as diffusers keeps it, in its header; empty if there is none."""
    beside = path.with_name(PEFT_CONFIG)
    try:
        if beside.exists():
            config = json.loads(beside.read_text(encoding="utf-8"))
        else:
            packed = json.loads(header.get(METADATA, "{}"))
            config = {key.partition(".")[2]: value for key, value in packed.items()}
        assert isinstance(config, dict)
    except (ValueError, AssertionError, AttributeError) as error:
        raise CheckpointError(f"{path}: its PEFT configuration is not a JSON object ({error})") from error
    if config.get("use_dora"):
        raise CheckpointError(f"{path} is a DoRA: only plain LoRA can be evaluated; merge it into a checkpoint first")
    return config


def _file(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        expected = f"expected a .safetensors file, a folder with one, or a hub id owner/name, got {source!r}"
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
            raise CheckpointError(f"{expected}, and there is no such file or folder")
        try:
            path = Path(snapshot_download(source, allow_patterns=["*.safetensors", PEFT_CONFIG]))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{expected}: nothing there, and the hub gave nothing ({refusal(error)})") from error
    files = [path / name for name in FILES if (path / name).exists()] or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(
            f"{path} holds {len(files)} safetensors files: expected one LoRA ({' or '.join(FILES)}); name the file"
        )
    return files[0]


def policy_error(lora: Lora, model: str, error: ConfigError) -> CheckpointError:
    """What a policy says that has not the layers of a LoRA."""
    some = ", ".join(sorted(lora.layers)[:2])
    return CheckpointError(f"{lora.source} is a LoRA of another model than {model}: it changes {some} ... ({error})")
