"""Verdicts follow from evidence, and a claim divides its level among what it rests on."""

import math

import numpy as np
import pytest

from experiments.report import evidence as claims
from experiments.report.evidence import Claim, above, below, each, equal, judge
from experiments.report.intervals import Distance, Exact, Interval, Mean, Share


class Between(Interval):
    """A measurement whose interval is the same at every level."""

    def interval(self, level: float) -> Interval:
        return self


NAN, INF = math.nan, math.inf
NEAR = Between(1.1, 0.9, 1.3)
YES = equal("", 1.0, NEAR, 2.0)
NO = equal("", 2.0, NEAR, 1.0)
CANNOT_TELL = equal("", 1.0, Between(1.1, 0.0, 3.0), 2.0)


@pytest.mark.parametrize(
    "evidence, status",
    [
        (YES, "supported"),
        (NO, "contradicted"),
        (CANNOT_TELL, "undecided"),
        (equal("", 1.0, Between(1.0, 0.5, 2.0)), "supported"),
        (equal("", NAN, Between(1.0, 0.5, 2.0)), "undecided"),
        (equal("", 1.0, Between(NAN, NAN, NAN)), "undecided"),
        (equal("", 1.0, Between(1.0, -INF, INF), 2.0), "undecided"),
        # a rival that was not measured rules nothing out
        (equal("", 1.0, NEAR, NAN), "undecided"),
        (equal("", 0.0, Exact(0.0, 1e-12), np.array(NAN)), "undecided"),
        (equal("", 2.0, NEAR, NAN), "undecided"),
        # nor one that may be the same
        (equal("", 1.0, NEAR, Between(1.5, 1.4, 1.6)), "supported"),
        (equal("", 1.0, NEAR, Between(1.5, 1.2, 1.8)), "undecided"),
        (equal("", 1.0, NEAR, Between(0.8, 0.5, 0.95)), "undecided"),
        (equal("", 0, Exact(1e-13, 1e-12)), "supported"),
        (equal("", 0, Exact(1e-11, 1e-12)), "contradicted"),
        (equal("", 3, Exact(3)), "supported"),
        (above("", 0, Between(0.2, 0.1, 0.3)), "supported"),
        (above("", 0, Between(0.2, -0.1, 0.5)), "undecided"),
        (above("", 0, Between(-0.2, -0.5, 0.1)), "undecided"),
        (above("", 0, Between(-0.2, -0.3, -0.1)), "contradicted"),
        (above("", 0, Between(0.2, 0.0, 0.4)), "undecided"),
        (above("", 0, Exact(NAN)), "undecided"),
        (above("", NAN, Exact(1)), "undecided"),
        (below("", 1, Exact(0.9)), "supported"),
        (below("", 1, Exact(1)), "undecided"),
        (below("", 1, Exact(1.1)), "contradicted"),
        (below("", 1, Exact(0.9, 0.2)), "undecided"),
        (below("", 1, Between(2.0, 1.5, INF)), "contradicted"),
    ],
)
def test_evidence_is_judged_by_prediction_rival_and_width(evidence, status):
    assert evidence.judged(0.01).status == status


S, C, U = "supported", "contradicted", "undecided"


@pytest.mark.parametrize(
    "right, others, verdict",
    [
        ([S], {}, "holds"),
        ([], {}, "undecided"),
        ([S, C, U], {}, "fails"),
        ([S, U], {}, "undecided"),
        ([S], {"printed": [C]}, "holds as corrected"),
        # what is printed is wrong only if all of it is
        ([S], {"printed": [S, C]}, "undecided"),
        ([S], {"printed": [U, C]}, "undecided"),
        ([S], {"printed": [S]}, "undecided"),
        ([C], {"printed": [C]}, "fails"),
        ([S], {"beyond": [C]}, "holds only under a stated condition"),
        ([S], {"beyond": [C, S]}, "undecided"),
        ([S], {"printed": [C], "beyond": [C]}, "holds as corrected"),
        ([S], {"printed": [C], "beyond": [S]}, "undecided"),
        ([U], {"beyond": [C]}, "undecided"),
        ([S], {"in_notes": False}, "missing in the notes"),
        ([S], {"printed": [C], "in_notes": False}, "missing in the notes"),
        ([S], {"printed": [U], "in_notes": False}, "undecided"),
        ([C], {"in_notes": False}, "fails"),
    ],
)
def test_the_verdict_follows_from_the_evidence(right, others, verdict):
    assert judge(right, **others) == verdict


def claim(*right, **others) -> Claim:
    return Claim("A1", "x", "criterion", right, **others)


def test_a_claim_divides_its_level_among_what_was_measured_with_an_error():
    assert claims.LEVEL * claims.NOTES == pytest.approx(0.01)
    first, second = (Mean.of(np.arange(n, dtype=float)) for n in (10, 20))
    exact = equal("", 0, Exact(0.0))
    assert claim(exact, exact).level == claims.LEVEL
    assert claim(equal("", 0, first), exact).level == claims.LEVEL
    assert claim(equal("", 0, first), equal("", 1, second)).level == claims.LEVEL / 2
    # one number that is looked at twice, and a rival that was measured
    twice = claim(equal("", 0, first), printed=(equal("", 1, first),))
    assert twice.level == claims.LEVEL
    rival = claim(equal("", 0, first, second), beyond=(equal("", 0, Share(1, 2)),))
    assert rival.level == claims.LEVEL / 3
    (judged,) = rival.evidence["right"]
    assert judged[2:5] == first.interval(rival.level)
    assert judged.rival == second.value


def test_evidence_for_each_value_of_a_parameter():
    rows = each("d = {}", (1, 2), [1, 4], map(Exact, (1, 4)), [NAN, 1.0], "no square")
    assert [row.name for row in rows] == ["d = 1", "d = 2"]
    assert [row.predicted for row in rows] == [1.0, 4.0]
    assert [row.rival for row in rows] == [None, Exact(1.0)]
    assert [row.rival_name for row in rows] == ["", "no square"]
    assert claim(*rows).verdict == "holds"
    one_for_all = each("{}", "ab", 0, [Exact(0.0)] * 2, 1, "one")
    assert [row.rival for row in one_for_all] == [Exact(1.0)] * 2
    with pytest.raises(ValueError):
        each("{}", (1, 2), 0, [Exact(0.0)])


def test_a_claim_as_a_table_has_its_headline_and_all_evidence():
    table = claim(YES, YES, printed=(NO,)).table()
    assert table["verdict"] == "holds as corrected"
    assert [table["predicted"], table["measured"], table["interval"]] == [1.0, 1.1, [0.9, 1.3]]
    assert [e["group"] for e in table["evidence"]] == ["right", "right", "printed"]
    assert [e["status"] for e in table["evidence"]] == ["supported", "supported", "contradicted"]
    assert table["relation"] == "=" and table["level"] == claims.LEVEL


def test_an_inequality_as_a_table_has_the_bound_and_not_the_measurement_as_prediction():
    table = claim(above("gain", 0, Between(0.2, 0.1, 0.3))).table()
    assert [table[key] for key in ("relation", "predicted", "measured")] == [">", 0.0, 0.2]
    assert table["evidence"][0]["relation"] == ">" and table["evidence"][0]["rival"] is None


def test_what_is_judged_is_plain_numbers():
    distance = Distance(*np.array([0.1, 50.0]))
    judged = equal("", np.array(1.0), distance, np.float32(3.0)).judged(0.1)
    assert all(type(x) is float for x in judged[1:6])
