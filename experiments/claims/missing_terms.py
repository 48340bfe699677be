"""X1: which of the notes' omissions turns the gradient of an LSTM most, and from which T on.

The notes leave out o of dE/dc_t (L3), c_{t−1} of everything behind the forget gate (L5–L7), and
dE/dc_{t−1} = dE/dc_t ⊙ f (L8). Each is left out alone, and all together as printed. A short step
against a vector v lowers the loss by its length times ‖∇E‖ cos(v, ∇E): the cosine is the share that
is left of what a step of that length could do. E is linear in the last output, with random
coefficients, and the weights are those that training starts from.

Axes: C cases, T time, B batch, D input width, H hidden width.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.models.lstm_variants import Case, Terms, back_propagate, run_steps
from experiments.report.evidence import Claim, above, below, equal
from experiments.report.intervals import Exact, Mean
from rnnattn import LSTMState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "X1": "Of the notes' omissions, the cell state's way back costs most",
}

LEFT_OUT = {
    "nothing": Terms(True, True, True),
    "o": Terms(False, True, True),
    "c₋": Terms(True, False, True),
    "dE/dc₋": Terms(True, True, False),
    "all three, as printed": Terms(False, False, False),
}

ROUNDING = 1e-12
"""What float64 leaves of a cosine that is 1."""

FROM, UP_TO = 5, 10
"""The T between which the cell state's way back is to cost more than either of the others."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of weights, inputs and losses."""
    lengths: Several[Size] = (1, 2, 5, 10, 50)
    """Steps T, with 1 and some from 5 to 10 among them."""
    cases: Size = 32
    """Random LSTMs for each T."""
    batch_size: Size = 8
    input_size: Size = 8
    hidden_size: Size = 32


TINY = Config(lengths=(1, 8), hidden_size=16)


class Result(NamedTuple):
    """Of the gradients of all weights, by T, case, and what is left out."""

    cosines: np.ndarray
    """Of the angle to the right one."""
    lengths: np.ndarray
    """Over that of the right one."""
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raise a `UsageError` if no T shows both, or there is no memory for the longest."""
    T = np.array(config.lengths)
    if 1 not in T or not np.any((T >= FROM) & (T <= UP_TO)):
        raise UsageError(
            f"lengths: should have 1 and a number from {FROM} to {UP_TO}, got {config.lengths}"
        )
    B, D, H = config.batch_size, config.input_size, config.hidden_size
    memory.check(8 * 5 * config.cases * (max(config.lengths) * B * 13 * H + 4 * H * (D + H)),
                 "cases")  # fmt: skip


def run(config: Config, session: Session = SILENT) -> Result:
    """Take every gradient of every case."""
    with jax.enable_x64(True):
        terms = Terms(*(jnp.array(flags) for flags in zip(*LEFT_OUT.values(), strict=True)))
        keys = jax.random.split(jax.random.key(config.seed), config.cases)
        found = [
            jax.jit(jax.vmap(partial(_compared, config, T, terms)))(keys) for T in config.lengths
        ]
    cosines, lengths = (np.array(several) for several in zip(*found, strict=True))
    return Result(cosines, lengths, {"smallest_cosine": float(cosines.min())})


def _compared(config: Config, T: int, terms: Terms, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines with the right gradient, and relative lengths, of one case."""
    B, D, H = config.batch_size, config.input_size, config.hidden_size
    weights, inputs, loss = jax.random.split(key, 3)
    params = rnnattn.init_lstm(weights, D, H, dtype=jnp.float64)
    x = jax.random.normal(inputs, (T, B, D), jnp.float64)
    zeros = jnp.zeros((B, H), jnp.float64)
    state = LSTMState(zeros, zeros)
    steps = run_steps(params, x, state)
    dy = jnp.zeros_like(steps.h).at[-1].set(jax.random.normal(loss, (B, H), jnp.float64))
    case = Case(params, x, state, dy, zeros)
    flat = lambda terms: ravel_pytree(back_propagate(terms, case, steps).params)[0]
    gradients = jax.vmap(flat)(terms)
    norms = jnp.linalg.norm(gradients, axis=1)
    return gradients @ gradients[0] / (norms * norms[0]), norms / norms[0]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """X1, at T = 1 and where the way back costs most."""
    by_name = dict(zip(LEFT_OUT, np.moveaxis(result.cosines, -1, 0), strict=True))
    without_carry, one = by_name["dE/dc₋"], config.lengths.index(1)
    farther = [
        above(f"cosine without {name} less that without dE/dc₋, T = {T}", 0,
              Mean.of_normal(by_name[name][k] - without_carry[k]))
        for k, T in enumerate(config.lengths)
        if FROM <= T <= UP_TO
        for name in ("o", "c₋")
    ]  # fmt: skip
    return (
        Claim(
            "X1",
            r"\cos(\nabla_{\text{without } \partial E/\partial c_{t-1}}, \nabla) <"
            r" \cos(\nabla_{\text{without } o}, \nabla),\ "
            r"\cos(\nabla_{\text{without } c_{t-1}}, \nabla)\quad(5 \le T \le 10)",
            f"From T = {FROM} to {UP_TO} the gradient without dE/dc₋ is turned farther from the "
            "right one than that without o and that without c₋; at T = 1 it is the right one, "
            "where the other two are not.",
            right=(
                *farther,
                equal("cosine without dE/dc₋, T = 1, least of all cases", 1,
                      Exact(without_carry[one].min(), ROUNDING)),
                *(
                    below(f"cosine without {name}, T = 1", 1, Mean.of_normal(by_name[name][one]))
                    for name in ("o", "c₋")
                ),
            ),
            note="Over 50 steps and more the missing o costs as much: it lengthens what comes "
            "back from every step. The printed gradient keeps half of what a step could do.",
            news="Of the three terms that the notes' LSTM gradient lacks, the cell state's way "
            "back costs most over five to ten steps; the printed gradient still goes downhill.",
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Cosines and lengths against T."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, error_bars, new_figure

    figure = new_figure(9.5, 4)
    cosines, lengths = figure.subplots(1, 2)
    T = np.array(config.lengths)
    for k, (name, colour) in enumerate(
        zip(LEFT_OUT, (BLACK, ORANGE, GREEN, BLUE, RED), strict=True)
    ):
        measured = [Mean.of_normal(cases) for cases in result.cosines[..., k]]
        error_bars(cosines, T, measured, colour, f"without {name}" if k < 4 else name)
        cosines.plot(T, [mean.value for mean in measured], color=colour)
        lengths.plot(T, result.lengths[..., k].mean(axis=1), "o-", color=colour)
    cosines.set(ylabel="cosine with the right gradient", ylim=(0, 1.05))
    lengths.set(ylabel="length over that of the right gradient", ylim=(0, None))
    for axes in (cosines, lengths):
        axes.set(xlabel="steps T", xscale="log")
        axes.grid(alpha=0.3)
    cosines.legend(fontsize=8, loc="lower left")
    return figure
