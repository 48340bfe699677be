"""Weights for the LSTM to begin with."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from rnnattn.checks import Check
from rnnattn.precision import accumulator
from rnnattn.recurrent.equations import LSTMParams


def init_lstm(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    projection_size: int | None = None,
    peephole: bool = False,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> LSTMParams:
    """Weights for `lstm`: input weights uniform in ±√(3/D), biases zero but for the forget gate's.

    Args:
        forget_bias: the forget gate's bias; 1 lets memory through (Jozefowicz et al. 2015).
        projection_size: R, the width h is projected to, as torch's `proj_size`; None for none.
        peephole: adds peephole weights, zero at first.
        recurrent_init: "orthogonal" makes the block of each gate orthogonal (Saxe et al. 2014);
            "uniform" draws all weights from ±1/√H, as torch does. Draw several networks within
            `jax.jit` by `jax.lax.map`, not by `vmap`: on a CPU with few threads, QR decompositions
            of batches can wait for one another for ever (seen with jaxlib 0.10.2).
        dtype: float32, bfloat16, float16 or float64.
    Raises:
        ValueError: a size is below 1, `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> params.w_x.shape, params.w_h.shape, params.b.shape
        ((3, 20), (5, 20), (20,))
    """
    D, H, R = input_size, hidden_size, projection_size
    check = Check("init_lstm")
    for name, size in {"input_size": D, "hidden_size": H, "projection_size": R}.items():
        check(size is None or size >= 1, name, "at least 1", size)
    check.one_of("recurrent_init", recurrent_init, ("orthogonal", "uniform"))
    check.float_dtype("dtype", dtype)
    width = H if R is None else R
    draw = accumulator(dtype)  # QR has no 16-bit version
    uniform = lambda key, shape, bound: jax.random.uniform(key, shape, draw, -bound, bound)
    orthogonal = jax.nn.initializers.orthogonal(dtype=draw)

    key_x, key_h, key_p = jax.random.split(key, 3)
    if recurrent_init == "uniform":
        w_x, w_h = uniform(key_x, (D, 4 * H), H**-0.5), uniform(key_h, (width, 4 * H), H**-0.5)
    else:
        w_x = uniform(key_x, (D, 4 * H), (3 / D) ** 0.5)
        gates = [orthogonal(k, (width, H), draw) for k in jax.random.split(key_h, 4)]
        w_h = jnp.concatenate(gates, axis=-1)
    b = jnp.zeros(4 * H, draw).at[H : 2 * H].set(forget_bias)
    return LSTMParams(
        w_x.astype(dtype),
        w_h.astype(dtype),
        b.astype(dtype),
        jnp.zeros((3, H), dtype) if peephole else None,
        None if R is None else uniform(key_p, (H, R), H**-0.5).astype(dtype),
    )
