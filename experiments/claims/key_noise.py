"""What noise in the keys does to a query that lies half-way between two of them (A7, A8).

n values with orthonormal directions μ, the first two of them a and b; q = β(μ_a + μ_b), logits not
scaled. Two kinds of noise:

    A7   k_i ~ N(μ_i, αI)                        the logit difference of a and b is N(0, 4αβ²)
    A8   k_a = γ μ_a, γ ~ N(1, ½), k_i = μ_i     w_a = 1 / (1 + e^{β(1−γ)} + (n−2) e^{−βγ})

w_a is the weight of v_a in the output, measured by attending to values of 1 at a and 0 elsewhere.
Measured arrays have a last axis of (value, low, high).
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
    predicted_weight,
    stretched_keys,
    weight_of_first,
)
from experiments.report.evidence import (
    Claim,
    Estimate,
    Evidence,
    equal,
    mean_interval,
    measured,
    normal_moments,
    share,
    share_interval,
    variance_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A7": "Averaging survives a little noise in the keys",
    "A8": "A key of uncertain length makes the average swing",
}

SWUNG = 0.1
"""An output has swung to one value when the other's weight is below this."""

Keys = Annotated[Size, Field(ge=2)]


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the noise."""
    samples: Samples = 20_000
    """Draws of the keys for each setting."""
    keys: Keys = 10
    """Number n of keys, where β or α varies."""
    beta: Logit = 10.0
    """Length β of the query along each of the two keys, where n or α varies."""
    betas: Several[Logit] = (1.0, 2.0, 5.0, 10.0, 20.0)
    """The β of A8's curve."""
    several_keys: Several[Keys] = (2, 10, 30)
    """The n of A8's curve."""
    blurred_beta: Logit = 40.0
    """β of A7, where α varies: so long that the other keys keep out of it at every αβ²."""
    spreads: tuple[Logit, ...] = (0.003, 0.01, 0.1, 1.0, 10.0)
    """The αβ² of A7's curve, rising: the first two are where it should average."""


TINY = Config(samples=2000, keys=4, several_keys=(2, 3), betas=(2.0, 10.0))


class Result(NamedTuple):
    """Variance of w_a against β, n and αβ², and single numbers."""

    beta_variance: np.ndarray
    keys_variance: np.ndarray
    spread_variance: np.ndarray
    mean: np.ndarray
    swung: np.ndarray
    noisy_query: np.ndarray
    gamma: np.ndarray
    weight: np.ndarray
    formula_error: np.ndarray
    scores: dict[str, float]


def swing_variance(beta: float, keys: int) -> float:
    """Var w_a of A8, by quadrature."""
    return normal_moments(lambda gamma: predicted_weight(gamma, beta, keys), 1.0, VARIANCE)[1]


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


def _blurred_variance(spread: float, beta: float, keys: int) -> float:
    """Var w_a of A7 by quadrature over the logit difference of a and b, which is N(0, 4αβ²).

    The other keys enter through the mean of their weight relative to the two, which `check` has
    made sure is negligible.
    """
    others = _others(spread, beta, keys)

    def weight(difference):
        return special.expit(difference) / (1 + others / (2 * np.cosh(difference / 2)))

    return normal_moments(weight, 0.0, 4 * spread)[1]


def _others(spread: float, beta: float, keys: int) -> float:
    """E Σ e^{logit of another key − mean logit of a and b}, that is of N(−β, 3αβ²)."""
    return (keys - 2) * math.exp(min(-beta + 1.5 * spread, 0.0))


def _noisy_query_variance(beta: float, keys: int) -> float:
    """Var w_a with a query made of the noisy key, by quadrature."""

    def weight(gamma: np.ndarray) -> np.ndarray:
        rest = (keys - 2) * np.exp(-beta * gamma**2)
        return 1 / (1 + np.exp(beta * (1 - gamma**2)) + rest)

    return normal_moments(weight, 1.0, VARIANCE)[1]


