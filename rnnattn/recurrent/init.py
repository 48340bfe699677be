"""Weights for recurrent units to begin with."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from rnnattn.checks import Check
from rnnattn.precision import accumulator
from rnnattn.recurrent.units.gru import GRUParams
from rnnattn.recurrent.units.layer_norm import LayerNormGRUParams, LayerNormLSTMParams
from rnnattn.recurrent.units.lstm import LSTMParams
from rnnattn.recurrent.units.rnn import RNNParams
from rnnattn.recurrent.units.slstm import SLSTMParams


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
    H, R = hidden_size, projection_size
    check = Check("init_lstm")
    if R is not None:
        check.integer("projection_size", R, 1, "an integer of at least 1, or None")
    width = H if R is None else R
    w_x, w_h = _weights(check, key, input_size, H, width, 4, recurrent_init, dtype)
    b = jnp.zeros(4 * H, dtype).at[H : 2 * H].set(forget_bias)
    projection = None
    if R is not None:
        _, _, key = jax.random.split(key, 3)
        projection = _uniform(key, (H, R), H**-0.5, dtype)
    return LSTMParams(w_x, w_h, b, jnp.zeros((3, H), dtype) if peephole else None, projection)


def init_gru(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    reset_after: bool = True,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> GRUParams:
    """Weights for `gru`: as those of `init_lstm`, biases zero.

    Args:
        reset_after: with a bias of the product that the reset gate is applied to.
        recurrent_init, dtype: as in `init_lstm`.
    Raises:
        ValueError: a size is below 1, `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> params.w_x.shape, params.w_h.shape, params.b.shape, params.b_n.shape
        ((3, 15), (5, 15), (15,), (5,))
    """
    H, check = hidden_size, Check("init_gru")
    w_x, w_h = _weights(check, key, input_size, H, H, 3, recurrent_init, dtype)
    b_n = jnp.zeros(H, dtype) if reset_after else None
    return GRUParams(w_x, w_h, jnp.zeros(3 * H, dtype), b_n)


def init_rnn(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> RNNParams:
    """Weights for `rnn`: as those of `init_lstm`, biases zero.

    Args:
        recurrent_init, dtype: as in `init_lstm`.
    Raises:
        ValueError: a size is below 1, `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_rnn(jax.random.key(0), input_size=3, hidden_size=4)
        >>> params.w_x.shape, params.w_h.shape
        ((3, 4), (4, 4))
    """
    H, check = hidden_size, Check("init_rnn")
    w_x, w_h = _weights(check, key, input_size, H, H, 1, recurrent_init, dtype)
    return RNNParams(w_x, w_h, jnp.zeros(H, dtype))


def init_layer_norm_lstm(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> LayerNormLSTMParams:
    """Weights for `layer_norm_lstm`: as those of `init_lstm`, gains 1.

    Args:
        forget_bias: as in `init_lstm`.
        recurrent_init, dtype: as in `init_lstm`.
    Raises:
        ValueError: a size is below 1, `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_layer_norm_lstm(jax.random.key(0), input_size=3, hidden_size=4)
        >>> params.w_x.shape, params.w_h.shape
        ((3, 16), (4, 16))
    """
    H, check = hidden_size, Check("init_layer_norm_lstm")
    w_x, w_h = _weights(check, key, input_size, H, H, 4, recurrent_init, dtype)
    ones, zeros = jnp.ones(4 * H, dtype), jnp.zeros(H, dtype)
    b = jnp.zeros(4 * H, dtype).at[H : 2 * H].set(forget_bias)
    return LayerNormLSTMParams(w_x, w_h, b, ones, ones, ones[:H], zeros)


def init_layer_norm_gru(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> LayerNormGRUParams:
    """Weights for `layer_norm_gru`: as those of `init_lstm`, biases zero, gains 1.

    Args:
        recurrent_init, dtype: as in `init_lstm`.
    Raises:
        ValueError: a size is below 1, `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_layer_norm_gru(jax.random.key(0), input_size=3, hidden_size=4)
        >>> params.w_x.shape, params.w_h.shape
        ((3, 12), (4, 12))
    """
    H, check = hidden_size, Check("init_layer_norm_gru")
    w_x, w_h = _weights(check, key, input_size, H, H, 3, recurrent_init, dtype)
    ones, zeros = jnp.ones(3 * H, dtype), jnp.zeros(3 * H, dtype)
    return LayerNormGRUParams(w_x, w_h, zeros, zeros[:H], ones, ones)


def init_slstm(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    num_heads: int = 1,
    forget_bias: float = 1.0,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> SLSTMParams:
    """Weights for `slstm`: as those of `init_lstm`, those of h by heads.

    Args:
        num_heads: N, which divides the hidden size.
        forget_bias: as in `init_lstm`.
        recurrent_init, dtype: as in `init_lstm`.
    Raises:
        ValueError: a size is below 1, `num_heads` does not divide the hidden size,
            `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_slstm(jax.random.key(0), input_size=3, hidden_size=4)
        >>> params.w_x.shape, params.w_h.shape
        ((3, 16), (1, 4, 16))
    """
    H, N, check = hidden_size, num_heads, Check("init_slstm")
    check(N >= 1, "num_heads", "at least 1", N)
    check.multiple("hidden_size", H, N, f"{N} heads")
    check.single_key("key", key)
    key_x, key_h = jax.random.split(key)
    w_x = _input_weights(check, key_x, input_size, H, 4, recurrent_init, dtype)
    width = H // N
    of_heads = [
        _recurrent_weights(k, width, width, 4, recurrent_init, dtype)
        for k in jax.random.split(key_h, N)
    ]
    b = jnp.zeros(4 * H, dtype).at[H : 2 * H].set(forget_bias)
    return SLSTMParams(w_x, jnp.stack(of_heads), b)


def _weights(check, key, D, H, width, blocks, recurrent_init, dtype):
    """w_x (D, blocks H) and w_h (width, blocks H)."""
    check.single_key("key", key)
    key_x, key_h, _ = jax.random.split(key, 3)
    w_x = _input_weights(check, key_x, D, H, blocks, recurrent_init, dtype)
    return w_x, _recurrent_weights(key_h, width, H, blocks, recurrent_init, dtype)


def _input_weights(check, key, D, H, blocks, recurrent_init, dtype):
    for name, size in {"input_size": D, "hidden_size": H}.items():
        check.integer(name, size, 1, "an integer of at least 1")
    check.one_of("recurrent_init", recurrent_init, ("orthogonal", "uniform"))
    check.float_dtype("dtype", dtype)
    bound = H**-0.5 if recurrent_init == "uniform" else (3 / D) ** 0.5
    return _uniform(key, (D, blocks * H), bound, dtype)


def _recurrent_weights(key, width, H, blocks, recurrent_init, dtype):
    if recurrent_init == "uniform":
        return _uniform(key, (width, blocks * H), H**-0.5, dtype)
    draw = accumulator(dtype)  # QR has no 16-bit version
    orthogonal = jax.nn.initializers.orthogonal(dtype=draw)
    of_blocks = [orthogonal(k, (width, H), draw) for k in jax.random.split(key, blocks)]
    return jnp.concatenate(of_blocks, axis=-1).astype(dtype)


def _uniform(key, shape, bound, dtype):
    return jax.random.uniform(key, shape, accumulator(dtype), -bound, bound).astype(dtype)
