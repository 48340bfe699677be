"""Whether more heads steady an average that noisy keys make swing (A9).

The setting of A8 (orthonormal μ, k_a = γμ_a with γ ~ N(1, ½), logits not scaled); w is the weight
of v_a in the mean over heads. Three readings of "more heads":

    independent   each head sees its own γ, q = β(μ_a + μ_b)       Var w = Var w_a / heads
    identical     all heads see the same keys, q = β(μ_a + μ_b)    w = w_a: nothing falls
    specialised   the same keys, q_1 = βμ_a, q_2 = βμ_b
                  w = ½ [σ(βγ − ln(n−1)) + 1/(e^β + n−1)]

Specialised heads steady the weight and bias it: the first one loses k_a where γ is small, and
E w < ½. Without noise (γ = 1) each reading averages, to within (n−2)e^{−β}.
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
from experiments.report.evidence import Claim, Evidence, equal
from experiments.report.intervals import Exact, Mean, Share, variance
from experiments.report.quadrature import normal_moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A9": "Several heads steady the average",
}

FEWEST = 8
"""Of so many draws that are not near ½, the interval of a mean is as good as it says."""

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
    """Number n of keys."""
    beta: Logit = 10.0
    """Length β of the query along each of its keys."""
    heads: Several[Size] = (2, 4, 8, 16)
    """How many heads see noise of their own."""
    betas: Several[Logit] = (5.0, 10.0, 20.0)
    """The β of the specialised heads' curve."""
    several_keys: Several[Annotated[Size, Field(ge=2)]] = (2, 30)
    """More n of the specialised heads, at `beta`."""


TINY = Config(samples=4000, keys=4, heads=(2, 3), betas=(10.0,), several_keys=(2,))


class Result(NamedTuple):
    """Mean and variance of v_a's weight in the mean over heads, a `Mean` in each row of two."""

    one: np.ndarray
    independent: np.ndarray
    """By the number of heads."""
    identical: np.ndarray
    identical_difference: np.ndarray
    """Largest, of the mean of two identical heads from one."""
    noiseless: np.ndarray
    """The weight in the mean of two identical heads without noise."""
    specialised: np.ndarray
    """By β."""
    positive: np.ndarray
    """The same, given γ > 0."""
    keys_specialised: np.ndarray
    """By n."""
    lost: np.ndarray
    """A `Share`."""
    weights_one: np.ndarray
    weights_independent: np.ndarray
    weights_specialised: np.ndarray
    scores: dict[str, float]


@partial(jax.jit, static_argnums=2)
def _independent(gamma, beta, keys):
    """w of each head, (B, heads), where head h sees keys of its own, stretched by γ_h."""
    query = jnp.zeros((len(gamma), 1, gamma.shape[1], keys), gamma.dtype).at[..., :2].set(beta)
    return weight_of_first(query, stretched_keys(gamma, keys))[:, 0]


@partial(jax.jit, static_argnums=2)
def _identical(gamma, beta, keys):
    """w of two heads with the same query and the same keys, (B, 2)."""
    query = jnp.zeros((len(gamma), 1, 2, keys), gamma.dtype).at[..., :2].set(beta)
    return weight_of_first(query, stretched_keys(gamma[:, None], keys))[:, 0]


@partial(jax.jit, static_argnums=2)
def _specialised(gamma, beta, keys):
    """w of two heads that see the same keys, one looking for a and the other for b, (B, 2)."""
    query = jnp.zeros((len(gamma), 1, 2, keys), gamma.dtype)
    query = query.at[:, 0, 0, 0].set(beta).at[:, 0, 1, 1].set(beta)
    return weight_of_first(query, stretched_keys(gamma[:, None], keys))[:, 0]


