"""A pair of chunks of a ring: O and L of queries over some of their keys, and their gradient.

By the kernels on a CPU where they serve, and elsewhere as `rnnattn.attention.blockwise` does, in
whose layout operands and results are. What is hidden may be NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp

import rnnattn.attention.blockwise as blockwise
import rnnattn.attention.native as native
from rnnattn.attention.equations import finite_lse
from rnnattn.attention.masking import zero_unreachable
from rnnattn.attention.native_parts import widened
from rnnattn.attention.problem import Operands
from rnnattn.attention.xla import time_first, time_last
from rnnattn.dispatch import dispatched


def forward(options, operands, masking):
    """O and L over the keys at hand."""
    run = _forward_on_xla if _unserved(options, operands) else _run_forward
    return run(options, operands, masking)


def gradient(options, operands, masking, o, lse, do, dlse):
    """What the keys at hand add to the gradient, O and L being those of all keys."""
    run = _gradient_on_xla if _unserved(options, operands) else _run_gradient
    return run(options, operands, masking, o, lse, do, dlse)


def _unserved(options, operands):
    return native.unserved(operands.query, operands.value, options)


def _forward_on_xla(options, operands, masking):
    return blockwise.forward(options, zero_unreachable(options, operands, masking), masking)


def _gradient_on_xla(options, operands, masking, *rows):
    operands = zero_unreachable(options, operands, masking)
    return blockwise.gradient(options, operands, masking, *rows)


def _time_before_heads(operands):
    q, k, v = time_first(operands.query), *(jnp.moveaxis(x, 1, 2) for x in operands[1:3])
    return operands._replace(query=q, key=k, value=v)


def _forward_natively(options, operands, masking):
    o, lse = native.HALVES[0](options, _time_before_heads(operands), masking)
    return time_last(o), lse


def _gradient_natively(options, operands, masking, o, lse, do, dlse):
    operands, do = widened(operands, do)
    rows = (time_first(o), finite_lse(lse), time_first(do), dlse)
    d = native.HALVES[1](options, _time_before_heads(operands), masking, *rows)
    dk, dv = (jnp.moveaxis(x, 2, 1) for x in (d.key, d.value))
    darrays = jax.tree.map(lambda x: x.astype(jnp.float32), d.score_arrays)
    return d._replace(query=time_last(d.query), key=dk, value=dv, score_arrays=darrays)


def _wide(shape) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward_results(options, operands, masking):
    rows = operands.query.shape[:4]
    return _wide((*rows, operands.value.shape[3])), _wide(rows)


def _gradient_results(options, operands, *_):
    q, k, v, scale, bias, *_ = operands
    dscale = _wide(scale.shape) if options.scale_gradient else None
    dbias = _wide(bias.shape) if bias is not None and options.bias_gradient else None
    arrays = operands.score_arrays if options.score_gradient else None
    darrays = jax.tree.map(lambda x: _wide(x.shape), arrays)
    return Operands(_wide(q.shape), _wide(k.shape), _wide(v.shape), dscale, dbias, None, darrays)


_run_forward = dispatched(
    "rnnattn_pair",
    _forward_on_xla,
    {"cpu": _forward_natively},
    _forward_results,
    None,
    None,
)
_run_gradient = dispatched(
    "rnnattn_pair_gradient",
    _gradient_on_xla,
    {"cpu": _gradient_natively},
    _gradient_results,
    None,
    None,
)
