"""Who may see whom, and what nobody can see set to zero.

0 × NaN is NaN, and so what meets nothing but weights of 0 is set to 0 first: queries that see no
key, keys that no query sees, and what comes back to such queries.

Axes: B batch, T queries, S keys, M key/value heads, G query heads to one of them.
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp

from rnnattn.attention.functions import shown


def visible(options, masking, rows, columns):
    """True where the query of `rows` may see the key of `columns`: five axes, 1 where shared.

    None if all may see all. The mask and the segments of `masking` are those of the rows and
    columns; lengths and offset are of the whole.
    """
    function = options.mask_function
    by_function = None if function is None else shown(function, masking, rows, columns)
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
    if masking.key_ranges is not None:
        bounds = jnp.split(masking.key_ranges, masking.key_ranges.shape[2], axis=2)
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        within = [(columns >= first) & (columns < past) for first, past in pairs]
        conditions.append(reduce(jnp.logical_or, within))
    conditions = [condition[:, None, None] for condition in conditions]
    if masking.mask is not None:
        conditions.append(masking.mask)
    if by_function is not None:
        conditions.append(by_function)
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


def any_in_reach(options, masking, first_row, last_row, S):
    """Whether positions and lengths leave any of S keys to any query of the rows, (B,)."""
    first, past = key_range(options, masking, first_row, last_row)
    return jnp.maximum(first, 0) < jnp.minimum(past, S)


def rows_in_reach(options, masking, T, S):
    """Whether positions and lengths leave a query a key, (B, 1, 1, T); None if surely all."""
    if masking.key_ranges is not None:
        first, past = ranges_within(masking.key_ranges, S)
        return jnp.any(first < past, 2)[:, None, None]
    if _unbounded(options, masking):
        return None
    rows = jnp.arange(T, dtype=jnp.int32)
    of_row = jax.vmap(lambda t: any_in_reach(options, masking, t, t, S), out_axes=1)
    return of_row(rows)[:, None, None]


def keys_in_reach(options, masking, T, S):
    """Whether positions and lengths leave a key to a query, (#B, S); None if surely all."""
    if masking.key_ranges is not None:
        return _in_some_range(ranges_within(masking.key_ranges, S), S)
    if _unbounded(options, masking):
        return None
    first, past = key_range(options, masking, 0, T - 1)
    s = jnp.arange(S, dtype=jnp.int32)[None]
    return (s >= first[:, None]) & (s < past[:, None])


def _unbounded(options, masking):
    given = (masking.query_lengths, masking.key_lengths, masking.key_ranges)
    return not options.is_causal and options.window is None and given == (None, None, None)


def ranges_within(key_ranges, S):
    """The first of S keys of each range of a query, and the one past its last, (B, T, ranges)."""
    bounds = jnp.clip(key_ranges, 0, S)
    first, past = bounds[..., ::2], bounds[..., 1::2]
    return first, jnp.maximum(first, past)


def two_ranges(key_ranges):
    """Whether queries have two ranges of keys."""
    return key_ranges is not None and key_ranges.shape[-1] > 2


def _in_some_range(ranges, S):
    """Whether a range holds a key, (B, S): more have begun by then than have ended."""
    first, past = (x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in ranges)
    rows = jnp.arange(first.shape[0], dtype=jnp.int32)[:, None]
    changes = jnp.zeros((first.shape[0], S + 1), jnp.int32)
    changes = changes.at[rows, first].add(1).at[rows, past].add(-1)
    return jnp.cumsum(changes, 1)[:, :S] > 0


def zero_unreachable(options, operands, masking):
    """Zero what positions and lengths keep apart from all else, for NaN there to reach nothing."""
    if _unbounded(options, masking):
        return operands
    q, k, v = operands.query, operands.key, operands.value
    T, S = q.shape[3], k.shape[2]
    q = only_seeing(rows_in_reach(options, masking, T, S), q)
    seen = keys_in_reach(options, masking, T, S)[:, None, :, None]
    return operands._replace(query=q, key=jnp.where(seen, k, 0), value=jnp.where(seen, v, 0))


def constant_where_unreachable(options, operands, masking, o, lse):
    """O and L, constants where no key is in reach: what comes back to them goes nowhere."""
    sees = rows_in_reach(options, masking, o.shape[3], operands.key.shape[2])
    if sees is None:
        return o, lse
    of_none = jnp.full_like(lse, -jnp.inf)
    if operands.sinks is not None:  # a sink of −∞ is none
        sinks = operands.sinks.astype(lse.dtype)
        of_none = jnp.where(sinks == -jnp.inf, of_none, sinks)
    return only_seeing(sees, o), jnp.where(sees, lse, of_none)


def zero_unseen(q, k, v, visible):
    """Zero the queries that see no key at hand, and the keys and values that no query sees.

    And whether a query sees one.
    """
    seen, sees = jnp.any(visible, (2, 3))[..., None], jnp.any(visible, 4)
    return only_seeing(sees, q), jnp.where(seen, k, 0), jnp.where(seen, v, 0), sees


def only_seeing(sees, x):
    """What of rows x (B, M, G, T, …) belongs to queries that see a key, and zero elsewhere."""
    if sees is None:
        return x
    return jnp.where(jnp.expand_dims(sees, range(sees.ndim, x.ndim)), x, 0)
