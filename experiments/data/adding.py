"""Sequences of the adding problem: values, two of which are marked, and the sum of those."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field

from experiments.engine.config import Size

CONSTANT_MSE = 1 / 6
"""Loss of the constant answer."""


@dataclass(frozen=True)
class DataConfig:
    """Sequences; training draws new ones at every step."""

    length: Annotated[Size, Field(ge=2)] = 10
    """Steps in a sequence."""
    held_out: Size = 64
    """Sequences in the validation set, and in the test set."""


class Sums(NamedTuple):
    """Sequences of (value, mark), and the sums of their marked values."""

    x: Float[Array, "B T 2"]
    sums: Float[Array, " B"]


def abstract_sums(size: int, length: int, dtype: str) -> Sums:
    """The shapes and dtypes of what `draw_sums` draws."""
    return jax.eval_shape(
        lambda: Sums(jnp.zeros((size, length, 2), dtype), jnp.zeros((size,), dtype))
    )


@partial(jax.jit, static_argnums=(1, 2, 3))
def draw_sums(key: PRNGKeyArray, size: int, length: int, dtype: str) -> Sums:
    """`size` random sequences with their sums."""
    value_key, first_key, second_key = jax.random.split(key, 3)
    values = jax.random.uniform(value_key, (size, length), jnp.dtype(dtype))
    first = jax.random.randint(first_key, (size,), 0, length // 2, jnp.int32)
    second = jax.random.randint(second_key, (size,), length // 2, length, jnp.int32)
    marks = jax.nn.one_hot(first, length, dtype=values.dtype)
    marks += jax.nn.one_hot(second, length, dtype=values.dtype)
    return Sums(jnp.stack([values, marks], axis=-1), jnp.sum(values * marks, axis=-1))
