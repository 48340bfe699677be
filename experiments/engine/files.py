"""Files that are whole or not there, and folders that one process at a time writes in."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from experiments.engine.config import UsageError

LOCK = "lock"


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` once it is whole and on the disk.

    Raises:
        OSError: naming a file; what was at `path` stays.
    """
    aside = path.with_name(f"{path.name}.new")
    try:
        with naming(path), aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) == str(aside):
            error.filename = str(path)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` that names no file, as of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's to write in; the lock ends with the process, however it ends.

    Raises:
        UsageError: naming the process that has it.
    """
    path = folder / LOCK
    with _locked_file(path) as file:
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            yield
        finally:
            if _lies_at(path, file):
                path.unlink()


def _locked_file(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UsageError(f"{path.parent}: is running, as {holder}") from None
        except OSError as error:
            # some network file systems have no locks
            lock = f"{path}: no lock ({error.strerror})"
            print(f"{lock}: start no second process in this folder", file=sys.stderr)
        if _lies_at(path, file):
            return file
        # whoever had it removed it between the two calls
        file.close()


def _lies_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
