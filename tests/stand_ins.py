"""Rewards and methods that exist only for tests: the smallest ones that need each part of the interface."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Method, Needs, Update
from alignbench.methods.online import collect_images
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import Reward
from alignbench.sampling.flow import mean_per_sample
from alignbench.sampling.rollout import Sampler
from alignbench.seeding import seed_of
from alignbench.stack import Stack


class Red(Reward):
    """The mean of the red channel."""

    name = "red"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"reward": images[:, 0].mean(dim=(1, 2))}


class Worded(Reward):
    """Smooth in the pixels, and another function of them for every prompt; the channels' weights come from its text."""

    name = "worded"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        codes = torch.tensor([[sum(map(ord, prompt.text)) % modulus for modulus in (3, 5, 7)] for prompt in prompts])
        return {"reward": (torch.sin(codes[:, :, None, None] + 3 * images)).mean(dim=(1, 2, 3))}


class Constant(Reward):
    """The same for every image, or not a number for one."""

    differentiable = False

    def __init__(self, value: float = 0.5, bad_prompt: str | None = None) -> None:
        self.name = "constant"
        self.value, self.bad_prompt = value, bad_prompt

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        values = [float("nan") if prompt.text == self.bad_prompt else self.value for prompt in prompts]
        return {"reward": torch.tensor(values)}


class _OneTime(Method):
    """Learns from each image at one time, t = 0.5, with noise seeded per image."""

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        for rows, images in self.parts(experience, clock):

            def batch(chosen: Sequence[int], rows: list[int] = rows) -> Batch:
                index = torch.tensor([rows[each] for each in chosen])
                terms = {name: value[index] for name, value in experience.terms.items()}
                seeds = [seed_of("noise", self.seed, clock.iteration, experience.ids[rows[each]]) for each in chosen]
                terms["noise"] = stack.policy.noise(seeds)
                prompts = [experience.prompts[row] for row in index.tolist()]
                return Batch(terms, experience.condition[index], prompts, chosen)

            yield Update(len(rows), images, batch)

    def expected_cost(self) -> Cost:
        raise NotImplementedError

    def errors(self, stack: Stack, batch: Batch, clean: Tensor, view: str = "current") -> Tensor:
        t = clean.new_full((len(clean),), 0.5)
        x_t = stack.policy.path.interpolate(clean, batch.terms["noise"], t)
        v = stack.predict(x_t, t, batch.condition, view=view)
        return mean_per_sample((v - stack.policy.path.target(clean, batch.terms["noise"])) ** 2)


class RewardGradient(_OneTime):
    """Maximises a differentiable reward of the one-step clean estimate."""

    needs = Needs(differentiable_reward=True)

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, _, _ = collect_images(self, stack, prompts, clock)
        collected.terms = {"clean": rollout.latents}
        return collected

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        t = batch.terms["noise"].new_full((len(batch.atoms),), 0.9)
        x_t = stack.policy.path.interpolate(batch.terms["clean"], batch.terms["noise"], t)
        v = stack.predict(x_t, t, batch.condition)
        images = stack.decode(stack.policy.path.clean(x_t, v, t))
        return Loss(-stack.score(images, batch.prompts)["reward"].sum())


class PairMargin(_OneTime):
    """The best against the worst image of each prompt; an atom is a pair, two denoiser rows."""

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, rewards, groups = collect_images(self, stack, prompts, clock)
        latents = stack.processes.gather(rollout.latents)
        pairs = [(rewards.masked_fill(groups != g, -9).argmax(), rewards.masked_fill(groups != g, 9).argmin())
                 for g in range(len(prompts))]  # fmt: skip
        mine = stack.processes.shard(len(prompts))
        collected.terms = {
            "winner": torch.stack([latents[pairs[g][0]] for g in mine]),
            "loser": torch.stack([latents[pairs[g][1]] for g in mine]),
        }
        collected.prompts, collected.ids = [prompts[g] for g in mine], list(mine)
        collected.condition, collected.kept = stack.encode(collected.prompts), range(len(prompts))
        return collected

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        for update in super().updates(experience, stack, clock):
            update.rows = 2
            yield update

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        margins = [
            self.errors(stack, batch, batch.terms["winner"], view)
            - self.errors(stack, batch, batch.terms["loser"], view)
            for view in ("current", "reference")
        ]
        return Loss(-logsigmoid(-5.0 * (margins[0] - margins[1].detach())).sum())


class GroupCentred(_OneTime):
    """Regresses centred errors on centred rewards: every loss needs a statistic of its whole group."""

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, rewards, groups = collect_images(self, stack, prompts, clock)
        own = list(collected.ids)
        collected.terms = {"clean": rollout.latents, "reward": rewards[own].to(rollout.latents), "group": groups[own]}
        return collected

    def prepare(self, stack: Stack, update: Update) -> None:
        with torch.no_grad():
            parts = stack.micro_batch.chunks(update.atoms, lambda atoms: self._pass(stack, update.batch(atoms)))
        gather = stack.processes.gather
        errors, rewards, groups = (gather(torch.cat([part[i] for part in parts])) for i in range(3))
        count = torch.bincount(groups, minlength=self.batch.prompts).clamp(min=1)
        for name, values in (("error", errors), ("reward", rewards)):
            update.shared[name] = torch.zeros(len(count)).to(values).index_add(0, groups, values) / count

    def _pass(self, stack: Stack, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return self.errors(stack, batch, batch.terms["clean"]), batch.terms["reward"], batch.terms["group"]

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        error, reward, group = self._pass(stack, batch)
        centred = (error - update.shared["error"][group]) + (reward - update.shared["reward"][group])
        return Loss((centred**2).sum())


__all__ = ["BatchSize", "Constant", "GroupCentred", "PairMargin", "Red", "RewardGradient", "Sampler", "Worded"]
