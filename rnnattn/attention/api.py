"""Dot-product attention as it is called, and the choice of a schedule.

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, SupportsFloat, SupportsIndex

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

import rnnattn.attention.cudnn as cudnn
import rnnattn.attention.native as native
import rnnattn.attention.pallas as pallas
import rnnattn.attention.xla as xla
from rnnattn.attention.arguments import (
    checked,
    numbered,
    on_mesh,
    problem,
    sorted_arguments,
    with_functions,
    with_one_batch_axis,
)
from rnnattn.attention.peers import hand_over
from rnnattn.attention.placed import placed
from rnnattn.attention.rule import attend, plain, with_weights
from rnnattn.attention.signature import Implementation, Window, typed
from rnnattn.checks import Check, forward_mode
from rnnattn.dispatch import no_hopper, unserved_here
from rnnattn.precision import varying_together


@typed
def dot_product_attention(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Real[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | Float[Array, "..."] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "..."] | None = None,
    key_value_seq_lengths: Int[Array, "..."] | None = None,
    local_window_size: Window | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    query_offset: SupportsIndex | Int[Array, "..."] = 0,
    query_segment_ids: Int[Array, "..."] | None = None,
    key_value_segment_ids: Int[Array, "..."] | None = None,
    logits_soft_cap: SupportsFloat | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout_rate: SupportsFloat = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    return_weights: bool = False,
    mask_function: Callable | None = None,
    score_function: Callable | None = None,
) -> Any:
    """softmax(scale · q kᵀ + bias) v for each head, over the keys a query may see (A1, A3).

    In place of `jax.nn.dot_product_attention`: the arguments up to `return_residual` are the same.

    Args:
        query: (B, T, N, K); B may be absent, or several axes, here and in all that follows.
        key, value: (B, S, M, K) and (B, S, M, V), with N a multiple of M: query head n reads
            key/value head n // (N / M).
        bias: added to the logits; of axes that broadcast to (B, N, T, S). Integers are constants.
        mask: False hides a key from a query; of axes that broadcast to (B, N, T, S).
        scale: of the logits, 1/√K by default; a number, or an array () or (N,).
        is_causal: hides keys behind the query's position.
        query_seq_lengths, key_value_seq_lengths: (B,), what is valid of each row, 0 included.
        local_window_size: the keys (left, right) of a query's position that it sees, besides the
            one at it; None for all of a side, one number for both. A negative size is refused:
            `jax.nn` hides the query's own key with it, other libraries mean all of a side.
        implementation: None chooses: "native" on a CPU where it can serve; in 16 bits, on one
            NVIDIA GPU and in a program that is not exported, cuDNN where it can
            (`rnnattn.attention.cudnn`, which rounds the weights, too), or "pallas" where it can,
            from 256 queries and keys on and with jax 0.11, as it was measured; else "xla".
            "dense" has all logits at once, "blockwise" memory linear in T + S; "xla" is the better
            of the two, blockwise from 2¹⁶ logits for each head on.
            "native" is the kernels for a CPU, see `rnnattn.native`: no float64, no dropout.
            "pallas" is the kernels for one Hopper GPU (`rnnattn.attention.hopper`): 16 bits, widths
            of 64 and 128, no mask or dropout; a bias of the same dtype, (…, T, S), with which they
            were compiled but not yet run on a GPU, so that None does not take them for it. On one
            TPU from the fifth generation on it is those of `rnnattn.attention.tpu`, for bfloat16
            and float32 and widths up to 256, without a mask, bias or dropout: they compile for a
            v5e and a v6e, were measured on none, and None never takes them. A call that one of the
            two can serve runs on XLA on the other's platform, unless that device is at hand: then
            it is refused.
            All that is said here is true of them, but that in 16 bits weights are rounded before
            their product with the values, and a value of ∞ that a query sees makes its output NaN.
            "cudnn" and "tokamax" hand the call over to `jax.nn` and to tokamax, for what they can
            serve, with their own gradients and rules for rows that see nothing.
        return_residual: also return the log-sum-exp L, (B, T, N), in float32 for 16-bit inputs and
            with a true gradient, where that of `jax.nn` has the key's dtype and none for L.
        query_offset: a number or (B,): query t stands at position t + offset among the keys. A
            cache's length while decoding; S − T aligns the last query with the last key.
        query_segment_ids, key_value_segment_ids: (B, T) and (B, S): a query sees the keys of its
            own segment. Sorted ids let whole blocks be skipped.
        logits_soft_cap: a number c: scaled logits s become c tanh(s / c), before bias and masks,
            as in ONNX.
        sinks: (N,), a logit of each head that joins the softmax's sum, and L, but has no value.
        dropout_rate: the share of weights set to zero, in [0, 1); the rest is scaled up.
        dropout_key: needed where `dropout_rate` is above 0. Both schedules drop the same weights.
        return_weights: also return the weights as they are applied, dropout included, (B, N, T, S);
            dense only, with JAX's own gradient.
        mask_function: (b, n, t, s) → Boolean, False hides key s of row b from query head n of the
            query at position t, `query_offset` counted in; several batch axes are numbered through.
            Of integers that broadcast; traced once, on single ones. `rnnattn.masks` has some ready,
            which compose. Blocks in which it shows nothing are skipped. A mask that amounts to
            causality, a window, segments or one or two ranges of keys for each query, as a prefix
            or a window beside sinks do, is run as these are; any other is evaluated block by block,
            and the kernels for a CPU get the Booleans; those for a GPU or TPU serve none.
        score_function: (logit, b, n, t, s) → logit, of the logits after bias, before masks;
            likewise traced once, on a number in the dtype that sums have. To have finite gradients
            it has to be finite for hidden keys, too. `masks.alibi` and `masks.relative_bias` are
            run by the kernels for a CPU, of a number for each head and distance, (B, N, T + S − 1)
            at most; others on XLA.
    Returns:
        The output (B, T, N, V) in the dtype of `value`; a tuple with L and the weights after it, if
        they are asked for. A query that may see no key gets zeros, and L = −∞ (its sink, if there
        is one). 16-bit inputs are summed in float32; float64 is float64 throughout.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        With respect to query, key, value, bias, sinks, an array `scale` and what `score_function`
        closes over, from cotangents of the output and L; kept are these, the output and L, and the
        weights are computed again; the rest of the arguments are constants. Whatever hides
        (lengths, masks, segments, causality, a window, offsets): a key or value that no query of
        its row may see, a query that may see no key, and what comes back to the output of one,
        reach nothing, even if they are NaN or ∞, and get gradients of zero. What comes back to L
        of such a query goes to its sink, if there is one. The gradient can be differentiated again,
        in reverse and forward mode, in linear memory where the schedule is. `jax.jvp` of the
        function itself raises a TypeError ("can't apply forward-mode autodiff (jvp) to a custom_vjp
        function"): that is what `rnnattn.attention.dot_product_attention_jvp` is for.
    Example:
        >>> import jax.numpy as jnp
        >>> q, k, v = jnp.ones((3, 2, 5, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True).shape
        (2, 5, 4, 8)
        >>> def loss(k):
        ...     out, lse = dot_product_attention(q, k, v, is_causal=True, return_residual=True)
        ...     return out[:, 2].sum() + lse[:, 2].sum()
        >>> bool((jax.grad(loss)(k)[:, 3:] == 0).all())
        True
    """
    function = "dot_product_attention"
    arguments = sorted_arguments(
        function,
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_weights=return_weights,
        mask_function=mask_function,
        score_function=score_function,
    )
    return call(function, attend, arguments)


@typed
def dot_product_attention_jvp(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Real[Array, "..."] | None = None,
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
        >>> import jax.numpy as jnp
        >>> q, k, v = jnp.ones((3, 2, 5, 4, 8))
        >>> out, dout = jax.jvp(lambda q: dot_product_attention_jvp(q, k, v), (q,), (q,))
        >>> dout.shape
        (2, 5, 4, 8)
    """
    function = "dot_product_attention_jvp"
    arguments = sorted_arguments(function, query, key, value, bias, mask, **options)
    return call(function, plain, arguments)


def call(function, rule, arguments, schedule=None):
    """A call of `function`, by `rule`; by the schedule that suits it, if none is given."""
    *_, request = arguments
    arrays, options = checked(function, *arguments)
    arrays, options = with_functions(function, arrays, options)
    name = request.implementation
    if name in ("cudnn", "tokamax"):
        ours = "None, 'xla', 'dense' or 'blockwise'"
        Check(function)(rule is attend, "implementation", ours, repr(name))
        return hand_over(function, arrays, options, request)
    if name == "native":
        unserved = native.unserved(arrays.query, arrays.value, options)
        Check(function).served(name, unserved)
    if name == "pallas":
        Check(function).served(name, unserved_here(*_unserved_by_pallas(arrays, options)))
    results = run(function, rule, arrays, options, request, schedule)
    return results[0] if len(results) == 1 else results


def run(function, rule, arrays, options, request, schedule=None):
    """What is asked for of O, L and the weights, of arguments that are checked."""
    if request.return_weights:
        rule = with_weights
    if schedule is None:
        schedule, options = _suited(arrays, options, request)
    if isinstance(arrays.query_offset, int) and arrays.query_offset == 0:
        arrays = arrays._replace(query_offset=None)  # a constant, which nobody has to send
    wanted = (True, request.return_residual, request.return_weights)
    with forward_mode(f"rnnattn.attention.{function}_jvp"):
        return _run_attention(function, rule, schedule, options, wanted, arrays)


def _unserved_by_pallas(arrays, options):
    """What the kernels for a GPU, and those for a TPU, cannot serve."""
    by_gpu = pallas.unserved_on_gpu(arrays, options) or no_hopper()
    return by_gpu, pallas.unserved_on_tpu(arrays, options)


# By whether the kernels for a CPU serve, and what of a GPU does.
_CHOSEN = {
    (True, None): native.NATIVE,
    (False, "cudnn"): cudnn.CUDNN,
    (True, "cudnn"): placed(
        "rnnattn_attention_16_bits", {"cpu": native.HALVES, "cuda": cudnn.HALVES}
    ),
    (False, "pallas"): placed("rnnattn_attention_on_gpu", {"cuda": pallas.WHERE_FASTER}),
    (True, "pallas"): placed(
        "rnnattn_attention_by_kernels", {"cpu": native.HALVES, "cuda": pallas.WHERE_FASTER}
    ),
}


def _suited(arrays, options, request):
    """The schedule that serves a call, and is the fastest where the choice is ours; its options."""
    T, S = arrays.query.shape[-3], arrays.key.shape[-3]
    name, empty = request.implementation, arrays.query.size * arrays.key.size == 0
    if name == "dense" or request.return_weights or empty:
        return xla.DENSE, options
    if name == "blockwise":
        return xla.BLOCKWISE, options
    if name == "pallas":
        by_gpu, by_tpu = _unserved_by_pallas(arrays, options)
        return pallas.PALLAS[not by_gpu, not by_tpu], options
    # Where they serve, the kernels are the faster at all sizes measured (benchmarks/README.md,
    # "When they run").
    by_cpu = name != "xla" and not native.unserved(arrays.query, arrays.value, options)
    by_gpu = None
    if name is None and not cudnn.unserved(arrays, options):
        by_gpu, options = "cudnn", options._replace(scale=cudnn.known_scale(arrays))
    elif name is None and not pallas.unserved_on_gpu(arrays, options):
        by_gpu = "pallas"
    return _CHOSEN.get((by_cpu, by_gpu)) or xla.by_size(T, S), options


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_attention(function, rule, schedule, options, wanted, arrays):
    """What is wanted of O, L and the weights, in the layout of the arguments.

    L is no result where nobody asked: it may be −∞, which `jax.debug_infs` takes for a mistake.
    """
    arrays = varying_together(arrays)
    batch = arrays.query.shape[:-3]
    arrays = numbered(options, with_one_batch_axis(arrays))
    run = partial(_run_parts, rule, schedule, options)
    axes = ("BTNV", "BTN", "BNTS") if rule is with_weights else ("BTNV", "BTN")
    results = on_mesh(function, run, options, arrays, axes)
    results = [x for x, want in zip(results, wanted, strict=False) if want]
    return tuple(x if len(batch) == 1 else x.reshape(*batch, *x.shape[1:]) for x in results)


def _run_parts(rule, schedule, options, arrays):
    arrays = varying_together(arrays)
    B, T, N, _ = arrays.query.shape
    operands, masking = problem(options, arrays)
    operands = schedule.enter(options, operands, masking)
    o, lse, *weights = rule(schedule, options, operands, masking)
    o, lse = schedule.leave(options, operands, masking, o, lse)
    o = o.reshape(B, T, N, o.shape[-1]).astype(arrays.value.dtype)
    lse = xla.time_first(lse).reshape(B, T, N)
    weights = [w.reshape(B, N, *w.shape[3:]) for w in weights]
    return (o, lse, *weights)
