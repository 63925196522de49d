"""The door to a user's reward: what it may return, and the sentence that says what it did wrong."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from alignbench import assembly
from alignbench.errors import AlignbenchError, ConfigError, DataError, RewardError, RewardMemoryError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards import foreign
from alignbench.rewards.reward import Reward, WeightedSum
from alignbench.run import run
from alignbench.sampling.rollout import Sampler
from tests.conftest import Compose
from tests.stand_ins import Red

PROMPTS = [Prompt(f"p/{index}", text) for index, text in enumerate(("a cat", "a dog", "a cow"))]
IMAGES = torch.linspace(0, 1, 3 * 3 * 2 * 2).view(3, 3, 2, 2)
DOING = r"^reward own, scoring 3 images from prompt p/0 \('a cat'\) on, "


class Own(Reward):
    """A user's reward that does what it is given to do."""

    name = "own"

    def __init__(self, do: Callable[[Tensor], Any] = lambda images: images.mean(dim=(1, 2, 3))) -> None:
        self.do = do

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        return self.do(images)


class Faulty(Reward):
    """Makes one mistake, when the mean of the images was asked for a number of times, unless it was corrected."""

    name = "faulty"
    corrected: ClassVar[bool] = False
    calls: ClassVar[int] = 0

    def __init__(self, fault: str = "raise", after: int = 0) -> None:
        self.fault, self.after = fault, after

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        Faulty.calls += 1
        values = images.mean(dim=(1, 2, 3))
        if Faulty.corrected or Faulty.calls <= self.after:
            return {"reward": values}
        if self.fault == "exit":
            sys.exit(3)
        if self.fault == "memory":
            raise MemoryError("of the reward's machine")
        return 1 / 0


@pytest.fixture
def faulty() -> None:
    Faulty.corrected, Faulty.calls = False, 0


def raises(error: BaseException) -> Callable[[Tensor], Any]:
    def do(images: Tensor) -> Any:
        raise error

    return do


# What is accepted


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        np.array([1.0, 2.0, 3.0]),
        np.array([3, 2, 1], dtype=np.uint8)[::-1],
        np.array([1, 2, 3], dtype=">i4"),
        [1, 2.0, 3],
        (1.0, 2.0, 3.0),
        [np.float32(1), np.float64(2), np.int64(3)],
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_one_number_an_image_is_accepted_in_any_form(given: Any, named: bool) -> None:
    scores = foreign.score(Own(lambda _: {"reward": given} if named else given), IMAGES, PROMPTS)
    assert list(scores) == ["reward"]
    assert scores["reward"].dtype == torch.float32
    assert scores["reward"].tolist() == [1.0, 2.0, 3.0]


def test_true_and_false_are_one_and_zero() -> None:
    assert foreign.score(Own(lambda _: [True, False, True]), IMAGES, PROMPTS)["reward"].tolist() == [1, 0, 1]


def test_the_reward_comes_first_whatever_the_order() -> None:
    scores = foreign.score(Own(lambda _: {"count": [1, 2, 3], "reward": [4, 5, 6]}), IMAGES, PROMPTS)
    assert {name: values.tolist() for name, values in scores.items()} == {"reward": [4, 5, 6], "count": [1, 2, 3]}
    assert next(iter(scores)) == "reward"


def test_numbers_are_of_the_images_precision() -> None:
    assert foreign.score(Own(), IMAGES.double(), PROMPTS)["reward"].dtype == torch.float64


def test_what_a_reward_returned_stays_as_it_was() -> None:
    buffer = torch.zeros(3)
    reward = Own(lambda images: buffer.copy_(images.mean(dim=(1, 2, 3))))
    first = foreign.score(reward, IMAGES, PROMPTS)["reward"]
    before = first.tolist()
    foreign.score(reward, 1 - IMAGES, PROMPTS)
    assert first.tolist() == before


