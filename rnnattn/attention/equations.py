"""The equations of dot-product attention and of its gradient: one block, no loop.

    s = scale · q kᵀ
    s ← c tanh(s / c)         with a soft cap c
    s ← f(s + bias)           with a score function f; −∞ where masked
    L = log(Σ eˢ + e^sink)    over the keys a query may see
    P = e^(s − L)             O = (P ∘ Z) v                                             (A1, A3)

Z is 1, or keep / (1 − rate) with dropout. A row that may see no key has P = 0 and O = 0, and L is
−∞, or its sink. The gradient, with dO and dL what comes back to O and L, and Δ = Σ dO ∘ O over a
row:

    dv = (P ∘ Z)ᵀ dO          dP = Z ∘ (dO vᵀ)
    dS = P ∘ (dP − Δ + dL)    dsink = Σ e^(sink − L) (dL − Δ)
    dS ← ∂f dS                dbias = dS            ∂f by JAX, with what f closes over
    dS ← dS (1 − (s / c)²)    s the capped logits                dscale = Σ dS ∘ q kᵀ
    dS ← scale · dS
    dq = dS k                 dk = dSᵀ q

The tangent, with ds that of the logits:

    μ = Σ P ∘ ds + e^(sink − L) dsink               dL = μ
    dO = (P ∘ Z ∘ ds) v + (P ∘ Z) dv − μ O

What may be NaN and meets nothing but weights of 0 is set to 0 first (`rnnattn.attention.masking`).

Axes: B batch, T queries, S keys, M key/value heads, G query heads to one of them, K head width, V
value width. Head n of the N = M G query heads is (n // G, n % G).
Sources: Vaswani et al. 2017; Dao et al. 2022 (the gradient from the log-sum-exp, appendix B);
Ainslie et al. 2023 (grouped heads); Gemma Team 2024 (soft cap); Xiao et al. 2024 (sinks); Lu &
Song 2024 (the tangent).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rnnattn.attention.dropout import drop
from rnnattn.attention.functions import scored
from rnnattn.attention.masking import only_seeing, zero_unseen
from rnnattn.precision import accumulator


def _rows(x):
    """(B, M, G, T, …) → (B, M, G T, …): one matrix for each key/value head."""
    B, M, G, T = x.shape[:4]
    return x.reshape(B, M, G * T, x.shape[-1])


def _product(subscripts, a, b):
    """Summed in the accumulator's dtype.

    Weights and gradients keep theirs, and 16-bit keys and values are brought to it: rounded to 16
    bits, weights would no longer add up to 1, and gradients might leave float16's range.
    """
    wide = accumulator(b.dtype)
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=wide)


def against_keys(a, b):
    """a bᵀ, for each query and key."""
    ab = _product("bmrc,bmsc->bmrs", _rows(a), b)
    return ab.reshape(*a.shape[:-1], b.shape[2])


def over_keys(p, b):
    """p b, for each query."""
    pb = _product("bmrs,bmsc->bmrc", _rows(p), b)
    return pb.reshape(*p.shape[:-1], b.shape[-1])


def over_queries(p, a):
    """pᵀ a, for each key."""
    return _product("bmrs,bmrc->bmsc", _rows(p), _rows(a))


def cap(s, soft_cap):
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def biased(s, bias):
    return s if bias is None else s + bias.astype(s.dtype)


def mask_logits(s, visible):
    return s if visible is None else jnp.where(visible, s, -jnp.inf)


class Scores(NamedTuple):
    """What queries and keys make of one another before the softmax."""

    query: Array  # of those that see no key at hand, zero
    key: Array  # of those that no query at hand sees, zero; so are the values
    value: Array
    sees: Array | None  # whether a query sees a key at hand; None if that was not looked for
    product: Array  # q kᵀ
    capped: Array  # s before bias, score function and masks
    s: Array
    z: Array | None


def score(options, operands, places, visible, z):
    """`places`: the masking, and the rows and columns of the queries and keys."""
    q, k, v, scale, bias, _, arrays = operands
    masking, sees = places[0], None
    by_pairs = (masking.mask, masking.query_segments, options.mask_function)
    if any(x is not None for x in by_pairs):
        q, k, v, sees = zero_unseen(q, k, v, visible)
    product = against_keys(q, k)
    capped = cap(scale * product, options.soft_cap)
    s = scored(options.score_function, places, biased(capped, bias), arrays)
    return Scores(q, k, v, sees, product, capped, mask_logits(s, visible), z)


class Softmax(NamedTuple):
    """The softmax of rows over the keys seen so far; each with the dtype of the accumulator."""

    peak: Float[Array, "B M G T"]  # the largest s
    total: Float[Array, "B M G T"]  # Σ e^(s − peak)
    weighted: Float[Array, "B M G T V"]  # Σ e^(s − peak) Z v

    @classmethod
    def empty(cls, operands, rows):
        """Of `rows` queries that have seen nothing: a sink counts as a key without a value."""
        B, M, G = operands.query.shape[:3]
        wide = accumulator(operands.query.dtype)
        shape = (B, M, G, rows)
        weighted = jnp.zeros_like(operands.value, wide, shape=(*shape, operands.value.shape[-1]))
        if operands.sinks is None:
            peak = jnp.full_like(operands.query, -jnp.inf, wide, shape=shape)
            return cls(peak, jnp.zeros_like(peak), weighted)
        sinks = jnp.broadcast_to(operands.sinks.astype(wide), shape)
        peak = lax.stop_gradient(sinks)
        return cls(peak, jnp.exp(sinks - _finite(peak)), weighted)

    def update(self, scores):
        """After further keys."""
        s, v, z = scores.s, scores.value, scores.z
        peak = jnp.maximum(self.peak, lax.stop_gradient(jnp.max(s, -1, initial=-jnp.inf)))
        p, shrink = rescaled(s, self.peak, peak)
        seen = over_keys(drop(p, z), v)
        return Softmax(
            peak,
            self.total * shrink + jnp.sum(p, -1),
            self.weighted * shrink[..., None] + seen,
        )

    def finish(self):
        """O and L."""
        empty = self.peak == -jnp.inf
        total = jnp.where(empty, 1, self.total)
        lse = jnp.where(empty, -jnp.inf, _finite(self.peak) + jnp.log(total))
        return self.weighted / along_rows(total, self.weighted.shape), lse


def rescaled(s, before, peak, exp=jnp.exp):
    """e^(s − peak), and by what sums shrink whose largest s was `before`."""
    largest = _finite(peak)
    return exp(s - along_rows(largest, s.shape)), exp(before - largest)


def along_rows(x, shape):
    """A number of each row (…) on an array (…, columns): kernels on a GPU have no axes of 1."""
    return lax.broadcast_in_dim(x, shape, tuple(range(x.ndim)))


def _finite(peak):
    """The number to subtract before exp: the largest s, or 0 where all are −∞."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def finite_lse(lse):
    """L as it is kept for the gradient: so large where nothing is seen that exp(s − L) is zero.

    Not ∞, which `jax.debug_infs` would take for a mistake.
    """
    return jnp.where(lse == -jnp.inf, jnp.finfo(lse.dtype).max, lse)


