"""`rnnattn.dot_product_attention` within the modules of flax; axes as in `rnnattn.nn`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rnnattn.attention import dot_product_attention
from rnnattn.checks import Check


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
    check = Check("attention_fn")
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
        rows = math.prod(batch)
        query, key, value = (x.reshape(rows, *x.shape[-3:]) for x in (query, key, value))
        bias, mask = (_merge_batch_axes(x, batch) for x in (bias, mask))
    if mask is not None:
        mask = mask.astype(bool)
    attend = partial(dot_product_attention, query, key, value, bias, mask, is_causal=is_causal)
    out = attend(dropout_rate=dropout_rate if dropping else 0.0, dropout_key=dropout_rng)
    if module is not None:
        _, weights = attend(return_weights=True)
        kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
        module.sow(kind, "attention_weights", weights.reshape(*batch, N, T, S))
    return out.reshape(*batch, *out.shape[-3:])


def _merge_batch_axes(x, batch):
    """x, which broadcasts to (*batch, N, T, S), for batch axes that are one."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(math.prod(batch), *x.shape[-3:])
