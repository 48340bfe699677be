"""How programs are timed against one another on a machine that is never quite still, and reported.

All run in one process, in rounds, one sample of each program a round, so that a slow minute is
slow for all; the order is drawn anew for each round. A sample is preceded by untimed calls of the
same program for 10 ms, since whoever runs after a program whose threads wait actively is slowed by
them (at calls of 2 ms by a quarter, where it always came after the same), and repeats its call
until 30 ms have passed. What counts is the ratio of two samples of one round: its
median over the rounds, with the quartiles. Compilation is timed apart.

A benchmark names shapes and peers, and makes programs of one shape for each kind, "forward" say:
those of "ours" and of every peer that can run. A table of speeds holds them all.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Program(NamedTuple):
    """What starts a computation, and what returns its results when they are there."""

    launch: Callable[[], Any]
    compile_seconds: float | None = None
    wait: Callable[[Any], Any] = jax.block_until_ready

    def call(self) -> Any:
        return self.wait(self.launch())

    def in_a_row(self, times: int) -> "Program":
        """So many calls, and one wait: what it takes to start them passes while others run."""

        def launch():
            for _ in range(times - 1):
                self.launch()
            return self.launch()

        return self._replace(launch=launch)


class Ratio(NamedTuple):
    """Median and quartiles, over the rounds, of another program's time over ours."""

    median: float
    lower: float
    upper: float


Programs = dict[str, Program]  # by kind


class Unavailable(Exception):
    """This peer cannot run here."""


def compiled(function: Callable, *args: Any) -> Program:
    """`function(*args)` as a compiled program of its own."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile()
    return Program(partial(executable, *args), time.perf_counter() - start)


def temporary_mebibytes(function: Callable, *args: Any) -> float:
    """The temporary memory of a program, as XLA plans it."""
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not say how much memory a program needs")
    return analysis.temp_size_in_bytes / 2**20


def prepare_torch(torch: Any) -> Callable[[Any], Any]:
    """Sets torch to all cores; a function that waits for its results, on the device of JAX."""
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise Unavailable("this build of torch has no CUDA")
    torch.set_num_threads(cores())

    def wait(results):
        if on_gpu:
            torch.cuda.synchronize()
        return results

    return wait


def to_torch(torch: Any, array: jax.Array) -> Any:
    """A copy as a tensor on the same device."""
    return torch.from_dlpack(array).clone()


# ---- speeds -----------------------------------------------------------------------------------


def build(
    ours: Callable[[Any], Programs],
    peers: Mapping[str, Callable[[Any], Programs]],
    problem: Any,
    label: str = "",
) -> dict[str, Programs]:
    """The programs of ours and of each peer that is installed."""
    programs = {"ours": ours(problem)}
    for name, peer in peers.items():
        try:
            programs[name] = peer(problem)
        except (ImportError, Unavailable) as error:
            print(f"  {label}without {name}: {error}")
    return programs


def check(
    programs: Mapping[str, Programs], results: Callable[[Programs], Mapping[str, Any]], dtype: str
) -> None:
    """All must have the same `results`, arrays of JAX or torch by name, as ours."""
    exact = dtype == "float32" and jax.default_backend() == "cpu"
    tolerance = 1e-4 if exact else 3e-2
    array = lambda a: np.asarray(a.detach().float().cpu() if hasattr(a, "detach") else a)
    arrays = lambda name: {what: array(a) for what, a in results(programs[name]).items()}
    expected = arrays("ours")
    for name in programs:
        for what, actual in arrays(name).items():
            e = expected[what].astype(np.float32)
            # what is zero, as dq where there is one key, leaves rounding errors
            scale = max(np.max(np.abs(e)), 0.1)
            error = np.max(np.abs(actual.astype(np.float32) - e)) / scale
            if not error <= tolerance:
                raise AssertionError(f"{name}: {what} is {error:.1e} off, over {tolerance:.0e}")


def compare(kinds: Sequence[str], programs: Mapping[str, Programs], rounds: int) -> dict[str, Any]:
    """For each kind, the time of each peer over ours: a row of the table of speeds."""
    row = {}
    for kind in kinds:
        of_kind = {name: each[kind] for name, each in programs.items()}
        times = measure(of_kind, rounds)
        row[kind] = {
            name: {
                "ratio": ratio(times[name], times["ours"])._asdict(),
                "milliseconds": 1e3 * float(np.median(times[name])),
                "compile_seconds": program.compile_seconds,
            }
            for name, program in of_kind.items()
        }
    return row


def summarize(kinds: Sequence[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of speeds: the rows, each with a "shape" too, and their means."""
    means = {}
    for kind in kinds:
        names = dict.fromkeys(name for row in rows for name in row[kind] if name != "ours")
        means[kind] = {name: geometric_mean(medians(rows, name, [kind])) for name in names}
    return {"rows": rows, "geometric_mean": means}


def medians(rows: Sequence[Mapping[str, Any]], peer: str, kinds: Sequence[str]) -> list[float]:
    """The ratios of `peer`, of the rows that have it."""
    return [
        row[kind][peer]["ratio"]["median"] for row in rows for kind in kinds if peer in row[kind]
    ]


