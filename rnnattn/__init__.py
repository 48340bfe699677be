"""LSTM, attention and rotary positions for JAX, with gradients derived by hand."""

from rnnattn import interop, reference
from rnnattn.cell import LSTMParams, LSTMState
from rnnattn.recurrent import bidirectional_lstm, init_lstm, lstm, lstm_step, stacked_lstm

__all__ = [
    "LSTMParams",
    "LSTMState",
    "bidirectional_lstm",
    "init_lstm",
    "interop",
    "lstm",
    "lstm_step",
    "reference",
    "stacked_lstm",
]
