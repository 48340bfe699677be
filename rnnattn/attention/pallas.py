"""The schedules of attention by kernels of our own in Pallas: for 16 bits on a Hopper GPU those of
`rnnattn.attention.hopper`, on a TPU those of `rnnattn.attention.tpu`.

They know ranges of keys and segments; all that hides by position, window, offset or length is made
a range for each query here. L and Δ − dL are given to the gradient, so that it needs to know
nothing of sinks, nor of what comes back to L.

Nothing of a hidden key or query may pass, even if it is NaN, and 0 × NaN is NaN. So the kernels are
given numbers alone: what is not finite becomes 0, and is said in another place. Forward, a key
whose value is not finite is NaN itself, which makes the logits of those NaN that see it. For the
gradient it is L that is NaN, as it then came out, or where what comes back to a query is.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rnnattn.attention.equations import row_sums, sum_to
from rnnattn.attention.kernels import LOG2_E, Reach
from rnnattn.attention.masking import key_range, ranges_within, two_ranges, visible
from rnnattn.attention.placed import backward_on_xla, forward_on_xla, placed, with_sinks
from rnnattn.attention.problem import Operands
from rnnattn.attention.xla import time_last
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import HOPPER, gpu_capability
from rnnattn.precision import accumulator

_WIDTHS = (64, 128)
_WIDEST_ON_TPU = 256
_FEWEST = 256  # queries, and keys, of what was measured to be faster
_FAR_ABOVE = 1e30  # an L that leaves no weight to any logit, and may be multiplied by log₂ e


def unserved_on_gpu(arrays, options):
    """What of a call the kernels for a Hopper GPU cannot serve."""
    K, V, dtype = arrays.query.shape[-1], arrays.value.shape[-1], arrays.query.dtype
    reasons = {
        f"the dtype {dtype.name}": dtype not in (jnp.bfloat16, jnp.float16),
        f"a width of {K} and {V} (64 and 128 can be)": not {K, V} <= {*_WIDTHS},
    }
    bias, pairs = arrays.bias, (arrays.query.shape[-3], arrays.key.shape[-3])
    if bias is not None:
        reasons |= {
            f"a bias of {bias.dtype.name}": bias.dtype != dtype,
            "a bias that queries or keys share": bias.shape[-2:] != pairs,
        }
    return those_that_hold(reasons | _unserved(arrays, options))


def unserved_on_tpu(arrays, options):
    """What of a call the kernels for a TPU cannot serve."""
    K, V, dtype = arrays.query.shape[-1], arrays.value.shape[-1], arrays.query.dtype
    fits = all(isinstance(n, int) and n <= _WIDEST_ON_TPU for n in (K, V))
    reasons = {
        f"the dtype {dtype.name} on a TPU": dtype not in (jnp.bfloat16, jnp.float32),
        f"a width of {K} and {V} on a TPU (up to {_WIDEST_ON_TPU} can be)": not fits,
        "`bias` on a TPU": arrays.bias is not None,
    }
    return those_that_hold(reasons | _unserved(arrays, options))


def _unserved(arrays, options):
    sizes = (*arrays.query.shape, *arrays.key.shape, arrays.value.shape[-1])
    return {
        "symbolic shapes": not all(isinstance(n, int) for n in sizes),
        "`mask`": arrays.mask is not None,
        "two ranges of keys of a query": two_ranges(arrays.key_ranges),
        "dropout": options.dropout_rate > 0,
        "`mask_function`": options.mask_function is not None,
        "`score_function`": options.score_function is not None,
        "an array without elements": any(isinstance(n, int) and n == 0 for n in sizes),
    }


def serves_here(operands):
    """Whether a program that is lowered here runs where the kernels were measured to be faster.

    The measurements: benchmarks/README.md, "On a GPU".
    """
    q, v, bias = operands.query, operands.value, operands.bias
    served = {q.shape[-1], v.shape[-1]} <= {*_WIDTHS} and bias is None
    fewest = min(q.shape[1], operands.key.shape[1])
    measured = jax.__version_info__[:2] == (0, 11) and fewest >= _FEWEST
    return served and measured and gpu_capability() == HOPPER


# ---- the kernels of a platform ----------------------------------------------------------------


class Tiles(NamedTuple):
    """How many queries and keys a block has of each kernel.

    Queries and keys are filled up to multiples of all of these.
    """

    forward: tuple[int, int]
    query_gradient: tuple[int, int]
    key_gradient: tuple[int, int]

    def fill(self, T, S):
        """How many queries and keys are missing."""
        queries, keys = map(max, zip(*self, strict=True))
        return -T % queries, -S % keys


class Kernels(NamedTuple):
    """The kernels of a platform, of arrays in the layout of the arguments; see their file."""

    tiles: Callable  # by T, S, K and V
    forward: Callable
    query_gradient: Callable
    key_gradient: Callable


def _hopper():
    # importing Pallas takes longer than all of the library
    import rnnattn.attention.hopper as hopper

    return hopper


def _tiles_on_hopper(T, S, K, V):
    hopper = _hopper()
    return Tiles(
        forward=(hopper.TILE, hopper.FORWARD_KEYS),
        query_gradient=(hopper.TILE, hopper.backward_keys(K, V)),
        key_gradient=(hopper.BACKWARD_QUERIES, hopper.TILE),
    )


def _tpu():
    import rnnattn.attention.tpu as tpu

    return tpu


def _tiles_on_tpu(T, S, K, V):
    return Tiles(*3 * [_tpu().tiles(T, S)])


def _of_file(file):
    """The kernels of a file, which is imported when they are called."""
    return [
        lambda *arrays, name=name, **how: getattr(file(), name)(*arrays, **how)
        for name in Kernels._fields[1:]
    ]


# ---- who sees whom ----------------------------------------------------------------------------


def _filled(x, axis, missing, **how):
    """x with so many more along an axis."""
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)], **how)


def _hides(options, masking, missing):
    """Whether a query may be there that does not see all keys of its row, padding included."""
    lengths = (masking.query_lengths, masking.key_lengths)
    given = (*lengths, masking.query_segments, masking.key_ranges, options.window)
    return options.is_causal or given != (None,) * 5 or any(missing)


def _reach(options, operands, masking, missing):
    """`Reach` without its blocks; None if all see all."""
    (B, T), S = operands.query.shape[:2], operands.key.shape[1]
    if not _hides(options, masking, missing):
        return None
    if masking.key_ranges is not None:
        ranges = tuple(x[..., 0] for x in ranges_within(masking.key_ranges, S))
    else:
        t = jnp.arange(T, dtype=jnp.int32)
        of_row = jax.vmap(lambda t: key_range(options, masking, t, t), out_axes=1)
        ranges = tuple(jnp.clip(x, 0, S) for x in of_row(t))
    first, past = (_filled(jnp.broadcast_to(x, (B, T)), 1, missing[0]) for x in ranges)
    filled = lambda ids, more: None if ids is None else _filled(ids, 1, more, mode="edge")
    of_queries = filled(masking.query_segments, missing[0])
    return Reach(first, past, of_queries, filled(masking.key_segments, missing[1]))


def _in_blocks(x, size):
    """(B, T) → the least and the largest of each block of that size, (B, blocks)."""
    blocks = x.reshape(x.shape[0], -1, size)
    return jnp.min(blocks, 2), jnp.max(blocks, 2)


def _blocks(reach, S, queries, keys):
    """Of so many queries by so many of S keys: which may see any, and which see whole."""
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


def _with_blocks(reach, S, sizes, of_keys=False):
    """With the blocks that each tile of queries visits, or each of keys; None stays None."""
    if reach is None:
        return None
    visited, whole = _blocks(reach, S, *sizes)
    if of_keys:
        visited, whole = (jnp.swapaxes(x, 1, 2) for x in (visited, whole))
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
    """(#B, #M, #G, 1, 1) → (B N,)."""
    B, _, M, G = operands.query.shape[:4]
    return jnp.broadcast_to(scale[..., 0, 0], (B, M, G)).reshape(-1)


def _of_pairs(bias, missing):
    """The bias, if there is one, as (#B, #N, T, S), with so many more queries and keys."""
    if bias is None:
        return {}
    bias = bias.reshape(bias.shape[0], -1, *bias.shape[3:])
    return {"bias": _filled(_filled(bias, 2, missing[0]), 3, missing[1])}


def _bias_gradient(ds, options, operands, masking):
    """From dS (B, N, T, S) where a tile came by; elsewhere anything may stand in memory."""
    (T, M, G), S = operands.query.shape[1:4], operands.key.shape[1]
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    sees = visible(options, masking, rows, columns)
    ds = ds[:, :, :T, :S].astype(jnp.float32).reshape(-1, M, G, T, S)
    return sum_to(ds if sees is None else jnp.where(sees, ds, 0), operands.bias.shape)


def _heads_joined(x):
    """(B, T, M, G, …) → (B, T, N, …)."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _forward(kernels, options, operands, masking):
    q, k, v, scale, *_ = operands
    (B, T, M, G, K), (_, S, _, V) = q.shape, v.shape
    tiles = kernels.tiles(T, S, K, V)
    missing = tiles.fill(T, S)
    reach = _reach(options, operands, masking, missing)
    if reach is not None:
        k, v = jnp.where(_not_finite(v)[..., None], jnp.nan, k), _finite(v)
    of_queries, of_keys = (partial(_filled, missing=n) for n in missing)
    o, lse = kernels.forward(
        of_queries(_heads_joined(q), 1),
        of_keys(k, 1),
        of_keys(v, 1),
        _of_heads(scale, operands),
        _with_blocks(reach, S + missing[1], tiles.forward),
        soft_cap=options.soft_cap,
        dtype=accumulator(v.dtype) if options.keeps_o else v.dtype,
        **_of_pairs(operands.bias, missing),
    )
    o = o[:, :T].reshape(B, T, M, G, -1)
    return with_sinks(o, lse[..., :T].reshape(B, M, G, T), operands.sinks)


def _backward(kernels, options, operands, masking, o, lse, do, dlse):
    if options.scale_gradient:
        return backward_on_xla(options, operands, masking, o, lse, do, dlse)
    q, k, v, scale, *_ = operands
    (B, T, M, G, K), (_, S, _, V) = q.shape, v.shape
    tiles = kernels.tiles(T, S, K, V)
    missing = tiles.fill(T, S)
    delta = time_last(row_sums(do, o)) - dlse
    reach = _reach(options, operands, masking, missing)
    if reach is not None:
        numbers = jnp.isfinite(delta) & time_last(~_not_finite(do))
        lse = jnp.where(numbers, lse, jnp.nan)
        q, k, v, do, delta = (_finite(x) for x in (q, k, v, do, delta))
    lse = jnp.minimum(lse, _FAR_ABOVE) * LOG2_E
    of_queries, of_keys = (partial(_filled, missing=n) for n in missing)
    query, do = (of_queries(_heads_joined(x), 1) for x in (q, do))
    lse, delta = (of_queries(x.reshape(B, M * G, T), 2) for x in (lse, delta))
    arrays = [query, of_keys(k, 1), of_keys(v, 1), do, lse, delta]
    of_pairs = _of_pairs(operands.bias, missing)
    run = lambda kernel, *sight, **how: kernel(
        arrays,
        _of_heads(scale, operands),
        _with_blocks(reach, S + missing[1], *sight),
        soft_cap=options.soft_cap,
        **of_pairs,
        **how,
    )
    wanted = operands.bias is not None and options.bias_gradient
    how = {"bias_gradient": True} if wanted else {}
    dq, *ds = run(kernels.query_gradient, tiles.query_gradient, **how)
    dk, dv = run(kernels.key_gradient, tiles.key_gradient, True)
    dbias = _bias_gradient(ds[0], options, operands, masking) if wanted else None
    return Operands(dq[:, :T].reshape(q.shape), dk[:, :S], dv[:, :S], None, dbias)


def halves(kernels):
    """The forward and the backward of a schedule, as `placed` takes them."""
    return partial(_forward, kernels), partial(_backward, kernels)


ON_HOPPER = halves(Kernels(_tiles_on_hopper, *_of_file(_hopper)))
ON_TPU = halves(Kernels(_tiles_on_tpu, *_of_file(_tpu)))
# Who asks for the kernels gets them in exported programs, too; by whether those for a GPU and those
# for a TPU serve a call.
PALLAS = {
    (True, False): placed("rnnattn_attention_pallas", {"cuda": ON_HOPPER}, exported=True),
    (False, True): placed("rnnattn_attention_pallas_tpu", {"tpu": ON_TPU}, exported=True),
    (True, True): placed(
        "rnnattn_attention_pallas_both", {"cuda": ON_HOPPER, "tpu": ON_TPU}, exported=True
    ),
}


def forward_where_faster(options, operands, masking):
    half = ON_HOPPER[0] if serves_here(operands) else forward_on_xla
    return half(options, operands, masking)


def backward_where_faster(options, operands, masking, *others):
    half = ON_HOPPER[1] if serves_here(operands) else backward_on_xla
    return half(options, operands, masking, *others)


WHERE_FASTER = forward_where_faster, backward_where_faster
