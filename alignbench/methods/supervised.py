"""Supervised baselines: flow matching on the policy's own images, the better ones more. What every method must beat.

Reward-weighted regression (Peters and Schaal, ICML 2007; for text-to-image models Lee et al., arXiv 2302.12192; online
on flow models Fan et al., arXiv 2502.06061) weighs the images of a group by their rewards; best-of-n (RAFT, Dong et
al., arXiv 2304.06767) keeps the best one. Nothing pushes an image away.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.methods.advantages import no_spread
from alignbench.methods.forward_process import ForwardProcess
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Update
from alignbench.methods.online import collect_images
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.flow import mean_per_sample
from alignbench.sampling.rollout import Sampler
from alignbench.stack import Stack


def softmax_weights(rewards: Tensor, temperature: float) -> Tensor:
    """``exp(R_ij / temperature) / sum_j exp(R_ij / temperature)``: weights that sum to 1 in each group.

    Args:
        rewards: ``[groups, images]``.
        temperature: positive; towards 0 the best image takes all, towards infinity all images weigh the same.
    """
    return torch.softmax(rewards.double() / temperature, dim=1).to(rewards.dtype)


def best(rewards: Tensor) -> Tensor:
    """1 for the best image of each group (the first of several), 0 for the others; ``[groups, images]``."""
    return torch.nn.functional.one_hot(rewards.argmax(dim=1), rewards.shape[1]).to(rewards)


class Supervised(ForwardProcess):
    """Flow matching on weighted images; groups of one reward, which prefer no image, are left out.

    ``L = mean_groups sum_j w_ij mean (v - u)^2`` at ``times`` times an image.
    """

    def __init__(self, *, times: int, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        super().__init__(times=times, sampler=sampler, batch=batch, seed=seed)
        if batch.images < 2:
            raise ConfigError(
                f"a group of one image has no better one: method.batch.images is {batch.images}, use 2 or more"
            )

    @abstractmethod
    def weights(self, rewards: Tensor) -> Tensor:
        """Weights ``[groups, images]`` of rewards ``[groups, images]``; they sum to 1 in each group."""

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, rewards, _ = collect_images(self, stack, prompts, clock)
        grouped = rewards.view(-1, self.batch.images)
        constant = no_spread(grouped.amax(dim=1), grouped.amin(dim=1), rewards)
        weights = self.weights(grouped) * ~constant[:, None]
        collected.kept = weights.flatten().nonzero().flatten().tolist()
        per_group = len(collected.kept) / max(1, int((~constant).sum()))  # the loss is a mean over groups, not images
        own = (weights * per_group).flatten()[list(collected.ids)]
        collected.terms = {"x_0": rollout.latents, "weight": own.to(rollout.latents)}
        nearly = constant & (grouped.amax(dim=1) > grouped.amin(dim=1))
        collected.metrics |= {
            "constant_groups": constant.float().mean().item(),
            "nearly_constant_groups": nearly.float().mean().item(),
            "kept_images": float(len(collected.kept)),
        }
        return collected

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        target = stack.policy.path.target(batch.terms["x_0"], batch.terms["noise"])
        v = stack.predict(batch.terms["x_t"], batch.terms["t"], batch.condition)
        error = mean_per_sample((v - target) ** 2)
        return Loss((batch.terms["weight"] * error).sum(), {"error": error.detach().sum()})

    @abstractmethod
    def trained_images(self) -> int:
        """How many images one iteration trains on, at most."""

    def expected_cost(self) -> Cost:
        images, guidance = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        return Cost(
            rollout=images * guidance * self.sampler.steps,
            training=self.trained_images() * self.times,
            backward=self.trained_images() * self.times,
            images=images,
            reward_calls=images,
        )


class RewardWeighted(Supervised):
    """Reward-weighted regression: ``w_ij`` is the softmax of the group's rewards.

    Args:
        temperature: of the softmax, in units of the reward; positive.
        times: training times per image, drawn without repetition from the rollout's steps.
    """

    def __init__(self, *, temperature: float, times: int, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        super().__init__(times=times, sampler=sampler, batch=batch, seed=seed)
        if temperature <= 0:
            raise ConfigError(f"rwr: temperature is {temperature:g}; it must be positive, in units of the reward")
        self.temperature = temperature

    def weights(self, rewards: Tensor) -> Tensor:
        return softmax_weights(rewards, self.temperature)

    def trained_images(self) -> int:
        return self.batch.total


class BestOfN(Supervised):
    """Best-of-n: the best image of each group alone, the first of several.

    Args:
        times: training times per image, drawn without repetition from the rollout's steps.
    """

    def weights(self, rewards: Tensor) -> Tensor:
        return best(rewards)

    def trained_images(self) -> int:
        return self.batch.prompts
