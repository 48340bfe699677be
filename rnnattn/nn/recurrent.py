"""Recurrent units as cells and as stacks of layers; axes as in `rnnattn.nn`.

A cell holds the weights of one layer and direction, with the options of its unit, and is one for
`nnx.RNN` as well; a stack has cells above one another.
"""

from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import rnnattn.recurrent as recurrent
from rnnattn.checks import Check, several
from rnnattn.nn.weights import Held
from rnnattn.precision import accumulator
from rnnattn.recurrent import LSTMState, SLSTMState


class _Cell(Held, nnx.RNNCellBase):
    """The weights of one layer and direction, and what of the unit is fixed."""

    def _begin(self, params, **options):
        self.hold(params)
        self.options = tuple(options.items())

    def _functions(self) -> tuple[Any, Any]:
        """The unit over a sequence and over one step."""
        raise NotImplementedError

    def _widths(self) -> Any:
        """The width of the state, or of each of its fields."""
        return self.w_h.shape[0]

    @property
    def output_size(self) -> int:
        """The width of h."""
        return jax.tree.leaves(self._widths())[0]

    @property
    def run(self) -> Any:
        """The unit over a sequence, with the options of this cell."""
        return partial(self._functions()[0], **dict(self.options))

    def __call__(self, carry: Any, inputs: Float[Array, "*B D"]) -> tuple[Any, Array]:
        """One step of the unit: the state after it, twice, of several fields h alone."""
        _, step = self._functions()
        state = step(self.params, inputs, carry, **dict(self.options))
        return state, getattr(state, "h", state)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> Any:
        """Zeros for inputs of `input_shape` (*B, D)."""
        widths, tree = jax.tree.flatten(self._widths())
        leading, dtype = input_shape[:-1], self.b.dtype
        dtypes = [dtype] + [accumulator(dtype)] * (len(widths) - 1)
        zeros = [jnp.zeros((*leading, n), d) for n, d in zip(widths, dtypes, strict=True)]
        return jax.tree.unflatten(tree, zeros)

    @property
    def num_feature_axes(self) -> int:
        """The axes of one input that are not batch."""
        return 1


class LSTMCell(_Cell):
    """The LSTM; carries `LSTMState`.

    Args:
        input_size, hidden_size, options: those of `rnnattn.init_lstm`.
        clip, coupled: those of `rnnattn.lstm_step`.
    Example:
        >>> rnn = nnx.RNN(LSTMCell(3, 5, rngs=nnx.Rngs(0)))
        >>> rnn(jnp.ones((2, 7, 3))).shape
        (2, 7, 5)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        clip: float | None = None,
        coupled: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        params = recurrent.init_lstm(rngs.params(), input_size, hidden_size, **options)
        self._begin(params, clip=clip, coupled=coupled)

    def _functions(self):
        return recurrent.lstm, recurrent.lstm_step

    def _widths(self):
        R, width = self.w_h.shape
        return LSTMState(R, width // 4)


class GRUCell(_Cell):
    """The GRU; carries h.

    Args:
        input_size, hidden_size, reset_after, options: those of `rnnattn.init_gru`.
    Example:
        >>> cell = GRUCell(3, 5, rngs=nnx.Rngs(0))
        >>> h, _ = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
        >>> h.shape
        (2, 5)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        reset_after: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options |= {"reset_after": reset_after}
        params = recurrent.init_gru(rngs.params(), input_size, hidden_size, **options)
        self._begin(params, reset_after=reset_after)

    def _functions(self):
        return recurrent.gru, recurrent.gru_step


class RNNCell(_Cell):
    """The plain recurrent network; carries h.

    Args:
        input_size, hidden_size, options: those of `rnnattn.init_rnn`.
        activation: that of `rnnattn.rnn`.
    Example:
        >>> cell = RNNCell(3, 5, activation="relu", rngs=nnx.Rngs(0))
        >>> cell(jnp.zeros((2, 5)), jnp.ones((2, 3)))[0].shape
        (2, 5)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Literal["tanh", "relu"] = "tanh",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        params = recurrent.init_rnn(rngs.params(), input_size, hidden_size, **options)
        self._begin(params, activation=activation)

    def _functions(self):
        return recurrent.rnn, recurrent.rnn_step


class LayerNormLSTMCell(_Cell):
    """The LSTM with layer normalisation; carries `LSTMState`.

    Args:
        input_size, hidden_size, options: those of `rnnattn.init_layer_norm_lstm`.
    Example:
        >>> cell = LayerNormLSTMCell(3, 5, rngs=nnx.Rngs(0))
        >>> cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))[1].shape
        (2, 5)
    """

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, **options: Any):
        init = recurrent.init_layer_norm_lstm
        self._begin(init(rngs.params(), input_size, hidden_size, **options))

    def _functions(self):
        return recurrent.layer_norm_lstm, recurrent.layer_norm_lstm_step

    def _widths(self):
        H = self.w_h.shape[0]
        return LSTMState(H, H)


class LayerNormGRUCell(_Cell):
    """The GRU with layer normalisation; carries h.

    Args:
        input_size, hidden_size, options: those of `rnnattn.init_layer_norm_gru`.
    Example:
        >>> cell = LayerNormGRUCell(3, 5, rngs=nnx.Rngs(0))
        >>> cell(jnp.zeros((2, 5)), jnp.ones((2, 3)))[0].shape
        (2, 5)
    """

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, **options: Any):
        init = recurrent.init_layer_norm_gru
        self._begin(init(rngs.params(), input_size, hidden_size, **options))

    def _functions(self):
        return recurrent.layer_norm_gru, recurrent.layer_norm_gru_step


class SLSTMCell(_Cell):
    """The sLSTM; carries `SLSTMState`.

    Args:
        input_size, hidden_size, options: those of `rnnattn.init_slstm`.
        forget_gate: that of `rnnattn.slstm`.
    Example:
        >>> cell = SLSTMCell(3, 4, num_heads=2, rngs=nnx.Rngs(0))
        >>> cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))[1].shape
        (2, 4)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_gate: Literal["sigmoid", "exponential"] = "sigmoid",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        params = recurrent.init_slstm(rngs.params(), input_size, hidden_size, **options)
        self._begin(params, forget_gate=forget_gate)

    def _functions(self):
        return recurrent.slstm, recurrent.slstm_step

    def _widths(self):
        H = self.b.shape[0] // 4
        return SLSTMState(H, H, H, H)


