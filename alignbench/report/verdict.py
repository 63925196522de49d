"""The verdict: what each method gained at the budget, what it cost, what it broke, in a table and in words.

Words and bold type say only what an interval supports: Student's over runs for a method against the base, Welch's for
two methods. What cannot be told apart at the runs there are is said to be so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.report.data import Comparison, Study, TrainingRun
from alignbench.report.statistics import Interval, SpeedUp, restricted_mean, t_interval, welch_difference
from alignbench.report.tables import (
    CLAIM_RUNS,
    DASH,
    HELD_OUT,
    MINUS,
    TIMES,
    Cell,
    Column,
    Entry,
    Group,
    Row,
    Table,
    base_cell,
    best,
    budget_note,
    budgets,
    budgets_text,
    by_protocol,
    difference_cell,
    entries,
    is_trained,
    mixed_note,
    number,
    protocol_title,
    runs_cell,
    score_cell,
    slug,
    time_cell,
    title_of,
    unbold,
)
from alignbench.report.targets import Reaching, compare, reaching, stated


@dataclass(frozen=True)
class Verdict:
    """One study under one protocol: sentences in words, and the table they are read from."""

    sentences: tuple[str, ...]
    table: Table


def goal(comparison: Comparison) -> tuple[str, float] | None:
    """The first target (by name) that every run of the comparison states."""
    shared = set.intersection(*(set(stated(run).items()) for run in comparison.runs))
    return min(shared, default=None)


def _scale(runs: Sequence[TrainingRun]) -> float:
    """The guidance of the headline: that of the curves, where all runs share it."""
    return min(run.curve_guidance for run in runs)


def _times(comparison: Comparison, target: tuple[str, float] | None) -> dict[str, Reaching]:
    """Times to the target of every method with finished runs, if all were evaluated under one protocol."""
    finished = [run for run in comparison.runs if run.finished]
    if target is None or len({run.curve_hash for run in finished}) > 1:
        return {}
    found = {
        label: reaching([run for run in comparison.of(label) if run.finished], *target) for label in comparison.labels
    }
    return {label: times for label, times in found.items() if times is not None}


def slowest(times: Mapping[str, Reaching]) -> str | None:
    """The method of the largest restricted mean time, the first of equals; None without times on one axis.

    A single run, to which no ratio has an interval, is that only among single runs.
    """
    if len({found.axis for found in times.values()}) != 1:
        return None
    several = [label for label, found in times.items() if len(found.times) > 1]
    return max(several or times, key=lambda label: restricted_mean(times[label].times).mean)


def speed_cell(speed: SpeedUp | None) -> Cell:
    """ "≥ 2.31 ×" with its limits; bold if they lie above 1 and the bound does not speak against it."""
    if speed is None:
        return Cell(DASH)
    if not speed.defined:
        return Cell("n/a", "both miss")
    ratio = speed.ratio
    detail = "" if math.isnan(ratio.low) else f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    return Cell(f"{speed.bound} {ratio.mean:.2f}{TIMES}".strip(), detail, bold=speed.bound != "≤" and ratio.above(1))


def _columns(held_out: Sequence[str]) -> tuple[Column, ...]:
    return (
        Column("Method", numeric=False),
        Column("Guidance"),
        Column("Trained reward"),
        Column(f"{MINUS} base"),
        *(Column(title_of(metric), f"{MINUS} base") for metric in held_out),
        Column("Target", "reached"),
        Column("Target", "cost"),
        Column("Speed-up", "to target"),
        Column("Drift"),
        Column("Diversity", f"{MINUS} base"),
        Column("Runs"),
    )


def _base_row(entry: Entry, comparison: Comparison, held_out: Sequence[str]) -> Row:
    scores = [Cell("trained") if is_trained(comparison, metric) else base_cell(entry, metric) for metric in held_out]
    blank = Cell("")
    cells = (
        Cell("base"), Cell(f"{entry.guidance:g}"), base_cell(entry, "reward"), blank, *scores, blank, blank, blank,
        base_cell(entry, "drift"), base_cell(entry, "diversity"), blank,
    )  # fmt: skip
    return Row(cells, base=True)


def verdicts(study: Study, protocols: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """One verdict for every protocol of final scores that the study's runs used."""
    parts = by_protocol(study, lambda run: run.final_hash)
    found = []
    for key, part in parts:
        groups, tidy, sentences = [], [], []
        held_out = [metric for metric in HELD_OUT if any(metric in run.recorded for run in part.runs)]
        for comparison in part.comparisons:
            rows, records = _rows(comparison, key, held_out)
            target = goal(comparison)
            aim = f", target {title_of(target[0])} ≥ {target[1]:g}" if target else ", no target stated"
            groups.append(Group(f"trained on {comparison.reward}{aim}", tuple(rows)))
            where = {"experiment": study.experiment, "model": study.model, "trained_on": comparison.reward}
            tidy += [where | {"protocol_hash": key} | record for record in records]
            sentences += words(comparison, key)
        title = f"{study.experiment}, {study.model}: verdict under protocol {protocol_title(protocols, key)}"
        name = slug("verdict", study.experiment, study.model, key)
        notes = mixed_note(protocols, [other for other, _ in parts]) + budget_note(part)
        table = Table(name, title, _columns(held_out), tuple(groups), notes, tuple(tidy))
        found.append(Verdict(tuple(sentences), table))
    return found


