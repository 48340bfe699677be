"""From the arguments of attention, checked, to the problem that a schedule is given.

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
"""

import math
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp

from rnnattn.attention.dropout import dropout_keys
from rnnattn.attention.functions import is_float, trace
from rnnattn.attention.problem import Functions, Masking, Operands, Options
from rnnattn.attention.reduced import maps_of, reduced
from rnnattn.attention.signature import Implementation
from rnnattn.checks import Check, several
from rnnattn.meshes import explicit_mesh, in_parts, parts_of
from rnnattn.precision import accumulator

# What has the leading axes of the query.
_PER_ROW = (
    *("query", "key", "value", "query_seq_lengths", "key_value_seq_lengths"),
    *("query_offset", "query_segment_ids", "key_value_segment_ids", "key_ranges"),
)

_FAR = 2**30  # a window's side of this many keys is open: sums of positions stay in int32


# Fields of `Arrays` that are no arguments.
_INTERNAL = {"key_ranges", "score_arrays", "function_arrays", "rows", "heads"}


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
    # no argument of anybody: see `rnnattn.attention.packed` and `reduced`, and `with_functions`
    key_ranges: Any = None
    score_arrays: Any = None
    function_arrays: Any = None  # of the mask function, others of the score function, and maps
    rows: Any = None
    heads: Any = None


class Request(NamedTuple):
    """Who is to run a call, and what it returns besides the output."""

    implementation: str | None = None
    return_residual: bool = False
    return_weights: bool = False


def sorted_arguments(
    function,
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
    mask_function=None,
    score_function=None,
    implementation=None,
    return_residual=False,
    return_weights=False,
    **arrays,
):
    """The arguments of a call by what becomes of them."""
    for name in arrays.keys() - (set(Arrays._fields) - _INTERNAL):
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return (
        Arrays(query, key, value, bias, mask, **arrays),
        Options(
            is_causal,
            local_window_size,
            logits_soft_cap,
            dropout_rate,
            mask_function=mask_function,
            score_function=score_function,
        ),
        Request(implementation, return_residual, return_weights),
    )


def with_one_batch_axis(arrays):
    """The same with the leading axes of the query made one; one row, where it has none."""
    batch = arrays.query.shape[:-3]
    if len(batch) == 1:
        return arrays
    B = math.prod(batch)

    def rows(x):
        return x.reshape(B, *x.shape[len(batch) :]) if jnp.shape(x)[: len(batch)] == batch else x

    def of_logits(x):
        if x is None or x.ndim < 4 or not batch:
            return x
        shared = all(n == 1 for n in x.shape[:-3])
        leading = (1,) * len(batch) if shared else batch
        whole = jnp.broadcast_to(x, (*leading, *x.shape[-3:]))
        return whole.reshape(math.prod(leading), *x.shape[-3:])

    per_row = {
        name: None if x is None else rows(jnp.asarray(x))
        for name, x in arrays._asdict().items()
        if name in _PER_ROW
    }
    return arrays._replace(**per_row, bias=of_logits(arrays.bias), mask=of_logits(arrays.mask))


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

    scale = max(K, 1) ** -0.5 if arrays.scale is None else arrays.scale
    keys = arrays.dropout_key if options.dropout_rate > 0 else None
    if keys is not None:  # of each head already, where these are divided
        made = keys.ndim == 2
        keys = keys.reshape(B, M, G) if made else dropout_keys(keys, B, M, G)
    operands = Operands(
        query=arrays.query.reshape(B, T, M, G, K),
        key=arrays.key,
        value=arrays.value,
        scale=of_heads(scale)[..., None],
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
        dropout_keys=keys,
        key_ranges=arrays.key_ranges,
    )
    if has_functions(options):
        functions = Functions(arrays.rows, arrays.heads.reshape(M, G), *arrays.function_arrays)
        operands = operands._replace(score_arrays=arrays.score_arrays)
        masking = masking._replace(functions=functions)
    return operands, masking


def has_functions(options):
    return options.mask_function is not None or options.score_function is not None


