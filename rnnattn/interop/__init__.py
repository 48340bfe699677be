"""Weights from and to torch, Keras, Flax, Haiku and ONNX; those of a ViT, timm and Google's.

All LSTMs compute z = x w_x + h w_h + b, and lay it out in their own way:

    rnnattn     gates i, f, g, o    w_x (D, 4H), w_h (R, 4H)         one bias
    torch       gates i, f, g, o    transposed                       two biases, added
    Keras       gates i, f, g, o    as here                          one bias
    Flax        gates i, f, g, o    as here, or one array a gate     one bias, with w_h
    Haiku       gates i, g, f, o    w_x above w_h in one array       one bias; 1 is added to f's
    ONNX        gates i, o, f, g    transposed, a leading axis       two biases, joined; peepholes
                                    for the directions               in the order i, o, f

GRUs have blocks r, z, n here, and b_n, a bias of h w_hn alone, where the reset is behind it:

    torch       r, z, n    transposed; two biases; reset after
    Keras       z, r, n    two biases (reset after), or one (before)
    Flax        r, z, n    an array a gate, or one; nnx has no b_n; reset after
    Haiku       z, r, n    one bias; its z is 1 − z; reset before
    ONNX        z, r, n    transposed, a leading axis; two biases; reset after where it says
                           `linear_before_reset`

A plain recurrent network has one block. torch has it transposed, with two biases, added; Keras
(`SimpleRNN`) and Flax (`SimpleCell`) as here.

Each format is a plain mapping from names to arrays (anything `numpy.asarray` takes), so none of
these packages is imported. What is read is copied, what is written is NumPy. The dtype is kept,
but for float64 where `jax_enable_x64` is off: JAX then makes it float32. An import of an export
gives the same numbers, exactly, but for Haiku's forget bias.

The weights of a ViT are a nested dictionary here, as `rnnattn.nn.load_weights` takes it: `stem`,
`cls` (for pool "cls"), `position` (learned), `blocks` by number, each with `norm1`, `attention`,
`norm2`, `fc1` and `fc2`, then `norm` and `head`. Kernels multiply on the right: (in, out). timm's
are transposed, with query, key and value in one array; Google's are as here, under other names.

Axes: D input width, H hidden width, R projected width (H without projection); in a ViT, D width
of a token, F hidden width of a block, N heads, K head width.
Sources: the documentation of `torch.nn.LSTM` and of the ONNX operator `LSTM`; the code of
`keras.layers.LSTM`, `flax.linen.LSTMCell`, `flax.nnx.LSTMCell` and `haiku.LSTM`; for ViTs that of
timm's `vision_transformer.py`, which names what google-research's `vision_transformer` and
`big_vision` store.
"""

from rnnattn.interop.files import read_safetensors, write_safetensors
from rnnattn.interop.gru import (
    gru_from_flax,
    gru_from_haiku,
    gru_from_keras,
    gru_from_onnx,
    gru_from_torch,
    gru_to_flax,
    gru_to_haiku,
    gru_to_keras,
    gru_to_onnx,
    gru_to_torch,
)
from rnnattn.interop.lstm import (
    lstm_from_flax,
    lstm_from_haiku,
    lstm_from_keras,
    lstm_from_onnx,
    lstm_from_torch,
    lstm_to_flax,
    lstm_to_haiku,
    lstm_to_keras,
    lstm_to_onnx,
    lstm_to_torch,
)
from rnnattn.interop.rnn import (
    rnn_from_flax,
    rnn_from_keras,
    rnn_from_torch,
    rnn_to_flax,
    rnn_to_keras,
    rnn_to_torch,
)
from rnnattn.interop.vit import vit_from_google, vit_from_timm, vit_to_google, vit_to_timm

__all__ = [
    "gru_from_flax",
    "gru_from_haiku",
    "gru_from_keras",
    "gru_from_onnx",
    "gru_from_torch",
    "gru_to_flax",
    "gru_to_haiku",
    "gru_to_keras",
    "gru_to_onnx",
    "gru_to_torch",
    "lstm_from_flax",
    "lstm_from_haiku",
    "lstm_from_keras",
    "lstm_from_onnx",
    "lstm_from_torch",
    "lstm_to_flax",
    "lstm_to_haiku",
    "lstm_to_keras",
    "lstm_to_onnx",
    "lstm_to_torch",
    "read_safetensors",
    "rnn_from_flax",
    "rnn_from_keras",
    "rnn_from_torch",
    "rnn_to_flax",
    "rnn_to_keras",
    "rnn_to_torch",
    "vit_from_google",
    "vit_from_timm",
    "vit_to_google",
    "vit_to_timm",
    "write_safetensors",
]
