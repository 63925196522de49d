"""GenEval as a reward, on rendered scenes whose scores are worked out by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench.errors import ConfigError, DataError, RewardError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.reward import SCORES, ExactSceneReward, GenevalReward
from alignbench.rewards.reward import check_finite
from alignbench.shapes.captions import records
from alignbench.shapes.render import render
from alignbench.shapes.scenes import PALETTE, Object, sample_scene

RED_CIRCLE = Object("circle", "red", 7, 7, 6)
GREEN_CIRCLE = Object("circle", "green", 24, 24, 5)
BLUE_SQUARE = Object("square", "blue", 24, 7, 5)
BAR = Object("bar", "white", 0, 0, 0)  # no object of the world


def images_of(*scenes: tuple[Object, ...]) -> Tensor:
    """Rendered scenes as float32 [n, 3, 32, 32]; ``BAR`` becomes a long white bar at the bottom."""
    pixels = render([tuple(thing for thing in scene if thing is not BAR) for scene in scenes])
    for image, scene in zip(pixels, scenes, strict=True):
        if BAR in scene:
            image[30:32, 2:16] = PALETTE["white"]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def prompt(record: Mapping[str, Any]) -> Prompt:
    return Prompt("test/0000", record["prompt"], record)


CIRCLE = suite.single_object("circle")
RED = suite.colors("circle", "red")
TWO_CIRCLES = suite.counting("circle", 2)
LEFT = suite.position("circle", "left of", "square")


@pytest.mark.parametrize(
    ("record", "scene", "expected"),
    [
        # official, strict, soft, exact scene, objects, invalid share
        (CIRCLE, (RED_CIRCLE,), (1, 1, 1, 1, 1, 0)),
        (CIRCLE, (), (0, 0, 0, 0, 0, 0)),
        (CIRCLE, (RED_CIRCLE, BLUE_SQUARE), (1, 1, 1, 0, 2, 0)),
        (CIRCLE, (RED_CIRCLE, GREEN_CIRCLE), (1, 0, 0, 0, 2, 0)),
        (CIRCLE, (RED_CIRCLE, BAR), (1, 1, 1, 0, 1, 0.5)),
        (CIRCLE, (BAR,), (0, 0, 0, 0, 0, 1)),
        (RED, (RED_CIRCLE, GREEN_CIRCLE), (1, 0, 0, 0, 2, 0)),
        (RED, (GREEN_CIRCLE,), (0, 0, 0.5, 0, 1, 0)),
        (TWO_CIRCLES, (RED_CIRCLE, GREEN_CIRCLE), (1, 1, 1, 1, 2, 0)),
        (TWO_CIRCLES, (RED_CIRCLE,), (0, 0, 0.5, 0, 1, 0)),
        (LEFT, (RED_CIRCLE, BLUE_SQUARE), (1, 1, 1, 1, 2, 0)),
        (LEFT, (GREEN_CIRCLE, BLUE_SQUARE), (0, 0, 2 / 3, 0, 2, 0)),
    ],
)
def test_scores(record: Mapping[str, Any], scene: tuple[Object, ...], expected: tuple[float, ...]) -> None:
    scores = GenevalReward().score(images_of(scene), [prompt(record)])
    assert list(scores) == ["reward", *SCORES]
    assert [scores[name].item() for name in SCORES] == pytest.approx(expected)
    assert scores["reward"].item() == scores["geneval_soft"].item()


# A circle beside a second one: right officially only; the soft score of three is below both.
THREE = (RED_CIRCLE, GREEN_CIRCLE, Object("circle", "blue", 24, 7, 4))


@pytest.mark.parametrize(
    ("reward", "name", "values"),
    [
        (GenevalReward("official"), "geneval_official", [1, 1, 1, 0]),
        (GenevalReward("strict"), "geneval_strict", [1, 1, 0, 0]),
        (GenevalReward("soft"), "geneval", [1, 1, -1, 0]),
        (GenevalReward("soft_released"), "geneval_soft_released", [1, 1, -1, 0]),
        (ExactSceneReward(), "exact_scene", [1, 0, 0, 0]),
    ],
)
def test_the_reward_is_the_score_it_is_named_for(reward: GenevalReward, name: str, values: list[float]) -> None:
    images = images_of((RED_CIRCLE,), (RED_CIRCLE, BLUE_SQUARE), THREE, (BLUE_SQUARE,))
    scores = reward.score(images, [prompt(CIRCLE)] * 4)
    assert reward.name == name
    assert not reward.differentiable
    assert next(iter(scores)) == "reward"
    assert scores["reward"].tolist() == values
    assert {value.dtype for value in scores.values()} == {torch.float32}


def test_a_wrong_relation_scores_higher_in_the_released_code() -> None:
    wrong = images_of((GREEN_CIRCLE, BLUE_SQUARE))
    for mode, value in (("soft", 2 / 3), ("soft_released", 3 / 4), ("strict", 0)):
        scores = GenevalReward(mode).score(wrong, [prompt(LEFT)])  # type: ignore[arg-type]
        assert list(scores) == ["reward", *SCORES]
        assert scores["reward"].item() == pytest.approx(value)


def test_each_image_has_its_own_prompt() -> None:
    images = images_of((RED_CIRCLE,), (RED_CIRCLE,), (BLUE_SQUARE,))
    prompts = [prompt(CIRCLE), prompt(suite.single_object("square")), prompt(suite.colors("square", "blue"))]
    assert GenevalReward().score(images, prompts)["reward"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("tag", suite.TAGS)
def test_sampled_scenes_of_every_tag_are_right(tag: str) -> None:
    rng = np.random.default_rng(0)
    some = [record for record in records() if record["tag"] == tag][:40]
    scenes = [sample_scene(record, rng) for record in some]
    scores = ExactSceneReward().score(images_of(*scenes), [prompt(record) for record in some])
    right = {name: scores[name].mean().item() for name in ("geneval", "geneval_strict", "geneval_soft", "exact_scene")}
    assert right == {"geneval": 1, "geneval_strict": 1, "geneval_soft": 1, "exact_scene": 1}


def test_images_are_scored_as_eight_bits() -> None:
    images = images_of((RED_CIRCLE, BLUE_SQUARE), THREE)
    levels = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    nudged = (images + 0.98 * (levels - 0.5) / 255).clamp(0, 1)  # less than half a level
    assert not torch.equal(nudged, images)
    before, after = (GenevalReward("soft").score(part, [prompt(LEFT), prompt(CIRCLE)]) for part in (images, nudged))
    for name, values in before.items():
        assert torch.equal(after[name], values)


def test_an_image_that_is_not_finite_has_no_score() -> None:
    images = images_of((RED_CIRCLE,), (RED_CIRCLE,), (RED_CIRCLE,))
    images[1, 0, 5, 5] = torch.nan
    images[2, 0, 5, 5] = torch.inf
    prompts = [prompt(CIRCLE)] * 3
    scores = GenevalReward().score(images, prompts)
    for values in scores.values():
        assert values.isnan().tolist() == [False, True, True]
    with pytest.raises(RewardError, match=r"image b of prompt test/0000"):
        check_finite(scores, prompts, ["a", "b", "c"])


def test_a_prompt_without_a_record_is_named() -> None:
    prompts = [prompt(CIRCLE), Prompt("mine/0007", "a photo of something")]
    with pytest.raises(DataError, match=r"mine/0007 .*something.* has no GenEval record"):
        GenevalReward().score(images_of((RED_CIRCLE,), (RED_CIRCLE,)), prompts)


@pytest.mark.parametrize("record", [suite.single_object("dog"), suite.colors("circle", "orange")])
def test_a_prompt_of_another_world_is_named(record: Mapping[str, Any]) -> None:
    with pytest.raises(DataError, match=r"test/0000 .* asks for .*: expected a class of circle, square"):
        ExactSceneReward().score(images_of((RED_CIRCLE,)), [prompt(record)])


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="reward mode is 'hard': expected one of soft, soft_released, strict, official"
    ):
        GenevalReward("hard")  # type: ignore[arg-type]
