"""The schedules on XLA: heads in front of time, so that a head's matrices are contiguous.

Between the layout of the arguments and that of `rnnattn.attention.dense` and
`rnnattn.attention.blockwise`, which is the letters' order in `Operands`.
"""

import jax.numpy as jnp

import rnnattn.attention.blockwise as blockwise
import rnnattn.attention.dense as dense
from rnnattn.attention.masking import constant_where_unreachable, zero_unreachable
from rnnattn.attention.problem import Schedule

# Measured on a CPU: benchmarks/README.md.
DENSE_LOGITS = 2**16  # of one head


def time_last(x):
    """(B, T, M, G, …) → (B, M, G, T, …)."""
    return jnp.moveaxis(x, 1, 3)


def time_first(x):
    """(B, M, G, T, …) → (B, T, M, G, …)."""
    return jnp.moveaxis(x, 3, 1)


def heads_first(operands):
    """From the layout of the arguments; keys and values (B, S, M, …) → (B, M, S, …)."""
    q, k, v = time_last(operands.query), *(jnp.moveaxis(x, 2, 1) for x in operands[1:3])
    return operands._replace(query=q, key=k, value=v)


def enter(options, operands, masking):
    return zero_unreachable(options, heads_first(operands), masking)


def leave(options, operands, masking, o, lse):
    o, lse = constant_where_unreachable(options, operands, masking, o, lse)
    return time_first(o), lse


DENSE = Schedule(enter, dense.forward, dense.backward, leave)
BLOCKWISE = Schedule(enter, blockwise.forward, blockwise.backward, leave)


def by_size(T, S):
    """The faster of the two; the one in blocks where a size is symbolic."""
    few = isinstance(T * S, int) and T * S < DENSE_LOGITS
    return DENSE if few else BLOCKWISE
