"""Schedules of a unit that have kernels of their own on some platforms, and run on XLA elsewhere.

What they share but the halves that run there: the schedule on XLA (`rnnattn.recurrent.chunked`) for
other places (`rnnattn.dispatch`) and for derivatives beyond the first, the trace, and `vmap`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import rnnattn.recurrent.chunked as chunked
from rnnattn.dispatch import dispatched
from rnnattn.divided import Division
from rnnattn.recurrent.problem import Schedule, Trace
from rnnattn.recurrent.unit import types_of_step

_FEWEST_ROWS = 64  # of all steps of a network, for which a turn of a loop over networks pays


def placed(name, by_platform, *, exported=False):
    """The schedule whose halves run as these in a program for a platform: see `dispatched`.

    Args:
        by_platform: a forward and a backward by the names that `jax.export` has for platforms; of
            what the halves of a schedule take, `options` and `keeps` as one pair. They leave the
            trace that the schedule on XLA leaves.
        exported: whether programs that are exported have them, too.
    """

    def forward(options, keeps, params, state, steps):
        return run_forward((options, keeps), params, state, steps)

    forwards, backwards = ({p: halves[n] for p, halves in by_platform.items()} for n in (0, 1))
    gradient = f"{name}_gradient"
    run_forward = dispatched(
        name,
        forward_on_xla,
        forwards,
        forward_results,
        partial(
            _forward_over_axis, forward, _in_turn(name, forward_on_xla, forwards, forward_results)
        ),
        Division("B", ("", "B", "TB"), ("B", "TB")),
        exported=exported,
    )
    backward = dispatched(
        gradient,
        chunked.backward,
        backwards,
        backward_results,
        _in_turn(gradient, chunked.backward, backwards, backward_results),
        Division("B", ("", "B", "TB", "TB", ("TB", "B")), ("", "B", "TB")),
        exported=exported,
    )
    return Schedule(forward, backward)


def unserved_by_kernels(params, x):
    """What of a call no kernels serve, by whether it is asked for."""
    sizes = (*x.shape, *params.w_h.shape)
    return {
        "symbolic shapes": not all(isinstance(n, int) for n in sizes),
        "an array without elements": 0 in sizes,
    }


def forward_on_xla(static, params, state, steps):
    options, keeps = static
    return chunked.forward(options, keeps, params, state, steps)


def interval(options, keeps, T):
    """The steps between two states that are kept, 0 where none is."""
    return min(options.residuals, T) if keeps and isinstance(options.residuals, int) else 0


def forward_results(static, params, state, steps):
    options, keeps = static
    T, B, _ = steps.x.shape
    n = interval(options, keeps, T)

    def several(count, tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)

    final, kept = types_of_step(options.unit, params, B, steps.x.dtype)
    y, *rest = several(T, final)
    trace = Trace(y)
    if n:
        trace = trace._replace(starts=several((T - 1) // n + 1, final))
    elif keeps:
        trace = trace._replace(rest=(*rest,))
    if keeps and options.residuals == "gates":
        trace = trace._replace(kept=several(T, kept))
    return final, trace


def backward_results(options, params, state, steps, *_):
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(like, (params, state, steps.x))


def _in_turn(name, on_xla, by_platform, results):
    """The rule for `vmap` by XLA, and of weights by the kernels of a CPU, one call after another.

    Measured: benchmarks/README.md, "Several networks at once".
    """

    def over_axis(static, *trees):
        static, has_axis = static
        axes = jax.tree.unflatten(jax.tree.structure(trees), [0 if b else None for b in has_axis])
        return jax.vmap(partial(on_xla, static), axes)(*trees)

    def in_turn(half, static, *trees):
        (static, has_axis), (leaves, tree) = static, jax.tree.flatten(trees)

        def one(mapped):
            mapped = iter(mapped)
            of_one = [next(mapped) if b else x for x, b in zip(leaves, has_axis, strict=True)]
            return half(static, *jax.tree.unflatten(tree, of_one))

        return lax.map(one, [x for x, b in zip(leaves, has_axis, strict=True) if b])

    def stacked_results(static, *trees):
        (static, has_axis), (leaves, tree) = static, jax.tree.flatten(trees)
        size = leaves[has_axis.index(True)].shape[0]
        shape = lambda x, b: jax.ShapeDtypeStruct(x.shape[b:], x.dtype)
        of_one = jax.tree.unflatten(tree, map(shape, leaves, has_axis))
        stack = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype)
        return jax.tree.map(stack, results(static, *of_one))

    on_cpu = {p: partial(in_turn, half) for p, half in by_platform.items() if p == "cpu"}
    run = dispatched(f"{name}_in_turn", over_axis, on_cpu, stacked_results, None, None)

    def rule(static, trees, has_axis, size):
        T, B, _ = trees[2].x.shape[-3:]
        pays = any(jax.tree.leaves(has_axis[0])) and T * B >= _FEWEST_ROWS
        return (run if pays else over_axis)((static, (*jax.tree.leaves(has_axis),)), *trees), 0

    return rule


def _forward_over_axis(forward, in_turn, static, trees, batched, size):
    """`vmap` joins its axis with the batch, if the weights are shared."""
    if any(jax.tree.leaves(batched[0])):
        return in_turn(static, trees, batched, size)
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
    results = forward(*static, params, state, steps)
    axes = jax.tree.map(lambda x: x.ndim - 2, results)  # (B, H) or (T, B, …)
    split = lambda x, at: x.reshape(*x.shape[:at], size, rows, *x.shape[at + 1 :])
    return jax.tree.map(split, results, axes), axes