@pytest.mark.parametrize(
    "changes",
    [
        lambda images: images.zero_(),
        lambda images: images.detach().numpy().fill(0),
        lambda images: images.data.mul_(255),
    ],
)
def test_images_changed_in_place_are_the_rewards_own(changes: Callable[[Tensor], Any]) -> None:
    """The scorer that comes next, another part of a sum and a gradient see the images that were sampled."""

    def do(images: Tensor) -> Tensor:
        values = images.mean(dim=(1, 2, 3))
        changes(images)
        return values

    before = IMAGES.clone()
    expected = foreign.score(Red(), before, PROMPTS)["reward"]
    total = WeightedSum({"own": (Own(do), 1.0), "red": (Red(), 1.0)})
    scores = foreign.score(total, before, PROMPTS)
    assert torch.equal(scores["red/reward"], expected)
    assert torch.equal(before, IMAGES)


# What is refused


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"gave None \(is a return missing\?\): expected named tensors"),
        ("high", "gave a str: expected named tensors"),
        (0.5, "gave a float: expected named tensors"),
        ({}, "gave scores named nothing: expected one named 'reward' among them"),
        ({"score": [1, 2, 3]}, "gave scores named score: expected one named 'reward'"),
        ({1: [1, 2, 3]}, "gave a dict: expected named tensors"),
        ([1, 2], "as 'reward' gave a list of 2: expected a tensor, an array or a list of 3 real numbers, one an image"),
        ([1, 2, None], "gave a list of 3 of object"),
        (["1", "2", "3"], "gave a list of 3 of <U1"),
        ([[1], [2, 3], [4]], "gave a list of 3: expected"),
        ([[1], [2], [3]], "gave a list of 3: expected"),
        ([10**400, 1, 2], "gave a list of 3 of object"),
        (torch.zeros(3, 1), r"gave a tensor of shape \[3, 1\] and torch.float32: expected"),
        (torch.tensor(0.5), r"gave a tensor of shape \[\]"),
        (torch.zeros(3, dtype=torch.complex64), ".* and torch.complex64: expected"),
        (np.zeros(3, dtype=complex), r"gave an array of shape \[3\] of complex128"),
        (np.array(["a", "b", "c"]), r"gave an array of shape \[3\] of <U1"),
        (np.zeros((3, 2)), r"gave an array of shape \[3, 2\]: expected"),
        ({"reward": [1, 2, 3], "extra": [1, 2]}, "as 'extra' gave a list of 2: expected"),
        ({"reward": [1, 2, 3], "extra": 1j * np.ones(3)}, "as 'extra' gave an array"),
        ({"reward": [1, 2, 3], "extra": None}, "as 'extra' gave None"),
        (torch.zeros(3, device="meta"), "raised NotImplementedError"),
    ],
)
def test_what_is_no_reward_is_one_sentence(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"{DOING}(as 'reward' )?{message}") as raised:
        foreign.score(Own(lambda _: returned), IMAGES, PROMPTS)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("the same command continues")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ZeroDivisionError("division by zero"),
            r"raised ZeroDivisionError: division by zero \(test_user_rewards.py, line ",
        ),
        (KeyError("tag"), "raised KeyError: 'tag'"),
        (ValueError("two\nlines"), "raised ValueError: two lines"),
        (RuntimeError("x" * 9999), "raised RuntimeError: x+[.]{3}"),
        (StopIteration(), "raised StopIteration"),
        (RecursionError(), "raised RecursionError"),
        (Unprintable(), "raised .*Unprintable: <exception str\\(\\) failed>"),
        (SystemExit(0), "raised SystemExit: 0"),
        (OSError(5, "Input/output error"), "raised OSError"),
    ],
)
def test_whatever_a_reward_raises_is_one_sentence(error: BaseException, message: str) -> None:
    with pytest.raises(RewardError, match=DOING + message) as raised:
        foreign.score(Own(raises(error)), IMAGES, PROMPTS)
    assert raised.value.__cause__ is error
    assert len(str(raised.value)) < 600


def test_ctrl_c_goes_through_and_so_do_sentences() -> None:
    with pytest.raises(KeyboardInterrupt):
        foreign.score(Own(raises(KeyboardInterrupt())), IMAGES, PROMPTS)
    with pytest.raises(DataError, match="as it was said"):
        foreign.score(Own(raises(DataError("as it was said"))), IMAGES, PROMPTS)


