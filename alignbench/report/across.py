"""Methods against each other over all tasks of a study: a task is a reward that the same methods were trained on."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from alignbench.report.data import Comparison, Study, TrainingRun
from alignbench.report.statistics import (
    CONFIDENCE,
    Array,
    aggregate,
    mean_over_budget,
    performance_profile,
    probability_of_improvement,
    restricted_mean,
    sign_count,
)
from alignbench.report.tables import (
    CLAIM_RUNS,
    DASH,
    Cell,
    Column,
    Group,
    Row,
    Table,
    budget_note,
    budgets,
    interval_cell,
    number,
    slug,
)
from alignbench.report.targets import Reaching, compare, reaching, stated
from alignbench.report.verdict import goal, listed, speed_cell

FACTORS = (1.0, 1.5, 2.0, 4.0)  # of the best method's time, in the performance profile


def final_scores(runs: Sequence[TrainingRun]) -> dict[int, float]:
    """Seed -> trained reward of the final weights at the curves' guidance."""
    finals = {run.seed: run.final(run.final_hash, run.curve_guidance) for run in runs}
    return {seed: row.metrics["reward"] for seed, row in finals.items() if row and "reward" in row.metrics}


def constant(run: TrainingRun) -> tuple[str, float]:
    """(metric, score that counts as 1) of the run's task, the first by name; ("", NaN) where it states none."""
    stated = run.run.get("normalisation")
    metric = min(stated, default="") if isinstance(stated, Mapping) else ""
    top = stated[metric] if isinstance(stated, Mapping) and metric else None
    return (run.measured(metric), float(top)) if isinstance(top, int | float) else ("", math.nan)


def normalised(score: float, base: float, top: float) -> float:
    """0 at the base model, 1 at the constant `top`; NaN where the base is there."""
    return (score - base) / (top - base) if top != base else math.nan


def _normalised_finals(runs: Sequence[TrainingRun]) -> list[float]:
    values = []
    for run in runs:
        final = run.final(run.final_hash, run.curve_guidance)
        base = run.base(run.final_hash, run.curve_guidance)
        metric, top = constant(run)
        if final and base and metric in final.metrics and metric in base.metrics:
            values.append(normalised(final.metrics[metric], base.metrics[metric], top))
    return [value for value in values if math.isfinite(value)]


def _normalised_areas(runs: Sequence[TrainingRun]) -> list[float]:
    values = []
    for run in runs:
        axis, budget = run.budget()
        metric, top = constant(run)
        x, y = run.curve(metric, axis)
        if run.finished and len(x) > 1:
            values.append(normalised(mean_over_budget(x, y, budget), float(y[0]), top))
    return [value for value in values if math.isfinite(value)]


def _comparable(study: Study) -> list[Comparison]:
    """Tasks whose finished runs share their protocols."""
    tasks = []
    for comparison in study.comparisons:
        finished = [run for run in comparison.runs if run.finished]
        if finished and len({(run.final_hash, run.curve_hash) for run in finished}) == 1:
            tasks.append(comparison)
    return tasks


def _reaching(task: Comparison, label: str, target: tuple[str, float]) -> Reaching | None:
    return reaching([run for run in task.of(label) if run.finished], *target)


def _first(task: Comparison, label: str) -> Reaching | None:
    target = goal(task)
    return _reaching(task, label, target) if target else None


def profiles(tasks: Sequence[Comparison], labels: Sequence[str]) -> Array:
    """[methods, FACTORS] shares of (task, target); a method reaches one if more than half of its runs do."""
    times = []
    for task in tasks:
        for target in sorted({pair for run in task.runs for pair in stated(run).items()}):
            found = [_reaching(task, label, target) for label in labels]
            if len({each.axis for each in found if each is not None}) == 1:
                times.append([_time(each) for each in found])
    return performance_profile(np.array(times).T, FACTORS) if times else np.full((len(labels), len(FACTORS)), np.nan)


def _time(found: Reaching | None) -> float:
    if found is None or 2 * found.hits <= len(found.times):
        return math.inf
    return restricted_mean(found.times).mean


def largest_block(finished: Mapping[str, Collection[str]]) -> tuple[list[str], list[str]]:
    """At least two methods and the tasks that all of them finished, by the tasks that each method finished.

    Of all such blocks that with most methods x tasks, of equals that with more tasks, then the first by name; empty
    where no two methods finished one task.
    """
    sets: set[frozenset[str]] = set()
    for tasks in finished.values():
        sets |= {frozenset(tasks), *(other & frozenset(tasks) for other in sets)}
    blocks = [(sorted(m for m, own in finished.items() if tasks <= set(own)), sorted(tasks)) for tasks in sets]
    return max(
        sorted((block for block in blocks if len(block[0]) > 1 and block[1]), key=lambda block: block[1]),
        key=lambda block: (len(block[0]) * len(block[1]), len(block[1])),
        default=([], []),
    )


def _left_out(study: Study, labels: Sequence[str], rewards: Sequence[str]) -> tuple[str, ...]:
    """The note on what is outside the block of these methods and tasks, and why; none where nothing is."""
    parts = [f"{label} (a variant)" for label in sorted({run.label for run in study.runs if run.variant})]
    done = {task.reward: {label for label in task.labels if final_scores(task.of(label))} for task in study.comparisons}
    for label in sorted({run.label for run in study.runs if not run.variant} - set(labels)):
        lacks = [reward for reward in rewards if label not in done[reward]]
        parts.append(f"{label} (no finished run on {listed(lacks)})")
    for reward in sorted(done.keys() - set(rewards)):
        lacks = [label for label in labels if label not in done[reward]]
        parts.append(f"task {reward} ({f'no finished run of {listed(lacks)}' if lacks else 'several protocols'})")
    return (f"Left out: {'; '.join(parts)}.",) if parts else ()


