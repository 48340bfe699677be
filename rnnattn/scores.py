"""The equations of dot-product attention and of its gradient: one block, no loop.

    s = scale · q kᵀ
    s ← c tanh(s / c)         with a soft cap c
    s ← s + bias              −∞ where masked
    L = log(Σ eˢ + e^sink)    over the keys a query may see
    P = e^(s − L)             O = (P ∘ Z) v                                             (A1, A3)

Z is 1, or keep / (1 − rate) with dropout. A row that may see no key has P = 0 and O = 0, and L is
−∞, or its sink. The gradient, with dO and dL what comes back to O and L, and Δ = Σ dO ∘ O over a
row:

    dv = (P ∘ Z)ᵀ dO          dP = Z ∘ (dO vᵀ)
    dS = P ∘ (dP − Δ + dL)    dbias = dS            dsink = Σ e^(sink − L) (dL − Δ)
    dS ← dS (1 − (s / c)²)    s the capped logits                dscale = Σ dS ∘ q kᵀ
    dS ← scale · dS
    dq = dS k                 dk = dSᵀ q

The tangent, with ds that of the logits:

    μ = Σ P ∘ ds + e^(sink − L) dsink               dL = μ
    dO = (P ∘ Z ∘ ds) v + (P ∘ Z) dv − μ O

0 × NaN is NaN, and so what meets nothing but weights of 0 is set to 0 first: queries that see no
key, keys that no query sees, and what comes back to such queries.

Axes: B batch, T queries, S keys, M key/value heads, G query heads to one of them, K head width, V
value width. Head n of the N = M G query heads is (n // G, n % G).
Sources: Vaswani et al. 2017; Dao et al. 2022 (the gradient from the log-sum-exp, appendix B);
Ainslie et al. 2023 (grouped heads); Gemma Team 2024 (soft cap); Xiao et al. 2024 (sinks); Lu &
Song 2024 (the tangent).
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rnnattn.precision import accumulator

_TILE = 128  # the keep bits of dropout are drawn for squares of this size


class Options(NamedTuple):
    """What is fixed when a function is traced."""

    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None  # keys to the left and right of a query
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    bias_gradient: bool = True  # that of a (T, S) bias is the one thing as large as the logits
    scale_gradient: bool = True  # a pass over the logits


class Operands(NamedTuple):
    """What has a gradient. An axis of `bias` is 1 where it is shared."""

    query: Float[Array, "B M G T K"]
    key: Float[Array, "B M S K"]
    value: Float[Array, "B M S V"]
    scale: Float[Array, "#B #M #G 1 1"] | None  # wide; None only for a gradient nobody asked for
    bias: Float[Array, "#B #M #G #T #S"] | None = None
    sinks: Float[Array, "1 M G 1"] | None = None


class Masking(NamedTuple):
    """Who may see whom, and what is dropped; None where it is not used."""

    offset: Int[Array, " #B"]  # query t stands at position t + offset among the keys
    mask: Bool[Array, "#B #M #G #T #S"] | None = None
    query_lengths: Int[Array, " B"] | None = None
    key_lengths: Int[Array, " B"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    dropout_keys: PRNGKeyArray | None = None  # (B, M, G)


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


def mask_logits(s, bias, visible):
    if bias is not None:
        s = s + bias.astype(s.dtype)
    return s if visible is None else jnp.where(visible, s, -jnp.inf)


class Scores(NamedTuple):
    """What queries and keys make of one another before the softmax."""

    query: Array  # of those that see no key at hand, zero
    key: Array  # of those that no query at hand sees, zero; so are the values
    value: Array
    sees: Array | None  # whether a query sees a key at hand; None if that was not looked for
    product: Array  # q kᵀ
    capped: Array  # s before bias and masks
    s: Array
    z: Array | None


def score(options, operands, masking, visible, z):
    q, k, v, scale, bias, _ = operands
    sees = None
    if masking.mask is not None or masking.query_segments is not None:
        q, k, v, sees = hide_unseen(q, k, v, visible)
    product = against_keys(q, k)
    capped = cap(scale * product, options.soft_cap)
    return Scores(q, k, v, sees, product, capped, mask_logits(capped, bias, visible), z)


def of_seeing(sees, x):
    """What of rows x (B, M, G, T, …) belongs to queries that see a key, and zero elsewhere."""
    if sees is None:
        return x
    return jnp.where(jnp.expand_dims(sees, range(sees.ndim, x.ndim)), x, 0)


class Running(NamedTuple):
    """The softmax of a row over the keys seen so far; each with the dtype of the accumulator."""

    peak: Float[Array, "B M G T"]  # the largest s
    total: Float[Array, "B M G T"]  # Σ e^(s − peak)
    weighted: Float[Array, "B M G T V"]  # Σ e^(s − peak) Z v


def _finite(peak):
    """The number to subtract before exp: the largest s, or 0 where all are −∞."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def nothing_seen(operands, rows):
    """Where the softmax of `rows` queries begins: a sink counts as a key without a value."""
    B, M, G = operands.query.shape[:3]
    wide = accumulator(operands.query.dtype)
    shape = (B, M, G, rows)
    weighted = jnp.zeros_like(operands.value, wide, shape=(*shape, operands.value.shape[-1]))
    if operands.sinks is None:
        peak = jnp.full_like(operands.query, -jnp.inf, wide, shape=shape)
        return Running(peak, jnp.zeros_like(peak), weighted)
    sinks = jnp.broadcast_to(operands.sinks.astype(wide), shape)
    peak = lax.stop_gradient(sinks)
    return Running(peak, jnp.exp(sinks - _finite(peak)), weighted)


