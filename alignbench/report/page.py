"""The report: figures, tables and one self-contained page, written below one folder.

index.html      everything, without any external resource
figures/        every figure as SVG and PNG
tables/         every table as CSV, Markdown and LaTeX, every evaluation and every plotted number as CSV
files.txt       what this report wrote, so that the next one removes what it no longer writes (`output`)
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs

from alignbench.report import (
    across,
    claims,
    curves,
    gallery,
    hacking,
    interactive,
    matched,
    provenance,
    tables,
    verdict,
    within,
)
from alignbench.report.answer import Answer, answer
from alignbench.report.claims import read
from alignbench.report.data import Axis, Comparison, Records, Study, load
from alignbench.report.output import Output

PNG_DPI = 160


@dataclass(frozen=True)
class Drawn:
    """One figure: its file, the static SVG element, its text alternative, and the chart that is drawn in its place."""

    file: str
    svg: Markup
    alternative: str
    chart: interactive.Chart

    @property
    def charts(self) -> dict[str, Any]:
        return interactive.embedded({"": self.chart})


@dataclass(frozen=True)
class Panel:
    """One metric of one comparison: the same figure for every axis."""

    title: str
    plots: Mapping[str, Drawn]  # by axis key

    @property
    def charts(self) -> dict[str, Any]:
        return interactive.embedded({key: drawn.chart for key, drawn in self.plots.items()})


@dataclass(frozen=True)
class Curves:
    """The step-efficiency figures of one comparison under one protocol."""

    title: str
    protocol: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Hacking:
    """The paths of one comparison, a figure a metric."""

    title: str
    plots: Sequence[Drawn]


@dataclass(frozen=True)
class Samples:
    """Sample grids of one comparison."""

    title: str
    strips: Sequence[gallery.Strip]


def _panel_metrics(comparison: Comparison) -> list[tuple[str, str]]:
    """(metric, title) of the trained reward, GenEval and exact scene; one figure for two that are the same number."""
    titles = {metric: tables.title_of(metric) for metric in tables.HEADLINE}
    metrics = list(tables.HEADLINE)
    rows = [row.metrics for run in comparison.runs for row in run.evaluations]
    for metric in tables.HEADLINE[1:]:
        if all(row.get(metric) == row.get("reward") for row in rows):
            metrics.remove(metric)
            titles["reward"] = f"{titles[metric]} = trained reward"
            break
    else:
        titles["reward"] = f"Trained reward: {comparison.reward}"
    return [(metric, titles[metric]) for metric in metrics]


def _curves(
    study: Study, records: Records, axes: Sequence[Axis], style: Mapping[str, curves.Style], output: Output
) -> Iterator[tuple[Curves, list[dict[str, Any]]]]:
    parts = tables.by_protocol(study, lambda run: run.curve_hash)
    for key, part in parts:
        for comparison in part.comparisons:
            where = {"experiment": study.experiment, "model": study.model, "trained_on": comparison.reward}
            comparable = tables.same_hardware(comparison.runs)
            shown = [axis for axis in axes if comparable or axis.key != "seconds"]
            panels: list[Panel] = []
            plotted: list[dict[str, Any]] = []
            for metric, title in _panel_metrics(comparison):
                plots: dict[str, Drawn] = {}
                for axis in shown:
                    parted = key if len(parts) > 1 else ""
                    name = tables.slug(
                        "curve", study.experiment, study.model, comparison.reward, metric, axis.key, parted
                    )
                    plot = curves.plot(name, title, metric, axis, comparison)
                    if plot is None:
                        continue
                    plots[axis.key] = _curve(plot, style, output)
                    plotted += curves.rows(plot, where | {"protocol_hash": key})
                if plots:
                    panels.append(Panel(title, plots))
            notes = [f"{len(parts)} protocols were used in {study.experiment}: their curves stand apart."] * (
                len(parts) > 1
            )
            notes.append(
                tables.OTHER_WORK
                if comparable
                else "No figure in seconds: these runs did not share one hardware, thread and process count."
            )
            notes += tables.budget_note(part)
            title = f"{study.experiment}, {study.model}: trained on {comparison.reward}"
            protocol = tables.protocol_title(records.protocols, key)
            yield Curves(title, protocol, tuple(panels), tuple(notes)), plotted


def _hacking(
    study: Study, style: Mapping[str, curves.Style], output: Output
) -> Iterator[tuple[Hacking, list[dict[str, Any]]]]:
    for comparison in study.comparisons:
        where = {"experiment": study.experiment, "model": study.model, "trained_on": comparison.reward}
        plots, points = [], []
        for plot in hacking.figures(comparison):
            name = tables.slug("hacking", study.experiment, study.model, comparison.reward, plot.metric)
            file, drawn = _draw(hacking.draw(plot, style), name, output)
            plots.append(Drawn(file, drawn, hacking.describe(plot), interactive.paths(plot, style)))
            points += list(hacking.rows(plot, where))
        if plots:
            yield Hacking(f"{study.experiment}, {study.model}: trained on {comparison.reward}", plots), points


def _curve(plot: curves.Plot, style: Mapping[str, curves.Style], output: Output) -> Drawn:
    file, drawn = _draw(curves.draw(plot, style), plot.name, output)
    return Drawn(file, drawn, curves.describe(plot), interactive.curve(plot, style))


def _headline(found: Answer, axes: Sequence[Axis]) -> curves.Plot | None:
    """The figure of the opening: the metric of the task against the cost that the budget limits."""
    budget = found.comparison.runs[0].budget()[0]
    for axis in sorted(axes, key=lambda axis: axis.key != budget):
        plot = curves.plot("headline", tables.title_of(found.metric), found.metric, axis, found.comparison)
        if plot is not None:
            return plot
    return None


def _more(plot: curves.Plot, found: Answer, plotted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of the opening's figure, where no other figure has them."""
    run = found.comparison.runs[0]
    where = {"experiment": run.experiment, "model": run.model, "trained_on": run.reward}
    same = where | {"metric": plot.metric, "axis": plot.axis.key}
    if any(row.items() >= same.items() for row in plotted):
        return []
    return list(curves.rows(plot, where | {"protocol_hash": run.curve_hash}))


