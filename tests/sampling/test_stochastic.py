"""The stochastic steps, against numpy in float64, torch.distributions, gradcheck and Gaussian data in closed form."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench.sampling.flow import pipeline_grid, shifted_linspace
from alignbench.sampling.stochastic import TRANSITIONS, Kind, kl_mu, kl_mu_step, kl_velocity, log_prob, step

KINDS: tuple[Kind, ...] = ("flow", "dance", "cps")
LEVELS = {"flow": 0.7, "dance": 0.3, "cps": 0.8}
GRID = pipeline_grid(10, shift=3.0).double()
DATA_MEAN, DATA_STD = 0.7, 0.5


def draws(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def reference(kind: Kind, x: np.ndarray, v: np.ndarray, s: float, s_next: float, a: float, s_1: float) -> tuple:
    """Mean and standard deviation of one sample's transition, from the equations."""
    ds = s_next - s
    if kind == "flow":
        sigma = a * math.sqrt(s / (1 - (s_1 if s == 1 else s)))
        mean = x * (1 + sigma**2 / (2 * s) * ds) + v * (1 + sigma**2 * (1 - s) / (2 * s)) * ds
        return mean, sigma * math.sqrt(-ds)
    if kind == "dance":
        score = -(x - (1 - s) * (x - s * v)) / s**2
        return x + ds * v + 0.5 * a**2 * score * (-ds), a * math.sqrt(-ds)
    mean = (1 - s_next) * (x - s * v) + s_next * math.cos(a * math.pi / 2) * (x + (1 - s) * v)
    return mean, s_next * math.sin(a * math.pi / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_steps_follow_the_equations(kind: Kind, dtype: torch.dtype, tolerance: float) -> None:
    """Every step but the last, all in one batch: a sigma per sample."""
    grid = GRID.to(dtype)
    x, v, z = draws(3, 9, 2, 4, 4, dtype=dtype)
    taken = step(kind, x, v, grid[:9], grid[1:10], LEVELS[kind], grid[1], z)
    assert taken.log_prob is not None
    assert taken.next.dtype == taken.log_prob.dtype == dtype
    exact = GRID.to(dtype).double().tolist()
    for i in range(9):
        x_i, v_i, z_i = (tensor[i].double().numpy() for tensor in (x, v, z))
        mean, std = reference(kind, x_i, v_i, exact[i], exact[i + 1], LEVELS[kind], exact[1])
        np.testing.assert_allclose(taken.mean[i].numpy(), mean, atol=tolerance)
        np.testing.assert_allclose(taken.std[i].numpy(), std, rtol=1e-5 if dtype == torch.float32 else 1e-12)
        np.testing.assert_allclose(taken.next[i].numpy(), mean + std * z_i, atol=tolerance)
        error = (std * z_i) ** 2
        density = -error.mean() if kind == "cps" else (-error / (2 * std**2)).mean() - math.log(std)
        constant = 0 if kind == "cps" else -math.log(math.sqrt(2 * math.pi))
        np.testing.assert_allclose(float(taken.log_prob[i]), density + constant, atol=10 * tolerance)


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_log_prob_is_the_normal_density_per_dimension(kind: Kind) -> None:
    x_next, mean = draws(2, 3, 2, 4, 4)
    std = torch.tensor([0.05, 0.4, 2.0], dtype=torch.float64)
    normal = torch.distributions.Normal(mean, std.reshape(3, 1, 1, 1))
    expected = normal.log_prob(x_next).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, mean, std, kind), expected)


