"""One recurrent unit with a linear map on either side, for any of the library's units.

    y = unit(x W_in),   answers = y W + b

so that units are compared with as many parameters each, and those whose input and state are of one
width (the RG-LRU) are among them.

Axes: B batch, T time, D input width, E what the unit reads, H its width, O answers.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import rnnattn

Unit = Literal[
    "lstm", "gru", "rnn", "layer_norm_lstm", "layer_norm_gru", "slstm", "mingru", "minlstm", "rglru"
]
UNITS: tuple[Unit, ...] = get_args(Unit)


class UnitParams(NamedTuple):
    """Weights of the model."""

    w_in: Float[Array, "D E"]
    unit: Any
    w: Float[Array, "H O"]
    b: Float[Array, " O"]


def init_unit(
    key: PRNGKeyArray, unit: Unit, inputs: int, read: int, width: int, answers: int
) -> UnitParams:
    """Random weights: the library's for the unit, variance one over the width of what is read."""
    in_key, unit_key, out_key = jax.random.split(key, 3)
    if unit == "rglru":
        read, of_unit = width, rnnattn.init_rglru(unit_key, width, num_blocks=1, dtype=jnp.float32)
    else:
        of_unit = getattr(rnnattn, f"init_{unit}")(unit_key, read, width, dtype=jnp.float32)
    w_in = jax.random.normal(in_key, (inputs, read), jnp.float32) / inputs**0.5
    w = jax.random.normal(out_key, (width, answers), jnp.float32) / width**0.5
    return UnitParams(w_in, of_unit, w, jnp.zeros((answers,), jnp.float32))


def size(params: PyTree) -> int:
    """How many numbers there are."""
    return sum(w.size for w in jax.tree.leaves(params))


def width_like(unit: Unit, inputs: int, read: int, answers: int, count: int) -> int:
    """The width, of multiples of four, with which a model has at most `count` parameters."""

    def of(width: int) -> int:
        init: Callable[[PRNGKeyArray], UnitParams] = lambda key: init_unit(
            key, unit, inputs, read, width, answers
        )
        return size(jax.eval_shape(init, jax.random.key(0)))

    return 4 * max(bisect_right(range(1, 2**22), count, key=lambda n: of(4 * n)), 1)


def answers(unit: Unit, params: UnitParams, x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
    """What the model answers after each step."""
    return _outputs(unit, params, x) @ params.w + params.b[None, None]


def last_answer(unit: Unit, params: UnitParams, x: Float[Array, "B T D"]) -> Float[Array, "B O"]:
    """What it answers after the last step."""
    return _outputs(unit, params, x)[:, -1] @ params.w + params.b[None]


def _outputs(unit, params, x):
    y, *_ = getattr(rnnattn, unit)(params.unit, x @ params.w_in)
    return y
