"""The schedule of the LSTM on XLA: chunks of steps.

Time-major. A chunk's input projections are one matrix product before its steps and its weight
gradients one after them, where JAX's own differentiation of a scan makes one for each step. All
that is not sequential, the pre-activations and the local derivatives, is computed for a whole chunk
at once in the backward pass; only dh and dc go step by step. A chunk is short enough for its
buffers to stay in cache.

    forward   per chunk: x w_x + b             per step: h₋ w_h, the cell
    backward  per chunk: z, the slopes         per step: dz, dz w_hᵀ
              per chunk: dw_x, dw_h, db, dx

This module holds no algebra of its own: see `rnnattn.cell`. Axes: T time, B batch, D input width,
H hidden width, R width of h.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rnnattn.cell import (
    LSTMParams,
    LSTMState,
    Variant,
    accumulator,
    advance,
    cell_gradient,
    dot,
    halve_params,
    peephole_gradient,
    peephole_terms,
    slopes_of,
    where,
)

_MERGED_BATCH = 8
_CHUNK_BYTES = 4 * 2**20  # measured: benchmarks/README.md, "The length of a chunk"


class Schedule(NamedTuple):
    reverse: bool = False
    residuals: Literal["gates", "states"] | int = "states"
    variant: Variant = Variant()


class Steps(NamedTuple):
    """What the steps read besides the state, each (T, B, …); None where a feature is not used."""

    x: Array
    valid: Array | None  # False past a row's length: the state is held, the output is zero
    fresh: Array | None  # True where the state is zeroed before the step


class _Trace(NamedTuple):
    """What the steps leave behind, each (T, B, …); None where it is recomputed."""

    y: Array | None
    c: Array | None
    a: Array | None


def _outer(x, dz):
    """Σ xᵀ dz over the leading axes."""
    return x.reshape(-1, x.shape[-1]).T.astype(dz.dtype) @ dz.reshape(-1, dz.shape[-1])


def _chunk_length(residuals, steps, H):
    """The steps of a chunk: what `residuals` says, or what fills `_CHUNK_BYTES`.

    No more than 512, and a divisor of T if there is one among those not much smaller.
    """
    T, B, _ = steps.x.shape
    if isinstance(residuals, int):
        return min(residuals, max(T, 1))
    row = B * 4 * H * accumulator(steps.x.dtype).itemsize
    most = min(max(_CHUNK_BYTES // max(row, 1), 1), 512, max(T, 1))
    return max(range((most + 1) // 2, most + 1), key=lambda n: (T % n == 0, n))


def _scan_chunks(chunk, carry, per_step, per_chunk, length, reverse):
    """Scan `chunk(carry, (per_step, per_chunk))`, which returns the same pair, over time.

    What is left of T after whole chunks is one shorter chunk at the end of the time axis.
    """
    T = per_step[0].x.shape[0]
    whole, rest = divmod(T, length)
    cut = whole * length
    split = lambda a: a[:cut].reshape(whole, length, *a.shape[1:])
    join = lambda a: a.reshape(cut, *a.shape[2:])
    body = (jax.tree.map(split, per_step), jax.tree.map(lambda a: a[:whole], per_chunk))
    if rest:
        tail = (jax.tree.map(lambda a: a[cut:], per_step), jax.tree.map(lambda a: a[-1], per_chunk))

    if rest and reverse:
        carry, (last_step, last_chunk) = chunk(carry, tail)
    carry, (per_step, per_chunk) = lax.scan(chunk, carry, body, reverse=reverse, unroll=whole == 1)
    per_step = jax.tree.map(join, per_step)
    if rest and not reverse:
        carry, (last_step, last_chunk) = chunk(carry, tail)
    if rest:
        append = lambda a, b: jnp.concatenate([a, b])
        per_step = jax.tree.map(append, per_step, last_step)
        per_chunk = jax.tree.map(lambda a, b: append(a, b[None]), per_chunk, last_chunk)
    return carry, (per_step, per_chunk)


def _chunk_forward(schedule, halved, state, steps, keep):
    """Run the steps of one chunk; `keep` names what of the trace besides y is wanted."""
    x = where(steps.valid, steps.x, 0)
    apart = x.shape[1] < _MERGED_BATCH
    if apart:
        x = dot(x, halved.w_x) + halved.b[None, None]
    else:
        w = jnp.concatenate([halved.w_x, halved.w_h])

    def step(state, inputs):
        x, valid, fresh = inputs
        if apart:
            preactivate = lambda h: x + dot(h, halved.w_h)
        else:
            preactivate = lambda h: dot(jnp.concatenate([x, h], axis=-1), w) + halved.b[None]
        state, a = advance(halved, preactivate, state, valid, fresh, schedule.variant)
        y = where(valid, state.h, 0)
        return state, _Trace(y, state.c if "c" in keep else None, a if "a" in keep else None)

    xs = (x, steps.valid, steps.fresh)
    return lax.scan(step, state, xs, reverse=schedule.reverse, unroll=x.shape[0] == 1)


def _chunk_backward(schedule, params, halved, carry, steps, dy, trace, start):
    """The gradient of one chunk: (dparams, dstate) grows by it; dx is returned."""
    dparams, dstate = carry
    dtype = dstate.c.dtype
    peephole, projection = params.peephole, params.projection
    x = where(steps.valid, steps.x, 0)

    if trace.c is None:
        _, trace = _chunk_forward(schedule, halved, start, steps, keep="ca")
    h_prev = _before(where(steps.valid, trace.y, start.h[None]), start.h, schedule.reverse)
    c_prev = _before(trace.c, start.c, schedule.reverse)
    if steps.fresh is not None:
        h_prev, c_prev = where(steps.fresh, 0, h_prev), where(steps.fresh, 0, c_prev)
    a = trace.a
    if a is None:
        a = dot(x, halved.w_x) + dot(h_prev, halved.w_h) + halved.b[None, None]
        if peephole is not None:
            a = a + peephole_terms(halved.peephole, c_prev, trace.c)
    slopes, m = slopes_of(a, c_prev, trace.c, schedule.variant)

    w_x, w_h = params.w_x.astype(dtype), params.w_h.astype(dtype)
    if projection is not None:
        projection = projection.astype(dtype)
    if peephole is not None:
        peephole = peephole.astype(dtype)

    def step(after, inputs):
        dy, slopes, valid, fresh = inputs
        dh = where(valid, after.h + dy, 0)
        dc = where(valid, after.c, 0)
        dm = dh if projection is None else dh @ projection.T
        dz, dc = cell_gradient(slopes, dm, dc, peephole)
        before = LSTMState(dz @ w_h.T, dc)
        if fresh is not None:
            before = LSTMState(*(where(fresh, 0, d) for d in before))
        before = LSTMState(*(where(valid, b, a) for a, b in zip(after, before, strict=True)))
        return before, (dz, None if projection is None else dh)

    xs = (dy.astype(dtype), slopes, steps.valid, steps.fresh)
    dstate, (dz, dh) = lax.scan(
        step, dstate, xs, reverse=not schedule.reverse, unroll=x.shape[0] == 1
    )

    grown = LSTMParams(
        w_x=dparams.w_x + _outer(x, dz),
        w_h=dparams.w_h + _outer(h_prev, dz),
        b=dparams.b + jnp.sum(dz, (0, 1)),
        peephole=None
        if peephole is None
        else dparams.peephole + peephole_gradient(dz, c_prev, trace.c),
        projection=None if projection is None else dparams.projection + _outer(m, dh),
    )
    return (grown, dstate), (dz @ w_x.T).astype(x.dtype)


def _before(after, start, reverse):
    """The state before each step of a chunk from the states after them."""
    parts = [after[1:], start[None]] if reverse else [start[None], after[:-1]]
    return jnp.concatenate(parts)


def _forward(schedule, params, state, steps):
    halved = halve_params(params)
    keep = {"gates": "ca", "states": "c"}.get(schedule.residuals, "")

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _chunk_forward(schedule, halved, state, steps, keep)
        return after, (trace, state)

    length = _chunk_length(schedule.residuals, steps, params.w_h.shape[1] // 4)
    state, (trace, starts) = _scan_chunks(chunk, state, (steps,), (), length, schedule.reverse)
    return state, trace, starts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sequence(schedule, params, state, steps):
    """(y, final state) of a time-major sequence."""
    state, trace, _ = _forward(schedule, params, state, steps)
    return trace.y, state


def _sequence_fwd(schedule, params, state, steps):
    final, trace, starts = _forward(schedule, params, state, steps)
    kept = _Trace(None, None, None) if isinstance(schedule.residuals, int) else trace
    return (trace.y, final), (params, steps, kept, starts)


def _sequence_bwd(schedule, residuals, cotangents):
    """L3 to L8, chunk by chunk against the direction of running; see `cell_gradient`."""
    params, steps, trace, starts = residuals
    dy, dstate = cotangents
    dtype = accumulator(steps.x.dtype)
    halved = halve_params(params)

    def chunk(carry, inputs):
        (steps, dy, trace), start = inputs
        carry, dx = _chunk_backward(schedule, params, halved, carry, steps, dy, trace, start)
        return carry, (dx, ())

    dparams = jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), params)
    carry = (dparams, jax.tree.map(lambda d: d.astype(dtype), dstate))
    length = _chunk_length(schedule.residuals, steps, params.w_h.shape[1] // 4)
    (dparams, dstate), (dx, _) = _scan_chunks(
        chunk, carry, (steps, dy, trace), starts, length, not schedule.reverse
    )
    cast = lambda d, like: d.astype(like.dtype)
    dparams = jax.tree.map(cast, dparams, params)
    dstate = LSTMState(dstate.h.astype(steps.x.dtype), dstate.c)
    return dparams, dstate, Steps(dx, None, None)


sequence.defvjp(_sequence_fwd, _sequence_bwd)
