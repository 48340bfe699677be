"""What a schedule of attention is given, and what it gives: one problem, in one of two layouts.

Axes: B batch, T queries, S keys, M key/value heads, G query heads to one of them, K head width, V
value width. Head n of the N = M G query heads is (n // G, n % G).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Options(NamedTuple):
    """What is fixed when a function is traced."""

    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None  # keys to the left and right of a query
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    bias_gradient: bool = True  # that of a (T, S) bias is the one thing as large as the logits
    scale_gradient: bool = True  # a pass over the logits
    keeps_o: bool = True  # for the gradient, in the accumulator's dtype
    lse_gradient: bool = True  # that which comes back to L, where libraries take none
    scale: float | None = None  # the operand's value, for a library that has to know it
    mask_function: Any = None  # as `rnnattn.attention.functions` traced it
    score_function: Any = None
    score_gradient: bool = True  # of what the score function closes over


class Operands(NamedTuple):
    """What has a gradient. An axis of `bias` is 1 where it is shared."""

    query: Float[Array, "B M G T K"]
    key: Float[Array, "B M S K"]
    value: Float[Array, "B M S V"]
    scale: Float[Array, "#B #M #G 1 1"] | None  # wide; None only for a gradient nobody asked for
    bias: Float[Array, "#B #M #G #T #S"] | None = None
    sinks: Float[Array, "1 M G 1"] | None = None
    score_arrays: tuple[Array, ...] | None = None  # floats that the score function closes over


class Functions(NamedTuple):
    """What is known of places, and what functions of them close over besides `score_arrays`."""

    rows: Int[Array, " B"]  # the numbers of the batch rows at hand, among all
    heads: Int[Array, "M G"]
    of_mask: tuple[Array, ...] = ()
    of_score: tuple[Array, ...] = ()
    maps: tuple[Bool[Array, "#B #N positions keys"], ...] = ()  # in blocks: see `masks.mapped`
    blocks: Bool[Array, "#B #M blocks blocks"] | None = None  # of queries and keys that meet


class Masking(NamedTuple):
    """Who may see whom, and what is dropped; None where it is not used."""

    offset: Int[Array, " #B"]  # query t stands at position t + offset among the keys
    mask: Bool[Array, "#B #M #G #T #S"] | None = None
    query_lengths: Int[Array, " B"] | None = None
    key_lengths: Int[Array, " B"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    dropout_keys: PRNGKeyArray | None = None  # (B, M, G)
    # [first, past), in place of position and lengths; or two such that have no key in common, as 4
    key_ranges: Int[Array, "B T bounds"] | None = None
    functions: Functions | None = None
    corner: Int[Array, "1 2"] | None = None  # the numbers of the first query and key, if not 0


class Schedule(NamedTuple):
    """A way to run the equations: four functions.

    Each takes (options, operands, masking, …). `enter` brings the operands from the layout of the
    arguments, where a query is (B, T, M, G, K), a key (B, S, M, K) and a value (B, S, M, V), into
    the one that the schedule reads, and zeroes what may be NaN and must reach nothing. `forward`
    gives O and L in the accumulator's dtype; an O that is not kept may have that of the values.
    `backward` gives, of O, L, dO and dL, the gradient of the operands, in the accumulator's dtype
    or their own, None where nobody asked. `leave` takes O and L back: O (B, T, M, G, V), L (B, M,
    G, T).
    """

    enter: Callable
    forward: Callable
    backward: Callable
    leave: Callable
