"""16-bit inputs against float64, beside what `jax.nn` makes of them; and what a loop carries.

Errors are judged where float16 and bfloat16 can hold the right value.
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
    lstm,
    lstm_step,
    native,
    reference,
)
from rnnattn.parallel import ring_attention
from tests.attention_cases import quick

B, T, N, K = 1, 24, 2, 32
WIDTHS = [jnp.bfloat16, jnp.float16]
# the largest logit, its scale, and what the loss is multiplied with
EXTREMES = [
    (1.0, K**-0.5, 1.0),
    (1.0, 1000.0, 2.0**15),
    (1.0, 1 / K, 2.0**15),
    (20.0, 1 / K, 2.0**10),
    (20.0, 1000.0, 1.0),
    (200.0, K**-0.5, 1.0),
    (200.0, 1.0, 2.0**15),
    (500.0, 1000.0, 2.0**10),
    (500.0, 1 / K, 1.0),
]


def problem(dtype, largest, scale, loss, seed=0):
    """q, k, v and what comes back, with logits up to `largest`; all fit into the dtype."""
    rng = np.random.default_rng(seed)
    q, k, v, do = (rng.normal(size=(B, T, N, K)) for _ in range(4))
    size = np.sqrt(largest / (scale * np.abs(np.einsum("btnk,bsnk->bnts", q, k)).max()))
    do = np.clip(loss * do, -6e4, 6e4)
    return [jnp.asarray(x, dtype) for x in (size * q, size * k, v, do)]


def ring(q, k, v, *, scale):
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    return ring_attention(q, k, v, mesh=mesh, axis_name="sequence", scale=scale)


OURS: dict[str, Any] = {
    "dense": partial(dot_product_attention, implementation="dense"),
    "blockwise": partial(dot_product_attention, implementation="blockwise"),
    "twin": reference.dot_product_attention,
    "ring": ring,
}
if native.status().available:
    OURS["native"] = partial(dot_product_attention, implementation="native")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("rule", OURS)
def test_attention_is_as_exact_as_jax_nn(rule, dtype):
    """At most 1.5 times its error, the largest and the root mean square, in O, dq, dk and dv."""

    def results(function, q, k, v, do, scale):
        out, pullback = jax.vjp(lambda q, k, v: function(q, k, v, scale=scale), q, k, v)
        return out, *pullback(do)

    def theirs(*arguments):  # what it tries first fails only where it is compiled as a whole
        with jax.numpy_dtype_promotion("standard"):
            return results(jax.nn.dot_product_attention, *arguments)

    ours = quick(partial(results, OURS[rule]))
    exact = quick(partial(results, reference.dot_product_attention))
    for case in EXTREMES:
        arrays, scale = problem(dtype, *case), case[1]
        right = exact(*(x.astype(jnp.float64) for x in arrays), scale)
        for name, e, a, n in zip(
            ("O", "dq", "dk", "dv"),
            right,
            ours(*arrays, scale),
            theirs(*arrays, scale),
            strict=True,
        ):
            assert a.dtype == dtype
            fits = np.abs(e) < float(jnp.finfo(dtype).max)
            error = lambda x: np.where(fits, np.abs(np.asarray(x, np.float64) - e), 0)  # noqa: B023
            least = float(jnp.finfo(dtype).smallest_subnormal)
            for norm in (np.max, lambda x: np.sqrt(np.mean(x**2))):
                mine, peer = norm(error(a)), norm(error(n))
                # NaN and infinity of the peer allow what is finite, and that alone
                bound = 1.5 * peer + least if np.isfinite(peer) else np.finfo(np.float64).max
                assert mine <= bound, (name, case, mine, peer)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_scale_is_not_rounded(dtype):
    """Two keys, K 1: logits 76.8 and 76.5, whose difference is less than the next number."""
    q = jnp.full((1, 1, 1, 1), 16, dtype)
    k = jnp.array([16, 15.9375], dtype).reshape(1, 2, 1, 1)
    for rule in OURS.keys() - {"ring"}:
        _, lse = OURS[rule](q, k, k, scale=0.3, return_residual=True)
        np.testing.assert_allclose(lse, np.logaddexp(76.8, 76.5), rtol=1e-6)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("step", [lstm_step, reference.lstm_step])
@pytest.mark.parametrize("wide", [False, True])
def test_a_loop_can_carry_the_state(step, dtype, wide):
    params = init_lstm(jax.random.key(0), 3, 4, dtype=dtype)
    state = LSTMState(jnp.zeros((2, 4), dtype), jnp.zeros((2, 4), jnp.float32 if wide else dtype))
    x = jnp.ones((5, 2, 3), dtype)
    last, _ = jax.lax.scan(lambda state, x: (step(params, x, state), None), state, x)
    run = lstm if step is lstm_step else reference.lstm
    _, whole = run(params, x, state, time_major=True)
    for a, b, s in zip(last, whole, state, strict=True):
        assert a.dtype == b.dtype == s.dtype
        wide = [np.asarray(x, np.float32) for x in (a, b)]
        np.testing.assert_allclose(wide[0], wide[1], rtol=0, atol=0.02)
    assert run(params, x, time_major=True)[1].c.dtype == jnp.float32
