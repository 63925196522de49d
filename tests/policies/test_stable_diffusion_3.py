"""The policy against diffusers' own pipeline, on tiny random checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from alignbench.errors import CheckpointError, ConfigError
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.sampling.rollout import Sampler, sample
from tests.tiny import tiny_sd3

TEXTS = ["a red dog", "two cats", "a red dog"]
STEPS = 5
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("sd3"), dual_attention=True)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("sd3_t5"), t5=True)


def load(folder: Path, **options: Any) -> StableDiffusion3Policy:
    return StableDiffusion3Policy.from_pretrained(
        folder, **{"rank": 4, "alpha": 8.0, "max_sequence_length": 0, **options}
    )


def pipeline(folder: Path, **components: Any) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomise_lora(policy: StableDiffusion3Policy) -> None:
    """Moves `current` away from the reference."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.trainable_parameters().items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.3, generator=generator)


def euler(policy: StableDiffusion3Policy, guidance: float, view: str = "current") -> Tensor:
    condition, noise = policy.encode(TEXTS), policy.noise(range(len(TEXTS)))

    def predict(latents: Tensor, sigma: Tensor) -> Tensor:
        return policy.predict(latents, sigma, condition, guidance=guidance, view=view)

    with torch.no_grad():
        latents, _ = sample(predict, noise, policy.grid(STEPS), Sampler(STEPS), policy.noise)
    return latents


def pipeline_latents(pipe: StableDiffusion3Pipeline, noise: Tensor, guidance: float, tokens: int) -> Tensor:
    return pipe(
        TEXTS,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=16,
        width=16,
        max_sequence_length=tokens,
        output_type="latent",
    ).images


# Parity


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize(("t5", "tokens"), [(False, 0), (False, 3), (True, 12)])
def test_euler_gives_the_latents_of_the_pipeline(
    folder: Path, t5_folder: Path, t5: bool, tokens: int, trainable: str
) -> None:
    source = t5_folder if t5 else folder
    policy = load(source, max_sequence_length=tokens, trainable=trainable)
    pipe = pipeline(source, **({} if t5 else NO_T5))
    for guidance in (1.0, 4.5):
        expected = pipeline_latents(pipe, policy.noise(range(len(TEXTS))), guidance, tokens)
        assert (euler(policy, guidance) - expected).abs().max() < 1e-4
        assert (expected[0] - expected[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn2.to_v",
        "transformer_blocks.1.ff.net.2",
        "context_embedder",
    ],
)
def test_parity_notices_one_permuted_weight(folder: Path, name: str) -> None:
    policy, pipe = load(folder), pipeline(folder, **NO_T5)
    expected = pipeline_latents(pipe, policy.noise(range(len(TEXTS))), 1.0, 0)
    weight = policy.transformer.get_submodule(name).weight
    weight.data = weight.data.flip(0)
    assert (euler(policy, 1.0) - expected).abs().max() > 1e-4


def test_decode_gives_the_images_of_the_pipeline(folder: Path) -> None:
    policy, pipe = load(folder), pipeline(folder, **NO_T5)
    latents = policy.noise([1, 2])
    config = pipe.vae.config
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        expected = pipe.image_processor.postprocess(decoded, output_type="pt")
        images = policy.decode(latents)
    torch.testing.assert_close(images, expected)
    assert images.shape == (2, 3, 16, 16)
    assert images.min() == 0.0  # the clamp is reached


def test_encode_images_is_the_mode_in_model_units(folder: Path) -> None:
    policy, pipe = load(folder), pipeline(folder, **NO_T5)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean = pipe.vae.encode(2 * images - 1).latent_dist.mean
        torch.testing.assert_close(policy.encode_images(images), (mean - 0.1) * 1.5)


def test_time_is_not_truncated(folder: Path) -> None:
    policy = load(folder)
    seen: list[Tensor] = []
    policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    sigma = torch.tensor([0.12345, 0.9996])
    policy.predict(policy.noise([1, 2]), sigma, policy.encode(TEXTS[:2]))
    torch.testing.assert_close(seen[0], torch.tensor([123.45, 999.6]), rtol=0, atol=1e-4)


