"""Masks as functions, said by what schedules know without them.

Causality, a window, documents and ranges of keys, one or two for each query, are run by all
schedules, and skip blocks without a look at each pair. What cannot be said by these stays a
function.
"""

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from rnnattn.attention.masking import key_range
from rnnattn.attention.problem import Masking, Options
from rnnattn.masks import (
    MAP_BLOCK,
    And,
    ByDistance,
    Causal,
    Document,
    Mapped,
    Not,
    Or,
    Prefix,
    Sinks,
    Window,
)


def reduced(check, arrays, options):
    """The arguments, whose mask function is left with what has no other words."""
    *batch, T, N, _ = arrays.query.shape
    S = arrays.key.shape[-3]
    check_arrays(check, (math.prod(batch), T, S), N, options)
    options, ranges, either, documents, rest = parts(options)
    if arrays.query_segment_ids is None and documents:
        arrays = _with_segments(arrays, documents.pop(0))
    if ranges or either:
        arrays, options = with_ranges(arrays, options, tuple(ranges), either, S)
    return arrays, options._replace(mask_function=joined(rest + documents))


def parts(options):
    """The options with causality and windows of their mask function, and the rest of it in parts.

    Which are ranges of keys, two of which either may show a key (None if there are none),
    documents, and all others; each has to show a key.
    """
    either = None
    documents: list[Any] = []
    ranges: list[Any] = []
    rest: list[Any] = []
    for mask in _all_of(options.mask_function):
        if isinstance(mask, Causal):
            options = options._replace(is_causal=True)
        elif isinstance(mask, Window):
            options = options._replace(window=_narrower(options.window, mask))
        elif isinstance(mask, Document):
            documents.append(mask)
        elif _is_range(mask):
            ranges.append(mask)
        elif either is None and _is_of_two_ranges(mask):
            either = mask.left, mask.right
        else:
            rest.append(mask)
    return options, ranges, either, documents, rest


def joined(masks):
    """What all of the masks show; None where there is none."""
    return reduce(And, masks) if masks else None


def check_arrays(check, sizes, heads, options):
    """What functions have of rows, queries, keys and heads has to be of B, T, S and N of them.

    Where S is None, any will do.
    """
    _check_mask(check, sizes, options.mask_function)
    score = options.score_function
    if isinstance(score, ByDistance):
        check(score.heads == heads, "score_function", f"of {heads} heads", f"one of {score.heads}")


def _check_mask(check, sizes, mask):
    B, T, S = sizes
    match mask:
        case And(left=left, right=right) | Or(left=left, right=right):
            _check_mask(check, sizes, left)
            _check_mask(check, sizes, right)
        case Not(mask=inner) | Mapped(mask=inner):
            _check_mask(check, sizes, inner)
        case Prefix(lengths=lengths):
            expected = f"a prefix of one length or of {B}, one for each row"
            check(lengths.shape in ((), (B,)), "mask_function", expected, lengths.shape)
        case Document(query_ids=of_queries, key_ids=of_keys):
            expected = f"a document of at least {T} queries, of one row or of {B}"
            fits = of_queries.shape[-1] >= T and of_queries.shape[:-1] in ((), (B,))
            check(fits, "mask_function", expected, of_queries.shape)
            S = of_keys.shape[-1] if S is None else S
            expected = f"a document of {S} keys, of one row or of {B}"
            check(of_keys.shape in ((S,), (B, S)), "mask_function", expected, of_keys.shape)


def maps_of(check, arrays, mask):
    """The maps of blocks that come with a mask, of which all hold."""
    match mask:
        case And(left=left, right=right):
            return (*maps_of(check, arrays, left), *maps_of(check, arrays, right))
        case Mapped(mask=inner, blocks=blocks):
            _check_map(check, arrays, blocks.shape)
            return (blocks, *maps_of(check, arrays, inner))
    return ()


