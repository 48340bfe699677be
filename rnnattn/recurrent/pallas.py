"""The schedule of the LSTM on a Hopper GPU: the kernels of `rnnattn.recurrent.hopper`.

They hold what goes step by step; all else is made of the whole sequence at once, or of n steps
where the state is kept every n: the input projections and the transposition before, the slopes
before the gradient's loop, and the products of dz after it.

Elsewhere, under `vmap` of weights, and for derivatives beyond the first, the schedule on XLA runs
(`rnnattn.recurrent.chunked`). Both leave the same for the gradient: y with c of every step, or the
state before every n steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnnattn.checks import those_that_hold
from rnnattn.dispatch import dispatched, gpu_capability
from rnnattn.precision import accumulator
from rnnattn.recurrent.chunked import scan_chunks, steps_apart
from rnnattn.recurrent.elsewhere import (
    backward_on_xla,
    backward_over_axis,
    forward_on_xla,
    forward_over_axis,
)
from rnnattn.recurrent.equations import (
    LSTMParams,
    LSTMState,
    Slopes,
    Variant,
    dot,
    halve_params,
    select,
)
from rnnattn.recurrent.problem import Schedule, Trace

_WIDTHS = (64, 128, 256)
_HOPPER = (9, 0)
_MEASURED_ROWS = 128


def unserved(params, x, variant):
    """What of a call the kernels cannot serve."""
    H, dtype = params.w_h.shape[1] // 4, jnp.result_type(x)
    sizes = (*x.shape, *params.w_h.shape)
    reasons = {
        f"the dtype {dtype.name}": dtype not in (jnp.bfloat16, jnp.float16),
        f"the hidden width {H} (64, 128 and 256 can be)": H not in _WIDTHS,
        "peephole weights": params.peephole is not None,
        "a projection": params.projection is not None,
        "`clip` or `coupled`": variant != Variant(),
        "symbolic shapes": not all(isinstance(n, int) for n in sizes),
        "an array without elements": 0 in sizes,
        "a GPU that is not of the Hopper generation": gpu_capability() not in ((), _HOPPER),
    }
    return those_that_hold(reasons)


def unchosen(params, x, variant, time_major):
    """What of a call nobody has measured on a device: benchmarks/README.md."""
    B = math.prod(x.shape[1:-1] if time_major else x.shape[:-2])
    reasons = {
        "jax before 0.11": jax.__version_info__ < (0, 11),
        f"a batch of {B}": isinstance(B, int) and B > _MEASURED_ROWS,
    }
    return unserved(params, x, variant) + those_that_hold(reasons)


def _without_gates(options):
    """The gates are cheaper made again, by one product of the whole sequence, than written."""
    return options._replace(residuals="states") if options.residuals == "gates" else options


# ---- by the kernels ---------------------------------------------------------------------------


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
    return LSTMState(_rows(h_last, B), _rows(c_last, B)), Trace(y, _rows(c, B) if keeps else None)


def _run_back(options, params, halved, start, steps, trace, dy, dstate):
    """The gradients of params, in the accumulator's dtype, state and x, of consecutive steps."""
    B, dtype = dy.shape[1], steps.x.dtype
    xh, _, _, slopes, _ = steps_apart(options, halved, steps, trace, start)
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
    dw = jnp.tensordot(xh, dz, ((0, 1), (0, 1)), preferred_element_type=wide)
    dw_x, dw_h = jnp.split(dw, [steps.x.shape[-1]])
    db = jnp.sum(dz.astype(wide), (0, 1))
    return LSTMParams(dw_x, dw_h, db), dstate, dot(dz, params.w_x.T).astype(dtype)


def _length(options, T):
    """The steps of a chunk: all, or those between two states that are kept."""
    return min(options.residuals, T) if isinstance(options.residuals, int) else T


def _forward_by_kernel(static, params, state, steps):
    options, keeps = static
    chunked, halved = isinstance(options.residuals, int), halve_params(params)

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _run(options, keeps and not chunked, halved, state, steps)
        return after, (trace, state)

    length = _length(options, steps.x.shape[0]) if keeps else steps.x.shape[0]
    final, (trace, starts) = scan_chunks(chunk, state, (steps,), (), length, options.reverse)
    return final, trace._replace(starts=starts) if keeps and chunked else trace


def _backward_by_kernel(options, params, state, steps, trace, cotangents):
    dy, dstate = cotangents
    wide, halved = accumulator(steps.x.dtype), halve_params(params)

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
    length = _length(options, steps.x.shape[0])
    (dparams, dstate), (dx, _) = scan_chunks(
        chunk, carry, per_step, starts, length, not options.reverse
    )
    dparams = jax.tree.map(lambda d, like: d.astype(like.dtype), dparams, params)
    return dparams, LSTMState(dstate.h.astype(steps.x.dtype), dstate.c), dx


# ---- where it runs ----------------------------------------------------------------------------


