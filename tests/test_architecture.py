"""What an architecture costs, against the model itself."""

from pathlib import Path

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from alignbench import architecture, assembly
from alignbench.configuration import CONF
from alignbench.cost import narrowed
from alignbench.errors import ConfigError
from alignbench.ledger import Ledger
from alignbench.policies.diffusers_policy import DiffusersPolicy
from alignbench.policies.saved_pipeline import ARCHITECTURES
from alignbench.processes import Processes
from alignbench.stack import Stack
from tests.stand_ins import Red
from tests.tiny import FAMILIES

# Parameters of the published denoisers, by their model cards and by diffusers; texts and images apart.
PUBLISHED = {
    "sd35_medium": 2_243_171_520,
    "flux_dev": 11_901_408_320,
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
}


def configured(model: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"model={model}", "device=cpu", *overrides])


def tiny(model: str, folder: Path, *overrides: str) -> DictConfig:
    length = ["model.policy.max_sequence_length=10"] if model in ("sd35_medium", "flux_dev") else []
    small = [f"model.policy.source={folder}", "model.policy.resolution=16", "model.policy.rank=4"]
    return configured(model, *small, *length, *overrides)


def test_the_meter_follows_sizes_and_lives() -> None:
    """x W is 2 * 10 * 100 * 50 FLOPs; a view holds nothing; what is dropped is given back."""
    with architecture.abstract(), architecture.Meter() as meter:
        x, w = torch.zeros(10, 100), torch.zeros(100, 50)
        y = x @ w
        assert meter.flops == 2 * 10 * 100 * 50
        assert meter.held == 4 * (10 * 100 + 100 * 50 + 10 * 50)
        y = y.view(500).double()
        assert meter.held == 4 * (10 * 100 + 100 * 50) + 8 * 500
        assert meter.peak == 4 * (10 * 100 + 100 * 50 + 10 * 50) + 8 * 500
        del x, w, y
        assert meter.held == 0


def test_what_was_there_before_is_not_held() -> None:
    x = torch.zeros(1000)
    with architecture.Meter() as meter:
        x.mul_(2)
        same = x.view(10, 100)
        assert meter.held == meter.peak == 0
        twice = same * 2
        assert meter.held == 4 * twice.numel()


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("model", FAMILIES)
def test_costs_are_those_of_the_model_itself(checkpoints: dict[str, Path], model: str, trainable: str) -> None:
    """FLOPs as the stack counts them while a real model runs, and its weights."""
    config = tiny(model, checkpoints[model], f"model.policy.trainable={trainable}")
    policy = assembly.pretrained(config, Processes("cpu"))
    assert isinstance(policy, DiffusersPolicy)
    with architecture.abstract():
        found = architecture.costs(assembly.abstract_policy(config))
    stack = Stack(policy, Red(), Ledger(), Processes("cpu"), micro_batch=1)
    assert found.flops == {name: stack.flops[name] for name in found.flops}
    assert found.flops["denoiser_backward"] > 0
    real = architecture.costs(policy)
    assert (found.weights, found.trained) == (real.weights, real.trained)


@pytest.mark.parametrize("model", ["sd35_medium", "sd15"])
def test_memory_is_what_a_real_model_holds(model: str, tmp_path: Path) -> None:
    """A tenth of the width, 128 x 128 pixels: large enough that activations outweigh everything else."""
    config = configured(model, f"model.policy.source={tmp_path}", "model.policy.resolution=128")
    with open_dict(config):
        config.model.policy.weights = "random"
    narrowed(ARCHITECTURES / configured(model).model.policy.source, tmp_path, width=0.1, depth=0.1)
    with architecture.abstract():
        found = architecture.costs(assembly.abstract_policy(config))
    policy = assembly.pretrained(config, Processes("cpu"))
    assert isinstance(policy, DiffusersPolicy)
    real = architecture.costs(policy)
    for name in ("sample", "call", "decode", "decode_gradient"):
        assert getattr(found, name) == pytest.approx(getattr(real, name), rel=0.02), name


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_architectures_in_the_package_are_the_published_ones(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded for them; all weights, because LoRA adds some."""

    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("alignbench.policies.saved_pipeline.snapshot_download", refused)
    with architecture.abstract():
        policy = assembly.abstract_policy(configured(model, "model.policy.trainable=full"))
        assert sum(parameter.numel() for parameter in policy.trainable_parameters().values()) == PUBLISHED[model]
        tensors = policy.encode(["a text"]).tensors
        assert len(tensors["prompt"]) == 1


def test_an_architecture_needs_no_memory(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of a full model are refused where they do not fit, unless they are without values."""
    config = configured("shapes", f"model.policy.source={tiny_checkpoint}", "model.policy.trainable=full")
    none = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: none)
    with pytest.raises(ConfigError, match=r"0\.0 GB are free"):
        assembly.pretrained(config, Processes("cpu"))
    with architecture.abstract():
        assembly.abstract_policy(config).add_view("old")
