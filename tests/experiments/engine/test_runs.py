"""A run keeps what it did, repeats itself, and is never overwritten unasked."""

import errno
import fcntl
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments.__main__ import main
from experiments.engine.checkpoints import Record
from experiments.engine.config import UsageError
from experiments.engine.experiment import ROOT
from experiments.engine.files import LOCK, locked, written
from experiments.engine.runs import CONFIG, create, reopen
from experiments.engine.sinks import EventFiles, JsonLines
from tests.experiments.sizes import tiny_options

DIGITS = "lstm_digits"


def tiny(output: Path, *options: str, config: str = DIGITS) -> int:
    sizes = tiny_options("lstm_digits") if config == DIGITS else []
    return main(["run", config, *sizes, "--output", str(output), *options])


def timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.endswith(("_seconds", "_per_second"))}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("a path with spaces")
    assert tiny(output, "--name", "first", "--seed", "3") == 0
    return output / "lstm_digits" / "first"


def test_a_run_reproduces_itself_bitwise_from_its_saved_config(finished):
    output = finished.parent.parent
    assert tiny(output, "--name", "again", config=str(finished / "config.toml")) == 0
    again = finished.parent / "again"
    assert [timeless(r) for r in records(again)] == [timeless(r) for r in records(finished)]
    first, second = (json.loads((f / "summary.json").read_text()) for f in (finished, again))
    assert timeless(second) == timeless(first)
    assert (again / "result.npz").read_bytes() == (finished / "result.npz").read_bytes()
    first, second = (tomllib.loads((f / "config.toml").read_text()) for f in (finished, again))
    assert second == first


def test_metrics_hold_every_split_at_its_steps(finished):
    steps = {split: [r["step"] for r in records(finished) if r["split"] == split]
             for split in ("train", "validation", "test")}  # fmt: skip
    assert steps == {"train": [2, 4], "validation": [2, 4], "test": [4]}


def test_summary_says_what_with_and_how_long(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["seed"] == 3
    assert {"python", "jax", "jaxlib", "numpy", "rnnattn"} <= set(summary["versions"])
    assert {
        "test_loss", "test_accuracy", "validation_loss", "train_loss", "device", "cores",
        "wall_seconds", "compile_seconds", "train_seconds",
        "hand_step_seconds", "autodiff_step_seconds", "hand_autodiff_loss_difference",
    } <= set(summary)  # fmt: skip


def test_the_saved_config_names_the_command(finished):
    head = (finished / "config.toml").read_text().splitlines()[0]
    assert head.startswith("# ") and "python -m experiments run " in head and "--seed 3" in head


def test_an_existing_run_is_left_as_it_is(finished, capsys):
    content = lambda: {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}
    before = content()
    output = finished.parent.parent
    assert tiny(output, "--name", "first") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(finished) in message and "exists" in message
    assert content() == before


def test_overwrite_replaces_a_run(tmp_path):
    folder = create(tmp_path, "lstm_digits", "old")
    (folder / "config.toml").write_text('experiment = "lstm_digits"')
    (folder / "stale").touch()
    assert tiny(tmp_path, "--name", "old", "--overwrite", "--compare-steps", "0") == 0
    assert (folder / "summary.json").exists() and not (folder / "stale").exists()


def test_overwrite_touches_nothing_that_is_not_a_run(tmp_path, capsys):
    precious = tmp_path / "lstm_digits" / "precious"
    precious.mkdir(parents=True)
    (precious / "thesis.txt").touch()
    assert tiny(tmp_path, "--name", "precious", "--overwrite") == 2
    assert "not the folder of a run" in capsys.readouterr().err
    assert (precious / "thesis.txt").exists()


def test_overwrite_needs_a_name(tmp_path, capsys):
    assert tiny(tmp_path, "--overwrite") == 2
    assert "--name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../out", "a/b", "..", ".", "", "/tmp/out", "a\nb"])
def test_a_name_is_one_plain_folder(name, tmp_path, capsys):
    assert tiny(tmp_path / "outputs", "--name", name, "--overwrite") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--name" in message
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["../../x", "../x", "{there}", ".", "..", "a/b", "", "x\n"])
def test_going_on_is_for_plain_names_too(name, tmp_path, capsys):
    for folder in ("x", "outputs/x", "outputs/lstm_digits/a/b"):
        (tmp_path / folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert tiny(tmp_path / "outputs", "--name", name.format(there=tmp_path / "x"), "--resume") == 2
    message = capsys.readouterr().err
    why = "has characters that are not printed" if "\n" in name else "is no name for a folder"
    assert message.count("\n") == 1 and why in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("thesis.txt", b""),
        ("metrics.jsonl", b"{}"),
        ("config.toml", b""),
        ("config.toml", b"[package]\nname = 'somebody'"),
        ("config.toml", b"="),
        ("config.toml", b"\xff"),
    ],
)
def test_what_is_no_run_stays_as_it_is(option, name, content, tmp_path, capsys):
    precious = tmp_path / "lstm_digits" / "precious"
    precious.mkdir(parents=True)
    (precious / name).write_bytes(content)
    assert tiny(tmp_path, "--name", "precious", option) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith(option) and str(precious) in message
    assert [path.name for path in precious.iterdir()] == [name]
    assert (precious / name).read_bytes() == content


