"""Attention and its gradient as kernels for a Hopper GPU, in Pallas Mosaic GPU.

A block of a kernel has a tile of queries, or of keys and values for their gradient, and goes over
blocks of the others. Two warpgroups compute, each with `ROWS` of the tile as the rows of all that
it has in registers; a third fetches the blocks, which both read. Forward, one warpgroup has the
tensor core while the other computes the softmax of its block.

    forward                  per block: s, P v                        at the end: O, L
    gradient of queries      per block: s, P, dP, dS, dq              L and Δ − dL are given
    gradient of keys         per block: sᵀ, Pᵀ, dPᵀ, dv, dSᵀ, dk      of all heads of a group

Who sees whom is said by `Reach`: the keys from one to another for each query, and the segments of
both. `blocks` says for each tile which blocks are visited, and between which of these all see all,
so that nothing is compared there.

A bias comes block by block as keys do. Its gradient is dS before scale and cap, of the blocks that
are visited; the others are not written.

Weights and dS are rounded to 16 bits before their products.

Axes: B batch, T queries and S keys, multiples of `TILE`, N query heads, M key/value heads, K head
width, V value width: see `rnnattn.attention.pallas`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rnnattn.attention.equations import (
    Softmax,
    along_rows,
    cap_gradient,
    logits_gradient,
    rescaled,
)
from rnnattn.attention.kernels import LN_2, logits, within
from rnnattn.mosaic import load, store

ROWS = 64  # of a warpgroup
TILE = 2 * ROWS
FORWARD_KEYS = 128  # of a step
BACKWARD_QUERIES = 64  # of a step of the gradient of keys
_STAGES = 2  # blocks that are there or on their way

_i32, _f32 = jnp.int32, jnp.float32
_LAYOUT = plgpu.Layout.WGMMA  # of an array (ROWS, …) in the registers of a warpgroup
_OF_ROWS, _OF_COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_HOW = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def backward_keys(K, V):
    """The keys of a step of the gradient of queries: as many as registers hold."""
    return 128 if max(K, V) <= 64 else 64


class _Sight(NamedTuple):
    """Of the blocks that a tile visits, in registers."""

    begin: Any
    count: Any
    whole: Any  # from and to; None where all blocks are seen whole

    @classmethod
    def of(cls, reach, tile, everything):
        if reach is None:
            return cls(_i32(0), _i32(everything), None)
        begin, end, *whole = (reach.blocks[tile, i] for i in range(4))
        return cls(begin, jnp.maximum(end - begin, 0), whole)

    def only_seen(self, x, block, sees, hidden):
        """x, and what is hidden where not `sees()`."""
        if self.whole is None:
            return x
        start, stop = self.whole
        whole = (block >= start) & (block < stop)
        return lax.cond(whole, lambda x: x, lambda x: jnp.where(sees(), x, hidden), x)


def _along_columns(x, shape):
    return lax.broadcast_in_dim(x, shape, (1,))


_load = partial(load, optimized=False)


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, _f32), layout)


def _part(n, size):
    return pl.ds(pl.multiple_of(n * size, size), size)


def _indices(shape, axis, start):
    return plgpu.broadcasted_iota(_i32, shape, axis, layout=_LAYOUT) + start


def _product(a, b, meanwhile=lambda: None):
    """a bᵀ, both in shared memory."""
    shape = (a.shape[0], b.shape[0])

    def multiply(sums):
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        meanwhile()
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, _f32))


def _added_product(sums, a, b, through, wg):
    """sums + a b, with a in registers; through shared memory in the interpreter."""
    if not through:
        return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(sums))
    place = through[0].at[wg]
    place[...] = a
    plgpu.commit_smem()

    def multiply(made):
        plgpu.wgmma(made, place, b)
        return made[...]

    return sums + pl.run_scoped(multiply, plgpu.ACC(sums.shape, _f32))


def _fetch(steps, copies):
    """The third warpgroup's part: copies of each step, as soon as their place is free.

    copies: a source by the step, the places, their barriers, and those of places that are free;
    none for what has the same places free as the copy before it.
    """
    plgpu.set_max_registers(24, action="decrease")

    def step(i: Any, _: Any) -> None:
        slot = lax.rem(i, _i32(_STAGES))
        for source, places, arrived, free in copies:

            def wait(free=free):
                plgpu.barrier_wait(free.at[slot])

            def copy(source=source, places=places, arrived=arrived):
                plgpu.copy_gmem_to_smem(source(i), places.at[slot], arrived.at[slot])

            if free is not None:
                pl.when(i >= _STAGES)(wait)
            pl.when(i < steps)(copy)

    # the last of them wait until all was read
    lax.fori_loop(_i32(0), steps + _STAGES, step, None)


def _fetch_keys(sight, b, m, size, *of_each, others=()):
    """The same for the blocks of keys that a tile visits, of row b and head m; then others."""

    def source(ref):
        return lambda i: ref.at[b, _part(sight.begin + i, size), m]

    _fetch(sight.count, [*((source(ref), *places) for ref, *places in of_each), *others])


class _Bias(NamedTuple):
    """A bias (#B, #N, rows, columns), of which a step has the rows of a tile, by warpgroups.

    Its places are free when those of the copies before it are.
    """

    ref: Any
    places: Any  # (2, stages, ROWS, columns of a step)
    arrived: Any

    @classmethod
    def scratch(cls, bias, columns):
        if bias is None:
            return []
        return [_shared(bias.dtype, 2, _STAGES, ROWS, columns), _stages(2)]

    def copies(self, b, tile, place):
        """What fetches it: `place(i)` is the head and the block of columns of a step."""
        (batch, heads, *_), columns = self.ref.shape, self.places.shape[3]
        at = lambda n, count: n if count > 1 else 0

        def of(wg):
            def source(i):
                n, block = place(i)
                of_head = self.ref.at[at(b, batch), at(n, heads)]
                return of_head.at[_part(2 * tile + wg, ROWS), _part(block, columns)]

            return source, self.places.at[wg], self.arrived, None

        return of(0), of(1)

    def take(self, wg, slot):
        plgpu.barrier_wait(self.arrived.at[slot])
        return load(self.places.at[wg, slot], _LAYOUT)


def _call(kernel, arrays, reach, results, scratch, grid, interpret):
    """`kernel(arrays, reach, results, scratch)`, each but the second a list of references."""
    leaves, tree = jax.tree.flatten(reach)
    ends = [len(arrays), len(arrays) + len(leaves), len(arrays) + len(leaves) + len(results)]

    def run(*refs):
        given, masks, made, rest = (
            refs[i:j] for i, j in zip([0, *ends], [*ends, None], strict=True)
        )
        kernel(given, None if reach is None else jax.tree.unflatten(tree, masks), made, rest)

    how = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        run,
        out_type=results,
        scratch_types=scratch,
        grid=(*grid.values(),),
        grid_names=(*grid,),
        num_threads=3,
        thread_name="warpgroup",
        # powers and tanh in one instruction
        compiler_params=plgpu.CompilerParams(approx_math=interpret is None),
        **how,
    )(*arrays, *leaves)


def _shared(dtype, *shape):
    return plgpu.SMEM(shape, dtype, transforms=_HOW)


def _stages(arrivals=1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=_STAGES)


def _through(dtype, columns, interpret):
    """Where the interpreter's tensor core, which reads no registers, has a factor from."""
    return [] if interpret is None else [_shared(dtype, 2, ROWS, columns)]


_out: Any = jax.ShapeDtypeStruct


def _given(bias):
    return [] if bias is None else [bias]


def _bias_of(ref, scratch):
    """Of what follows in the scratch: the bias, if there is one, and the rest."""
    return (_Bias(*ref, *scratch[:2]), scratch[2:]) if ref else (None, scratch)


# ---- forward ----------------------------------------------------------------------------------


def forward(query, key, value, scale, reach, *, soft_cap, dtype, bias=None, interpret=None):
    """O (B, T, N, V) in that dtype, and L (B, N, T) in float32, without sinks.

    scale: (B N,) in float32. reach: of tiles of queries and `FORWARD_KEYS`; None if all see all.
    bias: (#B, #N, T, S), in the dtype of the query. interpret: parameters of the interpreter.
    """
    (B, T, N, K), (_, S, M, V) = query.shape, value.shape
    keys_of_step = FORWARD_KEYS

    def kernel(arrays, reach, results, scratch):
        (q_ref, k_ref, v_ref, scale_ref, *bias_ref), (o_ref, lse_ref) = arrays, results
        q_s, k_s, v_s, q_here, k_here, v_here, k_free, v_free, turn, *more = scratch
        of_bias, through = _bias_of(bias_ref, more)
        b, n, wg = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        # later tiles see more keys where sight is causal, and so begin earlier
        tile = T // TILE - 1 - lax.axis_index("tile")
        m = lax.div(n, _i32(N // M))
        reach = jax.tree.map(lambda ref: ref.at[b], reach)
        sight = _Sight.of(reach, tile, S // keys_of_step)

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(wg == 2)
        def _():
            of_keys, of_values = (k_ref, k_s, k_here, k_free), (v_ref, v_s, v_here, v_free)
            others = of_bias.copies(b, tile, lambda i: (n, sight.begin + i)) if of_bias else ()
            _fetch_keys(sight, b, m, keys_of_step, of_keys, of_values, others=others)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            rows, q = _part(2 * tile + wg, ROWS), q_s.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q, q_here.at[wg])
            of_rows = _rows_in_reach(reach, rows)
            scale = scale_ref[b * N + n]
            plgpu.barrier_wait(q_here.at[wg])
            pl.when(wg == 1)(take_turns)

            def step(i, carry):
                peak, total, weighted = carry
                slot, block = lax.rem(i, _i32(_STAGES)), sight.begin + i
                plgpu.barrier_wait(k_here.at[slot])
                product = _product(q, k_s.at[slot], take_turns)
                plgpu.barrier_arrive(k_free.at[slot])
                bias = of_bias.take(wg, slot) if of_bias else None
                _, s = logits(product, scale, soft_cap, bias)
                sees = lambda: _sees_keys(reach, of_rows, block, keys_of_step)
                s = sight.only_seen(s, block, sees, -jnp.inf)
                before, peak = peak, jnp.maximum(peak, jnp.max(s, axis=1))
                p, shrink = rescaled(s, before, peak, jnp.exp2)
                total = total * shrink + jnp.sum(p, axis=1)
                weighted = weighted * along_rows(shrink, weighted.shape)
                carry = (peak, total, weighted, p.astype(query.dtype))
                peak, total, weighted, p = lax.optimization_barrier(carry)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_here.at[slot])
                plgpu.barrier_wait(turn)
                weighted = _added_product(weighted, p, v_s.at[slot], through, wg)
                plgpu.barrier_arrive(v_free.at[slot])
                return peak, total, weighted

            nothing = [_full((ROWS,), x, _OF_ROWS) for x in (-jnp.inf, 0)]
            start = (*nothing, _full((ROWS, V), 0, _LAYOUT))
            peak, total, weighted = lax.fori_loop(_i32(0), sight.count, step, start)
            pl.when(wg == 0)(take_turns)
            o, lse = Softmax(peak * LN_2, total, weighted).finish()
            store(o_ref.at[b, rows, n], o.astype(dtype))
            store(lse_ref.at[b, n, rows], lse)

    of_16_bits = query.dtype
    scratch = [
        _shared(of_16_bits, 2, ROWS, K),
        _shared(of_16_bits, _STAGES, keys_of_step, K),
        _shared(of_16_bits, _STAGES, keys_of_step, V),
        plgpu.Barrier(num_barriers=2),
        *(_stages(), _stages(), _stages(2), _stages(2)),
        plgpu.Barrier(num_arrivals=2),
        *_Bias.scratch(bias, keys_of_step),
        *_through(of_16_bits, keys_of_step, interpret),
    ]
    results = [_out((B, T, N, V), dtype), _out((B, N, T), _f32)]
    grid = {"head": N, "tile": T // TILE, "batch": B}
    arrays = (query, key, value, scale, *_given(bias))
    return _call(kernel, arrays, reach, results, scratch, grid, interpret)


def _rows_in_reach(reach, rows):
    """Of the queries of a warpgroup: the first key, the one past the last, the segment."""
    if reach is None:
        return None
    refs = (reach.first, reach.past, reach.query_segments)
    return [None if ref is None else _load(ref.at[rows], _OF_ROWS) for ref in refs]


def _sees_keys(reach, of_rows, block, size):
    """Whether the queries of a warpgroup see the keys of a block."""
    shape = (ROWS, size)
    first, past, ids = (None if x is None else along_rows(x, shape) for x in of_rows)
    segments = None
    if ids is not None:
        others = _load(reach.key_segments.at[_part(block, size)], _OF_COLUMNS)
        segments = ids, _along_columns(others, shape)
    return within(first, past, _indices(shape, 1, block * size), segments)


# ---- the gradient -----------------------------------------------------------------------------


def query_gradient(
    arrays, scale, reach, *, soft_cap, bias=None, bias_gradient=False, interpret=None
):
    """[dq], (B, T, N, K), and dS (B, N, T, S) before scale and cap, if wanted; in 16 bits.

    arrays: query, key, value, dO (B, T, N, V); L in units of log 2 and Δ − dL, (B, N, T).
    reach: of tiles of queries and `backward_keys`; None if all see all.
    """
    query, _, value, *_ = arrays
    (B, T, N, K), (_, S, M, V), dtype = query.shape, value.shape, query.dtype
    keys_of_step = backward_keys(K, V)

    def kernel(arrays, reach, results, scratch):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, scale_ref, *bias_ref = arrays
        dq_ref, *ds_ref = results
        q_s, do_s, k_s, v_s, q_here, k_here, v_here, k_free, v_free, *more = scratch
        of_bias, more = _bias_of(bias_ref, more)
        ds_s, through = more[: len(ds_ref)], more[len(ds_ref) :]
        b, n, wg = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = T // TILE - 1 - lax.axis_index("tile")
        m = lax.div(n, _i32(N // M))
        reach = jax.tree.map(lambda ref: ref.at[b], reach)
        sight = _Sight.of(reach, tile, S // keys_of_step)

        @pl.when(wg == 2)
        def _():
            of_keys, of_values = (k_ref, k_s, k_here, k_free), (v_ref, v_s, v_here, v_free)
            others = of_bias.copies(b, tile, lambda i: (n, sight.begin + i)) if of_bias else ()
            _fetch_keys(sight, b, m, keys_of_step, of_keys, of_values, others=others)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            rows, q, do = _part(2 * tile + wg, ROWS), q_s.at[wg], do_s.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q, q_here.at[wg])
            plgpu.copy_gmem_to_smem(do_ref.at[b, rows, n], do, q_here.at[wg])
            of_rows = _rows_in_reach(reach, rows)
            shape = (ROWS, keys_of_step)
            lse, delta = (_load(ref.at[b, n, rows], _OF_ROWS) for ref in (lse_ref, delta_ref))
            scale = scale_ref[b * N + n]
            plgpu.barrier_wait(q_here.at[wg])

            def step(i, dq):
                slot, block = lax.rem(i, _i32(_STAGES)), sight.begin + i
                plgpu.barrier_wait(k_here.at[slot])
                bias = of_bias.take(wg, slot) if of_bias else None
                product = _product(q, k_s.at[slot])
                capped, s = logits(product, scale, soft_cap, bias)
                p = jnp.exp2(s - along_rows(lse, shape))
                sees = lambda: _sees_keys(reach, of_rows, block, keys_of_step)
                p = sight.only_seen(p, block, sees, 0.0)
                before_cap = lambda ds: cap_gradient(scale * ds, capped, soft_cap)
                if not ds_ref:
                    # dS is linear in P: s is let go of before dP is there
                    p = before_cap(p)
                plgpu.barrier_wait(v_here.at[slot])
                dp = _product(do, v_s.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                ds = logits_gradient(p, dp, along_rows(delta, shape))
                if ds_ref:
                    place = ds_s[0].at[wg]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    place[...] = ds.astype(dtype)
                    ds = before_cap(ds)
                    plgpu.commit_smem()
                    to = ds_ref[0].at[b, n, rows, _part(block, keys_of_step)]
                    plgpu.copy_smem_to_gmem(place, to)
                dq = _added_product(dq, ds.astype(dtype), k_s.at[slot], through, wg)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            dq = lax.fori_loop(_i32(0), sight.count, step, _full((ROWS, K), 0, _LAYOUT))
            store(dq_ref.at[b, rows, n], dq.astype(dtype))
            if ds_ref:
                plgpu.wait_smem_to_gmem(0)

    scratch = [
        _shared(dtype, 2, ROWS, K),
        _shared(dtype, 2, ROWS, V),
        _shared(dtype, _STAGES, keys_of_step, K),
        _shared(dtype, _STAGES, keys_of_step, V),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        *(_stages(), _stages(), _stages(2), _stages(2)),
        *_Bias.scratch(bias, keys_of_step),
        *([_shared(dtype, 2, ROWS, keys_of_step)] if bias_gradient else []),
        *_through(dtype, keys_of_step, interpret),
    ]
    results = [_out((B, T, N, K), dtype)]
    if bias_gradient:
        results.append(_out((B, N, T, S), dtype))
    grid = {"head": N, "tile": T // TILE, "batch": B}
    arrays = (*arrays, scale, *_given(bias))
    return _call(kernel, arrays, reach, results, scratch, grid, interpret)


def key_gradient(arrays, scale, reach, *, soft_cap, bias=None, interpret=None):
    """dk (B, S, M, K) and dv (B, S, M, V), in 16 bits: as `query_gradient`.

    reach: of tiles of keys and `BACKWARD_QUERIES`; None if all see all.
    """
    if bias is not None:
        bias = jnp.swapaxes(bias, 2, 3)
    query, _, value, *_ = arrays
    (B, T, N, K), (_, S, M, V), dtype = query.shape, value.shape, query.dtype
    G, queries_of_step = N // M, BACKWARD_QUERIES
    shape = (ROWS, queries_of_step)

    def kernel(arrays, reach, results, scratch):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, scale_ref, *bias_ref = arrays
        dk_ref, dv_ref = results
        k_s, v_s, q_s, do_s, lse_s, delta_s, k_here, q_here, do_here, q_free, do_free, *more = (
            scratch
        )
        of_bias, through = _bias_of(bias_ref, more)
        b, m, wg = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = lax.axis_index("tile")
        reach = jax.tree.map(lambda ref: ref.at[b], reach)
        sight = _Sight.of(reach, tile, T // queries_of_step)
        steps = G * sight.count

        def place(i):
            """The query head of a step, and its block of queries."""
            g = lax.div(i, jnp.maximum(sight.count, 1)) if G > 1 else _i32(0)
            return m * G + g, sight.begin + i - g * sight.count

        @pl.when(wg == 2)
        def _():
            def queries_of(ref):
                def source(i):
                    n, block = place(i)
                    return ref.at[b, _part(block, queries_of_step), n]

                return source

            def numbers_of(ref):
                def source(i):
                    n, block = place(i)
                    return ref.at[b, n, _part(block, queries_of_step)]

                return source

            copies = [
                (queries_of(q_ref), q_s, q_here, q_free),
                (numbers_of(lse_ref), lse_s, q_here, None),
                (queries_of(do_ref), do_s, do_here, do_free),
                (numbers_of(delta_ref), delta_s, do_here, None),
            ]
            others = of_bias.copies(b, tile, place) if of_bias else ()
            _fetch(steps, [*copies, *others])

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            rows, k, v = _part(2 * tile + wg, ROWS), k_s.at[wg], v_s.at[wg]
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, m], k, k_here.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, m], v, k_here.at[wg])
            ids = None
            if reach is not None and reach.key_segments is not None:
                ids = _load(reach.key_segments.at[rows], _OF_ROWS)
            plgpu.barrier_wait(k_here.at[wg])

            def sees(block):
                refs = (reach.first, reach.past, reach.query_segments)
                first, past, segments = (
                    None
                    if ref is None
                    else _along_columns(
                        _load(ref.at[_part(block, queries_of_step)], _OF_COLUMNS), shape
                    )
                    for ref in refs
                )
                segments = None if ids is None else (along_rows(ids, shape), segments)
                return within(first, past, _indices(shape, 0, (2 * tile + wg) * ROWS), segments)

            def step(i, carry):
                dk, dv = carry
                (n, block), slot = place(i), lax.rem(i, _i32(_STAGES))
                scale = scale_ref[b * N + n]
                plgpu.barrier_wait(q_here.at[slot])
                product = _product(k, q_s.at[slot])
                bias = of_bias.take(wg, slot) if of_bias else None
                capped, s = logits(product, scale, soft_cap, bias)
                p = jnp.exp2(s - _along_columns(_load(lse_s.at[slot], _OF_COLUMNS), shape))
                p = sight.only_seen(p, block, lambda: sees(block), 0.0)
                rounded, p = p.astype(dtype), cap_gradient(scale * p, capped, soft_cap)
                plgpu.barrier_wait(do_here.at[slot])
                dp = _product(v, do_s.at[slot])
                dv = _added_product(dv, rounded, do_s.at[slot], through, wg)
                delta = _along_columns(_load(delta_s.at[slot], _OF_COLUMNS), shape)
                plgpu.barrier_arrive(do_free.at[slot])
                ds = logits_gradient(p, dp, delta)
                dk = _added_product(dk, ds.astype(dtype), q_s.at[slot], through, wg)
                plgpu.barrier_arrive(q_free.at[slot])
                return dk, dv

            start = tuple(_full((ROWS, width), 0, _LAYOUT) for width in (K, V))
            dk, dv = lax.fori_loop(_i32(0), steps, step, start)
            store(dk_ref.at[b, rows, m], dk.astype(dtype))
            store(dv_ref.at[b, rows, m], dv.astype(dtype))

    scratch = [
        _shared(dtype, 2, ROWS, K),
        _shared(dtype, 2, ROWS, V),
        _shared(dtype, _STAGES, queries_of_step, K),
        _shared(dtype, _STAGES, queries_of_step, V),
        plgpu.SMEM((_STAGES, queries_of_step), _f32),
        plgpu.SMEM((_STAGES, queries_of_step), _f32),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        *(_stages(2), _stages(2), _stages(2), _stages(2)),
        *_Bias.scratch(bias, queries_of_step),
        *_through(dtype, queries_of_step, interpret),
    ]
    results = [_out((B, S, M, K), dtype), _out((B, S, M, V), dtype)]
    grid = {"head": M, "tile": S // TILE, "batch": B}
    arrays = (*arrays, scale, *_given(bias))
    return _call(kernel, arrays, reach, results, scratch, grid, interpret)
