"""The equations of the sLSTM of xLSTM and of its gradient: one step, no loop.

    z = x w_x + h₋ w_h + b              pre-activations, four blocks in the order i, f, g, o,
                                        w_h block-diagonal: a head reads its own h₋
    l = log σ(z_f), or z_f              g = tanh(z_g)    o = σ(z_o)                  (S1)
    m = max(l + m₋, z_i)                f' = e^(l + m₋ − m)    i' = e^(z_i − m)      (S2)
    c = f' ⊙ c₋ + i' ⊙ g                n = f' ⊙ n₋ + i'    h = o ⊙ c / n            (S3)

The gates are exponentials, and m keeps them in range: c and n are both e^(−m) times what they
would be without it, and so h does not depend on m. From zeros, where n₋ = 0, nothing is left to
scale, and m is z_i. The gradient is that of all four fields; with p = l + m₋ and w = ∂m/∂p, which
is 1 where p is the larger and 0 where it is not:

    dz_o = dh ⊙ (c / n) ⊙ o(1 − o)      dc ← dc + dh ⊙ o / n
                                        dn ← dn − dh ⊙ o ⊙ c / n²                    (S4)
    dp = (dc ⊙ c₋ + dn ⊙ n₋) ⊙ f'       di = (dc ⊙ g + dn) ⊙ i'
    dz_g = dc ⊙ i' ⊙ (1 − g²)           dm ← dm − dp − di                            (S5)
    dp ← dp + w ⊙ dm                    dz_i = di + (1 − w) ⊙ dm
    dz_f = dp ⊙ (1 − σ(z_f)), or dp                                                  (S6)
    dm₋ = dp                            dc₋ = dc ⊙ f'    dn₋ = dn ⊙ f'
    dw_x, dw_h, db, dx, dh₋ from dz as in the LSTM, w_h by heads                     (S7)

Axes: B batch, T time, D input width, H hidden width, N heads. Source: Beck et al. 2024.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rnnattn.checks import Check
from rnnattn.precision import accumulator
from rnnattn.recurrent.noise import scaled
from rnnattn.recurrent.unit import Unit, affine, blocks_of, joined, outer, sigmoid


class SLSTMParams(NamedTuple):
    """The weights of one layer and direction; w_h of each head, its four blocks side by side."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "N H/N 4*H/N"]
    b: Float[Array, " 4*H"]


class SLSTMState(NamedTuple):
    """What one step hands to the next. For 16-bit inputs all but h is float32."""

    h: Float[Array, "B H"]
    c: Float[Array, "B H"]
    n: Float[Array, "B H"]
    m: Float[Array, "B H"]


class Slopes(NamedTuple):
    """The local derivatives of a step: none depends on what comes back through time."""

    o: Array  # ∂h/∂z_o = (c / n) ⊙ o(1 − o)
    c: Array  # ∂h/∂c = o / n
    n: Array  # ∂h/∂n = −o ⊙ c / n²
    p_c: Array  # ∂c/∂p = c₋ ⊙ f'
    p_n: Array  # ∂n/∂p = n₋ ⊙ f'
    i_c: Array  # g ⊙ i'
    i_n: Array  # i'
    g: Array  # ∂c/∂z_g = i' ⊙ (1 − g²)
    w: Array  # ∂m/∂p
    f: Array  # ∂l/∂z_f
    carry: Array  # f'


