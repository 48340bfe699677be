"""A cache of keys and values in pages, and attention to it.

Rows of different lengths take their pages from one heap; rows that began alike share pages, and one
that writes to a page of several gets a copy of it first.

Axes: B rows, T tokens or queries, P pages, N query heads, M key/value heads, K head width, V value
width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Num

import rnnattn.attention.xla as xla
from rnnattn.attention import pages
from rnnattn.attention.arguments import (
    Arrays,
    check_of_heads,
    checked_options,
    has_functions,
    problem,
    traced,
)
from rnnattn.attention.cache import check_tokens
from rnnattn.attention.problem import Options
from rnnattn.attention.quantised import quantise
from rnnattn.attention.reduced import check_arrays, joined, parts, with_ranges
from rnnattn.attention.signature import Window
from rnnattn.checks import Check
from rnnattn.meshes import explicit_mesh, in_parts
from rnnattn.precision import varying_together


class PagedCache(NamedTuple):
    """Keys and values of the tokens so far, in pages that rows take as they grow, and may share.

    Token t of row b is in place t % page_size of page `table[b, t // page_size]`. What the table
    holds behind the pages that a row needs means nothing, nor does a page that no row has. How many
    rows have a page follows from the table and the lengths: see `reference_counts`.
    """

    key: Num[Array, "P page_size M K"]  # int8 where they are quantised
    value: Num[Array, "P page_size M V"]
    table: Int32[Array, "B pages_per_row"]
    lengths: Int32[Array, " B"]
    overflowed: Bool[Array, " B"]  # rows that tokens were lost of, since there was no page for them
    key_scale: Float[Array, "P page_size M"] | None = None
    value_scale: Float[Array, "P page_size M"] | None = None


def _letters(cache) -> Any:
    """Of each field the axes; heads alone can be on several devices of a mesh."""
    scale: Any = None if cache.key_scale is None else "PSM"
    return PagedCache("PSMK", "PSMV", "B", "B", "B", scale, scale)  # type: ignore[arg-type]


def init_paged_cache(
    batch: int,
    *,
    pages: int,
    page_size: int,
    pages_per_row: int,
    num_heads: int,
    key_size: int,
    value_size: int | None = None,
    dtype: Any = jnp.float32,
) -> PagedCache:
    """A cache of `pages` pages for all rows together, none of them taken.

    Args:
        batch: how many rows there are.
        page_size: of tokens; the kernels for a CPU read multiples of 64.
        pages_per_row: the most that a row can take, and so its longest length / page_size.
        num_heads, key_size, value_size: of keys and values; these are as wide as keys by default.
        dtype: of keys and values; int8 keeps them quantised, by `quantise`: see `append`.
    Raises:
        ValueError: a number is less than 1, or the dtype is neither floating nor int8.
    Gradient:
        None.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=8, page_size=4, pages_per_row=6, num_heads=1, key_size=2
        ... )
        >>> cache.key.shape, cache.table.shape, int(free_pages(cache))
        ((8, 4, 1, 2), (2, 6), 8)
    """
    check = Check("init_paged_cache")
    sizes = {"batch": batch, "pages": pages, "page_size": page_size, "num_heads": num_heads}
    sizes |= {"pages_per_row": pages_per_row, "key_size": key_size}
    sizes["value_size"] = key_size if value_size is None else value_size
    whole = {name: check.integer(name, size, 1) for name, size in sizes.items()}
    dtype = jnp.dtype(dtype)
    known = dtype == jnp.int8 or jnp.issubdtype(dtype, jnp.floating)
    check(known, "dtype", "a floating dtype or int8", dtype.name)
    per_head = whole["pages"], whole["page_size"], whole["num_heads"]
    scale = jnp.zeros(per_head, jnp.float32) if dtype == jnp.int8 else None
    return PagedCache(
        jnp.zeros((*per_head, whole["key_size"]), dtype),
        jnp.zeros((*per_head, whole["value_size"]), dtype),
        jnp.zeros((whole["batch"], whole["pages_per_row"]), jnp.int32),
        jnp.zeros(whole["batch"], jnp.int32),
        jnp.zeros(whole["batch"], jnp.bool),
        scale,
        scale,
    )


# ------------------------------------------------------------------------------------- who has what


def _pages_for(lengths, page_size):
    return -(-lengths // page_size)


def _held(cache):
    """Which entries of the table are of pages that a row has, (B, pages_per_row)."""
    places = jnp.arange(cache.table.shape[1], dtype=jnp.int32)
    return places[None] < _pages_for(cache.lengths, cache.key.shape[1])[:, None]


def reference_counts(cache: PagedCache) -> Int32[Array, " P"]:
    """How many rows have each page; a page of none is free.

    Counted from the table and the lengths, so that no order of calls can put it out of step.

    Raises:
        ValueError: a field of the cache has another shape than it should.
    Gradient:
        None.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=3, page_size=4, pages_per_row=2, num_heads=1, key_size=2
        ... )
        >>> cache = append(cache, jnp.ones((2, 1, 1, 2)), jnp.ones((2, 1, 1, 2)))
        >>> reference_counts(fork(cache, jnp.array([1, 1]))).tolist()
        [0, 2, 0]
    """
    return _counts(_checked(Check("reference_counts"), cache))


@jax.jit
def _counts(cache):
    P = cache.key.shape[0]
    at = jnp.where(_held(cache), cache.table, P)
    return jnp.zeros(P, jnp.int32).at[at].add(1, mode="drop")


def free_pages(cache: PagedCache) -> Int32[Array, ""]:
    """How many pages no row has.

    Raises:
        ValueError: a field of the cache has another shape than it should.
    Gradient:
        None.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=3, page_size=4, pages_per_row=2, num_heads=1, key_size=2
        ... )
        >>> cache = append(cache, jnp.ones((2, 1, 1, 2)), jnp.ones((2, 1, 1, 2)))
        >>> int(free_pages(cache)), int(free_pages(drop(cache, jnp.array([True, False]))))
        (1, 2)
    """
    return _free(_checked(Check("free_pages"), cache))


@jax.jit
def _free(cache):
    return jnp.sum(_counts(cache) == 0, dtype=jnp.int32)


# ------------------------------------------------------------------------------------------ growing


def append(
    cache: PagedCache,
    key: Float[Array, "B T M K"],
    value: Float[Array, "B T M V"],
    counts: Int[Array, " B"] | None = None,
) -> PagedCache:
    """The cache with the first `counts[b]` of T tokens behind those that row b holds.

    A row takes free pages as it needs them. One that writes to a page that another row has, too,
    gets a copy of it first; the last of rows that share a page and all write to it keeps it.

    Rows are served in their order. Where the free pages do not suffice for a row, or it would be
    longer than pages_per_row · page_size, nothing of it is stored, its length stays as it was, and
    `overflowed` says so until the row is dropped; rows behind one that found too few pages get no
    page by this call either. What other rows have is never touched.

    Args:
        counts: in [0, T], beyond which they are clipped; None for all of the T.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        With respect to the keys and values of both, JAX's own, but where the cache is int8.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=3, page_size=4, pages_per_row=4, num_heads=1, key_size=2
        ... )
        >>> tokens = jnp.ones((2, 5, 1, 2))
        >>> cache = append(cache, tokens, tokens, jnp.array([5, 2]))
        >>> cache.lengths.tolist(), int(free_pages(cache))
        ([5, 2], 0)
        >>> cache = append(cache, tokens, tokens)  # which one page cannot hold
        >>> cache.lengths.tolist(), cache.overflowed.tolist()
        ([5, 2], [True, True])
    """
    check = Check("append")
    cache, key, value = _checked(check, cache), jnp.asarray(key), jnp.asarray(value)
    quantised = cache.key_scale is not None
    check_tokens(check, cache, key, value, cache.lengths.shape[0], counts, quantised=quantised)
    given = {"cache": cache, "key": key, "value": value, "counts": counts}
    return _append(**given) if explicit_mesh(given) is None else _append_in_parts(given)


@jax.jit
def _append_in_parts(given):
    """On a mesh of explicit axes: heads by themselves, rows and pages whole."""
    letters = _letters(given["cache"])
    axes = {"cache": letters, "key": "BTMK", "value": "BTMV", "counts": "B"}
    whole = {"T": "the tokens", "B": "the rows", "P": "the pages", "S": "the pages' tokens"}
    run = lambda given: _append(**given)
    return in_parts(Check("append"), run, given, axes, letters, divided="M", whole=whole)


class _Plan(NamedTuple):
    """What a call of `append` does to the table; what is to be copied, and where."""

    table: Int32[Array, "B pages_per_row"]
    served: Bool[Array, " B"]
    overflowed: Bool[Array, " B"]
    copied_from: Int32[Array, " B"]
    copied_to: Int32[Array, " B"]  # P where nothing is


def _plan(cache, counts):
    P, page_size = cache.key.shape[:2]
    B, places = cache.table.shape
    rows = jnp.arange(B, dtype=jnp.int32)
    before, after = cache.lengths, cache.lengths + counts
    fits = after <= places * page_size
    writes = (counts > 0) & fits
    references = _counts(cache)

    # the last page of a row that has room in it: whose is it besides?
    begun = writes & (before % page_size != 0)
    last = cache.table[rows, jnp.minimum(before // page_size, places - 1)]
    alike = (last[:, None] == last[None]) & begun[:, None] & begun[None]
    earlier = jnp.sum(alike & (rows[None] < rows[:, None]), 1, dtype=jnp.int32)
    copies = begun & (earlier + 1 < references[last])
    shared = begun & (references[last] > 1)

    kept = _pages_for(before, page_size) - copies.astype(jnp.int32)
    needed = jnp.where(writes, _pages_for(after, page_size) - kept, 0)
    up_to = jnp.cumsum(needed, dtype=jnp.int32)
    free = references == 0
    # who needs no page only because others leave him theirs waits for their copies
    enough = (up_to <= jnp.sum(free, dtype=jnp.int32)) | ((needed == 0) & ~shared)
    served = writes & enough

    heap = jnp.argsort(~free, stable=True).astype(jnp.int32)
    at = jnp.arange(places, dtype=jnp.int32)[None]
    is_new = (at >= kept[:, None]) & (at < _pages_for(after, page_size)[:, None])
    nth = (up_to - needed - kept)[:, None] + at
    table = jnp.where(is_new & served[:, None], heap[jnp.clip(nth, 0, P - 1)], cache.table)
    to = table[rows, jnp.minimum(before // page_size, places - 1)]
    lost = (counts > 0) & ~served
    return _Plan(table, served, lost, last, jnp.where(copies & served, to, P))


@jax.jit
def _append(cache, key, value, counts):
    B, T = key.shape[:2]
    P, page_size = cache.key.shape[:2]
    whole = jnp.full(B, T, jnp.int32) if counts is None else jnp.asarray(counts, jnp.int32)
    counts = jnp.clip(whole, 0, T)
    plan = _plan(cache, counts)

    t = jnp.arange(T, dtype=jnp.int32)[None]
    at = cache.lengths[:, None] + t
    stored = plan.served[:, None] & (t < counts[:, None])
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    place = jnp.minimum(at // page_size, cache.table.shape[1] - 1)
    page = jnp.where(stored, plan.table[rows, place], P)

    def grown(pages, tokens):
        if pages is None:
            return None
        pages = pages.at[plan.copied_to].set(pages[plan.copied_from], mode="drop")
        return pages.at[page, at % page_size].set(tokens.astype(pages.dtype), mode="drop")

    key_scale = value_scale = None
    if cache.key_scale is not None:
        (key, key_scale), (value, value_scale) = quantise(key), quantise(value)
    return PagedCache(
        grown(cache.key, key),
        grown(cache.value, value),
        plan.table,
        cache.lengths + jnp.where(plan.served, counts, 0),
        cache.overflowed | plan.overflowed,
        grown(cache.key_scale, key_scale),
        grown(cache.value_scale, value_scale),
    )


def fork(cache: PagedCache, source_rows: Int[Array, " rows"]) -> PagedCache:
    """Rows that are copies of rows, with the same pages: row b becomes what row source_rows[b] is.

    So a beam search keeps the rows that it goes on with. What is in a page is not copied before a
    row writes to it, and a page that no row has any more is free.

    Args:
        source_rows: (rows,), as many as the result is to have; beyond [0, B) they are clipped.
    Raises:
        ValueError: source_rows is not a vector of integers.
    Gradient:
        With respect to the keys and values: they are what they were.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=3, page_size=4, pages_per_row=2, num_heads=1, key_size=2
        ... )
        >>> token = jnp.ones((2, 1, 1, 2))
        >>> cache = fork(append(cache, token, token), jnp.array([0, 0]))
        >>> int(free_pages(cache)), int(free_pages(append(cache, token, token)))
        (2, 1)
    """
    check = Check("fork")
    cache = _checked(check, cache)
    check.axes("source_rows", source_rows, "(rows)")
    check.integers("source_rows", source_rows)
    table, lengths, overflowed = _rows_of(cache.table, cache.lengths, cache.overflowed, source_rows)
    return cache._replace(table=table, lengths=lengths, overflowed=overflowed)


@jax.jit
def _rows_of(table, lengths, overflowed, rows):
    rows = jnp.clip(jnp.asarray(rows), 0, lengths.shape[0] - 1)
    return table[rows], lengths[rows], overflowed[rows]


def drop(cache: PagedCache, rows: Bool[Array, " B"]) -> PagedCache:
    """The cache with these rows empty, as if they had never been: pages that were theirs are free.

    Args:
        rows: (B,), true for those that are dropped.
    Raises:
        ValueError: rows is not (B,) of Booleans.
    Gradient:
        With respect to the keys and values: they are what they were.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=3, page_size=4, pages_per_row=2, num_heads=1, key_size=2
        ... )
        >>> token = jnp.ones((2, 1, 1, 2))
        >>> drop(append(cache, token, token), jnp.array([True, False])).lengths.tolist()
        [0, 1]
    """
    check = Check("drop")
    cache = _checked(check, cache)
    check.shape("rows", rows, cache.lengths.shape, "(B,)")
    check.booleans("rows", rows)
    lengths, overflowed = _without(cache.lengths, cache.overflowed, rows)
    return cache._replace(lengths=lengths, overflowed=overflowed)


@jax.jit
def _without(lengths, overflowed, rows):
    return jnp.where(rows, 0, lengths), overflowed & ~rows


def truncate(cache: PagedCache, lengths: Int[Array, " B"]) -> PagedCache:
    """The cache with no more than the first `lengths[b]` tokens of row b.

    Speculative decoding takes back the drafts that were not accepted. `overflowed` stays: what was
    lost is lost.

    Args:
        lengths: (B,); longer than a row is, they leave it as it is, and negative ones empty.
    Raises:
        ValueError: lengths is not (B,) of integers.
    Gradient:
        With respect to the keys and values: they are what they were.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=4, page_size=2, pages_per_row=2, num_heads=1, key_size=2
        ... )
        >>> tokens = jnp.ones((2, 3, 1, 2))
        >>> cache = truncate(append(cache, tokens, tokens), jnp.array([1, 9]))
        >>> cache.lengths.tolist(), int(free_pages(cache))
        ([1, 3], 1)
    """
    check = Check("truncate")
    cache = _checked(check, cache)
    check.shape("lengths", lengths, cache.lengths.shape, "(B,)")
    check.integers("lengths", lengths)
    return cache._replace(lengths=_shorter(cache.lengths, lengths))


@jax.jit
def _shorter(lengths, most):
    return jnp.clip(jnp.asarray(most, jnp.int32), 0, lengths)


def _checked(check, cache):
    """The cache as arrays that fit together."""
    cache = jax.tree.map(jnp.asarray, cache)
    whole, of_table = cache.key.shape, cache.table.shape
    check(len(whole) == 4, "cache.key", "of shape (P, page_size, M, K)", whole)
    fits = cache.value.ndim == 4 and cache.value.shape[:3] == whole[:3]
    expected = f"of shape (P, page_size, M, V) to go with key's {whole}"
    check(fits, "cache.value", expected, cache.value.shape)
    check(len(of_table) == 2, "cache.table", "of shape (B, pages_per_row)", of_table)
    check.integers("cache.table", cache.table)
    check.shape("cache.lengths", cache.lengths, of_table[:1], "(B,)")
    check.integers("cache.lengths", cache.lengths)
    table, lengths = (x.astype(jnp.int32) for x in (cache.table, cache.lengths))
    return cache._replace(table=table, lengths=lengths)


# --------------------------------------------------------------------------------------- attention


def paged_attention(
    query: Float[Array, "B T N K"],
    cache: PagedCache,
    *,
    scale: float | Float[Array, "..."] | None = None,
    is_causal: bool = True,
    query_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: Window | None = None,
    implementation: Literal["xla", "native"] | None = None,
    return_residual: bool = False,
    query_offset: SupportsIndex | Int[Array, "..."] | None = None,
    logits_soft_cap: SupportsFloat | None = None,
    sinks: Float[Array, " N"] | None = None,
    mask_function: Callable | None = None,
    score_function: Callable | None = None,
) -> Any:
    """`dot_product_attention` of each row to what a `PagedCache` holds of it, pages where they are.

    No array of (B, S, M, K) is made: a CPU's kernels read through the page table where pages are
    multiples of 64 tokens of a dtype that they know; elsewhere some pages at a time are read.

    Args:
        query: (B, T, N, K), with N a multiple of M; in the dtype of the cache, if that is not int8.
        query_seq_lengths: (B,), the queries that a row has, such as the `counts` of `append`; None
            for all T.
        query_offset: a number or (B,): query t stands at position t + offset. None where the
            queries are those of the tokens that were appended last, after they were.
        implementation: "native", "xla", or None for the first if it can serve.
        return_residual: also return the log-sum-exp L, (B, T, N).
        scale, is_causal, local_window_size, logits_soft_cap, sinks: as in
            `dot_product_attention`.
        mask_function, score_function: as there, of the positions that the queries stand at and of
            the places of tokens in their rows. The mask hides more than `is_causal` does. The
            kernels serve all masks, and of scores a bias by distance.
    Returns:
        The output (B, T, N, V) in the dtype of the query, and L behind it if it is asked for. A
        query that may see no key, as one of an empty row, gets zeros and L = −∞ (its sink, if there
        is one). What lies in free pages, and behind a row's length, may be NaN and reaches nothing.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        With respect to query, keys and values of the cache, sinks, an array `scale` and what the
        score function closes over, in reverse and forward mode and of every order: JAX's own, of
        the schedule on XLA, which keeps the softmax of every few pages. An int8 cache has a
        gradient for its scales.
    Example:
        >>> cache = init_paged_cache(
        ...     2, pages=8, page_size=4, pages_per_row=4, num_heads=1, key_size=2
        ... )
        >>> q, k, v = jnp.ones((3, 2, 5, 1, 2))
        >>> cache = append(cache, k, v, counts=jnp.array([5, 3]))
        >>> paged_attention(q, cache, query_seq_lengths=jnp.array([5, 3])).shape
        (2, 5, 1, 2)
    """
    check = Check("paged_attention")
    cache, query = _checked(check, cache), jnp.asarray(query)
    B, (_, _, M, K) = cache.lengths.shape[0], cache.key.shape
    fits = query.ndim == 4 and (query.shape[0], query.shape[3]) == (B, K)
    expected = f"of shape (B, T, N, K) to go with a cache of {B} rows of K = {K}"
    check(fits, "query", expected, query.shape)
    N = query.shape[2]
    check(N % M == 0, "query", f"of a multiple of the cache's {M} heads", f"{N} heads")
    check.floating("query", query)
    if cache.key_scale is None:
        check.dtype_of("query", query, "cache.key", cache.key)
    if query_seq_lengths is not None:
        check.shape("query_seq_lengths", query_seq_lengths, (B,), "(B,)")
        check.integers("query_seq_lengths", query_seq_lengths)
    if query_offset is not None:
        query_offset = jnp.asarray(query_offset)
        expected = f"an integer or of shape (B,) = ({B},), or None"
        check(query_offset.shape in ((), (B,)), "query_offset", expected, query_offset.shape)
        check.integers("query_offset", query_offset)
    check_of_heads(check, N, scale, sinks)
    check.one_of("implementation", implementation, (None, "xla", "native"))
    sides: Any = local_window_size
    cap: Any = logits_soft_cap
    stated = Options(
        is_causal, sides, cap, mask_function=mask_function, score_function=score_function
    )
    stated = checked_options(check, stated, None)._replace(keeps_o=False)
    given = {
        "query": query,
        "cache": cache,
        "scale": scale,
        "sinks": sinks,
        "lengths": query_seq_lengths,
        "offset": query_offset,
    }
    if has_functions(stated):
        of_functions, stated = _with_functions(check, stated, given)
        given |= of_functions
    if implementation == "native":
        check.served("native", pages.unserved(stated, query, cache.value))
    o, lse = _attend_on_mesh(implementation, stated, given)
    return (o, lse) if return_residual else o


def _rows(given):
    """What is valid of each row, and where its queries stand."""
    query, cache, lengths = given["query"], given["cache"], given.get("lengths")
    T = query.shape[1]
    counts = T if lengths is None else jnp.clip(lengths, 0, T).astype(jnp.int32)
    offset = given.get("offset")
    return {
        "query_seq_lengths": lengths,
        "key_value_seq_lengths": cache.lengths,
        "query_offset": cache.lengths - counts if offset is None else offset,
    }


def _with_functions(check, options, given):
    """What functions close over, and the ranges that a mask comes down to, if it does; options.

    Documents stay functions: the ids of keys would have to be as many as pages hold.
    """
    query, cache = given["query"], given["cache"]
    B, N, (_, page_size, _, _) = query.shape[0], query.shape[2], cache.key.shape
    check_arrays(check, (B, 0, None), N, options)
    options, ranges, either, documents, rest = parts(options)
    options = options._replace(mask_function=joined(rest + documents))
    arrays = Arrays(query, cache.key, cache.value, **_rows(given))
    if ranges or either:
        keys = cache.table.shape[1] * page_size
        arrays, options = with_ranges(arrays, options, tuple(ranges), either, keys)
    arrays, options = traced(check, arrays, options)
    return {
        "key_ranges": arrays.key_ranges,
        "score_arrays": arrays.score_arrays,
        "function_arrays": arrays.function_arrays,
        "heads": jnp.arange(N, dtype=jnp.int32),
    }, options


@partial(jax.jit, static_argnums=(0, 1))
def _attend_on_mesh(implementation, options, given):
    """On a mesh of explicit axes heads by themselves, rows and pages whole."""
    run = partial(_attend, implementation, options)
    if explicit_mesh(given) is None:
        return run(given)
    check, given = Check("paged_attention"), {n: x for n, x in given.items() if x is not None}
    letters = {"query": "BTMK", "cache": _letters(given["cache"])}
    of_each = {"lengths": "B", "offset": "B", "scale": "M", "sinks": "M"}
    letters |= {n: of_each[n] * jnp.ndim(given[n]) for n in of_each if n in given}
    of_functions = {"key_ranges": "BTR", "score_arrays": "", "function_arrays": "", "heads": "M"}
    letters |= {n: axes for n, axes in of_functions.items() if n in given}
    whole = {"T": "the queries", "B": "the rows", "P": "the pages", "S": "the pages' tokens"}
    return in_parts(check, run, given, letters, ("BTMV", "BTM"), divided="M", whole=whole)


def _attend(implementation, options, given):
    given = varying_together({name: x for name, x in given.items() if x is not None})
    query, cache = given["query"], given["cache"]
    B, T, N, _ = query.shape
    rows = _rows(given)
    if "key_ranges" in given:  # which are those of lengths, too
        rows = {"query_offset": rows["query_offset"]}
    others = {name: x for name, x in given.items() if name in Arrays._fields and name != "query"}
    numbers = jnp.arange(B, dtype=jnp.int32)
    arrays = Arrays(query, cache.key, cache.value, **rows, **others, rows=numbers)
    operands, masking = problem(options, arrays)
    run = pages.on_xla if implementation == "xla" else pages.forward
    which = pages.Pages(cache.table, cache.key_scale, cache.value_scale)
    o, lse = run(options, operands, masking, which)
    return o.reshape(B, T, N, o.shape[-1]), xla.time_first(lse).reshape(B, T, N)
