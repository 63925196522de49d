"""Saved diffusers pipelines: where they are, and whether they are whole, before any weights are loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import EnumType
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BatchEncoding

from alignbench.errors import CheckpointError, ConfigError
from alignbench.foreign import HUB_ID, read_json, reading, tensor_shapes
from alignbench.hub import refusal

WeightSource = Literal["pretrained", "random"]

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}  # whose classes an index may name
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers, of transformers
FLOW_NUMBERS = ("num_train_timesteps", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
NUMBERS = {  # of components, that images are made with
    "transformer": ("sample_size", "in_channels", "patch_size", "pos_embed_max_size"),
    "unet": ("sample_size", "in_channels"),
    "vae": ("scaling_factor", "shift_factor", "latent_channels"),
}
SIGNED = ("shift_factor",)
DIFFUSION_NUMBERS = ("num_train_timesteps", "beta_start", "beta_end")
WHOLE = "a whole pipeline as save_pretrained writes it; save or download the checkpoint again"
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
    with reading(folder, WHOLE):
        index = check(folder, weights)
        if weights == "random":
            return _random_pipeline(folder, pipeline_class, index, dtypes)
        changed = {name: value for name, value in index.items() if not isinstance(value, list) and name[0] != "_"}
        return pipeline_class.from_pretrained(
            folder, dtype=dict(dtypes), local_files_only=True, trust_remote_code=False, **changed
        )


def local_folder(source: str | Path, revision: str | None, pipeline_class: Any, *, weights: WeightSource) -> Path:
    """The folder itself, or the local copy of a hub checkpoint.

    Random weights need its configurations alone; those of some published checkpoints are in the package.

    Raises:
        CheckpointError: it is neither a folder nor a hub id, or the hub gives nothing.
    """
    if Path(source).is_dir():
        return Path(source)
    expected = f"expected a folder saved with save_pretrained or a hub id owner/name, got {str(source)!r}"
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{expected}, and there is no such folder")
    if weights == "random" and revision is None and (ARCHITECTURES / source).is_dir():
        return ARCHITECTURES / source
    try:
        if weights == "random":
            texts = ["*.json", "*.txt", "*.model"]
            return Path(snapshot_download(str(source), revision=revision, allow_patterns=texts))
        return Path(pipeline_class.download(str(source), revision=revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{expected}: there is no such folder, and the hub gave nothing ({refusal(error)})"
        ) from error


def read_index(folder: Path, pipeline_class: Any, model: str, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The content of ``model_index.json``: library and class by component.

    Args:
        folder: of the checkpoint.
        pipeline_class: what it must be of; its components are of the classes that it takes.
        model: what to use instead of another one, in words.
        ignored: components that are never loaded.

    Raises:
        CheckpointError: it is missing, not JSON, of another pipeline, or names a class that the pipeline does not take,
            such as code of the checkpoint's own.
    """
    path = folder / "model_index.json"
    index = read_json(path, "a pipeline saved with save_pretrained has one")
    if index.get("_class_name") != pipeline_class.__name__:
        raise CheckpointError(
            f"{folder} holds a {index.get('_class_name')}, expected a {pipeline_class.__name__}; "
            f"use a {model} checkpoint in diffusers format"
        )
    taken = pipeline_class._get_signature_types()
    for name in [name for name in index if name not in ignored]:
        value = index[name]
        if isinstance(value, list):
            _check_class(path, name, value, taken)
        elif value is not None and bool not in taken.get(name, (bool,)):
            raise CheckpointError(f"{path}: {name} is {value!r}, expected its library and class; download it again")
    return index


