"""DiffusionNFT's equations against NumPy in float64, and the paper's invariants."""

import numpy as np
import pytest
import torch

from alignbench import assembly
from alignbench.methods.diffusion_nft import DiffusionNFT, nft_loss, old_decay, optimality
from alignbench.methods.method import Clock
from alignbench.prompts.sets import draw
from alignbench.sampling.flow import FlowPath
from tests.conftest import Compose

PATH = FlowPath()


def inputs(seed: int = 0, batch: int = 5) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    tensors = {name: torch.tensor(rng.normal(size=(batch, 3, 2, 2))) for name in ("v", "v_old", "x_t", "x_0")}
    tensors["t"] = torch.tensor(rng.uniform(0.05, 1, batch))
    tensors["r"] = torch.tensor(rng.uniform(0, 1, batch))
    return tensors


def reference(tensors: dict[str, torch.Tensor], beta: float, a_max: float) -> np.ndarray:
    """The equations of the paper, one sample at a time."""
    losses = []
    for v, v_old, x_t, x_0, t, r in zip(
        *(tensors[name].numpy() for name in ("v", "v_old", "x_t", "x_0", "t", "r")), strict=True
    ):
        parts = []
        for velocity in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
            error = (x_t - t * velocity) - x_0
            parts.append(np.mean(error**2) / max(np.mean(np.abs(error)), 1e-5))
        losses.append(a_max * (r * parts[0] + (1 - r) * parts[1]) / beta)
    return np.array(losses)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_equals_the_papers_equations(beta: float) -> None:
    tensors = inputs()
    loss = nft_loss(**tensors, beta=beta, a_max=5.0, path=PATH)
    np.testing.assert_allclose(loss.numpy(), reference(tensors, beta, 5.0), rtol=1e-12)


def test_positive_and_negative_losses_agree_at_the_old_weights() -> None:
    tensors = inputs() | {"r": torch.ones(5, dtype=torch.float64)}
    tensors["v"] = tensors["v_old"]
    positive = nft_loss(**tensors, beta=0.7, a_max=5.0, path=PATH)
    negative = nft_loss(**(tensors | {"r": torch.zeros(5, dtype=torch.float64)}), beta=0.7, a_max=5.0, path=PATH)
    torch.testing.assert_close(positive, negative)


@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 1.0])
def test_gradient_at_the_old_weights_is_that_of_the_positive_loss_times_two_r_minus_one(r: float) -> None:
    """``(A_max / beta)(2 r - 1) grad L_pos``: indifferent images (r = 0.5) do not move the weights."""
    beta, a_max = 0.5, 5.0
    tensors = inputs() | {"r": torch.full((5,), r, dtype=torch.float64)}
    v = tensors["v_old"].clone().requires_grad_()
    nft_loss(**(tensors | {"v": v}), beta=beta, a_max=a_max, path=PATH).sum().backward()

    t = tensors["t"].view(-1, 1, 1, 1)
    error = tensors["x_t"] - t * tensors["v_old"] - tensors["x_0"]
    weight = error.abs().mean((1, 2, 3), keepdim=True)
    gradient_of_positive = 2 * error * (-t * beta) / weight / error[0].numel()
    torch.testing.assert_close(v.grad, a_max / beta * (2 * r - 1) * gradient_of_positive)


def test_gradient_of_the_loss_matches_finite_differences_with_its_weights_held_fixed() -> None:
    """The adaptive weight carries no gradient: r = 1 and beta = 1 leave a weighted squared error of ``v`` alone."""
    tensors = inputs(batch=1) | {"r": torch.ones(1, dtype=torch.float64)}
    v = tensors["v"].clone().requires_grad_()
    nft_loss(**(tensors | {"v": v}), beta=1.0, a_max=5.0, path=PATH).sum().backward()
    t = float(tensors["t"])
    x_t, x_0 = tensors["x_t"].numpy(), tensors["x_0"].numpy()
    weight = np.abs(x_t - t * tensors["v"].numpy() - x_0).mean()

    def fixed(velocity: np.ndarray) -> float:
        return 5.0 * float(np.mean((x_t - t * velocity - x_0) ** 2)) / weight

    step = np.zeros_like(x_t)
    step[0, 1, 0, 1] = 1e-6
    difference = (fixed(tensors["v"].numpy() + step) - fixed(tensors["v"].numpy() - step)) / 2e-6
    assert v.grad is not None
    assert v.grad[0, 1, 0, 1].item() == pytest.approx(difference, rel=1e-6)


