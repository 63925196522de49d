"""What every method keeps to, whatever it is: each file of conf/method is tested by existing.

Methods run with their published settings on the tiny checkpoint and the reward ``Red``; only sizes are smaller.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from alignbench import assembly, plan
from alignbench.configuration import identity
from alignbench.records import RunDirectory, strip_volatile
from alignbench.run import Loop
from alignbench.seeding import seeds_of
from tests.conftest import CONF, Compose

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))

# What a method, or every method of a class, needs otherwise to fit 2 prompts x 4 images and 3 steps. Most need nothing.
SMALLER: dict[str, list[str]] = {
    "AdvantageWeightedMatching": ["method.algorithm.times=1"],  # 3 steps leave 1 to train
    "BestOfN": ["method.algorithm.times=2"],
    "Preference": ["method.algorithm.pairs_per_update=8"],
    "RewardWeighted": ["method.algorithm.times=2"],
    "TempFlowGRPO": ["method.algorithm.seeds=2", "method.algorithm.branches=2"],
    "flow_grpo_fast": ["method.algorithm.window.size=1", "method.algorithm.window.last=2"],
    "mix_grpo": ["method.algorithm.window.size=1", "method.algorithm.window.last=2"],
}

# What it needs otherwise to learn ``Red``, which hardly varies here: its standard deviation over images is 0.009.
LEARNING: dict[str, list[str]] = {
    "Preference": ["method.batch.images=64", "method.algorithm.pairs_per_update=16", "method.rollout.guidance=1"],
    "RewardWeighted": ["method.algorithm.temperature=0.001"],
    "TempFlowGRPO": ["method.algorithm.branches=4"],
}


@cache
def published(method: str) -> DictConfig:
    """A method's configuration as it is published."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"method={method}", "overlay=none"]).method  # type: ignore[no-any-return]


def chosen(table: dict[str, list[str]], method: str) -> list[str]:
    """The overrides of a method and of its class."""
    return table.get(published(method).algorithm._target_.rpartition(".")[2], []) + table.get(method, [])


def configured(tiny_run: Compose, method: str, *overrides: str) -> DictConfig:
    """A run of a method: 2 prompts x 4 images (1 where it takes 1), 3 steps, and two updates if it makes several."""
    batch = published(method).batch
    sizes = [f"method.batch.images={min(4, batch.images)}", f"method.batch.updates={min(2, batch.updates)}"]
    return tiny_run(f"method={method}", "overlay=none", *sizes, *chosen(SMALLER, method), *overrides)


def loop(config: DictConfig, records: RunDirectory | None = None) -> Loop:
    return Loop(config, assembly.assemble(config), records, tracker=None, stopping=[])


def trained(of: Loop) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in of.parts.policy.trainable_parameters().items()}


