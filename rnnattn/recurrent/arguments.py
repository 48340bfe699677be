"""From the arguments of a sequence, checked, to what a schedule is given."""

import math
from typing import Literal, NamedTuple, SupportsFloat, SupportsIndex, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rnnattn.checks import Check
from rnnattn.meshes import in_parts
from rnnattn.precision import accumulator
from rnnattn.recurrent.equations import LSTMState, Variant
from rnnattn.recurrent.problem import Steps

# What `residuals=None` may keep of all steps for the gradient.
_GATES_BYTES = 256 * 2**20  # c and the pre-activations
_STATES_BYTES = 2**30  # c alone


class _SharedOptions(TypedDict, total=False):
    lengths: Int[Array, "*B"] | None
    resets: Bool[Array, "..."] | None
    clip: SupportsFloat | None
    coupled: bool
    residuals: Literal["gates", "states"] | SupportsIndex | None
    implementation: Literal["xla", "native", "pallas", "cudnn"] | None


class StackOptions(_SharedOptions, total=False):
    """Options of `rnnattn.lstm` that a stack hands on to each of its layers."""

    reverse: bool


class SequenceOptions(_SharedOptions, total=False):
    """Options of `rnnattn.lstm` that both directions have in common."""

    time_major: bool


def batch_of(x, time_major):
    """The sizes of the axes of x (*B, T, D), or (T, *B, D), besides time and width."""
    return x.shape[1:-1] if time_major else x.shape[:-2]


def time_first(x, batch, time_major):
    """(*B, T, …), or (T, *B, …), → (T, B, …)."""
    x = x if time_major else jnp.moveaxis(x, len(batch), 0)
    return x if len(batch) == 1 else x.reshape(x.shape[0], -1, *x.shape[1 + len(batch) :])


def time_back(y, batch, time_major):
    """(T, B, …) → (*B, T, …), or (T, *B, …)."""
    y = y if len(batch) == 1 else y.reshape(y.shape[0], *batch, *y.shape[2:])
    return y if time_major else jnp.moveaxis(y, 0, len(batch))


def full_state(params, state, batch):
    """The initial state, (B, …), in the dtypes the steps carry; None is zeros."""
    B, H, dtype = math.prod(batch), params.w_h.shape[1] // 4, params.b.dtype
    if state is None:
        zeros = lambda width, dtype: jnp.zeros_like(params.b, dtype, shape=(B, width))
        return LSTMState(zeros(params.w_h.shape[0], dtype), zeros(H, accumulator(dtype)))
    rows = lambda x: x if len(batch) == 1 else x.reshape(B, x.shape[-1])
    return LSTMState(rows(state.h), rows(state.c).astype(accumulator(dtype)))


def time_major_steps(x, lengths, resets, reverse):
    """The masks of a time-major x; a reset past a row's length counts for nothing."""
    valid = None
    if lengths is not None:
        steps = jnp.arange(x.shape[0], dtype=jnp.int32)
        valid = steps[:, None] < lengths.astype(jnp.int32).reshape(1, -1)
    if resets is None:
        return Steps(x, valid, None)
    if valid is not None:
        resets = resets & valid
    if reverse:  # the step run after an episode's first is the last of the episode before
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    return Steps(x, valid, resets)


def as_given(final, state, batch):
    """The final state in the axes and dtypes of the initial one, so that a loop can carry it."""
    if len(batch) != 1:
        final = LSTMState(*(x.reshape(*batch, x.shape[-1]) for x in final))
    return final if state is None else jax.tree.map(lambda x, s: x.astype(s.dtype), final, state)


def on_mesh(function, run, time_major, given):
    """`run(given)`, the arguments of a sequence by name; with explicit axes, in parts of rows."""
    if len(batch_of(given["x"], time_major)) != 1:
        return run(given)
    steps = "TB" if time_major else "BT"
    final = LSTMState("BR", "BH")  # type: ignore[arg-type]
    axes = {"params": "", "x": steps + "D", "state": final, "lengths": "B", "resets": steps}
    results = (steps + "R", final)
    whole = {"T": "time"}
    return in_parts(Check(function), run, given, axes, results, divided="B", whole=whole)


# ---- checks -----------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """Of a sequence, as arrays."""

    x: Array
    state: LSTMState | None
    lengths: Array | None
    resets: Array | None


