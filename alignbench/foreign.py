"""The door for files of others: weights, their configurations, and what the libraries make of them.

Every file that somebody else wrote is read inside ``reading``, which turns whatever a library raises over it into one
``CheckpointError``: the file, what was wrong with it, what would work. The library's own error stays attached to it;
with ``ALIGNBENCH_DEBUG=1`` the command line prints its traceback.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignbench.errors import AlignbenchError, CheckpointError
from alignbench.hub import refusal

LARGEST_JSON = 64 * 2**20  # bytes; the vocabularies of published tokenizers have up to 20 MB
PICKLED = (".bin", ".ckpt", ".pt", ".pth")  # names of files that torch writes
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@contextmanager
def reading(what: object, expected: str) -> Iterator[None]:
    """Read a file of others inside: what is raised over it becomes one sentence.

    Args:
        what: the file or folder, named so that a user finds it.
        expected: what would work, as the end of "Expected ...".

    Raises:
        CheckpointError: whatever a library raised, chained to it; only full memory of a GPU and the project's own
            errors pass as they are.
    """
    try:
        yield
    except (AlignbenchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # No narrower class holds: the Rust of tokenizers raises bare Exception, that of safetensors an Exception of its
        # own, huggingface_hub's dataclasses another; and a value of another type ends as TypeError, KeyError,
        # AttributeError, IndexError, ZeroDivisionError or RecursionError wherever a library first works with it.
        raise CheckpointError(f"cannot read {what}: {refusal(error)}. Expected {expected}") from error


def from_hub(source: str, names: Sequence[str], expected: str) -> Path:
    """The local copy of a repository of the hub, or of a file or folder in it, fetched where it is not there.

    Args:
        source: ``owner/name``, or that and a path within it.
        names: patterns of what to fetch of a whole repository.
        expected: what would work, as the beginning of the message.

    Raises:
        CheckpointError: it is no such place, or the hub gives nothing.
    """
    owner, *rest = source.split("/")
    repository, inside = "/".join([owner, *rest[:1]]), rest[1:]
    if not HUB_ID.fullmatch(repository) or any(part in ("", ".", "..") for part in inside):
        raise CheckpointError(f"{expected}, got {source!r}, and there is no such file or folder")
    below, beside = "/".join(inside), "/".join([*inside[:-1], "*.json"])
    patterns = [below, f"{below}/*", beside] if inside else list(names)
    try:
        path = Path(snapshot_download(repository, allow_patterns=patterns)) / below
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{expected}, got {source!r}: nothing there, and the hub gave nothing ({refusal(error)})"
        ) from error
    if not path.exists():
        raise CheckpointError(f"{expected}, got {source!r}: the copy of {repository} has no {below}")
    return path


def read_json(path: Path, why: str) -> dict[str, Any]:
    """The content of a JSON file.

    Args:
        path: the file.
        why: it is needed, as the end of a sentence.

    Raises:
        CheckpointError: it is missing, no regular file, larger than 64 MiB, not JSON, or not an object.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {why}")
    check_regular(path)
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected a JSON file of at most {LARGEST_JSON}")
    try:
        return parse_object(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}); download it again") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the text is something else, or nested deeper than Python's stack.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); save or download the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds a {type(content).__name__}, expected a JSON object")
    return content


def check_regular(path: Path) -> None:
    """Refuse what would never end or never begin when it is read: pipes, devices, sockets, folders.

    Raises:
        CheckpointError: the path is missing or no regular file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file: expected a file of weights or settings")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes in a safetensors file by name; the file is complete and its header is sound.

    Raises:
        CheckpointError: otherwise.
    """
    with _safetensors(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping


def read_header(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself: text by name, empty if it says nothing.

    Raises:
        CheckpointError: it is no safetensors file that can be read.
    """
    with _safetensors(path) as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of one that torch wrote, by name; no code of the file is run.

    Raises:
        CheckpointError: the file is damaged, holds something else, or would have to be unpickled.
    """
    check_regular(path)
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    with reading(path, "a file of tensors alone, as torch.save(state_dict) or safetensors write it: no code is run"):
        held = torch.load(path, "cpu", weights_only=True)
    return _named_tensors(held, path)


def _named_tensors(held: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(held, Mapping) or not held:
        raise CheckpointError(f"{path} holds a {type(held).__name__}, expected tensors by name")
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} under {name!r}, expected tensors by name: save the state_dict "
                "of the model alone"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(
                f"{path} holds a sparse, quantised or empty tensor under {name!r}, expected plain ones"
            )
    return dict(held)


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open. Its library checks the header: length, types, offsets without gap or overlap."""
    check_regular(path)
    with reading(path, "a safetensors file of tensors that torch has; download it again"):
        try:
            with safe_open(path, framework="pt") as opened:
                yield opened
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({refusal(error)}); download it again") from error
