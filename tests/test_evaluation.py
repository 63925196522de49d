"""The protocol: which images, which means, which errors; what it costs; and that evaluating disturbs nothing."""

import io
import random
import weakref

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from alignbench import assembly
from alignbench.errors import RewardError
from alignbench.evaluation import (
    DRIFT_SAMPLES,
    DRIFT_SIGMAS,
    Protocol,
    Samples,
    diversity,
    grid_rows,
    picture,
    summarise,
)
from alignbench.methods.method import Clock
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sets import draw
from alignbench.rewards.reward import Reward
from alignbench.training import optimizer_step
from tests.conftest import CONF, Compose
from tests.stand_ins import Constant
from tests.test_ledger import IMAGE_FLOPS, TEXT_FLOPS, Similarity

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


def test_the_grid_has_a_line_a_prompt_and_repeats_the_last_image_of_a_prompt_that_has_few() -> None:
    tags = [Prompt(f"a/{i}", f"a{i}", {"tag": "a"}) for i in range(3)] + [Prompt("b/0", "b0", {"tag": "b"})]
    samples = Samples(tags, [(0, 0), (0, 1), (1, 0), (2, 0)] + [(3, image) for image in range(6)])
    grid = grid_rows(samples)
    assert grid == [[0, 1, 1, 1], [2, 2, 2, 2], [4, 5, 6, 7]]  # two prompts of a tag

    shades = {row: torch.full((3, 2, 2), row / 10) for row in (0, 1, 2, 4, 5, 6, 7)}
    pixels = np.asarray(Image.open(io.BytesIO(picture(shades, grid))))
    assert pixels.shape == (3 * 4, 4 * 4, 3)  # a white frame around each
    assert pixels[1::4, 1::4, 0].tolist() == [[round(25.5 * row) for row in line] for line in grid]
    assert pixels[2::4, 2::4].tolist() == pixels[1::4, 1::4].tolist()
    assert (pixels[0::4] == 255).all()
    assert (pixels[:, 3::4] == 255).all()


def test_the_sampler_takes_as_many_steps_as_the_models_papers() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for model, steps in (("shapes", 10), ("sd35_medium", 40)):
            config = compose("config", [f"model={model}"])
            assert (config.evaluation.curve.steps, config.evaluation.final.steps) == (steps, steps)


def test_the_protocols_of_the_embedded_world_are_those_of_the_published_records() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["device=cpu"])
    described = assembly.protocols(config, assembly.assemble(config))
    assert {name: each["hash"] for name, each in described.items()} == {
        "curve": "8aeac7662b89",
        "final": "1a4297d595f9",
    }


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


def test_the_grid_shows_the_images_that_were_scored_and_names_their_prompts(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("micro_batch=3"))
    parts.evaluator.sample_reference()
    result = parts.evaluator(parts.curve, view="evaluation", guidance=1.0)
    assert result.scores["grid"] == [{"id": prompt.id, "prompt": prompt.text} for prompt in parts.prompts[:2]]
    pixels = np.asarray(Image.open(io.BytesIO(result.grid)), dtype=np.float64)
    height = pixels.shape[0] // 2
    for line in range(2):
        for image in range(2):  # two of each prompt; the reward is the mean of the red channel
            tile = pixels[line * height + 1 : (line + 1) * height - 1, image * height + 1 : (image + 1) * height - 1, 0]
            assert tile.mean() / 255 == pytest.approx(result.scores["metrics"]["reward"][2 * line + image], abs=1e-6)


