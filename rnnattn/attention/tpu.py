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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rnnattn.attention.equations import (
    Softmax,
    along_rows,
    cap_gradient,
    logits_gradient,
    rescaled,
)
from rnnattn.attention.kernels import LN_2, logits, within

LANES = 128  # a tile is a multiple of them
MOST_QUERIES, MOST_KEYS = 512, 1024  # of a tile
_VMEM = 48 * 2**20  # less than any TPU has from the fifth generation on

_i32, _f32 = np.int32, jnp.float32
_out: Any = jax.ShapeDtypeStruct


def tiles(T, S):
    """The queries and the keys of a tile: as many as may be, but that tiles are about as long."""

    def even(n, most):
        of_each = -(-n // -(-n // most))
        return -(-of_each // LANES) * LANES

    return even(T, MOST_QUERIES), even(S, MOST_KEYS)


class _Turn(NamedTuple):
    """Where a turn of the grid is."""

    row: Any
    query_head: Any
    head: Any  # of keys and values
    queries: Any  # the tile
    keys: Any  # the tile


class _Plan(NamedTuple):
    """The turns of a grid: for each tile of its own kind, the blocks that it visits of the other.

    Of a tile of keys, for one head of its group after another.
    """

    of_keys: bool  # whether the tiles are of keys
    heads: tuple[int, int]  # N and M
    tiles: int
    blocks: int
    bounded: bool  # whether `Reach` says which are visited

    def bounds(self, row, tile, of_blocks, which):
        """A number of the four that a tile has in `Reach`, which are given as one row."""
        place = ((row * _i32(self.tiles)) + tile) * _i32(4)
        return [of_blocks[place + _i32(n)] for n in which]

    def turn(self, row, head, tile, g, i, *of_blocks):
        N, M = self.heads
        block = i
        if self.bounded:
            begin, end = self.bounds(row, tile, of_blocks[0], (0, 1))
            # what is done with visits stays at the last, so that nothing comes in vain
            block = jnp.minimum(begin + i, jnp.maximum(end - _i32(1), _i32(0)))
        if self.of_keys:
            return _Turn(row, head * _i32(N // M) + g, head, block, tile)
        return _Turn(row, head, lax.div(head, _i32(N // M)), tile, block)

    def grid(self, rows, of_blocks):
        N, M = self.heads
        own, group = (M, N // M) if self.of_keys else (N, 1)
        turns = self.blocks
        if self.bounded:
            begin, end = (of_blocks.reshape(-1, 4)[:, n] for n in (0, 1))
            turns = jnp.maximum(jnp.max(end - begin), 1).astype(jnp.int32)
        return rows, own, self.tiles, group, turns


class _Specs(NamedTuple):
    """The blocks of arrays in a turn, by what they are of."""

    plan: _Plan
    sizes: tuple[int, int]  # queries and keys of a tile

    def _spec(self, shape, of_turn):
        return pl.BlockSpec(shape, lambda *at: of_turn(self.plan.turn(*at)))

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

    def ranges(self, count):
        """(B, count, T)."""
        place = lambda turn: (turn.row, _i32(0), turn.queries)
        return self._spec((None, count, self.sizes[0]), place)

    def segments(self):
        """(B, 1, S)."""
        place = lambda turn: (turn.row, _i32(0), turn.keys)
        return self._spec((None, 1, self.sizes[1]), place)


def _sees(turn, sizes, ranges, segments):
    """Whether queries see keys, (keys, queries)."""
    queries, keys = sizes
    start = turn.keys * _i32(keys)
    rows = ranges[...]
    indices = lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
    ids = None
    if segments is not None:
        # turned by way of whole tiles, as the TPU turns them
        column = jnp.broadcast_to(segments[...], (LANES, keys)).T[:, :1]
        ids = rows[2:3], column
    return within(rows[0:1] - start, rows[1:2] - start, indices, ids)


def _call(kernel, of_keys, arrays, kinds, scale, reach, results, scratch, interpret):
    """What is written by a kernel whose tiles are of queries, or of keys.

    kernel: of the scale and the references of arrays, results and scratch; gives what is done
        at the start of a tile, for each block, and in the end. What is done for a block takes a
        function of who sees whom, None where all see all.
    kinds: by which of `_Specs` the arrays come, with their width.
    results: the same of results, and their types. scratch: shapes in float32.
    """
    (B, N, T, _), (_, M, S, _) = arrays[0].shape, arrays[1].shape
    sizes = tiles(T, S)
    counts = T // sizes[0], S // sizes[1]
    plan = _Plan(of_keys, (N, M), *(counts[::-1] if of_keys else counts), reach is not None)
    specs = _Specs(plan, sizes)
    of_blocks, masks, mask_specs = [], [], []
    if reach is not None:
        of_blocks = [reach.blocks.reshape(-1)]
        rows = [x for x in (reach.first, reach.past, reach.query_segments) if x is not None]
        masks, mask_specs = [jnp.stack(rows, 1)], [specs.ranges(len(rows))]
    if reach is not None and reach.key_segments is not None:
        masks, mask_specs = [*masks, reach.key_segments[:, None]], [*mask_specs, specs.segments()]

    def body(*refs):
        refs = list(refs)
        take = lambda count: [refs.pop(0) for _ in range(count)]
        of_blocks_ref, (scale_ref,) = take(len(of_blocks)), take(1)
        given, seen, written, kept = map(
            take, (len(arrays), len(masks), len(results), len(scratch))
        )
        at = [pl.program_id(axis) for axis in range(5)]
        row, _, tile, g, i = at
        turn = plan.turn(*at, *of_blocks_ref)
        start, step, finish = kernel(
            scale_ref[row * _i32(N) + turn.query_head], given, written, kept
        )
        pl.when((g == 0) & (i == 0))(start)
        if reach is None:
            step(None)
        else:
            begin, end, first, past = plan.bounds(row, tile, of_blocks_ref[0], range(4))
            block = begin + i
            whole = (block >= first) & (block < past)
            ranges, segments = seen[0], seen[1] if len(seen) > 1 else None
            pl.when((block < end) & whole)(lambda: step(None))
            sees = lambda: _sees(turn, sizes, ranges, segments)
            pl.when((block < end) & ~whole)(lambda: step(sees))
        last = (g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1)
        pl.when(last)(finish)

    named = lambda name, width: getattr(specs, name)(width)
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(of_blocks),
            grid=plan.grid(B, *(of_blocks or [None])),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *map(named, *zip(*kinds, strict=True)),
                *mask_specs,
            ],
            out_specs=[named(*how) for how, _ in results],
            scratch_shapes=[pltpu.VMEM(shape, _f32) for shape in scratch],
        ),
        out_shape=[made for _, made in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
    )
    return call(*of_blocks, scale, *arrays, *masks)


def _dot(a, b, axes):
    """Summed over an axis of either. What has 16 bits is multiplied exactly, whatever JAX is told."""
    precision = None if a.dtype == _f32 else lax.Precision.DEFAULT
    dimensions = tuple((axis,) for axis in axes), ((), ())
    return lax.dot_general(a, b, dimensions, precision, preferred_element_type=_f32)


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
    """O (B, T, N, V) in that dtype, and L (B, N, T) in float32, without sinks.

    scale: (B N,) in float32. reach: with the blocks of tiles of queries; None if all see all.
    interpret: how Pallas' interpreter runs this, where it is to.
    """
    (B, T, N, K), V = query.shape, value.shape[3]
    queries, _ = tiles(T, key.shape[1])

    def kernel(scale, arrays, results, scratch):
        (q_ref, k_ref, v_ref), (o_ref, lse_ref), sums = arrays, results, Softmax(*scratch)

        def start():
            for ref, x in zip(sums, (-jnp.inf, 0.0, 0.0), strict=True):
                ref[...] = jnp.full(ref.shape, x, _f32)

        def step(sees):
            _, s = logits(_against(k_ref[...], q_ref[...]), scale, soft_cap)
            s = _only_seen(s, sees, -jnp.inf)
            before = sums.peak[...]
            peak = jnp.maximum(before, jnp.max(s, 0, keepdims=True))
            p, shrink = rescaled(s, before, peak, jnp.exp2)
            weighted = _of_transposed(v_ref[...], p.astype(value.dtype))
            sums.peak[...] = peak
            sums.total[...] = sums.total[...] * shrink + jnp.sum(p, 0, keepdims=True)
            sums.weighted[...] = sums.weighted[...] * along_rows(shrink, weighted.shape) + weighted

        def finish():
            peak, total, weighted = (ref[...] for ref in sums)
            o, lse_ref[...] = Softmax(peak * LN_2, total, weighted).finish()
            o_ref[...] = o.astype(dtype)

        return start, step, finish

    o, lse = _call(
        kernel,
        False,
        [_heads_first(x) for x in (query, key, value)],
        [("queries", K), ("keys", K), ("keys", V)],
        scale,
        reach,
        [(("across", V), _out((B, N, V, T), dtype)), (("across", 1), _out((B, N, 1, T), _f32))],
        [(1, queries), (1, queries), (V, queries)],
        interpret,
    )
    return jnp.moveaxis(o, 3, 1), lse[:, :, 0]


# ---- the gradient -----------------------------------------------------------------------------


def _of_gradient(arrays):
    """The arrays of either kernel as it is given them, and their kinds."""
    *arrays, lse, delta = arrays
    K, V = arrays[0].shape[3], arrays[2].shape[3]
    kinds = [("queries", K), ("keys", K), ("keys", V), ("queries", V), ("across", 1), ("across", 1)]
    return [*map(_heads_first, arrays), lse[:, :, None], delta[:, :, None]], kinds


def _weights_and_gradient(arrays, scale, soft_cap, sees):
    """P, and dS by way of cap and scale, of a block."""
    q, k, v, do, lse, delta = (ref[...] for ref in arrays)
    capped, s = logits(_against(k, q), scale, soft_cap)
    p = _only_seen(jnp.exp2(s - along_rows(lse, s.shape)), sees, 0.0)
    # dS is linear in P
    ds = logits_gradient(
        cap_gradient(scale * p, capped, soft_cap), _against(v, do), along_rows(delta, s.shape)
    )
    return p, ds


def _summed(sums, results, add):
    """What a kernel does that adds to sums block by block and writes them as results."""

    def start():
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, _f32)

    def step(sees):
        for ref, more in zip(sums, add(sees), strict=True):
            ref[...] += more

    def finish():
        for ref, made in zip(sums, results, strict=True):
            made[...] = ref[...].astype(made.dtype)

    return start, step, finish


def query_gradient(arrays, scale, reach, *, soft_cap, interpret: Any = False):
    """dq (B, T, N, K), in the dtype of the query.

    arrays: query, key, value, dO (B, T, N, V); L in units of log 2 and Δ − dL, (B, N, T).
    scale: (B N,) in float32. reach: with the blocks of tiles of queries; None if all see all.
    """
    query, key, *_ = arrays
    (B, T, N, K), dtype = query.shape, query.dtype
    queries, _ = tiles(T, key.shape[1])

    def kernel(scale, arrays, results, scratch):
        def add(sees):
            _, ds = _weights_and_gradient(arrays, scale, soft_cap, sees)
            return [_of_transposed(arrays[1][...], ds.astype(dtype))]

        return _summed(scratch, results, add)

    results = [(("across", K), _out((B, N, K, T), dtype))]
    given = *_of_gradient(arrays), scale, reach
    (dq,) = _call(kernel, False, *given, results, [(K, queries)], interpret)
    return jnp.moveaxis(dq, 3, 1)


def key_gradient(arrays, scale, reach, *, soft_cap, interpret: Any = False):
    """dk (B, S, M, K) and dv (B, S, M, V), in their dtype: as `query_gradient`.

    reach: with the blocks of tiles of keys.
    """
    query, key, value, *_ = arrays
    (_, T, _, _), (B, S, M, K), V, dtype = query.shape, key.shape, value.shape[3], key.dtype
    _, keys = tiles(T, S)

    def kernel(scale, arrays, results, scratch):
        def add(sees):
            p, ds = _weights_and_gradient(arrays, scale, soft_cap, sees)
            q, do = arrays[0][...], arrays[3][...]
            return _product(ds.astype(dtype), q), _product(p.astype(dtype), do)

        return _summed(scratch, results, add)

    results = [(("keys", width), _out((B, M, S, width), dtype)) for width in (K, V)]
    given = *_of_gradient(arrays), scale, reach
    made = _call(kernel, True, *given, results, [(keys, K), (keys, V)], interpret)
    return [_heads_first(d) for d in made]
