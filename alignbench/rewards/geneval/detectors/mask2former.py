"""Mask2Former (Cheng et al. 2022, arXiv 2112.01527) as GenEval's detector on photographs.

The hub's ``facebook/mask2former-swin-small-coco-instance`` has the architecture and recipe of the official scorer, but
other weights: numbers that it gave are called ``geneval_hf``. Images are resized and detections read off the queries as
the official scorer does it; transformers' own post-processing works at another resolution and rounds scores.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation

from alignbench.errors import CheckpointError
from alignbench.rewards.checkpoints import load_frozen
from alignbench.rewards.geneval.rules import THRESHOLD, Detection
from alignbench.rewards.geneval.suite import OBJECTS

SHORTER, LONGER, DIVISOR = 800, 1333, 32  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
INSTANCES = 100  # an image's detections, before any threshold

Size = tuple[int, int]
"""Height and width in pixels."""


class Mask2FormerDetector:
    """Finds the 80 classes of COCO, in their order: class i is ``OBJECTS[i]``.

    Args:
        model: folder or hub id of a ``Mask2FormerForUniversalSegmentation``.
        device: where the model lives.

    Raises:
        CheckpointError: weights are missing or truncated, or the model has another number of classes.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        expected = "a folder with config.json and model.safetensors, or facebook/mask2former-swin-small-coco-instance"
        self.model: Any = load_frozen(Mask2FormerForUniversalSegmentation, model, expected).to(device)
        classes = self.model.config.num_labels
        if classes != len(OBJECTS):
            raise CheckpointError(f"{model} knows {classes} classes: expected the {len(OBJECTS)} of COCO instances")

    @torch.no_grad()
    def detect(self, images: NDArray[np.uint8], threshold: float = THRESHOLD) -> list[list[Detection]]:
        """The instances of every image with a score above ``threshold``, in no order.

        Args:
            images: uint8 RGB [n, H, W, 3].
            threshold: the lowest of those that the rules will ask for.
        """
        if len(images) == 0:
            return []
        pixels = torch.from_numpy(images).to(self.model.device).permute(0, 3, 1, 2).float() / 255
        original, resized = _size(pixels), fitted(_size(pixels))
        prepared = preprocess(pixels, resized)
        with torch.autocast(pixels.device.type, enabled=False):
            outputs = self.model(pixel_values=prepared)
        return [
            instances(classes, masks, (_size(prepared), resized, original), threshold)
            for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        ]


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


def fitted(size: Size) -> Size:
    """The size at which an image is looked at: shorter side 800, or longer side 1333 where that is smaller."""
    scale = min(SHORTER / min(size), LONGER / max(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def preprocess(images: Tensor, size: Size) -> Tensor:
    """Images ``[n, 3, H, W]`` in [0, 1] to pixel values: resized, normalised, zeros up to multiples of 32."""
    resized = functional.interpolate(images, size, mode="bilinear", antialias=True)
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return functional.pad((resized - mean) / std, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR))


def instances(
    class_logits: Tensor, mask_logits: Tensor, sizes: tuple[Size, Size, Size], threshold: float
) -> list[Detection]:
    """The detections of one image (mmdet's instance post-processing).

    The 100 most probable pairs of a query and a class, so that a query may be several classes; an instance's pixels are
    those with a positive mask logit, its score the class probability times the mean mask probability of these pixels.

    Args:
        class_logits: ``[queries, classes + 1]``; the last one is "no object".
        mask_logits: ``[queries, h, w]``.
        sizes: of the padded input, of the image in it, and of the original image, to which masks are brought back.
        threshold: the score must be strictly above.
    """
    padded, resized, original = sizes
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    best, places = probabilities.flatten().topk(min(INSTANCES, probabilities.numel()))
    places, best = places[best > threshold], best[best > threshold]  # no score exceeds its probability
    found: list[Detection] = []
    for place, probability in zip(places.tolist(), best.tolist(), strict=True):
        query, label = divmod(place, probabilities.shape[1])
        logits = _restored(mask_logits[query], padded, resized, original)
        mask = logits > 0
        if not mask.any():
            continue  # its score is 0
        score = probability * float(logits[mask].sigmoid().mean())
        if score > threshold:
            rows, columns = (mask.any(dim=axis).nonzero().flatten() for axis in (1, 0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
            found.append(Detection(OBJECTS[label], box, score, mask.cpu().numpy()))
    return found


def _restored(logits: Tensor, padded: Size, resized: Size, original: Size) -> Tensor:
    """Mask logits ``[h, w]`` of the padded input as those of the original image."""
    whole = functional.interpolate(logits[None, None], padded, mode="bilinear")
    return functional.interpolate(whole[..., : resized[0], : resized[1]], original, mode="bilinear")[0, 0]
