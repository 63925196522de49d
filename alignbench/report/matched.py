"""Scores at matched budgets: the last checkpoint at a quarter, half and all of it, never the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignbench.report.data import TRAINED, Comparison, Evaluation, Study, TrainingRun
from alignbench.report.statistics import Interval, paired_difference, t_interval
from alignbench.report.tables import (
    DASH,
    MINUS,
    Cell,
    Column,
    Group,
    Row,
    Table,
    budget_note,
    by_protocol,
    difference_cell,
    headline_metrics,
    interval_cell,
    mixed_note,
    number,
    protocol_title,
    runs_cell,
    slug,
    title_of,
)

SHARES = (0.25, 0.5, 1.0)


def checkpoint(run: TrainingRun, share: float) -> Evaluation | None:
    """The last evaluation of trained weights at a share of the budget, at the curves' guidance.

    As with the whole budget, the iteration that used the share up counts, and ends a little later: what a run evaluates
    at a share, it evaluates after that iteration. Those of a run are taken to cost the same.
    """
    rows = run.select(run.curve_hash, TRAINED, run.curve_guidance) if run.finished else []
    begun = [row for row in rows if share >= 1 or row.fraction * (1 - 1 / max(1, row.iteration)) < share]
    return begun[-1] if begun else None


def _pairs(runs: Sequence[TrainingRun], share: float) -> list[tuple[Evaluation, Evaluation]]:
    """(base, last checkpoint at a share of the budget) of every finished run that has both."""
    found = [(run.base(run.curve_hash, run.curve_guidance), checkpoint(run, share)) for run in runs]
    return [(base, row) for base, row in found if base is not None and row is not None]


def used_at(runs: Sequence[TrainingRun], share: float) -> float:
    """The share of the budget that the checkpoints at a share had used, mean over runs; NaN without such runs."""
    fractions = [row.fraction for _, row in _pairs(runs, share)]
    return float(np.mean(fractions)) if fractions else math.nan


def changes(runs: Sequence[TrainingRun], share: float, metric: str) -> Interval:
    """Interval over runs of a metric's change from the base at a share of the budget; n is 0 without such runs."""
    both = [(row.metrics[metric], base.metrics[metric]) for base, row in _pairs(runs, share) if _has(metric, base, row)]
    values = np.array(both, dtype=np.float64).reshape(-1, 2)
    return paired_difference(values[:, 0], values[:, 1])


def matched(study: Study, protocols: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """A table for every protocol of curves: base first, then each method at each share of the budget."""
    tables = []
    parts = by_protocol(study, lambda run: run.curve_hash)
    for key, part in parts:
        groups, tidy, metrics = [], [], headline_metrics(part)
        for comparison in part.comparisons:
            rows = [_base(comparison, metrics)]
            for label in comparison.labels:
                for share in SHARES:
                    row, record = _row(comparison.of(label), label, share, metrics)
                    rows.append(row)
                    where = {"experiment": study.experiment, "model": study.model, "trained_on": comparison.reward}
                    tidy.append(where | {"protocol_hash": key} | record)
            groups.append(Group(f"trained on {comparison.reward}", tuple(rows)))
        columns = [Column("Method", numeric=False), Column("Budget"), Column("Used", "mean over runs")]
        for metric in metrics:
            columns += [Column(title_of(metric)), Column(f"{MINUS} base", title_of(metric))]
        title = (
            f"{study.experiment}, {study.model}: at matched budgets, under protocol {protocol_title(protocols, key)}"
        )
        notes = mixed_note(protocols, [other for other, _ in parts]) + budget_note(part)
        name = slug("matched", study.experiment, study.model, key)
        tables.append(Table(name, title, (*columns, Column("Runs")), tuple(groups), notes, tuple(tidy)))
    return tables


def _base(comparison: Comparison, metrics: Sequence[str]) -> Row:
    bases = [run.base(run.curve_hash, run.curve_guidance) for run in comparison.runs]
    cells = [Cell("base"), Cell("0%"), Cell("")]
    for metric in metrics:
        values = [base.metrics[metric] for base in bases if base is not None and metric in base.metrics]
        cells += [Cell(number(float(np.mean(values))) if values else DASH), Cell("")]
    return Row((*cells, Cell("")), base=True)


def _row(runs: Sequence[TrainingRun], label: str, share: float, metrics: Sequence[str]) -> tuple[Row, dict[str, Any]]:
    pairs, used = _pairs(runs, share), used_at(runs, share)
    record: dict[str, Any] = {"method": label, "budget_share": share, "used": used, "n": len(pairs)}
    cells = [Cell(label), Cell(f"{share:.0%}"), Cell(DASH if math.isnan(used) else f"{used:.0%}")]
    for metric in metrics:
        change = changes(runs, share, metric)
        if not change.n:
            cells += [Cell(DASH), Cell(DASH)]
            continue
        score = t_interval([row.metrics[metric] for base, row in pairs if _has(metric, base, row)])
        cells += [interval_cell(score), difference_cell(change)]
        record |= _named(metric, score) | _named(f"{metric}_difference", change)
    return Row((*cells, runs_cell(len(pairs))), label), record


def _has(metric: str, *rows: Evaluation) -> bool:
    return all(metric in row.metrics for row in rows)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
