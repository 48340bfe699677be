"""The native schedule of the LSTM on a CPU: the kernels of `rnnattn/native/src`.

Elsewhere (`rnnattn.dispatch`), under `vmap` of weights, and for derivatives beyond the
first, the schedule on XLA runs (`rnnattn.recurrent.chunked`). Both leave the same for the gradient:
y with c and a of every step, or with c alone, or the state before every chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.native as native
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import dispatched
from rnnattn.native.calls import call_attributes
from rnnattn.recurrent.elsewhere import (
    backward_on_xla,
    backward_over_axis,
    forward_on_xla,
    forward_over_axis,
)
from rnnattn.recurrent.equations import LSTMParams, LSTMState, Variant
from rnnattn.recurrent.problem import Schedule, Trace


def unserved(params, x, variant):
    """What of a call the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    sizes = (*x.shape, *params.w_h.shape)
    reasons = {
        f"the dtype {jnp.result_type(x).name}": jnp.result_type(x) != jnp.float32,
        "peephole weights": params.peephole is not None,
        "a projection": params.projection is not None,
        "`clip` or `coupled`": variant != Variant(),
        "symbolic shapes": not all(isinstance(n, int) for n in sizes),
        "an array without elements": 0 in sizes,
    }
    return those_that_hold(reasons)


def forward(options, keeps, params, state, steps):
    """The final state and the trace."""
    return _forward((options, keeps), params, state, steps)


def backward(options, params, state, steps, trace, cotangents):
    """The gradients of params, state and x."""
    return _backward(options, params, state, steps, trace, cotangents)


NATIVE = Schedule(forward, backward)


# ---- natively ---------------------------------------------------------------------------------

_ABSENT = (0,)  # the shape of what is not there


def _call(name, options, results, arrays, interval):
    """A kernel's results in the tree of their shapes, given the arguments; None where absent."""
    params, state, steps, *others = arrays
    given = lambda x, dtype: jnp.zeros(_ABSENT, dtype) if x is None else x
    shapes = [jax.ShapeDtypeStruct(_ABSENT, jnp.float32) if x is None else x for x in results]
    masks = [given(mask, jnp.bool) for mask in (steps.valid, steps.fresh)]
    made = jax.ffi.ffi_call(f"rnnattn.lstm_{name}.v1", shapes)(
        *(steps.x, *params[:3], *state, *masks),
        *(given(x, jnp.float32) for x in others),
        reverse=options.reverse,
        interval=np.int64(interval),
        **call_attributes(),
    )
    return [None if like is None else x for x, like in zip(made, results, strict=True)]


def _interval(options, keeps, T):
    """The steps between two states that are kept, 0 where none is."""
    return min(options.residuals, T) if keeps and isinstance(options.residuals, int) else 0


def _forward_results(static, params, state, steps):
    options, keeps = static
    (T, B, _), H = steps.x.shape, params.w_h.shape[0]
    n = _interval(options, keeps, T)
    array: Any = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    c = array(T, B, H) if keeps and not n else None
    a = array(T, B, 4 * H) if keeps and options.residuals == "gates" else None
    state = lambda *sizes: LSTMState(array(*sizes, B, H), array(*sizes, B, H))
    return state(), Trace(array(T, B, H), c, a, state((T - 1) // n + 1) if n else None)


def _forward_natively(static, *arrays):
    options, keeps = static
    final, (y, c, a, starts) = _forward_results(static, *arrays)
    results = [y, *final, c, a, *(starts or (None, None))]
    interval = _interval(options, keeps, y.shape[0])
    y, h_last, c_last, c, a, *states = _call("forward", options, results, arrays, interval)
    return LSTMState(h_last, c_last), Trace(y, c, a, starts and LSTMState(*states))


def _backward_results(options, params, state, steps, *_):
    like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.tree.map(like, (params, state, steps.x))


def _backward_natively(options, params, state, steps, trace, cotangents):
    dparams, dstate, dx = _backward_results(options, params, state, steps)
    dy, dlast = cotangents
    others = (*trace[:3], *(trace.starts or (None, None)), dy, *dlast)
    results, arrays = [dx, *dparams[:3], *dstate], (params, state, steps, *others)
    interval = _interval(options, True, steps.x.shape[0])
    dx, *dparams, dh, dc = _call("backward", options, results, arrays, interval)
    return LSTMParams(*dparams), LSTMState(dh, dc), dx


# ---- where it runs ----------------------------------------------------------------------------

_forward = dispatched(
    "rnnattn_lstm",
    forward_on_xla,
    {"cpu": _forward_natively},
    _forward_results,
    forward_over_axis(forward, forward_on_xla),
)
_backward = dispatched(
    "rnnattn_lstm_gradient",
    backward_on_xla,
    {"cpu": _backward_natively},
    _backward_results,
    backward_over_axis(backward_on_xla),
)
