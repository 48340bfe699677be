"""The equations of units whose state is a linear recurrence, and of its gradient; no loop.

    h = a ⊙ h₋ + b                                                                      (R1)

h₋ is the state before the step. What a and b are tells units apart. Neither depends on h₋, so no
product is in the loop, and what a step reads, p, is known for all steps at once:

    linear     a = p_a                      b = p_b
    minGRU     z = σ(p_z)                   a = 1 − z           b = z ⊙ p_h              (R2)
    minLSTM    f, i = σ(p_f), σ(p_i)        a = f / (f + i)     b = (1 − a) ⊙ p_h        (R3)
    RG-LRU     r, i = σ(p_r), σ(p_i)        log a = −λ ⊙ r      b = β ⊙ i ⊙ p_x          (R4)
               β = √(1 − a²)

Biases are added to p here; λ = c softplus(Λ) is made outside. In a step that begins an episode h₋
is 0, and β is 1.

The gradient is the recurrence in reverse. With dh what comes back to h from outside and from the
next step:

    da = dh ⊙ h₋        db = dh         dh₋ = a ⊙ dh                                    (R5)
    minGRU     dp_z = dh ⊙ z(1 − z) ⊙ (p_h − h₋)              dp_h = dh ⊙ z             (R6)
    minLSTM    dp_f = dh ⊙ a(1 − a) ⊙ (h₋ − p_h) ⊙ (1 − f)    dp_h = dh ⊙ (1 − a)
               dp_i = dh ⊙ a(1 − a) ⊙ (p_h − h₋) ⊙ (1 − i)                              (R7)
    RG-LRU     q = −r ⊙ ∂h/∂log a ⊙ dh = dh ⊙ (i ⊙ p_x ⊙ a² ⊙ r/β − a ⊙ h₋ ⊙ r)
               dp_r = λ ⊙ (1 − r) ⊙ q       dλ = Σ q
               dp_i = dh ⊙ β ⊙ p_x ⊙ i(1 − i)                 dp_x = dh ⊙ β ⊙ i         (R8)

All a of the units are in (0, 1): products of them vanish and nothing grows, so these are the
numbers themselves. Their logarithms, in which Feng et al. train, would want a positive b. Where a
is close to 1, what is small beside it is made without a difference: z and 1 − z, a and 1 − a each
by itself; 1 − a² as −expm1(2 log a). β has no slope at a = 1, but r/β stays finite, as β ≈ √(2λr):
the gradient needs no bound.

Axes: B batch, T time, D input width, H hidden width, G blocks of gates, K width of such a block.
Sources: Feng et al. 2024, arXiv 2410.01201 (minGRU, minLSTM); De et al. 2024, arXiv 2402.19427
(RG-LRU, §2.4); Martin & Cundy 2018, arXiv 1709.04057 (the recurrence and its gradient).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rnnattn.precision import accumulator
from rnnattn.steps import select

RATE = 8.0  # c of the RG-LRU


class MinGRUParams(NamedTuple):
    """The weights of a minGRU: blocks z, h of x @ w_x + b."""

    w_x: Float[Array, "D 2*H"]
    b: Float[Array, " 2*H"]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.b.shape[0] // 2


class MinLSTMParams(NamedTuple):
    """The weights of a minLSTM: blocks f, i, h of x @ w_x + b."""

    w_x: Float[Array, "D 3*H"]
    b: Float[Array, " 3*H"]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.b.shape[0] // 3


class RGLRUParams(NamedTuple):
    """The weights of an RG-LRU: gates r and i by products block by block, and Λ (`decay`)."""

    w_r: Float[Array, "G K K"]
    w_i: Float[Array, "G K K"]
    b_r: Float[Array, " H"]
    b_i: Float[Array, " H"]
    decay: Float[Array, " H"]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.decay.shape[0]


class Unit(NamedTuple):
    """What a and b are made of.

    `project(params, x, valid)` makes of the input what steps read, arrays (…, n H) of which each
    has n blocks p side by side, and the weights w (m, H) that steps share, in the dtype of sums;
    x of steps that are not valid reaches neither. `coefficients(p, w, fresh)` gives a and b, and
    `gradient(p, w, fresh, h₋, dh)` those of p and of w, before the sum over steps, and dh₋.
    `fresh`, (…, 1) or None, is True in the first step of an episode, where h₋ is given as 0.
    """

    name: str
    project: Callable
    coefficients: Callable
    gradient: Callable


def blocks_of(inputs, H):
    """The blocks p, (…, H) each, of arrays (…, n H), in the dtype that sums have."""
    wide = [x.astype(accumulator(x.dtype)) for x in inputs]
    return [p for x in wide for p in jnp.split(x, x.shape[-1] // H, axis=-1)]


def inputs_of(blocks, inputs):
    """The same back again, in the dtype of these inputs."""
    parts, joined = iter(blocks), []
    for x in inputs:
        own = [next(parts) for _ in range(x.shape[-1] // blocks[0].shape[-1])]
        joined.append(jnp.concatenate(own, axis=-1).astype(x.dtype))
    return tuple(joined)


def advance(a, h_prev, b):
    """R1."""
    return a * h_prev + b


def _shared_weights(*rows):
    """The weights of all steps as one array; w_x and the like are none of them."""
    return jnp.stack([row.astype(accumulator(row.dtype)) for row in rows])


def linear_inputs(params, x, valid):
    a, _ = x
    return x, jnp.zeros((0, a.shape[-1]), accumulator(a.dtype))


def linear(p, w, fresh):
    return p


def linear_gradient(p, w, fresh, h_prev, dh):
    a, _ = p
    return [dh * h_prev, dh], [], dh * a  # R5


def projected(n, params, x, valid):
    """x w_x, and b as the weights of its n blocks."""
    return (select(valid, x, 0) @ params.w_x,), _shared_weights(*jnp.split(params.b, n))


def mingru(p, w, fresh):
    z, p_h = jax.nn.sigmoid(p[0] + w[0]), p[1] + w[1]
    return jax.nn.sigmoid(-(p[0] + w[0])), z * p_h  # R2


def mingru_gradient(p, w, fresh, h_prev, dh):
    z, p_h = jax.nn.sigmoid(p[0] + w[0]), p[1] + w[1]
    a = jax.nn.sigmoid(-(p[0] + w[0]))
    dp = [dh * z * a * (p_h - h_prev), dh * z]  # R6
    return dp, dp, dh * a


def _shares(p_f, p_i):
    """f / (f + i) and i / (f + i): σ of ± log f/i, which gates that vanish both do not harm."""
    ratio = jax.nn.softplus(-p_i) - jax.nn.softplus(-p_f)
    return jax.nn.sigmoid(ratio), jax.nn.sigmoid(-ratio)


def minlstm(p, w, fresh):
    p_f, p_i, p_h = (block + bias for block, bias in zip(p, w, strict=True))
    a, of_input = _shares(p_f, p_i)
    return a, of_input * p_h  # R3


def minlstm_gradient(p, w, fresh, h_prev, dh):
    p_f, p_i, p_h = (block + bias for block, bias in zip(p, w, strict=True))
    a, of_input = _shares(p_f, p_i)
    dratio = dh * a * of_input * (h_prev - p_h)
    not_f, not_i = jax.nn.sigmoid(-p_f), jax.nn.sigmoid(-p_i)
    dp = [dratio * not_f, -dratio * not_i, dh * of_input]  # R7
    return dp, dp, dh * a


def _decay(r, λ, fresh):
    """a, and β = √(1 − a²), which is 1 in a fresh step; without a slope at a = 1 where β is 0."""
    log_a = -λ * r
    square = -jnp.expm1(2 * log_a)
    vanishes = square == 0
    β = jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, square)))
    return jnp.exp(log_a), β if fresh is None else jnp.where(fresh, 1, β)


def rglru_inputs(params, x, valid):
    """The gates, block by block, and x; the biases and λ."""
    x = select(valid, x, 0)
    G, K, _ = params.w_r.shape
    blocks = x.reshape(*x.shape[:-1], G, K)
    gates = [jnp.einsum("...gk,gkn->...gn", blocks, w).reshape(x.shape) for w in params[:2]]
    rate = jax.nn.softplus(params.decay.astype(accumulator(x.dtype)))
    return (*gates, x), _shared_weights(params.b_r, params.b_i, RATE * rate)


def rglru(p, w, fresh):
    r, i = jax.nn.sigmoid(p[0] + w[0]), jax.nn.sigmoid(p[1] + w[1])
    a, β = _decay(r, w[2], fresh)
    return a, β * i * p[2]  # R4


def rglru_gradient(p, w, fresh, h_prev, dh):
    r, i = jax.nn.sigmoid(p[0] + w[0]), jax.nn.sigmoid(p[1] + w[1])
    not_r, not_i = jax.nn.sigmoid(-(p[0] + w[0])), jax.nn.sigmoid(-(p[1] + w[1]))
    λ, x = w[2], p[2]
    a, β = _decay(r, λ, fresh)
    vanishes = (β == 0) if fresh is None else (β == 0) | fresh
    slope = jnp.where(vanishes, 0, a * a * r / jnp.where(vanishes, 1, β))
    q = dh * (i * x * slope - a * h_prev * r)
    dp_r = λ * not_r * q
    dp_i = dh * β * x * i * not_i
    return [dp_r, dp_i, dh * β * i], [dp_r, dp_i, q], dh * a  # R8


LINEAR = Unit("linear", linear_inputs, linear, linear_gradient)
MINGRU = Unit("minGRU", partial(projected, 2), mingru, mingru_gradient)
MINLSTM = Unit("minLSTM", partial(projected, 3), minlstm, minlstm_gradient)
RGLRU = Unit("RG-LRU", rglru_inputs, rglru, rglru_gradient)
