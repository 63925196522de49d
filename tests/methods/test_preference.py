"""The preference losses against NumPy in float64, the safeguard's guarantee, pairs from collection to resumption."""

import json
import os
import signal
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import Tensor

from alignbench import assembly, records
from alignbench.assembly import Parts
from alignbench.errors import CheckpointError, ConfigError, DataError, RewardError
from alignbench.methods.method import Clock
from alignbench.methods.preference import (
    dmpo_loss,
    dpo_loss,
    dspo_loss,
    gradient_products,
    prediction_error,
    preference_logit,
    safeguard_scale,
    scale_gradient,
)
from alignbench.processes import Processes
from alignbench.prompts.sets import draw
from alignbench.run import run
from alignbench.sampling.flow import DiffusionPath
from alignbench.shapes.captions import split
from alignbench.shapes.pairs import preference_pairs, write_pairs
from alignbench.training import optimizer_step
from tests.conftest import Compose
from tests.stopping import stopped
from tests.test_resume import numbers

BETA = 3.0
UNTIMED = settings(deadline=None)


def inputs(seed: int = 0, batch: int = 5) -> dict[str, Tensor]:
    """Predictions and targets of winners and losers, current and reference, float64."""
    rng = np.random.default_rng(seed)
    names = ("winner", "loser", "winner_ref", "loser_ref", "target_w", "target_l")
    return {name: torch.tensor(rng.normal(size=(batch, 3, 2, 2))) for name in names}


def logit(tensors: dict[str, Tensor], beta: float = BETA, scale: Tensor | None = None) -> Tensor:
    """The preference logit as the method computes it."""
    loser = prediction_error(tensors["loser"], tensors["target_l"])
    return preference_logit(
        prediction_error(tensors["winner"], tensors["target_w"]),
        loser if scale is None else scale_gradient(loser, scale),
        prediction_error(tensors["winner_ref"], tensors["target_w"]),
        prediction_error(tensors["loser_ref"], tensors["target_l"]),
        beta,
    )


