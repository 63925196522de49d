"""The report's tables, each once as cells (page and Markdown) and once as tidy numbers (CSV).

A table never mixes evaluation protocols: runs under another protocol hash get a table of their own, with a note on
both. Scores are means over finished training runs with 95% Student-t limits; differences to the base are taken run by
run, under the same protocol and guidance, before they are averaged.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from alignbench.report.data import AXES, BASE, Axis, Comparison, Evaluation, Study, TrainingRun
from alignbench.report.statistics import (
    Interval,
    mean_over_budget,
    paired_difference,
    restricted_mean,
    t_interval,
    welch_difference,
)
from alignbench.report.targets import Reaching, reaching, stated

CLAIM_RUNS = 5  # fewer runs per cell are a preview, not a claim
SEEN_TAGS = ("single_object", "counting")  # no unseen combinations exist: test prompts are among the training prompts
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL = ("geneval", "geneval_hf")  # by the embedded world's detector, by Mask2Former on photographs
HEADLINE = ("reward", *GENEVAL, "exact_scene")
PREFERENCES = ("pickscore", "judge")
HELD_OUT = ("exact_scene", *GENEVAL, *PREFERENCES)  # where it is not the trained reward
BESIDE = (
    "geneval_strict",
    "geneval_hf_strict",
    "exact_scene",
    "objects_per_image",
    "invalid_share",
    "diversity",
    "drift",
)
ALWAYS = ("geneval", "exact_scene")  # never one without the other: an exact scene has an exact detector
TITLES = {
    "reward": "Trained reward",
    "geneval": "GenEval (official)",
    "geneval_hf": "GenEval (hub detector)",
    "geneval_strict": "GenEval (strict)",
    "geneval_hf_strict": "GenEval (hub detector, strict)",
    "exact_scene": "Exact scene",
    "objects_per_image": "Objects an image",
    "invalid_share": "Invalid share",
    "pickscore": "PickScore",
    "judge": "Second judge",
    "diversity": "Diversity",
    "drift": "Drift",
}
LONGEST_SLUG = 200  # bytes; file systems take 255, and an ending follows
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def title_of(metric: str) -> str:
    """The name of a metric in headings: "geneval/color_attr" -> "color attr"."""
    name, _, tag = metric.partition("/")
    return TITLES.get(metric, (tag if tag and name in GENEVAL else metric).replace("_", " "))


def headline_metrics(study: Study) -> list[str]:
    """The metrics of a study's headline: the trained reward and the GenEval of its domain, with exact scenes.

    GenEval on photographs is a metric of its own and has no exact scenes; a study that measured neither shows neither.
    """
    recorded = _recorded(study)
    both = not recorded.isdisjoint(ALWAYS)
    return [m for m in HEADLINE if m == "reward" or m in recorded or (both and m in ALWAYS)]


def _recorded(study: Study) -> frozenset[str]:
    return frozenset[str]().union(*(run.recorded for run in study.runs))


def is_trained(comparison: Comparison, metric: str) -> bool:
    """Whether a metric is the trained reward itself: the same number in every evaluation."""
    rows = [row.metrics for run in comparison.runs for row in run.evaluations if "reward" in row.metrics]
    return bool(rows) and all(row.get(metric) == row["reward"] for row in rows)


def evaluated_on(study: Study) -> list[str]:
    """What every method is scored on, whatever it was trained on.

    A trained reward that is none of these in some comparison comes before them.
    """
    recorded = _recorded(study)
    reward, *metrics = (*headline_metrics(study), *(metric for metric in PREFERENCES if metric in recorded))
    own = not all(any(is_trained(comparison, metric) for metric in metrics) for comparison in study.comparisons)
    return [reward, *metrics] if own else metrics


@dataclass(frozen=True)
class Column:
    """A heading; `note` is a short label under it, such as "seen"."""

    title: str
    note: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A value as text; `detail` is its uncertainty, `flag` marks what a reader must not overlook."""

    text: str
    detail: str = ""
    bold: bool = False
    flag: bool = False


@dataclass(frozen=True)
class Row:
    """Cells of one line; `label` is the method whose colour it carries, `base` marks the untrained model."""

    cells: tuple[Cell, ...]
    label: str = ""
    base: bool = False


