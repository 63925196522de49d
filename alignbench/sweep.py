"""A sweep: every cell of the grid is a run with records of its own, and one that fails does not stop the others.

Hydra's launchers run cells in this process, in others or on other machines. How each cell ended is therefore a file in
the sweep's folder, ``<results>/.sweep/<time>/<number>.json``, from which the table at the end is drawn.
"""

import gc
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from alignbench.configuration import CONF, explain, run_folder
from alignbench.errors import AlignbenchError, LockedError, RecordError
from alignbench.records import atomic_write, read_run, writer, writing
from alignbench.terminal import lasting, printable

COLOURS = {  # by outcome
    "planned": "bright_black",
    "done": "green",
    "skipped": "green",
    "left": "cyan",
    "stopped": "yellow",
    "not done": "red",  # left to a process that ended before the run did
    "failed": "red",
}
_begun: list[Path] = []  # the folder of this process's sweep


class Begin(Callback):
    """Hydra's callback that says where the cells of a sweep note how they ended."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep begins. Its folder is made here, for what Hydra says where that fails is a traceback."""
        try:
            folder = Path(config.hydra.sweep.dir)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        except (RecordError, OmegaConfBaseException) as error:
            told = error if isinstance(error, RecordError) else explain(error, CONF)
            print(f"alignbench: {told}", file=sys.stderr)
            sys.exit(1)  # another exception in a callback is a warning to Hydra
        _begun.append(folder)


@lasting()  # a launcher's process begins here
def cell(config: DictConfig) -> None:
    """Run one cell and note how it ended. An error is told, and the sweep goes on; Ctrl-C goes through."""
    from alignbench import schema
    from alignbench.run import run

    job = HydraConfig.get()
    overrides = list(job.overrides.task)
    gc.collect()  # of the cell before: its model should be gone when this one's is loaded
    outcome, message = "done", ""
    folder: str | None = None
    try:
        schema.check(config)
        folder = os.path.relpath(run_folder(config, overrides), job.sweep.dir)
        if config.dry_run:
            outcome = "planned"
        elif _done(Path(job.sweep.dir, folder)):
            outcome = "skipped"
        run(config, overrides)
    except BaseException as error:
        several = isinstance(error, SystemExit) and isinstance(error.__cause__, Exception)  # processes end so, and tell
        cause = error.__cause__ or error if several else error
        outcome, message = _verdict(cause)
        if not isinstance(cause, Exception):
            raise
        if not several:
            _tell(cause)
    finally:
        if "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0":  # else the first one notes it
            note = {"overrides": overrides, "folder": folder, "outcome": outcome, "message": message}
            _write(Path(job.sweep.dir) / f"{job.job.num}.json", note)


def _done(folder: Path) -> bool:
    return read_run(folder).status.get("status") == "done"


def _write(note: Path, content: dict[str, Any]) -> None:
    atomic_write(note, json.dumps(content, indent=1) + "\n")


def _verdict(error: BaseException) -> tuple[str, str]:
    if isinstance(error, LockedError):
        return "left", f"to {error.writer}"
    if isinstance(error, AlignbenchError):
        return "failed", str(error)
    if isinstance(error, Exception):
        return "failed", f"{type(error).__name__}: {error}"
    return "stopped", "the same command continues it"


def _tell(error: Exception) -> None:
    """What the command of a single run would say of an error, in a sweep that goes on."""
    if isinstance(error, LockedError):
        print(f"{error.folder}: left to {error.writer}, which is writing it", flush=True)
    elif isinstance(error, AlignbenchError):
        print(f"alignbench: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


@contextmanager
def concluded() -> Iterator[None]:
    """End a sweep that is begun inside with a table of its cells, and with exit status 1 if one failed or is not done.

    A cell that was left to another process may well be running or done by now. It is not done where that process ended.
    """
    _begun.clear()
    try:
        yield
    finally:
        for folder in _begun:
            _look_after(folder)
        cells = [cell for folder in _begun for cell in _cells(folder)]
        if cells:
            _print(cells)
    if any(cell["outcome"] in ("failed", "not done") for cell in cells):
        sys.exit(1)


def _look_after(sweep: Path) -> None:
    """Say of each cell that was left to another process whether that process ended without finishing it."""
    for note in sweep.glob("*.json"):
        cell = json.loads(note.read_bytes())
        folder = sweep / (cell["folder"] or "")
        if cell["outcome"] == "left" and writer(folder) is None and not _done(folder):  # in this order: it may end now
            message = f"left {cell['message']}, which has ended; the same command continues it"
            _write(note, cell | {"outcome": "not done", "message": message})


def _cells(sweep: Path) -> list[dict[str, Any]]:
    notes = sorted(sweep.glob("*.json"), key=lambda note: int(note.stem))
    return [json.loads(note.read_bytes()) for note in notes]


def _print(cells: Sequence[dict[str, Any]]) -> None:
    same = set.intersection(*(set(cell["overrides"]) for cell in cells)) if len(cells) > 1 else set()
    counted = Counter(cell["outcome"] for cell in cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print("\nsweep: " + ", ".join(f"{counted[name]} {name}" for name in COLOURS if name in counted))
    for each in cells:
        chosen = " ".join(override for override in each["overrides"] if override not in same)
        told = f"{chosen}: {each['message']}" if each["message"] else chosen
        console.print(Text.assemble("  ", (f"{each['outcome']:<8} ", COLOURS[each["outcome"]]), printable(told)))
