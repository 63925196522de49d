"""Saved diffusers pipelines: where they are, and whether they are whole, before any weights are loaded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BatchEncoding

from alignbench.errors import CheckpointError, ConfigError
from alignbench.hub import refusal

WeightSource = Literal["pretrained", "random"]

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # whole; CLIP's before its merges; T5's
ARCHITECTURES = Path(__file__).parent / "architectures"  # configurations of published checkpoints, by hub id


def load_pipeline(
    pipeline_class: Any,
    source: str | Path,
    revision: str | None,
    weights: WeightSource,
    check: Callable[[Path, WeightSource], dict[str, Any]],
    dtypes: Mapping[str, torch.dtype],
) -> Any:
    """A pipeline from a folder or the hub, checked before it is loaded.

    Args:
        check: (folder, weights) -> what to load: the index with other values for components that are left out.
        dtypes: of the components' weights, by name or ``default``.

    Raises:
        CheckpointError: there is no such checkpoint, or `check` found it unusable.
    """
    if weights not in ("pretrained", "random"):
        raise ConfigError(f"weights must be 'pretrained' or 'random', got {weights!r}")
    folder = local_folder(source, revision, pipeline_class, weights=weights)
    index = check(folder, weights)
    if weights == "random":
        return _random_pipeline(folder, pipeline_class, index, dtypes)
    changed = {name: value for name, value in index.items() if not isinstance(value, list) and not name.startswith("_")}
    return pipeline_class.from_pretrained(folder, dtype=dict(dtypes), local_files_only=True, **changed)


def local_folder(source: str | Path, revision: str | None, pipeline_class: Any, *, weights: WeightSource) -> Path:
    """The folder itself, or the local copy of a hub checkpoint.

    Random weights need its configurations alone; those of some published checkpoints are in the package.

    Raises:
        CheckpointError: it is neither a folder nor a hub id, or the hub gives nothing.
    """
    if Path(source).is_dir():
        return Path(source)
    expected = f"expected a folder saved with save_pretrained or a hub id owner/name, got {str(source)!r}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise CheckpointError(f"{expected}, and there is no such folder")
    if weights == "random" and revision is None and (ARCHITECTURES / source).is_dir():
        return ARCHITECTURES / source
    try:
        if weights == "random":
            texts = ["*.json", "*.txt", "*.model"]
            return Path(snapshot_download(str(source), revision=revision, allow_patterns=texts))
        return Path(pipeline_class.download(str(source), revision=revision))
    except OSError as error:
        raise CheckpointError(
            f"{expected}: there is no such folder, and the hub gave nothing ({refusal(error)})"
        ) from error


def read_index(folder: Path, pipeline: str, model: str) -> dict[str, Any]:
    """The content of ``model_index.json``: library and class by component.

    Args:
        pipeline: name of the class it must be of.
        model: what to use instead of another one, in words.

    Raises:
        CheckpointError: it is missing, not JSON, or of another pipeline.
    """
    index = read_json(folder / "model_index.json", "a pipeline saved with save_pretrained has one")
    if index.get("_class_name") != pipeline:
        raise CheckpointError(
            f"{folder} holds a {index.get('_class_name')}, expected a {pipeline}; "
            f"use a {model} checkpoint in diffusers format"
        )
    return index


def check_components(
    folder: Path,
    index: Mapping[str, Any],
    components: Sequence[str],
    models: Mapping[str, Any],
    optional: Sequence[str] = (),
) -> None:
    """Check that weights are there and whole, by their indexes and safetensors headers.

    Args:
        components: that have weights.
        models: diffusers classes by component, whose parameters are compared by name and shape.
        optional: components that may be absent.

    Raises:
        CheckpointError: naming the file, what was expected and what is there.
    """
    for component in components:
        if index.get(component, [None, None])[1] is None:
            if component in optional:
                continue
            allowed = f"only {' and '.join(optional)} may be absent" if optional else "none may be absent"
            raise CheckpointError(f"{folder / 'model_index.json'} has no {component}; {allowed}")
        shapes = _safetensors_shapes(folder / component)
        config = read_json(folder / component / "config.json", "it says how the weights are to be read")
        if component in models:
            _check_shapes(folder / component, models[component], config, shapes)
    for name, value in index.items():
        if name.startswith("tokenizer") and isinstance(value, list) and value[1] is not None:
            _check_tokenizer(folder / name)


def _check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer has its vocabulary: transformers makes one that reads nothing where it is missing."""
    read_json(folder / "tokenizer_config.json", "it says how texts are split")
    files = [folder / name for name in VOCABULARIES if (folder / name).exists()]
    if not files:
        raise CheckpointError(
            f"{folder} has no vocabulary, expected {' or '.join(VOCABULARIES)}; save or download the checkpoint again"
        )
    for path in files:
        if path.suffix == ".json":
            read_json(path, "it holds the vocabulary")


