"""Schedules in the layout of the arguments, which run on some platforms, and elsewhere on XLA.

What they share but the halves that run there: the schedules on XLA in this layout
(`rnnattn.attention.xla`), for other places (`rnnattn.dispatch`) and for derivatives beyond the
first, and `vmap`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import rnnattn.attention.xla as xla
from rnnattn.attention.equations import joined, row_sums, sinks_gradient
from rnnattn.attention.masking import only_seeing, rows_in_reach
from rnnattn.attention.problem import Functions, Masking, Operands, Schedule
from rnnattn.dispatch import dispatched
from rnnattn.divided import Division

# The letters of the axes along which the kernels can be divided, and of those before them.
_OPERANDS: Any = Operands("BTMG", "BSM", "BSM", "BMG", "BMG", "BMG", "")  # type: ignore[arg-type]
_FUNCTIONS: Any = Functions("B", "MG", "", "", "")  # type: ignore[arg-type]
_MASKING: Any = Masking("B", "BMG", "B", "B", "B", "B", "BMG", "B", _FUNCTIONS)  # type: ignore[arg-type]
_ARGUMENTS = (_OPERANDS, _MASKING)


def as_they_are(options, operands, masking):
    return operands


def placed(name, by_platform, *, exported=False):
    """The schedule whose halves run as these in a program for a platform: see `dispatched`.

    Args:
        by_platform: a forward and a backward by the names that `jax.export` has for platforms.
        exported: whether programs that are exported have them, too.

    They take and give what the halves of a schedule do, in the layout of the arguments: L and
    gradients of scale and bias in float32, those of query, key and value in their dtypes, and none
    of the sinks, which follows from the rest.
    """
    forwards, backwards = ({p: halves[n] for p, halves in by_platform.items()} for n in (0, 1))
    run_forward: Callable = dispatched(
        name,
        forward_on_xla,
        forwards,
        forward_results,
        lambda *how: (_over_axis(run_forward, forward_on_xla, (), *how), 0),
        Division("BMG", _ARGUMENTS, ("BTMG", "BMG")),
        exported=exported,
    )
    run_backward: Callable = dispatched(
        f"{name}_gradient",
        backward_on_xla,
        backwards,
        _backward_results,
        lambda *how: _backward_over_axis(run_backward, *how),
        Division("BMG", (*_ARGUMENTS, "BTMG", "BMG", "BTMG", "BMG"), _OPERANDS),
        exported=exported,
    )

    def whole_backward(options, operands, masking, o, lse, do, dlse):
        gradient = run_backward(options, operands, masking, o, lse, do, dlse)
        dsinks = sinks_gradient(operands.sinks, lse, xla.time_last(row_sums(do, o)), dlse)
        return gradient._replace(sinks=dsinks)

    return Schedule(
        as_they_are, run_forward, whole_backward, lambda options, operands, masking, *r: r
    )


def with_sinks(o, lse, sinks):
    """O and L of a softmax that sinks join, if there are any: they only change these afterwards."""
    if sinks is None:
        return o, lse
    share, lse = joined(lse, sinks)
    return (xla.time_first(share)[..., None] * o).astype(o.dtype), lse


# ------------------------------------------------------------------------------------------ on XLA


def _by_size(operands):
    return xla.by_size(operands.query.shape[1], operands.key.shape[1])


def forward_on_xla(options, operands, masking):
    schedule = _by_size(operands)
    operands = schedule.enter(options, operands, masking)
    results = schedule.forward(options, operands, masking)
    o, lse = schedule.leave(options, operands, masking, *results)
    return o if options.keeps_o else o.astype(operands.value.dtype), lse


def as_given(gradient, operands):
    """The gradient, that of query, key and value in their dtypes.

    That of a score function is in float32.
    """
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(gradient[:3], operands[:3], strict=True))
    dscore = jax.tree.map(lambda d: d.astype(jnp.float32), gradient.score_arrays)
    return gradient._replace(query=dq, key=dk, value=dv, score_arrays=dscore)


def backward_on_xla(options, operands, masking, o, lse, do, dlse):
    """The gradient, but for that of the sinks."""
    schedule = _by_size(operands)
    operands = schedule.enter(options, operands, masking)._replace(sinks=None)
    o, do = xla.time_last(o), xla.time_last(do)
    sees = rows_in_reach(options, masking, o.shape[3], operands.key.shape[2])
    do, dlse = (only_seeing(sees, x) for x in (do, dlse))
    d = schedule.backward(options, operands, masking, o, lse, do, dlse)
    dk, dv = (jnp.moveaxis(x, 1, 2) for x in (d.key, d.value))
    return as_given(d._replace(query=xla.time_first(d.query), key=dk, value=dv), operands)


# ------------------------------------------------------------------------------------- the results


def _like(x) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _wide(*shape) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def forward_results(options, operands, masking):
    B, T, M, G, _ = operands.query.shape
    dtype, V = operands.value.dtype, operands.value.shape[3]
    o: Any = jax.ShapeDtypeStruct((B, T, M, G, V), jnp.float32 if options.keeps_o else dtype)
    return o, _wide(B, M, G, T)


def _backward_results(options, operands, *_):
    q, k, v, scale, bias, *_ = operands
    dscale = _wide(*scale.shape) if options.scale_gradient else None
    dbias = _wide(*bias.shape) if bias is not None and options.bias_gradient else None
    dscore = None
    if operands.score_arrays is not None and options.score_gradient:
        dscore = tuple(_wide(*x.shape) for x in operands.score_arrays)
    return Operands(_like(q), _like(k), _like(v), dscale, dbias, None, dscore)


# -------------------------------------------------------------------------------------- under vmap

# Fields of the operands and the masking that the rows of a batch may share.
_SHARED = ("scale", "bias", "mask", "offset", "sinks")


def _joined(trees, batched, size, rows, apart):
    """The arguments with the axis of `vmap` joined to the batch, (A, B, …) → (A B, …).

    What all rows share stays as it is, but for the fields named in `apart`.
    """

    def join(x, is_batched, shared=False):
        if x is None or (shared and not is_batched and x.shape[0] == 1):
            return x
        x = x if is_batched else x[None]
        return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(size * rows, *x.shape[2:])

    def join_field(name, x, batched):
        if name == "score_arrays" or x is None:
            return x
        if name == "functions":
            return x._replace(rows=join(x.rows, batched.rows))
        return join(x, batched, name in _SHARED and name not in apart)

    def join_fields(tree, batched):
        return type(tree)(*map(join_field, tree._fields, tree, batched))

    (operands, masking, *others), (of_operands, of_masking, *of_others) = trees, batched
    joined = [join_fields(operands, of_operands), join_fields(masking, of_masking)]
    return [*joined, *map(join, others, of_others)]


def _over_axis(run, on_xla, apart, options, trees, batched, size):
    """The results of all rows.

    Left to XLA are sinks of their own for each, and score functions, too, and the gradients of what
    these close over.
    """
    (operands, *_), (of_operands, of_masking, *_) = trees, batched
    of_functions = (of_operands.sinks, of_operands.score_arrays, of_masking.functions)
    wants_dscore = operands.score_arrays is not None and "score_arrays" in apart
    if wants_dscore or any(jax.tree.leaves(of_functions)):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        return jax.vmap(partial(on_xla, options), axes)(*trees)
    rows = operands.query.shape[1 if of_operands.query else 0]
    results = run(options, *_joined(trees, batched, size, rows, apart))
    return jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), results)


def _backward_over_axis(run, options, trees, batched, size):
    """Scale and bias have a gradient for each row, which is summed where the rows share them."""
    apart = ("scale",) * options.scale_gradient + ("bias",) * options.bias_gradient
    apart += ("score_arrays",) * options.score_gradient
    gradient = _over_axis(run, backward_on_xla, apart, options, trees, batched, size)

    def shared(d, x, is_batched):
        if d is None or d.shape[1] == x.shape[1 if is_batched else 0]:
            return d
        return jnp.sum(d, 1, keepdims=True)

    scale, bias = (
        shared(*(getattr(tree, name) for tree in (gradient, trees[0], batched[0])))
        for name in ("scale", "bias")
    )
    return gradient._replace(scale=scale, bias=bias), 0
