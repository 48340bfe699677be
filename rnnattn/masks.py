"""Which keys a query may see, and what logits become, as functions of positions.

For `mask_function` and `score_function` of `rnnattn.dot_product_attention`: b counts the rows of
the batch, n the query heads, t is the position of a query among the keys, `query_offset` counted
in, and s that of a key; all are integers that broadcast. Masks compose with `&`, `|` and `~`, with
one another and with functions of one's own:

    causal() & (window(left=1024) | sinks(4)) & document(ids)

Masks and score functions are pytrees of their arrays, so that they pass through `jax.jit`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rnnattn.checks import Check
from rnnattn.precision import accumulator

__all__ = [
    "Mask",
    "alibi",
    "alibi_slopes",
    "causal",
    "dilated",
    "document",
    "mapped",
    "prefix",
    "relative_bias",
    "sinks",
    "window",
]


class Mask:
    """A `mask_function` that composes with `&`, `|` and `~`: (b, n, t, s) → Boolean.

    Example:
        >>> mask = causal() & ~window(1)
        >>> [bool(mask(0, 0, 5, s)) for s in (3, 4, 5, 6)]
        [True, False, False, False]
    """

    def __call__(self, b: Any, n: Any, t: Any, s: Any) -> Any:
        raise NotImplementedError

    def __and__(self, other: Callable) -> "Mask":
        return And(self, as_mask(other))

    def __rand__(self, other: Callable) -> "Mask":
        return And(as_mask(other), self)

    def __or__(self, other: Callable) -> "Mask":
        return Or(self, as_mask(other))

    def __ror__(self, other: Callable) -> "Mask":
        return Or(as_mask(other), self)

    def __invert__(self) -> "Mask":
        return Not(self)


def _static() -> Any:
    """A field that is no array."""
    return field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(_static,))
def _tree(cls):
    """A frozen dataclass as a pytree of its fields, but for those that are static."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False, repr=False)(cls))


@_tree
class Where(Mask):
    """A function (b, n, t, s) → Boolean as a mask."""

    function: Callable = _static()

    def __call__(self, b, n, t, s):
        return self.function(b, n, t, s)


def as_mask(function: Callable) -> Mask:
    return function if isinstance(function, Mask) else Where(function)


@_tree
class And(Mask):
    """What both masks show."""

    left: Mask
    right: Mask

    def __call__(self, b, n, t, s):
        return self.left(b, n, t, s) & self.right(b, n, t, s)


@_tree
class Or(Mask):
    """What either mask shows."""

    left: Mask
    right: Mask

    def __call__(self, b, n, t, s):
        return self.left(b, n, t, s) | self.right(b, n, t, s)


@_tree
class Not(Mask):
    """What a mask hides."""

    mask: Mask

    def __call__(self, b, n, t, s):
        return ~jnp.asarray(self.mask(b, n, t, s))


@_tree
class Causal(Mask):
    """Made by `causal`."""

    def __call__(self, b, n, t, s):
        return jnp.asarray(s <= t)


@_tree
class Window(Mask):
    """Made by `window`."""

    left: int | None = _static()
    right: int | None = _static()

    def __call__(self, b, n, t, s):
        distance = jnp.asarray(s - t)
        shown = jnp.ones_like(distance, jnp.bool)
        if self.left is not None:
            shown = distance >= -self.left
        return shown if self.right is None else shown & (distance <= self.right)


@_tree
class Prefix(Mask):
    """Made by `prefix`; a length, or one for each row."""

    lengths: Any  # () or (B,)

    def of_row(self, b):
        return self.lengths if self.lengths.ndim == 0 else _at(self.lengths, b)

    def __call__(self, b, n, t, s):
        return s < self.of_row(b)


@_tree
class Document(Mask):
    """Made by `document`."""

    query_ids: Any  # (positions,) or (B, positions)
    key_ids: Any  # (S,) or (B, S)

    def ids_of_queries(self, b, t):
        return self._of(self.query_ids, b, t)

    def ids_of_keys(self, b, s):
        return self._of(self.key_ids, b, s)

    def _of(self, ids, b, place):
        return _at(ids, place) if ids.ndim == 1 else _at(ids, b, place)

    def __call__(self, b, n, t, s):
        return self.ids_of_queries(b, t) == self.ids_of_keys(b, s)