def reference_logit(tensors: dict[str, Tensor], beta: float = BETA) -> np.ndarray:
    """``u``, one pair at a time."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    values = []
    for i in range(len(arrays["winner"])):
        e_w, e_l = (
            np.mean((arrays[f"{k}"][i] - arrays[t][i]) ** 2) for k, t in (("winner", "target_w"), ("loser", "target_l"))
        )
        r_w, r_l = (
            np.mean((arrays[f"{k}_ref"][i] - arrays[t][i]) ** 2)
            for k, t in (("winner", "target_w"), ("loser", "target_l"))
        )
        values.append(-0.5 * beta * ((e_w - e_l) - (r_w - r_l)))
    return np.array(values)


def sigmoid(u: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-u))


# Equations


def test_logit_follows_the_definition_and_prefers_the_better_predicted_winner() -> None:
    tensors = inputs()
    np.testing.assert_allclose(logit(tensors).numpy(), reference_logit(tensors), rtol=1e-12)
    improved = tensors | {"winner": (tensors["winner_ref"] + tensors["target_w"]) / 2, "loser": tensors["loser_ref"]}
    assert (logit(improved) > 0).all()


def test_dpo_gradient_is_that_of_the_negative_log_sigmoid() -> None:
    """``dL/dpred_w = (1 - sigmoid(u)) beta / 2 * 2 (pred_w - target_w) / n``, and the opposite sign for the loser."""
    tensors = {name: value.requires_grad_(name in ("winner", "loser")) for name, value in inputs().items()}
    u = logit(tensors)
    loss = dpo_loss(u)
    np.testing.assert_allclose(loss.detach().numpy(), -np.log(sigmoid(reference_logit(tensors))), rtol=1e-12)
    loss.sum().backward()
    weight = BETA / 2 * (1 - sigmoid(reference_logit(tensors))).reshape(-1, 1, 1, 1)
    for name, target, sign in (("winner", "target_w", 1), ("loser", "target_l", -1)):
        difference = (tensors[name] - tensors[target]).detach().numpy()
        gradient = tensors[name].grad
        assert gradient is not None
        np.testing.assert_allclose(gradient.numpy(), sign * weight * 2 * difference / 12, rtol=1e-10)


def test_dspo_keeps_the_gradient_through_its_sigmoid() -> None:
    tensors = inputs(batch=1)
    arrays = {name: value.numpy().copy() for name, value in tensors.items()}

    def loss(winner: np.ndarray, loser: np.ndarray) -> float:
        now = tensors | {"winner": torch.tensor(winner), "loser": torch.tensor(loser)}
        weight = BETA * (1 - sigmoid(reference_logit(now)))[0]
        return float(np.mean((winner - arrays["target_w"] - weight * (winner - arrays["winner_ref"])) ** 2))

    winner, loser = (tensors[name].clone().requires_grad_() for name in ("winner", "loser"))
    u = logit(tensors | {"winner": winner, "loser": loser})
    value = dspo_loss(winner, tensors["winner_ref"], tensors["target_w"], u, BETA)
    assert value.item() == pytest.approx(loss(arrays["winner"], arrays["loser"]), rel=1e-12)
    value.sum().backward()
    for name, tensor in (("winner", winner), ("loser", loser)):
        for index in ((0, 0, 0, 0), (0, 2, 1, 0)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {"winner": arrays["winner"].copy(), "loser": arrays["loser"].copy()}
                moved[name][index] += step
                ends.append(loss(**moved))
            assert tensor.grad is not None
            assert tensor.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
            assert tensor.grad[index].item() != 0


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_dmpo_is_the_divergence_of_two_bernoullis(alpha: float) -> None:
    u = np.linspace(-8, 8, 33)
    p, q = sigmoid(u), 1 - alpha
    direct = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(dmpo_loss(torch.tensor(u), alpha).numpy(), direct, rtol=1e-9, atol=1e-12)


def test_dmpo_vanishes_at_its_target_and_stays_finite_far_away() -> None:
    target = torch.tensor(np.log(0.99 / 0.01), requires_grad=True)
    loss = dmpo_loss(target, 0.01)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert target.grad is not None
    assert target.grad.item() == pytest.approx(0, abs=1e-15)
    far = dmpo_loss(torch.tensor([-1e4, 1e4]), 0.01)
    np.testing.assert_allclose(far.numpy(), [-np.log(0.01), -np.log(0.99)], rtol=1e-5)


def test_at_the_reference_the_logit_is_zero() -> None:
    tensors = inputs()
    tensors |= {"winner": tensors["winner_ref"], "loser": tensors["loser_ref"]}
    u = logit(tensors, beta=5000.0)
    assert (u == 0).all()
    np.testing.assert_allclose(dpo_loss(u).numpy(), np.log(2))
    np.testing.assert_allclose(dmpo_loss(u, 0.01).numpy(), -np.log(2) - 0.5 * np.log(0.99 * 0.01))
    supervised = dspo_loss(tensors["winner"], tensors["winner_ref"], tensors["target_w"], u, 5000.0)
    np.testing.assert_allclose(supervised.numpy(), prediction_error(tensors["winner"], tensors["target_w"]).numpy())


# The safeguard


def test_gradient_products_are_those_of_autograd() -> None:
    tensors = inputs()
    gradients = []
    for name, target in (("winner", "target_w"), ("loser", "target_l")):
        prediction = tensors[name].clone().requires_grad_()
        prediction_error(prediction, tensors[target]).sum().backward()
        assert prediction.grad is not None
        gradients.append(prediction.grad.numpy().reshape(5, -1))
    product, norm = gradient_products(tensors["winner"], tensors["target_w"], tensors["loser"], tensors["target_l"])
    np.testing.assert_allclose(product.numpy(), (gradients[0] * gradients[1]).sum(1), rtol=1e-12)
    np.testing.assert_allclose(norm.numpy(), (gradients[0] ** 2).sum(1), rtol=1e-12)


vectors = st.lists(st.floats(-100, 100), min_size=4, max_size=4).map(lambda values: np.array(values))


@UNTIMED
@given(vectors, vectors, st.floats(0, 1))
def test_the_common_direction_lowers_the_winners_error(g_a: np.ndarray, g_b: np.ndarray, mu: float) -> None:
    """``gA . delta <= -mu ||gA||^2`` for ``delta = -(gA - lambda gB)``."""
    product, norm = float(g_a @ g_b), float(g_a @ g_a)
    scale = safeguard_scale(*torch.tensor([product, norm], dtype=torch.float64), mu).item()
    assert 0 <= scale <= 1
    delta = -(g_a - scale * g_b)
    assert g_a @ delta <= -mu * norm + 1e-12 * (norm + abs(product))
    if product <= 0:
        assert scale == 1  # the loser's gradient helps the winner: nothing is held back


def test_mu_of_one_holds_everything_back_and_mu_of_zero_only_what_would_harm() -> None:
    product, norm = torch.tensor([2.0, 0.5, -3.0]), torch.ones(3)
    assert safeguard_scale(product, norm, 1.0).tolist() == [0, 0, 1]
    assert safeguard_scale(product, norm, 0.0).tolist() == pytest.approx([0.5, 1, 1])


@pytest.mark.parametrize("base", ["dpo", "dspo", "dmpo"])
def test_the_safeguard_scales_the_losers_gradient_and_changes_no_value(base: str) -> None:
    tensors = inputs()
    scale = torch.linspace(0, 1, 5, dtype=torch.float64)

    def loss(given: dict[str, Tensor], scale: Tensor | None) -> Tensor:
        u = logit(given, scale=scale)
        if base == "dspo":
            return dspo_loss(given["winner"], given["winner_ref"], given["target_w"], u, BETA)
        return dpo_loss(u) if base == "dpo" else dmpo_loss(u, 0.01)

    found = {}
    for name, factor in (("plain", None), ("guarded", scale)):
        given = tensors | {key: tensors[key].clone().requires_grad_() for key in ("winner", "loser")}
        value = loss(given, factor)
        value.sum().backward()
        found[name] = (value.detach(), given["winner"].grad, given["loser"].grad)
    plain, guarded = found["plain"], found["guarded"]
    torch.testing.assert_close(guarded[0], plain[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(guarded[1], plain[1], rtol=1e-12, atol=1e-14)
    assert plain[2] is not None
    torch.testing.assert_close(guarded[2], scale.view(-1, 1, 1, 1) * plain[2], rtol=1e-12, atol=1e-14)


def test_one_scale_for_many_pairs_can_fail_where_one_a_pair_cannot() -> None:
    """Over random batches of 8 pairs with DPO's weights: how often a winner's error would rise faster than allowed."""
    rng = np.random.default_rng(0)
    mu, batches, pairs = 0.6, 500, 8
    failed = {"pair": 0, "batch, a pair": 0, "batch, as a whole": 0}
    for _ in range(batches):
        g_a = rng.normal(size=(pairs, 16)) * rng.lognormal(size=(pairs, 1))
        g_b = g_a * rng.uniform(0, 2, size=(pairs, 1)) + 0.5 * rng.normal(size=(pairs, 16))
        weight = rng.uniform(0, 1, size=(pairs, 1))  # 1 - sigmoid(u)
        products, norms = torch.tensor((g_a * g_b).sum(1)), torch.tensor((g_a * g_a).sum(1))
        each = safeguard_scale(products, norms, mu).numpy()[:, None]
        one = safeguard_scale(products.sum(), norms.sum(), mu).item()
        bound = -mu * weight[:, 0] * norms.numpy() + 1e-9
        failed["pair"] += int((-(weight * g_a * (g_a - each * g_b)).sum(1) > bound).sum())
        descent = -(weight * g_a * (g_a - one * g_b)).sum(1)
        failed["batch, a pair"] += int((descent > bound).sum())
        failed["batch, as a whole"] += int(descent.sum() > bound.sum())
    assert failed["pair"] == 0
    assert failed["batch, a pair"] > 0.2 * batches * pairs
    assert failed["batch, as a whole"] > 0.2 * batches


# The method


def configured(tiny_run: Compose, *overrides: str, **more: Any) -> DictConfig:
    """2 prompts x 4 images, 3 pairs an optimizer step, two steps an iteration."""
    sizes = [
        "overlay=none",
        "method.algorithm.pairs_per_update=3",
        "method.batch.updates=2",
        "method.optimizer.lr=0.001",
    ]
    return tiny_run("method=sdpo", *sizes, *overrides, **more)


def iterate(parts: Parts, iteration: int = 0) -> None:
    """An iteration, and nothing of the loop around it."""
    method, clock = parts.method, Clock(iteration)
    prompts = draw(parts.prompts, method.prompts_wanted(clock), 0, iteration, "none")
    experience = method.collect(parts.stack, prompts, clock)
    for update in method.updates(experience, parts.stack, clock):
        optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)


def weights(parts: Parts) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parts.policy.trainable_parameters().items()}


def test_a_pair_is_the_best_and_the_worst_image_of_a_prompt(tiny_run: Compose) -> None:
    parts = assembly.assemble(configured(tiny_run))
    stack, seen = parts.stack, []
    score = stack.score
    stack.score = lambda images, prompts, **more: seen.append(images) or score(images, prompts, **more)  # type: ignore
    experience = parts.method.collect(stack, draw(parts.prompts, 2, 0, 0, "none"), Clock())
    red = torch.cat(seen)[:, 0].mean((1, 2)).view(2, 4)
    for name, expected in (("winner", red.amax(1)), ("loser", red.amin(1))):
        images = stack.policy.decode(experience.terms[name])
        torch.testing.assert_close(images[:, 0].mean((1, 2)), expected, rtol=0, atol=1e-3)  # scored as uint8
    artifact = parts.method.artifact()
    assert artifact is not None
    torch.testing.assert_close(artifact["scores"], torch.stack([red.amax(1), red.amin(1)], 1), rtol=0, atol=1e-3)
    assert [prompt.text for prompt in experience.prompts] == [p.text for p in draw(parts.prompts, 2, 0, 0, "none")]


def test_the_first_loss_is_that_of_a_zero_logit(tiny_run: Compose) -> None:
    parts = assembly.assemble(configured(tiny_run, "method.algorithm.base=dpo"))
    experience = parts.method.collect(parts.stack, draw(parts.prompts, 2, 0, 0, "none"), Clock())
    update = next(parts.method.updates(experience, parts.stack, Clock()))
    loss = parts.method.loss(parts.stack, update, update.batch(range(3)))
    assert loss.total.item() == pytest.approx(3 * np.log(2), rel=1e-4)  # beta is 2000: rounding is amplified


def test_every_pair_is_used_before_one_is_used_again(tiny_run: Compose) -> None:
    config = configured(
        tiny_run, "method.batch.prompts=4", "method.batch.images=2", "method.algorithm.pairs_per_update=2"
    )
    parts = assembly.assemble(config)
    drawn: list[str] = []
    for iteration in range(3):
        clock = Clock(iteration)
        experience = parts.method.collect(
            parts.stack, draw(parts.prompts, parts.method.prompts_wanted(clock), 0, iteration, "none"), clock
        )
        for update in parts.method.updates(experience, parts.stack, clock):
            drawn += [prompt.text for prompt in update.batch(range(update.atoms)).prompts]
    epochs = [drawn[start : start + 4] for start in (0, 4, 8)]
    assert all(sorted(epoch) == ["ab", "cd", "ef", "gh"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_winner_and_loser_share_time_and_noise_and_draws_differ(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for models that predict noise: DDPM's ``sqrt(abar) x_0 + sqrt(1 - abar) e``, up to scale, target ``e``."""
    config = configured(tiny_run, "model.policy.dtype=float64", "method.algorithm.base=dpo", "method.algorithm.beta=7")
    parts = assembly.assemble(config)
    abar = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    parts.policy.path = DiffusionPath(abar)
    experience = parts.method.collect(_sampled(parts), draw(parts.prompts, 2, 0, 0, "none"), Clock())
    calls: list[tuple[Tensor, Tensor, str]] = []

    def predict(latents: Tensor, t: Tensor, condition: object, *, view: str = "current") -> Tensor:
        calls.append((latents, t, view))
        return (1.5 if view == "current" else 0.5) * latents.detach().requires_grad_()

    monkeypatch.setattr(parts.stack, "predict", predict)
    update = next(parts.method.updates(experience, parts.stack, Clock()))
    batch = update.batch(range(3))
    loss = parts.method.loss(parts.stack, update, batch)

    noise, t = batch.terms["noise"], batch.terms["t"].double()
    ratio = (t / (1 - t)) ** 2  # (1 - abar) / abar
    scale = (1 / (1 + ratio)).view(-1, 1, 1, 1)
    distance, steps = (abar - scale.flatten().unsqueeze(1)).abs().min(1)
    assert distance.max() < 1e-6  # times are those of training steps
    assert len(set(steps.tolist())) == 3
    units = scale.sqrt() + (1 - scale).sqrt()
    x_t = [(scale.sqrt() * batch.terms[name] + (1 - scale).sqrt() * noise) / units for name in ("winner", "loser")]
    for latents, t, _ in calls:
        torch.testing.assert_close(latents, torch.cat(x_t))
        torch.testing.assert_close(t, batch.terms["t"].repeat(2))
    errors = [[((k * x - noise) ** 2).mean((1, 2, 3)) for x in x_t] for k in (1.5, 0.5)]
    u = -0.5 * 7 * ((errors[0][0] - errors[0][1]) - (errors[1][0] - errors[1][1]))
    assert loss.total.item() == pytest.approx(torch.log1p(torch.exp(-u)).sum().item(), rel=1e-10)
    assert loss.metrics["winner_error_change"].item() == pytest.approx((errors[0][0] - errors[1][0]).sum().item())
    assert loss.metrics["loser_error_change"].item() == pytest.approx((errors[0][1] - errors[1][1]).sum().item())


