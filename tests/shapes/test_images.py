"""The folder of rendered images: every picture shows its caption, and methods can read it."""

from pathlib import Path

import numpy as np
import torch

from alignbench.prompts.images import CaptionedImages
from alignbench.rewards.geneval.reward import ExactSceneReward
from alignbench.shapes.captions import split
from alignbench.shapes.images import write_images


def test_every_image_shows_its_caption_and_nothing_else(tmp_path: Path) -> None:
    prompts = split("train")[::8]
    write_images(tmp_path, prompts, per_prompt=3, seed=0)
    images = CaptionedImages(tmp_path)
    assert {text: len(files) for text, files in images.files.items()} == {prompt.text: 3 for prompt in prompts}
    pixels = np.stack([images.draw(prompt, np.random.default_rng(k)) for k, prompt in enumerate(prompts)])
    assert pixels.shape == (len(prompts), 32, 32, 3)
    scores = ExactSceneReward().score(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, prompts)
    assert scores["reward"].tolist() == [1.0] * len(prompts)


def test_the_images_are_distinct_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    prompts = split("train")[:4]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_images(tmp_path / name, prompts, per_prompt=2, seed=seed)
    files = {name: [file.read_bytes() for file in sorted((tmp_path / name).glob("*.png"))] for name in "abc"}
    assert files["a"] == files["b"]
    assert len({*files["a"], *files["c"]}) == 16