def predicted_specialised(gamma: np.ndarray, beta: float, keys: int) -> np.ndarray:
    """w of the two specialised heads, the exact softmax."""
    looking_for_a = special.expit(beta * gamma - math.log(keys - 1))
    looking_for_b = 1 / (math.exp(beta) + keys - 1)
    return (looking_for_a + looking_for_b) / 2


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the noise, or for the keys of one draw, or if
    hardly any draw of the specialised heads would have a short k_a, given γ > 0."""
    heads = max(config.heads)
    memory.check(2 * 8 * config.samples * heads, "samples × heads")
    memory.check(2 * 8 * heads * config.keys**2, "heads × keys²")
    memory.check(2 * 8 * max(config.several_keys) ** 2, "several_keys")
    beta = max(config.betas)
    short = lost_share(beta, config.keys) - lost_share(math.inf, config.keys)
    if config.samples * short < FEWEST:
        raise UsageError(
            f"samples: too few of {config.samples} have 0 < γ < ln(n − 1)/β at β = {beta:g} for an "
            f"interval; needs {math.ceil(FEWEST / short)}"
        )


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw the noise, attend with each kind of heads, and take the moments of their mean."""
    random = np.random.default_rng(config.seed)
    beta, keys = config.beta, config.keys

    def draw(heads: int) -> np.ndarray:
        return draw_gamma(random, (config.samples, heads))

    def specialised(gamma: np.ndarray, beta: float, keys: int) -> np.ndarray:
        return in_chunks(lambda g: _specialised(g, beta, keys), gamma, keys)

    def identical(gamma: np.ndarray) -> np.ndarray:
        return in_chunks(lambda g: _identical(g, beta, keys), gamma, keys).mean(axis=1)

    def moments(several: list[np.ndarray]) -> np.ndarray:
        return np.array([(Mean.of(w), variance(w)) for w in several])

    with jax.enable_x64(True):
        independent = [
            in_chunks(lambda g: _independent(g, beta, keys), draw(heads), keys * heads).mean(axis=1)
            for heads in config.heads
        ]
        gamma = draw(1)[:, 0]
        same = identical(gamma)
        one = in_chunks(lambda g: _independent(g, beta, keys), gamma[:, None], keys)[:, 0]
        gammas = [draw(1)[:, 0] for _ in config.betas]
        by_beta = [
            specialised(g, b, keys).mean(axis=1) for g, b in zip(gammas, config.betas, strict=True)
        ]
        by_keys = [specialised(draw(1)[:, 0], beta, n).mean(axis=1) for n in config.several_keys]
        pair = specialised(gamma, beta, keys)
        noiseless = identical(np.ones(1))
    return Result(
        one=moments([one])[0],
        independent=moments(independent),
        identical=moments([same])[0],
        identical_difference=np.array(np.max(np.abs(same - one))),
        noiseless=np.array(noiseless[0]),
        specialised=moments(by_beta),
        positive=moments([w[g > 0] for g, w in zip(gammas, by_beta, strict=True)]),
        keys_specialised=moments(by_keys),
        lost=np.array(Share.of(pair[:, 0] < 0.5)),
        weights_one=one[:20_000],
        weights_independent=independent[0][:20_000],
        weights_specialised=pair.mean(axis=1)[:20_000],
        scores={
            "one_head_variance": float(np.var(one)),
            "specialised_variance": float(np.var(pair.mean(axis=1))),
            "specialised_mean": float(np.mean(pair)),
        },
    )


def one_head_moments(config: Config) -> tuple[float, float]:
    """Mean and variance of w of one head, by quadrature."""
    weight = lambda gamma: predicted_weight(gamma, config.beta, config.keys)
    return normal_moments(weight, 1.0, VARIANCE)


def specialised_moments(beta: float, keys: int, low: float = -math.inf) -> tuple[float, float]:
    """Mean and variance of w of the two specialised heads, given γ > low, by quadrature."""
    weight = lambda gamma: predicted_specialised(gamma, beta, keys)
    return normal_moments(weight, 1.0, VARIANCE, low)


