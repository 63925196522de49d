"""The protocol: which images, which means, which errors; and that evaluating disturbs nothing."""

import random

import numpy as np
import pytest
import torch

from alignbench import assembly
from alignbench.evaluation import Protocol, Samples, diversity, summarise
from alignbench.methods.method import Clock
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sets import draw
from alignbench.rewards.reward import Reward
from alignbench.training import optimizer_step
from tests.conftest import Compose

PROMPTS = [Prompt(f"a/{i}", f"a{i}", {"tag": "a"}) for i in range(2)] + [Prompt("b/0", "b0", {"tag": "b"})]


def test_images_are_spread_evenly_over_the_prompts_of_a_tag() -> None:
    samples = Samples.choose(PROMPTS, 3)
    assert samples.rows == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]


def test_a_small_protocol_looks_at_a_subset_of_a_large_one() -> None:
    many = [Prompt(f"p/{i:03d}", str(i), {"tag": "a"}) for i in range(40)]
    small, large = (Samples.choose(many, n) for n in (7, 20))
    assert len(small.prompts) == 7
    assert {prompt.id for prompt in small.prompts} < {prompt.id for prompt in large.prompts}


def test_overall_score_is_the_unweighted_mean_of_the_tags_and_errors_are_clustered_by_prompt() -> None:
    samples = Samples.choose(PROMPTS, 3)
    scores = {"s": torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)}
    metrics, errors = summarise(scores, samples)
    assert metrics == pytest.approx({"s/a": 0.75, "s/b": 1 / 3, "s": (0.75 + 1 / 3) / 2})
    # tag a: prompt means 1 and 1/2, variance 1/8, two clusters; tag b has one prompt: its three images, variance 1/3
    assert errors["s/a"] == pytest.approx(np.sqrt(0.125 / 2))
    assert errors["s/b"] == pytest.approx(np.sqrt((1 / 3) / 3))
    assert errors["s"] == pytest.approx(np.sqrt(0.125 / 2 + 1 / 9) / 2)


def test_diversity_is_the_mean_cosine_distance_within_a_prompt() -> None:
    samples = Samples(PROMPTS[:2], [(0, 0), (0, 1), (1, 0), (1, 1)])
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    assert diversity(embeddings, samples) == pytest.approx((1.0 + 0.4) / 2)


def test_the_hash_follows_everything_a_number_depends_on() -> None:
    protocol = Protocol("curve", 1, "test", 3, 2, "euler", "pipeline", (1.0,))
    described = [
        protocol.describe(samples, scorers, dtype, (4, 8, 8))
        for samples in (Samples.choose(PROMPTS, 3), Samples.choose(PROMPTS[:2], 3))
        for scorers in (["geneval"], ["geneval", "judge"])
        for dtype in ("float32", "bfloat16")
    ]
    assert len({str(each) for each in described}) == 8


def test_evaluation_leaves_every_generator_and_every_weight_as_they_were(tiny_run: Compose) -> None:
    class Rude(Reward):
        name, differentiable = "rude", False

        def score(self, images: torch.Tensor, prompts: object) -> dict[str, torch.Tensor]:
            random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
            return {"reward": images.mean((1, 2, 3))}

    def trained(evaluate: bool) -> dict[str, torch.Tensor]:
        parts = assembly.assemble(tiny_run("method=flow_grpo", "method.batch.updates=1"))
        parts.evaluator.scorers["rude"] = Rude()
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index] # noqa: NPY002
        if evaluate:
            parts.evaluator.sample_reference()
            parts.evaluator(parts.curve, view="evaluation", guidance=1.0)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index] # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
        method = parts.method
        experience = method.collect(parts.stack, draw(parts.prompts, 2, 0, 0, "none"), Clock())
        for update in method.updates(experience, parts.stack, Clock()):
            optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)
        assert parts.ledger.row()["images"] == 8  # evaluation is charged elsewhere
        return {name: value.detach().clone() for name, value in parts.policy.trainable_parameters().items()}

    left_alone, evaluated = trained(False), trained(True)
    assert all(torch.equal(left_alone[name], evaluated[name]) for name in left_alone)


def test_evaluation_does_not_depend_on_the_micro_batch(tiny_run: Compose) -> None:
    results = []
    for size in (64, 3):
        parts = assembly.assemble(tiny_run(f"micro_batch={size}", "model.policy.dtype=float64"))
        parts.evaluator.sample_reference()
        results.append(parts.evaluator(parts.curve, view="evaluation", guidance=1.0).metrics)
    assert results[0] == pytest.approx(results[1], abs=1e-6)
