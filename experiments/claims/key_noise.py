"""What noise in the keys does to a query that lies half-way between two of them (A7, A8).

n values with orthonormal directions μ, the first two of them a and b; q = β(μ_a + μ_b), logits not
scaled. Two kinds of noise:

    A7   k_i ~ N(μ_i, αI)                        logits are independent N(β or 0, 2αβ²)
    A8   k_a = γ μ_a, γ ~ N(1, ½), k_i = μ_i     w_a = 1 / (1 + e^{β(1−γ)} + (n−2) e^{−βγ})

w_a is the weight of v_a in the output, measured by attending to values of 1 at a and 0 elsewhere.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from scipy import special, stats

from experiments.engine import memory
from experiments.engine.config import Logit, Samples, Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.models.noisy_keys import (
    VARIANCE,
    draw_gamma,
    in_chunks,
    log_rest,
    predicted_weight,
    stretched_keys,
    weight_of_first,
)
from experiments.models.normal_logits import weight_moments
from experiments.report.evidence import Claim, each, equal
from experiments.report.intervals import Exact, Mean, Share, variance
from experiments.report.quadrature import normal_moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A7": "Averaging survives a little noise in the keys",
    "A8": "A key of uncertain length makes the average swing",
}

SWUNG = 0.1
"""An output has swung to one value when the other's weight is below this."""

ROUNDING = 1e-12
"""What float64 leaves of a weight."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the noise."""
    samples: Samples = 20_000
    """Draws of the keys for each setting."""
    keys: Annotated[Size, Field(ge=3)] = 10
    """Number n of keys, where β or α varies."""
    beta: Logit = 10.0
    """Length β of the query along each of the two keys, where n varies."""
    betas: Several[Logit] = (1.0, 2.0, 5.0, 10.0, 20.0)
    """The β of A8's curve."""
    several_keys: Several[Annotated[Size, Field(ge=2)]] = (2, 10, 30)
    """The n of A8's curve."""
    blurred_beta: Logit = 40.0
    """β of A7, where α varies: so long that the other keys keep out of it."""
    spreads: tuple[Annotated[float, Field(ge=1e-4, le=700)], ...] = (0.003, 0.01, 0.1, 1.0, 10.0)
    """The αβ² of A7's curve, rising: the first two are where it should average."""
    short_betas: Several[Logit] = (0.5, 1.0, 2.0)
    """β of A7 at the first αβ²: so short that the other keys take part."""


TINY = Config(samples=2000, keys=4, several_keys=(2, 3), betas=(2.0, 10.0))


class Result(NamedTuple):
    """Means and variances of w_a, a `Mean` in each row, a `Share`, and some of A8's draws."""

    blurred_mean: np.ndarray
    """Of A7, by αβ²."""
    blurred_variance: np.ndarray
    short_mean: np.ndarray
    """Of A7, by β."""
    swing_mean: np.ndarray
    """Of A8, by `settings`."""
    swing_variance: np.ndarray
    swung: np.ndarray
    noisy_query_variance: np.ndarray
    formula_error: np.ndarray
    """Largest, of the formula of w_a, and of that without the n − 2 other keys."""
    gamma: np.ndarray
    weight: np.ndarray
    scores: dict[str, float]


@partial(jax.jit, static_argnums=2)
def _between(gamma, beta, keys):
    """w_a with q = β(μ_a + μ_b)."""
    query = jnp.zeros((len(gamma), 1, 1, keys), gamma.dtype).at[..., :2].set(beta)
    return weight_of_first(query, stretched_keys(gamma[:, None], keys))[:, 0, 0]


@partial(jax.jit, static_argnums=2)
def _between_noisy(gamma, beta, keys):
    """w_a with q = β(k_a + k_b), made of the stretched key itself."""
    key = stretched_keys(gamma[:, None], keys)
    query = beta * (key[:, 0] + key[:, 1])
    return weight_of_first(query[:, None], key)[:, 0, 0]


