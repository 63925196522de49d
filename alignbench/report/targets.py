"""When runs reached the targets that their task stated beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignbench.report.data import AXES, Axis, TrainingRun
from alignbench.report.statistics import SpeedUp, TimeToTarget, clip_times, speed_up, time_to_target


def stated(run: TrainingRun) -> dict[str, float]:
    """Targets of the run's task: metric -> score, by the names under which the run recorded them."""
    targets = run.run.get("targets")
    items = targets.items() if isinstance(targets, Mapping) else ()
    return {run.measured(str(metric)): float(value) for metric, value in items if isinstance(value, int | float)}


@dataclass(frozen=True)
class Reaching:
    """Times of some runs to one target, all against one cost; `horizon` is what the shortest of them could spend."""

    axis: Axis
    times: tuple[TimeToTarget, ...]
    horizon: float

    @property
    def hits(self) -> int:
        return sum(time.reached for time in self.times)


def reaching(runs: Sequence[TrainingRun], metric: str, target: float, axis: str = "") -> Reaching | None:
    """Times to a target along an axis, or along that of the runs' budget.

    A miss is censored at the budget, on an axis that is not the budget's where the run ended. None where no run has a
    curve of the metric, or the runs' budgets are on different axes.
    """
    times, horizons, axes = [], [], set()
    for run in runs:
        own, budget = run.budget()
        key = axis or own
        x, y = run.curve(metric, key)
        if len(x) > 1:
            horizon = budget if key == own else float(x[-1])
            times.append(time_to_target(x, y, target, horizon))
            horizons.append(horizon)
            axes.add(key)
    if not times or len(axes) > 1:
        return None
    (found,) = axes
    return Reaching(next(each for each in AXES if each.key == found), tuple(times), min(horizons))


def compare(faster: Sequence[Reaching | None], slower: Sequence[Reaching | None]) -> SpeedUp | None:
    """Speed-up over tasks that both sides ran ([task]), every task within what all its runs could spend."""
    first, second = [], []
    for a, b in zip(faster, slower, strict=True):
        if a is not None and b is not None and a.axis == b.axis:
            horizon = min(a.horizon, b.horizon)
            first.append(clip_times(a.times, horizon))
            second.append(clip_times(b.times, horizon))
    return speed_up(first, second) if first else None
