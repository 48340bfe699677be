"""The law of the inner product of two random vectors (A1).

q, k ∈ R^d with independent N(0, 1) entries. Given q, ⟨q, k⟩ is N(0, ‖q‖²); over both it has mean 0,
variance d and kurtosis 3 E‖q‖⁴ / (E‖q‖²)² = 3 + 6/d: normal only in the limit. At d = 2 its density
is Laplace's, ½ e^{−|x|}.

The raw fourth moment cannot see 6/d past d ≈ 64. The kurtosis at every d is therefore the mean of
3s², where s = ‖q‖²/d, which takes for granted that ⟨q, k⟩ given q is normal; from it 6(s − 1), of
mean exactly 0, is subtracted: the same mean with a standard deviation that falls like the 6/d that
it has to resolve.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from pydantic import Field
from scipy import stats

from experiments.engine import memory
from experiments.engine.config import Samples, Seed, Several, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, each, equal
from experiments.report.intervals import Distance, Mean, variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A1": "The inner product of two random vectors has variance d",
}

LAPLACE = 2
"""The width at which the whole law is tested."""

NORMAL = stats.norm(scale=LAPLACE**0.5)
"""The law that is printed, there."""

FOURTH = (4, 64)
"""Least and largest width whose raw fourth moment is looked at: the tails of narrower products are
too heavy for it, and 6/d of wider ones is too small."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the vectors."""
    widths: Several[Size] = (1, 4, 16, 64, 256, 1024, 4096)
    """Widths d of the vectors."""
    samples: Annotated[Samples, Field(ge=1000)] = 10_000
    """Pairs of vectors of each width from 256 on, and up to 16 times as many of the narrow ones,
    where the tails are heavy and the intervals, by the central limit theorem, need them."""


TINY = Config(widths=(1, 16, 256), samples=1000)


class Result(NamedTuple):
    """Moments of ⟨q, k⟩ by width, a `Mean` in each row, and what was drawn at width 2."""

    mean: np.ndarray
    variance: np.ndarray
    kurtosis_given_q: np.ndarray
    kurtosis: np.ndarray
    drawn: np.ndarray
    scores: dict[str, float]


