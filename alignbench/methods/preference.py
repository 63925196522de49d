"""Preference learning on pairs: Diffusion-DPO, DSPO and DMPO, and the safeguard of Diffusion-SDPO on any of them.

A pair is a prompt with a winner and a loser. Both are noised at one time with one noise; the losses compare how much
better than the base model the current one predicts the winner, and how much worse the loser. The safeguard
(arXiv 2511.03317) weakens the gradient that pushes the loser away where it would push the winner away too.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from alignbench.errors import ConfigError, DataError
from alignbench.methods.advantages import no_spread
from alignbench.methods.method import Batch, BatchSize, Clock, Cost, Experience, Loss, Method, Needs, Update
from alignbench.methods.online import collect_images
from alignbench.policies.policy import Condition
from alignbench.prompts.pairs import PairFolder
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.flow import mean_per_sample, per_sample
from alignbench.sampling.rollout import Sampler
from alignbench.seeding import generator, seed_of
from alignbench.settings import construct
from alignbench.stack import Stack

Base = Literal["dpo", "dspo", "dmpo"]
Safeguard = Literal["none", "pair", "batch"]
Source = Literal["rollout", "dataset"]


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """``E = mean (prediction - target)^2`` [B] of predictions [B, ...], velocities or noises."""
    return mean_per_sample((prediction - target) ** 2)


def preference_logit(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """``u = -0.5 beta [(E_w - E_l) - (E_w^ref - E_l^ref)]`` [B] of errors [B] (arXiv 2311.12908).

    Positive where, compared with the reference, the model prefers the winner; 0 at the reference.
    """
    return -0.5 * beta * ((winner - loser) - (winner_ref - loser_ref))


def dpo_loss(u: Tensor) -> Tensor:
    """``-log sigmoid(u)`` [B] (Diffusion-DPO, arXiv 2311.12908)."""
    return -logsigmoid(u)


def dspo_loss(winner: Tensor, winner_ref: Tensor, target: Tensor, u: Tensor, beta: float) -> Tensor:
    """``mean ||(pred_w - target) - beta (1 - sigmoid(u)) (pred_w - ref_w)||^2`` [B] (DSPO), sigmoid with gradient.

    Args:
        winner, winner_ref, target: predictions of current and reference weights for the winner, their target [B, ...].
        u: preference logit [B].
        beta: that of the logit.
    """
    weight = beta * per_sample(torch.sigmoid(-u), winner)
    return mean_per_sample((winner - target - weight * (winner - winner_ref)) ** 2)


def dmpo_loss(u: Tensor, alpha: float) -> Tensor:
    """``KL(Bernoulli(p) || Bernoulli(1 - alpha))`` [B] with ``p = sigmoid(u)`` (DMPO, arXiv 2507.07510).

    By softplus: ``log p = -softplus(-u)``, ``log(1 - p) = -softplus(u)``. It is 0 at ``u = log((1 - alpha) / alpha)``
    and pulls larger margins back.
    """
    p = torch.sigmoid(u)
    return p * (-softplus(-u) - math.log(1 - alpha)) + (1 - p) * (-softplus(u) - math.log(alpha))


def gradient_products(
    winner: Tensor, winner_target: Tensor, loser: Tensor, loser_target: Tensor
) -> tuple[Tensor, Tensor]:
    """``gA . gB`` and ``||gA||^2`` [B] of the errors' gradients with respect to the predictions [B, ...].

    The gradient of ``E`` is ``2 (prediction - target) / n`` with n values in a prediction.
    """
    g_a, g_b = (
        2 * (prediction - target).flatten(1) / prediction[0].numel()
        for prediction, target in ((winner, winner_target), (loser, loser_target))
    )
    return (g_a * g_b).sum(1), (g_a * g_a).sum(1)


def safeguard_scale(product: Tensor, norm: Tensor, mu: float) -> Tensor:
    """lambda in [0, 1], what the loser's gradient is multiplied by (arXiv 2511.03317); any shape.

    1 where ``gA . gB <= 0``, else ``min(1, (1 - mu) ||gA||^2 / (gA . gB + 1e-9))``. The common direction
    ``delta = -(gA - lambda gB)`` then has ``gA . delta <= -mu ||gA||^2``: the winner's error falls to first order.

    Args:
        product: ``gA . gB``.
        norm: ``||gA||^2``.
        mu: in [0, 1]; the larger, the more of the winner's descent is kept.
    """
    limited = ((1 - mu) * norm / (product.clamp(min=0) + 1e-9)).clamp(max=1)
    return torch.where(product <= 0, 1.0, limited)


def scale_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """``stop(value) + scale (value - stop(value))``: the value as it is, its gradient times ``scale``."""
    return value.detach() + scale * (value - value.detach())


@dataclass
class Pairs:
    """N pairs, on the CPU of every process.

    Attributes:
        winner, loser: clean latents ``[N, ...]``.
        scores: their rewards ``[N, 2]``; 1 and 0 for pairs of a data set.
        prompts: N records.
    """

    winner: Tensor
    loser: Tensor
    scores: Tensor
    prompts: list[Prompt]

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors; the prompts as the bytes of a JSON list of ids and texts."""
        text = json.dumps([(prompt.id, prompt.text) for prompt in self.prompts]).encode()
        prompts = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {"winner": self.winner, "loser": self.loser, "scores": self.scores, "prompts": prompts}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Pairs":
        """What ``tensors`` returned."""
        prompts = [Prompt(*each) for each in json.loads(tensors["prompts"].numpy().tobytes())]
        return cls(tensors["winner"], tensors["loser"], tensors["scores"], prompts)


