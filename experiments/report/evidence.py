"""What a claim of the notes is, when it is measured: evidence, intervals and a verdict.

A `Claim` holds evidence, not a verdict: the verdict follows from the evidence by `judge`. Each
claim may be wrong with probability `LEVEL`, which it divides among its own intervals with `share`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

Verdict = Literal[
    "holds",
    "holds as corrected",
    "holds only under a stated condition",
    "fails",
    "undecided",
]

Relation = Literal["=", ">", "<"]
"""What is predicted of the true number: that it is the predicted one, above it or below it."""

Number = float | np.ndarray
"""A number, possibly as NumPy keeps it in a result: an array without axes."""

LEVEL = 0.01 / 27
"""Probability that any interval of a claim misses what it is an interval for. Those of 27 claims
hold together with 99 % (Bonferroni); the page says what it is for as many as it has."""


def share(intervals: int) -> float:
    """The level of each of so many intervals that a claim rests on."""
    return LEVEL / intervals


class Estimate(NamedTuple):
    """A measured number and the interval that holds the true one with the level's probability."""

    value: float
    low: float
    high: float


class Evidence(NamedTuple):
    """One measurement beside what theory predicts and what a rival theory does."""

    name: str
    """What was measured, in a few words and with the conditions that it was measured under."""
    predicted: float
    """What the statement says, computed; of an inequality, the bound."""
    measured: float
    low: float
    high: float
    rival: float | None = None
    """What holds if the statement does not: the printed value, no effect, …"""
    rival_name: str = ""
    relation: Relation = "="

    @property
    def status(self) -> Literal["supported", "contradicted", "undecided"]:
        """Whether the prediction lies in the interval, and the rival does not.

        An inequality has no rival: all of the interval has to lie beyond the bound, and none of it
        if the inequality is wrong.
        """
        numbers = (self.predicted, self.measured, self.low, self.high)
        if any(math.isnan(number) for number in numbers):
            return "undecided"
        over, under = self.low > self.predicted, self.high < self.predicted
        if self.relation == ">":
            right, wrong = over, under
        elif self.relation == "<":
            right, wrong = under, over
        else:
            right = self.rival is None or not self.low <= self.rival <= self.high
            wrong = over or under
        if wrong:
            return "contradicted"
        return "supported" if right else "undecided"


def known(value: Number, tolerance: float = 0.0) -> Estimate:
    """A value that is no statistic, but known up to a stated error of arithmetic."""
    value = float(value)
    return Estimate(value, value - tolerance, value + tolerance)


def measured(
    name: str,
    predicted: Number,
    estimate: Estimate,
    rival: Number | None = None,
    rival_name: str = "",
) -> Evidence:
    """Evidence from an estimate with an interval."""
    value, low, high = map(float, estimate)
    rival = None if rival is None else float(rival)
    return Evidence(name, float(predicted), value, low, high, rival, rival_name)


def equal(
    name: str,
    predicted: Number,
    value: Number,
    tolerance: float,
    rival: Number | None = None,
    rival_name: str = "",
) -> Evidence:
    """Evidence that is no statistic: the value is known up to a stated error of arithmetic."""
    return measured(name, predicted, known(value, tolerance), rival, rival_name)


def above(name: str, bound: Number, estimate: Estimate) -> Evidence:
    """Evidence that the true number is above a bound."""
    return measured(name, bound, estimate)._replace(relation=">")


def below(name: str, bound: Number, estimate: Estimate) -> Evidence:
    """Evidence that the true number is below a bound."""
    return measured(name, bound, estimate)._replace(relation="<")


def judge(
    right: Sequence[Evidence],
    *,
    printed: Sequence[Evidence] = (),
    beyond: Sequence[Evidence] = (),
) -> Verdict:
    """The verdict that follows from evidence.

    Args:
        right: for the statement as rnnattn has it: printed, or corrected, or under its condition.
        printed: for the statement as printed, where it was corrected.
        beyond: for the statement outside its condition, where it has one.
    Returns:
        "fails" if any of `right` is contradicted, else "undecided" if any of it cannot tell. With
        `printed`, "holds as corrected" if any of that is contradicted; with `beyond`, and nothing
        printed, "holds only under a stated condition" likewise; and "undecided" if none is, as
        nothing then shows that the correction or the condition is needed.
    """
    states = [evidence.status for evidence in right]
    if "contradicted" in states:
        return "fails"
    if not states or "undecided" in states:
        return "undecided"
    for others, verdict in (
        (printed, "holds as corrected"),
        (beyond, "holds only under a stated condition"),
    ):
        if others:
            needed = any(evidence.status == "contradicted" for evidence in others)
            return verdict if needed else "undecided"  # type: ignore[return-value]
    return "holds"