def with_functions(function, arrays, options):
    """The arguments with functions of positions traced, and apart from these what they close over.

    What a mask says in other words is said in those (`rnnattn.attention.reduced`).
    """
    if not has_functions(options):
        return arrays, options
    check = Check(function)
    maps = maps_of(check, arrays, options.mask_function)
    arrays, options = reduced(check, arrays, options)
    return traced(check, arrays, options, maps)


def traced(check, arrays, options, maps=()):
    """The arguments with functions of positions traced, without other words for what they say."""
    floats: list[Any] = []
    of_score: list[Any] = []
    of_mask: tuple[Any, ...] = ()
    mask, score = options.mask_function, options.score_function
    if mask is not None:
        mask, of_mask = trace(check, "mask_function", mask)
    if score is not None:
        score, given = trace(check, "score_function", score, accumulator(arrays.query.dtype))
        for x in given:
            (floats if is_float(x) else of_score).append(x)
    arrays = arrays._replace(
        score_arrays=None if score is None else tuple(floats),
        function_arrays=(of_mask, tuple(of_score), () if mask is None else maps),
    )
    return arrays, options._replace(mask_function=mask, score_function=score)


def numbered(options, arrays):
    """With the numbers of rows and heads, where functions ask for them and they are not there."""
    if not has_functions(options) or arrays.rows is not None:
        return arrays
    B, _, N, _ = arrays.query.shape
    rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (B, N))
    return arrays._replace(rows=rows, heads=heads)


def on_mesh(function, run, options, arrays, results):
    """`run(arrays)`; on a mesh of explicit axes, in parts of rows and heads."""
    if explicit_mesh(arrays) is None:
        return run(arrays)
    B, _, N, _ = arrays.query.shape
    M, parts = arrays.key.shape[2], parts_of(arrays.query, 2)
    if 1 < M and M % parts:  # several devices read one head: each gets its own
        copies = math.lcm(M, parts) // M
        key, value = (jnp.repeat(x, copies, axis=2) for x in (arrays.key, arrays.value))
        arrays = arrays._replace(key=key, value=value)
    if options.dropout_rate > 0:  # the same wherever a head is
        keys = dropout_keys(arrays.dropout_key, B, 1, N).reshape(B, N)
        arrays = arrays._replace(dropout_key=keys)
    given = {name: x for name, x in arrays._asdict().items() if x is not None}
    last = lambda letters, x: letters and letters[len(letters) - jnp.ndim(x) :]
    axes = Arrays(
        *("BTNK", "BSNK", "BSNV", "BNTS", "BNTS", "N", "B", "B", "B", "BT", "BS", "N", "BN"),
        *("BTR", "", "", "B", "N"),
    )
    letters = {name: last(getattr(axes, name), x) for name, x in given.items()}
    return in_parts(
        Check(function),
        lambda given: run(Arrays(**given)),
        given,
        letters,
        results,
        divided="BN",
        whole={"T": "the queries (see `ring_attention`)", "S": "the keys (see `ring_attention`)"},
    )


# ---- checks -----------------------------------------------------------------------------------