def test_cps_log_prob_has_neither_variance_nor_logarithms() -> None:
    x_next, mean = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert log_prob(x_next, mean, torch.tensor([0.1, 7.0]), "cps").tolist() == [-2.5, -5.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_level_zero_is_euler_to_the_last_bit(kind: Kind, dtype: torch.dtype) -> None:
    grid = GRID.to(dtype)
    x, v, z = draws(3, 10, 2, 4, 4, dtype=dtype)
    taken = step(kind, x, v, grid[:-1], grid[1:], 0.0, grid[1], z)
    assert torch.equal(taken.next, x + grid.diff().reshape(10, 1, 1, 1) * v)
    assert taken.log_prob is None
    assert not taken.std.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vanishing_noise_level_tends_to_euler(kind: Kind) -> None:
    x, v = draws(2, 9, 2, 4, 4)
    mean, std = TRANSITIONS[kind](x, v, GRID[:9], GRID[1:10], 1e-7, GRID[1])
    torch.testing.assert_close(mean, x + GRID.diff()[:9].reshape(9, 1, 1, 1) * v, rtol=0, atol=1e-12)
    assert std.max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_gradient_agrees_with_finite_differences(kind: Kind) -> None:
    x, v, x_next = draws(3, 3, 2, 2)
    v.requires_grad_()

    def log_probability(v: Tensor) -> Tensor:
        mean, std = TRANSITIONS[kind](x, v, GRID[:3], GRID[1:4], LEVELS[kind], GRID[1])
        return log_prob(x_next, mean, std, kind)

    assert torch.autograd.gradcheck(log_probability, (v,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_the_rest_of_the_batch(kind: Kind) -> None:
    """Latents to the last bit; log-probabilities to 5e-7, the rounding of a mean: 1/20 of the tightest clip range."""
    x, v, z = draws(3, 9, 2, 4, 4, dtype=torch.float32)
    grid = GRID.float()
    s, s_next = grid[:9], grid[1:10]
    whole = step(kind, x, v, s, s_next, LEVELS[kind], grid[1], z)
    order = torch.tensor([4, 8, 0, 2, 7, 1, 3, 6, 5])
    permuted = step(kind, x[order], v[order], s[order], s_next[order], LEVELS[kind], grid[1], z[order])
    assert whole.log_prob is not None
    assert permuted.log_prob is not None
    assert torch.equal(whole.next[order], permuted.next)
    torch.testing.assert_close(whole.log_prob[order], permuted.log_prob, rtol=0, atol=5e-7)
    for i in range(9):
        one = slice(i, i + 1)
        alone = step(kind, x[one], v[one], s[i], s_next[i], LEVELS[kind], grid[1], z[one])
        assert alone.log_prob is not None
        assert torch.equal(whole.next[one], alone.next)
        torch.testing.assert_close(whole.log_prob[one], alone.log_prob, rtol=0, atol=5e-7)
    recomputed = log_prob(whole.next, *TRANSITIONS[kind](x, v, s, s_next, LEVELS[kind], grid[1]), kind)
    assert torch.equal(recomputed, whole.log_prob)


def marginal(transition: Callable[[Tensor, int], tuple[Tensor, float]], steps: int) -> tuple[float, float]:
    """Mean and standard deviation after ``steps`` affine Gaussian transitions from N(0, 1), without sampling.

    An affine mean is known from its values at 0 and 1.
    """
    mean, variance = 0.0, 1.0
    for i in range(steps):
        values, std = transition(torch.tensor([[0.0], [1.0]], dtype=torch.float64), i)
        offset, slope = float(values[0]), float(values[1] - values[0])
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, math.sqrt(variance)


def gaussian_marginal(kind: Kind, noise_level: float, grid: Tensor) -> tuple[float, float]:
    """The images' mean and std under the exact velocity of N(DATA_MEAN, DATA_STD^2); the last step is deterministic."""
    last = len(grid) - 2

    def transition(x: Tensor, i: int) -> tuple[Tensor, float]:
        s = grid[i]
        gain = ((1 - s) ** 2 * DATA_STD**2 + s**2).reciprocal()
        centred = x - (1 - s) * DATA_MEAN
        v = s * gain * centred - (DATA_MEAN + (1 - s) * DATA_STD**2 * gain * centred)
        level = 0.0 if i == last else noise_level
        taken = step(kind, x, v, s, grid[i + 1], level, grid[1], torch.zeros_like(x))
        return taken.next, float(taken.std)

    return marginal(transition, last + 1)


@pytest.mark.parametrize(
    "grid", [pipeline_grid(1000, shift=3.0), shifted_linspace(1000, 1.0)], ids=["pipeline", "even"]
)
@pytest.mark.parametrize(("kind", "noise_level"), [("flow", 0.7), ("flow", 0.0), ("dance", 0.3), ("dance", 1.0)])
def test_flow_and_dance_reach_the_data_in_the_limit(kind: Kind, noise_level: float, grid: Tensor) -> None:
    mean, std = gaussian_marginal(kind, noise_level, grid.double())
    assert mean == pytest.approx(DATA_MEAN, rel=0.01)
    assert std == pytest.approx(DATA_STD, rel=0.01)


@pytest.mark.parametrize(("kind", "noise_level", "std"), [("flow", 0.0, 0.359), ("flow", 0.7, 0.421)])
def test_ten_steps_do_not_reach_the_data(kind: Kind, noise_level: float, std: float) -> None:
    mean, measured = gaussian_marginal(kind, noise_level, GRID)
    assert mean == pytest.approx(DATA_MEAN, abs=1e-6)
    assert measured == pytest.approx(std, abs=5e-4)


@pytest.mark.parametrize(("noise_level", "limit"), [(0.8, 0.4045), (0.5, 0.4619)])
def test_cps_does_not_reach_the_data_even_in_the_limit(noise_level: float, limit: float) -> None:
    """Near s = 0 a step scales the noise part by 1 - (1 - cos) q, q = s^2 / var, and adds s^2 sin^2: the balance is
    var sin^2 / (2 (1 - cos)) = var cos^2(eta pi / 4)."""
    assert DATA_STD * math.cos(noise_level * math.pi / 4) == pytest.approx(limit, abs=5e-5)
    mean, std = gaussian_marginal("cps", noise_level, pipeline_grid(4000, shift=3.0).double())
    assert mean == pytest.approx(DATA_MEAN, rel=0.01)
    assert std == pytest.approx(limit, rel=0.006)


def test_mean_noise_of_the_released_grid() -> None:
    """TempFlow-GRPO's released weight 2.25 is 1 / mean(sigma_k d_k) over the trained steps of SD3's ten."""
    x = torch.zeros(9, 1, dtype=torch.float64)
    std = TRANSITIONS["flow"](x, x, GRID[:9], GRID[1:10], 0.7, GRID[1]).std
    assert 1 / float(std.mean()) == pytest.approx(2.25, abs=0.005)


def test_kl_forms_follow_the_equations() -> None:
    x, v, v_ref = draws(3, 9, 2, 4, 4)
    s, s_next = GRID[:9], GRID[1:10]
    mean, std = TRANSITIONS["flow"](x, v, s, s_next, 0.7, GRID[1])
    mean_ref, _ = TRANSITIONS["flow"](x, v_ref, s, s_next, 0.7, GRID[1])
    for i in range(9):
        grid = GRID.tolist()
        mu, q = reference("flow", x[i].numpy(), v[i].numpy(), grid[i], grid[i + 1], 0.7, grid[1])
        mu_ref, _ = reference("flow", x[i].numpy(), v_ref[i].numpy(), grid[i], grid[i + 1], 0.7, grid[1])
        sigma_i = q / math.sqrt(grid[i] - grid[i + 1])
        square = ((mu - mu_ref) ** 2).mean()
        assert float(kl_mu(mean, mean_ref, std, s, s_next)[i]) == pytest.approx(square / (2 * sigma_i**2), rel=1e-10)
        assert float(kl_mu_step(mean, mean_ref, std)[i]) == pytest.approx(square / (2 * q**2), rel=1e-10)
        expected = ((v[i] - v_ref[i]).numpy() ** 2).mean()
        assert float(kl_velocity(v, v_ref)[i]) == pytest.approx(expected, rel=1e-12)


def test_kl_mu_step_is_the_divergence_of_the_two_transitions() -> None:
    mean, mean_ref = draws(2, 3, 2, 4)
    std = torch.tensor([0.05, 0.4, 2.0], dtype=torch.float64)
    normals = [torch.distributions.Normal(m, std.reshape(3, 1, 1)) for m in (mean, mean_ref)]
    expected = torch.distributions.kl_divergence(*normals).mean(dim=(1, 2))
    torch.testing.assert_close(kl_mu_step(mean, mean_ref, std), expected)
