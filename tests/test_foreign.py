"""The door for files of others: whatever is in them, one sentence leaves, in bounded time."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from alignbench.command import command_line
from alignbench.configuration import embedded
from alignbench.errors import AlignbenchError, CheckpointError
from alignbench.foreign import LARGEST_JSON, parse_object, read_header, read_json, read_tensors, reading, tensor_shapes
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.rewards.text_image import PickScore

BOUND = timedelta(seconds=20)  # of one input, on a machine that is busy
fuzz = settings(deadline=BOUND, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


# The door


class Odd(Exception):
    """As the Rust libraries raise: neither OSError nor ValueError."""


@pytest.mark.parametrize(
    "error", [Odd("no such token"), KeyError("weights"), ZeroDivisionError(), RecursionError("deep")]
)
def test_whatever_is_raised_over_a_file_becomes_a_sentence_with_its_cause(error: Exception) -> None:
    message = r"^cannot read some\.bin: .*\. Expected a file of weights$"
    with pytest.raises(CheckpointError, match=message) as raised, reading("some.bin", "a file of weights"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), CheckpointError("ours"), KeyboardInterrupt()])
def test_what_is_not_about_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, reading("some.bin", "a file"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("debug", ["1", "0"])
def test_the_traceback_is_kept_for_those_who_ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: str
) -> None:
    def job() -> None:
        parse_object("{", "model_index.json")

    monkeypatch.setenv("ALIGNBENCH_DEBUG", debug)
    with pytest.raises(SystemExit) as raised:
        command_line(job, "alignbench")
    told = capsys.readouterr().err
    assert raised.value.code == 1
    assert told.splitlines()[-1].startswith("alignbench: model_index.json is not valid JSON")
    assert ("JSONDecodeError" in told) == ("Traceback" in told) == (debug == "1")


# JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType, expected a JSON object"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"\xff\xfe{}", "cannot be read as UTF-8"),
        (b"", "is not valid JSON"),
    ],
)
def test_json_that_is_no_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json", "")


def test_files_that_have_no_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.safetensors", tmp_path / "pipe.pth", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match="no regular file"):
            read_tensors(path)
        with pytest.raises(CheckpointError, match="no regular file"):
            read_json(path, "")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(CheckpointError, match="expected a JSON file of at most"):
        read_json(tmp_path / "large.json", "")


@fuzz
@given(
    text=st.text() | JSON.map(json.dumps) | st.sampled_from(["{", "[", '{"a":', "NaN"]).map(lambda part: part * 5000)
)
def test_any_text_is_an_object_or_refused(text: str) -> None:
    with suppress(AlignbenchError):
        assert isinstance(parse_object(text, "text"), dict)


# Weights


def safetensors_file(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed) if length is None else length) + packed + body)
    return path


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        ({"a": entry(0, 8)}, 4, None),  # truncated
        ({"a": entry(0, 8)}, 12, None),  # bytes that belong to nothing
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, None),  # overlapping
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, None),  # a gap
        ({"a": entry(0, 8, [3])}, 8, None),
        ({"a": entry(8, 0)}, 8, None),
        ({"a": entry(0, 8, [2], "F33")}, 8, None),
        ({"a": entry(0, 8, [2**62, 2**62])}, 8, None),
        ({"a": {"dtype": "F32"}}, 8, None),
        ({"a": 3}, 8, None),
        ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, 8, None),
        ([], 0, None),
        (b"{" * 1000, 0, None),
        (b'{"a":' * 50_000, 0, None),
        ({}, 0, 2**63),  # a header of eight exabytes
        ({}, 0, 99_000_000),
    ],
)
def test_headers_that_are_not_sound(tmp_path: Path, header: object, body: int, length: int | None) -> None:
    path = safetensors_file(tmp_path / "a.safetensors", header, bytes(body), length)
    for read in (tensor_shapes, read_header, read_tensors):
        with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated or damaged"):
            read(path)


ENTRIES = st.dictionaries(
    st.text(max_size=4) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(
                ["F32", "F16", "BF16", "I64", "F8_E4M3", "F4", "F8_E8M0", "C64", "BOOL", "U64", "?"]
            ),
            "shape": st.lists(st.integers(0, 4) | st.integers(-(2**65), 2**65), max_size=3),
            "data_offsets": st.lists(st.integers(0, 64) | st.integers(0, 2**65), min_size=2, max_size=2),
        }
    )
    | JSON,
    max_size=3,
)


@fuzz
@given(
    header=ENTRIES | JSON | st.binary(max_size=40),
    body=st.integers(0, 64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_sound_or_refused(tmp_path: Path, header: object, body: int, length: int | None) -> None:
    path = safetensors_file(tmp_path / "a.safetensors", header, bytes(body), length)
    for read in (tensor_shapes, read_header, read_tensors):
        with suppress(AlignbenchError):
            read(path)


@fuzz
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_any_damage_to_weights_is_found_or_harmless(tmp_path: Path, place: int, byte: int, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3)}, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - (cut if cut % 2 else 0)])
    with suppress(AlignbenchError):
        read_tensors(path)


class Runs:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("suffix", ["pth", "bin", "pt", "ckpt", "unknown"])
def test_pickles_are_never_run(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    for held in ({"a": Runs(tmp_path / "ran")}, Runs(tmp_path / "ran")):
        torch.save(held, file)
        with pytest.raises(CheckpointError, match=rf"weights\.{suffix}: .*Expected a file of tensors alone"):
            read_tensors(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({}, "holds a dict, expected tensors by name"),
        ({"state_dict": {"a": torch.ones(2)}}, "holds a dict under 'state_dict', expected tensors by name"),
        ({0: torch.ones(2)}, "holds a Tensor under 0"),
        ({"a": torch.ones(2).to_sparse()}, "holds a sparse, quantised or empty tensor under 'a'"),
        ({"a": torch.ones(2, device="meta")}, "holds a sparse, quantised or empty tensor under 'a'"),
    ],
)
def test_torch_files_that_hold_something_else(tmp_path: Path, held: object, message: str) -> None:
    torch.save(held, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "weights.pth")


@fuzz
@given(place=st.integers(0, 2000), content=st.binary(max_size=4), cut=st.integers(0, 2000))
def test_any_damage_to_a_torch_file_is_found_or_harmless(tmp_path: Path, place: int, content: bytes, cut: int) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(4)}, path)
    whole = bytearray(path.read_bytes())
    place %= len(whole)
    whole[place : place + len(content)] = content
    path.write_bytes(whole[: len(whole) - (cut if cut % 2 else 0)])
    with suppress(AlignbenchError):
        read_tensors(path)


# Pipelines


@pytest.mark.parametrize(
    ("component", "value", "message"),
    [
        ("vae", ["my_vae", "AutoencoderKL"], "makes the vae a AutoencoderKL of my_vae, expected AutoencoderKL of diff"),
        (
            "transformer",
            ["diffusers", "FluxTransformer2DModel"],
            "the transformer a FluxTransformer2DModel of diffusers",
        ),
        ("text_encoder", ["transformers", "T5EncoderModel"], "expected CLIPTextModelWithProjection"),
        ("scheduler", ["os", "system"], "makes the scheduler a system of os"),
        ("tokenizer", ["tests.stand_ins", "Red"], "makes the tokenizer a Red of tests.stand_ins"),
        ("own_module", ["own", "Own"], "has a own_module, which the pipeline does not take"),
        ("vae", "AutoencoderKL", "vae is 'AutoencoderKL', expected its library and class"),
        ("vae", [], "makes the vae a None of None"),
        ("vae", None, "has no vae; only text_encoder_3 may be absent"),
    ],
)
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_components_of_other_classes_and_code_of_a_checkpoint_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, component: str, value: object, message: str, weights: str
) -> None:
    if value is None and weights == "random":
        return
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, component: value}))
    before = set(sys.modules)
    with pytest.raises(CheckpointError, match=message):
        StableDiffusion3Policy.from_pretrained(copy, weights=weights)  # type: ignore[arg-type]
    assert not {"my_vae", "own"} & (set(sys.modules) - before)


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a scheduler with text": (
        "scheduler/scheduler_config.json",
        {"shift": "three"},
        "shift is 'three', expected a pos",
    ),
    "a scheduler of zero": ("scheduler/scheduler_config.json", {"shift": 0}, "shift is 0, expected a positive number"),
    "a text for a side": ("transformer/config.json", {"sample_size": "eight"}, "sample_size is 'eight'"),
    "a list for layers": (
        "transformer/config.json",
        {"num_layers": [2]},
        r"transformer/config\.json: .*Expected the conf",
    ),
    "code of a model": (
        "text_encoder/config.json",
        {"auto_map": {"AutoModel": "own.Own"}},
        "code of the checkpoint's ow",
    ),
    "code of a tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": {}}, "code of the checkpoint's own"),
    "text for a shift": ("vae/config.json", {"shift_factor": "x"}, "shift_factor is 'x', expected a number"),
    "text for a scale": ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor is 'x'"),
}


@pytest.mark.parametrize(("file", "changes", "message"), CHANGES.values(), ids=list(CHANGES))
def test_settings_of_components_that_cannot_be(
    tiny_checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        StableDiffusion3Policy.from_pretrained(copy, max_sequence_length=0)


def test_the_shipped_model_is_accepted() -> None:
    """Its autoencoder has a shift below zero."""
    StableDiffusion3Policy.check_source(embedded("embedded:generator"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "holds a list, expected a JSON object"),
        ({"weight_map": []}, "has no weight_map with a file for each tensor"),
        ({"weight_map": {"a": 1}}, "has no weight_map with a file for each tensor"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": "../../vae/diffusion_pytorch_model.safetensors"}}, "expected files beside it"),
        ({"weight_map": {"a": "other.safetensors"}}, "other.safetensors is missing, its index lists it"),
        ({"weight_map": {"a": ".."}}, "is no regular file|expected files beside it"),
    ],
)
def test_lists_of_shards_that_are_none(tiny_checkpoint: Path, tmp_path: Path, index: object, message: str) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        StableDiffusion3Policy.check_source(copy)


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_any_index_is_one_or_refused(tiny_checkpoint: Path, data: st.DataObject) -> None:
    path = tiny_checkpoint / "model_index.json"
    before = path.read_text()
    index = json.loads(before)
    names = st.sampled_from([*index, "other"]) | st.text(max_size=6)
    classes = st.sampled_from(["diffusers", "transformers", "os", "AutoencoderKL", "CLIPTokenizer", None, 3])
    values = JSON | st.lists(classes, max_size=3)
    changed = {**index, **data.draw(st.dictionaries(names, values, min_size=1, max_size=2))}
    try:
        path.write_text(json.dumps(changed))
        with suppress(AlignbenchError):
            StableDiffusion3Policy.check_source(tiny_checkpoint)
    finally:
        path.write_text(before)


FILES = ["scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"]
FILES += ["text_encoder/config.json", "tokenizer/tokenizer_config.json"]


@settings(fuzz, max_examples=25)
@given(file=st.sampled_from(FILES), data=st.data())
def test_any_settings_make_a_policy_or_are_refused(tiny_checkpoint: Path, file: str, data: st.DataObject) -> None:
    path = tiny_checkpoint / file
    before = path.read_text()
    config = json.loads(before)
    small = JSON.filter(lambda value: not isinstance(value, int) or abs(value) < 1000)
    changed = {**config, **data.draw(st.dictionaries(st.sampled_from(sorted(config)), small, min_size=1, max_size=2))}
    try:
        path.write_text(json.dumps(changed))
        with suppress(AlignbenchError):
            StableDiffusion3Policy.from_pretrained(tiny_checkpoint, max_sequence_length=0)
    finally:
        path.write_text(before)


# Rewards


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", []),
        ("config.json", "{"),
        ("config.json", {"model_type": "clip", "projection_dim": "x"}),
        ("config.json", {"model_type": "bert"}),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
        ("processor_config.json", []),
        (
            "processor_config.json",
            {"image_processor": {"image_processor_type": "CLIPImageProcessor", "image_mean": "x"}},
        ),
    ],
)
def test_a_reward_folder_that_is_none(tiny_pickscore: Path, tmp_path: Path, file: str, content: object) -> None:
    copy = shutil.copytree(tiny_pickscore, tmp_path / "copy")
    (copy / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match="copy") as raised:
        PickScore(copy)
    assert "\n" not in str(raised.value)
