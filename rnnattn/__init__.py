"""LSTM, attention and rotary positions for JAX, with gradients derived by hand."""

from rnnattn import reference
from rnnattn.recurrent import LSTMParams, LSTMState, init_lstm, lstm, lstm_step

__all__ = ["LSTMParams", "LSTMState", "init_lstm", "lstm", "lstm_step", "reference"]
