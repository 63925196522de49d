"""The first screen: which method for a task at its budget, and what it breaks.

One comparison leads the page: that of GenEval where there is one, else the one with the most finished runs. Words and
bold type say only what an interval supports, as in the verdict on all comparisons below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import numpy as np

from alignbench.report.data import Comparison, Records, Study, TrainingRun
from alignbench.report.matched import changes, used_at
from alignbench.report.statistics import Interval, t_interval
from alignbench.report.tables import (
    DASH,
    GENEVAL,
    HELD_OUT,
    MINUS,
    Cell,
    Column,
    Entry,
    Group,
    Row,
    Table,
    amount_text,
    base_cell,
    best,
    budget_note,
    budgets,
    by_protocol,
    counted,
    difference_cell,
    entries,
    is_trained,
    number,
    protocol_title,
    runs_cell,
    score_cell,
    slug,
    title_of,
    unbold,
)
from alignbench.report.verdict import (
    goal,
    guided,
    inseparable,
    listed,
    repeated,
    rest,
    sample,
    signed,
    single_runs,
    undecided,
)

BREAKS_BY_FALLING = (*HELD_OUT, "diversity")  # and the tags of GenEval
BREAKS_BY_RISING = ("invalid_share",)
SHARES = (0.25, 0.5)  # of the budget, beside the whole of it


@dataclass(frozen=True)
class Answer:
    """The question in words, the answer in words, the table it is read from, and what its curve shows."""

    question: str
    sentences: tuple[str, ...]
    table: Table
    comparison: Comparison
    metric: str


@dataclass(frozen=True)
class Contender:
    """A method's final scores: how far the metric of the task moved, and what got worse beyond the interval.

    `broken` has (metric, interval) by guidance, that of the curves first.
    """

    entry: Entry
    change: Interval
    broken: Mapping[float, Sequence[tuple[str, Interval]]]

    @property
    def label(self) -> str:
        return self.entry.label


def leading(records: Records) -> tuple[Study, Comparison, str] | None:
    """(study, comparison, hash of the final protocol) that the page opens with; None without finished runs."""

    def weight(found: tuple[Study, Comparison, str]) -> tuple[bool, bool, int]:
        reward, runs = found[1].reward, found[1].runs
        return reward == "geneval", reward.startswith("geneval"), sum(run.finished for run in runs)

    candidates = [
        (part, comparison, key)
        for study in records.studies
        for key, part in by_protocol(study, lambda run: run.final_hash)
        for comparison in part.comparisons
        if any(run.finished for run in comparison.runs)
    ]
    return max(candidates, key=weight, default=None)


def budget_text(runs: Sequence[TrainingRun], share: float = 1.0) -> str:
    """What finished runs could spend, or a share of it, with its unit: "7.5 TFLOP"; empty where they differ."""
    found = {run.budget() for run in counted(runs)}
    if len(found) != 1:
        return ""
    ((key, amount),) = found
    return amount_text(key, share * amount) if amount else ""


def answer(records: Records) -> Answer | None:
    """The page's opening; None without a finished run."""
    found = leading(records)
    if found is None:
        return None
    study, comparison, key = found
    target = goal(comparison)
    metric = target[0] if target and any(target[0] in run.recorded for run in comparison.runs) else "reward"
    scale = min(run.curve_guidance for run in comparison.runs)
    scored = [entry for entry in entries(comparison, key) if entry.values(metric)]
    methods = [_contender(entry, scored, key, metric) for entry in scored if entry.label and entry.guidance == scale]
    methods.sort(key=lambda each: -float(np.mean(each.entry.values(metric))))
    budget = budget_text(comparison.runs)
    name = title_of(metric) if metric != "reward" else comparison.reward
    question = f"Which method for {name}{f' at {budget}' if budget else ''}, and what does it break?"
    said = (*_choice(comparison, methods, metric), *guided(scored, repeated([m.entry for m in methods]), scale, metric))
    table = _table(study, comparison, records.protocols, key, metric, scored, methods)
    return Answer(question, said, table, comparison, metric)


def _contender(entry: Entry, scored: Sequence[Entry], key: str, metric: str) -> Contender:
    recorded = {name for row in entry.rows for name in row.metrics}
    tags = sorted(name for name in recorded if name.startswith(tuple(f"{score}/" for score in GENEVAL)))
    worse: dict[float, list[tuple[str, Interval]]] = {entry.guidance: []}
    for each in (each for each in scored if each.label == entry.label):
        for other in (*BREAKS_BY_FALLING, *tags, *BREAKS_BY_RISING):
            moved = each.difference(key, other)
            aim = each is entry and (other == metric or is_trained(entry.comparison, other))
            if not aim and (moved.above(0) if other in BREAKS_BY_RISING else moved.below(0)):
                worse.setdefault(each.guidance, []).append((other, moved))
    return Contender(entry, entry.difference(key, metric), worse)