@partial(jax.jit, static_argnums=2)
def _between_blurred(noise, beta, keys):
    """w_a with q = β(μ_a + μ_b) and keys blurred by noise, (B, S, K)."""
    key = jnp.eye(keys, dtype=noise.dtype)[None] + noise
    query = jnp.zeros((len(noise), 1, 1, keys), noise.dtype).at[..., :2].set(beta)
    return weight_of_first(query, key[:, :, None])[:, 0, 0]


def blurred_moments(spread: float, beta: float, keys: int) -> tuple[float, float]:
    """Mean and variance of w_a of A7, by quadrature."""
    mean, square = weight_moments(keys, math.sqrt(2 * spread), lead=beta, leaders=2)
    return mean, square - mean**2


def swing_moments(beta: float, keys: int) -> tuple[float, float]:
    """Mean and variance of w_a of A8, by quadrature."""
    return normal_moments(lambda gamma: predicted_weight(gamma, beta, keys), 1.0, VARIANCE)


def noisy_query_variance(beta: float, keys: int) -> float:
    """Var w_a of A8 with a query made of the noisy key, by quadrature: the logit is βγ²."""
    return normal_moments(lambda gamma: predicted_weight(gamma**2, beta, keys), 1.0, VARIANCE)[1]


def swung_share(beta: float, keys: int) -> float:
    """P(w_a < SWUNG or w_a > 1 − SWUNG): w_a rises with γ, so each is a tail of γ."""
    ends = (special.logit([SWUNG, 1 - SWUNG]) + log_rest(beta, keys)) / beta
    low, high = stats.norm.cdf(ends, 1, math.sqrt(VARIANCE))
    return float(low + 1 - high)


def settings(config: Config) -> list[tuple[float, int]]:
    """The β and n of A8, each once; the first is that of the notes."""
    by_beta = [(beta, config.keys) for beta in config.betas]
    by_keys = [(config.beta, keys) for keys in config.several_keys]
    return list(dict.fromkeys([(config.beta, config.keys), *by_beta, *by_keys]))


def check(config: Config) -> None:
    """Raise a UsageError if A7's β or αβ² are not what they should show, or if there is no memory
    for the noise."""
    memory.check(2 * 8 * config.samples * config.keys**2, "samples × keys²")
    memory.check(2 * 8 * max(config.several_keys) ** 2, "several_keys")
    spreads, others = config.spreads, config.keys - 2
    if list(spreads) != sorted(spreads) or len(spreads) < 3:
        raise UsageError(f"spreads: need three or more, rising, got {spreads}")
    if others * math.exp(-config.blurred_beta) > 1e-3:
        raise UsageError(
            f"blurred_beta: {config.blurred_beta:g} is too short: other keys would take part; "
            f"needs about {math.log(1e3 * others):.3g}"
        )
    if others * math.exp(-max(config.short_betas)) < 0.1:
        raise UsageError(
            f"short_betas: {max(config.short_betas):g} is too long: other keys would hardly take "
            f"part; needs {math.log(10 * others):.3g} at most"
        )


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw the noise, attend, and take the moments of the weight."""
    random = np.random.default_rng(config.seed)
    beta, keys = config.beta, config.keys

    def swing(beta: float, keys: int) -> np.ndarray:
        gamma = draw_gamma(random, (config.samples,))
        return in_chunks(lambda g: _between(g, beta, keys), gamma, keys)

    def blur(spread: float, beta: float) -> np.ndarray:
        noise = random.normal(0, math.sqrt(spread) / beta, (config.samples, keys, keys))
        return in_chunks(lambda x: _between_blurred(x, beta, keys), noise, keys)

    with jax.enable_x64(True):
        gamma = draw_gamma(random, (config.samples,))
        weight = in_chunks(lambda g: _between(g, beta, keys), gamma, keys)
        noisy = in_chunks(lambda g: _between_noisy(g, beta, keys), gamma, keys)
        swinging = [weight, *(swing(*setting) for setting in settings(config)[1:])]
        blurred = [blur(spread, config.blurred_beta) for spread in config.spreads]
        short = [blur(config.spreads[0], b) for b in config.short_betas]
    formulas = (predicted_weight(gamma, beta, n) for n in (keys, 2))
    return Result(
        blurred_mean=np.array([Mean.of(w) for w in blurred]),
        blurred_variance=np.array([variance(w) for w in blurred]),
        short_mean=np.array([Mean.of(w) for w in short]),
        swing_mean=np.array([Mean.of(w) for w in swinging]),
        swing_variance=np.array([variance(w) for w in swinging]),
        swung=np.array(Share.of((weight < SWUNG) | (weight > 1 - SWUNG))),
        noisy_query_variance=np.array(variance(noisy)),
        formula_error=np.array([np.max(np.abs(weight - formula)) for formula in formulas]),
        gamma=gamma[:2000],
        weight=weight[:2000],
        scores={"variance": float(np.var(weight)), "noisy_query_variance": float(np.var(noisy))},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A7 where the noise is small and where it is not; A8's swing against β and n."""
    return _averaging_survives(config, result), _the_average_swings(config, result)


