"""The native kernels: an optional extension. All else is in pyproject.toml."""

import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

SOURCES = ["module", "attention_handlers", "lstm_handlers", "avx512", "avx2", "baseline"]
FOLDER = Path("rnnattn/native/src")


def extensions():
    """The kernels, if there is jaxlib, whose headers they are compiled with."""
    jaxlib = find_spec("jaxlib")
    if jaxlib is None:
        print("rnnattn: no jaxlib to build with: left without native kernels", file=sys.stderr)
        return []
    return [
        Extension(
            "rnnattn.native.kernels",
            [str(FOLDER / f"{name}.cc") for name in SOURCES],
            include_dirs=[str(Path(jaxlib.submodule_search_locations[0], "include"))],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-g0"],
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
            optional=True,  # without a compiler all works through XLA
        )
    ]


setup(
    ext_modules=extensions(),
    options={
        "bdist_wheel": {"py_limited_api": "cp311"},
        "build_ext": {"force": True},  # what an earlier build left may be for another jaxlib
    },
)
