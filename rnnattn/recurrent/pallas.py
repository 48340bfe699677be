"""The schedules of the LSTM by kernels in Pallas: on a Hopper GPU those of
`rnnattn.recurrent.hopper`, on a TPU those of `rnnattn.recurrent.tpu`.

They hold what goes step by step; all else is made of the whole sequence at once, or of n steps
where the state is kept every n: the input projections and the transposition before, the slopes
before the gradient's loop, and the products of dz after it. Where a is kept of every step, it is
one product once the states are known.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import rnnattn.recurrent.chunked as chunked
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import HOPPER, gpu_capability
from rnnattn.precision import accumulator
from rnnattn.recurrent.noise import QUIET
from rnnattn.recurrent.placed import forward_on_xla, interval, placed, unserved_by_kernels
from rnnattn.recurrent.problem import Trace
from rnnattn.recurrent.unit import dot
from rnnattn.recurrent.units.lstm import LSTM, LSTMParams, LSTMState, Slopes
from rnnattn.steps import select

_WIDTHS = (64, 128, 256, 384, 512)
# A block of the row of gates begins where a tile of VMEM does; w_h in float32 then takes 16 MiB.
_LANES, _WIDEST_ON_TPU = 128, 1024
_FEWEST_STEPS, _MOST_ROWS = 16, 128  # of what was measured to be faster


def unserved_on_gpu(params, x, options):
    """What of a call the kernels for a Hopper GPU cannot serve."""
    H, dtype = params.w_h.shape[1] // 4, jnp.result_type(x)
    reasons = {
        f"the dtype {dtype.name}": dtype not in (jnp.bfloat16, jnp.float16),
        f"the hidden width {H} (64, 128, 256, 384 and 512 can be)": H not in _WIDTHS,
    }
    return those_that_hold(reasons | _unserved(params, x, options))


def unserved_on_tpu(params, x, options):
    """What of a call the kernels for a TPU cannot serve."""
    H, dtype = params.w_h.shape[1] // 4, jnp.result_type(x)
    fits = isinstance(H, int) and H % _LANES == 0 and H <= _WIDEST_ON_TPU
    reasons = {
        f"the dtype {dtype.name} on a TPU": dtype not in (jnp.bfloat16, jnp.float32),
        f"the hidden width {H} on a TPU (multiples of 128 up to 1024 can be)": not fits,
    }
    return those_that_hold(reasons | _unserved(params, x, options))


def _unserved(params, x, options):
    return {
        "peephole weights": params.peephole is not None,
        "a projection": params.projection is not None,
        "`clip` or `coupled`": options.unit != LSTM(),
        "`return_cells`": options.every_state,
        "zoneout or dropout": options.noise != QUIET,
    } | unserved_by_kernels(params, x)


def serves_here(steps):
    """Whether a program that is lowered here runs where the kernels were measured to be faster.

    The measurements: benchmarks/README.md, "On a GPU".
    """
    T, B, _ = steps.x.shape
    measured = jax.__version_info__[:2] == (0, 11) and T >= _FEWEST_STEPS and B <= _MOST_ROWS
    return measured and gpu_capability() == HOPPER


def _hopper():
    # importing Pallas takes longer than all of the library
    import rnnattn.recurrent.hopper as hopper

    return hopper


def _tiles(B):
    return -(-B // _hopper().TILE)


def _tiled(x):
    """(…, B, width) → (…, N, width, TILE): tiles of the batch, the last filled up with zeros."""
    *others, B, width = x.shape
    N, tile = _tiles(B), _hopper().TILE
    x = jnp.pad(x, [*(len(others) * [(0, 0)]), (0, N * tile - B), (0, 0)])
    return jnp.swapaxes(x.reshape(*others, N, tile, width), -1, -2)


def _rows(x, B):
    """(…, N, width, TILE) → (…, B, width)."""
    *others, N, width, tile = x.shape
    return jnp.swapaxes(x, -1, -2).reshape(*others, N * tile, width)[..., :B, :]


def _masks(*masks):
    def tiled(mask):
        return None if mask is None else _tiled(mask.astype(jnp.float32)[..., None])[:, :, 0]

    return [tiled(mask) for mask in masks]


class Loops(NamedTuple):
    """The kernels of a platform, of arrays as the schedule has them.

    `forward(z, w_h, state, valid, fresh, *, reverse, keeps)`, z being ½(x w_x + b) of every step
    and w_h halved, gives h and, with `keeps`, c of every step, and h and c of the last.
    `backward(slopes, dy, w_h, dstate, valid, fresh, *, reverse)` gives dz of every step, in any
    precision, and the cotangents of the initial h and c.
    """

    forward: Callable
    backward: Callable
    sizes: chunked.Sizes  # how many steps are made ready for them at once


def _forward_on_hopper(z, w_h, state, valid, fresh, *, reverse, keeps):
    z, B = _tiled(z), z.shape[1]
    y, c, h_last, c_last = _hopper().forward(
        z.reshape(*z.shape[:2], 4, -1, z.shape[-1]),
        w_h.T,
        [_tiled(s) for s in state],
        _masks(valid, fresh),
        reverse=reverse,
        keeps=keeps,
    )
    return _rows(y, B), _rows(c, B) if keeps else None, _rows(h_last, B), _rows(c_last, B)


def _backward_on_hopper(slopes, dy, w_h, dstate, valid, fresh, *, reverse):
    B = dy.shape[1]
    dz, dh, dc = _hopper().backward(
        Slopes(*map(_tiled, slopes)),
        _tiled(dy),
        w_h,
        [_tiled(d) for d in dstate],
        _masks(valid, fresh),
        reverse=reverse,
    )
    dz = dz.reshape(*dz.shape[:2], -1, dz.shape[-1])
    return _rows(dz, B), _rows(dh, B), _rows(dc, B)


def _tpu():
    import rnnattn.recurrent.tpu as tpu

    return tpu


def _forward_on_tpu(*arrays, **how):
    return _tpu().forward(*arrays, **how)


def _backward_on_tpu(*arrays, **how):
    return _tpu().backward(*arrays, **how)


def _run(loops, options, keeps, halved, state, steps):
    """The final state and the trace, of consecutive steps."""
    z = dot(select(steps.valid, steps.x, 0), halved.w_x) + halved.b[None, None]
    y, c, h_last, c_last = loops.forward(
        z, halved.w_h, state, steps.valid, steps.fresh, reverse=options.reverse, keeps=keeps
    )
    y = select(steps.valid, y, 0)
    return LSTMState(h_last, c_last), Trace(y, (c,) if keeps else None)


def _run_back(loops, options, params, halved, start, steps, trace, dy, dstate):
    """The gradients of params, in the accumulator's dtype, state and x, of consecutive steps."""
    dtype = steps.x.dtype
    x, before, after = chunked.states_of_steps(options, steps, trace, start)
    kept = chunked.kept_of_steps(steps, trace)
    slopes, _ = options.unit.slopes(halved, x, before.h, before, after, kept, None)
    # what is not valid holds dh and dc, and a fresh step passes no dc on
    carry = slopes.carry if steps.fresh is None else select(~steps.fresh, slopes.carry, 0)
    if steps.valid is not None:
        slopes = Slopes(*(select(steps.valid, s, 0) for s in slopes))
        carry = select(steps.valid, carry, 1)
    # else XLA transposes what they are made of, which is more
    slopes = lax.optimization_barrier(slopes._replace(carry=carry))
    dy = select(steps.valid, dy, 0)
    dz, dh, dc = loops.backward(
        slopes, dy, params.w_h, dstate, steps.valid, steps.fresh, reverse=options.reverse
    )
    wide: Any = accumulator(dtype)
    xh = jnp.concatenate([x, before.h], axis=-1)
    dw = jnp.tensordot(xh.astype(dz.dtype), dz, ((0, 1), (0, 1)), preferred_element_type=wide)
    dw_x, dw_h = jnp.split(dw, [steps.x.shape[-1]])
    db = jnp.sum(dz.astype(wide), (0, 1))
    dx = dot(dz, params.w_x.T.astype(dz.dtype)).astype(dtype)
    return LSTMParams(dw_x, dw_h, db), LSTMState(dh, dc), dx


