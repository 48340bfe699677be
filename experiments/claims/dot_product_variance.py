"""The law of the inner product of two random vectors (A1).

q, k ∈ R^d with independent N(0, 1) entries. Given q, ⟨q, k⟩ is N(0, ‖q‖²); over both it has mean 0,
variance d and kurtosis 3 E‖q‖⁴ / (E‖q‖²)² = 3 + 6/d: normal only in the limit. At d = 2 its density
is Laplace's, ½ e^{−|x|}.

The raw fourth moment cannot see 6/d past d ≈ 256. The kurtosis is therefore the mean of 3s², where
s = ‖q‖²/d, from which 6(s − 1), whose mean is exactly 0, is subtracted: the same mean with a
standard deviation that falls like the 6/d that it has to resolve. Measured arrays have a last axis
of (value, low, high).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from pydantic import Field
from scipy import stats

from experiments.engine import memory
from experiments.engine.config import Samples, Seed, Several, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import (
    Claim,
    Estimate,
    mean_interval,
    measured,
    share,
    variance_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A1": "The inner product of two random vectors has variance d",
}

SHOWN = 2
"""The width whose distribution is drawn."""


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
    """Moments of ⟨q, k⟩ by width, and its distribution at width 2."""

    mean: np.ndarray
    variance: np.ndarray
    kurtosis: np.ndarray
    kurtosis_raw: np.ndarray
    shown: np.ndarray
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
    memory.check(4 * 8 * max(_samples(config, width) for width in config.widths), "samples")


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw pairs of vectors of each width and take the moments of their products."""
    random = np.random.default_rng(config.seed)
    level = share(3 * len(config.widths))
    means, variances, kurtoses, raw = [], [], [], []
    for width in config.widths:
        product, s = _draw(random, width, _samples(config, width))
        means.append(mean_interval(product, level))
        variances.append(variance_interval(product, level, mean=0.0))
        kurtoses.append(mean_interval(3 * s**2 - 6 * (s - 1), level))
        raw.append(np.mean(product**4) / np.mean(product**2) ** 2)
    return Result(
        mean=np.array(means),
        variance=np.array(variances),
        kurtosis=np.array(kurtoses),
        kurtosis_raw=np.array(raw),
        shown=_draw(random, SHOWN, config.samples)[0],
        scores={"samples": float(config.samples)},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A1: mean and variance as printed, and a kurtosis that no normal law has."""
    widths = config.widths

    def every(text, estimates, predictions, rivals, rival_name):
        return [
            measured(f"{text}, d = {width}", predicted, Estimate(*estimate), rival, rival_name)
            for width, estimate, predicted, rival in zip(
                widths, estimates, predictions, rivals, strict=True
            )
        ]

    # at d = 1 every power of d is the same
    standing = [None if width == 1 else 1.0 for width in widths]
    variance = every("variance", result.variance, widths, standing, "that of one entry")
    normal, exact = [3.0] * len(widths), [3 + 6 / width for width in widths]
    kurtosis = every("kurtosis", result.kurtosis, exact, normal, "a normal law")
    as_printed = every("kurtosis", result.kurtosis, normal, exact, "3 + 6/d")
    mean = every("mean", result.mean, [0.0] * len(widths), [None] * len(widths), "")
    return (
        Claim(
            "A1",
            r"q, k \sim \mathcal{N}(0, I_d):\quad \mathbb{E}\langle q, k\rangle = 0,\quad"
            r"\operatorname{Var}\langle q, k\rangle = d,\quad"
            r"\text{kurtosis } 3 + \frac{6}{d}",
            "At every width the variance is d (and not 1), the mean 0, and the kurtosis 3 + 6/d "
            "and not the 3 of the normal law that is printed.",
            (*reversed(variance), *kurtosis, *mean),
            printed=tuple(as_printed),
            note="Mean and variance are as printed; the law is normal only as d → ∞. Given q it is "
            "exactly N(0, ‖q‖²); at d = 2 it is Laplace's.",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Variance and excess kurtosis against the width, and the density at width 2."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, error_bars, new_figure

    widths = np.array(config.widths)
    figure = new_figure(10, 3.8)
    variance, kurtosis, density = figure.subplots(1, 3)
    variance.plot(widths, widths, color=BLACK, label="theory, d")
    error_bars(variance, widths, result.variance, BLUE, "measured")
    variance.set(xlabel="width d", ylabel="variance of ⟨q, k⟩", xscale="log", yscale="log")

    kurtosis.plot(widths, 6 / widths, color=BLACK, label="theory, 6/d")
    error_bars(kurtosis, widths, result.kurtosis - 3, BLUE, "from ‖q‖²")
    kurtosis.plot(widths, np.abs(result.kurtosis_raw - 3), color=ORANGE, marker="x",
                  linestyle="", label="|raw fourth moment − 3|")  # fmt: skip
    kurtosis.set(xlabel="width d", ylabel="kurtosis of ⟨q, k⟩, above 3",
                 xscale="log", yscale="log")  # fmt: skip

    edges = np.linspace(-8, 8, 65)
    heights = np.histogram(result.shown, edges)[0] / len(result.shown) / np.diff(edges)
    density.stairs(heights, edges, color=BLUE, fill=True, alpha=0.4, label="measured")
    x = np.linspace(-8, 8, 321)
    density.plot(x, np.exp(-np.abs(x)) / 2, color=BLACK, label="theory, ½ exp(−|x|)")
    density.plot(x, stats.norm.pdf(x, scale=SHOWN**0.5), color=GREEN, linestyle="--",
                 label="printed, N(0, 2)")  # fmt: skip
    density.set(xlabel="⟨q, k⟩ at d = 2", ylabel="probability density", yscale="log",
                ylim=(1e-4, 1))  # fmt: skip
    for axes in (variance, kurtosis, density):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
