"""Published claims against what was measured: each claim is data in a YAML file, its verdict comes from the records.

A file holds one paper:

    paper: name
    source: arXiv number
    claims:
      - claim: what is claimed, in words
        published: the published figure, as text
        where: model, resolution, hardware of the published figure
        not_comparable: what of it this suite cannot measure
        measure:                      # left out where nothing of the claim can be measured here
          quantity: gain | difference | area | speed_up | training
          method: diffusion_nft
          against: flow_grpo          # difference, area and speed_up compare two methods
          metric: geneval             # of the evaluations; for training a column of metrics.jsonl
          axis: optimizer_steps       # speed_up: a cost; left out: that of the budget
          rewards: [geneval]          # trained rewards to look at; left out: all that both methods were trained on
        supported: {above: 0}         # or {below: 0}: where the whole 95% interval must lie

The claim is supported where the whole interval lies on the stated side of the number, contradicted where it lies on
the other, inconclusive where the number is inside, and not run where there are no finished runs. The published figure
itself is never the threshold: it belongs to another model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from alignbench.errors import AlignbenchError
from alignbench.report.data import AXES, UNTUNED, Comparison, Records, Study, TrainingRun
from alignbench.report.statistics import (
    Interval,
    mean_over_budget,
    t_interval,
    welch_difference,
)
from alignbench.report.tables import CLAIM_RUNS, DASH, Cell, Column, Group, Row, Table, number, title_of
from alignbench.report.targets import compare, reaching
from alignbench.report.verdict import goal

QUANTITIES = ("gain", "difference", "area", "speed_up", "training")
COMPARING = ("difference", "area", "speed_up")  # take a second method
Ruling = Literal["supported", "contradicted", "inconclusive", "not comparable", "not run"]


class BadClaims(AlignbenchError):
    """A file of claims cannot be used."""


@dataclass(frozen=True)
class Measure:
    """What is computed from the records for a claim (fields as in the module's docstring)."""

    quantity: str
    method: str
    against: str = ""
    metric: str = ""
    axis: str = ""
    rewards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One claim of a paper; `threshold` and `above` say where the interval must lie to support it."""

    paper: str
    source: str
    claim: str
    published: str
    where: str
    not_comparable: str
    measure: Measure | None
    threshold: float = 0.0
    above: bool = True


@dataclass(frozen=True)
class Finding:
    """What the records of one comparison say about a claim; `measured` is in words, `interval` may be undefined."""

    claim: Claim
    ruling: Ruling
    setting: str = ""  # experiment, model, trained reward
    measured: str = ""
    interval: Interval | None = None


def read(folder: Path) -> list[Claim]:
    """Every claim of the YAML files of a folder, in the order of the files' names.

    Raises:
        BadClaims: not a folder with YAML files, or a file is malformed.
    """
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise BadClaims(f"{folder}: expected a folder with one YAML file a paper, such as experiments/claims")
    return [claim for path in files for claim in _read(path)]


def _read(path: Path) -> list[Claim]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [_claim(str(content["paper"]), str(content["source"]), entry) for entry in content["claims"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadClaims(
            f"{path}: {type(error).__name__}: {error}; see the format in alignbench/report/claims.py"
        ) from (error)


def _claim(paper: str, source: str, entry: Mapping[str, Any]) -> Claim:
    """Raises KeyError, TypeError or ValueError where an entry is not what the format says."""
    texts = ("claim", "published", "where", "not_comparable")
    claim, published, where, not_comparable = (str(entry[key]) for key in texts)
    unknown = set(entry) - {*texts, "measure", "supported"}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in the claim {claim!r}")
    if entry.get("measure") is None:
        return Claim(paper, source, claim, published, where, not_comparable, measure=None)
    fields = dict(entry["measure"])
    measure = Measure(**(fields | {"rewards": tuple(fields.get("rewards") or ())}))
    if measure.quantity not in QUANTITIES:
        raise ValueError(f"quantity {measure.quantity!r} is none of {', '.join(QUANTITIES)}")
    if (measure.quantity in COMPARING) != bool(measure.against):
        raise ValueError(f"{measure.quantity} {'needs' if measure.quantity in COMPARING else 'takes no'} 'against'")
    if (measure.quantity == "speed_up") == bool(measure.metric):
        raise ValueError(f"{measure.quantity} {'takes no' if measure.metric else 'needs a'} 'metric'")
    if measure.axis and measure.axis not in {axis.key for axis in AXES}:
        raise ValueError(f"axis {measure.axis!r} is none of {', '.join(axis.key for axis in AXES)}")
    ((side, threshold),) = entry["supported"].items()
    if side not in ("above", "below"):
        raise ValueError(f"supported takes above or below, not {side!r}")
    return Claim(
        paper, source, claim, published, where, not_comparable, measure, float(threshold), above=side == "above"
    )  # fmt: skip


def judge(interval: Interval, threshold: float, above: bool, bound: str = "") -> Ruling:
    """The ruling of an interval; `bound` "≥" or "≤" says that the truth may lie beyond it on that side.

    A censored comparison can only rule on the side that the bound does not reach.
    """
    if interval.above(threshold) and bound != "≤":
        return "supported" if above else "contradicted"
    if interval.below(threshold) and bound != "≥":
        return "contradicted" if above else "supported"
    return "inconclusive"


def findings(records: Records, claims: Sequence[Claim]) -> list[Finding]:
    """Every claim against every comparison that ran its methods, at least one finding a claim."""
    found: list[Finding] = []
    for claim in claims:
        if claim.measure is None:
            found.append(Finding(claim, "not comparable"))
            continue
        measured = [
            finding
            for study in records.studies
            for comparison in study.comparisons
            if (finding := _find(claim, claim.measure, study, comparison)) is not None
        ]
        found += measured or [Finding(claim, "not run")]
    return found


def _finished(comparison: Comparison, method: str) -> list[TrainingRun]:
    """Finished runs of a method as it is configured: variants are other methods."""
    return [run for run in comparison.runs if run.method == method and not run.variant and run.finished]


def _find(claim: Claim, measure: Measure, study: Study, comparison: Comparison) -> Finding | None:
    if measure.rewards and comparison.reward not in measure.rewards:
        return None
    first = _finished(comparison, measure.method)
    second = _finished(comparison, measure.against) if measure.against else []
    if not first or (measure.against and not second):
        return None
    setting = f"{study.experiment}, {study.model}, trained on {comparison.reward}"
    untuned = sorted({run.method for run in (*first, *second) if run.label.endswith(UNTUNED)})
    if untuned:
        setting += f"; untuned: {', '.join(untuned)}"
    unequal = _unequal([*first, *second])
    if unequal:
        return Finding(claim, "inconclusive", setting, unequal)
    return _measured(claim, measure, setting, first, second, goal(comparison))


def _unequal(runs: Sequence[TrainingRun]) -> str:
    """Why these runs cannot stand in one comparison; empty where they can."""
    if len({(run.curve_hash, run.final_hash) for run in runs}) > 1:
        return "the runs were evaluated under different protocols"
    if len({run.budget() for run in runs}) > 1:
        return "the runs had different budgets"
    return ""


def _measured(
    claim: Claim,
    measure: Measure,
    setting: str,
    first: Sequence[TrainingRun],
    second: Sequence[TrainingRun],
    target: tuple[str, float] | None,
) -> Finding:
    if measure.quantity == "speed_up":
        return _race(claim, measure, setting, first, second, target)
    title = title_of(first[0].measured(measure.metric))
    if measure.quantity == "gain":
        pairs = [(_final(run, measure.metric), _base(run, measure.metric)) for run in first]
        interval = t_interval([final - base for final, base in pairs if not math.isnan(final - base)])
        what = f"{title}, final minus base"
    elif measure.quantity == "training":
        interval = t_interval([run.late[measure.metric] for run in first if measure.metric in run.late])
        what = f"{measure.metric} over the last tenth of training"
    else:
        value = _final if measure.quantity == "difference" else _area
        a, b = (
            [score for run in runs if not math.isnan(score := value(run, measure.metric))] for runs in (first, second)
        )
        if not a or not b:
            return Finding(claim, "inconclusive", setting, f"{title} was not measured")
        interval = welch_difference(a, b)
        kind = "final" if measure.quantity == "difference" else "mean over the budget"
        what = f"{title}, {kind}, {measure.method} minus {measure.against}"
    if not interval.n:
        return Finding(claim, "inconclusive", setting, f"{title} was not measured")
    limits = "" if math.isnan(interval.low) else f" [{number(interval.low, True)}, {number(interval.high, True)}]"
    text = f"{what}: {number(interval.mean, True)}{limits}"
    return Finding(claim, judge(interval, claim.threshold, claim.above), setting, text, interval)


def _race(
    claim: Claim,
    measure: Measure,
    setting: str,
    first: Sequence[TrainingRun],
    second: Sequence[TrainingRun],
    target: tuple[str, float] | None,
) -> Finding:
    if target is None:
        return Finding(claim, "inconclusive", setting, "no target was stated before the runs")
    if measure.axis == "seconds" and len({run.hardware for run in (*first, *second)}) > 1:
        return Finding(claim, "inconclusive", setting, "seconds of different hardware")
    speed = compare([reaching(first, *target, measure.axis)], [reaching(second, *target, measure.axis)])
    if speed is None:
        return Finding(claim, "inconclusive", setting, f"{title_of(target[0])} was not measured along this cost")
    a, n, b, m = speed.reached
    hits = f"{title_of(target[0])} ≥ {target[1]:g} reached by {a}/{n} and {b}/{m} runs"
    if not speed.defined:
        return Finding(claim, "inconclusive", setting, f"{hits}: no ratio", speed.ratio)
    ratio = speed.ratio
    limits = "" if math.isnan(ratio.low) else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    axis = next((axis.title.lower() for axis in AXES if axis.key == measure.axis), "the budget's cost")
    text = f"speed-up in {axis} {speed.bound} {ratio.mean:.2f}{limits}; {hits}".replace("  ", " ")
    return Finding(claim, judge(ratio, claim.threshold, claim.above, speed.bound), setting, text, ratio)


def _final(run: TrainingRun, metric: str) -> float:
    row = run.final(run.final_hash, run.curve_guidance)
    return row.metrics.get(run.measured(metric), math.nan) if row else math.nan


def _base(run: TrainingRun, metric: str) -> float:
    row = run.base(run.final_hash, run.curve_guidance)
    return row.metrics.get(run.measured(metric), math.nan) if row else math.nan


def _area(run: TrainingRun, metric: str) -> float:
    axis, budget = run.budget()
    x, y = run.curve(run.measured(metric), axis)
    return mean_over_budget(x, y, budget) if len(x) > 1 else math.nan


def table(found: Sequence[Finding]) -> Table:
    """One row a finding, grouped by paper."""
    groups: dict[str, list[Row]] = {}
    tidy = []
    for finding in found:
        claim, n = finding.claim, finding.interval.n if finding.interval else 0
        decided = finding.ruling in ("supported", "contradicted")
        few = f"n = {n}, a preview" if 2 <= n < CLAIM_RUNS else (f"n = {n}" if n else "")
        if n == 1:
            few = "one run has no interval"
        wanted = f"{'above' if claim.above else 'below'} {claim.threshold:g}" if claim.measure else DASH
        cells = (
            Cell(claim.claim), Cell(claim.published, claim.where), Cell(finding.measured or DASH, finding.setting),
            Cell(wanted), Cell(finding.ruling, few, bold=decided), Cell(claim.not_comparable),
        )  # fmt: skip
        groups.setdefault(f"{claim.paper} ({claim.source})", []).append(Row(cells))
        interval = finding.interval or Interval(math.nan, math.nan, math.nan, 0)
        tidy.append(
            {"paper": claim.paper, "claim": claim.claim, "published": claim.published, "setting": finding.setting,
             "measured": finding.measured, "mean": interval.mean, "low": interval.low, "high": interval.high, "n": n,
             "supported_if": wanted, "verdict": finding.ruling}
        )  # fmt: skip
    columns = (
        Column("Claim", numeric=False), Column("Published", "where", numeric=False),
        Column("Measured here", "95% interval", numeric=False),
        Column("Supported", "if the interval is", numeric=False), Column("Verdict", numeric=False),
        Column("Not comparable here", numeric=False),
    )  # fmt: skip
    parts = tuple(Group(title, tuple(rows)) for title, rows in groups.items())
    return Table("claims", "Published claims against these runs", columns, parts, (), tuple(tidy))
