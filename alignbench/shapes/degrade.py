"""Rendered degradations: the same scene as a worse picture.

They are what the preference models learn to dislike and what the control words before a caption speak of. Each is
strong enough to be seen at a glance and leaves the scene recognisable, so that a degraded picture of the right scene
still beats a clean picture of a wrong one in a fair judgement. Three of them have a negative control word (`WORDS`).

All take and give float32 images ``[n, height, width, 3]`` in [0, 1] with one strength in [0, 1] per image.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from alignbench.shapes.scenes import BACKGROUND

Images = NDArray[np.float32]
Strength = NDArray[np.float32]
Degradation = Callable[[Images, Strength, np.random.Generator], Images]


def _between(low: float, high: float, strength: Strength) -> Strength:
    return (low + (high - low) * strength).astype(np.float32)


def _gaussian(length: int, sigma: Strength) -> Images:
    """Blurring matrices ``[n, length, length]`` along one axis; rows sum to 1, so edges are renormalised."""
    offset = np.arange(length, dtype=np.float32)
    weight = np.exp(-0.5 * ((offset[:, None] - offset) / sigma[:, None, None]) ** 2)
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True), dtype=np.float32)


def blur(images: Images, strength: Strength, rng: np.random.Generator) -> Images:
    """Gaussian blur of 0.9 to 2.0 pixels."""
    sigma = _between(0.9, 2.0, strength)
    rows, columns = _gaussian(images.shape[1], sigma), _gaussian(images.shape[2], sigma)
    vertical = np.matmul(rows, images.reshape(*images.shape[:2], -1)).reshape(images.shape)
    return np.asarray(np.matmul(columns[:, None], vertical), dtype=np.float32)


def noise(images: Images, strength: Strength, rng: np.random.Generator) -> Images:
    """White noise of standard deviation 0.08 to 0.25."""
    sd = _between(0.08, 0.25, strength)[:, None, None, None]
    return images + sd * rng.standard_normal(images.shape, dtype=np.float32)


def tint(images: Images, strength: Strength, rng: np.random.Generator) -> Images:
    """A random saturated colour over everything, 15 to 40 percent opaque."""
    colour = rng.random((len(images), 1, 1, 3), dtype=np.float32)
    colour -= colour.min(axis=-1, keepdims=True)
    colour /= colour.max(axis=-1, keepdims=True)
    opacity = _between(0.15, 0.4, strength)[:, None, None, None]
    return images * (1 - opacity) + colour * opacity


def fade(images: Images, strength: Strength, rng: np.random.Generator) -> Images:
    """Contrast against the image's own mean colour falls to 60 to 25 percent."""
    contrast = _between(0.6, 0.25, strength)[:, None, None, None]
    mean = images.mean(axis=(1, 2), keepdims=True)
    return np.asarray(mean + contrast * (images - mean), dtype=np.float32)


def chip(images: Images, strength: Strength, rng: np.random.Generator) -> Images:
    """A corner of an object is missing: a 5 to 8 pixel square around one of its border pixels shows the background.

    An image without objects comes back as it is.
    """
    side = np.rint(_between(5, 8, strength)).astype(int)
    background = np.array(BACKGROUND, dtype=np.float32) / 255
    inside = np.pad(np.abs(images - background).max(axis=-1) > 0.2, ((0, 0), (1, 1), (1, 1)))
    surrounded = inside[:, :-2, 1:-1] & inside[:, 2:, 1:-1] & inside[:, 1:-1, :-2] & inside[:, 1:-1, 2:]
    border = inside[:, 1:-1, 1:-1] & ~surrounded
    chipped = images.copy()
    for image, candidates, size in zip(chipped, map(np.argwhere, border), side, strict=True):
        if len(candidates):
            top, left = np.maximum(candidates[rng.integers(len(candidates))] - size // 2, 0)
            image[top : top + size, left : left + size] = background
    return chipped


def warp(images: Images, strength: Strength, rng: np.random.Generator) -> Images:
    """Wavy displacement of 0.7 to 1.5 pixels: straight edges bend."""
    n, height, width = images.shape[:3]
    amplitude = _between(0.7, 1.5, strength)[:, None, None]
    y, x = np.meshgrid(np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), indexing="ij")
    period, phase = rng.uniform(8, 12, (2, n, 1, 1)), rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
    row = np.clip(y + amplitude * np.sin(2 * np.pi * x / period[0] + phase[0]), 0, height - 1)
    column = np.clip(x + amplitude * np.sin(2 * np.pi * y / period[1] + phase[1]), 0, width - 1)
    top, left = np.minimum(row.astype(int), height - 2), np.minimum(column.astype(int), width - 2)
    down = (row - top).astype(np.float32)[..., None]
    right = (column - left).astype(np.float32)[..., None]
    index = np.arange(n)[:, None, None]
    upper = images[index, top, left] * (1 - right) + images[index, top, left + 1] * right
    lower = images[index, top + 1, left] * (1 - right) + images[index, top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)


DEGRADATIONS: dict[str, Degradation] = {
    "blur": blur,
    "noise": noise,
    "tint": tint,
    "fade": fade,
    "chip": chip,
    "warp": warp,
}

WORDS = {"blur": "blurred", "noise": "noisy", "fade": "faded"}
"""The control word of a degradation, where the captions have one."""


def degrade(images: NDArray[np.uint8], names: Sequence[str], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Degrade each image in its own way, with a strength drawn uniformly.

    Args:
        images: uint8 ``[n, height, width, 3]``.
        names: one key of ``DEGRADATIONS`` per image.
        rng: draws strengths and everything random in the degradations.

    Returns:
        uint8 images of the same shape.

    Raises:
        KeyError: a name that is no degradation.
        ValueError: another number of names than of images.
    """
    if len(images) != len(names):
        raise ValueError(f"{len(images)} images and {len(names)} names of degradations: one per image is needed")
    source = np.divide(images, 255, dtype=np.float32)
    result = np.empty_like(source)
    for name in dict.fromkeys(names):
        chosen = np.flatnonzero(np.asarray(names) == name)
        strength = rng.random(len(chosen), dtype=np.float32)
        result[chosen] = DEGRADATIONS[name](source[chosen], strength, rng)
    levels: NDArray[np.uint8] = np.rint(255 * np.clip(result, 0, 1)).astype(np.uint8)
    return levels
