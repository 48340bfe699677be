"""A run goes on after any interruption as if there was none, and keeps what is good whatever
happens to it.
"""

import codecs
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.__main__ import main
from experiments.engine import runs
from experiments.engine.checkpoints import Checkpoints, Progress, read_params
from experiments.engine.config import UsageError
from experiments.engine.experiment import ROOT
from experiments.engine.session import Session, Stopped, deferred_signals
from experiments.engine.training import TrainConfig, fit, make_optimizer
from experiments.models.lstm import ModelConfig, init_readout
from rnnattn.interop import read_safetensors

ADDING = "lstm_adding"
STEPS = 300
OPTIONS = (
    f"--train.steps {STEPS} --train.batch-size 4 --train.log-every 7 --train.evaluate-every 50"
    " --train.checkpoint-every 20 --model.hidden-size 4 --data.length 10 --data.held-out 8"
    " --compare-steps 0"
).split()


def timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.endswith(("_seconds", "_per_second"))}


def kept(folder: Path) -> list[Any]:
    """All that a run leaves, times apart."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    return [
        *(timeless(json.loads(line)) for line in lines),
        timeless(summary),
        (folder / "result.npz").read_bytes(),
    ]


def command(output: Path, *options: str, name: str = "x") -> list[str]:
    run = [sys.executable, "-m", "experiments", "run", ADDING, *OPTIONS]
    return [*run, "--output", str(output), "--name", name, *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run without interruption."""
    output = tmp_path_factory.mktemp("whole")
    assert main(["run", *command(output)[4:]]) == 0
    return output / "lstm_adding" / "x"


