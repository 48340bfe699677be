"""The schedule of attention for 16 bits on a Hopper GPU: kernels of our own.

Kernels: `rnnattn.attention.hopper`. They know ranges of keys and segments; all that hides by
position, window, offset or length is made a range for each query here. L and Δ − dL are given to
the gradient, so that it needs to know nothing of sinks, nor of what comes back to L.

Nothing of a hidden key or query may pass, even if it is NaN, and 0 × NaN is NaN. So the kernels are
given numbers alone: what is not finite becomes 0, and is said in another place. Forward, a key
whose value is not finite is NaN itself, which makes the logits of those NaN that see it. For the
gradient it is L that is NaN, as it then came out, or where what comes back to a query is.
"""

import math

import jax
import jax.numpy as jnp

from rnnattn.attention.equations import row_sums
from rnnattn.attention.masking import key_range, ranges_within, two_ranges
from rnnattn.attention.placed import backward_on_xla, forward_on_xla, placed, with_sinks
from rnnattn.attention.problem import Operands
from rnnattn.attention.xla import time_last
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import HOPPER, gpu_capability

_WIDTHS = (64, 128)
_FEWEST = 256  # queries, and keys, of what was measured to be faster
_FAR_ABOVE = 1e30  # an L that leaves no weight to any logit, and may be multiplied by log₂ e


def unserved(arrays, options):
    """What of a call the kernels cannot serve."""
    q, k, v = arrays.query, arrays.key, arrays.value
    K, V, sizes = q.shape[-1], v.shape[-1], (*q.shape, *k.shape, v.shape[-1])
    if not all(isinstance(n, int) for n in sizes):
        return ["symbolic shapes"]
    reasons = {
        f"the dtype {q.dtype.name}": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"a width of {K} and {V} (64 and 128 can be)": not {K, V} <= {*_WIDTHS},
        "`mask`": arrays.mask is not None,
        "`bias`": arrays.bias is not None,
        "two ranges of keys of a query": two_ranges(arrays.key_ranges),
        "dropout": options.dropout_rate > 0,
        "`mask_function`": options.mask_function is not None,
        "`score_function`": options.score_function is not None,
        "an array without elements": 0 in sizes,
    }
    return those_that_hold(reasons)


def serves_here(operands):
    """Whether a program that is lowered here runs where the kernels were measured to be faster.

    The measurements: benchmarks/README.md, "On a GPU".
    """
    q, v, bias = operands.query, operands.value, operands.bias
    served = {q.shape[-1], v.shape[-1]} <= {*_WIDTHS} and bias is None
    fewest = min(q.shape[1], operands.key.shape[1])
    measured = jax.__version_info__[:2] == (0, 11) and fewest >= _FEWEST
    return served and measured and gpu_capability() == HOPPER


def _hopper():
    # importing Pallas takes longer than all of the library
    import rnnattn.attention.hopper as hopper

    return hopper


# ---- who sees whom ----------------------------------------------------------------------------


def _filled(x, axis, **how):
    """x with its axis made a multiple of a tile."""
    missing = -x.shape[axis] % _hopper().TILE
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)], **how)


def _hides(options, masking, T, S):
    """Whether a query may be there that does not see all keys of its row, padding included."""
    tile = _hopper().TILE
    lengths = (masking.query_lengths, masking.key_lengths)
    given = (*lengths, masking.query_segments, masking.key_ranges, options.window)
    return options.is_causal or given != (None,) * 5 or T % tile > 0 or S % tile > 0


def _ranges(options, operands, masking):
    """The first key that each query may see, and the one past the last, (B, T)."""
    (B, T), S = operands.query.shape[:2], operands.key.shape[1]
    if masking.key_ranges is not None:
        first, past = (x[..., 0] for x in ranges_within(masking.key_ranges, S))
    else:
        t = jnp.arange(T, dtype=jnp.int32)
        of_row = jax.vmap(lambda t: key_range(options, masking, t, t), out_axes=1)
        first, past = (jnp.clip(x, 0, S) for x in of_row(t))
    return (_filled(jnp.broadcast_to(x, (B, T)), 1) for x in (first, past))


def _reach(options, operands, masking):
    """`hopper.Reach` without its blocks; None if all see all."""
    T, S = operands.query.shape[1], operands.key.shape[1]
    if not _hides(options, masking, T, S):
        return None
    filled = lambda ids: None if ids is None else _filled(ids, 1, mode="edge")
    ids = filled(masking.query_segments), filled(masking.key_segments)
    return _hopper().Reach(*_ranges(options, operands, masking), *ids, None)


def _in_blocks(x, size):
    """(B, T) → the least and the largest of each block of that size, (B, blocks)."""
    blocks = x.reshape(x.shape[0], -1, size)
    return jnp.min(blocks, 2), jnp.max(blocks, 2)


