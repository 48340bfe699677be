"""What the logits' scale does to the softmax and to the gradient that passes through it (A2).

q, k_1 … k_n ∈ R^d with independent N(0, 1) entries; logits s⟨q, k_i⟩, with s = 1 or s = 1/√d;
p their softmax, J = diag(p) − ppᵀ its Jacobian, and s KᵀJg the gradient that a random g ~ N(0, I_n)
sends to q. Given q the logits are independent N(0, (s‖q‖)²), so exactly

    E tr J = 1 − n E p_1²

and, unscaled and as d → ∞, all that is left are near-ties of the first two logits at a gap Δ whose
density at 0 is f_0/√d:

    J → p(1−p) [1 −1; −1 1],  p = σ(Δ):   √d E‖J‖_F → f_0,   E‖KᵀJg‖ → f_0 √(2/π)

At d = 4096 these limits are still 3 % too high. Predictions are therefore those of the softmax of
the first three logits: `NearTies`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from scipy import optimize, special, stats

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Samples, Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.models.normal_logits import weight_moments
from experiments.report.evidence import Claim, above, equal
from experiments.report.intervals import Exact, Mean, Quantile, Share, variance
from experiments.report.quadrature import normal_expectation, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A2": "Scaling by 1/√d keeps the softmax from saturating",
}

ROUNDING = 1e-10
"""What float64 leaves of a gradient of order 1, of which J is a difference."""

GONE = 1e-3
"""A gradient shorter than this counts as vanished."""

TENTH = 0.1
"""The lower quantile that is looked at beside the median."""

FEWEST = 8
"""Of so many draws that are not near 0, the interval of a mean is as good as it says."""

UNSCALED, SCALED = range(2)

KINDS = ("‖J‖_F", "entropy", "gradient", "tr J")
JACOBIAN, ENTROPY, GRADIENT, TRACE = range(len(KINDS))
"""What is found of each draw."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the vectors."""
    widths: Several[Annotated[Size, Field(ge=4)]] = (4, 16, 64, 256, 1024, 4096)
    """Widths d of query and keys, rising."""
    keys: Annotated[Size, Field(ge=3)] = 16
    """Number n of keys."""
    samples: Samples = 2000
    """Draws for each width."""


TINY = Config(widths=(16, 1024), samples=300)


class Result(NamedTuple):
    """What was found, by (scale, kind, width, draw)."""

    drawn: np.ndarray
    logit_variance: np.ndarray
    """Of a scaled logit at the largest width, a `Mean`."""
    gradient_error: np.ndarray
    """Largest difference of the gradient from s KᵀJg."""
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raise a UsageError if there is no memory for the logits of a draw and what is found of them
    all, or if the widest vectors are not wide enough for near-ties, or too wide to draw any."""
    n, widths = config.keys, config.widths
    memory.check(2 * 8 * widths[-1] * n, "widths × keys")
    memory.check(8 * n**2, "keys²")
    memory.check(3 * 2 * len(KINDS) * 8 * len(widths) * config.samples, "widths × samples")
    if list(widths) != sorted(widths):
        raise UsageError(f"widths: should rise, got {widths}")
    trace = mean_trace(n, widths[-1], UNSCALED)
    if near_ties(n, widths[-1]).trace() < 0.99 * trace:
        raise UsageError(
            f"widths: {widths[-1]} is too narrow for {n} keys, of which more than three take part; "
            "16 keys need some 1000"
        )
    if config.samples * trace < FEWEST:
        needed = math.ceil(FEWEST / trace)
        raise UsageError(
            f"samples: too few of {config.samples} are near-ties at d = {widths[-1]} for an "
            f"interval; needs {needed}"
        )


@jax.jit
def _attend(q, k, g, scale):
    """For rows of queries (B, d) with keys of their own: p, the gradient to q of Σ g_i p_i, and its
    largest difference from s KᵀJg."""

    def attend(q, **options):
        # attending to the values g gives Σ g_i p_i
        rows = q[:, None, None], k[:, :, None], g[:, :, None, None]
        return rnnattn.dot_product_attention(*rows, scale=scale, **options)

    # asked for weights, the library leaves the gradient to JAX
    gradient = jax.grad(lambda q: jnp.sum(attend(q)))(q)
    p = attend(q, return_weights=True)[1][:, 0, 0]
    through = p * (g - jnp.sum(p * g, axis=1, keepdims=True))
    error = gradient - scale * jnp.einsum("bn,bnd->bd", through, k)
    return p, gradient, jnp.max(jnp.abs(error))


def _measure(p: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """What is found of rows of weights and gradients, by (kind, row)."""
    # ‖diag(p) − ppᵀ‖² = Σp² − 2Σp³ + (Σp²)², written so that it does not cancel near saturation
    off = np.sum(p**2, axis=1)[:, None] - p**2
    spread = p * _complement(p)
    jacobian = np.sqrt(np.sum(spread**2 + p**2 * off, axis=1))
    entropy = np.sum(special.entr(p), axis=1)
    return np.array([jacobian, entropy, np.linalg.norm(gradient, axis=1), np.sum(spread, axis=1)])


def _complement(p: np.ndarray) -> np.ndarray:
    """1 − p_i as the sum of the others, which keeps its digits where p_i rounds to 1."""
    others = np.broadcast_to(p[:, None, :], (*p.shape, p.shape[1])).copy()
    others[:, np.arange(p.shape[1]), np.arange(p.shape[1])] = 0
    return others.sum(axis=2)


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw queries and keys of each width, attend both ways, and look at weights and gradients."""
    random = np.random.default_rng(config.seed)
    with jax.enable_x64(True):
        found = [_draw(random, width, config.keys, config.samples) for width in config.widths]
    drawn, logits, errors = zip(*found, strict=True)
    drawn = np.stack(drawn, axis=2)
    unscaled, scaled = np.median(drawn[:, GRADIENT, -1], axis=1)
    return Result(
        drawn=drawn,
        logit_variance=np.array(variance(logits[-1], mean=0.0)),
        gradient_error=np.array(np.max(errors)),
        scores={"median_gradient_unscaled": float(unscaled), "median_gradient": float(scaled)},
    )


