"""The equations of the plain recurrent network (Elman 1990) and of its gradient: one step, no loop.

    a = x w_x + h₋ w_h + b              h = φ(a),   φ tanh or relu                   (R1)

h₋ is the state before the step. The gradient, with dh what comes back from outside and from the
next step:

    da = dh ⊙ φ'(a)                     tanh' = 1 − tanh²,  relu' = [a > 0]          (R2)
    dw_x = Σ xᵀ da      dw_h = Σ h₋ᵀ da     db = Σ da     over batch and time        (R3)
    dx = da w_xᵀ        dh₋ = da w_hᵀ                                                (R4)

Axes: B batch, T time, D input width, H hidden width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rnnattn.checks import Check
from rnnattn.recurrent.unit import Unit, affine, dot, joined, outer


class RNNParams(NamedTuple):
    """The weights of one layer and direction, multiplied on the right: x @ w_x + h @ w_h + b."""

    w_x: Float[Array, "D H"]
    w_h: Float[Array, "H H"]
    b: Float[Array, " H"]


class RNNState(NamedTuple):
    """What one step hands to the next."""

    h: Float[Array, "B H"]


@dataclass(frozen=True)
class RNN(Unit):
    """The plain recurrent network."""

    candidate = False

    relu: bool = False

    def widths(self, params):
        return RNNState(params.w_h.shape[0])

    def kept_width(self, params):
        return params.w_h.shape[0]

    def verify(self, check, params, D):
        check.axes("params.w_h", params.w_h, "(H, H)")
        H = params.w_h.shape[0]
        check(H > 0, "params.w_h", "of at least one row", jnp.shape(params.w_h))
        check.shape("params.w_h", params.w_h, (H, H), "(H, H)")
        check.shape("params.w_x", params.w_x, (D, H), "(D of `x`, H)")
        check.shape("params.b", params.b, (H,), "(H,)")

    def inputs(self, weights, x):
        return affine(x, weights.w_x, weights.b)

    def step(self, weights, u, h, state, e=None):
        a = u + dot(h, weights.w_h)
        after = jnp.maximum(a, 0) if self.relu else jnp.tanh(a)
        return RNNState(after.astype(h.dtype)), a

    def slopes(self, weights, x, h, before, after, kept, e):
        a = kept if kept is not None else self.inputs(weights, x) + dot(h, weights.w_h)
        return self.slope(a), None

    def slope(self, a):
        """φ'(a)."""
        return (a > 0).astype(a.dtype) if self.relu else 1 - jnp.tanh(a) ** 2

    def step_gradient(self, params, slopes, after):
        da = after.h * slopes
        dh = da @ params.w_h.T
        return RNNState(jnp.zeros_like(dh)), dh, da

    def gradient(self, params, x, h, before, after, seen, dz):
        dw = outer(joined(x, h), dz)
        D = x.shape[-1]
        dparams = RNNParams(dw[:D], dw[D:], jnp.sum(dz, (0, 1)))
        return dparams, (dz @ params.w_x.T).astype(x.dtype)


def rnn_unit(function, activation):
    """The unit of the options of `function`; `ValueError` if one is off."""
    Check(function).one_of("activation", activation, ("tanh", "relu"))
    return RNN(activation == "relu")
