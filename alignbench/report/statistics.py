"""Statistics over training runs: Student-t intervals, area under a curve, censored time to a target.

Every function takes one number a run, or one curve a run; nothing here resamples what was measured inside a run.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
STAYS = 2  # consecutive evaluations at or above a target that count as reaching it

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` runs and its confidence limits, which are NaN where there are fewer than two runs."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def above(self, value: float) -> bool:
        """Whether the whole interval lies above `value`; an interval without width supports nothing."""
        return self.high > self.low > value

    def below(self, value: float) -> bool:
        """Whether the whole interval lies below `value`; an interval without width supports nothing."""
        return self.low < self.high < value


def pointwise_interval(curves: ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array, Array]:
    """Mean and two-sided Student-t limits down the first axis: mean -+ t_{n-1} s / sqrt(n), s with n - 1.

    Args:
        curves: [runs, ...] one row a run.

    Returns:
        Mean, low, high, each [...]; NaN limits with one run, NaN everywhere with none.
    """
    values = np.asarray(curves, dtype=np.float64)
    n = len(values)
    if n < 2:
        mean = values[0] if n else np.full(values.shape[1:], np.nan)
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    mean = values.mean(axis=0)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def t_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Student-t interval of the mean of independent runs (values: [runs])."""
    values = np.asarray(values, dtype=np.float64)
    mean, low, high = pointwise_interval(values, confidence)
    return Interval(float(mean), float(low), float(high), len(values))


def paired_difference(values: ArrayLike, base: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Student-t interval of the mean of values - base, pair by pair (both [runs])."""
    return t_interval(np.asarray(values, dtype=np.float64) - np.asarray(base, dtype=np.float64), confidence)


def welch_difference(first: ArrayLike, second: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Interval of mean(first) - mean(second), independent runs of unequal variance (Welch, 1947); n of the smaller."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    mean, n = float(a.mean() - b.mean()), min(len(a), len(b))
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return Interval(mean, mean, mean, n)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(va + vb))
    return Interval(mean, mean - half, mean + half, n)


def interpolate(x: Array, y: Array, grid: Array) -> Array:
    """Linear interpolation of one run's curve (x ascending), NaN outside its own range: never extrapolated."""
    return np.interp(grid, x, y, left=np.nan, right=np.nan)


def mean_over_budget(x: Array, y: Array, budget: float) -> float:
    """Area under one run's curve from its first point to the budget (trapezoids), divided by that distance.

    A run that ends before the budget is averaged over what it has; NaN if that is a single point.
    """
    end = min(budget, float(x[-1]))
    if end <= x[0]:
        return float("nan")
    inside = x < end
    xs, ys = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(ys, xs) / (end - x[0]))


@dataclass(frozen=True)
class TimeToTarget:
    """Cost at which a target was reached, or the budget where it was not (`reached` is False: censored)."""

    time: float
    reached: bool


def time_to_target(x: Array, y: Array, target: float, budget: float, stays: int = STAYS) -> TimeToTarget:
    """The first evaluation at or above the target that starts `stays` such evaluations in a row, by the budget.

    The time is that of an evaluation (no interpolation). A miss, or a hit that nothing confirms, is censored at the
    budget.
    """
    above = y >= target
    for index in range(len(x) - stays + 1):
        if x[index] <= budget and above[index : index + stays].all():
            return TimeToTarget(float(x[index]), True)
    return TimeToTarget(budget, False)
