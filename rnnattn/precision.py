"""In what precision sums are made."""

import jax.numpy as jnp


def accumulator(dtype):
    """16-bit numbers are summed in float32, others in their own dtype."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)
