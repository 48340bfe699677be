"""Recurrent units: the LSTM, the GRU and others, over one step, a sequence, two directions, layers.

From what is called to what is computed: `api`, `family` and `stack` (the functions, the choice of a
schedule), `init` (weights), `arguments` (checks), `rule` (the custom rule), the schedules `chunked`
(on XLA) and `native`, and `units` (the equations), which meet by the contract of `unit`.
"""

from rnnattn.recurrent.api import lstm, lstm_step
from rnnattn.recurrent.family import (
    gru,
    gru_step,
    layer_norm_gru,
    layer_norm_gru_step,
    layer_norm_lstm,
    layer_norm_lstm_step,
    rnn,
    rnn_step,
    slstm,
    slstm_step,
)
from rnnattn.recurrent.init import (
    init_gru,
    init_layer_norm_gru,
    init_layer_norm_lstm,
    init_lstm,
    init_rnn,
    init_slstm,
)
from rnnattn.recurrent.stack import bidirectional, bidirectional_lstm, stacked, stacked_lstm
from rnnattn.recurrent.units.gru import GRUParams
from rnnattn.recurrent.units.layer_norm import LayerNormGRUParams, LayerNormLSTMParams
from rnnattn.recurrent.units.lstm import LSTMParams, LSTMState
from rnnattn.recurrent.units.rnn import RNNParams
from rnnattn.recurrent.units.slstm import SLSTMParams, SLSTMState

__all__ = [
    "GRUParams",
    "LSTMParams",
    "LSTMState",
    "LayerNormGRUParams",
    "LayerNormLSTMParams",
    "RNNParams",
    "SLSTMParams",
    "SLSTMState",
    "bidirectional",
    "bidirectional_lstm",
    "gru",
    "gru_step",
    "init_gru",
    "init_layer_norm_gru",
    "init_layer_norm_lstm",
    "init_lstm",
    "init_rnn",
    "init_slstm",
    "layer_norm_gru",
    "layer_norm_gru_step",
    "layer_norm_lstm",
    "layer_norm_lstm_step",
    "lstm",
    "lstm_step",
    "rnn",
    "rnn_step",
    "slstm",
    "slstm_step",
    "stacked",
    "stacked_lstm",
]
