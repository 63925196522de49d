"""The path and its grids, against the equations in float64, diffusers' scheduler and the path's own algebra."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from alignbench.errors import ConfigError
from alignbench.sampling.flow import (
    DiffusionPath,
    FlowPath,
    dynamic_grid,
    mean_per_sample,
    pipeline_grid,
    shifted_linspace,
)

PATH = FlowPath()
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # nothing here may depend on speed


def latents(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(3, 2, 4, 4, generator=generator, dtype=dtype)
    noise = torch.randn(3, 2, 4, 4, generator=generator, dtype=dtype)
    return x0, noise, torch.tensor([0.1, 0.5, 0.93], dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_path_follows_the_equations(dtype: torch.dtype, tolerance: float) -> None:
    x0, noise, t = latents(0, dtype)
    a, e, s = x0.double().numpy(), noise.double().numpy(), t.double().numpy()[:, None, None, None]
    x_t = PATH.interpolate(x0, noise, t)
    v = PATH.target(x0, noise)
    assert x_t.dtype == dtype
    np.testing.assert_allclose(x_t.numpy(), (1 - s) * a + s * e, atol=tolerance)
    np.testing.assert_allclose(v.numpy(), e - a, atol=tolerance)
    np.testing.assert_allclose(PATH.clean(x_t, v, t).numpy(), a, atol=tolerance)
    np.testing.assert_allclose(PATH.noise(x_t, v, t).numpy(), e, atol=tolerance)


@pytest.mark.parametrize("predicts", ["velocity", "epsilon"])
def test_estimates_fit_together_for_any_prediction(predicts: str) -> None:
    """Also for a wrong one: the line through both estimates is at ``x_t``, and its slope is the velocity."""
    path = PATH if predicts == "velocity" else diffusion_path()
    x_t, prediction, t = latents(1)  # two unrelated tensors
    clean, noise = path.clean(x_t, prediction, t), path.noise(x_t, prediction, t)
    torch.testing.assert_close(path.interpolate(clean, noise, t), x_t, rtol=0, atol=1e-13)
    torch.testing.assert_close(path.velocity(x_t, prediction, t), noise - clean, rtol=0, atol=1e-12)
    assert torch.equal(prediction, noise if predicts == "epsilon" else path.velocity(x_t, prediction, t))


def test_target_is_the_time_derivative_of_the_path() -> None:
    x0, noise, t = latents(2)
    difference = (PATH.interpolate(x0, noise, t + 1e-3) - PATH.interpolate(x0, noise, t - 1e-3)) / 2e-3
    torch.testing.assert_close(difference, PATH.target(x0, noise), rtol=0, atol=1e-11)


def test_one_time_for_the_batch_equals_the_same_time_for_every_sample() -> None:
    x0, noise, _ = latents(3)
    one, each = torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)
    assert torch.equal(PATH.interpolate(x0, noise, one), PATH.interpolate(x0, noise, each))


def test_model_time_is_not_truncated() -> None:
    assert PATH.model_time(torch.tensor([0.96005, 1.0])).tolist() == pytest.approx([960.05, 1000.0], rel=1e-7)


def test_training_times_are_logit_normal_through_the_shift() -> None:
    levels = np.linspace(0.01, 0.99, 25)
    t = 1 / (1 + np.exp(-norm.ppf(levels)))
    for shift in (1.0, 3.0):
        times = FlowPath(shift=shift).training_time(torch.tensor(levels))
        np.testing.assert_allclose(times.numpy(), shift * t / (1 + (shift - 1) * t), rtol=1e-12)


def diffusion_path() -> DiffusionPath:
    """The schedule of Stable Diffusion 1.5, as diffusers makes it."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DiffusionPath(scheduler.alphas_cumprod)


