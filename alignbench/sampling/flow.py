"""The rectified-flow path and its time grids (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206)."""

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class FlowPath:
    """``x_t = (1 - t) x_0 + t e`` with ``e ~ N(0, I)``: t = 1 is noise, t = 0 the image latent.

    The model predicts the velocity ``v``, whose target is ``u = e - x_0``. Latents, noise and velocity are [B, ...];
    times are [B] or one value [], in [0, 1]. ``shift`` is what the model was trained with, 1 for none.
    """

    parameterisation: ClassVar[Literal["velocity"]] = "velocity"
    num_train_timesteps: int = 1000
    shift: float = 1.0

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t``, the point of the path at time ``t``."""
        t = per_sample(t, x0)
        return (1 - t) * x0 + t * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """``u = e - x_0``, what the model learns to predict."""
        return noise - x0

    def clean(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """``x0_hat = x_t - t v``, the model's estimate of the image latent."""
        return x_t - per_sample(t, x_t) * v

    def noise(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """``e_hat = x_t + (1 - t) v``, the model's estimate of the noise: velocity -> epsilon."""
        return x_t + (1 - per_sample(t, x_t)) * v

    def velocity(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``v = (e_hat - x_t) / (1 - t)``: epsilon -> velocity, for t < 1 (pure noise says nothing about ``x_0``)."""
        return (noise - x_t) / (1 - per_sample(t, x_t))

    def model_time(self, t: Tensor) -> Tensor:
        """The time the network is given: ``1000 t``, not truncated to an integer."""
        return self.num_train_timesteps * t

    def training_time(self, uniform: Tensor) -> Tensor:
        """Logit-normal(0, 1) times through the model's shift (arXiv 2403.03206, section 3.1), as quantiles.

        Args:
            uniform: levels in (0, 1), any shape; uniform draws give draws of a time.
        """
        return shift_time(torch.sigmoid(torch.special.ndtri(uniform)), self.shift)


@dataclass(frozen=True, eq=False)
class DiffusionPath:
    """``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e`` with ``e ~ N(0, I)`` (DDPM, arXiv 2006.11239, eq. 4).

    The model predicts the noise, whose target is ``e``. Latents and noise are [B, ...]; times are [B] or one value [],
    a training step (0 to T - 1) divided by T.

    Attributes:
        alphas_cumprod: ``abar`` of the T training steps, decreasing, [T].
    """

    parameterisation: ClassVar[Literal["epsilon"]] = "epsilon"
    alphas_cumprod: Tensor

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t``, the point of the path at time ``t``."""
        abar = per_sample(self.alphas_cumprod.to(x0)[self.model_time(t)], x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """``e``, what the model learns to predict."""
        return noise

    def model_time(self, t: Tensor) -> Tensor:
        """The time the network is given: the training step, an integer."""
        return (len(self.alphas_cumprod) * t).round().long()

    def training_time(self, uniform: Tensor) -> Tensor:
        """Every training step with the same probability, as quantiles; ``uniform`` in [0, 1), any shape."""
        steps = len(self.alphas_cumprod)
        return (steps * uniform).floor() / steps


def shift_time(t: Tensor, shift: float) -> Tensor:
    """``shift t / (1 + (shift - 1) t)``: spends more of the steps near noise (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def pipeline_grid(steps: int, *, shift: float, num_train_timesteps: int = 1000, mu: float | None = None) -> Tensor:
    """The sigmas of diffusers' ``FlowMatchEulerDiscreteScheduler.set_timesteps(steps, mu=mu)``, equal to the last bit.

    The scheduler spaces its times evenly between 1 and the smallest *shifted* training time and then shifts them again:
    with shift 3 the grid is ``shift(linspace(1, 0.002994, T))`` and a 0.

    Args:
        steps: T, at least 2.
        shift: ``shift`` of the scheduler's config; not used with ``mu``.
        num_train_timesteps: ``num_train_timesteps`` of the scheduler's config.
        mu: logarithm of the shift, for schedulers with ``use_dynamic_shifting`` (exponential).

    Returns:
        float32 [T + 1], decreasing from 1 to 0.

    Raises:
        ConfigError: fewer than 2 steps.
    """
    _check_steps(steps)
    sigma_min = torch.tensor(1 / num_train_timesteps, dtype=torch.float32)  # float32: the scheduler's own rounding
    if mu is None:
        sigma_min = shift_time(sigma_min, shift)
    last = sigma_min.item() * num_train_timesteps
    spacing = (last - num_train_timesteps) / (steps - 1)
    times = torch.arange(steps, dtype=torch.float64) * spacing + num_train_timesteps
    times[-1] = last
    t = times / num_train_timesteps
    t = shift_time(t, shift) if mu is None else math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    return torch.cat([t, t.new_zeros(1)]).float()


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