def test_no_more_images_are_kept_than_a_micro_batch_and_the_grid(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = assembly.assemble(tiny_run("micro_batch=4", "evaluation.curve.images_per_tag=32"))
    parts.evaluator.sample_reference()
    decode, gather = parts.policy.decode, parts.stack.processes.gather
    decoded: list[weakref.ref[torch.Tensor]] = []
    alive, gathered = [], []

    def watched(latents: torch.Tensor) -> torch.Tensor:
        alive.append(sum(each() is not None for each in decoded))
        images = decode(latents)
        decoded.append(weakref.ref(images))
        return images

    def counted(local: torch.Tensor) -> torch.Tensor:
        gathered.extend([len(local)] if local.ndim == 4 else [])
        return gather(local)

    monkeypatch.setattr(parts.policy, "decode", watched)
    monkeypatch.setattr(parts.stack.processes, "gather", counted)
    parts.evaluator(parts.curve, view="evaluation", guidance=1.0)
    assert len(decoded) == 32 / 4
    assert max(alive) == 0
    assert gathered == [2 * 4]  # the first two prompts of the only tag, four noises of each


def test_everything_an_evaluation_computes_is_counted(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("micro_batch=3"))
    parts.evaluator.scorers["similarity"] = parts.evaluator.features = scorer = Similarity()
    parts.evaluator.sample_reference()
    for _ in range(2):
        parts.evaluator(parts.curve, view="evaluation", guidance=3.0)
    costs, images, prompts = parts.stack.flops, 2 * 8, 4
    passes = DRIFT_SAMPLES * 10 + 2 * DRIFT_SAMPLES * len(DRIFT_SIGMAS) * 2 + images * 2 * 2
    texts = prompts * (costs["text"] + TEXT_FLOPS) + costs["text"]  # the empty one too
    counts = parts.ledger.row()["phases"]["evaluation"]
    assert counts["nfe"] == passes
    assert counts["reward_calls"] == 2 * images  # red and similarity; an embedding is no reward call
    assert counts["flops"] == (
        passes * costs["denoiser"] + images * costs["decode"] + 2 * images * IMAGE_FLOPS + texts
    )  # scored and embedded
    assert sum(scorer.scored) == images
    assert parts.ledger.row()["flops"] == 0
    assert parts.ledger.clocks()["reward"] == 0


def test_an_evaluation_that_is_not_repeated_costs_the_same(tiny_run: Compose) -> None:
    first, second = (assembly.assemble(tiny_run()) for _ in range(2))
    for parts in (first, second):
        parts.evaluator.scorers["similarity"] = Similarity()
        parts.evaluator.sample_reference()
    before = first.ledger.row()["phases"]["evaluation"]
    first.evaluator(first.final, view="reference", guidance=3.0)
    after = first.ledger.row()["phases"]["evaluation"]
    cost = {name: after[name] - before[name] for name in after}
    second.evaluator.repeat(second.evaluator.samples(second.final), guidance=3.0, cost=cost)
    assert second.ledger.row() == first.ledger.row()
    for parts in (first, second):
        parts.evaluator(parts.final, view="evaluation", guidance=3.0)
    assert second.ledger.row() == first.ledger.row()


def test_a_score_that_is_not_finite_is_named_by_its_place_in_the_protocol(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("micro_batch=3"))
    parts.evaluator.sample_reference()
    parts.evaluator.scorers["constant"] = Constant(bad_prompt="gh")  # the last of four prompts, two images of each
    with pytest.raises(RewardError, match=r"reward is nan for image 6 of prompt prompts/00003"):
        parts.evaluator(parts.curve, view="evaluation", guidance=1.0)


def test_memory_that_runs_out_while_scoring_changes_nothing_but_the_waste(tiny_run: Compose) -> None:
    results, ledgers = [], []
    for fits in (1000, 2):
        parts = assembly.assemble(tiny_run("micro_batch=8", "model.policy.dtype=float64"))
        parts.evaluator.sample_reference()
        parts.ledger.wasted_nfe = 0
        parts.evaluator.scorers["similarity"] = Similarity(fits)
        results.append(parts.evaluator(parts.curve, view="evaluation", guidance=1.0))
        ledgers.append(parts.ledger)
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-6, abs=1e-6)
    assert results[0].grid == results[1].grid
    assert ledgers[0].row() == ledgers[1].row()
    assert [ledger.wasted_nfe for ledger in ledgers] == [0, (8 + 4) * 2]
