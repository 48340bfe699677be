"""The native kernels: an optional extension. All else is in pyproject.toml.

With RNNATTN_BUILD=debug in the environment they are built for a debugger: with symbols, and
optimised no further than it can follow. With RNNATTN_BUILD=quick they take half the time to build,
and are slower, which does for a test of the build.

    RNNATTN_BUILD=debug python setup.py build_ext --inplace
    python setup.py compile_commands
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(map(str, Path("rnnattn/native/src").glob("*.cc")))
BUILDS = {
    "": (["-O3", "-g0"], ["-Wl,-s"]),
    "debug": (["-Og", "-g"], []),
    "quick": (["-O1", "-g0"], ["-Wl,-s"]),
}


def extensions():
    """The kernels, if there is jaxlib, whose headers they are compiled with."""
    jaxlib = find_spec("jaxlib")
    if jaxlib is None:
        print("rnnattn: no jaxlib to build with: left without native kernels", file=sys.stderr)
        return []
    compile_args, link_args = BUILDS[os.environ.get("RNNATTN_BUILD", "")]
    return [
        Extension(
            "rnnattn.native.kernels",
            SOURCES,
            include_dirs=[str(Path(jaxlib.submodule_search_locations[0], "include"))],
            extra_compile_args=["-std=c++17", "-fvisibility=hidden", *compile_args],
            extra_link_args=link_args,
            py_limited_api=True,
            optional=True,  # without a compiler all works through XLA
        )
    ]


class BuildExtension(build_ext):
    """Compiles as many sources at a time as there are processors; setuptools, one by one."""

    def build_extension(self, ext):
        one_by_one = self.compiler.compile

        def compile_together(sources, *arguments, **options):
            compile_one = lambda source: one_by_one([source], *arguments, **options)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [path for paths in pool.map(compile_one, sources) for path in paths]

        self.compiler.compile = compile_together
        super().build_extension(ext)


class CompileCommands(Command):
    """compile_commands.json, where clangd and other tools look up how a source is compiled."""

    user_options: ClassVar[list] = []

    def initialize_options(self): ...

    def finalize_options(self): ...

    def run(self):
        commands = []
        for extension in self.distribution.ext_modules:
            folders = [*extension.include_dirs, get_path("include")]
            command = [os.environ.get("CXX", "c++"), *extension.extra_compile_args]
            command += [f"-I{folder}" for folder in folders]
            commands += [
                {"directory": os.getcwd(), "file": file, "arguments": [*command, "-c", file]}
                for file in extension.sources
            ]
        Path("compile_commands.json").write_text(json.dumps(commands, indent=2) + "\n")


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "compile_commands": CompileCommands},
    options={
        "bdist_wheel": {"py_limited_api": "cp311"},
        "build_ext": {"force": True},  # what an earlier build left may be for another jaxlib
    },
)