@dataclass(frozen=True)
class Group:
    """Rows below one subheading (may be empty)."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """One table. `records` are its numbers, one dict a row, as they stand in the CSV file.

    In an `ordered` table a row belongs to the one above it; the rows of the others stand for themselves.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    records: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    ordered: bool = False

    @property
    def sortable(self) -> bool:
        """Whether there is anything that a reader could want in another order."""
        return not self.ordered and any(sum(not row.base for row in group.rows) > 1 for group in self.groups)


def markdown(table: Table) -> str:
    """The table as GitHub Markdown; pipes, line breaks and angle brackets of names are escaped."""

    def clean(text: str) -> str:
        for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), (">", "&gt;"), ("\r", " "), ("\n", " ")):
            text = text.replace(plain, escaped)
        return text

    def cell(value: Cell) -> str:
        text = clean(f"{value.text} {value.detail}".strip())
        return f"**{text}**" if value.bold and text else text

    headings = [clean(f"{column.title} ({column.note})" if column.note else column.title) for column in table.columns]
    lines = [f"### {clean(table.title)}", "", f"| {' | '.join(headings)} |"]
    lines.append(f"| {' | '.join('---:' if column.numeric else '---' for column in table.columns)} |")
    for group in table.groups:
        if group.title:
            lines.append(f"| *{clean(group.title)}* |" + " |" * (len(table.columns) - 1))
        lines += [f"| {' | '.join(cell(value) for value in row.cells)} |" for row in group.rows]
    lines += ["", *(f"* {clean(note)}" for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$", TIMES: r"$\times$", MINUS: "$-$", DASH: "--",
        "\r": " ", "\n": " ",
    }
)  # fmt: skip


def latex(table: Table) -> str:
    """The table as a LaTeX `tabular` of plain rules (no package needed), its title and notes as comments."""

    def cell(value: Cell) -> str:
        text = f"{value.text} {value.detail}".strip().translate(LATEX)
        return f"\\textbf{{{text}}}" if value.bold and text else text

    def comment(text: str) -> str:
        return "% " + " ".join(text.split())

    headings = [f"{column.title} ({column.note})" if column.note else column.title for column in table.columns]
    lines = [
        comment(table.title),
        f"\\begin{{tabular}}{{{''.join('lr'[c.numeric] for c in table.columns)}}}",
        "\\hline",
    ]
    lines += [" & ".join(heading.translate(LATEX) for heading in headings) + r" \\", r"\hline"]
    for group in table.groups:
        if group.title:
            lines.append(f"\\multicolumn{{{len(headings)}}}{{l}}{{\\emph{{{group.title.translate(LATEX)}}}}} \\\\")
        lines += [" & ".join(cell(value) for value in row.cells) + r" \\" for row in group.rows]
    lines += ["\\hline", "\\end{tabular}", *(comment(note) for note in table.notes)]
    return "\n".join(lines) + "\n"


def csv(records: Iterable[Mapping[str, Any]]) -> str:
    """Tidy numbers as CSV at full precision; empty where there is no value.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    told = [{harmless(key): harmless(value) for key, value in record.items()} for record in records]
    return pd.DataFrame(told).to_csv(index=False, lineterminator="\n")


def harmless(value: Any) -> Any:
    """A value of a CSV cell that no spreadsheet computes: ``=1+1`` becomes ``'=1+1``, numbers stay."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def number(value: float, signed: bool = False) -> str:
    """Three decimals up to 100, less above; a dash for NaN; a real minus sign."""
    if math.isnan(value):
        return DASH
    decimals = 3 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS)


def count(value: float) -> str:
    """1234567 -> "1,234,567"; NaN -> a dash."""
    return DASH if math.isnan(value) else f"{value:,.0f}"


def flops(value: float) -> str:
    """1.23e13 -> "12.3 T"."""
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return count(value)


def interval_cell(interval: Interval, signed: bool = False, bold: bool = False) -> Cell:
    """ "0.452" with "± 0.021" below it, or the value alone where one run gives no interval."""
    detail = "" if math.isnan(interval.half_width) else f"± {number(interval.half_width)}"
    return Cell(number(interval.mean, signed), detail, bold)


