"""Dot-product attention: arguments, checks, and the choice of schedule; a cache for decoding.

The equations and their gradient are in `rnnattn.scores`, the schedules that run them in
`rnnattn.dense` and `rnnattn.blockwise`.

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import rnnattn.blockwise as blockwise
import rnnattn.dense as dense
import rnnattn.native as native
import rnnattn.native_attention as native_attention
from rnnattn.precision import accumulator, varying_together
from rnnattn.scores import Masking, Operands, Options, dropout_keys, hide, hide_results

Implementation = Literal["dense", "blockwise", "xla", "native", "cudnn", "tokamax"]

# Measured on a CPU: benchmarks/README.md.
_DENSE_LOGITS = 2**16  # of one head

_FAR = 2**30  # a window's side of this many keys is open: sums of positions stay in int32


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, and room for more: `length` of the S are there."""

    key: Float[Array, "B S M K"]
    value: Float[Array, "B S M V"]
    length: Int[Array, " B"]


def dot_product_attention(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | Float[Array, "..."] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "..."] | None = None,
    key_value_seq_lengths: Int[Array, "..."] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    query_offset: int | Int[Array, "..."] = 0,
    query_segment_ids: Int[Array, "..."] | None = None,
    key_value_segment_ids: Int[Array, "..."] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    return_weights: bool = False,
) -> Any:
    """softmax(scale · q kᵀ + bias) v for each head, over the keys a query may see (A1, A3).

    In place of `jax.nn.dot_product_attention`: the arguments up to `return_residual` are the same.

    Args:
        query: (B, T, N, K); B may be absent, here and in all that follows.
        key, value: (B, S, M, K) and (B, S, M, V), with N a multiple of M: query head n reads
            key/value head n // (N / M).
        bias: added to the logits; up to four axes that broadcast to (B, N, T, S).
        mask: False hides a key from a query; up to four axes that broadcast to (B, N, T, S).
        scale: of the logits, 1/√K by default; a number, or an array () or (N,).
        is_causal: hides keys behind the query's position.
        query_seq_lengths, key_value_seq_lengths: (B,), what is valid of each row, 0 included.
        local_window_size: the keys (left, right) of a query's position that it sees, besides the
            one at it; None for all of a side, one number for both.
        implementation: "dense" (all logits at once), "blockwise" (memory linear in T + S), "xla"
            (the better of the two, blockwise from 2¹⁶ logits for each head on), "native" (kernels
            for a CPU, see `rnnattn.native`; float32, no dropout); "cudnn" and "tokamax" hand the
            call over to `jax.nn` and to tokamax, for what they can serve, with their own gradients
            and rules for rows that see nothing; None chooses: "native" on a CPU where it can serve,
            else "xla".
        return_residual: also return the log-sum-exp L, (B, T, N), in float32 for 16-bit inputs.
        query_offset: a number or (B,): query t stands at position t + offset among the keys. A
            cache's length while decoding; S − T aligns the last query with the last key.
        query_segment_ids, key_value_segment_ids: (B, T) and (B, S): a query sees the keys of its
            own segment. Sorted ids let whole blocks be skipped.
        logits_soft_cap: c: scaled logits s become c tanh(s / c), before bias and masks, as in ONNX.
        sinks: (N,), a logit of each head that joins the softmax's sum, and L, but has no value.
        dropout_rate: the share of weights set to zero, in [0, 1); the rest is scaled up.
        dropout_key: needed where `dropout_rate` is above 0. Both schedules drop the same weights.
        return_weights: also return the weights as they are applied, dropout included, (B, N, T, S);
            dense only, with JAX's own gradient.
    Returns:
        The output (B, T, N, V) in the dtype of `value`; a tuple with L and the weights after it, if
        they are asked for. A query that may see no key gets zeros, and L = −∞ (its sink, if there
        is one). 16-bit inputs are summed in float32; float64 is float64 throughout.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        With respect to query, key, value, bias, sinks and an array `scale`, from cotangents of the
        output and L; kept are these, the output and L, and the weights are computed again; the rest
        of the arguments are constants. Whatever hides (lengths, mask, segments, causality, a
        window, offsets): a key or value that no query of its row may see, a query that may see no
        key, and what comes back to the output of one, reach nothing, even if they are NaN or ∞, and
        get gradients of zero. What comes back to L of such a query goes to its sink, if there is
        one. The gradient can be differentiated
        again, in reverse and forward mode, in linear memory where the schedule is. `jax.jvp` of the
        function itself raises a TypeError ("can't apply forward-mode autodiff (jvp) to a custom_vjp
        function"): that is what `rnnattn.attention.dot_product_attention_jvp` is for.
    Example:
        >>> q, k, v = jnp.ones((3, 2, 5, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True).shape
        (2, 5, 4, 8)
        >>> def loss(k):
        ...     out, lse = dot_product_attention(q, k, v, is_causal=True, return_residual=True)
        ...     return out[:, 2].sum() + lse[:, 2].sum()
        >>> bool((jax.grad(loss)(k)[:, 3:] == 0).all())
        True
    """
    arrays = _Arrays(
        query,
        key,
        value,
        bias,
        mask,
        scale,
        query_seq_lengths,
        key_value_seq_lengths,
        query_offset,
        query_segment_ids,
        key_value_segment_ids,
        sinks,
        dropout_key,
    )
    settings = _Settings(
        is_causal,
        local_window_size,
        logits_soft_cap,
        dropout_rate,
        implementation,
        return_residual,
        return_weights,
    )
    return _call("dot_product_attention", _attend, arrays, settings)


