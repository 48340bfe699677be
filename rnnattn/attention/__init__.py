"""Dot-product attention, and a cache for decoding.

From what is called to what is computed: `api` (the functions, the choice of a schedule),
`arguments` (checks), `rule` (the custom rule), the schedules `dense` and `blockwise` (on XLA,
behind `xla`) and `native`, `equations` with `masking` and `dropout`; `ring` is behind
`rnnattn.parallel`. `packed` is for sequences packed behind one another.
"""

from rnnattn.attention.api import dot_product_attention, dot_product_attention_jvp
from rnnattn.attention.cache import KVCache, update_cache
from rnnattn.attention.packed import packed_attention, packed_attention_jvp
from rnnattn.attention.signature import Implementation

__all__ = [
    "Implementation",
    "KVCache",
    "dot_product_attention",
    "dot_product_attention_jvp",
    "packed_attention",
    "packed_attention_jvp",
    "update_cache",
]
