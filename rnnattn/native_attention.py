"""The native schedule of attention on a CPU: kernels in `rnnattn/native/src/attention_*-inl.h`.

Elsewhere, and for derivatives beyond the first (`rnnattn.native.dispatch`), a schedule on XLA
runs, which is the first argument of `forward` and `backward`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.native.dispatch as dispatch
from rnnattn.scores import (
    Operands,
    hide,
    hide_results,
    of_seeing,
    queries_reached,
    row_sums,
    sinks_gradient,
    sum_to,
)


def forward(xla, options, operands, masking):
    """O and L; `xla` is the schedule for where the kernels do not serve."""
    return _forward((xla, options), _in_float32(operands), masking)


def backward(xla, options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands."""
    operands = _in_float32(operands)
    gradient = _backward((xla, options), operands, masking, o, lse, do, dlse)
    dsinks = sinks_gradient(operands.sinks, lse, row_sums(do, o), dlse)
    return gradient._replace(sinks=dsinks)


def _in_float32(operands):
    bias = operands.bias
    return operands if bias is None else operands._replace(bias=bias.astype(jnp.float32))


# ------------------------------------------------------------------------------------------ on XLA


def _forward_on_xla(static, operands, masking):
    xla, options = static
    results = xla.forward(options, hide(options, operands, masking), masking)
    return hide_results(options, operands, masking, *results)


def _backward_on_xla(static, operands, masking, o, lse, do, dlse):
    """The gradient, but for that of the sinks."""
    xla, options = static
    operands = hide(options, operands, masking)._replace(sinks=None)
    sees = queries_reached(options, masking, o.shape[3], operands.key.shape[2])
    do, dlse = (of_seeing(sees, x) for x in (do, dlse))
    return xla.backward(options, operands, masking, o, lse, do, dlse)


# ---------------------------------------------------------------------------------- in the kernels


def _rows_first(x):
    """(B, M, G, T, …) → (B, T, M, G, …), as the arguments of attention are in memory."""
    return jnp.moveaxis(x, 3, 1)


def _keys_first(x):
    """(B, M, S, …) → (B, S, M, …)."""
    return jnp.moveaxis(x, 2, 1)


def _given(x, dtype=jnp.float32):
    """An argument of a kernel; without elements where it is absent."""
    return jnp.zeros(0, dtype) if x is None else x


def _call(name, options, operands, masking, others, results):
    """A kernel's results, given the operands, the masking and more."""
    q, k, v, scale, bias, _ = operands
    arguments = [_rows_first(scale * q), _keys_first(k), _keys_first(v)]
    arguments += [_given(bias), _given(masking.mask, jnp.bool), masking.offset]
    integers = [masking.query_lengths, masking.key_lengths]
    integers += [masking.query_segments, masking.key_segments]
    arguments += [_given(x, jnp.int32) for x in integers]
    left, right = options.window or (None, None)
    side = lambda x: np.int64(-1 if x is None else x)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(f"rnnattn.attention_{name}.v1", results)(
        *arguments,
        *others,
        is_causal=options.is_causal,
        left=side(left),
        right=side(right),
        soft_cap=np.float32(options.soft_cap or 0),
        **dispatch.call_attributes(),
    )


def _forward_natively(static, operands, masking):
    _, options = static
    (B, M, G, T, _), V = operands.query.shape, operands.value.shape[-1]
    results = [(B, T, M, G, V), (B, M, G, T)]
    o, lse = _call("forward", options, operands, masking, [_given(operands.sinks)], results)
    return jnp.moveaxis(o, 1, 3), lse


def _backward_natively(static, operands, masking, o, lse, do, dlse):
    _, options = static
    q, k, v, scale, bias, _ = operands
    others = [_rows_first(o), lse, _rows_first(do), dlse]
    wants_dbias = bias is not None and options.bias_gradient
    results = [_rows_first(q).shape, _keys_first(k).shape, _keys_first(v).shape]
    results.append(bias.shape if wants_dbias else (0,))
    dq, dk, dv, dbias = _call("backward", options, operands, masking, others, results)
    dq = jnp.moveaxis(dq, 1, 3)  # of the query times the scale
    dk, dv = (jnp.moveaxis(x, 1, 2) for x in (dk, dv))
    dscale = None
    if options.scale_gradient:
        # a query that sees nothing, and may be NaN, has a gradient of zero
        dscale = sum_to(jnp.where(dq == 0, 0, q * dq), scale.shape)
    return Operands(scale * dq, dk, dv, dscale, dbias if wants_dbias else None)


# ------------------------------------------------------------------------------------ where it runs


def _like(x, shape=None) -> Any:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, jnp.float32)


def _forward_results(static, operands, masking):
    q = operands.query
    return _like(q, (*q.shape[:4], operands.value.shape[3])), _like(q, q.shape[:4])


def _backward_results(static, operands, *_):
    _, options = static
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


def _over_axis(run, on_xla, apart, static, trees, batched, size):
    """The results of all rows; sinks of their own for each are left to XLA."""
    operands, of_operands = trees[0], batched[0]
    if of_operands.sinks:
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        return jax.vmap(partial(on_xla, static), axes)(*trees)
    rows = operands.query.shape[1 if of_operands.query else 0]
    results = run(static, *_joined(trees, batched, size, rows, apart))
    return jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), results)


def _forward_over_axis(static, trees, batched, size):
    return _over_axis(_forward, _forward_on_xla, (), static, trees, batched, size), 0


def _backward_over_axis(static, trees, batched, size):
    """Scale and bias have a gradient for each row, which is summed where the rows share them."""
    _, options = static
    apart = ("scale",) * options.scale_gradient + ("bias",) * options.bias_gradient
    gradient = _over_axis(_backward, _backward_on_xla, apart, static, trees, batched, size)

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
