"""How programs are timed against one another on a machine that is never quite still.

All run in one process, in rounds, one sample of each program a round, so that a slow minute is
slow for all; the order is rotated from round to round. A sample is preceded by an untimed call of
the same program, since whoever runs after a program with its own threads is slowed by them, and
repeats its call until 30 ms have passed. What counts is the ratio of two samples of one round: its
median over the rounds, with the quartiles. Compilation is timed apart.
"""

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A call that returns when its results are there."""

    call: Callable[[], Any]
    compile_seconds: float | None = None


class Ratio(NamedTuple):
    """Median and quartiles, over the rounds, of another program's time over ours."""

    median: float
    lower: float
    upper: float


def compiled(function: Callable, *args: Any) -> Program:
    """`function(*args)` as a compiled program of its own."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile()
    return Program(lambda: jax.block_until_ready(executable(*args)), time.perf_counter() - start)


def measure(
    programs: Mapping[str, Program], rounds: int, sample_seconds: float = 0.03
) -> dict[str, list[float]]:
    """The seconds per call of each program, one sample for each round."""
    for program in programs.values():
        program.call()
    names = list(programs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for first in range(rounds):
        for k in range(len(names)):
            name = names[(first + k) % len(names)]
            times[name].append(_sample(programs[name].call, sample_seconds))
    return times


def _sample(call, sample_seconds):
    call()
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < sample_seconds:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
    return elapsed / calls


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Above 1 ours is the faster."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    lower, _, upper = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(statistics.median(each), lower, upper)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What a number depends on: processor, cores, device, versions, and how busy the machine is."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