def frozen(of: Loop) -> dict[str, Tensor]:
    """Every parameter of the pipeline that is not trained."""
    components = of.parts.policy.pipeline.components.items()  # type: ignore[attr-defined]
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in components
        if isinstance(module, nn.Module)
        for name, value in module.named_parameters()
        if not value.requires_grad
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_index_of_methods_has_it(method: str) -> None:
    index = (CONF.parent / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    assert f"\n| `{method}` | " in index


@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_changes_the_trained_weights_and_no_others(tiny_run: Compose, method: str) -> None:
    run = loop(configured(tiny_run, method))
    before, others = trained(run), frozen(run)
    run.iterate()
    after = trained(run)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert others
    torch.testing.assert_close(frozen(run), others, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_costs_what_the_method_says(tiny_run: Compose, method: str) -> None:
    """The second one: what is collected once belongs to no iteration. FLOPs show what is decoded with a gradient."""
    run = loop(configured(tiny_run, method))
    run.parts.stack.encode(run.parts.prompts)  # each text once a run, whenever it comes
    run.iterate()
    first = run.parts.ledger.row()
    run.iterate()
    second = run.parts.ledger.row()

    def spent(count: str, phase: str) -> int:
        return int(second["phases"][phase][count] - first["phases"][phase][count])

    cost = run.parts.method.expected_cost()
    assert {phase: spent("nfe", phase) for phase in ("rollout", "training")} == {
        "rollout": cost.rollout,
        "training": cost.training,
    }
    for count in ("backward", "images", "reward_calls"):
        assert second[count] - first[count] == getattr(cost, count), count
    flops = plan.Outline.of(run.parts).flops_per_iteration()  # the reward has none
    assert second["flops"] - first["flops"] == pytest.approx(flops)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_everything(tiny_run: Compose, method: str) -> None:
    config = configured(tiny_run, method)

    def after_two_iterations(seed: int) -> dict[str, Tensor]:
        run = loop(config)
        run.parts.method.seed = seed  # the same model and prompts, other noise
        run.iterate()
        run.iterate()
        return trained(run)

    first, again, other = (after_two_iterations(seed) for seed in (0, 0, 1))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert any(not torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_run_continues_to_the_same_numbers(tiny_run: Compose, tmp_path: Path, method: str) -> None:
    """Two iterations, a checkpoint, another loop that restores it, a third iteration: as three without a stop."""
    config = configured(tiny_run, method)
    whole = loop(config)
    for _ in range(3):
        expected = whole.iterate()
    for iterations in (2, 1):
        with RunDirectory.open(tmp_path / "run", config=identity(config), run={}) as records:
            part = loop(config, records)
            part.restore()
            for _ in range(iterations):
                row = part.iterate()
                records.append_metrics(row)
            part.save()
    assert json.dumps(strip_volatile(row)) == json.dumps(strip_volatile(expected))
    weights, others = (dict(each.parts.policy.state_dict()) for each in (part, whole))  # of every view
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batch_size_does_not_change_the_step(tiny_run: Compose, method: str) -> None:
    config = configured(tiny_run, method, "model.policy.dtype=float64")

    def after_an_iteration(size: int) -> Loop:
        config.micro_batch = size
        run = loop(config)
        run.iterate()
        return run

    whole, split = after_an_iteration(64), after_an_iteration(3)
    torch.testing.assert_close(trained(split), trained(whole), rtol=0, atol=1e-9)
    assert split.parts.ledger.row() == whole.parts.ledger.row()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_finite(tiny_run: Compose, method: str) -> None:
    run = loop(configured(tiny_run, method, "model.policy.dtype=bfloat16"))
    row = run.iterate()
    assert torch.tensor([value for value in row.values() if isinstance(value, float)]).isfinite().all()
    assert all(value.isfinite().all() for value in trained(run).values())


def fresh_rewards(of: Loop, images: int = 128) -> Tensor:
    """Rewards of images of the current weights, by the method's own sampler without its noise; fixed prompts, seeds."""
    sampler = dataclasses.replace(of.parts.method.sampler, stochastic=None, noise_level=0.0, noisy=None)
    prompts = [of.parts.prompts[image % len(of.parts.prompts)] for image in range(images)]
    return of.parts.stack.sample(prompts, sampler, seeds_of("fresh", ids=range(images))).scores["reward"]


@pytest.mark.parametrize("method", METHODS)
def test_the_reward_rises(tiny_run: Compose, method: str) -> None:
    """By five standard errors of a difference of means in 20 iterations."""
    images = min(8, published(method).batch.images)
    sizes = ["method.batch.prompts=4", f"method.batch.images={images}", "method.optimizer.lr=0.003"]
    run = loop(configured(tiny_run, method, *sizes, *chosen(LEARNING, method)))
    before = fresh_rewards(run)
    for _ in range(20):
        run.iterate()
    after = fresh_rewards(run)
    error = torch.sqrt((before.var() + after.var()) / len(before))
    assert after.mean() - before.mean() >= 5 * error
