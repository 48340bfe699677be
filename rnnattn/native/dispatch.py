"""Where kernels run: functions that call them in a program for one CPU, and XLA elsewhere.

`rnnattn.attention.native` and `rnnattn.recurrent.native` are made of these: schedules like any
other, the kernels' where these serve, and elsewhere one on XLA, with the same results.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from rnnattn.native.load import found

# How kernels are called; tests set these.
instruction_set: str | None = None  # the one of `status`
threads = 0  # all of XLA's


def call_attributes() -> dict[str, Any]:
    """Attributes of every call of a kernel."""
    status, sets = found()
    chosen = sets[instruction_set or status.instruction_set or ""]
    return {"instruction_set": np.int64(chosen), "threads": np.int64(threads)}


def dispatched(name, natively, on_xla, results, batched, platform="cpu"):
    """A function of arrays that runs `natively` or `on_xla`, whichever serves where it ends up.

    That is known where a program is lowered, and only there: `natively` runs in one for a single
    device of the platform; one for a CPU must not be exported, since its kernels stay here.
    Programs for several devices are left to XLA, which can divide them, and so is all that is not
    lowered as one program, as under `jax.disable_jit`. Derivatives are those of `on_xla`, and so of
    every order.

    Args:
        natively, on_xla: of what is static, hashable, and of trees of arrays; to a tree of arrays.
        results: of the same, a tree of their `jax.ShapeDtypeStruct`.
        batched: the rule for `vmap`, of what is static, the trees, their leading axes those of
            `vmap` where the same trees of Booleans say so, and the size of these; to the results
            and where they have that axis, a tree or one for all.
    """

    def leafwise(function):
        def of_leaves(*leaves, static, tree):
            return jax.tree.leaves(function(static, *jax.tree.unflatten(tree, leaves)))

        return of_leaves

    @cache
    def primitive():
        # importing this takes longer than all of the library
        from jax.extend.core import Primitive

        defined = Primitive(name)
        defined.multiple_results = True
        plain = leafwise(on_xla)
        defined.def_impl(jax.jit(plain, static_argnames=("static", "tree")))
        defined.def_abstract_eval(
            lambda *leaves, **how: [
                jax.core.ShapedArray(x.shape, x.dtype) for x in leafwise(results)(*leaves, **how)
            ]
        )
        in_xla = mlir.lower_fun(plain, multiple_results=True)
        in_kernels = mlir.lower_fun(leafwise(natively), multiple_results=True)

        def for_platform(context, *leaves, **how):
            serves = _serves(context.module_context, platform)
            return (in_kernels if serves else in_xla)(context, *leaves, **how)

        mlir.register_lowering(defined, in_xla)
        mlir.register_lowering(defined, for_platform, platform=platform)

        def tangents_of(primals, tangents, **how):
            moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

            def of_moving(*moved):
                leaves = list(primals)
                for i, x in zip(moving, moved, strict=True):
                    leaves[i] = x
                return plain(*leaves, **how)

            pick = lambda leaves: tuple(leaves[i] for i in moving)
            return jax.jvp(of_moving, pick(primals), pick(tangents))

        ad.primitive_jvps[defined] = tangents_of

        def over_axis(leaves, axes, *, static, tree):
            has_axis = [a is not None for a in axes]
            front = [
                jnp.moveaxis(x, a, 0) if b else x
                for x, a, b in zip(leaves, axes, has_axis, strict=True)
            ]
            size = front[has_axis.index(True)].shape[0]
            trees, has_axis = (jax.tree.unflatten(tree, x) for x in (front, has_axis))
            if size == 0:
                axes = jax.tree.map(lambda b: 0 if b else None, has_axis)
                results, axes = jax.vmap(partial(on_xla, static), axes)(*trees), 0
            else:
                results, axes = batched(static, trees, has_axis, size)
            return jax.tree.leaves(results), jax.tree.leaves(jax.tree.broadcast(axes, results))

        batching.primitive_batchers[defined] = over_axis
        return defined

    def call(static, *trees):
        # in `jax.shard_map` arrays have types that a primitive would have to know of
        if jax.sharding.get_abstract_mesh().manual_axes:
            return on_xla(static, *trees)
        leaves, tree = jax.tree.flatten(trees)
        outputs = primitive().bind(*leaves, static=static, tree=tree)
        return jax.tree.unflatten(jax.tree.structure(results(static, *trees)), outputs)

    return call


def _serves(module, platform):
    """Whether a program may call kernels: it has them where it runs, and is for one device."""
    devices = getattr(module.axis_context, "num_devices", 1)
    return devices == 1 and not (platform == "cpu" and module.lowering_parameters.for_export)
