"""Rollouts against loops that take one sample at a time, in float64."""

import math

import pytest
import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.sampling.flow import pipeline_grid
from alignbench.sampling.rollout import Sampler, branch, finish, sample

STEPS, TRUNKS, BRANCHES, SHAPE = 5, 3, 4, (2, 3)
GRID = pipeline_grid(STEPS, shift=3.0).double()
SCALE = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)  # what a condition is: another velocity for each trunk


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def velocity(x: Tensor, s: float, scale: float) -> Tensor:
    """A field that is curved in the latent and the time."""
    return torch.sin(scale * x + s) + 0.2 * x * s


def flow_mean_std(x: Tensor, v: Tensor, i: int, a: float) -> tuple[Tensor, float]:
    """Flow-GRPO's step, written out."""
    s, ds = float(GRID[i]), float(GRID[i + 1] - GRID[i])
    sigma = a * math.sqrt(s / (1 - float(GRID[1] if i == 0 else GRID[i])))
    mean = x + (v + sigma**2 / (2 * s) * (x + (1 - s) * v)) * ds
    return mean, sigma * math.sqrt(-ds)


@pytest.mark.parametrize("noisy", [(0,), (1, 2), (0, 3), (3,)])
def test_only_the_chosen_steps_are_stochastic(noisy: tuple[int, ...]) -> None:
    sampler = Sampler(STEPS, stochastic="flow", noise_level=0.7, noisy=noisy)
    start, noise = normal(TRUNKS, *SHAPE), normal(STEPS, TRUNKS, *SHAPE)

    def predict(x: Tensor, s: Tensor) -> Tensor:
        return torch.stack([velocity(x[j], float(s[j]), float(SCALE[j])) for j in range(TRUNKS)])

    latents, trajectory = sample(predict, start, GRID, sampler, lambda step: noise[step])
    assert trajectory is not None
    assert trajectory.latents.shape == (TRUNKS, len(noisy), *SHAPE)
    for j in range(TRUNKS):
        x = start[j]
        for i in range(STEPS):
            v = velocity(x, float(GRID[i]), float(SCALE[j]))
            if i in noisy:
                torch.testing.assert_close(trajectory.latents[j, noisy.index(i)], x, rtol=0, atol=1e-12)
                mean, std = flow_mean_std(x, v, i, 0.7)
                x = mean + std * noise[i, j]
                torch.testing.assert_close(trajectory.next_latents[j, noisy.index(i)], x, rtol=0, atol=1e-12)
            else:
                x = x + (GRID[i + 1] - GRID[i]) * v
        torch.testing.assert_close(latents[j], x, rtol=0, atol=1e-12)


def test_a_multistep_solver_does_not_reach_over_a_stochastic_step() -> None:
    """Step 2 of 5 is stochastic: the solver's step 3 is of first order (Euler's), though step 1 was its own."""
    sampler = Sampler(STEPS, solver="dpm2", stochastic="flow", noise_level=0.7, noisy=(2,))
    seen: list[Tensor] = []

    def predict(x: Tensor, s: Tensor) -> Tensor:
        seen.append(x)
        return velocity(x, float(s[0]), 0.9)

    sample(predict, normal(1, *SHAPE), GRID, sampler, lambda step: normal(1, *SHAPE))
    third = seen[3] + (GRID[4] - GRID[3]) * velocity(seen[3], float(GRID[3]), 0.9)
    torch.testing.assert_close(seen[4], third, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noisy", [(), (4,), (2, 1), (1, 1), (-1,)])
def test_impossible_stochastic_steps_are_refused(noisy: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"they must increase and lie in \[0, 1, 2, 3\]"):
        Sampler(STEPS, stochastic="flow", noise_level=0.7, noisy=noisy)
    with pytest.raises(ConfigError, match=r"stochastic=None: they must increase and lie in \[\]"):
        Sampler(STEPS, noisy=(0,))


def walked(solver: str = "euler") -> tuple[Tensor, Tensor, list[int]]:
    """Clean latents and first latents of all branches by ``branch`` and ``finish``, and the rows of every call."""
    sampler = Sampler(STEPS, solver=solver, stochastic="flow", noise_level=0.7)
    noise = normal(STEPS, TRUNKS * BRANCHES, *SHAPE)
    calls: list[int] = []

    def field(x: Tensor, s: Tensor, trunk: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.stack([velocity(x[j], float(s[j]), float(SCALE[int(trunk[j])])) for j in range(len(x))])

    trajectory = branch(
        lambda x, s: field(x, s, torch.arange(TRUNKS)),
        normal(TRUNKS, *SHAPE),
        GRID,
        sampler,
        BRANCHES,
        lambda step: noise[step],
    )
    row = torch.arange(TRUNKS * (STEPS - 1) * BRANCHES)
    trunk, first = row // ((STEPS - 1) * BRANCHES), row // BRANCHES % (STEPS - 1) + 1
    latents = finish(lambda x, s, which: field(x, s, trunk[which]), trajectory.next_latents[:, 0], first, GRID, sampler)
    return latents, trajectory.latents, calls


def test_branches_are_those_of_one_walk_at_a_time() -> None:
    latents, origins, _ = walked()
    start, noise = normal(TRUNKS, *SHAPE), normal(STEPS, TRUNKS * BRANCHES, *SHAPE)
    row = 0
    for trunk in range(TRUNKS):
        for step in range(STEPS - 1):
            for each in range(BRANCHES):
                x = start[trunk]
                for i in range(STEPS):
                    v = velocity(x, float(GRID[i]), float(SCALE[trunk]))
                    if i == step:
                        torch.testing.assert_close(origins[row, 0], x, rtol=0, atol=1e-10)
                        mean, std = flow_mean_std(x, v, i, 0.7)
                        x = mean + std * noise[step, trunk * BRANCHES + each]
                    else:
                        x = x + (GRID[i + 1] - GRID[i]) * v
                torch.testing.assert_close(latents[row], x, rtol=0, atol=1e-10)
                row += 1
    assert row == len(latents)


@pytest.mark.parametrize("solver", ["ddim", "dpm1"])
def test_other_one_step_solvers_walk_the_same_branches(solver: str) -> None:
    torch.testing.assert_close(walked(solver)[0], walked()[0], rtol=0, atol=1e-12)


def test_no_pass_too_many() -> None:
    """T = 5: 4 passes a trunk, and 4, 3, 2, 1 for the branches of its steps; 4 calls walk them all."""
    calls = walked()[2]
    assert calls[:4] == [TRUNKS] * 4
    assert calls[4:] == [TRUNKS * BRANCHES * born for born in (1, 2, 3, 4)]
