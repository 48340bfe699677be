"""The LSTM against a loop in NumPy that shares nothing with it, row by row and step by step.

The twins in `rnnattn.reference` run the equations of `rnnattn.recurrent.units.lstm`, as the rule
does: what a term of these should be, they cannot tell.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import LSTMParams, LSTMState, lstm, reference
from rnnattn.recurrent import chunked
from rnnattn.recurrent.arguments import time_major_steps
from rnnattn.recurrent.problem import Options, Outputs
from rnnattn.recurrent.units.lstm import LSTM
from tests.lstm_cases import assert_close, make_case

T, B, D, H, R = 5, 4, 2, 3, 2
# no step, one, some, all
LENGTHS = np.array([0, 1, 3, T])
# in time order: marks on first steps, in padding, on a last valid step, two in a row
RESETS = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 0, 1, 1, 0], [1, 0, 1, 1, 0]], bool)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step_by_hand(params, x, h, c, clip, coupled):
    """One step of one row: vectors."""
    i, f, g, o = np.split(x @ params.w_x + h @ params.w_h + params.b, 4)
    p_i, p_f, p_o = np.zeros((3, len(c))) if params.peephole is None else params.peephole
    bounded = lambda z: z if clip is None else np.clip(z, -clip, clip)
    i = sigmoid(bounded(i + p_i * c))
    f = 1 - i if coupled else sigmoid(bounded(f + p_f * c))
    c = f * c + i * np.tanh(bounded(g))
    m = sigmoid(bounded(o + p_o * c)) * np.tanh(c)
    return m if params.projection is None else m @ params.projection, c


def lstm_by_hand(params, x, state, lengths, resets, reverse, clip, coupled):
    y = np.zeros((*x.shape[:2], state.h.shape[1]))
    last_h, last_c = np.array(state.h), np.array(state.c)
    for row in range(len(x)):
        h, c = last_h[row], last_c[row]
        for t in reversed(range(lengths[row])) if reverse else range(lengths[row]):
            # a mark parts a step from the one before it in time, whichever way is run
            parted = t + 1 < lengths[row] and resets[row, t + 1] if reverse else resets[row, t]
            if parted:
                h, c = np.zeros_like(h), np.zeros_like(c)
            h, c = step_by_hand(params, x[row, t], h, c, clip, coupled)
            y[row, t] = h
        last_h[row], last_c[row] = h, c
    return y, (last_h, last_c)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("clip, coupled", [(None, False), (0.4, False), (0.4, True), (None, True)])
@pytest.mark.parametrize("peephole, projected", [(False, None), (True, R)])
def test_every_variant_is_the_loop(peephole, projected, clip, coupled, reverse):
    case = make_case(T, B, D, H, projected, peephole=peephole)
    masks: dict[str, Any] = {"lengths": LENGTHS, "resets": RESETS, "reverse": reverse}
    options: Any = {"clip": clip, "coupled": coupled}
    params, x, state = jax.tree.map(np.asarray, case[:3])
    expected = lstm_by_hand(params, x, state, **masks, **options)
    masks |= {"lengths": jnp.asarray(LENGTHS), "resets": jnp.asarray(RESETS)}
    for function in (lstm, reference.lstm):
        y, final = function(case.params, case.x, case.state, **masks, **options)
        assert_close((y, tuple(final)), expected, 1e-12)


@pytest.mark.parametrize("clip", [0.1, 0.4])
def test_every_pre_activation_is_bounded_alike(clip):
    """One step from weights so large that all four reach the bound, from above and from below."""
    large = LSTMParams(jnp.full((1, 4), 50.0), jnp.zeros((1, 4)), jnp.zeros(4))
    for x in (1.0, -1.0):
        gate, candidate = sigmoid(clip * x), np.tanh(clip * x)
        c = gate * 0.5 + gate * candidate
        state = LSTMState(jnp.zeros((1, 1)), jnp.full((1, 1), 0.5))
        _, actual = lstm(large, jnp.full((1, 1, 1), x), state, clip=clip)
        np.testing.assert_allclose(actual.c, [[c]], rtol=1e-12)
        np.testing.assert_allclose(actual.h, [[gate * np.tanh(c)]], rtol=1e-12)


def test_sixteen_bit_peepholes_are_multiplied_in_float32():
    """p c is summed in float32, as products are: c = 1 + 2⁻⁹ times p = 1 + 2⁻⁷ needs 16 bits."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    peephole = jnp.full((3, 1), 1 + 2**-7, jnp.bfloat16)
    params = LSTMParams(zeros(1, 4), zeros(1, 4), zeros(4), peephole)
    state = LSTMState(zeros(1, 1), jnp.full((1, 1), 1 + 2**-9, jnp.float32))
    _, actual = lstm(params, zeros(1, 1, 1), state)
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    _, c = step_by_hand(wide, np.zeros(1), np.zeros(1), np.full(1, 1 + 2**-9), None, False)
    np.testing.assert_allclose(actual.c[0], c, rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_trace_serves_chunks_of_any_length(masked, reverse):
    """The gradient takes the states before its chunks from all c and y: those of the forward pass
    may have been others, as the kernels' on a CPU are."""
    case = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), make_case(T, B, D, H))
    lengths, resets = (jnp.asarray(LENGTHS), jnp.asarray(RESETS)) if masked else (None, None)
    swap = lambda a: jnp.swapaxes(a, 0, 1)
    steps = time_major_steps(
        swap(case.x), lengths, None if resets is None else swap(resets), reverse
    )
    options = Options(LSTM(), reverse)
    _, trace = chunked.forward(options, True, case.params, case.state, steps)
    assert trace.starts is None
    dy, dlast = case.cotangents
    arguments = (options, case.params, case.state, steps, trace, (Outputs(swap(dy), None), dlast))
    in_one = chunked.backward_in(chunked.ELSEWHERE, *arguments)
    in_twos = chunked.backward_in(chunked.ON_CPU._replace(chunk_steps=2), *arguments)
    assert_close(in_twos, in_one, 1e-6)
