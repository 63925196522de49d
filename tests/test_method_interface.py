"""The interface carries every family: rewards with gradients, pairs, statistics of whole groups."""

import pytest
import torch

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.errors import ConfigError
from alignbench.methods.method import Clock, Method
from alignbench.prompts.sets import draw
from alignbench.training import optimizer_step
from tests.conftest import Compose

STAND_INS = ["RewardGradient", "PairMargin", "GroupCentred"]  # contracts/test_methods.py runs the methods of the suite


def prepared(tiny_run: Compose, method: str, *overrides: str) -> Parts:
    """Parts of a float64 run of a method of the suite or of the tests."""
    name = method if method in ("diffusion_nft", "flow_grpo") else "diffusion_nft"
    config = tiny_run("model.policy.dtype=float64", f"method={name}", "method.batch.updates=1", *overrides)
    if method != name:
        config.method.algorithm = {"_target_": f"tests.stand_ins.{method}"}
    return assembly.assemble(config)


def one_step(parts: Parts) -> dict[str, torch.Tensor]:
    """Weights after one iteration."""
    method: Method = parts.method
    experience = method.collect(parts.stack, draw(parts.prompts, method.batch.prompts, 0, 0, "none"), Clock())
    for update in method.updates(experience, parts.stack, Clock()):
        optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)
    return {name: value.detach().clone() for name, value in parts.policy.trainable_parameters().items()}


@pytest.mark.parametrize("method", STAND_INS)
def test_micro_batch_size_does_not_change_the_step(tiny_run: Compose, method: str) -> None:
    whole = one_step(prepared(tiny_run, method, "micro_batch=64"))
    split = one_step(prepared(tiny_run, method, "micro_batch=3"))
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", STAND_INS)
def test_a_step_changes_trainable_weights_and_nothing_else(tiny_run: Compose, method: str) -> None:
    parts = prepared(tiny_run, method)
    before = {name: value.detach().clone() for name, value in parts.policy.trainable_parameters().items()}
    frozen = {name: value.detach().clone() for name, value in parts.policy.transformer.named_parameters()
              if not value.requires_grad}  # type: ignore[attr-defined] # fmt: skip
    after = one_step(parts)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for name, value in parts.policy.transformer.named_parameters():  # type: ignore[attr-defined]
        if name in frozen:
            assert torch.equal(value, frozen[name])


def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = one_step(prepared(tiny_run, "diffusion_nft"))
    parts = prepared(tiny_run, "diffusion_nft")
    predict = type(parts.policy).predict

    def scarce(self, latents, *arguments, **options):  # type: ignore[no-untyped-def]
        if len(latents) > 2:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return predict(self, latents, *arguments, **options)

    monkeypatch.setattr(type(parts.policy), "predict", scarce)
    starved = one_step(parts)
    assert parts.stack.micro_batch.size == 2
    for name, value in whole.items():
        torch.testing.assert_close(starved[name], value, rtol=0, atol=1e-9)


def test_a_method_that_needs_a_gradient_refuses_a_reward_without_one(tiny_run: Compose) -> None:
    config = tiny_run(reward="tests.stand_ins.Constant")
    config.method.algorithm = {"_target_": "tests.stand_ins.RewardGradient"}
    with pytest.raises(ConfigError, match="through the reward, but red has none; differentiable here: pickscore"):
        assembly.assemble(config)


def test_passes_are_counted_exactly(tiny_run: Compose) -> None:
    """8 images, 3 steps, KL on: 8 x 3 to sample, 8 x 2 x (old, current, reference) to train, 8 x 2 backward."""
    parts = prepared(tiny_run, "diffusion_nft", "overlay=none")
    one_step(parts)
    row = parts.ledger.row()
    assert (row["nfe"], row["backward"], row["images"], row["reward_calls"]) == (8 * 3 + 8 * 2 * 3, 8 * 2, 8, 8)
    costs = parts.stack.flops
    expected = row["nfe"] * costs["denoiser"] + row["backward"] * costs["denoiser_backward"] + 8 * costs["decode"]
    assert row["flops"] == expected + 2 * costs["text"]  # two prompts


def test_guided_passes_count_twice(tiny_run: Compose) -> None:
    parts = prepared(tiny_run, "flow_grpo", "overlay=none", "method.algorithm.kl=0")
    one_step(parts)
    kept = 8  # the red channel differs in every image
    row = parts.ledger.row()
    assert row["nfe"] == 2 * 8 * 3 + 2 * kept * 2
    assert row["backward"] == 2 * kept * 2


def test_an_attempt_that_runs_out_of_memory_is_wasted_and_not_charged(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, starved = prepared(tiny_run, "diffusion_nft"), prepared(tiny_run, "diffusion_nft")
    one_step(whole)
    predict = type(starved.policy).predict

    def scarce(self, latents, *arguments, **options):  # type: ignore[no-untyped-def]
        if len(latents) > 2:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return predict(self, latents, *arguments, **options)

    monkeypatch.setattr(type(starved.policy), "predict", scarce)
    one_step(starved)
    assert starved.ledger.row()["nfe"] == whole.ledger.row()["nfe"]
    assert starved.ledger.wasted_nfe > 0
