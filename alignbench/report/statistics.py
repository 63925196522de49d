"""Statistics over training runs: intervals, area under a curve, censored time to a target, comparisons of methods.

Every function takes one number a run, or one curve a run; what was measured inside a run is resampled by
`PromptBootstrap` alone, whose intervals are about that run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

CONFIDENCE = 0.95
STAYS = 2  # consecutive evaluations at or above a target that count as reaching it
RESAMPLES = 10_000
STUDENT_RUNS = 10  # Student's interval where a cell has so many runs or fewer, the bootstrap where all have more
IQM_TASKS, IQM_RUNS = 4, 5  # an interquartile mean needs at least so many
TINY, EDGE = 1e-300, 1e-9

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
    constant = values.max(axis=0) == values.min(axis=0)  # whose rounded mean would give a width of 1e-17
    mean = np.where(constant, values[0], values.mean(axis=0))
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    half = np.where(constant, 0.0, half)
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
    return weighted_sum([a, b], [1, -1], confidence)


def weighted_sum(groups: Sequence[Array], weights: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Interval of sum_k weight_k mean(group_k) over independent groups of runs (each [runs]); n of the smallest.

    Student's t with the degrees of freedom of Satterthwaite (1946); NaN limits where a group has fewer than two runs.
    """
    point = float(sum(weight * group.mean() for weight, group in zip(weights, groups, strict=True)))
    sizes = np.array([len(group) for group in groups])
    n = int(sizes.min())
    if n < 2:
        return Interval(point, math.nan, math.nan, n)
    variances = np.square(weights) * [_variance(group) for group in groups] / sizes
    total = variances.sum()
    if total == 0:
        return Interval(point, point, point, n)
    freedom = total**2 / (variances**2 / (sizes - 1)).sum()
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(total))
    return Interval(point, point - half, point + half, n)


def _variance(group: Array) -> float:
    """With n - 1; exactly 0 for equal values, whose rounded mean would give 1e-33."""
    return 0.0 if group.max() == group.min() else float(group.var(ddof=1))


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


def clip_times(times: Sequence[TimeToTarget], horizon: float) -> list[TimeToTarget]:
    """The same times as if every run had ended at `horizon`: what was reached later counts as missed there."""
    return [t if t.reached and t.time <= horizon else TimeToTarget(min(t.time, horizon), False) for t in times]


def restricted_mean(times: Sequence[TimeToTarget]) -> Interval:
    """E[min(T, B)], a miss counting with the budget B at which it was censored, with Student's interval over runs.

    With a miss it is a lower bound of the mean time, and the limits are NaN: runs that all end at B differ too little
    (of five runs of which 30, 60 and 80% miss, intervals that state 95% would cover 93, 82 and 60%).
    """
    interval = t_interval([time.time for time in times])
    if all(time.reached for time in times):
        return interval
    return Interval(interval.mean, math.nan, math.nan, interval.n)


Statistic = Callable[[Sequence[Array]], Array]


