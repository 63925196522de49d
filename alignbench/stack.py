"""The rollout and reward stack: the only way to a model call or a reward call, so that nothing is uncounted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignbench.ledger import Ledger
from alignbench.policies.policy import Condition, Policy
from alignbench.processes import Processes
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import Reward, check_finite
from alignbench.sampling.rollout import Sampler, Trajectory, sample

T = TypeVar("T")


@dataclass
class Rollout:
    """What ``Stack.sample`` returns for the samples of this process.

    Attributes:
        latents: clean latents ``[samples, ...]``.
        images: decoded images ``[samples, 3, height, width]`` in [0, 1], or None if they were not asked for.
        scores: named scores ``[samples]``; empty if no reward was asked for.
        trajectory: what the stochastic steps went through; None for a deterministic rollout.
        condition: the encoded prompts.
    """

    latents: Tensor
    images: Tensor | None
    scores: dict[str, Tensor]
    trajectory: Trajectory | None
    condition: Condition


class MicroBatch:
    """A batch size that halves when memory runs out and stays there.

    Args:
        size: rows of one call to begin with.
        ledger: takes back what a failed attempt was charged.
    """

    def __init__(self, size: int, ledger: Ledger) -> None:
        self.size = size
        self.ledger = ledger

    def halve(self) -> None:
        """Make the next calls half as large."""
        self.size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def chunks(self, n: int, run: Callable[[range], T]) -> list[T]:
        """Call ``run`` on consecutive ranges that cover ``range(n)``, retrying smaller ones when memory runs out."""
        results: list[T] = []
        start = 0
        while start < n:
            rows = range(start, min(n, start + self.size))
            try:
                with self.ledger.attempt():
                    results.append(run(rows))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self.size == 1:
                    raise
                self.halve()
                continue
            start = rows.stop
        return results


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the machine's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Stack:
    """Policy, reward and ledger as one counted surface.

    Args:
        policy: the model that is trained.
        reward: what scores its images.
        ledger: where every call is counted.
        processes: the processes of the run.
        micro_batch: rows of one call to begin with; halved when memory runs out.
    """

    def __init__(
        self, policy: Policy, reward: Reward, ledger: Ledger, processes: Processes, *, micro_batch: int
    ) -> None:
        self.policy = policy
        self.reward = reward
        self.ledger = ledger
        self.processes = processes
        self.micro_batch = MicroBatch(micro_batch, ledger)
        self.flops = dict(policy.flops()) | {"denoiser_backward": self._backward_flops()}
        self._reward_flops: dict[str, float] = {}

    def _backward_flops(self) -> float:
        """FLOPs of one sample's backward pass through the denoiser for the weights that are trained; measured once."""
        latents = self.policy.noise([0])
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            output = self.policy.predict(latents, latents.new_full((1,), 0.5), self.policy.encode([""]))
            forward = counter.get_total_flops()
            torch.autograd.grad(output.sum(), list(self.policy.trainable_parameters().values()), allow_unused=True)
        return float(counter.get_total_flops() - forward)

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Encode prompts; each distinct text goes through the text encoders once a run."""
        return self.policy.encode([prompt.text for prompt in prompts])

    def predict(
        self,
        latents: Tensor,
        sigma: Tensor,
        condition: Condition,
        *,
        guidance: float = 1.0,
        detach_uncond: bool = False,
        view: str = "current",
    ) -> Tensor:
        """One counted prediction, as ``Policy.predict``. A backward pass is counted where gradients are recorded."""
        rows = len(latents) * (1 if guidance == 1.0 else 2)
        trained = torch.is_grad_enabled() and (view == "current" or latents.requires_grad)
        backward = (len(latents) if detach_uncond else rows) if trained else 0
        flops = rows * self.flops["denoiser"] + backward * self.flops["denoiser_backward"]
        self.ledger.count(nfe=rows, backward=backward, flops=flops)
        return self.policy.predict(latents, sigma, condition, guidance=guidance, detach_uncond=detach_uncond, view=view)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [0, 1]; with gradients where the latents carry them."""
        passes = 3 if torch.is_grad_enabled() and latents.requires_grad else 1  # a backward costs two forwards
        self.ledger.count(images=len(latents), flops=passes * len(latents) * self.flops["decode"])
        return self.policy.decode(latents)

    def score(self, images: Tensor, prompts: Sequence[Prompt], *, reward: Reward | None = None) -> dict[str, Tensor]:
        """Score images: with gradients as they are, without gradients as a user would see them (rounded to uint8).

        Raises:
            RewardError: a score is not finite.
        """
        reward = reward or self.reward
        with_gradient = torch.is_grad_enabled() and images.requires_grad
        if not with_gradient:
            images = (images * 255).round() / 255
        with self.ledger.timed("reward"):
            scores = reward.score(images, prompts)
        passes = 3 if with_gradient else 1
        self.ledger.count(
            reward_calls=len(images), flops=passes * len(images) * self._reward_cost(reward, images, prompts)
        )
        check_finite(scores, prompts, [f"{index} of {len(images)}" for index in range(len(images))])
        return scores

    def _reward_cost(self, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> float:
        """FLOPs of scoring one image whose prompt is already encoded, measured once."""
        if reward.name not in self._reward_flops:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                reward.score(images[:1].detach(), prompts[:1])
            self._reward_flops[reward.name] = float(counter.get_total_flops())
        return self._reward_flops[reward.name]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        seeds: Sequence[int],
        *,
        step_seeds: Callable[[int, int], int] | None = None,
        view: str = "current",
        reward: Reward | None = None,
        keep_images: bool = False,
        score: bool = True,
    ) -> Rollout:
        """Sample, decode and score, in micro-batches.

        Args:
            prompts: one record per sample.
            sampler: solver, steps, guidance, stochastic steps.
            seeds: of the initial noise, one per sample.
            step_seeds: (sample, step) -> seed of a stochastic step's noise; needed by stochastic samplers.
            view: the weights that sample.
            reward: another reward than the trained one.
            keep_images: return the decoded images too.
            score: False skips decoding and scoring unless images are kept.
        """
        grid = self.policy.grid(sampler.steps, sampler.grid).to(self.policy.device)
        condition = self.encode(prompts)

        def chunk(rows: range) -> Rollout:
            part = condition[rows.start : rows.stop]
            few = list(prompts[rows.start : rows.stop])

            def predict(latents: Tensor, sigma: Tensor) -> Tensor:
                return self.predict(latents, sigma, part, guidance=sampler.guidance, view=view)

            def draw(step: int) -> Tensor:
                if step_seeds is None:
                    raise ValueError("a stochastic sampler needs step_seeds")
                return self.policy.noise([step_seeds(row, step) for row in rows])

            start = self.policy.noise(seeds[rows.start : rows.stop])
            latents, trajectory = sample(predict, start, grid, sampler, draw)
            images = self.decode(latents) if score or keep_images else None
            scores = self.score(images, few, reward=reward) if score and images is not None else {}
            return Rollout(latents, images if keep_images else None, scores, trajectory, part)

        parts = self.micro_batch.chunks(len(prompts), chunk)
        return Rollout(
            latents=torch.cat([part.latents for part in parts]),
            images=torch.cat([part.images for part in parts if part.images is not None]) if keep_images else None,
            scores={name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
            trajectory=Trajectory.cat([part.trajectory for part in parts if part.trajectory is not None]),
            condition=condition,
        )
