"""Methods that follow the gradient of a differentiable reward: Direct-Align and SRPO, ReFL, DRaFT.

Direct-Align (Shen et al., arXiv 2509.06942) noises an image with a *known* noise, lets the model take one step, and
takes the known noise out again: what is left is an image at any noise level, so that early steps can be trained too.
SRPO, of the same paper, replaces the reward by the preference between two control words before the prompt. ReFL (Xu et
al., arXiv 2304.05977) decodes the model's clean estimate at one late step, DRaFT-K (Clark et al., arXiv 2309.17400)
goes back through the last K steps of the sampler.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alignbench.errors import ConfigError, DataError
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Method, Needs, Update
from alignbench.policies.policy import Condition
from alignbench.prompts.images import CaptionedImages
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.flow import per_sample, shift_time
from alignbench.sampling.rollout import Sampler
from alignbench.sampling.solvers import SOLVERS
from alignbench.seeding import generator, seed_of, seeds_of
from alignbench.stack import Stack

POSITIONS = 1000  # p[0..999], from noisy to clean
ONE_STEP_SOLVERS = ("euler", "ddim", "dpm1")


class DirectAlign(Method):
    """Direct-Align, with semantic relative preference: SRPO.

    One optimizer step learns from both branches of an image: *denoise* arrives at its noise level from above,
    *inversion* from below, where the gradient of the recovered image with respect to the velocity has the other sign.
    A reward that rises in one branch must therefore fall in the other.

    Args:
        relative: the reward is the preference of one control word over another (SRPO); False takes the reward of the
            prompt itself, ``L = -R``.
        inversion: False drops the inversion branch.
        positive_words, negative_words: control words, put before the prompt; they cycle with the optimizer step.
        weight_denoise, weight_inversion: k at the cleanest and at the noisiest position, in between linear.
        grid_points: the noisiest and the cleanest position, as points of the 50-step grid with shift 3.
        longest_step: largest distance of the two ends of a branch, in positions.
        margin: of the hinge.
        reward_scale: what rewards are divided by.
        images: a folder of real images (see ``CaptionedImages``) to learn from; None samples them.
    """

    needs = Needs(differentiable_reward=True)

    def __init__(
        self,
        *,
        relative: bool,
        inversion: bool,
        positive_words: Sequence[str],
        negative_words: Sequence[str],
        weight_denoise: tuple[float, float],
        weight_inversion: tuple[float, float],
        grid_points: tuple[int, int],
        longest_step: int,
        margin: float,
        reward_scale: float,
        images: str | None,
        sampler: Sampler,
        batch: BatchSize,
        seed: int,
    ) -> None:
        super().__init__(sampler=sampler, batch=batch, seed=seed)
        _check_sampler("direct_align", sampler)
        _check_scale("direct_align", reward_scale)
        if relative and not (positive_words and negative_words):
            raise ConfigError(
                "direct_align: relative=true needs positive_words and negative_words, at least one each; "
                "relative=false takes the reward of the prompt itself"
            )
        if not 0 < grid_points[0] < grid_points[1] < 50:
            raise ConfigError(
                f"direct_align: grid_points is {list(grid_points)}: two increasing points inside of the 50-step grid "
                "(the paper: [5, 25])"
            )
        if not 1 <= longest_step <= POSITIONS // 2:
            raise ConfigError(f"direct_align: longest_step is {longest_step}; it must be in 1..{POSITIONS // 2}")
        self.relative, self.inversion = relative, inversion
        self.positive_words, self.negative_words = tuple(positive_words), tuple(negative_words)
        self.weight_denoise, self.weight_inversion = weight_denoise, weight_inversion
        self.grid_points, self.longest_step = grid_points, longest_step
        self.margin, self.reward_scale = margin, reward_scale
        self.images = None if images is None else CaptionedImages(images)

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        ids = list(stack.processes.shard(self.batch.total))
        own = [prompts[each // self.batch.images] for each in ids]
        if self.images is None:
            x_0 = stack.sample(own, self.sampler, [self._noise_seed(each, clock) for each in ids], score=False).latents
        else:
            x_0 = self._real_latents(self.images, stack, own, ids, clock)
        return Experience({"x_0": x_0}, stack.encode(own), own, ids, range(self.batch.total))

    def _real_latents(
        self, images: CaptionedImages, stack: Stack, prompts: Sequence[Prompt], ids: Sequence[int], clock: Clock
    ) -> Tensor:
        """Latents of a real image of each prompt, drawn per image."""

        def encode(rows: range) -> Tensor:
            draws = [generator("image", self.seed, clock.iteration, ids[row]) for row in rows]
            pixels = [images.draw(prompts[row], rng) for row, rng in zip(rows, draws, strict=True)]
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
            return stack.encode_images(batch.to(stack.policy.device))

        latents = torch.cat(stack.micro_batch.chunks(len(prompts), encode))
        if latents.shape[1:] != stack.policy.latent_shape:
            raise DataError(
                f"images of {images.folder} have latents {list(latents.shape[1:])}, but the model works on "
                f"{list(stack.policy.latent_shape)}: resize them to the pixels of its samples"
            )
        return latents

    def _noise_seed(self, sample: int, clock: Clock) -> int:
        """The noise of an image: one for all prompts."""
        return seed_of("initial noise", self.seed, clock.iteration, sample % self.batch.images)

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        position = positions(*self.grid_points)
        branches = (False, True) if self.inversion else (False,)
        for index, (rows, images) in enumerate(self.parts(experience, clock)):
            atoms = [(row, inverted) for row in rows for inverted in branches]

            def batch(
                chosen: Sequence[int],
                atoms: list[tuple[int, bool]] = atoms,
                step: int = clock.optimizer_steps + index,
            ) -> Batch:
                rows = [atoms[each][0] for each in chosen]
                inverted = torch.tensor([atoms[each][1] for each in chosen])
                samples = [experience.ids[row] for row in rows]
                u = torch.tensor([draw_position(self.seed, clock.iteration, each) for each in samples])
                s_from, s_to = endpoints(u, inverted, position, self.longest_step)
                k = preference_weight(u, inverted, self.longest_step, self.weight_denoise, self.weight_inversion)
                x_0 = experience.terms["x_0"][rows]
                terms = {
                    "x_0": x_0,
                    "noise": stack.policy.noise([self._noise_seed(each, clock) for each in samples]),
                    "s_from": s_from.to(x_0),
                    "s_to": s_to.to(x_0),
                    "k": k.to(x_0),
                    "inverted": inverted.to(x_0.device),
                    "step": torch.full((len(rows),), step),
                }
                condition = experience.condition[torch.as_tensor(rows)]
                return Batch(terms, condition, [experience.prompts[row] for row in rows], chosen)

            yield Update(len(atoms), images, batch)

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        x_0, noise, inverted = (batch.terms[name] for name in ("x_0", "noise", "inverted"))
        s_from, s_to = batch.terms["s_from"], batch.terms["s_to"]
        x = stack.policy.path.interpolate(x_0, noise, s_from)
        v = stack.predict(x, s_from, batch.condition)
        images = stack.decode(recover(x, v, noise, s_from, s_to))
        if not self.relative:
            reward = stack.score(images, batch.prompts)["reward"]
            total = torch.where(inverted, reward, -reward).sum() / self.reward_scale
            return Loss(total, {"reward": reward.detach()[~inverted].sum()})
        steps = batch.terms["step"].tolist()
        positive, negative = (
            stack.score(
                images,
                [with_word(prompt, words, step) for prompt, step in zip(batch.prompts, steps, strict=True)],
            )["reward"]
            for words in (self.positive_words, self.negative_words)
        )
        r = relative_reward(positive, negative, batch.terms["k"], inverted) / self.reward_scale
        losses = hinge(r, self.margin)
        branches = 2 if self.inversion else 1
        metrics = {
            "reward": positive.detach()[~inverted].sum(),  # of the prompt behind a positive word: it costs no call
            "relative_reward": r.detach()[~inverted].sum(),
            "hinge_active": (losses.detach() > 0).sum() / branches,
        }
        return Loss(losses.sum(), metrics)

    def expected_cost(self) -> Cost:
        images, guidance = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        rows = images * (2 if self.inversion else 1)
        return Cost(
            rollout=images * guidance * self.sampler.steps if self.images is None else 0,
            training=rows,
            backward=rows,
            images=rows,
            images_with_gradient=rows,
            reward_calls=rows * (2 if self.relative else 1),
        )


def positions(first: int, last: int) -> Tensor:
    """``p[0..999]``: noise levels, linear between two points of the 50-step grid with shift 3; float64 [1000]."""
    start, end = shift_time(1 - torch.tensor([first, last], dtype=torch.float64) / 50, shift=3.0).tolist()
    return torch.linspace(start, end, POSITIONS, dtype=torch.float64)


def draw_position(seed: int, iteration: int, sample: int) -> int:
    """``u ~ U{5..995}``, hashed per image."""
    return int(generator("position", seed, iteration, sample).integers(5, 996))


def endpoints(u: Tensor, inverted: Tensor, position: Tensor, longest_step: int) -> tuple[Tensor, Tensor]:
    """Where the branches start and arrive: ``s_from``, ``s_to``, both [B].

    Both arrive at ``p[1000 - u]``; with ``j = min(longest_step, u, 1000 - u)`` denoise starts at the noisier
    ``p[1000 - u - j]`` and inversion at the cleaner ``p[min(1000 - u + j, 999)]``.

    Args:
        u: int64 [B], in 5..995.
        inverted: bool [B], the inversion branch.
        position: [1000], decreasing.
    """
    arrival = POSITIONS - u
    j = step_length(u, longest_step)
    start = torch.where(inverted, (arrival + j).clamp(max=POSITIONS - 1), arrival - j)
    return position[start], position[arrival]


def step_length(u: Tensor, longest_step: int) -> Tensor:
    """``j = min(longest_step, u, 1000 - u)``: how many positions a branch goes; int64 [B]."""
    return torch.minimum(u, POSITIONS - u).clamp(max=longest_step)


def preference_weight(
    u: Tensor, inverted: Tensor, longest_step: int, denoise: tuple[float, float], inversion: tuple[float, float]
) -> Tensor:
    """k at the branch's cleaner end; float64 [B].

    ``linspace(*denoise, 1000)[u]`` and ``linspace(*inversion, 1000)[max(u - j, 1)]``, whose index grows towards noise.
    """
    tables = [torch.linspace(*ends, POSITIONS, dtype=torch.float64) for ends in (denoise, inversion)]
    return torch.where(inverted, tables[1][(u - step_length(u, longest_step)).clamp(min=1)], tables[0][u])


def recover(x: Tensor, v: Tensor, noise: Tensor, s_from: Tensor, s_to: Tensor) -> Tensor:
    """One Euler step, then the known noise is taken out: ``x0_rec = (x + (s_to - s_from) v - s_to e) / (1 - s_to)``.

    With the exact velocity ``e - x_0`` it is ``x_0`` whatever the two noise levels.

    Args:
        x, v, noise: [B, ...]; ``x = (1 - s_from) x_0 + s_from e``.
        s_from, s_to: [B], in [0, 1), of either order.
    """
    s_from, s_to = per_sample(s_from, x), per_sample(s_to, x)
    return (x + (s_to - s_from) * v - s_to * noise) / (1 - s_to)


def relative_reward(positive: Tensor, negative: Tensor, k: Tensor, inverted: Tensor) -> Tensor:
    """``(1 + k) R(c+) - R(c-)`` in the denoise branch, ``(1 + k) R(c-) - R(c+)`` in the inversion branch; all [B]."""
    wanted, unwanted = torch.where(inverted, negative, positive), torch.where(inverted, positive, negative)
    return (1 + k) * wanted - unwanted


def hinge(r: Tensor, margin: float) -> Tensor:
    """``relu(margin - r) / 2``."""
    return (margin - r).clamp(min=0) / 2


def with_word(prompt: Prompt, words: Sequence[str], step: int) -> Prompt:
    """The prompt behind the step's control word, "Detail. a photo of a dog", as in the official code."""
    return replace(prompt, text=f"{words[step % len(words)]}. {prompt.text}")