def _draw(
    random: np.random.Generator, width: int, keys: int, samples: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """What `_measure` finds, by (scale, kind, draw), one scaled logit of each draw, and the error
    of the gradient."""
    parts: tuple[list, list] = ([], [])
    logits, worst = [], 0.0
    chunks = -(-samples * width * keys // 2**21)
    # all of one size, so that one compiled program serves them; a few draws too many are left out
    size = -(-samples // chunks)
    for _ in range(chunks):
        q = random.standard_normal((size, width))
        k = random.standard_normal((size, keys, width))
        g = random.standard_normal((size, keys))
        logits.append(np.vecdot(q, k[:, 0]) / math.sqrt(width))
        arrays = tuple(map(jnp.asarray, (q, k, g)))
        for part, scale in zip(parts, (1.0, 1 / math.sqrt(width)), strict=True):
            *attended, error = map(np.asarray, _attend(*arrays, scale))
            part.append(_measure(*attended))
            # not `max`, which passes NaN over
            worst = float(np.maximum(worst, error))
    found = np.array([np.concatenate(part, axis=1) for part in parts])
    return found[..., :samples], np.concatenate(logits)[:samples], worst


def mean_trace(keys: int, width: int, scale: int) -> float:
    """E tr J by quadrature."""
    # ‖q‖ as a function of a normal variable, over which the trapezoidal rule is as good
    x = np.arange(-6, 6.5, 0.5)
    chance = stats.norm.pdf(x) / np.sum(stats.norm.pdf(x))
    norms = np.sqrt(stats.chi2.ppf(stats.norm.cdf(x), width) / (1, width)[scale])
    return 1 - keys * float(np.dot(chance, [weight_moments(keys, norm)[1] for norm in norms]))


def tie_density(keys: int) -> float:
    """f_0, the density at 0 of the gap between the largest two of n standard normals."""
    others = lambda x: stats.norm.pdf(x) * stats.norm.cdf(x) ** (keys - 2)
    return keys * (keys - 1) * normal_expectation(others)


class NearTies(NamedTuple):
    """The unscaled softmax of the first three of n logits, by quadrature over their gaps.

    Their J has a tr J = 2(p_1p_2 + p_1p_3 + p_2p_3), and eigenvalues of the product 3p_1p_2p_3. The
    norm of q, and that of KᵀJg over ‖Jg‖, are χ_{d−1} and stand for it by its mean: their spread is
    of second order in 1/√d. So is what a fourth logit near the first adds: 0.1 % of tr J at
    d = 4096, n = 16, and less of ‖J‖_F and KᵀJg.
    """

    mass: np.ndarray
    """Of each pair of gaps."""
    first: np.ndarray
    """Larger eigenvalue of J."""
    second: np.ndarray
    norm: float
    """Of KᵀJg over ‖Jg‖."""

    def trace(self) -> float:
        """E tr J."""
        return float(np.sum(self.mass * (self.first + self.second)))

    def jacobian(self) -> float:
        """E‖J‖_F."""
        return float(np.sum(self.mass * np.hypot(self.first, self.second)))

    def gradient(self) -> float:
        """E‖KᵀJg‖: over g, a complete elliptic integral."""
        over_g = self.first * special.ellipe(1 - (self.second / self.first) ** 2)
        return math.sqrt(2 / math.pi) * self.norm * float(np.sum(self.mass * over_g))

    def below(self, length: float) -> float:
        """P(‖KᵀJg‖ < length), with g_2 = r sin φ."""
        ratio = length / self.norm
        r = np.minimum(ratio / np.maximum(self.second, 1e-300), 6.0)
        chance = np.zeros_like(self.mass)
        for φ, weight in zip(*map(np.ravel, panels(np.array([0, math.pi / 2]))), strict=True):
            g = r * math.sin(φ)
            left = np.sqrt(np.maximum(ratio**2 - (self.second * g) ** 2, 0)) / self.first
            # both signs of g_1 and of g_2
            density = 2 * np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
            chance += weight * r * math.cos(φ) * density * special.erf(left / math.sqrt(2))
        return float(np.sum(self.mass * chance))

    def quantile(self, probability: float) -> float:
        """The length below which ‖KᵀJg‖ is with that probability."""
        excess = lambda log: self.below(math.exp(log)) - probability
        return math.exp(
            optimize.brentq(excess, -6 * self.norm, math.log(10 * self.norm), xtol=1e-4)
        )


def near_ties(keys: int, width: int) -> NearTies:
    """By Gauss–Legendre over the gaps, whose density is an integral over the third logit."""
    norm = math.sqrt(2) * math.exp(math.lgamma(width / 2) - math.lgamma((width - 1) / 2))
    # the softmax varies within 1 of a logit, which is 1/norm here
    gaps, gap_weights = map(np.ravel, panels(np.linspace(0, 8, math.ceil(norm) + 1)))
    ends = np.array([0, 4 / norm, 12 / norm, 36 / norm, 3, 6, 10])
    lasts, last_weights = map(np.ravel, panels(ends))
    u, v = gaps[:, None], lasts
    pdf = stats.norm.pdf
    third = np.arange(-8, 8.25, 0.25)
    beyond = (
        keys * (keys - 1) * (keys - 2) * 0.25 * pdf(third) * stats.norm.cdf(third) ** (keys - 3)
    )
    density = sum(b * pdf(y + v) * pdf(y + v + u) for y, b in zip(third, beyond, strict=True))
    e_2, e_3 = np.exp(-norm * u), np.exp(-norm * (u + v))
    total = 1 + e_2 + e_3
    trace = 2 * (e_2 + e_3 + e_2 * e_3) / total**2
    product = 3 * e_2 * e_3 / total**3
    first = (trace + np.sqrt(np.maximum(trace**2 - 4 * product, 0))) / 2
    first = np.maximum(first, 1e-300)
    return NearTies(density * gap_weights[:, None] * last_weights, first, product / first, norm)


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A2: what vanishes unscaled, in which sense, and what scaling keeps."""
    n, widest = config.keys, config.widths[-1]
    theory = near_ties(n, widest)
    mean_gradient, median = theory.gradient(), theory.quantile(0.5)
    gradients = result.drawn[:, GRADIENT, -1]
    at = f"d = {widest}, n = {n}"
    share = [Share.of(x < GONE) for x in gradients]
    middle = [Quantile(x, 0.5) for x in gradients]
    jacobian = [Mean.of(x) for x in result.drawn[:, JACOBIAN, -1]]
    mean = Mean.of(gradients[UNSCALED])
    names = ("unscaled", "scaled")
    trace = [[mean_trace(n, d, scale) for d in config.widths] for scale in (UNSCALED, SCALED)]
    right = (
        equal(f"share of gradients below {GONE:g}, unscaled, {at}", theory.below(GONE),
              share[UNSCALED], share[SCALED], "scaled logits"),
        equal(f"median of the gradient, unscaled, {at}", median,
              middle[UNSCALED], middle[SCALED], "scaled logits"),
        equal("largest difference of the gradient from s KᵀJg", 0,
              Exact(float(result.gradient_error), ROUNDING)),
        above(f"{TENTH:.0%} quantile of the gradient, scaled, {at}", GONE,
              Quantile(gradients[SCALED], TENTH)),
        equal(f"variance of a scaled logit, {at}", 1, Mean(*result.logit_variance),
              widest, "not scaled"),
        equal(f"mean of the gradient, unscaled, {at}", mean_gradient, mean,
              median, "it vanishes as its median does"),
        equal(f"mean ‖J‖_F, unscaled, {at}", theory.jacobian(),
              jacobian[UNSCALED], jacobian[SCALED], "scaled logits"),
        *(
            equal(f"mean tr J, {names[scale]}, d = {d}, n = {n}", trace[scale][i],
                  Mean.of(result.drawn[scale, TRACE, i]),
                  trace[1 - scale][i], f"{names[1 - scale]} logits")
            for scale in (UNSCALED, SCALED)
            for i, d in enumerate(config.widths)
        ),
    )  # fmt: skip
    beyond = equal(
        f"mean of the gradient, unscaled, taken to vanish as its median does, {at}",
        median, mean, mean_gradient, "near-ties carry it",
    )  # fmt: skip
    return (
        Claim(
            "A2",
            r"J = \operatorname{diag}(p) - pp^\top,\quad \mathbb{E}\lVert J\rVert_F \approx"
            r"\frac{f_0}{\sqrt d},\quad \operatorname{median}\lVert K^\top J g\rVert \to 0,\quad"
            r"\mathbb{E}\lVert K^\top J g\rVert \to f_0\sqrt{2/\pi}\quad\text{(unscaled)}",
            "Unscaled, the gradient's median, its mean and its share below 1e-3 at the largest d, "
            "and the mean of ‖J‖_F, are those of near-ties by quadrature, and not those of scaled "
            "logits, nor does the mean vanish as the median does; scaled, the 10 % quantile of the "
            "gradient is above 1e-3. Both ways the gradient is s KᵀJg, and E tr J at every d that "
            "of the exact softmax.",
            right,
            beyond=(beyond,),
            note="The gradient that scaling saves vanishes in its median and lower quantiles; its "
            "mean does not vanish, as rare near-ties carry it.",
            printed_equation=r"\tfrac{1}{\sqrt{d_k}}\langle q_i, k_i\rangle \sim"
            r"\mathcal{N}(0, 1)\quad\text{prevents vanishing gradients}",
            news="Without 1/√d the gradient through the softmax vanishes in the median, and not in "
            "the mean: rare near-ties of two keys carry all of it.",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Median, 10 % quantile and mean of ‖J‖_F, entropy and gradient against the width."""
    from experiments.figures import BLACK, BLUE, ORANGE, error_bars, new_figure

    figure = new_figure(10, 7.2)
    jacobian, entropy, gradient, below = figure.subplots(2, 2).flat
    scales = ((UNSCALED, ORANGE, "unscaled"), (SCALED, BLUE, "scaled"))
    drawings = (
        (JACOBIAN, jacobian, "$\\Vert J\\Vert_F$"),
        (ENTROPY, entropy, "entropy (nats)"),
        (GRADIENT, gradient, "gradient to q, $\\Vert s K^T J g\\Vert$"),
    )
    for kind, axes, name in drawings:
        for scale, colour, label in scales:
            # what has underflowed to 0 is far below the axis
            drawn = np.maximum(result.drawn[scale, kind], 1e-300)
            for estimates, line, of in (
                ([Mean.of(x) for x in drawn], "-", "mean"),
                ([Quantile(x, 0.5) for x in drawn], "--", "median"),
                ([Quantile(x, TENTH) for x in drawn], ":", "10 % quantile"),
            ):
                values = [estimate.interval(0.01).value for estimate in estimates]
                axes.plot(config.widths, values, line, color=colour)
                error_bars(axes, config.widths, estimates, colour, "")
                axes.plot([], [], f"{line}o", color=colour, markersize=4, label=f"{label}, {of}")
        axes.set(ylabel=name, yscale="log", ylim=(1e-12, 10))
    for scale, colour, label in scales:
        shares = [Share.of(x < GONE) for x in result.drawn[scale, GRADIENT]]
        error_bars(below, config.widths, shares, colour, label)
    below.set(ylabel=f"share of gradients below {GONE:g}")

    # of narrow vectors the softmax is no affair of two or three logits
    wide = [d for d in config.widths if d >= 64]
    theory = [near_ties(config.keys, d) for d in wide]
    for axes, values, line, label in (
        (jacobian, [each.jacobian() for each in theory], "-", "near-ties, mean"),
        (gradient, [each.gradient() for each in theory], "-", "near-ties, mean"),
        (gradient, [each.quantile(0.5) for each in theory], "--", "near-ties, median"),
        (below, [each.below(GONE) for each in theory], "-", "near-ties, unscaled"),
    ):
        axes.plot(wide, values, line, color=BLACK, linewidth=1, label=label)
    limit = tie_density(config.keys) * math.sqrt(2 / math.pi)
    gradient.axhline(limit, color=BLACK, linewidth=1, linestyle=":",
                     label="limit of the mean, $f_0\\sqrt{2/\\pi}$")  # fmt: skip
    # the curves of the entropy are named beside it
    for axes in (jacobian, gradient, below):
        axes.legend(fontsize=8)
    for axes in (jacobian, entropy, gradient, below):
        axes.set(xlabel="width d", xscale="log")
        axes.grid(alpha=0.3)
    return figure
