import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alignbench.report.statistics import (
    Array,
    Interval,
    PromptBootstrap,
    Signs,
    TimeToTarget,
    aggregate,
    bootstrap,
    clip_times,
    improvement,
    interpolate,
    interquartile_mean,
    mean_of_tasks,
    mean_over_budget,
    paired_difference,
    performance_profile,
    pointwise_interval,
    probability_of_improvement,
    restricted_mean,
    sign_count,
    speed_up,
    t_interval,
    time_to_target,
    weighted_sum,
    welch_difference,
)

# 97.5% quantiles of Student's t: (2 p - 1) / sqrt(2 p (1 - p)) for two degrees of freedom, a table for four.
T_975 = {2: 0.95 / math.sqrt(2 * 0.975 * 0.025), 4: 2.776445105}


def test_t_interval_of_three_runs_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0])  # s = 1
    assert (interval.mean, interval.n) == (2.0, 3)
    assert interval.half_width == pytest.approx(T_975[2] / math.sqrt(3), rel=1e-9)
    assert interval.low == pytest.approx(2 - T_975[2] / math.sqrt(3))


def test_t_interval_of_five_runs_by_hand() -> None:
    interval = t_interval([2.0, 4.0, 4.0, 4.0, 6.0])  # squares 4 + 4 = 8, s^2 = 2
    assert interval.mean == 4.0
    assert interval.half_width == pytest.approx(T_975[4] * math.sqrt(2 / 5), rel=1e-9)


def test_one_run_has_no_interval_and_none_has_no_mean() -> None:
    one = t_interval([0.4])
    assert (one.mean, one.n) == (0.4, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert not one.above(0)
    none = t_interval([])
    assert math.isnan(none.mean)
    assert none.n == 0


@pytest.mark.parametrize("runs", [2, 3, 5, 10])
def test_stated_coverage_holds_in_simulation(runs: int) -> None:
    trials = 40_000
    values = np.random.default_rng(runs).normal(0.3, 0.05, (runs, trials))
    _, low, high = pointwise_interval(values)
    covered = np.mean((low <= 0.3) & (high >= 0.3))
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


def test_pointwise_interval_is_one_interval_a_point() -> None:
    curves = np.random.default_rng(0).normal(size=(4, 6))
    mean, low, high = pointwise_interval(curves)
    for point in range(6):
        one = t_interval(curves[:, point])
        assert (mean[point], low[point], high[point]) == pytest.approx((one.mean, one.low, one.high))


def test_paired_difference_removes_what_pairs_share() -> None:
    base = [0.1, 0.5, 0.9]
    interval = paired_difference([0.2, 0.7, 1.2], base)  # 0.1, 0.2, 0.3
    assert interval.mean == pytest.approx(0.2)
    assert interval.half_width == pytest.approx(0.1 * T_975[2] / math.sqrt(3))


def test_welch_agrees_with_scipy() -> None:
    first, second = [1.0, 2.0, 3.0, 5.0], [0.5, 0.6, 0.4]
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    interval = welch_difference(first, second)
    assert interval.mean == pytest.approx(2.75 - 0.5)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.n == 3


def test_welch_of_equal_variances_by_hand() -> None:
    interval = welch_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])  # 2/3 pooled, 4 degrees of freedom
    assert interval.mean == pytest.approx(-1)
    assert interval.half_width == pytest.approx(T_975[4] * math.sqrt(2 / 3))


def test_welch_without_an_interval() -> None:
    assert math.isnan(welch_difference([1.0], [1.0, 2.0]).low)
    same = welch_difference([1.0, 1.0], [0.0, 0.0])
    assert (same.low, same.high) == (1.0, 1.0)
    assert not same.above(0)  # identical runs are no evidence
    assert not welch_difference([0.4] * 3, [0.1] * 3).above(0)  # whose rounded means differ from them


def test_identical_runs_have_no_width_whatever_their_rounding() -> None:
    assert t_interval([0.4] * 3) == Interval(0.4, 0.4, 0.4, 3)
    assert np.mean([0.4] * 3) != 0.4


def test_above_and_below() -> None:
    assert Interval(2.0, 1.0, 3.0, 3).above(0.9)
    assert not Interval(2.0, 1.0, 3.0, 3).above(1.0)
    assert Interval(2.0, 1.0, 3.0, 3).below(3.1)
    assert not Interval(2.0, 1.0, 3.0, 3).below(3.0)


