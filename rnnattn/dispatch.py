"""What runs where: functions with an implementation of their own on a platform, and XLA elsewhere.

The schedules `rnnattn.attention.placed` and `rnnattn.recurrent.native` are made of these: schedules
like any other, by kernels or by another library where these serve, and elsewhere on XLA, with the
same results.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from rnnattn.divided import can_be_divided, lowered_in_parts
from rnnattn.precision import varying_together


def dispatched(name, on_xla, by_platform, results, batched, division, *, exported=False):
    """A function of arrays that runs `on_xla` or as one `by_platform` says, where it ends up.

    That is known where a program is lowered, and only there: another implementation than `on_xla`
    runs in one for a single device of its platform that is not exported, and on a CPU for several
    devices, of which each has a part. Left to XLA is a part that is divided further, in a
    `jax.shard_map` over some of a mesh's axes, and all that is not lowered as one program, as under
    `jax.disable_jit`. Derivatives are those of `on_xla`, and so of every order.

    Args:
        on_xla: of what is static, hashable, and of trees of arrays; to a tree of arrays.
        by_platform: the same of these, by the names that `jax.export` has for platforms.
        results: of the same, a tree of their `jax.ShapeDtypeStruct`.
        batched: the rule for `vmap`, of what is static, the trees, their leading axes those of
            `vmap` where the same trees of Booleans say so, and the size of these; to the results
            and where they have that axis, a tree or one for all; None leaves them to XLA.
        division: along which axes the arrays may be divided among devices; None leaves programs for
            several to XLA, but for the parts in a `jax.shard_map`.
        exported: whether a program that is exported has them, too: they then are all of its own.
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
            lambda *leaves, **how: [_typed(x, leaves) for x in leafwise(results)(*leaves, **how)]
        )
        lower = partial(mlir.lower_fun, multiple_results=True)
        in_xla = lower(plain)
        mlir.register_lowering(defined, in_xla)

        def in_parts(platform, context, *leaves, static, tree):
            function = partial(defined.bind, static=static, tree=tree)
            trees = jax.tree.unflatten(tree, context.avals_in)
            shapes = results(static, *trees)
            return lowered_in_parts(platform, function, division, trees, shapes, context, *leaves)

        for platform, function in by_platform.items():
            parts = partial(in_parts, platform) if division else None
            rules = (lower(leafwise(function)), parts, in_xla)
            rule = partial(_lowered, platform, exported, rules)
            mlir.register_lowering(defined, rule, platform=platform)

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
            if size == 0 or batched is None:
                axes = jax.tree.map(lambda b: 0 if b else None, has_axis)
                results, axes = jax.vmap(partial(on_xla, static), axes)(*trees), 0
            else:
                results, axes = batched(static, trees, has_axis, size)
            return jax.tree.leaves(results), jax.tree.leaves(jax.tree.broadcast(axes, results))

        batching.primitive_batchers[defined] = over_axis
        return defined

    def call(static, *trees):
        mesh = jax.sharding.get_abstract_mesh()
        # types tell how a part is divided further, as results would have to
        if mesh.manual_axes and not mesh.are_all_axes_manual:
            return on_xla(static, *trees)
        leaves, tree = jax.tree.flatten(varying_together(trees))
        outputs = primitive().bind(*leaves, static=static, tree=tree)
        return jax.tree.unflatten(jax.tree.structure(results(static, *trees)), outputs)

    return call


def _typed(x, leaves):
    """The type of a result of this shape and dtype, from types that vary over the same axes."""
    mesh = next((a.sharding.mesh for a in leaves if not a.sharding.mesh.empty), None)
    if mesh is None:
        return jax.core.ShapedArray(x.shape, x.dtype)
    return jax.core.ShapedArray(
        x.shape,
        x.dtype,
        sharding=NamedSharding(mesh, PartitionSpec()),
        manual_axis_type=leaves[0].manual_axis_type,
    )


# Platforms whose implementations run in programs for several devices, too: of several GPUs none
# was at hand to try it.
_DIVIDED = ("cpu",)


def _lowered(platform, exported, rules, context, *leaves, **how):
    """A lowering rule: one for a device alone, for parts of several, or that of XLA."""
    here, in_parts, rule = rules
    module = context.module_context
    axes, divides = module.axis_context, platform in _DIVIDED
    if exported or not module.lowering_parameters.for_export:
        count = getattr(axes, "num_devices", 1)
        if isinstance(axes, mlir.SPMDAxisContext):  # in `jax.shard_map`
            rule = here if divides and axes.manual_axes == {*axes.mesh.axis_names} else rule
        elif count == 1:
            rule = here
        elif divides and in_parts and can_be_divided(platform, count):
            rule = in_parts
    return rule(context, *leaves, **how)


HOPPER = (9, 0)  # the capability of that generation


def no_hopper():
    """What of the GPUs at hand, if there are any, cannot run kernels for one of that generation."""
    other = gpu_capability() not in ((), HOPPER)
    return ["a GPU that is not of the Hopper generation"] if other else []


def unserved_here(by_gpu, by_tpu):
    """Of what kernels for a GPU and those for a TPU cannot serve, for what a call is refused.

    For what those for the device at hand cannot serve; where there is neither, a call is refused
    that neither can. Elsewhere XLA runs.
    """
    here = {"gpu": by_gpu, "tpu": by_tpu}.get(jax.default_backend())
    neither = [*by_gpu, *(r for r in by_tpu if r not in by_gpu)] if by_gpu and by_tpu else []
    return neither if here is None else here


def gpu_capability():
    """The least compute capability of the NVIDIA GPUs at hand; none if there is none."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return ()
    return min(tuple(map(int, device.compute_capability.split("."))) for device in devices)
