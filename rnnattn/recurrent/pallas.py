"""The schedule of the LSTM on a Hopper GPU: the kernels of `rnnattn.recurrent.hopper`.

They hold what goes step by step; all else is made of the whole sequence at once, or of n steps
where the state is kept every n: the input projections and the transposition before, the slopes
before the gradient's loop, and the products of dz after it. Where a is kept of every step, it is
one product once the states are known.
"""

from typing import Any

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
_FEWEST_STEPS, _MOST_ROWS = 16, 128  # of what was measured to be faster


def unserved(params, x, options):
    """What of a call the kernels cannot serve."""
    H, dtype = params.w_h.shape[1] // 4, jnp.result_type(x)
    reasons = {
        f"the dtype {dtype.name}": dtype not in (jnp.bfloat16, jnp.float16),
        f"the hidden width {H} (64, 128, 256, 384 and 512 can be)": H not in _WIDTHS,
        "peephole weights": params.peephole is not None,
        "a projection": params.projection is not None,
        "`clip` or `coupled`": options.unit != LSTM(),
        "`return_cells`": options.every_state,
        "zoneout or dropout": options.noise != QUIET,
    }
    return those_that_hold(reasons | unserved_by_kernels(params, x))


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


def _masks(steps):
    def tiled(mask):
        return None if mask is None else _tiled(mask.astype(jnp.float32)[..., None])[:, :, 0]

    return tiled(steps.valid), tiled(steps.fresh)


def _run(options, keeps, halved, state, steps):
    """The final state and the trace, of consecutive steps."""
    B = steps.x.shape[1]
    x = _tiled(dot(select(steps.valid, steps.x, 0), halved.w_x) + halved.b[None, None])
    y, c, h_last, c_last = _hopper().forward(
        x.reshape(*x.shape[:2], 4, -1, x.shape[-1]),
        halved.w_h.T,
        [_tiled(s) for s in state],
        _masks(steps),
        reverse=options.reverse,
        keeps=keeps,
    )
    y = select(steps.valid, _rows(y, B), 0)
    return LSTMState(_rows(h_last, B), _rows(c_last, B)), Trace(
        y, (_rows(c, B),) if keeps else None
    )


def _run_back(options, params, halved, start, steps, trace, dy, dstate):
    """The gradients of params, in the accumulator's dtype, state and x, of consecutive steps."""
    B, dtype = dy.shape[1], steps.x.dtype
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
    dz, dh, dc = _hopper().backward(
        Slopes(*map(_tiled, slopes)),
        _tiled(select(steps.valid, dy, 0)),
        params.w_h,
        [_tiled(d) for d in dstate],
        _masks(steps),
        reverse=options.reverse,
    )
    dz = _rows(dz.reshape(*dz.shape[:2], -1, dz.shape[-1]), B)
    dstate = LSTMState(_rows(dh, B), _rows(dc, B))
    wide: Any = accumulator(dtype)
    xh = jnp.concatenate([x, before.h], axis=-1)
    dw = jnp.tensordot(xh, dz, ((0, 1), (0, 1)), preferred_element_type=wide)
    dw_x, dw_h = jnp.split(dw, [steps.x.shape[-1]])
    db = jnp.sum(dz.astype(wide), (0, 1))
    return LSTMParams(dw_x, dw_h, db), dstate, dot(dz, params.w_x.T).astype(dtype)


def forward(static, params, state, steps):
    """The final state and the trace."""
    options, keeps = static
    T, halved = steps.x.shape[0], options.unit.prepare(params)
    n = interval(options, keeps, T)

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _run(options, keeps and not n, halved, state, steps)
        return after, (trace, state)

    length = n or T
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


def backward(options, params, state, steps, trace, cotangents):
    """The gradients of params, state and x."""
    (dy, _), dstate = cotangents
    wide, halved = accumulator(steps.x.dtype), options.unit.prepare(params)

    def chunk(carry, inputs):
        dparams, dstate = carry
        (steps, dy, trace), start = inputs
        if trace.y is None:
            _, trace = _run(options, True, halved, start, steps)
        more, dstate, dx = _run_back(options, params, halved, start, steps, trace, dy, dstate)
        return (jax.tree.map(jnp.add, dparams, more), dstate), (dx, ())

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, wide), params)
    carry = (zeros, jax.tree.map(lambda d: d.astype(wide), dstate))
    starts = trace.starts or jax.tree.map(lambda s: s[None], state)
    per_step = (steps, dy, trace._replace(starts=None))
    T = steps.x.shape[0]
    length = interval(options, True, T) or T
    (dparams, dstate), (dx, _) = chunked.scan_chunks(
        chunk, carry, per_step, starts, length, not options.reverse
    )
    dparams = jax.tree.map(lambda d, like: d.astype(like.dtype), dparams, params)
    return dparams, LSTMState(dstate.h.astype(steps.x.dtype), dstate.c), dx


def forward_where_faster(static, params, state, steps):
    half = forward if serves_here(steps) else forward_on_xla
    return half(static, params, state, steps)


def backward_where_faster(options, params, state, steps, *others):
    half = backward if serves_here(steps) else chunked.backward
    return half(options, params, state, steps, *others)


WHERE_FASTER = forward_where_faster, backward_where_faster
# who asks for the kernels gets them in exported programs, too
PALLAS = placed("rnnattn_lstm_pallas", {"cuda": (forward, backward)}, exported=True)
