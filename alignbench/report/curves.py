"""Step-efficiency figures: a score against what it cost, every run as a thin line, mean and band over runs.

The mean and its pointwise 95% Student-t band are taken over the finished runs of a method, at every cost where one of
them was evaluated: the others are interpolated linearly there, inside their own range. They are drawn where all of them
have values. Runs that did not finish are thin dashed lines and enter no mean. Horizontal lines are the base model:
dashed under the curves' protocol, dotted at a guidance that only the final protocol scores.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from alignbench.report.data import AXES, UNTUNED, Axis, Comparison, TrainingRun
from alignbench.report.statistics import Array, interpolate, pointwise_interval

# Colours of methods on white and on the page's dark background: at least 3:1 against it, and apart from each other with
# every kind of colour vision (the first two after Okabe and Ito, 2008; the others searched for). Markers differ too.
LIGHT = ("#0072b2", "#d55e00", "#08a46f", "#520753", "#5e3f02", "#02048e", "#dd1438")
DARK = ("#56b4e9", "#ff9248", "#a2ebd5", "#c02998", "#f8e5a6", "#896cfb", "#fc6b89")
INK, MUTED, LINE, BASE = "#1b1f25", "#59616b", "#d5d9df", "#6e7680"  # each replaced by a CSS variable on the page
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# These keep their colours in every report.
KNOWN = ("diffusion_nft", "flow_grpo", "tempflow_grpo", "best_of_n", "rwr", "sdpo", "srpo")

STYLE: dict[Any, Any] = {  # matplotlib types the keys as literals
    "svg.fonttype": "none",  # text stays text: selectable, in the page's font and colour
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Style:
    """How a method looks everywhere in the report; `slot` is its colour variable on the page."""

    slot: int
    marker: str

    @property
    def colour(self) -> str:
        return LIGHT[self.slot]


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for every method: known methods keep theirs, the others take what is free, in alphabetical order.

    With more than seven labels colours repeat, with other markers.
    """
    slots = {label: KNOWN.index(name) for label in labels if (name := label.removesuffix(UNTUNED)) in KNOWN}
    free = [slot for slot in range(len(LIGHT)) if slot not in slots.values()]
    others = sorted(label for label in labels if label not in slots)
    styled = {label: Style(slot, MARKERS[slot]) for label, slot in slots.items()}
    styled |= {label: Style(slot, MARKERS[slot]) for label, slot in zip(others, free, strict=False)}
    for index, label in enumerate(others[len(free) :]):
        turn, slot = divmod(index, len(LIGHT))
        styled[label] = Style(slot, MARKERS[(slot + 3 * (turn + 1)) % len(MARKERS)])
    return styled


@dataclass(frozen=True)
class Band:
    """Mean and pointwise 95% limits of one method on its runs' grid, each [points]; limits NaN for a single run."""

    x: Array
    mean: Array
    low: Array
    high: Array
    n: int


@dataclass(frozen=True)
class Line:
    """One run: its scores against their cost, each [evaluations]."""

    seed: int
    x: Array
    y: Array


@dataclass(frozen=True)
class Curve:
    """Everything one figure shows about one method."""

    label: str
    band: Band | None
    finished: tuple[Line, ...]
    unfinished: tuple[Line, ...]


@dataclass(frozen=True)
class Base:
    """The base model's score at one guidance; `final`: hash of the final protocol where only that one scores it."""

    guidance: float
    score: float
    final: str = ""

    @property
    def label(self) -> str:
        return f"base, guidance {self.guidance:g}"


@dataclass(frozen=True)
class Plot:
    """One figure: a metric of one comparison against one cost."""

    name: str
    title: str
    metric: str
    axis: Axis
    curves: tuple[Curve, ...]
    base: tuple[Base, ...]


def band(curves: Sequence[tuple[Array, Array]]) -> Band | None:
    """Mean and band over runs on the range that all of them cover; None where there is no such range."""
    if not curves:
        return None
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if end <= start:
        return None
    costs = np.unique(np.concatenate([x for x, _ in curves]))
    grid = costs[(costs >= start) & (costs <= end)]
    mean, low, high = pointwise_interval(np.stack([interpolate(x, y, grid) for x, y in curves]))
    return Band(grid, mean, low, high, len(curves))


