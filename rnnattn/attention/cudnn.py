"""The schedule of attention for 16 bits on an NVIDIA GPU: cuDNN's fused kernels.

They are XLA's custom calls `__cudnn$fmha…`, called as `jax.nn` calls them, but that L stays in
float32 and that the gradient takes O and L as it is given them. What cuDNN does in another way than
`rnnattn.attention.equations` is put right around them: what may be NaN and nobody sees is zeroed
first, and a query that sees no key gets zeros and L = −∞. A sink only changes L afterwards:

    L₁ = log(e^L + e^sink)        O₁ = O e^(L − L₁)

and the gradient takes O₁ and L₁ for O and L. Weights and dS are rounded to 16 bits by cuDNN.
"""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnnattn.attention.masking import keys_in_reach, rows_in_reach, visible
from rnnattn.attention.pallas import backward_where_faster
from rnnattn.attention.placed import forward_on_xla, placed, with_sinks
from rnnattn.attention.problem import Masking, Operands
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import HOPPER, gpu_capability

_WIDEST = 256  # of a head; 128 before Hopper
_AMPERE = (8, 0)
_FAR_BELOW = -(2.0**41)  # a bias under it stands for −∞: cuDNN subtracts logits of that size
_FAR_ABOVE = 1e30  # an L that leaves no weight to any logit, and may be multiplied by log₂ e


def unserved(arrays, options):
    """What of a call is not handed to cuDNN."""
    q, k, v, bias = arrays.query, arrays.key, arrays.value, arrays.bias
    (T, _, K), S, V = q.shape[-3:], k.shape[-3], v.shape[-1]
    if not all(isinstance(n, int) for n in (*q.shape, *k.shape, V)):
        return ["symbolic shapes"]
    offset, scale, left = arrays.query_offset, arrays.scale, _left(options)
    lengths = arrays.query_seq_lengths, arrays.key_value_seq_lengths
    known = scale is None or (isinstance(scale, int | float) and math.isfinite(scale))
    reasons = {
        f"the dtype {q.dtype.name}": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"a width of {K} and {V}": K != V or K % 8 or K > _WIDEST,
        "a single query or key": min(T, S) < 2,
        "`mask`": arrays.mask is not None,
        "segment ids": arrays.query_segment_ids is not None,
        "packed sequences": arrays.key_ranges is not None,
        "`query_offset`": not (offset is None or (isinstance(offset, int) and offset == 0)),
        "`logits_soft_cap`": options.soft_cap is not None,
        "dropout": options.dropout_rate > 0,
        "`mask_function`": options.mask_function is not None,
        "`score_function`": options.score_function is not None,
        "a window without a causal side": options.window is not None and not _is_causal(options),
        "a window with lengths or fewer keys": left is not None
        and (T > S or any(x is not None for x in lengths)),
        "an array as `scale`": not known,
    }
    if bias is not None:
        reasons |= {
            f"a bias of {bias.dtype.name}": bias.dtype != q.dtype,
            "a bias that queries or keys share": bias.shape[-2:] != (T, S),
            "a bias for an odd number of queries or keys": T % 2 or S % 2,
        }
    return those_that_hold(reasons)


def known_scale(arrays):
    """The number that scales the logits of a call that is served."""
    K = arrays.query.shape[-1]
    return float(K**-0.5 if arrays.scale is None else arrays.scale)


def _serves_here(operands):
    return gpu_capability() >= (_AMPERE if operands.query.shape[-1] <= 128 else HOPPER)


def _is_causal(options):
    return options.is_causal or (options.window or (None, None))[1] == 0


def _left(options):
    return (options.window or (None, None))[0]


# ------------------------------------------------------------------------------ cuDNN's own calls


class Problem(NamedTuple):
    """What is fixed of a call of cuDNN."""

    scale: float
    causal: bool
    window: int  # the keys that a query sees at most, its own among them; 0 for all


def attend(problem, q, k, v, bias, lengths):
    """O (B, T, N, K), in 16 bits, and L (B, N, T), in float32.

    Args:
        bias: (#B, #N, T, S) or None. lengths: of queries and of keys, each (B,), or None.
    """
    B, T, N, _ = q.shape
    stats = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return _call("", problem, [q, k, v, bias], lengths, bias is not None, [q], [stats])


