import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alignbench.report.statistics import (
    Interval,
    TimeToTarget,
    interpolate,
    mean_over_budget,
    paired_difference,
    pointwise_interval,
    t_interval,
    time_to_target,
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
