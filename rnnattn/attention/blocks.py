"""Queries and keys in blocks, and which pairs of blocks a schedule has to visit.

Blocks that positions, windows, lengths or segments rule out are skipped, and so are those in which
a mask function shows nothing, which is found out beforehand, block by block. The last block of
either kind ends where the sequence ends and so may begin within the one before it; what it shares
with that one is not counted again.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rnnattn.attention.functions import shown
from rnnattn.attention.masking import key_range, ranges_within, two_ranges, visible
from rnnattn.masks import MAP_BLOCK


class Axis(NamedTuple):
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


class Grid(NamedTuple):
    """`head`: the one batch row and key/value head at hand; None if all of them are.

    What has an axis of queries and one of keys is whole until a block of it is cut.
    """

    queries: Axis
    keys: Axis
    head: tuple[Array, Array] | None = None
    axes: tuple[int, int] = (3, 2)  # of queries, and of keys and values, as the schedule has them

    def blocks(self):
        return jnp.arange(self.queries.count, dtype=jnp.int32)

    def places(self, i, j):
        return self.queries.indices(i), self.keys.indices(j)

    def band(self, x, i):
        """The queries of block i and the head at hand."""
        if x is None:
            return None
        if self.head is not None:
            x = cut_one(cut_one(x, self.head[0], 0), self.head[1], 1)
        return self.queries.cut(x, i, 3)

    def put_band(self, x, band, i):
        places = (*(self.head or (0, 0)), 0, self.queries.start(i), 0)
        sizes = zip(places, band.shape, x.shape, strict=True)
        corner = [jnp.int32(0) if cut == size else place for place, cut, size in sizes]
        return lax.dynamic_update_slice(x, band, corner)

    def cut_queries(self, operands, masking, i):
        cut = lambda x: None if x is None else self.queries.cut(x, i, 1)
        query = self.queries.cut(operands.query, i, self.axes[0])
        bias = self.band(operands.bias, i)
        masking = masking._replace(
            mask=self.band(masking.mask, i),
            query_segments=cut(masking.query_segments),
            key_ranges=cut(masking.key_ranges),
        )
        return operands._replace(query=query, bias=bias), masking

    def cut_keys(self, operands, masking, j):
        cut = lambda x, axis: None if x is None else self.keys.cut(x, j, axis)
        k, v = (cut(x, self.axes[1]) for x in (operands.key, operands.value))
        bias = cut(operands.bias, 4)
        mask, segments = cut(masking.mask, 4), cut(masking.key_segments, 1)
        operands = operands._replace(key=k, value=v, bias=bias)
        return operands, masking._replace(mask=mask, key_segments=segments)


def in_blocks(size, longest):
    """In equal blocks of at most `longest`; in one, where the size is symbolic."""
    if not isinstance(size, int):
        return Axis(size, size)
    count = -(-size // longest)
    return Axis(size, -(-size // count))


def cut_one(x, n, axis):
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, n, 1, axis)


def visible_in(options, grid, places, j):
    """`visible` at places in the keys of j, without those that an earlier block has had."""
    sees = visible(options, *places)
    first_time = grid.keys.first_time(j)
    if first_time is None:
        return sees
    first_time = first_time[None, None, None, None]
    return first_time if sees is None else sees & first_time


# ------------------------------------------------------------------------------- which are skipped


class Visits(NamedTuple):
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

    def ends(self):
        """The first block, and the one past the last."""
        if self.some is None:
            return self.first, self.past
        blocks = jnp.arange(self.some.size, dtype=jnp.int32)
        first = jnp.min(jnp.where(self.some, blocks, self.some.size))
        return first, jnp.max(jnp.where(self.some, blocks + 1, 0))

    def include(self, j):
        return (self.first <= j) & (j < self.past) if self.some is None else self.some[j]


def with_block_map(options, grid, masking):
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


def blocks_to_visit(options, grid, masking):
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
        visits = Visits(first, jnp.maximum(first, past), None)
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