def dot_product_attention_jvp(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    **options: Any,
) -> Any:
    """`dot_product_attention` with a rule for tangents instead of one for cotangents.

    For `jax.jvp`, `jax.jacfwd`, `jax.linearize` and Hessian-vector products of any kind, in memory
    linear in T + S. Reverse mode works as well, a little slower than the other's.

    Args:
        options: those of `dot_product_attention`, "cudnn" and "tokamax" apart.
    Raises:
        ValueError: as `dot_product_attention` does.
    Gradient:
        The tangent dO = (P ∘ dS) v + P dv − μ O, dL = μ = Σ P ∘ dS, block by block (Lu & Song
        2024); its transpose is the gradient.
    Example:
        >>> q, k, v = jnp.ones((3, 2, 5, 4, 8))
        >>> out, dout = jax.jvp(lambda q: dot_product_attention_jvp(q, k, v), (q,), (q,))
        >>> dout.shape
        (2, 5, 4, 8)
    """
    arrays, settings = _sorted(query, key, value, bias, mask, **options)
    return _call("dot_product_attention_jvp", _forward, arrays, settings)


def update_cache(
    cache: KVCache, key: Float[Array, "B T M K"], value: Float[Array, "B T M V"]
) -> KVCache:
    """The cache with T more tokens behind those that each row holds.

    To attend to it, give the length before the update as `query_offset`, with `is_causal`. What
    exceeds the room of a row is not stored, though `length` counts it: compare it with S.

    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and what
            came.
    Gradient:
        With respect to both caches' and the new keys and values; JAX's own.
    Example:
        >>> empty = KVCache(jnp.zeros((2, 16, 4, 8)), jnp.zeros((2, 16, 4, 8)), jnp.zeros(2, int))
        >>> q, k, v = jnp.ones((3, 2, 1, 4, 8))
        >>> cache = update_cache(empty, k, v)
        >>> out = dot_product_attention(
        ...     q, cache.key, cache.value, is_causal=True, query_offset=empty.length
        ... )
        >>> cache.length.tolist(), out.shape
        ([1, 1], (2, 1, 4, 8))
    """
    _check_cache(cache, key, value)
    T = key.shape[1]
    rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
    at = cache.length.astype(jnp.int32)[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    return KVCache(
        cache.key.at[rows, at].set(key, mode="drop"),
        cache.value.at[rows, at].set(value, mode="drop"),
        cache.length + jnp.asarray(T, cache.length.dtype),
    )


# ----------------------------------------------------------------------------------- the schedules


class _Schedule(NamedTuple):
    """(options, operands, masking) → O, L; with O, L, dO, dL behind → the operands' gradient."""

    forward: Callable
    backward: Callable
    hides: bool = False  # what no query can reach by itself


_DENSE = _Schedule(dense.forward, dense.backward)
_BLOCKWISE = _Schedule(blockwise.forward, blockwise.backward)

# The kernels, and the XLA schedule for where they do not serve.
_NATIVE = {
    xla: _Schedule(
        partial(native_attention.forward, xla), partial(native_attention.backward, xla), hides=True
    )
    for xla in (_DENSE, _BLOCKWISE)
}


def _forward(schedule, options, operands, masking):
    return schedule.forward(options, operands, masking)


def _plain(schedule, options, operands, masking):
    return dense.forward(options, operands, masking)


def _forward_with_weights(schedule, options, operands, masking):
    return dense.forward_with_weights(options, operands, masking)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(schedule, options, operands, masking):
    """O and L."""
    return _forward(schedule, options, operands, masking)


def wanted(x):
    """Whether an argument of a rule is differentiated, as the size of a residual, 0 or 1.

    JAX may read the residuals of one trace by the tree of another's, which then has to be the same.
    """
    return jnp.zeros(int(x is not None and x.perturbed), jnp.bool)


def _attend_fwd(schedule, options, operands, masking):
    """Keeps operands, O and L, and which of bias and scale is differentiated: see `wanted`.

    O is that of the accumulator: rounded to 16 bits, Δ would lose what sets it apart from dP.
    """
    asked = (wanted(operands.bias), wanted(operands.scale))
    operands, masking = jax.tree.map(lambda x: x.value, (operands, masking))
    o, lse = _forward(schedule, options, operands, masking)
    return (o, lse), (operands, masking, o, lse, asked)


def _attend_bwd(schedule, options, residuals, cotangents):
    """The gradient from the log-sum-exp: the equations of `rnnattn.scores`."""
    *kept, asked = residuals
    wants_bias, wants_scale = (flag.size > 0 for flag in asked)
    options = options._replace(bias_gradient=wants_bias, scale_gradient=wants_scale)
    full = lambda d: jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d
    do, dlse = map(full, cotangents)
    do = do.astype(kept[0].value.dtype)  # which it had
    gradient = schedule.backward(options, *kept, do, dlse)
    absent = {name: None for name, d in gradient._asdict().items() if d is None}
    like = kept[0]._replace(**absent)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, like), None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


