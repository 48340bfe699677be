"""The loops of the LSTM over time as kernels for a Hopper GPU, in Pallas Mosaic GPU.

A kernel holds what is recurrent and nothing else: forward h₋ w_h and the cell; backward L3, L4, L8
and dh₋ = dz w_hᵀ. All products over the whole sequence are made outside.

A cluster of blocks has a tile of `TILE` rows of the batch, from the first step to the last, and
each of its blocks `UNITS` hidden units; w_h is read once, by each block its part. Everything is
transposed, so that units are the 64 rows of the tensor core's product and the batch tile is its
columns: a small batch wastes nothing, and the four gates of a unit are four accumulators of one
layout, on which the cell is elementwise.

    forward    h of all units to each block of the cluster         every step
    backward   to each block its part of dh₋, in C terms           every step

Backward two blocks have the same units, and each makes half of what is sent for them: half the
product, and half the weights, so that those of H 512 fit. What is elementwise both do.

What blocks send goes straight from registers to the others' shared memory, and completes on a
barrier there that each block has armed for itself: nothing else is waited for in a step. Buffers
take turns. Forward there are two: who sends a second time into a buffer has received what everybody
sent after having read it. Backward there are three, as a block receives from one only of each two
that have the same units: when that has come which these sent in step n, all blocks have sent in
step n − 1, hence have read what came in step n − 2.

x, the slopes and the results go straight between registers and global memory, where what a block
reads or writes in a step lies together, of a batch in N tiles. It is read a step ahead; by a block
alone it is asked for `AHEAD` steps before, since its step is shorter than the way to memory and
back.

Axes: T time, N tiles of the batch, H hidden width, which fits: `rnnattn.recurrent.pallas`;
C = H / UNITS blocks have all units, and backward there are S times as many.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

from rnnattn.mosaic import load, store
from rnnattn.recurrent.units.lstm import (
    LSTM,
    Slopes,
    cell_of_gates,
    gates_of_tanh,
    gradient_of_gates,
)

UNITS = 64
TILE = 16
AHEAD = 4

_i32, _f32 = jnp.int32, jnp.float32
_FRAGMENTS = plgpu.Layout.WGMMA  # of an array (UNITS, TILE) in the registers of a block
_OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # of an array (TILE,) beside it
_SCALAR = plgpu.Layout.WG_SPLAT
_WORDS = plgpu.RefType()
_ABSENT: tuple[Any, Any] = (None, None)  # weights in shared memory, where registers hold all


def _load(ref, layout=_FRAGMENTS, **how):
    """As most of what is loaded is laid out."""
    return load(ref, layout, **how)


def transforms(shape, dtype):
    """Of an array in shared memory that the tensor core reads, or a transfer writes."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if shape[-1] % (s // itemsize) == 0)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


# ---- what blocks of a cluster tell each other -------------------------------------------------
#
# Pallas has `async_store_smem`, which lets the sender arm the receiver's barrier: a fence of the
# whole device for each receiver and step, several times what all else in a step costs.


def _ptx(text):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)


def _int(bits):
    return ir.IntegerType.get_signless(bits)


def _barrier(words, n):
    no_phases: Any = None  # who waits says for which
    return mgpu.utils.BarrierRef(mgpu.utils.memref_ptr(words), n.registers.item(), no_phases, 1)


