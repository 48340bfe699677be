"""What a type checker makes of the public functions: `make types` reads this file."""

from typing import assert_type

import jax
import jax.numpy as jnp

from rnnattn import (
    KVCache,
    LSTMParams,
    dot_product_attention,
    nn,
    parallel,
    reference,
    stacked_lstm,
)
from rnnattn.attention import dot_product_attention_jvp


def read_by_the_type_checker(q: jax.Array, flag: bool, params: LSTMParams):
    for attend in (dot_product_attention, dot_product_attention_jvp):
        assert_type(attend(q, q, q, is_causal=True), jax.Array)
        assert_type(attend(q, q, q, return_residual=True), tuple[jax.Array, jax.Array])
        assert_type(attend(q, q, q, return_weights=True), tuple[jax.Array, jax.Array])
    both = reference.dot_product_attention(q, q, q, return_residual=True, return_weights=True)
    assert_type(both, tuple[jax.Array, jax.Array, jax.Array])
    dot_product_attention(q, q, q, return_residual=flag)

    ring = parallel.ring_attention
    assert_type(ring(q, q, q, axis_name="sequence", is_causal=True), jax.Array)
    both_of_ring = ring(q, q, q, axis_name="sequence", return_residual=True)
    assert_type(both_of_ring, tuple[jax.Array, jax.Array])

    # a misspelt option; that nothing is to be ignored here is an error
    dot_product_attention(q, q, q, is_casual=True)  # type: ignore[call-overload]
    reference.dot_product_attention(q, q, q, is_casual=True)  # type: ignore[call-overload]
    stacked_lstm([params], q, residual="gates")  # type: ignore[call-arg]
    ring(q, q, q, axis_name="sequence", is_casual=True)  # type: ignore[call-overload]
    ring(q, q, q)  # type: ignore[call-overload]


def modules_read_by_the_type_checker(
    attention: nn.MultiHeadAttention, vit: nn.ViT, x: jax.Array, cache: KVCache
):
    assert_type(attention(x, is_causal=True), jax.Array)
    assert_type(attention(x, cache=cache), tuple[jax.Array, KVCache])
    assert_type(vit(x), jax.Array)
    assert_type(vit(x, capture=True)[0], jax.Array)


def test_what_is_typed_is_what_runs():
    q = jnp.ones((2, 3, 1, 4))
    assert isinstance(dot_product_attention(q, q, q), jax.Array)
    assert len(dot_product_attention(q, q, q, return_residual=True, return_weights=True)) == 3
