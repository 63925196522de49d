"""Stochastic steps with log-probabilities, and the KL forms between two of them.

A step goes from ``s = sigma`` to ``s' = sigma_next``, with ``ds = s' - s < 0`` and ``d = sqrt(-ds)``: a Gaussian whose
mean depends on the velocity. ``x``, ``v``, means and noise are [B, ...]; ``sigma``, ``sigma_next`` and standard
deviations are [B] or one value []. The last step of a rollout (``s' = 0``) is always deterministic: it is not for here.

With the exact velocity, flow and dance reach the data's distribution in the limit of many steps, not at ten. cps does
not: Gaussian data come out with ``cos(eta pi / 4)`` of their standard deviation. That is how it is defined.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alignbench.sampling.flow import mean_per_sample, per_sample

Kind = Literal["flow", "dance", "cps"]


class Transition(NamedTuple):
    """The Gaussian a step draws from: ``mean`` [B, ...] and ``std``, [B] or []."""

    mean: Tensor
    std: Tensor


class StochasticStep(NamedTuple):
    """A step taken: ``next = mean + std noise`` [B, ...]; ``log_prob`` [B], None for a deterministic step."""

    next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None


def flow(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: Tensor) -> Transition:
    """Flow-GRPO's transition (arXiv 2505.05470), noise level ``a``.

    ``sigma_i = a sqrt(s / (1 - s))``, with ``1 - sigma_max`` under the root where ``s = 1``; ``std = sigma_i d``;
    ``mu = x (1 + sigma_i^2 / (2 s) ds) + v (1 + sigma_i^2 (1 - s) / (2 s)) ds``.

    Args:
        sigma_max: the grid's second point ``s_1``, the largest sigma at which ``sigma_i`` is finite.
    """
    ds = sigma_next - sigma
    sigma_i = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))
    drift = sigma_i**2 / (2 * sigma)
    mean = x * per_sample(1 + drift * ds, x) + v * per_sample((1 + drift * (1 - sigma)) * ds, x)
    return Transition(mean, sigma_i * torch.sqrt(-ds))


def dance(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: Tensor) -> Transition:
    """DanceGRPO's transition (arXiv 2505.07818), noise level ``eta`` at every sigma; ``sigma_max`` is not used.

    ``mu = x + ds v + eta^2 / 2 score (-ds)``, ``score = -(x - (1 - s) x0_hat) / s^2``, ``std = eta d``.
    """
    s, ds = per_sample(sigma, x), per_sample(sigma_next - sigma, x)
    x0_hat = x - s * v
    score = -(x - (1 - s) * x0_hat) / s**2
    return Transition(x + ds * v - 0.5 * noise_level**2 * score * ds, noise_level * torch.sqrt(sigma - sigma_next))


def cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: Tensor) -> Transition:
    """FlowCPS, coefficients-preserving sampling (arXiv 2509.05952), noise level ``eta``; ``sigma_max`` is not used.

    ``mu = (1 - s') x0_hat + s' cos(eta pi / 2) x1_hat``, ``std = s' sin(eta pi / 2)``.
    """
    s, s_next = per_sample(sigma, x), per_sample(sigma_next, x)
    x0_hat = x - s * v
    x1_hat = x + (1 - s) * v
    angle = noise_level * math.pi / 2
    return Transition((1 - s_next) * x0_hat + s_next * math.cos(angle) * x1_hat, sigma_next * math.sin(angle))


TRANSITIONS: dict[Kind, Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor], Transition]] = {
    "flow": flow,
    "dance": dance,
    "cps": cps,
}


def step(
    kind: Kind,
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float,
    sigma_max: Tensor,
    noise: Tensor,
) -> StochasticStep:
    """Take one stochastic step with the standard normal ``noise`` [B, ...].

    Noise level 0 is Euler's step exactly, for every kind; it has no log-probability.
    """
    if noise_level == 0:
        mean = x + per_sample(sigma_next - sigma, x) * v
        return StochasticStep(mean, mean, torch.zeros_like(sigma), None)
    mean, std = TRANSITIONS[kind](x, v, sigma, sigma_next, noise_level, sigma_max)
    x_next = mean + per_sample(std, x) * noise
    return StochasticStep(x_next, mean, std, log_prob(x_next, mean, std, kind))


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, kind: Kind) -> Tensor:
    """Log-probability [B] of ``x_next``, a *mean* over the latent's axes: the papers' clip ranges belong to that scale.

    flow, dance: ``mean[-(x' - mu)^2 / (2 std^2) - log std - log sqrt(2 pi)]``.
    cps: ``-mean (x' - mu)^2``, without variance and logarithms, as FlowCPS defines it.
    """
    squared_error = mean_per_sample((x_next - mean) ** 2)
    if kind == "cps":
        return -squared_error
    return -squared_error / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)


def kl_mu(mean: Tensor, mean_ref: Tensor, std: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Flow-GRPO's KL [B]: ``mean (mu - mu_ref)^2 / (2 sigma_i^2)``, where ``sigma_i = std / d``."""
    return kl_mu_step(mean, mean_ref, std) * (sigma - sigma_next)


def kl_mu_step(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """TempFlow-GRPO's KL [B]: ``mean (mu - mu_ref)^2 / (2 std^2)``, the divergence of the transitions per dimension."""
    return mean_per_sample((mean - mean_ref) ** 2) / (2 * std**2)


def kl_velocity(v: Tensor, v_ref: Tensor) -> Tensor:
    """The forward-process methods' penalty [B]: ``mean (v - v_ref)^2``."""
    return mean_per_sample((v - v_ref) ** 2)
