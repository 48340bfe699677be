"""The other units as they are called, over one step and over a sequence.

Axes: B batch, T time, D input width, H hidden width.
"""

from typing import Any, Literal, SupportsIndex, TypedDict, Unpack

from jaxtyping import Array, Bool, Float, Int

import rnnattn.recurrent.native as native
from rnnattn.checks import Check, forward_mode
from rnnattn.recurrent.arguments import (
    checked_residuals,
    checked_sequence,
    checked_step,
    suited_residuals,
)
from rnnattn.recurrent.chunked import CHUNKED
from rnnattn.recurrent.problem import Options
from rnnattn.recurrent.run import run_sequence
from rnnattn.recurrent.units.gru import GRUParams, gru_unit


class UnitOptions(TypedDict, total=False):
    """Options that all units have in common; those of `rnnattn.gru`."""

    lengths: Int[Array, "*B"] | None
    mask: Bool[Array, "..."] | None
    resets: Bool[Array, "..."] | None
    reverse: bool
    time_major: bool
    residuals: Literal["gates", "states"] | SupportsIndex | None
    implementation: Literal["xla", "native"] | None


def gru_step(
    params: GRUParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    reset_after: bool = True,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """One step (G1 to G3): h after `x`, given h before it.

    Args:
        x: (B, D); B may be absent, or several axes, here and in h.
        reset_after, implementation: as in `gru`.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and
            what came.
    Gradient:
        G4 to G7, with respect to `params`, `x` and `h`; keeps the pre-activations.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_gru
        >>> params = init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> gru_step(params, jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
        (2, 5)
    """
    unit = gru_unit("gru_step", reset_after)
    return run_step("gru_step", unit, params, x, (h,), implementation)[0]


def gru(
    params: GRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    reset_after: bool = True,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """h after every step of `x`, and after the last one (G1 to G3).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        h: the initial state; None is zeros.
        reset_after: the reset gate is applied behind the product with h, as cuDNN, torch and
            Keras have it, or before it, as Cho et al. 2014 (and Keras' `reset_after=False`), with
            `params.b_n` None; two products one after the other in each step then.
        lengths: the valid steps of each row, 0 to T; outputs past them are zero.
        mask: (B, T), or (T, B) with `time_major`; False marks a step that is not there: it holds h
            and gives zero output.
        resets: (B, T), or (T, B); True marks the first step of an episode in time order.
        reverse: run from the last valid step to the first; outputs stay in the order of x.
        residuals: what is kept for the gradient beside y: "gates" (the pre-activations of each
            step), "states" (nothing) or n (h every n steps); None chooses by memory. All of these
            are as in `lstm`, which says more of each.
        implementation: "xla"; "native", the kernels of `rnnattn.native` on a CPU (and "xla"
            elsewhere), for 32 and 16 bits and the reset after the product; or None, which is
            "native" where these serve and "xla" elsewhere.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, and the final h, in the dtype of x.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        G4 to G7, with respect to `params`, `x` and `h`, from cotangents of y and the final h;
        lengths, mask and resets are constants. It can be differentiated again in reverse and
        forward mode; for `jax.jvp` of the function itself use `rnnattn.reference.gru`.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_gru
        >>> params = init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> y, h = gru(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == h[1]).all())
        ((2, 7, 5), True, True)
    """
    state = None if h is None else (h,)
    y, final = run_unit("gru", gru_unit("gru", reset_after), params, x, state, **options)
    return y, final[0]


def run_step(function, unit, params, x, state, implementation):
    """The state after a step."""
    x, state = checked_step(function, unit, params, x, state)
    options = Options(unit, residuals="gates")
    schedule = _suited(function, implementation, params, x, options)
    with forward_mode(f"rnnattn.reference.{function}"):
        return run_sequence(function, schedule, options, True, params, x[None], state)[1]


def run_unit(
    function,
    unit,
    params,
    x,
    state,
    *,
    lengths=None,
    mask=None,
    resets=None,
    reverse=False,
    time_major=False,
    residuals=None,
    implementation=None,
) -> tuple[Array, Any]:
    """h of every step, and the final state."""
    given = (lengths, mask, resets, time_major)
    arguments = checked_sequence(function, unit, params, x, state, *given)
    keeps = checked_residuals(function, residuals)
    if keeps is None:
        keeps = suited_residuals(unit, params, arguments.x, time_major)
    options = Options(unit, bool(reverse), keeps)
    schedule = _suited(function, implementation, params, arguments.x, options)
    with forward_mode(f"rnnattn.reference.{function}"):
        outputs, final = run_sequence(function, schedule, options, time_major, params, *arguments)
    return outputs.y, final


def _suited(function, implementation, params, x, options):
    """The schedule that is asked for, or the kernels where they serve."""
    check = Check(function)
    check.one_of("implementation", implementation, (None, "xla", "native"))
    unserved = [] if implementation == "xla" else native.unserved(params, x, options)
    if implementation == "native":
        check.served("native", unserved)
    return CHUNKED if implementation == "xla" or unserved else native.NATIVE
