"""Reward hacking: how far the trained reward rose, and what happened meanwhile to what nobody trained on.

One path a run, from the base (hollow) to the end of training (filled): to the right is more of the trained reward,
upwards more of a reward that was held out, of diversity, or of drift from the base. A path that turns downwards, or
drift that rises while the trained reward stands still, is what hacking looks like.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from alignbench.report.curves import LINE, MUTED, STYLE, Style, head, joined, legend_room, short
from alignbench.report.data import BASE, TRAINED, Comparison, TrainingRun
from alignbench.report.statistics import Array
from alignbench.report.tables import HELD_OUT, is_trained, title_of

SIDE_EFFECTS = ("diversity", "drift")


@dataclass(frozen=True)
class Path:
    """One run: trained reward and another metric over training, each [evaluations], the base first."""

    run: TrainingRun
    trained: Array
    other: Array


@dataclass(frozen=True)
class Paths:
    """One figure: every run of a comparison, one metric against the trained reward."""

    title: str
    metric: str
    reward: str
    paths: tuple[Path, ...]


def path(run: TrainingRun, metric: str) -> Path | None:
    """The run under the curves' protocol and guidance; None with fewer than two evaluations of both metrics."""
    rows = [row for kind in (BASE, TRAINED) for row in run.select(run.curve_hash, kind, run.curve_guidance)]
    points = [(row.metrics["reward"], row.metrics[metric]) for row in rows if {"reward", metric} <= set(row.metrics)]
    if len(points) < 2:
        return None
    trained, other = np.array(points, dtype=np.float64).T
    return Path(run, trained, other)


def figures(comparison: Comparison) -> list[Paths]:
    """The metrics that are not the trained reward itself, as far as they were measured."""
    found = []
    for metric in (*HELD_OUT, *SIDE_EFFECTS):
        if is_trained(comparison, metric) or metric == comparison.reward:
            continue
        paths = tuple(each for run in comparison.runs if (each := path(run, metric)) is not None)
        if paths:
            found.append(Paths(title_of(metric), metric, comparison.reward, paths))
    return found


def draw(plot: Paths, style: Mapping[str, Style]) -> Figure:
    """The figure, in the colours of a white page."""
    labels = sorted({each.run.label for each in plot.paths})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.3))
        columns, top = legend_room(labels)
        axes = figure.add_axes((0.125, 0.135, 0.845, top - 0.135))
        for label in labels:
            look, paths = style[label], [each for each in plot.paths if each.run.label == label]
            for finished, dashes in ((True, "-"), (False, (0, (2, 2)))):
                lines = [(each.trained, each.other) for each in paths if each.run.finished is finished]
                if lines:
                    axes.plot(*joined(lines), color=look.colour, linewidth=0.9, alpha=0.75, linestyle=dashes)
            start, end = ([(each.trained[i], each.other[i]) for each in paths] for i in (0, -1))
            axes.plot(*np.transpose(start), linestyle="", marker="o", markersize=4, markerfacecolor="none", color=MUTED)
            axes.plot(
                *np.transpose(end), linestyle="", marker=look.marker, markersize=5.5, color=look.colour,
                markeredgewidth=0, zorder=3,
            )  # fmt: skip
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.05, y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"Trained reward: {plot.reward}", color=MUTED)
        looks = [(short(label), style[label]) for label in labels]
        handles = [
            Line2D([], [], color=look.colour, marker=look.marker, markersize=5, label=name) for name, look in looks
        ]
        head(figure, plot.title, handles, columns)
    return figure


def describe(plot: Paths) -> str:
    """A text alternative: for every method the mean start and end of both metrics over its runs."""
    parts = [f"Paths of {plot.title} against the trained reward {plot.reward}, one a run."]
    for label in sorted({each.run.label for each in plot.paths}):
        of_label = [each for each in plot.paths if each.run.label == label]
        start, end = (np.mean([(p.trained[i], p.other[i]) for p in of_label], axis=0) for i in (0, -1))
        runs = f"mean of {len(of_label)} runs" if len(of_label) > 1 else "one run"
        unfinished = sum(not each.run.finished for each in of_label)
        runs += f", {unfinished} unfinished" if unfinished else ""
        parts.append(
            f"{label}, {runs}: trained reward from {start[0]:.3f} to {end[0]:.3f}, "
            f"{plot.title} from {start[1]:.3f} to {end[1]:.3f}."
        )
    return " ".join(parts)


def rows(plot: Paths, where: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Every point of every path for the CSV file."""
    for each in plot.paths:
        for trained, other in zip(each.trained, each.other, strict=True):
            yield {
                **where, "method": each.run.label, "seed": each.run.seed, "metric": plot.metric,
                "trained_reward": trained, "value": other,
            }  # fmt: skip
