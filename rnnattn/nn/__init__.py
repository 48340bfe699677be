"""Flax NNX modules over the functions of this library. They hold weights; the functions compute.

Recurrent units, with a product in the loop or without, multi-head attention, and a vision
transformer (ViT) for images of any size. A pre-norm block of the ViT is

    x ← x + MHA(LN(x))        x ← x + W₂ gelu(W₁ LN(x) + b₁) + b₂

and its head reads LN of the last x, at the class token or as the mean of the tokens.

Dropout is on until `module.eval()` and again after `module.train()`. Its keys come from streams
within the module or, so that a step can be run again exactly, from `rngs` given to the call.

Axes: B batch, T time or tokens, S keys, D width, H hidden width, R width of h (H without a
projection), N query heads, M key/value heads, K head width.
Sources: Vaswani et al. 2017; Ainslie et al. 2023, arXiv 2305.13245 (grouped heads); Dehghani et al.
2023, arXiv 2302.05442 (normalised queries and keys); Dosovitskiy et al. 2020, arXiv 2010.11929
(ViT); Beyer et al. 2022, arXiv 2205.01580 (2-D sinusoids, mean pooling); Heo et al. 2024, arXiv
2403.13298 (rotary ViT); Xiao et al. 2021, arXiv 2106.14881 (convolutional stem); Huang et al. 2016,
arXiv 1603.09382 (stochastic depth).
"""

from rnnattn.nn.attention import LayerNorm, MultiHeadAttention
from rnnattn.nn.flax_attention import attention_fn
from rnnattn.nn.linear import RGLRU, MinGRU, MinLSTM
from rnnattn.nn.recurrent import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    GRUCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMCell,
    RNNCell,
    SLSTMCell,
)
from rnnattn.nn.vit import Activations, Block, ConvStem, PatchStem, ViT
from rnnattn.nn.weights import load_weights

__all__ = [
    "GRU",
    "LSTM",
    "RGLRU",
    "RNN",
    "SLSTM",
    "Activations",
    "Block",
    "ConvStem",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "MinGRU",
    "MinLSTM",
    "MultiHeadAttention",
    "PatchStem",
    "RNNCell",
    "SLSTMCell",
    "ViT",
    "attention_fn",
    "load_weights",
]