def test_diffusion_path_in_the_network_s_units_equals_the_scheduler() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise, _ = latents(4, torch.float32)
    steps = torch.tensor([0, 437, 999])
    path = diffusion_path()
    abar = scheduler.alphas_cumprod[steps].double()
    t = (((1 - abar) / abar).sqrt() / (1 + ((1 - abar) / abar).sqrt())).float()  # sigma / (1 + sigma)
    z = path.unit_variance(path.interpolate(x0, noise, t), t)
    torch.testing.assert_close(z, scheduler.add_noise(x0, noise, steps), rtol=0, atol=1e-6)
    assert torch.equal(path.target(x0, noise), noise)
    assert path.model_time(t).tolist() == [0, 437, 999]


def test_diffusion_steps_survive_float32_and_other_times_take_the_nearest() -> None:
    path = diffusion_path()
    steps = torch.arange(1000)
    times = path.grid(steps.tolist())
    assert times[-1] == 0
    assert torch.equal(path.model_time(times[:-1].float()), steps)
    assert path.model_time(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    assert path.model_time(0.6 * times[5] + 0.4 * times[6]) == 5
    assert path.model_time(0.4 * times[5] + 0.6 * times[6]) == 6


def test_euler_in_these_coordinates_is_ddim() -> None:
    """From the noisiest training step to the image, with predictions that follow no model."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(4)
    path = diffusion_path()
    z, _, _ = latents(5)
    grid = path.grid(scheduler.timesteps.tolist())
    x = z * torch.hypot(grid[0], 1 - grid[0])
    for i, step in enumerate(scheduler.timesteps):
        prediction = torch.sin((i + 2) * z)
        x = x + (grid[i + 1] - grid[i]) * path.velocity(x, prediction, grid[i])
        z = scheduler.step(prediction, step, z).prev_sample
        torch.testing.assert_close(path.unit_variance(x, grid[i + 1]), z, rtol=0, atol=1e-5)  # float32 schedule


def test_diffusion_training_times_are_all_steps_alike() -> None:
    path = diffusion_path()
    times = path.training_time(torch.arange(4000, dtype=torch.float64) / 4000)
    assert torch.equal(path.model_time(times), torch.arange(1000).repeat_interleave(4))


def test_mean_per_sample_is_over_every_axis_but_the_batch() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert mean_per_sample(x).tolist() == [2.5, 8.5]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_pipeline_grid_equals_the_scheduler(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in range(2, 51):
        scheduler.set_timesteps(steps)
        grid = pipeline_grid(steps, shift=shift)
        assert torch.equal(grid, scheduler.sigmas)
        assert torch.equal(PATH.model_time(grid[:-1]), scheduler.timesteps)


def test_dynamic_grid_equals_the_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    for steps in range(2, 51):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.65)
        torch.testing.assert_close(dynamic_grid(steps, 0.65), scheduler.sigmas, rtol=0, atol=2e-7)


def test_pipeline_grid_is_shifted_twice() -> None:
    points = np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), 10)
    np.testing.assert_allclose(pipeline_grid(10, shift=3.0)[:-1].numpy(), 3 * points / (1 + 2 * points), rtol=1e-6)


@UNTIMED
@given(steps=st.integers(2, 60), shift=st.floats(0.2, 12))
def test_grids_decrease_from_noise_to_the_image(steps: int, shift: float) -> None:
    for grid in (pipeline_grid(steps, shift=shift), shifted_linspace(steps, shift)):
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float32
        assert grid[0] == 1
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()


@UNTIMED
@given(steps=st.integers(2, 60), shift=st.floats(0.2, 12))
def test_shifting_back_gives_even_steps(steps: int, shift: float) -> None:
    s = shifted_linspace(steps, shift).double().numpy()
    even = s / (shift - (shift - 1) * s)  # the inverse of the shift
    np.testing.assert_allclose(even, np.arange(steps, -1, -1) / steps, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_fewer_than_two_steps_say_what_works(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"at least 2 sampling steps, got {steps}\..* Use 2 or more"):
        pipeline_grid(steps, shift=3.0)
    with pytest.raises(ConfigError, match="Use 2 or more"):
        shifted_linspace(steps, 3.0)