def _averaging_survives(config: Config, result: Result) -> Claim:
    n, long, spreads = config.keys, config.blurred_beta, config.spreads
    means, variances = (
        [Mean(*row) for row in rows] for rows in (result.blurred_mean, result.blurred_variance)
    )
    mean, spread = np.array([blurred_moments(s, long, n) for s in spreads]).T
    # as if k_b were μ_b itself
    one_noisy = [normal_moments(special.expit, 0.0, 2 * s)[1] for s in spreads[:2]]
    short = [blurred_moments(spreads[0], beta, n)[0] for beta in config.short_betas]
    at_variance = f"variance of the weight of v_a, αβ² = {{}} (β = {long:g}, n = {n})"
    at_mean = f"mean of the weight of v_a, αβ² = {{}} (β = {long:g}, n = {n})"
    return Claim(
        "A7",
        r"k_i \sim \mathcal{N}(\mu_i, \alpha I),\quad q = \beta(\mu_a + \mu_b)"
        r"\;\Rightarrow\; \mathbb{E}\, w_a \approx \tfrac12,\quad"
        r"\operatorname{Var} w_a \approx \tfrac14 \alpha\beta^2"
        r"\quad(\alpha\beta^2 \ll 1,\ (n-2)e^{-\beta} \ll 1)",
        "For small αβ² and long β mean and variance of v_a's weight are those of the exact softmax "
        "by quadrature, the variance not that of noise in one of the two keys alone. For large αβ² "
        "the variance is no longer that small, and for short β the mean is no longer ½.",
        right=(
            *each(at_variance, spreads[:2], spread[:2], variances[:2],
                  one_noisy, "noise in k_a alone"),
            *each(at_mean, spreads[:2], mean[:2], means[:2]),
        ),
        beyond=(
            # as small as for the smallest αβ², however large it is
            *each(at_variance, spreads[2:], spread[0], variances[2:],
                  spread[2:], "quadrature at this αβ²"),
            *each(f"mean of the weight of v_a, β = {{}} (αβ² = {spreads[0]:g}, n = {n})",
                  config.short_betas, 0.5, [Mean(*row) for row in result.short_mean],
                  short, "quadrature at this β"),
        ),
        note="α tiny is not enough: β → ∞ at any fixed α gives the swinging of A8, as the logit "
        "difference of the two keys is N(0, 4αβ²). Nor may β be short: then the others take part.",
        printed_equation=r"\beta \gg 0,\quad q = \beta K_a + \beta K_b \Leftrightarrow "
        r"k_i \approx \mu_i",
    )  # fmt: skip


