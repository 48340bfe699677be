"""Dot-product attention, and caches for decoding.

From what is called to what is computed: `api` (the functions, the choice of a schedule),
`arguments` (checks), `rule` (the custom rule), the schedules `dense` and `blockwise` (on XLA,
behind `xla`) and `native`, `equations` with `masking` and `dropout`; `ring` is behind
`rnnattn.parallel`. `packed` is for sequences packed behind one another. Caches: `cache`, `paged`
over the schedule `pages`, `rotating`; `quantised` are keys and values of 8 bits.
"""

from rnnattn.attention.api import dot_product_attention, dot_product_attention_jvp
from rnnattn.attention.cache import KVCache, update_cache
from rnnattn.attention.packed import packed_attention, packed_attention_jvp
from rnnattn.attention.paged import (
    PagedCache,
    append,
    drop,
    fork,
    free_pages,
    init_paged_cache,
    paged_attention,
    reference_counts,
    truncate,
)
from rnnattn.attention.quantised import dequantise, quantise
from rnnattn.attention.rotating import (
    RotatingCache,
    rotating_attention,
    update_rotating_cache,
)
from rnnattn.attention.signature import Implementation

__all__ = [
    "Implementation",
    "KVCache",
    "PagedCache",
    "RotatingCache",
    "append",
    "dequantise",
    "dot_product_attention",
    "dot_product_attention_jvp",
    "drop",
    "fork",
    "free_pages",
    "init_paged_cache",
    "packed_attention",
    "packed_attention_jvp",
    "paged_attention",
    "quantise",
    "reference_counts",
    "rotating_attention",
    "truncate",
    "update_cache",
    "update_rotating_cache",
]