def plot(name: str, title: str, metric: str, axis: Axis, comparison: Comparison) -> Plot | None:
    """Collect one figure's numbers; None where no run has two points to connect."""

    def lines(runs: list[TrainingRun], finished: bool) -> tuple[Line, ...]:
        found = (Line(run.seed, *run.curve(metric, axis.key)) for run in runs if run.finished is finished)
        return tuple(line for line in found if len(line.x) > 1)

    curves = []
    for label in comparison.labels:
        runs = comparison.of(label)
        finished, unfinished = lines(runs, True), lines(runs, False)
        if finished or unfinished:
            curves.append(Curve(label, band([(line.x, line.y) for line in finished]), finished, unfinished))
    if not curves:
        return None
    return Plot(name, title, metric, axis, tuple(curves), base_lines(comparison, metric))


def base_lines(comparison: Comparison, metric: str) -> tuple[Base, ...]:
    """The base at every guidance: under the curves' protocol, else under the final one where all runs share it."""

    def means(hash_of: Callable[[TrainingRun], str]) -> dict[float, float]:
        values: dict[float, list[float]] = {}
        for run in comparison.runs:
            for guidance in run.guidances(hash_of(run)):
                row = run.base(hash_of(run), guidance)
                if row is not None and metric in row.metrics:
                    values.setdefault(guidance, []).append(row.metrics[metric])
        return {guidance: float(np.mean(scores)) for guidance, scores in sorted(values.items())}

    during = means(lambda run: run.curve_hash)
    hashes = {run.final_hash for run in comparison.runs}
    final = means(lambda run: run.final_hash) if len(hashes) == 1 else {}
    lines = [Base(guidance, score) for guidance, score in during.items()]
    lines += [Base(guidance, score, *hashes) for guidance, score in final.items() if guidance not in during]
    return tuple(lines)


def _prefix(largest: float) -> tuple[float, str]:
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if largest >= scale:
            return scale, letter
    return 1.0, ""


def axis_scale(axis: Axis, largest: float) -> tuple[float, str]:
    """What to divide costs by, and the label that says so: (1e12, "Compute (TFLOP)")."""
    if axis.key == "flops":
        scale, letter = _prefix(largest)
        return scale, f"{axis.title} ({letter}{axis.unit})"
    if largest >= 1e4 and axis.key != "seconds":
        scale, word = (1e6, "million") if largest >= 2e6 else (1e3, "thousand")
        return scale, f"{axis.title} ({word})"
    return 1.0, f"{axis.title} (method's clock)" if axis.key == "seconds" else axis.title


def short(name: str, longest: int = 34) -> str:
    """A name that fits into a legend."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def legend_room(names: Sequence[str], extra: int = 0) -> tuple[int, float]:
    """(columns of the legend, top of the axes below its rows) for some methods and a number of other lines."""
    entries = len(names) + extra
    columns = 3 if entries > 4 and max(len(short(name)) for name in names) <= 16 else 2
    return columns, 0.895 - 0.047 * math.ceil(entries / columns)


def head(figure: Figure, title: str, handles: Sequence[Line2D], columns: int) -> None:
    """Title and legend above the axes."""
    figure.text(0.02, 0.955, title, fontsize=10, fontweight="bold", va="center")
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.005, 0.925), ncols=columns, frameon=False,
        fontsize=7.8, handlelength=2.2, columnspacing=1.4, borderpad=0.2, labelspacing=0.25,
    )  # fmt: skip


def joined(lines: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Several lines as one, with a gap of NaN behind each: an artist per method instead of one per run."""
    x, y = (np.concatenate([np.append(line[side], np.nan) for line in lines]) for side in (0, 1))
    return x, y


