"""Keys and values as 8-bit integers, with a scale for each token and head.

    x ≈ x₈ · σ,   σ = max |x| / 127 over the width of a head

A number is off by σ/2 at most, 1/254 of the largest beside it.

Source: Hooper et al. 2024 (KVQuant), of which this is the plain form, symmetric and per token.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from rnnattn.checks import Check
from rnnattn.precision import accumulator

_LARGEST = 127


def quantise(x: Float[Array, "*axes K"]) -> tuple[Int8[Array, "*axes K"], Float[Array, "*axes"]]:
    """Numbers of 8 bits, and their scale over the last axis.

    Returns:
        int8 (…, K), and the scale (…), in float32 for 16-bit numbers, else in the dtype of x. What
        is zero throughout has a scale of zero. Of numbers that are not finite nothing is left.
    Raises:
        ValueError: x is not of a floating dtype, or has no axes.
    Gradient:
        That of the scale; what is rounded has none.
    Example:
        >>> x = jnp.array([[1.0, -0.5], [0.0, 0.0]])
        >>> eight_bits, scale = quantise(x)
        >>> eight_bits.tolist()
        [[127, -64], [0, 0]]
        >>> bool(jnp.abs(dequantise(eight_bits, scale) - x).max() <= scale.max() / 2)
        True
    """
    check, x = Check("quantise"), jnp.asarray(x)
    check.floating("x", x)
    check(x.ndim > 0, "x", "of at least one axis", x.shape)
    return _quantise(x)


@jax.jit
def _quantise(x):
    wide = x.astype(accumulator(x.dtype))
    scale = jnp.max(jnp.abs(wide), -1) / _LARGEST
    divisor = jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.round(wide / divisor).astype(jnp.int8), scale


def dequantise(
    x: Int8[Array, "*axes K"], scale: Float[Array, "*axes"], dtype: Any = None
) -> Float[Array, "*axes K"]:
    """The numbers that `quantise` was given, but for what it rounded.

    Args:
        dtype: of the result; that of the scale by default.
    Raises:
        ValueError: a shape or dtype is off.
    Gradient:
        With respect to the scale; JAX's own.
    Example:
        >>> dequantise(jnp.array([[127, -64]], jnp.int8), jnp.array([2.0])).tolist()
        [[254.0, -128.0]]
    """
    check, x, scale = Check("dequantise"), jnp.asarray(x), jnp.asarray(scale)
    check(x.dtype == jnp.int8, "x", "of dtype int8", x.dtype.name)
    check.floating("scale", scale)
    check.shape("scale", scale, x.shape[:-1], "that of x but for its last axis,")
    dtype = jnp.dtype(scale.dtype if dtype is None else dtype)
    check.float_dtype("dtype", dtype)
    return _dequantise(x, scale, dtype)


@partial(jax.jit, static_argnums=(2,))
def _dequantise(x, scale, dtype):
    return (x.astype(scale.dtype) * scale[..., None]).astype(dtype)
