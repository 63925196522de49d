"""What an equal tuning found: every trial, the best so far, the winners, and knobs that ended at a boundary.

A trial's score is the trained reward of its final weights on the tuning prompts, minus the base model's, so that
methods tuned on different rewards stand side by side, each on its own axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignbench.report.curves import MUTED, STYLE, styles
from alignbench.report.data import Evaluation, Records


@dataclass(frozen=True)
class Trial:
    """One trial: its method, reward, setting (knob -> level), and what came of it.

    `score` is the trained reward at the end, `error` its standard error within the run, `base` the base model's; None
    where the run has not finished, which `status` explains.
    """

    method: str
    reward: str
    setting: Mapping[str, Any]
    status: str
    score: float | None = None
    error: float | None = None
    base: float | None = None
    held_out: Mapping[str, float] | None = None
    flops: float | None = None

    @property
    def gain(self) -> float | None:
        return None if self.score is None or self.base is None else self.score - self.base


def find(records: Records, experiment: str, method: str, reward: str, setting: Mapping[str, Any]) -> Trial:
    """The trial of a setting among the records; the first one if several folders hold it."""
    for run in records.runs:
        same = all(run.config.get(knob) == level for knob, level in setting.items())
        if (run.experiment, run.method, run.reward) != (experiment, method, reward) or not same:
            continue
        guidance = run.curve_guidance
        base, final = run.base(run.final_hash, guidance), run.final(run.final_hash, guidance)
        if base is None or final is None:
            return Trial(method, reward, setting, f"{run.status}: {run.message}" if run.message else run.status)
        return _scored(method, reward, setting, base, final)
    return Trial(method, reward, setting, "not run")


def _scored(method: str, reward: str, setting: Mapping[str, Any], base: Evaluation, final: Evaluation) -> Trial:
    return Trial(
        method=method,
        reward=reward,
        setting=setting,
        status="done",
        score=final.metrics["reward"],
        error=final.standard_errors.get("reward"),
        base=base.metrics["reward"],
        held_out={key: value for key, value in final.metrics.items() if "/" not in key and key != "reward"},
        flops=final.costs.get("flops"),
    )


def best_so_far(trials: Sequence[Trial]) -> list[float]:
    """The largest gain among the first 1, 2, ... trials; NaN before the first that finished."""
    gains = [np.nan if trial.gain is None else trial.gain for trial in trials]
    return [float(value) for value in np.fmax.accumulate(gains)]


def best(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The finished trials of the largest gains, best first, the earlier one of equals."""
    finished = [trial for trial in trials if trial.gain is not None]
    return sorted(finished, key=lambda trial: -(trial.gain or 0.0))[:count]


def winner(first: Sequence[Trial], second: Sequence[Trial | None] = ()) -> Trial | None:
    """The best trial: of the second round if one of it finished, else of the first; None if none did."""
    return next(iter(best([trial for trial in second if trial], 1) or best(first, 1)), None)


def boundary_hits(best: Trial, knobs: Mapping[str, Sequence[Any]]) -> list[str]:
    """Knobs whose best level is the first or last that was tried: a better one may lie beyond."""
    return [knob for knob, levels in knobs.items() if best.setting[knob] in (levels[0], levels[-1])]


def page(
    space: Mapping[str, Mapping[str, Any]],
    trials: Mapping[str, Sequence[Trial]],
    second: Mapping[str, Sequence[Trial | None]],
) -> str:
    """Markdown: the winners with their boundary hits, then every trial of every method.

    Args:
        space: for each method its ``knobs``, knob -> ordered levels.
        trials: for each method its trials, in the order of the design.
        second: for each method of which there is one, the second round: the same trials again, None where not run.
    """
    lines = ["| method | reward | trials | best setting | base | best | gain | at a boundary |", "|" + "---|" * 8]
    for method, of_method in trials.items():
        again = [trial for trial in second.get(method, ()) if trial is not None]
        best, done = winner(of_method, again), _finished(of_method) + (f", {_finished(again)} again" if again else "")
        head = f"| {method} | {of_method[0].reward} | {done} |"
        if best is None or best.gain is None:
            lines.append(f"{head} none finished | | | | |")
            continue
        hits = ", ".join(short(knob) for knob in boundary_hits(best, space[method]["knobs"])) or "none"
        lines.append(
            f"{head} {_setting(best)} | {best.base:.3f} | {best.score:.3f} ± {best.error or 0:.3f} | {best.gain:+.3f} "
            f"| {hits} |"
        )
    for method, of_method in trials.items():
        numbered = [(str(number), trial) for number, trial in enumerate(of_method, start=1)]
        numbered += [
            (f"{number} again", trial) for number, trial in enumerate(second.get(method, ()), start=1) if trial
        ]
        knobs = [short(knob) for knob in space[method]["knobs"]]
        measured = sorted({name for _, trial in numbered for name in trial.held_out or {}})
        lines += ["", f"## {method}", ""]
        lines += ["| trial | " + " | ".join([*knobs, "gain", *measured, "TFLOP", "status"]) + " |"]
        lines += ["|" + "---|" * (len(knobs) + len(measured) + 4)]
        for number, trial in numbered:
            cells = [str(level) for level in trial.setting.values()]
            cells.append("" if trial.gain is None else f"{trial.gain:+.3f}")
            cells += [f"{(trial.held_out or {}).get(name, np.nan):.3f}".replace("nan", "") for name in measured]
            cells += ["" if trial.flops is None else f"{trial.flops / 1e12:.2f}", trial.status]
            lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _finished(trials: Sequence[Trial]) -> str:
    return f"{sum(trial.gain is not None for trial in trials)}/{len(trials)}"


def short(knob: str) -> str:
    """The last component of a configuration key."""
    return knob.rsplit(".", 1)[-1]


def _setting(trial: Trial) -> str:
    return ", ".join(f"{short(knob)} {level}" for knob, level in trial.setting.items())


def draw(trials: Mapping[str, Sequence[Trial]], second: Mapping[str, Sequence[Trial | None]]) -> Figure:
    """Gain of every trial (points) and best so far (steps) against the number of trials, a panel a method.

    A trial's gain in the second round is a ring above or below its point.
    """
    columns = min(4, len(trials))
    rows = -(-len(trials) // columns)
    style = styles(list(trials))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * columns, 2.0 * rows), layout="constrained")
        for axes, (method, of_method) in zip(
            figure.subplots(rows, columns, squeeze=False).flat, trials.items(), strict=False
        ):
            number = np.arange(1, len(of_method) + 1)
            gains = [np.nan if trial.gain is None else trial.gain for trial in of_method]
            axes.axhline(0, color=MUTED, linewidth=0.6)
            axes.scatter(number, gains, s=14, color=style[method].colour, marker=style[method].marker)
            again = [np.nan if trial is None or trial.gain is None else trial.gain for trial in second.get(method, ())]
            colour = style[method].colour
            axes.scatter(number[: len(again)], again, s=26, facecolors="none", edgecolors=colour, linewidths=1)
            last = max((index for index, gain in enumerate(gains, start=1) if not np.isnan(gain)), default=0)
            so_far = best_so_far(of_method)[:last]
            axes.step(number[:last], so_far, where="post", color=style[method].colour, linewidth=1)
            axes.set_title(f"{method} ({of_method[0].reward})", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in figure.axes[len(trials) :]:
            axes.remove()
        figure.supxlabel("trials", fontsize=8.5)
        figure.supylabel("gain over the base", fontsize=8.5)
    return figure
