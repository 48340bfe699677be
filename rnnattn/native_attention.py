"""The native schedule of attention on a CPU: the kernels of `rnnattn/_native/attention.inc`.

Elsewhere (`rnnattn.native.dispatched`), and for derivatives beyond the first, a schedule on XLA
runs, which is the first argument of `forward` and `backward`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.native as native
from rnnattn.scores import Operands, hide, row_sums, sinks_gradient


def forward(xla, options, operands, masking):
    """O and L; `xla` is the schedule for where the kernels do not serve."""
    return _forward(xla, options, _in_float32(operands), masking)


def backward(xla, options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands."""
    operands = _in_float32(operands)
    dq, dk, dv, *rest = _backward(xla, options, operands, masking, o, lse, do, dlse)
    dbias = rest[0] if rest else None
    dsinks = sinks_gradient(operands.sinks, lse, row_sums(do, o), dlse)
    return Operands(dq, dk, dv, dbias, dsinks)


def _in_float32(operands):
    bias = operands.bias
    return operands if bias is None else operands._replace(bias=bias.astype(jnp.float32))


def _xla_forward(xla, options, operands, masking):
    return xla.forward(options, hide(options, operands, masking), masking)


def _xla_backward(xla, options, operands, masking, o, lse, do, dlse):
    operands = hide(options, operands, masking)._replace(sinks=None)
    gradient = xla.backward(options, operands, masking, o, lse, do, dlse)
    return [x for x in gradient if x is not None]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(xla, options, operands, masking):
    return tuple(_bind("forward", xla, options, operands, masking))


@_forward.defjvp
def _forward_jvp(xla, options, primals, tangents):
    operands, masking = primals
    twin = lambda operands: _xla_forward(xla, options, operands, masking)
    return jax.jvp(twin, (operands,), (tangents[0],))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(xla, options, operands, masking, o, lse, do, dlse):
    return _bind("backward", xla, options, operands, masking, o, lse, do, dlse)


@_backward.defjvp
def _backward_jvp(xla, options, primals, tangents):
    operands, masking, *others = primals
    doperands, _, *dothers = tangents
    twin = lambda operands, *others: _xla_backward(xla, options, operands, masking, *others)
    return jax.jvp(twin, (operands, *others), (doperands, *dothers))


# -------------------------------------------------------------------------------------- the kernels


def _rows_first(x):
    """(B, M, G, T, …) → (B, T, M, G, …), as the arguments of attention are in memory."""
    return jnp.moveaxis(x, 3, 1)


def _keys_first(x):
    """(B, M, S, …) → (B, S, M, …)."""
    return jnp.moveaxis(x, 2, 1)


def _native(kind, xla, options, operands, masking, *others):
    """O and L, or dq, dk, dv and maybe dbias."""
    q, k, v, bias, sinks = operands
    given = lambda x, dtype: jnp.zeros(0, dtype) if x is None else x
    arguments = [_rows_first(q), _keys_first(k), _keys_first(v)]
    arguments += [given(bias, jnp.float32), given(masking.mask, jnp.bool), masking.offset]
    integers = [masking.query_lengths, masking.key_lengths]
    integers += [masking.query_segments, masking.key_segments]
    arguments += [given(x, jnp.int32) for x in integers]
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    (B, M, G, T, _), V = q.shape, v.shape[-1]
    wants_dbias = bias is not None and options.bias_gradient
    if kind == "forward":
        arguments.append(given(sinks, jnp.float32))
        results = [shape(B, T, M, G, V), shape(B, M, G, T)]
    else:
        o, lse, do, dlse = others
        arguments += [_rows_first(o), lse, _rows_first(do), dlse]
        results = [shape(*x.shape) for x in arguments[:3]]
        results.append(shape(*bias.shape) if wants_dbias else shape(0))
    left, right = options.window or (None, None)
    side = lambda x: np.int64(-1 if x is None else x)
    first, second, *rest = jax.ffi.ffi_call(f"rnnattn.attention_{kind}.v1", results)(
        *arguments,
        is_causal=options.is_causal,
        left=side(left),
        right=side(right),
        soft_cap=np.float32(options.soft_cap or 0),
        **native.how(),
    )
    first = jnp.moveaxis(first, 1, 3)
    if kind == "forward":
        return [first, second]
    dv, dbias = rest
    gradient = [first, jnp.moveaxis(second, 1, 2), jnp.moveaxis(dv, 1, 2)]
    return [*gradient, dbias] if wants_dbias else gradient


def _xla(kind, xla, *arguments):
    return list((_xla_forward if kind == "forward" else _xla_backward)(xla, *arguments))


def _results(kind, options, operands):
    q, k, v, bias, _ = operands
    shapes = [q.shape, k.shape, v.shape]
    if kind == "forward":
        shapes = [(*q.shape[:4], v.shape[3]), q.shape[:4]]
    elif bias is not None and options.bias_gradient:
        shapes.append(bias.shape)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


# ------------------------------------------------------------------------------------ where it runs


def _bind(kind, xla, options, *arguments):
    leaves, tree = jax.tree.flatten(arguments)
    return _dispatched(*leaves, kind=kind, xla=xla, options=options, tree=tree)


def _run(run, *leaves, kind, xla, options, tree):
    return run(kind, xla, options, *jax.tree.unflatten(tree, leaves))


def _shapes(*leaves, kind, xla, options, tree):
    operands, *_ = jax.tree.unflatten(tree, leaves)
    return _results(kind, options, operands)


def _batched(leaves, axes, *, kind, xla, options, tree):
    """`vmap` joins its axis with the batch."""
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    front = lambda x, a: x if a is None else jnp.moveaxis(x, a, 0)
    leaves = [front(x, a) for x, a in zip(leaves, axes, strict=True)]
    arguments = jax.tree.unflatten(tree, leaves)
    batched = jax.tree.unflatten(tree, [a is not None for a in axes])
    operands, masking, *others = arguments
    if batched[0].sinks:
        run = partial(_run, _xla, kind=kind, xla=xla, options=options, tree=tree)
        axes = [None if a is None else 0 for a in axes]
        results = jax.vmap(run, axes)(*leaves)
        return results, [0] * len(results)
    rows = operands.query.shape[1 if batched[0].query else 0]
    own_bias = kind == "backward" and options.bias_gradient

    def join(x, is_batched, own=True):
        """(A, B, …) → (A B, …)."""
        if x is None or (not is_batched and not own and x.shape[0] == 1):
            return x
        rest = x.shape[2:] if is_batched else x.shape[1:]
        x = x if is_batched else x[None]
        return jnp.broadcast_to(x, (size, rows, *rest)).reshape(size * rows, *rest)

    shared = {"bias": own_bias, "mask": False, "offset": False, "sinks": False}
    join_all = lambda x, b: type(x)(
        **{n: join(getattr(x, n), getattr(b, n), shared.get(n, True)) for n in x._fields}
    )
    joined = [join_all(operands, batched[0]), join_all(masking, batched[1])]
    joined += [join(x, b) for x, b in zip(others, batched[2:], strict=True)]
    results = _bind(kind, xla, options, *joined)
    results = [x.reshape(size, rows, *x.shape[1:]) for x in results]
    if len(results) == 4 and operands.bias.shape[1 if batched[0].bias else 0] < rows:
        results[3] = jnp.sum(results[3], 1, keepdims=True)
    return results, [0] * len(results)


_dispatched = native.dispatched(
    "rnnattn_attention", partial(_run, _native), partial(_run, _xla), _shapes, _batched
)
