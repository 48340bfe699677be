"""The plain twins: the same equations, one step after another, under JAX's own differentiation.

Each function here equals its namesake in `rnnattn` and has no rule of its own, so that every
transformation applies: `jax.jvp`, `jacfwd`, `linearize`. It is the oracle of the tests, and the
plain way to say what the fast one computes.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, Real

from rnnattn.attention.api import call
from rnnattn.attention.arguments import sorted_arguments
from rnnattn.attention.rule import plain
from rnnattn.attention.xla import DENSE
from rnnattn.position import (
    RopeOptions,
    Scaling,
    call_rope,
    call_rope_2d,
    call_rope_mixed,
    rotate_plain,
)
from rnnattn.precision import varying_together
from rnnattn.recurrent.arguments import (
    as_given,
    check_sequence,
    check_step,
    full_state,
    on_mesh,
    time_major_steps,
)
from rnnattn.recurrent.equations import (
    LSTMParams,
    LSTMState,
    Variant,
    advance,
    dot,
    halve_params,
    select,
)
from rnnattn.recurrent.stack import Dropout, both_directions, stack


def lstm(
    params: LSTMParams,
    x: Float[Array, "... D"],
    state: LSTMState | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    clip: float | None = None,
    coupled: bool = False,
) -> tuple[Float[Array, "... R"], LSTMState]:
    """`rnnattn.lstm` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> x = jnp.ones((2, 7, 3))
        >>> (y, state), (dy, dstate) = jax.jvp(lambda x: lstm(params, x), (x,), (x,))
        >>> dy.shape
        (2, 7, 5)
    """
    check_sequence("reference.lstm", params, x, state, lengths, resets, time_major, clip)
    given = {"params": params, "x": x, "state": state, "lengths": lengths, "resets": resets}
    run = lambda given: _run_lstm(Variant(clip, coupled), reverse, time_major, **given)
    return on_mesh("reference.lstm", run, time_major, given)


def _run_lstm(variant, reverse, time_major, params, x, state, lengths, resets):
    params, x, state, lengths, resets = varying_together((params, x, state, lengths, resets))
    if not time_major:
        x = jnp.swapaxes(x, 0, 1)
        resets = None if resets is None else jnp.swapaxes(resets, 0, 1)
    halved = halve_params(params)

    def step(state, inputs):
        x, valid, fresh = inputs
        from_x = dot(select(valid, x, 0), halved.w_x) + halved.b[None]
        preactivate = lambda h: from_x + dot(h, halved.w_h)
        state, _ = advance(halved, preactivate, state, valid, fresh, variant)
        return state, select(valid, state.h, 0)

    steps = time_major_steps(x, lengths, resets, reverse)
    final, y = lax.scan(step, full_state(params, state, x.shape[1]), steps, reverse=reverse)
    return (y if time_major else jnp.swapaxes(y, 0, 1)), as_given(final, state)


def lstm_step(
    params: LSTMParams,
    x: Float[Array, "B D"],
    state: LSTMState,
    *,
    clip: float | None = None,
    coupled: bool = False,
) -> LSTMState:
    """`rnnattn.lstm_step` without its rule.

    Gradient: JAX's own, in every mode.
    """
    check_step("reference.lstm_step", params, x, state, clip)
    return lstm(params, x[None], state, time_major=True, clip=clip, coupled=coupled)[1]


def bidirectional_lstm(
    forward: LSTMParams,
    backward: LSTMParams,
    x: Float[Array, "... D"],
    states: tuple[LSTMState | None, LSTMState | None] = (None, None),
    **options: Any,
) -> tuple[Float[Array, "... width"], tuple[LSTMState, LSTMState]]:
    """`rnnattn.bidirectional_lstm` over plain scans.

    Gradient: JAX's own, in every mode.
    """
    return both_directions(lstm, (forward, backward), x, states, options)


def stacked_lstm(
    layers: Sequence[LSTMParams | tuple[LSTMParams, LSTMParams]],
    x: Float[Array, "... D"],
    states: Sequence[Any] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    variational: bool = False,
    time_major: bool = False,
    **options: Any,
) -> tuple[Float[Array, "... R"], tuple[Any, ...]]:
    """`rnnattn.stacked_lstm` over plain scans.

    Gradient: JAX's own, in every mode.
    """
    dropout = Dropout(dropout_rate, dropout_key, variational)
    return stack(lstm, layers, x, states, dropout, {"time_major": time_major, **options})


def dot_product_attention(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    **options: Any,
) -> Any:
    """`rnnattn.dot_product_attention` with all logits at once and no rule of its own.

    Gradient: JAX's own, in every mode.
    Example:
        >>> q, k, v = jnp.ones((3, 2, 5, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True).shape
        (2, 5, 4, 8)
    """
    arguments = sorted_arguments(query, key, value, bias, mask, **options)
    return call("reference.dot_product_attention", plain, arguments, DENSE)


def rope(
    x: Float[Array, "*batch T N K"],
    positions: Real[ArrayLike, "..."],
    *,
    base: float | int = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rnnattn.rope` without its rule.

    Gradient: JAX's own, in every mode.
    """
    options = RopeOptions(base, rotary_dim, interleaved, scaling, inverse)
    return call_rope("reference.rope", rotate_plain, x, positions, options)


def rope_2d(
    x: Float[Array, "*batch T N K"],
    rows: Real[ArrayLike, "..."],
    columns: Real[ArrayLike, "..."],
    *,
    base: float | int = 100.0,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rnnattn.rope_2d` without its rule.

    Gradient: JAX's own, in every mode.
    """
    options = RopeOptions(base, None, interleaved, scaling, inverse)
    return call_rope_2d("reference.rope_2d", rotate_plain, x, rows, columns, options)


def rope_mixed(
    x: Float[Array, "*batch T N K"],
    rows: Real[ArrayLike, "..."],
    columns: Real[ArrayLike, "..."],
    frequencies: Float[Array, "..."],
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rnnattn.rope_mixed` without its rule.

    Gradient: JAX's own, in every mode.
    """
    return call_rope_mixed(
        "reference.rope_mixed", rotate_plain, x, rows, columns, frequencies, interleaved, inverse
    )