def print_ratios(speed: Mapping[str, Any], axes: str, width: int) -> None:
    """The table of each kind; `axes` name those of a shape, in a column of so many characters."""
    for kind, means in speed["geometric_mean"].items():
        print(f"\n{kind}: time of the peer / ours, median [quartiles]; ours in ms")
        print(f"{axes:<{width}}{'ours':>9}" + "".join(f"{name:>19}" for name in means))
        for row in speed["rows"]:
            line = f"{row['shape']!s:<{width}}{row[kind]['ours']['milliseconds']:>9.2f}"
            for name in means:
                cell = show_ratio(row[kind][name]["ratio"]) if name in row[kind] else "–"
                line += f"{cell:>19}"
            print(line)
        print(f"{'geometric mean':<{width + 9}}" + "".join(f"{m:>19.2f}" for m in means.values()))


def show_ratio(r: Mapping[str, float]) -> str:
    return f"{r['median']:.2f} [{r['lower']:.2f}–{r['upper']:.2f}]"


def print_trust_and_compilation(speed: Mapping[str, Any]) -> None:
    """A warning where "ours again" differs from ours; then what compilation took."""
    rows, means = speed["rows"], speed["geometric_mean"]
    kinds, peers = list(means), next(iter(means.values()))
    copies = medians(rows, "ours again", kinds)
    worst = max((abs(copy - 1) for copy in copies), default=0.0)
    if worst > 0.03:
        print(
            f"\nNot to be trusted: the identical program is {worst:.0%} off; is the machine idle?"
        )
    print(f"\nseconds to compile, {' + '.join(kinds)}, summed over the shapes")
    for name in ("ours", *peers):
        cells = [row[kind][name] for row in rows for kind in kinds if name in row[kind]]
        seconds = [cell["compile_seconds"] for cell in cells]
        if None not in seconds:
            print(f"  {name:<12}{sum(seconds):6.1f}")


# ---- the rounds -------------------------------------------------------------------------------


def measure(
    programs: Mapping[str, Program], rounds: int, sample_seconds: float = 0.03
) -> dict[str, list[float]]:
    """The seconds per call of each program, one sample for each round."""
    for program in programs.values():
        program.call()
    times: dict[str, list[float]] = {name: [] for name in programs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(programs), len(programs)):
            _repeat(programs[name].call, sample_seconds / 3)
            times[name].append(_repeat(programs[name].call, sample_seconds))
    return times


def _repeat(call, seconds):
    """The seconds per call, of as many as it takes."""
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
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


# ---- the command line -------------------------------------------------------------------------


def parser(
    description: str,
    shapes: Mapping[str, Any],
    peers: Iterable[str],
    default_peers: Sequence[str],
    studies: Mapping[str, str],
) -> argparse.ArgumentParser:
    """What every benchmark understands.

    Args:
        shapes: the options of the argument `--shapes`.
        studies: what a flag of that name measures in place of speeds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", nargs="+", **shapes)
    parser.add_argument("--peers", nargs="*", choices=list(peers), default=default_peers)
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, what in studies.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"{what}, and no speeds")
    parser.add_argument("--output", type=new_file, help="a JSON file for the results")
    return parser


def count(text: str) -> int:
    """A whole number above zero, as an argument."""
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no whole number from 1 to 999999999")
    return int(text)


def counts(text: str, names: str) -> tuple[int, ...]:
    """As many whole numbers above zero as `names`, as an argument such as "T,B,D,H"."""
    parts = text.split(",")
    if len(parts) != len(names.split(",")):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {names}")
    return tuple(map(count, parts))


def new_file(text: str) -> Path:
    """The path of a file to write in the end, as an argument: its folder is made at once."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be written as a file")
    return path


class Study(NamedTuple):
    """A measurement, and how its result is printed."""

    measure: Callable[[], Any]
    show: Callable[[Any], None]


def report(
    args: argparse.Namespace, packages: Sequence[str], speed: Study, **studies: Study
) -> None:
    """Runs the studies whose flags are set, or else `speed`, and writes what came out."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    about = machine(packages)
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    results: dict[str, Any] = {"machine": about, "dtype": args.dtype, "rounds": args.rounds}
    asked = {name: study for name, study in studies.items() if getattr(args, name)}
    for name, study in (asked or {"speed": speed}).items():
        results[name] = study.measure()
        study.show(results[name])
    if args.output:
        write(args.output, results)


def report_speed(
    about: str,
    axes: str,
    width: int,
    shapes: Sequence[tuple[int, ...]],
    peers: Mapping[str, Any],
    packages: Sequence[str],
    measure: Callable[..., Any],
) -> None:
    """The command line of a benchmark without studies, whose shapes are whole numbers.

    Args:
        about: its docstring.
        axes: the names of a shape's numbers, such as "T,B,D,H", in a column of `width` characters.
        measure: of shapes, the names of peers, rounds and a dtype, to the table of speeds.
    """
    given = {"type": lambda text: counts(text, axes), "default": shapes, "metavar": axes}
    args = parser(about.splitlines()[0], given, peers, list(peers), {}).parse_args()

    def show(speed: Mapping[str, Any]) -> None:
        print_ratios(speed, f"({axes.replace(',', ', ')})", width)
        print_trust_and_compilation(speed)

    speed = lambda: measure(args.shapes, args.peers, args.rounds, args.dtype)
    report(args, packages, speed=Study(speed, show))


def table(
    kinds: Sequence[str],
    shapes: Iterable[tuple[int, ...]],
    programs_of: Callable[[tuple[int, ...]], Mapping[str, Programs]],
    rounds: int,
) -> dict[str, Any]:
    """The table of speeds of the programs of each shape."""
    rows = []
    for shape in shapes:
        rows.append({"shape": shape} | compare(kinds, programs_of(shape), rounds))
        print(f"  {shape} done", flush=True)
    return summarize(kinds, rows)


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Keep the results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n")


# ---- the machine ------------------------------------------------------------------------------


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
