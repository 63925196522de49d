"""How far one run's final score would move with other prompts: the only numbers here that are not about seeds."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignbench.records import read_regular
from alignbench.report.data import Evaluation, Records, TrainingRun, sound
from alignbench.report.statistics import Interval, PromptBootstrap
from alignbench.report.tables import Cell, Column, Group, Row, Table, number

RESAMPLES = 2_000  # of every run; these intervals support no claim about methods
Resampler = Callable[[tuple[str, ...], tuple[int, ...]], PromptBootstrap]


@dataclass(frozen=True)
class Scores:
    """Per-image trained rewards of one evaluation, prompt by prompt: tags and images are [prompts]."""

    prompts: tuple[str, ...]
    tags: tuple[str, ...]
    images: tuple[int, ...]
    rewards: tuple[float, ...]


def scores(row: Evaluation | None) -> Scores | None:
    """The recorded scores of an evaluation; None where there is no file of them, or it does not hold what it should."""
    if row is None or row.scores is None:
        return None
    try:
        recorded = sound(json.loads(read_regular(row.scores)), "")
        found = Scores(
            tuple(map(str, recorded["prompt_ids"])),
            tuple(map(str, recorded["tags"])),
            tuple(int(count) for count in recorded["images"]),
            tuple(float(value) for value in recorded["metrics"]["reward"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    complete = len(found.tags) == len(found.images) == len(found.prompts) and sum(found.images) == len(found.rewards)
    return found if complete and min(found.images, default=0) > 0 else None


def resampler() -> Resampler:
    """Draws each set of prompts once, whatever the number of runs that were scored on it."""
    drawn: dict[tuple[tuple[str, ...], tuple[int, ...]], PromptBootstrap] = {}

    def of(tags: tuple[str, ...], images: tuple[int, ...]) -> PromptBootstrap:
        if (tags, images) not in drawn:
            drawn[tags, images] = PromptBootstrap(tags, images, resamples=RESAMPLES)
        return drawn[tags, images]

    return of


def intervals(run: TrainingRun, of: Resampler) -> tuple[Interval, Interval | None] | None:
    """(final trained reward, its difference to the base on the same prompts), resampled by prompt within tags."""
    guidance = run.curve_guidance
    final, base = scores(run.final(run.final_hash, guidance)), scores(run.base(run.final_hash, guidance))
    if final is None:
        return None
    prompts = of(final.tags, final.images)
    paired = base is not None and (base.prompts, base.images) == (final.prompts, final.images)
    change = prompts.interval(final.rewards, base.rewards) if base is not None and paired else None
    return prompts.interval(final.rewards), change


def table(records: Records) -> Table:
    """Every finished run with recorded scores."""
    rows: list[Row] = []
    tidy: list[Mapping[str, Any]] = []
    of = resampler()
    for run in records.runs:
        found = intervals(run, of)
        if found is None:
            continue
        score, change = found
        cells = (Cell(run.name), _cell(score), _cell(change, signed=True) if change else Cell(""), Cell(str(score.n)))
        rows.append(Row(cells, run.label))
        record: dict[str, Any] = {"run": run.name, "reward": score.mean, "low": score.low, "high": score.high}
        if change:
            record |= {"difference": change.mean, "difference_low": change.low, "difference_high": change.high}
        tidy.append(record | {"prompts": score.n})
    columns = (
        Column("Run", numeric=False), Column("Trained reward", "over prompts"),
        Column("− base", "same prompts"), Column("Prompts"),
    )  # fmt: skip
    notes = () if rows else ("No run recorded its scores image by image.",)
    return Table(
        "within", "Single runs, resampled by prompt within tags", columns, (Group("", tuple(rows)),), notes, tuple(tidy)
    )


def _cell(interval: Interval, signed: bool = False) -> Cell:
    limits = f"[{number(interval.low, signed)}, {number(interval.high, signed)}]"
    return Cell(number(interval.mean, signed), limits)
