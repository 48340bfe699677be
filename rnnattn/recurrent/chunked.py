"""The schedule of the LSTM on XLA: chunks of steps.

Time-major. A chunk's input projections are one matrix product before its steps and its weight
gradients one after them, where JAX's own differentiation of a scan makes one for each step. All
that is not sequential, the pre-activations and the local derivatives, is computed for a whole chunk
at once in the backward pass; only dh and dc go step by step. On a CPU a chunk is short enough for
its buffers to stay in cache; elsewhere, where a loop costs more than what is in it, a chunk is all
of the sequence, if memory allows, and a turn of a loop several steps (`Sizes`).

    forward   per chunk: x w_x + b             per step: h₋ w_h, the cell
    backward  per chunk: z, the slopes         per step: dz, dz w_hᵀ
              per chunk: dw_x, dw_h, db, dx

This module holds no algebra of its own: see `rnnattn.recurrent.equations`.

Axes: T time, B batch, D input width, H hidden width, R width of h.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rnnattn.precision import accumulator
from rnnattn.recurrent.equations import (
    LSTMParams,
    LSTMState,
    advance,
    cell_gradient,
    dot,
    halve_params,
    peephole_gradient,
    peephole_terms,
    select,
    slopes_of,
)
from rnnattn.recurrent.problem import Schedule, Trace

_FEW_ROWS = 8  # on a CPU, a step of fewer rows costs no more than the loop around it


class Sizes(NamedTuple):
    """How time is cut where a program runs."""

    chunk_bytes: int  # of the pre-activations of a chunk
    chunk_steps: int | None  # of a chunk, at most
    turn: int  # steps in one turn of a loop
    turn_of_few: int  # the same of the backward loop, for few rows
    merged_bytes: int  # weights up to this size are worth one product for x and h together


# Measured: benchmarks/README.md, "How the schedule is chosen".
ON_CPU = Sizes(4 * 2**20, 512, 1, 4, 2**20)
ELSEWHERE = Sizes(128 * 2**20, None, 8, 8, 0)


class _WeightGradient(NamedTuple):
    """The weight gradients as they grow, with [w_x; w_h] as one, w (D + R, 4H)."""

    w: Array
    b: Array
    peephole: Array | None
    projection: Array | None


def _outer(x, dz):
    """Σ xᵀ dz over time and batch, without one axis made of both: B may lie on several devices."""
    return jnp.tensordot(x.astype(dz.dtype), dz, ((0, 1), (0, 1)))


def chunk_length(sizes, residuals, steps, H):
    """The steps of a chunk: what `residuals` says, or what fills `chunk_bytes`.

    A divisor of T if there is one among those not much smaller. All of T where that is symbolic.
    """
    T, B, _ = steps.x.shape
    if not isinstance(T, int):
        return T
    T = max(T, 1)
    if isinstance(residuals, int):
        return min(residuals, T)
    rows = B if isinstance(B, int) else _FEW_ROWS
    row = rows * 4 * H * accumulator(steps.x.dtype).itemsize
    most = min(max(sizes.chunk_bytes // max(row, 1), 1), sizes.chunk_steps or T, T)
    return max(range((most + 1) // 2, most + 1), key=lambda n: (T % n == 0, n))


def scan_chunks(chunk, carry, per_step, per_chunk, length, reverse):
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


def _chunk_forward(sizes, options, halved, state, steps, keep):
    """Run the steps of one chunk; `keep` names what of the trace besides y is wanted."""
    x, w_x, w_h = select(steps.valid, steps.x, 0), halved.w_x, halved.w_h
    merged = not _few_rows(x) and w_x.nbytes + w_h.nbytes <= sizes.merged_bytes
    if merged:
        w = jnp.concatenate([w_x, w_h])
    else:
        x = dot(x, w_x) + halved.b[None, None]

    def step(state, inputs):
        x, valid, fresh = inputs
        if merged:
            preactivate = lambda h: dot(jnp.concatenate([x, h], axis=-1), w) + halved.b[None]
        else:
            preactivate = lambda h: x + dot(h, w_h)
        state, a = advance(halved, preactivate, state, valid, fresh, options.variant)
        y = select(valid, state.h, 0)
        return state, Trace(y, state.c if "c" in keep else None, a if "a" in keep else None)

    xs = (x, steps.valid, steps.fresh)
    return lax.scan(step, state, xs, reverse=options.reverse, unroll=_unroll(sizes.turn, x))


def _chunk_backward(sizes, options, params, halved, carry, steps, dy, trace, start):
    """The gradient of one chunk: (dparams, dstate) grows by it; dx is returned."""
    dparams, dstate = carry
    dtype = dstate.c.dtype
    peephole, projection = params.peephole, params.projection

    if trace.c is None:
        _, trace = _chunk_forward(sizes, options, halved, start, steps, keep="ca")
    xh, c, c_prev, slopes, m = steps_apart(options, halved, steps, trace, start)

    w_x, w_h = params.w_x.astype(dtype), params.w_h.astype(dtype)
    if projection is not None:
        projection = projection.astype(dtype)
    if peephole is not None:
        peephole = peephole.astype(dtype)

    def step(after, inputs):
        dy, slopes, valid, fresh = inputs
        dh = select(valid, after.h + dy, 0)
        dc = select(valid, after.c, 0)
        dm = dh if projection is None else dh @ projection.T
        dz, dc = cell_gradient(slopes, dm, dc, peephole)
        before = LSTMState(dz @ w_h.T, dc)
        if fresh is not None:
            before = LSTMState(*(select(fresh, 0, d) for d in before))
        before = LSTMState(*(select(valid, b, a) for a, b in zip(after, before, strict=True)))
        return before, (dz, None if projection is None else dh)

    xs = (dy.astype(dtype), slopes, steps.valid, steps.fresh)
    back, turn = not options.reverse, sizes.turn_of_few if _few_rows(xh) else sizes.turn
    dstate, (dz, dh) = lax.scan(step, dstate, xs, reverse=back, unroll=_unroll(turn, xh))

    grown = _WeightGradient(
        w=dparams.w + _outer(xh, dz),
        b=dparams.b + jnp.sum(dz, (0, 1)),
        peephole=dparams.peephole,
        projection=dparams.projection,
    )
    if peephole is not None:
        dp = peephole_gradient(dz, c_prev, c)
        grown = grown._replace(peephole=dparams.peephole + dp)
    if projection is not None:
        grown = grown._replace(projection=dparams.projection + _outer(m, dh))
    return (grown, dstate), (dz @ w_x.T).astype(xh.dtype)


def steps_apart(options, halved, steps, trace, start):
    """All that each step's gradient needs besides what comes back: [x, h₋], c, c₋, slopes, m."""
    xh, c, c_prev = states_of_steps(options, steps, trace, start)
    if trace.a is not None:
        a = select(steps.valid, trace.a, 0)
    else:
        a = preactivations(halved, xh, c, c_prev)
    return xh, c, c_prev, *slopes_of(a, c_prev, c, options.variant)