def _the_average_swings(config: Config, result: Result) -> Claim:
    first = f"β = {config.beta:g}, n = {config.keys}"
    at = settings(config)
    named = [f"β = {beta:g}, n = {n}" for beta, n in at]
    mean, var = np.array([swing_moments(*setting) for setting in at]).T
    noisy = [noisy_query_variance(*setting) for setting in at]
    # where the others take no part, it is ½ all the same
    half = np.where(mean < 0.4, 0.5, np.nan)
    formula, printed = (Exact(error, ROUNDING) for error in result.formula_error)
    # beyond that, float64 cannot tell them apart
    told = (config.keys - 2) * math.exp(-config.beta) > 1e-9
    return Claim(
        "A8",
        r"w_a = \frac{1}{1 + e^{\beta(1-\gamma)} + (n-2)\,e^{-\beta\gamma}},\quad"
        r"\gamma \sim \mathcal{N}(1, \tfrac12)\;\Rightarrow\; c"
        r"\text{ swings between } v_a \text{ and } v_b",
        "Mean and variance of v_a's weight are those of the exact softmax by quadrature at every β "
        "and n, the variance not that of a query made of the noisy key, and the other way round; "
        "so is the share of draws that have swung to one value, which is not all of them.",
        right=(
            *each("variance of the weight of v_a, {}", named, var,
                  [Mean(*row) for row in result.swing_variance], noisy, "q made of the noisy key"),
            equal(f"variance of the weight of v_a if q is made of the noisy key, {first}",
                  noisy[0], Mean(*result.noisy_query_variance), var[0], "q made of μ_a and μ_b"),
            equal(f"share of draws with a weight within {SWUNG} of 0 or of 1, {first}",
                  swung_share(*at[0]), Share(*result.swung), 1, "always at one of the two"),
            *each("mean of the weight of v_a, {}", named, mean,
                  [Mean(*row) for row in result.swing_mean], half, "½, as of two keys alone"),
            equal(f"largest error of the formula of w_a, {first}", 0, formula,
                  printed if told else None, "without the n − 2 others, as printed"),
        ),
        note="The mean stays ½ where β is long: it is each single output that is no average.",
        printed_equation=r"c = \frac{e^{\gamma\beta}}{e^{\gamma\beta} + e^\beta} v_a +"
        r"\frac{e^\beta}{e^\beta + e^{\gamma\beta}} v_b",
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Variance of w_a against β and αβ², and the weights themselves."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, error_bars, new_figure

    figure = new_figure(10, 3.8)
    draws, swing, blur = figure.subplots(1, 3)
    beta, keys, betas, spreads = config.beta, config.keys, config.betas, config.spreads
    gamma = np.linspace(result.gamma.min(), result.gamma.max(), 300)
    draws.plot(result.gamma, result.weight, ".", color=BLUE, alpha=0.4, label="a draw")
    draws.plot(gamma, predicted_weight(gamma, beta, keys), color=BLACK, label="exact softmax")
    draws.axhline(0.5, color=ORANGE, linestyle="--", label="the average")
    draws.set(xlabel="stretch γ of key a", title=f"A8: it swings (β = {beta:g})")

    grid = np.geomspace(min(betas), max(betas), 60)
    curve = [swing_moments(b, keys)[1] for b in grid]
    swing.plot(grid, curve, color=BLACK, label=f"exact softmax, n = {keys:g}")
    at = settings(config)
    shown = [Mean(*result.swing_variance[at.index((b, keys))]) for b in betas]
    error_bars(swing, betas, shown, BLUE, "measured")
    swing.axhline(0.25, color=ORANGE, linestyle="--", label="limit ¼")
    swing.set(xlabel="query length β", xscale="log", title="A8: more so with β", ylim=(0, 0.27))

    spread = np.geomspace(min(spreads), max(spreads), 40)
    curve = [blurred_moments(s, config.blurred_beta, keys)[1] for s in spread]
    blur.plot(spread, curve, color=BLACK, label="exact softmax")
    small = spread[spread < 1]
    blur.plot(small, small / 4, color=GREEN, linestyle=":", label="αβ²/4")
    error_bars(blur, spreads, [Mean(*row) for row in result.blurred_variance], BLUE, "measured")
    blur.axhline(0.25, color=ORANGE, linestyle="--", label="limit ¼")
    blur.set(xlabel="αβ²", xscale="log", yscale="log", title="A7: small noise averages")
    draws.set_ylabel("weight of $v_a$")
    for axes in (swing, blur):
        axes.set_ylabel("variance of the weight of $v_a$")
    for axes in (draws, swing, blur):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
