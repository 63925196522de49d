"""AWM's surrogate, ratio and loss against NumPy in float64, and what they must do whatever the formula."""

import math

import numpy as np
import pytest
import torch

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.errors import ConfigError
from alignbench.methods.awm import AdvantageWeightedMatching, Weighting, ema_decay, scaled, surrogate
from alignbench.methods.method import Clock, Update
from alignbench.prompts.sets import draw
from alignbench.sampling.flow import FlowPath
from tests.conftest import Compose

DOUBLE = ("model.policy.dtype=float64", "method=awm", "overlay=none", "method.rollout.steps=6")


def velocities(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prediction, its target and times."""
    rng = np.random.default_rng(0)
    v, target = (torch.tensor(rng.normal(size=(batch, 3, 2, 2))) for _ in range(2))
    return v, target, torch.tensor(rng.uniform(0.05, 1, batch))


def value(v: np.ndarray, target: np.ndarray, t: float, weighting: str, p: float) -> float:
    """The surrogate of one sample."""
    error = float(np.mean((v - target) ** 2))
    return {
        "ghuber": -(t / p) * ((error + 1e-10) ** p - (1e-10) ** p),
        "uniform": -error,
        "t": -t * error,
        "t_squared": -(t**2) * error,
    }[weighting]


@pytest.mark.parametrize("power", [0.25, 1.5])
@pytest.mark.parametrize("weighting", ["ghuber", "uniform", "t", "t_squared"])
def test_surrogate_equals_the_papers_weightings(weighting: Weighting, power: float) -> None:
    v, target, t = velocities()
    expected = [
        value(*(each[row].numpy() for each in (v, target)), float(t[row]), weighting, power) for row in range(5)
    ]
    np.testing.assert_allclose(surrogate(v, target, t, weighting, power).numpy(), expected, rtol=1e-12)


def test_surrogate_is_zero_at_the_target_and_its_gradient_is_finite_there() -> None:
    _, target, t = velocities()
    v = target.clone().requires_grad_()
    values = surrogate(v, target, t, "ghuber", 0.25)
    values.sum().backward()
    assert values.tolist() == [0.0] * 5
    assert v.grad is not None
    assert v.grad.isfinite().all()


def test_a_power_of_one_half_pulls_equally_whatever_the_error_and_smaller_ones_less_where_it_is_large() -> None:
    """The gradient's norm goes with ``E^(p - 1/2)``: an error ten times the size is a hundred times the ``E``."""
    v, target, t = velocities()
    norms = {}
    for power in (0.25, 0.5, 1.0):
        for size in (1, 10):
            near = (target + size * (v - target)).requires_grad_()
            surrogate(near, target, t, "ghuber", power).sum().backward()
            assert near.grad is not None
            norms[power, size] = near.grad.flatten(1).norm(dim=1)
    for power in (0.25, 0.5, 1.0):
        torch.testing.assert_close(norms[power, 10] / norms[power, 1], torch.full((5,), 100 ** (power - 0.5)).double())


def test_t_squared_is_the_error_of_the_clean_estimate() -> None:
    rng = np.random.default_rng(1)
    x_0, noise = (torch.tensor(rng.normal(size=(5, 3, 2, 2))) for _ in range(2))
    v, _, t = velocities()
    path = FlowPath()
    clean = path.clean(path.interpolate(x_0, noise, t), v, t)
    found = surrogate(v, path.target(x_0, noise), t, "t_squared", 0.25)
    torch.testing.assert_close(found, -((clean - x_0) ** 2).mean((1, 2, 3)))


def test_advantages_are_clipped_and_then_scaled() -> None:
    assert scaled(torch.tensor([-10.0, -2.5, 0.0, 1.0, 7.0]), 5.0, 1.0).tolist() == pytest.approx([-1, -0.5, 0, 0.2, 1])


def test_the_ema_weights_follow_more_slowly_up_to_a_limit() -> None:
    assert [ema_decay(k, 0.3) for k in (0, 100, 300, 9999)] == pytest.approx([0, 0.1, 0.3, 0.3])


@pytest.fixture
def parts(tiny_run: Compose) -> Parts:
    """Four trained steps, two of them an image; two updates an iteration; every view has weights of its own."""
    settings = ("method.algorithm.times=2", "method.algorithm.kl=0.2", "method.algorithm.kl_ema=0.7")
    parts = assembly.assemble(tiny_run(*DOUBLE, *settings, "method.batch.updates=2"))
    move(parts, 0, 0.02)
    parts.policy.blend("old", 0.0)
    return parts


def move(parts: Parts, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parts.policy.trainable_parameters().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def collected(parts: Parts) -> tuple[AdvantageWeightedMatching, Update]:
    """The first update of an iteration from the current weights."""
    method = parts.method
    assert isinstance(method, AdvantageWeightedMatching)
    prompts = draw(parts.prompts, method.batch.prompts, 0, 0, "none")
    experience = method.collect(parts.stack, prompts, Clock())
    return method, next(method.updates(experience, parts.stack, Clock()))


def test_loss_equals_the_papers_equations(parts: Parts) -> None:
    method, update = collected(parts)
    move(parts, 1, 0.02)
    parts.policy.blend("ema", 0.5)
    batch = update.batch(range(update.atoms))
    loss = method.loss(parts.stack, update, batch)

    total, ratios = 0.0, []
    for row in range(update.atoms):
        t = float(batch.terms["t"][row])
        x_0, noise = (batch.terms[name][row].numpy() for name in ("x_0", "noise"))
        x_t = torch.tensor(((1 - t) * x_0 + t * noise)[None])
        with torch.no_grad():
            v = {
                view: parts.policy.predict(x_t, torch.tensor([t]).double(), batch.condition[row : row + 1], view=view)
                .numpy()[0]
                for view in ("current", "old", "reference", "ema")
            }  # fmt: skip
        new, old = (value(v[view], noise - x_0, t, "ghuber", 0.25) for view in ("current", "old"))
        ratio, advantage = math.exp(new - old), float(batch.terms["advantage"][row])
        ratios.append(ratio)
        total += max(-advantage * ratio, -advantage * min(max(ratio, 1 - method.clip_range), 1 + method.clip_range))
        total += 0.2 * np.mean((v["current"] - v["reference"]) ** 2) + 0.7 * np.mean((v["current"] - v["ema"]) ** 2)
    assert max(abs(ratio - 1) for ratio in ratios) > 1e-3
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-9)


def gradients(parts: Parts, total: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, list(parts.policy.trainable_parameters().values())))