def bootstrap(
    groups: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap over whole runs, stratified: every group is resampled within itself, to its own size.

    The percentiles are expanded (Hesterberg, 2015, The American Statistician 69): for the mean of n normal runs they
    give Student's interval, where those at 2.5 and 97.5% would cover 91% at n = 11 and 83% at n = 5.

    Args:
        groups: one array of runs for each cell (a method on a task), each [runs] or [runs, ...].
        statistic: takes the groups with resamples in front, each [resamples, runs, ...]; returns [resamples].

    Returns:
        The statistic of the runs as they are, its limits, and the size of the smallest group, by which they are
        expanded. Limits are NaN where a group has fewer than two runs. With few runs there are few different resamples:
        `t_interval` and `weighted_sum` are for those.
    """
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    point, n = float(statistic([group[None] for group in values])[0]), min(len(group) for group in values)
    if n < 2:
        return Interval(point, math.nan, math.nan, n)
    generator = np.random.default_rng(seed)
    drawn = [group[generator.integers(len(group), size=(resamples, len(group)))] for group in values]
    z = math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1)
    low, high = np.quantile(statistic(drawn), stats.norm.cdf([-z, z]))
    return Interval(point, float(low), float(high), n)


def mean_of_tasks(tasks: Sequence[Array]) -> Array:
    """Mean over tasks of the mean over runs: a task with more runs does not weigh more (each [..., runs])."""
    return np.asarray(np.mean([task.mean(axis=-1) for task in tasks], axis=0))


def interquartile_mean(tasks: Sequence[Array], confidence: float = CONFIDENCE) -> Interval:
    """Mean of the middle half of runs x tasks (Agarwal et al., 2021, arXiv 2108.13264), each [runs].

    The interval is that of Tukey and McLaughlin (1963, Sankhya A 25) for a trimmed mean, by task: Student's t of runs
    winsorised to the middle half, as many degrees of freedom as runs are kept less tasks. By simulation with 4 tasks
    of 5 runs an interval that states 95% covers 95 to 96% of normal runs and 92% of skewed ones, where the percentile
    bootstrap covers 87 to 92%. NaN limits where a task has fewer than two runs or no degree of freedom is left.
    """
    ordered = np.sort(np.concatenate(list(tasks)))
    cut, n = len(ordered) // 4, min(map(len, tasks))
    kept = ordered[cut : len(ordered) - cut]
    mean, freedom = float(kept.mean()), len(kept) - len(tasks)
    if n < 2 or freedom < 1:
        return Interval(mean, math.nan, math.nan, n)
    variance = sum(len(task) * _variance(task.clip(kept[0], kept[-1])) for task in tasks) / len(kept) ** 2
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, n)


def aggregate(tasks: Sequence[ArrayLike]) -> tuple[str, Interval]:
    """("interquartile mean" or "mean", interval) of one score over tasks (each [runs]).

    The interquartile mean throws half of the runs away, so it is taken from 4 tasks of 5 runs up only. The mean has
    Student's interval (variances of the tasks pooled as they are) unless every task has more than ten runs, and then
    the bootstrap of whole runs within tasks: with 3 runs of one task and 11 of another the bootstrap of normal runs
    covers 83%, Student's 93%.
    """
    runs = [np.asarray(task, dtype=np.float64) for task in tasks]
    if len(runs) >= IQM_TASKS and min(map(len, runs)) >= IQM_RUNS:
        return "interquartile mean", interquartile_mean(runs)
    if min(map(len, runs)) > STUDENT_RUNS:
        return "mean", bootstrap(runs, mean_of_tasks)
    return "mean", weighted_sum(runs, [1 / len(runs)] * len(runs))


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster one method reaches a target than another.

    Attributes:
        ratio: of restricted mean times, slower over faster, geometric mean over tasks; NaN where it is not defined.
        bound: "" for an estimate; "≥" where only the slower method missed targets (its time is at least the budget),
            "≤" where only the faster one did; "n/a" where both did, and the ratio says nothing.
        reached: (faster hits, faster runs, slower hits, slower runs).
    """

    ratio: Interval
    bound: str
    reached: tuple[int, int, int, int]

    @property
    def defined(self) -> bool:
        return self.bound != "n/a"


def speed_up(faster: Sequence[Sequence[TimeToTarget]], slower: Sequence[Sequence[TimeToTarget]]) -> SpeedUp:
    """Ratio of restricted mean times to target E[min(T, B)], slower over faster, over the same tasks (``[task][run]``).

    The interval is Welch's on the logarithms of the means, var(log mean) = var / (n mean^2), unless every method has
    more than ten runs of every task, and then the bootstrap of whole runs within tasks. Neither knows what a censored
    run would have needed: that is what `bound` says. Where it is "≥" the lower limit is one of the ratio of mean times
    too (by simulation with 3 and 5 runs it lies below that ratio in 98% or more), the upper one is not.
    """
    hits = [sum(time.reached for task in side for time in task) for side in (faster, slower)]
    sizes = [sum(map(len, side)) for side in (faster, slower)]
    reached = (hits[0], sizes[0], hits[1], sizes[1])
    missed = hits[0] < sizes[0], hits[1] < sizes[1]
    bound = {(False, False): "", (False, True): "≥", (True, False): "≤", (True, True): "n/a"}[missed]
    groups = [np.array([time.time for time in task]) for side in (faster, slower) for task in side]
    n = min(map(len, groups), default=0)
    if bound == "n/a" or not n or any(group.mean() <= 0 for group in groups):
        return SpeedUp(Interval(math.nan, math.nan, math.nan, n), "n/a", reached)
    tasks = len(faster)

    def logarithm(parts: Sequence[Array]) -> Array:
        means = np.log([np.maximum(part.mean(axis=-1), TINY) for part in parts])
        return np.asarray((means[tasks:] - means[:tasks]).mean(axis=0))

    if n > STUDENT_RUNS:
        log = bootstrap(groups, logarithm)
    else:
        point = float(logarithm([group[None] for group in groups])[0])
        spread = weighted_sum([group / group.mean() for group in groups], [-1 / tasks] * tasks + [1 / tasks] * tasks)
        log = Interval(point, point + spread.low, point + spread.high, spread.n)  # the sum itself is 0: means are 1
    ratio = Interval(math.exp(log.mean), math.exp(log.low), math.exp(log.high), log.n)
    return SpeedUp(ratio, bound, reached)


def improvement(first: ArrayLike, second: ArrayLike) -> float:
    """P(a run of the first beats a run of the second), ties half: Mann-Whitney's U / (n m)."""
    a, b = np.asarray(first, dtype=np.float64)[:, None], np.asarray(second, dtype=np.float64)[None, :]
    return float(np.mean((a > b) + 0.5 * (a == b)))


def probability_of_improvement(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], confidence: float = CONFIDENCE
) -> Interval:
    """Mann-Whitney per task, averaged over tasks (``[task][runs]``), with an interval.

    The score interval of Newcombe (2006, Statistics in Medicine 25, method 5), which does not shrink to a point when
    all runs of one method beat all of the other. Its variance belongs to one probability: with different ones on
    different tasks it is too large, as p (1 - p) is concave, and the interval too wide rather than too narrow.
    """
    sizes = [(len(np.asarray(a)), len(np.asarray(b))) for a, b in zip(first, second, strict=True)]
    point = float(np.mean([improvement(a, b) for a, b in zip(first, second, strict=True)]))
    n = min(map(min, sizes))
    if n < 2:
        return Interval(point, math.nan, math.nan, n)
    z = float(stats.norm.ppf((1 + confidence) / 2))

    def excess(p: float) -> float:
        """(point - p)^2 - z^2 V(p), V of Hanley and McNeil with (n + m) / 2 for n and m, averaged over tasks."""
        extra = (1 - p) / (2 - p) + p / (1 + p)
        variances = (p * (1 - p) * (1 + ((n + m) / 2 - 1) * extra) / (n * m) for n, m in sizes)
        return (point - p) ** 2 - z**2 * sum(variances) / len(sizes) ** 2

    low = 0.0 if point == 0 else float(optimize.brentq(excess, 0, point - EDGE * point))
    high = 1.0 if point == 1 else float(optimize.brentq(excess, point + EDGE * (1 - point), 1))
    return Interval(point, low, high, n)


