"""The C++ sources: each file includes what it uses, so that an editor can open it alone."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow

SOURCES = sorted(Path(__file__).resolve().parent.parent.glob("rnnattn/native/src/*"))
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.thorough
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_source_can_be_parsed_alone(source):
    """And no name of it hides another."""
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-Wshadow", "-Werror=shadow"]
    for folder in (jax.ffi.include_dir(), sysconfig.get_paths()["include"]):
        command += ["-isystem", folder]
    parsed = subprocess.run([*command, "-x", "c++", source], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
