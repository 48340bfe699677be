"""The equations of the long short-term memory (LSTM) and of its gradient: one step, no loop.

    z = x w_x + h₋ w_h + b              pre-activations, four blocks in the order i, f, g, o
    i, f, o = σ(z_i), σ(z_f), σ(z_o)    g = tanh(z_g)                                   (L1)
    c = f ⊙ c₋ + i ⊙ g                  h = o ⊙ tanh(c)                                 (L2)

h₋ and c₋ are the state before the step. The gradient, with dh and dc what comes back from
outside and from the next step:

    dc ← dc + dh ⊙ o ⊙ (1 − tanh²c)                                                     (L3)
    dz_i = dc ⊙ g ⊙ i(1 − i)            dz_f = dc ⊙ c₋ ⊙ f(1 − f)
    dz_g = dc ⊙ i ⊙ (1 − g²)            dz_o = dh ⊙ tanh(c) ⊙ o(1 − o)                  (L4)
    dw_x = Σ xᵀ dz      dw_h = Σ h₋ᵀ dz      db = Σ dz      over batch and time         (L5, L6)
    dx = dz w_xᵀ        dh₋ = dz w_hᵀ                                                   (L7)
    dc₋ = dc ⊙ f                                                                        (L8)

Variants change single terms: peepholes p add p_i ⊙ c₋, p_f ⊙ c₋, p_o ⊙ c to z_i, z_f, z_o; a
coupled gate sets f = 1 − i; a clip bounds every z; a projection P makes h = (o ⊙ tanh c) P.

Axes: B batch, T time, D input width, H hidden width, R projected width (H without projection).
Sources: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate); Gers &
Schmidhuber 2000 (peepholes); Graves & Schmidhuber 2005 (the full gradient); Sak et al. 2014
(projection); Greff et al. 2015 (coupled gates). L1–L8 are the claims of the notes, corrected.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rnnattn.checks import Check
from rnnattn.precision import accumulator
from rnnattn.recurrent.noise import scaled
from rnnattn.recurrent.unit import Unit, affine, blocks_of, dot, joined, outer


class LSTMParams(NamedTuple):
    """The weights of one layer and direction, multiplied on the right: x @ w_x + h @ w_h + b."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "R 4*H"]
    b: Float[Array, " 4*H"]
    peephole: Float[Array, "3 H"] | None = None
    projection: Float[Array, "H R"] | None = None


class LSTMState(NamedTuple):
    """What one step hands to the next. For 16-bit inputs c is float32, h is 16-bit."""

    h: Float[Array, "B R"]
    c: Float[Array, "B H"]


class Slopes(NamedTuple):
    """The local derivatives of a step: none depends on what comes back through time."""

    c: Array  # ∂m/∂c   = o ⊙ (1 − tanh²c)
    i: Array  # ∂c/∂z_i = g ⊙ i(1 − i)
    f: Array  # ∂c/∂z_f = c₋ ⊙ f(1 − f)
    g: Array  # ∂c/∂z_g = i ⊙ (1 − g²)
    o: Array  # ∂m/∂z_o = tanh(c) ⊙ o(1 − o)
    carry: Array  # ∂c/∂c₋ = f


def _blocks(row):
    """The blocks i, f, g, o of a row (…, 4H)."""
    return blocks_of(row, 4)


def _halve(row):
    """½ on the blocks i, f, o: σ(z) = ½ + ½ tanh(½z), so that one tanh makes all four gates."""
    i, f, g, o = _blocks(row)
    return joined(0.5 * i, 0.5 * f, g, 0.5 * o)


def _clip_bounds(clip):
    """The bound of each block of a halved row."""
    return 0.5 * clip, 0.5 * clip, clip, 0.5 * clip


def peephole_terms(peephole, c_prev, c):
    """What c adds to a halved row: the input and forget gate see c₋, the output gate c."""
    p_i, p_f, p_o = jnp.expand_dims(0.5 * peephole, range(1, c.ndim))
    return joined(p_i * c_prev, p_f * c_prev, jnp.zeros_like(c), p_o * c)


