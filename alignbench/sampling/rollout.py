"""A rollout: from noise along a grid to clean latents, by deterministic steps with stochastic ones where asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.sampling.solvers import SOLVERS, State
from alignbench.sampling.stochastic import Kind, step
from alignbench.settings import between

MOST_STEPS, MOST_GUIDANCE = 10_000, 1_000.0  # far above what any paper takes
GRIDS = ("pipeline", "shifted_linspace")


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    Attributes:
        steps: T, at least 2.
        solver: the deterministic step, a name of ``SOLVERS``.
        grid: ``"pipeline"`` (what diffusers' pipeline uses for the model) or ``"shifted_linspace"``.
        guidance: classifier-free guidance scale; 1 is one pass a step, otherwise two.
        guidance_embedding: the guidance *input* of guidance-distilled models while sampling; None: the model's own.
        stochastic: the stochastic step (``"flow"``, ``"dance"``, ``"cps"``); None for an ODE.
        noise_level: of the stochastic step.
        noisy: which steps are stochastic, increasing; None: all but the last, which never is.

    Raises:
        ConfigError: a value out of range, with the ones that would work.
    """

    steps: int
    solver: str = "euler"
    grid: str = "pipeline"
    guidance: float = 1.0
    stochastic: Kind | None = None
    noise_level: float = 0.0
    noisy: tuple[int, ...] | None = None
    guidance_embedding: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(f"rollout steps is {self.steps}: at least 2, because the last step is never stochastic")
        between(self.steps, 2, MOST_STEPS, "rollout steps")
        for name, value, known in (
            ("solver", self.solver, tuple(SOLVERS)),
            ("grid", self.grid, GRIDS),
            ("stochastic step", self.stochastic, (None, *get_args(Kind))),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not known; choose one of {', '.join(map(str, known))}")
        if not 1 <= self.guidance <= MOST_GUIDANCE:
            raise ConfigError(
                f"guidance is {self.guidance:g}: 1 means none, larger follows the prompt more closely, and "
                f"{MOST_GUIDANCE:g} is the most"
            )
        if self.stochastic is not None and self.noise_level <= 0:
            raise ConfigError(
                f"stochastic={self.stochastic} with noise_level={self.noise_level:g}: it must be positive"
            )
        if self.noisy is not None:
            possible = range(self.steps - 1) if self.stochastic else range(0)
            if not self.noisy or self.noisy != tuple(sorted(set(self.noisy) & set(possible))):
                raise ConfigError(
                    f"stochastic steps {self.noisy} of a rollout of {self.steps} steps with stochastic="
                    f"{self.stochastic}: they must increase and lie in {list(possible)}"
                )

    @property
    def noisy_steps(self) -> Sequence[int]:
        """The stochastic steps, increasing."""
        if self.stochastic is None:
            return ()
        return range(self.steps - 1) if self.noisy is None else self.noisy


@dataclass
class Trajectory:
    """What the stochastic steps of a rollout went through, as float32.

    Attributes:
        latents: exactly what was fed to the model, ``[samples, noisy steps, ...]``.
        next_latents: where each step arrived, same shape.
        log_prob: of each step under the weights that sampled, ``[samples, noisy steps]``.
    """

    latents: Tensor
    next_latents: Tensor
    log_prob: Tensor

    @staticmethod
    def cat(parts: "Sequence[Trajectory]") -> "Trajectory | None":
        """Join the samples of several rollouts; None if there are none."""
        if not parts:
            return None
        return Trajectory(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.next_latents for part in parts]),
            torch.cat([part.log_prob for part in parts]),
        )


