"""The blockwise schedule of attention: memory that grows with T + S, not with their product.

Blocks of queries go over blocks of keys. Forward, a block's softmax is kept as a running peak, sum
and weighted sum; backward, the weights are computed again from the log-sum-exp:

    forward   per block: s, P v                     per query block: O, L
    backward  per block: s, P, dP, dS, dv, dk, dq

Blocks that positions, windows, lengths or segments rule out are skipped, and so are those in which
a mask function shows nothing, which is found out beforehand, block by block. The last block of
either kind ends where the sequence ends and so may begin within the one before it; what it shares
with that one is not counted again.

`forward` is the same schedule with a rule for tangents; the transpose of that rule, which JAX
makes, is the gradient again, so that every order and mode keeps the memory linear.

This module holds no algebra of its own: see `rnnattn.attention.equations`, also for the axes.
"""

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rnnattn.attention.dropout import dropout_mask
from rnnattn.attention.equations import (
    Softmax,
    block_gradient,
    block_tangent,
    finish_tangent,
    row_sums,
    score,
    sinks_gradient,
    sum_to,
)
from rnnattn.attention.functions import shown
from rnnattn.attention.masking import key_range, ranges_within, two_ranges, visible
from rnnattn.attention.problem import Operands
from rnnattn.masks import MAP_BLOCK

# Measured: benchmarks/README.md, "How attention's schedule is chosen".
FORWARD_BLOCK = (512, 512)  # on a CPU: queries of all heads of a group, keys
BACKWARD_BLOCK = (512, 256)
RANGES_BLOCK = (128, 128)  # where queries have ranges of keys: these may end in any block
BLOCK_LOGITS = 2**26  # elsewhere, of all rows and heads together: 256 MiB in float32
_LEAST_BLOCK = 128  # queries of a head, and keys
_LONGEST_RANGES_BLOCK = 512  # the same, where queries have ranges of keys
_TANGENT_LOGITS = 2**18  # of a block, all heads together, in the rule for tangents
_LEAST_TANGENT_BLOCK = 64