# ----------------------------------------------------------------------- from arguments to operands


class _Arrays(NamedTuple):
    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    scale: Any = None
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    query_offset: Any = 0
    query_segment_ids: Any = None
    key_value_segment_ids: Any = None
    sinks: Any = None
    dropout_key: Any = None


class _Settings(NamedTuple):
    is_causal: bool = False
    local_window_size: Any = None
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    implementation: str | None = None
    return_residual: bool = False
    return_weights: bool = False


def _sorted(query, key, value, bias, mask, **options):
    settings = {name: options.pop(name) for name in _Settings._fields if name in options}
    return _Arrays(query, key, value, bias, mask, **options), _Settings(**settings)


def _call(function, rule, arrays, settings):
    arrays = _check(function, arrays, settings)
    if settings.implementation in ("cudnn", "tokamax"):
        ours = "None, 'xla', 'dense' or 'blockwise'"
        _require(function, rule is _attend, "implementation", ours, repr(settings.implementation))
        return _hand_over(arrays, settings)
    if settings.implementation == "native" and (unserved := _unserved(arrays, settings)):
        raise ValueError(
            f"{function}: `implementation='native'` cannot serve {' or '.join(unserved)}; 'xla' can"
        )
    if settings.return_weights:
        rule = _forward_with_weights
    schedule = _DENSE if rule is _plain else _schedule(arrays, settings)
    results = _run(rule, schedule, _options(settings), arrays)
    wanted = (True, settings.return_residual, settings.return_weights)
    results = [result for result, want in zip(results, wanted, strict=False) if want]
    return results[0] if len(results) == 1 else tuple(results)


def _options(settings):
    far = lambda side: side is None or side >= _FAR
    left, right = (None if far(side) else side for side in _window(settings.local_window_size))
    window = None if left is None and right is None else (left, right)
    return Options(
        bool(settings.is_causal), window, settings.logits_soft_cap, settings.dropout_rate
    )


def _schedule(arrays, settings):
    T, S = arrays.query.shape[-3], arrays.key.shape[-3]
    empty = arrays.query.size * arrays.key.size == 0
    if settings.implementation == "dense" or settings.return_weights or empty:
        return _DENSE
    if settings.implementation == "blockwise":
        return _BLOCKWISE
    xla = _DENSE if T * S < _DENSE_LOGITS else _BLOCKWISE
    # Where they serve, the kernels are the faster at all sizes measured, but for the gradient of
    # one query per head (benchmarks/README.md, "When they run").
    wanted = settings.implementation is None and not _unserved(arrays, settings)
    return _NATIVE[xla] if wanted or settings.implementation == "native" else xla


