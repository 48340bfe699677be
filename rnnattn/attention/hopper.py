"""Attention and its gradient as kernels for a Hopper GPU, in Pallas Mosaic GPU.

A block of the forward kernel has the queries of a tile, of one head: two warpgroups of `ROWS`
compute, each with its queries, and a third fetches blocks of `KEYS` keys and values, which both
read. While one warpgroup has the tensor core, the other computes the softmax of its block.

Who sees whom is said by `Reach`: the keys from one to another for each query, and the segments of
both. It says of each tile, too, which blocks of keys are visited, and which of these all of its
queries see whole, so that nothing is compared there.

Logits are kept in units of log 2, since the GPU has a power of 2 and not of e. Weights and dS are
rounded to 16 bits before the products that they are in.

Axes: B batch, T queries and S keys, multiples of `TILE`, N query heads, M key/value heads, K head
width, V value width: see `rnnattn.attention.pallas`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from rnnattn.attention.equations import Softmax, along_rows, cap, rescaled

ROWS = 64  # of a warpgroup
TILE = KEYS = 128  # queries of a block, and keys of a step
_STAGES = 2  # blocks of keys that are there or on their way

_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
_i32, _f32 = jnp.int32, jnp.float32
_LAYOUT = plgpu.Layout.WGMMA  # of an array (ROWS, …) in the registers of a warpgroup
_OF_ROWS, _OF_COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_HOW = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


class Reach(NamedTuple):
    """Which keys a query may see: those of its range that have its segment."""

    first: Int[Array, "B T"]
    past: Int[Array, "B T"]
    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    blocks: Int[Array, "B tiles 4"]  # visited from, to; and of these seen whole from, to


def _load(ref, layout):
    """From memory into registers; jax 0.10 wants an index apart from the reference."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _store(ref, value):
    """From registers into global memory, in pieces smaller than its sectors."""
    if hasattr(plgpu, "store"):  # from jax 0.12 on, where an assignment wants whole sectors
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, _f32), layout)


def _part(n, size):
    return pl.ds(pl.multiple_of(n * size, size), size)


def _sees(reach, refs, keys, first_key, of_rows):
    """Whether each of ROWS queries sees each key of a block."""
    first, past, segments = of_rows
    shape = (ROWS, KEYS)
    columns = plgpu.broadcasted_iota(_i32, shape, 1, layout=_LAYOUT) + first_key
    sees = (columns >= along_rows(first, shape)) & (columns < along_rows(past, shape))
    if segments is None:
        return sees
    others = lax.broadcast_in_dim(_load(refs.key_segments.at[keys], _OF_COLUMNS), shape, (1,))
    return sees & (along_rows(segments, shape) == others)


