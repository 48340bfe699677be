"""The NNX modules against the functions they call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rnnattn
from rnnattn.nn import LSTM, LSTMCell
from tests.lstm_cases import assert_close, make_case

OPTIONS = {"dtype": jnp.float64}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projection_size", [None, 2])
def test_the_module_is_the_stack_of_its_weights(bidirectional, projection_size):
    module = LSTM(
        3,
        5,
        num_layers=2,
        bidirectional=bidirectional,
        projection_size=projection_size,
        rngs=nnx.Rngs(0),
        **OPTIONS,
    )
    x, lengths = make_case(4, 2, 3, 5).x, jnp.array([4, 2])
    y, states = jax.jit(lambda module, x: module(x, lengths=lengths))(module, x)
    assert_close((y, states), rnnattn.stacked_lstm(module.layers, x, lengths=lengths), 1e-12)
    again, _ = module(x, states)
    assert_close(again, rnnattn.stacked_lstm(module.layers, x, states)[0], 1e-12)


def test_the_cell_plugs_into_flax_rnn():
    cell = LSTMCell(3, 5, rngs=nnx.Rngs(0), peephole=True, **OPTIONS)
    x = make_case(4, 2, 3, 5).x
    expected = rnnattn.lstm(cell.params, x)
    carry, y = nnx.RNN(cell, return_carry=True)(x)
    assert_close((y, carry), expected, 1e-12)
    y_reversed = nnx.RNN(cell, reverse=True, keep_order=True)(x)
    assert_close(y_reversed, rnnattn.lstm(cell.params, x, reverse=True)[0], 1e-12)


def test_an_optimizer_moves_every_weight():
    module = LSTM(
        3, 5, num_layers=2, bidirectional=True, projection_size=2, peephole=True, rngs=nnx.Rngs(0)
    )
    before = jax.tree.leaves(nnx.state(module, nnx.Param))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    x = jnp.ones((2, 4, 3), jnp.float32)
    gradient = nnx.grad(lambda module: jnp.sum(module(x)[0] ** 2))(module)
    optimizer.update(module, gradient)
    after = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert len(before) == 2 * 2 * 5
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


def test_dropout_is_for_training_only():
    module = LSTM(3, 5, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0), **OPTIONS)
    x = make_case(4, 2, 3, 5).x
    first, second = module(x)[0], module(x)[0]
    assert not np.array_equal(first, second)
    module.eval()
    assert_close(module(x)[0], rnnattn.stacked_lstm(module.layers, x)[0], 1e-12)
    module.train()
    assert not np.array_equal(module(x)[0], module(x)[0])


def test_no_layers_is_an_error():
    with pytest.raises(ValueError, match="`num_layers` must be at least 1, got 0"):
        LSTM(3, 5, num_layers=0, rngs=nnx.Rngs(0))
