"""X1: which of the notes' omissions turns the gradient of an LSTM most, and over how many steps.

The notes leave out o of dE/dc_t (L3), c_{t−1} of everything behind the forget gate (L5–L7), and
dE/dc_{t−1} = dE/dc_t ⊙ f (L8). Each is left out alone, and all together as printed. A short step
against a vector v lowers the loss by its length times ‖∇E‖ cos(v, ∇E): the cosine is the share that
is left of what a step of that length could do. E is linear in the last output, with random
coefficients, and the weights are those that training starts from.

Axes: C cases, T time, B batch, D input width, H hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    "X1": "Over five to ten steps the notes' costliest omission is the cell state's way back",
}

LEFT_OUT = {
    "nothing": Terms(True, True, True),
    "o": Terms(False, True, True),
    "c₋": Terms(True, False, True),
    "dE/dc₋": Terms(True, True, False),
    "all three": Terms(False, False, False),
}

ROUNDING = 1e-12
"""What float64 leaves of a cosine that is 1."""

FROM, UP_TO = 5, 10
"""The T between which the cell state's way back is to cost more than o and more than c₋."""


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
    """Raise a `UsageError` if the lengths lack what is claimed, or the memory is too small."""
    T = np.array(config.lengths)
    if 1 not in T or not np.any((T >= FROM) & (T <= UP_TO)):
        raise UsageError(
            f"lengths: should have 1 and a number from {FROM} to {UP_TO}, got {config.lengths}"
        )
    B, D, H = config.batch_size, config.input_size, config.hidden_size
    # the steps of one case, and what comes back to them in each gradient
    of_steps = max(config.lengths) * B * (D + 13 * H)
    memory.check(8 * (1 + len(LEFT_OUT)) * (of_steps + 4 * H * (D + H)), "lengths × cells")


def run(config: Config, session: Session = SILENT) -> Result:
    """Take every gradient of every case."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(config.seed), config.cases)
        # case by case: in a batch, the QR decomposition of each gate's weights blocks a thread of
        # XLA's until others have done the work; two cores have no others (jaxlib 0.10.2)
        found = [
            jax.jit(partial(jax.lax.map, partial(_compared, config, T)))(keys)
            for T in config.lengths
        ]
    cosines, lengths = (np.array(several) for several in zip(*found, strict=True))
    return Result(cosines, lengths, {"smallest_cosine": float(cosines.min())})


def _compared(config: Config, T: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    terms = jax.tree.map(lambda *flags: jnp.array(flags), *LEFT_OUT.values())
    flat = lambda terms: ravel_pytree(back_propagate(terms, case, steps).params)[0]
    gradients = jax.vmap(flat)(terms)
    norms = jnp.linalg.norm(gradients, axis=1)
    return gradients @ gradients[0] / (norms * norms[0]), norms / norms[0]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """X1, at T = 1 and where the way back costs most."""
    by_name = dict(zip(LEFT_OUT, np.moveaxis(result.cosines, -1, 0), strict=True))
    without_carry, one = by_name["dE/dc₋"], config.lengths.index(1)
    further = {
        T: {name: Mean.of_normal(by_name[name][k] - without_carry[k]) for name in ("o", "c₋")}
        for k, T in enumerate(config.lengths)
    }
    claim = Claim(
        "X1",
        r"\cos(\nabla_{\text{without } \partial E/\partial c_{t-1}}, \nabla) <"
        r" \cos(\nabla_{\text{without } o}, \nabla),\ "
        rf"\cos(\nabla_{{\text{{without }} c_{{t-1}}}}, \nabla)\quad({FROM} \le T \le {UP_TO})",
        f"From T = {FROM} to {UP_TO} the gradient without dE/dc₋ is turned farther from the right "
        "one than that without o and that without c₋; at T = 1 it is the right one, where the "
        "other two are not.",
        right=(
            *(
                above(f"cosine without {name} less that without dE/dc₋, T = {T}", 0, mean)
                for T, means in further.items()
                if FROM <= T <= UP_TO
                for name, mean in means.items()
            ),
            equal("cosine without dE/dc₋, T = 1, least of all cases", 1,
                  Exact(without_carry[one].min(), ROUNDING)),
            *(
                below(f"cosine without {name}, T = 1", 1, Mean.of_normal(by_name[name][one]))
                for name in ("o", "c₋")
            ),
        ),
        note="Of a loss of the last output, and weights that training starts from. Where o, which "
        "is below 1, is left out, what comes back is too long at every step, so that this cost "
        "grows with T.",
        news="Of the three terms that the notes' LSTM gradient lacks, the cell state's way back "
        "turns it most over five to ten steps; over a single step it does not matter.",
    )  # fmt: skip
    told = [
        T
        for T, means in further.items()
        if all(mean.interval(claim.level).low > 0 for mean in means.values())
    ]
    longest = config.lengths.index(max(config.lengths))
    cosines = ", ".join(
        f"{by_name[name][one].mean():.2f} and {by_name[name][longest].mean():.2f} without {name}"
        for name in list(LEFT_OUT)[1:]
    )
    beside = (
        f"Of T = {_listed(config.lengths)}, both differences are above 0 by their intervals at "
        f"{_listed(told)}. Mean cosines at T = 1 and {max(config.lengths)}: {cosines}, as printed."
    )
    return (replace(claim, beside=beside),)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def plot(config: Config, result: Result) -> "Figure":
    """Cosines and lengths against T."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, error_bars, new_figure

    figure = new_figure(9.5, 4)
    cosines, lengths = figure.subplots(1, 2)
    T = np.array(config.lengths)
    labels = ("right", "without o", "without c₋", "without dE/dc₋", "all three, as printed")
    for k, (label, colour) in enumerate(
        zip(labels, (BLACK, ORANGE, GREEN, BLUE, RED), strict=True)
    ):
        measured = [Mean.of_normal(cases) for cases in result.cosines[..., k]]
        error_bars(cosines, T, measured, colour, label)
        cosines.plot(T, [mean.value for mean in measured], color=colour)
        lengths.plot(T, result.lengths[..., k].mean(axis=1), "o-", color=colour)
    cosines.set(ylabel="cosine with the right gradient", ylim=(0, 1.05))
    lengths.set(ylabel="length over that of the right gradient", ylim=(0, None))
    for axes in (cosines, lengths):
        axes.set(xlabel="steps T", xscale="log")
        axes.grid(alpha=0.3)
    cosines.legend(fontsize=8, loc="lower left")
    return figure
