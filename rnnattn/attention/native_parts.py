"""Kernels that know one range of keys for a query, and masks as arrays, where there is more to it.

Keys come in parts. Forward, the softmax of one part joins that of those before it; backward, each
part adds its share, as O and L are those of all keys:

    forward   per part: O_j, L_j                    per query: O, L
    backward  per part: dq, dk, dv, dbias from O, L, dO, dL

Of two ranges of keys, each is a part. A mask that is a function is evaluated block by block,
together with whatever else hides, and a kernel gets the Booleans: forward of a block of queries and
all keys, backward of a block of either, which then is a part. Kernels skip what a mask shows to
nobody: blocks are left out beforehand only by positions, and by a map that comes with the mask
(`masks.mapped`).

Operands and O are in the layout of the arguments, L is (B, M, G, T): see `Schedule`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from rnnattn.attention.blocks import Grid, blocks_to_visit, in_blocks, visible_in, with_block_map
from rnnattn.attention.equations import merged
from rnnattn.attention.masking import two_ranges, visible
from rnnattn.attention.placed import as_given
from rnnattn.attention.problem import Masking, Operands
from rnnattn.attention.xla import time_first, time_last
from rnnattn.precision import accumulator

# Measured: benchmarks/README.md, "Masks and scores as functions".
FORWARD_BLOCK = 256  # queries and keys
BACKWARD_BLOCK = 512
PAIRS = 2**18  # of queries and keys, where there are few queries
BOOLEANS = 2**24  # of a block of queries and all keys
LEAST_BLOCK = 64  # queries


def forward(run, options, operands, masking, S):
    """O and L, by `run(options, operands, masking)` of each part of S keys."""
    if options.mask_function is not None:
        return _forward_of_blocks(run, options, operands, masking, S)
    first, *more = _ranges_apart(masking)
    if not more:
        return run(options, operands, first)
    wide, without_sinks = options._replace(keeps_o=True), operands._replace(sinks=None)
    o, lse = run(wide, operands, first)
    for masking in more:
        o_more, lse_more = run(wide, without_sinks, masking)
        o, lse = merged(o, time_first(lse), o_more, time_first(lse_more))
        lse = time_last(lse)
    return o if options.keeps_o else o.astype(operands.value.dtype), lse


def backward(run, options, operands, masking, o, lse, do, dlse):
    """The gradient, by `run(options, operands, masking, o, lse, do, dlse)` of each part."""
    of_rows = o, lse, do, dlse
    if options.mask_function is not None:
        return _backward_of_blocks(run, options, operands, masking, *of_rows)
    first, *more = _ranges_apart(masking)
    if not more:
        return run(options, operands, first, *of_rows)
    wide, do = widened(operands, do)
    parts = [run(options, wide, masking, o, lse, do, dlse) for masking in (first, *more)]
    return as_given(jax.tree.map(lambda *parts: sum(parts), *parts), operands)


def widened(operands, do):
    """Operands and dO, for a gradient that is a sum: what is added up is not rounded to 16 bits."""
    q, k, v, do = (x.astype(accumulator(x.dtype)) for x in (*operands[:3], do))
    return operands._replace(query=q, key=k, value=v), do


def _ranges_apart(masking):
    """The masking with one range of keys at a time, where queries have two."""
    if not two_ranges(masking.key_ranges):
        return [masking]
    return [masking._replace(key_ranges=x) for x in jnp.split(masking.key_ranges, 2, 2)]


# ------------------------------------------------------------------------------------------- blocks


def _grid(T, S, queries, keys):
    """Blocks of at most so many queries and keys, and more keys where there are fewer queries."""
    return Grid(in_blocks(T, queries), in_blocks(S, max(keys, PAIRS // T)), axes=(1, 1))


def _is_one(grid):
    return grid.queries.count == grid.keys.count == 1


def _without_what_hides(options):
    return options._replace(mask_function=None, is_causal=False, window=None)


def _block(options, grid, operands, masking, i, j):
    """Options, operands and masking of block (i, j), of which all that hides is one mask."""
    operands, masking = grid.cut_keys(*grid.cut_queries(operands, masking, i), j)
    rows, columns = grid.places(i, j)
    sees = visible_in(options, grid, (masking, rows, columns), j)
    offset = masking.offset + rows[0] - columns[0]
    masking = Masking(offset, sees, functions=masking.functions)
    return _without_what_hides(options), operands, masking


def _visits(options, grid, masking):
    if masking.functions.maps:
        masking = with_block_map(options, grid, masking)
    return blocks_to_visit(options, grid, masking)


def _forward_of_blocks(run, options, operands, masking, S):
    """Blocks of queries, with all keys: what these see is put together from blocks of keys."""
    (B, T, M, G, _), V = operands.query.shape, operands.value.shape[3]
    places = [jnp.arange(n, dtype=jnp.int32) for n in (T, S)]
    alike = jax.eval_shape(lambda: visible(options, masking, *places)).shape[:3]
    queries = max(BOOLEANS // (S * math.prod(alike)), LEAST_BLOCK)
    grid = _grid(T, S, min(queries, FORWARD_BLOCK), FORWARD_BLOCK)
    if _is_one(grid):
        return run(*_block(options, grid, operands, masking, 0, 0))
    visits = _visits(options, grid, masking)
    zeros = partial(jnp.zeros_like, operands.query)

    def query_block(carry, i):
        (o, lse), sees = carry
        of_i, masking_i = grid.cut_queries(operands, masking, i)
        visits_of_i, rows = visits(i), grid.queries.indices(i)
        first, past = visits_of_i.ends()

        def found(j):
            _, of_keys = grid.cut_keys(of_i, masking_i, j)
            found = visible(options, of_keys, rows, grid.keys.indices(j))
            return jnp.broadcast_to(found, (*alike, rows.size, grid.keys.block))

        def key_block(j, sees):
            none = lambda j: zeros(jnp.bool, shape=(*alike, rows.size, grid.keys.block))
            return grid.keys.put(sees, jax.lax.cond(visits_of_i.include(j), found, none, j), j, 4)

        # what lies beyond the ends is of another block, and in no range
        sees = jax.lax.fori_loop(first, past, key_block, sees)
        ranges = jnp.stack([first, past]) * grid.keys.block
        ranges = jnp.broadcast_to(ranges, (B, rows.size, 2))
        offset, functions = masking.offset + rows[0], masking.functions
        stated = Masking(offset, sees, key_ranges=ranges, functions=functions)
        block = run(_without_what_hides(options), of_i, stated)
        put = lambda x, block, axis: grid.queries.put(x, block, i, axis)
        return (tuple(map(put, (o, lse), block, (1, 3))), sees), None

    dtype = jnp.float32 if options.keeps_o else operands.value.dtype
    results = zeros(dtype, shape=(B, T, M, G, V)), zeros(jnp.float32, shape=(B, M, G, T))
    sees = zeros(jnp.bool, shape=(*alike, grid.queries.block, S))
    (results, _), _ = jax.lax.scan(query_block, (results, sees), grid.blocks())
    return results


def _backward_of_blocks(run, options, operands, masking, o, lse, do, dlse):
    T, S = operands.query.shape[1], operands.key.shape[1]
    grid = _grid(T, S, BACKWARD_BLOCK, BACKWARD_BLOCK)
    if _is_one(grid):
        return run(*_block(options, grid, operands, masking, 0, 0), o, lse, do, dlse)
    visits = _visits(options, grid, masking)
    wide, do = widened(operands, do)

    def query_block(sums, i):
        of_query = lambda x, axis: grid.queries.cut(x, i, axis)
        o_i, lse_i, do_i, dlse_i = map(of_query, (o, lse, do, dlse), (1, 3, 1, 3))
        first_time = grid.queries.first_time(i)
        if first_time is not None:
            lse_i = jnp.where(first_time[None, None, None], lse_i, -jnp.inf)

        def key_block(j, sums):
            block = _block(options, grid, wide, masking, i, j)
            added = run(*block, o_i, lse_i, do_i, dlse_i)
            add = lambda x, added, axis: grid.keys.add(x, added, j, axis)
            return sums._replace(
                query=sums.query + added.query,
                key=add(sums.key, added.key, 1),
                value=add(sums.value, added.value, 1),
                bias=None if sums.bias is None else add(sums.bias, added.bias, 4),
                score_arrays=jax.tree.map(jnp.add, sums.score_arrays, added.score_arrays),
            )

        dq = jnp.zeros_like(of_query(wide.query, 1))
        of_block = sums._replace(query=dq, bias=grid.band(sums.bias, i))
        of_block = visits(i).turns(key_block, of_block)
        dbias = None if sums.bias is None else grid.put_band(sums.bias, of_block.bias, i)
        dq = grid.queries.add(sums.query, of_block.query, i, 1)
        return of_block._replace(query=dq, bias=dbias), None

    zeros = partial(jax.tree.map, lambda x: jnp.zeros_like(x, accumulator(x.dtype)))
    dbias = zeros(operands.bias) if options.bias_gradient else None
    dscore = zeros(operands.score_arrays) if options.score_gradient else None
    dq, dk, dv = zeros(wide[:3])
    start = Operands(dq, dk, dv, None, dbias, None, dscore)
    return as_given(jax.lax.scan(query_block, start, grid.blocks())[0], operands)
