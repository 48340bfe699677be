"""What surrounds an experiment while it runs: where its records go, and how it survives being
stopped.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.engine.checkpoints import Checkpoints, Record

PROFILED = slice(2, 7)
"""The third step to the seventh: the first ones warm up."""


class Stopped(BaseException):
    """Training was asked to stop, and did so after a step, with a checkpoint of it.

    It is no `Exception`, as `KeyboardInterrupt` is none: who catches whatever a run may raise, to
    go on with the next one, does not mean this.
    """


def _discard(record: Record) -> None:
    pass


class Start(NamedTuple):
    """Parameters from outside, of a run or of a file."""

    params: PyTree
    sha256: str
    """Of the names and the numbers that were read."""
    changes: list[str]
    """What it took to make parameters of another library's, a line for each."""


@dataclass(frozen=True)
class Session:
    """The default keeps nothing, neither records nor checkpoints, and is for one device."""

    log: Callable[[Record], None] = _discard
    """Is given each record as it comes."""
    folder: Path | None = None
    """For the checkpoints of the experiment's trainings."""
    config_hash: str = ""
    """Of the config, which checkpoints have to agree with."""
    mesh: Mesh | None = None
    """The devices to train on; None for one."""
    profile: Path | None = None
    """For traces of a few steps of each training; None if there are to be none."""
    start: Start | None = None
    """What the training begins with in place of the experiment's own parameters; None for these."""

    def begin(self, params: PyTree) -> PyTree:
        """What a training begins with whose experiment would begin with `params`."""
        return params if self.start is None else self.start.params

    @contextmanager
    def checkpoints(
        self, name: str, kept: int, best: str | None = None, data: str = ""
    ) -> Iterator[Checkpoints | None]:
        """Those of the training called `name`; None if none are kept.

        Args:
            data: a checksum of the data, with which checkpoints have to agree as well.
        """
        if self.folder is None:
            yield None
            return
        folder = self.folder / name
        with Checkpoints(folder, kept, self.config_hash, best, data) as checkpoints:
            yield checkpoints

    def profiled(self, name: str, steps: range, wait: Callable[[], Any]) -> Iterator[int]:
        """The steps of the training called `name`, a few of them under JAX's profiler.

        Args:
            wait: until the devices have done what they have been given.
        """
        if self.profile is None:
            yield from steps
            return
        begin = min(PROFILED.start, len(steps) - 1)
        yield from steps[:begin]
        wait()
        with jax.profiler.trace(self.profile / name):
            for step in steps[begin : PROFILED.stop]:
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    yield step
            wait()
        yield from steps[PROFILED.stop :]


SILENT = Session()


@dataclass
class Stop:
    """Whether the process has been asked to stop."""

    requested: bool = False


@contextmanager
def deferred_signals(defer: bool = True) -> Iterator[Stop]:
    """SIGTERM and SIGINT set the flag instead of what they do; the second time, they do it."""
    stop = Stop()
    if not defer or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        stop.requested = True
        restore()

    for number in numbers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