def _draw(random: np.random.Generator, width: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """⟨q, k⟩ and ‖q‖²/d of so many pairs."""
    products, squares = [], []
    size = max(1, 2**20 // width)
    for start in range(0, samples, size):
        q, k = random.standard_normal((2, min(size, samples - start), width))
        products.append(np.vecdot(q, k))
        squares.append(np.vecdot(q, q) / width)
    return np.concatenate(products), np.concatenate(squares)


def _samples(config: Config, width: int) -> int:
    return config.samples * min(16, max(1, 256 // width))


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for what is found of each pair."""
    memory.check(4 * 8 * max(_samples(config, d) for d in (LAPLACE, *config.widths)), "samples")


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw pairs of vectors of each width and take the moments of their products."""
    random = np.random.default_rng(config.seed)
    draws = [_draw(random, d, _samples(config, d)) for d in config.widths]
    pairs = list(zip(config.widths, draws, strict=True))
    return Result(
        mean=np.array([Mean.of(x) for x, _ in draws]),
        variance=np.array([variance(x, mean=0.0) for x, _ in draws]),
        kurtosis_given_q=np.array([Mean.of(3 * s**2 - 6 * (s - 1)) for _, s in draws]),
        kurtosis=np.array([Mean.of((x**2 / d) ** 2) for d, (x, _) in pairs]),
        drawn=_draw(random, LAPLACE, _samples(config, LAPLACE))[0],
        scores={"samples": float(config.samples)},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A1: mean and variance as printed, and a law that is not normal."""
    d = np.array(config.widths)
    mean, variance, given_q, raw = (
        [Mean(*row) for row in rows]
        for rows in (result.mean, result.variance, result.kurtosis_given_q, result.kurtosis)
    )
    # at d = 1 every power of d is the same
    one_entry = np.where(d == 1, np.nan, 1)
    low, high = FOURTH
    seen = [k for k, width in enumerate(d) if low <= width <= high]
    from_fourth = d[seen], [raw[k] for k in seen]
    to_laplace, to_normal = (Distance.of(result.drawn, law) for law in (stats.laplace(), NORMAL))
    x = np.linspace(-8, 8, 4001)
    apart = np.max(np.abs(stats.laplace.cdf(x) - NORMAL.cdf(x)))
    whole = f"largest difference of distribution functions, d = {LAPLACE}:"
    return (
        Claim(
            "A1",
            r"q, k \sim \mathcal{N}(0, I_d):\quad \mathbb{E}\langle q, k\rangle = 0,\quad"
            r"\operatorname{Var}\langle q, k\rangle = d,\quad"
            r"\text{kurtosis } 3 + \frac{6}{d}",
            "At every width the variance is d (and not 1), the mean 0, and the kurtosis 3 + 6/d "
            "and not the 3 of the normal law that is printed; at d = 2 the whole law is Laplace's, "
            "and not the normal one.",
            right=(
                *each("variance, d = {}", d, d, variance, one_entry, "that of one entry")[::-1],
                *each("kurtosis, as ⟨q, k⟩ is normal given q, d = {}", d, 3 + 6 / d, given_q,
                      3, "a normal law"),
                *each("kurtosis, from ⟨q, k⟩⁴, d = {}", from_fourth[0], 3 + 6 / from_fourth[0],
                      from_fourth[1]),
                *each("mean, d = {}", d, 0, mean),
                equal(f"{whole} from Laplace's", 0, to_laplace, apart, "a normal law"),
            ),
            printed=(
                *each("kurtosis, as ⟨q, k⟩ is normal given q, d = {}", d, 3, given_q,
                      3 + 6 / d, "3 + 6/d"),
                equal(f"{whole} from N(0, {LAPLACE})", 0, to_normal, apart, "Laplace's law"),
            ),
            note="Mean and variance are as printed; the law is normal only as d → ∞. Given q it is "
            "exactly N(0, ‖q‖²); at d = 2 it is Laplace's.",
            printed_equation=r"\langle q_i, k_i\rangle = \sum_j q_{ij} k_{ij} \sim"
            r"\mathcal{N}(0, d_k)",
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Variance and excess kurtosis against the width, and the density at width 2."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, error_bars, new_figure

    widths = np.array(config.widths)
    figure = new_figure(10, 3.8)
    variances, kurtosis, density = figure.subplots(1, 3)
    variances.plot(widths, widths, color=BLACK, label="theory, d")
    error_bars(variances, widths, [Mean(*row) for row in result.variance], BLUE, "measured")
    variances.set(xlabel="width d", ylabel="variance of ⟨q, k⟩", xscale="log", yscale="log")

    kurtosis.plot(widths, 6 / widths, color=BLACK, label="theory, 6/d")
    excess = [Mean(row[0] - 3, *row[1:]) for row in result.kurtosis_given_q]
    error_bars(kurtosis, widths, excess, BLUE, "from ‖q‖²")
    kurtosis.plot(widths, np.abs(result.kurtosis[:, 0] - 3), color=ORANGE, marker="x",
                  linestyle="", label="|from ⟨q, k⟩⁴|")  # fmt: skip
    kurtosis.set(xlabel="width d", ylabel="kurtosis of ⟨q, k⟩, above 3",
                 xscale="log", yscale="log")  # fmt: skip

    edges = np.linspace(-8, 8, 65)
    heights = np.histogram(result.drawn, edges)[0] / len(result.drawn) / np.diff(edges)
    density.stairs(heights, edges, color=BLUE, fill=True, alpha=0.4, label="measured")
    x = np.linspace(-8, 8, 321)
    density.plot(x, stats.laplace.pdf(x), color=BLACK, label="theory, ½ exp(−|x|)")
    density.plot(x, NORMAL.pdf(x), color=GREEN, linestyle="--", label=f"printed, N(0, {LAPLACE})")
    density.set(xlabel=f"⟨q, k⟩ at d = {LAPLACE}", ylabel="probability density", yscale="log",
                ylim=(1e-4, 1))  # fmt: skip
    for axes in (variances, kurtosis, density):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
