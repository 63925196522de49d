"""DiffusionNFT: online reinforcement learning on the forward process (Zheng et al., arXiv 2509.16117).

The rollout is any black-box sampler of the *old* weights and keeps clean latents only. Each latent is noised again, and
the velocity is pulled towards an implicit positive policy where the reward was high and away from it where it was low.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.methods.advantages import group_advantages
from alignbench.methods.forward_process import ForwardProcess
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Needs, Update
from alignbench.methods.online import collect_images
from alignbench.policies.policy import Policy
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.flow import ProbabilityPath, mean_per_sample, per_sample
from alignbench.sampling.rollout import Sampler
from alignbench.sampling.stochastic import kl_velocity
from alignbench.stack import Stack

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
MODES: tuple[Mode, ...] = ("all", "positive_only", "negative_only", "one_only", "binary")


def optimality(advantage: Tensor, a_max: float, mode: Mode = "all") -> Tensor:
    """``r = clip(A / A_max, -1, 1) / 2 + 0.5``: how likely an image is one of the good ones, in [0, 1].

    The modes are the official code's: keep the sign that is named (the others become indifferent, 0.5); let an
    advantage be its sign, so that r is 0.6 and 0.4 at ``a_max`` 5 (``binary``); or be 1 where it is positive, so that r
    is 0.6 there, and 0 elsewhere (``one_only``).
    """
    if mode == "positive_only":
        advantage = advantage.clamp(min=0)
    elif mode == "negative_only":
        advantage = advantage.clamp(max=0)
    elif mode == "one_only":
        advantage = (advantage > 0).to(advantage)
    elif mode == "binary":
        advantage = torch.sign(advantage)
    return (advantage / a_max).clamp(-1, 1) / 2 + 0.5


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    t: Tensor,
    r: Tensor,
    beta: float,
    a_max: float,
    path: ProbabilityPath,
) -> Tensor:
    """``A_max (r L_pos + (1 - r) L_neg) / beta`` per sample (arXiv 2509.16117, eq. 5; weights of the code).

    ``v_pos = beta v + (1 - beta) v_old`` and ``v_neg = (1 + beta) v_old - beta v`` are the implicit policies;
    ``L = mean (x0_hat - x_0)^2 / w``, ``w = max(mean |x0_hat - x_0|, 1e-5)`` without gradient, in float64.

    Args:
        v, v_old, x_t, x_0: ``[B, ...]``.
        t, r: ``[B]``.

    Returns:
        ``[B]``.
    """

    def error(velocity: Tensor) -> Tensor:
        difference = path.clean(x_t, velocity, t) - x_0
        weight = mean_per_sample(difference.detach().double().abs()).clamp(min=1e-5)
        return mean_per_sample(difference**2 / per_sample(weight, difference)).to(v.dtype)

    positive = error(beta * v + (1 - beta) * v_old)
    negative = error((1 + beta) * v_old - beta * v)
    return a_max * (r * positive + (1 - r) * negative) / beta


def old_decay(optimizer_steps: int, schedule: int) -> float:
    """Decay of the old weights after an iteration, by the official schedule types.

    0: old is current; 1 (GenEval, PickScore): ``min(0.001 k, 0.5)``; 2 (OCR): 0 for 75 steps, then
    ``min(0.0075 (k - 75), 0.999)``.
    """
    if schedule == 0:
        return 0.0
    if schedule == 1:
        return min(0.001 * optimizer_steps, 0.5)
    return min(max(0.0, 0.0075 * (optimizer_steps - 75)), 0.999)


class DiffusionNFT(ForwardProcess):
    """DiffusionNFT.

    Args:
        beta: strength of the implicit policies, positive.
        kl: weight of ``mean (v - v_ref)^2``; 0 makes no reference pass.
        a_max: where advantages are clipped.
        mode: which images count, see ``optimality``.
        std: ``"global"`` or ``"group"`` standard deviation of the advantages.
        old_schedule: how the sampling weights follow, see ``old_decay``.
        times: training times per image, drawn without repetition from the sampler's steps; None takes all but one.
    """

    needs = Needs(views=("old",))

    def __init__(
        self,
        *,
        beta: float,
        kl: float,
        a_max: float,
        mode: Mode,
        std: Literal["global", "group"],
        old_schedule: Literal[0, 1, 2],
        times: int | None,
        sampler: Sampler,
        batch: BatchSize,
        seed: int,
    ) -> None:
        times = sampler.steps - 1 if times is None else times
        super().__init__(times=times, sampler=sampler, batch=batch, seed=seed)
        if a_max <= 0:
            raise ConfigError(f"diffusion_nft: a_max is {a_max:g}; it must be positive (the paper uses 5)")
        if std not in ("global", "group"):
            raise ConfigError(f"diffusion_nft: std is {std!r}; choose global or group")
        if batch.images < 2:
            raise ConfigError(
                f"diffusion_nft compares images of one prompt: method.batch.images is {batch.images}, use 2 or more"
            )
        if beta <= 0:
            raise ConfigError(f"diffusion_nft: beta is {beta:g}; it must be positive (the paper uses 1.0 and 0.1)")
        if kl < 0:
            raise ConfigError(f"diffusion_nft: kl is {kl:g}; it must be 0 or more")
        if mode not in MODES:
            raise ConfigError(f"diffusion_nft: mode {mode!r} is not known; choose one of {', '.join(MODES)}")
        if old_schedule not in (0, 1, 2):
            raise ConfigError(f"diffusion_nft: old_schedule is {old_schedule}; choose 0, 1 or 2")
        self.beta, self.kl, self.a_max, self.mode, self.std = beta, kl, a_max, mode, std
        self.old_schedule = old_schedule

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, rewards, groups = collect_images(self, stack, prompts, clock, view="old")
        advantages = group_advantages(rewards, groups, std=self.std, ddof=0, eps=1e-4)
        r = optimality(advantages.values, self.a_max, self.mode)
        collected.terms = {"x_0": rollout.latents, "r": r[list(collected.ids)].to(rollout.latents)}
        collected.metrics |= advantages.metrics() | {"optimality_std": r.std().item()}
        return collected

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        x_0, x_t, t, r = (batch.terms[name] for name in ("x_0", "x_t", "t", "r"))
        with torch.no_grad():
            v_old = stack.predict(x_t, t, batch.condition, view="old")
            v_ref = stack.predict(x_t, t, batch.condition, view="reference") if self.kl > 0 else None
        v = stack.predict(x_t, t, batch.condition)
        policy_loss = nft_loss(v, v_old, x_t, x_0, t, r, self.beta, self.a_max, stack.policy.path)
        total = policy_loss.sum()
        metrics = {"policy_loss": total.detach(), "old_distance": kl_velocity(v.detach(), v_old).sum()}
        if v_ref is not None:
            divergence = kl_velocity(v, v_ref).sum()
            total = total + self.kl * divergence
            metrics["kl"] = divergence.detach()
        return Loss(total, metrics)

    def after_iteration(self, policy: Policy, clock: Clock) -> None:
        policy.blend("old", old_decay(clock.optimizer_steps, self.old_schedule))

    def expected_cost(self) -> Cost:
        images, guidance = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        return Cost(
            rollout=images * guidance * self.sampler.steps,
            training=images * (3 if self.kl > 0 else 2) * self.times,
            backward=images * self.times,
            images=images,
            reward_calls=images,
        )
