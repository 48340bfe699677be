"""Units without a product in the loop, as layers; axes as in `rnnattn.nn`."""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import rnnattn.linear as linear
from rnnattn.nn.weights import Held


class _Layer(Held):
    """The weights of a unit, and its sequence."""

    def _begin(self, params, implementation):
        self.hold(params)
        self.implementation = implementation

    def _run(self) -> Any:
        """The unit over a sequence."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        h: Float[Array, "*B H"] | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        resets: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T H"], Float[Array, "*B H"]]:
        """The outputs of all steps, and the last h; see the unit's function."""
        masks: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        return self._run()(self.params, x, h, implementation=self.implementation, **masks)


class MinGRU(_Layer):
    """A minGRU over sequences: `rnnattn.mingru` with weights of its own.

    Args:
        implementation: that of `rnnattn.mingru`.
        options: those of `rnnattn.init_mingru`.
    Example:
        >>> import jax.numpy as jnp
        >>> module = MinGRU(3, 5, rngs=nnx.Rngs(0))
        >>> y, h = module(jnp.ones((2, 7, 3)))
        >>> y.shape, h.shape
        ((2, 7, 5), (2, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        implementation: Literal["xla", "native"] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        params = linear.init_mingru(rngs.params(), input_size, hidden_size, **options)
        self._begin(params, implementation)

    def _run(self):
        return linear.mingru


class MinLSTM(_Layer):
    """A minLSTM over sequences: `rnnattn.minlstm` with weights of its own.

    Args:
        implementation: that of `rnnattn.minlstm`.
        options: those of `rnnattn.init_minlstm`.
    Example:
        >>> import jax.numpy as jnp
        >>> module = MinLSTM(3, 5, forget_bias=1.0, rngs=nnx.Rngs(0))
        >>> y, h = module(jnp.ones((2, 7, 3)))
        >>> y.shape, h.shape
        ((2, 7, 5), (2, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        implementation: Literal["xla", "native"] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        params = linear.init_minlstm(rngs.params(), input_size, hidden_size, **options)
        self._begin(params, implementation)

    def _run(self):
        return linear.minlstm


class RGLRU(_Layer):
    """An RG-LRU over sequences: `rnnattn.rglru` with weights of its own, without Griffin's block.

    Args:
        implementation: that of `rnnattn.rglru`.
        options: those of `rnnattn.init_rglru`.
    Example:
        >>> import jax.numpy as jnp
        >>> module = RGLRU(6, num_blocks=2, rngs=nnx.Rngs(0))
        >>> y, h = module(jnp.ones((2, 7, 6)))
        >>> y.shape, h.shape
        ((2, 7, 6), (2, 6))
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        implementation: Literal["xla", "native"] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self._begin(linear.init_rglru(rngs.params(), hidden_size, **options), implementation)

    def _run(self):
        return linear.rglru
