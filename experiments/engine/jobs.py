"""Commands in processes of their own, some of them at a time."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from experiments.engine.session import Stopped, deferred_signals


def run_all(commands: Mapping[str, Sequence[str]], at_a_time: int) -> dict[str, str]:
    """Run the commands, and hand on what they say on stderr, headed by their names.

    A signal (SIGTERM, SIGINT) is handed on to those that run, and no others begin.

    Returns:
        By name the commands that failed, with the last that each said, or the signal it died of.

    Raises:
        Stopped: once all have ended, if there was a signal.
    """
    started: list[subprocess.Popen[str]] = []
    failed: dict[str, str] = {}

    def run(name: str, command: Sequence[str]) -> None:
        if stop.requested:
            return
        # in a session of its own, as the terminal's Ctrl-C would come beside the one handed on
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        started.append(process)
        last = ""
        assert process.stderr is not None
        with process:
            for line in process.stderr:
                last = line.rstrip("\n").removeprefix(f"{name}: ")
                print(f"{name}: {last}", file=sys.stderr, flush=True)
        code = process.returncode
        if code < 0:
            failed[name] = f"ended by {signal.Signals(-code).name}"
        elif code > 0:
            failed[name] = last or f"ended with exit code {code}"

    with deferred_signals() as stop, ThreadPoolExecutor(at_a_time) as threads:
        running = {threads.submit(run, name, command) for name, command in commands.items()}
        told = 0
        while running:
            ended, running = wait(running, timeout=0.1)
            for each in ended:
                each.result()
            while stop.requested and told < len(started):
                started[told].terminate()
                told += 1
    if stop.requested:
        raise Stopped("stopped, as the runs that were under way did")
    return failed
