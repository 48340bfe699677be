"""The native schedule of the LSTM on a CPU: the kernels of `rnnattn/native/src`."""

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.native as native
from rnnattn.checks import those_that_hold
from rnnattn.native.calls import call_attributes
from rnnattn.recurrent.placed import (
    backward_results,
    forward_results,
    interval,
    placed,
    unserved_by_kernels,
)
from rnnattn.recurrent.problem import Trace
from rnnattn.recurrent.units.lstm import LSTMParams, LSTMState

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def unserved(params, x, options):
    """What of a call the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    dtype = jnp.result_type(x)
    reasons = {
        f"the dtype {dtype.name}": dtype not in _DTYPES,
        "`return_cells`": options.every_state,
    }
    return those_that_hold(reasons | unserved_by_kernels(params, x))


_ABSENT = (0,)  # the shape of what is not there


def _call(name, options, results, arrays, n):
    """A kernel's results in the tree of their shapes, given the arguments; None where absent."""
    params, state, steps, *others = arrays
    unit = options.unit
    given = lambda x, dtype: jnp.zeros(_ABSENT, dtype) if x is None else x
    shapes = [jax.ShapeDtypeStruct(_ABSENT, jnp.float32) if x is None else x for x in results]
    weights = [given(w, steps.x.dtype) for w in params]
    masks = [given(mask, jnp.bool) for mask in (steps.valid, steps.fresh)]
    made = jax.ffi.ffi_call(f"rnnattn.lstm_{name}.v2", shapes)(
        *(steps.x, *weights, *state, *masks),
        *(given(x, jnp.float32) for x in others),
        reverse=options.reverse,
        clip=np.float32(unit.clip or 0),
        coupled=unit.coupled,
        interval=np.int64(n),
        **call_attributes(),
    )
    return [None if like is None else x for x, like in zip(made, results, strict=True)]


def forward(static, *arrays):
    """The final state and the trace."""
    options, keeps = static
    final, (y, rest, a, starts) = forward_results(static, *arrays)
    results = [y, *final, *(rest or (None,)), a, *(starts or (None, None))]
    n = interval(options, keeps, y.shape[0])
    y, h_last, c_last, c, a, *states = _call("forward", options, results, arrays, n)
    trace = Trace(y, rest and (c,), a, starts and LSTMState(*states))
    return LSTMState(h_last, c_last), trace


def backward(options, params, state, steps, trace, cotangents):
    """The gradients of params, state and x."""
    dparams, dstate, dx = backward_results(options, params, state, steps)
    (dy, _), dlast = cotangents
    (c,) = trace.rest or (None,)
    others = (trace.y, c, trace.kept, *(trace.starts or (None, None)), dy, *dlast)
    results, arrays = [dx, *dparams, *dstate], (params, state, steps, *others)
    n = interval(options, True, steps.x.shape[0])
    dx, *dparams, dh, dc = _call("backward", options, results, arrays, n)
    return LSTMParams(*dparams), LSTMState(dh, dc), dx


HALVES = forward, backward
NATIVE = placed("rnnattn_lstm", {"cpu": HALVES})
