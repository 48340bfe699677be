"""X6: whether this report's own intervals miss as seldom as they promise.

Each kind of interval is made many times, of samples like those that the report rests on, from a law
whose true value is known; how often it misses is counted. The laws are

    gradient of A2      p(1 − p)|g|√(2d) with p = σ(√d Δ), d = 4096: the longest tail, skewness 6.4
    weight of A8        σ(β(γ − 1)), γ ~ N(1, ½), β = 10, whose values crowd at 0 and 1; its mean
                        and its variance
    accuracies of V3    normal, of 16 trainings
    median, share and distribution, of samples whose law does not matter
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from scipy import special, stats

from experiments.engine import memory
from experiments.engine.config import Samples, Seed, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, below
from experiments.report.intervals import Distance, Mean, Quantile, Share, variance
from experiments.report.quadrature import normal_moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "X6": "The intervals of this report miss as seldom as they promise",
}

WIDTH = 4096
"""d of A2's gradient."""

TIE = 0.53
"""Mean of an exponential gap Δ: with it near-ties are about as frequent as among 16 logits."""

BETA = 10.0
"""β of A8's weight."""

TRAININGS = 16

SLACK = 1.5
"""Misses of up to so many times the promised share are few enough."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the samples."""
    level: Annotated[float, Field(ge=1e-4, le=0.5)] = 0.05
    """The promised share of misses."""
    repetitions: Samples = 4000
    """Intervals of each kind."""
    samples: Size = 2000
    """Samples of each interval, but of trainings, which are 16."""


TINY = Config(level=0.1, repetitions=2000, samples=500)


class Result(NamedTuple):
    """By kind, in the order of `kinds`."""

    misses: np.ndarray
    """A `Share` of each."""
    above: np.ndarray
    """Intervals that lie above the true value, of the misses."""
    scores: dict[str, float]


class Kind(NamedTuple):
    """How an interval is come by, and the value that it should hold."""

    draw: Callable[[np.random.Generator, int], np.ndarray]
    measure: Callable[[np.ndarray], Any]
    truth: float


def _ties(random: np.random.Generator, number: int) -> np.ndarray:
    p = special.expit(math.sqrt(WIDTH) * random.exponential(TIE, number))
    return p * (1 - p) * np.abs(random.normal(0, math.sqrt(2), number)) * math.sqrt(2 * WIDTH)


def _weights(random: np.random.Generator, number: int) -> np.ndarray:
    return special.expit(BETA * random.normal(0, math.sqrt(0.5), number))


def kinds() -> dict[str, Kind]:
    """Each kind of interval, by what it is of."""
    # √d Δ is exponential
    gap = np.linspace(0, 40, 400_001)
    rate = 1 / (TIE * math.sqrt(WIDTH))
    slope = special.expit(gap) * special.expit(-gap) * rate * np.exp(-rate * gap)
    tie_mean = float(np.trapezoid(slope, gap)) * 2 / math.sqrt(math.pi) * math.sqrt(2 * WIDTH)
    mean, spread = normal_moments(lambda x: special.expit(BETA * x), 0.0, 0.5)
    normal = lambda random, number: random.standard_normal(number)
    return {
        "mean, gradient of A2": Kind(_ties, Mean.of, tie_mean),
        "mean, weight of A8": Kind(_weights, Mean.of, mean),
        "variance, weight of A8": Kind(_weights, variance, spread),
        f"mean of {TRAININGS} trainings": Kind(
            lambda random, _: random.standard_normal(TRAININGS), Mean.of_normal, 0.0
        ),
        "median": Kind(normal, lambda x: Quantile(x, 0.5), 0.0),
        "share": Kind(normal, lambda x: Share.of(x > 1.0), float(stats.norm.sf(1.0))),
        "distance from the true distribution": Kind(
            normal, lambda x: Distance.of(x, stats.norm()), 0.0
        ),
    }


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the samples of an interval."""
    memory.check(10 * 8 * config.samples, "samples")


def run(config: Config, session: Session = SILENT) -> Result:
    """Make every interval many times, and count what it misses."""
    misses, above = [], []
    for number, kind in enumerate(kinds().values()):
        random = np.random.default_rng([config.seed, number])
        ends = np.array([
            kind.measure(kind.draw(random, config.samples)).interval(config.level)
            for _ in range(config.repetitions)
        ])  # fmt: skip
        over, under = ends[:, 1] > kind.truth, ends[:, 2] < kind.truth
        misses.append(Share.of(over | under))
        above.append(np.sum(over))
    return Result(
        misses=np.array(misses),
        above=np.array(above),
        scores={"most_misses": float(max(share.hits / share.number for share in misses))},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """X6, for each kind."""
    return (
        Claim(
            "X6",
            r"P(\text{the interval of level } \alpha \text{ misses}) \le \alpha",
            f"Of intervals of level {config.level:g}, made of samples like those that the report "
            f"rests on, no kind misses more than {SLACK:g} times as often as it promises.",
            right=tuple(
                below(f"misses of level {config.level:g}: {name}", SLACK * config.level,
                      Share(*row))
                for name, row in zip(kinds(), result.misses, strict=True)
            ),
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Misses by kind, on either side."""
    from experiments.figures import BLACK, BLUE, ORANGE, error_bars, new_figure

    figure = new_figure(9, 4)
    axes = figure.subplots()
    names = list(kinds())
    places = np.arange(len(names))
    shares = [Share(*row) for row in result.misses]
    over = result.above / result.misses[:, 1]
    both = result.misses[:, 0] / result.misses[:, 1]
    axes.bar(places, over, color=BLUE, label="interval above the true value")
    axes.bar(places, both - over, bottom=over, color=ORANGE, label="below it")
    error_bars(axes, places, shares, BLACK, "both, with its interval")
    axes.axhline(config.level, color=BLACK, linestyle="--", label="promised")
    axes.set_xticks(places, [name.replace(", ", ",\n") for name in names], fontsize=7)
    axes.set(xlabel="interval", ylabel=f"share of misses, level {config.level:g}")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    return figure
