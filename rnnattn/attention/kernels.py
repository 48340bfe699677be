"""What kernels of attention in Pallas share: whom a query sees, and logits in units of log 2.

Accelerators have an instruction for a power of 2 and none for one of e.
"""

import math
from typing import NamedTuple

from jaxtyping import Array, Int

from rnnattn.attention.equations import cap

LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Reach(NamedTuple):
    """The keys that a query may see: those of its range that have its segment."""

    first: Int[Array, "B T"]
    past: Int[Array, "B T"]
    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    # [from, to) are visited, [from, to) of these seen whole
    blocks: Int[Array, "B tiles 4"] | None = None


def within(first, past, keys, segments):
    """Whether a query sees a key; segments are those of both, or None."""
    sees = (keys >= first) & (keys < past)
    return sees if segments is None else sees & (segments[0] == segments[1])


def logits(product, scale, soft_cap, bias=None):
    """s before bias and masks, if the cap's gradient needs it, and s in units of log 2."""
    capped = None if soft_cap is None else cap(product * scale, soft_cap)
    s = product * (scale * LOG2_E) if capped is None else capped * LOG2_E
    return capped, s if bias is None else s + bias.astype(s.dtype) * LOG2_E
