"""What a recurrent unit is: the contract between its equations and the schedules that run them.

A unit states one step and the gradient of one step; when which part is computed, kept or computed
again is a matter of the schedules (`rnnattn.recurrent.problem`). They run

    forward     u = inputs(x)                           of many steps at once
                state, kept = step(u, h, state)         one after another
    backward    slopes = slopes(x, h, before, after)    of many steps at once
                d state, dh, dz = step_gradient(slopes, d state)        one after another
                d params, dx = gradient(x, h, before, after, dz)        of many steps at once

so that all that does not wait for the step before it is one product for many steps. Lengths,
resets, both directions, the residual policies, both orders of differentiation, 16 bits and several
devices are the schedules' matter: no unit has a line about them. Nor about zoneout; recurrent
dropout wants to know what of the state the products read, and that is h beside the state, which may
be a part of it: `rnnattn.recurrent.noise`.

Axes: B batch, D input width, H hidden width; what is said of "many steps at once" has T in front.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rnnattn.precision import accumulator
from rnnattn.recurrent.noise import NOTHING, QUIET, of_candidate, read, zoneout
from rnnattn.steps import select


class Unit(ABC):
    """The equations of a unit, with what of them is fixed when a function is traced.

    A frozen dataclass, equal to another of the same options. States are NamedTuples whose first
    field is h, what the unit gives out and the next layer reads.
    """

    @abstractmethod
    def widths(self, params: Any) -> Any:
        """The state's NamedTuple, with the width of each field."""

    @abstractmethod
    def kept_width(self, params: Any) -> int:
        """The width of what a step gives to keep, in the dtype of sums."""

    @abstractmethod
    def verify(self, check: Any, params: Any, D: Any) -> None:
        """Whether the parameters fit one another and inputs of width D; `ValueError` if not."""

    def prepare(self, params: Any) -> Any:
        """The weights as `inputs`, `step` and `slopes` read them; made once, before the loop."""
        return params

    def merged(self, weights: Any) -> Any:
        """The same for a step that is one product of [x, h], if the unit knows such a one."""
        return weights

    @abstractmethod
    def inputs(self, weights: Any, x: Any) -> Any:
        """u: what a step needs of x, (…, B, D)."""

    @abstractmethod
    def step(self, weights: Any, u: Any, h: Any, state: Any, e: Any = None) -> tuple[Any, Any]:
        """The state after a step, and what else of it may be kept for the gradient.

        Of many steps at once, too, if the states before them are known.

        Args:
            h: what the products read of the state's h, which is read by nothing else here.
            e: a factor of what is written of the candidate (`scaled`), or None; a unit without a
                candidate beside its state leaves it alone.
        """

    # whether there is a candidate: what a step writes, by a gate, to a memory that it may also keep
    candidate: ClassVar[bool] = True
    # the fields of the state that can keep their value apart from others, from the first on
    zoned_fields: ClassVar[int | None] = None

    @abstractmethod
    def slopes(
        self, weights: Any, x: Any, h: Any, before: Any, after: Any, kept: Any, e: Any
    ) -> tuple[Any, Any]:
        """What the gradient of each step needs besides what comes back to it; of many steps.

        Args:
            h, e: as in `step`.
            before, after: the states around each step, `after` as the step made it.
            kept: what `step` gave; None where it was not kept, and is computed from the states.
        Returns:
            slopes, for `step_gradient`; and what only `gradient` reads.
        """

    @abstractmethod
    def step_gradient(self, params: Any, slopes: Any, after: Any) -> tuple[Any, Any, Any]:
        """From the cotangent of the state after a step those of the state before it, of h, and dz.

        What the state's own h gets is 0 where nothing but the products reads it. `params` here and
        in `gradient` are in the dtype of sums, and not prepared.
        """

    @abstractmethod
    def gradient(
        self, params: Any, x: Any, h: Any, before: Any, after: Any, seen: Any, dz: Any
    ) -> tuple[Any, Any]:
        """The cotangents of params, summed over many steps, and of x, from dz of each step.

        Args:
            seen: the second result of `slopes`.
        """


def dot(x, w):
    """x w, summed in the dtype of sums."""
    return jnp.matmul(x, w, preferred_element_type=accumulator(x.dtype))


def along(row, x):
    """A row, (H,), with as many axes as x has."""
    return jnp.expand_dims(row, range(x.ndim - 1))


def affine(x, w, b):
    """x w + b, summed in the dtype of sums."""
    return dot(x, w) + along(b.astype(accumulator(x.dtype)), x)


def sigmoid(a):
    """σ(a), by one tanh."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * a)


def blocks_of(row, count):
    """The blocks of a row, (…, count · H)."""
    return jnp.split(row, count, axis=-1)


def joined(*blocks):
    """The row of these blocks."""
    return jnp.concatenate(blocks, axis=-1)


def outer(x, dz):
    """Σ xᵀ dz over time and batch, without one axis made of both: B may lie on several devices."""
    return jnp.tensordot(x.astype(dz.dtype), dz, ((0, 1), (0, 1)))


def select_each(condition, a, b):
    """`select` for each array of two trees; b may be one number for all."""
    if condition is None:
        return a
    if isinstance(b, int):
        return jax.tree.map(lambda x: select(condition, x, b), a)
    return jax.tree.map(lambda x, y: select(condition, x, y), a, b)


def advance(unit, weights, u, state, valid, fresh, noise=QUIET, drawn=NOTHING):
    """The state after a step, and what of it may be kept.

    valid, fresh: (B,) or None. A row that is not valid holds its state, a fresh one starts from 0.
    """
    start = state if fresh is None else select_each(~fresh, state, 0)
    h = read(noise, drawn.reads, start[0])
    e = of_candidate(noise, drawn.candidate, accumulator(h.dtype))
    made, kept = unit.step(weights, u, h, start, e)
    after = zoneout(noise, drawn.zoned, start, made)
    return select_each(valid, after, state), kept


def types_of_step(unit, params, rows, dtype):
    """The shapes and dtypes of what a step of so many rows gives: the state, and what to keep."""
    widths = unit.widths(params)
    array = lambda width, dtype: jax.ShapeDtypeStruct((rows, width), dtype)
    state = type(widths)(*map(array, widths, dtypes_of(widths, dtype)))
    return state, array(unit.kept_width(params), accumulator(dtype))


def dtypes_of(state, dtype):
    """Of the fields of a state: h is of the dtype of x, the rest of that of sums."""
    return [dtype] + [accumulator(dtype)] * (len(state) - 1)


def widened(params):
    """The parameters in the dtype of sums."""
    return jax.tree.map(lambda w: w.astype(accumulator(w.dtype)), params)


def full_state(unit, params, state, rows, dtype):
    """The initial state, (rows, …), h in a dtype and the rest in that of sums; None is zeros."""
    widths = unit.widths(params)
    dtypes = dtypes_of(widths, dtype)
    if state is None:
        like = jax.tree.leaves(params)[0]
        zeros = (
            jnp.zeros_like(like, d, shape=(rows, w)) for w, d in zip(widths, dtypes, strict=True)
        )
        return type(widths)(*zeros)
    flat = (s.reshape(rows, s.shape[-1]).astype(d) for s, d in zip(state, dtypes, strict=True))
    return type(widths)(*flat)
