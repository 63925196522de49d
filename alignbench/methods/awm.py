"""AWM: advantage weighted matching (Xue et al., arXiv 2509.25050).

The flow-matching error of pre-training takes the place of the log-probability in a policy gradient: images of any ODE
sampler are noised again, and the velocity fits those of positive advantage and leaves those of negative advantage.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.methods.advantages import Std, group_advantages
from alignbench.methods.forward_process import ForwardProcess
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Needs, Update
from alignbench.methods.online import collect_images
from alignbench.methods.ppo import clip_fraction, ppo
from alignbench.policies.policy import Policy
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.flow import mean_per_sample
from alignbench.sampling.rollout import Sampler
from alignbench.sampling.stochastic import kl_velocity
from alignbench.seeding import generator
from alignbench.stack import Stack

Weighting = Literal["ghuber", "uniform", "t", "t_squared"]
EPS = 1e-10  # of the official code: the power's slope stays finite where the error vanishes


def surrogate(v: Tensor, target: Tensor, t: Tensor, weighting: Weighting, power: float) -> Tensor:
    """What stands for the log-probability of an image, from its flow-matching error ``E = mean (v - u)^2``.

    ``ghuber`` is ``-(t / p) ((E + eps)^p - eps^p)`` (official code), a generalised Huber function that takes less of
    large errors as p falls; ``uniform`` ``-E``, ``t`` ``-t E`` and ``t_squared`` ``-t^2 E``.

    Args:
        v, target: ``[B, ...]``.
        t: ``[B]`` in [0, 1].
        power: p, positive; of ``ghuber`` alone.

    Returns:
        ``[B]``, at most 0; 0 where the velocity is its target.
    """
    error = mean_per_sample((v - target) ** 2)
    if weighting == "ghuber":
        return -t / power * ((error + EPS) ** power - math.pow(EPS, power))
    weights = {"uniform": torch.ones_like(t), "t": t, "t_squared": t**2}
    return -weights[weighting] * error


def scaled(advantage: Tensor, clip: float, largest: float) -> Tensor:
    """``clip(A, -clip, clip) largest / clip`` (official code), in [-largest, largest]."""
    return advantage.clamp(-clip, clip) * (largest / clip)


def ema_decay(optimizer_steps: int, largest: float) -> float:
    """Decay of the ``ema`` weights after an iteration: ``min(0.001 k, largest)`` (official code)."""
    return min(0.001 * optimizer_steps, largest)


class AdvantageWeightedMatching(ForwardProcess):
    """AWM.

    Args:
        weighting: how an error counts, see ``surrogate``.
        power: p of ``ghuber``, positive.
        clip_range: c of the clipped ratio, positive. In the first update of an iteration the ratio is 1.
        advantage_clip, advantage_max: advantages are clipped to the first and scaled to the second, see ``scaled``.
        kl: weight of ``mean (v - v_ref)^2``; 0 makes no reference pass.
        kl_ema: weight of ``mean (v - v_ema)^2``; 0 makes no pass of the ``ema`` weights.
        ema_decay: largest decay of the ``ema`` weights, in [0, 1].
        std: ``"global"`` or ``"group"`` standard deviation of the advantages.
        times: training times per image, one of each of as many equal parts of the trained steps.
        timestep_fraction: the trained steps are the first ``int(fraction T)`` of the rollout, in (0, 1].
        first_step: whether t = 1 is among them.
    """

    needs = Needs(views=("old", "ema"))

    def __init__(
        self,
        *,
        weighting: Weighting,
        power: float,
        clip_range: float,
        advantage_clip: float,
        advantage_max: float,
        kl: float,
        kl_ema: float,
        ema_decay: float,
        std: Std,
        times: int,
        timestep_fraction: float,
        first_step: bool,
        sampler: Sampler,
        batch: BatchSize,
        seed: int,
    ) -> None:
        super().__init__(times=times, sampler=sampler, batch=batch, seed=seed)
        if weighting not in get_args(Weighting):
            raise ConfigError(f"awm: weighting {weighting!r} is not known; choose {', '.join(get_args(Weighting))}")
        positive = {"power": power, "clip_range": clip_range, "advantage_clip": advantage_clip}
        for name, value in (positive | {"advantage_max": advantage_max}).items():
            if value <= 0:
                raise ConfigError(f"awm: {name} is {value:g}; it must be positive")
        if kl < 0 or kl_ema < 0:
            raise ConfigError(f"awm: kl is {kl:g} and kl_ema {kl_ema:g}; they must be 0 or more")
        if not 0 <= ema_decay <= 1:
            raise ConfigError(f"awm: ema_decay is {ema_decay:g}; it must lie in [0, 1] (the paper uses 0.3)")
        if std not in ("global", "group"):
            raise ConfigError(f"awm: std is {std!r}; choose global or group")
        if batch.images < 2:
            raise ConfigError(
                f"awm compares images of one prompt: method.batch.images is {batch.images}, use 2 or more"
            )
        if not 0 < timestep_fraction <= 1:
            raise ConfigError(f"awm: timestep_fraction is {timestep_fraction:g}; it must lie in (0, 1]")
        self.trained_steps = range(0 if first_step else 1, int(timestep_fraction * sampler.steps))
        if times > len(self.trained_steps):
            raise ConfigError(
                f"awm: times is {times}, but timestep_fraction {timestep_fraction:g} and first_step {first_step} leave "
                f"{len(self.trained_steps)} of the rollout's {sampler.steps} steps to train: choose at most that many"
            )
        self.weighting, self.power, self.clip_range = weighting, power, clip_range
        self.advantage_clip, self.advantage_max, self.std = advantage_clip, advantage_max, std
        self.kl, self.kl_ema, self.ema_decay = kl, kl_ema, ema_decay

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, rewards, groups = collect_images(self, stack, prompts, clock)
        advantages = group_advantages(rewards, groups, std=self.std, ddof=0, eps=1e-4)
        kept = scaled(advantages.values, self.advantage_clip, self.advantage_max)[list(collected.ids)]
        collected.terms = {"x_0": rollout.latents, "advantage": kept.to(rollout.latents)}
        collected.metrics |= advantages.metrics() | {
            "advantage_clipped": (advantages.values.abs() > self.advantage_clip).float().mean().item(),
        }
        return collected

    def training_steps(self, sample: int, clock: Clock) -> list[int]:
        """One random step of each of ``times`` equal parts of the trained steps."""
        bounds = [self.trained_steps.start + part * len(self.trained_steps) // self.times for part in range(self.times)]
        draws = generator("time", self.seed, clock.iteration, sample)
        return draws.integers(bounds, [*bounds[1:], self.trained_steps.stop]).tolist()  # type: ignore[no-any-return]

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        x_t, t, advantage = (batch.terms[name] for name in ("x_t", "t", "advantage"))
        target = stack.policy.path.target(batch.terms["x_0"], batch.terms["noise"])
        v = stack.predict(x_t, t, batch.condition)
        new = surrogate(v, target, t, self.weighting, self.power)
        old = new.detach()  # a single update starts from the weights that sampled: no pass is needed
        if self.batch.updates > 1:
            with torch.no_grad():
                v_old = stack.predict(x_t, t, batch.condition, view="old")
            old = surrogate(v_old, target, t, self.weighting, self.power)
        rho = torch.exp(new - old)
        total = ppo(rho, advantage, self.clip_range, self.advantage_max).sum()
        metrics = {
            "policy_loss": total.detach(),
            "clip_fraction": clip_fraction(rho.detach(), self.clip_range) * len(rho),
        }
        for name, view, weight in (("kl", "reference", self.kl), ("kl_ema", "ema", self.kl_ema)):
            if weight > 0:
                with torch.no_grad():
                    other = stack.predict(x_t, t, batch.condition, view=view)
                distance = kl_velocity(v, other).sum()
                total = total + weight * distance
                metrics[name] = distance.detach()
        return Loss(total, metrics, largest={"ratio_deviation": (rho.detach() - 1).abs().max()})

    def after_iteration(self, policy: Policy, clock: Clock) -> None:
        policy.blend("ema", ema_decay(clock.optimizer_steps, self.ema_decay))
        policy.blend("old", 0.0)

    def expected_cost(self) -> Cost:
        images, guidance = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        views = 1 + (self.batch.updates > 1) + (self.kl > 0) + (self.kl_ema > 0)
        return Cost(
            rollout=images * guidance * self.sampler.steps,
            training=images * self.times * views,
            backward=images * self.times,
            images=images,
            reward_calls=images,
        )
