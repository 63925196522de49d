"""Sizes of JPEG files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from alignbench.rewards.jpeg import JpegSize


def images() -> torch.Tensor:
    """A flat grey picture and a noisy one."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    return torch.stack([torch.full((3, 48, 40), 0.5), torch.from_numpy(noise).permute(2, 0, 1).float() / 255])


def test_the_score_is_the_size_of_the_file() -> None:
    expected = []
    for picture in images():
        file = io.BytesIO()
        array = np.rint(picture.permute(1, 2, 0).double().numpy() * 255).astype(np.uint8)
        Image.fromarray(array, "RGB").save(file, "JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    assert JpegSize("incompressibility").score(images(), [])["reward"].tolist() == pytest.approx(expected)
    assert JpegSize("compressibility").score(images(), [])["reward"].tolist() == pytest.approx([-x for x in expected])
    assert expected[1] > 3 * expected[0]


def test_names_and_what_is_not_finite() -> None:
    broken = images()
    broken[0, 1, 2, 3] = torch.nan
    reward = JpegSize("compressibility")
    assert (reward.name, reward.differentiable) == ("jpeg_compressibility", False)
    assert reward.score(broken, [])["reward"].isnan().tolist() == [True, False]