class Preference(Method):
    """DPO, DSPO or DMPO, with or without the safeguard of SDPO.

    With ``pairs: rollout``, ``batch.prompts`` prompts get ``batch.images`` images each, the best against the worst is a
    pair, and ties are dropped. An iteration is ``batch.updates`` optimizer steps; pairs are drawn in a random order, a
    new one whenever all have been used.

    Args:
        base: ``"dpo"``, ``"dspo"`` or ``"dmpo"``.
        beta: of the preference logit, positive.
        alpha: of DMPO, in (0, 1): its target probability is ``1 - alpha``.
        safeguard: ``"none"``, one lambda a ``"pair"``, or one for the whole ``"batch"`` of an optimizer step, which
            takes another pass over it.
        mu: of the safeguard, in [0, 1].
        pairs: ``"rollout"`` or ``"dataset"``.
        refresh_every: iterations after which pairs are sampled anew, from the current weights; None samples them once,
            from the base model.
        pairs_per_update: pairs of an optimizer step, over all processes.
        dataset: where the pairs of ``"dataset"`` are, see ``PairFolder``.
    """

    needs = Needs(parameterisations=("velocity", "epsilon"))

    def __init__(
        self,
        *,
        base: Base,
        beta: float,
        alpha: float,
        safeguard: Safeguard,
        mu: float,
        pairs: Source,
        refresh_every: int | None,
        pairs_per_update: int,
        dataset: Mapping[str, Any],
        sampler: Sampler,
        batch: BatchSize,
        seed: int,
    ) -> None:
        super().__init__(sampler=sampler, batch=batch, seed=seed)
        if beta <= 0:
            raise ConfigError(f"method.algorithm.beta is {beta:g}; it must be positive (100 is a start on flow models)")
        if not 0 < alpha < 1:
            raise ConfigError(f"method.algorithm.alpha is {alpha:g}; it must lie between 0 and 1 (DMPO uses 0.01)")
        if not 0 <= mu <= 1:
            raise ConfigError(f"method.algorithm.mu is {mu:g}; it must lie in [0, 1] (the paper uses 0.2 to 0.9)")
        if refresh_every is not None and (refresh_every < 1 or pairs == "dataset"):
            raise ConfigError(
                f"method.algorithm.refresh_every is {refresh_every} with pairs={pairs}; "
                "use 1 or more with pairs=rollout, or null for pairs that stay"
            )
        if pairs_per_update < 1:
            raise ConfigError(f"method.algorithm.pairs_per_update is {pairs_per_update}; it must be 1 or more")
        if pairs == "rollout" and batch.images < 2:
            raise ConfigError(
                f"pairs need two images of a prompt: method.batch.images is {batch.images}, use 2 or more"
            )
        self.base, self.beta, self.alpha, self.safeguard, self.mu = base, beta, alpha, safeguard, mu
        self.refresh_every, self.pairs_per_update = refresh_every, pairs_per_update
        self.folder = (
            construct(PairFolder, dataset, "method.algorithm.dataset", seed=seed) if pairs == "dataset" else None
        )
        self.pairs: Pairs | None = None
        self.collected_at = 0  # the iteration the pairs are from

    # Pairs

    def _collects(self, clock: Clock) -> bool:
        """Whether the next iteration collects pairs; as long as there are none, every iteration does."""
        if self.pairs is None:
            return True
        return self.refresh_every is not None and clock.iteration % self.refresh_every == 0

    def prompts_wanted(self, clock: Clock) -> int:
        return self.batch.prompts if self.folder is None and self._collects(clock) else 0

    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        metrics: dict[str, float] = {}
        if self._collects(clock):
            if self.folder is None:
                self.pairs, metrics = self._sample(stack, prompts, clock)
            else:
                self.pairs, metrics = self._read(stack, self.folder)
            self.collected_at = clock.iteration
        if self.pairs is None:
            return Experience({}, Condition({}), [], [], [], metrics)
        terms = {"winner": self.pairs.winner, "loser": self.pairs.loser}
        rows = range(len(self.pairs.prompts))
        return Experience(terms, Condition({}), self.pairs.prompts, rows, rows, metrics)  # encoded batch by batch

    def _sample(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> tuple[Pairs | None, dict[str, float]]:
        """The best against the worst image of each prompt; None if no prompt has two different rewards."""
        view = "reference" if self.refresh_every is None else "current"
        collected, rollout, rewards, _ = collect_images(self, stack, prompts, clock, view=view)
        grouped = rewards.view(len(prompts), self.batch.images)
        decided = (~no_spread(grouped.amax(1), grouped.amin(1), rewards)).nonzero().flatten()
        metrics = collected.metrics | {"pairs": float(len(decided)), "tied_prompts": 1 - len(decided) / len(prompts)}
        if not len(decided):
            return None, metrics
        first = decided * self.batch.images
        winners, losers = first + grouped[decided].argmax(1), first + grouped[decided].argmin(1)
        chosen = torch.cat([winners, losers]).sort().values  # in the order in which processes hold them
        own = chosen[torch.isin(chosen, torch.as_tensor(collected.ids))] - collected.ids[0]
        latents = stack.processes.gather(rollout.latents[own.to(rollout.latents.device)].cpu())
        scores = torch.stack([rewards[winners], rewards[losers]], dim=1)
        metrics |= {"winner_reward": scores[:, 0].mean().item(), "loser_reward": scores[:, 1].mean().item()}
        winner, loser = (latents[torch.searchsorted(chosen, each)] for each in (winners, losers))
        return Pairs(winner, loser, scores, [prompts[group] for group in decided.tolist()]), metrics

    def _read(self, stack: Stack, folder: PairFolder) -> tuple[Pairs, dict[str, float]]:
        """Encode the images of a data set.

        Raises:
            DataError: images of several sizes, or of another size than the model's.
        """
        own = stack.processes.shard(len(folder))
        shape = stack.policy.latent_shape

        def encode(rows: range) -> Tensor:
            images = [image for row in rows for image in folder[own[row]]]
            sizes = {image.shape for image in images}
            if len(sizes) == 1:
                pixels = torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2) / 255
                latents = stack.encode_images(pixels.to(stack.policy.device, stack.policy.latent_dtype))
                if latents.shape[1:] == shape:
                    return latents.reshape(-1, 2, *shape).cpu()
            height, width, _ = min(sizes)
            raise DataError(
                f"{folder.path} has images of {width} x {height} pixels{' and other sizes' * (len(sizes) > 1)}, which "
                f"do not give the model's latents of shape {list(shape)}; set method.algorithm.dataset.resolution to "
                "the side of the model's images"
            )

        empty = torch.empty(0, 2, *shape, dtype=stack.policy.latent_dtype)
        latents = stack.processes.gather(torch.cat([empty, *stack.micro_batch.chunks(len(own), encode)]))
        scores = torch.tensor([1.0, 0.0]).expand(len(folder), 2)
        pairs = Pairs(latents[:, 0].contiguous(), latents[:, 1].contiguous(), scores, folder.prompts)
        return pairs, {"pairs": float(len(folder))}

    def state_dict(self) -> dict[str, Any]:
        return {"collected_at": self.collected_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.collected_at = state["collected_at"]

    def artifact(self) -> dict[str, Tensor] | None:
        return None if self.pairs is None else self.pairs.tensors()

    def load_artifact(self, tensors: Mapping[str, Tensor]) -> None:
        self.pairs = Pairs.of_tensors(tensors)

    # Learning from them

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        if not experience.kept:
            return
        first = (clock.iteration - self.collected_at) * self.batch.updates
        for step in range(first, first + self.batch.updates):
            own = [step * self.pairs_per_update + each for each in stack.processes.shard(self.pairs_per_update)]
            rows = self._rows(own, len(experience.kept))

            def batch(chosen: Sequence[int], own: list[int] = own, rows: list[int] = rows) -> Batch:
                picked = torch.as_tensor([rows[each] for each in chosen])
                keys = [(self.seed, self.collected_at, own[each]) for each in chosen]
                terms = {name: value[picked].to(stack.policy.device) for name, value in experience.terms.items()}
                uniform = torch.tensor([generator("time", *key).random() for key in keys], dtype=torch.float64)
                terms["t"] = stack.policy.path.training_time(uniform).to(terms["winner"])
                terms["noise"] = stack.policy.noise([seed_of("noise", *key) for key in keys])  # one for both images
                prompts = [experience.prompts[row] for row in picked.tolist()]
                return Batch(terms, stack.encode(prompts), prompts, chosen)

            yield Update(len(own), self.pairs_per_update, batch, rows=2)

    def _rows(self, draws: Sequence[int], count: int) -> list[int]:
        """The pairs of some draws: draw n is entry ``n % count`` of a random order, a new one every ``count`` draws."""
        orders = {
            epoch: generator("pairs", self.seed, self.collected_at, epoch).permutation(count)
            for epoch in {draw // count for draw in draws}
        }
        return [int(orders[draw // count][draw % count]) for draw in draws]

    def _predict(self, stack: Stack, batch: Batch, view: str) -> tuple[Tensor, Tensor]:
        """Predictions for winner and loser by a view's weights, in one call without guidance."""
        path, noise, t = stack.policy.path, batch.terms["noise"], batch.terms["t"]
        x_t = torch.cat([path.interpolate(batch.terms[name], noise, t) for name in ("winner", "loser")])
        winner, loser = stack.predict(x_t, t.repeat(2), Condition.cat([batch.condition] * 2), view=view).chunk(2)
        return winner, loser

    def _targets(self, stack: Stack, batch: Batch) -> tuple[Tensor, Tensor]:
        target = stack.policy.path.target
        return target(batch.terms["winner"], batch.terms["noise"]), target(batch.terms["loser"], batch.terms["noise"])

    def prepare(self, stack: Stack, update: Update) -> None:
        if self.safeguard != "batch":
            return

        def sums(atoms: range) -> Tensor:
            batch = update.batch(atoms)
            (winner, loser), (target_w, target_l) = self._predict(stack, batch, "current"), self._targets(stack, batch)
            products = gradient_products(winner, target_w, loser, target_l)
            return torch.stack([values.double().sum() for values in products])

        with torch.no_grad():
            parts = stack.micro_batch.chunks(update.atoms, sums)
        total = sum(parts, torch.zeros(2, dtype=torch.float64, device=stack.policy.device))
        stack.processes.sum([total])
        update.shared["scale"] = safeguard_scale(total[0], total[1], self.mu)

    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        target_w, target_l = self._targets(stack, batch)
        with torch.no_grad():
            winner_ref, loser_ref = self._predict(stack, batch, "reference")
        winner, loser = self._predict(stack, batch, "current")

        error_w, error_l = prediction_error(winner, target_w), prediction_error(loser, target_l)
        ref_w, ref_l = prediction_error(winner_ref, target_w), prediction_error(loser_ref, target_l)
        if self.safeguard == "pair":
            products = gradient_products(winner.detach(), target_w, loser.detach(), target_l)
            scale = safeguard_scale(*products, self.mu)
        elif self.safeguard == "batch":
            scale = update.shared["scale"].to(error_l).expand_as(error_l)
        else:
            scale = torch.ones_like(error_l)
        u = preference_logit(error_w, scale_gradient(error_l, scale), ref_w, ref_l, self.beta)
        if self.base == "dpo":
            losses = dpo_loss(u)
        elif self.base == "dspo":
            losses = dspo_loss(winner, winner_ref, target_w, u, self.beta)
        else:
            losses = dmpo_loss(u, self.alpha)

        metrics = {
            "winner_error_change": error_w - ref_w,
            "loser_error_change": error_l - ref_l,
            "margin": u,
            "implicit_accuracy": (u > 0).to(u),
            "lambda": scale,
            "lambda_below_one": (scale < 1).to(u),
        }
        return Loss(losses.sum(), {name: value.detach().sum() for name, value in metrics.items()})

    def expected_cost(self) -> Cost:
        """In the long run: pairs that are sampled anew cost their share, pairs that are collected once nothing."""
        images = self.batch.total / self.refresh_every if self.refresh_every else 0
        passes = 2 * self.pairs_per_update * self.batch.updates  # a winner and a loser each
        return Cost(
            rollout=images * (1 if self.sampler.guidance == 1 else 2) * self.sampler.steps,
            training=passes * (3 if self.safeguard == "batch" else 2),
            backward=passes,
            images=images,
            reward_calls=images,
        )
