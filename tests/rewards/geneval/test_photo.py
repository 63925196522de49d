"""GenEval on photographs: colours by CLIP, the reward, and the evaluation of a folder."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.clip import OpenClip
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.colours import ClipColours
from alignbench.rewards.geneval.detectors import mask2former
from alignbench.rewards.geneval.evaluate import main
from alignbench.rewards.geneval.photo import PHOTO_SCORES, PhotoGenevalReward, PhotoJudge
from alignbench.rewards.geneval.reward import Mode
from alignbench.rewards.geneval.rules import Detection, read_rows

DOG = suite.single_object("dog")
SETTINGS: dict[str, Any] = {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16, "max_overlap": 1.0}


def picture(seed: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
    return blocks.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)


def as_tensor(*pictures: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def detection(name: str, box: tuple[int, int, int, int], score: float = 0.95, mask: bool = True) -> Detection:
    """An ellipse in its box, or the box alone."""
    x1, y1, x2, y2 = box
    y, x = np.mgrid[0:48, 0:64]
    inside = ((2 * x + 1 - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y + 1 - y1 - y2) / (y2 - y1)) ** 2 <= 1
    return Detection(name, (float(x1), float(y1), float(x2), float(y2)), score, inside if mask else None)


THINGS = [
    detection("apple", (2, 3, 30, 40)),
    detection("apple", (10, 20, 60, 48)),
    detection("apple", (33, 5, 50, 21), mask=False),
]


@pytest.fixture(scope="module")
def colours(tiny_clip: Path) -> ClipColours:
    return ClipColours(OpenClip(f"local-dir:{tiny_clip}", None))


def expected_colours(folder: Path, image: NDArray[np.uint8], things: Sequence[Detection]) -> list[str]:
    """The benchmark's recipe with open_clip alone, crop by crop and in float64 after the encoders."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    palette = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    named = []
    for thing in things:
        grey = Image.new("RGB", (image.shape[1], image.shape[0]), "#999")
        if thing.mask is not None:
            grey.paste(Image.fromarray(image), mask=Image.fromarray(thing.mask.astype(np.uint8) * 255))
        else:
            grey = Image.fromarray(image)
        crop = grey.crop(tuple(map(int, thing.box)))
        with torch.no_grad():
            seen = model.encode_image(preprocess(crop)[None])[0].double().numpy()
        logits = []
        for colour in palette:
            total = np.zeros(len(seen))
            for text in (
                f"a photo of a {colour} {thing.class_name}",
                f"a photo of a {colour}-colored {thing.class_name}",
                f"a photo of a {colour} object",
            ):
                with torch.no_grad():
                    vector = model.encode_text(tokenizer([text]))[0].double().numpy()
                total += vector / np.linalg.norm(vector)
            logits.append(100 * total @ seen / np.linalg.norm(total) / np.linalg.norm(seen))
        named.append(palette[int(np.argmax(logits))])
    return named


def test_colours_are_those_of_the_recipe(tiny_clip: Path, colours: ClipColours) -> None:
    seen = set()
    for seed in range(3):
        expected = expected_colours(tiny_clip, picture(seed), THINGS)
        assert colours(picture(seed), THINGS) == expected
        assert [colours(picture(seed), [thing])[0] for thing in THINGS] == expected
        seen |= set(expected)
    assert len(seen) > 1
    assert colours(picture(0), []) == []