@_tree
class Dilated(Mask):
    """Made by `dilated`."""

    step: int = _static()

    def __call__(self, b, n, t, s):
        return jnp.asarray((t - s) % self.step == 0)


@_tree
class Sinks(Mask):
    """Made by `sinks`."""

    count: int = _static()

    def __call__(self, b, n, t, s):
        return jnp.asarray(s < self.count)


@_tree
class Mapped(Mask):
    """Made by `mapped`: a mask, and the blocks of queries and keys in which it shows anything."""

    mask: Mask
    blocks: Any  # (#B, #N, blocks of positions, blocks of keys)

    def __call__(self, b, n, t, s):
        return self.mask(b, n, t, s)


def _at(x, *places):
    """x at places that are not negative, and at its end past that."""
    return x.at[places].get(mode="clip", wrap_negative_indices=False)


def causal() -> Mask:
    """Keys up to the query's own position: s ≤ t.

    Gradient: none; so with all masks.
    Example:
        >>> bool(causal()(0, 0, 2, 3))
        False
    """
    return Causal()


def window(left: int | None = None, right: int | None = None) -> Mask:
    """Keys that lie at most `left` before a query's position and at most `right` behind it.

    Args:
        left, right: at least 0; None for all of a side.
    Raises:
        ValueError: a side is no such number.
    Example:
        >>> [bool(window(1, 0)(0, 0, 5, s)) for s in (3, 4, 5, 6)]
        [False, True, True, False]
    """
    check, expected = Check("masks.window"), "an integer of at least 0, or None"
    if left is not None:
        left = check.integer("left", left, 0, expected)
    if right is not None:
        right = check.integer("right", right, 0, expected)
    return Window(left, right)


def prefix(lengths: Int[Array, "..."] | int) -> Mask:
    """The first keys of a row: s < length. `causal() | prefix(lengths)` is a prefix-LM's mask.

    Args:
        lengths: a number, or one for each row, (B,).
    Raises:
        ValueError: they are no integers, or have more axes.
    Example:
        >>> bool((causal() | prefix(4))(0, 0, 1, 3))
        True
    """
    check = Check("masks.prefix")
    check.integers("lengths", lengths)
    check(jnp.ndim(lengths) < 2, "lengths", "a number or of shape (B,)", jnp.shape(lengths))
    return Prefix(jnp.asarray(lengths, jnp.int32))


def document(query_ids: Int[Array, "..."], key_ids: Int[Array, "..."] | None = None) -> Mask:
    """Keys of a query's own document, where the ids of both are the same.

    Args:
        query_ids: (positions,) or (B, positions), by the position t of a query: with a
            `query_offset`, those of all positions, not of the queries at hand.
        key_ids: (S,) or (B, S); None is `query_ids`.
    Raises:
        ValueError: they are no integers, or have no such axes.
    Example:
        >>> ids = jnp.array([[0, 0, 1]])
        >>> bool(document(ids)(0, 0, 2, 1))
        False
    """
    check = Check("masks.document")
    key_ids = query_ids if key_ids is None else key_ids
    for name, ids in {"query_ids": query_ids, "key_ids": key_ids}.items():
        check.integers(name, ids)
        check(jnp.ndim(ids) in (1, 2), name, "of shape (S,) or (B, S)", jnp.shape(ids))
    return Document(jnp.asarray(query_ids, jnp.int32), jnp.asarray(key_ids, jnp.int32))


def dilated(step: int) -> Mask:
    """Every `step`-th key from a query's position on, in both directions (Beltagy et al. 2020).

    Raises:
        ValueError: `step` is less than 1.
    Example:
        >>> [bool(dilated(2)(0, 0, 5, s)) for s in (3, 4, 5)]
        [True, False, True]
    """
    return Dilated(Check("masks.dilated").integer("step", step, 1))


def sinks(count: int) -> Mask:
    """The first `count` keys, which all queries see beside a window (Xiao et al. 2024).

    Raises:
        ValueError: `count` is negative.
    Example:
        >>> mask = causal() & (window(2) | sinks(1))
        >>> [bool(mask(0, 0, 9, s)) for s in (0, 1, 7, 9, 10)]
        [True, False, True, True, False]
    """
    return Sinks(Check("masks.sinks").integer("count", count, 0))


# ------------------------------------------------------------------------------------ maps of masks