def test_samples_at_different_sigmas_share_a_batch(folder: Path) -> None:
    policy = load(folder)
    latents, condition, sigma = policy.noise([1, 2, 3]), policy.encode(TEXTS), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        batch = policy.predict(latents, sigma, condition, guidance=2.0)
        for index in range(3):
            row = slice(index, index + 1)
            alone = policy.predict(latents[row], sigma[row], condition[row], guidance=2.0)
            torch.testing.assert_close(batch[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pipeline", "shifted_linspace"])
def test_grid(folder: Path, name: str) -> None:
    policy = load(folder)
    grid = policy.grid(10, name)
    if name == "pipeline":
        scheduler = pipeline(folder, **NO_T5).scheduler
        scheduler.set_timesteps(10)
        expected = scheduler.sigmas
    else:
        expected = torch.tensor([3 * t / (1 + 2 * t) for t in (1 - i / 10 for i in range(11))])
    torch.testing.assert_close(grid, expected, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="karras"):
        policy.grid(10, "karras")


# Guidance


def test_guidance_combines_both_branches(folder: Path) -> None:
    policy = load(folder, dtype="float64")
    latents, sigma = policy.noise([1, 2]), torch.tensor([0.7, 0.3], dtype=torch.float64)
    with torch.no_grad():
        cond = policy.predict(latents, sigma, policy.encode(TEXTS[:2]))
        uncond = policy.predict(latents, sigma, policy.encode(["", ""]))
        guided = policy.predict(latents, sigma, policy.encode(TEXTS[:2]), guidance=3.5)
    assert guided.dtype == torch.float64
    torch.testing.assert_close(guided, -2.5 * uncond + 3.5 * cond)
    assert (cond - uncond).abs().max() > 1e-2


def test_guidance_is_one_call_of_twice_the_batch(folder: Path) -> None:
    policy = load(folder)
    batches: list[int] = []
    policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    latents, sigma, condition = policy.noise([1, 2]), torch.tensor([0.7, 0.3]), policy.encode(TEXTS[:2])
    policy.predict(latents, sigma, condition)
    policy.predict(latents, sigma, condition, guidance=2.0)
    assert batches == [2, 4]


def test_detached_unconditional_branch(folder: Path) -> None:
    """Same value; the gradient is g times that of the conditional branch alone."""
    policy = load(folder, dtype="float64")
    randomise_lora(policy)
    parameters = list(policy.trainable_parameters().values())
    latents, sigma, condition = policy.noise([1]), torch.tensor([0.6], dtype=torch.float64), policy.encode(["a dog"])

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value.sin().sum(), parameters)])

    attached = policy.predict(latents, sigma, condition, guidance=3.0)
    detached = policy.predict(latents, sigma, condition, guidance=3.0, detach_uncond=True)
    torch.testing.assert_close(attached, detached)
    uncond = policy.predict(latents, sigma, policy.encode([""])).detach()
    cond = policy.predict(latents, sigma, condition)
    expected = gradient(uncond + 3.0 * (cond - uncond))
    torch.testing.assert_close(gradient(detached), expected)
    assert not torch.allclose(gradient(attached), expected, rtol=1e-2)


def test_misuse_of_predict_is_an_error(folder: Path) -> None:
    policy = load(folder)
    latents, condition = policy.noise([1, 2]), policy.encode(TEXTS[:2])
    with pytest.raises(ConfigError, match=r"guidance_embedding=3\.5"):
        policy.predict(latents, torch.ones(2), condition, guidance_embedding=3.5)
    with pytest.raises(ValueError, match=r"shape \[\]"):
        policy.predict(latents, torch.tensor(0.5), condition)
    with pytest.raises(ValueError, match="1 conditions"):
        policy.predict(latents, torch.ones(2), condition[:1])


# Text


def test_each_text_goes_through_the_encoders_once(t5_folder: Path) -> None:
    policy = load(t5_folder, max_sequence_length=12)
    calls = {"text_encoder": 0, "text_encoder_2": 0, "text_encoder_3": 0}
    for name in calls:
        encoder = getattr(policy.pipeline, name)

        def count(*_: object, name: str = name) -> None:
            calls[name] += 1

        encoder.register_forward_hook(count)
    for _ in range(2):
        condition = policy.encode(TEXTS)
        for _ in range(2):
            policy.predict(policy.noise([1, 2, 3]), torch.ones(3), condition, guidance=4.5)
    assert set(calls.values()) == {3}  # two distinct texts and the empty one


