"""LoRA files of others as the uniform low-rank updates that a policy takes, read as the pipelines of diffusers do.

The pipeline's own converter brings a file into PEFT's names, and PEFT says what each update is scaled by: both work on
the denoiser without its weights. Here the scale is multiplied into B and smaller ranks are padded with zeros, so that
one rank R and alpha = R hold for all layers; the update ``B A`` stays the same.

Gotchas: a file without settings of its own has the scale 1, as in diffusers; PEFT's files have theirs in
``adapter_config.json`` and are refused without it, because nobody could tell their scale.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from torch import Tensor, nn

from alignbench.errors import CheckpointError
from alignbench.foreign import check_regular, from_hub, parse_object, read_header, read_json, read_tensors, reading
from alignbench.policies.diffusers_policy import DiffusersPolicy
from alignbench.policies.policy import Policy

FILES = (  # of diffusers, of PEFT
    ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"),
    ("pytorch_lora_weights.bin", "adapter_model.bin"),
)
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, in the file's header
KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<matrix>[AB])\.weight")
TEXT_ENCODER = re.compile(r"text_encoder|lora_te\d?_|te\d?\.")
NAME = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")  # of a layer, or the end of one: PEFT takes any regular expression
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights too
FUSE = (
    "make a checkpoint of it in diffusers: pipe.load_lora_weights(FILE), pipe.fuse_lora(), pipe.unload_lora_weights(), "
    "pipe.save_pretrained(FOLDER); and score checkpoint=FOLDER"
)


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of linear layers, scaled: a layer's weight becomes ``W + B A``.

    Attributes:
        source: the file.
        layers: by path within the denoiser: A ``[rank, in]`` and B ``[out, rank]``, float32.
        config: the file of PEFT's settings beside it, where it is in PEFT's format.
    """

    source: Path
    layers: Mapping[str, tuple[Tensor, Tensor]]
    config: Path | None = None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(len(a) for a, _ in self.layers.values())

    def settings(self) -> dict[str, Any]:
        """What a policy must be made with to take these updates."""
        return {"trainable": "lora", "rank": self.rank, "alpha": float(self.rank), "targets": sorted(self.layers)}

    def install(self, policy: Policy, view: str) -> None:
        """Put the updates into a new view of a policy that was made with ``settings``."""
        tensors = {}
        for layer, (a, b) in self.layers.items():
            missing = self.rank - len(a)
            tensors[f"{view}/{layer}.lora_A"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
            tensors[f"{view}/{layer}.lora_B"] = torch.nn.functional.pad(b, (0, missing))
        policy.load_state_dict(policy.state_dict() | tensors)


def read_lora(source: str, policy: type[DiffusersPolicy], checkpoint: str | Path, revision: str | None = None) -> Lora:
    """Read a LoRA: a file, a folder of diffusers or PEFT with one, or ``owner/name`` on the hub and what is below it.

    Args:
        source: where it is.
        policy: class of the model that it changes.
        checkpoint: of that model: a folder or hub id; only its configuration is read.
        revision: of the checkpoint, on the hub.

    Raises:
        CheckpointError: nothing there, a damaged file, settings that cannot be, layers that the model does not have, or
            updates that are more than ``B A`` on linear layers of the denoiser (text encoders, convolutions, DoRA).
    """
    path = _file(source)
    tensors = read_tensors(path)
    _check_kind(path, tensors)
    denoiser = policy.denoiser_without_weights(checkpoint, revision)
    own = f"{policy.denoiser_name}."
    expected = f"a LoRA that {policy.pipeline_class.__name__}.load_lora_weights takes"
    with reading(path, expected), _quiet():
        config = _peft_config(path, tensors)
        if config is not None:
            state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
            alphas: Mapping[str, Any] | None = None
            settings: dict[str, Any] | None = _settings(config, read_json(config, "it holds alpha"), "")
        else:
            state, alphas = _converted(tensors, policy, denoiser)
            prefixed = any(key.startswith(own) for key in state)
            settings = _own_settings(path, own if prefixed else "")
            state = _without_prefix(path, state, own) if prefixed else state
        if not any(KEY.fullmatch(key) for key in state):
            state = convert_unet_state_dict_to_peft(state)  # names of diffusers before PEFT
        layers = _layers(path, state, denoiser, own)
        scales = _scales(denoiser, state, alphas, settings, policy.denoiser_name)
    updates = {layer: (a.float(), b.float() * scales[layer]) for layer, (a, b) in layers.items()}
    return Lora(path, updates, config)


def _check_kind(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no plain LoRA of a denoiser, by names."""
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in this file")
    for key in tensors:
        if "dora_scale" in key or "lora_magnitude_vector" in key:
            raise CheckpointError(f"{path} is a DoRA ({key}): only plain LoRA can be scored; {FUSE}")
        if TEXT_ENCODER.match(key):
            raise CheckpointError(f"{path} changes a text encoder too ({key}): only denoisers are changed here; {FUSE}")
        if re.search(r"\.(hada|lokr|oft|boft|vera)_|\.diff(_b)?$", key):
            raise CheckpointError(f"{path} is no LoRA ({key}): only plain LoRA can be scored; {FUSE}")


def _peft_config(path: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """The file of settings beside a file in PEFT's format; None for other formats.

    Raises:
        CheckpointError: it is in PEFT's format, and there are no settings.
    """
    first = next(iter(tensors))
    if not first.startswith(PEFT_PREFIX):
        return None
    config = path.with_name(PEFT_CONFIG)
    if config.exists():
        return config
    if any("double_blocks" in key for key in tensors):  # FLUX under its authors' names: diffusers converts it, scale 1
        return None
    raise CheckpointError(
        f"{path} is in PEFT's format ({first}), which keeps alpha in {PEFT_CONFIG}: there is none beside it, so its "
        "scale is not known; put it there"
    )


def _converted(
    tensors: Mapping[str, Tensor], policy: type[DiffusersPolicy], denoiser: Any
) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """Tensors under the pipeline's names, and the alphas that lay beside them, by the pipeline's own converter."""
    parts = policy.pipeline_class.lora_state_dict(
        dict(tensors), unet_config=denoiser.config, return_alphas=True, return_lora_metadata=True
    )
    return dict(parts[0]), (parts[1] or None) if len(parts) == 3 else None  # state, alphas if the format has any, None


def _without_prefix(path: Path, state: Mapping[str, Tensor], own: str) -> dict[str, Tensor]:
    for key in state:
        if not key.startswith(own):
            raise CheckpointError(
                f"{path}: cannot use {key}; expected names that begin with {own}, as of other tensors"
            )
    return {key.removeprefix(own): tensor for key, tensor in state.items()}


def _layers(path: Path, state: Mapping[str, Tensor], denoiser: nn.Module, own: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Both matrices by layer; every tensor is one of them, and every layer is a linear one of the denoiser."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: cannot use {key}; {_advice(key, own)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {key} holds {tensor.dtype}, expected floating-point numbers")
        found.setdefault(match["layer"], {})[match["matrix"]] = tensor
    modules = dict(denoiser.named_modules())
    for layer, parts in found.items():
        if len(parts) != 2:
            raise CheckpointError(f"{path}: {layer} has only {next(iter(parts))} of its two matrices A and B")
        if layer not in modules:
            raise CheckpointError(
                f"{path} is a LoRA of another model: it changes {layer}, which a {type(denoiser).__name__} has not; "
                f"{_advice(layer, own)}"
            )
        if not isinstance(modules[layer], nn.Linear):
            kind = type(modules[layer]).__name__
            raise CheckpointError(f"{path} changes {layer}, a {kind}: only linear layers can be changed here; {FUSE}")
        a, b = parts["A"], parts["B"]
        shapes = list(a.shape), list(b.shape)
        taken = modules[layer].in_features, modules[layer].out_features
        if a.ndim != 2 or b.ndim != 2 or not len(a) or len(a) != b.shape[1] or (a.shape[1], len(b)) != taken:
            raise CheckpointError(
                f"{path} is a LoRA of another model: {layer} has matrices of shapes {shapes[0]} and {shapes[1]}, "
                f"expected [rank, {taken[0]}] and [{taken[1]}, rank]"
            )
    return {layer: (parts["A"], parts["B"]) for layer, parts in found.items()}


def _advice(name: str, own: str) -> str:
    """What names should look like, and what gave these."""
    for mark, why in (
        ("module.", "module. is of DistributedDataParallel: save the model inside it"),
        ("diffusion_model.", "diffusion_model. is of other programs, and the pipeline of diffusers does not read it"),
        (".default", "an adapter's name stands in it, as state_dict() gives it: save with pipe.save_lora_weights"),
    ):
        if mark in name:
            return f"{why}; expected names such as {own}LAYER.lora_A.weight"
    return f"expected names such as {own}LAYER.lora_A.weight, in the format of diffusers, PEFT or kohya"


def _own_settings(path: Path, prefix: str) -> dict[str, Any] | None:
    """PEFT's configuration in the file's header, of the denoiser; None if there is none.

    ``save_lora_weights`` of a pipeline puts the component's name before tensors and settings, ``save_lora_adapter`` of
    a model before neither.
    """
    packed = read_header(path).get(METADATA) if path.suffix == ".safetensors" else None
    if packed is None:
        return None
    held = parse_object(packed, f"{path}: {METADATA} in its header")
    mine = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
    return _settings(path, mine, f"{METADATA} in its header: {prefix}")


def _settings(path: Path, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What of PEFT's configuration decides the scale of the updates, each of the type that PEFT needs.

    Raises:
        CheckpointError: a value of another type or out of range, or a kind of adapter that is no plain LoRA.
    """
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("use_qalora"):
        kind = "a DoRA" if config.get("use_dora") else f"a {config.get('peft_type')} of another kind than LoRA"
        raise CheckpointError(f"{path} is {kind}: only plain LoRA can be scored; {FUSE}")
    if str(config.get("init_lora_weights")).startswith(CHANGED_BASES):
        raise CheckpointError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the model's own weights too; "
            "convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    settings: dict[str, Any] = {name: config.get(name) for name in ("r", "lora_alpha")}
    settings |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    settings["use_rslora"] = config.get("use_rslora") or False
    if not isinstance(settings["use_rslora"], bool):
        raise CheckpointError(f"{path}: {where}use_rslora is {settings['use_rslora']!r}, expected true or false")
    for name in ("r", "lora_alpha"):
        _check_number(f"{path}: {where}{name}", settings[name], whole=name == "r")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings[name], dict):
            raise CheckpointError(
                f"{path}: {where}{name} is {settings[name]!r}, expected an object of numbers by layer"
            )
        for layer, value in settings[name].items():
            if not NAME.fullmatch(layer):
                raise CheckpointError(
                    f"{path}: {where}{name} has {layer!r}, expected names of layers: regular expressions are not run"
                )
            _check_number(f"{path}: {where}{name} of {layer}", value, whole=name == "rank_pattern")
    return settings


def _check_number(what: str, value: object, *, whole: bool) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise CheckpointError(f"{what} is {value!r}, expected a positive {'integer' if whole else 'number'}")


def _scales(
    denoiser: Any,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    name: str,
) -> dict[str, float]:
    """What PEFT multiplies the update of each layer by, when it is put into the denoiser as the pipeline does it."""
    from peft.tuners.lora import LoraLayer  # takes seconds to import, and only files of LoRA need it

    metadata = None
    if settings is not None:
        targets = [layer for layer, module in denoiser.named_modules() if f"{layer}.lora_A.weight" in state]
        known = {**settings, "target_modules": targets}
        metadata = {f"{name}.{key}": value for key, value in known.items()}
    with torch.device("meta"):  # whatever rank the settings name, it takes no memory
        denoiser.load_lora_adapter(
            {f"{name}.{key}": tensor for key, tensor in state.items()},
            prefix=name,
            network_alphas=alphas,
            metadata=metadata,
            adapter_name="read",
            low_cpu_mem_usage=True,
        )
    return {
        layer: float(module.scaling["read"])
        for layer, module in denoiser.named_modules()
        if isinstance(module, LoraLayer)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers and PEFT log and warn of before they raise."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _file(source: str) -> Path:
    """The file of a LoRA that is given by a file, a folder or a place on the hub."""
    path = Path(source)
    if not path.exists():
        expected = "expected a file of a LoRA, a folder with one, or owner/name[/folder] on the hub"
        path = from_hub(source, ("*.safetensors", PEFT_CONFIG), expected)
    if path.is_dir():
        return _in_folder(path)
    check_regular(path)
    return path


def _in_folder(folder: Path) -> Path:
    """The one LoRA of a folder or, where it has none, of the folders below it, such as ``checkpoint-100/lora``."""
    found = _loras(folder) or sorted(folder.glob("*.safetensors"))
    if not found:
        found = [path for depth in ("*/", "*/*/") for each in sorted(folder.glob(depth)) for path in _loras(each)]
    if len(found) != 1:
        some = f": {', '.join(str(path) for path in found[:4])}" if found else ""
        raise CheckpointError(
            f"{folder} holds {len(found)} LoRA files, expected one ({' or '.join(FILES[0])}){some}; name the file"
        )
    return found[0]


def _loras(folder: Path) -> list[Path]:
    """Files of a folder that are LoRAs by their names; safetensors where there are both."""
    for names in FILES:
        found = [folder / name for name in names if (folder / name).is_file()]
        if found:
            return found
    return []
