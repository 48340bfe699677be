"""The custom rule of a sequence, which joins the two halves of a schedule."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from rnnattn.recurrent.problem import Outputs, Steps
from rnnattn.recurrent.unit import select_each


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sequence(schedule, options, params, state, steps):
    """What each step gives out, and the final state, by a schedule."""
    final, trace = schedule.forward(options, False, params, state, steps)
    return _outputs(options, steps, trace), final


def _outputs(options, steps, trace):
    return Outputs(
        trace.y, select_each(steps.valid, trace.rest, 0) if options.every_state else None
    )


def _sequence_fwd(schedule, options, params, state, steps):
    """Keeps the arguments and the trace; the states only where they are not computed again."""
    final, trace = schedule.forward(options, True, params, state, steps)
    again = isinstance(options.residuals, int)
    kept = trace._replace(y=None, rest=None) if again else trace
    return (_outputs(options, steps, trace), final), (params, state, steps, kept)


def _sequence_bwd(schedule, options, residuals, cotangents):
    """The gradients of params, state and x."""
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
    comes_back = lambda tree: reduce(
        jnp.logical_or, (jnp.any(d != 0, -1) for d in jax.tree.leaves(tree))
    )
    outputs, dstate = cotangents
    valid = jnp.ones_like(steps.fresh) if steps.valid is None else steps.valid

    def step(after, inputs):
        given, valid, fresh = inputs
        read = after | (valid & given)
        return read & ~fresh, read

    inputs = (comes_back(outputs), valid, steps.fresh)
    _, read = lax.scan(step, comes_back(dstate), inputs, reverse=not options.reverse)
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
