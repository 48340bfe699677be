"""A stack of LSTMs that reads text, character by character, and says what comes next.

    y = LSTM(E[x]),   p(next) = softmax(y W + b),   loss = -log p(next),   in nats per character

Axes: B batch, T time, V characters, E width of their embedding, H hidden width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

import rnnattn
import rnnattn.reference
from experiments.engine.config import Fraction, Layers, Size
from experiments.engine.training import Loss
from experiments.models.lstm import (
    Dtype,
    Gradient,
    ModelConfig,
    computed_in,
    init_lstm,
    kept_dtype,
)

READ_AT_ONCE = 256
"""Characters of held-out text in memory at a time; the scores are the same for any number."""

States = tuple[rnnattn.LSTMState, ...]


@dataclass(frozen=True)
class TextModelConfig(ModelConfig):
    """The stacked LSTM and how its gradient is computed."""

    layers: Layers = 2
    """Number of LSTM layers."""
    embedding_size: Size = 8
    """Size of the character embedding."""
    dropout: Fraction = 0.1
    """Dropout rate between layers, in training."""
    remat: Literal["none", "states"] = "none"
    """What to recompute in the backward pass of the hand-derived gradient, to save memory: nothing,
    or most states (one in √window is kept)."""


class TextParams(NamedTuple):
    """Weights of the model."""

    embedding: Float[Array, "V E"]
    layers: tuple[rnnattn.LSTMParams, ...]
    w: Float[Array, "H V"]
    b: Float[Array, " V"]


def init_text(key: PRNGKeyArray, characters: int, config: TextModelConfig) -> TextParams:
    """Random weights: the library's for the LSTMs, variances 1 and 1/H for what is around them."""
    embedding_key, w_key, *keys = jax.random.split(key, config.layers + 2)
    E, H, dtype = config.embedding_size, config.hidden_size, jnp.dtype(kept_dtype(config.dtype))
    widths = [E] + [H] * (config.layers - 1)
    return TextParams(
        jax.random.normal(embedding_key, (characters, E), dtype),
        tuple(init_lstm(k, D, H, dtype=dtype) for k, D in zip(keys, widths, strict=True)),
        jax.random.normal(w_key, (H, characters), dtype) / H**0.5,
        jnp.zeros((characters,), dtype),
    )


def zero_states(params: TextParams, rows: int) -> States:
    """The states of all layers before anything is read."""
    zeros = [jnp.zeros((rows, layer.w_h.shape[0]), layer.b.dtype) for layer in params.layers]
    return tuple(rnnattn.LSTMState(h=z, c=z) for z in zeros)


def predict(
    params: TextParams,
    x: Int32[Array, "B T"],
    states: States,
    gradient: Gradient,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    dtype: Dtype | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "B T V"], States]:
    """Logits of the character after each of `x`, and the states after the last.

    Args:
        dtype: of the arithmetic; None is that of the parameters, in which logits and states are.
        remat: keep a few of the states for the gradient.
    """
    residuals = math.isqrt(x.shape[1]) if remat else None
    stack = rnnattn.stacked_lstm if gradient == "hand" else rnnattn.reference.stacked_lstm
    # of the table itself, the gradients of many characters would be added up in that dtype
    embedded = computed_in(dtype, params.embedding[x])
    layers, w = computed_in(dtype, (params.layers, params.w))
    below = [state._replace(h=computed_in(dtype, state.h)) for state in states]
    y, after = stack(
        layers, embedded, below, dropout_rate=dropout, dropout_key=key, residuals=residuals
    )
    logits = (y @ w).astype(params.b.dtype) + params.b[None, None, :]
    return logits, jax.tree.map(lambda new, old: new.astype(old.dtype), after, states)


def loss_under(
    gradient: Gradient, dropout: float, dtype: Dtype | None = None, remat: bool = False
) -> Loss:
    """Cross-entropy and accuracy of a batch of windows, and the states that the next one gets."""

    def loss(params, batch, key, states):
        states = jax.lax.stop_gradient(states)
        states = jax.tree.map(lambda s: jnp.where(batch.first, 0, s), states)
        x, following = batch.characters[:, :-1], batch.characters[:, 1:]
        logits, states = predict(params, x, states, gradient, dropout, key, dtype, remat)
        nats, correct = judge(logits, following)
        accuracy = jnp.mean(correct, dtype=logits.dtype)
        return jnp.mean(nats), ({"accuracy": accuracy}, states)

    return loss


def read_through(
    params: TextParams, text: Int32[Array, " N"], gradient: Gradient, dtype: Dtype | None = None
) -> tuple[Float[Array, " N-1"], Float[Array, " N-1"]]:
    """-log p of each character but the first, given all before it, and whether it was guessed."""

    def read(states, window):
        x, following = window
        logits, states = predict(params, x[None, :], states, gradient, dtype=dtype)
        nats, correct = judge(logits[0], following)
        return states, (nats, correct.astype(nats.dtype))

    # what is read beyond the end changes nothing before it
    padding = (0, -(len(text) - 1) % READ_AT_ONCE)
    windows = [jnp.pad(part, padding).reshape(-1, READ_AT_ONCE) for part in (text[:-1], text[1:])]
    _, (nats, correct) = jax.lax.scan(read, zero_states(params, 1), windows)
    return nats.ravel()[: len(text) - 1], correct.ravel()[: len(text) - 1]


def draw(logits: Float[Array, " V"], key: PRNGKeyArray, temperature: float) -> Int32[Array, ""]:
    """A character by p ∝ exp(logit / temperature); at a temperature of 0 the likeliest."""
    if temperature == 0:
        return jax.lax.argmax(logits, 0, jnp.int32)
    # one beyond the range of the logits' dtype would be rounded to infinity or 0
    limits = jnp.finfo(logits.dtype)
    temperature = min(max(temperature, float(limits.tiny)), float(limits.max))
    # the likeliest is 0, so that no temperature makes it infinite
    logits = (logits - jnp.max(logits)) / temperature
    return jax.random.categorical(key, logits).astype(jnp.int32)


@partial(jax.jit, static_argnames=("length", "temperature"))
def write(
    params: TextParams,
    prompt: Int32[Array, " N"],
    key: PRNGKeyArray,
    *,
    length: int,
    temperature: float = 1.0,
) -> Int32[Array, " length"]:
    """The characters that follow the prompt, which has one at least.

    Each is drawn from what the model expects after the last, p(next) ∝ exp(logit / temperature); at
    a temperature of 0 it is the likeliest.
    """

    def read(below, character):
        x, states = params.embedding[character][None, :], []
        for layer, state in zip(params.layers, below, strict=True):
            states.append(rnnattn.lstm_step(layer, x, state))
            x = states[-1].h
        return tuple(states), x[0]

    def step(carry, key):
        character, below = carry
        states, h = read(below, character)
        logits = h @ params.w + params.b
        character = draw(logits, key, temperature)
        return (character, states), character

    states = zero_states(params, 1)
    if len(prompt) > 1:
        states, _ = jax.lax.scan(read, states, prompt[:-1])
    return jax.lax.scan(step, (prompt[-1], states), jax.random.split(key, length))[1]


def judge(
    logits: Float[Array, "*axes V"], following: Int32[Array, "*axes"]
) -> tuple[Float[Array, "*axes"], Bool[Array, "*axes"]]:
    """-log p of the characters that follow, and whether they are the likeliest."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    return nats, jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == following