def _check_class(path: Path, name: str, value: list[Any], taken: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a component of a class that is not one of diffusers or transformers that the pipeline takes there."""
    if value == [None, None]:
        return
    if name not in taken:
        raise CheckpointError(f"{path} has a {name}, which the pipeline does not take; it takes {', '.join(taken)}")
    known = [each for kind in taken[name] for each in _names(kind)]
    library, class_name = value if len(value) == 2 else (None, None)
    if not isinstance(library, str) or library not in LIBRARIES or str(class_name).removesuffix("Fast") not in known:
        raise CheckpointError(
            f"{path} makes the {name} a {class_name} of {library}, expected {' or '.join(known)} of "
            f"{' or '.join(LIBRARIES)}; code of a checkpoint's own is never run"
        )


def _names(kind: Any) -> list[str]:
    """Names of a class, or of the classes that an enumeration of schedulers lists."""
    return list(kind.__members__) if isinstance(kind, EnumType) else [kind.__name__]


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
        if index.get(component, [None, None]) in (None, [None, None]):
            if component in optional:
                continue
            allowed = f"only {' and '.join(optional)} may be absent" if optional else "none may be absent"
            raise CheckpointError(f"{folder / 'model_index.json'} has no {component}; {allowed}")
        config = read_json(folder / component / "config.json", "it says how the weights are to be read")
        _check_custom(folder / component / "config.json", config)
        check_numbers(folder / component / "config.json", config, NUMBERS.get(component, ()))
        shapes = _safetensors_shapes(folder / component)
        if component in models:
            _check_shapes(folder / component, models[component], shapes)
    for name, value in index.items():
        if name.startswith("tokenizer") and isinstance(value, list) and value != [None, None]:
            check_tokenizer(folder / name)


def _check_custom(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that names Python files of its own."""
    if "auto_map" in config:
        raise CheckpointError(
            f"{path} asks for code of the checkpoint's own (auto_map), which is never run; use a checkpoint of a class "
            "that diffusers or transformers have"
        )


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer has its vocabulary: transformers makes one that reads nothing where it is missing.

    Raises:
        CheckpointError: it has none, or is code of the checkpoint's own.
    """
    path = folder / "tokenizer_config.json"
    _check_custom(path, read_json(path, "it says how texts are split"))
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
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path, "the time grid is read from it")
    check_numbers(path, scheduler, FLOW_NUMBERS)
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
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path, "the noise schedule is read from it")
    check_numbers(path, scheduler, DIFFUSION_NUMBERS)
    spacing, offset = scheduler.get("timestep_spacing", "leading"), scheduler.get("steps_offset", 0)
    if spacing not in ("leading", "linspace", "trailing") or not isinstance(offset, int):
        raise CheckpointError(
            f"{path}: timestep_spacing is {spacing!r} and steps_offset {offset!r}, expected leading, linspace or "
            "trailing and an integer"
        )
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


def check_numbers(path: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that settings, where they are there, are finite numbers, and positive but for those of `SIGNED`.

    Raises:
        CheckpointError: one is something else.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue  # the class has a default
        lowest, kind = (-math.inf, "a") if name in SIGNED else (0, "a positive")
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest < value < math.inf:
            raise CheckpointError(f"{path}: {name} is {value!r}, expected {kind} number; download it again")


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
        component = getattr(LIBRARIES[library], class_name)
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


def _check_shapes(folder: Path, model_class: Any, shapes: Mapping[str, list[int]]) -> None:
    model = model_without_weights(folder / "config.json", model_class)
    shapes = {_current_name(name): shape for name, shape in shapes.items()}
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            raise CheckpointError(f"{folder} has no weights for {name}; its files do not belong to its config.json")
        if shapes[name] != list(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, expected {list(tensor.shape)}; "
                "its files do not belong to its config.json"
            )


def model_without_weights(path: Path, model_class: Any) -> Any:
    """A model of diffusers on the meta device, from its ``config.json``.

    Raises:
        CheckpointError: the file is not a configuration of that class.
    """
    config = read_json(path, "it says how the weights are to be read")
    with reading(path, f"the configuration of a {model_class.__name__}"), torch.device("meta"):
        return model_class.from_config(config)


def _current_name(name: str) -> str:
    """Today's name of a parameter: the attention of Stable Diffusion 1's autoencoder was saved under older ones."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def indexed_files(folder: Path) -> list[Path]:
    """The files of sharded weights, which an index lists; none where there is no index.

    Raises:
        CheckpointError: the index is not one, or lists a file that is not beside it.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return []
    names = read_json(indexes[0], "it lists the files of the weights").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{indexes[0]} has no weight_map with a file for each tensor; download it again")
    files = sorted({folder / name for name in names.values()})
    for path in files:
        if path.parent != folder:
            raise CheckpointError(f"{indexes[0]} lists {path}, expected files beside it; download it again")
        if not path.exists():
            raise CheckpointError(f"{path} is missing, its index lists it; download the checkpoint again")
    return files


def _safetensors_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a component, whose files are complete."""
    files = indexed_files(folder) or [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not files:
        raise CheckpointError(f"{folder} has no safetensors weights; save or download the checkpoint again")
    return {name: shape for path in files for name, shape in tensor_shapes(path).items()}
