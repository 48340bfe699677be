"""Attention and its gradient as kernels for a TPU, in Pallas.

A turn of the grid has a tile of queries and one of keys in VMEM. One of the two stays for all the
blocks of the other that it visits, one after another; these come while those before are computed.

    forward                  per block: s, P v                        at the end: O, L
    gradient of queries      per block: s, P, dP, dS, dq              L and Δ − dL are given
    gradient of keys         per block: s, P, dv, dP, dS, dk          of all heads of a group

Keys go down, queries go across, in all three: a number of each query (L, Δ, the largest s so far)
then is a row, which takes no more memory than it has numbers, and what is summed over keys is
summed down the rows, without an exchange between lanes. O and dq come out so, too, (V, T) and
(K, T) of a head, and are turned when they are brought into the layout of the arguments.

`Reach` says who sees whom, and its `blocks` which of them a tile visits, and between which all see
all, so that nothing is compared there. A tile that visits fewer than another idles for the rest of
its turns. In 16 bits weights and dS are rounded before their products.

Axes: B batch, T queries and S keys, multiples of `tiles(T, S)`, N query heads, M key/value heads,
K head width, V value width: see `rnnattn.attention.pallas`.
"""

from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rnnattn.attention.equations import (
    Softmax,
    cap_gradient,
    logits_gradient,
    rescaled,
)
from rnnattn.attention.kernels import LN_2, logits, within
from rnnattn.precision import accumulator

LANES = 128  # a tile is a multiple of them
MOST_QUERIES, MOST_KEYS = 512, 1024  # of a tile
_VMEM = 48 * 2**20  # less than any TPU has from the fifth generation on

_i32 = np.int32
_out: Any = jax.ShapeDtypeStruct