def attend_gradient(arguments, o, lse, do, wants_dbias):
    """dq, dk, dv and, if it is wanted, dbias, in 16 bits; from the arguments of `attend`."""
    problem, q, k, v, bias, lengths = arguments
    arrays = [q, k, v, lse, do, bias, o]
    others = [jax.ShapeDtypeStruct(bias.shape, bias.dtype)] if wants_dbias else []
    return _call("Backward", problem, arrays, lengths, bias is not None, [q, k, v], others)


def _call(half, problem, arrays, lengths, has_bias, like, others):
    """A custom call's results: some in the shapes of arguments (B, T, N, K), and others."""
    arrays = [x for x in (*arrays, *(lengths or ())) if x is not None]
    # cuDNN names the axes (B, N, T, K) of what lies in memory as (B, T, N, K)
    rows = [jax.ShapeDtypeStruct([x.shape[n] for n in (0, 2, 1, 3)], x.dtype) for x in like]
    workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)
    *results, _ = jax.ffi.ffi_call(
        f"__cudnn$fmha{'ScaleBias' if has_bias else ''}Softmax{half}",
        [*rows, *others, workspace],
        output_layouts=[(0, 2, 1, 3) for _ in rows] + [None for _ in (*others, workspace)],
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(_config(half, problem, arrays, lengths)),
    )(*arrays)
    return [*(jnp.moveaxis(x, 1, 2) for x in results[: len(rows)]), *results[len(rows) :]]


