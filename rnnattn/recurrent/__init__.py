"""Recurrent units: the LSTM, over one step, a sequence, two directions and a stack of layers.

From what is called to what is computed: `api` and `stack` (the functions, the choice of a
schedule), `init` (weights), `arguments` (checks), `rule` (the custom rule), the schedules `chunked`
(on XLA) and `native`, `equations`.
"""

from rnnattn.recurrent.api import lstm, lstm_step
from rnnattn.recurrent.equations import LSTMParams, LSTMState
from rnnattn.recurrent.init import init_lstm
from rnnattn.recurrent.stack import bidirectional_lstm, stacked_lstm

__all__ = [
    "LSTMParams",
    "LSTMState",
    "bidirectional_lstm",
    "init_lstm",
    "lstm",
    "lstm_step",
    "stacked_lstm",
]