def forward(query, key, value, scale, reach, *, soft_cap, dtype, interpret=None):
    """O (B, T, N, V) in that dtype, and L (B, N, T) in float32, without sinks.

    scale: (N,) in float32. reach: None where every query sees every key.
    interpret: parameters of the interpreter, whose tensor core reads no registers.
    """
    (B, T, N, K), (_, S, M, V) = query.shape, value.shape
    G, plain = N // M, interpret is not None

    def kernel(q_ref, k_ref, v_ref, scale_ref, *refs):
        given, refs = refs[: len(leaves)], refs[len(leaves) :]
        of_reach = None if reach is None else jax.tree.unflatten(tree, given)
        o_ref, lse_ref, q_s, k_s, v_s, p_s, q_bar, k_bar, v_bar, k_free, v_free, turn = refs
        b, n, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
        # later tiles see more keys where sight is causal, and so begin earlier
        tile = T // TILE - 1 - lax.axis_index("tile")
        m = lax.div(n, _i32(G))
        if of_reach is None:
            begin, end = _i32(0), _i32(S // KEYS)
        else:
            begin, end, whole_from, whole_to = (of_reach.blocks[b, tile, i] for i in range(4))
        count = jnp.maximum(end - begin, 0)

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(wg == 2)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _(i):
                slot = lax.rem(i, _i32(_STAGES))
                keys = _part(begin + i, KEYS)

                def fetch(ref, into, arrived, free):
                    @pl.when(i >= _STAGES)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(ref.at[b, keys, m], into.at[slot], arrived.at[slot])

                fetch(k_ref, k_s, k_bar, k_free)
                fetch(v_ref, v_s, v_bar, v_free)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            rows = _part(tile * 2 + wg, ROWS)
            q = q_s.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q, q_bar.at[wg])
            scale = scale_ref[n] * (1 if soft_cap else _LOG2_E)
            if of_reach is not None:
                of_row = lambda ref: None if ref is None else _load(ref.at[b, rows], _OF_ROWS)
                of_rows = [of_row(ref) for ref in of_reach[:3]]
            plgpu.barrier_wait(q_bar.at[wg])
            pl.when(wg == 1)(take_turns)

            def hide(s, block):
                keys = _part(block, KEYS)
                refs = of_reach._replace(
                    key_segments=None
                    if of_reach.key_segments is None
                    else of_reach.key_segments.at[b]
                )
                return jnp.where(_sees(reach, refs, keys, block * KEYS, of_rows), s, -jnp.inf)

            def step(i, carry):
                peak, total, weighted = carry
                slot = lax.rem(i, _i32(_STAGES))
                plgpu.barrier_wait(k_bar.at[slot])

                def product(s):
                    plgpu.wgmma(s, q, k_s.at[slot].transpose((1, 0)))
                    take_turns()
                    return s[...]

                s = pl.run_scoped(product, plgpu.ACC((ROWS, KEYS), _f32))
                plgpu.barrier_arrive(k_free.at[slot])
                s = s * scale
                if soft_cap:
                    s = cap(s, soft_cap) * _LOG2_E
                if of_reach is not None:
                    block = begin + i
                    whole = (block >= whole_from) & (block < whole_to)
                    s = lax.cond(whole, lambda s: s, lambda s: hide(s, block), s)
                before, peak = peak, jnp.maximum(peak, jnp.max(s, axis=1))
                p, shrink = rescaled(s, before, peak, jnp.exp2)
                total = total * shrink + jnp.sum(p, axis=1)
                weighted = weighted * along_rows(shrink, weighted.shape)
                p = p.astype(query.dtype)
                weighted, total, peak, p = lax.optimization_barrier((weighted, total, peak, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_bar.at[slot])
                plgpu.barrier_wait(turn)
                if plain:
                    p_s[wg] = p
                    plgpu.commit_smem()

                    def seen(sums):
                        plgpu.wgmma(sums, p_s.at[wg], v_s.at[slot])
                        return sums[...]

                    weighted = weighted + pl.run_scoped(seen, plgpu.ACC((ROWS, V), _f32))
                else:
                    add = lambda sums: plgpu.wgmma(sums, p, v_s.at[slot])
                    weighted = pl.run_state(add)(plgpu.ACC.init(weighted))
                plgpu.barrier_arrive(v_free.at[slot])
                return peak, total, weighted

            start = (
                _full((ROWS,), -jnp.inf, _OF_ROWS),
                _full((ROWS,), 0, _OF_ROWS),
                _full((ROWS, V), 0, _LAYOUT),
            )
            peak, total, weighted = lax.fori_loop(_i32(0), count, step, start)
            pl.when(wg == 0)(take_turns)
            o, lse = Softmax(peak * _LN_2, total, weighted).finish()
            _store(o_ref.at[b, rows, n], o.astype(dtype))
            _store(lse_ref.at[b, n, rows], lse)

    leaves, tree = jax.tree.flatten(reach)
    out: Any = jax.ShapeDtypeStruct
    shared = lambda *shape: plgpu.SMEM(shape, query.dtype, transforms=_HOW)
    barriers = partial(plgpu.Barrier, num_barriers=_STAGES)
    return _call(
        kernel,
        [out((B, T, N, V), dtype), out((B, N, T), _f32)],
        [
            shared(2, ROWS, K),
            shared(_STAGES, KEYS, K),
            shared(_STAGES, KEYS, V),
            shared(2, ROWS, KEYS) if plain else shared(1, 8, 64),
            plgpu.Barrier(num_barriers=2),
            barriers(),
            barriers(),
            barriers(num_arrivals=2),
            barriers(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        {"head": N, "tile": T // TILE, "batch": B},
        interpret,
    )(query, key, value, scale, *leaves)


def _call(kernel, results, scratch, grid, interpret):
    how = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=scratch,
        grid=(*grid.values(),),
        grid_names=(*grid,),
        num_threads=3,
        thread_name="wg",
        # powers and tanh in one instruction
        compiler_params=plgpu.CompilerParams(approx_math=interpret is None),
        **how,
    )
