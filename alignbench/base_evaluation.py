"""The base model's evaluations, taken over from a run of the same experiment that has made them already."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignbench.records import find_runs, read_run

SETTINGS = ("model", "reward", "prompts", "evaluation")  # what the base model's scores depend on


@dataclass(frozen=True)
class Recorded:
    """An evaluation as another run has recorded it.

    Attributes:
        measured: metrics, standard errors and cost.
        scores: the table of per-image scores.
        grid: PNG of the sample grid.
        source: the run, as the last three folders of its path.
    """

    measured: dict[str, Any]
    scores: dict[str, Any]
    grid: bytes
    source: str


def recorded(run: Path, protocol_hash: str, guidance: float) -> Recorded | None:
    """The evaluation that this run would make of the base model, from the last run of its experiment that has it.

    Only from a run with the same model, reward and evaluation settings, code, packages, hardware and threads: its
    numbers would come out again to the last bit.
    """
    found = None
    mine = read_run(run)
    for folder in find_runs(run.parent.parent):
        other = read_run(folder)
        same_settings = all(other.config.get(key) == mine.config[key] for key in SETTINGS)
        if folder == run or not same_settings or environment(other.run) != environment(mine.run):
            continue
        for row in other.evaluations:
            key = (row.get("weights"), row.get("protocol_hash"), row.get("guidance"))
            files = [folder / str(row.get(kind)) for kind in ("scores", "grid")]
            if key == ("base", protocol_hash, guidance) and all(file.is_file() for file in files):
                measured = {key: row[key] for key in ("metrics", "standard_errors", "cost")}
                scores, grid = json.loads(files[0].read_text()), files[1].read_bytes()
                found = Recorded(measured, scores, grid, "/".join(folder.parts[-3:]))
    return found


def environment(run: Mapping[str, Any]) -> list[Any]:
    """What must agree for two runs to compute the same numbers, beside their settings; a dirty checkout never does."""
    clean = run.get("git", {}).get("dirty") is False
    return [run.get(key) for key in ("git", "packages", "hardware", "threads", "processes")] + [
        None if clean else object()
    ]
