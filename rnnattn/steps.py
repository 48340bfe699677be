"""What primitives over sequences of steps have in common: axes, and checks of their arguments.

Axes: B batch, which may be absent, or several axes; T time, D input width, H hidden width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rnnattn.checks import Check
from rnnattn.precision import accumulator


def batch_of(x: Any, time_major: bool) -> tuple[Any, ...]:
    """The sizes of the axes of x (*B, T, D), or (T, *B, D), besides time and width."""
    return x.shape[1:-1] if time_major else x.shape[:-2]


def select(condition: Any, a: Any, b: Any) -> Any:
    """`jnp.where` with a condition (…) on arrays (…, width); no condition chooses `a`."""
    return a if condition is None else jnp.where(condition[..., None], a, b)


def check_steps(check: Check, name: str, x: Any, time_major: bool, width: str = "D") -> None:
    """An array of steps of numbers."""
    expected = f"of shape (T, *B, {width})" if time_major else f"of shape (*B, T, {width})"
    check(x.ndim >= 2, name, expected, x.shape)
    check.floating(name, x)


def check_step(check: Check, name: str, x: Any) -> None:
    """An array of one step of numbers."""
    check(x.ndim >= 1, name, "of shape (*B, D)", x.shape)
    check.floating(name, x)


def checked_masks(
    check: Check, x: Any, lengths: Any, mask: Any, resets: Any, time_major: bool
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Lengths of the rows of x, and what its steps are marked with, as arrays."""
    array = lambda x: None if x is None else jnp.asarray(x)
    lengths, mask, resets = map(array, (lengths, mask, resets))
    batch = batch_of(x, time_major)
    axes = ("", "B", "*B")[min(len(batch), 2)]
    if lengths is not None:
        check.shape("lengths", lengths, batch, f"({axes},)" if batch else "()")
        check.integers("lengths", lengths)
    inner = ("T", axes) if time_major else (axes, "T")
    named = ", ".join(name for name in inner if name)
    for name, marks in {"mask": mask, "resets": resets}.items():
        if marks is not None:
            check.shape(name, marks, x.shape[:-1], f"({named})" if batch else "(T,)")
            check.booleans(name, marks)
    return lengths, mask, resets


def check_rows(
    check: Check, name: str, s: Any, shape: tuple[Any, ...], like: Any, letter: str = "H"
) -> None:
    """A part of a state, of shape (*B, H), in the dtype of x or in that of its sums."""
    axes = ("", "B, ", "*B, ")[min(len(shape) - 1, 2)]
    check.shape(name, s, shape, f"({axes}{letter})")
    dtype, wide = jnp.result_type(like), accumulator(jnp.result_type(like))
    check(s.dtype in (dtype, wide), name, f"of dtype {wide.name}", s.dtype.name)
