"""The base model's evaluations, taken over from a run of the same experiment that has made them already.

Another run's files are input like any other: what is amiss with them is told, and its scores are left alone.
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from alignbench import record_fields
from alignbench.records import Run, find_runs, read_object, read_regular, read_run

SETTINGS = ("model", "reward", "prompts", "evaluation")  # what the base model's scores depend on
INPUTS = ("model.", "reward.", "evaluation.")  # beginnings of the inputs' names that they depend on
ROUNDING = 2e-6  # of the per-image scores in the records
TAKEN = ("metrics", "standard_errors", "cost")


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


class Unusable(Exception):
    """Why an evaluation of another run is not taken over."""


def recorded(run: Path, protocol_hash: str, guidance: float, number: int) -> tuple[Recorded | None, list[str]]:
    """The evaluation that this run would make of the base model, from the last run of its experiment that has it.

    Only from a run with the same model, reward and evaluation settings, inputs, code, packages, hardware and threads:
    its numbers would come out again to the last bit. A training run takes from a training run, the evaluation of the
    same number: before it, both have read the same texts, so that it cost both the same.

    Returns:
        The evaluation, or None, and a line for each one that was passed over because something is wrong with it.
    """
    mine, found, passed_over = read_run(run), None, []
    for other in donors(mine):
        try:
            for row in other.evaluations:
                key = (row.get("weights"), row.get("protocol_hash"), row.get("guidance"))
                same_place = row.get("evaluation") == number or kind(mine) == "evaluated"
                if key == ("base", protocol_hash, guidance) and same_place and has_files(other, row):
                    found = taken(other, row)
        except Unusable as error:
            passed_over.append(f"the base scores of {other.folder} are not taken over: {error}")
    return found, passed_over


def donors(mine: Run) -> Iterator[Run]:
    """Runs of the experiment whose base scores would be this run's."""
    for folder in find_runs(mine.folder.parent.parent):
        if folder == mine.folder:
            continue
        other = read_run(folder)
        same_settings = all(other.config.get(key) == mine.config.get(key) for key in SETTINGS)
        same_inputs = inputs(other.run) is not None and inputs(other.run) == inputs(mine.run)
        same_kind = kind(mine) in (kind(other), "evaluated")
        if same_settings and same_inputs and same_kind and environment(other.run) == environment(mine.run):
            yield other


def kind(run: Run) -> Any:
    """``"evaluated"``, or None for a training run."""
    return run.run.get("kind")


def inputs(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs that the base model's scores depend on; None where a run has none on record."""
    known = run.get("inputs")
    return {name: known[name] for name in known if name.startswith(INPUTS)} if isinstance(known, Mapping) else None


def environment(run: Mapping[str, Any]) -> list[Any]:
    """What must agree for two runs to compute the same numbers, beside their settings; a dirty checkout never does."""
    git = run.get("git")
    clean = isinstance(git, Mapping) and git.get("dirty") is False
    return [run.get(key) for key in ("git", "packages", "hardware", "threads", "processes")] + [
        None if clean else object()
    ]


def has_files(other: Run, row: Mapping[str, Any]) -> bool:
    """Whether the scores and the picture of a row are there: records are shared without some of their files."""
    return all(isinstance(row.get(kind), str) and (other.folder / row[kind]).is_file() for kind in ("scores", "grid"))


def taken(other: Run, row: Mapping[str, Any]) -> Recorded:
    """An evaluation of another run, checked as input.

    Raises:
        Unusable: a row, table or picture that is not as a run writes it, or scores that are not those of the row.
    """
    amiss = [each for each in other.problems if not each.startswith(("status.json", "metrics.jsonl"))]
    missing = [f"evaluations.jsonl has a row without {name!r}" for name in TAKEN if name not in row]
    for reason in [*amiss, *missing, record_fields.wrong_cost(row.get("cost"))]:
        if reason:
            raise Unusable(reason)
    images = row.get("images")
    try:
        table = read_object(other.folder / row["scores"])
        grid = read_regular(other.folder / row["grid"])
    except (OSError, ValueError) as error:
        raise Unusable(f"{row['scores']} or {row['grid']} cannot be read ({error})") from error
    if reason := record_fields.wrong_scores(table, images if isinstance(images, int) else 0):
        raise Unusable(f"{row['scores']}: {reason}")
    for name, mean in record_fields.tag_means(table).items():
        if abs(mean - row["metrics"].get(name, float("inf"))) > ROUNDING * max(1.0, abs(mean)):
            raise Unusable(f"{row['scores']}: its {name} has another mean than the row in evaluations.jsonl")
    check_picture(grid, row["grid"])
    return Recorded({name: row[name] for name in TAKEN}, table, grid, "/".join(other.folder.parts[-3:]))


def check_picture(data: bytes, name: str) -> None:
    """Raise ``Unusable`` for what is no whole PNG."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(data), formats=["PNG"]).load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"{name} is no picture ({error})") from error