def states_of_steps(options, steps, trace, start):
    """[x, h₋], c and c₋ of every step."""
    h_prev = _states_before(select(steps.valid, trace.y, start.h[None]), start.h, options.reverse)
    c_prev = _states_before(trace.c, start.c, options.reverse)
    if steps.fresh is not None:
        h_prev, c_prev = select(steps.fresh, 0, h_prev), select(steps.fresh, 0, c_prev)
    # NaN in a step that does not count meets a dz of zero
    x, c, h_prev, c_prev = (select(steps.valid, z, 0) for z in (steps.x, trace.c, h_prev, c_prev))
    return jnp.concatenate([x, h_prev], axis=-1), c, c_prev


def preactivations(halved, xh, c, c_prev):
    """a of every step, which needs no loop once the states are known."""
    a = dot(xh, jnp.concatenate([halved.w_x, halved.w_h])) + halved.b[None, None]
    if halved.peephole is not None:
        a = a + peephole_terms(halved.peephole, c_prev, c)
    return a


def _unroll(turn, x):
    """Steps in one turn of a loop, as `lax.scan` wants it."""
    T = x.shape[0]
    return max(min(turn, T), 1) if isinstance(T, int) else 1


def _few_rows(x):
    B = x.shape[1]
    return isinstance(B, int) and B < _FEW_ROWS


