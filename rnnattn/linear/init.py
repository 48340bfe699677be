"""Weights for linear units to begin with."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from rnnattn.checks import Check
from rnnattn.linear.equations import RATE, MinGRUParams, MinLSTMParams, RGLRUParams
from rnnattn.precision import accumulator


def init_mingru(
    key: PRNGKeyArray, input_size: int, hidden_size: int, *, dtype: Any = jnp.float32
) -> MinGRUParams:
    """Weights for `mingru`: input weights uniform in ±√(3/D), biases zero.

    Args:
        dtype: float32, bfloat16, float16 or float64.
    Raises:
        ValueError: a size is below 1, or `dtype` is not a float.
    Example:
        >>> params = init_mingru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> params.w_x.shape, params.b.shape
        ((3, 10), (10,))
    """
    return MinGRUParams(*_projection("init_mingru", key, 2, input_size, hidden_size, dtype))


def init_minlstm(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 0.0,
    dtype: Any = jnp.float32,
) -> MinLSTMParams:
    """Weights for `minlstm`: uniform in ±√(3/D), biases zero but for the forget gate's.

    Args:
        forget_bias: the forget gate's bias; larger ones let memory through (Feng et al. 2024, §4).
        dtype: float32, bfloat16, float16 or float64.
    Raises:
        ValueError: a size is below 1, or `dtype` is not a float.
    Example:
        >>> params = init_minlstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> params.w_x.shape, params.b.shape
        ((3, 15), (15,))
    """
    w_x, b = _projection("init_minlstm", key, 3, input_size, hidden_size, dtype)
    return MinLSTMParams(w_x, b.at[:hidden_size].set(forget_bias))


def init_rglru(
    key: PRNGKeyArray, hidden_size: int, *, num_blocks: int = 1, dtype: Any = jnp.float32
) -> RGLRUParams:
    """Weights for `rglru`: gates uniform in ±√(3/K), biases zero, e^(−λ) uniform in [0.9, 0.999].

    With r = 1 the last is a; so it is in De et al. 2024, §2.4.

    Args:
        hidden_size: H, the width of x as well.
        num_blocks: G, the blocks of channels whose gates see each other.
        dtype: float32, bfloat16, float16 or float64.
    Raises:
        ValueError: a size is below 1, `num_blocks` divides not `hidden_size`, or `dtype` is not a
            float.
    Example:
        >>> params = init_rglru(jax.random.key(0), hidden_size=6, num_blocks=2)
        >>> params.w_r.shape, params.decay.shape
        ((2, 3, 3), (6,))
    """
    check = Check("init_rglru")
    check(num_blocks >= 1, "num_blocks", "at least 1", num_blocks)
    check.multiple("hidden_size", hidden_size, num_blocks, f"{num_blocks} blocks")
    check.float_dtype("dtype", dtype)
    check.single_key("key", key)
    draw, K = accumulator(dtype), hidden_size // num_blocks
    key_r, key_i, key_decay = jax.random.split(key, 3)
    gate = lambda key: _uniform(key, (num_blocks, K, K), K, dtype)
    zeros = jnp.zeros(hidden_size, dtype)
    slowest = jax.random.uniform(key_decay, (hidden_size,), draw, 0.9, 0.999)
    decay = jnp.log(jnp.expm1(-jnp.log(slowest) / RATE))  # softplus of it is λ / c
    return RGLRUParams(gate(key_r), gate(key_i), zeros, zeros, decay.astype(dtype))


def _projection(function, key, n, D, H, dtype):
    """Weights and biases of n blocks."""
    check = Check(function)
    for name, size in {"input_size": D, "hidden_size": H}.items():
        check(size >= 1, name, "at least 1", size)
    check.float_dtype("dtype", dtype)
    check.single_key("key", key)
    return _uniform(key, (D, n * H), D, dtype), jnp.zeros(n * H, dtype)


def _uniform(key, shape, inputs, dtype):
    """Numbers of variance 1 / `inputs`."""
    bound = (3 / inputs) ** 0.5
    return jax.random.uniform(key, shape, accumulator(dtype), -bound, bound).astype(dtype)