@dataclass(frozen=True)
class SLSTM(Unit):
    """The sLSTM; its forget gate a sigmoid or an exponential."""

    zoned_fields = 1  # m says what c and n are to be multiplied by, so none of them goes alone

    exponential_forget: bool = False

    def widths(self, params):
        H = params.w_h.shape[0] * params.w_h.shape[1]
        return SLSTMState(H, H, H, H)

    def kept_width(self, params):
        return params.w_x.shape[1]

    def verify(self, check, params, D):
        check.axes("params.w_h", params.w_h, "(N, H/N, 4H/N)")
        N, width, _ = params.w_h.shape
        H = N * width
        check(H > 0, "params.w_h", "of at least one head of one unit", params.w_h.shape)
        check.shape("params.w_h", params.w_h, (N, width, 4 * width), "(N, H/N, 4H/N)")
        check.shape("params.w_x", params.w_x, (D, 4 * H), "(D of `x`, 4H)")
        check.shape("params.b", params.b, (4 * H,), "(4H,)")

    def inputs(self, weights, x):
        return affine(x, weights.w_x, weights.b)

    def step(self, weights, u, h, state, e=None):
        z = u + from_heads(weights.w_h, h)
        p, i, g, o = self.gates(z, state.m, state.n)
        f, i, m = stabilised(p, i)
        c, n = f * state.c + i * scaled(g, e), f * state.n + i
        return SLSTMState((o * c / n).astype(h.dtype), c, n, m), z

    def gates(self, z, m_prev, n_prev):
        """p, z_i, g, o; p is −∞ where there is nothing to scale."""
        z_i, z_f, z_g, z_o = blocks_of(z, 4)
        log_f = z_f if self.exponential_forget else jax.nn.log_sigmoid(z_f)
        p = log_f + jnp.where(n_prev == 0, -jnp.inf, m_prev)
        return p, z_i, jnp.tanh(z_g), sigmoid(z_o)

    def slopes(self, weights, x, h, before, after, kept, e):
        z = kept
        if z is None:
            z = self.inputs(weights, x) + from_heads(weights.w_h, h)
        p, z_i, g, o = self.gates(z, before.m, before.n)
        f, i, _ = stabilised(p, z_i)
        # of steps that do not count n is 0, and nothing comes back to them
        n = jnp.where(after.n == 0, 1, after.n)
        seen = after.c / n
        _, z_f, _, _ = blocks_of(z, 4)
        slopes = Slopes(
            o=seen * o * (1 - o),
            c=o / n,
            n=-o * seen / n,
            p_c=before.c * f,
            p_n=before.n * f,
            i_c=scaled(g, e) * i,
            i_n=i,
            g=scaled(i * (1 - g * g), e),
            w=(p > z_i).astype(z.dtype),
            f=jnp.ones_like(z_f) if self.exponential_forget else 1 - sigmoid(z_f),
            carry=f,
        )
        return slopes, None

    def step_gradient(self, params, slopes, after):
        dc = after.c + after.h * slopes.c
        dn = after.n + after.h * slopes.n
        dp = dc * slopes.p_c + dn * slopes.p_n
        di = dc * slopes.i_c + dn * slopes.i_n
        dm = after.m - dp - di
        dp = dp + slopes.w * dm
        dz_i = di + (1 - slopes.w) * dm
        dz = joined(dz_i, dp * slopes.f, dc * slopes.g, after.h * slopes.o)
        dh = to_heads(params.w_h, dz)
        return SLSTMState(jnp.zeros_like(dh), dc * slopes.carry, dn * slopes.carry, dp), dh, dz

    def gradient(self, params, x, h, before, after, seen, dz):
        by_head = _by_head(dz, params.w_h.shape[0])
        h = h.reshape(*h.shape[:-1], *params.w_h.shape[:2]).astype(dz.dtype)
        dw_h = jnp.einsum("tbnh,tbnz->nhz", h, by_head)
        dparams = SLSTMParams(outer(x, dz), dw_h, jnp.sum(dz, (0, 1)))
        return dparams, (dz @ params.w_x.T).astype(x.dtype)


def stabilised(p, z_i):
    """f', i' and m."""
    # not `jnp.maximum`, whose derivative compares its result with p: a p that XLA computes again
    # may differ in its last bit, and then the result is equal to neither
    m = jnp.where(p > z_i, p, z_i)
    return jnp.exp(p - m), jnp.exp(z_i - m), m


def from_heads(w_h, h):
    """h w_h, (…, 4H), each head by its own weights."""
    N, width, _ = w_h.shape
    h = h.reshape(*h.shape[:-1], N, width)
    wide = accumulator(h.dtype)
    z = jnp.einsum("...nh,nhz->...nz", h, w_h, preferred_element_type=wide)
    z = jnp.moveaxis(z.reshape(*z.shape[:-1], 4, width), -2, -3)
    return z.reshape(*z.shape[:-3], 4 * N * width)


def to_heads(w_h, dz):
    """dz w_hᵀ, (…, H)."""
    dh = jnp.einsum("...nz,nhz->...nh", _by_head(dz, w_h.shape[0]), w_h)
    return dh.reshape(*dh.shape[:-2], dh.shape[-2] * dh.shape[-1])


def _by_head(dz, N):
    """(…, 4H) → (…, N, 4H/N)."""
    width = dz.shape[-1] // (4 * N)
    dz = jnp.moveaxis(dz.reshape(*dz.shape[:-1], 4, N, width), -3, -2)
    return dz.reshape(*dz.shape[:-2], 4 * width)


def slstm_unit(function, forget_gate):
    """The unit of the options of `function`; `ValueError` if one is off."""
    Check(function).one_of("forget_gate", forget_gate, ("sigmoid", "exponential"))
    return SLSTM(forget_gate == "exponential")
