"""The shipped generator, as plain diffusers loads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import alignbench.shapes
from alignbench.rewards.geneval.detectors.shapes import ShapesGenevalDetector
from alignbench.rewards.geneval.rules import official

FOLDER = Path(alignbench.shapes.__file__).parent / "checkpoints" / "generator"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_draws_what_the_caption_says_far_above_chance(pipeline: StableDiffusion3Pipeline) -> None:
    """A single object of one of 24 looks is right by chance in 4 percent of the pictures."""
    looks = [("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")]
    records = [{"tag": "colors", "include": [{"class": s, "count": 1, "color": c}]} for c, s in looks for _ in range(8)]
    images = pipeline(
        [f"a photo of a {colour} {shape}" for colour, shape in looks for _ in range(8)],
        num_inference_steps=10,
        guidance_scale=3.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    scenes = ShapesGenevalDetector().detect(np.rint(images * 255).astype(np.uint8))
    pairs = zip(records, scenes, strict=True)
    right = np.mean([official(record, scene.found, scene.colour_of).correct for record, scene in pairs])
    assert right >= 0.4


def test_it_is_stored_in_float16_and_loads_as_float32(pipeline: StableDiffusion3Pipeline) -> None:
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert sum(weight.numel() for part in parts for weight in part.parameters()) * 2 < 12e6
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) < 12e6


def test_scheduler_and_latents_are_those_of_the_design(pipeline: StableDiffusion3Pipeline) -> None:
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.transformer.config.in_channels == pipeline.vae.config.latent_channels == 8
    assert pipeline.transformer.config.sample_size == 8
    assert pipeline.vae_scale_factor == 4
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == 16