def test_interpolation_is_linear_and_never_extrapolates() -> None:
    x, y = np.array([1.0, 3.0]), np.array([10.0, 20.0])
    found = interpolate(x, y, np.array([0.5, 1.0, 1.5, 3.0, 3.1]))
    np.testing.assert_allclose(found, [np.nan, 10.0, 12.5, 20.0, np.nan])


def test_mean_over_budget_by_hand() -> None:
    x, y = np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 2.0])  # areas 1 and 4
    assert mean_over_budget(x, y, 3.0) == pytest.approx(5 / 3)
    assert mean_over_budget(x, y, 2.0) == pytest.approx(3 / 2)
    assert mean_over_budget(x, y, 0.5) == pytest.approx(0.5)  # triangle of height 1
    assert mean_over_budget(x, y, 9.0) == pytest.approx(5 / 3)  # only what was run
    assert math.isnan(mean_over_budget(np.array([0.0]), np.array([0.3]), 1.0))


@settings(deadline=None)
@given(st.floats(-5, 5), st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.05, 50))
def test_a_constant_curve_has_its_value_as_mean(height: float, steps: list[float], budget: float) -> None:
    x = np.concatenate([[0.0], np.cumsum(steps)])
    assert mean_over_budget(x, np.full_like(x, height), budget) == pytest.approx(height, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.5, 0.6, 0.7], TimeToTarget(1.0, True)),
        ([0.1, 0.5, 0.4, 0.7, 0.8], TimeToTarget(3.0, True)),  # the first hit did not stay
        ([0.1, 0.2, 0.3, 0.7], TimeToTarget(10.0, False)),  # the last hit is not confirmed: censored
        ([0.1, 0.2, 0.3, 0.4], TimeToTarget(10.0, False)),
        ([0.5, 0.5, 0.1, 0.1], TimeToTarget(0.0, True)),  # two are enough, a later fall does not undo it
        ([0.9], TimeToTarget(10.0, False)),
    ],
)
def test_time_to_target(scores: list[float], expected: TimeToTarget) -> None:
    x = np.arange(len(scores), dtype=np.float64)
    assert time_to_target(x, np.array(scores), 0.5, budget=10.0) == expected


def test_a_target_reached_after_the_budget_is_a_miss() -> None:
    x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0, 1.0])
    assert time_to_target(x, y, 0.5, budget=1.5) == TimeToTarget(1.5, False)


def reached(*times: float) -> list[TimeToTarget]:
    return [TimeToTarget(time, True) for time in times]


def missed(*times: float) -> list[TimeToTarget]:
    return [TimeToTarget(time, False) for time in times]


def test_weighted_sum_by_hand() -> None:
    groups = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 8.0])]  # variances of the means 1/3 and 4
    interval = weighted_sum(groups, [0.5, 0.5])
    total = (1 / 3 + 4) / 4
    freedom = total**2 / ((1 / 12) ** 2 / 2 + 1**2 / 1)
    assert interval.mean == 4.0
    assert interval.half_width == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(total))
    assert interval.n == 2


def test_restricted_mean_counts_a_miss_with_the_budget() -> None:
    assert restricted_mean([*reached(2.0, 4.0), *missed(9.0)]).mean == 5.0


def test_a_time_with_a_miss_is_a_lower_bound_without_limits() -> None:
    for times in ([*reached(2.0, 4.0), *missed(9.0)], missed(9.0, 9.0, 9.0)):
        interval = restricted_mean(times)
        assert interval.n == 3
        assert all(map(math.isnan, (interval.low, interval.high, interval.half_width)))
    assert restricted_mean(reached(2.0, 4.0, 9.0)) == t_interval([2.0, 4.0, 9.0])


def test_a_shorter_horizon_censors_what_came_later() -> None:
    assert clip_times([*reached(2.0, 8.0), *missed(10.0)], 5.0) == [*reached(2.0), *missed(5.0, 5.0)]


