"""The schedule of attention over keys and values that lie in pages: forward, pages where they are.

A row's keys are those of its pages, in the order of the page table. On XLA some pages of each row
at a time meet all its queries, with a softmax that is kept as a running peak, sum and weighted sum;
on a CPU the kernels read through the page table. No array holds the keys of a row one after
another.

Derivatives are JAX's own, of the schedule on XLA, whose turns are computed again.

Axes: B batch, T queries, P pages, M key/value heads, G query heads to one of them, K head width, V
value width. This module holds no algebra of its own: see `rnnattn.attention.equations`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import rnnattn.attention.native as native
import rnnattn.attention.xla as xla
from rnnattn.attention.equations import Softmax, score
from rnnattn.attention.masking import (
    constant_where_unreachable,
    key_range,
    keys_in_reach,
    only_seeing,
    ranges_within,
    rows_in_reach,
    visible,
)
from rnnattn.attention.placed import forward_results
from rnnattn.attention.problem import Functions, Masking, Operands
from rnnattn.attention.quantised import dequantise
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import dispatched
from rnnattn.divided import Division

# Keys of a row that a turn on XLA takes, if they are more than a page has: turns cost.
_KEYS_OF_A_TURN = 256


class Pages(NamedTuple):
    """Which pages are whose; scales where keys and values are quantised."""

    table: Int[Array, "B pages_per_row"]
    key_scale: Float[Array, "P page_size M"] | None = None
    value_scale: Float[Array, "P page_size M"] | None = None


def forward(options, operands, masking, pages):
    """O (B, T, M, G, V) in the dtype of the query, and L (B, M, G, T).

    Args:
        operands: key and value are of all pages, (P, page_size, M, …); so far as the lengths of
            `masking` go, row b has those of `pages.table[b]`.
    """
    run = on_xla if unserved(options, operands.query, operands.value) else _placed
    return run(options, operands, masking, pages)


def unserved(options, query, value):
    """What of a call the kernels cannot serve: `value` is of all pages."""
    size, multiple = value.shape[1], native.PAGE_KEYS
    reasons = {
        f"pages of {size} tokens, no multiple of {multiple}": size % multiple,
        "keys and values of int8": value.dtype == jnp.int8,
    }
    return those_that_hold(reasons) or native.unserved(query, value, options)


def on_xla(options, operands, masking, pages):
    """The same, wherever it runs."""
    T, (P, page_size) = operands.query.shape[1], operands.key.shape[:2]
    together = max(_KEYS_OF_A_TURN // page_size, 1)
    together = min(together, pages.table.shape[1])
    turns = -(-pages.table.shape[1] // together)
    # what is behind the last page of the table is behind every length
    table = jnp.clip(pages.table, 0, P - 1)
    table = jnp.pad(table, ((0, 0), (0, turns * together - pages.table.shape[1])))
    block = together * page_size
    S = turns * block

    sees = rows_in_reach(options, masking, T, S)
    seen = keys_in_reach(options, masking, T, S)
    first, past = key_range(options, masking, 0, T - 1)
    if masking.key_ranges is not None:
        first, past = ranges_within(masking.key_ranges, S)
    first, past = jnp.min(first) // block, -(-jnp.max(past) // block)
    rows = jnp.arange(T, dtype=jnp.int32)
    query = only_seeing(sees, xla.time_last(operands.query))

    def of_pages(x, scale, at, seen):
        """(B, M, keys, …) of some pages of each row, zero what nobody sees."""
        x = x[at] if scale is None else dequantise(x[at], scale[at], query.dtype)
        x = x.reshape(x.shape[0], block, *x.shape[3:])
        return jnp.moveaxis(jnp.where(seen[:, :, None, None], x, 0), 2, 1)

    def turn(softmax, i):
        def visit(softmax):
            columns = i * block + jnp.arange(block, dtype=jnp.int32)
            at = lax.dynamic_slice_in_dim(table, i * together, together, 1)
            seen_here = lax.dynamic_slice_in_dim(seen, i * block, block, 1)
            of_turn = operands._replace(
                query=query,
                key=of_pages(operands.key, pages.key_scale, at, seen_here),
                value=of_pages(operands.value, pages.value_scale, at, seen_here),
            )
            places = (masking, rows, columns)
            shows = visible(options, *places)
            return softmax.update(score(options, of_turn, places, shows, None))

        return lax.cond((first <= i) & (i < past), visit, lambda softmax: softmax, softmax), None

    start = Softmax.empty(operands._replace(query=query), T)
    softmax, _ = lax.scan(
        jax.checkpoint(turn, prevent_cse=False), start, jnp.arange(turns, dtype=jnp.int32)
    )
    B, M, _, _, K = query.shape
    whole: Any = jax.ShapeDtypeStruct((B, M, S, K), query.dtype)  # whose size alone is asked for
    o, lse = softmax.finish()
    o, lse = constant_where_unreachable(options, operands._replace(key=whole), masking, o, lse)
    return xla.time_first(o).astype(query.dtype), lse


def _on_cpu(options, operands, masking, pages):
    table = jnp.clip(pages.table, 0, operands.key.shape[0] - 1)
    return native.forward_over_pages(options, operands, masking, table)


def _results(options, operands, masking, pages):
    return forward_results(options, operands, masking)


# Pages have no row: where rows are divided, each device has all of them.
_OPERANDS: Any = Operands("BTMG", "..M", "..M", "BMG", None, "BMG", "")  # type: ignore[arg-type]
_FUNCTIONS: Any = Functions("B", "MG", "", "", "")  # type: ignore[arg-type]
_MASKING: Any = Masking(
    "B",  # type: ignore[arg-type]
    query_lengths="B",  # type: ignore[arg-type]
    key_lengths="B",  # type: ignore[arg-type]
    key_ranges="B",  # type: ignore[arg-type]
    functions=_FUNCTIONS,
)
_PAGES: Any = Pages("B")  # type: ignore[arg-type]
_placed = dispatched(
    "rnnattn_paged_attention",
    on_xla,
    {"cpu": _on_cpu},
    _results,
    None,
    Division("BMG", (_OPERANDS, _MASKING, _PAGES), ("BTMG", "BMG")),
)
