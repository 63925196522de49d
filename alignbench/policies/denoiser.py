"""Weights of a denoiser alone: a file, a folder, or a place on the hub, put into a policy that trains all of them."""

from pathlib import Path

from alignbench.errors import CheckpointError
from alignbench.foreign import PICKLED, check_regular, from_hub, read_tensors
from alignbench.policies.policy import Policy
from alignbench.policies.saved_pipeline import WEIGHT_FILES, indexed_files

ON_HUB = ("*.json", "*.safetensors")
EXPECTED = (
    "expected a pipeline (a folder with model_index.json, or a hub id), a denoiser's folder, a file of its weights, "
    "or owner/name/folder on the hub"
)


def is_pipeline(source: str) -> bool:
    """Whether a checkpoint is a whole pipeline; one that is neither here nor on the hub is none.

    Raises:
        CheckpointError: it is a name on the hub, which gives nothing.
    """
    path = Path(source)
    if not path.exists() and source.count("/") == 1:
        path = from_hub(source, ("model_index.json", "config.json"), EXPECTED)
    return (path / "model_index.json").is_file()


def local_denoiser(source: str) -> Path:
    """The file or folder of a denoiser's weights; what is on the hub is fetched.

    Raises:
        CheckpointError: it is neither here nor on the hub.
    """
    return Path(source) if Path(source).exists() else from_hub(source, ON_HUB, EXPECTED)


def install_denoiser(path: Path, policy: Policy) -> None:
    """Put the weights of a saved denoiser into a policy's new view ``evaluation``.

    Raises:
        CheckpointError: no weights, or not those of this model.
    """
    state = {name: tensor for file in _files(path) for name, tensor in read_tensors(file).items()}
    own = policy.trainable_parameters()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own and name.endswith((".weight", ".bias"))]  # others are buffers
    if missing or unknown:
        example = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which the model has not"
        raise CheckpointError(
            f"{path}: not a denoiser of this model under the names of diffusers; {len(missing)} weights are missing, "
            f"{len(unknown)} unknown: it {example}. A file under other names is converted by the model's class: "
            "from_single_file(FILE).save_pretrained(FOLDER)"
        )
    for name, parameter in own.items():
        if state[name].shape != parameter.shape or not state[name].is_floating_point():
            raise CheckpointError(
                f"{path}: not a denoiser of this model; {name} is {state[name].dtype} of shape "
                f"{list(state[name].shape)}, expected floating-point numbers of shape {list(parameter.shape)}"
            )
    policy.load_state_dict(policy.state_dict() | {f"evaluation/{name}": state[name] for name in own})


def _files(path: Path) -> list[Path]:
    """The files of weights: a file itself, or those of a folder; safetensors before files that torch wrote."""
    if not path.is_dir():
        check_regular(path)
        return [path]
    found = (
        indexed_files(path)
        or [path / name for name in WEIGHT_FILES if (path / name).exists()][:1]
        or sorted(path.glob("*.safetensors"))
        or sorted(file for file in path.iterdir() if file.suffix in PICKLED)
    )
    if not found:
        raise CheckpointError(f"{path}: {EXPECTED}; there are no weights in this folder")
    return found