def _rows(comparison: Comparison, key: str, held_out: Sequence[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    found, scale, target = entries(comparison, key), _scale(comparison.runs), goal(comparison)
    times = _times(comparison, target)
    reference = slowest(times)
    rows = [_base_row(entry, comparison, held_out) for entry in found if not entry.label]
    records = []
    for entry in found:
        if not entry.label or entry.guidance != scale:
            continue
        speed = compare([times.get(entry.label)], [times.get(reference)]) if reference else None
        cells = [Cell(entry.label), Cell(f"{entry.guidance:g}")]
        cells.append(score_cell(entry, "reward", bold=best(entry, found, "reward")))
        cells.append(difference_cell(entry.difference(key, "reward")))
        for metric in held_out:
            trained = is_trained(comparison, metric)
            cells.append(Cell("trained") if trained else difference_cell(entry.difference(key, metric)))
        reached = times.get(entry.label)
        cells.append(Cell(f"{reached.hits}/{len(reached.times)}") if reached else Cell(DASH))
        cells.append(time_cell(reached) if reached else Cell(DASH))
        cells.append(Cell("slowest", "reference") if entry.label == reference else speed_cell(speed))
        cells += [score_cell(entry, "drift"), difference_cell(entry.difference(key, "diversity"))]
        cells.append(runs_cell(len(entry.rows)))
        rows.append(Row(tuple(cells), entry.label))
        record: dict[str, Any] = {"method": entry.label, "guidance": entry.guidance, "n": len(entry.rows)}
        for metric in ("reward", *held_out, "diversity"):
            moved = entry.difference(key, metric)
            record |= {f"{metric}_difference": moved.mean, f"{metric}_low": moved.low, f"{metric}_high": moved.high}
        if speed is not None and entry.label != reference:
            record |= {"speed_up": speed.ratio.mean, "speed_up_low": speed.ratio.low, "speed_up_bound": speed.bound}
            record |= {"speed_up_high": speed.ratio.high, "reference": reference}
        records.append(record)
    finished = {entry.label for entry in found}
    missing = [label for label in comparison.labels if label not in finished]
    width = len(_columns(held_out)) - 2
    rows += [Row((Cell(label), *[Cell("")] * width, Cell("0", "none finished", flag=True)), label) for label in missing]
    if len(budgets(comparison.runs)) > 1:
        rows = [unbold(row) for row in rows]
    return rows, records


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def words(comparison: Comparison, key: str) -> list[str]:
    """What the table of one comparison says, in sentences that claim nothing an interval does not support."""
    found, scale = entries(comparison, key), _scale(comparison.runs)
    methods = [entry for entry in found if entry.label and entry.guidance == scale and entry.values("reward")]
    head = f"Trained on {comparison.reward}:"
    if not methods:
        return [f"{head} no finished run, no verdict."]
    several = repeated(methods)
    reason = undecided(comparison, methods, "reward")
    if not several:
        return [f"{head} not decided: {reason}.", *guided(found, several, scale)]
    changes = {entry.label: entry.difference(key, "reward") for entry in several}
    raised = [label for label, change in changes.items() if change.above(0)]
    lowered = [label for label, change in changes.items() if change.below(0)]
    open_ = [label for label in changes if label not in (*raised, *lowered)]
    said = []
    if raised:
        gains = [f"{label} ({signed(changes[label])})" for label in raised]
        said.append(f"{listed(gains)} {_verb(raised, 'raises', 'raise')} the trained reward above the base")
    if lowered:
        losses = [f"{label} ({signed(changes[label])})" for label in lowered]
        said.append(f"{listed(losses)} {_verb(lowered, 'lowers', 'lower')} it")
    if open_:
        said.append(f"for {listed(open_)} a change from the base cannot be told from none")
    lead = [f"Not decided: {reason}."] if reason else _leader(several)
    told = f"{head} {'; '.join(said)} ({sample(several)})."
    return [told, *lead, *single_runs(methods), *guided(found, several, scale)]


def repeated(methods: Sequence[Entry]) -> list[Entry]:
    """The methods of two runs or more: single runs have no interval, and nothing is decided by them."""
    return [entry for entry in methods if len(entry.rows) > 1]


def single_runs(methods: Sequence[Entry]) -> list[str]:
    """Names the single runs beside methods of several."""
    single = [entry.label for entry in methods if len(entry.rows) < 2]
    return [f"Not in the choice, for single runs have no interval: {listed(single)}."] if single else []


def undecided(comparison: Comparison, methods: Sequence[Entry], metric: str) -> str:
    """Why no method can be chosen: budgets differ, or there are only single runs; else empty."""
    if len(budgets(comparison.runs)) > 1:
        where = budgets_text(comparison.runs)
        return f"the budgets differ ({where}), so final scores are not matched and nothing is bold"
    if repeated(methods):
        return ""
    first = max(methods, key=lambda entry: float(np.mean(entry.values(metric))))
    runs = "one run each has" if len(methods) > 1 else "one run has"
    return f"{first.label} has the highest mean, but {runs} no interval: a preview"


def inseparable(first: Entry, methods: Sequence[Entry], metric: str) -> list[str]:
    """The other methods that one is not shown to be above."""
    others = [entry for entry in methods if entry is not first]
    values = first.values(metric)
    return [entry.label for entry in others if not welch_difference(values, entry.values(metric)).above(0)]


def sample(methods: Sequence[Entry], unit: str = "") -> str:
    """ "n = 3, a preview": the fewest runs of a method, and what they allow."""
    fewest = min(len(entry.rows) for entry in methods)
    return f"n = {fewest}{unit}{', a preview' if fewest < CLAIM_RUNS else ''}"


def rest(methods: Sequence[Entry], word: str = "every") -> str:
    """All methods but one, in words."""
    return "the other method" if len(methods) == 2 else f"{word} other method"


def signed(interval: Interval) -> str:
    """ "+0.130 ± 0.059"."""
    width = "" if math.isnan(interval.half_width) else f" ± {number(interval.half_width)}"
    return f"{number(interval.mean, signed=True)}{width}"


def _verb(names: Sequence[str], one: str, several: str) -> str:
    return one if len(names) == 1 else several


def _leader(methods: Sequence[Entry]) -> list[str]:
    if len(methods) < 2:
        return []
    first = max(methods, key=lambda entry: float(np.mean(entry.values("reward"))))
    same = inseparable(first, methods, "reward")
    if not same:
        return [f"{first.label} ends above {rest(methods)}, beyond the 95% interval of the difference."]
    fewest = min(len(entry.rows) for entry in methods)
    if len(same) == len(methods) - 1:
        named = rest(methods, "any")
        return [f"{first.label} has the highest mean, but with n = {fewest} it cannot be told apart from {named}."]
    return [f"{first.label} has the highest mean; with n = {fewest} it cannot be told apart from {listed(same)}."]


def guided(found: Sequence[Entry], methods: Sequence[Entry], scale: float, metric: str = "reward") -> list[str]:
    """Whether guidance alone, without any training, does as well."""
    said = []
    for entry in found:
        if entry.label or entry.guidance == scale or not entry.values(metric):
            continue
        base = float(np.mean(entry.values(metric)))
        above = [method.label for method in methods if t_interval(method.values(metric)).above(base)]
        where = f"The untrained base at guidance {entry.guidance:g} scores {number(base)}"
        if not above:
            said.append(f"{where}: no method at guidance {scale:g} is shown to be above that.")
        elif len(above) < len(methods):
            said.append(f"{where}: only {listed(above)} {_verb(above, 'is', 'are')} shown to be above that.")
    return said
