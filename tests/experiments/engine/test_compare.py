"""Sweeps run and resume every combination, and runs are set side by side."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.__main__ import main
from experiments.engine import compare, runs
from experiments.engine.config import UsageError
from experiments.engine.experiment import ROOT
from experiments.engine.runs import FIGURE

ADDING = "lstm_adding"


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """Two learning rates, one of which no run survives, with two seeds each."""
    output = tmp_path_factory.mktemp("sweep")
    assert sweep(output, "train.learning-rate=1e-3,1e38", "seed=0,1") == 1
    return output / "lstm_adding-sweep"


def sweep(output: Path, *grid: str) -> int:
    return main(["sweep", ADDING, "--quick", "--output", str(output), "--grid", *grid])


def test_every_combination_runs_and_one_that_fails_does_not_stop_the_rest(swept):
    finished = {path.parent.name for path in swept.glob(f"*/{FIGURE}")}
    assert finished == {"learning_rate-1e-3_seed-0", "learning_rate-1e-3_seed-1"}
    assert (swept / "learning_rate-1e38_seed-0").is_dir()
    assert (swept / "sweep.png").stat().st_size > 10_000


def test_a_sweep_ends_with_a_table_of_means_over_seeds_and_of_what_failed(swept):
    head, _, row, *rest = (swept / "sweep.md").read_text().splitlines()
    assert "test_loss" in head and "test_accuracy" in head
    assert row.startswith("| learning_rate-1e-3 | 2 ") and "±" in row
    failures = [line for line in rest if "failed" in line]
    assert len(failures) == 2 and all("1e38" in line and "step" in line for line in failures)


def test_a_sweep_that_is_run_again_leaves_what_is_finished(swept, capsys):
    run = swept / "learning_rate-1e-3_seed-0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert sweep(swept.parent, "train.learning_rate=1e-3", "seed=0") == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "learning_rate-1e-3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "grid, part",
    [
        ([], "seed=0,1,2"),
        (["seed"], "seed=0,1,2"),
        (["seed=0,,1"], "seed=0,1,2"),
        (["seed=0", "seed=1"], "twice"),
        (["seed=0,-1"], "seed"),
        (["name=a,b"], "name is an option"),
        (["output=/a,/b"], "output is an option"),
        (["resume=True"], "resume is an option"),
        (["seed=0,0"], "seed has a value twice"),
        (["seed=01,1"], "seed-01 and seed-1 would be one run"),
        (["train.learning_rate=1e-3,0.001"], "would be one run"),
    ],
)
def test_a_grid_that_will_not_do_is_said_before_anything_runs(grid, part, tmp_path, capsys):
    assert sweep(tmp_path / "new", *grid) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_runs_are_compared_by_their_curves_and_scores(swept, tmp_path, capsys):
    folders = [str(swept / f"learning_rate-1e-3_seed-{seed}") for seed in (0, 1)]
    figure = tmp_path / "new" / "figure.png"
    assert main(["compare", *folders, "--output", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "test_loss" in lines[0] and "seed-0" in lines[2] and "seed-1" in lines[3]
    assert figure.stat().st_size > 10_000


def test_what_cannot_be_compared_is_said_in_a_line(swept, tmp_path, capsys):
    for folder, part in (
        (tmp_path, "is not the folder of a run"),
        (swept / "learning_rate-1e38_seed-0", "is not finished"),
    ):
        assert main(["compare", str(folder)]) == 2
        message = capsys.readouterr().err
        assert part in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "line", [b'{"step": 1', b"", b"[]", b"{}", b"\xff", b"[" * 99999, b'{"step": 1, "loss": 2}']
)
def test_a_damaged_line_of_the_metrics_is_named(line, swept, tmp_path, capsys):
    folder = tmp_path / "x"
    shutil.copytree(swept / "learning_rate-1e-3_seed-0", folder)
    metrics = folder / "metrics.jsonl"
    first, *rest = metrics.read_bytes().splitlines()
    metrics.write_bytes(b"\n".join([first, line, *rest]))
    assert main(["compare", str(folder), "--output", str(tmp_path / "new" / "f.png")]) == 2
    message = capsys.readouterr().err
    assert message == f"{metrics}: line 2 is damaged\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["x", "x.xyz", "x.png.", ".png"])
def test_a_figure_ends_in_a_format(name, swept, tmp_path, capsys):
    folder = str(swept / "learning_rate-1e-3_seed-0")
    assert main(["compare", folder, "--output", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and ".png" in message and str(tmp_path / name) in message
    assert list(tmp_path.iterdir()) == []


def test_a_figure_of_any_format_is_whole(swept, tmp_path):
    folder = str(swept / "learning_rate-1e-3_seed-0")
    for name, head in (("x.pdf", b"%PDF"), ("x.svg", b"<?xml"), ("x.PNG", b"\x89PNG")):
        assert main(["compare", folder, "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(head)


def test_comparing_nothing_and_exporting_to_a_folder_are_one_line(swept, tmp_path, capsys):
    folder = str(swept / "learning_rate-1e-3_seed-0")
    for arguments in (["compare"], ["export", folder, "--output", str(tmp_path)]):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "got \n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        UsageError("is running"),
        FloatingPointError("step 1: loss is nan"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        jax.errors.JaxRuntimeError("INTERNAL: a kernel failed"),
        OSError(28, "No space left on device", "result.npz"),
        ValueError("shapes (3,) and (4,)\nand more"),
        AssertionError(),
    ],
)
def test_a_run_that_fails_does_not_stop_a_sweep(error, swept, tmp_path, monkeypatch, capsys):
    record = runs.record

    def failing(module, config, folder, **asked):
        if config.seed == 0:
            raise error
        return record(module, config, folder, **asked)

    group = tmp_path / "lstm_adding-sweep"
    shutil.copytree(swept / "learning_rate-1e-3_seed-1", group / "seed-1_learning_rate-1e-3")
    monkeypatch.setattr(runs, "record", failing)
    assert sweep(tmp_path, "seed=0,1", "train.learning_rate=1e-3") == 1
    first = next(iter(str(error).splitlines()), "AssertionError")
    table = (group / "sweep.md").read_text().splitlines()
    (failure,) = [line for line in table if "failed" in line]
    assert failure.startswith("seed-0_") and first in failure
    out, message = capsys.readouterr()
    assert failure in out and message.endswith(f"{failure.replace('failed: ', '')}\n")
    # of what nobody expected, all of it
    assert ("Traceback" in message) == isinstance(error, ValueError | AssertionError)


def test_a_sweep_of_which_nothing_is_left_says_so(tmp_path, capsys):
    blocked = tmp_path / "lstm_adding-sweep"
    blocked.mkdir()
    (blocked / "seed-0").touch()
    assert sweep(tmp_path, "seed=0") == 1
    assert "seed-0: failed: --resume" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_told_to_stop_keeps_what_it_has_and_begins_no_other_run(number, tmp_path):
    grid = ["seed=0,1", "train.steps=2000", "train.log_every=1", "model.hidden_size=4"]
    command = [sys.executable, "-m", "experiments", "sweep", ADDING, "--quick", "--output"]
    process = subprocess.Popen(
        [*command, str(tmp_path), "--grid", *grid], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("*/*/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 75, message
    assert message.splitlines()[-1].endswith("of 2000; the same command goes on from there")
    (folder,) = (tmp_path / "lstm_adding-sweep").iterdir()
    assert list((folder / "checkpoints").iterdir())


def test_two_combinations_never_share_a_folder(tmp_path):
    # 12 in Python's way, and two values; a space is none for a folder's name
    grid = ["--grid", "betas=1 2,1_2"]
    assert main(["sweep", "attention_averaging", "--output", str(tmp_path), *grid]) == 0
    folders = sorted(path.name for path in (tmp_path / "attention_averaging-sweep").glob("*/"))
    assert len(folders) == 2 and folders[0] == "betas-1_2"
    assert re.fullmatch("betas-1_2-[0-9a-f]{8}", folders[1])


@pytest.mark.parametrize(
    "grid, names",
    [
        (["train.learning-rate=1e-3,3e-3", "seed=0"],
         ["learning_rate-1e-3_seed-0", "learning_rate-3e-3_seed-0"]),
        # whatever else is in the sweep
        (["data.path=a b,a_b"], ["path-a_b-28faec3a", "path-a_b"]),
        (["data.path=a b"], ["path-a_b-28faec3a"]),
        (["data.steps=1", "train.steps=1,2"],
         ["data.steps-1_train.steps-1", "data.steps-1_train.steps-2"]),
    ],
)  # fmt: skip
def test_combinations_are_named_by_what_tells_them_apart(grid, names):
    assert compare.names_of(compare.combinations(compare.parse_grid(grid))) == names


@pytest.mark.parametrize(
    "values",
    [
        {"a": ["1_b-2", "1"], "b": ["3", "2_b-3"]},
        {"a": ["x" * 300 + "1", "x" * 300 + "2", "x" * 300]},
        {"a": ["ä", "ö", "_", "..", "/", "%"]},
    ],
)
def test_names_are_plain_short_and_unique(values):
    combinations = compare.combinations(values)
    names = compare.names_of(combinations)
    assert len(set(names)) == len(combinations)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) for name in names)


def test_a_grid_is_keys_with_values():
    with pytest.raises(UsageError, match="should be"):
        compare.parse_grid(["=1"])
