"""Attention within sequences that are packed behind one another, each by itself.

To its schedule the packed batch is one row, in which a query sees a range of keys: those of its own
sequence that its position, causality and a window leave to it. Ranges of few keys cost little,
wherever they lie; so the cost is that of the sequences, one by one.
"""

from functools import partial
from typing import Any, Literal, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rnnattn.attention.api import call
from rnnattn.attention.arguments import checked, sorted_arguments
from rnnattn.attention.masking import key_range
from rnnattn.attention.problem import Masking
from rnnattn.attention.rule import attend, plain
from rnnattn.attention.signature import Window
from rnnattn.checks import Check
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
    Returns:
        The output (T, N, V), and L behind it if it is asked for. A query that may see no key, as
        one of no sequence, gets zeros and L = −∞ (its sink, if there is one).
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        That of `dot_product_attention`, with respect to query, key, value, sinks and an array
        `scale`. Tokens that belong to no sequence, or else reach nothing, may hold NaN and get
        zeros. Forward mode: `rnnattn.attention.packed_attention_jvp`.
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
    for name in ("mask_function", "score_function"):
        check(getattr(stated, name) is None, name, "left out", "a function")
    arrays, stated = checked(function, arrays, stated, request)
    ranges = _key_ranges(stated, arrays.query.shape[0], of_queries, of_keys, query_offset)
    arrays = arrays._replace(key_ranges=ranges)
    stated = stated._replace(is_causal=False, window=None)  # the ranges say so
    return call(function, rule, (arrays, stated, request), schedule)


@partial(jax.jit, static_argnums=(0, 1))
def _key_ranges(options, T, of_queries, of_keys, offset):
    """The keys [first, past) of each query, (T, 2), where all are numbered through.

    Each query is a row by itself here, with an offset and a length of the keys of its own.
    """
    if offset is None:
        offset = jnp.diff(of_keys) - jnp.diff(of_queries)
    sequences = of_keys.size - 1
    offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), sequences)
    ids = cu_seqlens_to_segment_ids(of_queries, T)
    inside = (ids >= 0) & (ids < sequences)
    ids = jnp.clip(ids, 0, sequences - 1)
    start, end = of_keys[ids], of_keys[ids + 1]
    rows = Masking(offset=start - of_queries[ids] + offset[ids], key_lengths=end)
    t = jnp.arange(T, dtype=jnp.int32)
    first, past = key_range(options, rows, t, t)
    first = jnp.maximum(first, start)
    return jnp.stack([first, jnp.where(inside, past, first)], 1)
