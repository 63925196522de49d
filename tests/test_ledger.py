"""Budgets end runs; phases stay apart; every pass, text and second is charged once, where it belongs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.errors import BudgetError, RewardError
from alignbench.ledger import Budget, Ledger
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import Reward
from alignbench.sampling.rollout import Sampler
from tests.conftest import Compose

SIDE, WIDTH, WORDS = 16, 5, 3
IMAGE_FLOPS = 2 * WIDTH * 3 * SIDE * SIDE  # one matrix product: a multiply-add is two
TEXT_FLOPS = 2 * WORDS * WIDTH
STEPS = 3


class Similarity(Reward):
    """An image tower and a text tower of one matrix product each."""

    name = "similarity"
    differentiable = True

    def __init__(self, fits: int = 1000) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(3 * SIDE * SIDE, WIDTH, generator=generator), requires_grad=False)
        self.text = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator), requires_grad=False)
        self.texts: dict[str, Tensor] = {}
        self.fits = fits  # images in memory
        self.scored: list[int] = []  # images of each call

    def encode(self, prompts: Sequence[Prompt]) -> None:
        for text in {prompt.text for prompt in prompts} - self.texts.keys():
            self.texts[text] = torch.full((1, WORDS), float(len(text))) @ self.text

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        self.scored.append(len(images))
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        self.encode(prompts)
        texts = torch.cat([self.texts[prompt.text] for prompt in prompts])
        return {"reward": (self.embed_images(images) * texts).sum(1)}

    def embed_images(self, images: Tensor) -> Tensor:
        return images.float().flatten(1) @ self.image


def with_similarity(tiny_run: Compose, *overrides: str) -> tuple[Parts, Similarity]:
    parts = assembly.assemble(tiny_run(*overrides))
    parts.stack.reward = reward = Similarity()
    return parts, reward


def sample(parts: Parts, prompts: Sequence[Prompt]) -> None:
    with parts.ledger.during("rollout"):
        parts.stack.sample(prompts, Sampler(STEPS), range(len(prompts)))


def test_evaluation_costs_the_method_nothing() -> None:
    ledger = Ledger()
    with ledger.during("rollout"):
        ledger.count(nfe=5, flops=10, images=2)
        with ledger.during("evaluation"):
            ledger.count(nfe=100, flops=1000)
    with ledger.during("training"):
        ledger.count(nfe=7, backward=3, flops=4)
    row = ledger.row()
    assert (row["nfe"], row["backward"], row["flops"], row["images"]) == (12, 3, 14, 2)
    assert row["phases"]["evaluation"]["nfe"] == 100


def test_seconds_of_reward_calls_are_the_methods() -> None:
    ledger = Ledger()
    with ledger.during("evaluation"), ledger.scoring():
        pass
    assert ledger.seconds["reward"] == 0 < ledger.seconds["evaluation"]
    with ledger.during("rollout"), ledger.scoring():
        pass
    assert 0 < ledger.seconds["reward"] < ledger.seconds["rollout"]


def test_a_text_counts_once_for_the_method_and_once_for_evaluation() -> None:
    ledger = Ledger()
    with ledger.during("rollout"):
        ledger.read("policy", ["a", "b", "a"], 10)
    with ledger.during("evaluation"):
        ledger.read("policy", ["b", "c"], 10)
    with ledger.during("training"):
        ledger.read("policy", ["b", "c"], 10)
        ledger.read("reward", ["b"], 3)
    row = ledger.row()
    assert row["flops"] == 3 * 10 + 3
    assert {phase: counts["flops"] for phase, counts in row["phases"].items()} == {
        "rollout": 33,
        "training": 0,
        "evaluation": 20,
    }


def test_state_round_trip() -> None:
    ledger, restored = Ledger(), Ledger()
    with ledger.during("training"):
        ledger.count(nfe=7, flops=15)
        ledger.read("policy", ["a"], 4)
    ledger.optimizer_steps = 4
    restored.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert restored.row() == ledger.row()
    restored.read("policy", ["a"], 4)  # encoded again after an interruption
    assert restored.row()["flops"] == 19


def test_counts_of_all_processes_add_up_and_their_common_texts_count_once() -> None:
    mine, other = Ledger(), Ledger()
    mine.count(nfe=3, flops=2**60)
    other.count(nfe=1, flops=1)
    mine.read("policy", ["a", "b"], 10)
    other.read("policy", ["b", "c"], 10)

    asked: list[dict[str, float]] = []
    other.row(lambda values: asked.append(values) or values)  # type: ignore[func-returns-value]
    turn = iter(range(3))

    def join(values: dict[str, float]) -> dict[str, float]:
        theirs = asked[next(turn)]
        return {name: values.get(name, 0) + theirs.get(name, 0) for name in values | theirs}

    row = mine.row(join)
    assert (row["nfe"], row["flops"]) == (4, 2**60 + 1 + 3 * 10)  # a float would lose the 1
    assert isinstance(row["flops"], int)


def joined(ledgers: Sequence[Ledger]) -> dict[str, Any]:
    """The state that the main process of several saves."""
    asked: list[list[dict[str, float]]] = []
    for ledger in ledgers:
        asked.append([])
        ledger.state_dict(lambda values: asked[-1].append(dict(values)) or values)  # type: ignore[func-returns-value]
    turns = iter(zip(*asked, strict=True))

    def join(values: dict[str, float]) -> dict[str, float]:
        parts = next(turns)
        return {name: sum(part.get(name, 0) for part in parts) for part in parts for name in part}

    return json.loads(json.dumps(ledgers[0].state_dict(join)))  # type: ignore[no-any-return]


def continued(state: Mapping[str, Any], processes: int) -> list[Ledger]:
    ledgers = [Ledger() for _ in range(processes)]
    for rank, ledger in enumerate(ledgers):
        ledger.seconds["training"] = 100.0  # getting ready again is no part of the run
        ledger.load_state_dict(state, main=rank == 0)
    return ledgers


def total(ledgers: Sequence[Ledger]) -> float:
    return sum(ledger.gpu_seconds() for ledger in ledgers)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2), (2, 3)])
def test_seconds_of_all_processes_go_on_with_another_number_of_them(before: int, after: int) -> None:
    ledgers = [Ledger() for _ in range(before)]
    for rank, ledger in enumerate(ledgers):
        ledger.seconds |= {"rollout": 3.0 + rank, "training": 2.0, "evaluation": 50.0}
    spent = total(ledgers)
    assert spent == {1: 5.0, 2: 11.0}[before]
    again = continued(joined(ledgers), after)
    assert total(again) == spent
    assert again[0].clocks()["total"] == 5.0  # the main process's own, as before
    again[-1].seconds["training"] += 4.0
    third = continued(joined(again), 1)
    assert total(third) == spent + 4.0


def test_a_state_of_an_earlier_version_has_the_main_process_seconds() -> None:
    ledger = Ledger()
    ledger.seconds["rollout"] = 3.0
    state = ledger.state_dict()
    del state["volatile"]["gpu_seconds"]
    assert total(continued(state, 1)) == 3.0


def test_a_reward_is_measured_on_its_first_call_and_texts_apart_from_images(tiny_run: Compose) -> None:
    parts, reward = with_similarity(tiny_run, "micro_batch=5")
    prompts = [parts.prompts[index % 3] for index in range(12)]
    sample(parts, prompts)
    sample(parts, prompts[:4])
    assert reward.scored == [5, 5, 2, 4]  # no call for the sake of measuring
    costs = parts.stack.flops
    denoiser_and_decoder = 16 * (STEPS * costs["denoiser"] + costs["decode"])
    assert parts.ledger.row()["flops"] == denoiser_and_decoder + 16 * IMAGE_FLOPS + 3 * (costs["text"] + TEXT_FLOPS)


def test_a_reward_that_is_differentiated_costs_two_passes_more(tiny_run: Compose) -> None:
    parts, _ = with_similarity(tiny_run)
    images = torch.rand(4, 3, SIDE, SIDE).requires_grad_()
    torch.autograd.backward(parts.stack.score(images, parts.prompts)["reward"].sum())
    assert images.grad is not None
    assert parts.ledger.row()["flops"] == 3 * 4 * IMAGE_FLOPS + 4 * TEXT_FLOPS


def test_the_policys_texts_cost_what_its_encoders_do(tiny_run: Compose) -> None:
    parts, _ = with_similarity(tiny_run)
    with FlopCounterMode(display=False) as counter:
        parts.policy.encode([prompt.text for prompt in parts.prompts])
    assert parts.stack.flops["text"] > 0
    assert counter.get_total_flops() == len(parts.prompts) * parts.stack.flops["text"]


def test_guidance_reads_the_empty_text_once(tiny_run: Compose) -> None:
    parts, _ = with_similarity(tiny_run)
    for _ in range(2):
        parts.stack.sample(parts.prompts[:2], Sampler(STEPS, guidance=4.0), [0, 1], score=False)
    costs = parts.stack.flops
    assert parts.ledger.row()["flops"] == 2 * 2 * 2 * STEPS * costs["denoiser"] + 3 * costs["text"]


def test_memory_that_runs_out_while_a_reward_is_measured(tiny_run: Compose) -> None:
    plain, _ = with_similarity(tiny_run, "micro_batch=8")
    starved, reward = with_similarity(tiny_run, "micro_batch=8")
    reward.fits = 2
    prompts = [plain.prompts[index % 4] for index in range(8)]
    sample(plain, prompts)
    sample(starved, prompts)
    assert reward.scored == [8, 4, 2, 2, 2, 2]
    assert starved.ledger.row() == plain.ledger.row()
    assert starved.ledger.wasted_nfe == (8 + 4) * STEPS
    assert starved.stack.micro_batch.size == 2


def test_every_number_of_a_row_is_whole(tiny_run: Compose) -> None:
    parts, _ = with_similarity(tiny_run)
    sample(parts, parts.prompts)
    row = parts.ledger.row()
    numbers = [row[name] for name in row if name != "phases"] + [
        n for part in row["phases"].values() for n in part.values()
    ]
    assert all(type(number) is int for number in numbers)


def test_a_score_that_is_not_finite_is_of_a_sample_of_the_run(tiny_run: Compose) -> None:
    parts, reward = with_similarity(tiny_run, "micro_batch=3")
    reward.texts[parts.prompts[2].text] = torch.full((1, WIDTH), torch.nan)
    prompts = [parts.prompts[index // 4] for index in range(12)]
    with pytest.raises(RewardError, match=r"reward is nan for image 8 of prompt prompts/00002"):
        sample(parts, prompts)
    with pytest.raises(RewardError, match=r"reward is nan for image 108 of prompt prompts/00002"):
        parts.stack.sample(prompts, Sampler(STEPS), range(12), ids=range(100, 112))
    with pytest.raises(RewardError, match=r"reward is nan for image 1 of a micro-batch of 2 of prompt prompts/00002"):
        parts.stack.score(torch.rand(2, 3, SIDE, SIDE), [parts.prompts[0], parts.prompts[2]])


def test_a_branch_that_has_no_finite_score_is_named_by_its_place_among_all(tiny_run: Compose) -> None:
    parts, reward = with_similarity(tiny_run, "micro_batch=4")
    reward.texts[parts.prompts[1].text] = torch.full((1, WIDTH), torch.nan)
    sampler = Sampler(STEPS, stochastic="flow", noise_level=0.7)  # two births of three branches: six a trunk
    with pytest.raises(RewardError, match=r"reward is nan for image 66 of prompt prompts/00001"):
        parts.stack.branch(
            parts.prompts[:2], sampler, [0, 1], branches=3, step_seeds=lambda *key: hash(key), ids=[10, 11]
        )


def test_no_images_cost_nothing_and_measure_nothing(tiny_run: Compose) -> None:
    parts, reward = with_similarity(tiny_run)
    parts.stack.embed(torch.rand(0, 3, SIDE, SIDE), reward)
    assert parts.ledger.row()["flops"] == 0
    parts.stack.embed(torch.rand(2, 3, SIDE, SIDE), reward)
    assert parts.ledger.row()["flops"] == 2 * IMAGE_FLOPS


def test_the_first_limit_ends_the_run() -> None:
    budget = Budget({"nfe": 100, "images": 10, "flops": None})
    assert budget.fraction({"nfe": 20, "images": 5, "flops": 1e20}) == 0.5
    with pytest.raises(BudgetError, match=r"budget.nfe is 0: it must be positive"):
        Budget({"nfe": 0})
    for limit in (float("nan"), float("inf"), -1):
        with pytest.raises(BudgetError, match=r"budget.nfe is (nan|inf|-1): it must be positive, and finite"):
            Budget({"nfe": limit})
    with pytest.raises(BudgetError, match="the run would never end"):
        Budget({"nfe": None})
