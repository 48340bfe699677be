"""What types arrays of a schedule have: the precision of sums, and, in `jax.shard_map`, over which
axes of the mesh they vary.
"""

import jax
import jax.numpy as jnp


def accumulator(dtype):
    """16-bit numbers are summed in float32, others in their own dtype."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def varying_together(tree):
    """The same arrays, all varying over each axis that any of them varies over.

    What a loop carries is then of one type from its first turn to its last, if it starts from
    zeros like one of these. The gradient of what did not vary is the sum over the axis.
    """
    leaves, structure = jax.tree.flatten(tree)
    vary = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    axes = frozenset().union(*vary)
    if not axes:
        return tree
    together = [
        jax.lax.pcast(x, tuple(axes - own), to="varying") if axes - own else x
        for x, own in zip(leaves, vary, strict=True)
    ]
    return jax.tree.unflatten(structure, together)
