"""``python -m alignbench.report.internals RESULTS``: what happened inside training, run by run.

Small multiples of the metrics that methods log in every iteration (reward of the rollout, gradient norm, clipped
ratios, distance to the policy that sampled, errors of winners and losers), against the compute they took.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from alignbench.errors import AlignbenchError
from alignbench.records import atomic_write, read_run
from alignbench.report import curves, data
from alignbench.report.curves import MUTED, STYLE, styles
from alignbench.report.data import LARGEST, TrainingRun
from alignbench.terminal import lasting

Array = NDArray[np.float64]
METRICS: Mapping[str, str] = {
    "reward": "reward of the rollout",
    "constant_groups": "groups without signal",
    "gradient_norm": "gradient norm",
    "clip_fraction": "clipped ratios",
    "ratio_deviation/first_update": "largest |ratio - 1| before the first update",
    "ratio_deviation/largest": "largest |ratio - 1|",
    "old_distance": "distance to the old policy",
    "kl": "KL to the reference",
    "hinge_active": "active hinges",
    "relative_reward": "semantic-relative reward",
    "winner_error_change": "winner's error minus the reference's",
    "loser_error_change": "loser's error minus the reference's",
    "lambda_below_one": "pairs whose loser is held back",
    "implicit_accuracy": "implicit accuracy",
}
PANEL = (2.6, 1.9)  # inches


def series(run: TrainingRun, metric: str) -> tuple[Array, Array]:
    """(TFLOP, value), each [iterations that logged it], smoothed over a tenth of the iterations."""
    rows = [row for row in read_run(run.folder).metrics if _finite(row.get(metric)) and _spent(row) is not None]
    spent = np.array([_spent(row) for row in rows], dtype=float) / 1e12
    values = np.array([row[metric] for row in rows], dtype=float)
    width = max(1, len(values) // 10)
    if width == 1:
        return spent, values
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return spent, (sums[ends] - sums[starts]) / (ends - starts)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _spent(row: Mapping[str, object]) -> float | None:
    ledger = row.get("ledger")
    flops = ledger.get("flops") if isinstance(ledger, Mapping) else None
    return float(flops) if isinstance(flops, int | float) and _finite(flops) else None


def draw(runs: Sequence[TrainingRun], metrics: Sequence[str]) -> Figure:
    """A panel for every metric that some run logged, a line for every run in its method's colour.

    Raises:
        AlignbenchError: none of the runs logged any of the metrics.
    """
    labels = list(dict.fromkeys(run.label for run in runs))
    style = styles(labels)
    panels = {metric: [(run, *series(run, metric)) for run in runs] for metric in metrics}
    panels = {metric: [entry for entry in lines if len(entry[1])] for metric, lines in panels.items()}
    panels = {metric: lines for metric, lines in panels.items() if lines}
    if not panels:
        raise AlignbenchError(f"none of the {len(runs)} runs logged any of: {', '.join(metrics)}")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down + 0.5), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes, (metric, lines) in zip(grid.flat, panels.items(), strict=False):
            for run, spent, values in lines:
                axes.plot(spent, values, color=style[run.label].colour, linewidth=1, alpha=0.8)
            if metric.endswith(("_change", "deviation/largest", "reward")) and min(v.min() for _, _, v in lines) < 0:
                axes.axhline(0, color=MUTED, linewidth=0.6)
            axes.set_title(METRICS.get(metric, metric), fontsize=8)
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        handles = [Line2D([], [], color=style[label].colour, label=curves.short(label)) for label in labels]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=8)
        figure.supxlabel("TFLOP of rollout and training", fontsize=8.5)
    return figure


@lasting()
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.report.internals", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--methods", nargs="+", help="some of the methods; default: all")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help=f"default: {' '.join(METRICS)}")
    parser.add_argument("--output", type=Path, default=Path("internals.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        runs = [run for run in data.load(options.results).runs if run.method in (options.methods or [run.method])]
        atomic_write(options.output, curves.png(draw(runs, options.metrics), dpi=120))
    except AlignbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
