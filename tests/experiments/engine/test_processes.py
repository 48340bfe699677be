"""Two processes train together, are stopped together, and go on, together or as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.engine.experiment import ROOT
from experiments.engine.processes import SILENCE
from experiments.engine.runs import finished

COMMON = "--train.batch-size 8 --train.log-every 7 --train.evaluate-every 100 --name x".split()
SIZES = {
    "lstm_adding": (
        "--train.steps 240 --train.checkpoint-every 100 --model.hidden-size 16 --compare-steps 0"
        " --data.length 6 --data.held-out 8 --parallel.data 2"
    ),
    "vit_digits": (
        "--train.steps 200 --train.checkpoint-every 30 --model.width 32 --model.depth 1"
        " --model.num-heads 2 --model.patch-size 4 --model.position learned --parallel.fsdp 2"
    ),
}


def command(name: str, output: Path, *options: str) -> list[str]:
    config = name
    return ["run", config, *COMMON, *SIZES[name].split(), "--output", str(output), *options]


def launch(each: Iterable[tuple[list[str], dict[str, str]]]) -> list[subprocess.Popen]:
    """A process for the arguments and the environment of each."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments", *arguments],
            cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for arguments, environment in each
    ]  # fmt: skip


def two(
    arguments: list[str], *, devices: tuple[int, int] = (1, 1), others: Sequence[str] = ()
) -> list[subprocess.Popen]:
    """Two with so many devices each, the second with `others` among its options."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    together = [*arguments, "--coordinator", coordinator, "--processes", "2", "--process"]
    count = [{"JAX_NUM_CPU_DEVICES": str(number)} for number in devices]
    return launch(zip([[*together, "0"], [*together, "1", *others]], count, strict=True))


def two_of_slurm(arguments: list[str]) -> list[subprocess.Popen]:
    """Two that find each other by what Slurm would tell them."""
    # the port follows from the number of the job
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2"}
    return launch(
        ([*arguments, "--cluster"], job | {"SLURM_PROCID": index, "SLURM_LOCALID": index})
        for index in "01"
    )


def wait_for(there, processes: list[subprocess.Popen]) -> None:
    while not there() and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def outcomes(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each; of the output, what is not gloo's."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=SILENCE + 60)
            lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
            ends.append((process.returncode, "\n".join(lines), err))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return ends


def metrics(folder: Path) -> list[dict]:
    """The metrics that do not depend on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if not k.endswith("_per_second")} for record in records
    ]


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_signal_to_one_stops_both_which_go_on_as_if_it_had_not(tmp_path):
    """To the numbers of one process that has both devices: two summands have one sum."""
    folder = tmp_path / "two" / "lstm_adding" / "x"
    arguments = command("lstm_adding", tmp_path / "two")
    processes = two(arguments)
    file = folder / "metrics.jsonl"
    wait_for(lambda: file.is_file() and file.read_bytes().count(b"\n") > 9, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = outcomes(processes)
    assert [code for code, _, _ in ends] == [75, 75], ends
    (stopped,) = steps_kept(folder)[-1:]
    assert stopped % 7 == 0
    for _, out, err in ends:
        assert out == "" and f"stopped after step {stopped} of 240" in err

    ends = outcomes(two([*arguments, "--resume"]))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "test_loss" in ends[0][1]
    assert ends[1][1:] == ("", "")
    assert finished(folder)
    assert len(steps_kept(folder)) == 2 and steps_kept(folder)[-1] == 240
    assert json.loads((folder / "summary.json").read_text())["devices"] == 2

    assert main(command("lstm_adding", tmp_path / "one")) == 0
    one = tmp_path / "one" / "lstm_adding" / "x"
    assert metrics(folder) == metrics(one)
    with np.load(folder / "result.npz") as a, np.load(one / "result.npz") as b:
        assert a.files == b.files
        for array in a.files:
            np.testing.assert_array_equal(a[array], b[array])


@pytest.mark.slow
def test_one_that_dies_ends_the_other_and_the_run_goes_on_without_it(tmp_path):
    folder = tmp_path / "two" / "vit_digits" / "x"
    processes = two_of_slurm(command("vit_digits", tmp_path / "two"))
    wait_for(lambda: (folder / "checkpoints" / "30").is_dir(), processes)
    processes[1].kill()
    died = time.monotonic()
    (code, _, message), (killed, _, _) = outcomes(processes)
    assert killed == -signal.SIGKILL
    # where it waits for numbers of the other, at once; in a checkpoint, when nothing is heard
    assert time.monotonic() - died < SILENCE + 15
    assert (code == 1 and "--resume" in message) or code == -signal.SIGABRT, message

    assert main([*command("vit_digits", tmp_path / "two"), "--resume", "--parallel.fsdp", "1"]) == 0
    assert main([*command("vit_digits", tmp_path / "one"), "--parallel.fsdp", "1"]) == 0
    two, one = metrics(folder), metrics(tmp_path / "one" / "vit_digits" / "x")
    for a, b in zip(two, one, strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        if a["step"] <= 20:
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_an_interrupt_is_heard_while_waiting_for_the_others(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = f"--coordinator localhost:{port} --processes 2 --process 0".split()
    (process,) = launch([(command("lstm_adding", tmp_path, *options), {})])
    while process.poll() is None:
        try:
            socket.create_connection(("localhost", port), 0.1).close()
            break
        except OSError:
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    clock = time.monotonic()
    ((code, _, message),) = outcomes([process])
    assert code == -signal.SIGINT and "Traceback" not in message
    assert time.monotonic() - clock < 2


@pytest.mark.slow
def test_processes_that_do_not_fit_together_are_an_error_in_both(tmp_path):
    arguments = command("lstm_adding", tmp_path / "two")
    for code, out, err in outcomes(two(arguments, devices=(1, 2))):
        assert code == 2 and out == ""
        assert "all should have as many devices, got 1, 2" in err
    for code, out, err in outcomes(two(arguments, others=["--seed", "1"])):
        assert code == 2 and out == ""
        assert "process 1 was given others than process 0" in err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--processes", "2"], ["go together", "no --coordinator and no --process"]),
        ("--coordinator h:1 --processes 2 --process 2".split(), ["from 0 to", "= 1, got 2"]),
        ("--coordinator h --processes 2 --process 0".split(), ["HOST:PORT", "got h"]),
        ("--coordinator h:70000 --processes 2 --process 0".split(), ["HOST:PORT", "got h:70000"]),
        (["--cluster", "--process", "0"], ["--cluster", "one or the other"]),
    ],
)
def test_processes_that_cannot_find_each_other_are_one_line(options, parts, tmp_path, capsys):
    assert main([*command("lstm_adding", tmp_path / "x"), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in parts:
        assert part in message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "config, name, part",
    [
        ("lstm_adding", [], "need the --name"),
        ("lstm_equations", ["--name", "x"], "are for what trains"),
    ],
)
def test_what_several_processes_need_is_said(config, name, part, tmp_path, capsys):
    options = [*name, "--output", str(tmp_path / "x"), "--cluster"]
    assert main(["run", config, *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and part in message


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        first = f"--coordinator localhost:{port} --processes 2 --process 0".split()
        assert main([*command("lstm_adding", tmp_path / "x"), *first]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"--coordinator: cannot listen at {port}" in message


@pytest.mark.parametrize(
    "coordinator, part",
    [
        ("localhost:0", "a port from 1 to 65535"),
        ("localhost:65536", "a port from 1 to 65535"),
        ("localhost:\u0661", "a port from 1 to 65535"),
        ("localhost", "should be HOST:PORT"),
        (":1234", "should be HOST:PORT"),
        ("local host:1", "should be HOST:PORT"),
        ("[zz]:1", "should be HOST:PORT"),
        ("nohost.invalid:1", "there is no host nohost.invalid"),
        ("a..b:1", "there is no host a..b"),
        (f"{'x' * 64}:1", "there is no host xxx"),
        (f"{'x' * 300}:1", "should be HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_told_and_not_waited_for(coordinator, part, tmp_path, capsys):
    where = ["--coordinator", coordinator, "--processes", "2", "--process", "1"]
    assert main([*command("lstm_adding", tmp_path / "x"), *where]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--coordinator: " in message and part in message
    assert not (tmp_path / "x").exists()


def test_no_more_processes_than_can_be_counted(tmp_path, capsys):
    where = "--coordinator localhost:1234 --processes 99999999999999999999 --process 1".split()
    assert main([*command("lstm_adding", tmp_path / "x"), *where]) == 2
    assert "--processes: should be less than 2147483648" in capsys.readouterr().err


@pytest.mark.slow
def test_a_machine_of_no_cluster_says_so():
    run = [sys.executable, "-m", "experiments", *command("lstm_adding", Path("never")), "--cluster"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "--cluster: none was found" in done.stderr
