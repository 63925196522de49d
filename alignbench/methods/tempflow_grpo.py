"""TempFlow-GRPO: when timing matters for GRPO in flow models (He et al., arXiv 2508.04324).

*Trajectory branching*: a trunk walks the ODE; at every step but the last, branches leave it by one stochastic step and
walk the ODE to the end. All that differs between the branches of a step is that step's noise, so their rewards belong
to it alone. *Noise-aware weighting*: a step counts as much as its noise can explore.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.methods.advantages import Advantages, Std, group_advantages
from alignbench.methods.flow_grpo import FlowGRPO
from alignbench.methods.method import BatchSize, Clock, Cost, Experience
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.rollout import Sampler
from alignbench.sampling.stochastic import TRANSITIONS, Kind
from alignbench.seeding import seed_of, seeds_of
from alignbench.stack import Stack

Group = Literal["seed_step", "prompt_step"]


def branch_advantages(rewards: Tensor, group: Group, std: Std, ddof: int, eps: float) -> Advantages:
    """Group advantages of branches, each step on its own (arXiv 2508.04324, seed groups).

    Args:
        rewards: ``[prompts, seeds, steps, branches]``.
        group: who is compared: ``"seed_step"`` the branches of one seed at one step, ``"prompt_step"`` those of all
            seeds of a prompt at one step.
        std: ``"global"`` is over all rewards of the step.
        ddof, eps: of the standard deviation.

    Returns:
        Advantages of the flattened rewards.
    """
    prompts, seeds, steps, branches = rewards.shape
    trunks = prompts * seeds
    groups = torch.arange(trunks if group == "seed_step" else prompts).repeat_interleave(
        branches if group == "seed_step" else seeds * branches
    )
    of_steps = [
        group_advantages(rewards[:, :, step].flatten(), groups, std=std, ddof=ddof, eps=eps) for step in range(steps)
    ]

    def rows(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.view(trunks, branches) for part in parts], dim=1).flatten()

    trunk_of_row = torch.arange(trunks).repeat_interleave(steps * branches)
    step_of_row = torch.arange(steps).repeat_interleave(branches).repeat(trunks)
    of = trunk_of_row if group == "seed_step" else trunk_of_row // seeds
    return Advantages(
        rows([each.values for each in of_steps]),
        rows([each.constant for each in of_steps]),
        rows([each.nearly for each in of_steps]),
        of * steps + step_of_row,
    )


def noise_weights(grid: Tensor, noise_level: float, kind: Kind = "flow") -> Tensor:
    """``w_k = sigma_k d_k / mean_k sigma_k d_k``: a step's share of the noise, 1 on average (arXiv 2508.04324).

    Args:
        grid: ``[T + 1]``, decreasing from 1 to 0.
        noise_level: of the stochastic step.
        kind: which stochastic step; ``sigma_k d_k`` is its standard deviation.

    Returns:
        ``[T - 1]``, for every step but the last.
    """
    nothing = torch.zeros_like(grid[:-2])
    std = TRANSITIONS[kind](nothing, nothing, grid[:-2], grid[1:-1], noise_level, grid[1]).std
    return std / std.mean()


class TempFlowGRPO(FlowGRPO):
    """TempFlow-GRPO. A row of its experience is a branch: an image at the step it was born in.

    Args:
        seeds: N, trunks per prompt.
        branches: K, branches per trunk and step; N K is ``batch.images``.
        group: who is compared, see ``branch_advantages``.
        branching: False takes Flow-GRPO's rollout: N K images per prompt, one advantage for all steps of an image.
        noise_weighting: False weights all steps alike.
        clip_range, advantage_clip, kl, kl_form, std, ddof, eps, detach_uncond, recompute_log_prob: as Flow-GRPO's.
    """

    def __init__(
        self,
        *,
        seeds: int,
        branches: int,
        group: Group,
        branching: bool,
        noise_weighting: bool,
        clip_range: float,
        advantage_clip: float,
        kl: float,
        kl_form: Literal["mu", "mu_step"],
        std: Literal["global", "group", "none"],
        ddof: Literal[0, 1],
        eps: float,
        detach_uncond: bool,
        recompute_log_prob: bool,
        sampler: Sampler,
        batch: BatchSize,
        seed: int,
    ) -> None:
        super().__init__(
            clip_range=clip_range,
            advantage_clip=advantage_clip,
            kl=kl,
            kl_form=kl_form,
            std=std,
            ddof=ddof,
            eps=eps,
            aggregate="rewards",
            same_noise=False,
            window=None,
            trained_fraction=1.0,
            detach_uncond=detach_uncond,
            recompute_log_prob=recompute_log_prob,
            sampler=sampler,
            batch=batch,
            seed=seed,
        )
        if seeds < 1 or branches < 1 or seeds * branches != batch.images:
            raise ConfigError(
                f"tempflow_grpo: {seeds} seeds x {branches} branches are not the {batch.images} images of a prompt per "
                "step: method.batch.images must be method.algorithm.seeds x method.algorithm.branches"
            )
        if group not in ("seed_step", "prompt_step"):
            raise ConfigError(f"tempflow_grpo: group is {group!r}; choose seed_step or prompt_step")
        if branching and group == "seed_step" and branches < 2:
            raise ConfigError(
                "tempflow_grpo compares the branches of a seed: method.algorithm.branches is 1, use 2 or more, or "
                "method.algorithm.group=prompt_step"
            )
        if branching and sampler.solver == "dpm2":
            raise ConfigError(
                "tempflow_grpo: method.rollout.solver is dpm2, which builds on the step before, but a branch begins in "
                "the middle of the walk: choose euler, ddim or dpm1"
            )
        self.seeds, self.branches, self.group = seeds, branches, group
        self.branching, self.noise_weighting = branching, noise_weighting

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        if not self.branching:
            return super().collect(stack, prompts, clock)
        births = self.sampler.steps - 1
        trunks = stack.processes.shard(self.batch.prompts * self.seeds)
        if not trunks:
            raise ConfigError(
                f"tempflow_grpo: {self.batch.prompts} prompts x {self.seeds} seeds for {stack.processes.count} "
                "processes: every process needs at least one seed"
            )
        own = [prompts[trunk // self.seeds] for trunk in trunks]
        key = (self.seed, clock.iteration)
        rollout = stack.branch(
            own,
            self.sampler,
            seeds_of("initial noise", *key, ids=trunks),
            branches=self.branches,
            step_seeds=lambda row, step, branch: seed_of("step noise", *key, trunks[row], step, branch),
            ids=trunks,
        )
        scores = {name: stack.processes.gather(values).float().cpu() for name, values in rollout.scores.items()}
        rewards = scores["reward"].view(self.batch.prompts, self.seeds, births, self.branches)
        advantages = branch_advantages(rewards, self.group, self.std, self.ddof, self.eps)
        of_trunk = births * self.branches  # rows
        collected = Experience(
            terms={},
            condition=rollout.condition,
            prompts=[prompt for prompt in own for _ in range(of_trunk)],
            ids=range(trunks.start * of_trunk, trunks.stop * of_trunk),
            kept=(),
            metrics={name: values.mean().item() for name, values in scores.items()}
            | {"reward_std": rewards.std(correction=0).item()},
        )
        steps = torch.arange(births).repeat_interleave(self.branches).repeat(len(trunks)).unsqueeze(1)
        return self._learn_from(collected, rollout, steps, advantages)

    def kept(self, advantages: Tensor) -> Tensor:
        """A branch slot of a seed, an image per step, is dropped only where all steps say nothing (official code)."""
        if not self.branching:
            return super().kept(advantages)
        of_slots = (advantages != 0).view(-1, self.sampler.steps - 1, self.branches)
        return of_slots.any(dim=1, keepdim=True).expand_as(of_slots).flatten()

    def together(self, kept: Sequence[int]) -> NDArray[np.int64]:
        """All steps of a branch slot: ``[slots, T - 1]``."""
        if not self.branching:
            return super().together(kept)
        rows, births = np.array(kept, dtype=np.int64), self.sampler.steps - 1
        trunk, slot = rows // (births * self.branches), rows % self.branches
        return rows[np.lexsort((rows, slot, trunk))].reshape(-1, births)

    def step_weights(self, grid: Tensor) -> Tensor:
        assert self.sampler.stochastic is not None
        if not self.noise_weighting:
            return super().step_weights(grid)
        return noise_weights(grid, self.sampler.noise_level, self.sampler.stochastic)

    def expected_cost(self) -> Cost:
        if not self.branching:
            return super().expected_cost()
        guidance = 1 if self.sampler.guidance == 1 else 2
        trunks, births = self.batch.prompts * self.seeds, self.sampler.steps - 1
        images = trunks * self.branches * births
        walks = births * (births + 1) // 2  # 1 + ... + (T - 1) passes
        return Cost(
            rollout=guidance * trunks * (births + self.branches * walks),
            training=images * guidance * (1 + (self.kl > 0) + self.recompute_log_prob),
            backward=images * (1 if self.detach_uncond else guidance),
            images=images,
            reward_calls=images,
        )
