"""`python -m alignbench.status results/`: which runs of a grid are done, running, failed, stopped or missing.

Reads the records and nothing else, at any time and from any machine that sees them. A cell is a method, a reward and a
seed of an experiment. Missing are those without a run that a sweep was asked for, and seeds that a method lacks while
another method that is trained on the same reward has them; variants of methods may have other seeds.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignbench.errors import RecordError
from alignbench.records import ROW_FILES, Run, find_runs, read_regular, read_run, writer
from alignbench.terminal import lasting, printable, unwritten

MOST = 1e12  # of a share of the budget or of seconds: beyond, a file is damaged
Place = tuple[str, str, str, str, int]  # experiment, model, reward, method, seed
State = Literal["done", "running", "failed", "stopped", "missing"]
COLOURS: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "stopped": "yellow",  # the same command continues it
    "missing": "bright_black",
}


@dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Attributes:
        fraction: of the budget that is used, in [0, 1]; None if the records do not say.
        seconds_left: of a running one; None before the first iteration ends.
        message: why it failed, or what is wrong with its records.
    """

    experiment: str
    model: str
    reward: str
    method: str
    seed: int
    state: State
    fraction: float | None = None
    seconds_left: float | None = None
    message: str = ""

    @property
    def place(self) -> Place:
        return self.experiment, self.model, self.reward, self.method, self.seed


def grid(root: Path) -> list[Cell]:
    """Every cell of every experiment at or below a folder, missing ones included.

    Raises:
        RecordError: no such folder.
    """
    cells = [cell for folder in find_runs(root) if (cell := read_cell(folder)) is not None]
    return completed(cells, asked(root))


def completed(cells: Sequence[Cell], asked: Iterable[Place]) -> list[Cell]:
    """Cells with a run and those that are missing, sorted."""
    known = {cell.place: cell for cell in cells}
    seeds: dict[tuple[str, str, str], set[int]] = {}
    plain = [cell for cell in cells if "@" not in cell.method]
    for cell in plain:
        seeds.setdefault(cell.place[:3], set()).add(cell.seed)
    wanted = {(*cell.place[:4], seed) for cell in plain for seed in seeds[cell.place[:3]]}
    return [known.get(place) or Cell(*place, state="missing") for place in sorted({*known, *wanted, *asked})]


def asked(root: Path) -> Iterator[Place]:
    """Cells at or below a folder that sweeps were asked for, by the sweeps' notes; what cannot be read says nothing."""
    root = root.resolve()
    for sweeps in (*root.rglob(".sweep"), *(above / ".sweep" for above in root.parents)):
        for note in sweeps.glob("*/*.json"):
            try:
                told = json.loads(read_regular(note))
                folder = (note.parent / told["folder"]).resolve()
                wanted = told["outcome"] != "planned" and folder.is_relative_to(root)
                place = place_of(folder)
            except (OSError, ValueError, LookupError, TypeError, RuntimeError):  # the last: links or lists without end
                continue
            if wanted and place is not None:
                yield place


def place_of(folder: Path) -> Place | None:
    """The cell whose run a folder is for, by its name; None if it is not for one."""
    experiment, model, reward, method, seed = ("", "", "", "", *folder.parts)[-5:]
    number = re.fullmatch(r"seed(\d+)", seed)
    return (experiment, model, reward, method, int(number[1])) if number else None


def read_cell(folder: Path) -> Cell | None:
    """The cell whose run lies in a folder; None if it holds no training run."""
    place, run = place_of(folder.resolve()), read_run(folder)
    if place is None or run.run.get("kind") == "evaluated":
        return None
    state, message = state_of(run)
    fraction = run.metrics[-1].get("fraction") if run.metrics else None
    measured = isinstance(fraction, int | float) and 0 <= fraction <= MOST
    if fraction is not None and not measured:
        message = "; ".join(filter(None, (message, "the last row of metrics.jsonl is damaged (fraction is no share)")))
    return Cell(
        *place,
        state=state,
        fraction=fraction if measured else None,
        seconds_left=seconds_left(run) if state == "running" else None,
        message=printable(message),
    )


def state_of(run: Run) -> tuple[State, str]:
    """How a run stands, and why. A run that says "running" without a process that writes it was killed: stopped."""
    status = run.status.get("status")
    if status == "done":
        return "done", "; ".join(run.problems)
    if writer(run.folder) is not None:
        return "running", ""
    if status in ("failed", "out_of_memory"):
        return "failed", "; ".join([str(run.status.get("message", "")), *run.problems])
    return "stopped", "; ".join(run.problems)


