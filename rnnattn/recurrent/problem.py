"""What a schedule of the LSTM is given, and what it gives; time-major.

Axes: T time, B batch, D input width, H hidden width, R width of h.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Array

from rnnattn.recurrent.equations import LSTMState, Variant


class Options(NamedTuple):
    """What is fixed when a function is traced."""

    reverse: bool = False
    residuals: Literal["gates", "states"] | int = "states"
    variant: Variant = Variant()


class Steps(NamedTuple):
    """What the steps read besides the state, each (T, B, …); None where a feature is not used."""

    x: Array
    valid: Array | None  # False past a row's length: the state is held, the output is zero
    fresh: Array | None  # True where the state is zeroed before the step


class Trace(NamedTuple):
    """What a run leaves behind; None where it is not kept, and computed again for the gradient."""

    y: Array | None  # (T, B, R)
    c: Array | None = None  # of every step, (T, B, H)
    a: Array | None = None  # of every step, (T, B, 4H)
    starts: LSTMState | None = None  # before every chunk, each (chunks, B, …)


class Schedule(NamedTuple):
    """A way to run the equations over time: two functions.

    `forward(options, keeps, params, state, steps)` gives the final state and the trace: y, and
    where `keeps` says so what `options.residuals` names: c and a of every step, c alone, or the
    state before every chunk of so many steps. `backward(options, params, state, steps, trace,
    cotangents)` gives, of those of y and the final state, the gradients of params, state and x.
    """

    forward: Callable
    backward: Callable
