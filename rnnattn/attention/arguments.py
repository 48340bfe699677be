"""From the arguments of attention, checked, to the problem that a schedule is given.

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rnnattn.attention.dropout import dropout_keys
from rnnattn.attention.problem import Masking, Operands, Options
from rnnattn.checks import Check
from rnnattn.precision import accumulator

Implementation = Literal["dense", "blockwise", "xla", "native", "cudnn", "tokamax"]

_FAR = 2**30  # a window's side of this many keys is open: sums of positions stay in int32


class Arrays(NamedTuple):
    """The arguments that are arrays, or may be."""

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


class Request(NamedTuple):
    """Who is to run a call, and what it returns besides the output."""

    implementation: str | None = None
    return_residual: bool = False
    return_weights: bool = False


def sorted_arguments(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    is_causal=False,
    local_window_size=None,
    logits_soft_cap=None,
    dropout_rate=0.0,
    implementation=None,
    return_residual=False,
    return_weights=False,
    **arrays,
):
    """The arguments of a call by what becomes of them."""
    return (
        Arrays(query, key, value, bias, mask, **arrays),
        Options(is_causal, local_window_size, logits_soft_cap, dropout_rate),
        Request(implementation, return_residual, return_weights),
    )


def with_batch(arrays):
    """One row, where there is no batch axis."""
    first = lambda x: None if x is None else x[None]
    per_row = {
        name: first(getattr(arrays, name))
        for name in ("query", "key", "value", "query_segment_ids", "key_value_segment_ids")
    }
    return arrays._replace(**per_row)


def problem(options, arrays):
    """Operands and masking in the layout of the arguments, heads grouped by key/value head."""
    B, T, N, K = arrays.query.shape
    M = arrays.key.shape[2]
    G, wide = N // M, accumulator(arrays.query.dtype)
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
    key = arrays.dropout_key if options.dropout_rate > 0 else None
    operands = Operands(
        query=arrays.query.reshape(B, T, M, G, K),
        key=arrays.key,
        value=arrays.value,
        scale=scale,
        bias=of_logits(arrays.bias),
        sinks=None if arrays.sinks is None else of_heads(arrays.sinks),
    )
    offset = 0 if arrays.query_offset is None else arrays.query_offset
    masking = Masking(
        offset=jnp.asarray(offset, jnp.int32).reshape(-1),
        mask=of_logits(arrays.mask),
        query_lengths=ints(arrays.query_seq_lengths),
        key_lengths=ints(arrays.key_value_seq_lengths),
        query_segments=ids(arrays.query_segment_ids),
        key_segments=ids(arrays.key_value_segment_ids),
        dropout_keys=None if key is None else dropout_keys(key, B, M, G),
    )
    return operands, masking


# ---- checks -----------------------------------------------------------------------------------


def checked(function, arrays, options, request):
    """The arguments as arrays and options in one form; `ValueError` for the first that is off."""
    check = Check(function)
    array = lambda x: None if x is None else jnp.asarray(x)
    numbers = ("scale", "query_offset", "dropout_key")  # may be Python's, or keys
    given = arrays._asdict()
    arrays = Arrays(**{n: x if n in numbers else array(x) for n, x in given.items()})
    q, k, v = arrays.query, arrays.key, arrays.value

    check(q.ndim in (3, 4), "query", "of shape (B, T, N, K) or (T, N, K)", q.shape)
    batch, (T, N, K), (S, M) = q.shape[:-3], q.shape[-3:], (*k.shape[-3:], 0, 0)[:2]
    rows = "of shape (B, S, M," if batch else "of shape (S, M,"
    check(k.shape == (*batch, S, M, K), "key", f"{rows} K) to go with query's {q.shape}", k.shape)
    check(v.shape[:-1] == k.shape[:-1], "value", f"{rows} V) to go with key's {k.shape}", v.shape)
    check(M > 0 and N % M == 0, "query", f"of a multiple of key's {M} heads", f"{N} heads")
    check.floating("query", q)
    for name in ("key", "value"):
        check.dtype_of(name, getattr(arrays, name), "query", q)

    logits = (*batch, N, T, S)
    axes = "(B, N, T, S)" if batch else "(N, T, S)"
    broadcast = f"of a shape that broadcasts to {axes} = {logits}"
    for name, of_kind in (("bias", check.floating), ("mask", check.booleans)):
        x = getattr(arrays, name)
        if x is not None:
            check(_broadcasts(x.shape, logits), name, broadcast, x.shape)
            of_kind(name, x)

    per_row = "(B,)" if batch else "()"
    for name in ("query_seq_lengths", "key_value_seq_lengths", "query_offset"):
        x = getattr(arrays, name)
        if x is not None:
            shapes = [batch, ()] if name == "query_offset" else [batch]
            expected = f"of shape {per_row} = {batch}" if batch else "of shape ()"
            expected = f"an int or {expected}" if name == "query_offset" else expected
            check(jnp.shape(x) in shapes, name, expected, jnp.shape(x))
            check.integers(name, x)

    ids = {"query_segment_ids": T, "key_value_segment_ids": S}
    for name, other in (tuple(ids), tuple(ids)[::-1]):
        x, shape = getattr(arrays, name), (*batch, ids[name])
        if x is None:
            check(getattr(arrays, other) is None, name, f"given where `{other}` is", None)
        else:
            check(x.shape == shape, name, f"of shape {shape}", x.shape)
            check.integers(name, x)

    if arrays.scale is not None:
        shape = jnp.shape(arrays.scale)
        check(shape in ((), (N,)), "scale", f"a number or of shape () or (N,) = ({N},)", shape)
        if not isinstance(arrays.scale, int | float):
            check.floating("scale", arrays.scale)
    if arrays.sinks is not None:
        check.shape("sinks", arrays.sinks, (N,), "(N,)")
        check.floating("sinks", arrays.sinks)
    _check_options(check, options, arrays.dropout_key)
    _check_request(check, request)
    return arrays, options._replace(
        is_causal=bool(options.is_causal), window=_bounded(options.window)
    )


def _check_options(check, options, dropout_key):
    window, cap, rate = options.window, options.soft_cap, options.dropout_rate
    sides = both_sides(window) if isinstance(window, int | tuple | list | None) else ()
    sizes = all(side is None or (isinstance(side, int) and side >= 0) for side in sides)
    expected = "None, an int of at least 0, or a pair of them, None for an open side"
    check(len(sides) == 2 and sizes, "local_window_size", expected, repr(window))
    positive = isinstance(cap, int | float) and cap > 0
    check(cap is None or positive, "logits_soft_cap", "a positive number or None", repr(cap))
    check.share("dropout_rate", rate)
    if rate > 0:
        check(dropout_key is not None, "dropout_key", "given where `dropout_rate` is above 0", None)
        typed = jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key)
        single = dropout_key.ndim == (0 if typed else 1)
        check(single, "dropout_key", "a single key", f"an array {dropout_key.shape} of them")


def _check_request(check, request):
    name = request.implementation
    check.one_of("implementation", name, (None, *get_args(Implementation)))
    if request.return_weights:
        expected = "None, 'xla' or 'dense' where `return_weights` is set"
        check(name in (None, "xla", "dense"), "implementation", expected, repr(name))


def _broadcasts(shape, target):
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    return len(padded) == len(target) and all(
        n in (1, want) for n, want in zip(padded, target, strict=True)
    )


def both_sides(size):
    """(left, right), None for an open side."""
    if size is None or isinstance(size, int):
        return size, size
    return tuple(size)


def _bounded(window):
    """(left, right), None for a side so far that it is open; None where both are."""
    sides = tuple(None if n is None or n >= _FAR else n for n in both_sides(window))
    return None if sides == (None, None) else sides
