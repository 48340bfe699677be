"""The native schedule of the LSTM on a CPU: the kernels of `rnnattn/_native/lstm.inc`.

Elsewhere (`rnnattn.native.dispatched`), under `vmap` of weights, and for derivatives beyond the
first, the schedule on XLA runs (`rnnattn.chunked`). Both leave the same for
the gradient: y with c and a of every step, or with c alone, or the state before every chunk.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import rnnattn.chunked as chunked
import rnnattn.native as native
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
    y, state, _ = _forward(schedule, False, params, state, steps)
    return y, state


def _sequence_fwd(schedule, params, state, steps):
    y, final, kept = _forward(schedule, True, params, state, steps)
    seen = None if isinstance(schedule.residuals, int) else y
    return (y, final), (params, state, steps, seen, kept)


def _sequence_bwd(schedule, residuals, cotangents):
    dparams, dstate, dx = _backward(schedule, *residuals, cotangents)
    return dparams, dstate, Steps(dx, None, None)


sequence.defvjp(_sequence_fwd, _sequence_bwd)


# ---- the two directions, wherever they run ----------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(schedule, keeps, params, state, steps):
    """y, the final state, and what is kept for the gradient."""
    y, h, c, *kept = _bind(_dispatched_forward, (schedule, keeps), params, state, steps)
    return y, LSTMState(h, c), _kept(schedule, kept)


@_forward.defjvp
def _forward_jvp(schedule, keeps, primals, tangents):
    return jax.jvp(partial(_forward_on_xla, schedule, keeps), primals, tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(schedule, params, state, steps, y, kept, cotangents):
    """dparams, dstate and dx."""
    options = (schedule, True)
    dx, *dparams, dh, dc = _bind(
        _dispatched_backward, options, params, state, steps, y, kept, cotangents
    )
    return LSTMParams(*dparams), LSTMState(dh, dc), dx


@_backward.defjvp
def _backward_jvp(schedule, primals, tangents):
    return jax.jvp(partial(_backward_on_xla, schedule), primals, tangents)


def _kept(schedule, arrays):
    """`_Kept` of what there is of c, a, h and c before the chunks."""
    if not arrays:
        return _Kept(None, None, None)
    if isinstance(schedule.residuals, int):
        return _Kept(None, None, LSTMState(*arrays))
    return _Kept(arrays[0], arrays[1] if schedule.residuals == "gates" else None, None)


# ---- on XLA -----------------------------------------------------------------------------------


def _forward_on_xla(schedule, keeps, params, state, steps):
    keep = {"gates": "ca", "states": "c"}.get(schedule.residuals, "") if keeps else ""
    final, trace, starts = chunked._forward(schedule, params, state, steps, keep)
    if keeps and isinstance(schedule.residuals, int):
        return trace.y, final, _Kept(None, None, starts)
    return trace.y, final, _Kept(trace.c, trace.a, None)


def _backward_on_xla(schedule, params, state, steps, y, kept, cotangents):
    starts = kept.starts or _starts(schedule, params, state, steps, y, kept.c)
    residuals = params, steps, chunked._Trace(y, kept.c, kept.a), starts
    dparams, dstate, dsteps = chunked._sequence_bwd(schedule, residuals, cotangents)
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


def _call(name, schedule, results, *arrays, interval):
    """A kernel's results, given the weights, the sequence and more; None for what is absent."""
    params, state, steps, *others = arrays
    given = lambda x, dtype: jnp.zeros(_ABSENT, dtype) if x is None else x
    masks = [given(mask, jnp.bool) for mask in (steps.valid, steps.fresh)]
    call = jax.ffi.ffi_call(f"rnnattn.lstm_{name}.v1", results)
    return call(
        *(steps.x, *params[:3], *state, *masks),
        *(given(x, jnp.float32) for x in others),
        reverse=schedule.reverse,
        interval=np.int64(interval),
        **native.how(),
    )


def _interval(schedule, keeps, T):
    """The steps between two states that are kept, 0 where none is."""
    return min(schedule.residuals, T) if keeps and isinstance(schedule.residuals, int) else 0