@pytest.mark.parametrize(
    ("faster", "slower", "ratio", "bound", "hits"),
    [
        (reached(1.0, 3.0), reached(6.0, 10.0), 4.0, "", (2, 2, 2, 2)),
        (reached(1.0, 3.0), [*reached(6.0), *missed(10.0)], 4.0, "≥", (2, 2, 1, 2)),
        ([*reached(2.0), *missed(6.0)], reached(8.0, 8.0), 2.0, "≤", (1, 2, 2, 2)),
        (reached(2.0), reached(4.0), 2.0, "", (1, 1, 1, 1)),
    ],
)
def test_speed_up_by_hand(
    faster: list[TimeToTarget], slower: list[TimeToTarget], ratio: float, bound: str, hits: tuple[int, ...]
) -> None:
    found = speed_up([faster], [slower])
    assert found.ratio.mean == pytest.approx(ratio)
    assert (found.bound, found.reached) == (bound, hits)
    assert math.isnan(found.ratio.low) is (len(faster) == 1)


@pytest.mark.parametrize("faster", [missed(9.0, 9.0), [*reached(1.0), *missed(9.0)], reached(0.0, 0.0)])
def test_no_speed_up_where_both_miss_or_a_time_is_zero(faster: list[TimeToTarget]) -> None:
    found = speed_up([faster], [missed(9.0, 9.0)])
    assert (found.bound, found.defined) == ("n/a", False)
    assert math.isnan(found.ratio.mean)


def test_speed_up_over_tasks_is_the_geometric_mean() -> None:
    found = speed_up([reached(1.0, 1.0), reached(5.0, 5.0)], [reached(8.0, 8.0), reached(10.0, 10.0)])
    assert found.ratio.mean == pytest.approx(4.0)  # sqrt(8 * 2)
    many = speed_up([reached(*[1.0] * 12), reached(5.0, 5.0)], [reached(8.0, 8.0), reached(10.0, 10.0)])
    assert (many.ratio.low, many.ratio.mean, many.ratio.high) == pytest.approx((4.0, 4.0, 4.0))


def test_the_smallest_cell_decides_between_student_and_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    small, large, other = (generator.gamma(25, 1 / 25, runs) for runs in (3, 11, 11))
    assert aggregate([small, large]) == ("mean", weighted_sum([small, large], [0.5, 0.5]))
    assert aggregate([other, large]) == ("mean", bootstrap([other, large], mean_of_tasks))
    spread = weighted_sum([small / small.mean(), large / large.mean()], [-1, 1])
    ratio = speed_up([reached(*small)], [reached(*large)]).ratio
    assert math.log(ratio.high / ratio.mean) == pytest.approx(spread.high)
    drawn = bootstrap([other, large], lambda parts: np.log(parts[1].mean(axis=-1) / parts[0].mean(axis=-1)))
    assert math.log(speed_up([reached(*other)], [reached(*large)]).ratio.high) == pytest.approx(drawn.high)


def covers(measured: float, covered: int, trials: int) -> bool:
    """Whether a simulated coverage is within four standard errors of the measured one that is stated."""
    return abs(covered / trials - measured) <= 4 * math.sqrt(measured * (1 - measured) / trials)


@pytest.mark.parametrize(("runs", "measured"), [((3, 3), 0.965), ((8, 8), 0.95), ((3, 11), 0.94)])
def test_coverage_of_the_speed_up(runs: tuple[int, int], measured: float) -> None:
    """With 3 and 11 runs the bootstrap covers 83%."""
    generator, trials, covered = np.random.default_rng(runs), 2_000, 0
    for _ in range(trials):  # times of mean 2 and 6, coefficient of variation 0.2
        fast, slow = (mean * generator.gamma(25, 1 / 25, n) for mean, n in zip((2.0, 6.0), runs, strict=True))
        ratio = speed_up([reached(*fast)], [reached(*slow)]).ratio
        covered += ratio.low <= 3.0 <= ratio.high
    assert covers(measured, covered, trials)


@pytest.mark.parametrize("runs", [3, 5])
def test_where_only_the_slower_misses_the_lower_limit_is_one_of_the_whole_ratio(runs: int) -> None:
    generator, trials, covered, seen = np.random.default_rng(runs), 1_000, 0, 0
    for _ in range(trials):  # medians 2 and 6, a budget of 5.6 that 6 runs in 10 of the slower method exceed
        fast, slow = (median * np.exp(generator.normal(0, 0.3, runs)) for median in (2.0, 6.0))
        censored = [TimeToTarget(min(time, 5.6), bool(time <= 5.6)) for time in slow]
        found = speed_up([reached(*fast)], [censored])
        seen += found.bound == "≥"
        covered += found.bound == "≥" and found.ratio.low <= 3.0
    assert seen > 900
    assert covered / seen >= 0.975


