"""The native kernels for CPUs: C++ that XLA calls within a program.

They are compiled with the package, if there is a compiler (`setup.py`); their sources are in
`rnnattn/_native`. XLA takes kernels that were built for its own version of the foreign function
interface or an older one, so they are built with the headers of the oldest jaxlib there is to
build with, and loaded only into one that takes them. `status` tells whether they are there, and if
not, why; all then works through XLA.

Importing `rnnattn` makes them known to XLA, so that a program compiled and kept by another process
finds them. The environment variable RNNATTN_NATIVE forces an instruction set, "avx512", "avx2" or
"baseline", when the kernels are first asked for; or it turns them "off", which from before the
import on leaves the extension alone.

`rnnattn.native_attention` and `rnnattn.native_lstm` are schedules: the kernels' where these serve,
and elsewhere one on XLA, with the same results.
"""

import os
import re
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.interpreters import ad, batching, mlir
from jaxlib import xla_client

_VARIABLE = "RNNATTN_NATIVE"
_AGAIN = "`pip install --force-reinstall --no-deps .` in the folder of the sources"


class Status(NamedTuple):
    """Whether there are native kernels, for which instruction set, and if not, why."""

    available: bool
    instruction_set: str | None = None
    reason: str | None = None


def status() -> Status:
    """Whether the native kernels are there, and the instruction set they were chosen for.

    Raises:
        ValueError: the environment variable RNNATTN_NATIVE is none of what it may be.
    Example:
        >>> status().available == (status().reason is None)
        True
    """
    return _load()[0]


@cache
def _load() -> tuple[Status, dict[str, int]]:
    """What there is, and the number of each instruction set that runs here."""
    asked = os.environ.get(_VARIABLE)
    if asked == "off":
        return Status(False, reason=f"{_VARIABLE} is 'off'"), {}
    sets, reason = _extension()
    if asked and asked not in (sets or ("avx512", "avx2", "baseline")):
        allowed = ", ".join(map(repr, [*sets, "off"]))
        raise ValueError(f"{_VARIABLE}: expected one of {allowed} on this machine, got {asked!r}")
    if reason:
        return Status(False, reason=reason), {}
    return Status(True, asked or next(iter(sets))), sets


def _extension() -> tuple[dict[str, int], str | None]:
    """The instruction sets of the kernels, made known to XLA; or none, and why.

    Raises nothing: what is wrong with the kernels must not get in the way of the rest.
    """
    try:
        kernels = import_module("rnnattn._kernels")
        built, sets, targets = kernels.ffi_version(), kernels.instruction_sets(), kernels.targets()
    except ModuleNotFoundError:
        return {}, (
            "the kernels were not built when rnnattn was installed, for want of a C++ compiler "
            f"or of jaxlib; once there is one, {_AGAIN} builds them"
        )
    except Exception as error:
        return {}, f"the kernels do not load: {error!r}; {_AGAIN} builds them anew"
    runs = ffi_version()
    which = f"built for version {_dotted(built)} of XLA's foreign function interface"
    if runs and built > runs:
        return {}, (
            f"the kernels were {which}, and jaxlib {jaxlib.__version__} has {_dotted(runs)}; "
            f"{_AGAIN} builds them for the oldest jaxlib, which serve every later one"
        )
    try:
        for name, target in targets.items():
            _register(name, target)
    except Exception as error:
        return {}, f"jaxlib {jaxlib.__version__} refuses the kernels, {which}: {error}"
    return sets, None


def ffi_version():
    """The version of the interface that the jaxlib here has, as its headers tell; None if not."""
    try:
        path = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
        header = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, RuntimeError):
        return None
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return (int(numbers["MAJOR"]), int(numbers["MINOR"])) if len(numbers) == 2 else None


def _dotted(version):
    return ".".join(map(str, version))


def _register(name, target):
    """As `jax.ffi.register_ffi_target`, but at once.

    That one waits until JAX starts its CPU backend. If XLA refused the kernel then, having dropped
    its version, JAX would have no backend at all.
    """
    try:
        register = xla_client._xla.register_custom_call_target
    except AttributeError:  # not a public name
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    else:
        register(name, target, "cpu", 1)


# A program that was compiled and kept finds the kernels by then.
if os.environ.get(_VARIABLE) != "off":
    _extension()


# How kernels are called; tests set these.
_instruction_set: str | None = None  # the one of `status`
_threads = 0  # all of XLA's


def how() -> dict[str, Any]:
    """Attributes of every call of a kernel."""
    status, sets = _load()
    chosen = sets[_instruction_set or status.instruction_set or ""]
    return {"instruction_set": np.int64(chosen), "threads": np.int64(_threads)}


def dispatched(name, natively, on_xla, results, batched):
    """A function of arrays that runs `natively` or `on_xla`, whichever serves where it ends up.

    That is known where a program is lowered, and only there: `natively` runs in one for a single
    CPU device that is not exported. Programs for several devices are left to XLA, which can divide
    them, and so is all that is not lowered as one program, as under `jax.disable_jit`. Derivatives
    are those of `on_xla`, and so of every order.

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

        def for_cpu(context, *leaves, **how):
            return (in_kernels if _serves(context.module_context) else in_xla)(
                context, *leaves, **how
            )

        mlir.register_lowering(defined, in_xla)
        mlir.register_lowering(defined, for_cpu, platform="cpu")

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


def _serves(module):
    """Whether a program may call kernels: it stays in this process, and on one device."""
    devices = getattr(module.axis_context, "num_devices", 1)
    return devices == 1 and not module.lowering_parameters.for_export
