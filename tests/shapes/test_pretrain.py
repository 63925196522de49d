"""The trainers of the autoencoder and the generator, at tiny sizes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from alignbench.errors import CheckpointError
from alignbench.shapes.captions import TAGS, meaning, records
from alignbench.shapes.pretrain import __main__ as command_line
from alignbench.shapes.pretrain.data import TAG_WEIGHTS, Corruption, depicted, draw_record, with_extra_object
from alignbench.shapes.pretrain.evaluation import embed, sample
from alignbench.shapes.pretrain.generator import (
    RECIPES,
    Architecture,
    Batch,
    CaptionTable,
    GeneratorRecipe,
    Pool,
    build_generator,
    draw_batch,
    flow_matching_loss,
    learning_rate_factor,
    save_pipeline,
    teacher_guidance,
    tokenize,
    train_generator,
)
from alignbench.shapes.pretrain.vae import (
    AutoencoderRecipe,
    build_autoencoder,
    decode,
    encode,
    train_autoencoder,
    training_images,
)
from alignbench.shapes.tokenizer import build_tokenizer

TINY = GeneratorRecipe(
    steps=4,
    architecture=Architecture(width=32, heads=2, layers=2, text_width=16, text_layers=2),
    captions=4,
    images_per_caption=2,
    warmup=2,
    pool=12,
)
TINY_AUTOENCODER = AutoencoderRecipe(steps=4, batch_size=4, warmup=2, images=16)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return build_autoencoder(0).eval()


# ------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_generator_equals_an_uninterrupted_one(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    whole = train_generator(TINY, autoencoder, tmp_path / "whole.pt")
    train_generator(TINY, autoencoder, tmp_path / "parts.pt", stop_after=3)
    resumed = train_generator(TINY, autoencoder, tmp_path / "parts.pt")
    _assert_equal_weights(whole, resumed)


def test_another_seed_gives_another_generator(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    first = train_generator(TINY, autoencoder, tmp_path / "first.pt")
    second = train_generator(replace(TINY, seed=1), autoencoder, tmp_path / "second.pt")
    assert not torch.equal(first.transformer.proj_out.weight, second.transformer.proj_out.weight)


def test_a_resumed_autoencoder_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train_autoencoder(TINY_AUTOENCODER, tmp_path / "whole.pt")
    train_autoencoder(TINY_AUTOENCODER, tmp_path / "parts.pt", stop_after=2)
    resumed = train_autoencoder(TINY_AUTOENCODER, tmp_path / "parts.pt")
    _assert_equal_weights(whole, resumed)
    assert whole.config.scaling_factor == resumed.config.scaling_factor


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train_autoencoder(TINY_AUTOENCODER, tmp_path / "state.pt", stop_after=1)
    with pytest.raises(CheckpointError, match=r"expected \{'steps': 5.*remove it to start again"):
        train_autoencoder(replace(TINY_AUTOENCODER, steps=5), tmp_path / "state.pt")


# ------------------------------------------------------------------------------------------------ the autoencoder


def test_scaled_latents_have_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    trained = train_autoencoder(TINY_AUTOENCODER, tmp_path / "state.pt")
    latents = encode(trained, training_images(TINY_AUTOENCODER.images, TINY_AUTOENCODER.seed))
    assert latents.shape == (16, 8, 8, 8)
    assert latents.mean().item() == pytest.approx(0, abs=1e-4)
    assert latents.std().item() == pytest.approx(1, abs=1e-4)


def test_decode_undoes_the_scaling(autoencoder: AutoencoderKL) -> None:
    images = training_images(3, 0)
    shifted = build_autoencoder(0).eval()
    shifted.register_to_config(shift_factor=0.3, scaling_factor=2.0)
    expected = decode(autoencoder, encode(autoencoder, images)).astype(int)
    assert np.abs(decode(shifted, encode(shifted, images)).astype(int) - expected).max() <= 1  # rounding


# ------------------------------------------------------------------------------------------------ the generator


def test_the_loss_is_that_of_flow_matching() -> None:
    """A network that returns its input x = (1 - s) x0 + s e has the error (x - (e - x0))^2."""
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 3, 1, 2, 2))
    sigma = np.array([0.25, 0.5, 1.0])
    batch = Batch(
        *(torch.from_numpy(array).float() for array in (clean, noise, sigma)),
        ids=torch.zeros(3, 16),
        guidance=torch.ones(3),
    )
    weight = sigma[:, None, None, None]
    expected = np.mean(((1 - weight) * clean + weight * noise - (noise - clean)) ** 2)

    class Identity(torch.nn.Module):
        def forward(self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return latents

    assert flow_matching_loss(Identity(), batch).item() == pytest.approx(expected, rel=1e-5)


def test_distilled_guidance_is_the_scaled_difference_of_the_teacher() -> None:
    """Captions of id k > 1 make the teacher say 10 k, the empty one (end token 1 after begin 0) says 1."""

    class Teacher(torch.nn.Module):
        def forward(self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            said = torch.where(ids[:, 1] == 1, 1.0, 10.0 * ids[:, 1])
            return said.repeat_interleave(len(latents) // len(ids))[:, None, None, None].expand_as(latents)

    ids = torch.zeros(3, 16, dtype=torch.int64)
    ids[:, 1] = torch.tensor([2, 3, 4])
    latents = torch.zeros(6, 1, 2, 2)
    batch = Batch(latents, latents, torch.full((6,), 0.5), ids, guidance=torch.tensor([1.0, 3.0, 1.5]))
    guidance = teacher_guidance(Teacher(), latents, batch)
    expected = [0, 0, 2 * (30 - 1), 2 * (30 - 1), 0.5 * (40 - 1), 0.5 * (40 - 1)]
    assert guidance[:, 0, 0, 0].tolist() == expected


def test_noise_levels_are_those_of_the_scheduler() -> None:
    """With shift 3, half of the shifted times lie above 3 * 0.5 / (1 + 2 * 0.5) = 0.75."""
    pool = Pool(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4, 1, 2, 2, dtype=torch.float16))
    recipe = replace(TINY, captions=100, images_per_caption=4)
    batch = draw_batch(recipe, pool, CaptionTable.of(build_tokenizer()), step=0)
    assert batch.sigma.shape == (400,)
    assert (batch.sigma > 0.75).sum() == 200
    assert 0 < batch.sigma.min() < 0.01
    assert 0.99 < batch.sigma.max() < 1


def test_captions_are_dropped_and_prefixed_at_their_rates() -> None:
    table = CaptionTable.of(build_tokenizer())
    pool = Pool(torch.arange(400), torch.zeros(400, 1, 1, 2, 2, dtype=torch.float16))
    recipe = replace(TINY, captions=20_000, images_per_caption=1, dropout=0.1, control=0.2)
    ids = draw_batch(recipe, pool, table, step=3).ids
    dropped = (ids == table.empty).all(dim=1)
    words = {build_tokenizer()(word).input_ids[1] for word in ("sharp", "clean", "vivid")}
    prefixed = torch.isin(ids[:, 1], torch.tensor(sorted(words)))
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.01)  # 4.7 standard errors
    assert prefixed.double().mean().item() == pytest.approx(0.9 * 0.2, abs=0.013)


def test_shares_of_a_batch_have_the_gradient_of_the_whole() -> None:
    recipe = TINY
    generator = build_generator(recipe, len(build_tokenizer()))
    pool = Pool(torch.arange(12), torch.randn(12, 2, 8, 8, 8).half())
    batch = draw_batch(recipe, pool, CaptionTable.of(build_tokenizer()), step=0)
    losses = [flow_matching_loss(generator, batch.share(rank, 2)).item() for rank in range(2)]
    assert np.mean(losses) == pytest.approx(flow_matching_loss(generator, batch).item(), rel=1e-3)


def test_the_learning_rate_warms_up_and_ends_at_a_twentieth() -> None:
    recipe = replace(TINY, steps=110, warmup=10)
    assert learning_rate_factor(recipe, 0) == pytest.approx(0.1)
    assert learning_rate_factor(recipe, 10) == pytest.approx(1)
    assert learning_rate_factor(recipe, 60) == pytest.approx(0.525)
    assert learning_rate_factor(recipe, 110) == pytest.approx(0.05)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_equals_the_pipeline_on_the_saved_folder(
    tmp_path: Path, autoencoder: AutoencoderKL, guidance: float
) -> None:
    generator = build_generator(TINY, len(build_tokenizer()))
    torch.nn.init.normal_(generator.transformer.proj_out.weight, std=0.2)  # zero at the beginning: nothing to see
    save_pipeline(tmp_path / "folder", generator, autoencoder, {"capacity": TINY.as_dict()})
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", text_encoder_3=None, tokenizer_3=None)
    prompts = ["a photo of a red circle", "a photo of two crosses"]
    expected = pipeline(
        prompts,
        num_inference_steps=10,
        guidance_scale=guidance,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    with torch.no_grad():
        prompt, empty = (embed(encoders, tokenize(pipeline.tokenizer, texts)) for texts in (prompts, [""]))
    sampled = sample(pipeline.transformer, pipeline.scheduler, prompt, empty, guidance, seed=5)
    torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "folder" / "training.json").read_text())["capacity"]["steps"] == 4


# ------------------------------------------------------------------------------------------------ data


def test_captions_are_drawn_by_the_weight_of_their_tag() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(draw_record(rng)["tag"] for _ in range(6000))
    total = sum(TAG_WEIGHTS.values())
    assert set(counts) == set(TAGS)
    for tag, weight in TAG_WEIGHTS.items():
        assert counts[tag] / 6000 == pytest.approx(weight / total, abs=0.03)


def test_without_corruption_the_caption_is_what_is_shown() -> None:
    rng = np.random.default_rng(0)
    for record in records():
        assert depicted(record, Corruption(), rng) == record


@pytest.mark.parametrize(
    ("kind", "tags"),
    [
        ("shape", TAGS),
        ("colour", ("colors", "color_attr")),
        ("missing", ("two_object", "position", "color_attr")),
        ("count", ("counting",)),
        ("relation", ("position",)),
        ("swap", ("color_attr",)),
    ],
)
def test_a_certain_corruption_changes_the_meaning_of_its_tags_only(kind: str, tags: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    corruption = Corruption(**{kind: 1.0})
    for record in records():
        changed = meaning(depicted(record, corruption, rng)) != meaning(record)
        assert changed == (record["tag"] in tags), record["prompt"]


def test_what_is_shown_is_always_a_record_of_the_world() -> None:
    rng = np.random.default_rng(1)
    corruption = Corruption(0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3)
    prompts = {record["prompt"] for record in records()}
    singles = {f"a photo of a {shape}" for shape in ("circle", "square", "triangle", "cross")}
    for record in records():
        assert depicted(record, corruption, rng)["prompt"] in prompts | singles


def test_an_extra_object_has_another_shape_and_leaves_four_alone() -> None:
    rng = np.random.default_rng(0)
    for record in records():
        named = sum(clause["count"] for clause in record["include"])
        scene = with_extra_object(record, rng)
        assert len(scene) == min(named + 1, 4)
        if named < 4:
            assert scene[-1].shape not in {thing.shape for thing in scene[:-1]}


def test_an_impossible_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a probability for swap, got 1\.5"):
        Corruption(swap=1.5)


# ------------------------------------------------------------------------------------------------ the command line


def test_the_base_phase_needs_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["generator", "--phase", "base"]) == 1
    assert "expected --from with every phase but capacity" in capsys.readouterr().err
    assert list(RECIPES) == ["capacity", "corrupted", "base"]


def _assert_equal_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
