"""The native kernels for CPUs: C++ that XLA calls within a program.

They are compiled with the package, if there is a compiler (`setup.py`); their sources are in
`rnnattn/_native`. `status` tells whether they are there. The environment variable RNNATTN_NATIVE
forces an instruction set, "avx512", "avx2" or "baseline", or turns the kernels "off"; it is read
where they are first asked for.

`rnnattn.native_attention` and `rnnattn.native_lstm` are schedules: the kernels' where these serve,
and elsewhere one on XLA, with the same results.
"""

import os
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import batching, mlir

_VARIABLE = "RNNATTN_NATIVE"


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
    try:
        kernels = import_module("rnnattn._kernels")
        sets = kernels.instruction_sets()
    except ImportError as error:
        kernels, sets, reason = None, {}, f"the extension is not there: {error}"
    if asked not in (None, "", "off", "avx512", "avx2", "baseline") or (
        kernels and asked not in (None, "", "off", *sets)
    ):
        allowed = ", ".join(map(repr, [*sets, "off"]))
        raise ValueError(f"{_VARIABLE}: expected one of {allowed} on this machine, got {asked!r}")
    if asked == "off":
        return Status(False, reason=f"{_VARIABLE} is 'off'"), {}
    if kernels is None:
        return Status(False, reason=reason), {}
    for name, target in kernels.targets().items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    return Status(True, asked or next(iter(sets))), sets


# How kernels are called; tests set these.
_instruction_set: str | None = None  # the one of `status`
_threads = 0  # all of XLA's


def how() -> dict[str, Any]:
    """Attributes of every call of a kernel."""
    status, sets = _load()
    chosen = sets[_instruction_set or status.instruction_set or ""]
    return {"instruction_set": np.int64(chosen), "threads": np.int64(_threads)}


def dispatched(name, natively, on_xla, shapes, batched):
    """A function of arrays that calls `natively` or `on_xla`, whichever serves where it ends up.

    That is known where a program is lowered, and only there: `natively` runs in one for a single
    CPU device that is not exported. Programs for several devices are left to XLA, which can divide
    them.

    Args:
        natively, on_xla: of arrays and static keywords, lists of arrays.
        shapes: of the same, their `jax.ShapeDtypeStruct`.
        batched: the rule for `vmap`, as JAX wants it.
    """

    @cache
    def primitive():
        # importing this takes longer than all of the library
        from jax.extend.core import Primitive

        defined = Primitive(name)
        defined.multiple_results = True
        defined.def_impl(lambda *x, **how: jax.jit(partial(defined.bind, **how))(*x))
        defined.def_abstract_eval(
            lambda *x, **how: [jax.core.ShapedArray(y.shape, y.dtype) for y in shapes(*x, **how)]
        )
        in_xla = mlir.lower_fun(on_xla, multiple_results=True)
        in_kernels = mlir.lower_fun(natively, multiple_results=True)

        def for_cpu(context, *x, **how):
            return (in_kernels if _serves(context.module_context) else in_xla)(context, *x, **how)

        mlir.register_lowering(defined, in_xla)
        mlir.register_lowering(defined, for_cpu, platform="cpu")
        batching.primitive_batchers[defined] = batched
        return defined

    def call(*x, **how):
        # in `jax.shard_map` arrays have types that a primitive would have to know of
        if jax.sharding.get_abstract_mesh().manual_axes:
            return on_xla(*x, **how)
        return primitive().bind(*x, **how)

    return call


def _serves(module):
    """Whether a program may call kernels: it stays in this process, and on one device."""
    devices = getattr(module.axis_context, "num_devices", 1)
    return devices == 1 and not module.lowering_parameters.for_export