def checked_sequence(function, params, x, state, lengths, resets, time_major):
    """The arguments as arrays; `ValueError` for the first that is off."""
    check = Check(function)
    array = lambda x: None if x is None else jnp.asarray(x)
    x, lengths, resets = map(array, (x, lengths, resets))
    expected = "of shape (T, *B, D)" if time_major else "of shape (*B, T, D)"
    check(x.ndim >= 2, "x", expected, x.shape)
    check.floating("x", x)
    _check_params(check, params, x)
    batch = batch_of(x, time_major)
    state = None if state is None else _checked_state(check, params, state, batch)
    axes = ("", "B", "*B")[min(len(batch), 2)]
    if lengths is not None:
        check.shape("lengths", lengths, batch, f"({axes},)" if batch else "()")
        check.integers("lengths", lengths)
    if resets is not None:
        inner = ("T", axes) if time_major else (axes, "T")
        named = ", ".join(name for name in inner if name)
        check.shape("resets", resets, x.shape[:-1], f"({named})" if batch else "(T,)")
        check.booleans("resets", resets)
    return Arguments(x, state, lengths, resets)


def checked_step(function, params, x, state):
    """x and the state of a step as arrays; `ValueError` for the first that is off."""
    check, x = Check(function), jnp.asarray(x)
    check(x.ndim >= 1, "x", "of shape (*B, D)", x.shape)
    check.floating("x", x)
    _check_params(check, params, x)
    return x, _checked_state(check, params, state, x.shape[:-1])


def checked_variant(function, clip, coupled):
    expected = "a positive number or None"
    clip = None if clip is None else Check(function).number("clip", clip, 0, expected)
    return Variant(clip, bool(coupled))


def checked_residuals(function, residuals):
    """A word, a number of steps, or None."""
    if residuals is None or (isinstance(residuals, str) and residuals in ("gates", "states")):
        return residuals
    expected = "'gates', 'states', a number of steps of at least 1 or None"
    return Check(function).integer("residuals", residuals, 1, expected)


def suited_residuals(T, batch, H, dtype):
    """What `residuals=None` keeps, by the memory it takes: see `lstm`. "states" of symbolic sizes.

    The numbers were measured: benchmarks/README.md, "What is kept for the gradient".
    """
    if not all(isinstance(n, int) for n in (T, *batch)):
        return "states"
    states = T * math.prod(batch) * H * accumulator(dtype).itemsize
    if 5 * states <= _GATES_BYTES:
        return "gates"
    return "states" if states <= _STATES_BYTES else math.isqrt(T)


def _check_params(check, params, x):
    D = x.shape[-1]
    whole = jnp.ndim(params.w_h) == 2 and params.w_h.shape[1] % 4 == 0 < params.w_h.shape[1]
    check(whole, "params.w_h", "of shape (H, 4H)", jnp.shape(params.w_h))
    R, H = params.w_h.shape[0], params.w_h.shape[1] // 4
    check.shape("params.w_x", params.w_x, (D, 4 * H), "(D, 4H)")
    check.shape("params.b", params.b, (4 * H,), "(4H,)")
    if params.projection is None:
        check.shape("params.w_h", params.w_h, (H, 4 * H), "(H, 4H)")
    else:
        check.shape("params.projection", params.projection, (H, R), "(H, R)")
    if params.peephole is not None:
        check.shape("params.peephole", params.peephole, (3, H), "(3, H)")
    for name, value in params._asdict().items():
        if value is not None:
            check.dtype_of(f"params.{name}", value, "x", x)


def _checked_state(check, params, state, batch):
    R, H, dtype = params.w_h.shape[0], params.w_h.shape[1] // 4, jnp.result_type(params.b)
    B = ("", "B, ", "*B, ")[min(len(batch), 2)]
    h, c = map(jnp.asarray, state)
    check.shape("state.h", h, (*batch, R), f"({B}H)" if R == H else f"({B}R)")
    check.shape("state.c", c, (*batch, H), f"({B}H)")
    check.dtype_of("state.h", h, "x", params.b)
    wide = accumulator(dtype)
    check(c.dtype in (dtype, wide), "state.c", f"of dtype {wide.name}", c.dtype.name)
    return LSTMState(h, c)
