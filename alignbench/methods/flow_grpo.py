"""Flow-GRPO: policy gradients on a stochastic sampler of a flow model (Liu et al., arXiv 2505.05470).

The rollout turns the ODE into an SDE with the same marginals, so every step has a probability; the loss is PPO's
clipped surrogate over all steps of all images, with one advantage per image.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.methods.advantages import group_advantages
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Method, Needs, Update
from alignbench.methods.online import collect_images
from alignbench.methods.ppo import clip_fraction, ppo
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.rollout import Sampler
from alignbench.sampling.stochastic import TRANSITIONS, Transition, kl_mu, log_prob
from alignbench.stack import Stack


class FlowGRPO(Method):
    """Flow-GRPO.

    Args:
        clip_range: c of the clipped ratio, positive; it belongs to log-probabilities that are means over the latent.
        advantage_clip: advantages are clipped to this magnitude first.
        kl: weight of ``mean (mu - mu_ref)^2 / (2 sigma_i^2)``; 0 makes no reference pass.
        std: ``"global"`` or ``"group"`` standard deviation of the advantages.
        ddof, eps: of that standard deviation.
        detach_uncond: no gradient through the unconditional branch of a guided prediction.
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
        std: Literal["global", "group"],
        ddof: Literal[0, 1],
        eps: float,
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
        if sampler.stochastic is None:
            raise ConfigError("flow_grpo needs log-probabilities: set method.rollout.stochastic to flow, dance or cps")
        if batch.images < 2:
            raise ConfigError(
                f"flow_grpo compares images of one prompt: method.batch.images is {batch.images}, use 2 or more"
            )
        self.clip_range, self.advantage_clip, self.kl = clip_range, advantage_clip, kl
        self.std, self.ddof, self.eps = std, ddof, eps
        self.detach_uncond, self.recompute_log_prob = detach_uncond, recompute_log_prob

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        collected, rollout, rewards, groups = collect_images(self, stack, prompts, clock)
        advantages = group_advantages(rewards, groups, std=self.std, ddof=self.ddof, eps=self.eps)
        assert rollout.trajectory is not None
        collected.terms = {
            "latents": rollout.trajectory.latents,
            "next_latents": rollout.trajectory.next_latents,
            "old_log_prob": rollout.trajectory.log_prob,
            "advantage": advantages.values[list(collected.ids)].to(rollout.latents),
        }
        collected.kept = advantages.values.nonzero().flatten().tolist()  # an advantage of zero says nothing
        collected.metrics |= {
            "constant_groups": advantages.constant_share,
            "kept_images": float(len(collected.kept)),
            "advantage_clipped": (advantages.values.abs() > self.advantage_clip).float().mean().item(),
        }
        return collected

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        for part, images in self.parts(experience, clock):
            atoms = [(row, step) for row in part for step in self.sampler.noisy_steps]

            def batch(chosen: Sequence[int], atoms: list[tuple[int, int]] = atoms) -> Batch:
                rows = torch.as_tensor([atoms[index][0] for index in chosen])
                steps = torch.as_tensor([atoms[index][1] for index in chosen])
                walked = ("latents", "next_latents", "old_log_prob")
                terms = {name: experience.terms[name][rows, steps] for name in walked}
                terms |= {"advantage": experience.terms["advantage"][rows], "step": steps}
                return Batch(terms, experience.condition[rows], [experience.prompts[row] for row in rows], chosen)

            yield Update(len(atoms), images * len(self.sampler.noisy_steps), batch)

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
            x, sigma, batch.condition, guidance=self.sampler.guidance, detach_uncond=self.detach_uncond, view=view
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
        policy_loss = ppo(rho, batch.terms["advantage"], self.clip_range, self.advantage_clip).sum()
        total = policy_loss
        metrics = {
            "policy_loss": policy_loss.detach(),
            "clip_fraction": clip_fraction(rho.detach(), self.clip_range) * len(rho),
        }
        if self.kl > 0:
            with torch.no_grad():
                reference = self._log_prob(stack, batch, "reference")[1]
            grid = stack.policy.grid(self.sampler.steps, self.sampler.grid).to(stack.policy.device)
            step = batch.terms["step"].to(grid.device)
            divergence = kl_mu(transition.mean, reference.mean, transition.std, grid[step], grid[step + 1]).sum()
            total = total + self.kl * divergence
            metrics["kl"] = divergence.detach()
        return Loss(total, metrics, largest={"ratio_deviation": (rho.detach() - 1).abs().max()})

    def expected_cost(self) -> Cost:
        images, branches = self.batch.total, 1 if self.sampler.guidance == 1 else 2
        steps = len(self.sampler.noisy_steps)
        return Cost(
            rollout=images * branches * self.sampler.steps,
            training=images * branches * steps * (1 + (self.kl > 0) + self.recompute_log_prob),
            backward=images * steps * (1 if self.detach_uncond else branches),
            images=images,
            reward_calls=images,
        )
