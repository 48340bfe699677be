"""A cache of keys and values for decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rnnattn.checks import Check
from rnnattn.meshes import explicit_mesh, in_parts


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, and room for more: `length` of the S are there."""

    key: Float[Array, "B S M K"]
    value: Float[Array, "B S M V"]
    length: Int[Array, " B"]


def update_cache(
    cache: KVCache, key: Float[Array, "B T M K"], value: Float[Array, "B T M V"]
) -> KVCache:
    """The cache with T more tokens behind those that each row holds.

    To attend to it, give the length before the update as `query_offset`, with `is_causal`. What
    exceeds the room of a row is not stored, though `length` counts it: compare it with S.

    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        With respect to both caches' and the new keys and values; JAX's own.
    Example:
        >>> empty = KVCache(jnp.zeros((2, 16, 4, 8)), jnp.zeros((2, 16, 4, 8)), jnp.zeros(2, int))
        >>> q, k, v = jnp.ones((3, 2, 1, 4, 8))
        >>> cache = update_cache(empty, k, v)
        >>> from rnnattn import dot_product_attention
        >>> out = dot_product_attention(
        ...     q, cache.key, cache.value, is_causal=True, query_offset=empty.length
        ... )
        >>> cache.length.tolist(), out.shape
        ([1, 1], (2, 1, 4, 8))
    """
    cache = KVCache(*map(jnp.asarray, cache))
    key, value = jnp.asarray(key), jnp.asarray(value)
    _check_cache(cache, key, value)
    given = {"cache": cache, "key": key, "value": value}
    return _update(**given) if explicit_mesh(given) is None else _update_in_parts(given)


@jax.jit
def _update_in_parts(given):
    """On a mesh of explicit axes: rows and heads by themselves."""
    letters = KVCache("BSMK", "BSMV", "B")  # type: ignore[arg-type]
    axes = {"cache": letters, "key": "BTMK", "value": "BTMV"}
    run, whole = lambda given: _update(**given), {"S": "the cache", "T": "the tokens"}
    check = Check("update_cache")
    return in_parts(check, run, given, axes, letters, divided="BM", whole=whole)


@jax.jit
def _update(cache, key, value):
    T = key.shape[1]
    rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
    at = cache.length.astype(jnp.int32)[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    return KVCache(
        cache.key.at[rows, at].set(key, mode="drop"),
        cache.value.at[rows, at].set(value, mode="drop"),
        cache.length + jnp.asarray(T, cache.length.dtype),
    )


def _check_cache(cache, key, value):
    check = Check("update_cache")
    B, S, *_ = whole = cache.key.shape
    check(len(whole) == 4, "cache.key", "of shape (B, S, M, K)", whole)
    same = len(cache.value.shape) == 4 and cache.value.shape[:3] == whole[:3]
    expected = f"of shape (B, S, M, V) to go with key's {whole}"
    check(same, "cache.value", expected, cache.value.shape)
    check_tokens(check, cache, key, value, B)
    T, length = key.shape[1], cache.length
    check(T <= S, "key", f"of at most the {S} tokens the cache has room for", T)
    check.shape("cache.length", length, (B,), "(B,)")
    check.integers("cache.length", length)


def check_tokens(check, cache, key, value, B, counts=None, *, quantised=False):
    """Keys and values of T tokens of B rows, of which row b may have its first `counts[b]`."""
    for name, old, new in (("key", cache.key, key), ("value", cache.value, value)):
        expected = f"of shape (B, T, …) to go with the cache's {old.shape}"
        fits = new.ndim == 4 and (new.shape[0], *new.shape[2:]) == (B, *old.shape[2:])
        check(fits, name, expected, new.shape)
        if quantised:
            check.floating(name, new)
        else:
            check.dtype_of(name, new, f"cache.{name}", old)
    T = key.shape[1]
    check(T == value.shape[1], "value", f"of as many tokens as key, {T}", value.shape[1])
    if counts is not None:
        check.shape("counts", counts, (B,), "(B,)")
        check.integers("counts", counts)