def test_optimality_modes() -> None:
    advantage = torch.tensor([-10.0, -2.5, 0.0, 2.5, 10.0])
    expected = {
        "all": [0.0, 0.25, 0.5, 0.75, 1.0],
        "positive_only": [0.5, 0.5, 0.5, 0.75, 1.0],
        "negative_only": [0.0, 0.25, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.6, 0.6],  # the released code: (1 / 5) / 2 + 0.5
        "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, values in expected.items():
        assert optimality(advantage, 5.0, mode).tolist() == pytest.approx(values)  # type: ignore[arg-type]


def test_old_weights_follow_the_official_schedules() -> None:
    assert [old_decay(k, 0) for k in (0, 1000)] == [0, 0]
    assert [old_decay(k, 1) for k in (0, 100, 500, 9999)] == [0, 0.1, 0.5, 0.5]
    assert [old_decay(k, 2) for k in (0, 75, 175, 9999)] == [0, 0, 0.75, 0.999]


# The method


def test_the_method_samples_with_the_old_weights_and_trains_the_current_ones(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three different sets of weights, and the method's loss from its predictions one image and time at a time."""
    settings = ("beta=0.3", "kl=0.2", "times=2", "old_schedule=2", "mode=all")
    config = tiny_run(
        "method=diffusion_nft",
        "overlay=none",
        "model.policy.dtype=float64",
        *(f"method.algorithm.{s}" for s in settings),
    )
    parts = assembly.assemble(config)
    method, stack, policy = parts.method, parts.stack, parts.policy
    assert isinstance(method, DiffusionNFT)
    generator = torch.Generator().manual_seed(0)

    def move() -> None:
        for parameter in policy.trainable_parameters().values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    move()
    policy.blend("old", 0.0)
    move()
    sampled: list[str] = []
    sample = stack.sample
    monkeypatch.setattr(
        stack, "sample", lambda *given, view, **more: sampled.append(view) or sample(*given, view=view, **more)
    )
    experience = method.collect(stack, draw(parts.prompts, 2, 0, 0, "none"), Clock())
    assert sampled == ["old"]

    update = next(method.updates(experience, stack, Clock()))
    batch = update.batch(range(update.atoms))
    grid = policy.grid(method.sampler.steps, method.sampler.grid).tolist()
    for first in range(0, update.atoms, 2):
        times = batch.terms["t"][first : first + 2].tolist()
        assert times[0] > times[1] > 0  # two different steps, each of the grid
        assert set(times) <= set(grid)
    loss = method.loss(stack, update, batch)
    total, distances = 0.0, {"old": 0.0, "reference": 0.0}
    for row in range(update.atoms):
        one = {name: value[row : row + 1] for name, value in batch.terms.items()}
        with torch.no_grad():
            v = {
                view: policy.predict(one["x_t"], one["t"], batch.condition[row : row + 1], view=view)
                for view in ("current", "old", "reference")
            }
        given = {
            "v": v["current"],
            "v_old": v["old"],
            "x_t": one["x_t"],
            "x_0": one["x_0"],
            "t": one["t"],
            "r": one["r"],
        }
        total += float(reference(given, 0.3, method.a_max)[0])
        for view in distances:
            distances[view] += float(((v["current"] - v[view]) ** 2).mean())
    assert min(distances.values()) > 1e-4 * update.atoms
    assert abs(distances["old"] / distances["reference"] - 1) > 1e-3
    assert loss.total.item() == pytest.approx(total + 0.2 * distances["reference"], rel=1e-9)
    assert loss.metrics["kl"].item() == pytest.approx(distances["reference"], rel=1e-9)

    old, current = (policy.weights.tensors(view) for view in ("old", "current"))
    before = {name: value.detach().clone() for name, value in old.items()}
    method.after_iteration(policy, Clock(optimizer_steps=115))
    for name, value in policy.weights.tensors("old").items():  # decay 0.0075 (115 - 75) = 0.3
        torch.testing.assert_close(value, 0.3 * before[name] + 0.7 * current[name].detach())
