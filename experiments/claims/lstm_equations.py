"""L1, L2: the equations of the LSTM as the notes print them, against the library and JAX's own.

The library shows h and c, and no gate. Its gates are found out from outside, by what one step does
to c and h: as c_1 = f c_0 + i g, c_0 = 0 and c_0 = 1 tell f and i g; a bias that forces g = 1
leaves i, one that forces i = 1 leaves g; and o = h_1 / tanh(c_1). The notes' equations are written
out in NumPy once more, and share no code with what they are compared with.

Axes: C cases, T time, B batch, D input width, H hidden width; gates in the order i, f, g, o.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import rnn

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Scale, Seed, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, equal
from experiments.report.intervals import Exact
from rnnattn import LSTMParams, LSTMState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "L1": "The gates of an LSTM, from one matrix or from two",
    "L2": "The cell state and the output of an LSTM",
}

GATES = ("i", "f", "g", "o")

ROUNDING = 1e-12
"""Float64 results that differ by less, and are of order 1, are the same."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of weights, inputs and states."""
    length: Size = 10
    """Steps of a sequence."""
    batch_size: Size = 8
    input_size: Size = 3
    hidden_size: Size = 16
    weight_scale: Scale = 0.7
    """Standard deviation of weights and biases; that of inputs and initial states is 1."""


TINY = Config(length=2, hidden_size=2)


class Weights(NamedTuple):
    """Those of `rnnattn.LSTMParams`, in NumPy."""

    w_x: np.ndarray
    w_h: np.ndarray
    b: np.ndarray


class Result(NamedTuple):
    """What the printed equations give, and what is found; without units."""

    pre_activations: np.ndarray  # L1, printed: (w_x and w_h apart or one matrix, gate, B, H)
    printed_gates: np.ndarray  # (as above)
    found_gates: np.ndarray  # (gate, B, H)
    printed_states: np.ndarray  # L2, printed, h and c: (2, T, B, H)
    found_states: np.ndarray  # (rnnattn or JAX, 2, T, B, H)
    bare_states: np.ndarray  # L2 without the tanh of h = tanh(c) ⊙ o: (2, T, B, H)
    scores: dict[str, float]