@dataclass(frozen=True)
class Signs:
    """Seeds of two methods, one against the other."""

    wins: int
    ties: int
    pairs: int


def sign_count(first: Mapping[int, float], second: Mapping[int, float]) -> Signs:
    """How often the first beats the second at the same seed (seed -> score); seeds of one method alone do not count."""
    shared = first.keys() & second.keys()
    wins = sum(first[seed] > second[seed] for seed in shared)
    return Signs(wins, sum(first[seed] == second[seed] for seed in shared), len(shared))


def performance_profile(times: ArrayLike, factors: ArrayLike) -> Array:
    """Share of (task, target) that each method reaches within a factor of the best (Dolan and Moré, 2002).

    Args:
        times: [methods, targets], infinite where a method missed. A target that nobody reached counts for nobody.
        factors: [factors], at least 1.

    Returns:
        [methods, factors]
    """
    found = np.asarray(times, dtype=np.float64)
    best = found.min(axis=0)
    within = found[:, :, None] <= best[:, None] * np.asarray(factors, dtype=np.float64)
    return np.asarray((within & np.isfinite(found)[:, :, None]).mean(axis=1))


class PromptBootstrap:
    """Resamples the prompts of one run, within tags, where the score is the unweighted mean over tags.

    It says how far a run's score would move with other prompts, not with another seed: it is no interval over runs.
    The same prompts are drawn for everything that is given to it, so differences between evaluations are paired.

    Args:
        tags: [prompts] tag of every prompt.
        images: [prompts] how many images were scored for it.
    """

    def __init__(self, tags: Sequence[str], images: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self._images = np.asarray(images, dtype=np.int64)
        generator = np.random.default_rng(seed)
        self._parts = []
        for tag in sorted(set(tags)):
            prompts = np.flatnonzero([other == tag for other in tags])
            times = generator.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=resamples)
            self._parts.append((prompts, times.astype(np.float64)))

    def _scores(self, values: ArrayLike) -> tuple[float, Array]:
        """(score, [resamples] scores with resampled prompts) of per-image values [images], prompt by prompt."""
        scores = np.asarray(values, dtype=np.float64)
        if len(scores) != self._images.sum():
            raise ValueError(f"expected {self._images.sum()} values, one an image, got {len(scores)}")
        ends = np.cumsum(self._images)
        sums = np.diff(np.concatenate([[0.0], np.cumsum(scores)])[np.concatenate([[0], ends])])
        point, drawn = [], []
        for prompts, times in self._parts:
            inside, weight = sums[prompts], self._images[prompts].astype(np.float64)
            point.append(inside.sum() / weight.sum())
            drawn.append((times @ inside) / (times @ weight))
        return float(np.mean(point)), np.asarray(np.mean(drawn, axis=0))

    def interval(self, values: ArrayLike, base: ArrayLike | None = None, confidence: float = CONFIDENCE) -> Interval:
        """Percentile interval of the score of `values` ([images]), or of its difference to `base`; n counts prompts."""
        point, drawn = self._scores(values)
        if base is not None:
            base_point, base_drawn = self._scores(base)
            point, drawn = point - base_point, drawn - base_drawn
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(point, float(low), float(high), len(self._images))
