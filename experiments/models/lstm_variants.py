"""The gradient of an LSTM as the notes print it, its three omissions made good one by one, and the
LSTM itself with a place for a finite difference at every quantity that the notes differentiate.

    dc_t = dh_t ⊙ o ⊙ (1 − tanh²c_t)  [+ dc_{t+1} ⊙ f_{t+1}]        L3: the notes leave out o
    dz_f = dc_t ⊙ c_{t−1} ⊙ f(1 − f)                                 L5–L7: they leave out c_{t−1}
    dc_{t−1} = dc_t ⊙ f                                              L8: they say nothing of it

This is the only place where wrong gradients live; the library's are in
`rnnattn.recurrent.units.lstm`. Everything is a plain step-by-step scan, time first: x (T, B, D), h
and c (T, B, H), z (T, B, 4H).

Axes: T time, B batch, D input width, H hidden width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from rnnattn import LSTMParams, LSTMState


class Terms(NamedTuple):
    """Which of the three omissions of the notes are made good."""

    output_gate: bool
    """The factor o of dE/dc_t (L3)."""
    previous_cell: bool
    """The factor c_{t−1} of everything behind the forget gate (L5, L6, L7)."""
    carried_cell: bool
    """dE/dc_{t−1} = dE/dc_t ⊙ f, which step t − 1 adds to its own dE/dc (L8)."""


GRADIENTS = {
    "printed in the notes": Terms(False, False, False),
    "o restored": Terms(True, False, False),
    "o and c₋ restored": Terms(True, True, False),
    "right": Terms(True, True, True),
}
"""Each makes good one omission more than the one before it."""


class Steps(NamedTuple):
    """The quantities of every step; as `nudges`, what is added to each as it is made."""

    h_prev: Array  # h_{t−1} as step t reads it: the output of step t − 1 stays as it is
    c_prev: Array  # c_{t−1}, likewise
    z: Array
    i: Array
    f: Array
    g: Array
    o: Array
    i_g: Array  # i ⊙ g, the notes' input_gate
    c: Array
    h: Array


def run_steps(params: LSTMParams, x: Array, state: LSTMState, nudges: Steps | None = None) -> Steps:
    """L1 and L2 over time, every quantity kept."""

    def step(state, inputs):
        x, nudge = inputs

        def nudged(name, value):
            return value if nudge is None else value + getattr(nudge, name)

        h_prev, c_prev = nudged("h_prev", state.h), nudged("c_prev", state.c)
        z = nudged("z", x @ params.w_x + h_prev @ params.w_h + params.b[None])
        z_i, z_f, z_g, z_o = jnp.split(z, 4, axis=-1)
        i, f = nudged("i", jax.nn.sigmoid(z_i)), nudged("f", jax.nn.sigmoid(z_f))
        g, o = nudged("g", jnp.tanh(z_g)), nudged("o", jax.nn.sigmoid(z_o))
        i_g = nudged("i_g", i * g)
        c = nudged("c", f * c_prev + i_g)
        h = nudged("h", o * jnp.tanh(c))
        return LSTMState(h, c), Steps(h_prev, c_prev, z, i, f, g, o, i_g, c, h)

    return jax.lax.scan(step, state, (x, nudges))[1]


def no_nudges(T: int, B: int, H: int, dtype: Any) -> Steps:
    """Nudges that change nothing."""
    widths = {name: 4 * H if name == "z" else H for name in Steps._fields}
    return Steps(**{name: jnp.zeros((T, B, width), dtype) for name, width in widths.items()})


class Case(NamedTuple):
    """An LSTM, what it reads, and the loss E = Σ dy ⊙ h + Σ dc_last ⊙ c_T."""

    params: LSTMParams
    x: Array
    state: LSTMState
    dy: Array
    dc_last: Array


class Gradients(NamedTuple):
    """The gradient with respect to everything a step reads or makes."""

    params: LSTMParams
    x: Array
    state: LSTMState
    steps: Steps


def back_propagate(terms: Terms, case: Case, steps: Steps) -> Gradients:
    """L3 to L8, with the terms that `terms` names, over the steps that the case has made."""
    params = case.params

    def step(coming_back, inputs):
        dy, s = inputs
        tanh_c = jnp.tanh(s.c)
        dh = dy + coming_back.h
        dc = dh * jnp.where(terms.output_gate, s.o, 1) * (1 - tanh_c**2) + coming_back.c
        do = dh * tanh_c
        dg = dc * s.i
        di = dc * s.g
        df = dc * s.c_prev
        dz_i = di * s.i * (1 - s.i)
        # the notes have this factor in dE/df, and lose it on the way to the weights
        dz_f = jnp.where(terms.previous_cell, df, dc) * s.f * (1 - s.f)
        dz_g = dg * (1 - s.g**2)
        dz_o = do * s.o * (1 - s.o)
        dz = jnp.concatenate([dz_i, dz_f, dz_g, dz_o], axis=-1)
        dh_prev = dz @ params.w_h.T
        dc_prev = jnp.where(terms.carried_cell, dc * s.f, 0)
        # c = f ⊙ c_{t−1} + i ⊙ g, so what reaches i ⊙ g is dc
        made = Steps(dh_prev, dc_prev, dz, di, df, dg, do, dc, dc, dh)
        return LSTMState(dh_prev, dc_prev), made

    last = LSTMState(jnp.zeros_like(case.dc_last), case.dc_last)
    dstate, d = jax.lax.scan(step, last, (case.dy, steps), reverse=True)
    dw_x = jnp.einsum("tbd,tbg->dg", case.x, d.z)
    dw_h = jnp.einsum("tbh,tbg->hg", steps.h_prev, d.z)
    return Gradients(LSTMParams(dw_x, dw_h, jnp.sum(d.z, (0, 1))), d.z @ params.w_x.T, dstate, d)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def last_output(terms: Terms, params: LSTMParams, x: Array) -> Array:
    """h_T of a run from zeros, with the gradient that `terms` names, right or wrong."""
    return run_steps(params, x, _zeros(params, x)).h[-1]


def _last_output_fwd(terms, params, x):
    steps = run_steps(params, x, _zeros(params, x))
    return steps.h[-1], (params, x, steps)


def _last_output_bwd(terms, residuals, dh):
    params, x, steps = residuals
    dy = jnp.zeros_like(steps.h).at[-1].set(dh)
    case = Case(params, x, _zeros(params, x), dy, jnp.zeros_like(dh))
    gradients = back_propagate(terms, case, steps)
    return gradients.params, gradients.x


last_output.defvjp(_last_output_fwd, _last_output_bwd)


def _zeros(params, x):
    h = jnp.zeros((x.shape[1], params.w_h.shape[0]), x.dtype)
    return LSTMState(h, h)


# ---- the truth --------------------------------------------------------------------------------


def differences(energy: Callable[[Any], Array], point: Any, step: float) -> tuple[Any, Any]:
    """dE/d of everything in `point`, to order h⁴, and how far a second estimate is from it."""
    flat, unravel = ravel_pytree(point)
    steps = jnp.array([step, step / 2, step / 4])

    def central(direction):
        shifts = jnp.concatenate([steps, -steps])
        energies = jax.vmap(lambda h: energy(unravel(flat + h * direction)))(shifts)
        return (energies[:3] - energies[3:]) / (2 * steps)

    coarse, middle, fine = jax.vmap(central, out_axes=1)(jnp.eye(flat.size))
    first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    return unravel(second), unravel(second - first)


def true_gradient(case: Case, step: float) -> tuple[Gradients, Gradients]:
    """The gradient of E by differences, and its noise."""
    T, B, H = case.dy.shape

    def energy(point):
        steps = run_steps(point.params, point.x, point.state, point.steps)
        return jnp.sum(case.dy * steps.h) + jnp.sum(case.dc_last * steps.c[-1])

    nudges = no_nudges(T, B, H, case.x.dtype)
    return differences(energy, Gradients(case.params, case.x, case.state, nudges), step)