def _length(loops, options, n, params, steps):
    """The steps of a chunk: n, if so many lie between two states that are kept."""
    options = options._replace(residuals="states")
    return n or chunked.chunk_length(loops.sizes, options, params, steps)


def _forward(loops, static, params, state, steps):
    """The final state and the trace."""
    options, keeps = static
    T, halved = steps.x.shape[0], options.unit.prepare(params)
    n = interval(options, keeps, T)

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _run(loops, options, keeps and not n, halved, state, steps)
        return after, (trace, state)

    length = _length(loops, options, n, params, steps)
    final, (trace, starts) = chunked.scan_chunks(
        chunk, state, (steps,), (), length, options.reverse
    )
    if n:
        return final, trace._replace(starts=starts)
    if keeps and options.residuals == "gates":
        x, before, after = chunked.states_of_steps(options, steps, trace, state)
        kept = options.unit.preactivations(halved, x, before.h, before, after)
        trace = trace._replace(kept=kept)
    return final, trace


def _backward(loops, options, params, state, steps, trace, cotangents):
    """The gradients of params, state and x."""
    (dy, _), dstate = cotangents
    wide, halved = accumulator(steps.x.dtype), options.unit.prepare(params)

    def chunk(carry, inputs):
        dparams, dstate = carry
        (steps, dy, trace), start = inputs
        if trace.y is None:
            _, trace = _run(loops, options, True, halved, start, steps)
        more, dstate, dx = _run_back(
            loops, options, params, halved, start, steps, trace, dy, dstate
        )
        return (jax.tree.map(jnp.add, dparams, more), dstate), (dx, ())

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, wide), params)
    carry = (zeros, jax.tree.map(lambda d: d.astype(wide), dstate))
    length = _length(loops, options, interval(options, True, steps.x.shape[0]), params, steps)
    starts = trace.starts or chunked.states_between(options, length, state, steps, trace)
    per_step = (steps, dy, trace._replace(starts=None))
    (dparams, dstate), (dx, _) = chunked.scan_chunks(
        chunk, carry, per_step, starts, length, not options.reverse
    )
    dparams = jax.tree.map(lambda d, like: d.astype(like.dtype), dparams, params)
    return dparams, LSTMState(dstate.h.astype(steps.x.dtype), dstate.c), dx


