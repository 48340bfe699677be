"""Whether more heads steady an average that noisy keys make swing (A9).

The setting of A8 (orthonormal μ, k_a = γμ_a with γ ~ N(1, ½), logits not scaled); w is the weight
of v_a in the mean over heads. Three readings of "more heads":

    independent   each head sees its own γ, q = β(μ_a + μ_b)       Var w = Var w_a / heads
    identical     all heads see the same keys, q = β(μ_a + μ_b)    w = w_a: nothing falls
    specialised   the same keys, q_1 = βμ_a, q_2 = βμ_b
                  w = ½ [σ(βγ − ln(n−1)) + 1/(e^β + n−1)]

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
from experiments.engine.config import Logit, Samples, Seed, Several, Size
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
    equal,
    measured,
    normal_moments,
    share,
    share_interval,
    variance_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A9": "Several heads steady the average",
}

Keys = Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the noise."""
    samples: Samples = 20_000
    """Draws of the keys for each setting."""
    keys: Keys = 10
    """Number n of keys."""
    beta: Logit = 10.0
    """Length β of the query along each of its keys."""
    heads: Several[Size] = (2, 4, 8, 16)
    """How many heads see noise of their own."""
    betas: Several[Logit] = (5.0, 10.0, 20.0)
    """The β of the specialised heads' curve."""
    several_keys: Several[Keys] = (2, 30)
    """More n of the specialised heads, at `beta`."""


TINY = Config(samples=2000, keys=4, heads=(2, 3), betas=(10.0,), several_keys=(2,))


