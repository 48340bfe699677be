"""The LSTM as a cell and as a stack of layers; axes as in `rnnattn.nn`."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rnnattn.checks import Check
from rnnattn.precision import accumulator
from rnnattn.recurrent import LSTMParams, LSTMState, init_lstm, lstm_step, stacked_lstm


class LSTMCell(nnx.RNNCellBase):
    """The weights of one layer and direction; also a cell for `nnx.RNN`, carrying `LSTMState`.

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
        params = init_lstm(rngs.params(), input_size, hidden_size, **options)
        self.clip, self.coupled = clip, coupled
        self.w_x = nnx.Param(params.w_x)
        self.w_h = nnx.Param(params.w_h)
        self.b = nnx.Param(params.b)
        self.peephole = nnx.data(_optional_param(params.peephole))
        self.projection = nnx.data(_optional_param(params.projection))

    @property
    def params(self) -> LSTMParams:
        """The weights as the functions take them."""
        read = lambda weight: None if weight is None else weight[...]
        return LSTMParams(
            self.w_x[...], self.w_h[...], self.b[...], read(self.peephole), read(self.projection)
        )

    def __call__(
        self, carry: LSTMState, inputs: Float[Array, "*B D"]
    ) -> tuple[LSTMState, Float[Array, "*B R"]]:
        """One step: `rnnattn.lstm_step`."""
        state = lstm_step(self.params, inputs, carry, clip=self.clip, coupled=self.coupled)
        return state, state.h

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> LSTMState:
        """Zeros for inputs of `input_shape` (*B, D)."""
        R, H = self.w_h.shape[0], self.w_h.shape[1] // 4
        dtype = self.b.dtype
        leading = input_shape[:-1]
        return LSTMState(
            jnp.zeros((*leading, R), dtype), jnp.zeros((*leading, H), accumulator(dtype))
        )

    @property
    def num_feature_axes(self) -> int:
        """The axes of one input that are not batch."""
        return 1


class LSTM(nnx.Module):
    """A stack of LSTM layers over sequences: `rnnattn.stacked_lstm` with weights of its own.

    Args:
        bidirectional: each layer runs in both directions and hands up both outputs.
        dropout_rate: the share of outputs dropped between layers, while training
            (`module.train()`, `module.eval()`).
        projection_size: R, the width h is projected to; None for none.
        clip, coupled, residuals, implementation: those of `rnnattn.lstm`.
        options: the others of `rnnattn.init_lstm`.
        rngs: streams `params` and, with dropout, `dropout`.
    Raises:
        ValueError: as `rnnattn.init_lstm` does, or `num_layers` is below 1.
    Example:
        >>> module = LSTM(3, 5, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> y, states = module(jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 10)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        projection_size: int | None = None,
        clip: float | None = None,
        coupled: bool = False,
        residuals: Literal["gates", "states"] | int | None = None,
        implementation: Literal["xla", "native", "pallas", "cudnn"] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        Check("LSTM")(num_layers >= 1, "num_layers", "at least 1", num_layers)
        directions = 2 if bidirectional else 1
        width = directions * (hidden_size if projection_size is None else projection_size)
        options |= {"projection_size": projection_size, "clip": clip, "coupled": coupled}
        self.forward = nnx.List()
        self.backward = nnx.List()
        for size in [input_size] + [width] * (num_layers - 1):
            self.forward.append(LSTMCell(size, hidden_size, rngs=rngs, **options))
            if bidirectional:
                self.backward.append(LSTMCell(size, hidden_size, rngs=rngs, **options))
        self.clip, self.coupled = clip, coupled
        self.residuals, self.implementation = residuals, implementation
        self.dropout_rate = dropout_rate
        self.deterministic = False
        self.rngs = nnx.data(rngs["dropout"].fork() if dropout_rate > 0 else None)

    @property
    def layers(self) -> list[Any]:
        """The weights as `rnnattn.stacked_lstm` takes them."""
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
        resets: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T width"], tuple[Any, ...]]:
        """The outputs of the top layer and the final states of all; see `rnnattn.stacked_lstm`."""
        dropping = self.dropout_rate > 0 and not self.deterministic
        return stacked_lstm(
            self.layers,
            x,
            states,
            lengths=lengths,
            resets=resets,
            clip=self.clip,
            coupled=self.coupled,
            residuals=self.residuals,
            implementation=self.implementation,
            dropout_rate=self.dropout_rate if dropping else 0.0,
            dropout_key=self.rngs() if dropping else None,
        )


def _optional_param(weight):
    return None if weight is None else nnx.Param(weight)