def difference_cell(interval: Interval) -> Cell:
    """A change with its sign, bold where its interval excludes zero; a dash without runs."""
    if not interval.n:
        return Cell(DASH)
    return interval_cell(interval, signed=True, bold=interval.above(0) or interval.below(0))


def runs_cell(n: int) -> Cell:
    """How many runs stand behind a row, and what that allows."""
    if n < 2:
        return Cell(str(n), "preview, one seed" if n else "")
    return Cell(str(n), "preview" if n < CLAIM_RUNS else "")


def unbold(row: Row) -> Row:
    """The row without bold type, where its table can support no comparison."""
    return replace(row, cells=tuple(replace(cell, bold=False) for cell in row.cells))


def passes(protocol: Mapping[str, Any], guidance: float) -> str:
    """Denoiser passes per image under a protocol: guidance above 1 takes two per step."""
    steps = protocol.get("steps")
    return str(steps * (2 if guidance > 1 else 1)) if isinstance(steps, int) else DASH


def by_protocol(study: Study, hash_of: Callable[[TrainingRun], str]) -> list[tuple[str, Study]]:
    """The study once per protocol hash, each with the runs that used it."""
    hashes = sorted({hash_of(run) for run in study.runs})
    return [(key, study.restricted(run for run in study.runs if hash_of(run) == key)) for key in hashes]


