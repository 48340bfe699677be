"""The native kernels: an optional extension. All else is in pyproject.toml."""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

SOURCES = ["module", "avx512", "avx2", "baseline"]
FOLDER = Path("rnnattn/_native")

(jaxlib,) = find_spec("jaxlib").submodule_search_locations

setup(
    ext_modules=[
        Extension(
            "rnnattn._kernels",
            [str(FOLDER / f"{name}.cc") for name in SOURCES],
            depends=[str(path) for kind in ("*.h", "*.inc") for path in sorted(FOLDER.glob(kind))],
            include_dirs=[str(Path(jaxlib) / "include")],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-g0"],
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
            optional=True,  # without a compiler all works through XLA
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
