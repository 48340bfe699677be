"""The equations of layer normalisation, and of the LSTM and the GRU that have it, with gradients.

A row r of R numbers, and its gradient, which two means of the row are taken off:

    v = norm(r) = (r − mean r) / σ      σ = √(var r + ε)
    dr = (dv − mean dv − v mean(dv ⊙ v)) / σ                                         (N1)

The LSTM (Ba, Kiros & Hinton 2016), with gains k and norms over all gates:

    z = k_x ⊙ norm(x w_x) + k_h ⊙ norm(h₋ w_h) + b      i, f, g, o as in the LSTM    (N2)
    c = f ⊙ c₋ + i ⊙ g      t = tanh(k_c ⊙ norm(c) + b_c)      h = o ⊙ t             (N3)

    dz_o = dh ⊙ t ⊙ o(1 − o)            dq = dh ⊙ o ⊙ (1 − t²)                       (N4)
    dc ← dc + N1 of k_c ⊙ dq            dz_i, dz_f, dz_g, dc₋ from dc as in the LSTM

The GRU, the reset gate after the product and its norm:

    s = k_h ⊙ norm(h₋ w_h)              a = k_x ⊙ norm(x w_x) + b                    (N5)
    r, z = σ(a_r + s_r), σ(a_z + s_z)   n = tanh(a_n + r ⊙ (s_n + b_n))
    h = (1 − z) ⊙ n + z ⊙ h₋            d_r, d_z, d_n, ds_n as in the GRU

Both, d what comes back to k_h ⊙ norm(h₋ w_h), and d' what comes back to the inputs' part:

    dh₋ += (N1 of k_h ⊙ d) w_hᵀ         dk_h = Σ d ⊙ norm(h₋ w_h)                    (N6)
    dx = (N1 of k_x ⊙ d') w_xᵀ          dk_x = Σ d' ⊙ norm(x w_x)

These are the variants of Haste, too. Axes: B batch, T time, D input width, H hidden width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rnnattn.recurrent.unit import Unit, along, blocks_of, dot, joined, outer, sigmoid, widened
from rnnattn.recurrent.units.gru import (
    GRUState,
    gradient_of_gates,
    interpolated,
    slopes_of_gates,
)
from rnnattn.recurrent.units.lstm import LSTMState, memory, memory_slopes

_EPSILON = 1e-5


class LayerNormLSTMParams(NamedTuple):
    """The weights of one layer and direction; gains k, of the norms of x w_x, h w_h and c."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "H 4*H"]
    b: Float[Array, " 4*H"]
    k_x: Float[Array, " 4*H"]
    k_h: Float[Array, " 4*H"]
    k_c: Float[Array, " H"]
    b_c: Float[Array, " H"]


class LayerNormGRUParams(NamedTuple):
    """The weights of one layer and direction; gains k, of the norms of x w_x and h w_h."""

    w_x: Float[Array, "D 3*H"]
    w_h: Float[Array, "H 3*H"]
    b: Float[Array, " 3*H"]
    b_n: Float[Array, " H"]
    k_x: Float[Array, " 3*H"]
    k_h: Float[Array, " 3*H"]


def norm(r):
    """norm(r), and 1/σ."""
    r = r - jnp.mean(r, -1, keepdims=True)
    inverse = 1 / jnp.sqrt(jnp.mean(r * r, -1, keepdims=True) + _EPSILON)
    return r * inverse, inverse


def norm_gradient(dv, v, inverse):
    """N1."""
    mean = lambda row: jnp.mean(row, -1, keepdims=True)
    return (dv - mean(dv) - v * mean(dv * v)) * inverse


