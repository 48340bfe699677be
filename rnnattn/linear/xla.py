"""The schedule of a linear recurrence on XLA: a loop on a CPU, an associative scan elsewhere.

On a CPU one loop reads p of a step, makes a and b of it and writes h in place, all from arrays as
they lie in memory: each number is read and written once, where the associative scan goes through
all of them ⌈log₂ T⌉ times. Elsewhere a loop costs more than what is in it. Derivatives of both
halves are those of the associative scan: that of a loop in place would make a whole array for each
step. Measured: benchmarks/README.md, "Units without a product in the loop".

This module holds no algebra of its own: see `rnnattn.linear.equations`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rnnattn.linear.equations import advance, blocks_of, inputs_of
from rnnattn.linear.problem import Schedule, found, running
from rnnattn.steps import select


def _column(mask):
    return None if mask is None else mask[..., None]


def _dropped(fresh, h):
    """0 where an episode begins."""
    return h if fresh is None else select(fresh, 0, h)


# ---- step by step -----------------------------------------------------------------------------


def _over_time(reverse, step, carry, T):
    """The carry after `step(t, carry)` for every t."""
    index = (lambda n: T - 1 - n) if reverse else (lambda n: n)
    return lax.fori_loop(0, T, lambda n, carry: step(index(n), carry), carry)


def _as_bits(x):
    """16-bit floats as integers: of floats, XLA widens the whole array where a step is written."""
    narrow = x is not None and jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return lax.bitcast_convert_type(x, jnp.uint16) if narrow else x


def _as_numbers(x, like):
    return x if x.dtype == like.dtype else lax.bitcast_convert_type(x, like.dtype)


def _reader(options, tree):
    """A function of t: step t of each array."""
    bits = jax.tree.map(_as_bits, tree)
    at = partial(lax.dynamic_index_in_dim, axis=options.time_axis, keepdims=False)
    return lambda t: jax.tree.map(lambda x, like: _as_numbers(at(x, t), like), bits, tree)


def _written(options, bits, value, like, t):
    """The array, as bits, with these numbers in step t."""
    value = _as_bits(value.astype(like.dtype))
    return lax.dynamic_update_index_in_dim(bits, value, t, options.time_axis)


def forward_by_steps(options, weights, h0, steps):
    _, H = h0.shape
    T = steps.inputs[0].shape[options.time_axis]
    rows = [w[None] for w in weights]
    read = _reader(options, steps)
    like = jnp.zeros_like(steps.inputs[0], shape=(*steps.inputs[0].shape[:-1], H))

    def step(t, carry):
        h, h_all = carry
        inputs, valid, fresh = read(t)
        a, b = options.unit.coefficients(blocks_of(inputs, H), rows, _column(fresh))
        h = select(valid, advance(a, _dropped(fresh, h), b), h)
        return h, _written(options, h_all, h, like, t)

    last, h = _over_time(options.reverse, step, (h0, _as_bits(like)), T)
    return _as_numbers(h, like), last


def backward_by_steps(options, weights, h0, steps, h, cotangents):
    _, H = h0.shape
    dh_all, dlast = cotangents
    T = h.shape[options.time_axis]
    rows = [w[None] for w in weights]
    first, before = (T - 1, 1) if options.reverse else (0, -1)
    read, read_h = _reader(options, (steps, dh_all)), _reader(options, h)

    def step(t, carry):
        dh, dweights, dinputs = carry
        (inputs, valid, fresh), dh_t = read(t)
        h_prev = jnp.where(t == first, h0, read_h(t + before).astype(h0.dtype))
        h_prev = _dropped(fresh, h_prev)
        p = [select(valid, x, 0) for x in blocks_of(inputs, H)]
        h_prev = select(valid, h_prev, 0)
        dh_t = select(valid, dh + dh_t.astype(dh.dtype), 0)
        dp, dw, dh_prev = options.unit.gradient(p, rows, _column(fresh), h_prev, dh_t)
        dweights = [total + d for total, d in zip(dweights, dw, strict=True)]
        write = lambda bits, value, like: _written(options, bits, value, like, t)
        dinputs = jax.tree.map(write, dinputs, inputs_of(dp, inputs), inputs)
        return select(valid, _dropped(fresh, dh_prev), dh), dweights, dinputs

    carry = (
        dlast,
        [jnp.zeros_like(h0) for _ in weights],
        jax.tree.map(lambda x: _as_bits(jnp.zeros_like(x)), steps.inputs),
    )
    dh0, dweights, dinputs = _over_time(not options.reverse, step, carry, T)
    dinputs = jax.tree.map(_as_numbers, dinputs, steps.inputs)
    return _of_rows(dweights, weights, h0), dh0, dinputs


def _of_rows(dw, weights, h0):
    """The gradients of the weights, (B, H) each, as one array (B, n, H)."""
    return jnp.stack(dw, 1) if dw else jnp.zeros_like(h0, shape=(h0.shape[0], *weights.shape))


# ---- all steps at once ------------------------------------------------------------------------


def _recurrence(axis, reverse, a, b, cut, start):
    """h of every step, h = a ⊙ h₋ + b, and h = b where it is `cut` off what was before."""

    def after(one, two):
        """Two runs of steps as one."""
        a, b = one[0] * two[0], advance(two[0], one[1], two[1])
        if cut is None:
            return a, b
        return a, jnp.where(two[2], two[1], b), one[2] | two[2]

    steps, nothing = ((a, b), (1, 0)) if cut is None else ((a, b, cut[..., None]), (1, 0, False))
    a, b, *cut_off = running(after, steps, nothing, axis, reverse)
    h = advance(a, jnp.expand_dims(start, axis), b)
    return jnp.where(cut_off[0], b, h) if cut_off else h


def _coefficients(options, weights, H, steps):
    """p and w of all steps, and a and b, with which a masked step holds h."""
    p = [select(steps.valid, x, 0) for x in blocks_of(steps.inputs, H)]
    rows = [w[None, None] for w in weights]
    a, b = options.unit.coefficients(p, rows, _column(steps.fresh))
    return p, rows, select(steps.valid, a, 1), select(steps.valid, b, 0)


def _last(options, reverse, x):
    axis = options.time_axis
    return lax.index_in_dim(x, 0 if reverse else x.shape[axis] - 1, axis, keepdims=False)


def forward_at_once(options, weights, h0, steps):
    _, _, a, b = _coefficients(options, weights, h0.shape[-1], steps)
    h = _recurrence(options.time_axis, options.reverse, a, b, steps.fresh, h0)
    return h.astype(steps.inputs[0].dtype), _last(options, options.reverse, h)


def backward_at_once(options, weights, h0, steps, h, cotangents):
    """R5: dh by the recurrence in reverse, where a step finds a of the one that ran after it."""
    (_, H), (dh_all, dlast), (_, valid, fresh) = h0.shape, cotangents, steps
    axis, back = options.time_axis, not options.reverse
    p, rows, a, _ = _coefficients(options, weights, H, steps)
    start = jnp.expand_dims(h0, axis)
    a_after = found(a, jnp.ones_like(start), axis, back)
    never = jnp.zeros_like(start, bool, shape=start.shape[:-1])
    cut = None if fresh is None else found(fresh, never, axis, back)
    dh_all = select(valid, dh_all.astype(h0.dtype), 0)
    dh = _recurrence(axis, back, a_after, dh_all, cut, dlast)
    dh0 = _last(options, back, _dropped(fresh, a * dh))
    h_prev = _dropped(fresh, found(h.astype(h0.dtype), start, axis, options.reverse))
    h_prev, dh = (select(valid, x, 0) for x in (h_prev, dh))
    dp, dw, _ = options.unit.gradient(p, rows, _column(fresh), h_prev, dh)
    return _of_rows([jnp.sum(d, axis) for d in dw], weights, h0), dh0, inputs_of(dp, steps.inputs)


# ---- where the program runs -------------------------------------------------------------------


def _by_place(by_steps, at_once):
    """A half of the schedule: one of these two, with the derivative of the second."""

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def half(options, *arrays):
        cpu, default = (partial(f, options) for f in (by_steps, at_once))
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)

    @half.defjvp
    def half_jvp(options, primals, tangents):
        return jax.jvp(partial(at_once, options), primals, tangents)

    return half


forward = _by_place(forward_by_steps, forward_at_once)
backward = _by_place(backward_by_steps, backward_at_once)
XLA = Schedule(forward, backward)
