"""Direct-Align, SRPO, ReFL and DRaFT: the paper's numbers, gradients against finite differences, exact counts."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import open_dict
from PIL import Image
from torch import Tensor

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.errors import ConfigError, DataError
from alignbench.methods.direct_align import (
    draw_position,
    endpoints,
    hinge,
    positions,
    preference_weight,
    recover,
    relative_reward,
    with_word,
)
from alignbench.methods.method import Clock, Experience
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sets import draw
from alignbench.seeding import seed_of
from alignbench.training import accumulate, optimizer_step
from tests.conftest import Compose

METHODS = ("srpo", "direct_align", "refl", "draft")
ALL_U = torch.arange(5, 996)


def ends(u: int, inverted: bool) -> tuple[float, float]:
    s_from, s_to = endpoints(torch.tensor([u]), torch.tensor([inverted]), positions(5, 25), 100)
    return round(s_from.item(), 4), round(s_to.item(), 4)


# Guidance as an input


def test_rollouts_may_read_another_guidance_input_than_training(
    tiny_run: Compose, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SRPO's scripts sample FLUX at guidance 1 (HPS) or 2 (PickScore) and train it at 3.5."""
    config = tiny_run(
        "model=flux_dev",
        "overlay=flux_dev_srpo",
        "method=srpo",
        f"model.policy.source={checkpoints['flux_dev']}",
        "model.policy.resolution=16",
        "model.policy.max_sequence_length=12",
        "method.batch.images=1",
        "method.batch.updates=1",
    )
    with open_dict(config):
        config.reward.parts.red.photo = config.reward.parts.red.shapes
    parts = assembly.assemble(config)
    read: list[float | None] = []
    predict = parts.policy.predict

    def noting(*given: object, guidance_embedding: float | None = None, **named: object) -> Tensor:
        read.append(guidance_embedding)
        return predict(*given, guidance_embedding=guidance_embedding, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.policy, "predict", noting)
    experience = parts.method.collect(parts.stack, draw(parts.prompts, 2, 0, 0, "none"), Clock())
    assert set(read) == {1.0}
    read.clear()
    (update,) = parts.method.updates(experience, parts.stack, Clock())
    accumulate(parts.stack, parts.method, update)
    assert set(read) == {None}  # the model's own
    assert parts.policy.guidance_embedding == 3.5  # type: ignore[attr-defined]


def test_a_guidance_input_needs_a_model_that_has_one(tiny_run: Compose) -> None:
    with pytest.raises(ConfigError, match=r"guidance_embedding is 2, but shapes has no guidance input: null here"):
        assembly.assemble(tiny_run("method=srpo", "method.batch.images=1", "method.rollout.guidance_embedding=2"))


# Equations


def test_positions_run_between_two_points_of_the_shifted_grid() -> None:
    """Shift 3 of 1 - 5/50 and 1 - 25/50: 2.7 / 2.8 and 1.5 / 2; the PickScore recipe ends at 1.2 / 1.8."""
    position = positions(5, 25)
    assert len(position) == 1000
    assert position[0].item() == pytest.approx(27 / 28, abs=1e-12)
    assert position[999].item() == pytest.approx(0.75, abs=1e-12)
    torch.testing.assert_close(position.diff(), torch.full((999,), (0.75 - 27 / 28) / 999, dtype=torch.float64))
    assert positions(5, 30)[999].item() == pytest.approx(2 / 3, abs=1e-12)


def test_both_branches_arrive_at_one_noise_level_from_opposite_sides() -> None:
    assert ends(500, inverted=False) == (0.8785, 0.8570)
    assert ends(500, inverted=True) == (0.8356, 0.8570)
    denoise, inversion = (
        endpoints(ALL_U, torch.full_like(ALL_U, inverted, dtype=torch.bool), positions(5, 25), 100)
        for inverted in (False, True)
    )
    assert torch.equal(denoise[1], inversion[1])
    assert (denoise[0] > denoise[1]).all()
    assert (inversion[0] < inversion[1]).all()


def test_steps_get_shorter_towards_both_ends_and_stay_inside() -> None:
    """In positions: u = 5 leaves index 995 for 990 and 999 (1000 is outside); u = 995 leaves index 5 for 0 and 10."""
    position = positions(5, 25)
    for u, inverted, start in ((5, False, 990), (5, True, 999), (60, True, 999), (995, False, 0), (995, True, 10)):
        s_from, s_to = endpoints(torch.tensor([u]), torch.tensor([inverted]), position, 100)
        assert (s_from, s_to) == (position[start], position[1000 - u])