def lost_share(beta: float, keys: int) -> float:
    """P(γ < ln(n − 1)/β): the first specialised head loses k_a, its weight falls below one half."""
    return float(stats.norm.cdf(math.log(keys - 1) / beta, 1, math.sqrt(VARIANCE)))


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A9, in its three readings."""
    beta, n = config.beta, config.keys
    setting = f"β = {beta:g}, n = {n}"
    centre, single = one_head_moments(config)
    half = "half of one head's, as with independent noise"

    def both(
        of: str, predicted: tuple[float, float], rows: np.ndarray, mean_rival: tuple[float, str],
        rival: tuple[float, str],
    ) -> tuple[Evidence, Evidence]:  # fmt: skip
        """Evidence for the variance of v_a's weight, and for its mean."""
        mean, spread = (Mean(*row) for row in rows)
        return (
            equal(f"variance, {of}", predicted[1], spread, *rival),
            equal(f"mean, {of}", predicted[0], mean, *mean_rival),
        )

    average = (0.5, "½, as printed")
    biased = (specialised_moments(beta, n)[0], "that of specialised heads")
    independent = [
        both(f"{heads} heads with independent noise, {setting}", (centre, single / heads), rows,
             biased, (single, "no reduction"))
        for heads, rows in zip(config.heads, result.independent, strict=True)
    ]  # fmt: skip
    specialised = [
        both(f"two specialised heads, β = {b:g}, n = {keys}", specialised_moments(b, keys), rows,
             average, (single / 2, half))
        for b, keys, rows in (
            *zip(config.betas, [n] * len(config.betas), result.specialised, strict=True),
            *zip([beta] * len(config.several_keys), config.several_keys,
                 result.keys_specialised, strict=True),
        )
    ]  # fmt: skip
    positive = [
        both(f"two specialised heads, given γ > 0, β = {b:g}, n = {n}",
             specialised_moments(b, n, 0.0), rows,
             *((x, "without the condition") for x in specialised_moments(b, n)))
        for b, rows in zip(config.betas, result.positive, strict=True)
    ]  # fmt: skip
    told = (n - 2) * math.exp(-beta) > 1e-9
    right = [
        *(evidence for pair in (*independent, *specialised, *positive) for evidence in pair),
        equal(f"variance, one head, {setting}", single, Mean(*result.one[1]),
              single / 2, "that of two heads"),
        equal(f"share of draws in which head 1 loses k_a, {setting}",
              lost_share(beta, n), Share(*result.lost),
              lost_share(math.inf, n), "P(γ < 0), its limit for β → ∞"),
        equal(f"largest difference between one head and the mean of two identical ones, {setting}",
              0, Exact(float(result.identical_difference))),
        equal(f"weight of v_a, two identical heads without noise, {setting}",
              1 / (2 + (n - 2) * math.exp(-beta)), Exact(float(result.noiseless), ROUNDING),
              # beyond that, float64 cannot tell them apart
              float(predicted_specialised(np.ones(()), beta, n)) if told else None,
              "specialised heads"),
    ]  # fmt: skip
    beyond = equal(
        f"variance, two heads with the same query and the same keys, {setting}",
        single / 2, Mean(*result.identical[1]), single, "no reduction",
    )  # fmt: skip
    return (
        Claim(
            "A9",
            r"\operatorname{Var}\Big[\frac{1}{H}\sum_h w_a^{(h)}\Big] = \frac{1}{H}"
            r"\operatorname{Var} w_a \quad\text{(independent noise)},\qquad "
            r"w = \tfrac12\big[\sigma(\beta\gamma - \ln(n-1)) + \tfrac{1}{e^\beta + n - 1}\big]"
            r"\quad\text{(specialised)}",
            "Of v_a's weight in the mean over heads: with noise of its own for each head the "
            "variance is 1/H of one head's, and not one head's, at the same mean; for two "
            "specialised heads mean and variance are those of the exact softmax by quadrature; two "
            "identical heads equal one, array for array, and average where there is no noise.",
            tuple(right),
            beyond=(beyond,),
            note="With the same keys for all heads, the usual reading, identical queries give "
            "identical heads and nothing falls. Queries that each look for one key steady the "
            "average but bias it: the weight of v_a is 0.429 in the mean at β = 10, n = 10, and "
            "not ½, as the first head loses its key where γ is small, and the other has no noise "
            "to make up for it.",
            news="Two heads that each look for one of two keys steady their average, and bias it: "
            "0.429 where one head has ½.",
            printed_equation=r"q_1 = q_2 = \beta(K_a + K_b):\quad \gamma \to 1,\quad "
            r"c \sim \tfrac12(v_a + v_b)\quad\text{with more heads}",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Variance against heads; its dependence on β; the weights' distributions."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, error_bars, new_figure

    figure = new_figure(10, 3.8)
    heads, beta, weights = figure.subplots(1, 3)
    grid, single = np.arange(1, max(config.heads) + 1), one_head_moments(config)[1]
    heads.plot(grid, single / grid, color=BLACK, label="one head's / H")
    error_bars(heads, 1, [Mean(*result.one[1])], RED, "one head")
    of_heads = [Mean(*row) for row in result.independent[:, 1]]
    error_bars(heads, config.heads, of_heads, BLUE, "independent noise")
    heads.axhline(single, color=ORANGE, linestyle="--", label="no reduction")
    same = Mean(*result.identical[1])
    error_bars(heads, 2, [same], ORANGE, "identical queries, shared keys")
    here = np.argmin(np.abs(np.array(config.betas) - config.beta))
    error_bars(heads, 2, [Mean(*result.specialised[here, 1])], GREEN, "specialised")
    heads.set(xlabel="heads H", ylabel="variance of the weight of $v_a$", xscale="log",
              yscale="log", title="More heads")  # fmt: skip
    heads.set_xticks([1, *config.heads], [1, *config.heads], minor=False)
    heads.minorticks_off()
    # room for the legend below
    heads.set_ylim(result.independent[:, 1, 0].min() / 6, None)

    betas = np.linspace(min(config.betas), max(config.betas), 40)
    for rows, low, colour, line, label in (
        (result.specialised, -math.inf, GREEN, "-", "all γ"),
        (result.positive, 0.0, RED, "--", "γ > 0"),
    ):
        curve = [specialised_moments(b, config.keys, low)[1] for b in betas]
        beta.plot(betas, curve, color=colour, linestyle=line, label=f"softmax, {label}")
        found = [Mean(*row) for row in rows[:, 1]]
        error_bars(beta, config.betas, found, colour, f"measured, {label}")
    beta.set(xlabel="query length β", ylabel="variance of the weight of $v_a$", ylim=(0, None),
             title=f"Two specialised heads, n = {config.keys}")  # fmt: skip

    edges = np.linspace(0, 1, 41)
    for sample, colour, line, label in (
        (result.weights_one, ORANGE, "-", "one head"),
        (result.weights_independent, BLUE, "--", f"{config.heads[0]} heads, independent noise"),
        (result.weights_specialised, GREEN, "-", "two specialised heads"),
    ):
        shares = np.histogram(sample, edges)[0] / len(sample)
        weights.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.6, label=label)
        weights.axvline(sample.mean(), color=colour, linestyle=":", linewidth=1)
    weights.set(xlabel="weight of $v_a$", ylabel="share of draws (bins of 0.025)", yscale="log",
                ylim=(3e-4, 1), title="Weight (dotted: its mean)")  # fmt: skip
    for axes in (heads, beta, weights):
        axes.grid(alpha=0.3)
    heads.legend(fontsize=8, loc="lower left")
    beta.legend(fontsize=8)
    weights.legend(fontsize=8, loc="lower center")
    return figure
