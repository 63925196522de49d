"""Rewards that are one similarity between an image and its prompt.

A CLIP model embeds both; the score is their cosine, times a scale. PickScore and HPSv2.1 are such models fine-tuned on
human choices, CLIPScore is one as it was published. The embedded world's tiny model and ``yuvalkirstain/PickScore_v1``
go through one class.

Gotchas: the preprocessing runs in torch on the tensor, because the processors of transformers and open_clip go through
uint8 and stop the gradient; weights and arithmetic are float32 even under autocast, because differences between images
of one prompt are small against the score; only the needed pairs are multiplied, never a matrix of all images by all
prompts.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from alignbench.errors import CheckpointError
from alignbench.foreign import reading
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.checkpoints import load_frozen
from alignbench.rewards.clip import OpenClip, Preprocessing
from alignbench.rewards.reward import Reward

PROCESSOR = "a folder or hub id that has both, as `processor`, such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Similarity(Reward):
    """The scaled cosine of an image and its prompt; a model says how both are embedded and what the scale is.

    Each distinct prompt goes through the text encoder once, alone and padded to the model's length, and stays cached:
    its embedding does not depend on the texts beside it, which another number of processes or a resumed run would
    change, and every text costs the same.
    """

    differentiable = True
    device: torch.device

    def __init__(self, name: str) -> None:
        self.name = name
        self._texts: dict[str, Tensor] = {}

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``[batch, features]`` of images ``[batch, 3, height, width]`` in [0, 1]; differentiable."""

    @abstractmethod
    def embed_text(self, text: str) -> Tensor:
        """The unit vector ``[features]`` of a text; without gradient."""

    @abstractmethod
    def scale(self) -> Tensor | float:
        """What the cosine is multiplied by."""

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
        with torch.autocast(self.device.type, enabled=False):
            text = self.embed_texts(texts)
            image = self.embed_images(images)
            return self.scale() * (image * text).sum(dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[batch, features]``; only texts not seen before are encoded."""
        self._read(texts)
        return torch.stack([self._texts[text] for text in texts])

    def _read(self, texts: Sequence[str]) -> None:
        """Encode and keep the texts that are not kept yet."""
        with torch.autocast(self.device.type, enabled=False):
            for text in dict.fromkeys(texts):
                if text not in self._texts:
                    self._texts[text] = self.embed_text(text)


class PickScore(Similarity):
    """CLIP similarity on the scale that the model learnt: ``exp(logit_scale) * cos(image, text)``.

    Source: Kirstain et al. 2023, Pick-a-Pic (arXiv 2305.01569), section 3.

    Args:
        model: folder or hub id of a ``CLIPModel``, for example ``yuvalkirstain/PickScore_v1``.
        processor: folder or hub id of its tokenizer and image processor; the model's own by default. For
            ``PickScore_v1`` it is ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.
        name: how tables and records call this reward.
        device: where the model lives; images are moved there.

    Raises:
        CheckpointError: a file is missing or truncated, or weights are missing from it.
    """

    def __init__(
        self,
        model: str | Path,
        processor: str | Path | None = None,
        *,
        name: str = "pickscore",
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(name)
        expected = "a folder with config.json and model.safetensors, or a hub id such as yuvalkirstain/PickScore_v1"
        self.model = load_frozen(CLIPModel, model, expected).to(device)
        self.device = self.model.device
        with reading(f"the tokenizer and image processor in {processor or model}", PROCESSOR):
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model, trust_remote_code=False)
            images = AutoImageProcessor.from_pretrained(processor or model, trust_remote_code=False)
            self.preprocess = Preprocessing.of(images)
            self.preprocess(torch.zeros(1, 3, 8, 8))  # so that settings which cannot be are found now
        if "auto_map" in self.tokenizer.init_kwargs:
            raise CheckpointError(
                f"the tokenizer in {processor or model} asks for code of its own (auto_map), which is never run. "
                f"Expected {PROCESSOR}"
            )
        known, taken = len(self.tokenizer), self.model.config.text_config.vocab_size
        if known != taken:  # transformers makes a tokenizer that reads nothing where the vocabulary is missing
            raise CheckpointError(
                f"the tokenizer in {processor or model} has {known} tokens, {model} was trained on {taken}: its "
                "vocabulary is missing, or that of another model"
            )

    def scale(self) -> Tensor:
        """The learnt scale; scalar."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    def embed_images(self, images: Tensor) -> Tensor:
        """See `Similarity`."""
        images = images.to(self.model.device, self.model.dtype)
        features = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        return functional.normalize(features, dim=-1)

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """See `Similarity`."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(
            self.model.device
        )
        return functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)[0]


class ClipScore(Similarity):
    """The cosine of image and text under a CLIP model of open_clip, in [-1, 1].

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718) is ``2.5 max(cos, 0)`` of an OpenAI model; the raw cosine keeps its
    gradient below zero. HPSv2.1 (Wu et al. 2023, arXiv 2306.09341) is the cosine of a ViT-H-14 fine-tuned on human
    choices; its tables show 100 times that.

    Args:
        model: an open_clip model; see `OpenClip`.
        weights: a tag or a file; see `OpenClip`.
        name: how tables and records call this reward.
        device: where the model lives; images are moved there.

    Raises:
        ConfigError: open_clip is not installed.
        CheckpointError: weights are missing, truncated or of another architecture.
    """

    def __init__(self, model: str, weights: str | None, *, name: str, device: str | torch.device = "cpu") -> None:
        super().__init__(name)
        self.clip = OpenClip(model, weights, device)
        self.device = self.clip.device

    def scale(self) -> float:
        """One: the raw cosine."""
        return 1.0

    def embed_images(self, images: Tensor) -> Tensor:
        """See `Similarity`."""
        return self.clip.embed_images(images)

    def embed_text(self, text: str) -> Tensor:
        """See `Similarity`."""
        return self.clip.embed_text(text)
