"""The walk of docs/add_an_experiment.md: its files, in a copy of the repository, do as it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.engine.experiment import ROOT
from experiments.engine.runs import read_summary

pytestmark = pytest.mark.slow

TEXT = (ROOT / "docs" / "add_an_experiment.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^`([\w/.]+)`[^\n]*:\n\n```(?:python|toml)\n(.*?)^```$", TEXT, re.M | re.S)
)
NAMES = ("parity", "softmax_shift")
SOURCES = "experiments/data/sources.py"
DIFF = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with the files of the page."""
    folder = tmp_path_factory.mktemp("copy") / "repository"
    without = shutil.ignore_patterns("__pycache__")
    for part in ("experiments", "configs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=without)
    for part in ("rnnattn", "conftest.py", "pyproject.toml"):
        (folder / part).symlink_to(ROOT / part)
    for name, content in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(content)
    # each run of lines that go, with the run of those that come for them
    (diff,) = DIFF
    sources = (folder / SOURCES).read_text()
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M):
        old, new = (re.sub("^[-+]", "", lines, flags=re.M) for lines in (old, new))
        assert sources.count(old) == 1
        sources = sources.replace(old, new)
    (folder / SOURCES).write_text(sources)
    return folder


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_the_files_of_a_data_set_a_task_and_a_claim():
    assert list(FILES) == [
        "experiments/data/parity.py",
        "experiments/data/stripes.py",
        "experiments/tasks/parity.py",
        "configs/tasks/parity.toml",
        "experiments/claims/softmax_shift.py",
        "configs/claims/softmax_shift.toml",
    ]


def test_both_are_listed_and_run_by_their_names(copy):
    listed = python(copy, "-m", "experiments", "list")
    assert all(re.search(rf"^{name} ", listed, re.M) for name in NAMES)
    output = python(copy, "-m", "experiments", "run", "softmax_shift", "--quick")
    assert "A10  holds: A constant added to all logits changes nothing" in output
    assert "test_accuracy" in python(copy, "-m", "experiments", "run", "parity", "--quick")


def test_images_of_another_source_are_told_apart(copy):
    options = ["--data.source", "stripes", "--train.steps", "60", "--name", "x", "--output", "."]
    python(copy, "-m", "experiments", "run", "vit_digits", "--quick", *options)
    summary = read_summary(copy / "vit_digits" / "x")
    assert summary["test_accuracy"] > 0.7 and summary["data_licence"] == "Apache-2.0"


def test_the_walking_tests_and_those_of_imports_find_them(copy):
    tests = ["tests/experiments/test_experiments.py", "tests/experiments/test_configs.py"]
    chosen = " or ".join([*NAMES, "every_experiment", "names_and_claims", "list_names"])
    command = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
    # for each name a run, a default, large numbers and the comments of its config
    assert "11 passed" in python(copy, *command, *tests, "-k", chosen)
    python(copy, *command, "tests/test_imports.py", "-k", "an_experiment_imports or circle")


def test_its_files_are_written_as_the_others_are(copy):
    files = [SOURCES, *(name for name in FILES if name.endswith(".py"))]
    python(copy, "-m", "ruff", "check", *files)
    python(copy, "-m", "ruff", "format", "--check", *files)