def test_embedding_does_not_depend_on_company(folder: Path) -> None:
    alone, together = load(folder).encode(["two cats"]), load(folder).encode(TEXTS)
    for name, tensor in alone.tensors.items():
        assert torch.equal(tensor[0], together.tensors[name][1])


# Weights


def test_lora_trains_the_first_attention_only(folder: Path) -> None:
    names = load(folder).trainable_parameters()
    # Two blocks of eight layers with A and B, but the last block has no add_out: its text stream ends.
    assert len(names) == (8 + 7) * 2
    assert not any("attn2" in name for name in names)
    assert all(".attn." in name and name.rpartition(".")[2] in ("lora_A", "lora_B") for name in names)


def test_full_trains_the_whole_transformer(folder: Path) -> None:
    policy = load(folder, trainable="full")
    assert {name for name, _ in policy.transformer.named_parameters()} == set(policy.trainable_parameters())


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_reference_is_the_base_model(folder: Path, trainable: str) -> None:
    policy = load(folder, trainable=trainable)
    expected = pipeline_latents(pipeline(folder, **NO_T5), policy.noise(range(len(TEXTS))), 2.0, 0)
    for parameter in policy.trainable_parameters().values():
        parameter.data.add_(0.05)
    assert (euler(policy, 2.0, view="reference") - expected).abs().max() < 1e-4
    assert (euler(policy, 2.0) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_predict_with_a_view_leaves_everything_as_it_was(folder: Path, trainable: str) -> None:
    policy = load(folder, trainable=trainable)
    policy.add_view("old")
    trainable_before = {name for name, parameter in policy.transformer.named_parameters() if parameter.requires_grad}
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    latents, sigma, condition = policy.noise([1]), torch.tensor([0.5]), policy.encode(["a dog"])
    for view in ("old", "reference"):
        assert not policy.predict(latents, sigma, condition, guidance=2.0, view=view).requires_grad
    after = {name for name, parameter in policy.transformer.named_parameters() if parameter.requires_grad}
    assert after == trainable_before == set(policy.trainable_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.state_dict().items())
    policy.predict(latents, sigma, condition).sum().backward()
    trained = {name for name, parameter in policy.transformer.named_parameters() if parameter.grad is not None}
    assert trained <= trainable_before
    assert trained  # the last block's text query of the full model has none: nothing reads it
    assert all(parameter.grad is None for parameter in policy.vae.parameters())


def test_gradient_by_finite_differences(folder: Path) -> None:
    """With respect to latents and LoRA weights, in float64."""
    policy = load(folder, dtype="float64")
    randomise_lora(policy)
    sigma, condition = torch.tensor([0.6, 0.2], dtype=torch.float64), policy.encode(TEXTS[:2])
    latents = policy.noise([1, 2]).requires_grad_()
    parameter = policy.trainable_parameters()["transformer_blocks.0.attn.to_v.lora_A"]

    def value() -> Tensor:
        return policy.predict(latents, sigma, condition, guidance=2.0).square().sum()

    gradients = torch.autograd.grad(value(), [latents, parameter])
    for tensor, gradient in zip((latents, parameter), gradients, strict=True):
        assert_directional_derivative(lambda: value().item(), tensor, gradient)


def test_decode_gradient_by_finite_differences(folder: Path) -> None:
    policy = load(folder, dtype="float64")
    latents = policy.noise([3]).requires_grad_()
    weights = torch.rand(1, 3, 16, 16, dtype=torch.float64)

    def value() -> Tensor:
        return (policy.decode(latents) * weights).sum()

    (gradient,) = torch.autograd.grad(value(), [latents])
    assert gradient.abs().max() > 0.01
    assert_directional_derivative(lambda: value().item(), latents, gradient)


def assert_directional_derivative(value: Callable[[], float], tensor: Tensor, gradient: Tensor) -> None:
    direction = torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(1))
    step, start = 1e-6, tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(start + step * direction)
        above = value()
        tensor.copy_(start - step * direction)
        below = value()
        tensor.copy_(start)
    assert (above - below) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("view", ["current", "old"])