@dataclass(frozen=True)
class Claim:
    """One claim of the notes with the evidence for and against it.

    The first of `right` is the claim's headline: the numbers that its row of the report shows.
    """

    id: str
    equation: str
    """The statement that was tested, in LaTeX."""
    criterion: str
    """What the verdict rests on, in a sentence or two."""
    right: tuple[Evidence, ...]
    printed: tuple[Evidence, ...] = ()
    beyond: tuple[Evidence, ...] = ()
    note: str = ""
    """What a reader should take away that the numbers do not say: the correction, the condition."""

    @property
    def verdict(self) -> Verdict:
        return judge(self.right, printed=self.printed, beyond=self.beyond)

    def table(self) -> dict[str, Any]:
        """The claim as a JSON object."""
        first = self.right[0]
        groups = {"right": self.right, "printed": self.printed, "beyond": self.beyond}
        return {
            "id": self.id,
            "verdict": self.verdict,
            "equation": self.equation,
            "criterion": self.criterion,
            "note": self.note,
            "relation": first.relation,
            "predicted": first.predicted,
            "measured": first.measured,
            "interval": [first.low, first.high],
            "evidence": [
                {"group": group, **evidence._asdict(), "status": evidence.status}
                for group, several in groups.items()
                for evidence in several
            ],
        }


def mean_interval(samples: np.ndarray, level: float) -> Estimate:
    """The mean of independent samples, by Student's t.

    Exact for normal samples; else by the central limit theorem, so for thousands of samples whose
    tails are not heavy (bounded ones, as weights are, and polynomials of normals).
    """
    count = samples.size
    mean = float(np.mean(samples))
    error = float(np.std(samples, ddof=1)) / math.sqrt(count)
    reach = float(stats.t.isf(level / 2, count - 1)) * error
    return Estimate(mean, mean - reach, mean + reach)


def variance_interval(samples: np.ndarray, level: float, mean: float | None = None) -> Estimate:
    """The variance of independent samples: the mean of their squared deviations from the mean.

    The deviations are from `mean` where theory gives it, else from the samples' own; in the second
    case the bias of order 1/n is far below the interval. See `mean_interval` for when it is right.
    """
    centre = np.mean(samples) if mean is None else mean
    return mean_interval((samples - centre) ** 2, level)


def normal_variance_interval(samples: np.ndarray, level: float) -> Estimate:
    """The variance of independent normal samples, exactly, by χ²."""
    freedom = samples.size - 1
    variance = float(np.var(samples, ddof=1))
    low, high = freedom * variance / stats.chi2.isf([level / 2, 1 - level / 2], freedom)
    return Estimate(variance, float(low), float(high))


def quantile_interval(samples: np.ndarray, probability: float, level: float) -> Estimate:
    """A quantile of independent samples of any law: order statistics, exactly, by the binomial."""
    ordered = np.sort(samples)
    count = ordered.size
    # the number of samples below the true quantile is Binomial(count, probability)
    low = int(stats.binom.ppf(level / 2, count, probability)) - 1
    high = int(stats.binom.isf(level / 2, count, probability))
    value = float(np.quantile(ordered, probability))
    return Estimate(
        value,
        float(ordered[low]) if low >= 0 else -math.inf,
        float(ordered[high]) if high < count else math.inf,
    )


def share_interval(hits: int, count: int, level: float) -> Estimate:
    """The probability of what happened `hits` times of `count`, exactly (Clopper, Pearson 1934)."""
    low = float(stats.beta.ppf(level / 2, hits, count - hits + 1)) if hits else 0.0
    high = float(stats.beta.isf(level / 2, hits + 1, count - hits)) if hits < count else 1.0
    return Estimate(hits / count, low, high)


# solving for them costs more than any one integral
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def normal_expectation(
    function: Callable[[np.ndarray], np.ndarray],
    mean: float = 0.0,
    variance: float = 1.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """E[function(γ)] for γ ~ N(mean, variance), given low < γ < high, by quadrature.

    Gauss–Legendre of order 16 on 400 panels out to 12 standard deviations, which is exact to 1e-12
    for softmax weights with logits up to some hundreds. Gauss–Hermite is not: the poles of a steep
    softmax come near the real axis, and it knows no condition.
    """
    deviation = math.sqrt(variance)
    start, stop = max(low, mean - 12 * deviation), min(high, mean + 12 * deviation)
    edges = np.linspace(start, stop, 401)
    half = np.diff(edges)[:, None] / 2
    points = edges[:-1, None] + half * (1 + _NODES)
    mass = half * _WEIGHTS * stats.norm.pdf(points, mean, deviation)
    return float(np.sum(mass * function(points)) / np.sum(mass))


def normal_moments(
    function: Callable[[np.ndarray], np.ndarray],
    mean: float = 0.0,
    variance: float = 1.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[float, float]:
    """Mean and variance of function(γ), under the law of `normal_expectation`."""
    law = (mean, variance, low, high)
    centre = normal_expectation(function, *law)
    return centre, normal_expectation(lambda x: (function(x) - centre) ** 2, *law)
