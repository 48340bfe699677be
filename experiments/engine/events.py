"""Metrics as event files, which TensorBoard shows."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.engine.checkpoints import Record
from experiments.engine.files import naming


@contextmanager
def event_log(folder: Path) -> Iterator[Callable[[Record], None]]:
    """A function that adds a record to the event files in the folder, a curve for each metric.

    What an earlier process wrote there stays until the first record: a run that goes on logs all of
    its records again.
    """
    from tensorboardX import SummaryWriter

    writers: list[Any] = []

    def log(record: Record) -> None:
        with naming(folder):
            if not writers:
                shutil.rmtree(folder, ignore_errors=True)
                writers.append(SummaryWriter(str(folder), flush_secs=10))
            for curve, value in _curves(record).items():
                writers[0].add_scalar(curve, value, record["step"])

    try:
        yield log
    finally:
        with naming(folder):
            for writer in writers:
                writer.close()


def _curves(record: Record) -> dict[str, int | float]:
    """The numbers of a record, by split, whatever else it is of, and metric."""
    texts = [value for name, value in record.items() if isinstance(value, str) and name != "split"]
    return {
        "/".join([str(record["split"]), *texts, name]): value
        for name, value in record.items()
        if not isinstance(value, str) and name != "step"
    }
