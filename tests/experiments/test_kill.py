"""Runs that are killed within the writing of their files; `kill.py` itself kills many more."""

import subprocess
import sys

import pytest

from experiments.engine.experiment import ROOT


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_writes_goes_on_as_if_it_was_not():
    command = [sys.executable, "-m", "tests.experiments.kill", "--moments", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 killed, 0 differ" in done.stdout
