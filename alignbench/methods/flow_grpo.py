"""Flow-GRPO: policy gradients on a stochastic sampler of a flow model (Liu et al., arXiv 2505.05470).

The rollout turns the ODE into an SDE with the same marginals, so every step has a probability; the loss is PPO's
clipped surrogate over all steps of all images, with one advantage per image.

Flow-GRPO-Fast, MixGRPO (arXiv 2507.21802) and DanceGRPO (arXiv 2505.07818) are settings of it: stochastic steps in a
window alone, some of the steps trained, one initial noise per prompt, other stochastic steps and advantages.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.methods.advantages import Advantages, add_advantages, group_advantages
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Method, Needs, Update
from alignbench.methods.online import collect_images
from alignbench.methods.ppo import clip_fraction, ppo
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import WeightedSum
from alignbench.sampling.rollout import Sampler
from alignbench.sampling.stochastic import TRANSITIONS, Transition, kl_mu, kl_mu_step, log_prob
from alignbench.seeding import generator
from alignbench.settings import construct
from alignbench.stack import Rollout, Stack


@dataclass(frozen=True)
class Window:
    """The consecutive stochastic steps of an iteration; the others are deterministic and not trained.

    Attributes:
        size: w, steps of the window.
        start: its first step: ``"random"`` draws it uniformly (Flow-GRPO-Fast), ``"progressive"`` moves it up by one
            step and begins again at the end (MixGRPO).
        first, last: the window lies in ``range(first, last)``.
        every: iterations at one place.

    Raises:
        ConfigError: a window that does not fit into its range.
    """

    size: int
    start: Literal["random", "progressive"]
    first: int
    last: int
    every: int

    def __post_init__(self) -> None:
        if self.start not in ("random", "progressive"):
            raise ConfigError(f"window.start is {self.start!r}; choose random or progressive")
        if self.size < 1 or self.first < 0 or self.first + self.size > self.last:
            raise ConfigError(
                f"a window of {self.size} steps does not fit into the steps {self.first} to {self.last - 1}: "
                "window.size must be 1 or more and at most window.last - window.first"
            )
        if self.every < 1:
            raise ConfigError(f"window.every is {self.every}; it must be 1 or more iterations")

    def steps(self, iteration: int, seed: int) -> tuple[int, ...]:
        """The stochastic steps of an iteration."""
        moved, places = iteration // self.every, self.last - self.first - self.size + 1
        if self.start == "progressive":
            start = self.first + moved % places
        else:
            start = self.first + int(generator("window", seed, moved).integers(places))
        return tuple(range(start, start + self.size))


class FlowGRPO(Method):
    """Flow-GRPO.

    Args:
        clip_range: c of the clipped ratio, positive; it belongs to log-probabilities that are means over the latent.
        advantage_clip: advantages are clipped to this magnitude first.
        kl: weight of the divergence from the reference; 0 makes no reference pass.
        kl_form: ``"mu"``: ``mean (mu - mu_ref)^2 / (2 sigma_i^2)``; ``"mu_step"``: with the step's whole variance
            ``sigma_i^2 d_i^2`` instead (TempFlow-GRPO).
        std: ``"global"`` or ``"group"`` standard deviation of the advantages; ``"none"`` divides by nothing.
        ddof, eps: of that standard deviation.
        aggregate: what is added up over several rewards: ``"rewards"`` or the ``"advantages"`` of each (MixGRPO).
        same_noise: all images of a prompt begin at one initial noise.
        window: values of a ``Window``; None makes all steps but the last stochastic.
        trained_fraction: share of the stochastic steps that each image trains, drawn per image, rounded down.
        detach_uncond: no gradient through the unconditional branch of a guided prediction, as in one snapshot of the
            official code; its gradient is several times larger and points elsewhere.
        recompute_log_prob: take the old log-probabilities at the start of each update from an extra counted pass,
            instead of from the rollout; for compute dtypes in which the two differ.
    """

    needs = Needs(log_probabilities=True)

    def __init__(
        self,
        *,
        clip_range: float,
        advantage_clip: float,
        kl: float,
        kl_form: Literal["mu", "mu_step"],
        std: Literal["global", "group", "none"],
        ddof: Literal[0, 1],
        eps: float,
        aggregate: Literal["rewards", "advantages"],
        same_noise: bool,
        window: Mapping[str, Any] | None,
        trained_fraction: float,
        detach_uncond: bool,
        recompute_log_prob: bool,
        sampler: Sampler,
        batch: BatchSize,
        seed: int,
    ) -> None:
        super().__init__(sampler=sampler, batch=batch, seed=seed)
        if clip_range <= 0:
            raise ConfigError(f"flow_grpo: clip_range is {clip_range:g}; it must be positive (the paper uses 1e-4)")
        if kl < 0:
            raise ConfigError(f"flow_grpo: kl is {kl:g}; it must be 0 or more")
        if std not in ("global", "group", "none") or ddof not in (0, 1):
            raise ConfigError(f"flow_grpo: std is {std!r} and ddof {ddof}; choose global, group or none, and 0 or 1")
        if kl_form not in ("mu", "mu_step"):
            raise ConfigError(f"flow_grpo: kl_form is {kl_form!r}; choose mu or mu_step")
        if aggregate not in ("rewards", "advantages"):
            raise ConfigError(f"flow_grpo: aggregate is {aggregate!r}; choose rewards or advantages")
        if not 0 < trained_fraction <= 1:
            raise ConfigError(f"flow_grpo: trained_fraction is {trained_fraction:g}; it must lie in (0, 1]")
        if sampler.stochastic is None:
            raise ConfigError("flow_grpo needs log-probabilities: set method.rollout.stochastic to flow, dance or cps")
        if batch.images < 2:
            raise ConfigError(
                f"flow_grpo compares images of one prompt: method.batch.images is {batch.images}, use 2 or more"
            )
        self.clip_range, self.advantage_clip, self.kl, self.kl_form = clip_range, advantage_clip, kl, kl_form
        self.std, self.ddof, self.eps, self.aggregate = std, ddof, eps, aggregate
        self.same_noise, self.trained_fraction = same_noise, trained_fraction
        self.window = construct(Window, window, "method.algorithm.window") if window is not None else None
        if self.window is not None and self.window.last > sampler.steps - 1:
            raise ConfigError(
                f"window.last is {self.window.last}, but of {sampler.steps} rollout steps only the first "
                f"{sampler.steps - 1} can be stochastic: {sampler.steps - 1} is the largest window.last"
            )
        self.detach_uncond, self.recompute_log_prob = detach_uncond, recompute_log_prob

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        sampler = self.sampler
        if self.window is not None:
            sampler = replace(sampler, noisy=self.window.steps(clock.iteration, self.seed))
        collected, rollout, rewards, groups = collect_images(
            self, stack, prompts, clock, sampler=sampler, same_noise=self.same_noise
        )
        steps = torch.tensor(sampler.noisy_steps).expand(len(collected.ids), -1)
        return self._learn_from(collected, rollout, steps, self._advantages(stack, rollout, rewards, groups))

    def _advantages(self, stack: Stack, rollout: Rollout, rewards: Tensor, groups: Tensor) -> Advantages:
        """Advantages of all processes' images."""
        if self.aggregate == "rewards" or not isinstance(stack.reward, WeightedSum):
            return group_advantages(rewards, groups, std=self.std, ddof=self.ddof, eps=self.eps)
        parts = []
        for name, (_, weight) in stack.reward.parts.items():
            scores = stack.processes.gather(rollout.scores[f"{name}/reward"]).float().cpu()
            parts.append((weight, group_advantages(scores, groups, std=self.std, ddof=self.ddof, eps=self.eps)))
        return add_advantages(parts, groups)

    def _learn_from(self, collected: Experience, rollout: Rollout, steps: Tensor, advantages: Advantages) -> Experience:
        """Fill in the terms: the stochastic ``steps`` ``[rows, walked]`` of each row and its advantage."""
        assert rollout.trajectory is not None
        collected.terms = {
            "latents": rollout.trajectory.latents,
            "next_latents": rollout.trajectory.next_latents,
            "old_log_prob": rollout.trajectory.log_prob,
            "step": steps,
            "advantage": advantages.values[list(collected.ids)].to(rollout.latents),
        }
        collected.kept = self.kept(advantages.values).nonzero().flatten().tolist()
        collected.metrics |= advantages.metrics() | {
            "kept_images": float(len(collected.kept)),
            "advantage_clipped": (advantages.values.abs() > self.advantage_clip).float().mean().item(),
        }
        return collected

    def kept(self, advantages: Tensor) -> Tensor:
        """Which rows are trained, bool [rows]: an advantage of zero says nothing (official code)."""
        return advantages != 0

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        walked = experience.terms["step"].shape[1]
        trained, says = self._trained(walked), (experience.terms["advantage"] != 0).tolist()
        for part, total in self.parts(experience, clock):
            atoms = [
                (row, place)
                for row in part
                if self.kl > 0 or says[row]  # a row of no advantage is counted below; without a divergence it adds 0
                for place in self._places(walked, experience.ids[row], clock)
            ]

            def batch(chosen: Sequence[int], atoms: list[tuple[int, int]] = atoms) -> Batch:
                rows = torch.as_tensor([atoms[index][0] for index in chosen])
                places = torch.as_tensor([atoms[index][1] for index in chosen])
                per_step = ("latents", "next_latents", "old_log_prob", "step")
                terms = {name: experience.terms[name][rows, places] for name in per_step}
                terms["advantage"] = experience.terms["advantage"][rows]
                prompts = [experience.prompts[row] for row in rows]
                return Batch(terms, stack.encode(prompts), prompts, chosen)

            yield Update(len(atoms), total * trained, batch)

    def _trained(self, walked: int) -> int:
        """How many of a row's stochastic steps are trained."""
        return max(1, int(self.trained_fraction * walked))

    def _places(self, walked: int, row: int, clock: Clock) -> list[int]:
        """Which of a row's stochastic steps are trained, drawn per row."""
        order = generator("trained steps", self.seed, clock.iteration, row).permutation(walked)
        return sorted(order[: self._trained(walked)].tolist())

    def prepare(self, stack: Stack, update: Update) -> None:
        if not self.recompute_log_prob or not update.atoms:
            return
        with torch.no_grad():
            parts = stack.micro_batch.chunks(
                update.atoms, lambda atoms: self._log_prob(stack, update.batch(atoms), "current")[0]
            )
        update.shared["old_log_prob"] = torch.cat(parts)

    def _log_prob(self, stack: Stack, batch: Batch, view: str) -> tuple[Tensor, Transition]:
        """Log-probability ``[rows]`` of the steps that were taken, under a view's weights, and its transition."""
        assert self.sampler.stochastic is not None
        grid = stack.policy.grid(self.sampler.steps, self.sampler.grid).to(stack.policy.device)
        step = batch.terms["step"].to(grid.device)
        x, sigma, sigma_next = batch.terms["latents"], grid[step], grid[step + 1]
        v = stack.predict(
            x,
            sigma,
            batch.condition,
            guidance=self.sampler.guidance,
            guidance_embedding=self.sampler.guidance_embedding,
            detach_uncond=self.detach_uncond,
            view=view,
        )
        transition = TRANSITIONS[self.sampler.stochastic](x, v, sigma, sigma_next, self.sampler.noise_level, grid[1])
        return log_prob(batch.terms["next_latents"], *transition, self.sampler.stochastic), transition

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        if self.recompute_log_prob:
            old = update.shared["old_log_prob"][list(batch.atoms)]
        else:
            old = batch.terms["old_log_prob"]
        new, transition = self._log_prob(stack, batch, "current")
        rho = torch.exp(new - old)
        surrogate = ppo(rho, batch.terms["advantage"], self.clip_range, self.advantage_clip)
        grid = stack.policy.grid(self.sampler.steps, self.sampler.grid).to(stack.policy.device)
        step = batch.terms["step"].to(grid.device)
        policy_loss = (self.step_weights(grid)[step] * surrogate).sum()
        total = policy_loss
        metrics = {
            "policy_loss": policy_loss.detach(),
            "clip_fraction": clip_fraction(rho.detach(), self.clip_range) * len(rho),
        }
        if self.kl > 0:
            with torch.no_grad():
                reference = self._log_prob(stack, batch, "reference")[1]
            if self.kl_form == "mu":
                divergence = kl_mu(transition.mean, reference.mean, transition.std, grid[step], grid[step + 1]).sum()
            else:
                divergence = kl_mu_step(transition.mean, reference.mean, transition.std).sum()
            total = total + self.kl * divergence
            metrics["kl"] = divergence.detach()
        return Loss(total, metrics, largest={"ratio_deviation": (rho.detach() - 1).abs().max()})

    def step_weights(self, grid: Tensor) -> Tensor:
        """What the policy term of each stochastic step is multiplied by, ``[T - 1]``."""
        return torch.ones_like(grid[:-2])

    def expected_cost(self) -> Cost:
        images, guidance = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        steps = self._trained(len(self.sampler.noisy_steps) if self.window is None else self.window.size)
        return Cost(
            rollout=images * guidance * self.sampler.steps,
            training=images * guidance * steps * (1 + (self.kl > 0) + self.recompute_log_prob),
            backward=images * steps * (1 if self.detach_uncond else guidance),
            images=images,
            reward_calls=images,
        )
