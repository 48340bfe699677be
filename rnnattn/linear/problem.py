"""What a schedule of a linear recurrence is given, and what it gives.

Axes: B batch, T time, H width; arrays of steps are (B, T, …), or (T, B, …) with `time_major`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rnnattn.linear.equations import Unit


class Options(NamedTuple):
    """What is fixed when a function is traced."""

    unit: Unit
    reverse: bool = False
    time_major: bool = False

    @property
    def time_axis(self):
        return 0 if self.time_major else 1


class Steps(NamedTuple):
    """What the steps read besides the state; None where a feature is not used."""

    inputs: tuple[Array, ...]  # (B, T, n H), the blocks of the unit side by side
    valid: Array | None  # (B, T); False where a step is masked: the state is held
    fresh: Array | None  # (B, T); True where the state is zeroed before the step


class Schedule(NamedTuple):
    """A way to run the equations over time: two functions.

    `forward(options, weights, h0, steps)` gives h of every step, (B, T, H) in the dtype of the
    inputs, that of a masked step being the one before it, and h after the last step.
    `backward(options, weights, h0, steps, h, cotangents)` gives, of those of both, the gradients of
    the weights row by row, (B, n, H), of h0 and of the inputs. The weights, (n, H) and the same for
    all steps, h0, (B, H), h after the last step and their gradients are in the dtype that sums
    have. What the inputs and the cotangents of masked steps hold reaches nothing.
    """

    forward: Callable
    backward: Callable


def found(x, start, axis, reverse):
    """What each step of a run finds: x of the step before it; the first one finds `start`."""
    T = x.shape[axis]
    if reverse:
        return jnp.concatenate([lax.slice_in_dim(x, 1, T, axis=axis), start], axis)
    return jnp.concatenate([start, lax.slice_in_dim(x, 0, T - 1, axis=axis)], axis)


def running(join, tree, nothing, axis, reverse):
    """Of each step, all that a run has up to it joined, by an associative function of two trees.

    Args:
        nothing: numbers that, joined with a step of the arrays, leave it as it is.
    """
    if isinstance(jax.tree.leaves(tree)[0].shape[axis], int):
        return lax.associative_scan(join, tree, axis=axis, reverse=reverse)

    def step(before, x):
        joined = join(before, x)
        return joined, joined

    steps = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), tree)
    start = jax.tree.map(lambda x, fill: jnp.full_like(x[0], fill), steps, nothing)
    _, joined = lax.scan(step, start, steps, reverse=reverse)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), joined)