def _broken(method: Contender) -> str:
    """What got worse, in words, guidance by guidance; empty if nothing is shown to."""
    said = []
    for guidance, worse in method.broken.items():
        named = ", ".join(f"{title_of(metric).lower()} {signed(moved)}" for metric, moved in worse)
        where = "" if guidance == method.entry.guidance else f"at guidance {guidance:g} "
        said += [f"{where}{named}"] if named else []
    return "; ".join(said)


def _choice(comparison: Comparison, methods: Sequence[Contender], metric: str) -> list[str]:
    """Which method, how sure that is, and what it breaks."""
    if not methods:
        return ["No finished run: no answer yet."]
    found = [each.entry for each in methods]
    if reason := undecided(comparison, found, metric):
        return [f"Not decided: {reason}."]
    left_out, several = single_runs(found), repeated(found)
    runs = sample(several, " runs a method")
    raising = [each for each in methods if each.change.above(0)]
    if not raising:
        return [f"None: no method is shown to raise it above the base ({runs}).", *left_out]
    first = raising[0]
    same = inseparable(first.entry, several, metric)
    end = f"ends at {number(float(np.mean(first.entry.values(metric))))}, {signed(first.change)} from the base"
    if same:
        lead = f"{first.label}, with the highest mean of those shown to raise it: it {end}"
        said = [f"{lead}; it cannot be told apart from {listed(same)} ({runs})."]
    elif len(several) > 1:
        said = [f"{first.label}: it {end}, above {rest(several)} beyond the 95% interval ({runs})."]
    else:
        said = [f"{first.label} is the only one with several finished runs: it {end} ({runs})."]
    harm = _broken(first)
    said.append(f"What {first.label} breaks: {harm}." if harm else f"{first.label} is not shown to break anything.")
    return said + left_out


def _used(comparison: Comparison) -> list[str]:
    """What the checkpoints behind the shares of the budget had used."""
    said = []
    for share in SHARES:
        used = [value for label in comparison.labels if not isnan(value := used_at(comparison.of(label), share))]
        if used:
            low, high = f"{min(used):.0%}", f"{max(used):.0%}"
            said.append(f"{low if low == high else f'{low} to {high}'} at {share:.0%}")
    return [f"Used by the checkpoints at a share of the budget: {', '.join(said)}."] if said else []


def _table(
    study: Study,
    comparison: Comparison,
    protocols: Mapping[str, Mapping[str, Any]],
    key: str,
    metric: str,
    scored: Sequence[Entry],
    methods: Sequence[Contender],
) -> Table:
    """Base rows, then methods by their mean: final score, change, earlier changes, what broke, drift."""
    rows, blank = [], [Cell("")] * (len(SHARES) + 2)
    for entry in (each for each in scored if not each.label):
        name = Cell("base", f"guidance {entry.guidance:g}")
        cells = [name, base_cell(entry, metric), *blank, base_cell(entry, "drift"), Cell("")]
        rows.append(Row(tuple(cells), base=True))
    tidy: list[dict[str, Any]] = []
    for each in methods:
        entry, score, harm = each.entry, t_interval(each.entry.values(metric)), _broken(each)
        cells = [Cell(each.label), score_cell(entry, metric, bold=best(entry, scored, metric))]
        cells.append(difference_cell(each.change))
        record: dict[str, Any] = {"trained_on": comparison.reward, "method": each.label, "protocol_hash": key}
        record |= {"metric": metric, "n": score.n, "mean": score.mean, "low": score.low, "high": score.high}
        record |= {"difference": each.change.mean, "broken": harm}
        for share in SHARES:
            moved = changes(entry.runs, share, metric)
            cells.append(difference_cell(moved))
            record[f"difference_at_{share:g}"] = moved.mean
        broken = Cell(harm, flag=True) if harm else Cell("nothing shown" if score.n > 1 else DASH)
        rows.append(Row((*cells, broken, score_cell(entry, "drift"), runs_cell(score.n)), each.label))
        tidy.append(record | {"drift": t_interval(entry.values("drift")).mean})
    if len(budgets(comparison.runs)) > 1:
        rows = [unbold(row) for row in rows]
    earlier = [Column(f"{MINUS} base at {share:.0%}", budget_text(comparison.runs, share)) for share in SHARES]
    columns = (
        Column("Method", numeric=False), Column(title_of(metric), "final"), Column(f"{MINUS} base", "final"), *earlier,
        Column("What it breaks", f"final {MINUS} base", numeric=False), Column("Drift", "final"), Column("Runs"),
    )  # fmt: skip
    during = " and ".join(sorted({protocol_title(protocols, run.curve_hash) for run in comparison.runs}))
    under = f"Final: protocol {protocol_title(protocols, key)}. Shares of the budget: protocol {during}."
    notes = (under, *_used(comparison), *budget_note(replace(study, comparisons=(comparison,))))
    title = f"{study.experiment}, {study.model}: trained on {comparison.reward}"
    groups = (Group("", tuple(rows)),)
    return Table(slug("answer", study.experiment, study.model), title, columns, groups, notes, tuple(tidy))
