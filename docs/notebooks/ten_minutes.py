# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Ten minutes with rnnattn
#
# A recurrent unit, its gradient, padding, attention and positions.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import rnnattn
from rnnattn import dot_product_attention, init_lstm, lstm, lstm_step, rope

rnnattn.native.status()  # do the kernels for CPUs run here?

# %% [markdown]
# ## An LSTM over a sequence
#
# Parameters are a named tuple of arrays, the state is one as well. `y` has the hidden state after every step.

# %%
params = init_lstm(jax.random.key(0), input_size=2, hidden_size=16)
x = jax.random.normal(jax.random.key(1), (3, 50, 2))  # (batch, time, input)
y, state = lstm(params, x)
y.shape, state.h.shape, bool((y[:, -1] == state.h).all())

# %% [markdown]
# ## Its gradient
#
# `jax.grad` uses the rule that is written by hand. How far back does the last output look? The norm of its gradient with
# respect to each input says:


# %%
def last(x):
    return lstm(params, x)[1].h.sum()


reach = jnp.linalg.norm(jax.grad(last)(x), axis=-1)
plt.figure(figsize=(6, 2.5))
plt.semilogy(reach.T)
plt.xlabel("step of the input")
plt.ylabel("|d last / dx|")
plt.tight_layout()

# %% [markdown]
# `rnnattn.reference` has the same function in plain JAX. The two gradients agree to rounding:

# %%
plain = jax.grad(lambda x: rnnattn.reference.lstm(params, x)[1].h.sum())(x)
float(jnp.abs(plain - jax.grad(last)(x)).max())

# %% [markdown]
# ## Rows of several lengths
#
# Padding may hold anything, even NaN.

# %%
lengths = jnp.array([50, 20, 0])
padded = jnp.where(jnp.arange(50)[None, :, None] < lengths[:, None, None], x, jnp.nan)
y, state = lstm(params, padded, lengths=lengths)
bool(jnp.isfinite(y).all()), bool((y[1, 20:] == 0).all()), bool((state.h[2] == 0).all())

# %% [markdown]
# ## One step at a time
#
# The same as the whole sequence at once, for a loop of your own:

# %%
state = rnnattn.LSTMState(jnp.zeros((3, 16)), jnp.zeros((3, 16)))
for t in range(50):
    state = lstm_step(params, x[:, t], state)
float(jnp.abs(state.h - lstm(params, x)[1].h).max())

# %% [markdown]
# ## Attention, and positions that rotate
#
# Memory is linear in T, with a window or without. Rotary positions make logits depend on distances alone: moving all
# positions by 100,000 steps changes nothing, as the angles are exact.

# %%
q, k, v = jax.random.normal(jax.random.key(2), (3, 1, 512, 4, 32))


def attend(start):
    t = start + jnp.arange(512)
    return dot_product_attention(rope(q, t), rope(k, t), v, is_causal=True)


float(jnp.abs(attend(0) - attend(100_000)).max())

# %% [markdown]
# Causality can be seen in a gradient: the output at step 300 has none from later values.

# %%
influence = jax.grad(lambda v: dot_product_attention(q, k, v, is_causal=True)[0, 300].sum())(v)
bool((influence[0, 301:] == 0).all())

# %% [markdown]
# Next: [the book of gradients](../gradients/index.md), or [a gradient derived, checked, broken and
# caught](a_gradient.py).
