"""Intervals hold the truth as often as they say, at the sizes and tails of the report itself."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.claims.interval_coverage import kinds
from experiments.report.intervals import (
    Distance,
    Exact,
    Mean,
    Quantile,
    Share,
    variance,
)

SEED = 7
"""Fixed before the tests were first run."""

LEVEL = 0.1

INTERVALS = {
    "mean of a few": (lambda r: Mean.of_normal(r.normal(3, 2, 16)), 3),
    "mean": (lambda r: Mean.of(r.exponential(1, 200)), 1),
    "variance": (lambda r: variance(r.uniform(0, 1, 400)), 1 / 12),
    "variance about 0": (lambda r: variance(r.laplace(0, 1, 1000), mean=0.0), 2),
    "median": (lambda r: Quantile(r.exponential(1, 51), 0.5), math.log(2)),
    "quantile": (lambda r: Quantile(r.normal(0, 1, 80), 0.1), stats.norm.ppf(0.1)),
    "share": (lambda r: Share(r.binomial(40, 0.3), 40), 0.3),
}


@pytest.mark.parametrize("measure, truth", INTERVALS.values(), ids=INTERVALS)
def test_intervals_hold_the_truth_as_often_as_they_say(measure, truth):
    random = np.random.default_rng(SEED)
    intervals = [measure(random).interval(LEVEL) for _ in range(2000)]
    held = np.mean([low <= truth <= high for _, low, high in intervals])
    # 2000 draws: three standard errors are 2 %; exact intervals of counts are a little wide
    assert 0.88 <= held <= 0.96


def test_a_long_tail_misses_no_more_often_than_it_says_on_either_side():
    """2,000 samples of the longest tail of the report, where Student's t is often too low."""
    random, count, level, pairs = np.random.default_rng(SEED), 2000, 1e-3, 10_000
    draw, _, truth = kinds()["mean, gradient of A2"]
    below = above = plain = 0
    for _ in range(pairs):
        mean = Mean.of(draw(random, count))
        _, low, high = mean.interval(level)
        below, above = below + (high < truth), above + (low > truth)
        plain += mean._replace(skewness=0.0).interval(level).high < truth
    # what is promised of each side lies in an interval of 99.9 % for its misses, or above it
    for misses in (below, above):
        assert Share(misses, pairs).interval(1e-3).low <= level / 2
    assert Share(plain, pairs).interval(1e-3).low > 2 * level / 2


def test_a_skewed_interval_is_student_s_where_there_is_no_skewness():
    samples = np.random.default_rng(SEED).normal(3, 2, 16)
    _, *ends = Mean.of_normal(samples).interval(0.05)
    expected = stats.ttest_1samp(samples, 0).confidence_interval(0.95)
    np.testing.assert_allclose(ends, expected, rtol=1e-12)
    tiny = Mean.of_normal(samples)._replace(skewness=1e-8).interval(0.05)
    np.testing.assert_allclose(tiny[1:], expected, rtol=1e-7)
    # and reaches farther to the side of the tail
    value, low, high = Mean.of(samples**4).interval(0.05)
    assert high - value > value - low > 0


def test_distributions_are_told_from_a_given_one_as_often_as_is_said():
    random, law = np.random.default_rng(SEED), stats.laplace()
    distances = [Distance.of(random.laplace(0, 1, 200), law) for _ in range(1000)]
    held = np.mean([distance.interval(LEVEL).low <= 0 for distance in distances])
    assert held >= 1 - LEVEL - 0.03
    other = Distance.of(random.normal(0, math.sqrt(2), 20_000), law)
    assert other.interval(1e-5).low > 0


def test_intervals_at_the_ends():
    assert Share(0, 10).interval(0.01)[:2] == (0.0, 0.0)
    assert Share(10, 10).interval(0.01)[::2] == (1.0, 1.0)
    few = Quantile(np.arange(3.0), 0.5).interval(1e-6)
    assert (few.low, few.high) == (-math.inf, math.inf)
    assert Exact(2.0, 0.5).interval(0.1) == (2.0, 1.5, 2.5)
    # samples that are all alike
    assert Mean.of(np.ones(5)).interval(0.1) == (1.0, 1.0, 1.0)


def test_a_measurement_is_a_row_of_an_array():
    random = np.random.default_rng(SEED)
    for measured in (Mean.of(random.exponential(1, 50)), Share.of(random.random(50) < 0.3)):
        again = type(measured)(*np.array(measured))
        assert again.interval(0.01) == measured.interval(0.01)