def test_gradient_checkpointing_changes_no_number(folder: Path, view: str) -> None:
    """Also through a view that is no longer installed when the backward pass runs the blocks again."""
    gradients = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "vae_gradient_checkpointing": checkpointing}
        policy = load(folder, dtype="float64", **settings)
        policy.add_view("old")
        randomise_lora(policy)
        latents = policy.noise([1]).requires_grad_()
        sigma = torch.tensor([0.6], dtype=torch.float64)
        clean = policy.path.clean(latents, policy.predict(latents, sigma, policy.encode(["a dog"]), view=view), sigma)
        policy.decode(clean).sum().backward()
        gradients.append(latents.grad)
        assert policy.weights.active == "current"
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bfloat16_is_autocast_over_float32_masters(folder: Path) -> None:
    """Storing the frozen weights in bfloat16 gives what autocast over float32 weights gives, to the last bit."""
    policy = load(folder, dtype="bfloat16")
    randomise_lora(policy)
    master = load(folder)
    master.load_state_dict(policy.state_dict())
    latents, sigma, condition = policy.noise([1, 2]), torch.tensor([0.7, 0.3]), policy.encode(TEXTS[:2])
    with torch.no_grad():
        velocity = policy.predict(latents, sigma, condition)
        plain = master.predict(latents, sigma, master.encode(TEXTS[:2]))
        with torch.autocast("cpu", torch.bfloat16):
            expected = master.transformer(latents, *master.encode(TEXTS[:2]).tensors.values(), 1000 * sigma)[0]
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, expected.float())
    torch.testing.assert_close(velocity, plain, rtol=0.1, atol=0.1)
    assert not torch.equal(velocity, plain)
    assert {parameter.dtype for parameter in policy.trainable_parameters().values()} == {torch.float32}
    assert policy.transformer.proj_out.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load(folder, dtype="bfloat16", trainable="full").state_dict().values()} == {
        torch.float32
    }


def test_state_dict_round_trip(folder: Path) -> None:
    policy = load(folder)
    policy.add_view("evaluation")
    randomise_lora(policy)
    policy.blend("evaluation", 0.25)
    fresh = load(folder, seed=1)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    assert fresh.views == policy.views
    for view in ("current", "evaluation"):
        assert torch.equal(euler(fresh, 1.0, view), euler(policy, 1.0, view))
    assert not torch.equal(euler(policy, 1.0, "current"), euler(policy, 1.0, "evaluation"))


def test_flops_of_the_denoiser_by_hand(folder: Path) -> None:
    """Linear layers, convolution and attention, a multiply-add as two; 16 image and 10 text tokens, width 16."""
    width, image, text, joint, pooled, embedded = 16, 16, 10, 16, 16, 256
    rank = 4
    square = width * width
    patch = image * (4 * 2 * 2) * width
    time_and_text = embedded * width + square + pooled * width + square
    modulation = 9 * square + 6 * square  # first block: image with a second attention, text
    modulation += 6 * square + 2 * square  # last block: image, text only normalised
    projections = 4 * (image + text) * square + 4 * image * square  # attn and attn2
    projections += (3 * (image + text) + image) * square
    attention = 2 * width * ((image + text) ** 2 * 2 + image**2)
    feed_forward = 8 * square * (2 * image + text)
    lora = 2 * rank * width * (4 * (image + text) + 3 * (image + text) + image)
    output = 2 * square + image * width * 16
    context = text * joint * width
    multiply_adds = (
        patch + time_and_text + context + modulation + projections + attention + feed_forward + lora + output
    )
    assert load(folder).flops()["denoiser"] == 2 * multiply_adds


def test_flops_of_decode_and_encode_are_per_image(folder: Path) -> None:
    flops = load(folder).flops()
    assert set(flops) == {"denoiser", "decode", "encode"}
    # The last convolution of the decoder alone: 8 to 3 channels, 3 x 3, 16 x 16 pixels.
    assert flops["decode"] > 2 * 8 * 3 * 9 * 256
    assert flops["encode"] > 2 * 8 * 3 * 9 * 256


# Export


