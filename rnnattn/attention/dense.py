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


def _places(operands, masking):
    T, S = operands.query.shape[3], operands.key.shape[2]
    return masking, jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)


def _scores(options, operands, masking):
    places = _places(operands, masking)
    T, S = (x.size for x in places[1:])
    sees = visible(options, *places)
    return score(options, operands, places, sees, dropout_mask(options, masking, 0, 0, T, S))


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
    places = _places(operands, masking)
    gradient = block_gradient(options, operands, places, scores, lse, delta, do, dlse)
    wanted = operands.bias is not None and options.bias_gradient
    dbias = sum_to(gradient.bias, operands.bias.shape) if wanted else None
    dq, dk, dv, dscale, _, darrays = gradient
    dsinks = sinks_gradient(operands.sinks, lse, delta, dlse)
    darrays = darrays if options.score_gradient else None
    return Operands(dq, dk, dv, dscale, dbias, dsinks, darrays)
