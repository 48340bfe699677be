"""The recurrent units as the tests of `tests/test_units.py` run them: one line for each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn
from rnnattn import (
    GRUParams,
    LayerNormGRUParams,
    LayerNormLSTMParams,
    LSTMParams,
    RNNParams,
    SLSTMParams,
    reference,
)
from rnnattn.recurrent.unit import Unit
from rnnattn.recurrent.units import gru, layer_norm, lstm, rnn, slstm


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


def _rnn(draw, D, H):
    return RNNParams(draw(D, H), draw(H, H), draw(H))


def _layer_norm_lstm(draw, D, H):
    b, k_x, k_h = (draw(4 * H) for _ in range(3))
    return LayerNormLSTMParams(draw(D, 4 * H), draw(H, 4 * H), b, k_x, k_h, draw(H), draw(H))


def _layer_norm_gru(draw, D, H):
    w_x, w_h = draw(D, 3 * H), draw(H, 3 * H)
    return LayerNormGRUParams(w_x, w_h, draw(3 * H), draw(H), draw(3 * H), draw(3 * H))


def _slstm(draw, D, H, heads):
    N = heads if H % heads == 0 else 1
    return SLSTMParams(draw(D, 4 * H), draw(N, H // N, 4 * H // N), draw(4 * H))


UNITS = {
    "lstm": _of("lstm", lstm.LSTM(), _lstm, fields=2),
    "gru": _of("gru", gru.ResetAfter(), partial(_gru, b_n=True)),
    "gru, reset before": _of("gru", gru.ResetBefore(), partial(_gru, b_n=False), reset_after=False),
    "rnn": _of("rnn", rnn.RNN(), _rnn),
    "rnn, relu": _of("rnn", rnn.RNN(relu=True), _rnn, activation="relu"),
    "layer-norm lstm": _of(
        "layer_norm_lstm", layer_norm.LayerNormLSTM(), _layer_norm_lstm, fields=2
    ),
    "layer-norm gru": _of("layer_norm_gru", layer_norm.LayerNormGRU(), _layer_norm_gru),
    "slstm": _of("slstm", slstm.SLSTM(), partial(_slstm, heads=2), fields=4),
    "slstm, exponential": _of(
        "slstm",
        slstm.SLSTM(exponential_forget=True),
        partial(_slstm, heads=1),
        fields=4,
        forget_gate="exponential",
    ),
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
