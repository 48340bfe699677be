"""Linear recurrences as they are called: the recurrence itself, units over a step or a sequence.

Axes: B batch, T time, D input width, H hidden width, G blocks of gates, K width of such a block.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import rnnattn.linear.native as native
from rnnattn.checks import Check, forward_mode
from rnnattn.linear.arguments import (
    at_start,
    at_the_end,
    checked_pair,
    checked_sequence,
    checked_step,
    on_mesh,
    width_of,
)
from rnnattn.linear.equations import (
    LINEAR,
    MINGRU,
    MINLSTM,
    RGLRU,
    MinGRUParams,
    MinLSTMParams,
    RGLRUParams,
)
from rnnattn.linear.problem import Options
from rnnattn.linear.rule import sequence
from rnnattn.linear.xla import XLA


def linear_scan(
    a: Float[Array, "... H"],
    b: Float[Array, "... H"],
    h0: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """h = a ⊙ h₋ + b after every step, and h after the last one (R1).

    Args:
        a, b: (B, T, H), or (T, B, H) with `time_major`; B may be absent, or several axes, here and
            in all that follows.
        h0: the initial state (B, H), in the dtype of a or, for 16 bits, float32; None is zeros.
        lengths: the valid steps of each row, 0 to T. The others are masked.
        mask: (B, T), or (T, B) with `time_major`; False where a step is masked, in any pattern. A
            masked step holds the state and gives an output of zero, and whatever a and b hold there
            reaches nothing.
        resets: (B, T), or (T, B) with `time_major`. True marks the first step of an episode in time
            order: nothing passes between it and the step before it, in either direction of running,
            as if the episodes ran apart, from zeros. On a masked step it takes effect at the next
            step that is not masked, and without such a step it counts for nothing. A mark on the
            first step drops the initial state of a run forwards, and leaves the returned state of a
            run in reverse. NaN in steps of an episode of which the loss reads nothing reaches no
            gradient.
        reverse: run from the last step to the first; outputs stay in the order of a.
        time_major: a, b, h, mask and resets have T before B.
        implementation: "xla"; "native", the kernels of `rnnattn.native` on a CPU (and "xla"
            elsewhere), for 32 and 16 bits; or None, which is "native" where that serves. "xla" is a
            loop on a CPU and an associative scan elsewhere.
    Returns:
        h of every step, in the shape and dtype of a, and the last h, (B, H): in the dtype of h0
        where that is given. For 16-bit inputs the state is float32 from step to step, and the last
        h as well if h0 is None, so that a sequence cut in two and chained equals one run.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        The recurrence in reverse (R5), with respect to a, b and h0, from cotangents of both
        results; keeps a, b and h. Lengths, masks and resets are constants. It can be differentiated
        again in reverse and forward mode; for `jax.jvp` of the function itself use
        `rnnattn.reference.linear_scan`.
    Example:
        >>> a, b = jnp.full((2, 4, 3), 0.5), jnp.ones((2, 4, 3))
        >>> h, last = linear_scan(a, b)
        >>> h[0, :, 0].tolist(), last.shape
        ([1.0, 1.5, 1.75, 1.875], (2, 3))
    """
    arguments = checked_pair("linear_scan", a, b, h0, lengths, mask, resets, time_major)
    return _call("linear_scan", LINEAR, arguments, reverse, time_major, implementation)


def mingru(
    params: MinGRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """A minGRU: h ← (1 − z) ⊙ h₋ + z ⊙ h̃, gate and candidate made of x alone (R1, R2).

    The candidate is linear in x (the form of the paper's §3.1, without its g): it may be negative.

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes.
        h: the initial state (B, H); None is zeros.
        lengths, mask, reverse, time_major, implementation: as in `linear_scan`.
        resets: as in `linear_scan`.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the last h, as
        `linear_scan` gives it.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        R5, R6, with respect to `params`, `x` and `h`, from cotangents of both results; keeps x,
        what products make of it, and h. Otherwise as `linear_scan`; the twin is
        `rnnattn.reference.mingru`.
    Example:
        >>> from rnnattn import init_mingru
        >>> params = init_mingru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> y, h = mingru(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == h[1]).all())
        ((2, 7, 5), True, True)
    """
    arguments = checked_sequence("mingru", params, x, h, lengths, mask, resets, time_major)
    return _call("mingru", MINGRU, arguments, reverse, time_major, implementation)


def mingru_step(
    params: MinGRUParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """One step (R1, R2): the state after `x`, given the state before it, and in its dtype.

    Args:
        x: (B, D); B may be absent, or several axes, here and in h.
        implementation: as in `linear_scan`.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        R5, R6, with respect to `params`, `x` and `h`.
    Example:
        >>> from rnnattn import init_mingru
        >>> params = init_mingru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> mingru_step(params, jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
        (2, 5)
    """
    arguments = checked_step("mingru_step", params, x, h)
    return _call("mingru_step", MINGRU, arguments, False, True, implementation)[1]


def minlstm(
    params: MinLSTMParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """A minLSTM: h ← f/(f+i) ⊙ h₋ + i/(f+i) ⊙ h̃, all three made of x alone (R1, R3).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes.
        h: the initial state (B, H); None is zeros.
        lengths, mask, reverse, time_major, implementation: as in `linear_scan`.
        resets: as in `linear_scan`.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the last h, as
        `linear_scan` gives it.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        R5, R7, with respect to `params`, `x` and `h`, from cotangents of both results; keeps x,
        what products make of it, and h. Otherwise as `linear_scan`; the twin is
        `rnnattn.reference.minlstm`.
    Example:
        >>> from rnnattn import init_minlstm
        >>> params = init_minlstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> y, h = minlstm(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == h[1]).all())
        ((2, 7, 5), True, True)
    """
    arguments = checked_sequence("minlstm", params, x, h, lengths, mask, resets, time_major)
    return _call("minlstm", MINLSTM, arguments, reverse, time_major, implementation)


def minlstm_step(
    params: MinLSTMParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """One step (R1, R3): the state after `x`, given the state before it, and in its dtype.

    Args:
        x: (B, D); B may be absent, or several axes, here and in h.
        implementation: as in `linear_scan`.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        R5, R7, with respect to `params`, `x` and `h`.
    Example:
        >>> from rnnattn import init_minlstm
        >>> params = init_minlstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> minlstm_step(params, jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
        (2, 5)
    """
    arguments = checked_step("minlstm_step", params, x, h)
    return _call("minlstm_step", MINLSTM, arguments, False, True, implementation)[1]


def rglru(
    params: RGLRUParams,
    x: Float[Array, "... H"],
    h: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """An RG-LRU: h ← a ⊙ h₋ + √(1 − a²) ⊙ i ⊙ x with gates of blocks of x (R1, R4).

    Args:
        x: (B, T, H), or (T, B, H) with `time_major`; B may be absent, or several axes.
        h: the initial state (B, H); None is zeros.
        lengths, mask, reverse, time_major, implementation: as in `linear_scan`.
        resets: as in `linear_scan`; and the first step run of such an episode takes its input as
            it is, without √(1 − a²). To begin a sequence so, mark its first step.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the last h, as
        `linear_scan` gives it.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        R5, R8, with respect to `params`, `x` and `h`, from cotangents of both results; keeps x,
        what products make of it, and h. Otherwise as `linear_scan`; the twin is
        `rnnattn.reference.rglru`.
    Example:
        >>> from rnnattn import init_rglru
        >>> params = init_rglru(jax.random.key(0), hidden_size=6, num_blocks=2)
        >>> y, h = rglru(params, jnp.ones((2, 7, 6)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == h[1]).all())
        ((2, 7, 6), True, True)
    """
    arguments = checked_sequence("rglru", params, x, h, lengths, mask, resets, time_major)
    return _call("rglru", RGLRU, arguments, reverse, time_major, implementation)


def rglru_step(
    params: RGLRUParams,
    x: Float[Array, "*B H"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """One step (R1, R4): the state after `x`, given the state before it, and in its dtype.

    Args:
        x: (B, H); B may be absent, or several axes, here and in h.
        implementation: as in `linear_scan`.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        R5, R8, with respect to `params`, `x` and `h`.
    Example:
        >>> from rnnattn import init_rglru
        >>> params = init_rglru(jax.random.key(0), hidden_size=6, num_blocks=2)
        >>> rglru_step(params, jnp.ones((2, 6)), jnp.zeros((2, 6))).shape
        (2, 6)
    """
    arguments = checked_step("rglru_step", params, x, h)
    return _call("rglru_step", RGLRU, arguments, False, True, implementation)[1]


def _call(function, unit, arguments, reverse, time_major, implementation):
    check = Check(function)
    check.one_of("implementation", implementation, (None, "xla", "native"))
    x = jax.tree.leaves(arguments.x)[0]
    unserved = native.unserved(x, width_of(arguments.params, arguments.x))
    if implementation == "native":
        check.served("native", unserved)
    schedule = XLA if implementation == "xla" or unserved else native.NATIVE[bool(time_major)]
    options = Options(unit, bool(reverse), bool(time_major))
    with forward_mode(f"rnnattn.reference.{function}"):
        return _run_linear(function, schedule, options, arguments)


@partial(jax.jit, static_argnames=("function", "schedule", "options"))
def _run_linear(function, schedule, options, arguments):
    """A sequence, after its arguments are checked."""
    run = partial(_run_parts, schedule, options)
    return on_mesh(function, run, options.time_major, arguments)


def _run_parts(schedule, options, **given):
    params, x, h0, masks, batch = at_start(options, **given)
    one = jax.tree.leaves(x)[0]
    if one.shape[options.time_axis] == 0:
        y, last = jnp.zeros_like(one, shape=(*one.shape[:-1], h0.shape[-1])), h0
    else:
        y, last = sequence(schedule, options, params, x, h0, masks)
    return at_the_end(options, y, last, given["h0"], batch)
