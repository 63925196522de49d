"""Weights of a denoiser alone: wherever they lie, the same numbers as its own folder gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from alignbench.errors import CheckpointError
from alignbench.policies.denoiser import install_denoiser, is_pipeline, local_denoiser
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from tests.tiny import tiny_sd3


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser's folder of another checkpoint."""
    return tiny_sd3(tmp_path_factory.mktemp("other"), seed=1) / "transformer"


@pytest.fixture
def policy(tiny_checkpoint: Path) -> Any:
    return StableDiffusion3Policy.from_pretrained(tiny_checkpoint, trainable="full", max_sequence_length=0)


def check_installed(policy: Any, folder: Path) -> None:
    expected = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    installed = policy.weights.tensors("evaluation")
    assert installed
    for name, tensor in installed.items():
        assert torch.equal(tensor, expected[name]), name
    assert any(not torch.equal(tensor, policy.weights.tensors("reference")[name]) for name, tensor in installed.items())


@pytest.mark.parametrize("layout", ["folder", "file", "renamed", "shards", "pickle", "pickle in a folder"])
def test_weights_are_found_in_every_layout(policy: Any, other: Path, tmp_path: Path, layout: str) -> None:
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "there"
    path.mkdir()
    if layout == "folder":
        path = other
    elif layout == "file":
        path = other / "diffusion_pytorch_model.safetensors"
    elif layout == "renamed":
        save_file(state, path / "srpo.safetensors")
    elif layout == "shards":
        SD3Transformer2DModel.from_pretrained(other).save_pretrained(path, max_shard_size="20KB")
        assert len(list(path.glob("*.safetensors"))) > 1
    else:
        torch.save(state, path / "unet.pth")
        path = path / "unet.pth" if layout == "pickle" else path
    assert not is_pipeline(str(path))
    install_denoiser(local_denoiser(str(path)), policy)
    check_installed(policy, other)


@pytest.mark.parametrize("below", ["", "/transformer", "/transformer/diffusion_pytorch_model.safetensors"])
def test_weights_on_the_hub_are_read_from_the_local_cache(
    policy: Any, other: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    snapshot = other.parent if below else other
    monkeypatch.setattr("alignbench.foreign.snapshot_download", lambda name, allow_patterns: str(snapshot))
    assert not is_pipeline(f"someone/model{below}")
    install_denoiser(local_denoiser(f"someone/model{below}"), policy)
    check_installed(policy, other)


def test_a_pipeline_on_the_hub_is_one(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignbench.foreign.snapshot_download", lambda name, allow_patterns: str(other.parent))
    assert is_pipeline("someone/model")
    assert is_pipeline(str(other.parent))


def test_weights_of_something_else(policy: Any, other: Path, tmp_path: Path) -> None:
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    name = "proj_out.weight"
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "fewer": ({key: state[key] for key in state if key != name}, "1 weights are missing, 0 unknown: it has no p"),
        "more": ({**state, "own.weight": torch.ones(1)}, r"0 weights are missing, 1 unknown: it has own\.weight"),
        "shape": ({**state, name: torch.ones(2)}, r"proj_out\.weight is torch\.float32 of shape \[2\], expected"),
        "whole": ({**state, name: state[name].int()}, r"proj_out\.weight is torch\.int32"),
        "renamed": ({f"model.diffusion_model.{key}": value for key, value in state.items()}, "from_single_file"),
    }  # fmt: skip
    for case, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / f"{case}.safetensors")
        with pytest.raises(CheckpointError, match=message):
            install_denoiser(tmp_path / f"{case}.safetensors", policy)
    torch.save(nn.Linear(2, 2), tmp_path / "unet.pth")
    with pytest.raises(CheckpointError, match=r"unet\.pth: .*Expected a file of tensors alone"):
        install_denoiser(tmp_path / "unet.pth", policy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there are no weights in this folder"):
        install_denoiser(tmp_path / "empty", policy)
    (tmp_path / "empty" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    with pytest.raises(CheckpointError, match="expected files beside it"):
        install_denoiser(tmp_path / "empty", policy)
