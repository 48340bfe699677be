"""A sequence of a unit, once its arguments are checked."""

from functools import partial

import jax

from rnnattn.recurrent.arguments import Arguments, given_by_name, on_mesh, over_steps
from rnnattn.recurrent.rule import sequence


@partial(jax.jit, static_argnames=("function", "schedule", "options", "time_major"))
def run_sequence(function, schedule, options, time_major, params, arguments: Arguments):
    """The outputs and the final state, by a schedule."""
    run = partial(sequence, schedule, options)
    over = partial(over_steps, run, options, time_major)
    given = given_by_name(time_major, params, arguments)
    return on_mesh(function, lambda given: over(**given), options, time_major, given)
