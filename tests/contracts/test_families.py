"""Every method on every model family: it takes a step as configured for users, or says which models fit.

The configurations are those of conf/, bfloat16 and overlays included; checkpoints and batches are tiny.
"""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from alignbench import assembly, needs
from alignbench.configuration import target
from alignbench.errors import ConfigError
from tests.conftest import CONF, Compose
from tests.contracts.test_methods import METHODS, SMALLER, chosen, frozen, loop, published, trained
from tests.tiny import FAMILIES

MODELS = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "model").glob("*.yaml"))}
VELOCITY = ["flux_dev", "sd35_medium", "shapes"]
TINY = {  # what a tiny checkpoint needs otherwise than the model itself
    "flux_dev": ["model.policy.max_sequence_length=12"],
    "sd35_medium": ["model.policy.max_sequence_length=12"],
}


def fits(model: str, method: str) -> bool:
    """Whether the method's class says that its equations hold for what the model predicts."""
    predicts = "velocity" if model in VELOCITY else "epsilon"
    algorithm = target(published(method).algorithm, "method.algorithm")
    return predicts in algorithm.needs.parameterisations  # type: ignore[attr-defined]


PAIRS = [(model, method) for model in FAMILIES for method in METHODS]
FITTING = [pair for pair in PAIRS if fits(*pair)]


def configured(tiny_run: Compose, folder: Path, model: str, method: str, *overrides: str) -> DictConfig:
    """The model and the method as conf/ has them, with what a run takes for 2 prompts x 4 images of 16 x 16 pixels."""
    batch = published(method).batch
    config = tiny_run(
        f"model={model}",
        f"method={method}",
        f"model.policy.source={folder}",
        "model.policy.resolution=16",
        f"method.batch.images={min(4, batch.images)}",
        f"method.batch.updates={min(2, batch.updates)}",
        *TINY.get(model, []),
        *chosen(SMALLER, method),
        *overrides,
    )
    with open_dict(config):
        config.reward.parts.red.photo = config.reward.parts.red.shapes
    return config


def test_every_model_is_here() -> None:
    assert {"shapes", *FAMILIES} == MODELS.keys()
    assert [model for model in MODELS if needs.parameterisation(MODELS[model]) == "velocity"] == VELOCITY  # type: ignore[arg-type]


def test_the_documents_name_the_methods_that_also_hold_for_noise() -> None:
    text = " ".join((CONF.parent / "docs" / "models.md").read_text(encoding="utf-8").split())
    (sentence,) = re.findall(r"The preference family \(([^)]*)\), ([^.]*) also hold for models that predict", text)
    named = set(re.findall(r"`(\w+)`", " ".join(sentence)))
    for model in ("sd15", "sdxl"):
        assert {method for method in METHODS if fits(model, method)} == named


@pytest.mark.parametrize(("model", "method"), FITTING)
def test_an_iteration_changes_the_trained_weights_alone_and_costs_what_the_method_says(
    tiny_run: Compose, checkpoints: dict[str, Path], model: str, method: str
) -> None:
    run = loop(configured(tiny_run, checkpoints[model], model, method))
    before, others = trained(run), frozen(run)
    row = run.iterate()
    after = trained(run)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    torch.testing.assert_close(frozen(run), others, rtol=0, atol=0)

    spent, cost = row["ledger"], run.parts.method.expected_cost()
    assert spent["phases"]["training"]["nfe"] == cost.training > 0
    assert spent["backward"] == cost.backward > 0
    assert spent["optimizer_steps"] == run.parts.method.batch.updates
    if cost.rollout:
        assert spent["phases"]["rollout"]["nfe"] == cost.rollout
        assert (spent["images"], spent["reward_calls"]) == (cost.images, cost.reward_calls)
    else:  # pairs are collected once, in the first iteration
        assert spent["phases"]["rollout"]["nfe"] > 0
        assert spent["images"] == spent["reward_calls"] == run.parts.method.batch.total
    flops = run.parts.policy.flops()
    assert spent["flops"] > (cost.rollout + cost.training) * flops["denoiser"]


@pytest.mark.parametrize(("model", "method"), [pair for pair in PAIRS if pair not in FITTING])
def test_another_pair_is_refused_before_anything_is_loaded(tiny_run: Compose, model: str, method: str) -> None:
    with pytest.raises(ConfigError) as raised:
        assembly.assemble(configured(tiny_run, Path("/nowhere"), model, method))
    assert str(raised.value) == (
        f"{method} holds for models that predict velocity, but {model} predicts epsilon; "
        f"models that fit: {', '.join(VELOCITY)}"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["overlay=none"], "grid 'shifted_linspace' is made for flow models; set method.rollout.grid to pipeline"),
        (["method.rollout.steps=501"], "expected 2 to 500 sampling steps, got 501"),
        (["evaluation.final.steps=501"], "expected 2 to 500 sampling steps, got 501"),
        (["evaluation.curve.grid=shifted_linspace"], "grid 'shifted_linspace' is made for flow models"),
    ],
)
def test_time_steps_that_a_model_does_not_have_are_refused_before_it_samples(
    tiny_run: Compose, checkpoints: dict[str, Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        assembly.assemble(configured(tiny_run, checkpoints["sd15"], "sd15", "draft", *overrides))
