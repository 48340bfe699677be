"""The schedule of recurrent units on XLA: chunks of steps.

Time-major. What a chunk's inputs add is one matrix product before its steps and its weight
gradients one after them, where JAX's own differentiation of a scan makes one for each step. All
that is not sequential, the pre-activations and the local derivatives, is computed for a whole chunk
at once in the backward pass; only the cotangents of the state go step by step. On a CPU a chunk is
short enough for its buffers to stay in cache; elsewhere, where a loop costs more than what is in
it, a chunk is all of the sequence, if memory allows, and a turn of a loop several steps (`Sizes`).

    forward   per chunk: inputs                per step: step
    backward  per chunk: slopes                per step: step_gradient
              per chunk: gradient

This module holds no algebra of its own: see `rnnattn.recurrent.unit`.

Axes: T time, B batch, D input width, H hidden width, R width of h.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rnnattn.precision import accumulator
from rnnattn.recurrent.noise import (
    draw_steps,
    of_candidate,
    read,
    read_gradient,
    zoneout_gradient,
)
from rnnattn.recurrent.problem import Schedule, Trace
from rnnattn.recurrent.unit import advance, select_each, types_of_step, widened
from rnnattn.steps import select

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


def chunk_length(sizes, options, params, steps):
    """The steps of a chunk: what `residuals` says, or what fills `chunk_bytes`.

    A divisor of T if there is one among those not much smaller. All of T where that is symbolic.
    """
    T, B, _ = steps.x.shape
    if not isinstance(T, int):
        return T
    T = max(T, 1)
    if isinstance(options.residuals, int):
        return min(options.residuals, T)
    rows = B if isinstance(B, int) else _FEW_ROWS
    _, kept = types_of_step(options.unit, params, rows, steps.x.dtype)
    row = kept.size * kept.dtype.itemsize
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


def _chunk_forward(sizes, options, weights, state, steps, reads, keep):
    """Run the steps of one chunk; `keep` names what of the trace besides y is wanted."""
    unit, noise = options.unit, options.noise
    x = select(steps.valid, steps.x, 0)
    if not _few_rows(x) and _bytes(weights) <= sizes.merged_bytes:
        weights = unit.merged(weights)

    def step(state, inputs):
        u, valid, fresh, drawn = inputs
        drawn = drawn._replace(reads=reads)
        state, kept = advance(unit, weights, u, state, valid, fresh, noise, drawn)
        y, rest = select(valid, state[0], 0), state[1:]
        return state, Trace(y, rest if "rest" in keep else None, kept if "kept" in keep else None)

    drawn = draw_steps(noise, steps.keys, state)
    xs = (unit.inputs(weights, x), steps.valid, steps.fresh, drawn)
    return lax.scan(step, state, xs, reverse=options.reverse, unroll=_unroll(sizes.turn, x))


def _chunk_backward(sizes, options, params, weights, carry, steps, reads, outputs, trace, start):
    """The gradient of one chunk: (dparams, dstate) grows by it; dx is returned."""
    dparams, dstate = carry
    unit, noise = options.unit, options.noise
    if trace.y is None:
        _, trace = _chunk_forward(sizes, options, weights, start, steps, reads, ("rest", "kept"))
    x, before, after = states_of_steps(options, steps, trace, start)
    drawn, kept = draw_steps(noise, steps.keys, start), kept_of_steps(steps, trace)
    h, e = read(noise, reads, before.h), of_candidate(noise, drawn.candidate, accumulator(x.dtype))
    if noise.zoneout:  # what was held is not what the step made
        after, kept = unit.step(weights, unit.inputs(weights, x), h, before, e)
    slopes, seen = unit.slopes(weights, x, h, before, after, kept, e)

    def step(dafter, inputs):
        outputs, slopes, valid, fresh, zoned = inputs
        given = select_each(valid, _with_outputs(dafter, outputs), 0)
        given, dheld = zoneout_gradient(noise, zoned, given)
        dbefore, dh, dz = unit.step_gradient(params, slopes, given)
        dbefore = dbefore._replace(h=dbefore.h + read_gradient(noise, reads, dh))
        if dheld is not None:
            dbefore = jax.tree.map(jnp.add, dbefore, dheld)
        if fresh is not None:
            dbefore = select_each(~fresh, dbefore, 0)
        return select_each(valid, dbefore, dafter), dz

    xs = (widened(outputs), slopes, steps.valid, steps.fresh, drawn.zoned)
    back, turn = not options.reverse, sizes.turn_of_few if _few_rows(x) else sizes.turn
    dstate, dz = lax.scan(step, dstate, xs, reverse=back, unroll=_unroll(turn, x))

    more, dx = unit.gradient(params, x, h, before, after, seen, dz)
    return (jax.tree.map(jnp.add, dparams, more), dstate), dx


def _with_outputs(dafter, outputs):
    """The cotangent of the state after a step: what comes back through time and from outside."""
    h = dafter[0] + outputs.y
    rest = dafter[1:]
    if outputs.rest is not None:
        rest = jax.tree.map(jnp.add, rest, outputs.rest)
    return type(dafter)(h, *rest)


def states_of_steps(options, steps, trace, start):
    """x, and the state before and after each step."""
    h = select(steps.valid, trace.y, start[0][None])
    after = type(start)(h, *trace.rest)
    before = type(start)(
        *(_states_before(a, s, options.reverse) for a, s in zip(after, start, strict=True))
    )
    if steps.fresh is not None:
        before = select_each(~steps.fresh, before, 0)
    # NaN in a step that does not count meets a cotangent of zero
    return [select_each(steps.valid, s, 0) for s in (steps.x, before, after)]


def kept_of_steps(steps, trace):
    """What the unit's steps gave to keep, if it was kept."""
    return None if trace.kept is None else select(steps.valid, trace.kept, 0)


