"""Programs exported with symbolic sizes: value and gradient, run at several sizes.

Each size by itself and all together; what is exported once has to be right for all of them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import (
    LSTMState,
    dot_product_attention,
    init_lstm,
    init_mingru,
    lstm,
    lstm_step,
    mingru,
    patchify,
    rope,
    stacked_lstm,
)
from rnnattn.attention import dot_product_attention_jvp

pytestmark = pytest.mark.slow

D, H, N, K = 3, 4, 2, 4
PARAMS = init_lstm(jax.random.key(0), D, H)


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def exported(function, *shapes, dtypes=None):
    """The function of arrays whose shapes have letters in them, as a program for any sizes."""
    scope = jax.export.SymbolicScope()
    symbolic = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in zip(shapes, dtypes or [jnp.float32] * len(shapes), strict=True)
    ]
    return jax.export.export(jax.jit(function))(*symbolic).call


def assert_right(function, shapes, sizes):
    """Value and gradient of the exported function as of the function itself."""

    def both(*arrays):
        value, pullback = jax.vjp(function, *arrays)
        return value, pullback(jax.tree.map(jnp.cos, value))

    run = exported(both, *shapes)
    for size in sizes:
        numbers = [tuple(size.get(n.strip(), n) for n in shape.split(",")) for shape in shapes]
        arrays = [draw(n, tuple(map(int, shape))) for n, shape in enumerate(numbers)]
        for a, b in zip(*map(jax.tree.leaves, (run(*arrays), both(*arrays))), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


SIZES = [{"b": 1, "t": 1}, {"b": 9, "t": 19}]


@pytest.mark.parametrize("shape", [f"b, 7, {D}", f"2, t, {D}", f"b, t, {D}"])
@pytest.mark.parametrize("options", [{}, {"implementation": "xla", "residuals": 4}], ids=str)
def test_lstm(shape, options):
    assert_right(lambda x: lstm(PARAMS, x, **options), [shape], SIZES)


def test_lstm_with_lengths_and_resets():
    run = lambda x, lengths, resets: lstm(PARAMS, x, lengths=lengths, resets=resets, reverse=True)
    shapes, dtypes = [f"b, t, {D}", "b", "b, t"], [jnp.float32, jnp.int32, bool]
    call = exported(run, *shapes, dtypes=dtypes)
    x, lengths = draw(0, (3, 5, D)), jnp.array([0, 3, 5], jnp.int32)
    resets = jnp.zeros((3, 5), bool).at[1, 2].set(True)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-6),
        call(x, lengths, resets),
        run(x, lengths, resets),
    )


def test_a_linear_unit_with_lengths_and_resets():
    params = init_mingru(jax.random.key(0), D, H)

    def both(x, lengths, resets):
        run = lambda x: mingru(params, x, lengths=lengths, resets=resets, reverse=True)
        results, pullback = jax.vjp(run, x)
        return results, pullback(results)

    call = exported(both, f"b, t, {D}", "b", "b, t", dtypes=[jnp.float32, jnp.int32, bool])
    arrays = draw(0, (3, 5, D)), jnp.array([0, 3, 5], jnp.int32), jnp.eye(3, 5, 1, bool)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), call(*arrays), both(*arrays))


def test_a_step_and_a_stack():
    step = lambda x, h, c: lstm_step(PARAMS, x, LSTMState(h, c))
    assert_right(step, [f"b, {D}", f"b, {H}", f"b, {H}"], SIZES)
    layers: Any = [(PARAMS, PARAMS), init_lstm(jax.random.key(1), 2 * H, H)]
    assert_right(lambda x: stacked_lstm(layers, x)[0], [f"b, t, {D}"], SIZES)


AXES = {
    "batch": ("b, 5", "b, 5"),
    "time": ("2, t", "2, t"),
    "queries": ("2, t", "2, 9"),
    "keys": ("2, 6", "2, s"),
    "all": ("b, t", "b, s"),
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("implementation", [None, "dense", "blockwise"])
def test_attention(axes, implementation):
    queries, keys = (f"{axis}, {N}, {K}" for axis in AXES[axes])
    options = {"is_causal": axes == "time", "local_window_size": (3, 9)}
    attend = partial(dot_product_attention, implementation=implementation, **options)
    sizes = [{"b": 1, "t": 1, "s": 1}, {"b": 3, "t": 40, "s": 70}]
    assert_right(lambda q, k: attend(q, k, k), [queries, keys], sizes)


def test_attention_in_forward_mode():
    attend = lambda q: dot_product_attention_jvp(q, q, q, implementation="blockwise")
    assert_right(lambda q: jax.jvp(attend, (q,), (q,)), ["b, t, 1, 2"], [{"b": 2, "t": 5}])


def test_positions_and_patches():
    turn = lambda x: rope(x, jnp.arange(x.shape[1], dtype=jnp.int32))
    assert_right(turn, [f"b, t, {N}, {K}"], SIZES)
    assert_right(lambda x: patchify(x, 2), ["b, 4, 4, 1"], SIZES)
