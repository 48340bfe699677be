"""The weights of a GRU from and to other libraries, against these, live."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import GRUParams, gru, interop
from tests.lstm_cases import assert_close

T, B, D, H = 6, 3, 2, 4
RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape))
X, START = draw(B, T, D), draw(B, H)


def params(b_n=True):
    return GRUParams(draw(D, 3 * H), draw(H, 3 * H), draw(3 * H), draw(H) if b_n else None)


@pytest.mark.parametrize("bias", [True, False])
def test_torch_with_two_layers_and_directions(bias):
    torch = pytest.importorskip("torch")
    layer = torch.nn.GRU(
        D, H, num_layers=2, bidirectional=True, batch_first=True, bias=bias, dtype=torch.float64
    )
    expected, last = layer(torch.tensor(np.asarray(X)))
    x, finals = X, []
    for n in range(2):
        outputs = []
        for reverse in (False, True):
            weights = interop.gru_from_torch(layer.state_dict(), n, reverse)
            y, h = gru(weights, x, reverse=reverse)
            outputs.append(y)
            finals.append(h)
        x = jnp.concatenate(outputs, axis=-1)
    assert_close((x, jnp.stack(finals)), (expected.detach(), last.detach()), 1e-12)


def test_a_torch_cell():
    torch = pytest.importorskip("torch")
    weights = params()
    cell = torch.nn.GRUCell(D, H, dtype=torch.float64)
    state = interop.gru_to_torch(weights)
    cell.load_state_dict(
        {key.removesuffix("_l0"): torch.tensor(value) for key, value in state.items()}
    )
    h = cell(torch.tensor(np.asarray(X[:, 0])), torch.tensor(np.asarray(START)))
    assert_close(gru(weights, X[:, :1], START)[1], h.detach(), 1e-12)
    again = interop.gru_from_torch(cell.state_dict())
    jax.tree.map(np.testing.assert_array_equal, again, weights)


@pytest.mark.parametrize("form", ["linen", "nnx"])
def test_flax(form):
    flax = pytest.importorskip("flax")
    nnx = pytest.importorskip("flax.nnx")
    weights = params()
    if form == "nnx":
        weights = weights._replace(b_n=jnp.zeros(H))
        cell = nnx.GRUCell(D, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        nnx.update(cell, jax.tree.map(jnp.asarray, interop.gru_to_flax(weights, "nnx")))
        step = cell
    else:
        cell = flax.linen.GRUCell(H, param_dtype=jnp.float64)
        step = partial(cell.apply, {"params": interop.gru_to_flax(weights)})
    with jax.numpy_rank_promotion("allow"):
        h, _ = step(START, X[:, 0])
    assert_close(gru(weights, X[:, :1], START)[1], h, 1e-12)
    jax.tree.map(
        np.testing.assert_array_equal,
        interop.gru_from_flax(interop.gru_to_flax(weights, form)),
        weights,
    )


def test_haiku():
    haiku = pytest.importorskip("haiku")
    weights = params(b_n=False)

    def run(x, h):
        return haiku.GRU(H)(x, h)

    made = interop.gru_to_haiku(weights)
    with jax.numpy_rank_promotion("allow"):
        _, h = haiku.transform(run).apply({"gru": made}, None, X[:, 0], START)
    assert_close(gru(weights, X[:, :1], START, reset_after=False)[1], h, 1e-12)
    jax.tree.map(np.testing.assert_array_equal, interop.gru_from_haiku(made), weights)


@pytest.mark.parametrize("linear_before_reset", [False, True])
def test_onnx(linear_before_reset):
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    weights = params(b_n=linear_before_reset)
    made = interop.gru_to_onnx(weights, linear_before_reset=linear_before_reset)
    helper = onnx.helper
    node = helper.make_node(
        "GRU",
        ["X", "W", "R", "B", "", "h"],
        ["Y", "last"],
        hidden_size=H,
        linear_before_reset=int(linear_before_reset),
    )
    double = onnx.TensorProto.DOUBLE
    value = partial(helper.make_tensor_value_info, elem_type=double, shape=None)
    graph = helper.make_graph(
        [node], "gru", [value(name) for name in "XWRBh"], [value("Y"), value("last")]
    )
    session = reference.ReferenceEvaluator(helper.make_model(graph))
    given = {"X": np.asarray(X).swapaxes(0, 1), "h": np.asarray(START)[None], **made}
    y, last = session.run(None, given)
    actual = gru(weights, X, START, reset_after=linear_before_reset)
    assert_close(actual, (y[:, 0].swapaxes(0, 1), last[0]), 1e-12)
    again = interop.gru_from_onnx(made, linear_before_reset=linear_before_reset)
    jax.tree.map(np.testing.assert_array_equal, again, weights)


@pytest.mark.parametrize("reset_after", [False, True])
def test_keras_formula(reset_after):
    """The code of `keras.layers.GRUCell`, in NumPy: gates z, r, h."""
    weights = params(b_n=reset_after)
    made = interop.gru_to_keras(weights, reset_after=reset_after)
    kernel, recurrent, bias = made["kernel"], made["recurrent_kernel"], made["bias"]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    b_x, b_h = bias if reset_after else (bias, np.zeros_like(bias))
    x, h = np.asarray(X[:, 0]), np.asarray(START)
    x_z, x_r, x_h = np.split(x @ kernel + b_x[None], 3, axis=-1)
    h_z, h_r, h_h = np.split(h @ recurrent + b_h[None], 3, axis=-1)
    z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
    inner = r * h_h if reset_after else (r * h) @ recurrent[:, 2 * H :]
    expected = z * h + (1 - z) * np.tanh(x_h + inner)
    assert_close(gru(weights, X[:, :1], START, reset_after=reset_after)[1], expected, 1e-12)
    jax.tree.map(np.testing.assert_array_equal, interop.gru_from_keras(made), weights)
    del made["bias"]
    assert not np.any(interop.gru_from_keras(made).b)
