"""What type checkers are told of attention: its options, and what is returned for which of them."""

from collections.abc import Callable, Sequence
from typing import (
    Any,
    Literal,
    Protocol,
    SupportsFloat,
    SupportsIndex,
    TypedDict,
    Unpack,
    cast,
    overload,
    runtime_checkable,
)

from jaxtyping import Array, Float, Int, PRNGKeyArray

Implementation = Literal["dense", "blockwise", "xla", "native", "pallas", "cudnn", "tokamax"]
Window = SupportsIndex | Sequence[SupportsIndex | None]


class AttentionOptions(TypedDict, total=False):
    """Options of `rnnattn.dot_product_attention`, but for what it returns besides the output."""

    scale: float | Float[Array, "..."] | None
    is_causal: bool
    query_seq_lengths: Int[Array, "..."] | None
    key_value_seq_lengths: Int[Array, "..."] | None
    local_window_size: Window | None
    implementation: Implementation | None
    query_offset: SupportsIndex | Int[Array, "..."]
    query_segment_ids: Int[Array, "..."] | None
    key_value_segment_ids: Int[Array, "..."] | None
    logits_soft_cap: SupportsFloat | None
    sinks: Float[Array, " N"] | None
    dropout_rate: SupportsFloat
    dropout_key: PRNGKeyArray | None
    mask_function: Callable | None
    score_function: Callable | None


@runtime_checkable
class AttentionFunction(Protocol):
    """An array, or a tuple where L or the weights are asked for."""

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        return_residual: Literal[False] = False,
        return_weights: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        return_residual: Literal[True],
        return_weights: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        return_residual: Literal[False] = False,
        return_weights: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        return_residual: Literal[True],
        return_weights: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[Array, Array, Array]: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        return_residual: bool = False,
        return_weights: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> Any: ...


def typed(function: Any) -> AttentionFunction:
    """The function itself, of this type."""
    return cast(AttentionFunction, function)
