"""The equations of the gated recurrent unit (GRU) and of its gradient: one step, no loop.

    a = x w_x + b                          pre-activations, three blocks in the order r, z, n
    r, z = σ(a_r + h₋ w_hr), σ(a_z + h₋ w_hz)                                       (G1)
    n = tanh(a_n + r ⊙ s)    s = h₋ w_hn + b_n       with the reset after           (G2)
    n = tanh(a_n + q w_hn)   q = r ⊙ h₋              with the reset before
    h = (1 − z) ⊙ n + z ⊙ h₋                                                        (G3)

h₋ is the state before the step. The gradient, with dh what comes back from outside and from the
next step, and d_r, d_z, d_n the cotangents of what σ and tanh are taken of:

    d_n = dh ⊙ (1 − z)(1 − n²)             d_z = dh ⊙ (h₋ − n) ⊙ z(1 − z)            (G4)
    after    ds = d_n ⊙ r                  d_r = d_n ⊙ s ⊙ r(1 − r)                  (G5)
             dh₋ = dh ⊙ z + [d_r, d_z, ds] w_hᵀ                                     (G6)
             dw_h = Σ h₋ᵀ [d_r, d_z, ds]   db_n = Σ ds
    before   dq = d_n w_hnᵀ                d_r = dq ⊙ h₋ ⊙ r(1 − r)                  (G5)
             dh₋ = dh ⊙ z + dq ⊙ r + [d_r, d_z] [w_hr, w_hz]ᵀ                        (G6)
             dw_h = Σ [h₋ᵀ d_r, h₋ᵀ d_z, qᵀ d_n]
    dw_x = Σ xᵀ [d_r, d_z, d_n]   db = Σ [d_r, d_z, d_n]   dx = [d_r, d_z, d_n] w_xᵀ  (G7)

Axes: B batch, T time, D input width, H hidden width. Sources: Cho et al. 2014 (reset before the
product); cuDNN, as torch and Keras' `reset_after` (reset after it).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rnnattn.checks import Check
from rnnattn.precision import accumulator
from rnnattn.recurrent.noise import scaled
from rnnattn.recurrent.unit import Unit, affine, along, blocks_of, dot, joined, outer


class GRUParams(NamedTuple):
    """The weights of one layer and direction, blocks r, z, n; b_n is that of s alone."""

    w_x: Float[Array, "D 3*H"]
    w_h: Float[Array, "H 3*H"]
    b: Float[Array, " 3*H"]
    b_n: Float[Array, " H"] | None = None


class GRUState(NamedTuple):
    """What one step hands to the next."""

    h: Float[Array, "B H"]


class Slopes(NamedTuple):
    """The local derivatives of a step: none depends on what comes back through time."""

    n: Array  # ∂h/∂a_n = (1 − z)(1 − n²)
    z: Array  # ∂h/∂a_z = (h₋ − n) ⊙ z(1 − z)
    r: Array  # of a_r: s ⊙ r(1 − r), or h₋ ⊙ r(1 − r)
    inner: Array  # ∂(r ⊙ s)/∂s and ∂(r ⊙ h₋)/∂h₋ = r
    carry: Array  # z


def _halve(row):
    """½ on the blocks r, z: σ(a) = ½ + ½ tanh(½a)."""
    r, z, n = blocks_of(row, 3)
    return joined(0.5 * r, 0.5 * z, n)


def _gate(half):
    """σ(a) of ½a."""
    return 0.5 + 0.5 * jnp.tanh(half)


class _GRU(Unit):
    """What both have in common."""

    @abstractmethod
    def preactivations(self, weights, u, h):
        """What is kept: the gates are made of it and of nothing else."""

    @abstractmethod
    def slopes_of(self, a, h, h_prev, e):
        """`slopes`, from what is kept."""

    def widths(self, params):
        return GRUState(params.w_h.shape[0])

    def verify(self, check, params, D):
        check(jnp.ndim(params.w_h) == 2, "params.w_h", "of shape (H, 3H)", jnp.shape(params.w_h))
        H = params.w_h.shape[0]
        check(H > 0, "params.w_h", "of at least one row", jnp.shape(params.w_h))
        check.shape("params.w_h", params.w_h, (H, 3 * H), "(H, 3H)")
        check.shape("params.w_x", params.w_x, (D, 3 * H), "(D of `x`, 3H)")
        check.shape("params.b", params.b, (3 * H,), "(3H,)")
        if params.b_n is not None:
            check.shape("params.b_n", params.b_n, (H,), "(H,)")

    def prepare(self, params):
        """Blocks r and z halved; what is added to rows in the dtype of sums."""
        dtype = accumulator(params.b.dtype)
        b_n = None if params.b_n is None else params.b_n.astype(dtype)
        return GRUParams(
            _halve(params.w_x), _halve(params.w_h), _halve(params.b.astype(dtype)), b_n
        )

    def inputs(self, weights, x):
        return affine(x, weights.w_x, weights.b)

    def slopes(self, weights, x, h, before, after, kept, e):
        if kept is None:
            kept = self.preactivations(weights, self.inputs(weights, x), h)
        wide = kept.dtype
        return self.slopes_of(kept, h.astype(wide), before.h.astype(wide), e)


def interpolated(z, n, state, e=None):
    """G3, of which e is a factor of n."""
    h = (1 - z) * scaled(n, e) + z * state.h.astype(z.dtype)
    return GRUState(h.astype(state.h.dtype))


def slopes_of_gates(r, z, n, h_prev, of_r, e=None):
    d_n, d_z = scaled((1 - z) * (1 - n * n), e), (h_prev - scaled(n, e)) * z * (1 - z)
    return Slopes(d_n, d_z, of_r * r * (1 - r), r, z)


def gradient_of_gates(slopes, dh):
    """G4, G5 with the reset after the product: d_r, d_z, d_n, ds."""
    d_n = dh * slopes.n
    return d_n * slopes.r, dh * slopes.z, d_n, d_n * slopes.inner


@dataclass(frozen=True)
class ResetAfter(_GRU):
    """The reset gate after the product: one product of h in each step."""

    def kept_width(self, params):
        return 4 * params.w_h.shape[0]

    def preactivations(self, weights, u, h):
        """a_n, ½a_r, ½a_z and s: those of x are neighbours, and those of h₋."""
        x_r, x_z, a_n = blocks_of(u, 3)
        h_r, h_z, s = blocks_of(dot(h, weights.w_h), 3)
        if weights.b_n is not None:
            s = s + along(weights.b_n, s)
        return joined(a_n, x_r + h_r, x_z + h_z, s)

    def step(self, weights, u, h, state, e=None):
        a = self.preactivations(weights, u, h)
        _, z, n = self._gates(a)
        return interpolated(z, n, state, e), a

    def _gates(self, a):
        """G1, G2."""
        a_n, a_r, a_z, s = blocks_of(a, 4)
        r, z = _gate(a_r), _gate(a_z)
        return r, z, jnp.tanh(a_n + r * s)

    def slopes_of(self, a, h, h_prev, e):
        r, z, n = self._gates(a)
        *_, s = blocks_of(a, 4)
        return slopes_of_gates(r, z, n, h_prev, s, e), None

    def step_gradient(self, params, slopes, after):
        d_r, d_z, d_n, d_s = gradient_of_gates(slopes, after.h)
        dh = joined(d_r, d_z, d_s) @ params.w_h.T
        return GRUState(after.h * slopes.carry), dh, joined(d_r, d_z, d_n, d_s)

    def gradient(self, params, x, h, before, after, seen, dz):
        d_r, d_z, d_n, d_s = blocks_of(dz, 4)
        dw_h = outer(h, joined(d_r, d_z, d_s))
        db_n = None if params.b_n is None else jnp.sum(d_s, (0, 1))
        return of_inputs(params, x, joined(d_r, d_z, d_n), dw_h, db_n)


@dataclass(frozen=True)
class ResetBefore(_GRU):
    """The reset gate before the product: two products of h in each step, one after the other."""

    def verify(self, check, params, D):
        super().verify(check, params, D)
        check(params.b_n is None, "params.b_n", "None where the reset is before the product", "one")

    def kept_width(self, params):
        return 3 * params.w_h.shape[0]

    def preactivations(self, weights, u, h):
        """½a_r, ½a_z, and what tanh is taken of."""
        x_r, x_z, x_n = blocks_of(u, 3)
        w_r, w_z, w_n = blocks_of(weights.w_h, 3)
        h_rz = dot(h, joined(w_r, w_z))
        h_r, h_z = blocks_of(h_rz, 2)
        a_r, a_z = x_r + h_r, x_z + h_z
        q = _gate(a_r).astype(h.dtype) * h
        return joined(a_r, a_z, x_n + dot(q, w_n))

    def step(self, weights, u, h, state, e=None):
        a = self.preactivations(weights, u, h)
        _, z, n = self._gates(a)
        return interpolated(z, n, state, e), a

    def _gates(self, a):
        a_r, a_z, a_n = blocks_of(a, 3)
        return _gate(a_r), _gate(a_z), jnp.tanh(a_n)

    def slopes_of(self, a, h, h_prev, e):
        r, z, n = self._gates(a)
        return slopes_of_gates(r, z, n, h_prev, h, e), r * h

    def step_gradient(self, params, slopes, after):
        w_r, w_z, w_n = blocks_of(params.w_h, 3)
        d_n, d_z = after.h * slopes.n, after.h * slopes.z
        dq = d_n @ w_n.T
        d_r = dq * slopes.r
        dh = dq * slopes.inner + joined(d_r, d_z) @ joined(w_r, w_z).T
        return GRUState(after.h * slopes.carry), dh, joined(d_r, d_z, d_n)

    def gradient(self, params, x, h, before, after, seen, dz):
        d_r, d_z, d_n = blocks_of(dz, 3)
        dw_rz = outer(h, joined(d_r, d_z))
        dw_h = joined(dw_rz, outer(seen, d_n))
        return of_inputs(params, x, dz, dw_h, None)


def of_inputs(params, x, d_a, dw_h, db_n):
    """G7, beside the gradients of w_h and b_n."""
    dparams = GRUParams(outer(x, d_a), dw_h, jnp.sum(d_a, (0, 1)), db_n)
    return dparams, (d_a @ params.w_x.T).astype(x.dtype)


def gru_unit(function, reset_after):
    """The unit of the options of `function`; `ValueError` if one is off."""
    Check(function).one_of("reset_after", reset_after, (True, False))
    return ResetAfter() if reset_after else ResetBefore()