def _draw(figure: Figure, name: str, output: Output) -> tuple[str, Markup]:
    """Write one figure as SVG and PNG; returns the SVG's file, and the SVG for the page."""
    file, drawn = f"figures/{name}.svg", curves.svg(figure, name)
    output.add(file, drawn)
    output.add(f"figures/{name}.png", curves.png(figure, PNG_DPI))
    return file, Markup(curves.inline(drawn))


def _evaluations(records: Records) -> Iterator[dict[str, Any]]:
    """Every evaluation of every run as one tidy row."""
    for run in records.runs:
        for row in run.evaluations:
            yield {
                "run": run.name, "experiment": run.experiment, "model": run.model, "trained_on": run.reward,
                "method": run.label, "seed": run.seed, "status": run.status, "protocol_hash": row.protocol_hash,
                "weights": row.weights, "guidance": row.guidance, "fraction": row.fraction, "iteration": row.iteration,
                **{f"cost_{key}": value for key, value in row.costs.items()}, **dict(sorted(row.metrics.items())),
            }  # fmt: skip


def _several(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _summary(records: Records) -> list[str]:
    """The first lines of the page: what was compared, and whether all of it is here."""
    finished = sum(run.finished for run in records.runs)
    total = len(records.runs) + len(records.unreadable)
    methods = len(records.labels)
    rewards = len({run.reward for run in records.runs})
    compared = f"{_several(methods, 'method')}, {_several(rewards, 'trained reward')}"
    return [f"{_several(total, 'run')}, {finished} finished: {compared}."]


def _hash(script: str) -> str:
    """The source expression by which a content security policy allows an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def render(records: Records, output: Output, published: Sequence[claims.Claim] = ()) -> str:
    """The page; figures and tables are added to `output` on the way."""
    style = curves.styles(records.labels)
    protocols = records.protocols
    studies = records.studies
    axes = curves.axes_with_costs([comparison for study in studies for comparison in study.comparisons])
    drawn, plotted = [], []
    for study in studies:
        for section, rows in _curves(study, records, axes, style, output):
            drawn.append(section)
            plotted += rows
    paths, points = [], []
    for study in studies:
        for part, rows in _hacking(study, style, output):
            paths.append(part)
            points += rows
    opening = answer(records)
    headline = _headline(opening, axes) if opening else None
    if opening and headline:
        plotted += _more(headline, opening, plotted)
    verdicts = [each for study in studies for each in verdict.verdicts(study, protocols)]
    sections = {
        "answer": [opening.table] if opening else [],
        "verdict": [each.table for each in verdicts],
        "pairs": [across.pairs(study) for study in studies],
        "tasks": [across.methods(study) for study in studies if len(study.comparisons) > 1],
        "matched": [table for study in studies for table in matched.matched(study, protocols)],
        "within": [within.table(records)],
        "claims": [claims.table(claims.findings(records, published))] if published else [],
        "headline": [table for study in studies for table in tables.headline(study, protocols)],
        "efficiency": [table for study in studies for table in tables.efficiency(study, protocols)],
        "geneval": [table for study in studies for table in tables.geneval(study, protocols)],
        "cost": [tables.cost(study) for study in studies],
        "runs": [provenance.runs(records)],
        "missing": [provenance.missing(study) for study in studies],
        "commands": [provenance.commands(study) for study in studies],
        "protocols": [provenance.protocols(records)],
        "differences": [provenance.differences(study) for study in studies],
        "settings": [provenance.own_settings(study) for study in studies],
        "environment": [provenance.environment(records)],
    }
    for table in (table for section in sections.values() for table in section):
        output.add(f"tables/{table.name}.md", tables.markdown(table))
        output.add(f"tables/{table.name}.tex", tables.latex(table))
        output.add(f"tables/{table.name}.csv", tables.csv(table.records))
    output.add("tables/evaluations.csv", tables.csv(_evaluations(records)))
    output.add("tables/curves.csv", tables.csv(plotted))
    output.add("tables/hacking.csv", tables.csv(points))
    samples = [
        Samples(f"{study.experiment}, {study.model}: trained on {comparison.reward}", gallery.strips(comparison))
        for study in studies
        for comparison in study.comparisons
    ]
    environment = Environment(
        loader=PackageLoader("alignbench.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    library = get_plotlyjs()
    scripts = [environment.get_template(name).render() for name in ("figures.js.jinja", "script.js.jinja")]
    return environment.get_template("page.html.jinja").render(
        answer=opening,
        headline=_curve(headline, style, output) if headline else None,
        library=Markup(library),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(map(_hash, (library, *scripts))),
        summary=_summary(records),
        missing=sum(len(table.records) for table in sections["missing"]),
        unfinished=sum(not run.finished for run in records.runs) + len(records.unreadable),
        tables=sections,
        axes=axes,
        curves=drawn,
        verdicts=verdicts,
        hacking=paths,
        samples=[section for section in samples if section.strips],
        slots={label: look.slot for label, look in style.items()},
        light=curves.LIGHT,
        dark=curves.DARK,
        ink={"ink": curves.INK, "muted": curves.MUTED, "line": curves.LINE, "base": curves.BASE},
        claim_runs=tables.CLAIM_RUNS,
    )


def build(paths: Sequence[Path], output: Path, say: Callable[[str], None] = print, claims: Path | None = None) -> Path:
    """Read the runs below `paths` and write the report to `output`; returns the path of the page.

    Raises:
        BadClaims: the folder `claims` does not hold published claims.
        NothingToReport: no run was found.
        ReportNotWritten: the output cannot be written.
    """
    published = read(claims) if claims else ()
    records = load(paths)
    say(f"read {_several(len(records.runs), 'run')} below {', '.join(str(path) for path in paths)}")
    for broken in records.unreadable:
        say(f"left out {broken.name}: {'; '.join(broken.problems)}")
    written = Output(output)
    written.add("index.html", render(records, written, published))
    written.write()
    figures = sum(name.startswith("figures/") for name in written.files)
    say(f"wrote {figures} figures to {output / 'figures'}")
    say(f"wrote {sum(name.startswith('tables/') for name in written.files)} tables to {output / 'tables'}")
    given = answer(records)
    if given is not None:
        say("\n".join(["", given.question, *given.sentences, "", tables.markdown(given.table)]))
    page = output / "index.html"
    say(f"report: {page} ({len(written.files['index.html']) / 1e6:.1f} MB)")
    return page
