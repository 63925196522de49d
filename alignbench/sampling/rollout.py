"""A rollout: from noise along a grid to clean latents, by deterministic steps with stochastic ones where asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.sampling.solvers import SOLVERS, State
from alignbench.sampling.stochastic import Kind, step

GRIDS = ("pipeline", "shifted_linspace")


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    Attributes:
        steps: T, at least 2.
        solver: the deterministic step, a name of ``SOLVERS``.
        grid: ``"pipeline"`` (what diffusers' pipeline uses for the model) or ``"shifted_linspace"``.
        guidance: classifier-free guidance scale; 1 is one pass a step, otherwise two.
        stochastic: the stochastic step (``"flow"``, ``"dance"``, ``"cps"``) of all steps but the last; None for an ODE.
        noise_level: of the stochastic step.

    Raises:
        ConfigError: a value out of range, with the ones that would work.
    """

    steps: int
    solver: str = "euler"
    grid: str = "pipeline"
    guidance: float = 1.0
    stochastic: Kind | None = None
    noise_level: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(f"rollout steps is {self.steps}: at least 2, because the last step is never stochastic")
        for name, value, known in (
            ("solver", self.solver, tuple(SOLVERS)),
            ("grid", self.grid, GRIDS),
            ("stochastic step", self.stochastic, (None, *get_args(Kind))),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not known; choose one of {', '.join(map(str, known))}")
        if self.guidance < 1:
            raise ConfigError(f"guidance is {self.guidance:g}: 1 means none, larger follows the prompt more closely")
        if self.stochastic is not None and self.noise_level <= 0:
            raise ConfigError(
                f"stochastic={self.stochastic} with noise_level={self.noise_level:g}: it must be positive"
            )

    @property
    def noisy_steps(self) -> range:
        """The stochastic steps: all but the last."""
        return range(self.steps - 1) if self.stochastic else range(0)


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


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    grid: Tensor,
    sampler: Sampler,
    draw: Callable[[int], Tensor],
) -> tuple[Tensor, Trajectory | None]:
    """Walk the grid from noise to clean latents.

    Args:
        predict: ``(latents [B, ...], sigma [B]) -> velocity [B, ...]``.
        latents: standard normal noise ``[B, ...]``.
        grid: ``[T + 1]``, decreasing from 1 to 0.
        sampler: which steps to take.
        draw: step -> standard normal noise ``[B, ...]`` of a stochastic step.

    Returns:
        Clean latents ``[B, ...]`` and the stochastic steps (None for an ODE).
    """
    solver = SOLVERS[sampler.solver]
    state: State = None
    walked: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(sampler.steps):
        velocity = predict(latents, grid[i].expand(len(latents)))
        if sampler.stochastic is not None and i in sampler.noisy_steps:
            taken = step(
                sampler.stochastic, latents, velocity, grid[i], grid[i + 1], sampler.noise_level, grid[1], draw(i)
            )
            assert taken.log_prob is not None
            walked.append((latents, taken.next, taken.log_prob))
            latents = taken.next
        else:
            latents, state = solver(latents, velocity, i, grid, state)
    if not walked:
        return latents, None
    return latents, Trajectory(*(torch.stack(parts, dim=1) for parts in zip(*walked, strict=True)))
