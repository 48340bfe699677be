"""Kill a run at many moments, let it go on, and hold all that it leaves against an unharmed run.

    python -m tests.experiments.kill --moments 50

Each time a run starts in a process of its own, which kills itself: as it is about to open, rename
or remove a file of its folder, a little later, or within the writing of it, where the kernel ends
it at a byte drawn at random. Every kind of file is met first, then whatever comes. `--resume` then
has to finish the run, with every file equal to that of the unharmed run, times apart.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboardX.proto import event_pb2

from experiments.__main__ import main

RUN = Path("outputs/lstm_text/x")
COMMAND = [
    "run", "lstm_text", *"--name x --output outputs --resume --tensorboard"
    " --train.steps 24 --train.batch-size 4 --train.log-every 3 --train.evaluate-every 8"
    " --train.checkpoint-every 6 --model.hidden-size 3 --compare-steps 0 --data.window 5"
    " --sample-length 20".split(),
]  # fmt: skip
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Moment(NamedTuple):
    """The n-th time that something is done to a file, and what is done then."""

    event: str
    path: str
    number: int
    how: str
    """`before`, `within` or `after`."""
    amount: float
    """The bytes that may still be written to a file, or the seconds to wait."""

    def __str__(self) -> str:
        return f"{self.how} {self.event} {self.path} ({self.number + 1})"


def in_a_child(act: Callable[[], int], folder: Path) -> int:
    """What the process comes to that does it in the folder: a code, or a signal as -number."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            with open(os.devnull, "w") as nowhere, open("messages", "a") as messages:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(messages.fileno(), 2)
            code = act()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(act: Callable[[str, str], None]) -> None:
    """Call `act` with whatever this process is about to change below the run's folder."""
    below = re.compile(rf"(?:^|.*/){RUN}/?(.*)")

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        found = below.match(os.fsdecode(arguments[0]))
        if found and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            act(event, re.sub(r"events\.out.*", "events", found[1]))

    sys.addaudithook(hook)


def run_and_record(file: Path) -> int:
    events: list[tuple[str, str]] = []
    watch(lambda *event: events.append(event))
    code = main(COMMAND)
    file.write_text(json.dumps(events))
    return code


def run_until(moment: Moment) -> int:
    left = moment.number

    def act(*event: str) -> None:
        nonlocal left
        if event != moment[:2]:
            return
        left -= 1
        if left >= 0:
            return
        if moment.how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        elif moment.how == "after":
            threading.Timer(moment.amount, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment.amount),) * 2)

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch(act)
    return main(COMMAND)


def moments(
    events: Sequence[tuple[str, str]], run: Path, random: np.random.Generator
) -> Iterator[Moment]:
    """Within every kind of file that is written, in any order, and then without an end."""

    def moment(event: str, path: str, how: str) -> Moment:
        count = int(random.integers(events.count((event, path))))
        whole = run / path.removesuffix(".new")
        size = whole.stat().st_size if whole.is_file() else 200
        amount = random.integers(size) if how == "within" else random.uniform(0, 0.1)
        return Moment(event, path, count, how, float(amount))

    written = {kind(path): (event, path) for event, path in events if event == "open"}
    for _, each in sorted(written.items(), key=lambda _: random.random()):
        yield moment(*each, "within")
    while True:
        event, path = events[int(random.integers(len(events)))]
        ways = ["before", "after", "within"] if event == "open" else ["before", "after"]
        yield moment(event, path, str(random.choice(ways)))


def kind(path: str) -> str:
    return re.sub(r"\b\d+\b", "N", path)


def left_by(folder: Path) -> dict[str, Any]:
    """All that the run has left, times apart."""
    run = folder / RUN
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_dir():
            found[name] = None
        elif name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif name == "summary.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif name.startswith("tensorboard/"):
            found["tensorboard"] = points(path.read_bytes())
        # Orbax' files have times, and names drawn at random: what is in them is exported below
        elif not name.startswith("checkpoints/"):
            found[name] = path.read_bytes()
    found = {name: it for name, it in found.items() if not re.match(r"checkpoints/\d+/", name)}
    export = lambda: main(["export", str(RUN), "--output", "params.safetensors"])
    found["exported"] = in_a_child(export, folder)
    found["params"] = (folder / "params.safetensors").read_bytes()
    return found


def timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.endswith(("_seconds", "_per_second"))}


def points(content: bytes) -> list[tuple[str, int, float]]:
    found = []
    while content:
        # the length, its checksum, and as much with a checksum
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        found += [
            (value.tag, event.step, value.simple_value)
            for value in event.summary.value
            if not value.tag.endswith(("_seconds", "_per_second"))
        ]
    return found


def try_all(wanted: int, seed: int, folder: Path) -> int:
    """Kill so many runs; how many of them ended unlike the unharmed one."""
    random = np.random.default_rng(seed)
    whole = folder / "whole"
    whole.mkdir()
    # what the unharmed run compiles is kept for all others, which only read it: none is killed as
    # it writes there
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if code := in_a_child(lambda: run_and_record(folder / "events.json"), whole):
        raise SystemExit(f"the unharmed run ended with {code}:\n{(whole / 'messages').read_text()}")
    events = [(event, path) for event, path in json.loads((folder / "events.json").read_text())]
    expected = left_by(whole)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    print(f"{len(events)} moments, of {len(set(map(kind, (p for _, p in events))))} kinds of file")

    killed, failed, left = 0, 0, Counter[str]()
    clock = time.monotonic()
    for each in moments(events, whole / RUN, random):
        here = folder / "killed"
        here.mkdir()
        code = in_a_child(partial(run_until, each), here)
        if code in (-signal.SIGKILL, -signal.SIGXFSZ):
            killed += 1
            left[f"{each.how} {kind(each.path)}"] += 1
            code = in_a_child(partial(main, COMMAND), here)
        # or the moment did not come, or was its last: what it left is to be right all the same
        found = left_by(here) if code == 0 else {"exit code": code}
        differing = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        if differing:
            failed += 1
            print((here / "messages").read_text())
        print(f"{killed:3} {each}: {', '.join(differing) or 'nothing'} differs")
        shutil.rmtree(here)
        if killed == wanted:
            break
    for name, number in sorted(left.items()):
        print(f"{number:3} killed {name}")
    print(f"{killed} killed, {failed} differ, {time.monotonic() - clock:.0f} s")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sys.exit(try_all(options.moments, options.seed, Path(name)) > 0)
