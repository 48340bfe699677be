"""Verdicts follow from evidence, and intervals and quadrature are right."""

import math

import numpy as np
import pytest
from scipy import special

from experiments.report import evidence as claims
from experiments.report.evidence import (
    Claim,
    Estimate,
    Evidence,
    above,
    below,
    equal,
    judge,
    known,
    measured,
)

YES = measured("", 1.0, Estimate(1.1, 0.9, 1.3), 2.0)
NO = measured("", 2.0, Estimate(1.1, 0.9, 1.3), 1.0)
CANNOT_TELL = measured("", 1.0, Estimate(1.1, 0.0, 3.0), 2.0)

SEED = 7
"""Fixed before the tests were first run."""


@pytest.mark.parametrize(
    "evidence, status",
    [
        (YES, "supported"),
        (NO, "contradicted"),
        (CANNOT_TELL, "undecided"),
        (measured("", 1.0, Estimate(1.0, 0.5, 2.0)), "supported"),
        (measured("", math.nan, Estimate(1.0, 0.5, 2.0)), "undecided"),
        (measured("", 1.0, Estimate(math.nan, math.nan, math.nan)), "undecided"),
        (measured("", 1.0, Estimate(1.0, -math.inf, math.inf), 2.0), "undecided"),
        (equal("", 0, 1e-13, 1e-12), "supported"),
        (equal("", 0, 1e-11, 1e-12), "contradicted"),
        (equal("", 3, 3, 0.0), "supported"),
        (above("", 0, Estimate(0.2, 0.1, 0.3)), "supported"),
        (above("", 0, Estimate(0.2, -0.1, 0.5)), "undecided"),
        (above("", 0, Estimate(-0.2, -0.5, 0.1)), "undecided"),
        (above("", 0, Estimate(-0.2, -0.3, -0.1)), "contradicted"),
        (above("", 0, Estimate(0.2, 0.0, 0.4)), "undecided"),
        (above("", 0, known(math.nan)), "undecided"),
        (above("", math.nan, known(1)), "undecided"),
        (below("", 1, known(0.9)), "supported"),
        (below("", 1, known(1)), "undecided"),
        (below("", 1, known(1.1)), "contradicted"),
        (below("", 1, known(0.9, 0.2)), "undecided"),
        (below("", 1, Estimate(2.0, 1.5, math.inf)), "contradicted"),
    ],
)
def test_evidence_is_judged_by_prediction_rival_and_width(evidence, status):
    assert evidence.status == status


@pytest.mark.parametrize(
    "right, others, verdict",
    [
        ([YES], {}, "holds"),
        ([], {}, "undecided"),
        ([YES, NO, CANNOT_TELL], {}, "fails"),
        ([YES, CANNOT_TELL], {}, "undecided"),
        ([YES], {"printed": [NO]}, "holds as corrected"),
        ([YES], {"printed": [YES, NO]}, "holds as corrected"),
        ([YES], {"printed": [YES]}, "undecided"),
        ([YES], {"printed": [CANNOT_TELL]}, "undecided"),
        ([NO], {"printed": [NO]}, "fails"),
        ([YES], {"beyond": [NO]}, "holds only under a stated condition"),
        ([YES], {"beyond": [YES]}, "undecided"),
        ([YES], {"printed": [NO], "beyond": [NO]}, "holds as corrected"),
        ([CANNOT_TELL], {"beyond": [NO]}, "undecided"),
        ([YES, above("", 0, known(1)), below("", 0, known(-1))], {}, "holds"),
        ([YES, above("", 0, known(-1))], {}, "fails"),
        ([YES, below("", 0, known(1))], {}, "fails"),
        ([YES], {"printed": [above("", 0, known(-1))]}, "holds as corrected"),
    ],
)
def test_the_verdict_follows_from_the_evidence(right, others, verdict):
    assert judge(right, **others) == verdict


def test_the_level_is_shared_by_the_claims_of_the_notes():
    assert claims.LEVEL * 27 == pytest.approx(0.01)
    assert claims.share(10) * 10 == pytest.approx(claims.LEVEL)


def test_a_claim_as_a_table_has_its_headline_and_all_evidence():
    table = Claim("A1", "x", "criterion", (YES, YES), printed=(NO,)).table()
    assert table["verdict"] == "holds as corrected"
    assert [table["predicted"], table["measured"], table["interval"]] == [1.0, 1.1, [0.9, 1.3]]
    assert [e["group"] for e in table["evidence"]] == ["right", "right", "printed"]
    assert table["relation"] == "="


def test_an_inequality_as_a_table_has_the_bound_and_not_the_measurement_as_prediction():
    table = Claim("V6", "x", "", (above("gain", 0, Estimate(0.2, 0.1, 0.3)),)).table()
    assert [table[key] for key in ("relation", "predicted", "measured")] == [">", 0.0, 0.2]
    assert table["evidence"][0]["relation"] == ">" and table["evidence"][0]["rival"] is None


def coverage(interval, truth: float, draws: int = 2000) -> float:
    random = np.random.default_rng(SEED)
    estimates = [interval(random) for _ in range(draws)]
    return float(np.mean([low <= truth <= high for _, low, high in estimates]))


INTERVALS = {
    "mean": (lambda r: claims.mean_interval(r.normal(3, 2, 20), 0.1), 3),
    "variance of a normal": (lambda r: claims.normal_variance_interval(r.normal(3, 2, 9), 0.1), 4),
    "variance": (lambda r: claims.variance_interval(r.uniform(0, 1, 400), 0.1), 1 / 12),
    "median": (lambda r: claims.quantile_interval(r.exponential(1, 51), 0.5, 0.1), math.log(2)),
    "quantile": (lambda r: claims.quantile_interval(r.normal(0, 1, 80), 0.1, 0.1), -1.2815515655),
    "share": (lambda r: claims.share_interval(int(r.binomial(40, 0.3)), 40, 0.1), 0.3),
}


@pytest.mark.parametrize("interval, truth", INTERVALS.values(), ids=INTERVALS)
def test_intervals_hold_the_truth_as_often_as_they_say(interval, truth):
    # 2000 draws: three standard errors are 2 %; exact intervals of counts are a little wide
    assert 0.88 <= coverage(interval, truth) <= 0.96


def test_intervals_at_the_ends():
    assert claims.share_interval(0, 10, 0.01)[:2] == (0.0, 0.0)
    assert claims.share_interval(10, 10, 0.01)[::2] == (1.0, 1.0)
    few = claims.quantile_interval(np.arange(3.0), 0.5, 1e-6)
    assert (few.low, few.high) == (-math.inf, math.inf)


def test_quadrature_of_polynomials_conditions_and_steep_functions():
    assert claims.normal_moments(lambda x: x, 1.0, 0.5) == pytest.approx((1, 0.5), rel=1e-12)
    half = claims.normal_expectation(lambda x: x, low=0)
    assert half == pytest.approx(math.sqrt(2 / math.pi), rel=1e-12)
    steep = claims.normal_expectation(lambda x: special.expit(300 * x))
    assert steep == pytest.approx(0.5, rel=1e-12)


def test_evidence_is_plain_numbers():
    evidence = measured("", np.array(1.0), Estimate(*np.array([1.0, 0.0, 2.0])), np.array(3.0))
    assert all(type(x) is float for x in evidence[1:6]) and isinstance(evidence, Evidence)