def test_texts_and_checks_go_through_the_same_door() -> None:
    class Reads(Own):
        def encode(self, prompts: Sequence[Prompt]) -> None:
            raise OSError("no tokenizer")

        def check(self, prompts: Sequence[Prompt]) -> None:
            raise KeyError("include")

    with pytest.raises(RewardError, match=r"reward own, encoding 3 texts from prompt p/0 \('a cat'\) on, raised OSErr"):
        foreign.encode(Reads(), PROMPTS)
    with pytest.raises(RewardError, match="reward own, checking 3 prompts, raised KeyError: 'include'"):
        foreign.check(WeightedSum({"own": (Reads(), 2.0)}), PROMPTS)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(3), "gave a tensor of shape .3. and torch.float32: expected a tensor of shape .3, features."),
        (np.zeros((3, 4)), "gave an array of shape"),
        (torch.full((3, 4), torch.nan), "gave vectors that are not finite"),
    ],
)
def test_embeddings_of_another_shape(vectors: Any, message: str) -> None:
    class Embeds(Own):
        def embed_images(self, images: Tensor) -> Any:
            return vectors

    with pytest.raises(RewardError, match=f"scorer own, embedding 3 images, {message}"):
        foreign.embed(Embeds(), IMAGES)


# Gradients


def test_a_gradient_passes_the_door_unchanged() -> None:
    images = IMAGES.clone().requires_grad_()
    foreign.score(Own(lambda images: (images**2).sum(dim=(1, 2, 3))), images, PROMPTS)["reward"].sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, 2 * IMAGES)


def test_a_gradient_passes_a_list_of_tensors() -> None:
    images = IMAGES.clone().requires_grad_()
    foreign.score(Own(lambda images: [each.sum() for each in images]), images, PROMPTS)["reward"].sum().backward()
    assert images.grad is not None
    assert images.grad.eq(1).all()


WEIGHT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    "do",
    [
        lambda images: images.detach().mean(dim=(1, 2, 3)),
        lambda images: images.mean(dim=(1, 2, 3)).tolist(),
        lambda images: WEIGHT * images.detach().mean(dim=(1, 2, 3)),  # a gradient, but not of the images
        torch.no_grad()(lambda images: images.mean(dim=(1, 2, 3))),
    ],
)
def test_a_reward_that_loses_the_gradient_is_named(do: Callable[[Tensor], Any]) -> None:
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(RewardError, match=DOING + "gave a reward without a gradient with respect to the images"):
        foreign.score(Own(do), images, PROMPTS)
    parts = {"own": (Own(do), 1.0), "red": (Red(), 1.0)}  # the other part's gradient would hide it
    with pytest.raises(RewardError, match=r"reward own, .* without a gradient"):
        foreign.score(WeightedSum(parts), images, PROMPTS)


def test_a_reward_keeps_its_switches_to_itself() -> None:
    def switches(images: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return images.mean(dim=(1, 2, 3))

    foreign.score(Own(switches), IMAGES, PROMPTS)
    assert torch.is_grad_enabled()


def test_without_gradients_none_is_kept() -> None:
    assert not foreign.score(Own(lambda images: WEIGHT * images[:, 0, 0, 0]), IMAGES, PROMPTS)["reward"].requires_grad


# Whole runs


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"raised ZeroDivisionError: division by zero \(test_user_rewards.py, line \d+\)"),
        ("exit", "raised SystemExit: 3"),
    ],
)
def test_the_run_has_failed_and_continues_once_the_reward_is_corrected(
    tiny_run: Compose, fault: str, message: str
) -> None:
    config = tiny_run()
    node = {"_target_": f"{__name__}.Faulty", "fault": fault, "after": 4}  # in the second iteration
    config.reward.parts = {"faulty": {"weight": 1.0, "shapes": node}}
    with pytest.raises(RewardError, match=f"^reward faulty, scoring 8 images from prompt prompts/.*{message}"):
        run(config)
    (file,) = Path(config.results).rglob("status.json")
    status = json.loads(file.read_text())
    assert status["status"] == "failed"
    assert "reward faulty" in status["message"]
    Faulty.corrected = True
    assert json.loads((run(config) / "status.json").read_text())["status"] == "done"


