"""The trainer of the preference models: what counts as right, the loss, resuming; and the shipped models' accuracy."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alignbench.errors import CheckpointError
from alignbench.rewards.text_image import PickScore
from alignbench.shapes.captions import records
from alignbench.shapes.pretrain.preference import (
    CHECKPOINTS,
    RECIPES,
    batch_loss,
    build_model,
    contrastive_loss,
    draw_batch,
    judgements,
    main,
    save,
    train,
    true_captions,
)
from alignbench.shapes.pretrain.preference_card import measure, report
from alignbench.shapes.pretrain.vae import build_autoencoder
from alignbench.shapes.scenes import Object, sample_scene
from alignbench.shapes.tokenizer import build_tokenizer

SMALL = replace(
    RECIPES["pickscore"],
    width=32,
    layers=1,
    heads=1,
    text_width=32,
    text_layers=1,
    projection=16,
    steps=4,
    warmup=2,
    groups=3,
    near_misses=1,
    degraded=4,
    arbitrary=2,
    control=3,
)


def test_true_captions_of_one_object() -> None:
    assert true_captions((Object("circle", "red", 16, 16, 5),)) == {"a photo of a circle", "a photo of a red circle"}


def test_true_captions_of_equal_shapes() -> None:
    scene = tuple(Object("cross", colour, x, 16, 4) for colour, x in (("red", 5), ("red", 15), ("blue", 25)))
    assert true_captions(scene) == {"a photo of three crosses"}


def test_true_captions_of_two_shapes() -> None:
    scene = (Object("square", "green", 8, 8, 4), Object("triangle", "white", 23, 9, 4))
    assert true_captions(scene) == {
        "a photo of a square and a triangle",
        "a photo of a triangle and a square",
        "a photo of a square left of a triangle",
        "a photo of a triangle right of a square",
        "a photo of a green square and a white triangle",
        "a photo of a white triangle and a green square",
    }


def test_equal_colours_are_no_attribution() -> None:
    scene = (Object("square", "red", 8, 8, 4), Object("triangle", "red", 23, 23, 4))
    captions = true_captions(scene)
    assert not any("red" in caption for caption in captions)
    assert {"a photo of a square above a triangle", "a photo of a square left of a triangle"} <= captions


def test_mixed_crowds_have_no_caption() -> None:
    scene = tuple(Object(shape, "red", x, 16, 4) for shape, x in (("circle", 5), ("square", 15), ("square", 25)))
    assert true_captions(scene) == frozenset()


def test_a_drawn_scene_has_its_own_caption() -> None:
    rng = np.random.default_rng(0)
    for record in records():
        assert record["prompt"] in true_captions(sample_scene(record, rng))


def test_judgements_by_hand() -> None:
    # One scene as a clean picture, blurred, noisy and chipped; another scene, clean.
    true = np.array([[1, 1, 1, 1, 0]] * 3, dtype=bool)
    of_text, of_image = judgements(true, ["", "sharp", "blurred"], ["", "blurred", "noisy", "other", ""])
    assert of_text.tolist() == [[1, -1, -1, -1, -1], [1, -1, -1, -1, -1], [-1, 1, -1, 0, -1]]
    assert of_image.tolist() == [[1, 1, 1, 1, -1], [1, -1, -1, -1, -1], [-1, 1, -1, 0, -1]]


def test_loss_with_one_positive_is_cross_entropy() -> None:
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    judgement = 2 * torch.eye(5, dtype=torch.int8) - 1
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    torch.testing.assert_close(contrastive_loss(logits, judgement), expected)


def test_loss_with_several_positives_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 9.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    judgement = torch.tensor([[1, 1, -1, 0], [-1, -1, -1, 0]], dtype=torch.int8)
    # Row 1: each positive against the one negative; column 4 is left out. Row 2 has no positive and does not count.
    expected = (np.log1p(np.exp(0.5 - 1.0)) + np.log1p(np.exp(0.5 - 2.0))) / 2
    assert contrastive_loss(logits, judgement).item() == pytest.approx(expected, rel=1e-12)


def test_batch_depends_on_seed_and_step_alone() -> None:
    first, again = draw_batch(SMALL, 5), draw_batch(SMALL, 5)
    assert first.texts == again.texts
    assert np.array_equal(first.images, again.images)
    assert draw_batch(SMALL, 6).texts != first.texts
    assert draw_batch(replace(SMALL, data_seed=1), 5).texts != first.texts


def test_batch_layout() -> None:
    recipe = RECIPES["pickscore"]
    batch = draw_batch(recipe, 0)
    captions = recipe.groups * (1 + recipe.near_misses)
    assert batch.images.shape == (captions + recipe.arbitrary + recipe.degraded, 32, 32, 3)
    assert len(batch.texts) == captions + recipe.control
    assert (batch.of_text[np.arange(captions), np.arange(captions)] == 1).all()
    # A near miss is false of the picture of the caption that it was made from, and the other way round.
    for start in range(0, captions, 1 + recipe.near_misses):
        for other in range(start + 1, start + 1 + recipe.near_misses):
            assert batch.of_text[start, other] == batch.of_text[other, start] == -1
    assert all(text.startswith("a photo of ") for text in batch.texts[:captions])
    assert all(re.fullmatch(r"[a-z]+\. a photo of .*", text) for text in batch.texts[captions:])
    assert ((batch.of_text == 1).sum(axis=1) >= 1).all()


def test_every_word_of_a_batch_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for text in draw_batch(RECIPES["judge"], 0).texts:
        words = len(re.findall(r"[a-z]+|\.", text))
        assert len(tokenizer(text)["input_ids"]) == words + 2 <= tokenizer.model_max_length


def test_the_text_is_pooled_at_its_end_token() -> None:
    tokenizer = build_tokenizer()
    model = build_model(SMALL, tokenizer).eval()
    short = "a photo of a circle"
    alone = tokenizer([short], padding=True, return_tensors="pt")
    padded = tokenizer([short, "sharp. a photo of a red circle and a blue square"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_model(**alone).last_hidden_state[0, len(alone["input_ids"][0]) - 1]
        got = model.text_model(**padded).pooler_output[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    whole = train(SMALL, tmp_path / "whole.pt")
    train(SMALL, tmp_path / "parts.pt", stop_after=2)
    resumed = train(SMALL, tmp_path / "parts.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="written by the recipe"):
        train(replace(SMALL, seed=9), tmp_path / "parts.pt")


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    recipe = replace(SMALL, steps=60, learning_rate=5e-3, groups=6, near_misses=0, degraded=0, control=0, arbitrary=0)
    tokenizer = build_tokenizer()
    unseen = [draw_batch(recipe, 1000 + k) for k in range(5)]

    def mean_loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([batch_loss(model, tokenizer, batch).item() for batch in unseen]))

    before = mean_loss(build_model(recipe, tokenizer))
    assert mean_loss(train(recipe, tmp_path / "state.pt")) < before - 0.3


def test_command_saves_measures_and_writes_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "judge", SMALL)
    monkeypatch.setattr("alignbench.shapes.pretrain.preference.SCENES_PER_TAG", 4)
    folder = tmp_path / "judge"
    main("judge", ["--output", str(folder), "--state", str(tmp_path / "state.pt"), "--threads", "1"])
    card = (folder / "README.md").read_text()
    printed = capsys.readouterr().out
    assert printed.strip() in card
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    main("judge", ["--output", str(folder), "--evaluate", "--threads", "1"])
    assert capsys.readouterr().out == printed


def test_a_model_without_opinion_is_never_right(tmp_path: Path) -> None:
    model = build_model(SMALL, build_tokenizer())
    with torch.no_grad():
        model.text_projection.weight.zero_()
    save(model, tmp_path)
    accuracies = measure(PickScore(tmp_path), scenes_per_tag=3)
    assert set(accuracies.means().values()) == {0.0}
    assert "0.000" in report(accuracies)


@pytest.mark.parametrize("name", ["pickscore", "judge"])
class TestShipped:
    """The checkpoints in the package keep the promises of their cards."""

    def test_accuracy(self, name: str) -> None:
        means = measure(PickScore(CHECKPOINTS / name), scenes_per_tag=60, seed=1).means()
        # 0.85 and 0.95 are promised on many scenes; 360 scenes leave a standard error below 0.02 on the first.
        assert means["captions"] > 0.81
        assert means["pictures"] > 0.81
        assert means["degraded"] > 0.93
        assert means["words"] > 0.9

    def test_gradient_through_a_decoder(self, name: str) -> None:
        reward = PickScore(CHECKPOINTS / name)
        reward.model.double()
        decoder = build_autoencoder(0).double().eval()
        latents = torch.randn(2, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        texts = ["a photo of a red circle", "sharp. a photo of two crosses"]

        def score(latents: torch.Tensor) -> torch.Tensor:
            return reward.similarity((decoder.decode(latents).sample / 2 + 0.5).clamp(0, 1), texts).sum()

        (gradient,) = torch.autograd.grad(score(latents.requires_grad_()), latents)
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
        direction = gradient / gradient.norm()
        with torch.no_grad():
            numerical = (score(latents + 1e-5 * direction) - score(latents - 1e-5 * direction)) / 2e-5
        assert float(gradient.norm()) == pytest.approx(float(numerical), rel=1e-5)

    def test_card_names_the_weights(self, name: str) -> None:
        weights = CHECKPOINTS / name / "model.safetensors"
        assert weights.stat().st_size <= 1.5 * 2**20
        assert hashlib.sha256(weights.read_bytes()).hexdigest() in (CHECKPOINTS / name / "README.md").read_text()


def test_the_judge_is_another_model() -> None:
    first, second = RECIPES["pickscore"], RECIPES["judge"]
    for key in ("seed", "data_seed", "width", "patch", "text_width"):
        assert getattr(first, key) != getattr(second, key)
