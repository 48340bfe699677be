"""The weights of a plain recurrent network from and to other libraries, against these, live."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import RNNParams, interop, rnn
from tests.lstm_cases import assert_close

T, B, D, H = 6, 3, 2, 4
RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape))
X, START = draw(B, T, D), draw(B, H)
WEIGHTS = RNNParams(draw(D, H), draw(H, H), draw(H))


@pytest.mark.parametrize("activation, bias", [("tanh", True), ("relu", False)])
def test_torch_with_two_layers_and_directions(activation, bias):
    torch = pytest.importorskip("torch")
    kinds = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": torch.float64}
    layer = torch.nn.RNN(D, H, nonlinearity=activation, bias=bias, **kinds)
    expected, last = layer(torch.tensor(np.asarray(X)))
    x, finals = X, []
    for n in range(2):
        outputs = []
        for reverse in (False, True):
            weights = interop.rnn_from_torch(layer.state_dict(), n, reverse)
            y, h = rnn(weights, x, reverse=reverse, activation=activation)
            outputs.append(y)
            finals.append(h)
        x = jnp.concatenate(outputs, axis=-1)
    assert_close((x, jnp.stack(finals)), (expected.detach(), last.detach()), 1e-12)


def test_a_torch_cell_with_its_gradients():
    torch = pytest.importorskip("torch")
    cell = torch.nn.RNNCell(D, H, dtype=torch.float64)
    state = interop.rnn_to_torch(WEIGHTS)
    cell.load_state_dict(
        {key.removesuffix("_l0"): torch.tensor(value) for key, value in state.items()}
    )
    h = torch.tensor(np.asarray(START))
    for t in range(T):
        h = cell(torch.tensor(np.asarray(X[:, t])), h)
    (h**2).sum().backward()
    run = lambda params: rnn(params, X, START)[1]
    assert_close(run(WEIGHTS), h.detach(), 1e-12)
    gradients = {name: weight.grad for name, weight in cell.named_parameters()}
    del gradients["bias_hh"]  # that of the other bias once more
    gradients["bias_hh"] = torch.zeros(H, dtype=torch.float64)
    expected = interop.rnn_from_torch(gradients)
    assert_close(jax.grad(lambda params: jnp.sum(run(params) ** 2))(WEIGHTS), expected, 1e-12)
    again = interop.rnn_from_torch(cell.state_dict())
    jax.tree.map(np.testing.assert_array_equal, again, WEIGHTS)


@pytest.mark.parametrize("form", ["linen", "nnx"])
def test_flax(form):
    flax = pytest.importorskip("flax")
    nnx = pytest.importorskip("flax.nnx")
    made = interop.rnn_to_flax(WEIGHTS, form)
    if form == "nnx":
        cell = nnx.SimpleCell(D, H, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        nnx.update(cell, jax.tree.map(jnp.asarray, made))
        step = cell
    else:
        cell = flax.linen.SimpleCell(H, param_dtype=jnp.float64)
        step = partial(cell.apply, {"params": made})
    with jax.numpy_rank_promotion("allow"):
        h, _ = step(START, X[:, 0])
    assert_close(rnn(WEIGHTS, X[:, :1], START)[1], h, 1e-12)
    jax.tree.map(np.testing.assert_array_equal, interop.rnn_from_flax(made), WEIGHTS)


def test_keras_formula():
    """The code of `keras.layers.SimpleRNNCell`, in NumPy."""
    made = interop.rnn_to_keras(WEIGHTS)
    x, h = np.asarray(X[:, 0]), np.asarray(START)
    expected = np.tanh(x @ made["kernel"] + made["bias"][None] + h @ made["recurrent_kernel"])
    assert_close(rnn(WEIGHTS, X[:, :1], START)[1], expected, 1e-12)
    jax.tree.map(np.testing.assert_array_equal, interop.rnn_from_keras(made), WEIGHTS)
    del made["bias"]
    assert not np.any(interop.rnn_from_keras(made).b)