def test_positions_are_drawn_from_the_whole_range() -> None:
    drawn = [draw_position(0, 3, sample) for sample in range(20_000)]
    assert (min(drawn), max(drawn)) == (5, 995)
    assert np.mean(drawn) == pytest.approx(500, abs=4 * 286 / 20_000**0.5)
    assert drawn[7] == draw_position(0, 3, 7) != draw_position(0, 4, 7)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_exact_velocity_recovers_the_image_for_every_pair(inverted: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(len(ALL_U), 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    s_from, s_to = endpoints(ALL_U, torch.full_like(ALL_U, inverted, dtype=torch.bool), positions(5, 25), 100)
    s = s_from.view(-1, 1, 1, 1)
    recovered = recover((1 - s) * x_0 + s * noise, noise - x_0, noise, s_from, s_to)
    torch.testing.assert_close(recovered, x_0, rtol=0, atol=1e-12)


def test_the_weight_grows_towards_noise_when_denoising_and_falls_when_inverting() -> None:
    """``a + (b - a) index / 999`` with the index of the cleaner end, counted from the clean side."""
    for u, start in ((500, 400), (5, 1), (60, 1), (101, 1), (950, 900)):
        k = [
            preference_weight(torch.tensor([u]), torch.tensor([inverted]), 100, (0.1, 0.25), (0.3, 0.01))
            for inverted in (False, True)
        ]
        assert k[0].item() == pytest.approx(0.1 + 0.15 * u / 999)
        assert k[1].item() == pytest.approx(0.3 - 0.29 * start / 999)


def test_the_relative_reward_swaps_the_words_in_the_inversion_branch() -> None:
    positive, negative, k = (torch.tensor(values) for values in ([7.0, 7.0], [2.0, 2.0], [0.1, 0.3]))
    r = relative_reward(positive, negative, k, torch.tensor([False, True]))
    torch.testing.assert_close(r, torch.tensor([1.1 * 7 - 2, 1.3 * 2 - 7]))


def test_the_hinge_ends_at_the_margin() -> None:
    r = torch.tensor([-1.0, 0.2, 0.7, 3.0], requires_grad=True)
    losses = hinge(r, 0.7)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([0.85, 0.25, 0.0, 0.0]))
    assert r.grad is not None
    assert r.grad[[0, 1, 3]].tolist() == [-0.5, -0.5, 0]


def test_both_branches_push_the_velocity_the_same_way() -> None:
    """The recovered image answers the velocity with opposite signs; with the words swapped the loss does not."""
    direction = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
    x, noise = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    inverted, u = torch.tensor([False, True]), torch.tensor([500, 500])
    s_from, s_to = endpoints(u, inverted, positions(5, 25), 100)
    gradients = []
    for swapped in (inverted, torch.tensor([False, False])):
        v = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        images = recover(x, v, noise, s_from, s_to)
        hinge(relative_reward(images @ direction, -images @ direction, torch.zeros(2), swapped), 1.0).sum().backward()
        gradients.append(v.grad)
    assert torch.nn.functional.cosine_similarity(*gradients[0], dim=0).item() == pytest.approx(1)  # type: ignore[misc]
    assert torch.nn.functional.cosine_similarity(*gradients[1], dim=0).item() == pytest.approx(-1)  # type: ignore[misc]


def test_control_words_stand_before_the_prompt_and_cycle() -> None:
    prompt = Prompt("a/1", "a dog", {"tag": "t"})
    texts = [with_word(prompt, ("Real", "Detail", "Flat"), step) for step in range(4)]
    assert [each.text for each in texts] == ["Real. a dog", "Detail. a dog", "Flat. a dog", "Real. a dog"]
    assert {(each.id, each.metadata["tag"]) for each in texts} == {("a/1", "t")}


# In the harness


def prepared(tiny_run: Compose, method: str, *overrides: str, reward: str = "tests.stand_ins.Worded") -> Parts:
    config = tiny_run(
        "model.policy.dtype=float64",
        f"method={method}",
        "overlay=none",
        "method.batch.prompts=4",
        "method.batch.images=1",
        "method.rollout.guidance=1",
        *overrides,
        reward=reward,
    )
    parts = assembly.assemble(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in parts.policy.trainable_parameters().values():  # away from B = 0, where A has no gradient
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return parts


def collected(parts: Parts, clock: Clock = Clock()) -> Experience:  # noqa: B008 - frozen
    prompts = draw(parts.prompts, parts.method.batch.prompts, 0, clock.iteration, "none")
    return parts.method.collect(parts.stack, prompts, clock)


def gradient(parts: Parts, experience: Experience, clock: Clock = Clock()) -> tuple[float, list[Tensor]]:  # noqa: B008
    """Sum of the losses of an iteration's only update, and its gradient."""
    (update,) = parts.method.updates(experience, parts.stack, clock)
    parameters = list(parts.policy.trainable_parameters().values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    sums, _ = accumulate(parts.stack, parts.method, update)
    return sums["loss"], [parameter.grad * update.denominator for parameter in parameters]  # type: ignore[operator]


def assert_gradient(parts: Parts, gradients: list[Tensor], value: Callable[[], float]) -> None:
    """Compare with the central difference of ``value`` along a random direction of all trained weights."""
    generator = torch.Generator().manual_seed(2)
    parameters = list(parts.policy.trainable_parameters().values())
    direction = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in parameters]
    derivative = sum((slope * along).sum().item() for slope, along in zip(gradients, direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            torch._foreach_add_(parameters, direction, alpha=step)
            values.append(value())
            torch._foreach_add_(parameters, direction, alpha=-step)
    assert derivative == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert abs(derivative) > 1e-4


def walk(parts: Parts, x: Tensor, prompts: list[Prompt], first: int, last: int, grid: Tensor) -> Tensor:
    """Euler steps ``first`` to ``last - 1`` on a grid."""
    condition = parts.policy.encode([prompt.text for prompt in prompts])
    for i in range(first, last):
        x = x + (grid[i + 1] - grid[i]) * parts.policy.predict(x, grid[i].expand(len(x)), condition)
    return x


def reward_of(parts: Parts, latents: Tensor, prompts: list[Prompt]) -> Tensor:
    return parts.stack.reward.score(parts.policy.decode(latents), prompts)["reward"]


def test_images_come_from_one_known_noise(tiny_run: Compose) -> None:
    """The noise that is injected is the noise that the image was sampled from, the same for every prompt."""
    parts = prepared(tiny_run, "srpo")
    grid = parts.policy.grid(3, "shifted_linspace")
    noises = []
    for iteration in (0, 1):
        experience = collected(parts, Clock(iteration))
        (update,) = parts.method.updates(experience, parts.stack, Clock(iteration))
        batch = update.batch(range(update.atoms))
        with torch.no_grad():
            walked = walk(parts, batch.terms["noise"], list(batch.prompts), 0, 3, grid)
        torch.testing.assert_close(walked, batch.terms["x_0"])
        assert all(torch.equal(noise, batch.terms["noise"][0]) for noise in batch.terms["noise"])
        noises.append(batch.terms["noise"][0])
    assert not torch.equal(*noises)


@pytest.mark.parametrize(
    ("relative", "inversion", "margin"), [(1, 1, 0.7), (1, 1, 0.05), (1, 0, 0.7), (0, 0, 0.7), (0, 1, 0.7)]
)
def test_loss_and_gradient_of_direct_align(tiny_run: Compose, relative: int, inversion: int, margin: float) -> None:
    """Against the equations written out image by image, in the sixth optimizer step; margin 0.05 cuts some rows off."""
    parts = prepared(
        tiny_run,
        "srpo",
        f"method.algorithm.relative={bool(relative)}",
        f"method.algorithm.inversion={bool(inversion)}",
        f"method.algorithm.margin={margin}",
        "method.algorithm.reward_scale=2",
    )
    clock = Clock(iteration=3, optimizer_steps=5)
    experience = collected(parts, clock)
    loss, gradients = gradient(parts, experience, clock)
    noise = parts.policy.noise([seed_of("initial noise", 0, 3, 0)])
    k_ends = ((0.1, 0.25), (0.3, 0.01))
    active = []

    def value() -> float:
        total = 0.0
        for row, prompt in enumerate(experience.prompts):
            u = draw_position(0, 3, experience.ids[row])
            j = min(100, u, 1000 - u)
            p = np.linspace(27 / 28, 0.75, 1000)
            x_0 = experience.terms["x_0"][row : row + 1]
            for inverted in range(1 + inversion):
                s_to, s_from = p[1000 - u], p[min(1000 - u + j, 999) if inverted else 1000 - u - j]
                x = (1 - s_from) * x_0 + s_from * noise
                v = parts.policy.predict(x, x.new_tensor([s_from]), parts.policy.encode([prompt.text]))
                latents = (x + (s_to - s_from) * v - s_to * noise) / (1 - s_to)
                if not relative:
                    total += (1 if inverted else -1) * reward_of(parts, latents, [prompt]).item() / 2
                    continue
                scores = [  # the sixth words of lists of four and of five
                    reward_of(parts, latents, [Prompt("", f"{word}. {prompt.text}")]).item()
                    for word in ("Detail", "Concept art")
                ]
                k = np.linspace(*k_ends[inverted], 1000)[max(u - j, 1) if inverted else u]
                wanted, unwanted = scores[::-1] if inverted else scores
                r = ((1 + k) * wanted - unwanted) / 2
                active.append(r < margin)
                total += max(0.0, margin - r) / 2
        return total

    with torch.no_grad():
        assert loss == pytest.approx(value())
    if margin < 0.1:
        assert len(set(active)) == 2
    assert_gradient(parts, gradients, value)


@pytest.mark.parametrize("last_steps", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_draft_differentiates_the_last_steps_of_the_sampler(
    tiny_run: Compose, last_steps: int, guidance: float
) -> None:
    """The reward of whole samples; what comes before the last K steps stays as it is when the weights move."""
    overrides = (f"method.algorithm.last_steps={last_steps}", f"method.rollout.guidance={guidance}")
    parts = prepared(tiny_run, "draft", *overrides)
    experience = collected(parts)
    prompts = list(experience.prompts)
    grid = parts.policy.grid(3, parts.method.sampler.grid)

    def steps(x: Tensor, first: int, last: int) -> Tensor:
        texts = parts.policy.encode([prompt.text for prompt in prompts])
        for i in range(first, last):
            both = [
                parts.policy.predict(x, grid[i].expand(len(x)), condition)
                for condition in (parts.policy.encode([""] * len(x)), texts)
            ]
            x = x + (grid[i + 1] - grid[i]) * (both[0] + guidance * (both[1] - both[0]))
        return x

    with torch.no_grad():
        noise = parts.policy.noise([seed_of("initial noise", 0, 0, each) for each in experience.ids])
        start = steps(noise, 0, 3 - last_steps)
    torch.testing.assert_close(experience.terms["latents"], start)
    loss, gradients = gradient(parts, experience)

    def value() -> float:
        return -reward_of(parts, steps(start, 3 - last_steps, 3), prompts).sum().item()

    with torch.no_grad():
        assert loss == pytest.approx(value())
    assert_gradient(parts, gradients, value)


def test_refl_differentiates_the_clean_estimate_of_one_late_step(tiny_run: Compose) -> None:
    parts = prepared(tiny_run, "refl", "method.rollout.steps=4", "method.algorithm.late=0.5")
    experience = collected(parts)
    grid = parts.policy.grid(4)
    assert Counter(experience.terms["stop"].tolist()) == {2: 2, 3: 2}
    loss, gradients = gradient(parts, experience)
    with torch.no_grad():
        starts = [
            walk(parts, parts.policy.noise([seed_of("initial noise", 0, 0, each)]), [prompt], 0, stop, grid)
            for each, prompt, stop in zip(
                experience.ids, experience.prompts, experience.terms["stop"].tolist(), strict=True
            )
        ]
    torch.testing.assert_close(experience.terms["latents"], torch.cat(starts))

    def value() -> float:
        total = 0.0
        for x, prompt, stop in zip(starts, experience.prompts, experience.terms["stop"].tolist(), strict=True):
            v = parts.policy.predict(x, grid[stop].expand(1), parts.policy.encode([prompt.text]))
            total -= reward_of(parts, x - grid[stop] * v, [prompt]).item()
        return total

    with torch.no_grad():
        assert loss == pytest.approx(value())
    assert_gradient(parts, gradients, value)


def test_refl_draws_its_steps_anew_and_evenly(tiny_run: Compose) -> None:
    parts = prepared(
        tiny_run, "refl", "method.rollout.steps=12", "method.batch.images=6", "method.batch.prompts=2"
    )  # a quarter of 12 steps: 9, 10 and 11
    stops = [parts.method.stops(Clock(iteration)) for iteration in range(200)]  # type: ignore[attr-defined]
    assert all(Counter(each) == {9: 4, 10: 4, 11: 4} for each in stops)
    first = Counter(each[0] for each in stops)
    assert min(first.values()) > 30  # 67 expected, standard deviation 7


def one_step(parts: Parts, shards: int = 1) -> list[Tensor]:
    """Weights after an iteration whose experience was collected in blocks, as several processes would."""
    stack, method = parts.stack, parts.method
    blocks = np.array_split(np.arange(method.batch.total), shards)
    gradients = []
    for block in blocks:
        stack.processes.shard = lambda n, block=block: range(block[0], block[-1] + 1)  # type: ignore[method-assign, misc]
        gradients.append(gradient(parts, collected(parts))[1])
    for parameter, *parts_of in zip(parts.policy.trainable_parameters().values(), *gradients, strict=True):
        parameter.grad = sum(parts_of) / method.batch.total  # type: ignore[assignment]
    parts.optimizer.step()
    return [each.detach().clone() for each in parts.policy.trainable_parameters().values()]


@pytest.mark.parametrize("method", METHODS)
def test_neither_micro_batches_nor_processes_change_the_step(tiny_run: Compose, method: str) -> None:
    whole = one_step(prepared(tiny_run, method))
    again = one_step(prepared(tiny_run, method))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    split = one_step(prepared(tiny_run, method, "micro_batch=3"), shards=2)
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("srpo", ()),
        ("srpo", ("method.algorithm.inversion=false", "method.rollout.guidance=2")),
        ("direct_align", ("method.algorithm.inversion=false",)),
        ("direct_align", ()),
        ("refl", ("method.rollout.guidance=2", "method.algorithm.late=0.7")),
        ("draft", ("method.rollout.guidance=2", "method.algorithm.last_steps=2")),
        ("draft", ("method.algorithm.last_steps=3",)),
    ],
)
def test_costs_are_what_was_expected(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch, method: str, overrides: tuple[str, ...]
) -> None:
    parts = prepared(tiny_run, method, *overrides)
    decode, with_gradient = type(parts.policy).decode, []

    def counted(self, latents):  # type: ignore[no-untyped-def]
        with_gradient.extend([latents.requires_grad] * len(latents))
        return decode(self, latents)

    monkeypatch.setattr(type(parts.policy), "decode", counted)
    with parts.ledger.during("rollout"):
        experience = collected(parts)
    with parts.ledger.during("training"):
        for update in parts.method.updates(experience, parts.stack, Clock()):
            optimizer_step(parts.stack, parts.method, update, parts.optimizer, clip=1.0)
    cost, phases = parts.method.expected_cost(), parts.ledger.row()["phases"]
    assert (phases["rollout"]["nfe"], phases["training"]["nfe"]) == (cost.rollout, cost.training)
    assert phases["rollout"]["images"] == phases["rollout"]["reward_calls"] == 0
    for name in ("backward", "images", "reward_calls"):
        assert phases["training"][name] == getattr(cost, name), name
    assert (len(with_gradient), sum(with_gradient)) == (cost.images, cost.images_with_gradient)


def test_costs_by_hand(tiny_run: Compose) -> None:
    """4 images, 3 steps. SRPO: two branches, two reward calls each. DRaFT-2 guided: 2 passes a call."""
    srpo = prepared(tiny_run, "srpo").method.expected_cost()
    assert (srpo.rollout, srpo.training, srpo.backward, srpo.images, srpo.reward_calls) == (12, 8, 8, 8, 16)
    overrides = ("method.rollout.guidance=2", "method.algorithm.last_steps=2")
    draft = prepared(tiny_run, "draft", *overrides).method.expected_cost()
    assert (draft.rollout, draft.training, draft.backward, draft.images, draft.reward_calls) == (8, 16, 16, 4, 4)


def test_autoencoder_checkpointing_changes_no_gradient(tiny_run: Compose) -> None:
    gradients = []
    for checkpointing in (False, True):
        parts = prepared(tiny_run, "srpo", f"model.policy.vae_gradient_checkpointing={checkpointing}")
        assert parts.policy.vae.decoder.gradient_checkpointing == checkpointing  # type: ignore[attr-defined]
        gradients.append(gradient(parts, collected(parts))[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# Real images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of every prompt of the tiny run."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for text in ("ab", "cd", "ef", "gh"):
        for copy in range(2):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{text}{copy}.png")
            lines.append(json.dumps({"prompt": text, "image": f"{text}{copy}.png"}) + "\n")
    (folder / "images.jsonl").write_text("".join(lines))
    return folder


def test_real_images_take_the_place_of_the_rollout(tiny_run: Compose, folder: Path) -> None:
    parts = prepared(tiny_run, "srpo", f"method.algorithm.images={folder}", "micro_batch=3")
    seen = set()
    for iteration in range(12):
        experience = collected(parts, Clock(iteration))
        for prompt, latent in zip(experience.prompts, experience.terms["x_0"], strict=True):
            expected = [
                parts.policy.encode_images(torch.tensor(np.asarray(Image.open(file)) / 255).permute(2, 0, 1)[None])[0]
                for file in (folder / f"{prompt.text}{copy}.png" for copy in range(2))
            ]
            found = [torch.allclose(latent, each, atol=1e-5) for each in expected]
            assert sum(found) == 1
            seen.add((prompt.text, found.index(True)))
    assert len(seen) == 8
    assert parts.ledger.row()["nfe"] == parts.method.expected_cost().rollout == 0


def test_images_that_cannot_be_used(tiny_run: Compose, folder: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder with an index images\.jsonl"):
        prepared(tiny_run, "srpo", f"method.algorithm.images={folder / 'absent'}")
    parts = prepared(tiny_run, "srpo", f"method.algorithm.images={folder}")
    Image.new("RGB", (8, 8)).save(folder / "ab0.png")
    Image.new("RGB", (8, 8)).save(folder / "ab1.png")
    with pytest.raises(DataError, match="resize the images to one size"):
        collected(parts)
    with pytest.raises(DataError, match="resize the images to one size"):
        prepared(tiny_run, "srpo", f"method.algorithm.images={folder}")
    for file in folder.glob("*.png"):
        Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(DataError, match=r"have latents \[4, 4, 4\], but the model works on \[4, 8, 8\]"):
        collected(prepared(tiny_run, "srpo", f"method.algorithm.images={folder}"))
    lines = (folder / "images.jsonl").read_text().splitlines()
    (folder / "images.jsonl").write_text("\n".join(lines[2:]))
    with pytest.raises(DataError, match="has no image of 'ab'"):
        collected(prepared(tiny_run, "srpo", f"method.algorithm.images={folder}"))
    (folder / "images.jsonl").write_text('{"prompt": "ab"}')
    with pytest.raises(DataError, match="line 1: expected"):
        prepared(tiny_run, "srpo", f"method.algorithm.images={folder}")


# Refusals


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_without_gradient_is_refused_before_any_work(tiny_run: Compose, method: str) -> None:
    with pytest.raises(ConfigError, match="through the reward"):
        prepared(tiny_run, method, reward="tests.stand_ins.Constant")


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("srpo", "method.algorithm.positive_words=[]", "needs positive_words and negative_words"),
        ("srpo", "method.algorithm.grid_points=[25,5]", "two increasing points"),
        ("srpo", "method.algorithm.longest_step=0", r"must be in 1\.\.500"),
        ("srpo", "method.algorithm.reward_scale=0", "must be positive"),
        ("refl", "method.algorithm.late=1.5", r"in \(0, 1\]"),
        ("refl", "method.rollout.steps=40", "every step needs an image"),
        ("refl", "method.algorithm.reward_scale=-1", "must be positive"),
        ("draft", "method.algorithm.last_steps=4", r"in 1\.\.3"),
        ("draft", "method.rollout.solver=dpm2", "euler, ddim, dpm1"),
    ],
)
def test_settings_out_of_range(tiny_run: Compose, method: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(tiny_run, method, override)


@pytest.mark.parametrize("method", METHODS)
def test_stochastic_rollouts_are_refused(tiny_run: Compose, method: str) -> None:
    with pytest.raises(ConfigError, match=r"set method\.rollout\.stochastic to null"):
        prepared(tiny_run, method, "method.rollout.stochastic=flow", "method.rollout.noise_level=0.7")
