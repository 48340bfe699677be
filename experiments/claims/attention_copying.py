"""Attention weights are a distribution (A3), and a large enough margin makes attention copy (A4).

    A3   α_i ≥ 0,  Σ α_i = 1
    A4   s⟨q, k_j⟩ − max_i s⟨q, k_i⟩ ≥ ln((n−1)(1−ε)/ε)   implies   α_j ≥ 1 − ε,
         and then  ‖c − v_j‖ ≤ ε max_i ‖v_i − v_j‖

The margin is tight when all rivals tie; ln((1−ε)/ε) is necessary. Likeness is not enough: a query
in the direction of its key, but short, copies nothing.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from scipy import special

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Logit, Seed, Several, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, above, equal
from experiments.report.intervals import Exact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A3": "Attention weights are a probability distribution",
    "A4": "A query very like one key copies its value",
}

ROUNDING = 1e-10
"""What float64 leaves of weights: the last digits of e^s are lost where s is some thousands."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of queries, keys and values."""
    draws: Size = 1000
    """Random sets of keys and values for each ε, and for each scale of the logits."""
    keys: Annotated[Size, Field(ge=3)] = 16
    """Number n of keys; they are as wide."""
    errors: Several[Annotated[float, Field(ge=1e-12, lt=0.5)]] = (0.1, 0.01, 0.001)
    """The ε, the weight left to the other keys."""
    scales: Several[Annotated[float, Field(ge=1e-6, le=1e6)]] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    """Standard deviations of the logits of A3."""
    lengths: Several[Logit] = (0.1, 0.3, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    """Lengths of a query in the direction of its key."""


TINY = Config(draws=20, keys=5)


class Result(NamedTuple):
    """Sums and signs of weights, and weights against margin and length."""

    sum_error: np.ndarray
    sigmoid_sum_error: np.ndarray
    lowest: np.ndarray
    tied: np.ndarray
    tied_short: np.ndarray
    weights: np.ndarray
    distances: np.ndarray
    length_weights: np.ndarray
    scores: dict[str, float]


def margin(error: np.ndarray, keys: int) -> np.ndarray:
    """The logit margin that guarantees a weight of 1 − ε."""
    return np.log((keys - 1) * (1 - error) / error)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output (B, V) and weights (B, S) of one query for each row; the logits are not scaled."""
    query, key, value = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    out, weights = rnnattn.dot_product_attention(
        query[:, None, None], key[:, :, None], value[:, :, None], scale=1.0, return_weights=True
    )
    return np.asarray(out[:, 0, 0]), np.asarray(weights[:, 0, 0])


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the keys and values of all draws."""
    memory.check(3 * 8 * config.draws * config.keys**2, "draws × keys²")


def run(config: Config, session: Session = SILENT) -> Result:
    """Attend to random keys of every scale, and to keys whose margin is known."""
    random = np.random.default_rng(config.seed)
    n, draws = config.keys, config.draws
    errors = np.array(config.errors)
    margins = margin(errors, n)
    with jax.enable_x64(True):
        sums, sigmoids, lowest = [], [], []
        for scale in config.scales:
            q, v = random.standard_normal((2, draws, n))
            k = random.standard_normal((draws, n, n)) * scale / math.sqrt(n)
            _, p = _attend(q, k, np.broadcast_to(v[:, :, None], (draws, n, n)))
            sums.append(np.max(np.abs(p.sum(axis=1) - 1)))
            each = special.expit(np.vecdot(q[:, None], k))
            sigmoids.append(np.max(np.abs(each.sum(axis=1) - 1)))
            lowest.append(p.min())

        eye = np.eye(n)

        def tie(lead: np.ndarray) -> np.ndarray:
            """The weight of the first key, which leads all others by so much."""
            q = np.concatenate([lead[:, None], np.zeros((len(lead), n - 1))], axis=1)
            keys = np.broadcast_to(eye, (len(lead), n, n))
            return _attend(q, keys, keys)[1][:, 0]

        weights, distances = [], []
        for lead in margins:
            # rivals anywhere below the margin, one of them at it
            logits = np.concatenate(
                [np.full((draws, 1), lead), np.zeros((draws, 1)),
                 -random.exponential(2.0, (draws, n - 2))], axis=1,
            )  # fmt: skip
            q = random.standard_normal((draws, n))
            # the key that has the logit, and a random part that q does not see
            noise = random.standard_normal((draws, n, n))
            size = np.sum(q**2, axis=1)[:, None]
            seen = logits - np.vecdot(q[:, None], noise)
            k = noise + seen[:, :, None] * (q / size)[:, None]
            v = random.standard_normal((draws, n, n))
            c, p = _attend(q, k, v)
            reach = np.linalg.norm(v - v[:, :1], axis=2).max(axis=1)
            weights.append(p[:, 0])
            distances.append(np.linalg.norm(c - v[:, 0], axis=1) / reach)

        return Result(
            sum_error=np.array(sums),
            sigmoid_sum_error=np.array(sigmoids),
            lowest=np.array(lowest),
            tied=tie(margins),
            tied_short=tie(np.log((1 - errors) / errors)),
            weights=np.array(weights),
            distances=np.array(distances),
            length_weights=tie(np.array(config.lengths)),
            scores={"largest_sum_error": float(np.max(sums))},
        )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A3 for logits of every size; A4 at its margin, and without it."""
    return _distribution(config, result), _copying(config, result)


def _distribution(config: Config, result: Result) -> Claim:
    rows = f"{config.draws} rows of {config.keys} keys at each of {len(config.scales)} scales"
    return Claim(
        "A3",
        r"\alpha = \operatorname{softmax}(s):\quad \sum_i \alpha_i = 1,\quad \alpha_i \ge 0",
        "The weights of every row sum to 1 to the rounding of float64, where sigmoid weights of "
        "the same logits do not, and none is negative.",
        (
            equal(f"largest |Σα − 1|, {rows}", 0, Exact(result.sum_error.max(), ROUNDING),
                  Exact(result.sigmoid_sum_error.min(), ROUNDING), "sigmoid weights"),
            equal("weights below zero", 0, Exact(float(np.sum(~(result.lowest >= 0))))),
        ),
    )  # fmt: skip


def _copying(config: Config, result: Result) -> Claim:
    n = config.keys
    right = []
    for i, error in enumerate(config.errors):
        at = f"ε = {error:g}, n = {n}"
        # negated, as NaN is on neither side
        violations = float(np.sum(~(result.weights[i] >= 1 - error - ROUNDING)))
        far = float(np.sum(~(result.distances[i] <= error + ROUNDING)))
        right += [
            equal(f"weight at the margin, all rivals tied, {at}", 1 - error,
                  Exact(result.tied[i], ROUNDING),
                  Exact(result.tied_short[i], ROUNDING), "at ln((1−ε)/ε), without the n − 1"),
            equal(f"weights below 1 − ε of {config.draws} random rivals, {at}", 0,
                  Exact(violations)),
            equal(f"outputs farther than ε max ‖v_i − v_j‖ from v_j, {at}", 0, Exact(far)),
        ]  # fmt: skip
    largest, lengths = max(config.errors), np.array(config.lengths)
    short = int(np.argmin(np.abs(lengths - 1)))
    length, weight = lengths[short], Exact(result.length_weights[short], ROUNDING)
    alike = (
        f"weight for a query of length {length:g} that points at its key (cosine 1, and 0 to the "
        f"others, n = {n})"
    )
    right.append(
        equal(alike, 1 / (1 + (n - 1) * np.exp(-length)), weight, 1 - largest, "it copies")
    )
    return Claim(
        "A4",
        r"s\langle q, k_j\rangle - \max_{i \ne j} s\langle q, k_i\rangle \ge"
        r"\ln\frac{(n-1)(1-\varepsilon)}{\varepsilon}\;\Rightarrow\; \alpha_j \ge 1 - \varepsilon",
        "At the margin with all rivals tied the weight is exactly 1 − ε, and less with a margin of "
        "ln((1−ε)/ε); no random rivals at the margin or below bring it under 1 − ε, nor the output "
        "farther than ε max ‖v_i − v_j‖ from v_j; a short query, however alike, does not copy.",
        tuple(right),
        beyond=(above(alike, 1 - largest, weight),),
        note="Likeness alone is not enough: the query must be long, so that the logit margin is.",
    )


def plot(config: Config, result: Result) -> "Figure":
    """Weight against the query's length; weights and distances at the margin."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, new_figure

    figure = new_figure(10, 3.8)
    length, weight, distance = figure.subplots(1, 3)
    errors, n = np.array(config.errors), config.keys
    grid = np.linspace(0, max(config.lengths), 200)
    length.plot(grid, 1 / (1 + (n - 1) * np.exp(-grid)), color=BLACK, label="theory")
    length.plot(config.lengths, result.length_weights, "o", color=BLUE, label="measured")
    for error, lead in zip(errors, margin(errors, n), strict=True):
        length.axvline(lead, color=ORANGE, linestyle="--", linewidth=1)
        length.annotate(f"ε = {error:g}", (lead, 0.3), rotation=90, ha="right", fontsize=8)
    length.set(xlabel="length of a query along its key", ylabel="weight of that key",
               title="Likeness is not enough")  # fmt: skip
    length.legend(fontsize=8)

    place = np.arange(len(errors))
    for axes, values in ((weight, 1 - result.weights), (distance, result.distances)):
        spread = np.linspace(-0.3, 0.3, values.shape[1])
        for x, row in zip(place, values, strict=True):
            axes.plot(x + spread, row, ".", color=BLUE, markersize=3, alpha=0.4,
                      label="random rivals" if x == 0 else None)  # fmt: skip
            axes.hlines(errors[x], x - 0.4, x + 0.4, color=BLACK,
                        label="bound ε" if x == 0 else None)  # fmt: skip
        axes.set_xticks(place, [f"{error:g}" for error in errors])
        axes.set(xlabel="ε", yscale="log")
    weight.plot(place, 1 - result.tied, "D", color=GREEN, label="all rivals tied")
    weight.set(ylabel="weight left to the other keys", title="At the margin for 1 − ε")
    distance.set(ylabel=r"$\Vert c-v_j\Vert\, /\, \max_i\Vert v_i-v_j\Vert$",
                 title="The output is $v_j$, within ε")  # fmt: skip
    for axes in (weight, distance):
        axes.legend(fontsize=8)
    for axes in (length, weight, distance):
        axes.grid(alpha=0.3)
    return figure
