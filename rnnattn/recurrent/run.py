"""A sequence of a unit, once its arguments are checked."""

from functools import partial

import jax

from rnnattn.recurrent.arguments import on_mesh, over_steps
from rnnattn.recurrent.rule import sequence


@partial(jax.jit, static_argnames=("function", "schedule", "options", "time_major"))
def run_sequence(
    function, schedule, options, time_major, params, x, state, lengths=None, mask=None, resets=None
):
    """The outputs and the final state, by a schedule."""
    run = partial(sequence, schedule, options)
    over = partial(over_steps, run, options.unit, time_major, options.reverse)
    given = {"params": params, "x": x, "state": state}
    given |= {"lengths": lengths, "mask": mask, "resets": resets}
    return on_mesh(function, lambda given: over(**given), options, time_major, given)