def _gates(a, unit):
    """L1: i, f, g, o from the halved row a = (½z_i, ½z_f, z_g, ½z_o)."""
    if unit.clip is not None:
        bounds = _clip_bounds(unit.clip)
        clipped = [jnp.clip(z, -κ, κ) for z, κ in zip(_blocks(a), bounds, strict=True)]
        a = joined(*clipped)
    return gates_of_tanh(_blocks(jnp.tanh(a)), unit)


def gates_of_tanh(blocks, unit):
    """L1: i, f, g, o from the tanh of the blocks of a halved row."""
    i, f, g, o = blocks
    i = 0.5 + 0.5 * i
    f = 1 - i if unit.coupled else 0.5 + 0.5 * f
    o = 0.5 + 0.5 * o
    return i, f, g, o


def memory(gates, c_prev, e=None):
    """L2: c, of which e is a factor of g."""
    i, f, g, _ = gates
    return f * c_prev + i * scaled(g, e)


def cell_of_gates(gates, c_prev, e=None):
    """L2: m = o ⊙ tanh(c), and c."""
    *_, o = gates
    c = memory(gates, c_prev, e)
    return o * jnp.tanh(c), c


def cell(a, c_prev, peephole, unit, e=None):
    """L1, L2: m = o ⊙ tanh(c), which is h where nothing is projected; c; a with its peepholes."""
    if peephole is None:
        return *cell_of_gates(_gates(a, unit), c_prev, e), a
    seen = a + peephole_terms(peephole, c_prev, jnp.zeros_like(c_prev))
    c = memory(_gates(seen, unit), c_prev, e)
    a = a + peephole_terms(peephole, c_prev, c)
    *_, o = _gates(a, unit)
    return o * jnp.tanh(c), c, a


def memory_slopes(gates, c_prev, e=None):
    """L4: ∂c/∂z of the gates i, f and g, of which e ⊙ g is written."""
    i, f, g, _ = gates
    return scaled(g, e) * i * (1 - i), c_prev * f * (1 - f), scaled(i * (1 - g * g), e)


def slopes_of(a, c_prev, c, unit, e=None):
    """The factors of L3, L4 and L8, and m. A pre-activation beyond the clip moves nothing."""
    gates = _gates(a, unit)
    i, f, g, o = gates
    tanh_c = jnp.tanh(c)
    d_i, d_f, d_g = memory_slopes(gates, c_prev, e)
    if unit.coupled:
        d_i, d_f = (scaled(g, e) - c_prev) * i * (1 - i), jnp.zeros_like(f)
    d_o = tanh_c * o * (1 - o)
    if unit.clip is not None:
        bounds = _clip_bounds(unit.clip)
        d_i, d_f, d_g, d_o = (
            jnp.where(jnp.abs(z) > κ, 0, d)
            for d, z, κ in zip((d_i, d_f, d_g, d_o), _blocks(a), bounds, strict=True)
        )
    return Slopes(o * (1 - tanh_c * tanh_c), d_i, d_f, d_g, d_o, f), o * tanh_c


def cell_gradient(slopes, dm, dc, peephole):
    """L3, L4, L8: dz and dc₋ from the cotangents of m and c."""
    dz, dc_prev = gradient_of_gates(slopes, dm, dc, peephole)
    return joined(*dz), dc_prev


def gradient_of_gates(slopes, dm, dc, peephole):
    """The same, with dz in its four blocks."""
    dz_o = dm * slopes.o
    dc = dc + dm * slopes.c
    if peephole is not None:
        p_i, p_f, p_o = peephole[:, None, :]
        dc = dc + dz_o * p_o
    dz_i = dc * slopes.i
    dz_f = dc * slopes.f
    dz_g = dc * slopes.g
    dc_prev = dc * slopes.carry
    if peephole is not None:
        dc_prev = dc_prev + dz_i * p_i + dz_f * p_f
    return [dz_i, dz_f, dz_g, dz_o], dc_prev


def peephole_gradient(dz, c_prev, c):
    """dp_i = Σ dz_i ⊙ c₋, dp_f = Σ dz_f ⊙ c₋, dp_o = Σ dz_o ⊙ c."""
    dz_i, dz_f, _, dz_o = _blocks(dz)
    return jnp.stack([jnp.sum(t, (0, 1)) for t in (dz_i * c_prev, dz_f * c_prev, dz_o * c)])