def draw(plot: Plot, style: Mapping[str, Style]) -> Figure:
    """The figure, in the colours of a white page."""
    drawn = [line for curve in plot.curves for line in (*curve.finished, *curve.unfinished)]
    scale, label = axis_scale(plot.axis, max(line.x[-1] for line in drawn))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.3))
        columns, top = legend_room([curve.label for curve in plot.curves], extra=len(plot.base))
        bottom = 0.135
        axes = figure.add_axes((0.105, bottom, 0.865, top - bottom))
        base, handles = [], []
        dashed, dotted = iter(((5, 2), (7, 2, 1.5, 2), (3, 3))), iter(((1, 1.5), (1, 3.5), (1, 1.5, 1, 4)))
        for line in plot.base:
            dashes = next(dotted if line.final else dashed, (1, 6))
            base.append(axes.axhline(line.score, color=BASE, linewidth=1.1, dashes=dashes, zorder=1, label=line.label))
        for curve in plot.curves:
            look = style[curve.label]
            for lines, kind, alpha in ((curve.finished, "-", 0.4), (curve.unfinished, (0, (2, 2)), 0.7)):
                if lines:
                    x, y = joined([(line.x / scale, line.y) for line in lines])
                    axes.plot(x, y, color=look.colour, linewidth=0.75, alpha=alpha, linestyle=kind, zorder=2)
            mean = curve.band
            if mean is None:  # nothing finished: the legend still needs the method
                handles += axes.plot(
                    [], [], color=look.colour, linewidth=0.75, linestyle=(0, (2, 2)), label=short(curve.label)
                )
                continue
            if mean.n > 1:
                axes.fill_between(
                    mean.x / scale, mean.low, mean.high, color=look.colour, alpha=0.16, linewidth=0, zorder=1.5
                )  # fmt: skip
            handles += axes.plot(
                mean.x / scale, mean.mean, color=look.colour, linewidth=1.8, label=short(curve.label), zorder=3,
                marker=look.marker, markersize=4, markevery=0.12, markeredgewidth=0,
            )  # fmt: skip
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.02, y=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(label, color=MUTED)
        head(figure, plot.title, [*handles, *base], columns)
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG file: text stays text, and the same numbers give the same bytes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


def png(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG file, without a date or version in it."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def inline(svg_file: str, slots: Sequence[str] = LIGHT) -> str:
    """The <svg> element for the page: in the page's colours (CSS variables) and font, without ids that would repeat.

    Coordinates keep one decimal, a seventh of a pixel, which halves the page.
    """
    element = svg_file[svg_file.index("<svg") :]
    element = re.sub(r"(\d\.\d)\d+(?= )", r"\1", element).replace(" \nL ", "L")
    element = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1), count=1
    )
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = element.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    variables = {colour: f"var(--series-{slot})" for slot, colour in enumerate(slots)}
    variables |= {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", BASE: "var(--base)", "#ffffff": "none"}
    for colour, variable in variables.items():
        element = element.replace(colour, variable)
    return element


def describe(plot: Plot) -> str:
    """A text alternative that gives the figure's numbers: where each method starts and ends, and the base."""
    parts = [f"Line chart of {plot.title} against {plot.axis.title.lower()}."]
    for curve in plot.curves:
        mean = curve.band
        if mean is None:
            parts.append(f"{curve.label}: no finished run, {len(curve.unfinished)} unfinished.")
            continue
        limits = f" (95% interval {mean.low[-1]:.3f} to {mean.high[-1]:.3f})" if mean.n > 1 else ""
        runs = f"mean of {mean.n} runs" if mean.n > 1 else "one run"
        ends = f"from {mean.mean[0]:.3f} to {mean.mean[-1]:.3f}{limits}"
        parts.append(f"{curve.label}, {runs}: {ends} at {mean.x[-1]:.3g} {plot.axis.unit}.")
    parts += [
        f"Base at guidance {line.guidance:g}{' (final protocol)' if line.final else ''}: {line.score:.3f}."
        for line in plot.base
    ]
    return " ".join(parts)


def rows(plot: Plot, where: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The plotted means, bands and lines of the base as tidy rows for the CSV file; the base's hold at every cost.

    `where` says which runs were drawn, `protocol_hash` the protocol of their curves.
    """
    drawn = {**where, "metric": plot.metric, "axis": plot.axis.key}
    for curve in plot.curves:
        mean = curve.band
        if mean is not None:
            for x, value, low, high in zip(mean.x, mean.mean, mean.low, mean.high, strict=True):
                yield drawn | {
                    "method": curve.label, "n": mean.n, "cost": x, "mean": value, "low": low, "high": high,
                }  # fmt: skip
    for line in plot.base:
        yield drawn | {"protocol_hash": line.final or where["protocol_hash"], "method": line.label, "mean": line.score}


def axes_with_costs(comparisons: Sequence[Comparison]) -> list[Axis]:
    """The axes along which some evaluation moved."""
    rows = [row for comparison in comparisons for run in comparison.runs for row in run.evaluations]
    return [axis for axis in AXES if any(row.costs.get(axis.key, 0.0) > 0 for row in rows)]