@pytest.mark.usefixtures("faulty")
def test_memory_that_runs_out_in_a_reward_halves_the_batch_and_ends_the_run_at_one_image(tiny_run: Compose) -> None:
    config = tiny_run("micro_batch=4")
    config.reward.parts = {
        "faulty": {"weight": 1.0, "shapes": {"_target_": f"{__name__}.Faulty", "fault": "memory", "after": 5}}
    }
    message = r"reward faulty, scoring 1 image of prompt .* raised MemoryError: of the reward's machine"
    with pytest.raises(RewardMemoryError, match=message):
        run(config)
    assert Faulty.calls >= 5 + 3  # of 4, of 2, of 1
    (file,) = Path(config.results).rglob("status.json")
    assert json.loads(file.read_text())["status"] == "failed"


def test_other_names_in_another_batch_are_refused(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("micro_batch=3"))
    parts.stack.reward = Own(
        lambda images: {"reward": images[:, 0, 0, 0]} | ({"odd": images[:, 0, 0, 0]} if len(images) == 2 else {})
    )
    prompts = [parts.prompts[index % 4] for index in range(8)]
    with pytest.raises(RewardError, match="gave the scores reward, odd, and reward before: it must give the same"):
        parts.stack.sample(prompts, Sampler(3), range(8))


class Unhashable(Own):
    __hash__ = None  # type: ignore[assignment]


def test_a_reward_need_not_be_hashable_nor_name_its_scores(tiny_run: Compose) -> None:
    config = tiny_run(reward=f"{__name__}.Unhashable")
    assert json.loads((run(config) / "status.json").read_text())["status"] == "done"


class Wanders(Own):
    """Leaves the working directory that it was called in."""

    name = "wanders"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        os.chdir("/")
        return super().score(images, prompts)


def test_relative_results_survive_a_change_of_directory(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(tiny_run("results=here", reward=f"{__name__}.Wanders"))
    assert Path.cwd() == tmp_path
    assert folder == Path("here/default/shapes/red/diffusion_nft/seed0")
    assert json.loads((tmp_path / folder / "status.json").read_text())["status"] == "done"


class Raises:
    def __init__(self) -> None:
        raise FileNotFoundError(2, "No such file or directory", "weights.pt")


class Nameless(Reward):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"reward": images[:, 0, 0, 0]}


class Unfinished(Reward):
    name = "unfinished"


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("Raises", RewardError, "reward.parts.red.shapes, when it was made, raised FileNotFoundError: .*weights.pt"),
        ("Nameless", ConfigError, "which makes a Nameless: it must make an .*Reward whose `name` is text"),
        ("Unfinished", RewardError, "raised TypeError: Can't instantiate abstract class Unfinished"),
        ("raises", ConfigError, "reward.parts.red.shapes.error is missing"),
        ("WEIGHT", ConfigError, "WEIGHT', a Tensor: it must be the name of a class"),
    ],
)
def test_what_cannot_be_made_a_reward(
    tiny_run: Compose, target: str, error: type[AlignbenchError], message: str
) -> None:
    config = tiny_run("model.policy.source=/nowhere", reward=f"{__name__}.{target}")
    with pytest.raises(error, match=message):
        run(config)
    assert not Path(config.results).exists()


# Anything else

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.builds(torch.tensor, st.floats(width=32)),
    st.builds(np.float16, st.floats(width=16)),
)
ARRAYS = arrays.arrays(
    st.one_of(arrays.scalar_dtypes(), arrays.unicode_string_dtypes()),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64]
TENSORS = st.builds(
    lambda shape, dtype, layout: torch.ones(shape).to(dtype).to_sparse() if layout else torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.booleans(),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, ARRAYS, TENSORS, st.binary(max_size=4), st.just(object()), st.just(len)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(NUMBERS, min_size=3, max_size=3),
        st.tuples(inner, inner, inner),
        st.dictionaries(st.one_of(st.sampled_from(["reward", "extra"]), st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(VALUES, st.booleans(), st.booleans())
def test_nothing_but_sentences_leaves_the_door(value: Any, named: bool, differentiable: bool) -> None:
    images = IMAGES.clone().requires_grad_(differentiable)
    with suppress(RewardError):
        scores = foreign.score(Own(lambda _: {"reward": value} if named else value), images, PROMPTS)
        assert next(iter(scores)) == "reward"
        for values in scores.values():
            assert (values.shape, values.dtype, values.layout) == ((3,), torch.float32, torch.strided)
