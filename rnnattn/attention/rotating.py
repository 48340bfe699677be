"""A cache of the last tokens alone, for attention within a window: a new token takes the place of
the oldest.

Axes: B batch, T tokens or queries, W places, N query heads, M key/value heads, K head width, V
value width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rnnattn.attention.api import dot_product_attention
from rnnattn.attention.cache import check_tokens
from rnnattn.checks import Check
from rnnattn.meshes import explicit_mesh, in_parts


class RotatingCache(NamedTuple):
    """Keys and values of the last W tokens of each row: the token at position p is in place p % W.

    `jnp.zeros` make an empty one.
    """

    key: Float[Array, "B W M K"]
    value: Float[Array, "B W M V"]
    length: Int[Array, " B"]  # of the whole row so far, and so the position of the next token


def update_rotating_cache(
    cache: RotatingCache,
    key: Float[Array, "B T M K"],
    value: Float[Array, "B T M V"],
    counts: Int[Array, " B"] | None = None,
) -> RotatingCache:
    """The cache with the first `counts[b]` of T tokens in the places of the oldest of row b.

    Of more than W tokens the last W remain.

    Args:
        counts: in [0, T], beyond which they are clipped; None for all of the T.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        With respect to the keys and values of both; JAX's own.
    Example:
        >>> cache = RotatingCache(
        ...     jnp.zeros((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1)), jnp.zeros(1, int)
        ... )
        >>> tokens = jnp.arange(5.0).reshape(1, 5, 1, 1)
        >>> update_rotating_cache(cache, tokens, tokens).key.ravel().tolist()
        [3.0, 4.0, 2.0]
    """
    check = Check("update_rotating_cache")
    cache, key, value = _checked(check, cache), jnp.asarray(key), jnp.asarray(value)
    check_tokens(check, cache, key, value, len(cache.key), counts)
    given = {"cache": cache, "key": key, "value": value, "counts": counts}
    return _update(**given) if explicit_mesh(given) is None else _update_in_parts(given)


@jax.jit
def _update_in_parts(given):
    """On a mesh of explicit axes: rows and heads by themselves."""
    letters: Any = RotatingCache("BWMK", "BWMV", "B")  # type: ignore[arg-type]
    axes = {"cache": letters, "key": "BTMK", "value": "BTMV", "counts": "B"}
    run, whole = lambda given: _update(**given), {"W": "the cache", "T": "the tokens"}
    check = Check("update_rotating_cache")
    return in_parts(check, run, given, axes, letters, divided="BM", whole=whole)


@jax.jit
def _update(cache, key, value, counts):
    (B, T), W = key.shape[:2], cache.key.shape[1]
    counts = jnp.full(B, T, jnp.int32) if counts is None else jnp.clip(counts, 0, T)
    t, counts = jnp.arange(T, dtype=jnp.int32)[None], counts.astype(jnp.int32)[:, None]
    stays = (t < counts) & (t >= counts - W)
    length = cache.length.astype(jnp.int32)
    place = jnp.where(stays, (length[:, None] + t) % W, W)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    return RotatingCache(
        cache.key.at[rows, place].set(key, mode="drop"),
        cache.value.at[rows, place].set(value, mode="drop"),
        cache.length + counts[:, 0].astype(cache.length.dtype),
    )


def rotating_attention(
    query: Float[Array, "B T N K"],
    cache: RotatingCache,
    *,
    window: int,
    query_seq_lengths: Int[Array, " B"] | None = None,
    **options: Any,
) -> Any:
    """Attention of the tokens that were put in last, each to itself and `window` keys before it.

    Equal to `dot_product_attention` to all keys there ever were, with `is_causal` and
    `local_window_size=window`.

    Args:
        query: (B, T, N, K), of the T tokens that the last `update_rotating_cache` put in.
        window: of so many keys before its own each query sees; of T tokens at once, W places hold
            enough for a window of at most W − T.
        query_seq_lengths: (B,), the `counts` of that update, if it had some.
        options: `scale`, `logits_soft_cap`, `sinks`, `implementation` and `return_residual` of
            `dot_product_attention`, among others; `mask` is in use.
    Returns:
        As `dot_product_attention`. What lies in places of no token may be NaN and reaches nothing.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        That of `dot_product_attention`.
    Example:
        >>> cache = RotatingCache(
        ...     jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2)), jnp.zeros(1, int)
        ... )
        >>> for _ in range(5):
        ...     q, k, v = jnp.ones((3, 1, 1, 1, 2))
        ...     cache = update_rotating_cache(cache, k, v)
        ...     out = rotating_attention(q, cache, window=2)
        >>> out.shape
        (1, 1, 1, 2)
    """
    check = Check("rotating_attention")
    cache, query = _checked(check, cache), jnp.asarray(query)
    check.axes("query", query, "(B, T, N, K)")
    T, W = query.shape[1], cache.key.shape[1]
    expected = f"an integer from 0 to {W - T}, so that {W} places hold it for {T} queries"
    window = check.integer("window", window, 0, expected)
    check(window <= W - T, "window", expected, window)
    if query_seq_lengths is not None:
        check.shape("query_seq_lengths", query_seq_lengths, cache.length.shape, "(B,)")
        check.integers("query_seq_lengths", query_seq_lengths)
    taken = {"key_value_seq_lengths", "query_offset", "is_causal", "local_window_size", "mask"}
    for name in taken & options.keys():
        raise TypeError(f"rotating_attention() got an unexpected keyword argument {name!r}")
    if T == 1 and window == W - 1:  # all that there is: what is known by its length is cheaper
        options |= {"key_value_seq_lengths": jnp.minimum(cache.length, W)}
    else:
        options |= {"mask": _sees(window, T, W, cache.length, query_seq_lengths)}
    options["query_seq_lengths"] = query_seq_lengths
    return dot_product_attention(query, cache.key, cache.value, **options)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sees(window, T, W, length, counts):
    """Which places each query sees, (B, 1, T, W)."""
    length = length.astype(jnp.int32)[:, None, None]
    t = jnp.arange(T, dtype=jnp.int32)[None, :, None]
    place = jnp.arange(W, dtype=jnp.int32)[None, None]
    counts = T if counts is None else jnp.clip(counts, 0, T).astype(jnp.int32)[:, None, None]
    at = length - counts + t
    key_at = length - 1 - (length - 1 - place) % W
    return ((key_at >= 0) & (key_at <= at) & (key_at >= at - window))[:, None]


def _checked(check, cache):
    """The cache as arrays that fit together."""
    cache = RotatingCache(*map(jnp.asarray, cache))
    whole = cache.key.shape
    check(len(whole) == 4 and whole[1] > 0, "cache.key", "of shape (B, W, M, K)", whole)
    fits = cache.value.ndim == 4 and cache.value.shape[:3] == whole[:3]
    expected = f"of shape (B, W, M, V) to go with key's {whole}"
    check(fits, "cache.value", expected, cache.value.shape)
    check.shape("cache.length", cache.length, whole[:1], "(B,)")
    check.integers("cache.length", cache.length)
    return cache