def protocol_title(protocols: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """ "final (3f2a...)": name and hash as they stand beside every number."""
    return f"{protocols.get(key, {}).get('name', 'unnamed')} {key}".strip() if key else "not recorded"


def slug(*parts: str) -> str:
    """A file name of several parts; what a file system or an address would stumble over becomes a hyphen.

    A name that file systems would not take ends in a hash of its parts.
    """
    name = "_".join("".join(c if c.isalnum() or c in "-._" else "-" for c in part) for part in parts if part)
    if len(name.encode()) <= LONGEST_SLUG:
        return name
    return f"{name[:40]}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def mixed_note(protocols: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, ...]:
    """A warning where runs of one study were scored under several protocols."""
    if len(keys) < 2:
        return ()
    listed = ", ".join(protocol_title(protocols, key) for key in keys)
    return (
        f"Runs here were scored under {len(keys)} protocols ({listed}): one table each. Do not compare across them.",
    )


def _scores(rows: Sequence[Evaluation], metric: str) -> list[float]:
    return [row.metrics[metric] for row in rows if metric in row.metrics]


def _present(study: Study, key: str, metric: str) -> bool:
    return any(metric in row.metrics for run in study.runs for row in run.evaluations if row.protocol_hash == key)


@dataclass(frozen=True)
class Entry:
    """One row's evaluations: the base of a comparison, or the final weights of a method, at one guidance."""

    comparison: Comparison
    label: str  # "" for the base
    guidance: float
    runs: tuple[TrainingRun, ...]
    rows: tuple[Evaluation, ...]

    def values(self, metric: str) -> list[float]:
        return _scores(self.rows, metric)

    def difference(self, key: str, metric: str) -> Interval:
        """To the base of the same run, protocol and guidance."""
        pairs = []
        for run, row in zip(self.runs, self.rows, strict=True):
            base = run.base(key, self.guidance)
            if base is not None and metric in base.metrics and metric in row.metrics:
                pairs.append((row.metrics[metric], base.metrics[metric]))
        values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return paired_difference(values[:, 0], values[:, 1])


def entries(comparison: Comparison, key: str) -> list[Entry]:
    """Base rows first, then every method, each at every guidance it was scored at."""
    guidances = sorted({guidance for run in comparison.runs for guidance in run.guidances(key)})
    found = []
    for label in ("", *comparison.labels):
        for guidance in guidances:
            runs = comparison.of(label) if label else comparison.runs
            scored = [(run, run.final(key, guidance) if label else run.base(key, guidance)) for run in runs]
            kept = [(run, row) for run, row in scored if row is not None]
            if kept:
                found.append(Entry(comparison, label, guidance, tuple(r for r, _ in kept), tuple(e for _, e in kept)))
    return found


def base_cell(entry: Entry, metric: str) -> Cell:
    """The base model's score with its standard error over prompts."""
    values = entry.values(metric)
    if not values:
        return Cell(DASH)
    errors = [row.standard_errors[metric] for row in entry.rows if metric in row.standard_errors]
    return Cell(number(float(np.mean(values))), f"se {number(float(np.mean(errors)))}" if errors else "")


def score_cell(entry: Entry, metric: str, bold: bool = False) -> Cell:
    """A score with its uncertainty: over runs for a method, over prompts for the base; a dash where there is none."""
    values = entry.values(metric)
    return interval_cell(t_interval(values), bold=bold) if entry.label and values else base_cell(entry, metric)


def best(entry: Entry, others: Sequence[Entry], metric: str) -> bool:
    """Whether an entry is better than every other method at its guidance and than the base at every guidance.

    Both by intervals: Welch's for two methods, Student's for a method against the base. Higher is better. Single runs
    have no interval: they are no rivals. Nothing is best where budgets differ.
    """
    values = entry.values(metric)
    rivals = [
        e.values(metric)
        for e in others
        if e.label not in ("", entry.label) and e.guidance == entry.guidance and len(e.rows) > 1
    ]
    bases = [float(np.mean(e.values(metric))) for e in others if not e.label and e.values(metric)]
    if not values or not rivals or not bases or not all(rivals) or len(budgets(entry.comparison.runs)) > 1:
        return False
    beats_methods = all(welch_difference(values, rival).above(0) for rival in rivals)
    return beats_methods and all(t_interval(values).above(base) for base in bases)


def _base_disagreement(found: Sequence[Entry]) -> tuple[str, ...]:
    """The base is scored on the same prompts and noise in every run, so its scores should agree to the last digits."""
    spreads = [
        np.ptp(e.values(metric))
        for e in found
        if not e.label
        for metric in (*GENEVAL, "exact_scene")
        if e.values(metric)
    ]
    worst = float(max(spreads, default=0.0))
    return (
        (f"The base model's scores differ between runs by up to {worst:.2g}: they should agree.",)
        if worst > 1e-6
        else ()
    )


def _tidy(entry: Entry, where: Mapping[str, Any], key: str, metric: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    interval = t_interval(entry.values(metric))
    if not entry.label:  # one model, scored once a run: no spread over seeds
        interval = Interval(interval.mean, math.nan, math.nan, interval.n)
    row = dict(where) | {
        "trained_on": entry.comparison.reward,
        "method": entry.label or "base",
        "guidance": entry.guidance,
    }
    row |= {"nfe_per_image": passes(protocol, entry.guidance), "protocol_hash": key, "metric": metric, "n": interval.n}
    row |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
    if entry.label:
        difference = entry.difference(key, metric)
        row |= {"difference": difference.mean, "difference_low": difference.low, "difference_high": difference.high}
    return row


def _identity(entry: Entry, protocol: Mapping[str, Any]) -> tuple[Cell, ...]:
    return Cell(entry.label or "base"), Cell(f"{entry.guidance:g}"), Cell(passes(protocol, entry.guidance))


IDENTITY = (Column("Method", numeric=False), Column("Guidance"), Column("NFE", "an image"))


def headline(study: Study, protocols: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Trained on x evaluated on: final scores and their differences to the base.

    Base rows come first, then methods at the guidance of the curves, then at the others.
    """
    tables = []
    parts = by_protocol(study, lambda run: run.final_hash)
    for key, part in parts:
        protocol, groups, tidy, disagreement = protocols.get(key, {}), [], [], set[str]()
        metrics = evaluated_on(part)
        where = {"experiment": study.experiment, "model": study.model}
        for comparison in part.comparisons:
            scale = min(run.curve_guidance for run in comparison.runs)
            found = sorted(entries(comparison, key), key=lambda entry: bool(entry.label) and entry.guidance != scale)
            disagreement |= set(_base_disagreement(found))
            rows = []
            for entry in found:
                cells = [*_identity(entry, protocol)]
                for metric in metrics:
                    cells.append(score_cell(entry, metric, bold=bool(entry.label) and best(entry, found, metric)))
                    cells.append(difference_cell(entry.difference(key, metric)) if entry.label else Cell(""))
                cells.append(runs_cell(len(entry.rows)) if entry.label else Cell(""))
                rows.append(Row(tuple(cells), entry.label, not entry.label))
                tidy += [_tidy(entry, where, key, metric, protocol) for metric in metrics if entry.values(metric)]
            rows += [
                Row((Cell(label), *[Cell("")] * (2 + 2 * len(metrics)), Cell("0", "none finished", flag=True)), label)
                for label in comparison.labels
                if label not in {entry.label for entry in found} and not all(map(_only_base, comparison.of(label)))
            ]
            groups.append(Group(f"trained on {comparison.reward}", tuple(rows)))
        columns = [*IDENTITY]
        for metric in metrics:
            columns += [Column(title_of(metric)), Column(f"{MINUS} base", "same guidance")]
        notes = mixed_note(protocols, [other for other, _ in parts])
        notes += (*sorted(disagreement), *budget_note(part))
        matrix = f"trained on {TIMES} evaluated on"
        title = f"{study.experiment}, {study.model}: {matrix}, under protocol {protocol_title(protocols, key)}"
        name = slug("headline", study.experiment, study.model, key)
        tables.append(Table(name, title, (*columns, Column("Runs")), tuple(groups), notes, tuple(tidy)))
    return tables


def _only_base(run: TrainingRun) -> bool:
    """Whether a run is nothing but a finished evaluation of the base model."""
    return run.run.get("kind") == "evaluated" and run.finished and all(row.weights == BASE for row in run.evaluations)


def counted(runs: Iterable[TrainingRun]) -> list[TrainingRun]:
    """The runs behind the means of methods: finished, and of more than the base model."""
    return [run for run in runs if run.finished and not _only_base(run)]


def budgets(runs: Iterable[TrainingRun]) -> dict[str, list[str]]:
    """The budgets of finished runs as text, each with the methods that had it."""
    found: dict[str, set[str]] = {}
    for run in counted(runs):
        stated = run.run.get("budget")
        limits = stated.items() if isinstance(stated, Mapping) else ()
        known = [amount_text(str(key), amount) for key, amount in limits if isinstance(amount, int | float)]
        text = " and ".join(known) or "not known"
        found.setdefault(text, set()).add(run.label)
    return {text: sorted(found[text]) for text in sorted(found)}


def budgets_text(runs: Iterable[TrainingRun]) -> str:
    """ "10 TFLOP: flow_grpo; 20 TFLOP: diffusion_nft"."""
    return "; ".join(f"{text}: {', '.join(labels)}" for text, labels in budgets(runs).items())


def budget_note(study: Study) -> tuple[str, ...]:
    """A warning where runs of one trained reward had different budgets, or else one trained reward and another."""
    notes = [
        f"Runs trained on {comparison.reward} had different budgets ({budgets_text(comparison.runs)}): "
        "their numbers are not matched."
        for comparison in study.comparisons
        if len(budgets(comparison.runs)) > 1
    ]
    if not notes and len(budgets(study.runs)) > 1:
        each = "; ".join(f"{c.reward}: {', '.join(budgets(c.runs))}" for c in study.comparisons if budgets(c.runs))
        notes = [f"Trained rewards had different budgets ({each}): across them, numbers are not matched."]
    return tuple(notes)


def geneval(study: Study, protocols: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """GenEval by tag with base rows first, and beside it what GenEval does not punish."""
    tables = []
    parts = by_protocol(study, lambda run: run.final_hash)
    for key, part in parts:
        protocol, groups, tidy = protocols.get(key, {}), [], []
        where = {"experiment": study.experiment, "model": study.model}
        shown = headline_metrics(part)
        by_tag = [name for each in shown if each in GENEVAL for name in (each, *(f"{each}/{tag}" for tag in TAGS))]
        metrics = [metric for metric in (*by_tag, *BESIDE) if metric in shown or _present(part, key, metric)]
        for comparison in part.comparisons:
            found, rows = entries(comparison, key), []
            for entry in found:
                cells = [*_identity(entry, protocol), *(score_cell(entry, metric) for metric in metrics)]
                tidy += [_tidy(entry, where, key, metric, protocol) for metric in metrics if entry.values(metric)]
                rows.append(
                    Row((*cells, runs_cell(len(entry.rows)) if entry.label else Cell("")), entry.label, not entry.label)
                )
            groups.append(Group(f"trained on {comparison.reward}", tuple(rows)))
        seen = {f"geneval/{tag}" for tag in SEEN_TAGS}  # of the embedded world's test split
        columns = [Column(title_of(metric), "seen" if metric in seen else "") for metric in metrics]
        notes = mixed_note(protocols, [other for other, _ in parts]) + budget_note(part)
        title = f"{study.experiment}, {study.model}: GenEval by tag under protocol {protocol_title(protocols, key)}"
        name = slug("geneval", study.experiment, study.model, key)
        tables.append(Table(name, title, (*IDENTITY, *columns, Column("Runs")), tuple(groups), notes, tuple(tidy)))
    return tables


def cost_text(axis: Axis, value: float) -> str:
    """A cost with its unit: "12.7 TFLOP"; a plain count on the other axes."""
    if axis.key == "flops":
        text = flops(value)
        return f"{text}{axis.unit}" if text[-1].isalpha() else f"{text} {axis.unit}"
    return count(value)


def amount_text(key: str, amount: float) -> str:
    """A limit on a cost with its unit: "7.5 TFLOP", "240,000 denoiser passes", "100 iterations"."""
    axis = next((axis for axis in AXES if axis.key == key), None)
    if axis is None:
        return f"{count(amount)} {key.replace('_', ' ')}"
    text = cost_text(axis, amount)
    return text if key == "flops" else f"{text} {axis.unit}"


def efficiency(study: Study, protocols: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Area under each run's curve over the budget, and the cost of reaching the targets stated before the run."""
    tables = []
    parts = by_protocol(study, lambda run: run.curve_hash)
    for key, part in parts:
        groups, tidy, metrics = [], [], headline_metrics(part)
        targets = sorted({target for run in part.runs for target in stated(run).items()})
        for comparison in part.comparisons:
            rows = []
            for label in comparison.labels:
                runs = [run for run in comparison.of(label) if run.finished]
                record: dict[str, Any] = {"experiment": study.experiment, "model": study.model}
                record |= {"trained_on": comparison.reward, "method": label, "protocol_hash": key, "n": len(runs)}
                cells = [Cell(label)]
                for metric in metrics:
                    cell, numbers = _area(runs, metric)
                    cells.append(cell)
                    record |= numbers
                for metric, target in targets:
                    reached, cell, numbers = _reaching(runs, metric, target)
                    cells += [reached, cell]
                    record |= numbers
                rows.append(Row((*cells, runs_cell(len(runs))), label))
                tidy.append(record)
            groups.append(Group(f"trained on {comparison.reward}", tuple(rows)))
        columns = [Column("Method", numeric=False)]
        columns += [Column(title_of(metric), "mean over budget") for metric in metrics]
        for metric, target in targets:
            goal = f"{title_of(metric)} ≥ {target:g}"
            columns += [Column(goal, "reached"), Column(goal, "mean cost, misses at budget")]
        title = f"{study.experiment}, {study.model}: over training, under protocol {protocol_title(protocols, key)}"
        notes = mixed_note(protocols, [other for other, _ in parts]) + budget_note(part)
        name = slug("efficiency", study.experiment, study.model, key)
        tables.append(Table(name, title, (*columns, Column("Runs")), tuple(groups), notes, tuple(tidy)))
    return tables


def _area(runs: Sequence[TrainingRun], metric: str) -> tuple[Cell, dict[str, Any]]:
    areas = []
    for run in runs:
        axis, budget = run.budget()
        x, y = run.curve(metric, axis)
        if len(x) > 1:
            areas.append(mean_over_budget(x, y, budget))
    if not areas:
        return Cell(DASH), {}
    area = t_interval(areas)
    numbers = {"mean": area.mean, "low": area.low, "high": area.high}
    return interval_cell(area), {f"{metric}_over_budget_{name}": value for name, value in numbers.items()}


def _reaching(runs: Sequence[TrainingRun], metric: str, target: float) -> tuple[Cell, Cell, dict[str, Any]]:
    """k/n runs that reached the target, and the mean of min(cost, budget): the restricted mean time to target."""
    found = reaching(runs, metric, target)
    if found is None:
        return Cell(DASH), Cell(DASH), {}
    cost = restricted_mean(found.times)
    goal = f"{metric}_{target:g}"
    numbers = {"reached": found.hits, "axis": found.axis.key, "mean": cost.mean, "low": cost.low, "high": cost.high}
    reached = Cell(f"{found.hits}/{len(found.times)}")
    return reached, time_cell(found), {f"{goal}_{name}": value for name, value in numbers.items()}


def time_cell(found: Reaching) -> Cell:
    """The restricted mean time with its unit, a lower bound where a run missed."""
    if not found.hits:
        return Cell("not reached")
    cost = restricted_mean(found.times)
    detail = "" if math.isnan(cost.half_width) else f"± {cost_text(found.axis, cost.half_width)}"
    bound = "" if found.hits == len(found.times) else "≥ "
    return Cell(f"{bound}{cost_text(found.axis, cost.mean)}", detail)


COSTS = (
    ("flops", "FLOP", flops), ("nfe", "NFE", count), ("backward", "Backward", count), ("images", "Images", count),
    ("reward_calls", "Reward calls", count), ("optimizer_steps", "Optimizer steps", count),
    ("wasted_nfe", "Wasted NFE", count),
)  # fmt: skip
COST_PHASES = ("rollout", "training", "evaluation")
CLOCKS = ("rollout", "reward", "training", "evaluation", "total")
OTHER_WORK = "Seconds are the wall clock's: other work on the machine lengthens them, and is not recorded."


def same_hardware(runs: Iterable[TrainingRun]) -> bool:
    """Whether seconds of these runs may stand side by side."""
    return len({run.hardware for run in runs}) <= 1


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def cost(study: Study) -> Table:
    """Mean over finished runs of what each method spent; evaluation has clocks of its own and is not in the totals."""
    comparable, groups, tidy = same_hardware(study.runs), [], []
    for comparison in study.comparisons:
        rows = []
        for label in comparison.labels:
            costs = [run.cost for run in comparison.of(label) if run.finished]
            record: dict[str, Any] = {"experiment": study.experiment, "model": study.model}
            record |= {"trained_on": comparison.reward, "method": label, "n": len(costs)}
            cells = [Cell(label)]
            for key, _, text in COSTS:
                record[key] = _mean(c.total[key] for c in costs if key in c.total)
                cells.append(Cell(text(record[key])))
            for phase in COST_PHASES:
                flop = _mean(c.phases[phase]["flops"] for c in costs if "flops" in c.phases.get(phase, {}))
                record[f"flops_{phase}"] = flop
                cells.append(Cell(DASH if math.isnan(flop) else flops(flop)))
            for clock in CLOCKS if comparable else ():
                record[f"seconds_{clock}"] = _mean(c.seconds[clock] for c in costs if clock in c.seconds)
                cells.append(Cell(count(record[f"seconds_{clock}"])))
            record["peak_memory_mb"] = _mean(c.peak_memory_mb for c in costs if not math.isnan(c.peak_memory_mb))
            cells.append(Cell(count(record["peak_memory_mb"])))
            rows.append(Row((*cells, Cell(str(len(costs)))), label))
            tidy.append(record)
        groups.append(Group(f"trained on {comparison.reward}", tuple(rows)))
    columns = [Column("Method", numeric=False), *(Column(title) for _, title, _ in COSTS)]
    columns += [Column("FLOP", phase) for phase in COST_PHASES]
    columns += [Column("Seconds", "method's clock" if clock == "total" else clock) for clock in CLOCKS if comparable]
    columns += [Column("Peak memory", "MB"), Column("Runs")]
    about = ["Seconds of reward calls are part of the phase that made them.", OTHER_WORK]
    if not comparable:
        about = ["Seconds are left out: these runs did not share one hardware, thread and process count."]
    notes = (*about, *budget_note(study))
    title = f"{study.experiment}, {study.model}: mean cost of a run"
    return Table(slug("cost", study.experiment, study.model), title, tuple(columns), tuple(groups), notes, tuple(tidy))
