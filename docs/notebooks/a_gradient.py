# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A gradient derived, checked, broken and caught
#
# We derive the gradient of one step of an LSTM, write it down, and see how a wrong factor shows.

# %%
import jax

jax.config.update("jax_enable_x64", True)  # rounding must not hide an error

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rnnattn import (
    LSTMState,
    dot_product_attention,
    gru,
    init_gru,
    init_lstm,
    lstm,
    lstm_step,
    rope,
)

# %% [markdown]
# ## Derived
#
# From c = f ⊙ c₋ + i ⊙ g and h = o ⊙ tanh(c): c gets what the next step sends, and what comes through h,
#
# ```
# dc ← dc + dh ⊙ o ⊙ (1 − tanh²c)
# ```
#
# and each gate gets dc times the other factor times its own slope. The factors are the arguments here so that we can
# break them later.


# %%
def gradient(params, x, state, dh, dc, *, with_o=True, with_c=True):
    """The gradients of x and of the state before the step."""
    z = x @ params.w_x + state.h @ params.w_h + params.b
    i, f, g, o = jnp.split(z, 4, axis=-1)
    i, f, o, g = *map(jax.nn.sigmoid, (i, f, o)), jnp.tanh(g)
    c = f * state.c + i * g
    dc = dc + dh * (o if with_o else 1) * (1 - jnp.tanh(c) ** 2)
    dz_i = dc * g * i * (1 - i)
    dz_f = dc * (state.c if with_c else 1) * f * (1 - f)
    dz_g = dc * i * (1 - g**2)
    dz_o = dh * jnp.tanh(c) * o * (1 - o)
    dz = jnp.concatenate([dz_i, dz_f, dz_g, dz_o], axis=-1)
    return dz @ params.w_x.T, LSTMState(dz @ params.w_h.T, dc * f)


# %% [markdown]
# ## Checked
#
# Against the library's rule, with random cotangents on both outputs:

# %%
keys = iter(jax.random.split(jax.random.key(0), 9))
draw = lambda *shape: jax.random.normal(next(keys), shape)
params = init_lstm(next(keys), 3, 4, dtype=jnp.float64)
x, state = draw(2, 3), LSTMState(draw(2, 4), draw(2, 4))
dh, dc = draw(2, 4), draw(2, 4)

step = lambda x, state: lstm_step(params, x, state)
_, pullback = jax.vjp(step, x, state)
expected = pullback(LSTMState(dh, dc))
largest = lambda a, b: float(jnp.abs(a - b).max())
jax.tree.map(largest, gradient(params, x, state, dh, dc), expected)

# %% [markdown]
# ## Broken, and caught
#
# The notes that this library implements leave out o in one equation and c₋ in another. Either is seen at once:

# %%
for broken in ({"with_o": False}, {"with_c": False}):
    dx, _ = gradient(params, x, state, dh, dc, **broken)
    print(broken, float(jnp.abs(dx - expected[0]).max() / jnp.abs(expected[0]).max()))

# %% [markdown]
# A test that compares only with `dc = 0`, or with zero `c₋`, would have missed one of them. `python tests/mutate.py` does
# this to every line of every backward pass of the library.
#
# ## Against finite differences
#
# No algebra at all: move the input by ε along a random direction, and compare the difference quotient with the
# gradient. The error falls with ε² until rounding takes over. A wrong gradient would be a horizontal line.


# %%
def error(f, x, epsilon):
    direction = jax.random.normal(jax.random.key(7), x.shape)
    quotient = (f(x + epsilon * direction) - f(x - epsilon * direction)) / (2 * epsilon)
    exact = jnp.vdot(jax.grad(f)(x), direction)
    return abs(float((quotient - exact) / exact))


def of(y):
    return jnp.vdot(y, jax.random.normal(jax.random.key(8), y.shape))


inputs = jax.random.normal(jax.random.key(9), (2, 6, 4))
heads = jax.random.normal(jax.random.key(10), (1, 6, 2, 4))
of_gru = init_gru(jax.random.key(11), 4, 5, dtype=jnp.float64)
of_lstm = init_lstm(jax.random.key(12), 4, 5, dtype=jnp.float64)
functions = {
    "lstm": (lambda x: of(lstm(of_lstm, x)[0]), inputs),
    "gru": (lambda x: of(gru(of_gru, x)[0]), inputs),
    "attention": (lambda q: of(dot_product_attention(q, heads, heads, is_causal=True)), heads),
    "rope": (lambda q: of(rope(q, jnp.arange(6))), heads),
}
steps = np.logspace(-9, -1, 17)
plt.figure(figsize=(6, 3))
for name, (f, at) in functions.items():
    plt.loglog(steps, [max(error(jax.jit(f), at, e), 1e-16) for e in steps], "o-", ms=3, label=name)
plt.xlabel("ε")
plt.ylabel("relative error of the gradient")
plt.legend()
plt.tight_layout()

# %% [markdown]
# Rotation is linear, so its difference quotient is exact for large steps, and only rounding is left.
