"""The native schedule of the LSTM on a CPU: kernels in `rnnattn/native/src/lstm_*-inl.h`.

Elsewhere (`rnnattn.native.dispatch`), under `vmap` of weights, and for derivatives beyond the
first, the schedule on XLA runs (`rnnattn.chunked`). Both leave the same for
the gradient: y with c and a of every step, or with c alone, or the state before every chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import rnnattn.chunked as chunked
import rnnattn.native as native
import rnnattn.native.dispatch as dispatch
from rnnattn.cell import LSTMParams, LSTMState, Variant, where
from rnnattn.chunked import Steps


class _Kept(NamedTuple):
    """What the steps leave for the gradient besides y; None where it is computed again."""

    c: Array | None  # of every step
    a: Array | None  # of every step
    starts: LSTMState | None  # before every chunk of as many steps as `residuals` says


def unserved(params, x, variant):
    """What of a call the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    sizes = (*x.shape, *params.w_h.shape)
    reasons = {
        f"the dtype {jnp.result_type(x).name}": jnp.result_type(x) != jnp.float32,
        "peephole weights": params.peephole is not None,
        "a projection": params.projection is not None,
        "`clip` or `coupled`": variant != Variant(),
        "symbolic shapes": not all(isinstance(n, int) for n in sizes),
        "an array without elements": 0 in sizes,
    }
    return [what for what, holds in reasons.items() if holds]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sequence(schedule, params, state, steps):
    """`rnnattn.chunked.sequence`."""
    y, state, _ = _forward((schedule, False), params, state, steps)
    return y, state


def _sequence_fwd(schedule, params, state, steps):
    y, final, kept = _forward((schedule, True), params, state, steps)
    seen = None if isinstance(schedule.residuals, int) else y
    return (y, final), (params, state, steps, seen, kept)


def _sequence_bwd(schedule, residuals, cotangents):
    params, state, steps, *kept = residuals
    kept = (params, state, *kept)
    dparams, dstate, dx = chunked.gradient_of_read(_gradient, schedule, steps, cotangents, kept)
    return dparams, dstate, Steps(dx, None, None)


def _gradient(schedule, steps, cotangents, kept):
    params, state, y, kept = kept
    return _backward(schedule, params, state, steps, y, kept, cotangents)


sequence.defvjp(_sequence_fwd, _sequence_bwd)


# ---- on XLA -----------------------------------------------------------------------------------


def _forward_on_xla(static, params, state, steps):
    """y, the final state, and what is kept for the gradient, if anything is."""
    schedule, keeps = static
    keep = {"gates": "ca", "states": "c"}.get(schedule.residuals, "") if keeps else ""
    final, trace, starts = chunked._forward(schedule, params, state, steps, keep)
    if keeps and isinstance(schedule.residuals, int):
        return trace.y, final, _Kept(None, None, starts)
    return trace.y, final, _Kept(trace.c, trace.a, None)


def _backward_on_xla(schedule, params, state, steps, y, kept, cotangents):
    """dparams, dstate and dx."""
    starts = kept.starts or _starts(schedule, params, state, steps, y, kept.c)
    trace = chunked._Trace(y, kept.c, kept.a)
    dparams, dstate, dsteps = chunked._backward(
        schedule, steps, cotangents, (params, trace, starts)
    )
    return dparams, dstate, dsteps.x


def _starts(schedule, params, state, steps, y, c):
    """The state before each chunk of the other schedule. A row that has not begun holds its own."""
    T, H = y.shape[0], params.w_h.shape[1] // 4
    length = chunked._chunk_length(schedule.residuals, steps, H)
    first, others = (length if schedule.reverse else length - 1), (T - 1) // length
    before = lambda a: a[first::length][:others]
    h = before(y)
    if steps.valid is not None:
        h = where(before(steps.valid), h, state.h[None])

    def join(start, rest):
        return jnp.concatenate([rest, start[None]] if schedule.reverse else [start[None], rest])

    return LSTMState(join(state.h, h), join(state.c, before(c)))


# ---- natively ---------------------------------------------------------------------------------

_ABSENT = (0,)  # the shape of what is not there


