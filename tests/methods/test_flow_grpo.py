"""Flow-GRPO's loss, assembled from the stack, against a NumPy evaluation in float64 of the paper's equations."""

import math

import numpy as np
import pytest
import torch

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.methods.flow_grpo import FlowGRPO
from alignbench.methods.method import Clock, Update
from alignbench.prompts.sets import draw
from tests.conftest import Compose

DOUBLE = (
    "model.policy.dtype=float64",
    "method=flow_grpo",
    "overlay=none",
    "method.algorithm.kl=0.04",
    "method.batch.updates=1",
)


@pytest.fixture
def parts(tiny_run: Compose) -> Parts:
    parts = assembly.assemble(tiny_run(*DOUBLE))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parts.policy.trainable_parameters().items():
        if "lora_B" in name:  # away from the reference, so that every term matters
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parts


def collected(parts: Parts) -> tuple[FlowGRPO, Update]:
    method = parts.method
    assert isinstance(method, FlowGRPO)
    prompts = draw(parts.prompts, method.batch.prompts, 0, 0, "none")
    experience = method.collect(parts.stack, prompts, Clock())
    return method, next(method.updates(experience, parts.stack, Clock()))


def perturb(parts: Parts) -> None:
    """Move the current weights off the ones that sampled, so that ratios differ from 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parts.policy.trainable_parameters().values():
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def test_ratio_is_one_before_the_first_update(parts: Parts) -> None:
    method, update = collected(parts)
    loss = method.loss(parts.stack, update, update.batch(range(update.atoms)))
    assert float(loss.largest["ratio_deviation"]) <= 1e-10


def test_ratio_is_one_in_float32_within_a_twentieth_of_the_clip_range(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("method=flow_grpo", "method.batch.updates=1"))
    method, update = collected(parts)
    for atoms in (range(update.atoms), range(3)):  # also in other company than during the rollout
        loss = method.loss(parts.stack, update, update.batch(atoms))
        assert float(loss.largest["ratio_deviation"]) <= 0.05 * method.clip_range


def test_recomputed_log_probabilities_are_those_of_the_rollout(parts: Parts) -> None:
    method, update = collected(parts)
    method.recompute_log_prob = True
    before = parts.ledger.row()["nfe"]
    method.prepare(parts.stack, update)
    stored = update.batch(range(update.atoms)).terms["old_log_prob"]
    torch.testing.assert_close(update.shared["old_log_prob"], stored, rtol=0, atol=1e-10)
    branches = 2  # guidance
    assert parts.ledger.row()["nfe"] - before == branches * update.atoms


def test_loss_equals_the_papers_equations(parts: Parts) -> None:
    method, update = collected(parts)
    perturb(parts)
    batch = update.batch(range(update.atoms))
    loss = method.loss(parts.stack, update, batch)

    grid = parts.policy.grid(method.sampler.steps).numpy()
    a, guidance = method.sampler.noise_level, method.sampler.guidance
    total, kl_total = 0.0, 0.0
    for row in range(update.atoms):
        step = int(batch.terms["step"][row])
        s, s_next = grid[step], grid[step + 1]
        x, x_next = (batch.terms[name][row].numpy() for name in ("latents", "next_latents"))
        sigma_i = a * math.sqrt(s / (1 - (grid[1] if s == 1 else s)))
        ds, d = s_next - s, math.sqrt(s - s_next)
        means = {}
        for view in ("current", "reference"):
            t = torch.tensor([s])
            latents = batch.terms["latents"][row : row + 1]
            with torch.no_grad():
                cond = parts.policy.predict(latents, t, batch.condition[row : row + 1], view=view)[0].numpy()
                uncond = parts.policy.predict(latents, t, parts.policy.encode([""]), view=view)[0].numpy()
            v = uncond + guidance * (cond - uncond)
            means[view] = x * (1 + sigma_i**2 / (2 * s) * ds) + v * (1 + sigma_i**2 * (1 - s) / (2 * s)) * ds
        squares = (x_next - means["current"]) ** 2 / (2 * sigma_i**2 * d**2)
        log_p = np.mean(-squares - math.log(sigma_i * d) - math.log(math.sqrt(2 * math.pi)))
        ratio = math.exp(log_p - float(batch.terms["old_log_prob"][row]))
        advantage = float(np.clip(batch.terms["advantage"][row], -5, 5))
        clipped = min(max(ratio, 1 - method.clip_range), 1 + method.clip_range)
        total += max(-advantage * ratio, -advantage * clipped)
        kl_total += np.mean((means["current"] - means["reference"]) ** 2) / (2 * sigma_i**2)
    assert kl_total > 0
    assert float(loss.total.detach()) == pytest.approx(total + method.kl * kl_total, rel=1e-8)


def test_kl_weight_zero_makes_no_reference_pass(tiny_run: Compose) -> None:
    passes = {}
    for kl in (0.0, 0.04):
        paper = ("method=flow_grpo", "overlay=none", "method.batch.updates=1")
        parts = assembly.assemble(tiny_run(*paper, f"method.algorithm.kl={kl}"))
        method, update = collected(parts)
        before = parts.ledger.row()["nfe"]
        method.loss(parts.stack, update, update.batch(range(update.atoms)))
        passes[kl] = (parts.ledger.row()["nfe"] - before) / update.atoms
    assert passes == {0.0: 2, 0.04: 4}  # guidance doubles both


def test_constant_groups_are_dropped_and_the_denominator_follows(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("method=flow_grpo", "method.batch.updates=1"))
    method = parts.method
    prompts = draw(parts.prompts, 2, 0, 0, "none")
    experience = method.collect(parts.stack, prompts, Clock())
    experience.kept = [row for row in experience.kept if row < 4]  # as if the second group had one reward
    (update,) = method.updates(experience, parts.stack, Clock())
    assert (update.atoms, update.denominator) == (4 * 2, 4 * 2)  # 4 images x 2 stochastic steps