def _sampled(parts: Parts) -> Any:
    """The stack, with the sampler's flow path for the collection alone."""
    sample, path = parts.stack.sample, parts.policy.path

    def with_flow(*arguments: Any, **more: Any) -> Any:
        from alignbench.sampling.flow import FlowPath

        parts.policy.path = FlowPath()
        rollout = sample(*arguments, **more)
        parts.policy.path = path
        return rollout

    parts.stack.sample = with_flow  # type: ignore[method-assign]
    return parts.stack


@pytest.mark.parametrize("safeguard", ["pair", "batch"])
def test_micro_batch_size_does_not_change_the_step(tiny_run: Compose, safeguard: str) -> None:
    found = []
    for size in (64, 3, 1):
        parts = assembly.assemble(
            configured(
                tiny_run, "model.policy.dtype=float64", f"micro_batch={size}", f"method.algorithm.safeguard={safeguard}"
            )
        )
        before = weights(parts)
        iterate(parts)
        found.append(weights(parts))
        assert any(not torch.equal(before[name], found[-1][name]) for name in before)
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


class Together(Processes):
    """One of several threads that stand in for processes."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__("cpu")
        self.rank, self.count, self.board, self.barrier = rank, len(board), board, barrier

    def exchange(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat(self.exchange(local.detach()))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        totals = [sum(parts) for parts in zip(*self.exchange([tensor.clone() for tensor in tensors]), strict=True)]
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)  # type: ignore[arg-type]

    def join(self, values: Any, join: Any) -> Any:
        self.exchange(None)
        return values


@pytest.mark.parametrize("safeguard", ["pair", "batch"])
def test_the_number_of_processes_does_not_change_the_step(tiny_run: Compose, safeguard: str) -> None:
    overrides = ["model.policy.dtype=float64", f"method.algorithm.safeguard={safeguard}"]
    alone = assembly.assemble(configured(tiny_run, *overrides))
    iterate(alone)
    several = [assembly.assemble(configured(tiny_run, *overrides)) for _ in range(3)]  # 3 pairs, 8 images: uneven
    board, barrier = [None] * 3, threading.Barrier(3, timeout=60)
    for rank, parts in enumerate(several):
        parts.stack.processes = Together(rank, board, barrier)
    threads = [threading.Thread(target=iterate, args=(parts,)) for parts in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for parts in several:
        for name, value in weights(alone).items():
            torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("safeguard", ["none", "pair", "batch"])
@pytest.mark.parametrize("refresh_every", ["null", "2"])
def test_cost_is_what_the_ledger_counts(tiny_run: Compose, safeguard: str, refresh_every: str) -> None:
    settings = [f"method.algorithm.safeguard={safeguard}", f"method.algorithm.refresh_every={refresh_every}"]
    parts = assembly.assemble(configured(tiny_run, *settings, "method.rollout.guidance=2"))
    rows = [parts.ledger.row()]
    for iteration in range(5):
        iterate(parts, iteration)
        rows.append(parts.ledger.row())
    training = 2 * 3 * 2 * (3 if safeguard == "batch" else 2)  # 2 steps x 3 pairs x 2 images, by 2 or 3 passes
    rollout = [8 * 3 * 2 * (k == 0 or (refresh_every == "2" and k % 2 == 0)) for k in range(5)]  # guidance: 2 passes
    assert [after["nfe"] - before["nfe"] for before, after in pairwise(rows)] == [each + training for each in rollout]
    cost = parts.method.expected_cost()  # of two iterations, one of which samples where any but the first does
    assert rows[5]["nfe"] - rows[3]["nfe"] == 2 * (cost.rollout + cost.training)
    assert (2 * cost.rollout, cost.training) == (rollout[3] + rollout[4], training)
    for name in ("backward", "images", "reward_calls"):
        assert rows[5][name] - rows[3][name] == 2 * getattr(cost, name)


def test_pairs_are_sampled_once_or_every_few_iterations(tiny_run: Compose) -> None:
    for setting, wanted in (("null", [2, 0, 0, 0]), ("3", [2, 0, 0, 2])):
        parts = assembly.assemble(configured(tiny_run, f"method.algorithm.refresh_every={setting}"))
        found = []
        for iteration in range(4):
            found.append(parts.method.prompts_wanted(Clock(iteration)))
            iterate(parts, iteration)
        assert found == wanted


def test_ties_are_dropped_and_only_ties_end_the_run(tiny_run: Compose) -> None:
    with pytest.raises(RewardError, match="the same reward over the first 3 iterations"):
        run(configured(tiny_run, "budget.iterations=9", reward="tests.stand_ins.Constant"))


@pytest.mark.parametrize("setting", ["refresh_every=null", "refresh_every=3"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Stopped after its second iteration, whose pairs are of the first."""

    def config(results: str) -> DictConfig:
        return configured(
            tiny_run, f"results={tmp_path / results}", "budget.iterations=4", "checkpoint_every=0.2",
            f"method.algorithm.{setting}",
        )  # fmt: skip

    append = records.RunDirectory.append_metrics

    def interrupting(self: records.RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        if row["iteration"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(records.RunDirectory, "append_metrics", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(config("stopped"))
    whole, resumed = run(config("whole")), run(config("stopped"))
    assert numbers(resumed) == numbers(whole)
    artifacts = {path.name: path.read_bytes() for path in (whole / "artifacts").iterdir()}
    assert {path.name: path.read_bytes() for path in (resumed / "artifacts").iterdir()} == artifacts
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert ["pairs" in row for row in rows] == [True, False, False, setting == "refresh_every=3"]


@pytest.mark.parametrize(("damage", "message"), [("remove", "is missing"), ("change", "has changed: its SHA-256")])
def test_a_run_does_not_continue_without_its_pairs(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    config = configured(tiny_run, "checkpoint_every=0.2")
    (artifact,) = stopped(config, monkeypatch).rglob("artifacts/*.safetensors")
    if damage == "remove":
        artifact.unlink()
    else:
        artifact.write_bytes(artifact.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=message):
        run(config)


# Pairs of a data set


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 rendered pairs, and a cache of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs", preference_pairs(split("train"), 40, seed=1))
    return tmp_path / "pairs"


def from_folder(tiny_run: Compose, folder: Path, *overrides: str) -> DictConfig:
    data = ["method.algorithm.pairs=dataset", f"method.algorithm.dataset.path={folder}"]
    return configured(tiny_run, *data, *overrides)


def test_pairs_of_a_data_set_are_encoded_once_and_trained_on(tiny_run: Compose, folder: Path) -> None:
    parts = assembly.assemble(from_folder(tiny_run, folder, "method.algorithm.dataset.resolution=16"))
    assert parts.method.prompts_wanted(Clock()) == 0
    before = parts.ledger.row()
    iterate(parts)
    after = parts.ledger.row()
    columns = preference_pairs(split("train"), 40, seed=1)
    count = int(columns["has_label"].sum())
    assert 0 < count < 40
    assert (after["images"], after["reward_calls"], after["nfe"]) == (0, 0, 2 * 3 * 2 * 2)
    costs = parts.stack.flops
    passes = after["nfe"] * costs["denoiser"] + after["backward"] * costs["denoiser_backward"]
    texts, rest = divmod(after["flops"] - before["flops"] - 2 * count * costs["encode"] - passes, costs["text"])
    assert rest == 0
    assert 1 <= texts <= 6  # captions of the 6 pairs drawn

    artifact = parts.method.artifact()
    assert artifact is not None
    assert artifact["scores"].tolist() == [[1, 0]] * count
    first = np.flatnonzero(columns["has_label"])[0]
    better = columns["jpg_0" if columns["label_0"][first] == 1 else "jpg_1"][first]
    small = better.reshape(16, 2, 16, 2, 3).mean((1, 3))  # half the side: the mean of 2 x 2, but for PIL's wider filter
    decoded = parts.policy.encode_images(torch.tensor(small).permute(2, 0, 1)[None].float() / 255)
    worse = columns["jpg_1" if columns["label_0"][first] == 1 else "jpg_0"][first].reshape(16, 2, 16, 2, 3).mean((1, 3))
    other = parts.policy.encode_images(torch.tensor(worse).permute(2, 0, 1)[None].float() / 255)
    stored = artifact["winner"][:1]
    assert (stored - decoded).abs().mean() < (stored - other).abs().mean()
    iterate(parts, 1)
    assert parts.ledger.row()["flops"] - after["flops"] < 1.5 * passes + 6 * costs["text"]  # nothing is encoded again


def test_a_run_on_some_pairs_of_a_data_set(tiny_run: Compose, folder: Path) -> None:
    overrides = ["method.algorithm.dataset.resolution=16", "method.algorithm.dataset.count=5"]
    results = run(from_folder(tiny_run, folder, *overrides))
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["pairs"] == 5
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_images_of_another_size_than_the_models_are_refused(tiny_run: Compose, folder: Path) -> None:
    with pytest.raises(DataError, match=r"has images of 32 x 32 pixels, which do not give .*\[4, 8, 8\]"):
        run(from_folder(tiny_run, folder))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.algorithm.base=ipo"], "choose dpo, dspo or dmpo"),
        (["method.algorithm.safeguard=device"], "choose none, pair or batch"),
        (["method.algorithm.beta=0"], "beta is 0"),
        (["method.algorithm.alpha=1"], "alpha is 1"),
        (["method.algorithm.mu=1.5"], "mu is 1.5"),
        (["method.algorithm.refresh_every=0"], "refresh_every is 0"),
        (
            ["method.algorithm.pairs=dataset", "method.algorithm.refresh_every=3"],
            "refresh_every is 3 with pairs=dataset",
        ),
        (["method.algorithm.pairs=dataset"], r"dataset\.path=FOLDER"),
        (["method.algorithm.pairs=dataset", "+method.algorithm.dataset.colour=1"], "has no setting 'colour'"),
        (["method.algorithm.pairs_per_update=0"], "pairs_per_update is 0"),
        (["method.batch.images=1"], "use 2 or more"),
    ],
)
def test_values_that_cannot_work(tiny_run: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(configured(tiny_run, *overrides))


@pytest.mark.parametrize("safeguard", ["none", "pair", "batch"])
@pytest.mark.parametrize("base", ["dpo", "dspo", "dmpo"])
def test_the_step_holds_back_the_losers_gradient_by_the_pairs_or_the_batchs_lambda(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch, base: str, safeguard: str
) -> None:
    """Value and gradients of the method's loss, with derivatives by hand in NumPy."""
    beta, alpha, mu = (0.7 if base == "dspo" else 7.0), 0.05, 0.6
    settings = {"base": base, "beta": beta, "alpha": alpha, "mu": mu, "safeguard": safeguard}
    overrides = [f"method.algorithm.{key}={value}" for key, value in settings.items()]
    parts = assembly.assemble(configured(tiny_run, "model.policy.dtype=float64", *overrides))
    stack, method = parts.stack, parts.method
    experience = method.collect(stack, draw(parts.prompts, 2, 0, 0, "none"), Clock())
    update = next(method.updates(experience, stack, Clock()))
    batch = update.batch(range(3))
    t_w, t_l = (batch.terms["noise"] - batch.terms[name] for name in ("winner", "loser"))  # velocities
    generator = torch.Generator().manual_seed(0)
    off, other, ref_w, ref_l = torch.randn(4, *t_w.shape, generator=generator, dtype=torch.float64)
    along = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64).view(3, 1, 1, 1)  # the loser's error, of the winner's
    p_w, p_l = t_w + off, t_l + along * off + 0.1 * other
    current = torch.cat([p_w, p_l]).requires_grad_()
    predictions = {"current": current, "reference": torch.cat([t_w + ref_w, t_l + ref_l])}
    monkeypatch.setattr(stack, "predict", lambda *_, view: predictions[view])
    method.prepare(stack, update)
    loss = method.loss(stack, update, batch)
    loss.total.backward()

    e_w, e_l, r_w, r_l = (each.flatten(1).numpy() for each in (off, (p_l - t_l).detach(), ref_w, ref_l))
    n = e_w.shape[1]
    products, norms = 4 / n**2 * (e_w * e_l).sum(1), 4 / n**2 * (e_w**2).sum(1)
    if safeguard == "batch":
        products, norms = np.full(3, products.sum()), np.full(3, norms.sum())
    scale = np.ones(3)
    if safeguard != "none":
        scale[products > 0] = np.minimum(1, (1 - mu) * norms[products > 0] / (products[products > 0] + 1e-9))
    u = -beta / 2 * ((e_w**2).mean(1) - (e_l**2).mean(1) - (r_w**2).mean(1) + (r_l**2).mean(1))
    s = 1 / (1 + np.exp(-u))
    direct = np.zeros_like(e_w)
    if base == "dpo":
        value, by_u = -np.log(s), s - 1
    elif base == "dmpo":
        value = s * np.log(s / (1 - alpha)) + (1 - s) * np.log((1 - s) / alpha)
        by_u = s * (1 - s) * (np.log(s / (1 - alpha)) - np.log((1 - s) / alpha))
    else:
        moved = e_w - r_w  # of the winner's prediction from the reference's
        rest = e_w - beta * (1 - s)[:, None] * moved
        value, by_u = (rest**2).mean(1), (2 * rest * beta * (s * (1 - s))[:, None] * moved).mean(1)
        direct = 2 / n * rest * (1 - beta * (1 - s))[:, None]
    gradients = [direct - beta / n * by_u[:, None] * e_w, beta / n * (by_u * scale)[:, None] * e_l]
    assert loss.total.item() == pytest.approx(value.sum(), rel=1e-10)
    assert current.grad is not None
    np.testing.assert_allclose(current.grad.flatten(1).numpy(), np.concatenate(gradients), rtol=1e-9, atol=1e-14)
    assert loss.metrics["lambda"].item() == pytest.approx(scale.sum(), rel=1e-9)
    assert loss.metrics["lambda_below_one"].item() == (scale < 1).sum()
    assert (scale < 1).sum() == {"none": 0, "pair": 1, "batch": 3}[safeguard]