def _swung_share(beta: float, keys: int) -> float:
    """P(w_a < SWUNG or w_a > 1 − SWUNG): w_a rises with γ, so each is a tail of γ."""
    odds = (1 - SWUNG) / SWUNG
    # 1/w − 1 = e^{−βγ} (e^β + n − 2)
    shift = math.log(math.exp(beta) + keys - 2)
    ends = [(shift + sign * math.log(odds)) / beta for sign in (-1, 1)]
    low, high = stats.norm.cdf(ends, 1, math.sqrt(VARIANCE))
    return float(low + 1 - high)


def check(config: Config) -> None:
    """Raise a UsageError if A7's prediction would not be exact, or has no small αβ² to show, or if
    there is no memory for the noise."""
    memory.check(2 * 8 * config.samples * config.keys**2, "samples × keys²")
    memory.check(2 * 8 * max(config.several_keys) ** 2, "several_keys")
    if list(config.spreads) != sorted(config.spreads) or len(config.spreads) < 3:
        raise UsageError(f"spreads: need three or more, rising, got {config.spreads}")
    if _others(config.spreads[-1], config.blurred_beta, config.keys) > 1e-6:
        raise UsageError(
            f"blurred_beta: {config.blurred_beta:g} is too short for αβ² = {config.spreads[-1]:g}: "
            "other keys would take part; needs about 1.5 αβ² + 16"
        )


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw the noise, attend, and take the moments of the weight."""
    random = np.random.default_rng(config.seed)
    beta, keys = config.beta, config.keys
    level_a7 = share(len(config.spreads))
    # and the mean, the share that has swung, and the noisy query
    level_a8 = share(len(config.betas) + len(config.several_keys) + 3)

    def swing(beta: float, keys: int) -> np.ndarray:
        gamma = draw_gamma(random, (config.samples,))
        return in_chunks(lambda g: _between(g, beta, keys), gamma, keys)

    def blur(spread: float) -> np.ndarray:
        long = config.blurred_beta
        noise = random.normal(0, math.sqrt(spread) / long, (config.samples, keys, keys))
        return in_chunks(lambda x: _between_blurred(x, long, keys), noise, keys)

    def variance(weight: np.ndarray, level: float) -> Estimate:
        return variance_interval(weight, level)

    with jax.enable_x64(True):
        gamma = draw_gamma(random, (config.samples,))
        weight = in_chunks(lambda g: _between(g, beta, keys), gamma, keys)
        noisy = in_chunks(lambda g: _between_noisy(g, beta, keys), gamma, keys)
        by_beta = [variance(swing(b, keys), level_a8) for b in config.betas]
        by_keys = [variance(swing(beta, n), level_a8) for n in config.several_keys]
        by_spread = [variance(blur(spread), level_a7) for spread in config.spreads]
    swung = int(np.sum((weight < SWUNG) | (weight > 1 - SWUNG)))
    return Result(
        beta_variance=np.array(by_beta),
        keys_variance=np.array(by_keys),
        spread_variance=np.array(by_spread),
        mean=np.array(mean_interval(weight, level_a8)),
        swung=np.array(share_interval(swung, config.samples, level_a8)),
        noisy_query=np.array(variance(noisy, level_a8)),
        gamma=gamma[:2000],
        weight=weight[:2000],
        formula_error=np.array(np.max(np.abs(weight - predicted_weight(gamma, beta, keys)))),
        scores={"variance": float(np.var(weight)), "noisy_query_variance": float(np.var(noisy))},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A7 where the noise is small and where it is not; A8's swing against β and n."""
    return _averaging_survives(config, result), _the_average_swings(config, result)