def checked(function, arrays, options, request):
    """The arguments as arrays and options in one form; `ValueError` for the first that is off."""
    check = Check(function)
    operands = ("query", "key", "value")
    array = lambda name, x: check.array(name, x) if name in operands or x is not None else None
    numbers = ("scale", "query_offset", "dropout_key")  # may be Python's, or keys
    given = {n: x for n, x in arrays._asdict().items() if n not in (*numbers, *_INTERNAL)}
    arrays = arrays._replace(**{n: array(n, x) for n, x in given.items()})
    q, k, v = arrays.query, arrays.key, arrays.value

    check(q.ndim >= 3, "query", "of shape (*B, T, N, K)", q.shape)
    batch, (T, N, K), (S, M) = q.shape[:-3], q.shape[-3:], (*k.shape[-3:], 0, 0)[:2]
    B = ("", "B, ", "*B, ")[min(len(batch), 2)]
    rows = f"of shape ({B}S, M,"
    check(k.shape == (*batch, S, M, K), "key", f"{rows} K) to go with query's {q.shape}", k.shape)
    check(v.shape[:-1] == k.shape[:-1], "value", f"{rows} V) to go with key's {k.shape}", v.shape)
    check(M > 0 and N % M == 0, "query", f"of a multiple of key's {M} heads", f"{N} heads")
    check.floating("query", q)
    for name in ("key", "value"):
        check.dtype_of(name, getattr(arrays, name), "query", q)

    # one row may say that it is one, as it may in `jax.nn`
    logits, one = (*batch, N, T, S), () if batch else (1,)
    expected = f"of a shape that broadcasts to ({B}N, T, S) = {logits}"
    for name in ("bias", "mask"):
        x = getattr(arrays, name)
        if x is not None:
            check(broadcasts(x.shape, (*one, *logits)), name, expected, x.shape)
    if arrays.mask is not None:
        check.booleans("mask", arrays.mask)
    if arrays.bias is not None and jnp.issubdtype(arrays.bias.dtype, jnp.integer):
        arrays = arrays._replace(bias=arrays.bias.astype(accumulator(q.dtype)))
    elif arrays.bias is not None:
        check.floating("bias", arrays.bias)

    for name in ("query_seq_lengths", "key_value_seq_lengths", "query_offset"):
        x = getattr(arrays, name)
        if x is not None:
            shapes, expected = [batch, (*one, *batch)], f"of shape {batch}"
            if batch:
                expected = f"of shape ({B.removesuffix(' ')}) = {batch}"
            if name == "query_offset":
                shapes, expected = [*shapes, ()], f"an integer or {expected}"
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

    check_of_heads(check, N, arrays.scale, arrays.sinks)
    _check_request(check, request)
    return arrays, checked_options(check, options, arrays.dropout_key)


def check_of_heads(check, N, scale, sinks):
    """What there is of each of N query heads, or one of all."""
    if scale is not None:
        shape = jnp.shape(scale)
        check(shape in ((), (N,)), "scale", f"a number or of shape () or (N,) = ({N},)", shape)
        if not isinstance(scale, int | float):
            check.floating("scale", scale)
    if sinks is not None:
        check.shape("sinks", sinks, (N,), "(N,)")
        check.floating("sinks", sinks)


def checked_options(check, options, dropout_key):
    """The options in one form, and a key where one is needed."""
    cap, rate = options.soft_cap, check.share("dropout_rate", options.dropout_rate)
    if cap is not None:
        cap = check.number("logits_soft_cap", cap, 0, "a positive number or None")
    if rate > 0:
        check(dropout_key is not None, "dropout_key", "given where `dropout_rate` is above 0", None)
        check.single_key("dropout_key", dropout_key)
    window = _checked_window(check, options.window)
    return options._replace(
        is_causal=check.flag("is_causal", options.is_causal),
        window=window,
        soft_cap=cap,
        dropout_rate=rate,
    )


def _checked_window(check, size):
    """(left, right), None for an open side; None where both are."""
    expected = "None, an integer of at least 0, or a pair of them, None for an open side"
    side = lambda n: None if n is None else check.integer("local_window_size", n, 0, expected)
    if several(size):
        check(len(size) == 2, "local_window_size", expected, repr(size))
        sides = [side(n) for n in size]
    else:
        sides = [side(size)] * 2
    left, right = (None if n is None or n >= _FAR else n for n in sides)
    return None if left is None and right is None else (left, right)


def _check_request(check, request):
    name = request.implementation
    check.one_of("implementation", name, (None, *get_args(Implementation)))
    if request.return_weights:
        expected = "None, 'xla' or 'dense' where `return_weights` is set"
        check(name in (None, "xla", "dense"), "implementation", expected, repr(name))


def broadcasts(shape, target):
    """Whether an array of this shape may stand where one of the other is wanted."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    return len(padded) == len(target) and all(
        n in (1, want) for n, want in zip(padded, target, strict=True)
    )
