"""Strict settings for the whole suite: float64 on, no silent promotion of dtype or rank."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# The list of fonts is the clone's own: that of the user may name those of an environment which is
# gone, and Matplotlib then warns of each in the middle of what a command says.
os.environ.setdefault("MPLCONFIGDIR", str(Path(__file__).parent / ".cache" / "matplotlib"))

import jax
import jaxlib
import jaxtyping
import matplotlib
import pytest

# Most of the suite's time goes into compiling programs that run for milliseconds. That takes two
# thirds of it without LLVM's optimisations, and half of that with XLA's older emitter of loops; the
# emitter is gone from 0.11 on, where an unknown flag ends the process. Each program as one module
# of LLVM saves a fifth of the rest, and a tenth that nothing says where in the sources an
# operation comes from. An XLA_FLAGS of one's own is left as it is: `XLA_FLAGS=" " make test`
# compiles as users do.
flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # of other processes
# Tracing makes many objects, most of which live: to look for garbage among them as often as Python
# does by itself takes a tenth of the time.
gc.set_threshold(100_000)
matplotlib.use("Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt what they start
jax.config.update("jax_num_cpu_devices", 8)  # what runs on several is tested on the CPU
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """What one process of a session compiles, the others load: the workers, and what tests start.

    The suite takes a tenth less for it. For some processors XLA says of each program that it loads
    that a feature is missing, which is none (jax-ml/jax issue 38445); tests read what commands say,
    so that there nothing is kept. In a folder of one's own, JAX_COMPILATION_CACHE_DIR, it stays.
    """
    if hasattr(config, "workerinput"):
        return
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="rnnattn-programs-")
        config.add_cleanup(temporary.cleanup)
        folder = temporary.name
    keep = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    variables = {name.upper(): str(value) for name, value in keep.items()}
    load = "import jax; [(jax.jit(abs)(-1), jax.clear_caches()) for _ in range(2)]"
    run = subprocess.run(
        [sys.executable, "-c", load], env=os.environ | variables, capture_output=True, check=False
    )
    if run.returncode == 0 and not run.stderr:
        os.environ.update(variables)
        for name, value in keep.items():
            jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _examples_run_as_users_run_them(request):
    """The examples of docstrings see JAX's default precision."""
    with jax.enable_x64(not isinstance(request.node, pytest.DoctestItem)):
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_programs_at_a_time():
    """Lets go of compiled programs before they are too many for Linux.

    It gives a process 65,530 mappings of memory by default, of which a program takes about three,
    and one too many is a segmentation fault in the compiler.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def only_own_checks(monkeypatch):
    """Without the suite's type checker, which refuses some arguments before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
