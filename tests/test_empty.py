"""Arrays without elements: results and gradients are those of no steps, no rows or no queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnattn
from rnnattn import masks, reference

D, H = 2, 4
UNITS = ["lstm", "gru", "rnn", "layer_norm_lstm", "layer_norm_gru", "slstm", "mingru", "minlstm"]
SHAPES = [((2, 2), 0), ((0,), 3), ((2, 0), 0)]  # of the batch, and T
MASKS = {
    "causal": masks.causal(),
    "a range": ~masks.prefix(2),
    "two ranges": masks.causal() & (masks.window(2) | masks.sinks(1)),
    "a function": masks.dilated(2),
}


def params_of(name):
    init: Any = getattr(rnnattn, f"init_{name}")
    return init(jax.random.key(0), D, H)


def value_and_gradients(f, *floats):
    out, back = jax.vjp(f, *floats)
    return out, back(jax.tree.map(jnp.ones_like, out))


@pytest.mark.parametrize("module", [rnnattn, reference], ids=["by rule", "twin"])
@pytest.mark.parametrize("name", UNITS)
def test_sequences_without_steps_or_rows(name, module):
    params, run = params_of(name), getattr(module, name)
    for batch, T in SHAPES:
        x = jnp.ones((*batch, T, D), jnp.float32)
        lengths, resets = jnp.full(batch, T, jnp.int32), jnp.zeros((*batch, T), bool)
        of = lambda p, x, n=lengths, new=resets: run(p, x, lengths=n, resets=new)
        (y, last), (dparams, dx) = value_and_gradients(of, params, x)
        assert y.shape == (*batch, T, H)
        assert all(s.shape[:-1] == batch and not s.any() for s in jax.tree.leaves(last))
        assert not any(d.any() for d in jax.tree.leaves(dparams))
        assert dx.shape == x.shape


@pytest.mark.parametrize("name", UNITS)
def test_steps_of_no_rows(name):
    params, step = params_of(name), getattr(rnnattn, f"{name}_step")
    run = getattr(rnnattn, name)
    _, state = run(params, jnp.ones((0, 1, D), jnp.float32))
    x = jnp.ones((0, D), jnp.float32)
    _, (dparams, dx, _) = value_and_gradients(step, params, x, state)
    assert not any(d.any() for d in jax.tree.leaves(dparams))
    assert dx.shape == x.shape


def test_stacks_without_steps():
    layers = [params_of("lstm"), params_of("lstm")._replace(w_x=jnp.ones((H, 4 * H), jnp.float32))]
    y, states = rnnattn.stacked_lstm(layers, jnp.ones((2, 2, 0, D), jnp.float32))
    assert y.shape == (2, 2, 0, H)
    assert states[1].c.shape == (2, 2, H)


@pytest.mark.parametrize("module", [rnnattn, reference], ids=["by rule", "twin"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_without_queries_or_rows(mask, module):
    attend = module.dot_product_attention
    for shape in ((2, 0), (0, 3), (2, 2, 0)):
        *batch, T = shape
        query, bias = jnp.ones((*shape, 2, 4)), jnp.ones((*batch, 2, T, 3))
        key = value = jnp.ones((*batch, 3, 1, 4))
        of = lambda q, k, v, b, how=MASKS[mask], attend=attend: attend(
            q, k, v, b, mask_function=how
        )
        out, gradients = value_and_gradients(of, query, key, value, bias)
        assert out.shape == query.shape
        assert [d.shape for d in gradients] == [query.shape, key.shape, value.shape, bias.shape]
        assert not any(np.any(d) for d in gradients)