class _Normed(Unit):
    """What both have in common: norms of both products, apart."""

    def prepare(self, params):
        """What is added to rows, or multiplied with them, in the dtype of sums."""
        wide = widened(params)
        return wide._replace(w_x=params.w_x, w_h=params.w_h)

    def inputs(self, weights, x):
        v, _ = norm(dot(x, weights.w_x))
        return along(weights.k_x, v) * v + along(weights.b, v)

    def from_h(self, params, v):
        """k_h ⊙ norm(h₋ w_h), from the norm."""
        return along(params.k_h, v) * v

    def h_gradient(self, params, d, v, inverse):
        """What comes back to h₋ w_h and to h₋: N6."""
        dr = norm_gradient(d * params.k_h[None], v, inverse)
        return dr, dr @ params.w_h.T

    def gradient_of_norms(self, params, x, h, v, d, dr, d_inputs):
        """N6: of w_x, w_h, b, k_x, k_h, and of x."""
        v_x, inverse = norm(dot(x, params.w_x.astype(x.dtype)))
        dr_x = norm_gradient(d_inputs * along(params.k_x, v_x), v_x, inverse)
        summed = lambda row: jnp.sum(row, (0, 1))
        made = {
            "w_x": outer(x, dr_x),
            "w_h": outer(h, dr),
            "b": summed(d_inputs),
            "k_x": summed(d_inputs * v_x),
            "k_h": summed(d * v),
        }
        return made, (dr_x @ params.w_x.T).astype(x.dtype)


def _verify(check, params, D, blocks):
    name = f"{blocks}H"
    check.axes("params.w_h", params.w_h, f"(H, {name})")
    H = params.w_h.shape[0]
    check(H > 0, "params.w_h", "of at least one row", jnp.shape(params.w_h))
    check.shape("params.w_h", params.w_h, (H, blocks * H), f"(H, {name})")
    check.shape("params.w_x", params.w_x, (D, blocks * H), f"(D of `x`, {name})")
    for field in ("b", "k_x", "k_h"):
        check.shape(f"params.{field}", getattr(params, field), (blocks * H,), f"({name},)")
    for field in {"k_c", "b_c", "b_n"} & set(params._fields):
        check.shape(f"params.{field}", getattr(params, field), (H,), "(H,)")


class LSTMSlopes(NamedTuple):
    """The local derivatives of a step: none depends on what comes back through time."""

    i: Array  # ∂c/∂z_i = g ⊙ i(1 − i)
    f: Array  # ∂c/∂z_f = c₋ ⊙ f(1 − f)
    g: Array  # ∂c/∂z_g = i ⊙ (1 − g²)
    o: Array  # ∂h/∂z_o = t ⊙ o(1 − o)
    q: Array  # ∂h/∂q = o ⊙ (1 − t²)
    carry: Array  # ∂c/∂c₋ = f
    c: Array  # norm(c), and its 1/σ
    c_inverse: Array
    v: Array  # norm(h₋ w_h), and its 1/σ
    v_inverse: Array