def _unserved(arrays, settings):
    """What of a call the native kernels cannot serve."""
    unserved = {
        f"the dtype {arrays.query.dtype.name}": arrays.query.dtype != jnp.float32,
        "dropout": settings.dropout_rate > 0,
        "an array without elements": 0 in (arrays.query.size, arrays.value.size),
    }
    if not native.status().available:
        unserved = {f"this installation ({native.status().reason})": True}
    return [what for what, holds in unserved.items() if holds]


def _window(size):
    """(left, right), None for an open side."""
    if size is None or isinstance(size, int):
        return size, size
    return tuple(size)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(rule, schedule, options, arrays):
    """O, L and what else `rule` returns, in the layout of the arguments."""
    arrays = varying_together(arrays)
    batched = arrays.query.ndim == 4
    if not batched:
        arrays = _with_batch(arrays)
    B, T, N, _ = arrays.query.shape
    operands, masking = _problem(options, arrays)
    if not schedule.hides:
        operands = hide(options, operands, masking)
    o, lse, *weights = rule(schedule, options, operands, masking)
    if not schedule.hides:
        o, lse = hide_results(options, operands, masking, o, lse)
    o = jnp.moveaxis(o, 3, 1).reshape(B, T, N, o.shape[-1]).astype(arrays.value.dtype)
    lse = jnp.moveaxis(lse, 3, 1).reshape(B, T, N)
    weights = [w.reshape(B, N, *w.shape[3:]) for w in weights]
    results = (o, lse, *weights)
    return results if batched else tuple(x[0] for x in results)


def _with_batch(arrays):
    """One row, where there is no batch axis."""
    first = lambda x: None if x is None else x[None]
    per_row = {
        name: first(getattr(arrays, name))
        for name in ("query", "key", "value", "query_segment_ids", "key_value_segment_ids")
    }
    return arrays._replace(**per_row)


def _problem(options, arrays):
    """Heads in front of time, for a head's matrices to be contiguous; grouped by key/value head."""
    B, T, N, K = arrays.query.shape
    M = arrays.key.shape[2]
    G, wide = N // M, accumulator(arrays.query.dtype)
    heads = lambda x: jnp.moveaxis(x, 2, 1)
    ints = lambda x: None if x is None else jnp.asarray(x, jnp.int32).reshape(-1)
    ids = lambda x: None if x is None else x.astype(jnp.int32)

    def of_logits(x):
        """(…) → (#B, #M, #G, #T, #S)."""
        if x is None:
            return None
        x = jnp.asarray(x)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        groups = (M, G) if x.shape[1] == N else (1, 1)
        return x.reshape(x.shape[0], *groups, *x.shape[2:])

    def of_heads(x):
        """() or (N,) → (1, #M, #G, 1)."""
        x = jnp.asarray(x, wide)
        return x.reshape(1, *((M, G) if x.size == N else (1, 1)), 1)

    scale = of_heads(K**-0.5 if arrays.scale is None else arrays.scale)[..., None]
    # Axes apart before they are moved: what the native kernels move back then cancels out.
    query = jnp.moveaxis(arrays.query.reshape(B, T, M, G, K), 1, 3)
    key = arrays.dropout_key if options.dropout_rate > 0 else None
    operands = Operands(
        query=query,
        key=heads(arrays.key),
        value=heads(arrays.value),
        scale=scale,
        bias=of_logits(arrays.bias),
        sinks=None if arrays.sinks is None else of_heads(arrays.sinks),
    )
    masking = Masking(
        offset=jnp.asarray(arrays.query_offset, jnp.int32).reshape(-1),
        mask=of_logits(arrays.mask),
        query_lengths=ints(arrays.query_seq_lengths),
        key_lengths=ints(arrays.key_value_seq_lengths),
        query_segments=ids(arrays.query_segment_ids),
        key_segments=ids(arrays.key_value_segment_ids),
        dropout_keys=None if key is None else dropout_keys(key, B, M, G),
    )
    return operands, masking


# ------------------------------------------------------------------------------- other libraries


def _hand_over(arrays, settings):
    """The call by `jax.nn` with cuDNN, or by tokamax."""
    _check_served(arrays, settings)
    batched = arrays.query.ndim == 4
    if not batched:
        arrays = _with_batch(arrays)
    lengths = lambda x: None if x is None else x.astype(jnp.int32).reshape(-1)
    four_axes = lambda x: None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)
    options = {
        "scale": arrays.scale,
        "is_causal": settings.is_causal,
        "query_seq_lengths": lengths(arrays.query_seq_lengths),
        "key_value_seq_lengths": lengths(arrays.key_value_seq_lengths),
        "local_window_size": settings.local_window_size,
    }
    if settings.implementation == "cudnn":
        attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    else:
        import tokamax

        attend = tokamax.dot_product_attention
        options["logits_soft_cap"] = settings.logits_soft_cap
    bias, mask = four_axes(arrays.bias), four_axes(arrays.mask)
    out = attend(arrays.query, arrays.key, arrays.value, bias, mask, **options)
    return out if batched else out[0]