def _states_before(after, start, reverse):
    """The state before each step of a chunk from the states after them."""
    parts = [after[1:], start[None]] if reverse else [start[None], after[:-1]]
    return jnp.concatenate(parts)


def _starts(options, length, state, steps, trace):
    """The state before each chunk. A row that has not begun holds its own."""
    T = trace.y.shape[0]
    first, others = (length if options.reverse else length - 1), (T - 1) // length
    before = lambda a: a[first::length][:others]
    h = before(trace.y)
    if steps.valid is not None:
        h = select(before(steps.valid), h, state.h[None])

    def join(start, rest):
        return jnp.concatenate([rest, start[None]] if options.reverse else [start[None], rest])

    return LSTMState(join(state.h, h), join(state.c, before(trace.c)))


def forward_in(sizes, options, keeps, params, state, steps):
    """The final state and the trace, in chunks and turns of these sizes."""
    keep = {"gates": "ca", "states": "c"}.get(options.residuals, "") if keeps else ""
    halved = halve_params(params)

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _chunk_forward(sizes, options, halved, state, steps, keep)
        return after, (trace, state)

    length = chunk_length(sizes, options.residuals, steps, params.w_h.shape[1] // 4)
    final, (trace, starts) = scan_chunks(chunk, state, (steps,), (), length, options.reverse)
    kept = keeps and isinstance(options.residuals, int)  # else chunks differ from place to place
    return final, trace._replace(starts=starts if kept else None)


def backward_in(sizes, options, params, state, steps, trace, cotangents):
    """L3 to L8, chunk by chunk against the direction of running; see `cell_gradient`."""
    dy, dstate = cotangents
    dtype = accumulator(steps.x.dtype)
    halved = halve_params(params)
    length = chunk_length(sizes, options.residuals, steps, params.w_h.shape[1] // 4)
    starts = trace.starts or _starts(options, length, state, steps, trace)

    def chunk(carry, inputs):
        (steps, dy, trace), start = inputs
        carry, dx = _chunk_backward(sizes, options, params, halved, carry, steps, dy, trace, start)
        return carry, (dx, ())

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, dtype), params)
    dparams = _WeightGradient(jnp.concatenate([zeros.w_x, zeros.w_h]), *zeros[2:])
    carry = (dparams, jax.tree.map(lambda d: d.astype(dtype), dstate))
    (dparams, dstate), (dx, _) = scan_chunks(
        chunk,
        carry,
        (steps, dy, trace._replace(starts=None)),
        starts,
        length,
        not options.reverse,
    )
    dw_x, dw_h = jnp.split(dparams.w, [steps.x.shape[-1]])
    gradient = LSTMParams(dw_x, dw_h, *dparams[1:])
    gradient = jax.tree.map(lambda d, like: d.astype(like.dtype), gradient, params)
    dstate = LSTMState(dstate.h.astype(steps.x.dtype), dstate.c)
    return gradient, dstate, dx


def _by_place(half, *how):
    """A function of arrays: `half` in the sizes of the place where the program runs."""
    cpu, default = (partial(half, sizes, *how) for sizes in (ON_CPU, ELSEWHERE))
    return partial(lax.platform_dependent, cpu=cpu, default=default)


def forward(options, keeps, params, state, steps):
    """The final state and the trace."""
    return _by_place(forward_in, options, keeps)(params, state, steps)


def backward(options, params, state, steps, trace, cotangents):
    """The gradients of params, state and x."""
    return _by_place(backward_in, options)(params, state, steps, trace, cotangents)


CHUNKED = Schedule(forward, backward)