def test_the_texts_of_a_class_are_read_once(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = OpenClip(f"local-dir:{tiny_clip}", None)
    read: list[str] = []
    original = clip.embed_text
    monkeypatch.setattr(clip, "embed_text", lambda text: read.append(text) or original(text))
    classifier = ClipColours(clip)
    for name in ("apple", "orange", "apple"):
        classifier(picture(0), [detection(name, (2, 3, 30, 40))])
    assert len(read) == 2 * 10 * 3
    assert read[:3] == ["a photo of a red apple", "a photo of a red-colored apple", "a photo of a red object"]
    assert "a photo of a orange orange" in read  # always "a"


# ------------------------------------------------------------------------------------------------ the reward


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are looked at with 72 pixels instead of 800, which takes a moment only."""
    monkeypatch.setattr(mask2former, "SHORTER", 72)
    monkeypatch.setattr(mask2former, "LONGER", 120)


class Found:
    """A detector that finds what the test says, by the red value of the first pixel."""

    def __init__(self, *things: list[Detection]) -> None:
        self.things = things

    def detect(self, images: NDArray[np.uint8], threshold: float) -> list[list[Detection]]:
        return [[each for each in self.things[image[0, 0, 0]] if each.score > threshold] for image in images]


@cache
def loaded(mode: Mode, tiny_clip: Path, tiny_mask2former: Path) -> PhotoGenevalReward:
    return PhotoGenevalReward(mode, str(tiny_mask2former), f"local-dir:{tiny_clip}", None, **SETTINGS)


def reward_over(tiny_clip: Path, tiny_mask2former: Path, mode: Mode, *things: list[Detection]) -> PhotoGenevalReward:
    reward = loaded(mode, tiny_clip, tiny_mask2former)
    reward._judge._detector = Found(*things)  # type: ignore[assignment]
    return reward


def numbered(count: int) -> torch.Tensor:
    images = as_tensor(*(picture(seed) for seed in range(count)))
    images[:, 0, 0, 0] = torch.arange(count) / 255
    return images


TWO_DOGS = suite.counting("dog", 2)
SURE, UNSURE, DOUBTFUL = (detection("dog", (2, 3, 30, 40), score) for score in (0.95, 0.7, 0.3))


@pytest.mark.parametrize(
    ("record", "things", "expected"),
    [
        # official, strict, soft, objects
        (DOG, [SURE], (1, 1, 1, 1)),
        (DOG, [SURE, UNSURE], (1, 0, 0, 2)),
        (DOG, [DOUBTFUL], (0, 0, 0, 0)),  # 0.3 is not above 0.3
        (TWO_DOGS, [SURE, UNSURE], (0, 0, 0.5, 1)),  # counting asks for more than 0.9
        (TWO_DOGS, [SURE, detection("dog", (33, 5, 50, 21))], (1, 1, 1, 2)),
        (suite.position("dog", "left of", "cat"), [SURE, detection("cat", (44, 3, 60, 40))], (1, 1, 1, 2)),
        (suite.position("cat", "left of", "dog"), [SURE, detection("cat", (44, 3, 60, 40))], (0, 0, 2 / 3, 2)),
    ],
)
def test_scores_by_hand(
    tiny_clip: Path, tiny_mask2former: Path, record: Any, things: list[Detection], expected: tuple[float, ...]
) -> None:
    reward = reward_over(tiny_clip, tiny_mask2former, "strict", things)
    scores = reward.score(numbered(1), [Prompt("0", record["prompt"], record)])
    assert list(scores) == ["reward", *PHOTO_SCORES]
    assert [scores[name].item() for name in PHOTO_SCORES] == pytest.approx(expected)
    assert scores["reward"].item() == expected[1]


def test_a_colour_is_asked_of_the_classifier(tiny_clip: Path, tiny_mask2former: Path) -> None:
    apple = detection("apple", (2, 3, 30, 40))
    images = numbered(1)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    (seen,) = expected_colours(tiny_clip, pixels[0], [apple])
    other = next(colour for colour in suite.COLOURS if colour != seen)
    reward = reward_over(tiny_clip, tiny_mask2former, "soft", [apple])
    for colour, score in ((seen, 1.0), (other, 0.5)):
        record = suite.colors("apple", colour)
        prompts = [Prompt("0", record["prompt"], record)]
        reward.encode(prompts)
        assert reward.score(images, prompts)["reward"].tolist() == [score]


def test_names_say_which_detector_it_was(tiny_clip: Path, tiny_mask2former: Path) -> None:
    names = {"strict": "strict", "soft_released": "soft_released", "official": "official"}
    for mode, name in (("soft", "geneval_hf"), *((mode, f"geneval_hf_{end}") for mode, end in names.items())):
        reward = reward_over(tiny_clip, tiny_mask2former, mode, [SURE, UNSURE], [SURE])  # type: ignore[arg-type]
        assert (reward.name, reward.differentiable) == (name, False)
        images = numbered(2)
        images[1, 2, 5, 5] = torch.nan
        scores = reward.score(images, [Prompt("0", "x", DOG)] * 2)
        assert list(scores) == ["reward", *PHOTO_SCORES]
        assert scores["reward"][0].item() == (mode == "official")
        assert all(each[1].isnan() for each in scores.values())


def test_prompts_outside_the_vocabulary_are_refused(tiny_clip: Path, tiny_mask2former: Path) -> None:
    reward = reward_over(tiny_clip, tiny_mask2former, "strict", [])
    reward.check([Prompt("0", "x", DOG)])
    for record, message in (
        ({}, "has no GenEval record"),
        (suite.single_object("circle"), "one of GenEval's 80 objects"),
        (suite.colors("dog", "cyan"), "a color of red, orange"),
    ):
        with pytest.raises(DataError, match=message):
            reward.check([Prompt("0", "x", record)])


@pytest.mark.parametrize("settings", [{"threshold": 1.5}, {"counting_threshold": -0.1}, {"max_objects": 0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PhotoJudge(**settings)


# ------------------------------------------------------------------------------------------------ a folder


@pytest.mark.usefixtures("small")
def test_a_folder_is_evaluated(
    tiny_clip: Path, tiny_mask2former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's rows are the reward's decisions on the same files."""
    records = [DOG, suite.counting("dog", 1 + 1), suite.colors("car", "red")]
    images = tmp_path / "images"
    for index, record in enumerate(records):
        suite.write_images(images, index, record, [picture(10 * index), picture(10 * index + 1)])
    suite.write_images(images, 3, DOG, [picture(5), picture(6, 64, 48)])  # of two sizes
    output = tmp_path / "results.jsonl"
    models = ["--detector", str(tiny_mask2former), "--clip", f"local-dir:{tiny_clip}", "--clip-weights", "none"]
    main([str(images), "--output", str(output), *models])
    rows = read_rows(output)
    assert [row.filename for row in rows] == [str(path) for path in sorted(images.rglob("*.png"))]
    reward = PhotoGenevalReward("official", str(tiny_mask2former), f"local-dir:{tiny_clip}", None, **SETTINGS)
    for row in rows:
        prompt = Prompt("0", row.prompt, json.loads(row.metadata))
        scores = reward.score(as_tensor(np.asarray(Image.open(row.filename))), [prompt])
        assert float(row.correct) == scores["reward"].item()
        details = json.loads(row.details)
        assert sum(map(len, details.values())) == scores["objects_per_image"].item()
        assert all(len(each) == 5 for found in details.values() for each in found)
    assert sum(map(len, json.loads(rows[0].details).values())) > 1
    printed = capsys.readouterr().out
    assert "8 images of 3 prompts" in printed
    tags: dict[str, list[bool]] = {}
    for row in rows:
        tags.setdefault(row.tag, []).append(row.correct)
    score = np.mean([np.mean(correct) for correct in tags.values()])
    assert f"geneval_hf score (unweighted over tags): {score:.5f}" in printed


def test_a_folder_without_the_layout_is_an_error_message(
    tiny_clip: Path, tiny_mask2former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--detector", str(tiny_mask2former), "--clip", f"local-dir:{tiny_clip}", "--clip-weights", "none"]
    prompt = suite.write_images(tmp_path, 0, DOG, [picture(0)])
    prompt.images[0].write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--output", str(tmp_path / "results.jsonl"), *models])
    assert "not an image that can be read" in capsys.readouterr().err
