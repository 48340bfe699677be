"""The recurrent units as the tests of `tests/test_units.py` run them: one line for each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn
from rnnattn import GRUParams, LSTMParams, reference
from rnnattn.recurrent.unit import Unit
from rnnattn.recurrent.units import gru, lstm


class Family(NamedTuple):
    """A unit's functions, its contract, and parameters drawn at random: of (draw, D, H)."""

    unit: Unit
    run: Callable
    step: Callable
    twin: Callable
    params: Callable
    fields: int = 1  # of the state


def _gru(draw, D, H, b_n):
    return GRUParams(draw(D, 3 * H), draw(H, 3 * H), draw(3 * H), draw(H) if b_n else None)


def _of(name, unit, params, fields=1, **options):
    run, step = (getattr(rnnattn, n) for n in (name, f"{name}_step"))
    run, step, twin = (partial(f, **options) for f in (run, step, getattr(reference, name)))
    return Family(unit, run, step, twin, params, fields)


def _lstm(draw, D, H):
    return LSTMParams(draw(D, 4 * H), draw(H, 4 * H), draw(4 * H))


UNITS = {
    "lstm": _of("lstm", lstm.LSTM(), _lstm, fields=2),
    "gru": _of("gru", gru.ResetAfter(), partial(_gru, b_n=True)),
    "gru, reset before": _of("gru", gru.ResetBefore(), partial(_gru, b_n=False), reset_after=False),
}


class Case(NamedTuple):
    """A problem; the state is an array, or a tuple where it has several fields."""

    params: Any
    x: jax.Array
    state: Any
    cotangents: Any


def make_case(family, T, B, D, H, *, dtype=jnp.float64, seed=0) -> Case:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = jax.tree.map(lambda w: w / 2, family.params(draw, D, H))
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def state():
        widths = family.unit.widths(params)
        drawn = [draw(B, width).astype(dtype if n == 0 else wide) for n, width in enumerate(widths)]
        return type(widths)(*drawn) if family.fields > 1 else drawn[0]

    y = draw(B, T, family.unit.widths(params)[0])
    return Case(params, draw(B, T, D), state(), (y, state()))
