"""The native schedule of the LSTM, the GRU and the plain unit on a CPU: `rnnattn/native/src`."""

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.native as native
from rnnattn.checks import those_that_hold
from rnnattn.native.calls import call_attributes
from rnnattn.recurrent.noise import QUIET
from rnnattn.recurrent.placed import (
    backward_results,
    forward_results,
    interval,
    placed,
    unserved_by_kernels,
)
from rnnattn.recurrent.problem import Trace
from rnnattn.recurrent.units.gru import ResetAfter, ResetBefore
from rnnattn.recurrent.units.lstm import LSTM
from rnnattn.recurrent.units.rnn import RNN


def _kernel(unit, half):
    """The name of a unit's kernel, and what of the unit it takes; None if it has none."""
    match unit:
        case LSTM(clip, coupled):
            return f"rnnattn.lstm_{half}.v2", {"clip": np.float32(clip or 0), "coupled": coupled}
        case ResetAfter() | ResetBefore():
            return f"rnnattn.gru_{half}.v2", {"reset_after": isinstance(unit, ResetAfter)}
        case RNN(relu):
            return f"rnnattn.rnn_{half}.v1", {"relu": relu}
    return None


def _dtypes(unit):
    """Those that a unit's kernels are for."""
    narrow = (jnp.bfloat16, jnp.float16) if isinstance(unit, LSTM | ResetAfter) else ()
    return (jnp.float32, *narrow)


def unserved(params, x, options):
    """What of a call the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    dtype, kernel = jnp.result_type(x), _kernel(options.unit, "forward")
    reasons = {
        f"the dtype {dtype.name}": dtype not in _dtypes(options.unit),
        "units but the LSTM, the GRU and the plain one": kernel is None,
        "`return_cells`": options.every_state,
        "zoneout or dropout": options.noise != QUIET,
    }
    return those_that_hold(reasons | unserved_by_kernels(params, x))


_ABSENT = (0,)  # the shape of what is not there


def _call(half, options, results, arrays, n):
    """A kernel's results in the tree of their shapes, given the arguments; None where absent."""
    params, state, steps, *others = arrays
    name, attributes = _kernel(options.unit, half)
    results, tree = jax.tree.flatten(results, is_leaf=lambda x: x is None)
    given = lambda x, dtype: jnp.zeros(_ABSENT, dtype) if x is None else x
    shapes = [jax.ShapeDtypeStruct(_ABSENT, jnp.float32) if x is None else x for x in results]
    weights = [given(w, steps.x.dtype) for w in params]
    masks = [given(mask, jnp.bool) for mask in (steps.valid, steps.fresh)]
    made = jax.ffi.ffi_call(name, shapes)(
        *(steps.x, *weights, *state, *masks),
        *(given(x, jnp.float32) for x in others),
        reverse=options.reverse,
        interval=np.int64(n),
        **attributes,
        **call_attributes(),
    )
    leaves = (None if like is None else x for x, like in zip(made, results, strict=True))
    return jax.tree.unflatten(tree, leaves)


def forward(static, *arrays):
    """The final state and the trace."""
    options, keeps = static
    final, trace = forward_results(static, *arrays)
    absent = (None,) * len(final)
    results = (trace.y, final, trace.rest or absent[1:], trace.kept, trace.starts or absent)
    n = interval(options, keeps, trace.y.shape[0])
    y, final, rest, kept, starts = _call("forward", options, results, arrays, n)
    return final, Trace(y, trace.rest and rest, kept, trace.starts and starts)


def backward(options, params, state, steps, trace, cotangents):
    """The gradients of params, state and x."""
    dparams, dstate, dx = backward_results(options, params, state, steps)
    outputs, dlast = cotangents
    absent = (None,) * len(state)
    kept = (trace.y, *(trace.rest or absent[1:]), trace.kept, *(trace.starts or absent))
    arrays = (params, state, steps, *kept, outputs.y, *dlast)
    n = interval(options, True, steps.x.shape[0])
    dx, dparams, dstate = _call("backward", options, (dx, dparams, dstate), arrays, n)
    return dparams, dstate, dx


HALVES = forward, backward
NATIVE = placed("rnnattn_recurrent", {"cpu": HALVES})
