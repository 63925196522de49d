"""CLIP models of open_clip, and the preprocessing of CLIP models as a differentiable function.

Gotchas: open_clip computes ``ViT-L-14`` with plain GELU, but OpenAI's weights need QuickGELU, so a pair that does not
fit is refused; open_clip is an extra (``photo``) and is imported when a model is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignbench.errors import CheckpointError, ConfigError
from alignbench.foreign import reading
from alignbench.rewards.checkpoints import weights_file

BICUBIC = 3  # PIL's number, as processors store it


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalise, differentiable.

    Attributes:
        size: the shorter edge after resizing, or ``(height, width)``.
        crop: ``(height, width)`` of the centre crop.
        mean: per channel, for values in [0, 1].
        std: per channel, for values in [0, 1].
    """

    size: int | tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """Read the settings of a CLIP image processor.

        Raises:
            CheckpointError: the processor resizes by something other than bicubic interpolation.
        """
        if int(processor.resample) != BICUBIC:
            raise CheckpointError(
                f"the image processor resizes with PIL filter {int(processor.resample)}, expected {BICUBIC} (bicubic): "
                "use the processor that the model was trained with"
            )
        size, crop = processor.size, processor.crop_size
        return cls(
            size=size.shortest_edge or (size.height, size.width),
            crop=(crop.height, crop.width),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` in [0, 1] to pixel values ``[batch, 3, *crop]``, same dtype."""
        height, width = images.shape[-2:]
        if isinstance(self.size, int):
            shorter = min(height, width)
            resized = (int(self.size * height / shorter), int(self.size * width / shorter))
        else:
            resized = self.size
        if resized != (height, width):
            # Bicubic overshoots at edges; an 8-bit resize saturates there, so does this one.
            images = functional.interpolate(images, resized, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((have - want) // 2 for have, want in zip(resized, self.crop, strict=True))
        images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class OpenClip:
    """A frozen float32 CLIP model of open_clip with its tokenizer and preprocessing.

    Args:
        model: name of an architecture (``ViT-H-14``), or ``local-dir:FOLDER`` or ``hf-hub:ID`` with
            ``open_clip_config.json`` and weights.
        weights: for an architecture, a tag of open_clip (``openai``) or a file; see ``weights_file``. Null otherwise.
        device: where the model lives; images are moved there.

    Raises:
        ConfigError: open_clip is not installed.
        CheckpointError: weights are missing, truncated, or of another architecture or activation.
    """

    def __init__(self, model: str, weights: str | None, device: str | torch.device = "cpu") -> None:
        open_clip = _open_clip()
        expected = "an architecture with a tag or a file of weights, or local-dir:FOLDER, or hf-hub:ID"
        file = weights
        if weights is None and ":" not in model:
            raise CheckpointError(f"cannot read the CLIP model {model} without weights: expected {expected}")
        if weights is not None and ("/" in weights or Path(weights).suffix):
            file = str(weights_file(weights))
        elif weights is not None:
            _check_activation(open_clip, model, weights)
        with reading(f"the CLIP model {model} with {weights}", expected):
            self.model: Any = open_clip.create_model(
                model, pretrained=file, device=device, require_pretrained=True, weights_only=True
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        self.model.eval().requires_grad_(False)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        if settings["interpolation"] != "bicubic" or settings["resize_mode"] != "shortest":
            raise CheckpointError(
                f"{model} resizes to {settings['resize_mode']} with {settings['interpolation']} interpolation: "
                "expected a CLIP model that resizes the shorter edge with bicubic interpolation"
            )
        with reading(f"the settings of the images of {model}", expected):
            size = settings["size"]
            crop = (size, size) if isinstance(size, int) else (size[0], size[1])
            self.preprocess = Preprocessing(
                size=crop[0] if crop[0] == crop[1] else crop,
                crop=crop,
                mean=tuple(settings["mean"]),
                std=tuple(settings["std"]),
            )
            self._as_published = open_clip.image_transform(
                crop, is_train=False, mean=settings["mean"], std=settings["std"]
            )
            self.preprocess(torch.zeros(1, 3, 8, 8))  # so that what cannot be is found now

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.model.logit_scale.device
        return device

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``[batch, features]`` of images ``[batch, 3, height, width]`` in [0, 1]; differentiable."""
        return self.embed_pixels(self.preprocess(images.to(self.device, self.model.logit_scale.dtype)))

    def embed_pictures(self, pictures: list[NDArray[np.uint8]]) -> Tensor:
        """Unit vectors of uint8 RGB pictures, each [h, w, 3], resized in 8 bits as the published scores were."""
        pixels = torch.stack([self._as_published(Image.fromarray(picture)) for picture in pictures])
        return self.embed_pixels(pixels.to(self.device, self.model.logit_scale.dtype))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Unit vectors of preprocessed images."""
        return functional.normalize(self.model.encode_image(pixels), dim=-1)

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """The unit vector ``[features]`` of a text, alone and padded to the model's length."""
        features = self.model.encode_text(self.tokenizer([text]).to(self.device))
        return functional.normalize(features, dim=-1)[0]


def _open_clip() -> Any:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # torchvision made for another torch is a RuntimeError
        raise ConfigError(
            f"this reward needs open_clip, which cannot be imported ({error}): pip install 'alignbench[photo]'"
        ) from error
    return open_clip


def _check_activation(open_clip: Any, model: str, tag: str) -> None:
    """Refuse an architecture whose activation is not the one that the weights were trained with."""
    architecture, published = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
    if architecture is None or not published:
        return  # open_clip says what there is
    if architecture.get("quick_gelu", False) != published.get("quick_gelu", False):
        other = model.removesuffix("-quickgelu") if architecture.get("quick_gelu") else f"{model}-quickgelu"
        raise CheckpointError(f"{model} computes another activation than the weights {tag} need: use {other}")
