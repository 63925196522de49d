"""Frozen weights of reward models: from a folder, a file, or the hub's local cache."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alignbench.errors import CheckpointError
from alignbench.hub import refusal


def load_frozen(kind: Any, model: str | Path, expected: str) -> Any:
    """A frozen float32 model of transformers in evaluation mode.

    Args:
        kind: its class, for example ``CLIPModel``.
        model: folder or hub id.
        expected: what would work, for messages.

    Raises:
        CheckpointError: files are missing or truncated, or the file lacks weights that the model needs, or has them in
            other shapes.
    """
    try:
        loaded, report = kind.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load a {kind.__name__} from {model}: {refusal(error)}. Expected {expected}"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"cannot load a {kind.__name__} from {model}: its weights have other shapes than its config.json says. "
            f"Expected {expected}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{model} has no weights for {missing[0]} and {len(missing) - 1} more: not a whole {kind.__name__}. "
            f"Expected {expected}"
        )
    return loaded.eval().requires_grad_(False)


def weights_file(place: str) -> Path:
    """A file of weights: a path, or ``organisation/repository/file`` on the hub.

    Raises:
        CheckpointError: it is neither here nor in the hub's cache, and cannot be fetched.
    """
    if Path(place).is_file():
        return Path(place)
    organisation, _, rest = place.partition("/")
    repository, _, name = rest.partition("/")
    expected = "expected the path of a file, or organisation/repository/file on the hub"
    if not organisation or not repository or not name:
        raise CheckpointError(f"there are no weights at {place}: {expected}")
    try:
        return Path(hf_hub_download(f"{organisation}/{repository}", name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"there are no weights at {place}: {expected} ({refusal(error)})") from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of one that torch wrote, by name; no code of the file is run.

    Raises:
        CheckpointError: the file is truncated or holds something else.
    """
    try:
        held = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} holds no readable weights: {error}") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise CheckpointError(f"{file} holds no weights: expected tensors by name")
    return held