class _ByStores(NamedTuple):
    """From registers into the shared memory of every block of the cluster."""

    words: Any  # a barrier for each buffer
    buffers: int
    expected: int  # the bytes that a block receives in a step

    @staticmethod
    def scratch(buffers):
        return [plgpu.SMEM((2 * buffers,), _i32)]

    def open(self):
        @plgpu.inline_mgpu(arg_types=(_WORDS,))
        def initialise(_, words):
            i32, i64 = _int(32), _int(64)
            first = mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.BLOCK)
            for n in range(self.buffers):
                address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(words), [n], i64)
                nvvm.mbarrier_init(address, mgpu.utils.c(1, i32), predicate=first)
            _ptx("fence.mbarrier_init.release.cluster;")
            _ptx("barrier.cluster.arrive.aligned;")
            _ptx("barrier.cluster.wait.aligned;")

        initialise(self.words)

    def arm(self, slot):
        @plgpu.inline_mgpu(arg_types=(_WORDS, _SCALAR))
        def expect(_, words, slot):
            one = mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.WARPGROUP)
            _barrier(words, slot).arrive_expect_tx(self.expected, predicate=one)

        expect(self.words, slot)

    def wait(self, step, *, for_product):
        @plgpu.inline_mgpu(arg_types=(_WORDS, _SCALAR, _SCALAR))
        def received(_, words, slot, turn):
            odd = arith.trunci(_int(1), turn.registers.item())
            _barrier(words, slot).wait_parity(odd)
            if for_product:  # the tensor core reads by another way than stores go
                _ptx("fence.proxy.async.shared::cta;")

        turn, slot = step // self.buffers, lax.rem(step, _i32(self.buffers))
        received(self.words, slot, lax.rem(turn, _i32(2)))

    def send(self, value, ref, slot, how, first, count, apart=1):
        """To `count` blocks from the first on, so far apart."""
        tiling, swizzle = how

        @plgpu.inline_mgpu(arg_types=(_FRAGMENTS, plgpu.RefType(how), _WORDS, _SCALAR, _SCALAR))
        def store(_, value, ref, words, slot, first):
            for n in range(count):
                block = arith.addi(first.registers.item(), mgpu.utils.c(n * apart, _int(32)))
                value.store_tiled_async(
                    ref,
                    _barrier(words, slot),
                    cluster_dim=gpu.Dimension.x,
                    cluster_idx=arith.index_cast(ir.IndexType.get(), block),
                    swizzle=swizzle.swizzle,
                    tiling_rank=len(tiling.tiling),
                )

        store(value, ref, self.words, slot, first)


