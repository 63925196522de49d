"""LoRA files of others: each changes the model as diffusers' own pipeline does it, or is refused in a sentence."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignbench.errors import AlignbenchError, CheckpointError
from alignbench.policies.flux import FluxPolicy
from alignbench.policies.lora import Lora, read_lora
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.policies.unet import StableDiffusionPolicy, StableDiffusionXLPolicy

POLICIES: dict[str, Any] = {
    "sd35_medium": StableDiffusion3Policy,
    "flux_dev": FluxPolicy,
    "sd15": StableDiffusionPolicy,
    "sdxl": StableDiffusionXLPolicy,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "ranks by layer": {"r": 3, "lora_alpha": 5, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 9}},
    "ranks by whole name": {"r": 2, "lora_alpha": 2, "rank_pattern": {"^LAYER": 5}, "alpha_pattern": {"^LAYER": 1}},
}


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return name, getattr(pipe, name)


def trained(checkpoint: Path, changes: Mapping[str, Any]) -> tuple[Any, str, Any, LoraConfig]:
    """A pipeline whose denoiser has an adapter of PEFT with weights that make a difference."""
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    name, denoiser = denoiser_of(pipe)
    layer = next(path for path, module in denoiser.named_modules() if path.endswith("to_q"))
    changes = json.loads(json.dumps(changes).replace("LAYER", layer))
    config = LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False, **changes)
    denoiser.add_adapter(config)
    return pipe, name, denoiser, config


def updates(pipe: Any, load: Callable[[Any, Any], None]) -> dict[str, Tensor]:
    """What loading a file adds to each weight of the denoiser: diffusers fuses it, and the difference is taken."""
    _, denoiser = denoiser_of(pipe)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    load(pipe, denoiser)
    denoiser.fuse_lora()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in denoiser.state_dict().items()}
    changed = {name: after[name] - tensor for name, tensor in before.items()}
    return {name.removesuffix(".weight"): tensor for name, tensor in changed.items() if tensor.abs().max() > 0}


def check_equal(lora: Lora, expected: Mapping[str, Tensor]) -> None:
    assert set(lora.layers) == set(expected)
    for layer, (a, b) in lora.layers.items():
        torch.testing.assert_close(b @ a, expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("model", POLICIES)
def test_files_of_diffusers_and_peft_change_the_weights_as_their_libraries_do(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, changes: dict[str, Any]
) -> None:
    """Three layouts of one adapter: ``save_lora_weights``, ``save_lora_adapter``, and the folder of PEFT."""
    checkpoint = checkpoints[model]
    pipe, name, denoiser, config = trained(checkpoint, changes)
    layers = get_peft_model_state_dict(denoiser)
    saved = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(tmp_path / "pipeline", **saved)
    denoiser.save_lora_adapter(tmp_path / "adapter")
    fresh = DiffusionPipeline.from_pretrained(checkpoint)
    expected = updates(fresh, lambda pipe, denoiser: pipe.load_lora_weights(tmp_path / "pipeline"))
    assert expected
    for folder in ("pipeline", "adapter"):
        check_equal(read_lora(str(tmp_path / folder), POLICIES[model], checkpoint), expected)

    bare = denoiser_of(DiffusionPipeline.from_pretrained(checkpoint))[1]
    wrapped = get_peft_model(bare, config)
    set_peft_model_state_dict(wrapped, {f"base_model.model.{key}": tensor for key, tensor in layers.items()})
    wrapped.save_pretrained(tmp_path / "checkpoint-10" / "lora")
    lora = read_lora(str(tmp_path / "checkpoint-10"), POLICIES[model], checkpoint)
    assert lora.config == tmp_path / "checkpoint-10" / "lora" / "adapter_config.json"
    check_equal(lora, expected)


@pytest.mark.parametrize("model", POLICIES)
def test_files_without_settings_have_the_scale_one_as_in_diffusers(
    checkpoints: dict[str, Path], tmp_path: Path, model: str
) -> None:
    pipe, name, denoiser, _ = trained(checkpoints[model], CONFIGS["ranks by layer"])
    type(pipe).save_lora_weights(tmp_path, **{f"{name}_lora_layers": get_peft_model_state_dict(denoiser)})
    fresh = DiffusionPipeline.from_pretrained(checkpoints[model])
    expected = updates(fresh, lambda pipe, denoiser: pipe.load_lora_weights(tmp_path))
    check_equal(read_lora(str(tmp_path), POLICIES[model], checkpoints[model]), expected)


def kohya(model: str, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that kohya's trainer gives, with an alpha of its own for every layer."""
    found: dict[str, Tensor] = {}
    for number, (key, tensor) in enumerate(sorted(layers.items())):
        layer, matrix = key.removesuffix(".weight").rsplit(".lora_", 1)
        name = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{name}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(1.0 + number % 3)
    return found


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_files_of_kohya_change_the_weights_as_the_pipeline_does(
    checkpoints: dict[str, Path], tmp_path: Path, model: str
) -> None:
    _, _, denoiser, _ = trained(checkpoints[model], {"r": 4, "lora_alpha": 4})
    file = tmp_path / "kohya.safetensors"
    save_file(kohya(model, get_peft_model_state_dict(denoiser)), file)
    fresh = DiffusionPipeline.from_pretrained(checkpoints[model])
    expected = updates(fresh, lambda pipe, denoiser: pipe.load_lora_weights(file))
    check_equal(read_lora(str(file), POLICIES[model], checkpoints[model]), expected)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_files_of_kohya_for_flux(checkpoints: dict[str, Path], tmp_path: Path, prefix: str) -> None:
    """Names of FLUX's authors, where queries, keys and values are one layer; diffusers splits them."""
    dot = "_" if prefix.endswith("_") else "."
    file, generator = tmp_path / "flux.safetensors", torch.Generator().manual_seed(0)
    name = f"{prefix}double_blocks{dot}0{dot}img_attn{dot}qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(3, 16, generator=generator),
        f"{name}.lora_up.weight": torch.randn(48, 3, generator=generator),
        f"{name}.alpha": torch.tensor(6.0),
    }
    save_file(tensors, file)
    lora = read_lora(str(file), FluxPolicy, checkpoints["flux_dev"])
    fresh = DiffusionPipeline.from_pretrained(checkpoints["flux_dev"])
    expected = updates(fresh, lambda pipe, denoiser: pipe.load_lora_weights(file))
    assert set(lora.layers) == {f"transformer_blocks.0.attn.to_{part}" for part in "qkv"}
    check_equal(lora, expected)
    whole = torch.cat([lora.layers[f"transformer_blocks.0.attn.to_{part}"][1] for part in "qkv"])
    a = lora.layers["transformer_blocks.0.attn.to_q"][0]
    by_hand = 6 / 3 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    torch.testing.assert_close(whole @ a, by_hand)


