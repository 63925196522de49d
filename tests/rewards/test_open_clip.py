"""Rewards on open_clip models, against the raw model and open_clip's own preprocessing."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignbench.errors import CheckpointError, ConfigError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.aesthetic import AestheticScore
from alignbench.rewards.clip import OpenClip
from alignbench.rewards.text_image import ClipScore
from tests.tiny_rewards import aesthetic_file

TEXTS = ["a red dog", "a cat", "a red dog", "two big cats and a dog"]


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(id=str(index), text=text) for index, text in enumerate(texts)]


def photographs(count: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def smooth(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Waves, as photographs are smooth at the scale of a pixel."""
    y, x = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 3, width), indexing="ij")
    waves = [np.stack([np.sin(x + y + i), np.cos(2 * x - i), np.sin(y) * np.cos(x + i)], -1) for i in range(count)]
    return np.rint(127.5 * (np.stack(waves) + 1)).astype(np.uint8)


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def raw(folder: Path) -> tuple[Any, Any, Any]:
    """Model, preprocessing and tokenizer as open_clip gives them."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.fixture
def reward(tiny_clip: Path) -> ClipScore:
    return ClipScore(f"local-dir:{tiny_clip}", None, name="clipscore")


@pytest.fixture
def aesthetic(tiny_clip: Path, tmp_path: Path) -> AestheticScore:
    return AestheticScore(
        str(aesthetic_file(tmp_path / "predictor.pth")), clip=f"local-dir:{tiny_clip}", clip_weights=None
    )


def test_the_score_is_the_cosine_of_the_raw_model(tiny_clip: Path, reward: ClipScore) -> None:
    pictures = photographs(4)
    model, preprocess, tokenizer = raw(tiny_clip)
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.fromarray(each)) for each in pictures])).double()
        texts = model.encode_text(tokenizer(TEXTS)).double()
        scores = reward.score(as_tensor(pictures), prompts(TEXTS))
    expected = [
        float(image @ text) / math.sqrt(float(image @ image) * float(text @ text))
        for image, text in zip(images, texts, strict=True)
    ]
    assert list(scores) == ["reward"]
    assert scores["reward"].tolist() == pytest.approx(expected, abs=1e-4)
    assert np.std(expected) > 0.01
    assert reward.differentiable


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (80, 52)])
def test_the_differentiable_preprocessing_is_within_a_grey_level_of_the_published_one(
    tiny_clip: Path, reward: ClipScore, height: int, width: int
) -> None:
    pictures = smooth(4, height, width)
    _, preprocess, _ = raw(tiny_clip)
    published = torch.stack([preprocess(Image.fromarray(each)) for each in pictures])
    ours = reward.clip.preprocess(as_tensor(pictures))
    assert ours.shape == published.shape
    assert (ours - published).abs().max() < 1.5 / 255 / 0.2
    with torch.no_grad():
        gap = reward.embed_images(as_tensor(pictures)) - reward.clip.embed_pictures(list(pictures))
    assert gap.norm(dim=-1).max() < 0.02


def test_pictures_go_through_the_published_preprocessing(tiny_clip: Path, reward: ClipScore) -> None:
    pictures = [photographs(1, 40, 56)[0], photographs(1, 32, 20)[0]]
    model, preprocess, _ = raw(tiny_clip)
    with torch.no_grad():
        expected = [model.encode_image(preprocess(Image.fromarray(each))[None], normalize=True) for each in pictures]
        torch.testing.assert_close(reward.clip.embed_pictures(pictures), torch.cat(expected), atol=1e-5, rtol=0)


def test_gradient_by_finite_differences(reward: ClipScore, aesthetic: AestheticScore) -> None:
    reward.clip.model.double()
    aesthetic.clip.model.double()
    aesthetic.predictor.double()
    generator = torch.Generator().manual_seed(1)
    images = 0.3 + 0.4 * torch.rand(2, 3, 40, 36, generator=generator, dtype=torch.float64)
    functions = {
        "similarity": lambda each: reward.similarity(each, TEXTS[:2]),
        "aesthetic": lambda each: aesthetic.predictor(aesthetic.clip.embed_images(each)),
    }
    for function in functions.values():
        at = images.clone().requires_grad_()
        function(at).sum().backward()
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            numerical = (function(images + 1e-5 * direction) - function(images - 1e-5 * direction)).sum() / 2e-5
        assert at.grad is not None
        assert float((at.grad * direction).sum()) == pytest.approx(float(numerical), rel=1e-5)


def test_the_gradient_reaches_the_image_through_score(reward: ClipScore, aesthetic: AestheticScore) -> None:
    for each in (reward, aesthetic):
        images = as_tensor(photographs(3)).requires_grad_()
        each.score(images, prompts(TEXTS[:3]))["reward"][1].backward()
        assert images.grad is not None
        assert images.grad[1].abs().max() > 0
        assert not images.grad[[0, 2]].any()


def test_a_score_does_not_depend_on_the_rest_of_the_batch(tiny_clip: Path) -> None:
    def fresh() -> ClipScore:
        return ClipScore(f"local-dir:{tiny_clip}", None, name="clipscore")

    images = as_tensor(photographs(4))
    together = fresh().score(images, prompts(TEXTS))["reward"]
    alone = fresh()
    parts = [alone.score(images[i : i + 1], prompts(TEXTS[i : i + 1]))["reward"] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(parts), atol=1e-5, rtol=0)


def test_every_distinct_text_is_read_once_and_costs_the_same(reward: ClipScore) -> None:
    flops = []
    for texts in (["a"], ["a cat and a dog"], ["b", "c", "b"], ["b"]):
        with FlopCounterMode(display=False) as counter:
            reward.encode(prompts(texts))
        flops.append(counter.get_total_flops())
    assert flops[0] > 0
    assert flops == [flops[0], flops[0], 2 * flops[0], 0]


def test_the_aesthetic_score_is_a_chain_of_products(tiny_clip: Path, tmp_path: Path, aesthetic: AestheticScore) -> None:
    pictures = photographs(3)
    weights = {name: value.double().numpy() for name, value in torch.load(tmp_path / "predictor.pth").items()}
    model, preprocess, _ = raw(tiny_clip)
    with torch.no_grad():
        features = model.encode_image(torch.stack([preprocess(Image.fromarray(each)) for each in pictures]))
        scores = aesthetic.score(as_tensor(pictures), prompts(["x", "y", "z"]))["reward"]
    values = features.double().numpy()
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for layer in (0, 2, 4, 6, 7):
        values = values @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    assert scores.tolist() == pytest.approx(values[:, 0].tolist(), abs=1e-4)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.01


def test_a_predictor_of_another_model_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    other = aesthetic_file(tmp_path / "other.pth", features=20)
    with pytest.raises(CheckpointError, match=r"other\.pth: .*size mismatch.* Expected a predictor of 12 features"):
        AestheticScore(str(other), clip=f"local-dir:{tiny_clip}", clip_weights=None)
    with pytest.raises(CheckpointError, match=r"no weights at gone\.pth: expected the path"):
        AestheticScore("gone.pth", clip=f"local-dir:{tiny_clip}", clip_weights=None)
    other.write_bytes(other.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"other\.pth: .*Expected a file of tensors alone"):
        AestheticScore(str(other), clip=f"local-dir:{tiny_clip}", clip_weights=None)


def test_weights_may_be_a_file_with_a_training_state_around_them(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HPSv2.1 is published as ``{"epoch": ..., "state_dict": ...}``; its architecture is known by name."""
    (tmp_path / "Tiny.json").write_text(
        json.dumps(json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"])
    )
    open_clip.add_model_config(tmp_path / "Tiny.json")
    state = load_file(tiny_clip / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "hps.pt")
    clip = OpenClip("Tiny", str(tmp_path / "hps.pt"))
    torch.testing.assert_close(clip.embed_text("a cat"), OpenClip(f"local-dir:{tiny_clip}", None).embed_text("a cat"))
    del state["visual.proj"]
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    with pytest.raises(CheckpointError, match=r"hps\.pt"):
        OpenClip("Tiny", str(tmp_path / "hps.pt"))


def test_weights_that_are_missing_are_not_made_up(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_clip, folder)
    (folder / "open_clip_model.safetensors").unlink()
    for model, weights in ((f"local-dir:{folder}", None), (f"local-dir:{tmp_path / 'gone'}", None), ("ViT-B-32", None)):
        with pytest.raises(CheckpointError, match="the CLIP model"):
            OpenClip(model, weights)
    with pytest.raises(CheckpointError, match=r"no weights at \./gone/file\.pt"):
        OpenClip("ViT-B-32", "./gone/file.pt")
    weights = load_file(tiny_clip / "open_clip_model.safetensors")
    del weights["text_projection"]
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="the CLIP model"):
        OpenClip(f"local-dir:{folder}", None)


def test_weights_of_another_activation_are_refused() -> None:
    """open_clip itself only warns, and computes something else than what was trained."""
    with pytest.raises(CheckpointError, match="use ViT-L-14-quickgelu"):
        OpenClip("ViT-L-14", "openai")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignbench\[photo\]'"):
        OpenClip("ViT-L-14-quickgelu", "openai")