def _config(half, problem, arrays, lengths):
    """What XLA reads of a call beside its arrays, a `GpuBackendConfig`."""
    q, k, *_ = arrays
    (B, T, N, _), S = q.shape, k.shape[1]
    mask = ["PADDING"] * (lengths is not None) + ["CAUSAL"] * problem.causal
    # the axes that are summed of either factor, and those of batch and heads
    logits, from_weights = ((3, 3), ((0, 2), (0, 2))), ((3, 1), ((0, 1), (0, 2)))
    of_weights = ((2, 1), ((0, 1), (0, 2)))
    products = {"bmm1": logits, "bmm2": from_weights}
    if half:
        products = {
            "bmm1_grad_gemm1": of_weights,
            "bmm1_grad_gemm2": from_weights,
            "bmm2_grad_gemm1": of_weights,
            "bmm2_grad_gemm2": logits,
        }
    fused = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": problem.scale,
        "intermediate_tensor_shape": {
            "element_type": "BF16" if q.dtype == jnp.bfloat16 else "F16",
            "dimensions": [str(n) for n in (B, N, T, S)],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "_".join(mask) or "NO_MASK",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": problem.window,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    for name, ((left, right), (left_batch, right_batch)) in products.items():
        fused[f"{name}_dot_dimension_numbers"] = {
            "lhs_contracting_dimensions": [str(left)],
            "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": [str(n) for n in left_batch],
            "rhs_batch_dimensions": [str(n) for n in right_batch],
        }
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": fused}


# --------------------------------------------------------------------------- around cuDNN's calls


class _Given(NamedTuple):
    """A problem as cuDNN is given it, and who can see anyone: all, where that is None."""

    arguments: tuple[Any, ...]  # of `attend`
    queries: Any  # (#B, T)
    keys: Any  # (#B, S)


def _given(options, operands, masking):
    q, k, v, _, bias, *_ = operands
    (B, T, M, G, K), S = q.shape, k.shape[1]
    left = _left(options)
    window = 0 if left is None or left >= T - 1 else left + 1
    queries = keys = lengths = None
    if not (masking.query_lengths is None and masking.key_lengths is None):
        # a row of length 0 is put right by `queries`
        within = lambda n, most: jnp.full(B, most, jnp.int32) if n is None else n.clip(1, most)
        lengths = within(masking.query_lengths, T), within(masking.key_lengths, S)
    if lengths is not None or T != S:  # else each can see itself
        queries = rows_in_reach(options, masking, T, S)
        keys = keys_in_reach(options, masking, T, S)
    if queries is not None:
        queries = queries[:, 0, 0]
        q, k, v = _only(queries, q), _only(keys, k), _only(keys, v)
    if bias is not None:
        bias = _only_seen(options, bias)
        bias = jnp.maximum(bias, max(_FAR_BELOW, float(jnp.finfo(bias.dtype).min)))
        bias = bias.reshape(bias.shape[0], -1, T, S)
    problem = Problem(options.scale, _is_causal(options), window)
    arguments = (problem, q.reshape(B, T, M * G, K), k, v, bias, lengths)
    return _Given(arguments, queries, keys)


def _only(can_see, x):
    """Rows x (B, T, …), zero where (#B, T) says so."""
    if can_see is None:
        return x
    return jnp.where(can_see.reshape(*can_see.shape, *[1] * (x.ndim - 2)), x, 0)


def _by_position(options, T, S):
    """Who may see whom by position alone, (1, 1, 1, T, S); None if all."""
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    return visible(options, Masking(offset=jnp.zeros(1, jnp.int32)), rows, columns)


def _only_seen(options, x):
    """Of a bias or its gradient (…, T, S): zero where positions hide a key from a query."""
    sees = _by_position(options, *x.shape[-2:])
    return x if sees is None else jnp.where(sees.reshape(sees.shape[-x.ndim :]), x, 0)


def _rows_that_see(options, given, operands, masking):
    """The queries that see a key, (#B, #N, T); None if surely all."""
    rows = None if given.queries is None else given.queries[:, None]
    if operands.bias is None:
        return rows
    # a bias of −∞ hides, and lengths leave the first keys
    T, S = operands.bias.shape[3:]
    leaves, sees = operands.bias != -jnp.inf, _by_position(options, T, S)
    leaves = leaves if sees is None else leaves & sees
    keys = jnp.arange(S, dtype=jnp.int32).reshape(1, 1, 1, 1, S)
    first = jnp.min(jnp.where(leaves, keys, S), -1)
    first = first.reshape(first.shape[0], -1, T)
    past = S if masking.key_lengths is None else masking.key_lengths[:, None, None]
    return first < past if rows is None else (first < past) & rows


def _forward(options, operands, masking):
    if not _serves_here(operands):
        return forward_on_xla(options, operands, masking)
    B, T, M, G, K = operands.query.shape
    given = _given(options, operands, masking)
    o, lse = attend(*given.arguments)
    o = o.astype(jnp.float32) if options.keeps_o else o
    sees = _rows_that_see(options, given, operands, masking)
    if sees is not None:
        o = jnp.where(jnp.moveaxis(sees, 1, 2)[..., None], o, 0)
        lse = jnp.where(sees, lse, -jnp.inf)
    return with_sinks(o.reshape(B, T, M, G, K), lse.reshape(B, M, G, T), operands.sinks)


def _backward(options, operands, masking, o, lse, do, dlse):
    q, bias = operands.query, operands.bias
    B, T, M, G, K = q.shape
    wants_dbias = bias is not None and options.bias_gradient
    if options.lse_gradient or options.scale_gradient or not _serves_here(operands):
        return backward_where_faster(options, operands, masking, o, lse, do, dlse)
    given = _given(options, operands, masking)
    # NaN that comes back to a query that sees nothing meets weights of zero
    do = _only(given.queries, do)
    if given.queries is not None:
        lse = jnp.where(given.queries[:, None, None], lse, _FAR_ABOVE)
    if not (given.queries is None and bias is None):
        lse = jnp.minimum(lse, _FAR_ABOVE)
    o, do = (x.astype(q.dtype).reshape(B, T, M * G, K) for x in (o, do))
    lse = lse.reshape(B, M * G, T)
    made = attend_gradient(given.arguments, o, lse, do, wants_dbias)
    dq, dk, dv, *of_bias = made
    dq, dk, dv = _only(given.queries, dq), _only(given.keys, dk), _only(given.keys, dv)
    dbias = None
    if wants_dbias:
        dbias = _only_seen(options, of_bias[0].reshape(bias.shape).astype(jnp.float32))
    return Operands(dq.reshape(q.shape), dk, dv, None, dbias)


HALVES = _forward, _backward
CUDNN = placed("rnnattn_attention_cudnn", {"cuda": HALVES})
