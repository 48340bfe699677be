"""Attention by other libraries: `jax.nn` with cuDNN, and tokamax."""

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from rnnattn.attention.arguments import with_one_batch_axis
from rnnattn.checks import Check, those_that_hold


def hand_over(function, arrays, options, request):
    """The call by `jax.nn` with cuDNN, or by tokamax."""
    name = request.implementation
    Check(function).served(name, _unserved(arrays, options, request))
    shape = arrays.query.shape
    arrays = with_one_batch_axis(arrays)
    lengths = lambda x: None if x is None else x.astype(jnp.int32).reshape(-1)
    four_axes = lambda x: None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)
    shared = {
        "scale": arrays.scale,
        "is_causal": options.is_causal,
        "query_seq_lengths": lengths(arrays.query_seq_lengths),
        "key_value_seq_lengths": lengths(arrays.key_value_seq_lengths),
        "local_window_size": options.window,
    }
    if name == "cudnn":
        attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    else:
        import tokamax

        attend = tokamax.dot_product_attention
        shared["logits_soft_cap"] = options.soft_cap
    bias, mask = four_axes(arrays.bias), four_axes(arrays.mask)
    out = attend(arrays.query, arrays.key, arrays.value, bias, mask, **shared)
    return out.reshape(*shape[:-1], out.shape[-1])


def _unserved(arrays, options, request):
    """What of a call the other library cannot serve."""
    refused = {
        "`query_offset`": not (isinstance(arrays.query_offset, int) and arrays.query_offset == 0),
        "segment ids": arrays.query_segment_ids is not None,
        "`sinks`": arrays.sinks is not None,
        "dropout": options.dropout_rate > 0,
        "`mask_function`": options.mask_function is not None or arrays.key_ranges is not None,
        "`score_function`": options.score_function is not None,
        "`return_residual`": request.return_residual,
        "an array as `scale`": not isinstance(arrays.scale, int | float | None),
        "an open side of `local_window_size`": options.window is not None
        and None in options.window,
    }
    if request.implementation == "cudnn":
        dtype = jnp.result_type(arrays.query)
        refused |= {
            f"the dtype {dtype.name}": dtype not in (jnp.bfloat16, jnp.float16),
            "a value width other than the key's": arrays.key.shape[-1] != arrays.value.shape[-1],
            "`logits_soft_cap`": options.soft_cap is not None,
            "a machine without a GPU": jax.default_backend() != "gpu",
        }
    else:
        # Its cap comes after the bias, ours before.
        both = options.soft_cap is not None and arrays.bias is not None
        refused |= {
            "`logits_soft_cap` with a bias": both,
            "an environment without the package": find_spec("tokamax") is None,
        }
    return those_that_hold(refused)