def seconds_left(run: Run) -> float | None:
    """Estimate for a running run: rollout and training in proportion to the budget, evaluations to their passes."""
    try:
        last, base = run.metrics[-1], [row for row in run.evaluations if row["weights"] == "base"]
        clock, fraction = last["volatile"]["seconds"], last["fraction"]
        training = clock["total"] * max(0.0, 1 - fraction) / fraction
        measured = sum(row["cost"]["nfe"] for row in run.evaluations if not row["volatile"]["reused_from"])
        if measured:
            pace = run.evaluations[-1]["volatile"]["seconds"]["evaluation"] / measured
        else:
            pace = clock["total"] / last["ledger"]["nfe"]
        curve, *final = base
        ended = sum(row["weights"] != "base" and row["protocol"] != curve["protocol"] for row in run.evaluations)
        due = [curve for each in run.config["evaluation"]["fractions"] if each > fraction]
        due += [*final, curve][ended:]
        left = float(training + pace * sum(row["cost"]["nfe"] for row in due))
        changed = max((run.folder / name).stat().st_mtime for name in ("status.json", *ROW_FILES))
        remaining = max(0.0, left - (time.time() - changed))
        return round(remaining, 1) if remaining <= MOST else None
    except (LookupError, TypeError, ValueError, ArithmeticError, OSError):  # nothing measured yet, or damaged rows
        return None


def duration(seconds: float) -> str:
    """To two significant digits or so: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def shown(cell: Cell) -> Text:
    """A cell of the table."""
    text: str = cell.state
    if cell.state in ("running", "stopped") and cell.fraction is not None:
        text = f"{text} {100 * cell.fraction:.0f}%"
    if cell.seconds_left is not None:
        text = f"{text}, {duration(cell.seconds_left)}"
    return Text(text, COLOURS[cell.state])


def tables(cells: Sequence[Cell]) -> Iterable[Table | Text]:
    """A table for each experiment, a line for each cell that has something to say, and the totals."""
    for experiment, group in itertools.groupby(cells, key=lambda cell: cell.experiment):
        members = list(group)
        models = {cell.model for cell in members}
        seeds = sorted({cell.seed for cell in members})
        table = Table(
            title=printable(experiment), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
        )
        for name in [*(["model"] if len(models) > 1 else []), "reward", "method"]:
            table.add_column(name, overflow="fold")
        for seed in seeds:
            table.add_column(f"seed {seed}", no_wrap=True)
        for (model, reward, method), row in itertools.groupby(members, key=lambda c: (c.model, c.reward, c.method)):
            states = {cell.seed: shown(cell) for cell in row}
            seen = [states.get(seed, "") for seed in seeds]
            names = [*([model] if len(models) > 1 else []), reward, method]
            table.add_row(*(Text(printable(name)) for name in names), *seen)
        yield table
        for cell in members:
            if cell.message:
                where = printable(f"{cell.model}/{cell.reward}/{cell.method}/seed{cell.seed}")
                yield Text(f"{where}: {cell.message}", COLOURS[cell.state])
        yield Text()
    yield Text(summary(cells))


def totals(cells: Sequence[Cell]) -> dict[str, int]:
    """How many cells are in each state."""
    counted = Counter(cell.state for cell in cells)
    return {state: counted[state] for state in COLOURS}


def summary(cells: Sequence[Cell]) -> str:
    """The totals in one line."""
    if not cells:
        return "no runs here"
    parts = ", ".join(f"{number} {state}" for state, number in totals(cells).items() if number)
    left = [cell.seconds_left for cell in cells if cell.seconds_left is not None]
    ends = f"; the running ones end in about {duration(max(left))}" if left else ""
    return f"{len(cells)} cells: {parts}{ends}"


def as_json(cells: Sequence[Cell]) -> dict[str, Any]:
    """The same for machines."""
    return {"cells": [vars(cell) for cell in cells], "totals": totals(cells)}


@lasting()
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if there is no such folder or nowhere to write."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.status", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(arguments)
    try:
        cells = grid(options.results)
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_json(cells), indent=1))
    else:
        console = Console(highlight=False)
        for part in tables(cells):
            console.print(part)
    if (reason := unwritten()) is not None:
        print(f"error: the output cannot be written: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
