"""Flax NNX modules over the functions of this library. They hold weights; the functions compute.

The LSTM, multi-head attention, and a vision transformer (ViT) for images of any size. A pre-norm
block of the ViT is

    x ← x + MHA(LN(x))        x ← x + W₂ gelu(W₁ LN(x) + b₁) + b₂

and its head reads LN of the last x, at the class token or as the mean of the tokens.

Dropout is on until `module.eval()` and again after `module.train()`. Its keys come from streams
within the module or, so that a step can be run again exactly, from `rngs` given to the call.

Axes: B batch, T time or tokens, S keys, D width, H hidden width, R width of h (H without a
projection), N query heads, M key/value heads, K head width.
Sources: Vaswani et al. 2017; Ainslie et al. 2023, arXiv 2305.13245 (grouped heads); Dehghani et al.
2023, arXiv 2302.05442 (normalised queries and keys); Dosovitskiy et al. 2020, arXiv 2010.11929
(ViT); Beyer et al. 2022, arXiv 2205.01580 (2-D sinusoids, mean pooling); Heo et al. 2024, arXiv
2403.13298 (rotary ViT); Xiao et al. 2021, arXiv 2106.14881 (convolutional stem); Huang et al. 2016,
arXiv 1603.09382 (stochastic depth).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rnnattn.attention import KVCache, dot_product_attention, update_cache
from rnnattn.cell import LSTMParams, LSTMState
from rnnattn.patches import conv_stem, patchify, resample_grid, token_mask
from rnnattn.position import rope as rotate, rope_2d, sinusoids
from rnnattn.precision import accumulator
from rnnattn.recurrent import init_lstm, lstm_step, stacked_lstm

# ---- the LSTM ---------------------------------------------------------------------------------


class LSTMCell(nnx.RNNCellBase):
    """The weights of one layer and direction; also a cell for `nnx.RNN`, carrying `LSTMState`.

    Args:
        input_size, hidden_size, options: those of `rnnattn.init_lstm`.
    Example:
        >>> rnn = nnx.RNN(LSTMCell(3, 5, rngs=nnx.Rngs(0)))
        >>> rnn(jnp.ones((2, 7, 3))).shape
        (2, 7, 5)
    """

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, **options: Any):
        params = init_lstm(rngs.params(), input_size, hidden_size, **options)
        self.w_x = nnx.Param(params.w_x)
        self.w_h = nnx.Param(params.w_h)
        self.b = nnx.Param(params.b)
        self.peephole = nnx.data(_param(params.peephole))
        self.projection = nnx.data(_param(params.projection))

    @property
    def params(self) -> LSTMParams:
        """The weights as the functions take them."""
        read = lambda weight: None if weight is None else weight[...]
        return LSTMParams(
            self.w_x[...], self.w_h[...], self.b[...], read(self.peephole), read(self.projection)
        )

    def __call__(
        self, carry: LSTMState, inputs: Float[Array, "B D"]
    ) -> tuple[LSTMState, Float[Array, "B R"]]:
        """One step: `rnnattn.lstm_step`."""
        state = lstm_step(self.params, inputs, carry)
        return state, state.h

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> LSTMState:
        """Zeros for inputs of `input_shape` (B, D)."""
        R, H = self.w_h.shape[0], self.w_h.shape[1] // 4
        dtype = self.b.dtype
        leading = input_shape[:-1]
        return LSTMState(
            jnp.zeros((*leading, R), dtype), jnp.zeros((*leading, H), accumulator(dtype))
        )

    @property
    def num_feature_axes(self) -> int:
        """The axes of one input that are not batch."""
        return 1


class LSTM(nnx.Module):
    """A stack of LSTM layers over sequences: `rnnattn.stacked_lstm` with weights of its own.

    Args:
        bidirectional: each layer runs in both directions and hands up both outputs.
        dropout_rate: the share of outputs dropped between layers, while training
            (`module.train()`, `module.eval()`).
        projection_size: R, the width h is projected to; None for none.
        options: the others of `rnnattn.init_lstm`.
        rngs: streams `params` and, with dropout, `dropout`.
    Raises:
        ValueError: as `rnnattn.init_lstm` does, or `num_layers` is below 1.
    Example:
        >>> module = LSTM(3, 5, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 10)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        projection_size: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if num_layers < 1:
            raise ValueError(f"LSTM: `num_layers` must be at least 1, got {num_layers}")
        directions = 2 if bidirectional else 1
        width = directions * (hidden_size if projection_size is None else projection_size)
        options["projection_size"] = projection_size
        self.forward = nnx.List()
        self.backward = nnx.List()
        for size in [input_size] + [width] * (num_layers - 1):
            self.forward.append(LSTMCell(size, hidden_size, rngs=rngs, **options))
            if bidirectional:
                self.backward.append(LSTMCell(size, hidden_size, rngs=rngs, **options))
        self.dropout_rate = dropout_rate
        self.deterministic = False
        self.rngs = nnx.data(rngs["dropout"].fork() if dropout_rate > 0 else None)

    @property
    def layers(self) -> list[Any]:
        """The weights as `rnnattn.stacked_lstm` takes them."""
        forward = [cell.params for cell in self.forward]
        if not self.backward:
            return forward
        return list(zip(forward, [cell.params for cell in self.backward], strict=True))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        states: Any = None,
        *,
        lengths: Int[Array, " B"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T width"], tuple[Any, ...]]:
        """The outputs of the top layer and the final states of all; see `rnnattn.stacked_lstm`."""
        dropping = self.dropout_rate > 0 and not self.deterministic
        return stacked_lstm(
            self.layers,
            x,
            states,
            lengths=lengths,
            resets=resets,
            dropout_rate=self.dropout_rate if dropping else 0.0,
            dropout_key=self.rngs() if dropping else None,
        )


# ---- attention --------------------------------------------------------------------------------


class MultiHeadAttention(nnx.Module):
    """Attention in several heads, of tokens to themselves or to a context.

    Names and shapes of the weights are those of `flax.nnx.MultiHeadAttention`.

    Args:
        num_heads: N, of the queries; the width of a head is K = features / N.
        features: of inputs and outputs.
        num_key_value_heads: M, a divisor of N: each is read by N / M query heads. None is N.
        qk_norm: a LayerNorm over each head of queries and keys, with a scale and no bias, before
            they are rotated. It bounds the logits; LayerNorm, as in ViT-22B and in flax, whose
            weights then fit.
        rope: True rotates queries and keys by their positions with `rnnattn.rope`; a function
            (x (B, T, N, K), positions) → like x does it another way, a partial of `rnnattn.rope`
            with other options, say, or a module with frequencies of its own.
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
        qk_norm: bool = False,
        rope: bool | Callable[..., Any] = False,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check = partial(_require, "MultiHeadAttention")
        N, M = num_heads, num_heads if num_key_value_heads is None else num_key_value_heads
        check(N > 0, "num_heads", "at least 1", N)
        check(features > 0 and features % N == 0, "features", f"a multiple of {N} heads", features)
        check(M > 0 and N % M == 0, "num_key_value_heads", f"a divisor of num_heads = {N}", M)
        check(0 <= dropout_rate < 1, "dropout_rate", "in [0, 1)", dropout_rate)
        K = features // N
        linear = partial(
            nnx.LinearGeneral,
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
        self.rope = nnx.data(rope) if isinstance(rope, nnx.Module) else _hook(rope)
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
            of = lambda x: _counted(x, start) if positions is None else positions
            query, key = self.rope(query, of(query)), self.rope(key, of(key))
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
        check = partial(_require, "MultiHeadAttention")
        owned = {"query_offset", "dropout_rate", "dropout_key", "return_residual", "scale"}
        for name in owned & set(options):
            check(False, name, "left to the module", repr(options[name]))
        given = [n for n, x in {"cache": cache, "positions": positions}.items() if x is not None]
        expected = f"None with `{' and '.join(given)}`"
        check(context is None or not given, "context", expected, "an array")


def attention_fn(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Float[Array, "..."] | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    is_causal: bool = False,
) -> Float[Array, "*B T N V"]:
    """`rnnattn.dot_product_attention` for the `attention_fn` of flax's own attention modules.

    Of `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`, decoding
    included. A query that sees no key gets zeros, where flax gives the mean of the values.

    Args:
        query, key, value: with any number of batch axes.
        mask: not only Boolean: flax makes masks of floats, 0 for hidden.
        broadcast_dropout: must be False where something drops: here every batch row and head has
            dropout of its own, and flax shares it among them by default.
        module: has the weights sown as flax does, before dropout: into `nnx.Intermediate` or into
            the collection "intermediates".
        force_fp32_for_softmax: it always is, or wider.
        precision, qk_attn_weights_einsum, attn_weights_value_einsum: must be None;
            `jax.default_matmul_precision` sets the first.
    Raises:
        ValueError: as `rnnattn.dot_product_attention` does, or an argument cannot be served.
    Gradient:
        That of `rnnattn.dot_product_attention`.
    Example:
        >>> module = nnx.MultiHeadAttention(
        ...     4, 32, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> module(jnp.ones((2, 5, 32)), is_causal=True).shape
        (2, 5, 32)
    """
    check = partial(_require, "attention_fn")
    dropping = dropout_rate > 0 and not deterministic
    check(precision is None, "precision", "None", repr(precision))
    for name, einsum in (
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        check(einsum is None, name, "None", einsum)
    check(not (dropping and broadcast_dropout), "broadcast_dropout", "False with dropout", True)
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    *batch, T, N, _ = query.shape
    S = key.shape[-3]
    if len(batch) > 1:
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        bias, mask = (_one_batch_axis(x, batch) for x in (bias, mask))
    if mask is not None:
        mask = mask.astype(bool)
    attend = partial(dot_product_attention, query, key, value, bias, mask, is_causal=is_causal)
    out = attend(dropout_rate=dropout_rate if dropping else 0.0, dropout_key=dropout_rng)
    if module is not None:
        _, weights = attend(return_weights=True)
        kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
        module.sow(kind, "attention_weights", weights.reshape(*batch, N, T, S))
    return out.reshape(*batch, *out.shape[-3:])


def _hook(rope):
    if rope is True:
        return rotate
    return None if rope is False else rope


def _counted(x, start):
    """0, 1, … for the tokens of x (B, T, N, K); from `start` (B,) on."""
    count = jnp.arange(x.shape[1], dtype=jnp.int32)
    return count if start is None else start.astype(jnp.int32)[:, None] + count[None]


def _one_batch_axis(x, batch):
    """x, which broadcasts to (*batch, N, T, S), for batch axes that are one."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])


# ---- the vision transformer -------------------------------------------------------------------


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


class Block(nnx.Module):
    """A pre-norm block of a transformer's encoder: attention, then two layers with a GELU between.

    The GELU is exact (erf), ε of the LayerNorms is 1e-6, as in timm.

    Args:
        features, num_heads, rope: as in `MultiHeadAttention`.
        hidden: the width between the two layers.
        dropout_rate: after each of the three linear maps.
        attention_dropout_rate: on the attention weights.
        drop_path_rate: the chance, for each row of the batch, that a branch is left out; what
            stays is scaled up.
    Example:
        >>> Block(32, 4, hidden=64, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 32))).shape
        (2, 5, 32)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        hidden: int,
        rope: bool | Callable[..., Any] = False,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.xavier_uniform(), **dtypes)
        self.norm1 = LayerNorm(features, **dtypes)
        self.attention = MultiHeadAttention(
            num_heads, features, rope=rope, dropout_rate=attention_dropout_rate, rngs=rngs, **dtypes
        )
        self.norm2 = LayerNorm(features, **dtypes)
        self.fc1 = linear(features, hidden, rngs=rngs)
        self.fc2 = linear(hidden, features, rngs=rngs)
        self.dropout = _dropout(dropout_rate, rngs)
        self.drop_path = _dropout(drop_path_rate, rngs, broadcast_dims=(1, 2))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        rngs: nnx.Rngs | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Any:
        """x (B, T, D) and, if asked for, the attention weights; `options` go to the attention."""
        drop, drop_path = partial(self.dropout, rngs=rngs), partial(self.drop_path, rngs=rngs)
        attended = self.attention(
            self.norm1(x), rngs=rngs, return_weights=return_weights, **options
        )
        y, *weights = attended if return_weights else (attended,)
        x = x + drop_path(drop(y))
        hidden = drop(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        x = x + drop_path(drop(self.fc2(hidden)))
        return (x, *weights) if return_weights else x


class Activations(NamedTuple):
    """What `ViT` computes on the way, T counting the class token (the first, if there is one)."""

    embedded: Float[Array, "B T D"]  # tokens with their positions, before the first block
    blocks: tuple[Float[Array, "B T D"], ...]  # tokens after each block
    weights: tuple[Float[Array, "B N T T"], ...]  # attention weights of each block
    normalized: Float[Array, "B T D"]  # tokens after the last LayerNorm
    pooled: Float[Array, "B D"]  # what the head reads
    mask: Bool[Array, "B T"] | None  # which tokens hold valid pixels


class ViT(nnx.Module):
    """A vision transformer for images of any size, square or not.

    With `valid`, padding takes part in nothing: its pixels are set to zero, its tokens are hidden
    from attention and left out of the mean. Logits and gradients are then bit for bit independent
    of what it holds, even of NaN.

    Args:
        patch_size: in pixels, (rows, columns); one number stands for both.
        width: D, of a token.
        mlp_ratio: the hidden width of a block, in units of `width`.
        classes: how many logits.
        channels: of the images.
        image_size: in pixels, one number or (rows, columns): the size that positions refer to.
            Needed by learned positions and the convolutional stem. For images of another size
            learned positions are resampled (`rnnattn.resample_grid`); 2-D sinusoids and rotations
            stretch to it, row i of n becoming (i + ½) m/n − ½ on the grid of m, or, with None, go
            on counting patches.
        position: "learned", "sincos2d" (half of the width for rows, half for columns, of
            `rnnattn.sinusoids`), "rope2d" (`rnnattn.rope_2d` on queries and keys) or "none".
        pool: "mean" of the tokens, or "cls": a token of its own, in front.
        stem: "patch", a linear map of each patch, or "conv": `rnnattn.conv_stem`, which brings
            images of any size to the grid of `image_size` (V6), by a 3 × 3 convolution for each
            halving that the patch size takes and a 1 × 1 convolution.
        dropout_rate: of tokens, and in the blocks after each linear map.
        attention_dropout_rate: of attention weights.
        drop_path_rate: stochastic depth: the chance that a branch of the last block is left out
            for an image; it grows linearly from 0 at the first block.
        dtype: of the computation, logits included; None is that of images and weights together.
        param_dtype: of the weights.
        rngs: streams `params` and, with any dropout, `dropout`.
    Raises:
        ValueError: an option is unknown or out of range, or sizes do not divide.
    Example:
        >>> model = ViT(
        ...     patch_size=2, width=32, depth=2, num_heads=4, classes=10, channels=1, image_size=8,
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> model(jnp.ones((3, 8, 8, 1))).shape, model(jnp.ones((3, 16, 10, 1))).shape
        ((3, 10), (3, 10))
    """

    def __init__(
        self,
        *,
        patch_size: int | tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float | int = 4,
        classes: int,
        channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        position: Literal["learned", "sincos2d", "rope2d", "none"] = "learned",
        pool: Literal["mean", "cls"] = "mean",
        stem: Literal["patch", "conv"] = "patch",
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check = partial(_require, "ViT")
        for name, value, known in (
            ("position", position, ("learned", "sincos2d", "rope2d", "none")),
            ("pool", pool, ("mean", "cls")),
            ("stem", stem, ("patch", "conv")),
        ):
            check(value in known, name, f"one of {known}", repr(value))
        for name, number in {"depth": depth, "classes": classes, "channels": channels}.items():
            check(number > 0, name, "at least 1", number)
        for name, rate in {"dropout_rate": dropout_rate, "drop_path_rate": drop_path_rate}.items():
            check(0 <= rate < 1, name, "in [0, 1)", rate)
        check(width % num_heads == 0, "width", f"a multiple of {num_heads} heads", width)
        K = width // num_heads
        check(position != "sincos2d" or width % 4 == 0, "width", "a multiple of 4", width)
        check(position != "rope2d" or K % 4 == 0, "width", f"{num_heads} heads times 4 n", width)
        self.patch_size = _both("patch_size", patch_size)
        self.position_scheme, self.pool, self.channels = position, pool, channels
        self.base_grid: Any = None
        if image_size is not None:
            self.base_grid = self._patches("image_size", _both("image_size", image_size))
        for name, value, needing in (("position", position, "learned"), ("stem", stem, "conv")):
            needs = f"given for {name} {needing!r}"
            check(self.base_grid or value != needing, "image_size", needs, None)

        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        if stem == "conv":
            self.stem = ConvStem(channels, width, self.patch_size, self.base_grid, rngs, **dtypes)
        else:
            self.stem = PatchStem(channels, width, self.patch_size, rngs, **dtypes)
        self.cls = nnx.data(None)
        if pool == "cls":
            self.cls = nnx.data(nnx.Param(jnp.zeros((1, width), param_dtype)))
        self.position = nnx.data(None)
        if position == "learned":
            tokens = math.prod(self.base_grid) + self.prefix
            draw = nnx.initializers.normal(0.02)(rngs.params(), (tokens, width), param_dtype)
            self.position = nnx.data(nnx.Param(draw))
        self.dropout = _dropout(dropout_rate, rngs)
        self.blocks = nnx.List(
            Block(
                width,
                num_heads,
                hidden=round(width * mlp_ratio),
                rope=_rotate_2d if position == "rope2d" else False,
                dropout_rate=dropout_rate,
                attention_dropout_rate=attention_dropout_rate,
                drop_path_rate=drop_path_rate * n / max(depth - 1, 1),
                rngs=rngs,
                **dtypes,
            )
            for n in range(depth)
        )
        self.norm = LayerNorm(width, **dtypes)
        zeros = nnx.initializers.zeros_init()
        self.head = nnx.Linear(width, classes, kernel_init=zeros, rngs=rngs, **dtypes)

    def __call__(
        self,
        images: Float[Array, "B rows columns channels"],
        valid: Bool[Array, "B rows columns"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        capture: bool = False,
    ) -> Any:
        """Logits (B, classes), and with `capture` also the `Activations`.

        Args:
            valid: which pixels are of the image, as `rnnattn.crop_and_pad` gives it; a token with
                one of them is valid. For the patch stem only. An image without any reads zeros.
            rngs: the stream `dropout` to draw from in place of the module's own.
            capture: attention is then dense.
        Raises:
            ValueError: the patch size does not divide the images (crop or pad them, or use the
                convolutional stem), or a shape or dtype is off.
        """
        self._check(images, valid)
        size = (images.shape[1], images.shape[2])
        mask = None
        if valid is not None:
            images = jnp.where(valid[..., None], images, 0)
            mask = token_mask(valid, self.patch_size)
        x = self.stem(images)
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype)[None], (len(x), 1, x.shape[2]))
            x = jnp.concatenate([cls, x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        table = self.position_table(size)
        if table is not None:
            x = x + table[None].astype(x.dtype)
        x = embedded = self.dropout(x, rngs=rngs)
        options = {
            "mask": None if mask is None else mask[:, None, None, :],
            "positions": self._coordinates(size) if self.position_scheme == "rope2d" else None,
        }
        blocks, weights = [], []
        for block in self.blocks:
            x = block(x, rngs=rngs, return_weights=capture, **options)
            if capture:
                x, of_block = x
                blocks.append(x)
                weights.append(of_block)
        normalized = self.norm(x)
        pooled = normalized[:, 0] if self.cls is not None else _masked_mean(normalized, mask)
        logits = self.head(pooled)
        if not capture:
            return logits
        kept = Activations(embedded, tuple(blocks), tuple(weights), normalized, pooled, mask)
        return logits, kept

    @property
    def prefix(self) -> int:
        """How many tokens stand before those of the image."""
        return int(self.pool == "cls")

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) of tokens that images of `size` have.

        Raises:
            ValueError: the patch size does not divide `size`.
        """
        if isinstance(self.stem, ConvStem):
            return self.stem.grid
        return self._patches("images", size)

    def position_table(self, size: tuple[int, int]) -> Float[Array, "T D"] | None:
        """What is added to the tokens of images of `size`; None where nothing is.

        The class token is in front, if there is one; 2-D sinusoids leave it as it is.

        Raises:
            ValueError: the patch size does not divide `size`.
        """
        if self.position_scheme == "learned":
            new = self.grid(size)
            return resample_grid(self.position[...], self.base_grid, new, prefix_tokens=self.prefix)
        if self.position_scheme != "sincos2d":
            return None
        dtype = self.head.param_dtype
        halves = [
            sinusoids(t[self.prefix :], self.head.in_features // 2, dtype=dtype)
            for t in self._coordinates(size)
        ]
        table = jnp.concatenate(halves, axis=-1)
        return jnp.pad(table, ((self.prefix, 0), (0, 0)))

    def _coordinates(self, size):
        """The row and the column of each token; of the class token, 0 and 0: no rotation."""
        grid = self.grid(size)
        axes = [
            np.arange(n, dtype=np.int32) if m in (None, n) else _stretched(n, m)
            for n, m in zip(grid, self.base_grid or (None, None), strict=True)
        ]
        return [np.pad(t.ravel(), (self.prefix, 0)) for t in np.meshgrid(*axes, indexing="ij")]

    def _patches(self, name, size):
        p, q = self.patch_size
        if size[0] % p or size[1] % q:
            raise ValueError(
                f"ViT: the (rows, columns) of `{name}` must be multiples of the patch size "
                f"{self.patch_size}, got {tuple(size)}; `rnnattn.crop_and_pad` makes them so"
            )
        return size[0] // p, size[1] // q

    def _check(self, images, valid):
        check = partial(_require, "ViT")
        expected = f"(B, rows, columns, {self.channels})"
        check(
            images.ndim == 4 and images.shape[3] == self.channels, "images", expected, images.shape
        )
        check(jnp.issubdtype(images.dtype, jnp.floating), "images", "floating", images.dtype.name)
        if valid is not None:
            check(valid.shape == images.shape[:3], "valid", f"{images.shape[:3]}", valid.shape)
            check(
                not isinstance(self.stem, ConvStem), "valid", "None with the conv stem", "an array"
            )
        self.grid(images.shape[1:3])


class PatchStem(nnx.LinearGeneral):
    """Images to tokens by a linear map of each patch; `kernel` (rows, columns, channels, D)."""

    def __init__(self, channels, width, patch_size, rngs, **dtypes):
        super().__init__((*patch_size, channels), width, axis=(-3, -2, -1), rngs=rngs, **dtypes)

    def __call__(self, images):
        tokens = patchify(images, self.in_features[:2])
        return super().__call__(tokens.reshape(*tokens.shape[:2], *self.in_features))


class ConvStem(nnx.Module):
    """Images of any size to tokens on one grid: `rnnattn.conv_stem`.

    n 3 × 3 convolutions, 2ⁿ the patch size or the next power above it, whose widths double up to
    `width`, and a 1 × 1 one.
    """

    def __init__(self, channels, width, patch_size, grid, rngs, **dtypes):
        self.grid, self.dtype = grid, dtypes["dtype"]
        halvings = max(1, math.ceil(math.log2(max(patch_size))))
        widths = [max(1, width >> n) for n in reversed(range(halvings))] + [width]
        sizes = [3] * halvings + [1]
        self.layers = nnx.List(
            nnx.Conv(before, after, (k, k), rngs=rngs, **dtypes)
            for before, after, k in zip([channels, *widths], widths, sizes, strict=False)
        )

    def __call__(self, images):
        kernels = [layer.kernel[...] for layer in self.layers]
        biases = [layer.bias[...] for layer in self.layers]
        dtype = self.dtype or jnp.result_type(images, kernels[0])
        images, kernels, biases = jax.tree.map(lambda x: x.astype(dtype), (images, kernels, biases))
        return conv_stem(images, kernels, biases, self.grid)


def _both(name, size):
    """(rows, columns), of one number or two."""
    pair = (size, size) if type(size) is int else tuple(size)
    sizes = len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
    _require("ViT", sizes, name, "an int of at least 1, or two", repr(size))
    return pair


def _rotate_2d(x, positions):
    return rope_2d(x, *positions)


def _stretched(n, m):
    """Where the middles of n patches lie on an axis of m, in float32: u_i of `rnnattn.patches`."""
    return ((np.arange(n) + 0.5) * (m / n) - 0.5).astype(np.float32)


def _masked_mean(x, mask):
    """The mean of the tokens of x (B, T, D) that are not hidden."""
    if mask is None:
        return jnp.mean(x, axis=1)
    wide = accumulator(x.dtype)
    kept = jnp.where(mask[..., None], x, 0).astype(wide)
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(wide)
    return (kept.sum(axis=1) / count).astype(x.dtype)


def _dropout(rate, rngs, **options):
    return nnx.Dropout(rate, rngs=rngs if rate > 0 else None, **options)


# ---- weights ----------------------------------------------------------------------------------


def load_weights(module: nnx.Module, weights: Mapping[Any, Any]) -> None:
    """Sets every parameter of `module` from a nested dictionary of arrays, as `interop` makes it.

    The arrays are copied. `nnx.to_pure_dict(nnx.state(module, nnx.Param))` is the way back.

    Raises:
        ValueError: a name is missing or unknown, or a shape or dtype is not the module's; all that
            is wrong is named, and nothing is set.
    Example:
        A checkpoint for the images it was trained on, then a model for larger patches of it:

        >>> from rnnattn import resize_patch_kernel
        >>> make = lambda patch_size, image_size: ViT(
        ...     patch_size=patch_size, image_size=image_size, width=8, depth=1, num_heads=2,
        ...     classes=3, rngs=nnx.Rngs(0),
        ... )
        >>> weights = nnx.to_pure_dict(nnx.state(make(4, 16), nnx.Param))
        >>> weights["stem"]["kernel"] = resize_patch_kernel(weights["stem"]["kernel"], 8)
        >>> load_weights(make(8, 32), weights)
    """
    own = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    given = nnx.traversals.flatten_mapping(weights)
    name = lambda path: ".".join(map(str, path))
    wrong = [f"`{name(path)}` is missing" for path in own if path not in given]
    wrong += [f"`{name(path)}` is unknown" for path in given if path not in own]
    for path in own:
        if path in given:
            expected, got = own[path], given[path]
            if jnp.shape(got) != expected.shape:
                shapes = f"{expected.shape}, got {jnp.shape(got)}"
                wrong.append(f"`{name(path)}` must have shape {shapes}")
            elif jnp.result_type(got) != expected.dtype:
                dtypes = f"{expected.dtype.name}, got {jnp.result_type(got).name}"
                wrong.append(f"`{name(path)}` must have the dtype {dtypes}")
    if wrong:
        raise ValueError(f"load_weights: {'; '.join(wrong)}")
    nnx.update(module, jax.tree.map(jnp.array, dict(weights)))


def _param(weight):
    return None if weight is None else nnx.Param(weight)


def _require(module, holds, name, expected, got):
    if not holds:
        raise ValueError(f"{module}: `{name}` must be {expected}, got {got}")
