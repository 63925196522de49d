"""Collecting images from the policy itself, as every online method on prompts does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignbench.methods.method import Clock, Experience, Method
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.rollout import Sampler
from alignbench.seeding import seed_of, seeds_of
from alignbench.stack import Rollout, Stack


def collect_images(
    method: Method,
    stack: Stack,
    prompts: Sequence[Prompt],
    clock: Clock,
    *,
    view: str = "current",
    sampler: Sampler | None = None,
    same_noise: bool = False,
) -> tuple[Experience, Rollout, Tensor, Tensor]:
    """Sample ``batch.images`` images of every prompt and score them.

    Args:
        view: the weights that sample.
        sampler: another one than the method's, for this iteration.
        same_noise: all images of a prompt begin at one noise, and differ by their stochastic steps alone.

    Returns:
        The experience (its terms still empty), this process's rollout, and over all processes the rewards
        ``[images]`` and the group (index of the prompt) of each image ``[images]``, on the CPU.
    """
    local = stack.processes.shard(method.batch.total)
    own = [prompts[sample // method.batch.images] for sample in local]
    key = (method.seed, clock.iteration)
    noises = [sample - sample % method.batch.images for sample in local] if same_noise else local
    rollout = stack.sample(
        own,
        sampler or method.sampler,
        seeds_of("initial noise", *key, ids=noises),
        step_seeds=lambda row, step: seed_of("step noise", *key, local[row], step),
        view=view,
        ids=local,
    )
    scores = {name: stack.processes.gather(values).float().cpu() for name, values in rollout.scores.items()}
    metrics = {name: values.mean().item() for name, values in scores.items()}
    metrics["reward_std"] = scores["reward"].std(correction=0).item()
    experience = Experience({}, rollout.condition, own, list(local), range(method.batch.total), metrics)
    groups = torch.arange(method.batch.total) // method.batch.images
    return experience, rollout, scores["reward"], groups