MAP_BLOCK = 128  # positions of queries, and keys


def mapped(
    mask: Callable,
    query_length: int,
    key_length: int,
    *,
    batch: int | None = None,
    heads: int | None = None,
) -> Mapped:
    """The mask with a map of the blocks in which it shows anything, evaluated here and once.

    Attention skips blocks in which a mask shows nothing, and looks at every pair of a query and a
    key to find them: in each call, and again for the gradient. With a map none of them does. It
    pays where few blocks are left of many, and where a mask depends on rows or heads: make it
    before the layers, or before the steps, that share the mask. Masks that run as causality,
    windows, segments or one or two ranges of keys need no map, and `packed_attention`, pages
    and rings have no use for one. It holds under `&` with other masks, and is lost under `|` and
    `~`.

    Args:
        mask: a mask, or a function (b, n, t, s) → Boolean.
        query_length: positions of queries, from 0 on, that the map knows: T, or as far as T with
            a `query_offset` gets. Blocks beyond are looked at.
        key_length: S.
        batch, heads: B and N, where the mask depends on the row or the head.
    Returns:
        The mask, with Booleans (#B, #N, ⌈query_length / 128⌉, ⌈key_length / 128⌉).
    Raises:
        ValueError: the mask gives no Boolean, or depends on rows or heads that are not counted; a
            number is less than 1. In attention: the map is of other rows, heads or keys, or of
            fewer queries.
    Example:
        >>> mask = mapped(causal() & dilated(2), 300, 300)
        >>> mask.blocks[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    check = Check("masks.mapped")
    check(callable(mask), "mask", "a function", repr(mask))
    place = jax.ShapeDtypeStruct((), jnp.int32)
    result = jax.eval_shape(mask, *[place] * 4)
    holds = (getattr(result, "shape", None), getattr(result, "dtype", None)) == ((), jnp.bool)
    check(holds, "mask", "a function that gives a Boolean of integers", result)
    lengths = {"query_length": query_length, "key_length": key_length}
    sizes = [-(-check.integer(name, n, 1) // MAP_BLOCK) for name, n in lengths.items()]
    counts = {"batch": batch, "heads": heads}
    for axis, (name, count) in enumerate(counts.items()):
        expected = f"given, as the mask depends on {('the row', 'the head')[axis]}"
        check(count is not None or not _depends(mask, axis), name, expected, None)
        counts[name] = 1 if count is None else check.integer(name, count, 1)
    mask = as_mask(mask)
    return Mapped(mask, _blocks(mask, (*counts.values(), *sizes)))


def _depends(mask, axis):
    """Whether a mask depends on one of its arguments."""
    of_one = lambda x: mask(*(x if n == axis else jnp.int32(0) for n in range(4)))
    try:
        jax.eval_shape(jax.vmap(of_one, out_axes=None), jax.ShapeDtypeStruct((1,), jnp.int32))
    except ValueError:  # of an axis that the result has and should not have
        return True
    return False


@partial(jax.jit, static_argnums=1)
def _blocks(mask, sizes):
    """Where a mask shows anything, by rows, heads, and blocks of queries and keys."""
    B, N, queries, keys = sizes
    rows, heads, within = (jnp.arange(n, dtype=jnp.int32) for n in (B, N, MAP_BLOCK))
    for axis in reversed(range(4)):
        mask = jax.vmap(mask, [0 if n == axis else None for n in range(4)])

    def of_pair(pair):
        t, s = (MAP_BLOCK * n + within for n in (pair // keys, pair % keys))
        return jnp.any(mask(rows, heads, t, s), (2, 3))

    pairs = jnp.arange(queries * keys, dtype=jnp.int32)
    return jnp.moveaxis(jax.lax.map(of_pair, pairs).reshape(queries, keys, B, N), (2, 3), (0, 1))


# ---------------------------------------------------------------------------------- score functions


class ByDistance:
    """A `score_function` that adds what depends on the head and the distance s − t alone.

    Schedules then may do with a number for each distance.
    """

    @property
    def heads(self) -> int:
        """N."""
        raise NotImplementedError

    def bias(self, n: Any, distance: Any, dtype: Any) -> Any:
        raise NotImplementedError

    def __call__(self, logit: Any, b: Any, n: Any, t: Any, s: Any) -> Any:
        return logit + self.bias(n, s - t, logit.dtype)


@_tree
class ALiBi(ByDistance):
    """Made by `alibi`."""

    slopes: Any  # (N,)

    @property
    def heads(self):
        return self.slopes.shape[-1]

    def bias(self, n, distance, dtype):
        return -_at(self.slopes, n).astype(dtype) * jnp.asarray(abs(distance), dtype)


@_tree
class RelativeBias(ByDistance):
    """Made by `relative_bias`: of the distances s − t, the farthest of either side shared."""

    by_distance: Any  # (distances, N)

    @property
    def heads(self):
        return self.by_distance.shape[-1]

    def bias(self, n, distance, dtype):
        farthest = self.by_distance.shape[0] // 2
        place = jnp.clip(distance, -farthest, farthest) + farthest
        return _at(self.by_distance, place, n).astype(dtype)


def alibi(slopes: Float[Array, " N"]) -> Callable:
    """A `score_function` that takes slope · |t − s| from a logit (Press et al. 2022).

    Args:
        slopes: (N,), of each query head; see `alibi_slopes`.
    Raises:
        ValueError: they are of another shape or dtype. In attention: of another number of heads.
    Gradient:
        With respect to the slopes.
    Example:
        >>> float(alibi(jnp.array([0.5]))(jnp.array(1.0), 0, 0, 5, 3))
        0.0
    """
    check = Check("masks.alibi")
    check(jnp.ndim(slopes) == 1, "slopes", "of shape (N,)", jnp.shape(slopes))
    check.floating("slopes", slopes)
    return ALiBi(_wide(slopes))


def alibi_slopes(heads: int) -> Float[Array, " N"]:
    """The slopes of Press et al. 2022: 2^(−8 n / N) for n = 1 … N, where N is a power of two.

    Else those of the next smaller power, and between them those of the next larger one.

    Raises:
        ValueError: there is no head.
    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    heads = Check("masks.alibi_slopes").integer("heads", heads, 1)
    of_power = lambda power: [2 ** (-8 * (n + 1) / power) for n in range(power)]
    power = 2 ** int(math.log2(heads))
    return jnp.array((of_power(power) + of_power(2 * power)[::2])[:heads], jnp.float32)


