"""From the arguments of a sequence, checked, to what a schedule is given."""

import jax
import jax.numpy as jnp

from rnnattn.checks import Check
from rnnattn.meshes import in_parts
from rnnattn.precision import accumulator
from rnnattn.recurrent.equations import LSTMState
from rnnattn.recurrent.problem import Steps


def full_state(params, state, B):
    """The initial state in the dtypes the steps carry; None is zeros."""
    H, dtype = params.w_h.shape[1] // 4, params.b.dtype
    if state is None:
        zeros = lambda width, dtype: jnp.zeros_like(params.b, dtype, shape=(B, width))
        return LSTMState(zeros(params.w_h.shape[0], dtype), zeros(H, accumulator(dtype)))
    return LSTMState(jnp.asarray(state.h), jnp.asarray(state.c, accumulator(dtype)))


def time_major_steps(x, lengths, resets, reverse):
    """The masks of a time-major x; a reset past a row's length counts for nothing."""
    valid = None
    if lengths is not None:
        steps = jnp.arange(x.shape[0], dtype=jnp.int32)
        valid = steps[:, None] < lengths.astype(jnp.int32)[None, :]
    if resets is None:
        return Steps(x, valid, None)
    if valid is not None:
        resets = resets & valid
    if reverse:  # the step run after an episode's first is the last of the episode before
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    return Steps(x, valid, resets)


def as_given(final, state):
    """The final state in the dtypes of the initial one, so that a loop can carry it."""
    return final if state is None else jax.tree.map(lambda x, s: x.astype(s.dtype), final, state)


def on_mesh(function, run, time_major, given):
    """`run(given)`, the arguments of a sequence by name; with explicit axes, in parts of rows."""
    steps = "TB" if time_major else "BT"
    final = LSTMState("BR", "BH")  # type: ignore[arg-type]
    axes = {"params": "", "x": steps + "D", "state": final, "lengths": "B", "resets": steps}
    results = (steps + "R", final)
    whole = {"T": "time"}
    return in_parts(Check(function), run, given, axes, results, divided="B", whole=whole)


# ---- checks -----------------------------------------------------------------------------------


def check_sequence(function, params, x, state, lengths, resets, time_major, clip):
    """Raises `ValueError` for the first argument of a sequence that is off."""
    check = Check(function)
    check.axes("x", x, "(T, B, D)" if time_major else "(B, T, D)")
    check.floating("x", x)
    _check_params(check, params, x)
    B = x.shape[1] if time_major else x.shape[0]
    if state is not None:
        _check_state(check, params, state, B)
    if lengths is not None:
        check.shape("lengths", lengths, (B,), "(B,)")
        check.integers("lengths", lengths)
    if resets is not None:
        axes = "(T, B)" if time_major else "(B, T)"
        check.shape("resets", resets, x.shape[:2], axes)
        check.booleans("resets", resets)
    _check_clip(check, clip)


def check_step(function, params, x, state, clip):
    """Raises `ValueError` for the first argument of a step that is off."""
    check = Check(function)
    check.axes("x", x, "(B, D)")
    check.floating("x", x)
    _check_params(check, params, x)
    _check_state(check, params, state, x.shape[0])
    _check_clip(check, clip)


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


def _check_state(check, params, state, B):
    R, H, dtype = params.w_h.shape[0], params.w_h.shape[1] // 4, jnp.result_type(params.b)
    check.shape("state.h", state.h, (B, R), "(B, H)" if R == H else "(B, R)")
    check.shape("state.c", state.c, (B, H), "(B, H)")
    check.dtype_of("state.h", state.h, "x", params.b)
    c, wide = jnp.result_type(state.c), accumulator(dtype)
    check(c in (dtype, wide), "state.c", f"of dtype {wide.name}", c.name)


def _check_clip(check, clip):
    check(clip is None or clip > 0, "clip", "positive or None", repr(clip))
