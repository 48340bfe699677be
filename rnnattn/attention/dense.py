"""The dense schedule of attention: all logits at once, for problems whose logits are few.

It is plain, so that JAX can differentiate it in every mode. This module holds no algebra of its
own: see `rnnattn.attention.equations`, also for the axes.
"""

import jax.numpy as jnp

from rnnattn.attention.dropout import drop, dropout_mask
from rnnattn.attention.equations import (
    Softmax,
    block_gradient,
    row_sums,
    score,
    sinks_gradient,
    sum_to,
    weights,
)
from rnnattn.attention.masking import only_seeing, visible
from rnnattn.attention.problem import Operands


def _scores(options, operands, masking):
    T, S = operands.query.shape[3], operands.key.shape[2]
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    sees = visible(options, masking, rows, columns)
    return score(options, operands, masking, sees, dropout_mask(options, masking, 0, 0, T, S))


def _attend(operands, scores):
    o, lse = Softmax.empty(operands, scores.s.shape[3]).update(scores).finish()
    return only_seeing(scores.sees, o), lse


def forward(options, operands, masking):
    """O and L."""
    return _attend(operands, _scores(options, operands, masking))


def forward_with_weights(options, operands, masking):
    """O, L and P ∘ Z."""
    scores = _scores(options, operands, masking)
    o, lse = _attend(operands, scores)
    return o, lse, drop(weights(scores.s, lse), scores.z)


def backward(options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands, in the accumulator's dtype."""
    scores, delta = _scores(options, operands, masking), row_sums(do, o)
    gradient = block_gradient(options, operands.scale, scores, lse, delta, do, dlse)
    wanted = operands.bias is not None and options.bias_gradient
    dbias = sum_to(gradient.bias, operands.bias.shape) if wanted else None
    dq, dk, dv, dscale, _ = gradient
    dsinks = sinks_gradient(operands.sinks, lse, delta, dlse)
    return Operands(dq, dk, dv, dscale, dbias, dsinks)