def tiles(T, S):
    """The queries and the keys of a tile: as many as may be, but that tiles are about as long."""

    def even(n, most):
        of_each = -(-n // -(-n // most))
        return -(-of_each // LANES) * LANES

    return even(T, MOST_QUERIES), even(S, MOST_KEYS)


class _Turn(NamedTuple):
    """Where a turn of the grid is: the row, the heads, the tiles of queries and of keys."""

    row: Any
    query_head: Any
    head: Any  # of keys and values
    queries: Any
    keys: Any


class _Grid(NamedTuple):
    """Tiles of queries, or of keys, and for each its turns with blocks of the other.

    A tile of keys has those of one head of its group after another.
    """

    of_keys: bool  # whether the tiles are of keys
    counts: tuple[int, int, int]  # B, N, M
    sizes: tuple[int, int]  # queries and keys of a tile
    tiles: int
    turns: Any  # as many as a tile has at most; not known before it runs, where `Reach` says it
    bounded: bool  # whether it does

    @classmethod
    def of(cls, of_keys, query, key, reach):
        """For query and key with heads in front of time."""
        (B, N, T, _), (_, M, S, _) = query.shape, key.shape
        sizes = tiles(T, S)
        own, others = T // sizes[0], S // sizes[1]
        if of_keys:
            own, others = others, own
        turns: Any = others
        if reach is not None:
            begin, end = reach.blocks[..., 0], reach.blocks[..., 1]
            turns = jnp.maximum(jnp.max(end - begin), 1).astype(jnp.int32)
        return cls(of_keys, (B, N, M), sizes, own, turns, reach is not None)

    @property
    def shape(self):
        B, N, M = self.counts
        return B, *((M, self.tiles, N // M) if self.of_keys else (N, self.tiles, 1)), self.turns

    def bounds(self, row, tile, of_blocks):
        """The four numbers that a tile has in `Reach`, which are given one behind the other."""
        place = (row * _i32(self.tiles) + tile) * _i32(4)
        return [of_blocks[place + _i32(n)] for n in range(4)]

    def turn(self, row, head, tile, g, i, *of_blocks):
        _, N, M = self.counts
        G, block = _i32(N // M), i
        if self.bounded:
            begin, end, *_ = self.bounds(row, tile, *of_blocks)
            # a tile that is done stays at its last block, so that nothing comes in vain
            block = jnp.minimum(begin + i, jnp.maximum(end - _i32(1), _i32(0)))
        if self.of_keys:
            return _Turn(row, head * G + g, head, block, tile)
        return _Turn(row, head, lax.div(head, G), tile, block)

    def _spec(self, shape, place):
        return pl.BlockSpec(shape, lambda *at: place(self.turn(*at)))

    # the blocks of arrays in a turn

    def queries(self, width):
        """(B, N, T, width)."""
        place = lambda turn: (turn.row, turn.query_head, turn.queries, _i32(0))
        return self._spec((None, None, self.sizes[0], width), place)

    def across(self, width):
        """(B, N, width, T)."""
        place = lambda turn: (turn.row, turn.query_head, _i32(0), turn.queries)
        return self._spec((None, None, width, self.sizes[0]), place)

    def keys(self, width):
        """(B, M, S, width)."""
        place = lambda turn: (turn.row, turn.head, turn.keys, _i32(0))
        return self._spec((None, None, self.sizes[1], width), place)

    def of_rows(self, count):
        """(B, count, T), for all heads."""
        place = lambda turn: (turn.row, _i32(0), turn.queries)
        return self._spec((None, count, self.sizes[0]), place)

    def segments(self):
        """(B, 1, S), for all heads."""
        place = lambda turn: (turn.row, _i32(0), turn.keys)
        return self._spec((None, 1, self.sizes[1]), place)


def _with_masks(grid, reach):
    """What `Reach` says of queries, and of keys, with its blocks in a turn."""
    if reach is None:
        return []
    rows = [x for x in (reach.first, reach.past, reach.query_segments) if x is not None]
    masks = [(jnp.stack(rows, 1), grid.of_rows(len(rows)))]
    if reach.key_segments is not None:
        masks.append((reach.key_segments[:, None], grid.segments()))
    return masks


def _sees(grid, turn, ranges, segments=None):
    """Whether queries see keys, (keys, queries)."""
    queries, keys = grid.sizes
    first, past, *ids = jnp.split(ranges[...], ranges.shape[0])
    start = turn.keys * _i32(keys)
    if segments is not None:
        # turned in whole tiles, as a TPU turns them
        ids.append(jnp.broadcast_to(segments[...], (LANES, keys)).T[:, :1])
    indices = lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
    return within(first - start, past - start, indices, ids or None)


def _call(kernel, grid, given, scale, reach, results, scratch, interpret):
    """What is written by a kernel.

    kernel: of the scale and the references of what is given, of results and of scratch; gives what
        is done at the start of a tile, for each block, and in the end. What is done for a block
        takes a function of who sees whom, None where all see all.
    given, results: arrays and types with heads in front of time, each with its blocks.
    scratch: shapes, in the dtype of sums, as `scale`.
    """
    masks, N = _with_masks(grid, reach), grid.counts[1]
    of_blocks = [] if reach is None else [reach.blocks.reshape(-1)]
    counts = [len(x) for x in (of_blocks, [scale], given, masks, results, scratch)]

    def body(*refs):
        rest = iter(refs)
        of_blocks, (scale_ref,), *others = ([*islice(rest, count)] for count in counts)
        given, masks, results, scratch = others
        at = [pl.program_id(axis) for axis in range(5)]
        turn = grid.turn(*at, *of_blocks)
        scale = scale_ref[turn.row * _i32(N) + turn.query_head]
        start, step, finish = kernel(scale, given, results, scratch)
        row, _, tile, g, i = at
        pl.when((g == 0) & (i == 0))(start)
        if grid.bounded:
            begin, end, first, past = grid.bounds(row, tile, *of_blocks)
            block = begin + i
            whole = (block >= first) & (block < past)
            pl.when((block < end) & whole)(lambda: step(None))
            pl.when((block < end) & ~whole)(lambda: step(lambda: _sees(grid, turn, *masks)))
        else:
            step(None)
        last = (g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1)
        pl.when(last)(finish)

    arrays, specs = zip(*given, *masks, strict=True)
    types, of_results = zip(*results, strict=True)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(of_blocks),
            grid=grid.shape,
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *specs],
            out_specs=of_results,
            scratch_shapes=[pltpu.VMEM(shape, scale.dtype) for shape in scratch],
        ),
        out_shape=types,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
    )(*of_blocks, scale, *arrays)


def _dot(a, b, axes):
    """Summed over an axis of either. Numbers of 16 bits are multiplied exactly in any case."""
    wide = accumulator(a.dtype)
    precision = None if a.dtype == wide else lax.Precision.DEFAULT
    of_a, of_b = ((axis,) for axis in axes)
    dimensions = (of_a, of_b), ((), ())
    return lax.dot_general(a, b, dimensions, precision, preferred_element_type=wide)


_product = partial(_dot, axes=(1, 0))  # a b
_of_transposed = partial(_dot, axes=(0, 0))  # aᵀ b
_against = partial(_dot, axes=(1, 1))  # a bᵀ


def _only_seen(x, sees, hidden):
    return x if sees is None else jnp.where(sees(), x, hidden)


def _heads_first(x):
    """(B, T, N, …) → (B, N, T, …), and back."""
    return jnp.swapaxes(x, 1, 2)


# ---- forward ----------------------------------------------------------------------------------


def forward(query, key, value, scale, reach, *, soft_cap, dtype, interpret: Any = False):
    """O (B, T, N, V) in that dtype, and L (B, N, T) in that of sums, without sinks.

    scale: (B N,), likewise. reach: with the blocks of tiles of queries; None if all see all.
    interpret: how Pallas' interpreter runs this, where it is to.
    """
    (B, T, N, K), V = query.shape, value.shape[3]
    query, key, value = map(_heads_first, (query, key, value))
    grid = _Grid.of(False, query, key, reach)

    def kernel(scale, arrays, results, scratch):
        (q_ref, k_ref, v_ref), (o_ref, lse_ref), sums = arrays, results, Softmax(*scratch)

        def start():
            for ref, x in zip(sums, (-jnp.inf, 0.0, 0.0), strict=True):
                ref[...] = jnp.full(ref.shape, x, ref.dtype)

        def step(sees):
            _, s = logits(_against(k_ref[...], q_ref[...]), scale, soft_cap)
            s = _only_seen(s, sees, -jnp.inf)
            before = sums.peak[...]
            peak = jnp.maximum(before, jnp.max(s, 0, keepdims=True))
            p, shrink = rescaled(s, before, peak, jnp.exp2)
            weighted = _of_transposed(v_ref[...], p.astype(value.dtype))
            sums.peak[...] = peak
            sums.total[...] = sums.total[...] * shrink + jnp.sum(p, 0, keepdims=True)
            sums.weighted[...] = sums.weighted[...] * shrink + weighted

        def finish():
            peak, total, weighted = (ref[...] for ref in sums)
            o, lse_ref[...] = Softmax(peak * LN_2, total, weighted).finish()
            o_ref[...] = o.astype(dtype)

        return start, step, finish

    given = [(query, grid.queries(K)), (key, grid.keys(K)), (value, grid.keys(V))]
    results = [
        (_out((B, N, V, T), dtype), grid.across(V)),
        (_out((B, N, 1, T), scale.dtype), grid.across(1)),
    ]
    queries, _ = grid.sizes
    scratch = [(1, queries), (1, queries), (V, queries)]
    o, lse = _call(kernel, grid, given, scale, reach, results, scratch, interpret)
    return jnp.moveaxis(o, 3, 1), lse[:, :, 0]


# ---- the gradient -----------------------------------------------------------------------------


def _for_gradient(of_keys, arrays, reach):
    """The grid of a kernel of the gradient, and what both are given."""
    *arrays, lse, delta = arrays
    query, key, value, do = map(_heads_first, arrays)
    K, V, grid = query.shape[3], value.shape[3], _Grid.of(of_keys, query, key, reach)
    of_rows = [(x[:, :, None], grid.across(1)) for x in (lse, delta)]
    return grid, [
        (query, grid.queries(K)),
        (key, grid.keys(K)),
        (value, grid.keys(V)),
        (do, grid.queries(V)),
        *of_rows,
    ]


def _weights_and_gradient(arrays, scale, soft_cap, sees):
    """P, and dS by way of cap and scale, of a block."""
    q, k, v, do, lse, delta = (ref[...] for ref in arrays)
    capped, s = logits(_against(k, q), scale, soft_cap)
    p = _only_seen(jnp.exp2(s - lse), sees, 0.0)
    # dS is linear in P
    ds = logits_gradient(cap_gradient(scale * p, capped, soft_cap), _against(v, do), delta)
    return p, ds


def _summed(sums, results, add):
    """What a kernel does that adds to sums block by block and writes them as results."""

    def start():
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def step(sees):
        for ref, more in zip(sums, add(sees), strict=True):
            ref[...] += more

    def finish():
        for ref, made in zip(sums, results, strict=True):
            made[...] = ref[...].astype(made.dtype)

    return start, step, finish


def query_gradient(arrays, scale, reach, *, soft_cap, interpret: Any = False):
    """[dq], (B, T, N, K) in the dtype of the query.

    arrays: query, key, value, dO (B, T, N, V); L in units of log 2 and Δ − dL, (B, N, T), in the
        dtype of sums. scale: (B N,), likewise.
    reach: with the blocks of tiles of queries; None if all see all.
    """
    query, *_ = arrays
    (B, T, N, K), dtype = query.shape, query.dtype
    grid, given = _for_gradient(False, arrays, reach)

    def kernel(scale, arrays, results, scratch):
        def add(sees):
            _, ds = _weights_and_gradient(arrays, scale, soft_cap, sees)
            return [_of_transposed(arrays[1][...], ds.astype(dtype))]

        return _summed(scratch, results, add)

    results = [(_out((B, N, K, T), dtype), grid.across(K))]
    scratch = [(K, grid.sizes[0])]
    (dq,) = _call(kernel, grid, given, scale, reach, results, scratch, interpret)
    return [jnp.moveaxis(dq, 3, 1)]


def key_gradient(arrays, scale, reach, *, soft_cap, interpret: Any = False):
    """dk (B, S, M, K) and dv (B, S, M, V), in their dtype: as `query_gradient`.

    reach: with the blocks of tiles of keys.
    """
    _, key, value, *_ = arrays
    (B, S, M, K), V, dtype = key.shape, value.shape[3], key.dtype
    grid, given = _for_gradient(True, arrays, reach)

    def kernel(scale, arrays, results, scratch):
        def add(sees):
            p, ds = _weights_and_gradient(arrays, scale, soft_cap, sees)
            q, do = arrays[0][...], arrays[3][...]
            return _product(ds.astype(dtype), q), _product(p.astype(dtype), do)

        return _summed(scratch, results, add)

    results = [(_out((B, M, S, width), dtype), grid.keys(width)) for width in (K, V)]
    scratch = [(grid.sizes[1], width) for width in (K, V)]
    made = _call(kernel, grid, given, scale, reach, results, scratch, interpret)
    return [_heads_first(d) for d in made]
