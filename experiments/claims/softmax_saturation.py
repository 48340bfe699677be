"""What the logits' scale does to the softmax and to the gradient that passes through it (A2).

q, k_1 … k_n ∈ R^d with independent N(0, 1) entries; logits s⟨q, k_i⟩, with s = 1 or s = 1/√d;
p their softmax, J = diag(p) − ppᵀ its Jacobian, and s KᵀJg the gradient that a random g ~ N(0, I_n)
sends to q. Given q the logits are independent N(0, (s‖q‖)²), so with z of that law, exactly,

    E tr J = 1 − n E p_1²,   E p_1² = ∫ t E[e^{2z} e^{−te^z}] E[e^{−te^z}]^{n−1} dt

and, as d → ∞ unscaled, where all that is left are near-ties of the first two logits at a gap Δ
whose density at 0 is f_0/√d:

    J → p(1−p) [1 −1; −1 1],  p = σ(Δ):   √d E‖J‖_F → f_0,   E‖KᵀJg‖ → f_0 √(2/π)

with the quantiles of ‖KᵀJg‖ those of p(1−p)|g_1 − g_2|‖k_1 − k_2‖. Measured arrays have a last axis
of (value, low, high); the axis before it is the width, and the first is (unscaled, scaled).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from scipy import optimize, signal, special, stats

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Samples, Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import (
    Claim,
    Estimate,
    mean_interval,
    measured,
    normal_expectation,
    quantile_interval,
    share,
    share_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A2": "Scaling by 1/√d keeps the softmax from saturating",
}

GONE = 1e-3
"""A gradient shorter than this counts as vanished."""

TENTH = 0.1
"""The lower quantile that is looked at beside the median."""

KINDS = ("jacobian", "entropy", "gradient")


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
    """‖J‖_F, entropy and gradient: their means, medians, 10 % quantiles and shares below 1e-3."""

    mean: np.ndarray
    median: np.ndarray
    tenth: np.ndarray
    below: np.ndarray
    trace: np.ndarray
    logit_variance: np.ndarray
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raise a UsageError if the widest vectors are not wide enough for the near-tie limit, or if
    there is no memory for the logits of a draw and what is found of them all."""
    if list(config.widths) != sorted(config.widths) or config.widths[-1] < 1024:
        raise UsageError(f"widths: should rise to 1024 or more, got {config.widths}")
    memory.check(2 * 8 * config.widths[-1] * config.keys, "widths × keys")
    memory.check(8 * config.keys**2, "keys²")
    memory.check(2 * 5 * 8 * config.samples, "samples")


@jax.jit
def _attend(q, k, g, scale):
    """p, and the gradient to q of Σ g_i p_i, for rows of queries (B, d) with keys of their own."""

    def output(q):
        # attending to the values g gives Σ g_i p_i
        out, p = rnnattn.dot_product_attention(
            q[:, None, None], k[:, :, None], g[:, :, None, None], scale=scale, return_weights=True
        )
        return jnp.sum(out), p[:, 0, 0]

    gradient, p = jax.grad(output, has_aux=True)(q)
    return p, gradient


def _measure(p: np.ndarray, gradient: np.ndarray) -> dict[str, np.ndarray]:
    squares = np.sum(p**2, axis=1)
    # ‖diag(p) − ppᵀ‖² = Σp² − 2Σp³ + (Σp²)², written so that it does not cancel near saturation
    off = squares[:, None] - p**2
    jacobian = np.sum((p * _complement(p)) ** 2 + p**2 * off, axis=1)
    return {
        "jacobian": np.sqrt(jacobian),
        "entropy": np.sum(special.entr(p), axis=1),
        "gradient": np.linalg.norm(gradient, axis=1),
        "trace": np.sum(p * _complement(p), axis=1),
    }