def start(noise: Tensor, grid: Tensor) -> Tensor:
    """Where a walk begins: noise with the standard deviation that unit-variance data have at ``s = grid[0]``.

    ``sqrt(s^2 + (1 - s)^2)``: 1 for flows, which begin at s = 1. Diffusion models begin before it, with DDPM's
    latents standard normal all the same.
    """
    return noise * torch.hypot(grid[0], 1 - grid[0])


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    grid: Tensor,
    sampler: Sampler,
    draw: Callable[[int], Tensor],
    until: int | None = None,
) -> tuple[Tensor, Trajectory | None]:
    """Walk the grid from noise to clean latents.

    Args:
        predict: ``(latents [B, ...], sigma [B]) -> velocity [B, ...]``.
        latents: standard normal noise ``[B, ...]``.
        grid: ``[T + 1]``, decreasing from 1 (a diffusion model's last training time) to 0.
        sampler: which steps to take.
        draw: step -> standard normal noise ``[B, ...]`` of a stochastic step.
        until: stop before this step, at noise level ``grid[until]``; None walks to the end.

    Returns:
        Clean latents ``[B, ...]`` and the stochastic steps (None for an ODE).
    """
    solver = SOLVERS[sampler.solver]
    latents = start(latents, grid)
    state: State = None
    walked: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(sampler.steps if until is None else until):
        velocity = predict(latents, grid[i].expand(len(latents)))
        if sampler.stochastic is not None and i in sampler.noisy_steps:
            taken = step(
                sampler.stochastic, latents, velocity, grid[i], grid[i + 1], sampler.noise_level, grid[1], draw(i)
            )
            assert taken.log_prob is not None
            walked.append((latents, taken.next, taken.log_prob))
            latents, state = taken.next, None  # a multistep solver remembers its own steps alone
        else:
            latents, state = solver(latents, velocity, i, grid, state)
    if not walked:
        return latents, None
    return latents, Trajectory(*(torch.stack(parts, dim=1) for parts in zip(*walked, strict=True)))


def branch(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    grid: Tensor,
    sampler: Sampler,
    branches: int,
    draw: Callable[[int], Tensor],
) -> Trajectory:
    """Walk trunks along the ODE and take, at every step but the last, K stochastic steps off each (arXiv 2508.04324).

    The trunk's velocity serves its branches too: T - 1 passes a trunk. ``finish`` takes the branches to the end.

    Args:
        predict: ``(latents [B, ...], sigma [B]) -> velocity [B, ...]``.
        latents: standard normal noise of the trunks ``[B, ...]``.
        grid: ``[T + 1]``, decreasing from 1 to 0.
        sampler: which steps to take; its solver must need nothing but the current step.
        branches: K, per trunk and step.
        draw: step -> standard normal noise ``[B K, ...]``, the branches of a trunk side by side.

    Returns:
        One row per branch, each with its one stochastic step: row ``(trunk (T - 1) + step) K + branch``.
    """
    assert sampler.stochastic is not None
    latents = start(latents, grid)
    born: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(sampler.steps - 1):
        velocity = predict(latents, grid[i].expand(len(latents)))
        x, v = latents.repeat_interleave(branches, 0), velocity.repeat_interleave(branches, 0)
        taken = step(sampler.stochastic, x, v, grid[i], grid[i + 1], sampler.noise_level, grid[1], draw(i))
        assert taken.log_prob is not None
        born.append((x, taken.next, taken.log_prob))
        latents, _ = SOLVERS[sampler.solver](latents, velocity, i, grid, None)

    def rows(parts: Sequence[Tensor]) -> Tensor:
        of_trunks = [part.view(len(latents), branches, *part.shape[1:]) for part in parts]
        return torch.stack(of_trunks, dim=1).flatten(0, 2).unsqueeze(1)

    return Trajectory(*(rows(parts) for parts in zip(*born, strict=True)))


def finish(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], latents: Tensor, first: Tensor, grid: Tensor, sampler: Sampler
) -> Tensor:
    """Walk each sample along the ODE from a step of its own to clean latents.

    Samples join when the walk reaches their step, so that a call holds samples of many steps and none takes a pass too
    many: ``T - first`` each.

    Args:
        predict: ``(latents [b, ...], sigma [b], which samples [b]) -> velocity [b, ...]``.
        latents: ``[B, ...]``, sample j at noise level ``grid[first[j]]``.
        first: int64 ``[B]``, in 1..T.
        grid: ``[T + 1]``, decreasing to 0.
        sampler: its solver must need nothing but the current step.
    """
    latents = latents.clone()
    for i in range(int(first.min()), sampler.steps):
        walking = (first <= i).nonzero().flatten().to(latents.device)
        x = latents[walking]
        velocity = predict(x, grid[i].expand(len(x)), walking)
        latents[walking], _ = SOLVERS[sampler.solver](x, velocity, i, grid, None)
    return latents
