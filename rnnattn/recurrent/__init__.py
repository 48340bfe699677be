"""Recurrent units: the LSTM, the GRU and others, over one step, a sequence, two directions, layers.

From what is called to what is computed: `api`, `family` and `stack` (the functions, the choice of a
schedule), `init` (weights), `arguments` (checks), `rule` (the custom rule), the schedules `chunked`
(on XLA) and `native`, and `units` (the equations), which meet by the contract of `unit`.
"""

from rnnattn.recurrent.api import lstm, lstm_step
from rnnattn.recurrent.family import gru, gru_step
from rnnattn.recurrent.init import init_gru, init_lstm
from rnnattn.recurrent.stack import bidirectional_lstm, stacked_lstm
from rnnattn.recurrent.units.gru import GRUParams
from rnnattn.recurrent.units.lstm import LSTMParams, LSTMState

__all__ = [
    "GRUParams",
    "LSTMParams",
    "LSTMState",
    "bidirectional_lstm",
    "gru",
    "gru_step",
    "init_gru",
    "init_lstm",
    "lstm",
    "lstm_step",
    "stacked_lstm",
]
