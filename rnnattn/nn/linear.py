"""Units without a product in the loop, as layers; axes as in `rnnattn.nn`."""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rnnattn.linear import (
    MinGRUParams,
    MinLSTMParams,
    RGLRUParams,
    init_mingru,
    init_minlstm,
    init_rglru,
    mingru,
    minlstm,
    rglru,
)


class MinGRU(nnx.Module):
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
        params = init_mingru(rngs.params(), input_size, hidden_size, **options)
        self.implementation = implementation
        self.w_x = nnx.Param(params.w_x)
        self.b = nnx.Param(params.b)

    @property
    def params(self) -> MinGRUParams:
        """The weights as the functions take them."""
        return MinGRUParams(self.w_x[...], self.b[...])

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        h: Float[Array, "*B H"] | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        resets: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T H"], Float[Array, "*B H"]]:
        """The outputs of all steps, and the last h; see `rnnattn.mingru`."""
        masks: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        return mingru(self.params, x, h, implementation=self.implementation, **masks)


class MinLSTM(nnx.Module):
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
        params = init_minlstm(rngs.params(), input_size, hidden_size, **options)
        self.implementation = implementation
        self.w_x = nnx.Param(params.w_x)
        self.b = nnx.Param(params.b)

    @property
    def params(self) -> MinLSTMParams:
        """The weights as the functions take them."""
        return MinLSTMParams(self.w_x[...], self.b[...])

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        h: Float[Array, "*B H"] | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        resets: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T H"], Float[Array, "*B H"]]:
        """The outputs of all steps, and the last h; see `rnnattn.minlstm`."""
        masks: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        return minlstm(self.params, x, h, implementation=self.implementation, **masks)


class RGLRU(nnx.Module):
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
        params = init_rglru(rngs.params(), hidden_size, **options)
        self.implementation = implementation
        self.w_r = nnx.Param(params.w_r)
        self.w_i = nnx.Param(params.w_i)
        self.b_r = nnx.Param(params.b_r)
        self.b_i = nnx.Param(params.b_i)
        self.decay = nnx.Param(params.decay)

    @property
    def params(self) -> RGLRUParams:
        """The weights as the functions take them."""
        weights = self.w_r, self.w_i, self.b_r, self.b_i, self.decay
        return RGLRUParams(*(weight[...] for weight in weights))

    def __call__(
        self,
        x: Float[Array, "*B T H"],
        h: Float[Array, "*B H"] | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        resets: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T H"], Float[Array, "*B H"]]:
        """The outputs of all steps, and the last h; see `rnnattn.rglru`."""
        masks: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        return rglru(self.params, x, h, implementation=self.implementation, **masks)
