"""A few dozen absurd inputs: `absurd.py` draws any number of them."""

import subprocess
import sys

import pytest

from experiments.engine.experiment import ROOT


@pytest.mark.slow
def test_absurd_inputs_end_with_a_line_and_leave_nothing():
    # in an interpreter of its own: it forks, which a process in which JAX has begun must not
    command = [sys.executable, "-m", "tests.experiments.absurd", "--count", "40", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
