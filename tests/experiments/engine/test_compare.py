"""Sweeps run and resume every combination, and runs are set side by side."""

import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.engine import compare, jobs, runs
from experiments.engine.config import UsageError
from experiments.engine.experiment import ROOT, find
from experiments.engine.runs import FIGURE
from experiments.engine.session import Stopped
from experiments.engine.training import TrainConfig
from experiments.figures import overlaid_curves
from experiments.tasks import lstm_adding

ADDING = "lstm_adding"

TINY = ["--train.steps", "4", "--train.batch-size", "4", "--train.log-every", "2"]
TINY += ["--model.hidden-size", "3", "--data.length", "4", "--data.held-out", "8"]
TINY += ["--compare-steps", "0"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """Two learning rates, one of which no run survives, with two seeds each."""
    output = tmp_path_factory.mktemp("sweep")
    assert sweep(output, "train.learning-rate=1e-3,1e38", "seed=0,1") == 1
    return output / "lstm_adding-sweep"


def sweep(output: Path, *grid: str) -> int:
    where = ["--output", str(output)]
    return main(["sweep", ADDING, "--quick", *TINY, *where, "--grid", *grid])


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
    assert "test_loss" in lines[0] and figure.stat().st_size > 10_000
    # they differ in the seed alone
    assert lines[2].startswith("| learning_rate-1e-3_seed-* | 2 ") and "±" in lines[2]
    assert main(["compare", *folders, "--each", "--output", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "seed-0" in lines[2] and "seed-1" in lines[3] and "±" not in lines[2] + lines[3]


def test_what_the_settings_of_runs_differ_in_is_told(swept):
    run = compare.read_run(swept / "learning_rate-1e-3_seed-0")
    train = replace(run.config.train, learning_rate=0.1)
    other = run._replace(config=replace(run.config, train=train, seed=3))
    lines = compare.differences({"a": [run], "b": [other]})
    assert lines == ["train.learning_rate: 0.001 (a), 0.1 (b)"]


def test_what_cannot_be_compared_is_said_in_a_line(swept, tmp_path, capsys):
    for folder, part in (
        (tmp_path, "is not the folder of a run"),
        (swept / "learning_rate-1e38_seed-0", "is not finished"),
    ):
        assert main(["compare", str(folder)]) == 2
        message = capsys.readouterr().err
        assert part in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1', b"", b"[]", b"{}", b"\xff", b"[" * 99999, b'{"step": 1, "loss": 2}',
        b'{"step": 1, "split": "train", "loss": "abc"}',
        b'{"step": 1, "split": "train", "loss": null}',
        b'{"step": "1", "split": "train", "loss": 2}',
        b'{"step": 1, "split": ["train"], "loss": 2}',
        b'{"step": 1, "split": "train", "loss": 1%s}' % (b"0" * 400),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_metrics_that_are_missing_are_named(command, swept, tmp_path, capsys):
    folder = shutil.copytree(swept / "learning_rate-1e-3_seed-0", tmp_path / "x")
    (folder / "metrics.jsonl").unlink()
    assert main([command, str(folder)]) == 2
    message = capsys.readouterr().err
    assert message == f"{folder / 'metrics.jsonl'}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("name", ["x", "x.xyz", "x.png.", ".png"])
def test_a_figure_ends_in_a_format(name, swept, tmp_path, capsys):
    folder = str(swept / "learning_rate-1e-3_seed-0")
    assert main(["compare", folder, "--output", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and ".png" in message and str(tmp_path / name) in message
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_cannot_be_written_is_named_as_it_was_asked_for(swept, tmp_path, capsys):
    figure = tmp_path / "x.png"
    figure.mkdir()
    folder = str(swept / "learning_rate-1e-3_seed-0")
    assert main(["compare", folder, "--output", str(figure)]) == 1
    assert capsys.readouterr().err == f"stopped: {figure}: Is a directory\n"
    assert list(tmp_path.iterdir()) == [figure]


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
    assert failure in out and failure.replace("failed: ", "") in message.splitlines()
    # of what nobody expected, all of it
    assert ("Traceback" in message) == isinstance(error, ValueError | AssertionError)


def test_a_sweep_of_which_nothing_is_left_says_so(tmp_path, capsys):
    blocked = tmp_path / "lstm_adding-sweep"
    blocked.mkdir()
    (blocked / "seed-0").touch()
    assert sweep(tmp_path, "seed=0") == 1
    assert "seed-0: failed: --resume" in capsys.readouterr().out


def test_a_folder_that_a_sweep_cannot_make_is_said_once(tmp_path, capsys):
    blocked = tmp_path / "lstm_adding-sweep"
    blocked.touch()
    assert sweep(tmp_path, "seed=0,1") == 2
    assert capsys.readouterr().err == f"--output: cannot write {blocked}: File exists\n"


def test_a_table_that_cannot_be_kept_is_printed_all_the_same(swept, tmp_path, capsys):
    folder = shutil.copytree(swept, tmp_path / swept.name)
    (folder / "sweep.md").unlink()
    (folder / "sweep.md").mkdir()
    assert sweep(tmp_path, "train.learning-rate=1e-3", "seed=0,1") == 1
    out, message = capsys.readouterr()
    assert "| learning_rate-1e-3 | 2 " in out
    assert message.splitlines()[-1] == f"stopped: {folder / 'sweep.md'}: Is a directory"


@pytest.mark.slow
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


@pytest.mark.slow
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


# ---- several seeds, several processes ------------------------------------------------------------


def test_a_run_is_repeated_with_several_seeds(tmp_path, capsys):
    command = ["run", ADDING, *TINY, "--output", str(tmp_path), "--seed", "3", "--name", "tiny"]
    assert main([*command, "--seeds", "2"]) == 0
    out, message = capsys.readouterr()
    folder = tmp_path / "lstm_adding-tiny"
    assert {path.name for path in folder.glob("*/")} == {"seed-3", "seed-4"}
    assert "| lstm_adding | 2 " in out and "±" in out and (folder / "curves.png").is_file()
    for seed in (3, 4):
        assert f"seed-{seed}:" in message.splitlines()
        text = (folder / f"seed-{seed}" / "config.toml").read_text()
        assert "--seeds" not in text and f"--seed {seed}" in text
        kept = tomllib.loads(text)
        assert kept["seed"] == seed and kept["train"]["steps"] == 4
    # one more; the others are there
    before = (folder / "seed-3" / "summary.json").stat().st_mtime_ns
    assert main([*command, "--seeds=3"]) == 0
    assert "| lstm_adding | 3 " in capsys.readouterr().out
    assert (folder / "seed-3" / "summary.json").stat().st_mtime_ns == before


def averaging(output: Path, *options: str) -> int:
    sweep = ["sweep", "attention_averaging", "--output", str(output), "--several-keys", "3"]
    return main([*sweep, "--grid", "betas=1 2,2 3,3 4", *options])


NAMES = [f"betas-{n}_{n + 1}-" for n in (1, 2, 3)]


def test_options_beside_the_grid_are_for_all_runs(tmp_path):
    assert averaging(tmp_path) == 0
    folders = sorted((tmp_path / "attention_averaging-sweep").glob("*/"))
    tables = [tomllib.loads((folder / "config.toml").read_text()) for folder in folders]
    assert [table["several_keys"] for table in tables] == [[3]] * 3
    assert [table["betas"] for table in tables] == [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]


def test_the_parts_of_a_sweep_are_all_of_it(tmp_path, capsys):
    folder = tmp_path / "attention_averaging-sweep"
    for part, there in (("2/2", [1]), ("1/2", [0, 1, 2])):
        assert averaging(tmp_path, "--part", part) == 0
        found = sorted(path.name[:-8] for path in folder.glob("*/"))
        assert found == [NAMES[n] for n in there]
        assert not (folder / "sweep.md").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    assert averaging(tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == before
    assert (folder / "sweep.md").read_text().count("| 1 ") == 3


@pytest.mark.parametrize("number, parts", [(7, 3), (2, 5), (6, 1)])
def test_every_combination_is_in_one_part(number, parts):
    found = [n for k in range(parts) for n in compare.parse_part(f"{k + 1}/{parts}", number)]
    assert sorted(found) == list(range(number))


@pytest.mark.slow
def test_the_runs_of_a_sweep_in_processes_of_their_own(tmp_path, capsys):
    folder = tmp_path / "attention_averaging-sweep"
    folder.mkdir()
    # as what fails does not stop the others
    blocked = compare.names_of([{"betas": "2 3"}])[0]
    (folder / blocked).touch()
    assert averaging(tmp_path, "--jobs", "2") == 1
    out, message = capsys.readouterr()
    assert len(list(folder.glob("*/figure.png"))) == 2
    assert f"{blocked}: failed: --resume: " in out and out.count("| 1 ") == 2
    assert f"{blocked}: --resume: {folder / blocked} is in the way, and no folder\n" in message
    (folder / blocked).unlink()
    assert averaging(tmp_path, "--jobs", "2") == 0
    assert capsys.readouterr().out.count("| 1 ") == 3


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{code}"]


def test_processes_are_some_at_a_time_and_what_they_say_is_handed_on(tmp_path, capsys):
    # how many there are, as each begins
    count = f"import pathlib; here = pathlib.Path({str(tmp_path)!r}); me = here / str(os.getpid())"
    count += "; me.touch(); print(len(list(here.iterdir())), file=sys.stderr); time.sleep(0.3)"
    commands = {
        **{name: python(f"{count}; me.unlink()") for name in "abcd"},
        "fails": python(f"{count}; me.unlink(); sys.exit('fails: no luck')"),
        "silent": python(f"{count}; me.unlink(); sys.exit(3)"),
        "killed": python(f"{count}; me.unlink(); os.kill(os.getpid(), signal.SIGKILL)"),
    }
    failed = jobs.run_all(commands, 2)
    assert failed["fails"] == "no luck" and failed["killed"] == "ended by SIGKILL"
    assert set(failed) == {"fails", "silent", "killed"}
    lines = capsys.readouterr().err.splitlines()
    assert "fails: no luck" in lines
    at_once = [int(line.partition(": ")[2]) for line in lines if line != "fails: no luck"]
    assert len(at_once) == 7 and max(at_once) == 2


def test_a_stop_is_handed_on_and_no_other_process_begins(tmp_path):
    path = tmp_path / "first"
    # sent to the process that waits, once the first is there to take it
    trap = "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'a').write('x'), exit(75)))"
    waits = python(f"{trap}\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)")
    begins = python(f"open({str(tmp_path / 'second')!r}, 'w')")
    with pytest.raises(Stopped):
        jobs.run_all({"first": [*waits, str(path)], "second": begins}, 1)
    assert path.read_text() == "x" and not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "command, part",
    [
        ("run {} --seeds 0", "--seeds: should be from 1"),
        ("run {} --seeds 99999999999", "--seeds: should be from 1"),
        ("run {} --seeds 2 --overwrite --name x", "--overwrite: is for one run"),
        ("run {} --seeds 2 --resume --name x", "--resume: is for one run"),
        ("run {} --seeds 2 --cluster --name x", "--cluster: is for one run"),
        ("run {} --seeds 2 --name ../x", "is no name for a folder"),
        ("run {} --seeds 2 --seed 4294967295", "seed: should be"),
        ("sweep {} --grid seed=0 --seeds 2", "--seeds: is for one run"),
        ("sweep {} --grid seed=0 --seed 3", "seed is given as an option, too"),
        ("sweep {} --grid train.log_every=1 --train.log-every 3", "given as an option, too"),
        ("sweep {} --grid seed=0 --jobs 0", "--jobs: should be from 1"),
        ("sweep {} --grid seed=0 --part 0/2", "--part: should be K/N"),
        ("sweep {} --grid seed=0 --part 3/2", "--part: should be K/N"),
        ("sweep {} --grid seed=0 --part all", "--part: should be K/N"),
        ("sweep {} --grid seed=0 --train.steps 0", "train.steps"),
    ],
)
def test_what_several_runs_cannot_be_asked_for_is_a_line(command, part, tmp_path, capsys):
    arguments = command.format(ADDING).split()
    assert main([*arguments, "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and part in message
    assert not (tmp_path / "new").exists()


def test_curves_of_several_runs_are_their_mean_in_a_band():
    def records(*losses: float) -> list[dict]:
        return [
            {"step": step, "split": "train", "loss": loss} for step, loss in enumerate(losses, 1)
        ]

    rows = {"a": [records(1, 2, 3), records(3, 2)], "b": [records(5, 6, 7)]}
    figure = overlaid_curves(rows, {"loss": "loss"})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    # where all of them are
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 2], [2, 2]])
    (band,) = axes.collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [2 - 2**0.5, 2 + 2**0.5])


def test_rows_are_of_runs_that_differ_in_the_seed_alone():
    def run(name: str, seed: int, steps: int) -> compare.Run:
        config = lstm_adding.Config(seed=seed, train=TrainConfig(steps=steps))
        return compare.Run(name, find(ADDING), config, [], {})

    found = [run("a1", 1, 5), run("b", 1, 6), run("a2", 2, 5)]
    rows = compare.by_config(found)
    assert {name: [each.name for each in row] for name, row in rows.items()} == {
        "a*": ["a1", "a2"], "b": ["b"],
    }  # fmt: skip
    found = [run("a1", 1, 5), run("a2", 2, 5), run("a3", 1, 6), run("a4", 2, 6)]
    assert list(compare.by_config(found)) == ["a1, a2", "a3, a4"]
    assert list(compare.by_config([run("x", 1, 5), run("y", 2, 5)])) == ["x, y"]
