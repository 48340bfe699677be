"""The loops of the LSTM over time as kernels for a TPU, in Pallas.

A kernel holds what is recurrent and nothing else: forward h₋ w_h and the cell; backward L3, L4, L8
and dh₋ = dz w_hᵀ. All products of many steps are made outside.

w_h lies in VMEM from the first step to the last. The grid is tiles of the batch × chunks of time,
the latter one after another, each way of running from its own end; what the steps read and write
comes and goes by chunks, while those before and after are computed. The state lies in the block of
the result that it becomes, which leaves VMEM when the last chunk of the tile is done.

Rows and steps of a block that lie beyond the arrays hold anything: steps are not run, and a row
reaches no other.

Axes: T time, B batch, H hidden width, which fits: `rnnattn.recurrent.pallas`.
"""

from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rnnattn.recurrent.unit import dot
from rnnattn.recurrent.units.lstm import LSTM, LSTMState, Slopes, cell, cell_gradient

ROWS = 128  # of a tile: as many as the matrix unit takes for the time of one
_MOST_STEPS = 64  # of a chunk, beyond which its own costs are small
_VMEM = 48 * 2**20  # less than any TPU has from the fifth generation on
STREAMED = 16 * 2**20  # of it, for what comes and goes; w_h has as much at most
_LANES = 128  # a row of VMEM; what is narrower takes one all the same

_i32, _f32 = np.int32, jnp.float32


def _call(kernel, backwards, per_step, w, state, results, interpret):
    """What `kernel(steps, w, state, results)`, a step of a tile, writes, and the last state.

    backwards: whether the last step is run first.
    per_step: arrays that the steps read, (T, B, width). w: weights that every step reads.
    state: (B, H) each, which the kernel reads and writes.
    results: types of what the steps write, (T, B, width).
    """
    (T, B, _), H = per_step[0].shape, state[0].shape[1]
    rows = min(B, ROWS)
    width = lambda x: -(-x.shape[2] // _LANES) * _LANES * x.dtype.itemsize
    of_step = 2 * rows * sum(map(width, (*per_step, *results)))  # one chunk comes, one is computed
    length = max(min(STREAMED // of_step, _MOST_STEPS, T), 1)
    chunks = -(-T // length)
    chunk = lambda n: _i32(chunks - 1) - n if backwards else n

    def body(*refs):
        counts, rest = (len(per_step), 1, len(state), len(results), len(state)), iter(refs)
        steps, (w_ref,), first, written, last = ([*islice(rest, count)] for count in counts)
        n = pl.program_id(1)
        count = jnp.minimum(_i32(length), _i32(T) - chunk(n) * _i32(length))

        @pl.when(n == 0)
        def start():
            for to, of in zip(last, first, strict=True):
                to[...] = of[...]

        def step(n, nothing):
            t = count - 1 - n if backwards else n
            kernel([ref.at[t] for ref in steps], w_ref, last, [ref.at[t] for ref in written])
            return nothing

        lax.fori_loop(_i32(0), count, step, None)

    zero = _i32(0)
    by_step = lambda x: pl.BlockSpec((length, rows, x.shape[2]), lambda b, n: (chunk(n), b, zero))
    by_tile = pl.BlockSpec((rows, H), lambda b, n: (b, zero))
    whole = pl.BlockSpec(w.shape, lambda b, n: (zero, zero), pipeline_mode=pl.Buffered(1))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    call: Any = pl.pallas_call(
        body,
        grid=(-(-B // rows), chunks),
        in_specs=[*map(by_step, per_step), whole, *(len(state) * [by_tile])],
        out_specs=[*map(by_step, results), *(len(state) * [by_tile])],
        out_shape=[*results, *map(like, state)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
    )
    made = call(*per_step, w, *state)
    return made[: len(results)], made[len(results) :]


def _columns(masks):
    """Masks (T, B) as what the steps read, and how a step finds its own again."""
    given = [m.astype(_f32)[..., None] for m in masks if m is not None]

    def found(refs):
        rest = iter(refs)
        return [None if m is None else next(rest)[...] > 0 for m in masks]

    return given, found


def _where(condition, a, b):
    return a if condition is None else jnp.where(condition, a, b)


def forward(z, w, state, valid, fresh, *, reverse=False, keeps=False, interpret: Any = False):
    """The state after every step, by halved weights.

    z: (T, B, 4H) ½(x w_x + b), in the dtype of sums. w: (H, 4H) ½ w_h.
    state: h (B, H) in the dtype of w, c in that of sums.
    valid, fresh: (T, B) or None; see `unit.advance`.
    interpret: how Pallas' interpreter runs this, where it is to.
    Returns: h of every step (T, B, H), c of every step, if kept; both of the last.
    """
    (T, B, _), H = z.shape, w.shape[0]
    masks, found = _columns([valid, fresh])

    def step(steps, w_ref, state, written):
        z, *marks = steps
        valid, fresh = found(marks)
        before = LSTMState(*(ref[...] for ref in state))
        start = before
        if fresh is not None:
            start = LSTMState(*(jnp.where(fresh, 0, s) for s in before))
        m, c, _ = cell(z[...] + dot(start.h, w_ref[...]), start.c, None, LSTM())
        made = m.astype(w.dtype), c
        after = [_where(valid, a, b) for a, b in zip(made, before, strict=True)]
        for ref, s in zip(state, after, strict=True):
            ref[...] = s
        for ref, s in zip(written, after, strict=False):
            ref[...] = s

    each = [jax.ShapeDtypeStruct((T, B, H), s.dtype) for s in state[: 1 + keeps]]
    (y, *c), last = _call(step, reverse, [z, *masks], w, state, each, interpret)
    return y, c[0] if keeps else None, *last


def backward(slopes, dy, w, dstate, valid, fresh, *, reverse=False, interpret: Any = False):
    """dz of every step, and the cotangents of the initial state.

    slopes: `lstm.Slopes`, each (T, B, H) in the dtype of sums, which hold the state where a step
        is not valid, and drop c where one is fresh. dy: (T, B, H). w: (H, 4H) w_h.
    dstate: the cotangents of h and c of the last step, each (B, H) in the dtype of sums.
    valid, fresh: (T, B) or None.
    Returns: dz (T, B, 4H), dh and dc (B, H), all in the dtype of sums: the matrix unit rounds what
        it multiplies by itself, as much as `jax_default_matmul_precision` lets it.
    """
    (T, B, H), dtype = dy.shape, slopes.c.dtype
    masks, found = _columns([valid, fresh])

    def step(steps, w_ref, dstate, written):
        *slopes, dy = (ref[...] for ref in steps[:7])
        valid, fresh = found(steps[7:])
        dh, dc = (ref[...] for ref in dstate)
        dh = dh + dy.astype(dtype)
        dz, dc = cell_gradient(Slopes(*slopes), dh, dc, None)
        before = dot(dz, w_ref[...])
        if fresh is not None:
            before = jnp.where(fresh, 0, before)
        dstate[0][...] = _where(valid, before, dh)
        dstate[1][...] = dc
        written[0][...] = dz

    each = [jax.ShapeDtypeStruct((T, B, 4 * H), dtype)]
    per_step = [*slopes, dy, *masks]
    (dz,), (dh, dc) = _call(step, not reverse, per_step, w.astype(dtype).T, dstate, each, interpret)
    return dz, dh, dc
