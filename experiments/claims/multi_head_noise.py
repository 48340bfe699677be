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

from experiments.claims.key_noise import (
    VARIANCE,
    draw_gamma,
    in_chunks,
    predicted_weight,
    stretched_keys,
    weight_of_first,
)
from experiments.engine import memory
from experiments.engine.config import Logit, Samples, Seed, Several, Size
from experiments.engine.session import SILENT, Session
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

CLAIMS = ("A9",)

LABELS: dict[str, str] = {}
"""Nothing is logged."""

Keys = Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Decides the noise."""
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


class Result(NamedTuple):
    """Variances of v_a's weight in the mean over heads, predicted and measured.

    `setting` is (β, n), for the curves of the figure.
    """

    one: np.ndarray
    one_predicted: np.ndarray
    heads: np.ndarray
    independent: np.ndarray
    independent_predicted: np.ndarray
    identical: np.ndarray
    identical_difference: np.ndarray
    beta: np.ndarray
    specialised: np.ndarray
    specialised_predicted: np.ndarray
    positive: np.ndarray
    positive_predicted: np.ndarray
    keys: np.ndarray
    keys_specialised: np.ndarray
    keys_predicted: np.ndarray
    lost: np.ndarray
    lost_predicted: np.ndarray
    setting: np.ndarray
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
    single = normal_moments(lambda g: predicted_weight(g, beta, keys), 1.0, VARIANCE)[1]
    # head 1 loses k_a where its weight falls below one half
    threshold = math.log(keys - 1) / beta
    return Result(
        one=np.array(variance(one)),
        one_predicted=np.array(single),
        heads=np.array(config.heads),
        independent=np.array([variance(w.mean(axis=1)) for w in independent]),
        independent_predicted=single / np.array(config.heads),
        identical=np.array(variance(same.mean(axis=1))),
        identical_difference=np.array(np.max(np.abs(same.mean(axis=1) - one))),
        beta=np.array(config.betas),
        specialised=np.array([variance(w) for w in by_beta]),
        specialised_predicted=np.array([specialised_variance(b, keys) for b in config.betas]),
        positive=np.array([variance(w[g > 0]) for g, w in zip(gammas, by_beta, strict=True)]),
        positive_predicted=np.array([specialised_variance(b, keys, 0.0) for b in config.betas]),
        keys=np.array(config.several_keys),
        keys_specialised=np.array([variance(w) for w in by_keys]),
        keys_predicted=np.array([specialised_variance(beta, n) for n in config.several_keys]),
        lost=np.array(share_interval(int(np.sum(pair[:, 0] < 0.5)), config.samples, level)),
        lost_predicted=np.array(stats.norm.cdf(threshold, 1, math.sqrt(VARIANCE))),
        setting=np.array([beta, keys]),
        weights_one=one[:20_000],
        weights_independent=independent[0].mean(axis=1)[:20_000],
        weights_specialised=pair.mean(axis=1)[:20_000],
        scores={
            "one_head_variance": float(np.var(one)),
            "specialised_variance": float(np.var(pair.mean(axis=1))),
        },
    )


def specialised_variance(beta: float, keys: int, low: float = -math.inf) -> float:
    """Var w of the two specialised heads, given γ > low, by quadrature."""
    return normal_moments(
        lambda gamma: predicted_specialised(gamma, beta, keys), 1.0, VARIANCE, low
    )[1]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A9, in its three readings."""
    setting = f"β = {config.beta:g}, n = {config.keys}"
    single = float(result.one_predicted)
    none = (single, "no reduction")
    independent = [
        measured(f"variance, {h} heads with independent noise, {setting}", p, Estimate(*e), *none)
        for h, e, p in zip(
            result.heads, result.independent, result.independent_predicted, strict=True
        )
    ]
    # what the printed claim says of two heads, which these two do better or worse than
    halved = (single / 2, "half of one head's variance, as with independent noise")
    specialised = [
        evidence
        for b, all_, all_predicted, positive, positive_predicted in zip(
            result.beta, result.specialised, result.specialised_predicted,
            result.positive, result.positive_predicted, strict=True,
        )
        for evidence in (
            measured(
                f"variance, two specialised heads, β = {b:g}, n = {config.keys}",
                all_predicted, Estimate(*all_), *halved,
            ),
            measured(
                f"variance, two specialised heads, given γ > 0, β = {b:g}, n = {config.keys}",
                positive_predicted, Estimate(*positive), all_predicted, "without the condition",
            ),
        )
    ]  # fmt: skip
    by_keys = [
        measured(
            f"variance, two specialised heads, β = {config.beta:g}, n = {n}",
            predicted, Estimate(*estimate), *halved,
        )
        for n, estimate, predicted in zip(
            result.keys, result.keys_specialised, result.keys_predicted, strict=True
        )
    ]  # fmt: skip
    right = [
        *independent,
        *specialised,
        *by_keys,
        measured(f"variance, one head, {setting}", single, Estimate(*result.one), 0.0, "no swing"),
        measured(
            f"share of draws in which head 1 loses k_a, {setting}",
            result.lost_predicted, Estimate(*result.lost),
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


def plot(result: Result) -> "Figure":
    """Variance against heads; its dependence on β; the weights' distributions."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, error_bars, new_figure

    figure = new_figure(10, 3.8)
    heads, beta, weights = figure.subplots(1, 3)
    grid = np.arange(1, result.heads.max() + 1)
    heads.plot(grid, result.one_predicted / grid, color=BLACK, label="one head's / H")
    error_bars(heads, 1, result.one, RED, "one head")
    error_bars(heads, result.heads, result.independent, BLUE, "independent noise")
    heads.axhline(result.one_predicted, color=ORANGE, linestyle="--", label="no reduction")
    error_bars(heads, 2, result.identical, ORANGE, "identical queries, shared keys")
    here = np.argmin(np.abs(result.beta - result.setting[0]))
    error_bars(heads, 2, result.specialised[here], GREEN, "specialised")
    heads.set(xlabel="heads H", ylabel="variance of the weight of $v_a$", xscale="log",
              yscale="log", title="More heads")  # fmt: skip
    heads.set_xticks([1, *result.heads], [1, *result.heads], minor=False)
    heads.minorticks_off()
    # room for the legend below
    heads.set_ylim(result.independent.min() / 6, None)

    grid = np.linspace(result.beta.min(), result.beta.max(), 40)
    for estimates, low, colour, line, label in (
        (result.specialised, -math.inf, GREEN, "-", "all γ"),
        (result.positive, 0.0, RED, "--", "γ > 0"),
    ):
        curve = [specialised_variance(b, int(result.setting[1]), low) for b in grid]
        beta.plot(grid, curve, color=colour, linestyle=line, label=f"softmax, {label}")
        error_bars(beta, result.beta, estimates, colour, f"measured, {label}")
    beta.set(xlabel="query length β", ylabel="variance of the weight of $v_a$", ylim=(0, None),
             title=f"Two specialised heads, n = {result.setting[1]:g}")  # fmt: skip

    edges = np.linspace(0, 1, 41)
    for sample, colour, line, label in (
        (result.weights_one, ORANGE, "-", "one head"),
        (result.weights_independent, BLUE, "--", f"{result.heads[0]} heads, independent noise"),
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
