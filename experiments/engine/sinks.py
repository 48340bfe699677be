"""Where the records of a run go: each sink is given every record, and is closed at the end.

A run that goes on after an interruption logs all of its records again, from the first.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from experiments.engine.checkpoints import Record
from experiments.engine.config import UsageError
from experiments.engine.files import naming


class Sink(Protocol):
    """What takes records."""

    def log(self, record: Record) -> None:
        """Take a record; nothing of it is changed afterwards."""

    def close(self) -> None:
        """There are no more, as the run is done or has failed."""


@contextmanager
def logging_to(sinks: Sequence[Sink]) -> Iterator[Callable[[Record], None]]:
    """A function that gives a record to all of the sinks, which are closed in the end."""

    def log(record: Record) -> None:
        for sink in sinks:
            sink.log(record)

    try:
        yield log
    except BaseException:
        for sink in sinks:
            # what went wrong before is what there is to tell
            with suppress(OSError):
                sink.close()
        raise
    for sink in sinks:
        sink.close()


class JsonLines:
    """A file with a line for each record, written at once.

    What an earlier process wrote stays until the first record: by then a run that goes on has read
    its checkpoint, which holds the records before it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mode = "wb"

    def log(self, record: Record) -> None:
        with naming(self._path), self._path.open(self._mode) as lines:
            lines.write(f"{json.dumps(record, allow_nan=False)}\n".encode())
        self._mode = "ab"

    def close(self) -> None:
        with naming(self._path), self._path.open("ab") as lines:
            os.fsync(lines.fileno())


class EventFiles:
    """Event files in a folder, which TensorBoard shows: a curve for each metric.

    What an earlier process wrote there stays until the first record.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, record: Record) -> None:
        with naming(self._folder):
            if self._writer is None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._writer = event_writer()(str(self._folder), flush_secs=10)
            for curve, value in curves(record).items():
                self._writer.add_scalar(curve, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            with naming(self._folder):
                self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose own files lie in the run's folder.

    Raises:
        UsageError: if the package is not installed, or if it cannot begin.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        begin = wandb_init()
        try:
            self._run = begin(
                project=project, group=folder.parent.name, name=folder.name, dir=str(folder),
                config=dict(config),
            )  # fmt: skip
        # there is no one class of errors for all that can be wrong with an account and a network
        except Exception as error:
            raise UsageError(
                f"--wandb: {type(error).__name__}: {error}".splitlines()[0]
                + "; WANDB_MODE=offline does without a network and an account"
            ) from None
        # by its own count, whatever is logged later is of a later step
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({**curves(record), "step": record["step"]})

    def close(self) -> None:
        self._run.finish()


def event_writer() -> Any:
    """The class that writes event files.

    Raises:
        UsageError: if its package is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard: tensorboardX is not installed; `pip install tensorboardX`"
        ) from None
    return SummaryWriter


def wandb_init() -> Any:
    """The function that begins a run of Weights & Biases.

    Raises:
        UsageError: if the package is not installed.
    """
    try:
        # not `import wandb`, as its runs may lie in a folder of that name, which can be imported
        from wandb import init
    except ImportError:
        raise UsageError(
            "--wandb: Weights & Biases is not installed; `pip install wandb`"
        ) from None
    return init


def curves(record: Record) -> dict[str, int | float]:
    """The numbers of a record, by split, whatever else it is of, and metric."""
    texts = [value for name, value in record.items() if isinstance(value, str) and name != "split"]
    return {
        "/".join([str(record["split"]), *texts, name]): value
        for name, value in record.items()
        if not isinstance(value, str) and name != "step"
    }
