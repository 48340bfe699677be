"""LSTM, attention and rotary positions for JAX, with gradients derived by hand."""

from importlib import import_module
from typing import TYPE_CHECKING

from rnnattn.attention import KVCache, dot_product_attention, update_cache
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
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    YaRNScaling,
    rope,
    rope_2d,
    rope_mixed,
    shift_matrix,
    sinusoids,
)
from rnnattn.recurrent import (
    GRUParams,
    LayerNormGRUParams,
    LayerNormLSTMParams,
    LSTMParams,
    LSTMState,
    RNNParams,
    SLSTMParams,
    SLSTMState,
    bidirectional_lstm,
    gru,
    gru_step,
    init_gru,
    init_layer_norm_gru,
    init_layer_norm_lstm,
    init_lstm,
    init_rnn,
    init_slstm,
    layer_norm_gru,
    layer_norm_gru_step,
    layer_norm_lstm,
    layer_norm_lstm_step,
    lstm,
    lstm_step,
    rnn,
    rnn_step,
    slstm,
    slstm_step,
    stacked_lstm,
)

__all__ = [
    "GRUParams",
    "KVCache",
    "LSTMParams",
    "LSTMState",
    "LayerNormGRUParams",
    "LayerNormLSTMParams",
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "RNNParams",
    "SLSTMParams",
    "SLSTMState",
    "YaRNScaling",
    "bidirectional_lstm",
    "conv_stem",
    "crop_and_pad",
    "dot_product_attention",
    "gru",
    "gru_step",
    "init_gru",
    "init_layer_norm_gru",
    "init_layer_norm_lstm",
    "init_lstm",
    "init_rnn",
    "init_slstm",
    "interop",
    "layer_norm_gru",
    "layer_norm_gru_step",
    "layer_norm_lstm",
    "layer_norm_lstm_step",
    "lstm",
    "lstm_step",
    "patchify",
    "reference",
    "resample_grid",
    "resize_patch_kernel",
    "rnn",
    "rnn_step",
    "rope",
    "rope_2d",
    "rope_mixed",
    "shift_matrix",
    "sinusoids",
    "slstm",
    "slstm_step",
    "stacked_lstm",
    "stem_strides",
    "token_mask",
    "unpatchify",
    "update_cache",
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
