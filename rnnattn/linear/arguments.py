"""From the arguments of a linear recurrence, checked, to what its rule is given."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rnnattn.checks import Check
from rnnattn.linear.equations import MinGRUParams, RGLRUParams
from rnnattn.linear.problem import found, running
from rnnattn.meshes import in_parts
from rnnattn.precision import accumulator, varying_together
from rnnattn.steps import batch_of, check_rows, check_step, check_steps, checked_masks


class Arguments(NamedTuple):
    """Of a sequence, as arrays; x is what steps read, an array or a tuple of some."""

    params: Any
    x: Any
    h0: Array | None
    lengths: Array | None
    mask: Array | None
    resets: Array | None


def width_of(params, x):
    """H; `linear_scan` has no weights, and its x are a and b."""
    return params.hidden_size if params else x[0].shape[-1]


def at_start(options, params, x, h0, lengths, mask, resets):
    """What the rule and the twin begin with, in rows, and the axes that the rows had."""
    given = varying_together((params, x, h0, lengths, mask, resets))
    params, x, h0, lengths, mask, resets = given
    batch = batch_of(jax.tree.leaves(x)[0], options.time_major)
    front, B = int(options.time_major), math.prod(batch)

    def rows(x):
        """(*B, T, …) → (B, T, …), or (T, *B, …) → (T, B, …)."""
        return x.reshape(*x.shape[:front], B, *x.shape[front + len(batch) :])

    if len(batch) != 1:
        x, mask, resets = jax.tree.map(rows, (x, mask, resets))
        lengths = None if lengths is None else lengths.reshape(B)
    one, H = jax.tree.leaves(x)[0], width_of(params, x)
    wide = accumulator(one.dtype)
    start = jnp.zeros_like(one, wide, shape=(B, H)) if h0 is None else h0.astype(wide)
    masks = masks_of(options, one, lengths, mask, resets)
    return params, x, start.reshape(B, H), masks, batch


def at_the_end(options, y, last, h0, batch):
    """y and the last h in the axes that were given, and the latter in the dtype of h0."""
    if len(batch) != 1:
        front = y.shape[: int(options.time_major)]
        y = y.reshape(*front, *batch, *y.shape[len(front) + 1 :])
        last = last.reshape(*batch, last.shape[-1])
    return y, last if h0 is None else last.astype(h0.dtype)


def masks_of(options, x, lengths, mask, resets):
    """Which steps of x (B, T, …), or (T, B, …), are valid, and which find a state of zero."""
    if x.shape[options.time_axis] == 0:
        return None, None
    axis = options.time_axis
    valid = mask
    if lengths is not None:
        steps = lax.broadcasted_iota(jnp.int32, x.shape[:2], axis)
        within = steps < jnp.expand_dims(lengths.astype(jnp.int32), axis)
        valid = within if mask is None else mask & within
    return valid, None if resets is None else fresh_steps(valid, resets, axis, options.reverse)


def fresh_steps(valid, resets, axis, reverse):
    """The valid steps before which an episode begins, or, run in reverse, after which one does.

    A mark on a masked step is one on the valid step after it in time, and without such a step none.
    In a run it so passes on to the next valid step: to one with more marks up to it than up to the
    valid step before it.
    """
    if reverse:  # the step run after an episode's first is the last of the episode before
        if valid is not None:
            resets = resets & running(jnp.logical_or, valid, False, axis, True)
        resets = found(resets, jnp.zeros_like(lax.index_in_dim(resets, 0, axis)), axis, True)
    if valid is None:
        return resets
    marks = running(jnp.add, resets.astype(jnp.int32), 0, axis, reverse)
    seen = running(jnp.maximum, jnp.where(valid, marks, 0), 0, axis, reverse)
    none = jnp.zeros_like(lax.index_in_dim(seen, 0, axis))
    return valid & (marks > found(seen, none, axis, reverse))


def on_mesh(function, run, time_major, arguments):
    """`run(**arguments)`; with explicit axes, in parts of rows."""
    given = arguments._asdict()
    call = lambda given: run(**given)
    if len(batch_of(jax.tree.leaves(arguments.x)[0], time_major)) != 1:
        return call(given)
    steps = "TB" if time_major else "BT"
    axes = {"params": "", "x": steps + "D", "h0": "BH", "lengths": "B"}
    axes |= {"mask": steps, "resets": steps}
    results, whole = (steps + "H", "BH"), {"T": "time"}
    return in_parts(Check(function), call, given, axes, results, divided="B", whole=whole)


# ---- checks -----------------------------------------------------------------------------------


def checked_pair(function, a, b, h0, lengths, mask, resets, time_major):
    """The arguments of `linear_scan` as arrays; `ValueError` for the first that is off."""
    check = Check(function)
    a, b = check.array("a", a), check.array("b", b)
    check_steps(check, "a", a, time_major, "H")
    check(a.shape[-1] > 0, "a", "of a width H of at least 1", a.shape)
    shape = "(T, *B, H)" if time_major else "(*B, T, H)"
    check.shape("b", b, a.shape, shape)
    check.dtype_of("b", b, "a", a)
    batch = batch_of(a, time_major)
    h0 = _checked_state(check, "h0", h0, batch, a.shape[-1], a)
    masks = checked_masks(check, a, lengths, mask, resets, time_major)
    return Arguments((), (a, b), h0, *masks)


def checked_sequence(function, params, x, h, lengths, mask, resets, time_major):
    """The arguments of a unit as arrays; `ValueError` for the first that is off."""
    check = Check(function)
    x = check.array("x", x)
    check_steps(check, "x", x, time_major)
    _check_params(check, params, x)
    h = _checked_state(check, "h", h, batch_of(x, time_major), params.hidden_size, x)
    return Arguments(params, x, h, *checked_masks(check, x, lengths, mask, resets, time_major))


def checked_step(function, params, x, h):
    """The arguments of a single step as those of a sequence of one, time-major."""
    check = Check(function)
    x = check.array("x", x)
    check_step(check, "x", x)
    _check_params(check, params, x)
    h = _checked_state(check, "h", h, x.shape[:-1], params.hidden_size, x)
    return Arguments(params, x[None], h, None, None, None)


def _check_params(check, params, x):
    """Weights that fit together and x."""
    D = x.shape[-1]
    if isinstance(params, RGLRUParams):
        shape = jnp.shape(params.w_r)
        fits = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == D
        check(fits, "params.w_r", f"of shape (G, K, K) where G K is the width of x, {D}", shape)
        check.shape("params.w_i", params.w_i, shape, "(G, K, K)")
        for name in ("b_r", "b_i", "decay"):
            check.shape(f"params.{name}", getattr(params, name), (D,), "(H,)")
    else:
        n, b = (2 if isinstance(params, MinGRUParams) else 3), jnp.shape(params.b)
        check(len(b) == 1 and b[0] % n == 0 < b[0], "params.b", f"of shape ({n}H,)", b)
        check.shape("params.w_x", params.w_x, (D, b[0]), f"(D, {n}H)")
    for name, value in params._asdict().items():
        check.dtype_of(f"params.{name}", value, "x", x)


def _checked_state(check, name, h, batch, H, like):
    if h is None:
        return None
    h = check.array(name, h)
    check_rows(check, name, h, (*batch, H), like)
    return h
