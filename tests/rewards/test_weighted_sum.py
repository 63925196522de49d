"""Weighted sums and the finiteness check."""

from collections.abc import Sequence

import pytest
import torch

from alignbench.errors import ConfigError, RewardError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import WeightedSum, check_finite
from tests.stand_ins import Constant, Red

PROMPTS = [Prompt("p/0", "a cat"), Prompt("p/1", "a dog")]
IMAGES = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)])


def test_a_sum_weighs_its_parts_and_reports_each() -> None:
    total = WeightedSum({"red": (Red(), 2.0), "bonus": (Constant(0.5), 0.4)})
    scores = total.score(IMAGES, PROMPTS)
    assert list(scores) == ["reward", "red/reward", "bonus/reward"]
    assert scores["reward"].tolist() == pytest.approx([0.7, 1.7])
    assert (total.name, total.differentiable) == ("red+bonus", False)


def test_a_part_of_weight_zero_is_not_computed() -> None:
    class Expensive(Constant):
        def score(self, images, prompts):  # type: ignore[no-untyped-def]
            raise AssertionError("computed")

    total = WeightedSum({"red": (Red(), 1.0), "expensive": (Expensive(), 0.0)})
    assert total.score(IMAGES, PROMPTS)["reward"].tolist() == [0.25, 0.75]
    assert total.differentiable


def test_gradients_flow_through_a_sum_of_differentiable_parts() -> None:
    images = IMAGES.clone().requires_grad_()
    WeightedSum({"red": (Red(), 3.0)}).score(images, PROMPTS)["reward"].sum().backward()
    expected = torch.zeros_like(IMAGES)
    expected[:, 0] = 3 / 16
    assert images.grad is not None
    torch.testing.assert_close(images.grad, expected)


def test_every_part_encodes_the_prompts() -> None:
    class Reader(Red):
        def __init__(self) -> None:
            self.read: list[Prompt] = []

        def encode(self, prompts: Sequence[Prompt]) -> None:
            self.read += prompts

    first, second = Reader(), Reader()
    WeightedSum({"first": (first, 1.0), "second": (second, 2.0), "red": (Red(), 1.0)}).encode(PROMPTS)
    assert first.read == second.read == PROMPTS


def test_weights_must_make_sense() -> None:
    with pytest.raises(ConfigError, match=r"reward.red.weight is -1: weights must be 0 or more"):
        WeightedSum({"red": (Red(), -1)})
    with pytest.raises(ConfigError, match="every reward has weight 0"):
        WeightedSum({"red": (Red(), 0)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    scores = {"reward": torch.tensor([0.0, bad])}
    with pytest.raises(RewardError, match=r"reward is (nan|inf) for image b of prompt p/1 \('a dog'\); 1 of 2 values"):
        check_finite(scores, PROMPTS, ["a", "b"])