def printed_pre_activations(params: Weights, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """w_x x + w_h h + b, and [w_h, w_x] [h; x] + b: (form, gate, B, H)."""
    apart = x @ params.w_x + h @ params.w_h + params.b
    together = np.concatenate([h, x], axis=-1) @ np.concatenate([params.w_h, params.w_x])
    return np.stack([np.split(z, 4, axis=-1) for z in (apart, together + params.b)])


def printed_gates_of(pre_activations: np.ndarray) -> np.ndarray:
    """i, f, o = σ(z), g = tanh(z)."""
    i, f, g, o = np.moveaxis(pre_activations, -3, 0)
    σ = lambda z: 1 / (1 + np.exp(-z))
    return np.stack([σ(i), σ(f), np.tanh(g), σ(o)], axis=-3)


def printed_run(
    params: Weights, x: np.ndarray, state: np.ndarray, squash: Callable = np.tanh
) -> np.ndarray:
    """c_t = c_{t−1} ⊙ f + i ⊙ g and h_t = squash(c_t) ⊙ o, over time: (h and c, T, B, H)."""
    h, c = state
    states = []
    for x_t in x:
        i, f, g, o = printed_gates_of(printed_pre_activations(params, x_t, h)[0])
        c = c * f + i * g
        h = squash(c) * o
        states.append((h, c))
    return np.swapaxes(np.array(states), 0, 1)


def gates_from_outside(params: LSTMParams, x: jax.Array, h: jax.Array) -> np.ndarray:
    """i, f, g, o of `rnnattn.lstm_step`, by what it does to c and h."""
    zero = jnp.zeros((len(x), h.shape[-1]))
    i_block, _, g_block, _ = np.split(np.arange(params.b.size), 4)

    def step(c, b=params.b):
        return rnnattn.lstm_step(params._replace(b=b), x, LSTMState(h, c))

    # σ(100) and tanh(100) are 1 in float64
    i, g = (step(zero, params.b.at[block].set(100.0)).c for block in (g_block, i_block))
    from_one = step(zero + 1)
    f = from_one.c - step(zero).c
    return np.stack([i, f, g, from_one.h / jnp.tanh(from_one.c)])


def library_run(params: LSTMParams, x: jax.Array, state: LSTMState) -> np.ndarray:
    """h and c after every step: h by `rnnattn.lstm` over all of x, c step by step."""
    y, _ = rnnattn.lstm(params, x, state, time_major=True)
    cells = []
    for x_t in x:
        state = rnnattn.lstm_step(params, x_t, state)
        cells.append(state.c)
    return np.stack([y, np.stack(cells)])


def jax_run(params: LSTMParams, x: jax.Array, state: LSTMState) -> np.ndarray:
    """The same by JAX's reference for cuDNN, whose weights are the other way round."""
    weights = [{0: w} for w in (params.w_x.T, params.w_h.T, params.b, jnp.zeros_like(params.b))]
    h, c = (s[None] for s in state)
    states = []
    for x_t in x:
        _, h, c = rnn.lstm_ref(
            x_t[:, None], h, c, *weights, jnp.ones(len(x_t), jnp.int32), input_size=x.shape[2],
            hidden_size=h.shape[2], num_layers=1, dropout=0.0, bidirectional=False,
        )  # fmt: skip
        states.append((h[0], c[0]))
    return np.swapaxes(np.array(states), 0, 1)


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the weights and the states."""
    T, B, D, H = config.length, config.batch_size, config.input_size, config.hidden_size
    memory.check(2 * 8 * 4 * H * (D + H), "weights")
    memory.check(8 * T * B * (2 * D + 6 * H), "inputs and states")


def run(config: Config, session: Session = SILENT) -> Result:
    """Run the equations three times."""
    T, B, D, H = config.length, config.batch_size, config.input_size, config.hidden_size
    rng = np.random.default_rng(config.seed)
    weights = [config.weight_scale * rng.normal(size=s) for s in ((D, 4 * H), (H, 4 * H), (4 * H,))]
    params = Weights(*weights)
    x, state = rng.normal(size=(T, B, D)), rng.normal(size=(2, B, H))
    with jax.enable_x64(True):
        arrays = LSTMParams(*map(jnp.asarray, params))
        first = LSTMState(*map(jnp.asarray, state))
        found_gates = gates_from_outside(arrays, jnp.asarray(x[0]), first.h)
        found_states = np.stack([f(arrays, jnp.asarray(x), first) for f in (library_run, jax_run)])
    pre_activations = printed_pre_activations(params, x[0], state[0])
    printed_states = printed_run(params, x, state)
    difference = float(np.max(np.abs(found_states - printed_states)))
    return Result(
        pre_activations=pre_activations,
        printed_gates=printed_gates_of(pre_activations),
        found_gates=found_gates,
        printed_states=printed_states,
        found_states=found_states,
        bare_states=printed_run(params, x, state, lambda c: c),
        scores={"largest_difference": difference},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """L1 and L2, which hold as they are printed."""
    largest = lambda a, b: float(np.max(np.abs(a - b)))
    apart, together = result.printed_gates
    i, f, g, o = apart
    exchanged = largest(result.found_gates, np.stack([f, i, g, o]))
    rival = (largest(result.found_states[0], result.bare_states), "h = c ⊙ o, without tanh")
    return (
        Claim(
            "L1",
            r"f = \sigma(w_{xf} x_t + w_{hf} h_{t-1} + b_f)"
            r" = \sigma([w_{hf}, w_{xf}][h_{t-1}; x_t] + b_f)",
            f"The gates of rnnattn.lstm_step, found from what it does to c and h, are the printed "
            f"ones to {ROUNDING:g} in both of their forms, and are not with i and f exchanged.",
            right=(
                equal(
                    "largest difference of a gate, with w_x and w_h apart", 0,
                    Exact(largest(result.found_gates, apart), ROUNDING),
                    exchanged, "i and f exchanged",
                ),
                equal(
                    "largest difference of a gate, with one matrix [w_h, w_x]", 0,
                    Exact(largest(result.found_gates, together), ROUNDING),
                    exchanged, "i and f exchanged",
                ),
            ),
        ),
        Claim(
            "L2",
            r"c_t = f \odot c_{t-1} + i \odot g, \qquad h_t = \tanh(c_t) \odot o",
            f"h and c after every step are those of the printed recurrence to {ROUNDING:g}, in "
            "rnnattn.lstm and in JAX's own LSTM, and are not without the last tanh.",
            right=tuple(
                equal(
                    f"largest difference of a state, {whose}", 0,
                    Exact(largest(found, result.printed_states), ROUNDING), *rival,
                )
                for whose, found in zip(
                    ("rnnattn.lstm", "jax.experimental.rnn"), result.found_states, strict=True
                )
            ),
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """The gates over their pre-activations, and the states of one unit over time."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, new_figure

    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    z = result.pre_activations[0]
    line = np.linspace(z.min(), z.max(), 200)
    left.plot(line, 1 / (1 + np.exp(-line)), color=BLACK, label="σ(z), printed")
    left.plot(line, np.tanh(line), color=BLACK, linestyle="--", label="tanh(z), printed")
    marks = zip(GATES, (BLUE, ORANGE, GREEN, RED), "osD^", strict=True)
    for k, (gate, colour, marker) in enumerate(marks):
        left.plot(
            z[k].ravel()[::3], result.found_gates[k].ravel()[::3], marker, color=colour,
            markersize=5, markerfacecolor="none", label=f"{gate}, found in rnnattn.lstm_step",
        )  # fmt: skip
    left.set(xlabel="printed pre-activation z", ylabel="value of the gate")
    steps = np.arange(1, result.printed_states.shape[1] + 1)
    for k, (name, colour) in enumerate((("h", BLUE), ("c", ORANGE))):
        right.plot(steps, result.printed_states[k, :, 0, 0], color=colour, label=f"{name}, printed")
        for found, marker, whose in zip(
            result.found_states, "ox", ("rnnattn.lstm", "jax.experimental.rnn"), strict=True
        ):
            right.plot(
                steps, found[k, :, 0, 0], marker, color=colour, markerfacecolor="none",
                label=f"{name}, {whose}",
            )  # fmt: skip
    right.set(xlabel="time step t", ylabel="state of one unit")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        "The printed equations of the LSTM: states differ from them by at most "
        f"{np.max(np.abs(result.found_states - result.printed_states)):.0e}"
    )
    return figure