def _check_map(check, arrays, shape):
    *batch, T, N, _ = arrays.query.shape
    B, queries, keys = math.prod(batch), T, -(-arrays.key.shape[-3] // MAP_BLOCK)
    if isinstance(arrays.query_offset, int):
        queries += arrays.query_offset
    fits = shape[0] in (1, B) and shape[1] in (1, N) and shape[3] == keys
    expected = f"mapped for {B} rows, {N} heads, {queries} queries and {keys} blocks of keys"
    shown = f"{shape}, with {MAP_BLOCK} queries in a block"
    check(fits and shape[2] * MAP_BLOCK >= queries, "mask_function", expected, shown)


def _all_of(mask):
    """The masks that all have to show a key."""
    match mask:
        case None:
            return []
        case And(left=left, right=right):
            return [*_all_of(left), *_all_of(right)]
        case Mapped(mask=inner):
            return _all_of(inner)
    return [mask]


def _narrower(window, mask):
    """A window as an option, None where it has no sides."""
    sides = zip(window or (None, None), (mask.left, mask.right), strict=True)
    left, right = (min((n for n in pair if n is not None), default=None) for pair in sides)
    return None if left is None and right is None else (left, right)


def _flat(arrays):
    """Positions of queries, (#B, T), and the numbers of rows, (B, 1)."""
    *batch, T, _, _ = arrays.query.shape
    offset = 0 if arrays.query_offset is None else arrays.query_offset
    offset = jnp.asarray(offset, jnp.int32).reshape(-1, 1)
    rows = jnp.arange(math.prod(batch), dtype=jnp.int32)[:, None]
    return offset + jnp.arange(T, dtype=jnp.int32)[None], rows


def _with_segments(arrays, document):
    *batch, T, _, _ = arrays.query.shape
    S = arrays.key.shape[-3]
    t, b = _flat(arrays)
    s = jnp.arange(S, dtype=jnp.int32)[None]
    ids = lambda found, n: jnp.broadcast_to(found, (b.size, n)).reshape(*batch, n)
    return arrays._replace(
        query_segment_ids=ids(document.ids_of_queries(b, t), T),
        key_value_segment_ids=ids(document.ids_of_keys(b, s), S),
    )


# ----------------------------------------------------------------------------------- ranges of keys


def _sides(mask):
    """On which sides (before, behind) a mask bounds the keys of a query; None if it has gaps."""
    match mask:
        case Causal() | Prefix() | Sinks():
            return False, True
        case Window(left=left, right=right):
            return left is not None, right is not None
        case And(left=left, right=right):
            a, b = _sides(left), _sides(right)
            return None if a is None or b is None else (a[0] or b[0], a[1] or b[1])
        case Or(left=left, right=right):
            a, b = _sides(left), _sides(right)
            return a if a == b and a in ((True, False), (False, True)) else None
        case Not(mask=inner):
            sides = _sides(inner)
            return sides[::-1] if sides in ((True, False), (False, True)) else None
    return None


def _is_range(mask):
    return _sides(mask) is not None


def _is_of_two_ranges(mask):
    return isinstance(mask, Or) and _is_range(mask.left) and _is_range(mask.right)


def range_of(mask, b, t):
    """The keys [first, past) of the query at t that a mask shows, None for an open side."""
    match mask:
        case Causal():
            return None, t + 1
        case Prefix():
            return None, mask.of_row(b)
        case Sinks(count=count):
            return None, jnp.int32(count)
        case Window(left=left, right=right):
            return None if left is None else t - left, None if right is None else t + right + 1
        case Not(mask=inner):
            return range_of(inner, b, t)[::-1]
        case And(left=left, right=right):
            first, past = zip(range_of(left, b, t), range_of(right, b, t), strict=True)
            return extreme(jnp.maximum, first), extreme(jnp.minimum, past)
        case Or(left=left, right=right):
            first, past = zip(range_of(left, b, t), range_of(right, b, t), strict=True)
            return extreme(jnp.minimum, first), extreme(jnp.maximum, past)


def extreme(of, bounds, least=None):
    """The largest or smallest of the bounds that there are; None if there is none."""
    known = [x for x in (*bounds, least) if x is not None]
    return reduce(of, known) if known else None


def _apart(one, other):
    """The bounds of two ranges of keys that have none in common, of two that may.

    Where these touch, the first is both of them, and the second is empty.
    """
    (a, b), (c, d) = one, other
    empty = a >= b
    a, b = jnp.where(empty, c, a), jnp.where(empty, d, b)
    empty = c >= d
    c, d = jnp.where(empty, a, c), jnp.where(empty, b, d)
    touch = jnp.maximum(a, c) <= jnp.minimum(b, d)
    both = jnp.where(touch, jnp.minimum(a, c), a), jnp.where(touch, jnp.maximum(b, d), b)
    return *both, jnp.where(touch, 0, c), jnp.where(touch, 0, d)


def of_both(shown_by, masks, either):
    """Bounds by `shown_by(*masks)`; of two ranges, where one mask or the other is to hold, too."""
    if either is None:
        return shown_by(*masks)
    return _apart(*(shown_by(*masks, one) for one in either))


def with_ranges(arrays, options, masks, either, S):
    """Positions, windows and lengths as ranges of S keys, too: they take the place of all these."""
    *batch, T, _, _ = arrays.query.shape
    offset = arrays.query_offset  # the number 0 is not sent to the device to say nothing
    offset = None if isinstance(offset, int) and offset == 0 else offset
    given = offset, arrays.query_seq_lengths, arrays.key_value_seq_lengths
    rows = math.prod(batch), T, S
    stated = Options(options.is_causal, options.window)
    ranges = _key_ranges(stated, rows, masks, either, *given)
    ranges = ranges.reshape(*batch, T, ranges.shape[-1])
    arrays = arrays._replace(key_ranges=ranges, query_seq_lengths=None, key_value_seq_lengths=None)
    return arrays, options._replace(is_causal=False, window=None)


@partial(jax.jit, static_argnums=(0, 1))
def _key_ranges(options, sizes, masks, either, offset, query_lengths, key_lengths):
    """The keys [first, past) of each query, (B, T, 2) or (B, T, 4)."""
    B, T, S = sizes
    t = jnp.arange(T, dtype=jnp.int32)[None]
    b = jnp.arange(B, dtype=jnp.int32)[:, None]
    of_rows = lambda x: None if x is None else jnp.asarray(x, jnp.int32).reshape(-1, 1)
    offset = of_rows(0 if offset is None else offset)
    lengths = of_rows(query_lengths), of_rows(key_lengths)
    rows = Masking(offset, query_lengths=lengths[0], key_lengths=lengths[1])
    stated = key_range(options, rows, t, t)

    def shown_by(*masks):
        found = [stated, *(range_of(mask, b, t + offset) for mask in masks)]
        first, past = zip(*found, strict=True)
        return extreme(jnp.maximum, first, 0), extreme(jnp.minimum, past, S)

    bounds = of_both(shown_by, masks, either)
    return jnp.stack([jnp.broadcast_to(x, (B, T)) for x in bounds], 2)