def test_bootstrap_resamples_whole_runs_within_groups() -> None:
    groups = [np.array([[1.0, 10.0], [2.0, 20.0]]), np.array([[5.0, 50.0], [5.0, 50.0]])]

    def check(parts: Sequence[Array]) -> Array:
        for part in parts:
            np.testing.assert_array_equal(part[..., 1], 10 * part[..., 0])  # a run keeps all that belongs to it
        assert set(np.unique(parts[0][..., 0])) <= {1.0, 2.0}
        assert set(np.unique(parts[1][..., 0])) == {5.0}
        return np.asarray(parts[0][..., 0].mean(axis=-1) + parts[1][..., 0].mean(axis=-1))

    interval = bootstrap(groups, check)
    assert interval == Interval(6.5, 6.0, 7.0, 2)  # means of two draws: 1, 1.5, 2, a quarter of them at each end
    assert bootstrap(groups, check) == interval  # a generator of its own
    assert math.isnan(bootstrap([np.array([1.0])], lambda parts: parts[0].mean(axis=-1)).low)


def test_bootstrap_agrees_with_the_normal_limit() -> None:
    values = np.random.default_rng(3).normal(size=400)
    interval = bootstrap([values], mean_of_tasks)
    assert interval.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.04)


def test_coverage_of_the_bootstrap_over_tasks() -> None:
    generator, trials, covered = np.random.default_rng(0), 400, 0
    for _ in range(trials):
        tasks = [generator.normal(mean, 0.1, 20) for mean in (0.2, 0.6)]
        interval = bootstrap(tasks, mean_of_tasks, resamples=500)
        covered += interval.low <= 0.4 <= interval.high
    assert 0.90 <= covered / trials <= 0.98


def test_coverage_of_the_bootstrap_from_eleven_runs_on() -> None:
    """The unexpanded percentiles cover 91%."""
    generator, trials, covered = np.random.default_rng(0), 2_000, 0
    for _ in range(trials):
        interval = bootstrap([generator.normal(0.4, 0.1, 11)], mean_of_tasks, resamples=500)
        covered += interval.low <= 0.4 <= interval.high
    assert covers(0.95, covered, trials)


@pytest.mark.parametrize(("runs", "measured"), [((3, 11), 0.93), ((5, 11), 0.945), ((3, 3), 0.96), ((11, 3, 5), 0.94)])
def test_coverage_of_the_mean_over_tasks_of_unequal_runs(runs: tuple[int, ...], measured: float) -> None:
    """With 3 and 11 runs the bootstrap covers 83%."""
    generator, trials, covered = np.random.default_rng(runs), 2_000, 0
    for _ in range(trials):
        _, interval = aggregate([generator.normal(0.2 * task, 0.1, n) for task, n in enumerate(runs)])
        covered += interval.low <= 0.1 * (len(runs) - 1) <= interval.high
    assert covers(measured, covered, trials)


@pytest.mark.parametrize(("means", "measured"), [([0.5] * 4, 0.95), ([0.2, 0.4, 0.6, 0.8], 0.96)])
def test_coverage_of_the_interquartile_mean(means: list[float], measured: float) -> None:
    """The percentile bootstrap covers 92% of the first and 87% of the second."""
    generator, trials, covered = np.random.default_rng(5), 2_000, 0
    for _ in range(trials):
        kind, interval = aggregate([generator.normal(mean, 0.05, 5) for mean in means])
        covered += interval.low <= 0.5 <= interval.high
    assert kind == "interquartile mean"
    assert covers(measured, covered, trials)