class SamplerGradient(Method):
    """Maximises the reward of images whose last model calls carry gradients: ``L = -R / scale``.

    The first steps of the sampler are walked without gradient, when images are collected.

    Args:
        reward_scale: what rewards are divided by.
    """

    needs = Needs(parameterisations=("velocity", "epsilon"), differentiable_reward=True)

    def __init__(self, *, reward_scale: float, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        super().__init__(sampler=sampler, batch=batch, seed=seed)
        _check_sampler(type(self).__name__.lower(), sampler)
        _check_scale(type(self).__name__.lower(), reward_scale)
        self.reward_scale = reward_scale

    @abstractmethod
    def stops(self, clock: Clock) -> list[int]:
        """For every image of the iteration the step before which its walk without gradient stops."""

    @abstractmethod
    def clean(self, stack: Stack, latents: Tensor, stop: Tensor, condition: Condition) -> Tensor:
        """Clean latents [B, ...] from ``latents`` at noise level ``grid[stop]`` ([B]), with gradients."""

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        stops = self.stops(clock)
        ids = sorted(stack.processes.shard(self.batch.total), key=lambda each: stops[each])
        own = [prompts[each // self.batch.images] for each in ids]
        seeds = seeds_of("initial noise", self.seed, clock.iteration, ids=ids)
        latents = []
        for stop in sorted({stops[each] for each in ids}):
            rows = [row for row, each in enumerate(ids) if stops[each] == stop]
            some, some_seeds = [own[row] for row in rows], [seeds[row] for row in rows]
            latents.append(stack.sample(some, self.sampler, some_seeds, score=False, until=stop).latents)
        terms = {"latents": torch.cat(latents), "stop": torch.tensor([stops[each] for each in ids])}
        return Experience(terms, stack.encode(own), own, ids, range(self.batch.total))

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        for rows, images in self.parts(experience, clock):

            def batch(chosen: Sequence[int], rows: list[int] = rows) -> Batch:
                picked = torch.as_tensor([rows[each] for each in chosen])
                terms = {name: value[picked] for name, value in experience.terms.items()}
                prompts = [experience.prompts[row] for row in picked.tolist()]
                return Batch(terms, experience.condition[picked], prompts, chosen)

            yield Update(len(rows), images, batch)

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        latents = self.clean(stack, batch.terms["latents"], batch.terms["stop"], batch.condition)
        reward = stack.score(stack.decode(latents), batch.prompts)["reward"]
        return Loss(-reward.sum() / self.reward_scale, {"reward": reward.detach().sum()})

    def cost(self, calls: int) -> Cost:
        """What an iteration costs with ``calls`` model calls with gradient an image."""
        images, guidance = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        return Cost(
            rollout=guidance * sum(self.stops(Clock())),
            training=images * guidance * calls,
            backward=images * guidance * calls,
            images=images,
            images_with_gradient=images,
            reward_calls=images,
        )


class ReFL(SamplerGradient):
    """ReFL: the clean estimate of one late step is decoded and scored.

    Args:
        late: the share of the sampler's steps, from the end, of which each image gets one at random. Every such step
            gets the same number of images, so that iterations cost the same.
    """

    def __init__(self, *, late: float, reward_scale: float, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        super().__init__(reward_scale=reward_scale, sampler=sampler, batch=batch, seed=seed)
        if not 0 < late <= 1:
            raise ConfigError(f"refl: late is {late:g}; a share of the steps in (0, 1] (the paper: 0.25)")
        self.late_steps = max(1, round(late * sampler.steps))
        if batch.total < self.late_steps:
            raise ConfigError(
                f"refl: {batch.total} images an iteration for {self.late_steps} late steps: every step needs an image; "
                "raise method.batch.prompts or lower method.algorithm.late"
            )

    def stops(self, clock: Clock) -> list[int]:
        order = generator("late step", self.seed, clock.iteration).permutation(self.batch.total)
        first = self.sampler.steps - self.late_steps
        return [first + place * self.late_steps // self.batch.total for place in order.tolist()]

    def clean(self, stack: Stack, latents: Tensor, stop: Tensor, condition: Condition) -> Tensor:
        grid = stack.policy.grid(self.sampler.steps, self.sampler.grid)
        s = grid[stop.to(grid.device)]
        walk = self.sampler
        prediction = stack.predict(
            latents, s, condition, guidance=walk.guidance, guidance_embedding=walk.guidance_embedding
        )
        return stack.policy.path.clean(latents, prediction, s)

    def expected_cost(self) -> Cost:
        return self.cost(calls=1)


class DRaFT(SamplerGradient):
    """DRaFT-K: the gradient goes back through the last K steps of the sampler.

    Args:
        last_steps: K; all of the sampler's steps is DRaFT.
    """

    def __init__(self, *, last_steps: int, reward_scale: float, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        super().__init__(reward_scale=reward_scale, sampler=sampler, batch=batch, seed=seed)
        if not 1 <= last_steps <= sampler.steps:
            raise ConfigError(
                f"draft: last_steps is {last_steps}; it must be in 1..{sampler.steps}, the rollout's steps"
            )
        if sampler.solver not in ONE_STEP_SOLVERS:
            raise ConfigError(
                f"draft: the solver {sampler.solver} remembers the step before, which has no gradient; "
                f"set method.rollout.solver to one of {', '.join(ONE_STEP_SOLVERS)}"
            )
        self.last_steps = last_steps

    def stops(self, clock: Clock) -> list[int]:
        return [self.sampler.steps - self.last_steps] * self.batch.total

    def clean(self, stack: Stack, latents: Tensor, stop: Tensor, condition: Condition) -> Tensor:
        grid = stack.policy.grid(self.sampler.steps, self.sampler.grid)
        solver, state = SOLVERS[self.sampler.solver], None  # a one-step solver has nothing to remember
        for i in range(self.sampler.steps - self.last_steps, self.sampler.steps):
            v = stack.velocity(latents, grid[i].expand(len(latents)), condition, self.sampler)
            latents, state = solver(latents, v, i, grid, state)
        return latents

    def expected_cost(self) -> Cost:
        return self.cost(calls=self.last_steps)


def _check_sampler(name: str, sampler: Sampler) -> None:
    if sampler.stochastic is not None:
        raise ConfigError(
            f"{name} follows the gradient of the reward through a deterministic sampler: "
            f"set method.rollout.stochastic to null, not {sampler.stochastic}"
        )


def _check_scale(name: str, reward_scale: float) -> None:
    if reward_scale <= 0:
        raise ConfigError(f"{name}: reward_scale is {reward_scale:g}; it must be positive (20 for PickScore's logits)")