class _Stack(nnx.Module):
    """Layers of cells, one or two to each."""

    cell: ClassVar[Any]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        recurrent_dropout: float = 0.0,
        candidate_dropout: float = 0.0,
        residuals: Literal["gates", "states"] | int | None = None,
        implementation: Literal["xla", "native", "pallas", "cudnn"] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        Check(type(self).__name__)(num_layers >= 1, "num_layers", "at least 1", num_layers)
        make = partial(self.cell, hidden_size=hidden_size, rngs=rngs, **options)
        self.forward = nnx.List()
        self.backward = nnx.List()
        size = input_size
        for _ in range(num_layers):
            self.forward.append(make(size))
            if bidirectional:
                self.backward.append(make(size))
            size = self.forward[0].output_size * (2 if bidirectional else 1)
        self.residuals, self.implementation = residuals, implementation
        self.dropout_rate = dropout_rate
        self.zoneout = zoneout
        self.recurrent_dropout, self.candidate_dropout = recurrent_dropout, candidate_dropout
        self.deterministic = False
        drawn = dropout_rate > 0 or self._draws_in_steps
        self.rngs = nnx.data(rngs["dropout"].fork() if drawn else None)

    @property
    def _draws_in_steps(self):
        zoneout: Any = self.zoneout
        rates = zoneout if several(zoneout) else (zoneout,)
        return any(rate > 0 for rate in (*rates, self.recurrent_dropout, self.candidate_dropout))

    @property
    def layers(self) -> list[Any]:
        """The weights as `rnnattn.stacked` takes them."""
        forward = [cell.params for cell in self.forward]
        if not self.backward:
            return forward
        return list(zip(forward, [cell.params for cell in self.backward], strict=True))

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        states: Any = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        resets: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T width"], tuple[Any, ...]]:
        """The outputs of the top layer and the final states of all; see `rnnattn.stacked`."""
        dropping = self.dropout_rate > 0 and not self.deterministic
        return recurrent.stacked(
            self.forward[0].run,
            self.layers,
            x,
            states,
            lengths=lengths,
            mask=mask,
            resets=resets,
            residuals=self.residuals,
            implementation=self.implementation,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            candidate_dropout=self.candidate_dropout,
            key=self.rngs() if self._draws_in_steps and not self.deterministic else None,
            dropout_rate=self.dropout_rate if dropping else 0.0,
            dropout_key=self.rngs() if dropping else None,
        )


class LSTM(_Stack):
    """A stack of LSTM layers over sequences: `rnnattn.stacked_lstm` with weights of its own.

    Args:
        num_layers, bidirectional: how many layers; whether each runs in both directions and hands
            up both outputs.
        dropout_rate: the share of outputs dropped between layers, while training
            (`module.train()`, `module.eval()`).
        zoneout, recurrent_dropout, candidate_dropout: those of the unit, as `rnnattn.lstm`, drawn
            while training; otherwise zoneout is its expectation.
        residuals, implementation: those of `rnnattn.lstm`.
        options: those of `LSTMCell`; `projection_size` is R, the width h is projected to.
        rngs: streams `params` and, with anything drawn, `dropout`.
    Raises:
        ValueError: as `rnnattn.init_lstm` does, or `num_layers` is below 1.
    Example:
        >>> module = LSTM(3, 5, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 10)
    """

    cell = LSTMCell


class GRU(_Stack):
    """A stack of GRU layers over sequences: `rnnattn.stacked` with weights of its own.

    Args:
        options: those of `LSTM` here, and of `GRUCell`.
    Example:
        >>> module = GRU(3, 4, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 8)
    """

    cell = GRUCell


class RNN(_Stack):
    """A stack of plain recurrent layers over sequences: `rnnattn.stacked` with weights of its own.

    Args:
        options: those of `LSTM` here, and of `RNNCell`.
    Example:
        >>> module = RNN(3, 4, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 8)
    """

    cell = RNNCell


class LayerNormLSTM(_Stack):
    """A stack of layer-norm LSTM layers over sequences: `rnnattn.stacked` with weights of its own.

    Args:
        options: those of `LSTM` here, and of `LayerNormLSTMCell`.
    Example:
        >>> module = LayerNormLSTM(3, 4, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 8)
    """

    cell = LayerNormLSTMCell


class LayerNormGRU(_Stack):
    """A stack of layer-norm GRU layers over sequences: `rnnattn.stacked` with weights of its own.

    Args:
        options: those of `LSTM` here, and of `LayerNormGRUCell`.
    Example:
        >>> module = LayerNormGRU(3, 4, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 8)
    """

    cell = LayerNormGRUCell


class SLSTM(_Stack):
    """A stack of sLSTM layers over sequences: `rnnattn.stacked` with weights of its own.

    Args:
        options: those of `LSTM` here, and of `SLSTMCell`.
    Example:
        >>> module = SLSTM(3, 4, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 8)
    """

    cell = SLSTMCell
