"""Rectified-flow and diffusion paths in one set of coordinates, and the time grids of flows.

Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206; Ho et al., arXiv 2006.11239.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignbench.errors import ConfigError


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``values`` ([B] or one value []) so that they broadcast over ``like`` ([B, ...])."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over every axis but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


class ProbabilityPath(ABC):
    """``x_t = (1 - t) x_0 + t e`` with ``e ~ N(0, I)``: t = 1 is noise, t = 0 the image latent.

    Latents, noise and predictions are [B, ...]; times are [B] or one value [], in [0, 1]. A path knows what its model
    predicts at such a point, and turns that into everything else.
    """

    parameterisation: ClassVar[Literal["velocity", "epsilon"]]

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t``, the point of the path at time ``t``."""
        t = per_sample(t, x0)
        return (1 - t) * x0 + t * noise

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """What the model learns to predict."""

    @abstractmethod
    def clean(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``x0_hat``, the model's estimate of the image latent."""

    @abstractmethod
    def noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``e_hat``, the model's estimate of the noise."""

    @abstractmethod
    def velocity(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``v = e_hat - x0_hat``, what solvers walk along."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The time the network is given."""

    @abstractmethod
    def training_time(self, uniform: Tensor) -> Tensor:
        """The times the model was trained at, as quantiles: uniform draws, any shape, give draws of a time."""


@dataclass(frozen=True)
class FlowPath(ProbabilityPath):
    """A rectified flow. The model predicts the velocity ``v``, whose target is ``u = e - x_0``.

    Attributes:
        num_train_timesteps: what the network's time is multiplied by.
        shift: what the model was trained with, 1 for none.
    """

    parameterisation = "velocity"
    num_train_timesteps: int = 1000
    shift: float = 1.0

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """``u = e - x_0``."""
        return noise - x0

    def clean(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``x0_hat = x_t - t v``."""
        return x_t - per_sample(t, x_t) * prediction

    def noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``e_hat = x_t + (1 - t) v``."""
        return x_t + (1 - per_sample(t, x_t)) * prediction

    def velocity(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction

    def model_time(self, t: Tensor) -> Tensor:
        """``1000 t``, not truncated to an integer."""
        return self.num_train_timesteps * t

    def training_time(self, uniform: Tensor) -> Tensor:
        """Logit-normal(0, 1) times through the model's shift (arXiv 2403.03206, section 3.1), as quantiles.

        Args:
            uniform: levels in (0, 1), any shape; uniform draws give draws of a time.
        """
        return shift_time(torch.sigmoid(torch.special.ndtri(uniform)), self.shift)


@dataclass(frozen=True, eq=False)
class DiffusionPath(ProbabilityPath):
    """DDPM (arXiv 2006.11239) in the coordinates of a rectified flow. The model predicts the noise, whose target is e.

    DDPM's ``z = sqrt(abar) x_0 + sqrt(1 - abar) e`` and ``x_t`` are one point in two units:
    ``x_t = z / (sqrt(abar) + sqrt(1 - abar))`` at ``t = sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar))``, so that
    ``z = x_t / sqrt(t^2 + (1 - t)^2)``. DDIM's step (eta 0) on z is then Euler's on ``x_t``, and noise levels mean the
    same for every model. The network knows the T times of its training steps; their largest is below 1.

    Attributes:
        alphas_cumprod: ``abar`` of the T training steps, decreasing, [T].
    """

    parameterisation = "epsilon"
    alphas_cumprod: Tensor

    @cached_property
    def times(self) -> Tensor:
        """``t`` of the training steps, increasing; float64 [T], on the CPU."""
        abar = self.alphas_cumprod.double().cpu()
        return (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """``e``."""
        return noise

    def clean(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``x0_hat = (x_t - t e_hat) / (1 - t)``, for t < 1: pure noise says nothing about ``x_0``."""
        t = per_sample(t, x_t)
        return (x_t - t * prediction) / (1 - t)

    def noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction

    def velocity(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``v = (e_hat - x_t) / (1 - t)``, for t < 1."""
        return (prediction - x_t) / (1 - per_sample(t, x_t))

    def model_time(self, t: Tensor) -> Tensor:
        """The training step whose time is nearest, int64."""
        times = self.times.to(t.device)
        return torch.bucketize(t.double(), (times[1:] + times[:-1]) / 2)

    def unit_variance(self, x_t: Tensor, t: Tensor) -> Tensor:
        """DDPM's ``z = x_t / sqrt(t^2 + (1 - t)^2)``, which the network takes."""
        t = per_sample(t, x_t)
        return x_t / torch.hypot(t, 1 - t)

    def training_time(self, uniform: Tensor) -> Tensor:
        """Every training step with the same probability, as quantiles; ``uniform`` in [0, 1), any shape; float64."""
        times = self.times.to(uniform.device)
        return times[(len(times) * uniform).long()]

    def grid(self, steps: Sequence[int]) -> Tensor:
        """The times of training steps, decreasing, and a 0; float64 [steps + 1]."""
        return torch.cat([self.times[list(steps)], self.times.new_zeros(1)])


def shift_time(t: Tensor, shift: float) -> Tensor:
    """``shift t / (1 + (shift - 1) t)``: spends more of the steps near noise (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def pipeline_grid(steps: int, *, shift: float, num_train_timesteps: int = 1000) -> Tensor:
    """The sigmas of diffusers' ``FlowMatchEulerDiscreteScheduler.set_timesteps(steps)``, equal to the last bit.

    The scheduler spaces its times evenly between 1 and the smallest *shifted* training time and then shifts them again:
    with shift 3 the grid is ``shift(linspace(1, 0.002994, T))`` and a 0.

    Args:
        steps: T, at least 2.
        shift: ``shift`` of the scheduler's config.
        num_train_timesteps: ``num_train_timesteps`` of the scheduler's config.

    Returns:
        float32 [T + 1], decreasing from 1 to 0.

    Raises:
        ConfigError: fewer than 2 steps.
    """
    _check_steps(steps)
    sigma_min = torch.tensor(1 / num_train_timesteps, dtype=torch.float32)  # float32: the scheduler's own rounding
    last = shift_time(sigma_min, shift).item() * num_train_timesteps
    spacing = (last - num_train_timesteps) / (steps - 1)
    times = torch.arange(steps, dtype=torch.float64) * spacing + num_train_timesteps
    times[-1] = last
    t = shift_time(times / num_train_timesteps, shift)
    return torch.cat([t, t.new_zeros(1)]).float()


def dynamic_grid(steps: int, mu: float) -> Tensor:
    """The sigmas of diffusers' ``FluxPipeline``: ``linspace(1, 1 / T, T)`` shifted by ``exp(mu)``, and a 0.

    Args:
        steps: T, at least 2.
        mu: logarithm of the shift, larger for larger images.

    Returns:
        float32 [T + 1], decreasing from 1 to 0.

    Raises:
        ConfigError: fewer than 2 steps.
    """
    _check_steps(steps)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_time(t, math.exp(mu)).float()


def shifted_linspace(steps: int, shift: float) -> Tensor:
    """``shift(linspace(1, 0, T + 1))``, the grid of DanceGRPO, MixGRPO and SRPO.

    Args:
        steps: T, at least 2.
        shift: 1 leaves the points evenly spaced; 3 is what those papers use.

    Returns:
        float32 [T + 1], decreasing from 1 to 0.

    Raises:
        ConfigError: fewer than 2 steps.
    """
    _check_steps(steps)
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise ConfigError(
            f"Expected at least 2 sampling steps, got {steps}. The last step is always deterministic, "
            "so fewer leave nothing to explore. Use 2 or more; the papers train with 10 and evaluate with 40."
        )