def methods(study: Study) -> Table:
    """Methods over tasks that all of them finished: normalised scores, area, performance profile.

    Variants (`method@...`) are left out, of the rest what is outside the largest block of methods x tasks.
    """
    tasks = _comparable(study.restricted(run for run in study.runs if not run.variant))
    plain = sorted({run.label for task in tasks for run in task.runs})
    labels, rewards = largest_block(
        {label: [task.reward for task in tasks if final_scores(task.of(label))] for label in plain}
    )
    shared = [task for task in tasks if task.reward in rewards]
    profile = profiles(shared, labels)
    rows, tidy = [], []
    for label, shares in zip(labels, profile, strict=True):
        cells = [Cell(label)]
        record: dict[str, Any] = {"experiment": study.experiment, "model": study.model, "method": label}
        for name, of_runs in (("final", _normalised_finals), ("area", _normalised_areas)):
            values = [found for found in (of_runs(task.of(label)) for task in shared) if found]
            if not values:
                cells.append(Cell(DASH))
                continue
            kind, interval = aggregate(values)
            shown = interval_cell(interval)
            cells.append(Cell(shown.text, f"[{number(interval.low)}, {number(interval.high)}]" if shown.detail else ""))
            record |= {f"{name}_{kind}": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        cells += [Cell(DASH if math.isnan(share) else f"{share:.0%}") for share in shares]
        record |= {f"within_{factor:g}": share for factor, share in zip(FACTORS, shares, strict=True)}
        rows.append(Row((*cells, Cell(str(len(shared)))), label))
        tidy.append(record)
    columns = (
        Column("Method", numeric=False), Column("Normalised", "final"), Column("Normalised", "mean over budget"),
        *(Column("Within", f"{factor:g} of the best time") for factor in FACTORS), Column("Tasks"),
    )  # fmt: skip
    title = f"{study.experiment}, {study.model}: over tasks"
    notes: tuple[str, ...] = ("No two methods, variants apart, finished a run of one task under one protocol.",)
    if shared:
        notes = (f"Tasks that every method here finished under one protocol: {', '.join(rewards)}.",)
        notes += _left_out(study, labels, rewards)
    return Table(
        slug("tasks", study.experiment, study.model), title, columns, (Group("", tuple(rows)),), notes, tuple(tidy)
    )


def pairs(study: Study) -> Table:
    """Every pair of methods: probability of improvement, seeds won, speed-up, over the tasks both finished."""
    rows, tidy = [], []
    tasks, labels = _comparable(study), sorted({run.label for run in study.runs})
    for first, second in itertools.combinations(labels, 2):
        scores = [(final_scores(task.of(first)), final_scores(task.of(second))) for task in tasks]
        both = [(task, a, b) for task, (a, b) in zip(tasks, scores, strict=True) if a and b]
        if not both:
            continue
        firsts, seconds = [list(a.values()) for _, a, _ in both], [list(b.values()) for *_, b in both]
        better = probability_of_improvement(firsts, seconds)
        orders = math.prod(math.comb(len(a) + len(b), len(a)) for a, b in zip(firsts, seconds, strict=True))
        enough = 2 / orders <= 1 - CONFIDENCE  # else even runs that all win may be chance: two cells of three runs
        matched = all(len(budgets([*task.of(first), *task.of(second)])) == 1 for task, *_ in both)
        signs = [sign_count(a, b) for _, a, b in both]
        wins, compared = sum(sign.wins for sign in signs), sum(sign.pairs for sign in signs)
        speed = compare([_first(task, first) for task, *_ in both], [_first(task, second) for task, *_ in both])
        few = min(better.n, *(min(len(a), len(b)) for _, a, b in both))
        cells = (
            Cell(first), Cell(second),
            Cell(f"{better.mean:.2f}", "" if math.isnan(better.low) else f"[{better.low:.2f}, {better.high:.2f}]",
                 bold=enough and matched and (better.above(0.5) or better.below(0.5))),
            Cell(f"{wins}/{compared}" if compared else DASH),
            speed_cell(speed), Cell(str(len(both))), Cell(str(few), "preview" if few < CLAIM_RUNS else ""),
        )  # fmt: skip
        rows.append(Row(cells, first))
        record: dict[str, Any] = {"experiment": study.experiment, "model": study.model, "first": first}
        record |= {"second": second, "improvement": better.mean, "low": better.low, "high": better.high}
        record |= {"seeds_won": wins, "ties": sum(sign.ties for sign in signs), "seeds_shared": compared}
        if speed is not None:
            record |= {"speed_up": speed.ratio.mean, "speed_up_low": speed.ratio.low, "speed_up_bound": speed.bound}
            record |= {"speed_up_high": speed.ratio.high}
        tidy.append(record | {"tasks": len(both)})
    columns = (
        Column("First", numeric=False), Column("Second", numeric=False), Column("P(first better)"),
        Column("Seeds won", "by the first"), Column("Speed-up", "first over second"), Column("Tasks"),
        Column("Runs", "fewest a cell"),
    )  # fmt: skip
    title = f"{study.experiment}, {study.model}: methods against each other"
    notes = budget_note(study) if rows else ("No two methods finished a run of one task.",)
    return Table(
        slug("pairs", study.experiment, study.model), title, columns, (Group("", tuple(rows)),), notes, tuple(tidy)
    )
