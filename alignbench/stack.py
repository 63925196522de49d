"""The rollout and reward stack: the only way to a model call or a reward call, so that nothing is uncounted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignbench.errors import RewardError
from alignbench.ledger import Ledger
from alignbench.memory import out_of_memory
from alignbench.policies.policy import Condition, Policy
from alignbench.processes import Processes
from alignbench.prompts.prompt import Prompt
from alignbench.rewards import foreign
from alignbench.rewards.reward import EmbedsImages, Reward, check_finite
from alignbench.sampling.rollout import Sampler, Trajectory, branch, finish, sample

T = TypeVar("T")
POLICY, REWARD = "policy", "reward"  # who reads texts, beside other rewards under their own names


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
        size: rows of one call to begin with; it stays in ``largest``, the same on every process.
        ledger: takes back what a failed attempt was charged.

    Attributes:
        between: called before each call; what it raises ends the work.
    """

    def __init__(self, size: int, ledger: Ledger) -> None:
        self.size = self.largest = size
        self.ledger = ledger
        self.between: Callable[[], None] = lambda: None

    @contextmanager
    def interrupted_by(self, between: Callable[[], None]) -> Iterator[None]:
        """Call ``between`` before each call made inside."""
        outer, self.between = self.between, between
        try:
            yield
        finally:
            self.between = outer

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
            self.between()
            rows = range(start, min(n, start + self.size))
            try:
                with self.ledger.attempt():
                    results.append(run(rows))
            except Exception as error:
                if not out_of_memory(error) or self.size == 1:
                    raise
                self.halve()
                continue
            start = rows.stop
        return results


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
        self.flops = {name: int(flops) for name, flops in policy.flops().items()}
        self.flops |= {"denoiser_backward": self._backward_flops(), "text": self._text_flops()}
        self._reward_flops: dict[tuple[int, str], int] = {}  # of one image or text, by reward and kind of pass
        self._score_names: dict[int, list[str]] = {}  # what each reward returned first

    def _backward_flops(self) -> int:
        """FLOPs of one sample's backward pass through the denoiser for the weights that are trained; measured once."""
        latents = self.policy.noise([0])
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            output = self.policy.predict(latents, latents.new_full((1,), 0.5), self.policy.encode([""]))
            forward = counter.get_total_flops()
            torch.autograd.grad(output.sum(), list(self.policy.trainable_parameters().values()), allow_unused=True)
        return int(counter.get_total_flops() - forward)

    def _text_flops(self) -> int:
        """FLOPs of one text's pass through the policy's encoders, which pad every text to one length; measured once."""
        with FlopCounterMode(display=False) as counter:
            self.policy.encode_text("")
        return int(counter.get_total_flops())

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Encode prompts; each distinct text goes through the text encoders once a run."""
        texts = [prompt.text for prompt in prompts]
        self.ledger.read(POLICY, texts, self.flops["text"])
        return self.policy.encode(texts)

    def predict(
        self,
        latents: Tensor,
        sigma: Tensor,
        condition: Condition,
        *,
        guidance: float = 1.0,
        guidance_embedding: float | None = None,
        detach_uncond: bool = False,
        view: str = "current",
    ) -> Tensor:
        """One counted prediction, as ``Policy.predict``. A backward pass is counted where gradients are recorded."""
        rows = len(latents) * (1 if guidance == 1.0 else 2)
        trained = torch.is_grad_enabled() and (view == "current" or latents.requires_grad)
        backward = (len(latents) if detach_uncond else rows) if trained else 0
        flops = rows * self.flops["denoiser"] + backward * self.flops["denoiser_backward"]
        self.ledger.count(nfe=rows, backward=backward, flops=flops)
        if guidance != 1.0:
            self.ledger.read(POLICY, [""], self.flops["text"])
        return self.policy.predict(
            latents,
            sigma,
            condition,
            guidance=guidance,
            guidance_embedding=guidance_embedding,
            detach_uncond=detach_uncond,
            view=view,
        )

    def velocity(
        self, latents: Tensor, sigma: Tensor, condition: Condition, sampler: Sampler, *, view: str = "current"
    ) -> Tensor:
        """One counted prediction as a velocity, whatever the model predicts: what a sampler walks along."""
        prediction = self.predict(
            latents,
            sigma,
            condition,
            guidance=sampler.guidance,
            guidance_embedding=sampler.guidance_embedding,
            view=view,
        )
        return self.policy.path.velocity(latents, prediction, sigma)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [0, 1]; with gradients where the latents carry them."""
        passes = 3 if torch.is_grad_enabled() and latents.requires_grad else 1  # a backward costs two forwards
        self.ledger.count(images=len(latents), flops=passes * len(latents) * self.flops["decode"])
        return self.policy.decode(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images ``[B, 3, H, W]`` in [0, 1], as ``Policy.encode_images``; counted, without gradient."""
        self.ledger.count(flops=len(images) * self.flops["encode"])
        with torch.no_grad():
            return self.policy.encode_images(images)

    def score(
        self,
        images: Tensor,
        prompts: Sequence[Prompt],
        *,
        reward: Reward | None = None,
        ids: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Score images: with gradients as they are, without gradients as a user would see them (rounded to uint8).

        Args:
            images: float32 ``[batch, 3, height, width]`` in [0, 1].
            prompts: one record per image.
            reward: another reward than the trained one.
            ids: of the images, to name one that has no finite score; default their places in the micro-batch.

        Raises:
            RewardError: a score is not finite, or not what a reward may return; see ``rewards.foreign``.
        """
        reward = reward or self.reward
        with_gradient = torch.is_grad_enabled() and images.requires_grad
        if not with_gradient:
            images = (images * 255).round() / 255
        with self.ledger.scoring():
            first = prompts[:1]
            _, each_text = self._measured((id(reward), "text"), len(first), lambda: foreign.encode(reward, first))
            foreign.encode(reward, prompts)
            scores, each_image = self._measured(
                (id(reward), "image"), len(images), lambda: foreign.score(reward, images, prompts)
            )
        self._check_names(reward, list(scores))
        passes = 3 if with_gradient else 1
        self.ledger.count(reward_calls=len(images), flops=passes * len(images) * each_image)
        if each_text:
            reader = REWARD if reward is self.reward else reward.name
            self.ledger.read(reader, [prompt.text for prompt in prompts], each_text)
        names = [f"{index} of a micro-batch of {len(images)}" for index in range(len(images))] if ids is None else ids
        check_finite(scores, prompts, names)
        return scores

    def embed(self, images: Tensor, scorer: EmbedsImages) -> Tensor:
        """A scorer's embeddings ``[batch, features]`` of images in [0, 1]; counted, but not as a reward call."""
        embeddings, each = self._measured((id(scorer), "embedding"), len(images), lambda: foreign.embed(scorer, images))
        self.ledger.count(flops=len(images) * each)
        return embeddings

    def _check_names(self, reward: Reward, names: list[str]) -> None:
        """Refuse a reward whose scores have other names in one batch than in another: a table needs all of them."""
        first = self._score_names.setdefault(id(reward), names)
        if set(first) != set(names):
            raise RewardError(
                f"reward {reward.name} gave the scores {', '.join(names)}, and {', '.join(first)} before: it must give "
                "the same ones in every call"
            )

    def _measured(self, kind: tuple[int, str], rows: int, call: Callable[[], T]) -> tuple[T, int]:
        """What a call returns, and the FLOPs of one of its rows: counted while the first call of its kind runs."""
        if kind in self._reward_flops or rows == 0:
            return call(), self._reward_flops.get(kind, 0)
        with FlopCounterMode(display=False) as counter:
            result = call()
        self._reward_flops[kind] = counter.get_total_flops() // rows
        return result, self._reward_flops[kind]

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
        until: int | None = None,
        ids: Sequence[int] | None = None,
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
            until: stop before this step; the latents are at noise level ``grid[until]`` then, and nothing to score.
            ids: of the samples over all processes, to name one in an error; default their places in ``prompts``.
        """
        grid = self.policy.grid(sampler.steps, sampler.grid).to(self.policy.device)
        condition = self.encode(prompts)

        def chunk(rows: range) -> Rollout:
            part = condition[rows.start : rows.stop]
            few = list(prompts[rows.start : rows.stop])

            def predict(latents: Tensor, sigma: Tensor) -> Tensor:
                return self.velocity(latents, sigma, part, sampler, view=view)

            def draw(step: int) -> Tensor:
                if step_seeds is None:
                    raise ValueError("a stochastic sampler needs step_seeds")
                return self.policy.noise([step_seeds(row, step) for row in rows])

            start = self.policy.noise(seeds[rows.start : rows.stop])
            latents, trajectory = sample(predict, start, grid, sampler, draw, until)
            images = self.decode(latents) if score or keep_images else None
            names = rows if ids is None else ids[rows.start : rows.stop]
            scores = self.score(images, few, reward=reward, ids=names) if score and images is not None else {}
            return Rollout(latents, images if keep_images else None, scores, trajectory, part)

        parts = self.micro_batch.chunks(len(prompts), chunk)
        return Rollout(
            latents=torch.cat([part.latents for part in parts]),
            images=torch.cat([part.images for part in parts if part.images is not None]) if keep_images else None,
            scores={name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
            trajectory=Trajectory.cat([part.trajectory for part in parts if part.trajectory is not None]),
            condition=condition,
        )

    @torch.no_grad()
    def branch(
        self,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        seeds: Sequence[int],
        *,
        branches: int,
        step_seeds: Callable[[int, int, int], int],
        view: str = "current",
        ids: Sequence[int] | None = None,
    ) -> Rollout:
        """Walk trunks along the ODE, branch off every step but the last, finish, decode and score the branches.

        Args:
            prompts: one record per trunk.
            sampler: a one-step solver, and the stochastic step that begins a branch.
            seeds: of the initial noise, one per trunk.
            branches: K, per trunk and step.
            step_seeds: (trunk, step, branch) -> seed of the noise that begins a branch.
            view: the weights that sample.
            ids: of the trunks over all processes, to name a branch in an error; default their places in ``prompts``.

        Returns:
            A row per branch, row ``(trunk (T - 1) + step) K + branch``, whose trajectory is its one stochastic step.
            The condition has one row per *trunk*: embeddings are large, and a trunk has K (T - 1) branches.
        """
        grid = self.policy.grid(sampler.steps, sampler.grid).to(self.policy.device)
        condition = self.encode(prompts)
        births = sampler.steps - 1

        def walk(rows: range) -> Trajectory:
            part = condition[rows.start : rows.stop]

            def predict(latents: Tensor, sigma: Tensor) -> Tensor:
                return self.velocity(latents, sigma, part, sampler, view=view)

            def draw(step: int) -> Tensor:
                return self.policy.noise([step_seeds(row, step, each) for row in rows for each in range(branches)])

            return branch(predict, self.policy.noise(seeds[rows.start : rows.stop]), grid, sampler, branches, draw)

        trajectory = Trajectory.cat(self.micro_batch.chunks(len(prompts), walk))
        assert trajectory is not None
        row = torch.arange(len(trajectory.log_prob)).view(len(prompts), births, branches)
        order = row.transpose(0, 1).flatten()  # equally long walks side by side fill the micro-batches

        def walk_on(rows: range) -> tuple[Tensor, dict[str, Tensor]]:
            chosen = order[rows.start : rows.stop]
            trunk, first = chosen // (births * branches), chosen // branches % births + 1
            part = condition[trunk]

            def predict(latents: Tensor, sigma: Tensor, walking: Tensor) -> Tensor:
                return self.velocity(latents, sigma, part[walking], sampler, view=view)

            latents = finish(predict, trajectory.next_latents[chosen, 0], first, grid, sampler)
            few = [prompts[each] for each in trunk.tolist()]
            numbers = torch.as_tensor(range(len(prompts)) if ids is None else ids)[trunk]
            names = (numbers * births * branches + chosen % (births * branches)).tolist()
            return latents, self.score(self.decode(latents), few, ids=names)

        parts = self.micro_batch.chunks(len(order), walk_on)
        back = order.argsort()
        return Rollout(
            latents=torch.cat([latents for latents, _ in parts])[back],
            images=None,
            scores={name: torch.cat([scores[name] for _, scores in parts])[back] for name in parts[0][1]},
            trajectory=trajectory,
            condition=condition,
        )