def relative_bias(
    table: Float[Array, "buckets N"], *, bidirectional: bool = True, max_distance: int = 128
) -> Callable:
    """A `score_function` that adds a learned bias of the distance's bucket (Raffel et al. 2020).

    Args:
        table: (buckets, N), as T5's `relative_attention_bias.weight`. (T5 leaves logits unscaled:
            `scale=1.0`.)
        bidirectional: half of the buckets is for keys behind the query; else these share the
            bucket of the query's own position, as in a decoder.
        max_distance: from here on all keys of a side share one bucket.
    Raises:
        ValueError: the table has another shape or dtype, or its buckets do not reach that far. In
            attention: it is of another number of heads.
    Gradient:
        With respect to the table, without an array of queries and keys.
    Example:
        >>> bias = relative_bias(jnp.arange(8.0)[:, None])
        >>> [float(bias(jnp.array(0.0), 0, 0, 5, s)) for s in (5, 4, 0, 6)]
        [0.0, 1.0, 2.0, 5.0]
    """
    check = Check("masks.relative_bias")
    check.axes("table", table, "(buckets, N)")
    check.floating("table", table)
    buckets = jnp.shape(table)[0]
    least = 4 if bidirectional else 2
    check.multiple("table", buckets, least, f"{least} buckets")
    max_distance = check.integer(
        "max_distance", max_distance, buckets // least + 1, f"above {buckets // least}, an integer"
    )
    return RelativeBias(_by_distance(_wide(table), bool(bidirectional), max_distance))


def _wide(x):
    """Floats in a dtype that their gradient can be summed in."""
    x = jnp.asarray(x)
    return x.astype(accumulator(x.dtype))


@partial(jax.jit, static_argnums=(1, 2))
def _by_distance(table, bidirectional, max_distance):
    """The table's rows for s − t from −max_distance to max_distance."""
    distance = jnp.arange(-max_distance, max_distance + 1, dtype=jnp.int32)
    buckets = table.shape[0]
    side = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    # as far as `exact` each distance has its own, and then they grow with its logarithm
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact)
    ratio = ratio / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    bucket = jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))
    return table[side + bucket]
