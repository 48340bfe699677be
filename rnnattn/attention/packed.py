"""Attention within sequences that are packed behind one another, each by itself.

To its schedule the packed batch is one row, in which a query sees a range of keys: those of its own
sequence that its position, causality and a window leave to it. Ranges of few keys cost little,
wherever they lie; so the cost is that of the sequences, one by one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rnnattn.attention.api import call
from rnnattn.attention.arguments import checked, sorted_arguments
from rnnattn.attention.masking import key_range
from rnnattn.attention.problem import Masking
from rnnattn.attention.reduced import check_arrays, extreme, joined, of_both, parts, range_of
from rnnattn.attention.rule import attend, plain
from rnnattn.attention.signature import Window
from rnnattn.checks import Check
from rnnattn.masks import ByDistance
from rnnattn.packing import checked_cu_seqlens, cu_seqlens_to_segment_ids

PackedImplementation = Literal["dense", "blockwise", "xla", "native", "pallas"]


def packed_attention(
    query: Float[Array, "T N K"],
    key: Float[Array, "S M K"],
    value: Float[Array, "S M V"],
    cu_seqlens_query: Int[Array, " starts"],
    cu_seqlens_key: Int[Array, " starts"] | None = None,
    *,
    scale: float | Float[Array, "..."] | None = None,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    implementation: PackedImplementation | None = None,
    return_residual: bool = False,
    query_offset: SupportsIndex | Int[Array, "..."] | None = None,
    logits_soft_cap: SupportsFloat | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout_rate: SupportsFloat = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    mask_function: Callable | None = None,
    score_function: Callable | None = None,
) -> Any:
    """`dot_product_attention` of sequences of several lengths, packed behind one another.

    Equal to calling it for each sequence, in time that grows with what these would take, and in
    memory that grows with T + S. `rnnattn.packing` makes `cu_seqlens` of lengths and segment ids;
    `rnnattn.packed_positions` are the positions for `rope`.

    Args:
        query: (T, N, K), the T tokens of all sequences.
        key, value: (S, M, K) and (S, M, V), with N a multiple of M, as in `dot_product_attention`.
        cu_seqlens_query, cu_seqlens_key: (sequences + 1,), as flash-attention has them: sequence i
            is the queries [cu_seqlens_query[i], cu_seqlens_query[i + 1]), and likewise of the keys;
            they begin with 0 and never fall. Either may be empty. None for the keys: those of the
            queries.
        is_causal: hides keys behind the query's position in its sequence.
        query_offset: a number or (sequences,): query t of its sequence stands at position
            t + offset among its keys. None aligns the last query of each sequence with its last
            key, as flash-attention does from 2.1 on; 0 the first with the first.
        implementation: "dense", "blockwise", "xla", "native" or "pallas", as in
            `dot_product_attention`; None chooses.
        return_residual: also return the log-sum-exp L, (T, N).
        scale, local_window_size, logits_soft_cap, sinks: as in `dot_product_attention`.
        dropout_rate, dropout_key: as well; which weights are dropped depends on where a sequence
            lies.
        mask_function, score_function: as in `dot_product_attention`, of places within a sequence:
            b is its number, t the position of the query among its keys, and s that of the key.
            Masks that come down to ranges of keys are run as these; `masks.alibi` and
            `masks.relative_bias` by the kernels where the keys are those of the queries.
    Returns:
        The output (T, N, V), and L behind it if it is asked for. A query that may see no key, as
        one of no sequence, gets zeros and L = −∞ (its sink, if there is one).
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        That of `dot_product_attention`, with respect to query, key, value, sinks, an array `scale`
        and what a score function closes over. Tokens that belong to no sequence, or else reach
        nothing, may hold NaN and get zeros. Forward mode: `rnnattn.attention.packed_attention_jvp`.
    Example:
        >>> q, k, v = jnp.ones((3, 7, 4, 8))
        >>> starts = jnp.array([0, 2, 7])  # two sequences, of 2 and 5 tokens
        >>> packed_attention(q, k, v, starts, is_causal=True).shape
        (7, 4, 8)
        >>> dv = jax.grad(lambda v: packed_attention(q, k, v, starts)[:2].sum())(v)
        >>> bool((dv[2:] == 0).all())  # what the first sequence does not see
        True
    """
    options = {
        "scale": scale,
        "is_causal": is_causal,
        "local_window_size": local_window_size,
        "implementation": implementation,
        "return_residual": return_residual,
        "logits_soft_cap": logits_soft_cap,
        "sinks": sinks,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "mask_function": mask_function,
        "score_function": score_function,
    }
    starts = cu_seqlens_query, cu_seqlens_key
    return call_packed("packed_attention", attend, query, key, value, starts, query_offset, options)


def packed_attention_jvp(
    query: Float[Array, "T N K"],
    key: Float[Array, "S M K"],
    value: Float[Array, "S M V"],
    cu_seqlens_query: Int[Array, " starts"],
    cu_seqlens_key: Int[Array, " starts"] | None = None,
    *,
    query_offset: SupportsIndex | Int[Array, "..."] | None = None,
    **options: Any,
) -> Any:
    """`packed_attention` with a rule for tangents, as `dot_product_attention_jvp` has one.

    Raises:
        ValueError: as `packed_attention` does.
    Gradient:
        That of `dot_product_attention_jvp`.
    Example:
        >>> q, k, v = jnp.ones((3, 7, 4, 8))
        >>> attend = lambda q: packed_attention_jvp(q, k, v, jnp.array([0, 2, 7]))
        >>> jax.jvp(attend, (q,), (q,))[1].shape
        (7, 4, 8)
    """
    function, starts = "packed_attention_jvp", (cu_seqlens_query, cu_seqlens_key)
    return call_packed(function, plain, query, key, value, starts, query_offset, options)


def call_packed(function, rule, query, key, value, starts, query_offset, options, schedule=None):
    """A call of `function`, by `rule`: see `call` of `rnnattn.attention.api`."""
    check = Check(function)
    check.axes("query", query, "(T, N, K)")
    names = ("cu_seqlens_query", "cu_seqlens_key")
    aligned = query_offset is None or (isinstance(query_offset, int) and query_offset == 0)
    alike = aligned and starts[1] is None
    starts = starts[0], starts[0] if starts[1] is None else starts[1]
    of_queries, of_keys = (
        checked_cu_seqlens(function, name, x) for name, x in zip(names, starts, strict=True)
    )
    check.shape(names[1], of_keys, of_queries.shape, "(sequences + 1,) as of the queries")
    if query_offset is not None:
        count = of_keys.size - 1
        fits = jnp.shape(query_offset) in ((), (count,))
        expected = f"an integer or of shape (sequences,) = ({count},), or None"
        check(fits, "query_offset", expected, jnp.shape(query_offset))
        check.integers("query_offset", query_offset)
    arrays, stated, request = sorted_arguments(function, query, key, value, **options)
    schedules = (None, "dense", "blockwise", "xla", "native", "pallas")
    check.one_of("implementation", request.implementation, schedules)
    check(not request.return_weights, "return_weights", "left out", True)
    arrays, stated = checked(function, arrays, stated, request)
    check_arrays(check, (of_keys.size - 1, 0, None), arrays.query.shape[-2], stated)
    T, S = arrays.query.shape[0], arrays.key.shape[0]
    starts = of_queries, of_keys, query_offset
    stated, ranges, either, documents, rest = parts(stated)
    mask, score = joined(rest + documents), stated.score_function
    bounds = stated._replace(mask_function=None, score_function=None)
    arrays = arrays._replace(key_ranges=_key_ranges(bounds, T, tuple(ranges), either, *starts))
    in_row = lambda function: (
        partial(_in_row, function, _places(T, S, *starts)) if callable(function) else function
    )
    if not (alike and isinstance(score, ByDistance)):  # else distances are the same in the row
        score = in_row(score)
    stated = stated._replace(  # the ranges say so
        is_causal=False, window=None, mask_function=in_row(mask), score_function=score
    )
    return call(function, rule, (arrays, stated, request), schedule)


def _of_queries(T, of_queries, of_keys, offset):
    """Of each query: its sequence, clipped to those there are, if it is of one, and its position.

    The position is that among the keys of its sequence.
    """
    if offset is None:
        offset = jnp.diff(of_keys) - jnp.diff(of_queries)
    sequences = of_keys.size - 1
    offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), sequences)
    ids = cu_seqlens_to_segment_ids(of_queries, T)
    inside = (ids >= 0) & (ids < sequences)
    ids = jnp.clip(ids, 0, sequences - 1)
    return ids, inside, jnp.arange(T, dtype=jnp.int32) - of_queries[ids] + offset[ids]


@partial(jax.jit, static_argnums=(0, 1))
def _key_ranges(options, T, masks, either, of_queries, of_keys, offset):
    """The keys [first, past) of each query, (T, 2) or (T, 4), where all are numbered through.

    Each query is a row by itself here, with an offset and a length of the keys of its own.
    """
    ids, inside, at = _of_queries(T, of_queries, of_keys, offset)
    start, end = of_keys[ids], of_keys[ids + 1]
    t = jnp.arange(T, dtype=jnp.int32)
    rows = Masking(offset=start + at - t, key_lengths=end)
    stated = key_range(options, rows, t, t)

    def shown_by(*masks):
        found = [range_of(mask, ids, at) for mask in masks]
        found = [tuple(x if x is None else x + start for x in bounds) for bounds in found]
        first, past = zip(stated, *found, strict=True)
        first, past = extreme(jnp.maximum, first, start), extreme(jnp.minimum, past)
        return first, jnp.where(inside, past, first)

    return jnp.stack(of_both(shown_by, masks, either), 1)


class _Places(NamedTuple):
    """Where the tokens of a packed row are in their sequences."""

    sequence: Int[Array, " T"]
    query: Int[Array, " T"]  # among the keys of its sequence
    key: Int[Array, " S"]


@partial(jax.jit, static_argnums=(0, 1))
def _places(T, S, of_queries, of_keys, offset):
    ids, _, at = _of_queries(T, of_queries, of_keys, offset)
    of_each = jnp.clip(cu_seqlens_to_segment_ids(of_keys, S), 0, of_keys.size - 2)
    return _Places(ids, at, jnp.arange(S, dtype=jnp.int32) - of_keys[of_each])


def _in_row(function, places, *arguments):
    """A function of places within a sequence, of those in the packed row."""
    *logit, _, n, t, s = arguments
    at = lambda x, place: jnp.take(x, place, mode="clip")
    return function(*logit, at(places.sequence, t), n, at(places.query, t), at(places.key, s))