def test_coverage_of_the_interquartile_mean_of_skewed_runs() -> None:
    generator, trials, covered = np.random.default_rng(5), 2_000, 0

    def draw(runs: int) -> list[Array]:
        tasks = ((0.06, 0.07), (0.16, 0.07), (0.33, 0.035), (0.32, 0.14))  # start and scale
        return [start + scale * generator.gamma(2, 1, runs) for start, scale in tasks]

    truth = interquartile_mean(draw(100_000)).mean
    for _ in range(trials):
        interval = interquartile_mean(draw(5))
        covered += interval.low <= truth <= interval.high
    assert covers(0.925, covered, trials)


@pytest.mark.parametrize(("runs", "shape", "measured"), [(3, 25, 0.95), (5, 25, 0.95), (5, 4, 0.93)])
def test_coverage_of_the_time_to_a_target_that_all_runs_reach(runs: int, shape: int, measured: float) -> None:
    generator, trials, covered = np.random.default_rng(runs), 2_000, 0
    for _ in range(trials):  # coefficient of variation 0.2 and 0.5
        interval = restricted_mean(reached(*(2.0 * generator.gamma(shape, 1 / shape, runs))))
        covered += interval.low <= 2.0 <= interval.high
    assert covers(measured, covered, trials)


@pytest.mark.parametrize("runs", [3, 5])
def test_coverage_of_the_mean_over_tasks(runs: int) -> None:
    generator, trials, covered = np.random.default_rng(runs), 2_000, 0
    for _ in range(trials):
        kind, interval = aggregate([generator.normal(mean, spread, runs) for mean, spread in ((0.2, 0.1), (0.6, 0.05))])
        covered += interval.low <= 0.4 <= interval.high
    assert kind == "mean"
    assert 0.935 <= covered / trials <= 0.975


def test_prompts_are_not_runs() -> None:
    """Resampling the prompts of a run says nothing of the spread over seeds: it covers far less than it states."""
    generator, trials, covered = np.random.default_rng(0), 200, 0
    for _ in range(trials):
        score = generator.normal(0.5, 0.05)  # a run's true score, seeds apart by 0.05
        prompts = generator.normal(score, 0.2, 100)
        interval = PromptBootstrap(["t"] * 100, [1] * 100, resamples=300).interval(prompts)
        covered += interval.low <= 0.5 <= interval.high
    assert covered / trials < 0.8


def test_the_interquartile_mean_needs_four_tasks_of_five_runs() -> None:
    five, task = np.arange(5.0), [0.0, 1.0, 2.0, 3.0, 4.0]
    assert aggregate([task] * 3)[0] == "mean"
    assert aggregate([task] * 3 + [task[:4]])[0] == "mean"
    kind, interval = aggregate([five, five, five, [0.0, 1.0, 2.0, 3.0, 400.0]])
    assert kind == "interquartile mean"
    # by hand: of 20 values the 5 lowest (0000 1) and 5 highest (400 444 3) go; 111 2222 333 remain
    assert interval.mean == pytest.approx((3 * 1 + 4 * 2 + 3 * 3) / 10)


def test_interval_of_the_interquartile_mean_by_hand() -> None:
    """Winsorised to the middle half every task is 1 1 2 3 3: squares 2 + 2 + 2 * 4 / 4 = 4, variance 1; 10 - 4 free."""
    interval = interquartile_mean([np.arange(5.0)] * 3 + [np.array([0.0, 1.0, 2.0, 3.0, 400.0])])
    assert (interval.mean, interval.n) == (2.0, 5)
    assert interval.half_width == pytest.approx(2.446912 * math.sqrt(4 * 5 * 1) / 10)  # a table's t for six
    same = interquartile_mean([np.full(5, 0.4)] * 4)
    assert (same.low, same.high) == pytest.approx((0.4, 0.4))
    assert not same.above(0)
    assert math.isnan(interquartile_mean([np.arange(5.0)] * 3 + [np.array([2.0])]).low)
    assert math.isnan(interquartile_mean([np.arange(2.0)] * 4).low)  # four kept, four tasks


def test_probability_of_improvement_by_hand() -> None:
    assert improvement([3.0, 1.0], [2.0, 1.0]) == (1 + 1 + 0 + 0.5) / 4
    a, b = [0.3, 0.5, 0.9, 0.2], [0.4, 0.1, 0.3]
    assert improvement(a, b) == pytest.approx(stats.mannwhitneyu(a, b).statistic / 12)
    both = probability_of_improvement([[3.0, 1.0], [0.0, 0.0]], [[2.0, 1.0], [1.0, 1.0]])
    assert both.mean == (0.625 + 0) / 2
    assert math.isnan(probability_of_improvement([[1.0]], [[0.0]]).low)


