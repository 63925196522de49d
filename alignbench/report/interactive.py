"""The figures of the page as one can question them: hover for method, seed and values, zoom, methods on and off.

The same numbers as in the static figures, as traces of plotly.js, which the page embeds and which needs nothing else.
Colours are names of the page's CSS variables ("--series-0"), so that the script can draw for a light and a dark page.
Without a script, and in print, the static figure stands there.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypedDict

import numpy as np

from alignbench.report.curves import Plot, Style, axis_scale
from alignbench.report.hacking import Paths
from alignbench.report.statistics import Array

SYMBOLS = {  # of matplotlib -> of plotly
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "*": "star",
}  # fmt: skip
DIGITS = 5  # of single runs: there are many, and a pixel is less

Trace = dict[str, Any]


class Chart(TypedDict):
    """One figure: titles of its axes, what its costs were divided by, and plotly's traces.

    Of a trace, `meta.kind` says what it is ("runs", "band", "mean", "base", "start", "end"), `meta.who` whose values
    they are, and the `customdata` of a point adds a run's seed or the limits of an interval.
    """

    x: str
    y: str
    scale: float
    traces: list[Trace]


def _rounded(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]


def _trace(label: str, place: int, x_title: str, kind: str, who: str) -> Trace:
    """What every trace of a method has; `label` becomes markup of plotly, so it is escaped."""
    name = escape(label)
    hover = f"{name}, {who} %{{customdata}}<br>%{{y:.4g}}<br>{escape(x_title)}: %{{x:.4g}}<extra></extra>"
    return {
        "type": "scatter", "mode": "lines", "name": name, "legendgroup": str(place), "showlegend": False,
        "hovertemplate": hover, "meta": {"kind": kind, "who": who},
    }  # fmt: skip


def _runs(lines: Sequence[tuple[int, Array, Array]]) -> Trace:
    """Runs (seed, x, y) as one trace with gaps: plotly is slow with a trace a run."""
    x, y, seeds = [], [], []
    for seed, xs, ys in lines:
        x += [*_rounded(xs), None]
        y += [*_rounded(ys), None]
        seeds += [seed] * (len(xs) + 1)
    return {"x": x, "y": y, "customdata": seeds}


def curve(plot: Plot, style: Mapping[str, Style]) -> Chart:
    """A step-efficiency figure; means and bands have all digits of the CSV file."""
    traces: list[Trace] = []
    end = max(line.x[-1] for each in plot.curves for line in (*each.finished, *each.unfinished))
    scale, title = axis_scale(plot.axis, end)
    for place, each in enumerate(plot.curves):
        look, mean = style[each.label], each.band
        colour = f"--series-{look.slot}"
        for lines, dash, opacity in ((each.finished, "solid", 0.4), (each.unfinished, "dot", 0.7)):
            if lines:
                trace = _trace(each.label, place, title, "runs", "seed")
                trace |= _runs([(line.seed, line.x / scale, line.y) for line in lines])
                trace |= {"opacity": opacity, "line": {"color": colour, "width": 1, "dash": dash}}
                traces.append(trace | {"showlegend": mean is None})  # the legend needs every method once
        if mean is None:
            continue
        if mean.n > 1:
            trace = _trace(each.label, place, title, "band", "") | {"hovertemplate": None, "hoverinfo": "skip"}
            x, y = np.append(mean.x, mean.x[::-1]) / scale, np.append(mean.high, mean.low[::-1])
            trace |= {"x": x.tolist(), "y": y.tolist(), "fill": "toself", "fillcolor": colour, "opacity": 0.16}
            traces.append(trace | {"line": {"width": 0}})
        trace = _trace(each.label, place, title, "mean", f"mean of {mean.n} runs" if mean.n > 1 else "one run")
        limits = zip(mean.low, mean.high, strict=True)
        trace["customdata"] = [f"[{low:.4g}, {high:.4g}]" if mean.n > 1 else "" for low, high in limits]
        trace |= {"x": (mean.x / scale).tolist(), "y": mean.mean.tolist(), "mode": "lines+markers", "showlegend": True}
        trace["marker"] = {"symbol": SYMBOLS[look.marker], "size": 6, "color": colour}
        traces.append(trace | {"line": {"color": colour, "width": 2.5}})
    for number, line in enumerate(plot.base):
        who = "final protocol" if line.final else "protocol of the curves"
        trace = _trace(line.label, len(plot.curves) + number, title, "base", who) | {"customdata": ["", ""]}
        trace |= {"x": [0, end / scale], "y": [line.score, line.score], "showlegend": True}
        traces.append(trace | {"line": {"color": "--base", "width": 1.5, "dash": "dot" if line.final else "dash"}})
    return Chart(x=title, y=plot.title, scale=scale, traces=traces)


def paths(plot: Paths, style: Mapping[str, Style]) -> Chart:
    """A figure of reward hacking: one path a run, its start hollow and its end filled."""
    traces: list[Trace] = []
    title = f"Trained reward: {plot.reward}"
    for place, label in enumerate(sorted({each.run.label for each in plot.paths})):
        look, of_label = style[label], [each for each in plot.paths if each.run.label == label]
        colour = f"--series-{look.slot}"
        for finished, dash in ((True, "solid"), (False, "dot")):
            lines = [(each.run.seed, each.trained, each.other) for each in of_label if each.run.finished is finished]
            if lines:
                trace = _trace(label, place, title, "runs", "seed") | _runs(lines) | {"opacity": 0.75}
                traces.append(trace | {"line": {"color": colour, "width": 1.3, "dash": dash}})
        hollow = {"symbol": "circle-open", "size": 7, "color": "--muted"}
        filled = {"symbol": SYMBOLS[look.marker], "size": 8, "color": colour}
        for at, kind, who, marker in ((0, "start", "base of seed", hollow), (-1, "end", "end of seed", filled)):
            trace = _trace(label, place, title, kind, who) | {"mode": "markers", "marker": marker}
            trace["x"] = _rounded(np.array([each.trained[at] for each in of_label]))
            trace["y"] = _rounded(np.array([each.other[at] for each in of_label]))
            trace["customdata"] = [each.run.seed for each in of_label]
            traces.append(trace | {"showlegend": at == -1})
    return Chart(x=title, y=plot.title, scale=1.0, traces=traces)


def embedded(charts: Mapping[str, Chart]) -> dict[str, Any]:
    """Charts of one figure against several costs as the page holds them.

    What a trace has in common with that of the first chart (all scores of runs, their seeds, every style) is written
    once, under `shared`: a trace without a name is `{**shared[i], **trace}`. Where the traces are other ones, because
    some run lacks a cost, they stand there in full.
    """
    first = next(iter(charts.values()))["traces"]

    def lean(chart: Chart) -> Chart:
        traces = chart["traces"]
        if [(trace["name"], trace["meta"]) for trace in traces] != [(trace["name"], trace["meta"]) for trace in first]:
            return chart
        own = [
            {key: value for key, value in trace.items() if value != common.get(key)}
            for trace, common in zip(traces, first, strict=True)
        ]
        return Chart(x=chart["x"], y=chart["y"], scale=chart["scale"], traces=own)

    return {"shared": first, "charts": {key: lean(chart) for key, chart in charts.items()}}
