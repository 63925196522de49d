from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

from alignbench.errors import CheckpointError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.text_image import PickScore, Preprocessing

TEXTS = ["a red dog", "a cat", "a red dog", "two big cats and a dog"]


@pytest.fixture
def folder(tiny_pickscore: Path) -> Path:
    return tiny_pickscore


@pytest.fixture
def reward(folder: Path) -> PickScore:
    return PickScore(folder)


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(id=str(index), text=text) for index, text in enumerate(texts)]


def photographs(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_score_equals_the_raw_model(folder: Path, reward: PickScore) -> None:
    pictures = photographs(4)
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        text=TEXTS, images=[Image.fromarray(picture) for picture in pictures], padding=True, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
        scores = reward.score(as_tensor(pictures), prompts(TEXTS))
    assert list(scores) == ["reward"]
    assert scores["reward"].dtype == torch.float32
    torch.testing.assert_close(scores["reward"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward.preprocess(as_tensor(pictures)), inputs["pixel_values"], atol=1e-5, rtol=0)
    assert expected.std() > 0.1  # the pictures are told apart, so the comparison means something


def test_scale_is_the_learnt_one(reward: PickScore) -> None:
    images = as_tensor(photographs(4))
    before = reward.score(images, prompts(TEXTS))["reward"]
    reward.model.logit_scale.fill_(np.log(7.0))
    after = reward.score(images, prompts(TEXTS))["reward"]
    torch.testing.assert_close(after / 7, before / np.exp(3.0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (80, 50), (21, 30)])
def test_resizing_matches_the_processor(folder: Path, reward: PickScore, height: int, width: int) -> None:
    # Smooth pictures: an 8-bit resize rounds between its two passes, so equality holds to about a grey level.
    y, x = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 3, width), indexing="ij")
    channels = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(y) * np.cos(x)], axis=-1)
    picture = np.rint(127.5 * (channels + 1)).astype(np.uint8)
    processor = CLIPProcessor.from_pretrained(folder).image_processor
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    got = reward.preprocess(as_tensor(picture[None]))
    assert got.shape == (1, 3, 32, 32)
    assert (got - expected).abs().max() < 1.5 / 255 / 0.2


def test_gradient_by_finite_differences(reward: PickScore) -> None:
    reward.model.double()
    generator = torch.Generator().manual_seed(1)
    images = 0.3 + 0.4 * torch.rand(2, 3, 40, 36, generator=generator, dtype=torch.float64)
    texts = TEXTS[:2]
    images.requires_grad_()
    reward.similarity(images, texts).sum().backward()
    assert images.grad is not None
    for _ in range(4):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        with torch.no_grad():
            ahead = reward.similarity(images + step * direction, texts).sum()
            behind = reward.similarity(images - step * direction, texts).sum()
        numerical = (ahead - behind) / (2 * step)
        assert float((images.grad * direction).sum()) == pytest.approx(float(numerical), rel=1e-6)


def test_each_image_has_its_own_gradient(reward: PickScore) -> None:
    images = as_tensor(photographs(3)).requires_grad_()
    reward.score(images, prompts(TEXTS[:3]))["reward"][1].backward()
    assert images.grad is not None
    assert images.grad[1].abs().max() > 0
    assert not images.grad[[0, 2]].any()


def test_distinct_prompts_are_encoded_once(reward: PickScore, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    original = reward.model.get_text_features

    def counting(**tokens: torch.Tensor) -> object:
        encoded.append(len(tokens["input_ids"]))
        return original(**tokens)

    monkeypatch.setattr(reward.model, "get_text_features", counting)
    images = as_tensor(photographs(4))
    first = reward.score(images, prompts(TEXTS))["reward"]
    again = reward.score(images, prompts(TEXTS))["reward"]
    assert encoded == [1, 1, 1]  # four prompts, one of them twice
    assert torch.equal(first, again)
    reward.score(images[:2], prompts(["a new one", "a cat"]))
    assert encoded == [1, 1, 1, 1]


def test_a_score_does_not_depend_on_the_rest_of_the_batch(folder: Path) -> None:
    images = as_tensor(photographs(4))
    together = PickScore(folder).score(images, prompts(TEXTS))["reward"]
    alone = [PickScore(folder).score(images[i : i + 1], prompts(TEXTS[i : i + 1]))["reward"] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_an_embedding_does_not_depend_on_the_texts_beside_it(folder: Path) -> None:
    together, one_by_one = PickScore(folder), PickScore(folder)
    expected = together.embed_texts(TEXTS)
    one_by_one.encode(prompts(TEXTS[::-1]))
    assert torch.equal(one_by_one.embed_texts(TEXTS), expected)


def test_every_text_costs_the_same(folder: Path) -> None:
    reward, flops = PickScore(folder), []
    for texts in (["a"], ["a cat and a dog"], ["b", "c", "b"], ["b"]):
        with FlopCounterMode(display=False) as counter:
            reward.encode(prompts(texts))
        flops.append(counter.get_total_flops())
    assert flops[0] > 0
    assert flops == [flops[0], flops[0], 2 * flops[0], 0]


def test_autocast_does_not_touch_the_score(folder: Path) -> None:
    images = as_tensor(photographs(4))
    plain = PickScore(folder).score(images, prompts(TEXTS))["reward"]
    other = PickScore(folder)
    with torch.autocast("cpu", torch.bfloat16):
        other.encode(prompts(TEXTS))
        inside = other.score(images, prompts(TEXTS))["reward"]
    assert torch.equal(plain, inside)


def test_prompts_cached_in_inference_mode_serve_gradients(reward: PickScore) -> None:
    images = as_tensor(photographs(4))
    with torch.inference_mode():
        expected = reward.score(images, prompts(TEXTS))["reward"].clone()
    images.requires_grad_()
    score = reward.score(images, prompts(TEXTS))["reward"]
    score.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(score.detach(), torch.tensor(expected.tolist()))


def test_a_very_long_prompt_is_cut_to_the_models_length(reward: PickScore) -> None:
    images = as_tensor(photographs(2))
    scores = reward.score(images, prompts(["a" * 10_000, "b" * 10_000]))["reward"]
    assert torch.isfinite(scores).all()


def test_number_of_prompts_must_match(reward: PickScore) -> None:
    with pytest.raises(ValueError, match="2 images and 3 prompts"):
        reward.score(as_tensor(photographs(2)), prompts(TEXTS[:3]))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.*model\.safetensors"):
        PickScore(tmp_path / "absent")


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"broken.*Expected a folder"):
        PickScore(broken)


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    partial = copy_of(folder, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight"):
        PickScore(partial)


def test_missing_processor(folder: Path, tmp_path: Path) -> None:
    bare = copy_of(folder, tmp_path / "bare")
    for file in bare.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(CheckpointError, match="image processor"):
        PickScore(bare)
    assert PickScore(bare, folder).name == "pickscore"  # the processor may live elsewhere, as PickScore_v1's does


def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers makes one that reads nothing: every text would have one embedding."""
    bare = copy_of(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"bare has \d tokens, .*bare was trained on 54: its voc"):
        PickScore(bare)


def test_weights_of_another_configuration(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "other")
    (other / "config.json").unlink()  # transformers takes the default of the class then
    with pytest.raises(CheckpointError, match=r"other: .* has shape \[.*\], its config\.json says \[.*\]\. Expected"):
        PickScore(other)


def test_another_filter_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"filter 2, expected 3"):
        Preprocessing.of(CLIPImageProcessor(resample=2))


def test_the_name_is_free(folder: Path) -> None:
    assert PickScore(folder, name="judge").name == "judge"
    assert PickScore(folder).differentiable