def _bytes(weights):
    return sum(w.nbytes for w in jax.tree.leaves(weights))


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


def states_between(options, length, state, steps, trace):
    """The state before each chunk, of those after each step. A row not begun holds its own."""
    T = trace.y.shape[0]
    first, others = (length if options.reverse else length - 1), (T - 1) // length
    before = lambda a: a[first::length][:others]
    h = before(trace.y)
    if steps.valid is not None:
        h = select(before(steps.valid), h, state[0][None])

    def join(start, rest):
        return jnp.concatenate([rest, start[None]] if options.reverse else [start[None], rest])

    return jax.tree.map(join, state, type(state)(h, *map(before, trace.rest)))


def forward_in(sizes, options, keeps, params, state, steps):
    """The final state and the trace, in chunks and turns of these sizes."""
    keep = {"gates": ("rest", "kept"), "states": ("rest",)}.get(options.residuals, ())
    keep = keep if keeps else ()
    keep = (*keep, "rest") if options.every_state else keep
    if options.noise.zoneout:  # then the gradient makes each step again, from the states
        keep = tuple(name for name in keep if name != "kept")
    weights = options.unit.prepare(params)
    reads, steps = steps.reads, steps._replace(reads=None)

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _chunk_forward(sizes, options, weights, state, steps, reads, keep)
        return after, (trace, state)

    length = chunk_length(sizes, options, params, steps)
    final, (trace, starts) = scan_chunks(chunk, state, (steps,), (), length, options.reverse)
    kept = keeps and isinstance(options.residuals, int)  # else chunks differ from place to place
    return final, trace._replace(starts=starts if kept else None)


def backward_in(sizes, options, params, state, steps, trace, cotangents):
    """The gradients, chunk by chunk against the direction of running."""
    outputs, dstate = cotangents
    weights, wide = options.unit.prepare(params), widened(params)
    length = chunk_length(sizes, options, params, steps)
    starts = trace.starts or states_between(options, length, state, steps, trace)
    reads, steps = steps.reads, steps._replace(reads=None)

    def chunk(carry, inputs):
        (steps, outputs, trace), start = inputs
        carry, dx = _chunk_backward(
            sizes, options, wide, weights, carry, steps, reads, outputs, trace, start
        )
        return carry, (dx, ())

    carry = (jax.tree.map(jnp.zeros_like, wide), widened(dstate))
    (dparams, dstate), (dx, _) = scan_chunks(
        chunk,
        carry,
        (steps, outputs, trace._replace(starts=None)),
        starts,
        length,
        not options.reverse,
    )
    as_like = lambda d, like: d.astype(like.dtype)
    return jax.tree.map(as_like, dparams, params), jax.tree.map(as_like, dstate, state), dx


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
