"""Loading the kernels: whether they are there and may be used, and making them known to XLA.

XLA takes kernels that were built for its own version of the foreign function interface or an older
one, so they are built with the headers of the oldest jaxlib there is to build with, and loaded only
into one that takes them.
"""

import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib
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
    return found()[0]


@cache
def found() -> tuple[Status, dict[str, int]]:
    """What there is, and the number of each instruction set that runs here."""
    asked = os.environ.get(_VARIABLE)
    if asked == "off":
        return Status(False, reason=f"{_VARIABLE} is 'off'"), {}
    sets, reason = _extension()
    if asked and asked not in (
        sets or ("avx512_amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "baseline")
    ):
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
        kernels = import_module("rnnattn.native.kernels")
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
        register = xla_client._xla.register_custom_call_target  # noqa: SLF001
    except AttributeError:  # it may go, not being public
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    else:
        register(name, target, "cpu", 1)


# A program that was compiled and kept finds the kernels by then.
if os.environ.get(_VARIABLE) != "off":
    _extension()