def interrupt(output: Path, number: int, lines: int) -> subprocess.CompletedProcess:
    """Start or go on with the run, and send the signal once it has logged so many lines."""
    metrics = output / "lstm_adding" / "x" / "metrics.jsonl"
    process = subprocess.Popen(
        command(output, "--resume"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while process.poll() is None:
        if metrics.is_file() and len(metrics.read_bytes().splitlines()) >= lines:
            process.send_signal(number)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(whole, tmp_path):
    for lines in np.sort(np.random.default_rng(0).integers(1, 40, 3)):
        killed = interrupt(tmp_path, signal.SIGKILL, int(lines))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    # here, as the run without interruption was: the summary tells how many devices there are
    assert main(["run", *command(tmp_path, "--resume")[4:]]) == 0
    assert kept(tmp_path / "lstm_adding" / "x") == kept(whole)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_keeps_what_it_has_and_says_so(whole, tmp_path):
    stopped = interrupt(tmp_path, signal.SIGTERM, 10)
    assert stopped.returncode == 75
    assert "--resume" in stopped.stderr.splitlines()[-1]
    folder = tmp_path / "lstm_adding" / "x"
    # of the step that it stopped after, which is none of those that are due
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert f"step {newest} of {STEPS}" in stopped.stderr
    assert main(["run", *command(tmp_path, "--resume")[4:]]) == 0
    assert kept(folder) == kept(whole)


def test_a_finished_run_stays_as_it_is(whole, capsys):
    state = lambda: {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in whole.rglob("*")}
    before = state()
    assert main(["run", *command(whole.parent.parent, "--resume")[4:]]) == 0
    assert "finished" in capsys.readouterr().out
    assert state() == before


def test_another_config_is_an_error_that_names_what_differs(whole, capsys):
    options = ["--resume", "--train.learning-rate", "0.5"]
    assert main(["run", *command(whole.parent.parent, *options)[4:]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "train.learning_rate" in message and "0.5" in message


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_could_not_be_asked_for_changes_nothing(overwrite, whole, tmp_path, capsys):
    folder = tmp_path / "lstm_adding" / "x"
    if overwrite:
        shutil.copytree(whole, folder)
    there = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    options = ["--train.best", "validation_los", *["--overwrite"] * overwrite]
    assert main(["run", *command(tmp_path, *options)[4:]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "train.best" in message
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == there
    assert folder.exists() == overwrite


def test_a_run_is_replaced_by_one_that_begins_with_its_weights(whole, tmp_path):
    folder = tmp_path / "lstm_adding" / "x"
    shutil.copytree(whole, folder)
    options = ["--overwrite", "--init", str(folder)]
    assert main(["run", *command(tmp_path, *options)[4:]]) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["x"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["init_sha256"] == (folder / "init.sha256").read_text().strip()


@pytest.mark.parametrize("source", ["gone", "with other weights"])
def test_a_run_goes_on_without_the_weights_that_it_began_with(source, whole, tmp_path, capsys):
    """From its own checkpoint, which has all; what is said of its beginning stays."""
    init = tmp_path / "init"
    shutil.copytree(whole, init)
    folder = tmp_path / "lstm_adding" / "x"
    asked = ["run", *command(tmp_path, "--init", str(init), "--resume")[4:]]
    assert main(asked) == 0
    before = json.loads((folder / "summary.json").read_text())
    for name in ("figure.png", "curves.png", "summary.json", "result.npz"):
        (folder / name).unlink()
    shutil.rmtree(init / "checkpoints")
    if source == "with other weights":
        shutil.copytree(folder / "checkpoints", init / "checkpoints")
    capsys.readouterr()
    assert main(asked) == 0
    assert "goes on from its checkpoint" in capsys.readouterr().err
    after = json.loads((folder / "summary.json").read_text())
    assert after["init_sha256"] == before["init_sha256"]
    assert after["test_loss"] == before["test_loss"]


def test_a_checkpoint_that_was_only_begun_is_none_to_go_on_from(whole, tmp_path):
    assert runs.trains(whole)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert not runs.trains(tmp_path)


@pytest.mark.parametrize("options", [["--resume"], ["--overwrite"]])
def test_going_on_or_replacing_needs_a_name(options, tmp_path, capsys):
    assert main(["run", ADDING, "--output", str(tmp_path / "new"), *options]) == 2
    message = capsys.readouterr().err
    assert "--name" in message and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_parameters_are_exported_and_read_back(whole, tmp_path):
    file = tmp_path / "params.safetensors"
    assert main(["export", str(whole), "--output", str(file)]) == 0
    like = init_readout(jax.random.key(1), 2, 1, ModelConfig(hidden_size=4))
    params = read_safetensors(file, like)
    kept = read_params(whole / "checkpoints")
    np.testing.assert_array_equal(params.lstm.w_h, kept["lstm"]["w_h"])
    with pytest.raises(ValueError, match=r"`b` must be float32\[2\], got float32\[1\]"):
        read_safetensors(file, like._replace(b=jnp.zeros(2, jnp.float32)))


@pytest.mark.parametrize("folder, part", [("", "not the folder of a run"), ("x", "not the folder")])
def test_without_a_run_there_is_nothing_to_export(folder, part, tmp_path, capsys):
    assert main(["export", str(tmp_path / folder)]) == 2
    assert part in capsys.readouterr().err


# ---- what can happen to the files ------------------------------------------------------------


def copy_cut_off(whole: Path, output: Path) -> Path:
    """The run as it is when it is killed between the last checkpoint and the result."""
    folder = output / "lstm_adding" / "x"
    shutil.copytree(whole, folder)
    for name in ("figure.png", "curves.png", "summary.json", "result.npz"):
        (folder / name).unlink()
    return folder


def test_metrics_whose_last_line_is_cut_are_written_again(whole, tmp_path):
    folder = copy_cut_off(whole, tmp_path)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    assert main(["run", *command(tmp_path, "--resume")[4:]]) == 0
    assert kept(folder) == kept(whole)


def damage(step: Path, how: str) -> None:
    largest = max((step / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "garbled":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    elif how == "without metadata":
        (step / "_CHECKPOINT_METADATA").unlink()
    largest.write_bytes(bytes(content))


def resumed(output: Path) -> subprocess.CompletedProcess:
    """In a process of its own: what Orbax had begun to read goes on after its loop has ended."""
    devices = {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    return subprocess.run(
        command(output, "--resume"), cwd=ROOT, env=os.environ | devices, capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "garbled", "without metadata"])
def test_a_damaged_checkpoint_is_said_to_be_and_the_one_before_it_is_used(how, whole, tmp_path):
    folder = copy_cut_off(whole, tmp_path)
    damage(folder / "checkpoints" / str(STEPS), how)
    done = resumed(tmp_path)
    assert done.returncode == 0
    assert f"checkpoints/{STEPS}: cannot be read" in done.stderr
    assert kept(folder) == kept(whole)


@pytest.mark.slow
def test_without_a_checkpoint_that_can_be_read_nothing_is_overwritten(whole, tmp_path):
    folder = copy_cut_off(whole, tmp_path)
    for step in (folder / "checkpoints").iterdir():
        damage(step, "truncated")
    metrics = (folder / "metrics.jsonl").read_bytes()
    done = resumed(tmp_path)
    assert done.returncode == 2
    assert "none of its checkpoints can be read" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_stops_the_run_with_a_message(whole, tmp_path, capsys):
    folder = tmp_path / "lstm_adding" / "x"
    folder.mkdir(parents=True)
    shutil.copy(whole / "config.toml", folder)
    # every write to it fails, as on a full disk
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    assert main(["run", *command(tmp_path, "--resume")[4:]]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "No space left" in message


@contextmanager
def nothing_may_be_written_in(folder: Path) -> Iterator[None]:
    """Nor by root, who has to be somebody else for that."""
    user, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0o555)
    try:
        if user == 0:
            # Python may lie where nobody else reads, and remembers an encoding that it did not find
            codecs.lookup("utf-8-sig")
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_may_not_be_written_in_is_one_message(there, capsys):
    # not below pytest's own, which nobody but its owner may enter
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        folder = output / "lstm_adding" / "x"
        closed = output
        if there:
            folder.mkdir(parents=True)
            closed = folder
        output.chmod(0o755)
        with nothing_may_be_written_in(closed):
            code = main(["run", *command(output, *["--resume"] * there)[4:]])
        assert list(closed.iterdir()) == []
    message = capsys.readouterr().err
    assert code == (1 if there else 2)
    assert message.count("\n") == 1 and "Permission denied" in message and str(closed) in message
    assert ("--output: cannot write" in message) == (not there)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before_it(whole, tmp_path):
    folder = copy_cut_off(whole, tmp_path)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())

    # no file may grow beyond 2 KiB
    limited = f'trap "" XFSZ; ulimit -f 2; exec {shlex.join(command(tmp_path, "--resume"))}'
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "stopped" in done.stderr
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()) == before


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [1, 8, 20])
def test_where_there_is_no_room_is_said_and_nothing_is_lost(kilobytes, whole, tmp_path):
    """For the metrics, a checkpoint, a figure: no file may grow beyond the size."""
    limited = (
        f'trap "" XFSZ; ulimit -f {kilobytes}; exec {shlex.join(command(tmp_path, "--resume"))}'
    )
    devices = {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    done = subprocess.run(
        ["bash", "-c", limited], cwd=ROOT, env=os.environ | devices, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    folder = tmp_path / "lstm_adding" / "x"
    assert done.stderr.splitlines()[-1].startswith(f"stopped: {folder}/")
    assert all(line.startswith("step ") for line in done.stderr.splitlines()[:-1])
    assert main(["run", *command(tmp_path, "--resume")[4:]]) == 0
    assert kept(folder) == kept(whole)


# ---- a signal --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", [">&- 2>/dev/full", "2>&-"])
def test_a_run_is_kept_where_nobody_reads_what_it_says(where, whole, tmp_path):
    shell = f"{shlex.join(command(tmp_path))} {where}"
    subprocess.run(["sh", "-c", shell], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120)
    folder = tmp_path / "lstm_adding" / "x"
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert (folder / "result.npz").read_bytes() == (whole / "result.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["importing", "compiling", "training"])
def test_a_signal_ends_a_run_at_once_and_without_a_traceback(moment, number, tmp_path):
    folder = tmp_path / "lstm_adding" / "x"
    begin = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    begin += "print(flush=True); runpy.run_module('experiments', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", begin, *command(tmp_path)[3:]], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    there = {"compiling": folder / "config.toml", "training": folder / "metrics.jsonl"}
    while moment in there and not there[moment].exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.2)
    process.send_signal(number)
    clock = time.monotonic()
    _, message = process.communicate(timeout=60)
    assert process.returncode in ([75, 0] if moment == "training" else [-number]), message
    assert "Traceback" not in message
    assert moment == "training" or time.monotonic() - clock < 2


def test_a_signal_after_the_last_step_is_heard(tmp_path):
    save = Checkpoints.save

    def interrupted(self, step, *rest):
        save(self, step, *rest)
        if step == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="step 9 of 9"):
        patch.setattr(Checkpoints, "save", interrupted)
        train(tmp_path)
    np.testing.assert_array_equal(train(tmp_path).params, train(None).params)


# ---- training, in this process --------------------------------------------------------------


def square(params, batch, key):
    noise = jax.random.normal(key, params.shape, params.dtype)
    return jnp.sum((params - batch + noise) ** 2), {}


def train(
    folder: Path | None,
    batch: Callable = lambda step: np.ones(2, np.float32),
    data: str = "",
    **changes,
):
    settings: dict[str, Any] = dict(steps=9, log_every=4, checkpoint_every=3, evaluate_every=5)
    records: list[dict] = []
    params = jnp.array([4.0, 3.0], jnp.float32)
    trained = fit(
        square, params, optax.adam(0.1), batch, jax.random.key(0),
        TrainConfig(**settings | changes),
        evaluations={"a": lambda p: {"first": p[0], "accuracy": -p[0]}}, final={},
        session=Session(records.append, folder, "hash"), data_sha256=data,
    )  # fmt: skip
    assert records == trained.records
    return trained


def fails_at(fatal: int) -> Callable:
    def batch(step):
        if step == fatal:
            raise RuntimeError("no luck")
        return np.ones(2, np.float32)

    return batch


@pytest.mark.parametrize("fatal", [2, 3, 5, 8])
def test_training_goes_on_from_between_two_records(fatal, tmp_path):
    expected = train(None)
    with pytest.raises(RuntimeError, match="no luck"):
        train(tmp_path, fails_at(fatal))
    found = train(tmp_path)
    np.testing.assert_array_equal(found.params, expected.params)
    assert [timeless(r) for r in found.records] == [timeless(r) for r in expected.records]


def test_the_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, checkpoints_kept=2, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8", "9"]


def away_from_its_goal(step):
    # two steps towards the goal, and all others away from it
    return np.full(2, -9 if step < 4 else 99, np.float32)


def test_an_exponential_mean_is_evaluated_beside_the_parameters_and_outlives_an_interruption(
    tmp_path,
):
    def with_mean(folder, batch):
        config = TrainConfig(
            steps=9, log_every=4, checkpoint_every=3, evaluate_every=1, ema=0.8, warmup=0.0,
            best="a_ema_first",
        )  # fmt: skip
        return fit(
            square, jnp.array([4.0, 3.0], jnp.float32), make_optimizer(config), batch,
            jax.random.key(0), config, evaluations={"a": lambda p: {"first": p[0]}},
            final={"b": lambda p: {"second": p[1]}}, session=Session(folder=folder),
        ).records  # fmt: skip

    whole = with_mean(None, away_from_its_goal)
    first, of_mean = (
        np.array([r["first"] for r in whole if r["split"] == split]) for split in ("a", "a_ema")
    )
    weights = 0.8 ** (np.arange(9)[:, None] - np.arange(9)) * np.tri(9)
    expected = weights @ first / weights.sum(axis=1)
    np.testing.assert_allclose(of_mean, expected, rtol=1e-5)
    assert [r["split"] for r in whole if "second" in r] == ["b", "b_ema"]

    def fails(step):
        if step == 5:
            raise RuntimeError("no luck")
        return away_from_its_goal(step)

    with pytest.raises(RuntimeError, match="no luck"):
        with_mean(tmp_path, fails)
    again = with_mean(tmp_path, away_from_its_goal)
    assert [timeless(r) for r in again] == [timeless(r) for r in whole]


def test_training_does_not_go_on_with_other_data(tmp_path):
    train(tmp_path, steps=9)
    with pytest.raises(UsageError, match="other data"):
        train(tmp_path, steps=9, data="changed")


@pytest.mark.parametrize("best", ["a_first", "a_accuracy"])
def test_the_best_checkpoint_is_kept_beside_the_newest(best, tmp_path):
    settings: dict[str, Any] = dict(
        evaluate_every=2, checkpoint_every=100, checkpoints_kept=1, best=best
    )
    whole = train(tmp_path / "x", away_from_its_goal, **settings)
    firsts = {r["step"]: r["first"] for r in whole.records if r["split"] == "a"}
    assert min(firsts.values()) == firsts[4]
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"4", "9"}
    assert float(read_params(tmp_path / "x", best=True)[0]) == firsts[4]
    assert float(read_params(tmp_path / "x")[0]) == firsts[9]

    # nor does an interruption lose it, or change it
    def fails(step):
        if step == 7:
            raise RuntimeError("no luck")
        return away_from_its_goal(step)

    with pytest.raises(RuntimeError):
        train(tmp_path / "y", fails, **settings)
    train(tmp_path / "y", away_from_its_goal, **settings)
    assert {path.name for path in (tmp_path / "y").iterdir()} == {"4", "9"}


def test_the_best_by_what_is_not_evaluated_is_refused(tmp_path):
    with pytest.raises(UsageError, match="one of a_accuracy, a_first, got b"):
        train(tmp_path, best="b")
    train(tmp_path)
    with pytest.raises(UsageError, match="none was kept as the best"):
        read_params(tmp_path, best=True)


def test_a_stop_is_heard_after_a_step_and_loses_nothing(tmp_path):
    def batch(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return np.ones(2, np.float32)

    with pytest.raises(Stopped, match="step 5 of 9"):
        train(tmp_path, batch)
    np.testing.assert_array_equal(train(tmp_path).params, train(None).params)


def test_the_second_signal_is_not_deferred():
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def nan_at(*steps: int) -> Callable:
    return lambda step: np.full(2, np.nan if step in steps else 1, np.float32)


def test_a_loss_that_is_not_finite_is_named_and_the_last_good_checkpoint_stays(tmp_path):
    with pytest.raises(FloatingPointError, match="step 8: loss is nan"):
        train(tmp_path, nan_at(7))
    assert "9" not in {path.name for path in tmp_path.iterdir()}
    np.testing.assert_array_equal(train(tmp_path).params, train(None).params)


def test_steps_that_are_not_finite_are_skipped_and_counted_if_asked_for():
    trained = train(None, nan_at(1, 2), not_finite="skip")
    assert [r["skipped"] for r in trained.records if r["split"] == "train"] == [2, 0, 0]
    assert all(np.isfinite(r["loss"]) for r in trained.records if "loss" in r)
    assert np.all(np.isfinite(trained.params))
    with pytest.raises(FloatingPointError, match="all skipped"):
        train(None, nan_at(*range(9)), not_finite="skip")


STATE = {"a": np.arange(200.0, dtype=np.float32), "b": np.zeros((), np.float32)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2, the array of which is that many times the one above."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, 2, "hash") as checkpoints:
        for step in (1, 2):
            state = jax.tree.map(lambda x, n=step: jnp.asarray(x * n), STATE)
            records: list[Any] = [{"step": step, "split": "train", "loss": step / 3}]
            checkpoints.save(step, state, jax.random.key(0), Progress(records, [], 0.5))
            checkpoints.wait()
    return folder


def loaded(folder: Path) -> tuple[int, list[float], Any]:
    """The step, the array and the rest of the checkpoint that is used."""
    with Checkpoints(folder, 2, "hash") as checkpoints:
        found = checkpoints.load(jax.tree.map(jnp.asarray, STATE), jax.random.key(0))
    assert found
    step, state, progress = found
    return step, state["a"].tolist(), progress


def files_of(saved: Path) -> list[str]:
    paths = sorted(path for path in (saved / "2").rglob("*") if path.is_file())
    return [path.relative_to(saved / "2").as_posix() for path in paths]


@pytest.mark.parametrize("how", ["a bit", "cut", "longer", "missing", "another's"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_not_used(how, saved, tmp_path, capsys):
    """Any file of it, any bit: the one before it is used, and a line says so."""
    random = np.random.default_rng(0)
    shutil.copytree(saved / "1", tmp_path / "one" / "1")
    one, two = loaded(tmp_path / "one"), loaded(saved)
    assert (one[0], two[0]) == (1, 2)
    capsys.readouterr()
    for name in files_of(saved):
        for trial in range(5 if how == "a bit" else 1):
            folder = tmp_path / f"{trial} {name.replace('/', ' ')}"
            shutil.copytree(saved, folder)
            file = folder / "2" / name
            content = bytearray(file.read_bytes())
            if how == "a bit":
                content[random.integers(len(content))] ^= 1 << random.integers(8)
            elif how == "cut":
                content = content[: random.integers(len(content))]
            elif how == "longer":
                content += b"\0"
            if how == "missing":
                file.unlink()
            elif how == "another's":
                other = folder / "1" / name
                same = list((folder / "1" / name).parent.glob("*"))
                file.write_bytes((other if other.exists() else same[0]).read_bytes())
            else:
                file.write_bytes(bytes(content))
            found, message = loaded(folder), capsys.readouterr().err
            changed = not file.exists() or file.read_bytes() != (saved / "2" / name).read_bytes()
            if changed and name.startswith("state/"):
                assert found == one, (name, how)
            # what Orbax writes beside them as it renames has times, too, which nobody reads
            assert found in (one, two), (name, how)
            assert message.count("\n") == (found == one or (how == "missing" and "SUMS" in name))


@pytest.mark.parametrize("kept, copied, used", [("12", (2, 3), 2), ("1", (1, 2), 1)])
def test_a_checkpoint_under_another_step_is_not_used(kept, copied, used, saved, tmp_path, capsys):
    for step in kept:
        shutil.copytree(saved / step, tmp_path / step)
    shutil.copytree(saved / str(copied[0]), tmp_path / str(copied[1]))
    assert loaded(tmp_path)[0] == used
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"it is of step {copied[0]}" in message


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    train(tmp_path / "x", checkpoints_kept=2, checkpoint_every=4)
    (damaged,) = (tmp_path / "x" / "9" / "state" / "d").iterdir()
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UsageError, match=r"damaged files.*the checkpoint before it is taken"):
        read_params(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "9")
    assert (read_params(tmp_path / "x") != train(None, steps=9).params).any()


def test_checkpoints_without_checksums_are_used_and_said_to_be(saved, tmp_path, capsys):
    """As those of the versions before there were any."""
    shutil.copytree(saved, tmp_path / "x")
    (tmp_path / "x" / "2" / "SHA256SUMS").unlink()
    assert loaded(tmp_path / "x")[0] == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "has no SHA256SUMS" in message


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda s: s | {"more": s["a"]}, "training/more: missing"),
        (lambda s: {"a": s["a"]}, "training/b: not expected"),
        (lambda s: s | {"a": s["a"][:1]}, r"training/a: expected float32\[1\], got float32\[2\]"),
        (lambda s: s | {"b": s["b"].astype(jnp.float16)}, r"expected float16\[\], got float32\[\]"),
    ],
)
def test_a_leaf_that_differs_is_an_error_that_names_it(change, line, tmp_path):
    state = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((), jnp.float32)}
    key = jax.random.key(0)
    with Checkpoints(tmp_path, 2, "hash") as checkpoints:
        checkpoints.save(1, state, key, Progress([], [], 0.0))
        checkpoints.wait()
        with pytest.raises(UsageError, match=line):
            checkpoints.load(change(state), key)
        with pytest.raises(UsageError, match="another random key"):
            checkpoints.load(state, jax.random.key(1))
    with Checkpoints(tmp_path, 2, "other") as checkpoints:
        with pytest.raises(UsageError, match="another config"):
            checkpoints.load(state, key)