def _call(name, schedule, results, arrays, interval):
    """A kernel's results in the tree of their shapes, given the arguments; None where absent."""
    params, state, steps, *others = arrays
    given = lambda x, dtype: jnp.zeros(_ABSENT, dtype) if x is None else x
    shapes = [jax.ShapeDtypeStruct(_ABSENT, jnp.float32) if x is None else x for x in results]
    masks = [given(mask, jnp.bool) for mask in (steps.valid, steps.fresh)]
    made = jax.ffi.ffi_call(f"rnnattn.lstm_{name}.v1", shapes)(
        *(steps.x, *params[:3], *state, *masks),
        *(given(x, jnp.float32) for x in others),
        reverse=schedule.reverse,
        interval=np.int64(interval),
        **dispatch.call_attributes(),
    )
    return [None if like is None else x for x, like in zip(made, results, strict=True)]


def _interval(schedule, keeps, T):
    """The steps between two states that are kept, 0 where none is."""
    return min(schedule.residuals, T) if keeps and isinstance(schedule.residuals, int) else 0


def _forward_results(static, params, state, steps):
    schedule, keeps = static
    (T, B, _), H = steps.x.shape, params.w_h.shape[0]
    n = _interval(schedule, keeps, T)
    array: Any = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    c = array(T, B, H) if keeps and not n else None
    a = array(T, B, 4 * H) if keeps and schedule.residuals == "gates" else None
    state = lambda *sizes: LSTMState(array(*sizes, B, H), array(*sizes, B, H))
    return array(T, B, H), state(), _Kept(c, a, state((T - 1) // n + 1) if n else None)


def _forward_natively(static, *arrays):
    schedule, keeps = static
    y, final, (c, a, starts) = _forward_results(static, *arrays)
    results = [y, *final, c, a, *(starts or (None, None))]
    interval = _interval(schedule, keeps, y.shape[0])
    y, h_last, c_last, c, a, *states = _call("forward", schedule, results, arrays, interval)
    kept = _Kept(c, a, starts and LSTMState(*states))
    return y, LSTMState(h_last, c_last), kept


def _backward_results(schedule, params, state, steps, *_):
    like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.tree.map(like, (params, state, steps.x))


def _backward_natively(schedule, params, state, steps, y, kept, cotangents):
    dparams, dstate, dx = _backward_results(schedule, params, state, steps)
    dy, dlast = cotangents
    others = (y, kept.c, kept.a, *(kept.starts or (None, None)), dy, *dlast)
    results, arrays = [dx, *dparams[:3], *dstate], (params, state, steps, *others)
    interval = _interval(schedule, True, steps.x.shape[0])
    dx, *dparams, dh, dc = _call("backward", schedule, results, arrays, interval)
    return LSTMParams(*dparams), LSTMState(dh, dc), dx


# ---- where it runs ----------------------------------------------------------------------------


def _over_axis_on_xla(on_xla, static, trees, batched):
    axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
    return jax.vmap(partial(on_xla, static), axes)(*trees), 0


def _forward_over_axis(static, trees, batched, size):
    """`vmap` joins its axis with the batch, if the weights are shared."""
    if any(jax.tree.leaves(batched[0])):
        return _over_axis_on_xla(_forward_on_xla, static, trees, batched)
    params, state, steps = trees
    _, of_state, of_steps = batched
    rows = steps.x.shape[2 if of_steps.x else 1]

    def join(at, x, is_batched):
        """(…, B, …) → (…, A B, …), B standing `at`."""
        x = jnp.moveaxis(x, 0, at) if is_batched else jnp.expand_dims(x, at)
        rest = x.shape[at + 2 :]
        x = jnp.broadcast_to(x, (*x.shape[:at], size, rows, *rest))
        return x.reshape(*x.shape[:at], size * rows, *rest)

    state = jax.tree.map(partial(join, 0), state, of_state)
    steps = jax.tree.map(partial(join, 1), steps, of_steps)
    results = _forward(static, params, state, steps)
    axes = jax.tree.map(lambda x: x.ndim - 2, results)  # (B, H) or (T, B, …)
    split = lambda x, at: x.reshape(*x.shape[:at], size, rows, *x.shape[at + 1 :])
    return jax.tree.map(split, results, axes), axes


def _backward_over_axis(schedule, trees, batched, size):
    return _over_axis_on_xla(_backward_on_xla, schedule, trees, batched)


_forward = dispatch.dispatched(
    "rnnattn_lstm", _forward_natively, _forward_on_xla, _forward_results, _forward_over_axis
)
_backward = dispatch.dispatched(
    "rnnattn_lstm_gradient",
    _backward_natively,
    _backward_on_xla,
    _backward_results,
    _backward_over_axis,
)
