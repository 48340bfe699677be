"""Changes that L1 to L8 have to notice."""

import jax
import jax.numpy as jnp

import rnnattn
from experiments.models.lstm_variants import run_steps
from rnnattn import LSTMState
from rnnattn.recurrent.units.lstm import slopes_of
from tests.experiments.claims.breaks import Break

lstm, lstm_step = rnnattn.lstm, rnnattn.lstm_step


def _step_with_i_and_f_exchanged(params, x, state):
    def exchanged(w):
        i, f, g, o = jnp.split(w, 4, axis=-1)
        return jnp.concatenate([f, i, g, o], axis=-1)

    blocks = {name: exchanged(getattr(params, name)) for name in ("w_x", "w_h", "b")}
    return lstm_step(params._replace(**blocks), x, state)


def _lstm_without_the_last_tanh(params, x, state, **options):
    def step(state, x):
        h, c = lstm_step(params, x, state)
        h = h / jnp.tanh(c) * c
        return LSTMState(h, c), h

    last, y = jax.lax.scan(step, state, x)
    return y, last


def _slopes(change):
    """The factors of the library's gradient, with a change."""

    def changed(a, c_prev, c, *others):
        slopes, m = slopes_of(a, c_prev, c, *others)
        return change(slopes, c_prev, c), m

    return changed


_without_o = _slopes(lambda slopes, _, c: slopes._replace(c=1 - jnp.tanh(c) ** 2))
_without_c_prev = _slopes(lambda slopes, c_prev, _: slopes._replace(f=slopes.f / c_prev))
without_carry = _slopes(lambda slopes, *_: slopes._replace(carry=jnp.zeros_like(slopes.carry)))


def _steps_with_i_and_g_exchanged(params, x, state):
    steps = run_steps(params, x, state)
    return steps._replace(i=steps.g, g=steps.i)


SLOPES = "rnnattn.recurrent.units.lstm.slopes_of"

BREAKS = (
    Break("L1", "rnnattn.lstm_step", _step_with_i_and_f_exchanged),
    Break("L2", "rnnattn.lstm", _lstm_without_the_last_tanh),
    Break("L3", SLOPES, _without_o),
    Break("L4", "experiments.claims.lstm_gradient.run_steps", _steps_with_i_and_g_exchanged),
    Break("L5", SLOPES, _without_c_prev),
    Break("L6", SLOPES, _without_c_prev),
    Break("L7", SLOPES, _without_c_prev),
    Break("L8", SLOPES, without_carry),
)