def _zero():
    """0, of which the compiler knows nothing: what is made with it in a loop stays in the loop.

    Else the addresses of all tiles of the weights are made before, and fill the registers.
    """
    scalar = plgpu.ShapeDtypeStruct((), _i32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(return_type=scalar)
    def make(_):
        zero: Any = llvm.inline_asm(_int(32), [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(zero, (), is_signed=True)

    return make()


# ---- forward ----------------------------------------------------------------------------------


def columns_in_registers(H):
    """Of the weights forward, the first: all where they fit, else those without room elsewhere.

    With half of them in registers a step of H 256 takes longer than with none: see
    benchmarks/README.md, "On a GPU".
    """
    return H if H <= 128 else max(0, H - 384)


def _row(mask, shape):
    """A mask of columns (TILE,) on an array of that shape."""
    return lax.broadcast_in_dim(mask, shape, (1,)) > 0


def forward(x, w, state, masks=None, *, reverse=False, keeps=False, interpret=None):
    """The state after every step, by halved weights.

    x: (T, N, 4, H, TILE) ½(x w_x + b). w: (4H, H) ½ w_hᵀ, 16-bit.
    state: h (N, H, TILE) in the dtype of w, c in float32.
    masks: valid and fresh, each (T, N, TILE) in float32 or None; see `unit.advance`.
    interpret: parameters of the interpreter, which knows only plain operations.
    Returns: h of every step (T, N, H, TILE), c of every step, if kept; both of the last.
    """
    (T, N, _, H, _), dtype = x.shape, w.dtype
    C, shape = H // UNITS, (UNITS, TILE)
    how = transforms(shape, dtype)  # the tensor core wants the same of both its operands
    plain, alone = interpret is not None, C == 1
    kept = 0 if plain else columns_in_registers(H)
    valid, fresh = masks or (None, None)
    given = [m for m in (valid, fresh) if m is not None]

    def kernel(x_ref, w_ref, h_ref, c_ref, *refs):
        mask_refs, refs = list(refs[: len(given)]), refs[len(given) :]
        y_ref, cs_ref, h_out, c_out, through, h_s, h_bar, *rest = refs
        (w_s, w_bar), link = (rest[:2], rest[2:]) if kept < H else (_ABSENT, rest)
        valid_ref = mask_refs.pop(0) if valid is not None else None
        fresh_ref = mask_refs.pop(0) if fresh is not None else None
        tile, block = lax.axis_index("tile"), lax.axis_index("block")
        mine = pl.ds(pl.multiple_of(block * UNITS, UNITS), UNITS)
        gates = [pl.ds(pl.multiple_of(g * H + block * UNITS, UNITS), UNITS) for g in range(4)]
        first, others = pl.ds(0, kept), pl.ds(kept, H - kept)
        until = lambda t: jnp.minimum(t, _i32(T - 1))
        time = lambda t: T - 1 - t if reverse else t
        load = partial(_load, optimized=False)
        stores = None if plain or alone else _ByStores(link[0], 2, H * TILE * 2)

        def fetch(t):
            if alone:
                plgpu.async_prefetch(x_ref.at[time(until(t + AHEAD)), tile, :, mine])
            t = time(until(t))
            row = lambda ref: None if ref is None else load(ref.at[t, tile], _OF_COLUMNS)
            z = [load(x_ref.at[t, tile, g, mine]) for g in range(4)]
            return z, row(valid_ref), row(fresh_ref)

        def record(t, h, c):
            store(y_ref.at[time(t), tile, mine], h)
            if keeps:
                store(cs_ref.at[time(t), tile, mine], c)

        if stores:
            stores.open()
        for g, rows in enumerate(gates if kept < H else ()):
            plgpu.copy_gmem_to_smem(w_ref.at[rows, others], w_s.at[g], w_bar)
        plgpu.copy_gmem_to_smem(h_ref.at[tile], h_s.at[0], h_bar)
        h, c = load(h_ref.at[tile, mine]), load(c_ref.at[tile, mine])
        inputs = fetch(_i32(0))
        w_g = [load(w_ref.at[rows, first]) for rows in gates if kept]
        for barrier in (h_bar, w_bar) if kept < H else (h_bar,):
            plgpu.barrier_wait(barrier)

        def step(t, carry):
            h, c, (x, valid, fresh) = carry
            slot = lax.rem(t, _i32(2))
            after = 1 - slot
            if stores:
                stores.arm(slot)

                @pl.when(t > 0)
                def _():
                    stores.wait(t - 1, for_product=True)

            def product(*sums):
                for total, w in zip(sums, w_g, strict=False):
                    plgpu.wgmma(total, w, h_s.at[slot, first])
                zero = _i32(0) if plain or kept == H else _zero()
                for n in range(0, H - kept, UNITS):
                    for g in range(4):
                        w = w_s.at[g + zero, :, pl.ds(n, UNITS)]
                        plgpu.wgmma(sums[g], w, h_s.at[slot, pl.ds(kept + n, UNITS)])
                if alone:

                    @pl.when(t > 0)
                    def _():
                        record(t - 1, h, c)

                later = fetch(t + 1) if alone else None
                return [s[...] for s in sums], later

            accumulators = 4 * [plgpu.ACC(shape, _f32)]
            z, later = pl.run_scoped(product, *accumulators)
            held, c_prev = h, c
            if fresh is not None:
                new = _row(fresh, shape)
                z, c_prev = [jnp.where(new, 0.0, s) for s in z], jnp.where(new, 0.0, c)
            z = [jnp.tanh(s + of_x.astype(_f32)) for s, of_x in zip(z, x, strict=True)]
            m, c_next = cell_of_gates(gates_of_tanh(z, LSTM()), c_prev)
            h = m.astype(dtype)
            if valid is not None:
                counts = _row(valid, shape)
                h, c = jnp.where(counts, h, held), jnp.where(counts, c_next, c)
            else:
                c = c_next
            if stores:
                stores.send(h, h_s.at[after, mine], slot, how, _i32(0), C)
            elif alone:
                h_s[after, ...] = h
                plgpu.commit_smem()
            else:
                through[after, tile, mine] = h
                plgpu.barrier_arrive(link[0])
                plgpu.barrier_wait(link[0])
                plgpu.copy_gmem_to_smem(through.at[after, tile], h_s.at[after], link[1].at[after])
                plgpu.barrier_wait(link[1].at[after])
            if not alone:
                record(t, h, c)
                later = fetch(t + 1)
            return h, c, later

        h, c, _ = lax.fori_loop(_i32(0), _i32(T), step, (h, c, inputs))
        if alone:
            record(_i32(T - 1), h, c)
        store(h_out.at[tile, mine], h)
        store(c_out.at[tile, mine], c)
        if stores:  # a block that is gone can receive nothing
            stores.wait(_i32(T - 1), for_product=False)

    out: Any = jax.ShapeDtypeStruct
    results = [
        out((T, N, H, TILE), dtype),
        out((T, N, H, TILE) if keeps else (1, 1, 8, 128), _f32),
        out((N, H, TILE), dtype),
        out((N, H, TILE), _f32),
        out((2, N, H, TILE) if plain and not alone else (1, 1, 8, 128), dtype),
    ]
    scratch: list[Any] = [
        plgpu.SMEM((2, H, TILE), dtype, transforms=how),
        plgpu.Barrier(),
        *_link(2, plain, alone),
    ]
    if kept < H:
        weights = plgpu.SMEM((4, UNITS, H - kept), dtype, transforms=how)
        scratch[2:2] = [weights, plgpu.Barrier(num_arrivals=4)]
    arrays = (x, w, *state, *given)
    y, c, h_last, c_last, _ = _call(kernel, results, scratch, N, C, interpret)(*arrays)
    return y, c if keeps else None, h_last, c_last


def _link(buffers, plain, alone):
    if alone:
        return []
    if not plain:
        return _ByStores.scratch(buffers)
    return [plgpu.ClusterBarrier(collective_axes=("block",)), plgpu.Barrier(num_barriers=2)]


def _call(kernel, results, scratch, N, C, interpret):
    how = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=scratch,
        grid=(N,),
        grid_names=("tile",),
        cluster=(C,),
        cluster_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=interpret is None,  # tanh in one instruction, right to 2⁻¹¹
            # no thread reads what it writes but behind a barrier of this file
            unsafe_no_auto_barriers=interpret is None,
        ),
        **how,
    )


# ---- backward ---------------------------------------------------------------------------------


def backward(slopes, dy, w, cotangents, masks=None, *, reverse=False, interpret=None):
    """dz of every step, and the cotangents of the initial state.

    slopes: `lstm.Slopes`, each (T, N, H, TILE) in float32, which hold the state where a step
        is not valid, and drop c where one is fresh. dy: (T, N, H, TILE). w: (H, 4H) w_h, 16-bit.
    cotangents: of h and c of the last step, each (N, H, TILE) in float32.
    masks: valid and fresh, each (T, N, TILE) in float32 or None.
    Returns: dz (T, N, 4, H, TILE) in the dtype of w, dh and dc (N, H, TILE) in float32.
    """
    (T, N, H, _), dtype = dy.shape, w.dtype
    C, shape = H // UNITS, (UNITS, TILE)
    S = min(C, 2)  # blocks with the same units
    P = C // S  # parts of dh₋ that a block makes
    how, how_part = transforms(shape, dtype), transforms(shape, _f32)
    plain, alone = interpret is not None, C == 1
    kept = 0 if plain else 4 // P  # gates whose weights are in registers
    valid, fresh = masks or (None, None)
    given = [m for m in (valid, fresh) if m is not None]

    def kernel(*refs):
        per_step, (w_ref, dh_ref, dc_ref), refs = refs[:7], refs[7:10], refs[10:]
        mask_refs, refs = list(refs[: len(given)]), refs[len(given) :]
        dz_ref, dh_out, dc_out, through, z_s, part_s, *rest = refs
        (w_s, w_bar), link = (rest[:2], rest[2:]) if kept < 4 else (_ABSENT, rest)
        valid_ref = mask_refs.pop(0) if valid is not None else None
        fresh_ref = mask_refs.pop(0) if fresh is not None else None
        tile, block = lax.axis_index("tile"), lax.axis_index("block")
        block, share = (lax.rem(block, _i32(C)), block // C) if S > 1 else (block, 0)
        mine = pl.ds(pl.multiple_of(block * UNITS, UNITS), UNITS)
        gates = [pl.ds(pl.multiple_of(g * H + block * UNITS, UNITS), UNITS) for g in range(4)]
        of_gate = [pl.ds(g * UNITS, UNITS) for g in range(4)]
        of_part = [pl.ds(p * UNITS, UNITS) for p in range(P)]
        first = 0 if alone else pl.multiple_of(share * (P * UNITS), UNITS)
        rows = lambda p, n: pl.ds(first + p * UNITS, n * UNITS)
        until = lambda n: jnp.minimum(n, _i32(T - 1))
        time = lambda n: n if reverse else T - 1 - n
        load = partial(_load, optimized=False)
        stores = None if plain or alone else _ByStores(link[0], S + 1, C * UNITS * TILE * 4)

        def fetch(n):
            for ref in per_step if alone else ():
                plgpu.async_prefetch(ref.at[time(until(n + AHEAD)), tile, mine])
            t = time(until(n))
            row = lambda ref: None if ref is None else load(ref.at[t, tile], _OF_COLUMNS)
            *slopes, dy = (load(ref.at[t, tile, mine]) for ref in per_step)
            return slopes, dy, row(valid_ref), row(fresh_ref)

        if stores:
            stores.open()
        for g in range(kept, 4):
            plgpu.copy_gmem_to_smem(w_ref.at[rows(0, P), gates[g]], w_s.at[g - kept], w_bar)
        dh, dc = load(dh_ref.at[tile, mine]), load(dc_ref.at[tile, mine])
        inputs = fetch(_i32(0))
        w_pg = [[load(w_ref.at[rows(p, 1), gates[g]]) for g in range(kept)] for p in range(P)]
        if kept < 4:
            plgpu.barrier_wait(w_bar)

        def step(n, carry):
            dh, dc, (slopes, dy, valid, fresh) = carry
            slot, to, t = lax.rem(n, _i32(2)), lax.rem(n, _i32(S + 1)), time(n)
            if stores:
                stores.arm(to)
            dh = dh + dy.astype(_f32)
            dz, dc = gradient_of_gates(Slopes(*slopes), dh, dc, None)
            dz = [d.astype(dtype) for d in dz]
            for g in range(4):
                z_s[slot, of_gate[g]] = dz[g]
            plgpu.commit_smem()

            def product(*sums):
                zero = _i32(0) if plain or kept == 4 else _zero()
                for g in range(4):
                    for p in range(P):
                        w = w_pg[p][g] if g < kept else w_s.at[g - kept + zero, of_part[p]]
                        plgpu.wgmma(sums[p], w, z_s.at[slot, of_gate[g]])
                for s in range(S):

                    @pl.when(share == s)
                    def record(s=s):
                        for g in range(s * 4 // S, (s + 1) * 4 // S):
                            store(dz_ref.at[t, tile, g, mine], dz[g])

                later = fetch(n + 1)
                return [s[...] for s in sums], later

            parts, later = pl.run_scoped(product, *(P * [plgpu.ACC(shape, _f32)]))
            if alone:
                total = parts[0]
            elif stores:
                for p in range(P):
                    whose = share * P + p
                    stores.send(parts[p], part_s.at[to, block], to, how_part, whose, S, C)
                stores.wait(n, for_product=False)
                total = _sum([_load(part_s.at[to, q]) for q in range(C)])
            else:
                for p in range(P):
                    through[slot, tile, share * P + p, block] = parts[p]
                plgpu.barrier_arrive(link[0])
                plgpu.barrier_wait(link[0])
                total = _sum([load(through.at[slot, tile, block, q]) for q in range(C)])
            if fresh is not None:
                total = jnp.where(_row(fresh, shape), 0.0, total)
            if valid is not None:
                total = jnp.where(_row(valid, shape), total, dh)
            return total, dc, later

        dh, dc, _ = lax.fori_loop(_i32(0), _i32(T), step, (dh, dc, inputs))

        @pl.when(share == 0)
        def end():
            store(dh_out.at[tile, mine], dh)
            store(dc_out.at[tile, mine], dc)

    out: Any = jax.ShapeDtypeStruct
    results = [
        out((T, N, 4, H, TILE), dtype),
        out((N, H, TILE), _f32),
        out((N, H, TILE), _f32),
        out((2, N, C, C, UNITS, TILE) if plain and not alone else (1, 1, 1, 1, 8, 128), _f32),
    ]
    scratch: list[Any] = [
        plgpu.SMEM((2, 4 * UNITS, TILE), dtype, transforms=how),
        plgpu.SMEM((S + 1, C, UNITS, TILE), _f32, transforms=how_part),
        *_link(S + 1, plain, alone)[:1],
    ]
    if kept < 4:
        weights = plgpu.SMEM((4 - kept, P * UNITS, UNITS), dtype, transforms=how)
        scratch[2:2] = [weights, plgpu.Barrier(num_arrivals=4 - kept)]
    arrays = (*slopes, dy, w, *cotangents, *given)
    dz, dh, dc, _ = _call(kernel, results, scratch, N, S * C, interpret)(*arrays)
    return dz, dh, dc


def _sum(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
