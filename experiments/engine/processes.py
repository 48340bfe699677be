"""Several processes, on one machine or on many, that train one model: each runs the same command.

All of them compute; process 0 alone prints, and writes all that is no checkpoint. Checkpoints are
written together, into a folder that all of them have to see.
"""

import hashlib
import os
import re
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.engine.config import UsageError

SILENCE = 30
"""Seconds without a sign of life from one process after which the others end."""


def join(
    coordinator: str | None, processes: int | None, process: int | None, *, cluster: bool
) -> None:
    """Wait for the other processes, if there are any; before JAX looks for its devices.

    Args:
        coordinator: host and port of process 0.
        cluster: the other three are known to the cluster that this runs on.

    Raises:
        UsageError: if that is not one way to find them, if there is no such cluster, or if they do
            not have as many devices each.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [option for option, value in given.items() if value is None]
    if cluster and len(missing) < len(given):
        raise UsageError(f"--cluster: takes the place of {', '.join(given)}; give one or the other")
    if not cluster and len(missing) == len(given):
        return
    if not cluster and missing:
        raise UsageError(f"{', '.join(given)}: go together, got no {' and no '.join(missing)}")
    if coordinator is not None and processes is not None and process is not None:
        _check(coordinator, processes, process)
    # what it would do with SIGTERM is done by the training loop
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=SILENCE
        )
    except ValueError as error:
        raise UsageError(
            f"--cluster: none was found that JAX knows ({error}); give {', '.join(given)}"
        ) from None
    check_devices()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        numbers = ", ".join(str(number) for _, number in sorted(devices.items()))
        raise UsageError(f"--processes: all should have as many devices, got {numbers}")


def check_devices() -> None:
    """Raise a `UsageError` if JAX finds none of the devices that it was asked for."""
    try:
        jax.devices()
    # an AssertionError says nothing; it comes where a platform has no plug-in
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it was not installed for them"
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"JAX_PLATFORMS={asked}: JAX finds no such devices: {reason}") from None


def _check(coordinator: str, processes: int, process: int) -> None:
    # a name, an IPv4 address, or an IPv6 address in brackets
    found = re.fullmatch(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", coordinator)
    port = int(found[2]) if found else 0
    if not found or not 0 < port < 2**16:
        raise UsageError(
            f"--coordinator: should be HOST:PORT with a port from 1 to 65535, got {coordinator}"
        )
    if processes >= 2**31:
        raise UsageError(f"--processes: should be less than {2**31}, got {processes}")
    if not 0 <= process < processes:
        raise UsageError(
            f"--process: should be from 0 to --processes - 1 = {processes - 1}, got {process}"
        )
    try:
        socket.getaddrinfo(found[1].strip("[]"), port)
    except (OSError, UnicodeError):
        raise UsageError(f"--coordinator: there is no host {found[1]} known here") from None
    if process == 0:
        # JAX itself crashes where something else listens
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise UsageError(f"--coordinator: cannot listen at {port}: {error}") from None


def alone() -> bool:
    """Whether this is the only process."""
    return not jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return alone() or jax.process_index() == 0


def check_same(asked: Any) -> None:
    """Raise a `UsageError` in every process if they were not all asked for the same."""
    if alone():
        return
    digest = hashlib.sha256(repr(asked).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [str(n) for n, each in enumerate(digests) if (each != digests[0]).any()]
    if others:
        raise UsageError(
            f"--processes: all should be given the same config and options, but process "
            f"{', '.join(others)} was given others than process 0"
        )


def of_first(act: Callable[[], bool]) -> bool:
    """What `act` comes to, done by process 0 alone while the others wait.

    Raises:
        UsageError: if it failed, and this is another process.
    """
    if alone():
        return act()
    failed = -1
    outcome = failed
    try:
        if is_first():
            outcome = act()
    finally:
        outcome = int(multihost_utils.broadcast_one_to_all(np.int32(outcome)))
    if outcome == failed:
        raise UsageError(f"process {jax.process_index()}: process 0 could not begin")
    return bool(outcome)


def any_says(flag: bool) -> bool:
    """Whether the flag is set in any process; all have to ask at once."""
    return flag if alone() else bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


@contextmanager
def leaving() -> Iterator[None]:
    """After a failure the process ends at once, and does not wait for the others to end, too."""
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if alone() or code not in (1, 130):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
