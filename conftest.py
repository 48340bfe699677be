"""Strict settings for the whole suite: float64 on, no silent promotion of dtype or rank."""

import signal

import jax
import matplotlib
import pytest

matplotlib.use("Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt what they start
jax.config.update("jax_num_cpu_devices", 8)  # what runs on several is tested on the CPU
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _examples_run_as_users_run_them(request):
    """The examples of docstrings see JAX's default precision."""
    with jax.enable_x64(not isinstance(request.node, pytest.DoctestItem)):
        yield