def _blocks(reach, S, queries, keys):
    """Of so many queries by so many keys: which may see any, and which see whole."""
    of_queries = lambda x: (y[:, :, None] for y in _in_blocks(x, queries))
    start = jnp.arange(0, S, keys, dtype=jnp.int32)[None, None]
    some = reach.first < reach.past
    least, _ = of_queries(jnp.where(some, reach.first, S))
    _, most = of_queries(jnp.where(some, reach.past, 0))
    visited = (least < start + keys) & (most > start)
    (_, first), (past, _) = of_queries(reach.first), of_queries(reach.past)
    whole = (first <= start) & (past >= start + keys)
    if reach.query_segments is not None:
        least, most = of_queries(reach.query_segments)
        of_keys = (x[:, None] for x in _in_blocks(reach.key_segments, keys))
        least_key, most_key = of_keys
        visited &= (least_key <= most) & (most_key >= least)
        whole &= (least == most) & (least_key == most_key)
    return visited, whole & visited


def _with_blocks(reach, visited, whole):
    """For tiles along the axis before the last, and blocks along the last."""
    count = visited.shape[-1]
    indices = jnp.arange(count, dtype=jnp.int32)[None, None]
    first = lambda holds: jnp.min(jnp.where(holds, indices, count), -1)
    begin, start = first(visited), first(whole)
    end = jnp.max(jnp.where(visited, indices + 1, 0), -1)
    stop = first(~whole & (indices >= start[..., None]))
    return reach._replace(blocks=jnp.stack([begin, end, start, stop], -1))


# ---- around the kernels -----------------------------------------------------------------------


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _not_finite(x):
    """Whether anything of a row is not."""
    return jnp.any(~jnp.isfinite(x), -1)


def _of_heads(scale, operands):
    """(1, #M, #G, 1, 1) → (N,)."""
    M, G = operands.query.shape[2:4]
    return jnp.broadcast_to(scale[0, :, :, 0, 0], (M, G)).reshape(-1)


def _heads_joined(x):
    """(B, T, M, G, …) → (B, T, N, …)."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _forward(options, operands, masking):
    hopper = _hopper()
    q, k, v, scale, *_ = operands
    (B, T, M, G, _), S = q.shape, k.shape[1]
    reach = _reach(options, operands, masking)
    if reach is not None:
        sizes = hopper.TILE, hopper.FORWARD_KEYS
        reach = _with_blocks(reach, *_blocks(reach, S + -S % hopper.TILE, *sizes))
        k, v = jnp.where(_not_finite(v)[..., None], jnp.nan, k), _finite(v)
    o, lse = hopper.forward(
        *(_filled(x, 1) for x in (_heads_joined(q), k, v)),
        _of_heads(scale, operands),
        reach,
        soft_cap=options.soft_cap,
        dtype=jnp.float32 if options.keeps_o else v.dtype,
    )
    o = o[:, :T].reshape(B, T, M, G, -1)
    return with_sinks(o, lse[..., :T].reshape(B, M, G, T), operands.sinks)


def _backward(options, operands, masking, o, lse, do, dlse):
    if options.scale_gradient:
        return backward_on_xla(options, operands, masking, o, lse, do, dlse)
    hopper = _hopper()
    q, k, v, scale, *_ = operands
    (B, T, M, G, K), (_, S, _, V) = q.shape, v.shape
    delta = time_last(row_sums(do, o)) - dlse
    of_queries = of_keys = reach = _reach(options, operands, masking)
    if reach is not None:
        filled = S + -S % hopper.TILE
        blocks = _blocks(reach, filled, hopper.TILE, hopper.backward_keys(K, V))
        of_queries = _with_blocks(reach, *blocks)
        blocks = _blocks(reach, filled, hopper.BACKWARD_QUERIES, hopper.TILE)
        of_keys = _with_blocks(reach, *(jnp.swapaxes(x, 1, 2) for x in blocks))
        numbers = jnp.isfinite(delta) & time_last(~_not_finite(do))
        lse = jnp.where(numbers, lse, jnp.nan)
        q, k, v, do, delta = (_finite(x) for x in (q, k, v, do, delta))
    lse = jnp.minimum(lse, _FAR_ABOVE) * math.log2(math.e)
    arrays = [_filled(x, 1) for x in (_heads_joined(q), k, v, _heads_joined(do))]
    arrays += [_filled(x.reshape(B, M * G, T), 2) for x in (lse, delta)]
    scale = _of_heads(scale, operands)
    dq = hopper.query_gradient(arrays, scale, of_queries, soft_cap=options.soft_cap)
    dk, dv = hopper.key_gradient(arrays, scale, of_keys, soft_cap=options.soft_cap)
    return Operands(dq[:, :T].reshape(q.shape), dk[:, :S], dv[:, :S], None)


HALVES = _forward, _backward
# who asks for the kernels gets them in exported programs, too
PALLAS = placed("rnnattn_attention_pallas", {"cuda": HALVES}, exported=True)


def forward_where_faster(options, operands, masking):
    half = _forward if serves_here(operands) else forward_on_xla
    return half(options, operands, masking)


def backward_where_faster(options, operands, masking, *others):
    half = _backward if serves_here(operands) else backward_on_xla
    return half(options, operands, masking, *others)


WHERE_FASTER = forward_where_faster, backward_where_faster
