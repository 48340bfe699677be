"""The native schedule of attention on a CPU: the kernels of `rnnattn/native/src`."""

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.attention.xla as xla
import rnnattn.native as native
from rnnattn.attention.equations import sum_to
from rnnattn.attention.placed import placed
from rnnattn.attention.problem import Operands
from rnnattn.checks import those_that_hold
from rnnattn.native.calls import call_attributes


def unserved(query, value, options):
    """What of a call the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    return those_that_hold(
        {
            f"the dtype {query.dtype.name}": query.dtype != jnp.float32,
            "dropout": options.dropout_rate > 0,
            "an array without elements": 0 in (query.size, value.size),
        }
    )


def _enter(options, operands, masking):
    bias = operands.bias
    return operands if bias is None else operands._replace(bias=bias.astype(jnp.float32))


def _given(x, dtype=jnp.float32):
    """An argument of a kernel; without elements where it is absent."""
    return jnp.zeros(0, dtype) if x is None else x


def _call(name, options, operands, masking, others, results):
    """A kernel's results, given the operands, the masking and more."""
    q, k, v, scale, bias, _ = operands
    arguments = [q, k, v, scale, _given(bias), _given(masking.mask, jnp.bool), masking.offset]
    integers = [masking.query_lengths, masking.key_lengths]
    integers += [masking.query_segments, masking.key_segments]
    arguments += [_given(x, jnp.int32) for x in integers]
    left, right = options.window or (None, None)
    side = lambda x: np.int64(-1 if x is None else x)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(f"rnnattn.attention_{name}.v2", results)(
        *arguments,
        *others,
        is_causal=options.is_causal,
        left=side(left),
        right=side(right),
        soft_cap=np.float32(options.soft_cap or 0),
        **call_attributes(),
    )


def _forward(options, operands, masking):
    B, T, M, G, _ = operands.query.shape
    results = [(B, T, M, G, operands.value.shape[3]), (B, M, G, T)]
    return tuple(_call("forward", options, operands, masking, [_given(operands.sinks)], results))


def _backward(options, operands, masking, o, lse, do, dlse):
    q, k, v, scale, bias, _ = operands
    wants_dbias = bias is not None and options.bias_gradient
    results = [q.shape, k.shape, v.shape, bias.shape if wants_dbias else (0,)]
    others = [o, lse, do, dlse]
    dscale = None
    if options.scale_gradient:  # from the gradient of the query times the scale
        scaled = operands._replace(query=xla.time_first(scale) * q, scale=jnp.ones_like(scale))
        dq, dk, dv, dbias = _call("backward", options, scaled, masking, others, results)
        # a query that sees nothing, and may be NaN, has a gradient of zero
        products = jnp.where(dq == 0, 0, q * dq)
        dscale = sum_to(xla.time_last(products), scale.shape)
        dq = xla.time_first(scale) * dq
    else:
        dq, dk, dv, dbias = _call("backward", options, operands, masking, others, results)
    return Operands(dq, dk, dv, dscale, dbias if wants_dbias else None)


HALVES = _forward, _backward
NATIVE = placed("rnnattn_attention", "cpu", *HALVES, _enter)
