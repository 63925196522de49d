"""The deterministic solvers, against numpy in float64, diffusers' DPM-Solver, and the exact flow of Gaussian data."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench.sampling.flow import pipeline_grid, shifted_linspace
from alignbench.sampling.solvers import SOLVERS, Index, State

DATA_STD = 0.5


def gaussian_velocity(x: Tensor, s: Tensor) -> Tensor:
    """The exact velocity for data N(0, DATA_STD^2): E[e - x_0 | x_s = x]."""
    s = s.reshape(s.shape + (1,) * (x.ndim - s.ndim))
    return (s - (1 - s) * DATA_STD**2) / ((1 - s) ** 2 * DATA_STD**2 + s**2) * x


def rollout(name: str, x: Tensor, grid: Tensor) -> Tensor:
    state: State = None
    for i in range(len(grid) - 1):
        x, state = SOLVERS[name](x, gaussian_velocity(x, grid[i]), i, grid, state)
    return x


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpm1"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("steps", [2, 10, 37])
def test_first_order_solvers_are_euler(name: str, dtype: torch.dtype, tolerance: float, steps: int) -> None:
    grid = pipeline_grid(steps, shift=3.0).to(dtype)
    x = noise(3, 2, 4, 4, dtype=dtype)
    velocities = noise(steps, 3, 2, 4, 4, dtype=dtype)  # no flow at all: the identity is algebraic
    reference = x.double().numpy()
    state: State = None
    for i in range(steps):
        reference = reference + float(grid[i + 1].double() - grid[i].double()) * velocities[i].double().numpy()
        x, state = SOLVERS[name](x, velocities[i], i, grid, state)
        assert x.dtype == dtype
        np.testing.assert_allclose(x.numpy(), reference, atol=tolerance)


def dpm2_reference(x: np.ndarray, velocities: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """DPM-Solver++ (2M) in the log-SNR, with the DDIM form written out for steps 0 and T - 1."""
    steps = len(grid) - 1
    m_1 = np.zeros_like(x)
    for i in range(steps):
        s, s_next = grid[i], grid[i + 1]
        m_0 = x - s * velocities[i]
        if i in (0, steps - 1):
            x = (1 - s_next) * m_0 + s_next * (x + (1 - s) * velocities[i])
        else:
            h = math.log((1 - s_next) / s_next) - math.log((1 - s) / s)
            correction = np.zeros_like(x)
            if i >= 2:
                r_0 = (math.log((1 - s) / s) - math.log((1 - grid[i - 1]) / grid[i - 1])) / h
                correction = -0.5 * (1 - s_next) * (math.exp(-h) - 1) / r_0 * (m_0 - m_1)
            x = s_next / s * x - (1 - s_next) * (math.exp(-h) - 1) * m_0 + correction
        m_1 = m_0
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("steps", [2, 3, 4, 10, 25])
def test_dpm2_follows_the_equations(dtype: torch.dtype, tolerance: float, steps: int) -> None:
    grid = pipeline_grid(steps, shift=3.0).to(dtype)
    velocities = noise(steps, 3, 2, 4, 4, dtype=dtype)
    x, state = noise(3, 2, 4, 4, dtype=dtype), None
    expected = dpm2_reference(x.double().numpy(), velocities.double().numpy(), grid.double().numpy())
    for i in range(steps):
        x, state = SOLVERS["dpm2"](x, velocities[i], i, grid, state)
    np.testing.assert_allclose(x.numpy(), expected, atol=tolerance)


def test_dpm2_equals_the_multistep_scheduler_of_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(10)
    grid = scheduler.sigmas
    x, state = noise(2, 3, 4, 4, dtype=torch.float32), None
    theirs = x
    for i, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(gaussian_velocity(theirs, grid[i]), timestep, theirs).prev_sample
        x, state = SOLVERS["dpm2"](x, gaussian_velocity(x, grid[i]), i, grid, state)
    torch.testing.assert_close(x, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("dpm1", 1), ("dpm2", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Between s = 0.8 and 0.3, where the log-SNR is smooth, halving the step divides the error by 2^order."""

    def error(steps: int) -> float:
        grid = torch.linspace(0.8, 0.3, steps + 1, dtype=torch.float64)
        exact = math.sqrt((0.7 * DATA_STD) ** 2 + 0.3**2) / math.sqrt((0.2 * DATA_STD) ** 2 + 0.8**2)
        return abs(float(rollout(name, torch.ones(1, 1, dtype=torch.float64), grid)) - exact)

    assert math.log2(error(100) / error(200)) == pytest.approx(order, abs=0.05)


def test_dpm2_is_far_more_accurate_than_euler_from_noise_to_image_with_many_steps() -> None:
    grid = shifted_linspace(400, 3.0).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    euler, dpm2 = (abs(float(rollout(name, one, grid)) - DATA_STD) for name in ("euler", "dpm2"))
    assert euler == pytest.approx(0.0036, abs=0.0005)
    assert dpm2 < euler / 10


def test_ten_euler_steps_shrink_gaussian_data() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)  # the flow is linear: the image of 1 is the image's standard deviation
    assert float(rollout("euler", one, pipeline_grid(10, shift=3.0).double())) == pytest.approx(0.359, abs=5e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_of_samples_at_different_steps(name: str) -> None:
    """One batched call at mixed steps equals a call per sample, history included."""
    grid = pipeline_grid(6, shift=3.0).double()
    index = torch.tensor([3, 0, 5, 1, 2, 4])
    x, v, history = noise(3, 6, 2, 4, 4)
    for state in (None, history):
        together, state_together = SOLVERS[name](x, v, index, grid, state)
        for sample, i in enumerate(index.tolist()):
            one = slice(sample, sample + 1)
            alone, state_alone = SOLVERS[name](x[one], v[one], i, grid, None if state is None else state[one])
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-14)
            if state_alone is not None and state_together is not None:
                assert torch.equal(state_together[one], state_alone)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_arrives_at_the_clean_estimate(name: str) -> None:
    grid = pipeline_grid(5, shift=3.0).double()
    x, v, history = noise(3, 4, 2, 4, 4)
    arrived, _ = SOLVERS[name](x, v, 4, grid, history)
    torch.testing.assert_close(arrived, x - grid[4] * v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("i", [0, 1, 2, 4])
def test_gradients_agree_with_finite_differences(name: str, i: Index) -> None:
    """DRaFT differentiates through solver steps; infinities of the log-SNR must not reach the gradient."""
    grid = pipeline_grid(5, shift=3.0).double()
    x, v, history = noise(3, 2, 3).requires_grad_().unbind()
    assert torch.autograd.gradcheck(lambda x, v, m: SOLVERS[name](x, v, i, grid, m)[0], (x, v, history))