def test_a_pickle_of_tensors_is_read_and_another_is_not(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = lora_tensors()
    torch.save({f"transformer.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "pytorch_lora_weights.bin")
    assert read_lora(str(tmp_path), StableDiffusion3Policy, checkpoints["sd35_medium"]).rank == 2
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(CheckpointError, match=r"lora_weights\.bin: .*Expected a file of tensors alone"):
        read_lora(str(tmp_path), StableDiffusion3Policy, checkpoints["sd35_medium"])


# Refusals

LAYER = "transformer_blocks.0.attn.to_q"
METADATA = "lora_adapter_metadata"
PLAIN = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"], "peft_type": "LORA"}


def lora_tensors(layer: str = LAYER, rank: int = 2, width: int = 16) -> dict[str, Tensor]:
    return {f"{layer}.lora_A.weight": torch.ones(rank, width), f"{layer}.lora_B.weight": torch.ones(width, rank)}


def read(folder: Path, checkpoint: Path, tensors: Mapping[str, Tensor], settings: object = None) -> Lora:
    """What is read of a file with these tensors and settings in its header."""
    packed = None if settings is None else {METADATA: settings if isinstance(settings, str) else json.dumps(settings)}
    folder.mkdir(exist_ok=True, parents=True)
    save_file(dict(tensors), folder / "pytorch_lora_weights.safetensors", metadata=packed)
    return read_lora(str(folder), StableDiffusion3Policy, checkpoint)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lora_tensors("text_encoder.layers.0.q_proj"), "changes a text encoder too .text_encoder.*checkpoint=FOLDER"),
        (lora_tensors("lora_te1_text_model_q"), "changes a text encoder too"),
        (
            lora_tensors(f"transformer.module.{LAYER}"),
            "module. is of DistributedDataParallel: save the model inside it",
        ),
        (lora_tensors(f"diffusion_model.{LAYER}"), "the pipeline of diffusers does not read it"),
        (lora_tensors(f"base_model.model.{LAYER}"), "keeps alpha in adapter_config.json: there is none beside it"),
        (lora_tensors("transformer.nothing"), "a LoRA of another model: it changes nothing, which a SD3Transformer2D"),
        (lora_tensors("transformer.pos_embed.proj"), r"changes pos_embed\.proj, a Conv2d: only linear"),
        (lora_tensors(f"transformer.{LAYER}", width=8), r"another model.*\[2, 8\] and \[8, 2\], expected \[rank, 16\]"),
        (lora_tensors(f"transformer.{LAYER}", rank=0), r"\[0, 16\] and \[16, 0\]"),
        ({f"transformer.{LAYER}.lora_A.weight": torch.ones(2, 16)}, "has only A of its two matrices"),
        ({key: tensor.int() for key, tensor in lora_tensors(LAYER).items()}, "holds torch.int32, expected floating"),
        ({**lora_tensors(), f"{LAYER}.lora_magnitude_vector": torch.ones(16)}, "is a DoRA"),
        ({**lora_tensors(), f"{LAYER}.dora_scale": torch.ones(16)}, "is a DoRA"),
        ({**lora_tensors(), f"{LAYER}.lora_B.bias": torch.ones(16)}, r"cannot use .*lora_B\.bias"),
        ({f"{LAYER}.lora_A.default_0.weight": torch.ones(2, 16)}, "an adapter's name stands in it"),
        ({"x.hada_w1_a": torch.ones(2, 2)}, "is no LoRA"),
        ({**lora_tensors(f"transformer.{LAYER}"), **lora_tensors("other.layer")}, r"cannot use other\.layer\.lora_A"),
        ({"lora_unet_mid_block_attn_to_q.lora_down.weight": torch.ones(2, 3)}, "cannot use lora_unet_mid_block"),
        ({}, "no tensors in this file"),
    ],
)
def test_tensors_that_cannot_be_used(
    checkpoints: dict[str, Path], tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, checkpoints["sd35_medium"], tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "abc"}, "lora_alpha is 'abc', expected a positive number"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"r": 0}, "r is 0, expected a positive integer"),
        ({"r": 2.5}, "r is 2.5, expected a positive integer"),
        ({"r": True}, "r is True"),
        ({"r": 3}, r"size mismatch.*Expected a LoRA that StableDiffusion3Pipeline"),
        ({"r": 10**12}, "size mismatch"),
        ({"rank_pattern": "x"}, "rank_pattern is 'x', expected an object of numbers by layer"),
        ({"alpha_pattern": {"(a+)+$": 8}}, r"alpha_pattern has '\(a\+\)\+\$', expected names of layers"),
        ({"alpha_pattern": {"to_q": "high"}}, "alpha_pattern of to_q is 'high'"),
        ({"rank_pattern": {"to_q": 0.5}}, "rank_pattern of to_q is 0.5, expected a positive integer"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"use_dora": True}, "is a DoRA"),
        ({"peft_type": "LOHA"}, "is a LOHA of another kind"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights too"),
    ],
)
def test_settings_that_cannot_be(
    checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        read(tmp_path, checkpoints["sd35_medium"], lora_tensors(), {**PLAIN, **changes})
    assert "\n" not in str(raised.value)
    assert "pytorch_lora_weights.safetensors" in str(raised.value)


@pytest.mark.parametrize("header", ["[]", "{", '"x"', "[" * 100_000, '{"transformer.r": 2}'])
def test_headers_that_are_no_settings(checkpoints: dict[str, Path], tmp_path: Path, header: str) -> None:
    with pytest.raises(CheckpointError, match=METADATA):
        read(tmp_path, checkpoints["sd35_medium"], lora_tensors(), header)


def test_a_scale_is_read_wherever_the_file_keeps_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By hand: alpha / rank = 8 / 2 times a product of ones over rank 2."""
    checkpoint, prefixed = checkpoints["sd35_medium"], {f"transformer.{key}": value for key, value in PLAIN.items()}
    own = read(tmp_path / "own", checkpoint, lora_tensors(), PLAIN)
    pipeline = read(tmp_path / "pipeline", checkpoint, lora_tensors(f"transformer.{LAYER}"), prefixed)
    for lora in (own, pipeline):
        ((a, b),) = lora.layers.values()
        assert torch.equal(b @ a, torch.full((16, 16), 8.0))


# Folders


def test_a_folder_is_searched_below_and_several_files_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["sd35_medium"]
    read(tmp_path / "run" / "checkpoint-20" / "lora", checkpoint, lora_tensors())
    assert read_lora(str(tmp_path / "run"), StableDiffusion3Policy, checkpoint).source.parent.name == "lora"
    shutil.copytree(tmp_path / "run" / "checkpoint-20", tmp_path / "run" / "checkpoint-40")
    with pytest.raises(CheckpointError, match=r"holds 2 LoRA files, .*checkpoint-20.*checkpoint-40.*; name the file"):
        read_lora(str(tmp_path / "run"), StableDiffusion3Policy, checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds 0 LoRA files"):
        read_lora(str(tmp_path / "empty"), StableDiffusion3Policy, checkpoint)


def test_a_folder_on_the_hub_is_read_from_the_local_cache(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, asked = checkpoints["sd35_medium"], []

    def cached(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "snapshot")

    read(tmp_path / "snapshot" / "step-100" / "lora", checkpoint, lora_tensors())
    monkeypatch.setattr("alignbench.foreign.snapshot_download", cached)
    file = "step-100/lora/pytorch_lora_weights.safetensors"
    for below in ("step-100/lora", "step-100", file):
        lora = read_lora(f"someone/loras/{below}", StableDiffusion3Policy, checkpoint)
        assert lora.source == tmp_path / "snapshot" / file
    assert asked[0] == ("someone/loras", ["step-100/lora", "step-100/lora/*", "step-100/*.json"])
    with pytest.raises(CheckpointError, match="the copy of someone/loras has no step-200"):
        read_lora("someone/loras/step-200", StableDiffusion3Policy, checkpoint)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_lora("someone/loras/../../etc", StableDiffusion3Policy, checkpoint)


# Anything at all

BOUND = timedelta(seconds=20)  # of one file, on a machine that is busy

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*PLAIN, "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"]
)
PATTERNS = st.dictionaries(st.sampled_from(["to_q", "^to_q", "(a+)+$", "[", ".*", "attn.to_q"]) | st.text(), JSON)


@settings(max_examples=60, deadline=BOUND, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(NAMES, JSON | PATTERNS, max_size=4), prefix=st.sampled_from(["", "transformer."]))
def test_whatever_the_settings_are_only_a_sentence_leaves(
    checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, Any], prefix: str
) -> None:
    packed = {f"{prefix}{key}": value for key, value in {**PLAIN, **changes}.items()}
    with suppress(AlignbenchError):
        lora = read(tmp_path, checkpoints["sd35_medium"], lora_tensors(f"{prefix}{LAYER}"), packed)
        assert all(bool(b.isfinite().all()) for _, b in lora.layers.values())


PARTS = st.sampled_from(
    f"transformer base_model.model module diffusion_model {LAYER} lora_A lora_B lora down up weight alpha default_0 "
    "lora_unet_x processor dora_scale bias".split()
)
SHAPES = st.sampled_from([(2, 16), (16, 2), (), (0, 16), (16,), (2, 16, 1, 1), (48, 2)])


@pytest.mark.parametrize("model", ["sd35_medium", "flux_dev", "sd15"])
@settings(max_examples=30, deadline=BOUND, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.dictionaries(st.lists(PARTS, min_size=1, max_size=5).map(".".join), SHAPES, min_size=1, max_size=4))
def test_whatever_the_tensors_are_only_a_sentence_leaves(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
    assert set(load_file(file)) == set(shapes)
    with suppress(AlignbenchError):
        read_lora(str(file), POLICIES[model], checkpoints[model])
