"""Loading the kernels: into a jaxlib that does not take them, where they are damaged or missing,
from a program that was compiled by another process; and building without what building takes.

What is imported is simulated, in processes of their own: a module whose handlers say that they were
built for whatever version.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rnnattn import native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MAJOR, MINOR = native.ffi_version()

# A module `rnnattn.native.kernels` with one handler. XLA asks a handler for its version through a
# frame that it fills in; the offsets are those of the structs in xla/ffi/api/c_api.h.
FAKE = """
import ctypes, sys, types

version, asked = {version}, []
word = lambda address: ctypes.c_void_p.from_address(address).value

@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
def handler(frame):
    asked.append(version)
    metadata = word(word(frame + 8) + 24)
    ctypes.c_int.from_address(metadata + 24).value = version[0]
    ctypes.c_int.from_address(metadata + 28).value = version[1]

capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype = ctypes.py_object
capsule.argtypes = [ctypes.c_void_p] * 3
fake = types.ModuleType("rnnattn.native.kernels")
fake.ffi_version = lambda: version
fake.instruction_sets = lambda: {{"baseline": 2}}
fake.targets = lambda: {{"fake": capsule(ctypes.cast(handler, ctypes.c_void_p), None, None)}}
sys.modules["rnnattn.native.kernels"] = fake
"""
# The header is missing, as where somebody else packed jaxlib.
NO_HEADERS = "import jax; jax.ffi.include_dir = lambda: '/nowhere'\n"
# What works however the kernels fare.
USE = """
import json, jax, jax.numpy as jnp, rnnattn
status = rnnattn.native.status()
q = jnp.ones((1, 8, 2, 4))
assert rnnattn.dot_product_attention(q, q, q).sum() == 64
print(json.dumps([status.available, status.reason]))
"""


def run(code, **environment):
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={key: x for key, x in os.environ.items() if key != "RNNATTN_NATIVE"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("version", [(MAJOR, MINOR + 1), (MAJOR + 1, 0)])
def test_kernels_that_were_built_for_a_later_jaxlib_are_left_alone(version):
    available, reason = json.loads(run(FAKE.format(version=version) + USE + "assert not asked"))
    assert not available
    assert f"built for version {version[0]}.{version[1]} " in reason
    assert f"has {MAJOR}.{MINOR};" in reason
    assert "pip install --force-reinstall" in reason


@pytest.mark.parametrize(
    "before, version", [("", (0, 0)), (NO_HEADERS, (MAJOR, MINOR + 1)), (NO_HEADERS, (0, 0))]
)
def test_what_jaxlib_refuses_is_refused_when_it_is_loaded(before, version):
    available, reason = json.loads(run(before + FAKE.format(version=version) + USE))
    assert not available
    assert f"refuses the kernels, built for version {version[0]}.{version[1]} " in reason
    assert f"framework's API version ({MAJOR}.{MINOR})" in reason


@pytest.mark.parametrize("before", ["", NO_HEADERS])
def test_kernels_of_the_same_version_are_taken(before):
    code = "import rnnattn; print(rnnattn.native.status().available)"
    assert run(before + FAKE.format(version=(MAJOR, MINOR)) + code).strip() == "True"


@pytest.mark.parametrize(
    "error", ["ImportError('undefined symbol')", "SystemError('no slots')", "OSError(5, 'disk')"]
)
def test_an_extension_that_does_not_load(error):
    code = f"""
import sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "rnnattn.native.kernels":
            raise {error}
sys.meta_path.insert(0, Finder)
"""
    available, reason = json.loads(run(code + USE))
    assert not available
    assert reason.startswith(f"the kernels do not load: {error}; ")


def test_an_extension_of_an_earlier_rnnattn():
    code = (
        "import sys, types; sys.modules['rnnattn.native.kernels'] = types.ModuleType('kernels')\n"
    )
    available, reason = json.loads(run(code + USE))
    assert not available
    assert "ffi_version" in reason


def test_no_extension():
    code = "import sys; sys.modules['rnnattn.native.kernels'] = None\n"
    available, reason = json.loads(run(code + USE))
    assert not available
    assert "C++ compiler" in reason
    assert "pip install --force-reinstall" in reason


def test_a_wrong_variable_is_an_error_where_kernels_are_asked_for():
    code = "import rnnattn\ntry: rnnattn.native.status()\nexcept ValueError as error: print(error)"
    assert "got 'banana'" in run(code, RNNATTN_NATIVE="banana")


def test_off_leaves_the_extension_alone():
    code = USE + "import sys; assert 'rnnattn.native.kernels' not in sys.modules"
    assert json.loads(run(code, RNNATTN_NATIVE="off")) == [False, "RNNATTN_NATIVE is 'off'"]


def test_nothing_is_written():
    hook = """
import sys
def hook(event, arguments):
    if event == "open" and set(str(arguments[1])) & set("wax+"):
        raise SystemExit(f"writes {arguments}")
sys.addaudithook(hook)
"""
    run(hook + USE, JAX_ENABLE_COMPILATION_CACHE="false")


@pytest.mark.skipif(not native.status().available, reason="no kernels")
def test_a_compiled_program_runs_where_only_rnnattn_is_imported(tmp_path):
    """It was compiled in a process, and kept; another loads it."""
    keep = """
import pickle, jax, jax.numpy as jnp, rnnattn
from jax.experimental import serialize_executable
q = jnp.ones((1, 8, 2, 4))
program = jax.jit(lambda q: rnnattn.dot_product_attention(q, q, q)).lower(q).compile()
assert "rnnattn.attention_forward" in program.as_text()
pickle.dump(serialize_executable.serialize(program), open({path!r}, "wb"))
"""
    load = """
import pickle, jax.numpy as jnp, rnnattn
from jax.experimental import serialize_executable
program = serialize_executable.deserialize_and_load(*pickle.load(open({path!r}, "rb")))
print(program(jnp.ones((1, 8, 2, 4))).sum())
"""
    path = str(tmp_path / "program")
    run(keep.format(path=path))
    assert float(run(load.format(path=path))) == 64


# ---- building -----------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path):
    """Runs `setup.py` in a copy of the sources, after some code; gives its log, and the folder."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "rnnattn", tmp_path / "rnnattn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )

    def call(*arguments, before=""):
        code = f"import runpy, sys; sys.argv = ['setup.py', *{arguments}]; {before}\n"
        done = subprocess.run(
            [sys.executable, "-c", code + "runpy.run_path('setup.py')"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, tmp_path

    return call


def test_a_build_without_a_compiler(build):
    log, folder = build("bdist_wheel")
    assert 'building extension "rnnattn.native.kernels" failed' in log
    (wheel,) = folder.glob("dist/*.whl")
    assert "rnnattn/native/load.py" in zipfile.ZipFile(wheel).namelist()


def test_a_build_without_jaxlib(build):
    log, folder = build("bdist_wheel", before="sys.modules['jaxlib'] = None")
    assert "rnnattn: no jaxlib to build with: left without native kernels" in log
    assert list(folder.glob("dist/*-py3-none-any.whl"))


def test_an_editable_install_is_a_path(build):
    """A finder loses to the folder of the clone, which looks like a package from above."""
    _, folder = build("editable_wheel")
    (wheel,) = folder.glob("dist/*.whl")
    paths = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".pth")]
    (path,) = (zipfile.ZipFile(wheel).read(name).decode() for name in paths)
    assert Path(path.strip()) == folder
