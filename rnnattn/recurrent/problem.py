"""What a schedule of a recurrent unit is given, and what it gives; time-major.

Axes: T time, B batch, D input width, H hidden width, R width of h.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxtyping import Array

from rnnattn.recurrent.noise import QUIET, Noise
from rnnattn.recurrent.unit import Unit


class Options(NamedTuple):
    """What is fixed when a function is traced."""

    unit: Unit
    reverse: bool = False
    residuals: Literal["gates", "states"] | int = "states"
    every_state: bool = False  # gives out all of the state of each step, not h alone
    noise: Noise = QUIET


class Steps(NamedTuple):
    """What the steps read besides the state, each (T, B, …); None where a feature is not used."""

    x: Array
    valid: Array | None  # False past a row's length: the state is held, the output is zero
    fresh: Array | None  # True where the state is zeroed before the step
    keys: Array | None = None  # what is random in a step is drawn from: (T, B, 2)
    reads: Array | None = None  # which of h the products of every step read: (B, R), without T


class Outputs(NamedTuple):
    """What a sequence gives out of each step; zero where a step is not valid."""

    y: Array  # (T, B, R)
    rest: tuple[Array, ...] | None  # with `every_state`


class Trace(NamedTuple):
    """What a run leaves behind; None where it is not kept, and computed again for the gradient."""

    y: Array | None  # h of each step, 0 where it is not valid: (T, B, R)
    rest: tuple[Array, ...] | None = None  # the other fields of the state after each, (T, B, H)
    kept: Array | None = None  # what the unit's step gives to keep, (T, B, …)
    starts: Any = None  # the state before every chunk, each (chunks, B, …)


class Schedule(NamedTuple):
    """A way to run a unit over time: two functions.

    `forward(options, keeps, params, state, steps)` gives the final state and the trace: y, and
    where `keeps` says so what `options.residuals` names: the rest of the states and what is kept of
    every step, the states alone, or the state before every chunk of so many steps; the rest of the
    states with `options.every_state`, too. `backward(options, params, state, steps, trace,
    cotangents)` gives, of those of the outputs (`Outputs`) and the final state, the gradients of
    params, state and x.
    """

    forward: Callable
    backward: Callable