def test_three_runs_that_all_win_are_no_certainty() -> None:
    interval = probability_of_improvement([[1.0, 2.0, 3.0]], [[0.0, 0.1, 0.2]])
    assert (interval.mean, interval.high) == (1.0, 1.0)
    # the lower limit solves (1 - p)^2 = z^2 p (1 - p) (1 + 2 ((1 - p) / (2 - p) + p / (1 + p))) / 9
    p = interval.low
    spread = p * (1 - p) * (1 + 2 * ((1 - p) / (2 - p) + p / (1 + p))) / 9
    assert (1 - p) ** 2 == pytest.approx(1.959964**2 * spread, rel=1e-5)
    assert 0.4 < p < 0.6
    mirrored = probability_of_improvement([[0.0, 0.1, 0.2]], [[1.0, 2.0, 3.0]])
    assert (mirrored.low, mirrored.high) == pytest.approx((0.0, 1 - p))


@pytest.mark.parametrize(("runs", "effects"), [(3, [0.8]), (5, [0.8]), (5, [0.8] * 3), (5, [0.0, 0.8, 2.0])])
def test_coverage_of_the_probability_of_improvement(runs: int, effects: list[float]) -> None:
    generator, trials, covered = np.random.default_rng(runs), 600, 0
    truth = np.mean(stats.norm.cdf(np.array(effects) / math.sqrt(2)))
    for _ in range(trials):
        first = [generator.normal(effect, 1, runs) for effect in effects]
        interval = probability_of_improvement(first, [generator.normal(0, 1, runs) for _ in effects])
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / trials <= 0.995


def test_sign_count() -> None:
    assert sign_count({0: 0.5, 1: 0.3, 2: 0.4, 9: 1.0}, {0: 0.4, 1: 0.3, 2: 0.9, 7: 0.0}) == Signs(1, 1, 3)


def test_performance_profile_by_hand() -> None:
    times = [[1.0, 4.0, math.inf, 3.0], [2.0, 2.0, math.inf, math.inf]]
    found = performance_profile(times, [1.0, 2.0, 10.0])
    np.testing.assert_allclose(found, [[0.5, 0.75, 0.75], [0.25, 0.5, 0.5]])


def test_the_prompt_bootstrap_keeps_tags_and_weighs_images() -> None:
    tags, images = ["a", "b", "a"], [2, 1, 1]
    constant_within_tags = PromptBootstrap(tags, images).interval([1.0, 1.0, 5.0, 1.0])
    assert constant_within_tags == Interval(3.0, 3.0, 3.0, 3)  # tags are means of 1 and 5, drawn within themselves
    # tag a: prompts of 2 and 1 images; drawn twice each: (0, 0), (0, 2), (2, 0), (2, 2) have means 0, 2/3, 2/3, 2
    spread = PromptBootstrap(tags, images).interval([0.0, 0.0, 5.0, 2.0])
    assert (spread.mean, spread.low, spread.high) == pytest.approx(((2 / 3 + 5) / 2, 2.5, 3.5))


def test_differences_within_a_run_are_paired_by_prompt() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=60)
    interval = PromptBootstrap(["a"] * 30, [2] * 30).interval(base + 0.25, base)
    assert (interval.low, interval.high) == pytest.approx((0.25, 0.25))
    with pytest.raises(ValueError, match="expected 60 values, one an image, got 59"):
        PromptBootstrap(["a"] * 30, [2] * 30).interval(base[:59])


def test_coverage_of_the_prompt_bootstrap() -> None:
    generator, trials, covered = np.random.default_rng(1), 300, 0
    tags = ["a"] * 30 + ["b"] * 30
    for _ in range(trials):  # a prompt's own level and two images each
        scores = np.repeat(generator.normal(0.4, 0.3, 60), 2) + generator.normal(0, 0.1, 120)
        interval = PromptBootstrap(tags, [2] * 60, resamples=300, seed=int(generator.integers(1 << 30))).interval(
            scores
        )
        covered += interval.low <= 0.4 <= interval.high
    assert 0.91 <= covered / trials <= 0.98