def test_exported_lora_gives_the_same_images_in_diffusers(folder: Path, tmp_path: Path) -> None:
    policy = load(folder)
    policy.add_view("evaluation")
    randomise_lora(policy)
    policy.blend("evaluation", 0.4)
    policy.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = pipeline(folder, **NO_T5)
    noise = policy.noise(range(len(TEXTS)))
    base = pipeline_latents(pipe, noise, 2.0, 0)
    pipe.load_lora_weights(tmp_path)
    latents = pipeline_latents(pipe, noise, 2.0, 0)
    expected = euler(policy, 2.0, view="evaluation")
    assert (latents - expected).abs().max() < 1e-4
    assert (latents - base).abs().max() > 1e-2
    assert (latents - euler(policy, 2.0)).abs().max() > 1e-2


def test_exported_transformer_gives_the_same_images_in_diffusers(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, trainable="full")
    policy.add_view("evaluation")
    for parameter in policy.weights.tensors("evaluation").values():
        parameter.add_(0.02)
    policy.export(tmp_path)
    pipe = pipeline(folder, transformer=SD3Transformer2DModel.from_pretrained(tmp_path), **NO_T5)
    latents = pipeline_latents(pipe, policy.noise(range(len(TEXTS))), 2.0, 0)
    assert (latents - euler(policy, 2.0, view="evaluation")).abs().max() < 1e-4
    assert (latents - euler(policy, 2.0)).abs().max() > 1e-2


# Checkpoints and settings


def truncate(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def truncate_header(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def empty_file(folder: Path) -> None:
    (folder / "text_encoder_2" / "model.safetensors").write_bytes(b"")


def git_lfs_pointer(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def remove_weights(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def remove_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": ')


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"diffusion_pytorch_model.safetensors is truncated or damaged .*file not fully covered"),
        (truncate_header, r"text_encoder/model.safetensors is truncated or damaged .*invalid header length"),
        (empty_file, "text_encoder_2/model.safetensors is truncated"),
        (git_lfs_pointer, "vae/diffusion_pytorch_model.safetensors is truncated"),
        (remove_weights, "vae has no safetensors weights"),
        (remove_index, "model_index.json is missing"),
        (break_index, "model_index.json is not valid JSON"),
        (edit("model_index.json", _class_name="FluxPipeline"), "FluxPipeline, expected a StableDiffusion3Pipeline"),
        (edit("model_index.json", vae=[None, None]), "has no vae; only text_encoder_3 may be absent"),
        (edit("vae/config.json", layers_per_block=2), "vae has no weights for encoder.down_blocks.0.resnets.1"),
        (edit("transformer/config.json", in_channels=8), r"proj.weight has shape \[16, 4, 2, 2\], expected \[16, 8, 2"),
        (edit("scheduler/scheduler_config.json", use_dynamic_shifting=True), "use_dynamic_shifting"),
    ],
)  # fmt: skip
def test_damaged_checkpoint_is_one_clear_error_before_loading(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)  # nothing may be loaded
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_sharded_checkpoint_with_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    transformer = SD3Transformer2DModel.from_pretrained(copy / "transformer")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(copy / "transformer", max_shard_size="40KB")
    StableDiffusion3Policy.check_checkpoint(copy)
    shard = sorted((copy / "transformer").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        StableDiffusion3Policy.check_checkpoint(copy)


def test_source_that_is_neither_folder_nor_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(tmp_path / "nowhere")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no connection\nand a long explanation")

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", unreachable)
    with pytest.raises(CheckpointError, match=r"hub gave nothing \(no connection and a long explanation\)"):
        load("checkpoints/nowhere")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": "some"}, "'lora' or 'full', got 'some'"),
        ({"dtype": "float16"}, "float32, bfloat16, float64, got 'float16'"),
        ({"dtype": "float64", "vae_dtype": "float32"}, "both be float64"),
        ({"resolution": 18}, "multiple of 4 pixels, got 18"),
        ({"resolution": 36}, "up to 32 pixels, got resolution 36"),
        ({"targets": ["attn.to_w"]}, "hit none"),
    ],
)
def test_impossible_settings(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)


def test_resolution_sets_the_latent_shape(folder: Path) -> None:
    policy = load(folder, resolution=32)
    assert policy.latent_shape == (4, 16, 16)
    latents = policy.noise([1])
    with torch.no_grad():
        velocity = policy.predict(latents, torch.ones(1), policy.encode(["a dog"]))
        assert policy.decode(latents).shape == (1, 3, 32, 32)
    assert velocity.shape == latents.shape
