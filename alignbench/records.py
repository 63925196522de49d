"""The run directory: plain files, written so that a run killed at any point continues to the same numbers.

    config.yaml  run.json        what is run, and by what; written once
    status.json                  replaced atomically
    metrics.jsonl                one row per iteration, appended
    evaluations.jsonl            one row per evaluation, appended
    scores/*.json  images/*.png  per-image scores and sample grids of evaluations
    checkpoints/step_<n>/        *.safetensors, state.json and COMPLETE, a marker with the hash of every file
    artifacts/*.safetensors      tensors that many checkpoints share; their names hold their hash

`RunDirectory` writes (one process at a time, strictly), `read_run` reads (any number, tolerantly).
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml

from alignbench import record_fields
from alignbench.errors import CheckpointError, LockedError, RecordError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
VOLATILE = frozenset({"volatile", "created", "updated", "hardware", "git", "packages"})  # may differ after a resume
ENVIRONMENT = VOLATILE | {"threads", "processes"}  # fields of run.json that do not decide whether it is the same run
KEPT_CHECKPOINTS = 2  # the newest, and one to fall back on if the disk damages it
MINIMUM_FREE_BYTES = 256 * 2**20  # records and two LoRA checkpoints of the embedded model take a tenth of this
ROW_FILES = ("metrics.jsonl", "evaluations.jsonl")
ATTACHED = ("scores", "grid")  # fields of an evaluation's row that name a file of the run
LOCK = ".lock"
LEFTOVER = re.compile(r"\..+\.\d+\.tmp|\..+\.(building|discarded)")  # names of what a killed process leaves
OWN = os.O_NOFOLLOW | os.O_NONBLOCK  # a link may lead to a file of the user's, and a pipe would wait for ever

Status = Literal["running", "done", "failed", "out_of_memory", "interrupted"]

# Every change to the disk is one of these calls, looked up at call time: fault tests wrap them by name.
_mkdir = os.makedirs
_open = os.open
_write = os.write
_fsync = os.fsync
_truncate = os.ftruncate
_replace = os.replace
_rmtree = shutil.rmtree
_unlink = os.unlink

_SPENT = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another results folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another results folder"),
    errno.ENXIO: ("it is a pipe, no file", "remove it"),
    errno.ELOOP: ("it is a link, and no file of a run is written through one", "remove the link"),
    errno.EFBIG: ("the file would pass the size limit", "raise the limit (ulimit -f) or choose another file system"),
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error inside the block into a RecordError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _SPENT:
            reason, remedy = _SPENT[error.errno]
            advice = f"{remedy}, then run the same command again: it continues from the last checkpoint"
        else:
            reason, advice = error.strerror or str(error), "choose a results folder that this user can write to"
        raise RecordError(
            f"cannot write {path}: {reason}; files written before are intact. To go on, {advice}."
        ) from error


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[_write(descriptor, view) :]
    _fsync(descriptor)


def _write_new(path: Path, data: bytes) -> None:
    """Write a file whose name nobody reads yet; it is on the disk when this returns."""
    with writing(path):
        descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = _open(path, os.O_RDONLY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8): a reader, or a crash, finds the old or the new content, never a mix.

    Raises RecordError if it cannot be written; the old content then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # of an earlier process of this number
        temporary.unlink()
    try:
        _write_new(temporary, data.encode() if isinstance(data, str) else data)
        with writing(path):
            _replace(temporary, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # gone after success; otherwise the error above says more
            temporary.unlink()


def _plain(value: object, where: str, key: str = "") -> Any:
    """`value` as JSON data. Raises RecordError, naming the key, for anything that JSON would lose or refuse."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise RecordError(f"{where}: {key or 'the record'} has the key {name!r}; keys must be strings.")
        return {name: _plain(item, where, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: {key} is {value}; only finite numbers are recorded.")
    if value is None or isinstance(value, str | int | float):
        return value
    kind = type(value).__name__
    raise RecordError(f"{where}: {key} is a {kind}; convert it to plain numbers, strings, lists or mappings.")


def _dump(value: Mapping[str, Any], where: str, indent: int | None = None) -> bytes:
    return (json.dumps(_plain(value, where), allow_nan=False, indent=indent) + "\n").encode()


def read_regular(path: Path) -> bytes:
    """The content of a file. Raises OSError for one that may never end: a pipe or a device."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return file.read()


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, NaN and bottomless nesting included."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text.decode(), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def config_hash(mapping: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of the mapping's canonical JSON; the order of keys does not matter."""
    canonical = json.dumps(_plain(mapping, "config"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def strip_volatile(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` without the volatile fields, at any depth: what a resumed run shares with an uninterrupted one."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items() if key not in VOLATILE}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    return {key: strip(item) for key, item in row.items() if key not in VOLATILE}


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> JSON text of the value; a list is one value."""
    leaves: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = json.dumps(value)
    return leaves


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line a differing key: "method.beta: 0.1 -> 1.0"; a key that one side lacks is "(absent)" there."""
    before, after = _leaves(old), _leaves(new)
    keys = [*before, *(key for key in after if key not in before)]
    pairs = [(key, before.get(key, "(absent)"), after.get(key, "(absent)")) for key in keys]
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b]


def _complete_lines(path: Path) -> list[bytes]:
    """Lines that end in a newline, without it; what follows the last one is a write that a crash tore off."""
    return read_regular(path).split(b"\n")[:-1] if path.exists() else []


def read_object(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds one mapping. Raises OSError, or ValueError saying what is wrong with it."""
    data = read_regular(path)
    if path.suffix == ".json":
        return _parse(data)
    try:
        value = _plain(yaml.safe_load(data), path.name)
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError, RecordError) as error:
        raise ValueError(str(error).splitlines()[0]) from error  # PyYAML's constructors leak the builtin ones
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return value


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({error}); restore it, or move the run's folder away.") from error


def _sha256(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.@+-]*", name):
        raise RecordError(f"{name!r} cannot name a file; use letters, digits and any of _ . @ + - after the first.")
    return name


def row_hash(row: Mapping[str, Any]) -> str:
    """What identifies a row: it comes out again when the row is made again after an interruption."""
    return config_hash(strip_volatile(row))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has the size and hash that its marker states.

    run: identifies the run that wrote it; None in checkpoints of earlier versions.
    row_hashes: of the rows written before it, by file name; empty in checkpoints of earlier versions.
    """

    folder: Path
    step: int
    metrics_rows: int  # rows written before it: `restore` cuts off what follows
    evaluations_rows: int
    run: str | None
    row_hashes: dict[str, list[str]]

    @classmethod
    def verify(cls, folder: Path) -> Self:
        """Check the folder against its marker. Raises CheckpointError saying what is missing, damaged or foreign."""
        try:
            marker = _parse(read_regular(folder / "COMPLETE"))
            files, step = marker["files"], int(marker["step"])
            for name, expected in files.items():
                size = (folder / name).stat().st_size
                if size != expected["bytes"]:
                    raise CheckpointError(f"{folder / name} has {size} bytes, expected {expected['bytes']}")
                if _sha256(folder / name) != expected["sha256"]:
                    raise CheckpointError(f"{folder / name} does not have the SHA-256 that its marker states")
            held = {"state.json", *(path.name for path in folder.glob("*.safetensors"))}
            if unlisted := sorted(held - set(files)):
                raise CheckpointError(f"{folder} has a marker that does not list {', '.join(unlisted)}")
            if folder.name != f"step_{step}":
                raise CheckpointError(f"{folder} is a copy of step_{step}, as its marker says")
            rows = {name: int(marker[f"{Path(name).stem}_rows"]) for name in ROW_FILES}
            hashes = {name: list(map(str, marker.get("row_hashes", {}).get(name, []))) for name in ROW_FILES}
            return cls(folder, step, rows["metrics.jsonl"], rows["evaluations.jsonl"], marker.get("run"), hashes)
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename} is missing") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} has an unreadable marker or file ({error})") from error


class RunDirectory:
    """The only writer of a run's folder, from `open` to `close` (or as a context manager).

    problems: damaged checkpoints that were passed over.
    changes: how the environment (packages, commit, hardware, threads) differs from the one the run began in.
    """

    def __init__(self, folder: Path, lock: int, changes: list[str]) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.changes = changes
        self._lock = lock
        self._run = config_hash(strip_volatile(_recorded(folder / "run.json")))

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        run: Mapping[str, Any],
        minimum_free_bytes: int = MINIMUM_FREE_BYTES,
    ) -> Self:
        """Create the folder, or take up a run that was begun there with the same configuration.

        `run` is the content of run.json; the one written first stays. Raises RecordError, before any work, if the
        folder cannot be written or is short of space, if another process has it open (LockedError), or if it belongs to
        another configuration: another `config`, or another value of a field of `run` that is not the environment's.
        """
        plain_config, plain_run = _plain(config, "config.yaml"), _plain({"schema": SCHEMA, **run}, "run.json")
        with writing(folder):
            _mkdir(folder, exist_ok=True)
            free = shutil.disk_usage(folder).free
        if free < minimum_free_bytes:
            raise RecordError(
                f"{folder} has {free / 2**20:.0f} MB free, a run needs at least {minimum_free_bytes / 2**20:.0f} MB: "
                "free some space or choose another results folder."
            )
        lock = _take_lock(folder / LOCK)
        try:
            return cls(folder, lock, _begin(folder, plain_config, plain_run))
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Let another process open the run. Closing twice is allowed."""
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # explicit: a forked worker may still hold the descriptor
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def status(self) -> dict[str, Any]:
        """What `set_status` wrote last, or what the rows tell if that is lost; empty before the first time."""
        return read_run(self.folder).status

    def set_status(self, status: Status, message: str = "", **fields: Any) -> None:
        """Replace status.json; fields of an earlier status do not stay."""
        updated = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        content = {"status": status, "message": message, **fields, "updated": updated}
        atomic_write(self.folder / "status.json", _dump(content, "status.json"))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append an iteration's row to metrics.jsonl; it is on the disk when this returns."""
        self._append("metrics.jsonl", row)

    def append_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append an evaluation's row to evaluations.jsonl; it is on the disk when this returns."""
        self._append("evaluations.jsonl", row)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line, path = _dump(row, name), self.folder / name
        with writing(path):
            is_new = not path.exists()
            descriptor = _open(path, os.O_WRONLY | os.O_CREAT | OWN, 0o666)
            try:
                end = sum(len(complete) + 1 for complete in _complete_lines(path))
                if os.fstat(descriptor).st_size > end:
                    _truncate(descriptor, end)
                os.lseek(descriptor, end, os.SEEK_SET)
                try:
                    _write_all(descriptor, line)
                except BaseException:  # also Ctrl-C: a row is recorded wholly or not at all
                    with contextlib.suppress(OSError):
                        _truncate(descriptor, end)
                    raise
            finally:
                os.close(descriptor)
            if is_new:
                _sync(self.folder)

    def write_scores(self, name: str, data: Mapping[str, Any]) -> str:
        """Write scores/<name>.json and return that path, relative to the run, for the evaluation's row."""
        return self._attach(f"scores/{_file_name(name)}.json", _dump(data, f"scores/{name}.json"))

    def write_image(self, name: str, png: bytes) -> str:
        """Write images/<name>.png and return that path, relative to the run, for the evaluation's row."""
        return self._attach(f"images/{_file_name(name)}.png", png)

    def _attach(self, relative: str, data: bytes) -> str:
        path = self.folder / relative
        with writing(path.parent):
            _mkdir(path.parent, exist_ok=True)
        atomic_write(path, data)
        return relative

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], state: Mapping[str, Any]
    ) -> None:
        """Write checkpoints/step_<step>: <key>.safetensors for each key of `tensors`, and state.json.

        Built under a temporary name, marked complete, then renamed; the two newest stay. A failure (RecordError)
        leaves the earlier ones as they were. Tensors keep their dtype; peak extra memory is one key's tensors twice.
        """
        from safetensors.torch import save

        final = self.folder / "checkpoints" / f"step_{step}"
        building = final.with_name(f".{final.name}.building")
        marker: dict[str, Any] = {"step": step, "run": self._run, "files": {}, "row_hashes": {}}
        for name in ROW_FILES:
            marker[f"{Path(name).stem}_rows"] = len(_complete_lines(self.folder / name))
            marker["row_hashes"][name] = [row_hash(row) for row in _read_rows(self.folder / name)[0]]
        weights = ((f"{_file_name(key)}.safetensors", save(_on_cpu(group))) for key, group in tensors.items())
        with writing(final):
            try:
                _mkdir(building)
                for name, data in itertools.chain([("state.json", _dump(state, "state.json"))], weights):
                    _write_new(building / name, data)
                    marker["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                _write_new(building / "COMPLETE", _dump(marker, "COMPLETE", indent=1))
                _sync(building)
                _discard(final)
                _replace(building, final)
                _sync(final.parent)
            finally:
                shutil.rmtree(building, ignore_errors=True)  # gone after success
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Keep the two newest checkpoints up to step `newest`; delete the others, later ones included."""
        folders = _checkpoint_folders(self.folder)
        kept = [step for step in sorted(folders) if step <= newest][-KEPT_CHECKPOINTS:]
        for step, folder in folders.items():
            if step not in kept:
                _discard(folder)

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Replace the folder <name> by what ``write`` puts into the one it is given: all of it, or nothing changes."""
        from safetensors import SafetensorError

        final = self.folder / _file_name(name)
        building = final.with_name(f".{name}.building")
        with writing(final):
            try:
                _mkdir(building)
                write(building)
                for path in sorted(building.rglob("*")):
                    _sync(path)
                _sync(building)
                _discard(final)
                _replace(building, final)
                _sync(final.parent)
            except SafetensorError as error:  # how safetensors tells of a full disk
                raise RecordError(f"cannot write {final}: {error}; files written before are intact.") from error
            finally:
                shutil.rmtree(building, ignore_errors=True)  # gone after success

    def write_artifact(self, name: str, tensors: "Mapping[str, Tensor]") -> str:
        """Write artifacts/<name>-<SHA-256>.safetensors, unless it is there, and return that path, relative to the run.

        A checkpoint's state that holds the path finds these tensors again, and no others.
        """
        from safetensors.torch import save

        data = save(_on_cpu(tensors))
        relative = f"artifacts/{_file_name(name)}-{hashlib.sha256(data).hexdigest()}.safetensors"
        return relative if (self.folder / relative).exists() else self._attach(relative, data)

    def prune_artifacts(self) -> None:
        """Delete the artifacts that no checkpoint's state names."""
        with writing(self.folder / "artifacts"):
            states = [path.read_bytes() for path in self.folder.glob("checkpoints/step_*/state.json")]
            for path in self.folder.glob("artifacts/*.safetensors"):
                ours = re.search(r"-[0-9a-f]{64}$", path.stem)
                if ours and not any(path.name.encode() in state for state in states):
                    _unlink(path)

    @staticmethod
    def load_artifact(folder: Path, relative: str) -> "dict[str, Tensor]":
        """Tensors of an artifact of the run in `folder`, on the CPU. Needs no lock: every process may call it.

        Raises CheckpointError if the file is missing or has changed.
        """
        from safetensors.torch import load

        path = folder / relative
        remedy = "restore the file, or delete the run's folder to start again"
        try:
            data = read_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} is missing, and the run cannot continue without it; {remedy}.") from error
        if hashlib.sha256(data).hexdigest() != path.stem.rpartition("-")[2]:
            raise CheckpointError(f"{path} has changed: its SHA-256 is not the one in its name; {remedy}.")
        return load(data)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and whose rows are all there; each one passed over adds to `problems`.

        Raises RecordError if a row before it is not the one that it was saved after.
        """
        for _, folder in sorted(_checkpoint_folders(self.folder).items(), reverse=True):
            try:
                checkpoint = Checkpoint.verify(folder)
                if checkpoint.run not in (None, self._run):
                    raise CheckpointError(f"{folder} is a checkpoint of another run")
                self._check_rows(checkpoint)
                return checkpoint
            except CheckpointError as error:
                self.problems.append(f"checkpoint passed over: {error}")
        return None

    def _check_rows(self, checkpoint: Checkpoint) -> None:
        for name, needed in zip(ROW_FILES, (checkpoint.metrics_rows, checkpoint.evaluations_rows), strict=True):
            rows, problems = _read_rows(self.folder / name, first=needed)
            if problems or len(rows) < needed:
                raise CheckpointError(f"{checkpoint.folder} follows {needed} rows of {name}, which lost some of them")
            if (line := _first_other(rows, checkpoint.row_hashes[name])) is not None:
                raise RecordError(
                    f"{self.folder / name}, line {line} is not the row that {checkpoint.folder.name} was saved after: "
                    "it was changed, moved or doubled, or comes from another run. Put the file back as it was; or "
                    f"delete its lines from {line} on, and the run continues from a checkpoint before them, or begins "
                    "again where there is none."
                )

    @staticmethod
    def load_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, "Tensor"]], dict[str, Any]]:
        """(tensors on the CPU, state), as given to `save_checkpoint`. Needs no lock: every process may call it.

        Raises CheckpointError if the files went missing or bad since the checkpoint was verified.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            paths = sorted(checkpoint.folder.glob("*.safetensors"))
            tensors = {path.stem: load(read_regular(path)) for path in paths}
            return tensors, read_object(checkpoint.folder / "state.json")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.folder} cannot be loaded ({error}).") from error

    def restore(self, checkpoint: Checkpoint | None) -> dict[str, list[dict[str, Any]]]:
        """Take the records back to `checkpoint` (None: to the start); the work that follows is done again.

        Later checkpoints are deleted and later rows cut off. Returns the rows cut off (those that can be read), by
        file name: {"metrics.jsonl": [...], "evaluations.jsonl": [...]}, the last of which tell what was wasted.
        """
        cut = {}
        kept = (checkpoint.metrics_rows, checkpoint.evaluations_rows) if checkpoint else (0, 0)
        with writing(self.folder):
            self._prune(checkpoint.step if checkpoint else -1)  # first: rows may go only when nothing later needs them
            for name, rows in zip(ROW_FILES, kept, strict=True):
                path = self.folder / name
                cut[name] = _read_rows(path, after=rows)[0]
                content = b"".join(line + b"\n" for line in _complete_lines(path)[:rows])
                if path.exists() and path.stat().st_size > len(content):
                    atomic_write(path, content)
        return cut


# The lock is flock's, on a file that says who has it, "<process> <host>". The system frees it when the process ends,
# however that happens, so none is ever stale.


def _take_lock(path: Path) -> int:
    """Descriptor that holds the run's lock. Raises LockedError if another process has it."""
    with writing(path):
        descriptor = _open(path, os.O_RDWR | os.O_CREAT | OWN, 0o666)
        try:
            for wait in (0.0, 0.02, 0.05, 0.1):  # `writer` takes the lock too, for an instant
                time.sleep(wait)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
            else:
                raise LockedError(path.parent, _named_in(path))
            _truncate(descriptor, 0)
            _write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise RecordError(
                    f"{path.parent} is on a file system without locks ({error.strerror}), where two processes could "
                    "write one run: mount it with flock (NFS: without nolock), or choose another results folder."
                ) from error
            raise
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _named_in(lock: Path) -> str:
    try:
        process, _, host = read_regular(lock).decode(errors="replace").strip().partition(" ")
    except OSError:
        process = host = ""
    where = f" on {host}" if host and host != socket.gethostname() else ""
    return f"process {process}{where}" if process else "another process"


def writer(folder: Path) -> str | None:
    """The live process that is writing a run, None if there is none: "process 12" or, elsewhere, "process 12 on host".

    Processes on other hosts are seen where the file system's locks reach them.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | OWN)
    except OSError:  # no run, or a copy of one
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _named_in(folder / LOCK)
    except OSError:  # a file system without locks, so nobody can be writing
        return None
    finally:
        os.close(descriptor)  # frees it


def _begin(folder: Path, config: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Write config.yaml and run.json, or compare with those written; returns changes of the environment."""
    with writing(folder):
        for leftover in list(folder.rglob(".*")):  # of a process that was killed in the middle
            if LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    if not (folder / "config.yaml").exists():
        orphans = [name for name in (*ROW_FILES, "checkpoints") if (folder / name).exists()]
        if orphans:
            raise RecordError(f"{folder} has {', '.join(orphans)} but no config.yaml; choose another results folder.")
        atomic_write(folder / "run.json", _dump(run, "run.json", indent=1))
        atomic_write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))  # last: it makes the run exist
        return []
    recorded = _recorded(folder / "run.json")
    lines = differences(_recorded(folder / "config.yaml"), config)
    lines += [f"inputs.{name}: {change}" for name, change in changed_inputs(recorded.get("inputs"), run.get("inputs"))]
    for key in [key for key in run if key not in ENVIRONMENT | {"inputs"}]:
        lines += differences({key: recorded[key]} if key in recorded else {}, {key: run[key]})
    if lines:
        raise RecordError(
            f"{folder} holds a run of another configuration (recorded -> requested):\n  "
            + "\n  ".join(lines)
            + "\nUse the recorded values to continue it, or choose another results folder."
        )
    environment = [key for key in run if key in ENVIRONMENT - {"created"}]
    return differences({key: recorded.get(key) for key in environment}, {key: run[key] for key in environment})


def changed_inputs(before: object, now: object) -> list[tuple[str, str]]:
    """(name, change) of the inputs of two run.json that are known in both and differ."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return []  # of earlier versions
    shown = {name: [f"{side[name]:.19}" for side in (before, now)] for name in before if name in now}
    return [(name, " -> ".join(shown[name])) for name in shown if before[name] != now[name]]


def _first_other(rows: Sequence[Mapping[str, Any]], hashes: Sequence[str]) -> int | None:
    """The number, from 1, of the first row that does not have its hash."""
    pairs = enumerate(zip(rows, hashes, strict=False), start=1)
    return next((number for number, (row, expected) in pairs if row_hash(row) != expected), None)


def _checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder, whatever state they are in."""
    found = {path: re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("checkpoints/step_*")}
    return {int(match[1]): path for path, match in found.items() if match}


def _discard(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a crash never leaves a part of it under that name."""
    if folder.is_symlink():
        _unlink(folder)
    elif folder.exists():
        nameless = folder.with_name(f".{folder.name}.discarded")
        shutil.rmtree(nameless, ignore_errors=True)
        _replace(folder, nameless)
        _rmtree(nameless)


def _on_cpu(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_rows(path: Path, first: int | None = None, after: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of lines `after` to `first`, and what is wrong with the lines that are not rows."""
    rows, problems = [], []
    try:
        lines = _complete_lines(path)
    except OSError as error:
        return [], [f"{path.name} cannot be read ({error.strerror})"]
    for number, line in enumerate(lines[after:first], start=after + 1):
        try:
            rows.append(_parse(line))
        except ValueError as error:
            problems.append(f"{path.name}, line {number} is damaged ({error})")
    return rows, problems


@dataclass(frozen=True)
class Run:
    """What a run's folder holds; a missing or damaged file reads as empty and is told in `problems`."""

    folder: Path
    run: dict[str, Any]
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    problems: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read a run, finished or not, without changing it; never raises because of what is in the folder.

    A torn last line is left out in silence (a crash, or a writer at work); anything else amiss is in `problems`. A
    status that is lost is told from the rows.
    """
    contents: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name in ("run.json", "config.yaml", "status.json"):
        try:
            contents[name] = read_object(folder / name)
            if name != "config.yaml" and (reason := record_fields.wrong(name.partition(".")[0], contents[name])):
                raise ValueError(reason)
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
        except ValueError as error:
            problems.append(f"{name} is damaged ({error})")
            if name == "status.json":
                contents.pop(name, None)
    run, config, status = (contents.get(name, {}) for name in ("run.json", "config.yaml", "status.json"))
    if run and run.get("schema") != SCHEMA:
        problems.append(f"run.json has schema {run.get('schema')}, this version reads {SCHEMA}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in ROW_FILES:
        rows[name], damaged = _read_rows(folder / name)
        problems += damaged or _problems_of(folder, name, rows[name])
    metrics, evaluations = rows.values()
    status = status or _told_by(folder, run, metrics, evaluations)
    return Run(folder, run, config, status, metrics, evaluations, tuple(problems))


def _problems_of(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the content of rows, and with their order as the newest checkpoint knows it."""
    told = ((number, record_fields.wrong(Path(name).stem, row)) for number, row in enumerate(rows, start=1))
    problems = [f"{name}, line {number}: {reason}" for number, reason in told if reason]
    newest = max(_checkpoint_folders(folder).items(), default=(0, folder))[1]
    try:
        hashes = _parse(read_regular(newest / "COMPLETE"))["row_hashes"][name]
    except (OSError, ValueError, LookupError, TypeError):  # a resume tells what is wrong with it
        return problems
    if isinstance(hashes, list) and (line := _first_other(rows, hashes)) is not None:
        problems.append(f"{name}, line {line} is not the row that {newest.name} was saved after")
    return problems


def _told_by(
    folder: Path, run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The status of a training run as its rows tell it; empty where they tell nothing."""
    if not (metrics or evaluations) or run.get("kind") == "evaluated":
        return {}
    used = metrics[-1].get("fraction", 0.0) if metrics else 0.0
    used = used if record_fields.mismatch(used, float) is None else 0.0
    ended = used >= 1 and any(row.get("weights") == "current" for row in evaluations)
    done = ended and ((folder / "lora").is_dir() or not _checkpoint_folders(folder))  # a copy may have neither
    message = "" if done else "status.json was lost; the same command continues from the last checkpoint"
    return {"status": "done" if done else "interrupted", "message": message, "fraction": min(1.0, used)}


def rebuild_status(folder: Path) -> bool:
    """Write a lost status.json again as the rows tell it; whether that was needed.

    Raises LockedError if another process writes the run, RecordError if the file cannot be written.
    """
    run = read_run(folder)
    if not run.status or not any(problem.startswith("status.json") for problem in run.problems):
        return False
    lock = _take_lock(folder / LOCK)
    try:
        atomic_write(folder / "status.json", _dump(run.status, "status.json"))
    finally:
        os.close(lock)
    return True


def missing_files(run: Run) -> list[str]:
    """Scores and pictures that the rows of a run name and that are not there."""
    named = (row.get(kind) for row in run.evaluations for kind in ATTACHED)
    return [name for name in named if isinstance(name, str) and not (run.folder / name).is_file()]


def find_runs(root: Path) -> list[Path]:
    """Folders of runs at or below `root`, sorted; one whose run.json is lost still counts. RecordError if no folder."""
    if not root.is_dir():
        raise RecordError(f"{root} is not a folder; give the results folder of a run or one above it.")
    marks = {"run.json", "status.json", *ROW_FILES}
    return sorted(Path(folder) for folder, _, files in os.walk(root) if marks & set(files))
