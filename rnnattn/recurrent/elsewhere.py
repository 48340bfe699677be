"""What becomes of a schedule of kernels where they do not run: the schedule on XLA, with the same
trace; and under `vmap`.
"""

from functools import partial

import jax
import jax.numpy as jnp

import rnnattn.recurrent.chunked as chunked


def forward_on_xla(static, params, state, steps):
    options, keeps = static
    return chunked.forward(options, keeps, params, state, steps)


backward_on_xla = chunked.backward


def forward_over_axis(forward, on_xla):
    """`vmap` joins its axis with the batch, if the weights are shared."""

    def over_axis(static, trees, batched, size):
        if any(jax.tree.leaves(batched[0])):
            return _over_axis_on_xla(on_xla, static, trees, batched)
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

    return over_axis


def backward_over_axis(on_xla):
    def over_axis(options, trees, batched, size):
        return _over_axis_on_xla(on_xla, options, trees, batched)

    return over_axis


def _over_axis_on_xla(on_xla, static, trees, batched):
    axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
    return jax.vmap(partial(on_xla, static), axes)(*trees), 0