def test_at_the_weights_that_sampled_it_is_a_policy_gradient(parts: Parts) -> None:
    """``rho = 1`` and ``grad loss = -A grad l``, with a pass of the old weights and without one."""
    method, update = collected(parts)
    method.kl = method.kl_ema = 0.0
    batch = update.batch(range(update.atoms))
    found = method.loss(parts.stack, update, batch)
    v = parts.policy.predict(batch.terms["x_t"], batch.terms["t"], batch.condition)
    error = ((v - (batch.terms["noise"] - batch.terms["x_0"])) ** 2).mean((1, 2, 3))
    likelihood = -4 * batch.terms["t"] * (error + 1e-10) ** 0.25
    expected = gradients(parts, -(batch.terms["advantage"] * likelihood).sum())
    torch.testing.assert_close(gradients(parts, found.total), expected)
    assert float(found.largest["ratio_deviation"]) <= 1e-10

    method.batch = type(method.batch)(method.batch.prompts, method.batch.images, updates=1)
    before = parts.ledger.row()["nfe"]
    alone = method.loss(parts.stack, update, batch)
    assert parts.ledger.row()["nfe"] - before == update.atoms
    torch.testing.assert_close(gradients(parts, alone.total), expected)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("kl_ema", [0.0, 1.0])
def test_a_weight_of_zero_makes_no_pass(tiny_run: Compose, kl: float, kl_ema: float) -> None:
    settings = ("method.algorithm.times=2", f"method.algorithm.kl={kl}", f"method.algorithm.kl_ema={kl_ema}")
    parts = assembly.assemble(tiny_run(*DOUBLE, *settings))
    method, update = collected(parts)
    before = parts.ledger.row()["nfe"]
    method.loss(parts.stack, update, update.batch(range(update.atoms)))
    assert (parts.ledger.row()["nfe"] - before) / update.atoms == 1 + (kl > 0) + (kl_ema > 0)
    assert method.expected_cost().training == update.atoms * (1 + (kl > 0) + (kl_ema > 0))


@pytest.mark.parametrize(
    ("first_step", "strata"),
    [
        (False, [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]),  # the released code's, for 14 steps and 6 times
        (True, [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]),
    ],
)
def test_times_are_one_of_each_part_of_the_grid(tiny_run: Compose, first_step: bool, strata: list[set[int]]) -> None:
    config = tiny_run(
        "method=awm", "overlay=none", "method.rollout.steps=14", f"method.algorithm.first_step={first_step}"
    )
    method = assembly.assemble(config).method
    assert isinstance(method, AdvantageWeightedMatching)
    drawn = np.array([method.training_steps(sample, Clock()) for sample in range(50)])
    assert [set(steps) for steps in drawn.T.tolist()] == strata  # every step of every part comes up


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("times=5", "times is 5, but .* leave 4 of the rollout's 6 steps"),
        ("weighting=huber", "huber"),
        ("power=0", "power is 0; it must be positive"),
        ("kl_ema=-1", "kl_ema -1; they must be 0 or more"),
        ("ema_decay=1.5", "ema_decay is 1.5; it must lie in"),
        ("timestep_fraction=1.1", "timestep_fraction is 1.1; it must lie in"),
    ],
)
def test_values_out_of_range_are_refused(tiny_run: Compose, setting: str, message: str) -> None:
    algorithm = ["times=2", "first_step=false", setting]
    with pytest.raises(ConfigError, match=message):
        assembly.assemble(tiny_run(*DOUBLE, *(f"method.algorithm.{each}" for each in algorithm)))
