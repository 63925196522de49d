"""What a run reads from outside, by hash: it continues with the inputs that it began with, or not at all.

Files count by what they hold (SHA-256), a repository of the hub by the commit that its revision stands for in the local
cache. Names are configuration keys, so that a message says what changed and where it is set.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from omegaconf import DictConfig, OmegaConf

from alignbench.configuration import embedded, plain
from alignbench.errors import DataError, RecordError
from alignbench.prompts.images import INDEX
from alignbench.prompts.prompt import Prompt
from alignbench.records import changed_inputs, read_run

WORDS = ("source", "model", "path", "processor", "detector", "images")  # settings whose single words may name a folder
PREFIXES = ("local-dir:", "hf-hub:")  # of open_clip
REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(/.+)?")


def of(config: DictConfig, *, prompts: Sequence[Prompt] | None, evaluated: Sequence[Prompt]) -> dict[str, str]:
    """The inputs of a run: configuration key -> ``sha256:...`` or ``commit:...``.

    They are the prompts, and whatever the model, the reward, the scorers and the method name by path or hub id. A
    repository that is not in the local cache yet is left out.

    Args:
        config: the composed configuration.
        prompts: those that are trained on; None where nothing is trained.
        evaluated: those of the evaluation protocols.

    Raises:
        DataError: an input cannot be read.
    """
    whole = embedded(plain(config))
    domain = whole["model"]["domain"]
    found = {} if prompts is None else {"prompts": fingerprint(prompts)}
    found["evaluation.prompts"] = fingerprint(evaluated)
    parts = {"model.policy": whole["model"]["policy"]}
    for group in ("reward.parts", "evaluation.scorers"):
        section, name = group.split(".")
        parts |= {f"{group}.{each}.{domain}": part.get(domain) for each, part in whole[section][name].items()}
    if prompts is not None:
        parts["method.algorithm"] = whole["method"]["algorithm"]
    for where, part in parts.items():
        for key, place, revision in places(part, where):
            if (content := identified(place, revision)) is not None:
                found[key] = content
    return found


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of the prompts' ids, texts and metadata, in their order."""
    listed = json.dumps([(prompt.id, prompt.text, dict(prompt.metadata)) for prompt in prompts], sort_keys=True)
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


def places(node: Any, where: str, revision: str | None = None) -> Iterator[tuple[str, str, str | None]]:
    """(key, text, revision) of the settings that may name a file, a folder or a repository."""
    if isinstance(node, Mapping):
        own = node.get("revision")
        for key, value in node.items():
            if key != "_target_":
                yield from places(value, f"{where}.{key}", own if isinstance(own, str) else None)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from places(value, f"{where}.{number}", revision)
    elif isinstance(node, str) and ("/" in node or Path(node).suffix or where.rsplit(".", 1)[-1] in WORDS):
        place = node
        for prefix in PREFIXES:
            place = place.removeprefix(prefix)
        yield where, place, revision


def identified(place: str, revision: str | None = None) -> str | None:
    """What stands at a path, or for a repository of the hub (``owner/name`` or ``owner/name/file``), as text.

    None if it is neither, or a repository that is not in the local cache.

    Raises:
        DataError: a file that cannot be read, or something that is neither file nor folder.
    """
    if (held := digest(place)) is not None:
        return f"sha256:{held}"
    repository = REPOSITORY.fullmatch(place)
    known = commit(repository[1], revision) if repository else None
    return None if known is None else f"commit:{known}"


def commit(repository: str, revision: str | None) -> str | None:
    """The commit that a revision (None: the main branch) stands for in the hub's local cache; None if it has none."""
    wanted = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", wanted):
        return wanted
    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    try:
        return (folder / "refs" / wanted).read_text().strip()
    except OSError:
        return None


def digest(place: str) -> str | None:
    """SHA-256 of a file, or of all files of a folder with their names; None where there is nothing.

    Hidden files do not count. Images that a folder's index names outside it do.

    Raises:
        DataError: a file that cannot be read, or something that is neither file nor folder.
    """
    path = Path(place)
    if not os.path.exists(place):
        return None
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{place} is neither a file nor a folder (a pipe or a device): give one of these")
    total = hashlib.sha256()
    try:
        files = {".": path} if path.is_file() else dict(sorted(_files(path).items())) | _indexed(path)
        for name, file in files.items():
            state = file.stat()
            total.update(f"{name}\0".encode(errors="surrogateescape"))
            total.update(_sha256(str(file), state.st_size, state.st_mtime_ns, state.st_ino))
    except OSError as error:
        raise DataError(f"{error.filename or place} cannot be read ({error.strerror})") from error
    return total.hexdigest()


@cache
def _sha256(file: str, size: int, changed: int, inode: int) -> bytes:
    """Of a file's content; read once for all runs of a sweep, unless it is written meanwhile."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _files(folder: Path) -> dict[str, Path]:
    """Regular files at or below a folder that are not hidden, by their names from it; links are followed, once."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        files = [] if real in seen else [Path(here, name) for name in names if not name.startswith(".")]
        seen.add(real)
        found |= {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return found


def _indexed(folder: Path) -> dict[str, Path]:
    """Images outside a folder that its index names, as it names them; lines that are amiss are for its reader."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    found: dict[str, Path] = {}
    for line in index.read_bytes().split(b"\n"):
        try:
            name = json.loads(line)["image"]
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        outside = isinstance(name, str) and (os.path.isabs(name) or ".." in Path(name).parts)
        if outside and os.path.isfile(folder / name):
            found[name] = folder / name
    return found


def check_unchanged(folder: Path, now: Mapping[str, str], config: DictConfig) -> None:
    """Refuse to continue a run whose inputs have changed since it began.

    Raises:
        RecordError: names them.
    """
    if changed := changes(folder, now, config):
        listed = "\n  ".join(changed)
        raise RecordError(
            f"{folder} was begun with other inputs (recorded -> found):\n  {listed}\n"
            "Put back what it was begun with to continue it, or begin another run: name=NAME or results=FOLDER."
        )


def changes(folder: Path, now: Mapping[str, str], config: DictConfig) -> list[str]:
    """One line for each input of a recorded run that holds something else now; none where nothing was recorded."""
    before = read_run(folder).run.get("inputs")
    return [f"{_named(key, config)}: {change}" for key, change in changed_inputs(before, now)]


def _named(key: str, config: DictConfig) -> str:
    """An input's key with its value."""
    if key.endswith("prompts"):
        return f"{key} ({config.prompts.path or config.prompts.source})"
    return f"{key} ({OmegaConf.select(config, key)})"