class Result(NamedTuple):
    """Variances of v_a's weight in the mean over heads."""

    one: np.ndarray
    independent: np.ndarray
    identical: np.ndarray
    identical_difference: np.ndarray
    specialised: np.ndarray
    positive: np.ndarray
    keys_specialised: np.ndarray
    lost: np.ndarray
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
    """Raise a `UsageError` if there is no memory for the noise, or for the keys of one draw."""
    heads = max(config.heads)
    memory.check(2 * 8 * config.samples * heads, "samples × heads")
    memory.check(2 * 8 * heads * config.keys**2, "heads × keys²")
    memory.check(2 * 8 * max(config.several_keys) ** 2, "several_keys")


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw the noise, attend with each kind of heads, and take the variance of their mean."""
    random = np.random.default_rng(config.seed)
    beta, keys = config.beta, config.keys
    # one head, γ > 0 at each β, and the share that loses k_a
    count = len(config.heads) + 2 * len(config.betas) + len(config.several_keys) + 3
    level = share(count)
    variance = partial(variance_interval, level=level)

    def draw(heads: int) -> np.ndarray:
        return draw_gamma(random, (config.samples, heads))

    def specialised(gamma: np.ndarray, beta: float, keys: int) -> np.ndarray:
        return in_chunks(lambda g: _specialised(g, beta, keys), gamma, keys)

    with jax.enable_x64(True):
        independent = [
            in_chunks(lambda g: _independent(g, beta, keys), draw(heads), keys * heads)
            for heads in config.heads
        ]
        gamma = draw(1)[:, 0]
        same = in_chunks(lambda g: _identical(g, beta, keys), gamma, keys)
        one = in_chunks(lambda g: _independent(g, beta, keys), gamma[:, None], keys)[:, 0]
        gammas = [draw(1)[:, 0] for _ in config.betas]
        by_beta = [
            specialised(g, b, keys).mean(axis=1) for g, b in zip(gammas, config.betas, strict=True)
        ]
        by_keys = [specialised(draw(1)[:, 0], beta, n).mean(axis=1) for n in config.several_keys]
        pair = specialised(gamma, beta, keys)
    return Result(
        one=np.array(variance(one)),
        independent=np.array([variance(w.mean(axis=1)) for w in independent]),
        identical=np.array(variance(same.mean(axis=1))),
        identical_difference=np.array(np.max(np.abs(same.mean(axis=1) - one))),
        specialised=np.array([variance(w) for w in by_beta]),
        positive=np.array([variance(w[g > 0]) for g, w in zip(gammas, by_beta, strict=True)]),
        keys_specialised=np.array([variance(w) for w in by_keys]),
        lost=np.array(share_interval(int(np.sum(pair[:, 0] < 0.5)), config.samples, level)),
        weights_one=one[:20_000],
        weights_independent=independent[0].mean(axis=1)[:20_000],
        weights_specialised=pair.mean(axis=1)[:20_000],
        scores={
            "one_head_variance": float(np.var(one)),
            "specialised_variance": float(np.var(pair.mean(axis=1))),
        },
    )


def one_head_variance(config: Config) -> float:
    """Var w of one head, by quadrature."""
    weight = lambda gamma: predicted_weight(gamma, config.beta, config.keys)
    return normal_moments(weight, 1.0, VARIANCE)[1]


def specialised_variance(beta: float, keys: int, low: float = -math.inf) -> float:
    """Var w of the two specialised heads, given γ > low, by quadrature."""
    return normal_moments(
        lambda gamma: predicted_specialised(gamma, beta, keys), 1.0, VARIANCE, low
    )[1]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A9, in its three readings."""
    setting = f"β = {config.beta:g}, n = {config.keys}"
    single = one_head_variance(config)
    none = (single, "no reduction")
    independent = [
        measured(
            f"variance, {heads} heads with independent noise, {setting}",
            single / heads, Estimate(*variance), *none,
        )
        for heads, variance in zip(config.heads, result.independent, strict=True)
    ]  # fmt: skip
    # what the printed claim says of two heads, which these two do better or worse than
    halved = (single / 2, "half of one head's variance, as with independent noise")
    specialised = [
        evidence
        for b, all_, positive in zip(
            config.betas, result.specialised, result.positive, strict=True
        )
        for evidence in (
            measured(
                f"variance, two specialised heads, β = {b:g}, n = {config.keys}",
                specialised_variance(b, config.keys), Estimate(*all_), *halved,
            ),
            measured(
                f"variance, two specialised heads, given γ > 0, β = {b:g}, n = {config.keys}",
                specialised_variance(b, config.keys, 0.0), Estimate(*positive),
                specialised_variance(b, config.keys), "without the condition",
            ),
        )
    ]  # fmt: skip
    by_keys = [
        measured(
            f"variance, two specialised heads, β = {config.beta:g}, n = {n}",
            specialised_variance(config.beta, n), Estimate(*estimate), *halved,
        )
        for n, estimate in zip(config.several_keys, result.keys_specialised, strict=True)
    ]  # fmt: skip
    # head 1 loses k_a where its weight falls below one half
    threshold = math.log(config.keys - 1) / config.beta
    right = [
        *independent,
        *specialised,
        *by_keys,
        measured(f"variance, one head, {setting}", single, Estimate(*result.one), 0.0, "no swing"),
        measured(
            f"share of draws in which head 1 loses k_a, {setting}",
            stats.norm.cdf(threshold, 1, math.sqrt(VARIANCE)), Estimate(*result.lost),
            stats.norm.cdf(-1 / math.sqrt(VARIANCE)), "P(γ < 0), its limit for β → ∞",
        ),
        equal(
            f"largest difference between one head and the mean of two identical ones, {setting}",
            0, result.identical_difference, 0.0,
        ),
    ]  # fmt: skip
    beyond = measured(
        f"variance, two heads with the same query and the same keys, {setting}",
        single / 2, Estimate(*result.identical), single, "no reduction",
    )  # fmt: skip
    return (
        Claim(
            "A9",
            r"\operatorname{Var}\Big[\frac{1}{H}\sum_h w_a^{(h)}\Big] = \frac{1}{H}"
            r"\operatorname{Var} w_a \quad\text{(independent noise)},\qquad "
            r"w = \tfrac12\big[\sigma(\beta\gamma - \ln(n-1)) + \tfrac{1}{e^\beta + n - 1}\big]"
            r"\quad\text{(specialised)}",
            "The variance of v_a's weight in the mean over heads: with noise of its own for each "
            "head it is 1/H of one head's, and not one head's; for two specialised heads it is "
            "that of the exact softmax by quadrature; two identical heads equal one, array for "
            "array.",
            tuple(right),
            beyond=(beyond,),
            note="With the same keys for all heads, the usual reading, identical queries give "
            "identical heads and nothing falls. Queries that each look for one key do it, but for "
            "the draws in which γ is so small that the first head loses its key.",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Variance against heads; its dependence on β; the weights' distributions."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, error_bars, new_figure

    figure = new_figure(10, 3.8)
    heads, beta, weights = figure.subplots(1, 3)
    grid, single = np.arange(1, max(config.heads) + 1), one_head_variance(config)
    heads.plot(grid, single / grid, color=BLACK, label="one head's / H")
    error_bars(heads, 1, result.one, RED, "one head")
    error_bars(heads, config.heads, result.independent, BLUE, "independent noise")
    heads.axhline(single, color=ORANGE, linestyle="--", label="no reduction")
    error_bars(heads, 2, result.identical, ORANGE, "identical queries, shared keys")
    here = np.argmin(np.abs(np.array(config.betas) - config.beta))
    error_bars(heads, 2, result.specialised[here], GREEN, "specialised")
    heads.set(xlabel="heads H", ylabel="variance of the weight of $v_a$", xscale="log",
              yscale="log", title="More heads")  # fmt: skip
    heads.set_xticks([1, *config.heads], [1, *config.heads], minor=False)
    heads.minorticks_off()
    # room for the legend below
    heads.set_ylim(result.independent.min() / 6, None)

    betas = np.linspace(min(config.betas), max(config.betas), 40)
    for estimates, low, colour, line, label in (
        (result.specialised, -math.inf, GREEN, "-", "all γ"),
        (result.positive, 0.0, RED, "--", "γ > 0"),
    ):
        curve = [specialised_variance(b, config.keys, low) for b in betas]
        beta.plot(betas, curve, color=colour, linestyle=line, label=f"softmax, {label}")
        error_bars(beta, config.betas, estimates, colour, f"measured, {label}")
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
    weights.set(xlabel="weight of $v_a$", ylabel="share of draws (bins of 0.025)", yscale="log",
                ylim=(3e-4, 1), title="The weight itself")  # fmt: skip
    for axes in (heads, beta, weights):
        axes.grid(alpha=0.3)
    heads.legend(fontsize=8, loc="lower left")
    beta.legend(fontsize=8)
    weights.legend(fontsize=8, loc="lower center")
    return figure
