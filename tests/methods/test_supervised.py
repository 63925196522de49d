"""The supervised baselines: weights against NumPy, their limits, and the loss they make."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.methods.method import Clock, Experience
from alignbench.methods.supervised import Supervised, best, softmax_weights
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sets import draw
from alignbench.training import optimizer_step
from tests.conftest import Compose
from tests.stand_ins import Constant, Red

DOUBLE = ("model.policy.dtype=float64", "overlay=none", "method.algorithm.times=2")


def rewards() -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).normal(size=(3, 5)))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_weights_are_the_softmax_of_each_group(temperature: float) -> None:
    raised = np.exp(rewards().numpy() / temperature)
    expected = raised / raised.sum(axis=1, keepdims=True)
    weights = softmax_weights(rewards(), temperature)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())


def test_weights_know_rewards_only_by_their_differences_within_a_group() -> None:
    moved = rewards() + torch.tensor([[0.0], [1000.0], [-1e5]])
    torch.testing.assert_close(softmax_weights(moved, 0.5), softmax_weights(rewards(), 0.5), rtol=1e-9, atol=0)


def test_temperature_goes_from_the_best_image_to_all_alike() -> None:
    torch.testing.assert_close(softmax_weights(rewards(), 1e-4), best(rewards()))
    torch.testing.assert_close(softmax_weights(rewards(), 1e9), torch.full((3, 5), 0.2).double())


def test_the_first_of_several_best_images_is_kept() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0], [2.0, 2.0, 0.0], [0.0, 0.5, 1.0]])
    assert best(scores).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def collected(parts: Parts) -> tuple[Supervised, Experience]:
    method = parts.method
    assert isinstance(method, Supervised)
    prompts = draw(parts.prompts, method.batch.prompts, 0, 0, "none")
    return method, method.collect(parts.stack, prompts, Clock())


def image_rewards(parts: Parts, experience: Experience) -> np.ndarray:
    """Rewards of an iteration's images, decoded once more, ``[prompts, images]``."""
    with torch.no_grad():
        images = (parts.policy.decode(experience.terms["x_0"]) * 255).round() / 255
    return images[:, 0].mean((1, 2)).float().numpy().astype(float).reshape(2, 4)


@pytest.mark.parametrize("method", ["rwr", "best_of_n"])
def test_loss_is_the_mean_over_groups_of_weighted_flow_matching_errors(tiny_run: Compose, method: str) -> None:
    temperature = ["method.algorithm.temperature=0.01"] if method == "rwr" else []
    parts = assembly.assemble(tiny_run(*DOUBLE, f"method={method}", *temperature))
    supervised, experience = collected(parts)
    (update,) = supervised.updates(experience, parts.stack, Clock())
    batch = update.batch(range(update.atoms))
    loss = float(supervised.loss(parts.stack, update, batch).total.detach()) / update.denominator

    scores = image_rewards(parts, experience)
    if method == "rwr":
        weights = np.exp((scores - scores.max()) / 0.01)
        weights /= weights.sum(axis=1, keepdims=True)
    else:
        weights = (scores == scores.max(axis=1, keepdims=True)).astype(float)
    of_latent = {latent.numpy().tobytes(): index for index, latent in enumerate(experience.terms["x_0"])}
    total = 0.0
    for row in range(update.atoms):
        t = float(batch.terms["t"][row])
        x_0, noise = (batch.terms[name][row].numpy() for name in ("x_0", "noise"))
        x_t = torch.tensor(((1 - t) * x_0 + t * noise)[None])
        with torch.no_grad():
            v = parts.policy.predict(x_t, torch.tensor([t]).double(), batch.condition[row : row + 1])[0].numpy()
        total += weights[divmod(of_latent[x_0.tobytes()], 4)] * np.mean((v - (noise - x_0)) ** 2)
    assert update.atoms == {"rwr": 8, "best_of_n": 2}[method] * 2  # two times an image
    assert loss == pytest.approx(total / 2 / 2, rel=1e-6)  # two groups, two times


def stepped(parts: Parts) -> dict[str, torch.Tensor]:
    """Weights after one iteration."""
    method, experience = collected(parts)
    for update in method.updates(experience, parts.stack, Clock()):
        optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)
    return {name: value.detach().clone() for name, value in parts.policy.trainable_parameters().items()}


def test_a_cold_softmax_takes_the_step_of_best_of_n(tiny_run: Compose) -> None:
    cold = stepped(assembly.assemble(tiny_run(*DOUBLE, "method=rwr", "method.algorithm.temperature=1e-7")))
    hard = stepped(assembly.assemble(tiny_run(*DOUBLE, "method=best_of_n")))
    warm = stepped(assembly.assemble(tiny_run(*DOUBLE, "method=rwr", "method.algorithm.temperature=1")))
    torch.testing.assert_close(cold, hard, rtol=0, atol=1e-10)
    assert max((warm[name] - hard[name]).abs().max().item() for name in hard) > 1e-4


class RedButForOne(Red):
    """The mean of the red channel; the same for every image of one prompt."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        same = torch.tensor([prompt.text == self.prompt for prompt in prompts])
        return {"reward": super().score(images, prompts)["reward"].masked_fill(same, 0.5)}


@pytest.mark.parametrize("method", ["rwr", "best_of_n"])
def test_groups_of_one_reward_are_left_out_and_the_others_count_in_full(tiny_run: Compose, method: str) -> None:
    parts = assembly.assemble(tiny_run(*DOUBLE, f"method={method}"))
    first = draw(parts.prompts, 2, 0, 0, "none")[0]
    parts.stack.reward = RedButForOne(first.text)
    supervised, experience = collected(parts)
    assert experience.metrics["constant_groups"] == 0.5
    assert all(4 <= image < 8 for image in experience.kept)
    (update,) = supervised.updates(experience, parts.stack, Clock())
    weights = update.batch(range(update.atoms)).terms["weight"]
    assert float(weights.sum()) / update.denominator == pytest.approx(1)


class RoundedApart(Red):
    """One reward for all images, but for what float32 leaves between equal numbers."""

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        return {"reward": 1 + 1.2e-7 * (torch.arange(len(images)) % 2)}


@pytest.mark.parametrize("method", ["rwr", "best_of_n"])
def test_rounding_is_no_preference(tiny_run: Compose, method: str) -> None:
    parts = assembly.assemble(tiny_run(*DOUBLE, f"method={method}"))
    parts.stack.reward = RoundedApart()
    _, experience = collected(parts)
    assert experience.kept == []
    assert experience.metrics["constant_groups"] == 1
    assert experience.metrics["reward_std"] > 0
    assert experience.metrics["nearly_constant_groups"] == 1


@pytest.mark.parametrize("method", ["rwr", "best_of_n"])
def test_nothing_is_learned_from_a_constant_reward(tiny_run: Compose, method: str) -> None:
    parts = assembly.assemble(tiny_run(*DOUBLE, f"method={method}"))
    parts.stack.reward = Constant()
    supervised, experience = collected(parts)
    assert list(supervised.updates(experience, parts.stack, Clock())) == []
