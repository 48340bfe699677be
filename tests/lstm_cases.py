"""Random LSTM problems in the configuration that catches every wrong BPTT variant we know:
float64, several steps, non-zero initial state, random cotangents on y, h_T and c_T."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn import LSTMParams, LSTMState


class Case(NamedTuple):
    params: LSTMParams
    x: jax.Array
    state: LSTMState
    cotangents: Any  # of the outputs


def make_case(T, B, D, H, R=None, *, peephole=False, dtype=jnp.float64, seed=0) -> Case:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    width = H if R is None else R
    carry = jnp.float64 if dtype == jnp.float64 else jnp.float32
    state = lambda: LSTMState(draw(B, width), draw(B, H).astype(carry))
    params = LSTMParams(
        draw(D, 4 * H) / 2,
        draw(width, 4 * H) / 2,
        draw(4 * H) / 2,
        draw(3, H) if peephole else None,
        None if R is None else draw(H, R),
    )
    return Case(params, draw(B, T, D), state(), (draw(B, T, width), state()))


def value_and_gradients(function, case):
    """Outputs, and gradients with respect to params, x and state, in one compilation."""

    @jax.jit
    def run(params, x, state, cotangents):
        outputs, pullback = jax.vjp(function, params, x, state)
        return outputs, pullback(cotangents)

    return run(*case)


def assert_close(actual, expected, rtol=1e-9):
    """Each leaf on its own scale: |a − e| ≤ rtol · max|e|."""
    actual, expected = jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected)
    assert len(actual) == len(expected)
    for (path, a), (_, e) in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, jax.tree_util.keystr(path)
        scale = np.max(np.abs(e), initial=0)
        np.testing.assert_allclose(
            a, e, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path)
        )


def relative_error(actual, expected):
    """The largest |a − e| / max|e| over the leaves."""
    errors = [
        np.max(np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64)))
        / np.max(np.abs(np.asarray(e, np.float64)))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    return np.max(errors)  # unlike `max`, lets no NaN pass
