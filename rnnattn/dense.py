"""The dense schedule of attention: all logits at once, for problems whose logits are few.

It is plain, so that JAX can differentiate it in every mode. This module holds no algebra of its
own: see `rnnattn.scores`, also for the axes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from rnnattn.scores import (
    Operands,
    against_keys,
    cap_gradient,
    drop,
    hide_unseen,
    keep,
    logits,
    logits_gradient,
    mask_logits,
    normalise,
    nothing_seen,
    over_keys,
    over_queries,
    row_sums,
    see,
    sinks_gradient,
    sum_to,
    visible,
    weights,
)


class _Scores(NamedTuple):
    k: Array
    v: Array
    capped: Array  # s before bias and masks
    s: Array
    z: Array | None


def _scores(options, operands, masking):
    T, S = operands.query.shape[3], operands.key.shape[2]
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    sees = visible(options, masking, rows, columns)
    k, v = hide_unseen(masking, operands.key, operands.value, sees)
    capped = logits(operands.query, k, options.soft_cap)
    s = mask_logits(capped, operands.bias, sees)
    return _Scores(k, v, capped, s, keep(options, masking, 0, 0, T, S))


def forward(options, operands, masking):
    """O and L."""
    _, v, _, s, z = _scores(options, operands, masking)
    o, lse = normalise(see(nothing_seen(operands, s.shape[3]), s, z, v))
    return o.astype(v.dtype), lse


def forward_with_weights(options, operands, masking):
    """O, L and P ∘ Z."""
    _, _, _, s, z = _scores(options, operands, masking)
    o, lse = forward(options, operands, masking)
    return o, lse, drop(weights(s, lse), z)


def backward(options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands, in the accumulator's dtype."""
    k, v, capped, s, z = _scores(options, operands, masking)
    p, delta = weights(s, lse), row_sums(do, o)
    dv = over_queries(drop(p, z), do)
    ds = logits_gradient(p, drop(against_keys(do, v), z), delta, dlse)
    dbias = None
    if operands.bias is not None and options.bias_gradient:
        dbias = sum_to(ds, operands.bias.shape)
    dsinks = sinks_gradient(operands.sinks, lse, delta, dlse)
    ds = cap_gradient(ds, capped, options.soft_cap)
    return Operands(over_keys(ds, k), over_queries(ds, operands.query), dv, dbias, dsinks)
