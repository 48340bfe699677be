"""Sequences packed behind one another, without padding: where each begins, and who is whose.

`cu_seqlens` are the cumulative lengths of the sequences, (sequences + 1,), in the form of
flash-attention: sequence i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]). A sequence may be
empty; tokens in front of the first and behind the last belong to none. All of it can be traced.
"""

from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rnnattn.checks import Check


def lengths_to_cu_seqlens(lengths: Int[Array, " sequences"]) -> Int[Array, " sequences+1"]:
    """Where sequences of these lengths begin, and where the last one ends.

    Raises:
        ValueError: `lengths` are not integers of shape (sequences,).
    Example:
        >>> lengths_to_cu_seqlens(jnp.array([3, 0, 2])).tolist()
        [0, 3, 3, 5]
    """
    check, lengths = Check("lengths_to_cu_seqlens"), jnp.asarray(lengths)
    check.axes("lengths", lengths, "(sequences)")
    check.integers("lengths", lengths)
    return _cumulative(lengths)


def cu_seqlens_to_lengths(cu_seqlens: Int[Array, " starts"]) -> Int[Array, " starts-1"]:
    """The length of each sequence.

    Raises:
        ValueError: `cu_seqlens` are not integers of shape (sequences + 1,).
    Example:
        >>> cu_seqlens_to_lengths(jnp.array([0, 3, 3, 5])).tolist()
        [3, 0, 2]
    """
    return jnp.diff(checked_cu_seqlens("cu_seqlens_to_lengths", "cu_seqlens", cu_seqlens))


def cu_seqlens_to_segment_ids(
    cu_seqlens: Int[Array, " starts"], tokens: SupportsIndex
) -> Int[Array, " {tokens}"]:
    """The number of each token's sequence: −1 in front of the first, `sequences` behind the last.

    They are sorted.

    Args:
        tokens: how many there are, those of no sequence included.
    Raises:
        ValueError: `cu_seqlens` are not integers of shape (sequences + 1,), or `tokens` is no
            integer of at least 0.
    Example:
        >>> cu_seqlens_to_segment_ids(jnp.array([0, 3, 3, 5]), 6).tolist()
        [0, 0, 0, 2, 2, 3]
    """
    cu_seqlens, tokens = _checked("cu_seqlens_to_segment_ids", cu_seqlens, tokens)
    return _segment_ids(cu_seqlens, tokens)


def segment_ids_to_cu_seqlens(
    segment_ids: Int[Array, " tokens"], sequences: SupportsIndex
) -> Int[Array, " {sequences}+1"]:
    """Where the tokens of each of the ids 0 … `sequences` − 1 begin, and where the last ones end.

    Args:
        segment_ids: sorted. Those below 0 and from `sequences` on are of tokens of no sequence.
    Raises:
        ValueError: `segment_ids` are not integers of shape (tokens,), or `sequences` is no integer
            of at least 1.
    Example:
        >>> segment_ids_to_cu_seqlens(jnp.array([0, 0, 0, 2, 2, 3]), 3).tolist()
        [0, 3, 3, 5]
    """
    check, ids = Check("segment_ids_to_cu_seqlens"), jnp.asarray(segment_ids)
    check.axes("segment_ids", ids, "(tokens)")
    check.integers("segment_ids", ids)
    sequences = check.integer("sequences", sequences, 1)
    return _starts(ids, sequences)


def packed_positions(
    cu_seqlens: Int[Array, " starts"], tokens: SupportsIndex
) -> Int[Array, " {tokens}"]:
    """The position of each token in its sequence, from 0: the `positions` of `rope`.

    Args:
        tokens: how many there are; those of no sequence are counted, too, from where they begin.
    Raises:
        ValueError: as `cu_seqlens_to_segment_ids` does.
    Example:
        >>> packed_positions(jnp.array([0, 3, 3, 5]), 6).tolist()
        [0, 1, 2, 0, 1, 0]
    """
    cu_seqlens, tokens = _checked("packed_positions", cu_seqlens, tokens)
    return _positions(cu_seqlens, tokens)


@jax.jit
def _cumulative(lengths):
    return jnp.pad(jnp.cumsum(lengths, dtype=jnp.int32), (1, 0))


@partial(jax.jit, static_argnums=1)
def _starts(ids, sequences):
    return jnp.searchsorted(ids, jnp.arange(sequences + 1, dtype=ids.dtype)).astype(jnp.int32)


@partial(jax.jit, static_argnums=1)
def _segment_ids(cu_seqlens, tokens):
    t = jnp.arange(tokens, dtype=jnp.int32)
    return jnp.searchsorted(cu_seqlens, t, side="right").astype(jnp.int32) - 1


@partial(jax.jit, static_argnums=1)
def _positions(cu_seqlens, tokens):
    ids, t = _segment_ids(cu_seqlens, tokens), jnp.arange(tokens, dtype=jnp.int32)
    return t - jnp.where(ids < 0, 0, cu_seqlens[jnp.maximum(ids, 0)])


def _checked(function, cu_seqlens, tokens):
    tokens = Check(function).integer("tokens", tokens, 0)
    return checked_cu_seqlens(function, "cu_seqlens", cu_seqlens), tokens


def checked_cu_seqlens(function: str, name: str, cu_seqlens: Any) -> jax.Array:
    """In int32; `ValueError` where they are not what they have to be."""
    check, cu_seqlens = Check(function), jnp.asarray(cu_seqlens)
    expected = "of shape (sequences + 1,), of one sequence at least"
    check(cu_seqlens.ndim == 1 and cu_seqlens.size > 1, name, expected, cu_seqlens.shape)
    check.integers(name, cu_seqlens)
    return cu_seqlens.astype(jnp.int32)