def _averaging_survives(config: Config, result: Result) -> Claim:
    swing = swing_variance(config.beta, config.keys)
    predicted_at = [
        _blurred_variance(spread, config.blurred_beta, config.keys) for spread in config.spreads
    ]
    spreads = list(zip(config.spreads, result.spread_variance, predicted_at, strict=True))

    def name(spread: float) -> str:
        return f"variance of the weight of v_a, αβ² = {spread:g} (n = {config.keys})"

    right = [
        measured(name(s), predicted, Estimate(*estimate), swing, "the swing of A8")
        for s, estimate, predicted in spreads[:2]
    ]
    # as small as for the smallest spread, however large the spread
    beyond = [
        measured(name(s), spreads[0][2], Estimate(*estimate), predicted, "quadrature at this αβ²")
        for s, estimate, predicted in spreads[2:]
    ]
    return Claim(
        "A7",
        r"k_i \sim \mathcal{N}(\mu_i, \alpha I),\quad q = \beta(\mu_a + \mu_b)"
        r"\;\Rightarrow\; \operatorname{Var} w_a \approx \tfrac14 \alpha\beta^2"
        r"\quad(\alpha\beta^2 \ll 1)",
        "For small αβ² the variance of v_a's weight is that of the exact softmax, by quadrature, "
        "and not that of the swing of A8; for large αβ² it is no longer that small.",
        tuple(right),
        beyond=tuple(beyond),
        note="α tiny is not enough: β → ∞ at any fixed α gives the swinging of A8, as the logit "
        "difference of the two keys is N(0, 4αβ²).",
    )


def _the_average_swings(config: Config, result: Result) -> Claim:
    setting = f"β = {config.beta:g}, n = {config.keys}"
    at = "variance of the weight of v_a"
    steady = (0.0, "c stays the mean of the two")

    def swing(beta: float, keys: int, variance: np.ndarray) -> Evidence:
        name = f"{at}, β = {beta:g}, n = {keys}"
        return measured(name, swing_variance(beta, keys), Estimate(*variance), *steady)

    by_beta = [
        swing(beta, config.keys, variance)
        for beta, variance in zip(config.betas, result.beta_variance, strict=True)
    ]
    by_keys = [
        swing(config.beta, keys, variance)
        for keys, variance in zip(config.several_keys, result.keys_variance, strict=True)
    ]
    # the headline is the setting of the notes
    by_beta.sort(key=lambda evidence: f"β = {config.beta:g}," not in evidence.name)
    right = [
        *by_beta,
        *by_keys,
        measured(
            f"share of draws with a weight within {SWUNG} of 0 or of 1, {setting}",
            _swung_share(config.beta, config.keys), Estimate(*result.swung), *steady,
        ),
        measured(f"mean of the weight of v_a, {setting}", 0.5, Estimate(*result.mean)),
        measured(
            f"{at} if q is made of the noisy key, {setting}",
            _noisy_query_variance(config.beta, config.keys), Estimate(*result.noisy_query), *steady,
        ),
        equal(f"largest error of the formula of w_a, {setting}", 0, result.formula_error, 1e-12),
    ]  # fmt: skip
    return Claim(
        "A8",
        r"w_a = \frac{1}{1 + e^{\beta(1-\gamma)} + (n-2)\,e^{-\beta\gamma}},\quad"
        r"\gamma \sim \mathcal{N}(1, \tfrac12)\;\Rightarrow\; c"
        r"\text{ swings between } v_a \text{ and } v_b",
        "The variance of v_a's weight is that of the exact softmax by quadrature at every β and n, "
        "and not 0; so is the share of draws that have swung; the mean is ½.",
        tuple(right),
    )


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
    curve = [swing_variance(b, keys) for b in grid]
    swing.plot(grid, curve, color=BLACK, label=f"exact softmax, n = {keys:g}")
    error_bars(swing, betas, result.beta_variance, BLUE, "measured")
    swing.axhline(0.25, color=ORANGE, linestyle="--", label="limit ¼")
    swing.set(xlabel="query length β", xscale="log", title="A8: more so with β", ylim=(0, 0.27))

    spread = np.geomspace(min(spreads), max(spreads), 40)
    curve = [_blurred_variance(s, config.blurred_beta, keys) for s in spread]
    blur.plot(spread, curve, color=BLACK, label="exact softmax")
    small = spread[spread < 1]
    blur.plot(small, small / 4, color=GREEN, linestyle=":", label="αβ²/4")
    error_bars(blur, spreads, result.spread_variance, BLUE, "measured")
    blur.axhline(0.25, color=ORANGE, linestyle="--", label="limit ¼")
    blur.set(xlabel="αβ²", xscale="log", yscale="log", title="A7: small noise averages")
    draws.set_ylabel("weight of $v_a$")
    for axes in (swing, blur):
        axes.set_ylabel("variance of the weight of $v_a$")
    for axes in (draws, swing, blur):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