def _check_served(arrays, settings):
    name = settings.implementation
    refused = {
        "`query_offset`": not (isinstance(arrays.query_offset, int) and arrays.query_offset == 0),
        "segment ids": arrays.query_segment_ids is not None,
        "`sinks`": arrays.sinks is not None,
        "dropout": settings.dropout_rate > 0,
        "`return_residual`": settings.return_residual,
        "an array as `scale`": not isinstance(arrays.scale, int | float | None),
        "an open side of `local_window_size`": settings.local_window_size is not None
        and None in _window(settings.local_window_size),
    }
    if name == "cudnn":
        dtype = jnp.result_type(arrays.query)
        refused |= {
            f"the dtype {dtype.name}": dtype not in (jnp.bfloat16, jnp.float16),
            "a value width other than the key's": arrays.key.shape[-1] != arrays.value.shape[-1],
            "`logits_soft_cap`": settings.logits_soft_cap is not None,
            "a machine without a GPU": jax.default_backend() != "gpu",
        }
    else:
        # Its cap comes after the bias, ours before.
        both = settings.logits_soft_cap is not None and arrays.bias is not None
        refused |= {
            "`logits_soft_cap` with a bias": both,
            "an environment without the package": find_spec("tokamax") is None,
        }
    found = [reason for reason, holds in refused.items() if holds]
    if found:
        raise ValueError(
            f"dot_product_attention: `implementation={name!r}` cannot serve "
            f"{' or '.join(found)}; 'xla' can"
        )


# ------------------------------------------------------------------------------------------- checks


def _check(function, arrays, settings):
    """The arguments as arrays; `ValueError` for the first that is off."""
    check = partial(_require, function)
    array = lambda x: None if x is None else jnp.asarray(x)
    numbers = ("scale", "query_offset", "dropout_key")  # may be Python's, or keys
    given = arrays._asdict()
    arrays = _Arrays(**{n: x if n in numbers else array(x) for n, x in given.items()})
    q, k, v = arrays.query, arrays.key, arrays.value

    check(q.ndim in (3, 4), "query", "of shape (B, T, N, K) or (T, N, K)", q.shape)
    batch, (T, N, K), (S, M) = q.shape[:-3], q.shape[-3:], (*k.shape[-3:], 0, 0)[:2]
    rows = "of shape (B, S, M," if batch else "of shape (S, M,"
    check(k.shape == (*batch, S, M, K), "key", f"{rows} K) to go with query's {q.shape}", k.shape)
    check(v.shape[:-1] == k.shape[:-1], "value", f"{rows} V) to go with key's {k.shape}", v.shape)
    check(M > 0 and N % M == 0, "query", f"of a multiple of key's {M} heads", f"{N} heads")
    check(_is(q, jnp.floating), "query", "of a floating dtype", q.dtype.name)
    for name in ("key", "value"):
        dtype = getattr(arrays, name).dtype
        check(dtype == q.dtype, name, f"of query's dtype {q.dtype.name}", dtype.name)

    logits = (*batch, N, T, S)
    axes = "(B, N, T, S)" if batch else "(N, T, S)"
    broadcast = f"of a shape that broadcasts to {axes} = {logits}"
    for name, kind, expected in (
        ("bias", jnp.floating, "of a floating dtype"),
        ("mask", jnp.bool_, "of dtype bool"),
    ):
        x = getattr(arrays, name)
        if x is not None:
            check(_broadcasts(x.shape, logits), name, broadcast, x.shape)
            check(_is(x, kind), name, expected, x.dtype.name)

    per_row = "(B,)" if batch else "()"
    for name in ("query_seq_lengths", "key_value_seq_lengths", "query_offset"):
        x = getattr(arrays, name)
        if x is not None:
            shapes = [batch, ()] if name == "query_offset" else [batch]
            expected = f"of shape {per_row} = {batch}" if batch else "of shape ()"
            expected = f"an int or {expected}" if name == "query_offset" else expected
            check(jnp.shape(x) in shapes, name, expected, jnp.shape(x))
            check(_is(x, jnp.integer), name, "of integers", jnp.result_type(x).name)

    ids = {"query_segment_ids": T, "key_value_segment_ids": S}
    for name, other in (tuple(ids), tuple(ids)[::-1]):
        x, shape = getattr(arrays, name), (*batch, ids[name])
        if x is None:
            check(getattr(arrays, other) is None, name, f"given where `{other}` is", None)
        else:
            check(x.shape == shape, name, f"of shape {shape}", x.shape)
            check(_is(x, jnp.integer), name, "of integers", x.dtype.name)

    if arrays.scale is not None:
        shape = jnp.shape(arrays.scale)
        check(shape in ((), (N,)), "scale", f"a number or of shape () or (N,) = ({N},)", shape)
        number = isinstance(arrays.scale, int | float) or _is(arrays.scale, jnp.floating)
        check(number, "scale", "of a floating dtype", jnp.result_type(arrays.scale).name)
    if arrays.sinks is not None:
        sinks = arrays.sinks
        check(sinks.shape == (N,), "sinks", f"of shape (N,) = ({N},)", sinks.shape)
        check(_is(sinks, jnp.floating), "sinks", "of a floating dtype", sinks.dtype.name)
    _check_settings(check, settings, arrays.dropout_key)
    return arrays


