"""Rewards that are one similarity between an image and its prompt.

A CLIP model embeds both; the score is the cosine times the model's learnt scale. PickScore is this model fine-tuned on
human choices, so the embedded world's tiny model and ``yuvalkirstain/PickScore_v1`` go through one class.

Gotchas: the preprocessing runs in torch on the tensor, because the processors of transformers go through uint8 and stop
the gradient; weights and arithmetic are float32 even under autocast, because differences between images of one prompt
are small against the score; only the needed pairs are multiplied, never a matrix of all images by all prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from alignbench.errors import CheckpointError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import Reward

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


class PickScore(Reward):
    """CLIP similarity on the scale that the model learnt: ``exp(logit_scale) * cos(image, text)``.

    Source: Kirstain et al. 2023, Pick-a-Pic (arXiv 2305.01569), section 3. Each distinct prompt goes through the text
    encoder once, alone and padded to the model's length, and stays cached: its embedding does not depend on the texts
    beside it, which another number of processes or a resumed run would change, and every text costs the same.

    Args:
        model: folder or hub id of a ``CLIPModel``, for example ``yuvalkirstain/PickScore_v1``.
        processor: folder or hub id of its tokenizer and image processor; the model's own by default. For
            ``PickScore_v1`` it is ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.
        name: how tables and records call this reward.
        device: where the model lives; images are moved there.

    Raises:
        CheckpointError: a file is missing or truncated, or weights are missing from it.
    """

    differentiable = True

    def __init__(
        self,
        model: str | Path,
        processor: str | Path | None = None,
        *,
        name: str = "pickscore",
        device: str | torch.device = "cpu",
    ) -> None:
        self.name = name
        self.model = load_clip(model).to(device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
            self.preprocess = Preprocessing.of(AutoImageProcessor.from_pretrained(processor or model))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no tokenizer and image processor in {processor or model}: {error}. Give `processor` a folder or hub "
                "id that has both, for example laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
            ) from error
        self._texts: dict[str, Tensor] = {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score images ``[batch, 3, height, width]`` in [0, 1]; differentiable with respect to them."""
        return {"reward": self.similarity(images, [prompt.text for prompt in prompts]).float()}

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """See `Reward.encode`."""
        self._read([prompt.text for prompt in prompts])

    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Scaled cosine of image i and text i: ``[batch]``, in the model's dtype.

        Raises:
            ValueError: another number of texts than of images.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} prompts: one prompt per image is needed")
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            text = self.embed_texts(texts)
            image = self.embed_images(images)
            scale: Tensor = self.model.logit_scale.exp()
            return scale * (image * text).sum(dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``[batch, projection]`` of images in [0, 1]."""
        images = images.to(self.model.device, self.model.dtype)
        features = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        return functional.normalize(features, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[batch, projection]``; only texts not seen before are encoded."""
        self._read(texts)
        return torch.stack([self._texts[text] for text in texts])

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> None:
        """Encode and keep the texts that are not kept yet."""
        length = self.model.config.text_config.max_position_embeddings
        with torch.autocast(self.model.device.type, enabled=False):
            for text in dict.fromkeys(texts):
                if text not in self._texts:
                    tokens = self.tokenizer(
                        text, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
                    ).to(self.model.device)
                    features = self.model.get_text_features(**tokens).pooler_output
                    self._texts[text] = functional.normalize(features, dim=-1)[0]


def load_clip(model: str | Path) -> Any:
    """A frozen float32 ``CLIPModel`` in evaluation mode.

    Raises:
        CheckpointError: files are missing or truncated, or the file lacks weights that the model needs.
    """
    needed = "a folder with config.json and model.safetensors, or a hub id such as yuvalkirstain/PickScore_v1"
    try:
        clip, report = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot load a CLIP model from {model}: {error}. Expected {needed}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{model} has no weights for {missing[0]} and {len(missing) - 1} more: not a whole CLIP model. "
            f"Expected {needed}"
        )
    return clip.eval().requires_grad_(False)
