"""The custom rule of a linear recurrence, which joins the two halves of a schedule."""

from functools import partial

import jax
import jax.numpy as jnp

from rnnattn.linear.problem import Steps, found, running
from rnnattn.steps import select


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sequence(schedule, options, params, x, h0, masks):
    """y, which is h of every step and zero in masked ones, and the last h, by a schedule.

    The masks are `valid` and `fresh`, as `Steps` has them.
    """
    results, _ = _sequence_fwd(schedule, options, params, x, h0, masks)
    return results


def _sequence_fwd(schedule, options, params, x, h0, masks):
    """Keeps the arguments, what the steps read and h; a and b are made again."""
    valid, fresh = masks
    inputs, weights = options.unit.project(params, x, valid)
    h, last = schedule.forward(options, weights, h0, Steps(inputs, valid, fresh))
    return (select(valid, h, 0), last), (params, x, h0, masks, inputs, weights, h)


def _sequence_bwd(schedule, options, residuals, cotangents):
    """R5 to R8: `rnnattn.linear.equations`; and the gradient of the products before the loop."""
    dparams, dx, dh0 = gradient_of_read(schedule, options, *residuals, cotangents)
    return dparams, dx, dh0, None


sequence.defvjp(_sequence_fwd, _sequence_bwd)


def gradient_of_read(schedule, options, params, x, h0, masks, *others):
    """The gradient of the steps that the loss reads, if resets set these apart from others.

    Nothing comes back to the others, but 0 × NaN is NaN: they are passed over like masked ones.
    """
    _, fresh = masks
    gradient = _gradient if fresh is None else _gradient_of_read
    return gradient(schedule, options, params, x, h0, masks, *others)


def _gradient(schedule, options, params, x, h0, masks, inputs, weights, h, cotangents):
    valid, fresh = masks
    steps = Steps(inputs, valid, fresh)
    dweights, dh0, dinputs = schedule.backward(options, weights, h0, steps, h, cotangents)
    project = lambda params, x: options.unit.project(params, x, valid)
    _, pullback = jax.vjp(project, params, x)
    dparams, dx = pullback((dinputs, jnp.sum(dweights, 0)))
    return dparams, dx, dh0


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradient_of_read(schedule, options, params, x, h0, masks, *others):
    *_, cotangents = others
    masks = steps_read(options, masks, cotangents), masks[1]
    return _gradient(schedule, options, params, x, h0, masks, *others)


@_gradient_of_read.defjvp
def _gradient_of_read_jvp(schedule, options, primals, tangents):
    # what comes back to a step may be zero, and still change
    _, tangent = jax.jvp(partial(_gradient, schedule, options), primals, tangents)
    return _gradient_of_read(schedule, options, *primals), tangent


def steps_read(options, masks, cotangents):
    """Which valid steps something comes back to, from their output or from a step after them.

    From a step on, more outputs are read than from the next episode on.
    """
    (valid, fresh), (dy, dlast) = masks, cotangents
    axis, back = options.time_axis, not options.reverse
    valid = jnp.ones_like(fresh) if valid is None else valid
    last = jnp.expand_dims(jnp.any(dlast != 0, -1), axis).astype(jnp.int32)
    own = (valid & jnp.any(dy != 0, -1)).astype(jnp.int32)
    read = running(jnp.add, own, 0, axis, back) + last
    of_next = running(jnp.maximum, jnp.where(fresh, read, 0), 0, axis, back)
    return valid & (read > found(of_next, jnp.zeros_like(last), axis, back))