def _check_settings(check, settings, dropout_key):
    window, cap = settings.local_window_size, settings.logits_soft_cap
    sides = _window(window) if isinstance(window, int | tuple | list | None) else ()
    sizes = all(side is None or (isinstance(side, int) and side >= 0) for side in sides)
    expected = "None, an int of at least 0, or a pair of them, None for an open side"
    check(len(sides) == 2 and sizes, "local_window_size", expected, repr(window))
    positive = isinstance(cap, int | float) and cap > 0
    check(cap is None or positive, "logits_soft_cap", "a positive number or None", repr(cap))
    rate = settings.dropout_rate
    share = isinstance(rate, int | float) and 0 <= rate < 1
    check(share, "dropout_rate", "a number in [0, 1)", repr(rate))
    if rate > 0:
        check(dropout_key is not None, "dropout_key", "given where `dropout_rate` is above 0", None)
        typed = jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key)
        single = dropout_key.ndim == (0 if typed else 1)
        check(single, "dropout_key", "a single key", f"an array {dropout_key.shape} of them")
    names, name = get_args(Implementation), settings.implementation
    check(name is None or name in names, "implementation", f"None or one of {names}", repr(name))
    if settings.return_weights:
        expected = "None, 'xla' or 'dense' where `return_weights` is set"
        check(name in (None, "xla", "dense"), "implementation", expected, repr(name))


def _require(function, holds, name, expected, got):
    if not holds:
        raise ValueError(f"{function}: `{name}` must be {expected}, got {got}")


def _is(x, kind):
    return jnp.issubdtype(jnp.result_type(x), kind)


def _broadcasts(shape, target):
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    return len(padded) == len(target) and all(
        n in (1, want) for n, want in zip(padded, target, strict=True)
    )


def _check_cache(cache, key, value):
    check = partial(_require, "update_cache")
    B, S, *_ = whole = cache.key.shape
    check(len(whole) == 4, "cache.key", "of shape (B, S, M, K)", whole)
    same = len(cache.value.shape) == 4 and cache.value.shape[:3] == whole[:3]
    expected = f"of shape (B, S, M, V) to go with key's {whole}"
    check(same, "cache.value", expected, cache.value.shape)
    for name, old, new in (("key", cache.key, key), ("value", cache.value, value)):
        expected = f"of shape (B, T, …) to go with the cache's {old.shape}"
        same = new.ndim == 4 and (new.shape[0], *new.shape[2:]) == (B, *old.shape[2:])
        check(same, name, expected, new.shape)
        dtype = f"of the cache's dtype {old.dtype.name}"
        check(new.dtype == old.dtype, name, dtype, new.dtype.name)
    T, length = key.shape[1], cache.length
    check(T == value.shape[1], "value", f"of as many tokens as key, {T}", value.shape[1])
    check(T <= S, "key", f"of at most the {S} tokens the cache has room for", T)
    check(length.shape == (B,), "cache.length", f"of shape (B,) = ({B},)", length.shape)
    check(_is(length, jnp.integer), "cache.length", "of integers", length.dtype.name)