def lstm_unit(function, clip, coupled):
    """The unit of the options of `function`; `ValueError` if one is off."""
    expected = "a positive number or None"
    clip = None if clip is None else Check(function).number("clip", clip, 0, expected)
    return LSTM(clip, bool(coupled))


class Halved(NamedTuple):
    """The weights as the steps read them: halved, and what is added to rows in the sums' dtype."""

    w_x: Array
    w_h: Array
    b: Array
    peephole: Array | None
    projection: Array | None
    w: Array | None = None  # [w_x; w_h], where x and h meet the weights in one product


@dataclass(frozen=True)
class LSTM(Unit):
    """The LSTM; with a clip of its pre-activations, and coupled gates."""

    clip: float | None = None
    coupled: bool = False

    def widths(self, params):
        return LSTMState(params.w_h.shape[0], params.w_h.shape[1] // 4)

    def kept_width(self, params):
        return params.w_h.shape[1]

    def verify(self, check, params, D):
        whole = jnp.ndim(params.w_h) == 2 and params.w_h.shape[1] % 4 == 0 < params.w_h.shape[1]
        check(whole, "params.w_h", "of shape (H, 4H)", jnp.shape(params.w_h))
        R, H = params.w_h.shape[0], params.w_h.shape[1] // 4
        check.shape("params.w_x", params.w_x, (D, 4 * H), "(D of `x`, 4H)")
        check.shape("params.b", params.b, (4 * H,), "(4H,)")
        if params.projection is None:
            check.shape("params.w_h", params.w_h, (H, 4 * H), "(H, 4H)")
        else:
            check.shape("params.projection", params.projection, (H, R), "(H, R)")
        if params.peephole is not None:
            check.shape("params.peephole", params.peephole, (3, H), "(3, H)")

    def prepare(self, params):
        dtype = accumulator(params.b.dtype)
        return Halved(
            _halve(params.w_x),
            _halve(params.w_h),
            _halve(params.b.astype(dtype)),
            None if params.peephole is None else params.peephole.astype(dtype),
            params.projection,
        )

    def merged(self, weights):
        return weights._replace(w=jnp.concatenate([weights.w_x, weights.w_h]))

    def inputs(self, weights, x):
        if weights.w is not None:
            return x
        return affine(x, weights.w_x, weights.b)

    def step(self, weights, u, h, state, e=None):
        if weights.w is None:
            a = u + dot(h, weights.w_h)
        else:
            a = dot(joined(u, h), weights.w) + weights.b[None]
        m, c, a = cell(a, state.c, weights.peephole, self, e)
        h = m.astype(h.dtype)
        if weights.projection is not None:
            h = dot(h, weights.projection).astype(h.dtype)
        return LSTMState(h, c), a

    def slopes(self, weights, x, h, before, after, kept, e):
        if kept is None:
            kept = self.preactivations(weights, x, h, before, after)
        return slopes_of(kept, before.c, after.c, self, e)

    def preactivations(self, weights, x, h, before, after):
        """a of every step, which needs no loop once the states are known."""
        xh = joined(x, h)
        a = dot(xh, jnp.concatenate([weights.w_x, weights.w_h])) + weights.b[None, None]
        if weights.peephole is not None:
            a = a + peephole_terms(weights.peephole, before.c, after.c)
        return a

    def step_gradient(self, params, slopes, after):
        projection = params.projection
        dm = after.h if projection is None else after.h @ projection.T
        dz, dc = cell_gradient(slopes, dm, after.c, params.peephole)
        dh = dz @ params.w_h.T
        return LSTMState(jnp.zeros_like(dh), dc), dh, (dz, None if projection is None else after.h)

    def gradient(self, params, x, h, before, after, seen, dz):
        dz, dh = dz
        dw = outer(joined(x, h), dz)
        D, projected = x.shape[-1], params.projection is not None
        peephole = None if params.peephole is None else peephole_gradient(dz, before.c, after.c)
        projection = outer(seen, dh) if projected else None
        dparams = LSTMParams(dw[:D], dw[D:], jnp.sum(dz, (0, 1)), peephole, projection)
        return dparams, (dz @ params.w_x.T).astype(x.dtype)
