"""GenEval of the generator, by tag, with the scheduler's own Euler grid and the exact detector."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from alignbench.rewards.geneval.detectors.shapes import ShapesGenevalDetector
from alignbench.rewards.geneval.rules import official, strict
from alignbench.shapes.captions import TAGS, Record, split
from alignbench.shapes.detector import exact_scene
from alignbench.shapes.pretrain.vae import decode

STEPS = 10


@dataclass(frozen=True)
class Scores:
    """Means over the images of a set of captions.

    Attributes:
        guidance: scale of classifier-free guidance; 1 is none.
        images: number of images of each tag.
        geneval: the official score, the unweighted mean over the tags.
        tags: official accuracy by tag.
        strict: as ``geneval``, with the training rule.
        exact_scene: as ``geneval``, for "right, and nothing else is there".
        exact_tags: exact scenes by tag.
        objects_per_image: accepted objects.
        invalid_share: images with a blob that is no object of the world.
    """

    guidance: float
    images: int
    geneval: float
    tags: Mapping[str, float]
    strict: float
    exact_scene: float
    exact_tags: Mapping[str, float]
    objects_per_image: float
    invalid_share: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def line(self) -> str:
        """One line for a log."""
        tags = " ".join(f"{tag} {value:.2f}" for tag, value in self.tags.items())
        return (
            f"guidance {self.guidance:g}: geneval {self.geneval:.3f} ({tags}) strict {self.strict:.3f} "
            f"exact {self.exact_scene:.3f} objects {self.objects_per_image:.2f} invalid {self.invalid_share:.3f}"
        )


@torch.no_grad()
def sample(
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompt: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    guidance: float,
    seed: int,
    batch_size: int = 128,
) -> Tensor:
    """Latents [n, 8, 8, 8] after `STEPS` Euler steps, as the pipeline takes them.

    Args:
        transformer: predicts the velocity.
        scheduler: gives the grid.
        prompt: text embeddings [n, 16, 128] and pooled embeddings [n, 128].
        empty: the same of the empty prompt, [1, ...].
        guidance: v = v_empty + guidance (v_prompt - v_empty).
        seed: of the initial noise.
    """
    n = len(prompt[0])
    scheduler.set_timesteps(STEPS)
    channels, side = transformer.config.in_channels, transformer.config.sample_size
    noise = torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))
    parts = []
    for part, text, pooled in zip(*(torch.split(tensor, batch_size) for tensor in (noise, *prompt)), strict=True):
        latents = part
        if guidance != 1:
            text = torch.cat([empty[0].expand(len(part), -1, -1), text])
            pooled = torch.cat([empty[1].expand(len(part), -1), pooled])
        for k, timestep in enumerate(scheduler.timesteps):
            model_input = torch.cat([latents, latents]) if guidance != 1 else latents
            velocity = transformer(
                hidden_states=model_input,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=timestep.expand(len(model_input)),
                return_dict=False,
            )[0].float()
            if guidance != 1:
                unguided, guided = velocity.chunk(2)
                velocity = unguided + guidance * (guided - unguided)
            latents = latents + (scheduler.sigmas[k + 1] - scheduler.sigmas[k]) * velocity
        parts.append(latents)
    return torch.cat(parts)


def embed(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Text embeddings [n, 16, 128] and pooled embeddings [n, 128] of token ids [n, 16], as the pipeline makes them."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return text, torch.cat([output.text_embeds for output in outputs], dim=-1)


def test_records(images_per_tag: int) -> list[Record]:
    """Captions of the test split, every tag ``images_per_tag`` times and its captions as equally often as possible."""
    by_tag = {tag: [dict(prompt.metadata) for prompt in split("test") if prompt.metadata["tag"] == tag] for tag in TAGS}
    return [members[k % len(members)] for members in by_tag.values() for k in range(images_per_tag)]


def score(records: Sequence[Record], images: NDArray[np.uint8], guidance: float) -> Scores:
    """Scores of one image for each record; every tag must have equally many."""
    scenes = ShapesGenevalDetector().detect(images)
    tags = np.array([record["tag"] for record in records])
    pairs = list(zip(records, scenes, strict=True))
    correct = np.array([official(record, scene.found, scene.colour_of).correct for record, scene in pairs], dtype=float)
    strictly = np.array([strict(record, scene.found, scene.colour_of) for record, scene in pairs])
    exact = np.array([exact_scene(record, scene.objects, scene.invalid) for record, scene in pairs], dtype=float)
    return Scores(
        guidance=guidance,
        images=len(records) // len(TAGS),
        geneval=float(correct.mean()),
        tags={tag: float(correct[tags == tag].mean()) for tag in TAGS},
        strict=float(strictly.mean()),
        exact_scene=float(exact.mean()),
        exact_tags={tag: float(exact[tags == tag].mean()) for tag in TAGS},
        objects_per_image=float(np.mean([len(scene.objects) for scene in scenes])),
        invalid_share=float(np.mean([scene.invalid > 0 for scene in scenes])),
    )


def generate(
    transformer: SD3Transformer2DModel,
    encoders: Sequence[CLIPTextModelWithProjection],
    autoencoder: AutoencoderKL,
    scheduler: FlowMatchEulerDiscreteScheduler,
    ids: Tensor,
    empty_ids: Tensor,
    guidance: float,
    seed: int,
) -> NDArray[np.uint8]:
    """Images uint8 [n, 32, 32, 3] for token ids [n, 16]."""
    with torch.no_grad():
        prompt, empty = embed(encoders, ids), embed(encoders, empty_ids)
    return decode(autoencoder, sample(transformer, scheduler, prompt, empty, guidance, seed))
