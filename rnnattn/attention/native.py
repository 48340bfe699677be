"""The native schedule of attention on a CPU, in the layout of the arguments: `rnnattn/native/src`.

Elsewhere, and for derivatives beyond the first (`rnnattn.native.dispatch`), the schedules on XLA
run (`rnnattn.attention.xla`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.attention.xla as xla
import rnnattn.native as native
from rnnattn.attention.equations import row_sums, sinks_gradient, sum_to
from rnnattn.attention.masking import only_seeing, rows_in_reach
from rnnattn.attention.problem import Operands, Schedule
from rnnattn.checks import those_that_hold
from rnnattn.native import dispatch


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


def enter(options, operands, masking):
    bias = operands.bias
    return operands if bias is None else operands._replace(bias=bias.astype(jnp.float32))


def leave(options, operands, masking, o, lse):
    return o, lse


def forward(options, operands, masking):
    """O and L."""
    return _forward(options, operands, masking)


def backward(options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands."""
    gradient = _backward(options, operands, masking, o, lse, do, dlse)
    dsinks = sinks_gradient(operands.sinks, lse, xla.time_last(row_sums(do, o)), dlse)
    return gradient._replace(sinks=dsinks)


NATIVE = Schedule(enter, forward, backward, leave)


# ------------------------------------------------------------------------------------------ on XLA


def _by_size(operands):
    return xla.by_size(operands.query.shape[1], operands.key.shape[1])


def _forward_on_xla(options, operands, masking):
    schedule = _by_size(operands)
    operands = schedule.enter(options, operands, masking)
    results = schedule.forward(options, operands, masking)
    return schedule.leave(options, operands, masking, *results)


def _backward_on_xla(options, operands, masking, o, lse, do, dlse):
    """The gradient, but for that of the sinks."""
    schedule = _by_size(operands)
    operands = schedule.enter(options, operands, masking)._replace(sinks=None)
    o, do = xla.time_last(o), xla.time_last(do)
    sees = rows_in_reach(options, masking, o.shape[3], operands.key.shape[2])
    do, dlse = (only_seeing(sees, x) for x in (do, dlse))
    d = schedule.backward(options, operands, masking, o, lse, do, dlse)
    dk, dv = (jnp.moveaxis(x, 1, 2) for x in (d.key, d.value))
    return d._replace(query=xla.time_first(d.query), key=dk, value=dv)


# ---------------------------------------------------------------------------------- in the kernels


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
        **dispatch.call_attributes(),
    )


def _forward_natively(options, operands, masking):
    results = [x.shape for x in _forward_results(options, operands, masking)]
    return tuple(_call("forward", options, operands, masking, [_given(operands.sinks)], results))


def _backward_natively(options, operands, masking, o, lse, do, dlse):
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


# ------------------------------------------------------------------------------------ where it runs


def _like(x, shape=None) -> Any:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, jnp.float32)


def _forward_results(options, operands, masking):
    q = operands.query
    B, T, M, G, _ = q.shape
    return _like(q, (B, T, M, G, operands.value.shape[3])), _like(q, (B, M, G, T))


def _backward_results(options, operands, *_):
    q, k, v, scale, bias, _ = operands
    dscale = _like(scale) if options.scale_gradient else None
    dbias = _like(bias) if bias is not None and options.bias_gradient else None
    return Operands(_like(q), _like(k), _like(v), dscale, dbias)


# Fields of the operands and the masking that the rows of a batch may share.
_SHARED = ("scale", "bias", "mask", "offset", "sinks")


def _joined(trees, batched, size, rows, apart=()):
    """The arguments with the axis of `vmap` joined to the batch, (A, B, …) → (A B, …).

    What all rows share stays as it is, but for the fields named in `apart`.
    """

    def join(x, is_batched, shared=False):
        if x is None or (shared and not is_batched and x.shape[0] == 1):
            return x
        x = x if is_batched else x[None]
        return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(size * rows, *x.shape[2:])

    def join_fields(tree, batched):
        fields = zip(tree._fields, tree, batched, strict=True)
        shared = [name for name in _SHARED if name not in apart]
        return type(tree)(*(join(x, b, name in shared) for name, x, b in fields))

    (operands, masking, *others), (of_operands, of_masking, *of_others) = trees, batched
    joined = [join_fields(operands, of_operands), join_fields(masking, of_masking)]
    return [*joined, *map(join, others, of_others)]


def _over_axis(run, on_xla, apart, options, trees, batched, size):
    """The results of all rows; sinks of their own for each are left to XLA."""
    operands, of_operands = trees[0], batched[0]
    if of_operands.sinks:
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        return jax.vmap(partial(on_xla, options), axes)(*trees)
    rows = operands.query.shape[1 if of_operands.query else 0]
    results = run(options, *_joined(trees, batched, size, rows, apart))
    return jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), results)


def _forward_over_axis(options, trees, batched, size):
    return _over_axis(_forward, _forward_on_xla, (), options, trees, batched, size), 0


def _backward_over_axis(options, trees, batched, size):
    """Scale and bias have a gradient for each row, which is summed where the rows share them."""
    apart = ("scale",) * options.scale_gradient + ("bias",) * options.bias_gradient
    gradient = _over_axis(_backward, _backward_on_xla, apart, options, trees, batched, size)

    def shared(d, x, is_batched):
        if d is None or d.shape[1] == x.shape[1 if is_batched else 0]:
            return d
        return jnp.sum(d, 1, keepdims=True)

    scale, bias = (
        shared(*(getattr(tree, name) for tree in (gradient, trees[0], batched[0])))
        for name in ("scale", "bias")
    )
    return gradient._replace(scale=scale, bias=bias), 0


_forward = dispatch.dispatched(
    "rnnattn_attention",
    _forward_natively,
    _forward_on_xla,
    _forward_results,
    _forward_over_axis,
)
_backward = dispatch.dispatched(
    "rnnattn_attention_gradient",
    _backward_natively,
    _backward_on_xla,
    _backward_results,
    _backward_over_axis,
)
