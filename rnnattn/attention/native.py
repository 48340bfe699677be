"""The native schedule of attention on a CPU: the kernels of `rnnattn/native/src`."""

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.attention.native_parts as parts
import rnnattn.attention.xla as xla
import rnnattn.native as native
from rnnattn.attention.equations import sum_to
from rnnattn.attention.functions import of_distances
from rnnattn.attention.placed import as_given, forward_results, placed
from rnnattn.attention.problem import Operands
from rnnattn.checks import those_that_hold
from rnnattn.native.calls import call_attributes
from rnnattn.precision import accumulator, varying_together

PAGE_KEYS = 64  # of a page, a multiple, as `kernels.h` has it


def unserved(query, value, options):
    """What of a call the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    return those_that_hold(
        {
            f"the dtype {query.dtype.name}": accumulator(query.dtype) != jnp.float32,
            "dropout": options.dropout_rate > 0,
            "a `score_function` that is no bias by distance": not _is_by_distance(options),
            "an array without elements": 0 in (query.size, value.size),
        }
    )


def _is_by_distance(options):
    """Whether all that a score function does is to add what depends on s − t."""
    return options.score_function is None or options.score_function.by_distance


def _by_distance(options, operands, masking, S):
    """What the score function adds to logits, by distance; None where there is none."""
    if options.score_function is None:
        return None
    sizes = operands.query.shape[1], S
    return of_distances(options.score_function, masking, *sizes, operands.score_arrays)


def _score_gradient(options, operands, masking, ddistances):
    """That of the floats of the score function, from that of what it adds, of each row and head."""
    S = operands.key.shape[1]
    of = lambda floats: _by_distance(options, operands._replace(score_arrays=floats), masking, S)
    added, pullback = jax.vjp(of, operands.score_arrays)
    return pullback(sum_to(ddistances, added.shape))[0]


def _given(x, dtype=jnp.float32):
    """An argument of a kernel in its dtype; without elements where it is absent."""
    return jnp.zeros(0, dtype) if x is None else x.astype(dtype)


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _joined(x):
    """(B, T, M, G, …) as (B, T, N, …), which is what the kernels read and write.

    So arrays come and go as the caller has them. XLA copies a result with one axis more where two
    of them are of size 1, as in decoding.
    """
    B, T, M, G, width = x.shape
    return x.reshape(B, T, M * G, width)


def _apart(x, M):
    """(B, T, N, …) as (B, T, M, G, …)."""
    B, T, N, width = x.shape
    return x.reshape(B, T, M, N // M, width)


def _joined_shape(x):
    return jax.eval_shape(_joined, x)


def _call(name, options, operands, masking, others, results, S):
    """A kernel's results, like these, given the operands with S keys, the masking and more."""
    q, k, v, scale, bias, *_ = operands
    mask = _given(masking.mask, jnp.bool)
    arguments = [_joined(q), k, v, scale, _given(bias), mask, masking.offset]
    integers = [masking.query_lengths, masking.key_lengths]
    integers += [masking.query_segments, masking.key_segments, masking.key_ranges]
    arguments += [_given(x, jnp.int32) for x in integers]
    arguments.append(_given(_by_distance(options, operands, masking, S)))
    left, right = options.window or (None, None)
    side = lambda x: np.int64(-1 if x is None else x)
    found = jax.ffi.ffi_call(f"rnnattn.attention_{name}.v5", results)(
        *arguments,
        *others,
        is_causal=options.is_causal,
        left=side(left),
        right=side(right),
        soft_cap=np.float32(options.soft_cap or 0),
        **call_attributes(),
    )
    return varying_together((found, q))[0]


def _by_kernel(name, options, operands, masking, S, *others):
    """O and L of a kernel."""
    o, lse = forward_results(options, operands, masking)
    more, results = [_given(operands.sinks), *others], [_joined_shape(o), lse]
    o, lse = _call(name, options, operands, masking, more, results, S)
    return _apart(o, operands.query.shape[2]), lse


def _forward(options, operands, masking):
    S = operands.key.shape[1]
    run = lambda *part: _by_kernel("forward", *part, S)
    return parts.forward(run, options, operands, masking, S)


def forward_over_pages(options, operands, masking, table):
    """`forward` of keys and values in pages, those of each row by the table."""
    S = table.shape[1] * operands.key.shape[1]
    run = lambda *part: _by_kernel("paged_forward", *part, S, table)
    return parts.forward(run, options, operands, masking, S)


def _backward_of_part(options, operands, masking, o, lse, do, dlse):
    """What the keys of a part add, but for that of the scale; O and L are those of all keys."""
    q, k, v, _, bias, *_ = operands
    wants_dbias = bias is not None and options.bias_gradient
    wants_dscore = operands.score_arrays is not None and options.score_gradient
    (B, T, M, G, _), S = q.shape, k.shape[1]
    results = [_joined_shape(q), k, v, _float32(*bias.shape) if wants_dbias else _float32(0)]
    results.append(_float32(B, M, G, 1, T + S - 1) if wants_dscore else _float32(0))
    others = [_joined(o), lse, _joined(do), dlse]
    dq, dk, dv, dbias, ddistances = _call(
        "backward", options, operands, masking, others, results, S
    )
    dscore = _score_gradient(options, operands, masking, ddistances) if wants_dscore else None
    dq = _apart(dq, M)
    return Operands(dq, dk, dv, None, dbias if wants_dbias else None, None, dscore)


def _backward(options, operands, masking, o, lse, do, dlse):
    if not options.scale_gradient:
        return parts.backward(_backward_of_part, options, operands, masking, o, lse, do, dlse)
    # from the gradient of the query times the scale, neither of them rounded to 16 bits
    scale = operands.scale
    wide, do = parts.widened(operands, do)
    scaled = wide._replace(query=xla.time_first(scale) * wide.query, scale=jnp.ones_like(scale))
    d = parts.backward(_backward_of_part, options, scaled, masking, o, lse, do, dlse)
    # a query that sees nothing, and may be NaN, has a gradient of zero
    products = jnp.where(d.query == 0, 0, wide.query * d.query)
    dscale = sum_to(xla.time_last(products), scale.shape)
    return as_given(d._replace(query=xla.time_first(scale) * d.query, scale=dscale), operands)


HALVES = _forward, _backward
NATIVE = placed("rnnattn_attention", {"cpu": HALVES})
