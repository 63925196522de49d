"""FLUX, Stable Diffusion 1.5 and XL against diffusers' own pipelines, on tiny random checkpoints."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignbench.errors import CheckpointError, ConfigError
from alignbench.policies import diffusers_policy, saved_pipeline
from alignbench.policies.diffusers_policy import DiffusersPolicy
from alignbench.policies.flux import FluxPolicy, pack, unpack
from alignbench.policies.unet import StableDiffusionPolicy, StableDiffusionXLPolicy
from alignbench.sampling.rollout import Sampler, sample
from tests.tiny import tiny_flux, tiny_sd15, tiny_sdxl

TEXTS = ["a red dog", "two cats", "a red dog"]
STEPS = 5


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        policy: the class under test.
        build: saves a tiny checkpoint of it.
        options: of `from_pretrained`, beside the rank.
        call: of its pipeline, beside what all pipelines take.
        weights: a few paths of layers of its denoiser.
        lora: trained tensors with the default targets, counted by hand.
        parameterisation: what it predicts.
    """

    policy: type[DiffusersPolicy]
    build: Callable[[Path], Path]
    options: dict[str, Any]
    call: dict[str, Any]
    weights: tuple[str, ...]
    lora: int
    parameterisation: str


FAMILIES = {
    "flux": Family(
        FluxPolicy,
        tiny_flux,
        {"resolution": 16, "max_sequence_length": 12},
        {"guidance_scale": 3.5, "max_sequence_length": 12},
        (
            "transformer_blocks.0.attn.add_k_proj",
            "single_transformer_blocks.0.attn.to_v",
            "single_transformer_blocks.0.proj_out",
            "time_text_embed.guidance_embedder.linear_1",
        ),
        2 * (8 + 4 + 3),  # the block of two streams has 8 attention and 4 feed-forward layers; the single block 3
        "velocity",
    ),
    "sd15": Family(
        StableDiffusionPolicy,
        tiny_sd15,
        {},
        {},
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "time_embedding.linear_1"),
        2 * 4 * 2 * 4,  # attentions: 1 down, 1 in the middle, 2 up; self and cross; 4 layers
        "epsilon",
    ),
    "sdxl": Family(
        StableDiffusionXLPolicy,
        tiny_sdxl,
        {},
        {},
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "add_embedding.linear_1"),
        2 * 4 * 2 * 4,
        "epsilon",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: family.build(tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.fixture(params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(name: str, folders: dict[str, Path], **options: Any) -> Any:
    family = FAMILIES[name]
    return family.policy.from_pretrained(  # type: ignore[attr-defined]
        options.pop("folder", folders[name]), **{"rank": 4, "alpha": 8.0, **family.options, **options}
    )


def pipeline(name: str, folders: dict[str, Path], **components: Any) -> Any:
    pipe = FAMILIES[name].policy.pipeline_class.from_pretrained(folders[name], **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_latents(name: str, pipe: Any, noise: Tensor, guidance: float) -> Tensor:
    """What the pipeline's own call gives, as ``[B, C, h, w]``."""
    arguments = {"guidance_scale": guidance, **FAMILIES[name].call}
    if name == "flux":
        noise = pack(noise)
        arguments |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(TEXTS)}
    latents = pipe(
        TEXTS, latents=noise, num_inference_steps=STEPS, height=16, width=16, output_type="latent", **arguments
    ).images
    return unpack(latents, 4, 4) if name == "flux" else latents


def euler(policy: Any, guidance: float, view: str = "current") -> Tensor:
    condition = policy.encode(TEXTS)

    def predict(latents: Tensor, sigma: Tensor) -> Tensor:
        prediction = policy.predict(latents, sigma, condition, guidance=guidance, view=view)
        return policy.path.velocity(latents, prediction, sigma)

    with torch.no_grad():
        latents, _ = sample(predict, policy.noise(range(3)), policy.grid(STEPS), Sampler(STEPS), policy.noise)
    return latents


def randomise_lora(policy: Any) -> None:
    """Moves `current` away from the reference."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.trainable_parameters().items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.3, generator=generator)


# Parity


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_euler_gives_the_latents_of_the_pipeline(name: str, folders: dict[str, Path], trainable: str) -> None:
    """With the scheduler that was saved: FLUX's own, DDIM for SD 1.5 and SDXL's own, which walks the same curve."""
    policy, pipe = load(name, folders, trainable=trainable), pipeline(name, folders)
    for guidance in (1.0, 2.5):
        expected = pipeline_latents(name, pipe, policy.noise(range(3)), guidance)
        assert (euler(policy, guidance) - expected).abs().max() < 1e-4
        assert (expected[0] - expected[1]).abs().max() > 0.1


def test_spacing_of_time_steps_is_the_schedulers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_sd15(tmp_path, timestep_spacing="trailing")
    policy = load("sd15", folders, folder=folder)
    assert policy.path.model_time(policy.grid(STEPS)[:-1]).tolist() == [999, 799, 599, 399, 199]
    assert load("sd15", folders).path.model_time(load("sd15", folders).grid(STEPS)[:-1]).tolist() == [
        801, 601, 401, 201, 1,
    ]  # fmt: skip
    expected = pipeline_latents("sd15", pipeline("sd15", {"sd15": folder}), policy.noise(range(3)), 2.5)
    assert (euler(policy, 2.5) - expected).abs().max() < 1e-4


def test_sdxl_equals_its_pipeline_with_ddim(folders: dict[str, Path]) -> None:
    policy, pipe = load("sdxl", folders), pipeline("sdxl", folders)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    expected = pipeline_latents("sdxl", pipe, policy.noise(range(3)), 2.5)
    assert (euler(policy, 2.5) - expected).abs().max() < 1e-4


def test_sdxl_without_zeros_contrasts_with_the_empty_text(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_sdxl(tmp_path, force_zeros_for_empty_prompt=False)
    policy, pipe = load("sdxl", folders, folder=folder), pipeline("sdxl", {"sdxl": folder})
    expected = pipeline_latents("sdxl", pipe, policy.noise(range(3)), 2.5)
    assert (euler(policy, 2.5) - expected).abs().max() < 1e-4
    assert (euler(load("sdxl", folders), 2.5) - expected).abs().max() > 1e-2  # the same weights, zeros


def test_stable_diffusion_1_as_it_was_published(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its repository names another sampler and a safety checker: the policy walks DDIM's steps and loads no checker."""
    published = shutil.copytree(folders["sd15"], tmp_path / "published")
    index = json.loads((published / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # there is no such folder here
    (published / "model_index.json").write_text(json.dumps(index))
    settings = json.loads((published / "scheduler" / "scheduler_config.json").read_text())
    settings |= {
        "_class_name": "PNDMScheduler",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
    (published / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    policy = load("sd15", folders, folder=published)
    assert type(policy.pipeline.scheduler).__name__ == "PNDMScheduler"
    assert policy.pipeline.safety_checker is None
    pipe = pipeline("sd15", folders)
    expected = pipeline_latents("sd15", pipe, policy.noise(range(3)), 4.5)
    assert (euler(policy, 4.5) - expected).abs().max() < 1e-4


def test_a_hub_id_is_downloaded_at_its_revision(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(source: str, revision: str | None) -> str:
        asked.append((source, revision))
        return str(folders[name])

    monkeypatch.setattr(FAMILIES[name].policy.pipeline_class, "download", download)
    monkeypatch.setattr(saved_pipeline, "snapshot_download", lambda *id, revision, **_: download(*id, revision))
    for weights in ("pretrained", "random"):
        policy = load(name, folders, folder="owner/a-model", revision="v2", weights=weights)
        assert policy.latent_shape == load(name, folders).latent_shape
    assert asked == 2 * [("owner/a-model", "v2")]


@pytest.mark.parametrize(("family", "layer"), [(key, layer) for key in FAMILIES for layer in FAMILIES[key].weights])
def test_parity_notices_one_permuted_weight(folders: dict[str, Path], family: str, layer: str) -> None:
    policy, pipe = load(family, folders), pipeline(family, folders)
    expected = pipeline_latents(family, pipe, policy.noise(range(3)), 1.0)
    weight = policy.denoiser.get_submodule(layer).weight
    weight.data = weight.data.flip(0)
    assert (euler(policy, 1.0) - expected).abs().max() > 1e-4


def test_decode_and_encode_give_what_the_pipelines_vae_gives(name: str, folders: dict[str, Path]) -> None:
    policy = load(name, folders)
    vae = AutoencoderKL.from_pretrained(folders[name] / "vae")
    shift, latents, images = 0.1 if name == "flux" else 0.0, policy.noise([1, 2]), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        decoded = (vae.decode(latents / 1.5 + shift).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(policy.decode(latents), decoded)
        mean = vae.encode(2 * images - 1).latent_dist.mean
        torch.testing.assert_close(policy.encode_images(images), (mean - shift) * 1.5)


def test_samples_at_different_sigmas_share_a_batch(name: str, folders: dict[str, Path]) -> None:
    policy = load(name, folders)
    latents, condition, sigma = policy.noise([1, 2, 3]), policy.encode(TEXTS), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        batch = policy.predict(latents, sigma, condition, guidance=2.0)
        for index in range(3):
            row = slice(index, index + 1)
            alone = policy.predict(latents[row], sigma[row], condition[row], guidance=2.0)
            torch.testing.assert_close(batch[row], alone, rtol=1e-4, atol=1e-4)


def test_detached_unconditional_branch(name: str, folders: dict[str, Path]) -> None:
    """Same value; the gradient is g times that of the conditional branch alone."""
    policy = load(name, folders, dtype="float64")
    randomise_lora(policy)
    parameters = list(policy.trainable_parameters().values())
    latents, sigma, condition = policy.noise([1]), torch.tensor([0.6], dtype=torch.float64), policy.encode(["a dog"])

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value.sin().sum(), parameters, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    attached = policy.predict(latents, sigma, condition, guidance=3.0)
    detached = policy.predict(latents, sigma, condition, guidance=3.0, detach_uncond=True)
    torch.testing.assert_close(attached, detached)
    uncond = policy.predict(latents, sigma, policy.unconditional()).detach()
    cond = policy.predict(latents, sigma, condition)
    expected = gradient(uncond + 3.0 * (cond - uncond))
    torch.testing.assert_close(gradient(detached), expected)
    assert not torch.allclose(gradient(attached), expected, rtol=1e-2)


def test_packing_is_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 3, 4), latents)


def test_guidance_embedding_is_an_input(folders: dict[str, Path]) -> None:
    policy = load("flux", folders)
    latents, sigma, condition = policy.noise([1, 2, 3]), torch.full((3,), 0.5), policy.encode(TEXTS)
    with torch.no_grad():
        default = policy.predict(latents, sigma, condition)
        assert torch.equal(policy.predict(latents, sigma, condition, guidance_embedding=3.5), default)
        other = policy.predict(latents, sigma, condition, guidance_embedding=1.0)
        again = load("flux", folders, guidance_embedding=1.0).predict(latents, sigma, condition)
    assert (other - default).abs().max() > 1e-3
    assert torch.equal(again, other)


def test_guidance_embedding_must_fit_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guidance_embedding is None, but this model takes guidance as an input"):
        load("flux", folders, guidance_embedding=None)
    without = tiny_flux(tmp_path, guidance_embeds=False)
    with pytest.raises(ConfigError, match=r"guidance_embedding is 3.5, but this model has no guidance input"):
        load("flux", folders, folder=without)
    for policy in (load("flux", folders, folder=without, guidance_embedding=None), load("sd15", folders)):
        with pytest.raises(ConfigError, match=r"no guidance input, got guidance_embedding=2\.0"):
            policy.predict(policy.noise([1]), torch.ones(1), policy.encode(["a"]), guidance_embedding=2.0)


# Text


def test_offloaded_encoders_are_fetched_once_for_all_new_texts(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(name, folders, offload_text_encoders=True)
    moves: list[str] = []
    first = policy.pipeline.text_encoder
    monkeypatch.setattr(
        diffusers_policy, "_move", lambda module, device: moves.append(str(device)) if module is first else None
    )
    policy.device = torch.device("cpu", 0)  # told apart from main memory, "cpu", by its index
    condition = policy.encode(TEXTS)
    assert moves == ["cpu:0", "cpu"]
    policy.encode(TEXTS)
    assert len(moves) == 2
    kept = load(name, folders).encode(TEXTS)
    for key, tensor in condition.tensors.items():
        torch.testing.assert_close(tensor.cpu(), kept.tensors[key])


# Weights


def test_lora_trains_the_targets(name: str, folders: dict[str, Path]) -> None:
    names = load(name, folders).trainable_parameters()
    assert len(names) == FAMILIES[name].lora
    assert {each.rpartition(".")[2] for each in names} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_views_and_reference(name: str, folders: dict[str, Path], trainable: str) -> None:
    policy = load(name, folders, trainable=trainable)
    expected = euler(policy, 2.0)
    policy.add_view("old")
    for parameter in policy.trainable_parameters().values():
        parameter.data.add_(0.05)
    for view in ("reference", "old"):
        torch.testing.assert_close(euler(policy, 2.0, view=view), expected, rtol=0, atol=1e-4)
    assert (euler(policy, 2.0) - expected).abs().max() > 1e-2
    trained = {each for each, parameter in policy.denoiser.named_parameters() if parameter.requires_grad}
    assert trained == set(policy.trainable_parameters())
    assert trainable == "lora" or trained == {each for each, _ in policy.denoiser.named_parameters()}
    latents, sigma, condition = policy.noise([1]), torch.tensor([0.5]), policy.encode(["a dog"])
    needs_grad = {view: policy.predict(latents, sigma, condition, view=view).requires_grad for view in policy.views}
    assert needs_grad == {"current": True, "reference": False, "old": False}


@pytest.mark.parametrize("view", ["current", "old"])
def test_gradient_checkpointing_changes_no_number(name: str, folders: dict[str, Path], view: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "vae_gradient_checkpointing": checkpointing}
        policy = load(name, folders, dtype="float64", **settings)
        policy.add_view("old")
        randomise_lora(policy)
        latents = policy.noise([1]).requires_grad_()
        sigma = torch.tensor([0.6], dtype=torch.float64)
        clean = policy.path.clean(latents, policy.predict(latents, sigma, policy.encode(["a dog"]), view=view), sigma)
        policy.decode(clean).sum().backward()
        gradients.append(latents.grad)
        assert policy.weights.active == "current"
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0


def test_bfloat16_is_autocast_over_float32_masters(name: str, folders: dict[str, Path]) -> None:
    policy, plain = load(name, folders, dtype="bfloat16"), load(name, folders)
    latents, sigma, condition = policy.noise([1, 2, 3]), torch.tensor([0.7, 0.5, 0.3]), policy.encode(TEXTS)
    with torch.no_grad():
        prediction = policy.predict(latents, sigma, condition)
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain.denoise(latents, sigma, condition, None).float()
        exact = plain.predict(latents, sigma, plain.encode(TEXTS))
    assert prediction.dtype == torch.float32
    assert (prediction - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert not torch.equal(prediction, exact)
    assert {parameter.dtype for parameter in policy.trainable_parameters().values()} == {torch.float32}
    frozen = [layer.weight for layer in policy.denoiser.modules() if isinstance(layer, nn.Linear)]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    full = load(name, folders, dtype="bfloat16", trainable="full")
    assert {parameter.dtype for parameter in full.trainable_parameters().values()} == {torch.float32}


def test_slices_change_nothing_and_tiles_the_seams(name: str, folders: dict[str, Path]) -> None:
    plain, sliced, tiled = (
        load(name, folders, **options) for options in ({}, {"vae_slicing": True}, {"vae_tiling": True})
    )
    latents = plain.noise([1, 2])
    with torch.no_grad():
        torch.testing.assert_close(sliced.decode(latents), plain.decode(latents))
        tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size = 4, 8
        images = tiled.decode(latents)
    assert images.shape == (2, 3, 16, 16)
    assert not torch.allclose(images, sliced.decode(latents))


def test_a_compiled_denoiser_gives_the_same_in_every_view(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views put other tensors, or none, where the compiled code expects parameters. Traced, but not translated."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    policies = [load("flux", folders, compile=compile) for compile in (False, True)]
    found = []
    for policy in policies:
        policy.add_view("old")
        randomise_lora(policy)
        latents, sigma, condition = policy.noise([1, 2]), torch.tensor([0.7, 0.3]), policy.encode(TEXTS[:2])
        outputs = [policy.predict(latents, sigma, condition, view=view) for view in (*policy.views, "current")]
        outputs[-1].square().sum().backward()
        gradients = [parameter.grad for parameter in policy.trainable_parameters().values()]
        found.append([*(output.detach() for output in outputs), *gradients, torch.tensor(policy.flops()["denoiser"])])
    assert graphs
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1])


# Export


def test_exported_lora_gives_the_same_images_in_diffusers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(name, folders)
    policy.add_view("evaluation")
    randomise_lora(policy)
    policy.blend("evaluation", 0.4)
    policy.export(tmp_path)
    pipe = pipeline(name, folders)
    noise = policy.noise(range(3))
    base = pipeline_latents(name, pipe, noise, 2.0)
    pipe.load_lora_weights(tmp_path)
    latents = pipeline_latents(name, pipe, noise, 2.0)
    assert (latents - euler(policy, 2.0, view="evaluation")).abs().max() < 1e-4
    assert (latents - base).abs().max() > 1e-2
    assert (latents - euler(policy, 2.0)).abs().max() > 1e-2


def test_exported_denoiser_gives_the_same_images_in_diffusers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = load(name, folders, trainable="full")
    policy.add_view("evaluation")
    for parameter in policy.weights.tensors("evaluation").values():
        parameter.add_(0.02)
    policy.export(tmp_path)
    component = {policy.denoiser_name: type(policy.denoiser).from_pretrained(tmp_path)}
    latents = pipeline_latents(name, pipeline(name, folders, **component), policy.noise(range(3)), 2.0)
    assert (latents - euler(policy, 2.0, view="evaluation")).abs().max() < 1e-4
    assert (latents - euler(policy, 2.0)).abs().max() > 1e-2


# Checkpoints and settings


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    return change


def truncate(folder: Path) -> None:
    path = next(folder / part for part in ("unet", "transformer") if (folder / part).exists())
    path /= "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def halve(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[: (folder / file).stat().st_size // 2])

    return change


SCHEDULER = "scheduler/scheduler_config.json"
DAMAGES: dict[str, list[tuple[Callable[[Path], None], str]]] = {
    "all": [
        (truncate, r"diffusion_pytorch_model.safetensors is truncated or damaged .*file not fully covered"),
        (remove("text_encoder/model.safetensors"), "text_encoder has no safetensors weights"),
        (remove("text_encoder/config.json"), "text_encoder/config.json is missing; it says how"),
        (remove("tokenizer/tokenizer.json"), "tokenizer has no vocabulary, expected tokenizer.json or vocab"),
        (halve("tokenizer/tokenizer.json"), "tokenizer/tokenizer.json is not valid JSON"),
        (halve("tokenizer/tokenizer_config.json"), "tokenizer/tokenizer_config.json is not valid JSON"),
        (remove("model_index.json"), "model_index.json is missing"),
        (edit("model_index.json", _class_name="OtherPipeline"), "holds a OtherPipeline, expected a "),
        (edit("model_index.json", vae=[None, None]), "has no vae; none may be absent"),
        (edit("vae/config.json", layers_per_block=2), "vae has no weights for encoder.down_blocks.0.resnets.1"),
    ],
    "flux": [
        (edit("transformer/config.json", in_channels=32), r"x_embedder.weight has shape \[16, 16\], expected \[16, 32"),
        (edit(SCHEDULER, use_dynamic_shifting=False), "use_dynamic_shifting=false.*a shift by the image's size"),
        (edit(SCHEDULER, time_shift_type="linear"), "time_shift_type=linear"),
    ],
    "sd15": [
        (edit("unet/config.json", in_channels=9), r"conv_in.weight has shape \[8, 4, 3, 3\], expected \[8, 9"),
        (edit(SCHEDULER, prediction_type="v_prediction"), "predicts v_prediction, expected one that predicts epsilon"),
        (edit(SCHEDULER, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    ],
    "sdxl": [(edit("unet/config.json", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56), "shape")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [(key, *damage) for key in FAMILIES for damage in DAMAGES[key] + (DAMAGES["all"] if key != "sdxl" else [])],
)
def test_damaged_checkpoint_is_one_clear_error_before_loading(
    folders: dict[str, Path],
    tmp_path: Path,
    family: str,
    damage: Callable[[Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = shutil.copytree(folders[family], tmp_path / "copy")
    damage(copy)
    monkeypatch.setattr(FAMILIES[family].policy.pipeline_class, "from_pretrained", None)  # nothing may be loaded
    with pytest.raises(CheckpointError, match=message):
        load(family, folders, folder=copy)


def test_every_folder_of_a_checkpoint_is_needed(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers as well: transformers makes one that reads nothing where its folder is missing."""
    monkeypatch.setattr(FAMILIES[name].policy.pipeline_class, "from_pretrained", None)
    parts = sorted(path.name for path in folders[name].iterdir() if path.is_dir())
    assert len(parts) >= 5
    for part in parts:
        copy = shutil.copytree(folders[name], tmp_path / part, ignore=shutil.ignore_patterns(part))
        with pytest.raises(CheckpointError, match=rf"/{part}\b"):
            load(name, folders, folder=copy)


def test_a_model_that_takes_an_image_too_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["sd15"], tmp_path / "copy")
    unet = StableDiffusionPipeline.from_pretrained(copy).unet
    config = {**unet.config, "in_channels": 9}
    type(unet).from_config(config).save_pretrained(copy / "unet")
    with pytest.raises(CheckpointError, match="takes 9 channels, expected the 4 of a latent"):
        load("sd15", folders, folder=copy)


def test_older_names_of_the_autoencoders_attention_are_known(folders: dict[str, Path], tmp_path: Path) -> None:
    """As Stable Diffusion 1.5 is published."""
    copy = shutil.copytree(folders["sd15"], tmp_path / "copy")
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    assert sum(any(f".{new}." in key for new in names) for key in tensors) == 2 * 4 * 2
    for new, old in names.items():
        tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    latents = load("sd15", folders).noise([1])
    with torch.no_grad():
        images = load("sd15", folders, folder=copy).decode(latents)
        assert torch.equal(images, load("sd15", folders).decode(latents))


def test_source_that_is_neither_folder_nor_hub_id(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(name, folders, folder=tmp_path / "nowhere")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no connection\nand a long explanation")

    monkeypatch.setattr(FAMILIES[name].policy.pipeline_class, "download", unreachable)
    with pytest.raises(CheckpointError, match=r"hub gave nothing \(no connection and a long explanation\)"):
        load(name, folders, folder="checkpoints/nowhere")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("flux", {"trainable": "some"}, "'lora' or 'full', got 'some'"),
        ("sd15", {"dtype": "float16"}, "float32, bfloat16, float64, got 'float16'"),
        ("sdxl", {"dtype": "float64", "vae_dtype": "float32"}, "both be float64"),
        ("flux", {"resolution": 18}, "multiple of 4 pixels, got 18"),
        ("sd15", {"resolution": 17}, "multiple of 2 pixels, got 17"),
        ("sdxl", {"targets": ["attn.to_w"]}, "hit none"),
    ],
)
def test_impossible_settings(folders: dict[str, Path], family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(family, folders, **options)


def test_grids_that_do_not_exist(folders: dict[str, Path]) -> None:
    policy = load("sd15", folders)
    with pytest.raises(ConfigError, match=r"made for flow models; set method\.rollout\.grid to pipeline"):
        policy.grid(10, "shifted_linspace")
    with pytest.raises(ConfigError, match="2 to 500 sampling steps, got 501"):
        policy.grid(501)
    flux = load("flux", folders)
    expected = torch.tensor([3 * t / (1 + 2 * t) for t in (1 - i / 10 for i in range(11))])
    torch.testing.assert_close(flux.grid(10, "shifted_linspace"), expected)


def test_resolution_sets_the_latent_shape_and_what_the_model_is_told(folders: dict[str, Path]) -> None:
    told: list[Tensor] = []
    for name in FAMILIES:
        policy = load(name, folders, resolution=32)
        assert policy.latent_shape == (4, 16, 16)
        if name == "sdxl":
            policy.denoiser.register_forward_pre_hook(
                lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
            )
        latents = policy.noise([1])
        with torch.no_grad():
            prediction = policy.predict(latents, torch.full((1,), 0.5), policy.encode(["a dog"]))
            assert policy.decode(latents).shape == (1, 3, 32, 32)
        assert prediction.shape == latents.shape
    assert [each.tolist() for each in told] == [[[32, 32, 0, 0, 32, 32]]]  # original size, crop, target size
    assert load("flux", folders, resolution=32).mu > load("flux", folders).mu  # larger images are noised more


def test_classes_say_what_they_predict(name: str, folders: dict[str, Path]) -> None:
    assert load(name, folders).path.parameterisation == FAMILIES[name].parameterisation


def test_published_pipelines_are_the_ones_meant() -> None:
    assert [family.policy.pipeline_class for family in FAMILIES.values()] == [
        FluxPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    ]


def test_random_weights_need_the_configurations_alone(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The same architecture, so the same cost; other numbers."""
    copy = shutil.copytree(folders[name], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    policy, plain = load(name, folders, folder=copy, weights="random"), load(name, folders)
    assert policy.flops() == plain.flops()
    assert not torch.equal(euler(policy, 2.0), euler(plain, 2.0))
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        load(name, folders, folder=copy)
