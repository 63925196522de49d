"""Saving and finding the state of an interrupted pretraining, atomically."""

import os
from pathlib import Path
from typing import Any

import torch

from alignbench.errors import CheckpointError

SECONDS_BETWEEN = 60.0
"""A state is written about once a minute."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a state beside its target, then puts it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The state at ``path``, or None where there is none yet.

    Raises:
        CheckpointError: the state was written by another recipe.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != recipe:
        raise CheckpointError(
            f"{path} was written by the recipe {state['recipe']}, expected {recipe}: "
            "remove it to start again, or name another --state"
        )
    return state
