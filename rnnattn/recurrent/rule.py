"""The custom rule of a sequence, which joins the two halves of a schedule."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rnnattn.recurrent.problem import Steps


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sequence(schedule, options, params, state, steps):
    """y and the final state, by a schedule."""
    final, trace = schedule.forward(options, False, params, state, steps)
    return trace.y, final


def _sequence_fwd(schedule, options, params, state, steps):
    """Keeps the arguments and the trace; y only where it is not computed again."""
    final, trace = schedule.forward(options, True, params, state, steps)
    kept = trace._replace(y=None) if isinstance(options.residuals, int) else trace
    return (trace.y, final), (params, state, steps, kept)


def _sequence_bwd(schedule, options, residuals, cotangents):
    """L3 to L8: `rnnattn.recurrent.equations`."""
    params, state, steps, trace = residuals
    dparams, dstate, dx = gradient_of_read(
        schedule.backward, options, params, state, steps, trace, cotangents
    )
    return dparams, dstate, Steps(dx, None, None)


sequence.defvjp(_sequence_fwd, _sequence_bwd)


def gradient_of_read(backward, options, params, state, steps, trace, cotangents):
    """`backward` of the steps that the loss reads, if resets set these apart from others.

    Nothing comes back to the others, but 0 × NaN is NaN: they are run like those past a length.
    """
    if steps.fresh is None:
        return backward(options, params, state, steps, trace, cotangents)
    return _gradient_of_read(backward, options, params, state, steps, trace, cotangents)


def steps_read(options, steps, cotangents):
    """Which valid steps something comes back to, from their output or from a step after them."""
    dy, dstate = cotangents
    comes_back = lambda d: jnp.any(d != 0, -1)
    valid = jnp.ones_like(steps.fresh) if steps.valid is None else steps.valid

    def step(after, inputs):
        dy, valid, fresh = inputs
        read = after | (valid & dy)
        return read & ~fresh, read

    last = comes_back(dstate.h) | comes_back(dstate.c)
    inputs = (comes_back(dy), valid, steps.fresh)
    _, read = lax.scan(step, last, inputs, reverse=not options.reverse)
    return valid & read


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradient_of_read(backward, options, params, state, steps, trace, cotangents):
    steps = steps._replace(valid=steps_read(options, steps, cotangents))
    return backward(options, params, state, steps, trace, cotangents)


@_gradient_of_read.defjvp
def _gradient_of_read_jvp(backward, options, primals, tangents):
    # what comes back to a step may be zero, and still change
    _, tangent = jax.jvp(partial(backward, options), primals, tangents)
    return _gradient_of_read(backward, options, *primals), tangent