class _Axis(NamedTuple):
    """An axis cut into blocks of one length, the last of them moved back to fit in."""

    size: int
    block: int

    @property
    def count(self):
        return -(-self.size // self.block)

    def start(self, i):
        return jnp.minimum(i * self.block, self.size - self.block)

    def indices(self, i):
        return self.start(i) + jnp.arange(self.block, dtype=jnp.int32)

    def first_time(self, i):
        """False where an earlier block has been; None if the blocks do not overlap."""
        return None if self.size % self.block == 0 else self.indices(i) >= i * self.block

    def _whole(self, x, axis):
        return self.block == self.size or x.shape[axis] != self.size

    def cut(self, x, i, axis):
        """Block i of x; an axis of size 1 is shared by all blocks."""
        if self._whole(x, axis):
            return x
        return lax.dynamic_slice_in_dim(x, self.start(i), self.block, axis)

    def put(self, x, block, i, axis):
        if self._whole(x, axis):
            return block
        return lax.dynamic_update_slice_in_dim(x, block, self.start(i), axis)

    def add(self, x, block, i, axis):
        return self.put(x, self.cut(x, i, axis) + block, i, axis)

    def join(self, blocks, axis):
        """The axis again, from a stack of its blocks."""
        last = blocks[-1]
        earlier = jnp.moveaxis(blocks[:-1], 0, axis)
        shape = (*last.shape[:axis], (self.count - 1) * self.block, *last.shape[axis + 1 :])
        earlier = lax.slice_in_dim(earlier.reshape(shape), 0, self.size - self.block, axis=axis)
        return jnp.concatenate([earlier, last], axis)


class _Grid(NamedTuple):
    """`head`: the one batch row and key/value head at hand; None if all of them are.

    What has an axis of queries and one of keys is whole until a block of it is cut.
    """

    queries: _Axis
    keys: _Axis
    head: tuple[Array, Array] | None

    def blocks(self):
        return jnp.arange(self.queries.count, dtype=jnp.int32)

    def places(self, i, j):
        return self.queries.indices(i), self.keys.indices(j)

    def band(self, x, i):
        """The queries of block i and the head at hand."""
        if x is None:
            return None
        if self.head is not None:
            x = _cut_one(_cut_one(x, self.head[0], 0), self.head[1], 1)
        return self.queries.cut(x, i, 3)

    def put_band(self, x, band, i):
        places = (*(self.head or (0, 0)), 0, self.queries.start(i), 0)
        sizes = zip(places, band.shape, x.shape, strict=True)
        corner = [jnp.int32(0) if cut == size else place for place, cut, size in sizes]
        return lax.dynamic_update_slice(x, band, corner)

    def cut_queries(self, operands, masking, i):
        cut = lambda x: None if x is None else self.queries.cut(x, i, 1)
        query, bias = self.queries.cut(operands.query, i, 3), self.band(operands.bias, i)
        masking = masking._replace(
            mask=self.band(masking.mask, i),
            query_segments=cut(masking.query_segments),
            key_ranges=cut(masking.key_ranges),
        )
        return operands._replace(query=query, bias=bias), masking

    def cut_keys(self, operands, masking, j):
        cut = lambda x, axis: None if x is None else self.keys.cut(x, j, axis)
        k, v, bias = cut(operands.key, 2), cut(operands.value, 2), cut(operands.bias, 4)
        mask, segments = cut(masking.mask, 4), cut(masking.key_segments, 1)
        operands = operands._replace(key=k, value=v, bias=bias)
        return operands, masking._replace(mask=mask, key_segments=segments)


def _axis(size, longest):
    """In equal blocks of at most `longest`; in one, where the size is symbolic."""
    if not isinstance(size, int):
        return _Axis(size, size)
    count = -(-size // longest)
    return _Axis(size, -(-size // count))


def _grid(operands, longest, head=None):
    """Blocks of at most `longest` queries, those of a group's heads together, and keys."""
    _, _, G, T, _ = operands.query.shape
    queries, keys = longest
    return _Grid(_axis(T, max(queries // G, 1)), _axis(operands.key.shape[2], keys), head)


def _longest_block(in_cache, operands, masking, head):
    """Queries of a group's heads and keys of a block; `in_cache` suits a CPU and one head."""
    if head:
        return in_cache if masking.key_ranges is None else RANGES_BLOCK
    queries, keys = _large_block(operands)
    if masking.key_ranges is None:
        return queries, keys
    G = operands.query.shape[2]
    return min(queries, G * _LONGEST_RANGES_BLOCK), min(keys, _LONGEST_RANGES_BLOCK)


def _large_block(operands):
    """Queries of a group's heads and keys of a block that lies in no cache.

    It has few logits for memory's sake, and else as many as may be: each turn of a loop costs, and
    larger products run at a higher rate. Where T is short, keys take what queries leave.
    """
    B, M, G, T, _ = operands.query.shape
    if not all(isinstance(n, int) for n in (B, M, G, T)):
        return FORWARD_BLOCK
    logits = max(BLOCK_LOGITS // max(B * M * G, 1), 1)  # of a head
    side = 2 ** int(math.log2(logits) / 2)
    queries = max(min(side, T), 1)
    keys = 2 ** int(math.log2(max(logits // queries, 1)))
    return G * max(queries, _LEAST_BLOCK), max(keys, _LEAST_BLOCK)


def _block(grid, operands, masking, i, j):
    """Operands and places of block (i, j), from those of the queries of i."""
    operands, masking = grid.cut_keys(operands, masking, j)
    return operands, (masking, *grid.places(i, j))


def _scores(options, grid, operands, places, j):
    """Of a block of the keys of j, its operands and places."""
    masking, rows, columns = places
    sees = visible(options, *places)
    first_time = grid.keys.first_time(j)
    if first_time is not None:
        first_time = first_time[None, None, None, None]
        sees = first_time if sees is None else sees & first_time
    z = dropout_mask(options, masking, rows[0], columns[0], rows.size, columns.size)
    return score(options, operands, places, sees, z)


# ------------------------------------------------------------------------------- which are skipped


class _Visits(NamedTuple):
    """The blocks [first, past) of keys that a block of queries has to visit, or some of them."""

    first: Array
    past: Array
    some: Array | None  # of all blocks, those to visit, which lie in [first, past)

    def turns(self, visit, start):
        """`visit(j, carry)` of each block."""
        if self.some is None:
            return lax.fori_loop(self.first, self.past, visit, start)
        order = jnp.argsort(~self.some, stable=True).astype(jnp.int32)
        count = jnp.sum(self.some, dtype=jnp.int32)
        return lax.fori_loop(jnp.int32(0), count, lambda n, carry: visit(order[n], carry), start)

    def include(self, j):
        return (self.first <= j) & (j < self.past) if self.some is None else self.some[j]


def _with_block_map(options, grid, masking):
    """The masking with what the mask function shows, block by block, of all rows and heads.

    From its maps, if it has any: these may know of more than there is, and so may the blocks.
    """
    queries, keys = grid.queries.count, grid.keys.count
    if options.mask_function is None or keys == 1:
        return masking
    if masking.functions.maps:
        found = [_from_map(grid, masking, blocks) for blocks in masking.functions.maps]
        blocks = reduce(jnp.logical_and, found)
        return masking._replace(functions=masking.functions._replace(blocks=blocks))

    def of_pair(n):
        places = grid.places(n // keys, n % keys)
        return jnp.any(shown(options.mask_function, masking, *places), (2, 3, 4))

    pairs = jnp.arange(queries * keys, dtype=jnp.int32)
    blocks = jnp.moveaxis(lax.map(of_pair, pairs), 0, 2)
    blocks = blocks.reshape(*blocks.shape[:2], queries, keys)
    return masking._replace(functions=masking.functions._replace(blocks=blocks))


def _from_map(grid, masking, some):
    """The blocks of the grid that hold something by a map, (#B, #M, blocks, blocks)."""
    rows, heads = masking.functions.rows, masking.functions.heads
    some = lax.optimization_barrier(some)  # of a constant, XLA would work all this out for seconds
    some = some if some.shape[0] == 1 else some[rows]
    some = some if some.shape[1] == 1 else jnp.any(some[:, heads], 2)
    first, last = _ends(grid.keys)
    some = _some_of(some, first // MAP_BLOCK, last // MAP_BLOCK + 1)
    first, last = (x[None] + masking.offset[:, None] for x in _ends(grid.queries))
    known = some.shape[2]
    outside = (first < 0) | (last >= known * MAP_BLOCK)
    first, past = first // MAP_BLOCK, last // MAP_BLOCK + 1
    B = max(some.shape[0], first.shape[0])
    within = lambda x: jnp.broadcast_to(jnp.clip(x, 0, known), (B, x.shape[1]))
    some = jnp.broadcast_to(jnp.swapaxes(some, 2, 3), (B, some.shape[1], grid.keys.count, known))
    some = jax.vmap(_some_of)(some, within(first), within(past))
    return jnp.swapaxes(some, 2, 3) | outside[:, None, :, None]


def _ends(axis):
    """The first and the last index of each block."""
    starts = axis.start(jnp.arange(axis.count, dtype=jnp.int32))
    return starts, starts + axis.block - 1


def _some_of(x, first, past):
    """Whether x holds anywhere in the ranges [first, past) of its last axis, (…, ranges)."""
    before = jnp.cumsum(x, -1, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros_like(before[..., :1]), before], -1)
    return before[..., past] > before[..., first]


def _key_blocks(options, grid, masking):
    """A function from a block of queries to the blocks of keys it has to visit."""
    queries, keys = grid.queries, grid.keys
    segments, ranges = _segment_bounds(grid, masking), _range_bounds(grid, masking)
    of_function = None if masking.functions is None else masking.functions.blocks

    def of(i):
        first_row = queries.start(i)
        first, past = key_range(options, masking, first_row, first_row + queries.block - 1)
        if ranges is not None:
            first, past = (bound[i] for bound in ranges)
        firsts = jnp.clip(first, 0, keys.size) // keys.block
        pasts = -(-jnp.clip(past, 0, keys.size) // keys.block)
        first, past = jnp.min(firsts), jnp.max(pasts)
        if segments is not None:
            (query_least, query_most), (key_least, key_most) = segments
            touch = (key_least <= query_most[i][None]) & (key_most >= query_least[i][None])
            touch = jnp.any(touch, 1)
            blocks = jnp.arange(keys.count, dtype=jnp.int32)
            first = jnp.maximum(first, jnp.min(jnp.where(touch, blocks, keys.count)))
            past = jnp.minimum(past, jnp.max(jnp.where(touch, blocks + 1, 0)))
        visits = _Visits(first, jnp.maximum(first, past), None)
        blocks = jnp.arange(keys.count, dtype=jnp.int32)
        if two_ranges(masking.key_ranges):
            held = (firsts[:, None] <= blocks[None]) & (blocks[None] < pasts[:, None])
            visits = visits._replace(some=jnp.any(held, 0) & visits.include(blocks))
        if of_function is not None:
            shows = jnp.any(of_function[:, :, i], (0, 1))
            visits = visits._replace(some=shows & visits.include(blocks))
        return visits

    return of


def _segment_bounds(grid, masking):
    """The least and the largest segment id of each block of queries and of keys, (blocks, B)."""
    if masking.query_segments is None:
        return None

    def bounds(axis, ids):
        blocks = jnp.arange(axis.count, dtype=jnp.int32)
        ids = jax.vmap(lambda i: axis.cut(ids, i, 1))(blocks)
        return jnp.min(ids, 2), jnp.max(ids, 2)

    return bounds(grid.queries, masking.query_segments), bounds(grid.keys, masking.key_segments)


def _range_bounds(grid, masking):
    """The least first and the largest past key of each range of a block's queries.

    (blocks, ranges).
    """
    if masking.key_ranges is None:
        return None
    S = grid.keys.size
    first, past = ranges_within(masking.key_ranges, S)
    first = jnp.where(first < past, first, S)
    blocks = jnp.arange(grid.queries.count, dtype=jnp.int32)
    of_block = lambda x, of: jax.vmap(lambda i: of(grid.queries.cut(x, i, 1), (0, 1)))(blocks)
    return of_block(first, jnp.min), of_block(past, jnp.max)


# ------------------------------------------------------------------------- forward and backward


def _forward_blocks(options, operands, masking, head=None):
    grid = _grid(operands, _longest_block(FORWARD_BLOCK, operands, masking, head), head)
    if head is None:
        masking = _with_block_map(options, grid, masking)
    key_blocks = _key_blocks(options, grid, masking)

    def query_block(results, i):
        of_i, masking_i = grid.cut_queries(operands, masking, i)

        def key_block(j, softmax):
            of_ij, places = _block(grid, of_i, masking_i, i, j)
            return softmax.update(_scores(options, grid, of_ij, places, j))

        start = Softmax.empty(of_i, grid.queries.block)
        block = key_blocks(i).turns(key_block, start).finish()
        put = lambda x, block: grid.queries.put(x, block, i, 3)
        return jax.tree.map(put, results, block), None

    softmax = jax.eval_shape(lambda: Softmax.empty(operands, grid.queries.size))
    zeros = lambda x: jnp.zeros_like(operands.value, x.dtype, shape=x.shape)
    results = (zeros(softmax.weighted), zeros(softmax.peak))
    return lax.scan(query_block, results, grid.blocks())[0]


def _backward_blocks(options, operands, masking, kept, cotangents, shared, head=None):
    """dq, dk, dv, dscale, and `shared` grown by its part, in the accumulator's dtype.

    `shared` is the gradient of the bias and of what the score function closes over, which are of
    all heads; None where nobody asked.
    """
    grid = _grid(operands, _longest_block(BACKWARD_BLOCK, operands, masking, head), head)
    if head is None:
        masking = _with_block_map(options, grid, masking)
    key_blocks = _key_blocks(options, grid, masking)
    per_row = (*kept, *cotangents)

    def query_block(gradient, i):
        of_i, masking_i = grid.cut_queries(operands, masking, i)
        o, lse, do, dlse = (grid.queries.cut(x, i, 3) for x in per_row)
        delta = row_sums(do, o)
        first_time = grid.queries.first_time(i)
        if first_time is not None:
            lse = jnp.where(first_time[None, None, None], lse, -jnp.inf)

        def key_block(j, gradient):
            dq, dk, dv, dscale, dbias, darrays = gradient
            of_ij, places = _block(grid, of_i, masking_i, i, j)
            scores = _scores(options, grid, of_ij, places, j)
            added = block_gradient(options, of_ij, places, scores, lse, delta, do, dlse)
            dk = grid.keys.add(dk, added.key, j, 2)
            dv = grid.keys.add(dv, added.value, j, 2)
            if dscale is not None:
                dscale = dscale + added.scale
            if dbias is not None:
                ds = added.bias
                extent = [1 if n == 1 else m for n, m in zip(dbias.shape, ds.shape, strict=True)]
                dbias = grid.keys.add(dbias, sum_to(ds, extent), j, 4)
            if darrays is not None:
                add = lambda d, x: d + x.astype(d.dtype)
                darrays = jax.tree.map(add, darrays, added.score_arrays)
            return dq + added.query, dk, dv, dscale, dbias, darrays

        dq, dk, dv, dscale, (dbias, darrays) = gradient
        band = grid.band(dbias, i)
        start = (jnp.zeros_like(of_i.query, dq.dtype), dk, dv, dscale, band, darrays)
        block, dk, dv, dscale, band, darrays = key_blocks(i).turns(key_block, start)
        dq = grid.queries.add(dq, block, i, 3)
        dbias = None if dbias is None else grid.put_band(dbias, band, i)
        return (dq, dk, dv, dscale, (dbias, darrays)), None

    q, k, v, scale, *_ = operands
    zeros = lambda x: jnp.zeros_like(x, kept[1].dtype)
    dscale = zeros(scale) if options.scale_gradient else None
    start = (zeros(q), zeros(k), zeros(v), dscale, shared)
    return lax.scan(query_block, start, grid.blocks())[0]


def _head(operands, masking, b, m):
    """Of one batch row and key/value head; what has queries and keys stays whole, see `_Grid`."""
    row = lambda x: _cut_one(x, b, 0)
    of_head = lambda x: None if x is None else _cut_one(row(x), m, 1)
    apart = {
        "mask": masking.mask,
        "dropout_keys": of_head(masking.dropout_keys),
        "functions": _functions_of_head(masking.functions, b, m),
    }
    masking = jax.tree.map(row, masking._replace(**dict.fromkeys(apart)))
    shared = {"bias": operands.bias, "score_arrays": operands.score_arrays}
    operands = jax.tree.map(of_head, operands._replace(**dict.fromkeys(shared)))
    return operands._replace(**shared), masking._replace(**apart)


def _functions_of_head(functions, b, m):
    if functions is None:
        return None
    blocks = functions.blocks
    return functions._replace(
        rows=_cut_one(functions.rows, b, 0),
        heads=_cut_one(functions.heads, m, 0),
        blocks=None if blocks is None else _cut_one(_cut_one(blocks, b, 0), m, 1),
    )


def _with_block_map_of_heads(options, longest, operands, masking):
    """For head after head: found out once, for all that it does not depend on."""
    grid = _grid(operands, _longest_block(longest, operands, masking, True))
    return _with_block_map(options, grid, masking)


def _cut_one(x, n, axis):
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, n, 1, axis)


def _scan_heads(run, operands, carry):
    """Scan `run(carry, (b, m))` over the batch rows and key/value heads."""
    B, M = operands.query.shape[:2]
    n = jnp.arange(B * M, dtype=jnp.int32)
    carry, results = lax.scan(run, carry, (n // M, n % M))
    return carry, jax.tree.map(lambda x: x.reshape(B, M, *x.shape[3:]), results)


def _forward_by_head(options, operands, masking):
    """One head after another, whose blocks stay in a CPU's cache."""
    masking = _with_block_map_of_heads(options, FORWARD_BLOCK, operands, masking)

    def run(_, head):
        of_head, masking_of_head = _head(operands, masking, *head)
        return None, _forward_blocks(options, of_head, masking_of_head, head)

    return _scan_heads(run, operands, None)[1]


def _backward_by_head(options, operands, masking, kept, cotangents, shared):
    masking = _with_block_map_of_heads(options, BACKWARD_BLOCK, operands, masking)

    def run(shared, head):
        of_head, masking_of_head = _head(operands, masking, *head)
        cut = lambda x: _cut_one(_cut_one(x, head[0], 0), head[1], 1)
        kept_of, cotangents_of = jax.tree.map(cut, (kept, cotangents))
        *gradient, shared = _backward_blocks(
            options, of_head, masking_of_head, kept_of, cotangents_of, shared, head
        )
        return shared, gradient

    shared, (dq, dk, dv, dscale) = _scan_heads(run, operands, shared)
    dscale = None if dscale is None else sum_to(dscale, operands.scale.shape)
    return dq, dk, dv, dscale, shared


# ------------------------------------------------------------------------ the rules of all orders


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward(options, operands, masking):
    """O and L, differentiable in every mode and to every order."""
    return lax.platform_dependent(
        operands,
        masking,
        cpu=partial(_forward_by_head, options),
        default=partial(_forward_blocks, options),
    )


@forward.defjvp
def _forward_jvp(options, primals, tangents):
    operands, masking = primals
    o, lse = forward(options, operands, masking)
    return (o, lse), _tangent(options, operands, masking, o, lse, tangents[0])


def _tangent(options, operands, masking, o, lse, doperands):
    """dO and dL, linear in `doperands`: no block's weights are kept, here or for the transpose."""
    # what the transpose adds up block by block is wide, too
    operands, doperands = jax.tree.map(lambda x: x.astype(lse.dtype), (operands, doperands))
    heads = o.shape[0] * o.shape[1]
    rows = int((_TANGENT_LOGITS / heads) ** 0.5) if isinstance(heads, int) else 0
    rows = max(rows, _LEAST_TANGENT_BLOCK)
    grid = _grid(operands, (rows, rows))
    masking = _with_block_map(options, grid, masking)
    key_blocks = _key_blocks(options, grid, masking)

    def query_block(_, i):
        of_i, masking_i = grid.cut_queries(operands, masking, i)
        dof_i, _ = grid.cut_queries(doperands, masking, i)
        o_i, lse_i = (grid.queries.cut(x, i, 3) for x in (o, lse))
        visits = key_blocks(i)

        def visit(tangent, j):
            def scores_of(of_i):
                of_ij, places = _block(grid, of_i, masking_i, i, j)
                return _scores(options, grid, of_ij, places, j)

            scores, dscores = jax.jvp(scores_of, (of_i,), (dof_i,))
            added = block_tangent(scores, lse_i, dscores.s, dscores.value)
            return jax.tree.map(jnp.add, tangent, added)

        @partial(jax.checkpoint, prevent_cse=False)
        def key_block(tangent, j):
            skip = lambda tangent, _: tangent
            return lax.cond(visits.include(j), visit, skip, tangent, j), None

        start = (jnp.zeros_like(lse_i), jnp.zeros_like(o_i))
        blocks = jnp.arange(grid.keys.count, dtype=jnp.int32)
        sums, _ = lax.scan(key_block, start, blocks)
        return None, finish_tangent(o_i, lse_i, *sums, operands.sinks, doperands.sinks)

    # Checkpointed, and no array of all rows is carried: either would be kept for every block
    # where the transpose of this is differentiated in reverse.
    blocks = lax.scan(jax.checkpoint(query_block, prevent_cse=False), None, grid.blocks())[1]
    return jax.tree.map(lambda x: grid.queries.join(x, 3), blocks)


def gradient(options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands, in the accumulator's dtype.

    O and L may be those of further keys as well, as in ring attention.
    """
    bias = operands.bias if options.bias_gradient else None
    arrays = operands.score_arrays if options.score_gradient else None
    dq, dk, dv, dscale, (dbias, darrays) = lax.platform_dependent(
        operands,
        masking,
        (o, lse),
        (do, dlse),
        jax.tree.map(lambda x: jnp.zeros_like(x, lse.dtype), (bias, arrays)),
        cpu=partial(_backward_by_head, options),
        default=partial(_backward_blocks, options),
    )
    dsinks = sinks_gradient(operands.sinks, lse, row_sums(do, o), dlse)
    return Operands(dq, dk, dv, dscale, dbias, dsinks, darrays)


backward = jax.custom_jvp(gradient, nondiff_argnums=(0,))


@backward.defjvp
def _backward_jvp(options, primals, tangents):
    """The derivative of the transpose of `_tangent`, which is the same function of the operands.

    O and L are functions of the operands too, those of these keys: what their tangents would add is
    already in it.
    """
    operands, masking, _, _, do, dlse = primals
    doperands, _, _, _, ddo, ddlse = tangents

    def transpose(operands, do, dlse):
        _, pullback = jax.vjp(lambda operands: forward(options, operands, masking), operands)
        return pullback((do, dlse))[0]

    arguments = (operands, do, dlse)
    d = backward(options, *primals)
    _, tangent = jax.jvp(transpose, arguments, (doperands, ddo, ddlse))
    tangent = tangent._replace(**{name: None for name, x in d._asdict().items() if x is None})
    return d, jax.tree.map(lambda t, x: t.astype(x.dtype), tangent, d)