def _complement(p: np.ndarray) -> np.ndarray:
    """1 − p_i as the sum of the others, which keeps its digits where p_i rounds to 1."""
    others = np.broadcast_to(p[:, None, :], (*p.shape, p.shape[1])).copy()
    others[:, np.arange(p.shape[1]), np.arange(p.shape[1])] = 0
    return others.sum(axis=2)


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw queries and keys of each width, attend both ways, and describe the distributions."""
    random = np.random.default_rng(config.seed)
    # trace at both scales and every width; variance, share, median, and three means
    level = share(2 * len(config.widths) + 7)
    estimates: dict[str, list] = {"mean": [], "median": [], "tenth": [], "below": []}
    traces, variances = [], []
    with jax.enable_x64(True):
        for width in config.widths:
            found, logits = _draw(random, width, config.keys, config.samples)
            variances.append(mean_interval(logits**2, level))
            traces.append([mean_interval(each["trace"], level) for each in found])
            for name, estimate in (
                ("mean", lambda x: mean_interval(x, level)),
                ("median", lambda x: quantile_interval(x, 0.5, level)),
                ("tenth", lambda x: quantile_interval(x, TENTH, level)),
                ("below", lambda x: share_interval(int(np.sum(x < GONE)), x.size, level)),
            ):
                estimates[name].append([[estimate(each[kind]) for kind in KINDS] for each in found])
    # (width, scale, kind, 3) → (scale, kind, width, 3)
    arrays = {name: np.array(several).transpose(1, 2, 0, 3) for name, several in estimates.items()}
    return Result(
        **arrays,
        trace=np.array(traces).transpose(1, 0, 2),
        logit_variance=np.array(variances),
        scores={"near_tie_density": tie_density(config.keys)},
    )


def _draw(
    random: np.random.Generator, width: int, keys: int, samples: int
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """What `_measure` finds of each scale, and one scaled logit of each draw."""
    parts: tuple[list, list] = ([], [])
    logits = []
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
            part.append(_measure(*map(np.asarray, _attend(*arrays, scale))))
    found = [
        {name: np.concatenate([piece[name] for piece in part])[:samples] for name in part[0]}
        for part in parts
    ]
    return found, np.concatenate(logits)[:samples]


def _mean_trace(keys: int, width: int, scaled: bool) -> float:
    """E tr J by quadrature: over ‖q‖, over log t, and over the logit as a convolution.

    The trapezoidal rule in every variable: the integrands are analytic and die out, so
    steps of 0.2 for e^{−e^u}, and of a quarter of the deviation for a normal law, leave 1e-10.
    """
    # ‖q‖ as a function of a normal variable, over which the rule is as good
    x = np.arange(-6, 6.5, 0.5)
    chance = stats.norm.pdf(x) / np.sum(stats.norm.pdf(x))
    norms = np.sqrt(stats.chi2.ppf(stats.norm.cdf(x), width) / (width if scaled else 1))
    return 1 - keys * float(np.dot(chance, [mean_square(keys, norm) for norm in norms]))


def mean_square(keys: int, norm: float) -> float:
    """E p_1² for n independent logits of N(0, norm²)."""
    step = min(0.2, norm / 4)
    reach = math.ceil(9 * norm / step)
    logit = step * np.arange(-reach, reach + 1)
    mass = step * stats.norm.pdf(logit, 0, norm)
    # t = e^u; past the logits' range, e^{−t e^z} is 0 above and e^{2u} is 0 below
    margin = math.ceil(20 / step)
    u = step * np.arange(-2 * reach - margin, 2 * reach + margin + 1)
    e = np.exp(np.minimum(u, 10.0))
    none = signal.fftconvolve(np.exp(-e), mass, mode="valid")
    both = signal.fftconvolve(e**2 * np.exp(-e), mass, mode="valid")
    return step * float(np.sum(both * np.clip(none, 0, 1) ** (keys - 1)))


def tie_density(keys: int) -> float:
    """f_0, the density at 0 of the gap between the largest two of n standard normals."""
    normal = stats.norm
    return (
        keys
        * (keys - 1)
        * normal_expectation(lambda x: normal.pdf(x) * normal.cdf(x) ** (keys - 2))
    )


class _Gap(NamedTuple):
    """P(the largest of n standard normals leads by more than `gap`)."""

    gap: np.ndarray
    exceeds: np.ndarray


def gap_law(keys: int) -> _Gap:
    """The law of the lead of the largest of n standard normals."""
    gap = np.linspace(0, 8, 400)
    lead = lambda by: normal_expectation(lambda x: stats.norm.cdf(x - by) ** (keys - 1))
    return _Gap(gap, keys * np.array([lead(by) for by in gap]))


def _tie_below(law: _Gap, width: int, length: float) -> float:
    """P(p(1−p)|g_1 − g_2|‖k_1 − k_2‖ < length), unscaled, with the norms of q and k_1 − k_2 at
    √d and √2d."""

    def shorter(difference):
        # p(1−p) = ¼ / cosh²(Δ/2), which is ¼ at most
        ratio = length / (np.abs(difference) * math.sqrt(2 * width))
        gap = 2 * np.arccosh(np.maximum(0.5 / np.sqrt(ratio), 1.0))
        return np.interp(gap / math.sqrt(width), law.gap, law.exceeds)

    return normal_expectation(shorter, variance=2.0)


def _tie_quantile(law: _Gap, width: int, probability: float) -> float:
    """The length below which a gradient through a near-tie is with that probability."""
    excess = lambda log: _tie_below(law, width, math.exp(log)) - probability
    return math.exp(optimize.brentq(excess, -6 * math.sqrt(width), math.log(10 * width), xtol=1e-3))


class NearTies(NamedTuple):
    """What theory says of the unscaled ones, by width; the mean gradient is the same at each."""

    jacobian: np.ndarray
    gradient: float
    median: np.ndarray
    below: np.ndarray


def near_ties(config: Config) -> NearTies:
    """Means of ‖J‖_F and of the gradient, and the gradient's median and share below 1e-3."""
    density, law = tie_density(config.keys), gap_law(config.keys)
    return NearTies(
        density / np.sqrt(np.array(config.widths)),
        density * math.sqrt(2 / math.pi),
        np.array([_tie_quantile(law, d, 0.5) for d in config.widths]),
        np.array([_tie_below(law, d, GONE) for d in config.widths]),
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A2: what vanishes unscaled, in which sense, and what scaling keeps."""
    widest, theory = config.widths[-1], near_ties(config)
    gradient = KINDS.index("gradient")
    unscaled, scaled = 0, 1
    at = f"d = {widest}, n = {config.keys}"
    trace = [[_mean_trace(config.keys, d, s) for d in config.widths] for s in (False, True)]
    traces = [
        measured(
            f"mean tr J {name}, d = {width}, n = {config.keys}",
            trace[scale][i], Estimate(*result.trace[scale, i]),
            trace[1 - scale][i], f"{other} logits",
        )
        for scale, name, other in ((unscaled, "unscaled", "scaled"), (scaled, "scaled", "unscaled"))
        for i, width in enumerate(config.widths)
    ]  # fmt: skip
    right = [
        measured(
            f"share of gradients below {GONE:g}, unscaled, {at}",
            theory.below[-1], Estimate(*result.below[unscaled, gradient, -1]),
            result.below[scaled, gradient, -1, 0], "scaled logits",
        ),
        measured(
            f"median of the gradient, unscaled, {at}",
            theory.median[-1], Estimate(*result.median[unscaled, gradient, -1]),
            result.median[scaled, gradient, -1, 0], "scaled logits",
        ),
        measured(
            f"share of gradients below {GONE:g}, scaled, {at}",
            0.0, Estimate(*result.below[scaled, gradient, -1]),
            result.below[unscaled, gradient, -1, 0], "unscaled logits",
        ),
        measured(
            f"variance of a scaled logit, {at}", 1.0, Estimate(*result.logit_variance[-1]),
            float(widest), "not scaled",
        ),
        measured(
            f"mean of the gradient, unscaled, {at}",
            theory.gradient, Estimate(*result.mean[unscaled, gradient, -1]),
            0.0, "it vanishes",
        ),
        measured(
            f"mean ‖J‖_F, unscaled, {at}",
            theory.jacobian[-1],
            Estimate(*result.mean[unscaled, KINDS.index("jacobian"), -1]),
            result.mean[scaled, KINDS.index("jacobian"), -1, 0], "scaled logits",
        ),
        *traces,
    ]  # fmt: skip
    beyond = measured(
        f"mean of the gradient, unscaled, taken to vanish as its median does, {at}",
        theory.median[-1], Estimate(*result.mean[unscaled, gradient, -1]),
        theory.gradient, "a constant carried by near-ties",
    )  # fmt: skip
    return (
        Claim(
            "A2",
            r"J = \operatorname{diag}(p) - pp^\top,\quad \mathbb{E}\lVert J\rVert_F \approx"
            r"\frac{f_0}{\sqrt d},\quad \operatorname{median}\lVert K^\top J g\rVert \to 0,\quad"
            r"\mathbb{E}\lVert K^\top J g\rVert \to f_0\sqrt{2/\pi}\quad\text{(unscaled)}",
            "Unscaled, the median gradient and the share below 1e-3 at the largest d are those of "
            "near-ties by quadrature, and not those of scaled logits; the mean tends to its "
            "constant and not to 0; E tr J is that of the exact softmax at every d, both ways.",
            tuple(right),
            beyond=(beyond,),
            note="The gradient that scaling saves vanishes in its median and lower quantiles; its "
            "mean does not vanish, as rare near-ties carry it.",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Median, 10 % quantile and mean of ‖J‖_F, entropy and gradient against the width."""
    from experiments.figures import BLACK, BLUE, ORANGE, error_bars, new_figure

    figure = new_figure(10, 7.2)
    widths, theory = config.widths, near_ties(config)
    jacobian, entropy, gradient, below = figure.subplots(2, 2).flat
    scales = ((0, ORANGE, "unscaled"), (1, BLUE, "scaled"))
    panels = (
        (jacobian, "$\\Vert J\\Vert_F$"),
        (entropy, "entropy (nats)"),
        (gradient, "gradient to q, $\\Vert s K^T J g\\Vert$"),
    )
    for kind, (axes, name) in enumerate(panels):
        for scale, colour, label in scales:
            for estimates, line, of in (
                (result.mean, "-", "mean"),
                (result.median, "--", "median"),
                (result.tenth, ":", "10 % quantile"),
            ):
                # what has underflowed to 0 is far below the axis
                shown = np.maximum(estimates[scale, kind], 1e-300)
                axes.plot(widths, shown[:, 0], line, color=colour)
                error_bars(axes, widths, shown, colour, "")
                axes.plot([], [], f"{line}o", color=colour, markersize=4, label=f"{label}, {of}")
        axes.set(ylabel=name, yscale="log", ylim=(1e-12, 10))
    jacobian.plot(widths, theory.jacobian, color=BLACK, linewidth=1,
                  label="theory, mean: $f_0/\\sqrt{d}$")  # fmt: skip
    gradient.axhline(theory.gradient, color=BLACK, linewidth=1,
                     label="theory, mean: $f_0\\sqrt{2/\\pi}$")  # fmt: skip
    gradient.plot(widths, theory.median, color=BLACK, linewidth=1,
                  linestyle="--", label="theory, median")  # fmt: skip
    for scale, colour, label in scales:
        error_bars(below, widths, result.below[scale, KINDS.index("gradient")], colour, label)
    below.plot(widths, theory.below, color=BLACK, linewidth=1,
               label="theory, unscaled")  # fmt: skip
    below.set(ylabel=f"share of gradients below {GONE:g}")
    # the curves of the entropy are named beside it
    for axes in (jacobian, gradient, below):
        axes.legend(fontsize=8)
    for axes in (jacobian, entropy, gradient, below):
        axes.set(xlabel="width d", xscale="log")
        axes.grid(alpha=0.3)
    return figure
