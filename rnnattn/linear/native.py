"""The native schedule of a linear recurrence on a CPU: the kernels of `rnnattn/native/src`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn.linear.xla as xla
import rnnattn.native as native
from rnnattn.checks import those_that_hold
from rnnattn.dispatch import dispatched
from rnnattn.divided import Division
from rnnattn.linear.equations import LINEAR, MINGRU, MINLSTM, RGLRU
from rnnattn.linear.problem import Schedule
from rnnattn.native.calls import call_attributes

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_UNITS = (LINEAR, MINGRU, MINLSTM, RGLRU)  # in the order of `LinearUnit` in kernels.h
_ARRAYS = 3  # in which a kernel takes the blocks of a unit


def unserved(x, H):
    """What of a call with steps x and a state of this width the kernels cannot serve."""
    if not native.status().available:
        return [f"this installation ({native.status().reason})"]
    dtype, sizes = jnp.result_type(x), (*x.shape, H)
    return those_that_hold(
        {
            f"the dtype {dtype.name}": dtype not in _DTYPES,
            "symbolic shapes": not all(isinstance(n, int) for n in sizes),
            "an array without elements": 0 in sizes,
        }
    )


def _call(name, options, results, weights, h0, steps, *others):
    """A kernel's results, of these shapes."""
    absent = lambda dtype: jnp.zeros(0, dtype)
    dtype = steps.inputs[0].dtype
    inputs = [*steps.inputs, *[absent(dtype)] * (_ARRAYS - len(steps.inputs))]
    masks = [absent(jnp.bool) if m is None else m for m in (steps.valid, steps.fresh)]
    return jax.ffi.ffi_call(f"rnnattn.linear_{name}.v1", results)(
        *(*inputs, weights, h0, *masks, *others),
        unit=np.int64(_UNITS.index(options.unit)),
        reverse=options.reverse,
        time_major=options.time_major,
        **call_attributes(),
    )


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward_results(options, weights, h0, steps):
    x = steps.inputs[0]
    return jax.ShapeDtypeStruct((*x.shape[:-1], h0.shape[-1]), x.dtype), _like(h0)


def _backward_results(options, weights, h0, steps, *_):
    of_rows = jax.ShapeDtypeStruct((h0.shape[0], *weights.shape), weights.dtype)
    return of_rows, _like(h0), jax.tree.map(_like, steps.inputs)


def _forward_on_cpu(options, weights, h0, steps):
    results = _forward_results(options, weights, h0, steps)
    return tuple(_call("forward", options, results, weights, h0, steps))


def _backward_on_cpu(options, weights, h0, steps, h, cotangents):
    results = _backward_results(options, weights, h0, steps)
    dweights, dh0, dinputs = results
    absent = [jax.ShapeDtypeStruct((0,), h.dtype)] * (_ARRAYS - len(dinputs))
    made = _call(
        "backward", options, [*dinputs, *absent, dweights, dh0], weights, h0, steps, h, *cotangents
    )
    *dinputs, dweights, dh0 = made
    return dweights, dh0, tuple(dinputs[: len(steps.inputs)])


def _joined_with_rows(half, on_xla, division):
    """The rule for `vmap`: its axis joins the rows; with weights of their own, calls run on XLA."""

    def rule(options, trees, has_axis, size):
        if jax.tree.leaves(has_axis[0])[0]:
            axes = jax.tree.map(lambda b: 0 if b else None, has_axis)
            return jax.vmap(partial(on_xla, options), axes)(*trees), 0

        def join(word, x, b):
            """(…, B, …) → (…, A B, …)."""
            if not word:
                return x
            at = word.index("B")
            x = jnp.moveaxis(x, 0, at) if b else jnp.expand_dims(x, at)
            return jnp.broadcast_to(x, (*x.shape[:at], size, *x.shape[at + 1 :])).reshape(
                *x.shape[:at], -1, *x.shape[at + 2 :]
            )

        words = jax.tree.broadcast(division.arguments, trees)
        results = half(options, *jax.tree.map(join, words, trees, has_axis))
        axes = jax.tree.map(
            lambda word: word.index("B"), jax.tree.broadcast(division.results, results)
        )
        split = lambda x, at: x.reshape(*x.shape[:at], size, -1, *x.shape[at + 1 :])
        return jax.tree.map(split, results, axes), axes

    return rule


def _schedule(time_major):
    """The schedule for arrays of steps that begin with time, or with rows."""
    steps = "TB" if time_major else "BT"
    of_forward = Division("B", ("", "B", steps), (steps, "B"))
    of_backward = Division("B", ("", "B", steps, steps, (steps, "B")), ("B", "B", steps))

    def forward(*arrays):
        return run_forward(*arrays)

    def backward(*arrays):
        return run_backward(*arrays)

    name = "rnnattn_linear_time_major" if time_major else "rnnattn_linear"
    run_forward = dispatched(
        name,
        xla.forward,
        {"cpu": _forward_on_cpu},
        _forward_results,
        _joined_with_rows(forward, xla.forward, of_forward),
        of_forward,
    )
    run_backward = dispatched(
        f"{name}_gradient",
        xla.backward,
        {"cpu": _backward_on_cpu},
        _backward_results,
        _joined_with_rows(backward, xla.backward, of_backward),
        of_backward,
    )
    return Schedule(forward, backward)


NATIVE = {time_major: _schedule(time_major) for time_major in (False, True)}
