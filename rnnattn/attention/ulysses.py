"""Attention to a sequence that lies on several devices: heads change places with time.

Each of D devices has T/D queries of all N heads, and S/D keys. One exchange gives it all T queries
and S keys of N/D heads, which is a problem of one device, with any option; another brings the
output back:

    q, k, v       (B, T/D, N, ·) → (B, T, N/D, ·)
    bias, mask    (B, N, T/D, S) → (B, N/D, T, S)
    O, L          (B, T, N/D, ·) → (B, T/D, N, ·)

The gradient is that of one device between the transposes of the exchanges, which are exchanges the
other way. A device sends (2 T N K + S M (K + V)) / D numbers forward, D times fewer than all keys
and values that go round a ring; but D has to divide N, and where it does not divide M, heads of
keys are sent more than once.

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
Source: Jacobs et al. 2023 (DeepSpeed Ulysses).
"""

import math

import jax.numpy as jnp
from jax import lax

from rnnattn.precision import varying_together


def head_copies(M, devices):
    """How often each of M heads of keys has to be there for the devices to divide them."""
    return math.lcm(M, devices) // M


def attend_by_heads(axis_name, devices, attend, arrays):
    """O and L of what one device holds; `attend(arrays)` gives those of a problem of one device."""
    arrays = varying_together(arrays)
    to_heads = lambda x: lax.all_to_all(x, axis_name, 2, 1, tiled=True)
    to_time = lambda x: lax.all_to_all(x, axis_name, 1, 2, tiled=True)
    copies = head_copies(arrays.key.shape[2], devices)
    of_keys = lambda x: to_heads(jnp.repeat(x, copies, axis=2) if copies > 1 else x)
    whole = lambda x, axis: lax.all_gather(x, axis_name, axis=axis, tiled=True)

    def own(x, axis):
        """The heads of this device."""
        n = x.shape[axis] // devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * n, n, axis)

    def of_logits(x):
        """From (#B, #N, #T/D, #S); what is shared stays so, but for what a single query has."""
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        by_head, by_query = x.shape[1] > 1, x.shape[2] == arrays.query.shape[1]
        if by_head and by_query:
            return lax.all_to_all(x, axis_name, 1, 2, tiled=True)
        if by_query:
            return whole(x, 2)
        return own(x, 1) if by_head else x

    moved = {"query": to_heads, "key": of_keys, "value": of_keys}
    moved |= dict.fromkeys(("bias", "mask"), of_logits)
    moved |= dict.fromkeys(
        ("query_segment_ids", "key_value_segment_ids"), lambda ids: whole(ids, 1)
    )
    of_heads = ("scale", "sinks", "heads")
    moved |= dict.fromkeys(of_heads, lambda x: own(x, 0) if jnp.ndim(x) else x)
    moved["dropout_key"] = lambda keys: own(keys, 1)
    given = {name: getattr(arrays, name) for name in moved}
    parts = {name: moved[name](x) for name, x in given.items() if x is not None}
    o, lse = attend(arrays._replace(**parts))
    return to_time(o), to_time(lse)