def see(running, scores):
    """The softmax after further keys."""
    s, v, z = scores.s, scores.value, scores.z
    peak = jnp.maximum(running.peak, lax.stop_gradient(jnp.max(s, -1, initial=-jnp.inf)))
    p = jnp.exp(s - _finite(peak)[..., None])
    shrink = jnp.exp(running.peak - _finite(peak))
    seen = over_keys(drop(p, z), v)
    return Running(
        peak,
        running.total * shrink + jnp.sum(p, -1),
        running.weighted * shrink[..., None] + seen,
    )


def normalise(running):
    """O and L."""
    empty = running.peak == -jnp.inf
    total = jnp.where(empty, 1, running.total)
    lse = jnp.where(empty, -jnp.inf, _finite(running.peak) + jnp.log(total))
    return running.weighted / total[..., None], lse


def _unseeing(lse):
    """L for e^(s − L): +∞ for a row that sees nothing, so that its weights are zero."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


def weights(s, lse):
    """P."""
    return jnp.exp(s - _unseeing(lse)[..., None])


def logits_gradient(p, dp, delta, dlse):
    """dS, the gradient of the logits after bias and masks."""
    return p * (dp - (delta - dlse)[..., None])


def cap_gradient(ds, s, soft_cap):
    """dS before the soft cap, from the capped logits s."""
    return ds if soft_cap is None else ds * (1 - (s / soft_cap) ** 2)


def sinks_gradient(sinks, lse, delta, dlse):
    if sinks is None:
        return None
    return jnp.sum(sink_weights(sinks, lse) * (dlse - delta), (0, 3), keepdims=True)


def sink_weights(sinks, lse):
    return jnp.exp(sinks.astype(lse.dtype) - _unseeing(lse))


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


def block_gradient(options, scale, scores, lse, delta, do, dlse):
    q, k, v, sees, product, capped, s, z = scores
    do, delta, dlse = (of_seeing(sees, x) for x in (do, delta, dlse))
    p = weights(s, lse)
    dv = over_queries(drop(p, z), do)
    dbias = logits_gradient(p, drop(against_keys(do, v), z), delta, dlse)
    ds = cap_gradient(dbias, capped, options.soft_cap)
    dscale = sum_to(ds * product, scale.shape) if options.scale_gradient else None
    ds = scale * ds
    return BlockGradient(over_keys(ds, k), over_queries(ds, q), dv, dscale, dbias)


def block_tangent(scores, lse, ds, dv):
    """What a block of keys adds to μ, and to dO but for −μ O."""
    p = weights(scores.s, lse)
    pz = drop(p, scores.z)
    weighted = over_keys(pz * ds, scores.value) + over_keys(pz, dv)
    return jnp.sum(p * ds, -1), of_seeing(scores.sees, weighted)


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


# ---------------------------------------------------------------------------------- who sees whom


def visible(options, masking, rows, columns):
    """True where the query of `rows` may see the key of `columns`: five axes, 1 where shared.

    None if all may see all. The mask and the segments of `masking` are those of the rows and
    columns; lengths and offset are of the whole.
    """
    rows, columns = rows[None, :, None], columns[None, None, :]
    conditions = []
    distance = columns - rows - masking.offset[:, None, None]
    left, right = options.window or (None, None)
    if options.is_causal:
        conditions.append(distance <= 0)
    if left is not None:
        conditions.append(distance >= -left)
    if right is not None and not options.is_causal:
        conditions.append(distance <= right)
    if masking.query_lengths is not None:
        conditions.append(rows < masking.query_lengths[:, None, None])
    if masking.key_lengths is not None:
        conditions.append(columns < masking.key_lengths[:, None, None])
    if masking.query_segments is not None:
        conditions.append(masking.query_segments[:, :, None] == masking.key_segments[:, None, :])
    conditions = [condition[:, None, None] for condition in conditions]
    if masking.mask is not None:
        conditions.append(masking.mask)
    return reduce(jnp.logical_and, conditions) if conditions else None


def key_range(options, masking, first_row, last_row):
    """The keys [first, past) of each batch row that positions and lengths leave to some query.

    `first_row` and `last_row` bound the queries, both included.
    """
    first = jnp.full_like(masking.offset, jnp.iinfo(jnp.int32).min)
    past = jnp.full_like(masking.offset, jnp.iinfo(jnp.int32).max)
    left, right = options.window or (None, None)
    if masking.query_lengths is not None:
        last_row = jnp.minimum(last_row, masking.query_lengths - 1)
    if options.is_causal:
        right = 0
    if left is not None:
        first = first_row + masking.offset - left
    if right is not None:
        past = last_row + masking.offset + right + 1
    if masking.key_lengths is not None:
        past = jnp.minimum(past, masking.key_lengths)
    return first, jnp.where(first_row <= last_row, past, jnp.iinfo(jnp.int32).min)


def reached(options, masking, first_row, last_row, S):
    """Whether positions and lengths leave any of S keys to any query of the rows, (B,)."""
    first, past = key_range(options, masking, first_row, last_row)
    return jnp.maximum(first, 0) < jnp.minimum(past, S)


def queries_reached(options, masking, T, S):
    """Whether positions and lengths leave a query a key, (B, 1, 1, T); None if surely all."""
    if _unbounded(options, masking):
        return None
    rows = jnp.arange(T, dtype=jnp.int32)
    of_row = jax.vmap(lambda t: reached(options, masking, t, t, S), out_axes=1)
    return of_row(rows)[:, None, None]


def _unbounded(options, masking):
    lengths = (masking.query_lengths, masking.key_lengths)
    return not options.is_causal and options.window is None and lengths == (None, None)


def hide(options, operands, masking):
    """Zero what positions and lengths keep apart from all else, for NaN there to reach nothing."""
    if _unbounded(options, masking):
        return operands
    q, k, v = operands.query, operands.key, operands.value
    T, S = q.shape[3], k.shape[2]
    q = of_seeing(queries_reached(options, masking, T, S), q)
    first, past = key_range(options, masking, 0, T - 1)
    s = jnp.arange(S, dtype=jnp.int32)[None]
    seen = ((s >= first[:, None]) & (s < past[:, None]))[:, None, :, None]
    return operands._replace(query=q, key=jnp.where(seen, k, 0), value=jnp.where(seen, v, 0))


def hide_results(options, operands, masking, o, lse):
    """O and L, constant where `hide` hides the query: what comes back to them reaches nothing."""
    sees = queries_reached(options, masking, o.shape[3], operands.key.shape[2])
    if sees is None:
        return o, lse
    of_none = jnp.full_like(lse, -jnp.inf)
    if operands.sinks is not None:  # a sink of −∞ is none
        sinks = operands.sinks.astype(lse.dtype)
        of_none = jnp.where(sinks == -jnp.inf, of_none, sinks)
    return of_seeing(sees, o), jnp.where(sees, lse, of_none)


def hide_unseen(q, k, v, visible):
    """Zero the queries that see no key at hand, and the keys and values that no query sees.

    And whether a query sees one.
    """
    seen, sees = jnp.any(visible, (2, 3))[..., None], jnp.any(visible, 4)
    return of_seeing(sees, q), jnp.where(seen, k, 0), jnp.where(seen, v, 0), sees


# ---------------------------------------------------------------------------------------- dropout


def dropout_keys(key, B, M, G):
    """A key for each batch row and query head.

    Of the one kind whose bits are the same under `vmap`, whatever the kind of `key`.
    """
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    of_rows = fold(key, jnp.arange(B, dtype=jnp.uint32))
    return jax.vmap(fold, (0, None))(of_rows, jnp.arange(M * G, dtype=jnp.uint32)).reshape(B, M, G)


def keep(options, masking, first_row, first_column, T, S):
    """Z for T queries and S keys from the given ones on; None without dropout.

    The bits of tile (⌊t/128⌋, ⌊s/128⌋) come from the two indices folded into the head's key, so
    that they are the same whichever block asks.
    """
    if options.dropout_rate == 0:
        return None
    rate, keys = options.dropout_rate, masking.dropout_keys

    def tiles(first, size):
        """The tiles that cover `size` from `first` on, wherever it lies in its own."""
        n = (size + _TILE - 2) // _TILE + 1
        return first // _TILE + jnp.arange(n, dtype=jnp.int32)

    def tile(key, i, j):
        key = jax.random.fold_in(jax.random.fold_in(key, i), j)
        return jax.random.bernoulli(key, 1 - rate, (_TILE, _TILE))

    rows, columns = tiles(first_row, T), tiles(first_column, S)
    grid = jax.vmap(jax.vmap(tile, (None, None, 0)), (None, 0, None))
    bits = jax.vmap(grid, (0, None, None))(keys.reshape(-1), rows, columns)
    bits = jnp.swapaxes(bits, 2, 3)
    bits = bits.reshape(*keys.shape, rows.size * _TILE, columns.size * _TILE)
    start = (0, 0, 0, first_row - rows[0] * _TILE, first_column - columns[0] * _TILE)
    bits = lax.dynamic_slice(bits, [jnp.int32(n) for n in start], (*keys.shape, T, S))
    return jnp.where(bits, 1 / (1 - rate), 0)


def drop(p, z):
    return p if z is None else p * z.astype(p.dtype)
