"""LSTM, attention and rotary positions for JAX, with gradients derived by hand."""

from importlib import import_module
from typing import TYPE_CHECKING

from rnnattn.attention import KVCache, dot_product_attention, packed_attention, update_cache
from rnnattn.packing import (
    cu_seqlens_to_lengths,
    cu_seqlens_to_segment_ids,
    lengths_to_cu_seqlens,
    packed_positions,
    segment_ids_to_cu_seqlens,
)
from rnnattn.patches import (
    conv_stem,
    crop_and_pad,
    patchify,
    resample_grid,
    resize_patch_kernel,
    stem_strides,
    token_mask,
    unpatchify,
)
from rnnattn.position import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    PRoPEScaling,
    YaRNScaling,
    mrope,
    rope,
    rope_2d,
    rope_mixed,
    shift_matrix,
    sinusoids,
    xpos,
)
from rnnattn.recurrent import (
    GRUParams,
    LSTMParams,
    LSTMState,
    bidirectional_lstm,
    gru,
    gru_step,
    init_gru,
    init_lstm,
    lstm,
    lstm_step,
    stacked_lstm,
)

__all__ = [
    "DynamicNTKScaling",
    "GRUParams",
    "KVCache",
    "LSTMParams",
    "LSTMState",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPEScaling",
    "NTKScaling",
    "PRoPEScaling",
    "YaRNScaling",
    "bidirectional_lstm",
    "conv_stem",
    "crop_and_pad",
    "cu_seqlens_to_lengths",
    "cu_seqlens_to_segment_ids",
    "dot_product_attention",
    "gru",
    "gru_step",
    "init_gru",
    "init_lstm",
    "interop",
    "lengths_to_cu_seqlens",
    "lstm",
    "lstm_step",
    "mrope",
    "packed_attention",
    "packed_positions",
    "patchify",
    "reference",
    "resample_grid",
    "resize_patch_kernel",
    "rope",
    "rope_2d",
    "rope_mixed",
    "segment_ids_to_cu_seqlens",
    "shift_matrix",
    "sinusoids",
    "stacked_lstm",
    "stem_strides",
    "token_mask",
    "unpatchify",
    "update_cache",
    "xpos",
]


if TYPE_CHECKING:
    from rnnattn import interop as interop, nn as nn, parallel as parallel, reference as reference


def __getattr__(name):
    """What not everybody needs is imported when it is asked for; `nn` needs flax."""
    if name in ("interop", "nn", "parallel", "reference"):
        return import_module(f"rnnattn.{name}")
    if name == "__version__":
        return import_module("importlib.metadata").version("rnnattn")
    raise AttributeError(f"module 'rnnattn' has no attribute {name!r}")