def _lse_for_exp(lse):
    """L for e^(s − L): +∞ for a row that sees nothing, so that its weights are zero."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


def weights(s, lse):
    """P."""
    return jnp.exp(s - _lse_for_exp(lse)[..., None])


def logits_gradient(p, dp, delta):
    """dS, that of the logits after bias, score function and masks, from Δ − dL of each row."""
    return p * (dp - delta)


def score_gradient(function, places, s, arrays, ds):
    """dS, that of the logits s before the score function, and that of what it closes over."""
    if function is None:
        return ds, None
    of = lambda s, arrays: scored(function, places, s, arrays)
    return jax.vjp(of, s, arrays)[1](ds)


def cap_gradient(ds, s, soft_cap):
    """dS before the soft cap, from the capped logits s."""
    return ds if soft_cap is None else ds * (1 - (s / soft_cap) ** 2)


def sinks_gradient(sinks, lse, delta, dlse):
    if sinks is None:
        return None
    return jnp.sum(sink_weights(sinks, lse) * (dlse - delta), (0, 3), keepdims=True)


def joined(lse, more):
    """What is left of O where a sink or further keys join a softmax, e^(L − L₁), and L₁.

    `more` is that sink or the L of these keys. It has derivatives of every order, also of −∞.
    """
    none = jnp.maximum(lse, more) == -jnp.inf
    lse, more = (jnp.where(none, 0, x.astype(lse.dtype)) for x in (lse, more))
    both = jnp.logaddexp(lse, more)
    return jnp.where(none, 0, jnp.exp(lse - both)), jnp.where(none, -jnp.inf, both)


def merged(o, lse, o_more, lse_more):
    """O (…, V) and L (…) over the keys of both, which have none in common."""
    (share, both), (share_more, _) = joined(lse, lse_more), joined(lse_more, lse)
    return share[..., None] * o + share_more[..., None] * o_more, both


def sink_weights(sinks, lse):
    return jnp.exp(sinks.astype(lse.dtype) - _lse_for_exp(lse))


def row_sums(do, o):
    """Δ. NaN that comes back to a query that sees nothing, whose O is 0, counts for nothing."""
    do = do.astype(o.dtype)
    return jnp.sum(jnp.where((o == 0) & ~jnp.isfinite(do), 0, do * o), -1)


class BlockGradient(NamedTuple):
    """What a block of queries and keys adds to the gradient of the operands."""

    query: Float[Array, "B M G T K"]
    key: Float[Array, "B M S K"]
    value: Float[Array, "B M S V"]
    scale: Float[Array, "#B #M #G 1 1"] | None
    bias: Float[Array, "B M G T S"]  # dS: not yet summed over what shares the bias
    score_arrays: tuple[Array, ...] | None


def block_gradient(options, operands, places, scores, lse, delta, do, dlse):
    """Of the operands that `scores` are of, at the same places."""
    scale, bias, arrays = operands.scale, operands.bias, operands.score_arrays
    q, k, v, sees, product, capped, s, z = scores
    do, delta, dlse = (only_seeing(sees, x) for x in (do, delta, dlse))
    p = weights(s, lse)
    dv = over_queries(drop(p, z), do)
    dp = drop(against_keys(do, v), z)
    ds = logits_gradient(p, dp, along_rows(delta - dlse, p.shape))
    s = biased(capped, bias)
    dbias, darrays = score_gradient(options.score_function, places, s, arrays, ds)
    ds = cap_gradient(dbias, capped, options.soft_cap)
    dscale = sum_to(ds * product, scale.shape) if options.scale_gradient else None
    ds = scale * ds
    return BlockGradient(over_keys(ds, k), over_queries(ds, q), dv, dscale, dbias, darrays)


def block_tangent(scores, lse, ds, dv):
    """What a block of keys adds to μ, and to dO but for −μ O."""
    p = weights(scores.s, lse)
    pz = drop(p, scores.z)
    weighted = over_keys(pz * ds, scores.value) + over_keys(pz, dv)
    return jnp.sum(p * ds, -1), only_seeing(scores.sees, weighted)


def finish_tangent(o, lse, mu, weighted, sinks, dsinks):
    """dO and dL from the sums over all keys."""
    if sinks is not None:
        mu = mu + sink_weights(sinks, lse) * dsinks
    return weighted - mu[..., None] * o, mu


def sum_to(x, shape):
    """Sum x over the axes that were broadcast from `shape`."""
    shared = [
        axis for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want
    ]
    return jnp.sum(x, shared, keepdims=True) if shared else x