def halves(loops):
    """The forward and the backward of a schedule, as `placed` takes them."""
    return partial(_forward, loops), partial(_backward, loops)


_ALL_STEPS = chunked.ELSEWHERE._replace(chunk_bytes=2**62)  # as was measured
ON_HOPPER = halves(Loops(_forward_on_hopper, _backward_on_hopper, _ALL_STEPS))
ON_TPU = halves(Loops(_forward_on_tpu, _backward_on_tpu, chunked.ELSEWHERE))


def forward_where_faster(static, params, state, steps):
    half = ON_HOPPER[0] if serves_here(steps) else forward_on_xla
    return half(static, params, state, steps)


def backward_where_faster(options, params, state, steps, *others):
    half = ON_HOPPER[1] if serves_here(steps) else chunked.backward
    return half(options, params, state, steps, *others)


WHERE_FASTER = forward_where_faster, backward_where_faster
# Who asks for the kernels gets them in exported programs, too; by whether those for a GPU and those
# for a TPU serve a call.
PALLAS = {
    (True, False): placed("rnnattn_lstm_pallas", {"cuda": ON_HOPPER}, exported=True),
    (False, True): placed("rnnattn_lstm_pallas_tpu", {"tpu": ON_TPU}, exported=True),
    (True, True): placed(
        "rnnattn_lstm_pallas_both", {"cuda": ON_HOPPER, "tpu": ON_TPU}, exported=True
    ),
}
