"""Frozen weights of reward models: from a folder, a file, or the hub's local cache."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from alignbench.errors import CheckpointError
from alignbench.foreign import reading
from alignbench.hub import refusal


def load_frozen(kind: Any, model: str | Path, expected: str) -> Any:
    """A frozen float32 model of transformers in evaluation mode.

    Args:
        kind: its class, for example ``CLIPModel``.
        model: folder or hub id.
        expected: what would work, for messages.

    Raises:
        CheckpointError: files are missing or damaged, or lack weights that the model needs, or have them in other
            shapes.
    """
    with reading(f"a {kind.__name__} from {model}", expected):
        loaded, report = kind.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    if report["mismatched_keys"]:
        name, there, made = min(report["mismatched_keys"])
        raise CheckpointError(
            f"cannot read a {kind.__name__} from {model}: {name} has shape {list(there)}, its config.json says "
            f"{list(made)}. Expected {expected}"
        )
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