def _forward_results(schedule, keeps, params, state, steps):
    """The shapes of y, h, c, and of c and a of every step, h and c before the chunks."""
    (T, B, _), H = steps.x.shape, params.w_h.shape[0]
    n = _interval(schedule, keeps, T)
    c = (T, B, H) if keeps and not n else _ABSENT
    a = (T, B, 4 * H) if keeps and schedule.residuals == "gates" else _ABSENT
    starts = ((T - 1) // n + 1, B, H) if n else _ABSENT
    return [(T, B, H), (B, H), (B, H), c, a, starts, starts]


def _forward_natively(schedule, keeps, params, state, steps):
    shapes = _forward_results(schedule, keeps, params, state, steps)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    n = _interval(schedule, keeps, steps.x.shape[0])
    results = _call("forward", schedule, results, params, state, steps, interval=n)
    return [x for x in results if x.shape != _ABSENT]


def _backward_results(schedule, keeps, params, state, steps, *_):
    """The shapes of dx, dw_x, dw_h, db, dh and dc."""
    return [x.shape for x in (steps.x, *params[:3], *state)]


def _backward_natively(schedule, keeps, params, state, steps, y, kept, cotangents):
    shapes = _backward_results(schedule, keeps, params, state, steps)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    dy, dstate = cotangents
    others = (y, kept.c, kept.a, *(kept.starts or (None, None)), dy, *dstate)
    n = _interval(schedule, keeps, steps.x.shape[0])
    return _call("backward", schedule, results, params, state, steps, *others, interval=n)


# ---- where it runs ----------------------------------------------------------------------------


def _bind(call, options, *arguments):
    leaves, tree = jax.tree.flatten(arguments)
    return call(*leaves, options=options, tree=tree)


def _run(function, *leaves, options, tree):
    return jax.tree.leaves(function(*options, *jax.tree.unflatten(tree, leaves)))


def _shapes(results, *leaves, options, tree):
    shapes = results(*options, *jax.tree.unflatten(tree, leaves))
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes if s != _ABSENT]


def _gradient_on_xla(schedule, keeps, *arguments):
    dparams, dstate, dx = _backward_on_xla(schedule, *arguments)
    return dx, dparams, dstate


def _vmap_on_xla(function, leaves, axes, **how):
    results = jax.vmap(partial(_run, function, **how), axes)(*leaves)
    return results, [0] * len(results)


def _forward_batched(leaves, axes, *, options, tree):
    """`vmap` joins its axis with the batch, if the weights are shared."""
    batched = jax.tree.unflatten(tree, [axis is not None for axis in axes])
    if any(jax.tree.leaves(batched[0])):
        return _vmap_on_xla(_forward_on_xla, leaves, axes, options=options, tree=tree)
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    arguments = jax.tree.unflatten(tree, leaves)
    places = jax.tree.unflatten(tree, axes)

    def join(x, axis, at):
        """(…, B, …) → (…, A B, …), B standing `at`."""
        x = jnp.moveaxis(x, axis, at) if axis is not None else jnp.expand_dims(x, at)
        x = jnp.broadcast_to(x, (*x.shape[:at], size, *x.shape[at + 1 :]))
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    params, state, steps = arguments
    _, state_axes, steps_axes = places
    state = LSTMState(*(join(x, a, 0) for x, a in zip(state, state_axes, strict=True)))
    present = lambda x, axis: None if x is None else join(x, axis, 1)
    x, valid, fresh = map(present, steps, steps_axes)
    results = _bind(
        _dispatched_forward, options, params, state, Steps(cast(Array, x), valid, fresh)
    )
    split = lambda x, at: x.reshape(*x.shape[:at], size, -1, *x.shape[at + 1 :])
    at = [0 if x.ndim == 2 else 1 for x in results]  # (B, H) of the final state, (T, B, …)
    return [split(x, i) for x, i in zip(results, at, strict=True)], at


_dispatched_forward = native.dispatched(
    "rnnattn_lstm",
    partial(_run, _forward_natively),
    partial(_run, _forward_on_xla),
    partial(_shapes, _forward_results),
    _forward_batched,
)
_dispatched_backward = native.dispatched(
    "rnnattn_lstm_gradient",
    partial(_run, _backward_natively),
    partial(_run, _gradient_on_xla),
    partial(_shapes, _backward_results),
    partial(_vmap_on_xla, _gradient_on_xla),
)
