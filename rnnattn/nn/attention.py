"""Multi-head attention and the normalisation of its heads; axes as in `rnnattn.nn`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from rnnattn.attention import KVCache, dot_product_attention, update_cache
from rnnattn.checks import Check
from rnnattn.position import rope as rotate
from rnnattn.precision import accumulator


class MultiHeadAttention(nnx.Module):
    """Attention in several heads, of tokens to themselves or to a context.

    Names and shapes of the weights are those of `flax.nnx.MultiHeadAttention`.

    Args:
        num_heads: N, of the queries.
        features: of inputs and outputs.
        head_width: K, of a head; None is features / N.
        num_key_value_heads: M, a divisor of N: each is read by N / M query heads. None is N.
        qk_norm: a LayerNorm over each head of queries and keys, with a scale and no bias, before
            they are rotated. It bounds the logits; LayerNorm, as in ViT-22B and in flax, whose
            weights then fit.
        rope: True rotates queries and keys by their positions with `rnnattn.rope`; a function
            (x (B, T, N, K), positions) → like x does it another way, a partial of `rnnattn.rope`
            with other options, say, or a module with frequencies of its own.
        use_bias: whether the four linear maps add one.
        dropout_rate: the share of attention weights set to zero while training.
        dtype: of the computation; None is that of inputs and weights together.
        param_dtype: of the weights.
        rngs: streams `params` and, with dropout, `dropout`.
    Raises:
        ValueError: the heads do not divide `features` or each other, or a number is out of range.
    Example:
        >>> attention = MultiHeadAttention(4, 32, rope=True, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 32))
        >>> attention(x, is_causal=True).shape
        (2, 5, 32)
        >>> cache = attention.init_cache(2, 16)
        >>> y, cache = attention(x, is_causal=True, cache=cache)  # a prompt,
        >>> y, cache = attention(x[:, :1], is_causal=True, cache=cache)  # then token by token
        >>> y.shape, cache.length.tolist()
        ((2, 1, 32), [6, 6])
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        num_key_value_heads: int | None = None,
        head_width: int | None = None,
        qk_norm: bool = False,
        rope: bool | Callable[..., Any] = False,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check = Check("MultiHeadAttention")
        N, M = num_heads, num_heads if num_key_value_heads is None else num_key_value_heads
        check(N > 0, "num_heads", "at least 1", N)
        if head_width is None:
            check.multiple("features", features, N, of=f"{N} heads")
            head_width = features // N
        check(head_width > 0, "head_width", "at least 1", head_width)
        check(M > 0 and N % M == 0, "num_key_value_heads", f"a divisor of `num_heads` = {N}", M)
        check(0 <= dropout_rate < 1, "dropout_rate", "in [0, 1)", dropout_rate)
        K = head_width
        linear = partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.query = linear(features, (N, K))
        self.key = linear(features, (M, K))
        self.value = linear(features, (M, K))
        self.out = linear((N, K), features, axis=(-2, -1))
        norm = partial(LayerNorm, K, use_bias=False, dtype=dtype, param_dtype=param_dtype)
        self.query_ln = nnx.data(norm() if qk_norm else None)
        self.key_ln = nnx.data(norm() if qk_norm else None)
        self.rope = nnx.data(rope) if isinstance(rope, nnx.Module) else _rotation(rope)
        self.dropout_rate = dropout_rate
        self.deterministic = False
        self.rngs = nnx.data(rngs["dropout"].fork() if dropout_rate > 0 else None)
        self.dtype, self.param_dtype = dtype, param_dtype

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens in each row."""
        *_, M, K = self.key.kernel.shape
        dtype = self.param_dtype if self.dtype is None else self.dtype
        empty = jnp.zeros((batch, length, M, K), dtype)
        return KVCache(empty, empty, jnp.zeros(batch, jnp.int32))

    @overload
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None = None,
        *,
        cache: None = None,
        return_weights: Literal[False] = False,
        **options: Any,
    ) -> Float[Array, "B T D"]: ...

    @overload
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None = None,
        *,
        cache: KVCache,
        return_weights: Literal[False] = False,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], KVCache]: ...

    @overload
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None = None,
        *,
        cache: KVCache | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Any: ...

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        positions: Any = None,
        rngs: nnx.Rngs | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Any:
        """Attention of `x` to `context`, or to itself.

        Args:
            context: what keys and values are made of; None is `x`.
            mask: False hides a key from a query; broadcasts to (B, N, T, S), where S is the room
                of the cache if there is one.
            is_causal: hides the tokens after a query's own, with or without a cache.
            cache: the keys and values of the tokens before; those of `x` are put behind them. Rows
                padded on the right: run them, then set `length` to what is valid of each.
            positions: of the tokens of `x`, handed to `rope`; by default 0, 1, …, behind a cache
                from its length on. A context is numbered from 0.
            rngs: the stream `dropout` to draw from in place of the module's own.
            return_weights: also return the attention weights, (B, N, T, S), as they are applied.
            options: others of `rnnattn.dot_product_attention`: bias, sequence lengths, segment ids,
                window, soft cap, implementation.
        Returns:
            y (B, T, D); a tuple with the cache and the weights after it, if there are any.
        Raises:
            ValueError: as `rnnattn.dot_product_attention` and `rnnattn.update_cache` do; an option
                is the module's own business; context and cache, or context and positions, together.
        """
        self._check(context, cache, positions, options)
        source = x if context is None else context
        query, key, value = self.query(x), self.key(source), self.value(source)
        if self.query_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        if self.rope is not None:
            start = None if cache is None else cache.length
            places = lambda x: _default_positions(x, start) if positions is None else positions
            query, key = self.rope(query, places(query)), self.rope(key, places(key))
        if cache is not None:
            options["query_offset"] = cache.length
            cache = update_cache(cache, key, value)
            key, value = cache.key, cache.value
            options.setdefault("key_value_seq_lengths", cache.length)
        if self.dropout_rate > 0 and not self.deterministic:
            stream = self.rngs if rngs is None else rngs["dropout"]
            options |= {"dropout_rate": self.dropout_rate, "dropout_key": stream()}
        attended = dot_product_attention(
            *(query, key, value),
            mask=mask,
            is_causal=is_causal,
            return_weights=return_weights,
            **options,
        )
        out, *weights = attended if return_weights else (attended,)
        results = [self.out(out), *([] if cache is None else [cache]), *weights]
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, context, cache, positions, options):
        check = Check("MultiHeadAttention")
        owned = {"query_offset", "dropout_rate", "dropout_key", "return_residual", "scale"}
        for name in owned & set(options):
            check(False, name, "left to the module", repr(options[name]))
        for name, other in {"cache": cache, "positions": positions}.items():
            check(context is None or other is None, "context", f"None with `{name}`", "an array")


def _rotation(rope):
    """What rotates queries and keys, of the option `rope`."""
    if rope is True:
        return rotate
    return None if rope is False else rope


def _default_positions(x, start):
    """0, 1, … for the tokens of x (B, T, N, K); from `start` (B,) on."""
    count = jnp.arange(x.shape[1], dtype=jnp.int32)
    return count if start is None else start.astype(jnp.int32)[:, None] + count[None]


class LayerNorm(nnx.Module):
    """(x − mean) / √(variance + ε) · scale + bias over the last axis; 16-bit x in float32.

    ε is 1e-6, as in timm and Google's ViTs. Unlike flax's, the variance is that of x − mean, which
    does not cancel, and float64 goes with strict promotion of dtypes.

    Example:
        >>> LayerNorm(2)(jnp.array([[1.0, 3.0]])).round(2).tolist()
        [[-1.0, 1.0]]
    """

    def __init__(
        self,
        features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        dtype = self.dtype or jnp.result_type(x, self.scale[...])
        wide = accumulator(dtype)
        x = x.astype(wide)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        along = lambda weight: weight[...].astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
        x = x * along(self.scale)
        return (x if self.bias is None else x + along(self.bias)).astype(dtype)