@dataclass(frozen=True)
class LayerNormLSTM(_Normed):
    """The LSTM with layer normalisation."""

    def widths(self, params):
        H = params.w_h.shape[0]
        return LSTMState(H, H)

    def kept_width(self, params):
        return 8 * params.w_h.shape[0]

    def verify(self, check, params, D):
        _verify(check, params, D, 4)

    def step(self, weights, u, h, state, e=None):
        r = dot(h, weights.w_h)
        z = u + self.from_h(weights, norm(r)[0])
        gates = self.gates(z)
        c = memory(gates, state.c, e)
        after = gates[-1] * self.seen(weights, norm(c)[0])
        return LSTMState(after.astype(h.dtype), c), joined(z, r)

    def gates(self, z):
        z_i, z_f, z_g, z_o = blocks_of(z, 4)
        return sigmoid(z_i), sigmoid(z_f), jnp.tanh(z_g), sigmoid(z_o)

    def seen(self, weights, v):
        """t, from norm(c)."""
        return jnp.tanh(along(weights.k_c, v) * v + along(weights.b_c, v))

    def slopes(self, weights, x, h, before, after, kept, e):
        if kept is None:
            r = dot(h, weights.w_h)
            v, v_inverse = norm(r)
            z = self.inputs(weights, x) + self.from_h(weights, v)
        else:
            z, r = blocks_of(kept, 2)
            v, v_inverse = norm(r)
        gates = self.gates(z)
        _, f, _, o = gates
        c, c_inverse = norm(after.c)
        t = self.seen(weights, c)
        d_o, d_q = t * o * (1 - o), o * (1 - t * t)
        d_i, d_f, d_g = memory_slopes(gates, before.c, e)
        slopes = LSTMSlopes(d_i, d_f, d_g, d_o, d_q, f, c, c_inverse, v, v_inverse)
        return slopes, (c, v)

    def step_gradient(self, params, slopes, after):
        dq = after.h * slopes.q
        dc = after.c + norm_gradient(dq * params.k_c[None], slopes.c, slopes.c_inverse)
        dz = joined(dc * slopes.i, dc * slopes.f, dc * slopes.g, after.h * slopes.o)
        dr, dh = self.h_gradient(params, dz, slopes.v, slopes.v_inverse)
        return LSTMState(jnp.zeros_like(dh), dc * slopes.carry), dh, (dz, dr, dq)

    def gradient(self, params, x, h, before, after, seen, dz):
        (c, v), (dz, dr, dq) = seen, dz
        made, dx = self.gradient_of_norms(params, x, h, v, dz, dr, dz)
        of_c = {"k_c": jnp.sum(dq * c, (0, 1)), "b_c": jnp.sum(dq, (0, 1))}
        return LayerNormLSTMParams(**made, **of_c), dx


class GRUSlopes(NamedTuple):
    """Those of the GRU's gates; norm(h₋ w_h) and its 1/σ."""

    gates: NamedTuple
    v: Array
    v_inverse: Array


@dataclass(frozen=True)
class LayerNormGRU(_Normed):
    """The GRU with layer normalisation."""

    def widths(self, params):
        return GRUState(params.w_h.shape[0])

    def kept_width(self, params):
        return 6 * params.w_h.shape[0]

    def verify(self, check, params, D):
        _verify(check, params, D, 3)

    def step(self, weights, u, h, state, e=None):
        r = dot(h, weights.w_h)
        _, z, n, _ = self.gates(weights, u, norm(r)[0])
        return interpolated(z, n, state, e), joined(u, r)

    def gates(self, weights, u, v):
        """r, z, n and s_n + b_n."""
        a_r, a_z, a_n = blocks_of(u, 3)
        s_r, s_z, s_n = blocks_of(self.from_h(weights, v), 3)
        s_n = s_n + along(weights.b_n, s_n)
        r, z = sigmoid(a_r + s_r), sigmoid(a_z + s_z)
        return r, z, jnp.tanh(a_n + r * s_n), s_n

    def slopes(self, weights, x, h, before, after, kept, e):
        if kept is None:
            u, r = self.inputs(weights, x), dot(h, weights.w_h)
        else:
            u, r = blocks_of(kept, 2)
        v, v_inverse = norm(r)
        r, z, n, s_n = self.gates(weights, u, v)
        gates = slopes_of_gates(r, z, n, before.h.astype(z.dtype), s_n, e)
        return GRUSlopes(gates, v, v_inverse), v

    def step_gradient(self, params, slopes, after):
        gates, v, v_inverse = slopes
        d_r, d_z, d_n, ds_n = gradient_of_gates(gates, after.h)
        ds = joined(d_r, d_z, ds_n)
        dr, dh = self.h_gradient(params, ds, v, v_inverse)
        return GRUState(after.h * gates.carry), dh, (ds, dr, joined(d_r, d_z, d_n))

    def gradient(self, params, x, h, before, after, seen, dz):
        ds, dr, d_inputs = dz
        made, dx = self.gradient_of_norms(params, x, h, seen, ds, dr, d_inputs)
        *_, ds_n = blocks_of(ds, 3)
        return LayerNormGRUParams(**made, b_n=jnp.sum(ds_n, (0, 1))), dx