def check_flow_scheduler(folder: Path, *, dynamic_shift: bool) -> None:
    """Check that the time grid of a flow model is one of those that are known.

    Raises:
        CheckpointError: another scheduler, or settings that change its grid.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "the time grid is read from it")
    special = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal", "invert_sigmas")
    unsupported = [key for key in special if scheduler.get(key)]
    if bool(scheduler.get("use_dynamic_shifting")) != dynamic_shift:
        unsupported.insert(0, f"use_dynamic_shifting={str(not dynamic_shift).lower()}")
    elif dynamic_shift and scheduler.get("time_shift_type", "exponential") != "exponential":
        unsupported.append(f"time_shift_type={scheduler['time_shift_type']}")
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or unsupported:
        shift = "a shift by the image's size" if dynamic_shift else "a constant shift"
        raise CheckpointError(
            f"{folder / 'scheduler'} is a {scheduler.get('_class_name')} with {unsupported or 'no special settings'}, "
            f"expected a FlowMatchEulerDiscreteScheduler with {shift}; use the scheduler the model was published with"
        )


def check_diffusion_scheduler(folder: Path) -> None:
    """Check that a diffusion model predicts noise and that its schedule is known.

    Raises:
        CheckpointError: another prediction, or a schedule that is not DDPM's.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "the noise schedule is read from it")
    name = f"{folder / 'scheduler'} is a {scheduler.get('_class_name')}"
    if "beta_schedule" not in scheduler:
        raise CheckpointError(f"{name} without a beta_schedule, expected DDPM's schedule of noise")
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise CheckpointError(
            f"{name} for a model that predicts {scheduler['prediction_type']}, expected one that predicts epsilon; "
            "use a checkpoint that was trained to predict the noise"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise CheckpointError(
            f"{name} with rescale_betas_zero_snr, expected false: a noise prediction says nothing at zero signal"
        )


def _random_pipeline(folder: Path, pipeline_class: Any, index: Mapping[str, Any], dtypes: Mapping[str, Any]) -> Any:
    """A pipeline of the saved architectures with weights as its classes initialise them, to measure what it costs.

    Args:
        index: library and class by component; components that are not to be there are None.
        dtypes: of the components' weights, by name or ``default``.
    """
    components: dict[str, Any] = {name: value for name, value in index.items() if not name.startswith("_")}
    for name, value in components.items():
        if not isinstance(value, list):
            continue
        library, class_name = value
        if class_name is None:
            components[name] = None
            continue
        component = getattr(import_module(library), class_name)
        if not issubclass(component, nn.Module):
            with unset_fake_temporarily():  # schedulers read values of their tensors
                there = (folder / name).is_dir()
                components[name] = component.from_pretrained(folder / name) if there else BlankTokenizer()
            continue
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtypes.get(name, dtypes["default"]))  # half the memory from the start
        try:
            if library == "diffusers":
                components[name] = component.from_config(component.load_config(folder / name))
            else:
                components[name] = component(component.config_class.from_pretrained(folder / name))
        finally:
            torch.set_default_dtype(previous)
    return pipeline_class(**components)


class BlankTokenizer:
    """Stands in for a tokenizer whose vocabulary is not there: every text is padding, of the length that is asked for.

    Enough for random weights, which read nothing into a text.
    """

    model_max_length = 77  # of CLIP; callers of T5 give theirs

    def __call__(self, text: str | list[str], *, max_length: int = 1, **options: Any) -> BatchEncoding:
        """Token ids ``[texts, max_length]``, as the tokenizers of transformers return them."""
        shape = (1 if isinstance(text, str) else len(text), max_length)
        return BatchEncoding({"input_ids": torch.zeros(shape, dtype=torch.long)})

    def tokenize(self, text: str) -> list[str]:
        """No tokens, so none that stands for a learnt embedding."""
        return []


def _check_shapes(folder: Path, model_class: Any, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    with torch.device("meta"):
        model = model_class.from_config(config)
    shapes = {_current_name(name): shape for name, shape in shapes.items()}
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            raise CheckpointError(f"{folder} has no weights for {name}; its files do not belong to its config.json")
        if shapes[name] != list(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, expected {list(tensor.shape)}; "
                "its files do not belong to its config.json"
            )


def _current_name(name: str) -> str:
    """Today's name of a parameter: the attention of Stable Diffusion 1's autoencoder was saved under older ones."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def _safetensors_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a component, whose files are complete."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        files = sorted({folder / name for name in read_json(indexes[0], "")["weight_map"].values()})
    else:
        files = [
            path
            for path in (folder / "diffusion_pytorch_model.safetensors", folder / "model.safetensors")
            if path.exists()
        ]
    if not files:
        raise CheckpointError(f"{folder} has no safetensors weights; save or download the checkpoint again")
    return {name: shape for path in files for name, shape in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, list[int]]:
    """Shapes in a safetensors file: 8 bytes little-endian length, JSON header of that length, then the tensors."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing, its index lists it; download the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated: its header does not fit into {size} bytes; download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} is not a safetensors file ({error}); download it again") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise CheckpointError(f"{path} is truncated or damaged: {size} bytes, expected {expected}; download it again")
    return {name: entry["shape"] for name, entry in header.items()}


def read_json(path: Path, why: str) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is missing (with `why` it is needed) or not JSON.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {why}")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save or download the checkpoint again") from error
    return content