@pytest.mark.parametrize("there", [[], [LOCK], [f"{CONFIG}.new"]])
def test_what_was_cut_off_before_its_config_was_there_begins(there, tmp_path):
    for name in there:
        (reopen(tmp_path, "lstm_digits", "x", {}) / name).touch()
    assert reopen(tmp_path, "lstm_digits", "x", {}) == tmp_path / "lstm_digits" / "x"


# ---- what is whole, finished, and whose ----------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("error", [lambda: OSError(28, "full"), KeyboardInterrupt])
def test_a_file_is_written_whole_or_not_at_all(before, error, tmp_path):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises((OSError, KeyboardInterrupt)) as raised, written(path) as file:
        file.write(b"half")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before
        raise error()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path)
    with written(path) as file:
        file.write(b"whole")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.slow
@pytest.mark.parametrize("summary", [None, b"", b"[]", b"\xff", b'{"seed": 3}', b"[" * 99999])
def test_finished_is_what_the_summary_says(summary, finished, tmp_path, capsys):
    """And not whether there is a figure, as a process leaves it that dies as it opens the file."""
    folder = tmp_path / "lstm_digits" / "x"
    shutil.copytree(finished, folder)
    (folder / "figure.png").write_bytes(b"")
    if summary is None:
        (folder / "summary.json").unlink()
    else:
        (folder / "summary.json").write_bytes(summary)
    assert main(["compare", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "is not finished" in message
    if summary not in (None, b"\xff"):  # one question is asked by all commands
        return
    assert tiny(tmp_path, "--name", "x", "--seed", "3", "--resume") == 0
    assert (folder / "figure.png").read_bytes() == (finished / "figure.png").read_bytes()
    assert ": finished" not in capsys.readouterr().out


def test_a_run_that_is_being_written_is_left_to_the_process_that_has_it(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "lstm_digits" / "x")
    folder = tmp_path / "lstm_digits" / "x"
    (folder / "summary.json").unlink()
    content = lambda: {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with locked(folder):
        before = content()
        for option in ("--resume", "--overwrite"):
            assert tiny(tmp_path, "--name", "x", "--seed", "3", option) == 2
            message = capsys.readouterr().err
            assert message.count("\n") == 1
            assert f"{folder}: is running, as process {os.getpid()} on " in message
        assert content() == before
    assert not (folder / LOCK).exists()


def test_a_lock_ends_with_its_process(tmp_path):
    hold = "import sys, os; from experiments.engine.files import *; "
    hold += "held = locked(Path(sys.argv[1])); held.__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        with pytest.raises(UsageError, match="is running"), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def meanwhile(file, operation):
        flock(file, operation)
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK).exists()


def test_where_there_are_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{tmp_path / LOCK}: no lock (No locks" in message


def test_default_names_are_unique(tmp_path):
    assert len({create(tmp_path, "group", None) for _ in range(5)}) == 5


def test_an_output_that_is_no_folder_is_one_message(tmp_path, capsys):
    blocked = tmp_path / "blocked"
    blocked.touch()
    for output in (blocked, blocked / "below"):
        for name in ([], ["--name", "x"]):
            assert tiny(output, *name) == 2
            message = capsys.readouterr().err
            assert message.count("\n") == 1 and "--output" in message and str(blocked) in message


# ---- for other programs to show ------------------------------------------------------------------


def points(folder: Path) -> list[tuple[str, int, float]]:
    """Curve, step and value of all that the event files hold."""
    found = []
    for file in folder.iterdir():
        content = file.read_bytes()
        while content:
            # the length, its checksum, and as much with a checksum
            size = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return sorted(found)


@pytest.mark.slow
def test_a_trace_and_event_files_are_kept_if_asked_for_and_change_nothing(finished, tmp_path):
    options = ["--name", "x", "--seed", "3", "--tensorboard"]
    assert tiny(tmp_path, *options, "--profile") == 0
    folder = tmp_path / "lstm_digits" / "x"
    assert [timeless(r) for r in records(folder)] == [timeless(r) for r in records(finished)]
    assert (folder / "result.npz").read_bytes() == (finished / "result.npz").read_bytes()

    (trace,) = folder.glob("profile/**/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    traced = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(traced) == ["3", "4"]

    expected = sorted(
        (f"{record['split']}/{name}", record["step"], np.float32(value))
        for record in records(folder)
        for name, value in record.items()
        if name not in ("step", "split")
    )
    assert points(folder / "tensorboard") == expected
    # a run that goes on logs its records again, but has each of them once
    (folder / "summary.json").unlink()
    assert tiny(tmp_path, *options, "--resume") == 0
    assert points(folder / "tensorboard") == expected


def test_curves_of_several_trainings_are_told_apart(tmp_path):
    sink = EventFiles(tmp_path)
    for method in ("a", "b"):
        sink.log({"step": 3, "split": "test", "method": method, "accuracy": 0.5})
    sink.close()
    assert points(tmp_path) == [("test/a/accuracy", 3, 0.5), ("test/b/accuracy", 3, 0.5)]


class RecordedRun:
    """What Weights & Biases gives, as far as a run uses it."""

    def __init__(self, **asked) -> None:
        self.asked, self.finished = asked, 0
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []

    def define_metric(self, name, step_metric) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def begun(monkeypatch) -> list[RecordedRun]:
    """The runs that were begun with a package that stands in for Weights & Biases."""
    begun: list[RecordedRun] = []

    def init(**asked) -> RecordedRun:
        begun.append(RecordedRun(**asked))
        return begun[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return begun


def test_weights_and_biases_are_given_all_and_change_nothing(begun, finished, tmp_path):
    assert tiny(tmp_path, "--name", "x", "--seed", "3", "--wandb", "digits") == 0
    folder = tmp_path / "lstm_digits" / "x"
    assert [timeless(r) for r in records(folder)] == [timeless(r) for r in records(finished)]
    (run,) = begun
    assert run.asked["project"] == "digits" and run.asked["dir"] == str(folder)
    assert (run.asked["group"], run.asked["name"]) == ("lstm_digits", "x")
    assert run.asked["config"]["train"]["steps"] == 4 and run.asked["config"]["seed"] == 3
    assert run.metrics == [("*", "step")] and run.finished == 1
    assert run.logged == [
        {f"{record['split']}/{name}": value for name, value in record.items()
         if name not in ("step", "split")} | {"step": record["step"]}
        for record in records(folder)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_run_that_fails_is_finished_with_weights_and_biases_too(begun, tmp_path):
    options = ["--train.learning-rate", "1e38", "--train.schedule", "constant", "--wandb", "x"]
    assert tiny(tmp_path, *options, "--train.warmup", "0") == 1
    assert [run.finished for run in begun] == [1]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs wandb")
def test_weights_and_biases_write_a_run_to_the_folder_where_there_is_no_network(finished, tmp_path):
    """The package itself, in a process of its own, as it begins one."""
    options = [*tiny_options("lstm_digits"), "--output", str(tmp_path), "--name", "x"]
    subprocess.run(
        [sys.executable, "-m", "experiments", "run", DIGITS, *options, "--seed", "3",
         "--wandb", "digits"],
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    folder = tmp_path / "lstm_digits" / "x"
    assert [timeless(r) for r in records(folder)] == [timeless(r) for r in records(finished)]
    (kept,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for record in records(folder):
        for name in record.keys() - {"step", "split"}:
            assert f"{record['split']}/{name}".encode() in content


def test_weights_and_biases_that_are_not_there_are_a_line(tmp_path, monkeypatch, capsys):
    # as after `import wandb` of the folder that its runs lie in
    for module in (None, SimpleNamespace()):
        monkeypatch.setitem(sys.modules, "wandb", module)
        assert tiny(tmp_path / "new", "--wandb", "x") == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "pip install wandb" in message
        assert not (tmp_path / "new").exists()

    def no_account(**asked):
        raise RuntimeError("api_key not configured\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=no_account))
    assert tiny(tmp_path, "--wandb", "x") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "api_key" in message and "WANDB_MODE=offline" in message


def test_what_an_earlier_process_logged_stays_until_there_is_more(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cases: list[tuple[list[Record], bytes]] = [
        ([], b""),
        ([{"step": 1}], b'{"step": 1}\n'),
        ([], b'{"step": 1}\n'),
        ([{"step": 2}, {"step": 3}], b'{"step": 2}\n{"step": 3}\n'),
    ]
    for records, content in cases:
        sink = JsonLines(path)
        for record in records:
            sink.log(record)
        sink.close()
        assert path.read_bytes() == content


def test_what_trains_nothing_has_no_trace(tmp_path, capsys):
    config = "lstm_equations"
    assert tiny(tmp_path / "x", "--profile", config=config) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--profile" in message
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_loss_that_is_not_finite_ends_the_run_naming_step_and_metric(tmp_path, capsys):
    options = ["--train.learning-rate", "1e38", "--train.schedule", "constant"]
    assert tiny(tmp_path, "--name", "hot", *options, "--train.warmup", "0") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "step 2: loss is" in message
    assert (tmp_path / "lstm_digits" / "hot" / "config.toml").exists()


@pytest.mark.slow
def test_without_a_terminal_a_command_says_how_far_it_is_line_by_line(tmp_path):
    command = [sys.executable, "-m", "experiments", "run", DIGITS, *tiny_options("lstm_digits")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path), "--compare-steps", "0"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert "test_accuracy" in done.stdout
    (folder,) = (tmp_path / "lstm_digits").iterdir()
    lines = done.stderr.splitlines()
    assert len(lines) == len(records(folder))
    for line, record in zip(lines, records(folder), strict=True):
        assert line.startswith(f"step {record['step']} of 4: {record['split']}: loss ")
        assert f"{record['loss']:.4g}" in line and f"accuracy {record['accuracy']:.4g}" in line
        assert re.search(r"; 0:00:\d\d left$", line)
    assert lines[-1].endswith("; 0:00:00 left")


def test_a_bad_command_exits_with_two():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "run", "configs/none.toml"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