def _forward_results(static, params, state, steps):
    options, keeps = static
    (T, B, _), H = steps.x.shape, params.w_h.shape[0]
    of: Any = jax.ShapeDtypeStruct
    narrow, wide = steps.x.dtype, accumulator(steps.x.dtype)
    states = lambda *sizes: LSTMState(of((*sizes, B, H), narrow), of((*sizes, B, H), wide))
    chunked = isinstance(options.residuals, int)
    c = of((T, B, H), wide) if keeps and not chunked else None
    starts = states(-(-T // _length(options, T))) if keeps and chunked else None
    return states(), Trace(of((T, B, H), narrow), c, None, starts)


def _backward_results(options, params, state, steps, *_):
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(like, (params, state, steps.x))


def _schedule(name, forward_there, backward_there, *, exported):
    """By these two on one CUDA device."""

    def _without_gates(options):
    """The gates are cheaper made again, by one product of the whole sequence, than written."""
    return options._replace(residuals="states") if options.residuals == "gates" else options


# ---- by the kernels ---------------------------------------------------------------------------


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
    return LSTMState(_rows(h_last, B), _rows(c_last, B)), Trace(y, _rows(c, B) if keeps else None)


def _run_back(options, params, halved, start, steps, trace, dy, dstate):
    """The gradients of params, in the accumulator's dtype, state and x, of consecutive steps."""
    B, dtype = dy.shape[1], steps.x.dtype
    xh, _, _, slopes, _ = steps_apart(options, halved, steps, trace, start)
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
    dw = jnp.tensordot(xh, dz, ((0, 1), (0, 1)), preferred_element_type=wide)
    dw_x, dw_h = jnp.split(dw, [steps.x.shape[-1]])
    db = jnp.sum(dz.astype(wide), (0, 1))
    return LSTMParams(dw_x, dw_h, db), dstate, dot(dz, params.w_x.T).astype(dtype)


def _length(options, T):
    """The steps of a chunk: all, or those between two states that are kept."""
    return min(options.residuals, T) if isinstance(options.residuals, int) else T


def _forward_by_kernel(static, params, state, steps):
    options, keeps = static
    chunked, halved = isinstance(options.residuals, int), halve_params(params)

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _run(options, keeps and not chunked, halved, state, steps)
        return after, (trace, state)

    length = _length(options, steps.x.shape[0]) if keeps else steps.x.shape[0]
    final, (trace, starts) = scan_chunks(chunk, state, (steps,), (), length, options.reverse)
    return final, trace._replace(starts=starts) if keeps and chunked else trace


def _backward_by_kernel(options, params, state, steps, trace, cotangents):
    dy, dstate = cotangents
    wide, halved = accumulator(steps.x.dtype), halve_params(params)

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
    length = _length(options, steps.x.shape[0])
    (dparams, dstate), (dx, _) = scan_chunks(
        chunk, carry, per_step, starts, length, not options.reverse
    )
    dparams = jax.tree.map(lambda d, like: d.astype(like.dtype), dparams, params)
    return dparams, LSTMState(dstate.h.astype(steps.x.dtype), dstate.c), dx


# ---- where it runs ----------------------------------------------------------------------------


def _forward_results(static, params, state, steps):
    options, keeps = static
    (T, B, _), H = steps.x.shape, params.w_h.shape[0]
    of: Any = jax.ShapeDtypeStruct
    narrow, wide = steps.x.dtype, accumulator(steps.x.dtype)
    states = lambda *sizes: LSTMState(of((*sizes, B, H), narrow), of((*sizes, B, H), wide))
    chunked = isinstance(options.residuals, int)
    c = of((T, B, H), wide) if keeps and not chunked else None
    starts = states(-(-T // _length(options, T))) if keeps and chunked else None
    return states(), Trace(of((T, B, H), narrow), c, None, starts)


def _backward_results(options, params, state, steps, *_):
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(like, (params, state, steps.x))


def _schedule(name, forward_there, backward_there, *, exported):
    """By these two on one CUDA device."""

    def forward(options, keeps, params, state, steps):
        return forward_half((_without_gates(options), keeps), params, state, steps)

    def backward(options, params, state, steps, trace, cotangents):
        return backward_half(
            _without_gates(options), params, state, steps, trace, cotangents
        )

    forward_half = dispatched(
        f"rnnattn_lstm_{name}",
        forward_on_xla,
        {"cuda": forward_there},
        _forward_results,
        forward_over_axis(forward, forward_on_xla),
        exported=exported,
    )
    backward_half = dispatched(
        f"rnnattn_lstm_{name}_gradient",
        backward_on_xla,
        {"cuda": backward_there},
        _backward_results,
        backward_over_axis(backward_on_xla),
        exported=exported,
    )
    return Schedule(forward, backward)


def _where_hopper(by_kernel, on_xla):
    """`by_kernel` on a GPU that has its instructions."""

    def half(*arguments):
        return (by_kernel if gpu_capability() == _HOPPER else on_xla)(*arguments)

    return half


# Who asks for the kernels gets them in exported programs, too.
PALLAS = _schedule("pallas", _forward_by_kernel, _backward_by_kernel, exported=True)

# The choice where nobody asks.
WHERE_HOPPER = _schedule(
    "pallas_where_hopper",
    _where_hopper(_forward_by_kernel, forward_on_xla),
    _where_hopper(_backward_by_kernel, backward_on_xla),
    exported=False,
)
