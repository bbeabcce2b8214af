"""Intervals against SciPy's binomial distribution, and against many samples of which the medians are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from glassine.runtime.bench.statistics import MIN_RUNS, drift, median_interval, quartiles, ratio_of_medians, warnings


@pytest.mark.parametrize("count", [8, 9, 10, 11, 20, 37, 100, 1000])
def test_the_interval_is_the_narrowest_that_reaches_its_level(count):
    low, high = median_interval(list(range(1, count + 1)))
    k = low
    assert high == count + 1 - k
    misses = 2 * stats.binom.cdf([k - 1, k], count, 0.5)
    assert 1 - misses[0] >= 0.975
    assert 1 - misses[1] < 0.975


def test_ten_runs_are_the_fewest_that_leave_out_the_extremes():
    reach = {count: median_interval(list(range(1, count + 1)))[0] for count in range(1, 15)}
    assert min(count for count, low in reach.items() if low > 1) == MIN_RUNS


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(5)
    held = narrow = 0
    for _ in range(1000):
        # Skewed, as times are; the medians differ by a factor of 1.2.
        theirs = 1 + random.exponential(0.05, 20)
        ours = 1.2 * (1 + random.exponential(0.05, 30))
        ratio = ratio_of_medians(ours.tolist(), theirs.tolist())
        held += ratio.low <= 1.2 <= ratio.high
        narrow += ratio.high / ratio.low < 1.15
        assert ratio.value == pytest.approx(np.median(ours) / np.median(theirs))
    assert held >= 980  # measured 999: wider than the 95 % that it promises
    assert narrow >= 900  # measured 946: yet not so wide that it says nothing


def test_no_difference_is_seen_where_there_is_none_and_one_where_there_is():
    samples = [1.0, 1.01, 0.99, 1.02, 0.98] * 4
    assert not ratio_of_medians(samples, samples).differs
    assert not ratio_of_medians([1.005 * one for one in samples], samples).differs
    assert ratio_of_medians([1.1 * one for one in samples], samples).differs


def test_quartiles_are_numpy_s():
    samples = [5.0, 1.0, 4.0, 2.0, 9.0, 7.0, 3.0]
    assert quartiles(samples) == pytest.approx(tuple(np.quantile(samples, [0.25, 0.75])))
    assert quartiles([3.0, 1.0]) == (1.0, 3.0)


def test_warnings_say_what_is_wrong_with_a_series():
    steady = [1.0, 1.01, 0.99, 1.02, 0.98] * 4
    assert warnings(steady) == ()
    assert warnings([*steady, 9.0]) == ()  # one accident is no spread
    assert warnings([1.0, 1.2] * 10) == ("the quartiles are 18% of the median apart",)
    slowing = [1.0] * 10 + [1.08] * 10
    assert drift(slowing) == pytest.approx(0.08)
    assert warnings(slowing) == ("the second half was 8% slower than the first",)
    assert warnings(slowing[::-1]) == ("the second half was 7% faster than the first",)
    assert drift([1.0]) == 0.0
