"""A run's folder, `<output>/<config's name>/<run's name>/`, and what it holds.

    lock           names the process that writes here, while there is one
    config.toml    the resolved config, which runs again as it stands
    init.sha256    of the weights that its training began with, if they are from outside
    checkpoints/   of its training, see `experiments.engine.checkpoints`
    metrics.jsonl  one line for each logged step
    summary.json   final scores, times, versions and machine; once all is there, `finished`
    result.npz     the arrays that the figure is drawn from
    <name>.txt     each text of the result, if it has any
    curves.png     of the metrics, if any are logged
    profile/       if asked for: JAX's trace of a few steps
    tensorboard/   if asked for: the metrics once more, as event files
    wandb/         if asked for: the files of Weights & Biases
    figure.png     of the result
    evaluations.jsonl   a line for each later `evaluate`

Every file but those of `checkpoints`, `profile`, `tensorboard` and `wandb`, and the metrics and
evaluations, which grow, is whole or not there. What counts as finished is the summary that says so,
which is written last.

Every key of the metrics and the summary that depends on the clock ends in `_seconds` or
`_per_second`; the rest is the same when the run is repeated.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tomli_w

from experiments.engine import devices as meshes, processes
from experiments.engine.checkpoints import Record
from experiments.engine.config import UsageError
from experiments.engine.experiment import Experiment
from experiments.engine.files import LOCK, locked, written
from experiments.engine.session import SILENT, Session, Start
from experiments.engine.sinks import EventFiles, JsonLines, Sink, WeightsAndBiases, logging_to

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
INIT = "init.sha256"
CHECKPOINTS, PROFILE, TENSORBOARD = "checkpoints", "profile", "tensorboard"
RESULT, CURVES, FIGURE = "result.npz", "curves.png", "figure.png"

WHERE = "parallel"
"""The part of a config that says on which devices a run trains, and not what: a run may go on with
another."""


def check(experiment: Experiment, config: Any) -> None:
    """Raise a `UsageError` if the config will not do: on these devices, or for the experiment."""
    if hasattr(config, WHERE):
        meshes.check(
            config.parallel,
            config.train.batch_size,
            config.train.accumulate,
            divides_sequence=experiment.DIVIDES_SEQUENCE,
        )
    experiment.check(config)


def group_of(config_path: Path) -> str:
    """The folder that runs of a config belong in: the config's name, or that of a run's group."""
    inside_run = config_path.name == CONFIG and (config_path.parent / METRICS).is_file()
    return config_path.resolve().parent.parent.name if inside_run else config_path.stem


def create(output: Path, group: str, name: str | None, *, overwrite: bool = False) -> Path:
    """A new, empty run folder; without a `name`, one named by the time, which is always new.

    What `overwrite` replaces lies beside it, hidden, until there is something of the new run.

    Raises:
        UsageError: if the name is no plain file name, if it is taken, or if nothing can be written.
    """
    if name is not None:
        check_name(name)
    try:
        (output / group).mkdir(parents=True, exist_ok=True)
        if name is None:
            return _create_unique(output / group)
        folder = output / group / name
        if overwrite and os.path.lexists(folder):
            _set_aside(folder)
        folder.mkdir()
        return folder
    except FileExistsError as error:
        if name is None or not os.path.lexists(output / group / name):
            raise UsageError(f"--output: {error.filename} is in the way, and no folder") from None
        raise UsageError(
            f"--name: {output / group / name} exists; --resume it, --overwrite it, or choose "
            "another name"
        ) from None
    except OSError as error:
        raise UsageError(f"--output: cannot write {error.filename}: {error.strerror}") from None


def reopen(output: Path, group: str, name: str, table: Mapping[str, Any]) -> Path:
    """The folder of a run that is to go on with the config `table`; a new one if there is none.

    Raises:
        UsageError: if the name is no plain file name; if the folder is not that of a run; or if it
            is the run of another config, with a line for each key that differs and does not only
            say where the run trains.
    """
    check_name(name)
    folder = output / group / name
    if not os.path.lexists(folder):
        return create(output, group, name)
    if not folder.is_dir():
        raise UsageError(f"--resume: {folder} is in the way, and no folder")
    if {path.name for path in folder.iterdir()} <= {LOCK, f"{CONFIG}.new"}:
        # stopped before anything was kept
        return folder
    kept = _kept_config("--resume", folder)
    for each in (kept, table := dict(table)):
        each.pop(WHERE, None)
    if lines := list(_differences(kept, table)):
        raise UsageError(*(f"--resume: {folder / CONFIG}: {line}" for line in lines))
    return folder


def take_back(folder: Path) -> None:
    """Undo `create`, if nothing came of the run: what could not be asked for changes nothing."""
    metrics = folder / METRICS
    if (folder / RESULT).exists() or (metrics.exists() and metrics.stat().st_size):
        return
    shutil.rmtree(folder)
    if os.path.lexists(_aside(folder)):
        _aside(folder).rename(folder)


def trains(folder: Path) -> bool:
    """Whether a training of the run has left a checkpoint, and not only begun to write one."""
    return any(path.name.isdigit() for path in (folder / CHECKPOINTS).rglob("*") if path.is_dir())


def kept_init(folder: Path) -> str | None:
    """The checksum of the weights from outside that the run began with, if it did."""
    with suppress(FileNotFoundError):
        return (folder / INIT).read_text(encoding="utf-8").strip()
    return None


def check_name(name: str) -> None:
    """Raise a `UsageError` if the name is none for a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"--name: {name!r} is no name for a folder; use letters, digits, '.', '_' and '-'"
        )


def _kept_config(option: str, folder: Path) -> dict[str, Any]:
    """The config of the run in the folder; a `UsageError` of the option if there is no run."""
    try:
        kept = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        kept = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{option}: {folder / CONFIG} cannot be read: {error}") from None
    if "experiment" not in kept:
        raise UsageError(f"{option}: {folder} is not the folder of a run; it stays as it is")
    return kept


def _differences(
    kept: Mapping[str, Any], table: Mapping[str, Any], group: str = ""
) -> Iterator[str]:
    """A line for each key of two configs that differs."""
    for key in sorted(kept.keys() | table.keys()):
        before, now = kept.get(key), table.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{group}{key}.")
        elif json.dumps(before, default=str) != json.dumps(now, default=str):
            yield f"{group}{key} was {json.dumps(before)} and would be {json.dumps(now)}"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run; empty if there is none that can be read."""
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def finished(folder: Path) -> bool:
    """Whether all that the run leaves is there."""
    return read_summary(folder).get("finished") is True


def write_config(folder: Path, table: Mapping[str, Any], command: str) -> None:
    """Keep the resolved config, headed by the command that it came from."""
    header = f"# The resolved config of: {command}\n"
    with written(folder / CONFIG) as file:
        file.write((header + tomli_w.dumps(table)).encode())


def read_metrics(folder: Path, labels: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a run, in order.

    Args:
        labels: the metrics that have to be numbers; others may be texts.

    Raises:
        UsageError: if the file cannot be read, or a line is damaged.
    """
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{folder / METRICS}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            numbers = [record["step"], *(record[name] for name in labels if name in record)]
            if not isinstance(record["split"], str):
                raise TypeError
            for value in numbers:
                # raises if it is no number, or one too large for a float
                math.isfinite(value)
        except (ValueError, RecursionError, KeyError, TypeError, OverflowError):
            raise UsageError(f"{folder / METRICS}: line {number} is damaged") from None
        records.append(record)
    return records


class ResultError(Exception):
    """What came of a run is not what a result may hold; the message says what is not."""


def write_result(folder: Path, result: Any, summary: Mapping[str, Any]) -> Any:
    """Keep a result: its arrays, its texts, and its scores at the head of the summary.

    Returns:
        The result as it is kept: with NumPy's arrays for numbers and arrays of other kinds.

    Raises:
        ResultError: if it holds anything else, which is not kept; all the rest is.
    """
    wrong: list[str] = []
    of_arrays = {k: v for k, v in result._asdict().items() if k not in ("scores", *texts(result))}
    arrays = _each(of_arrays, _array, "", wrong)
    scores = _each(dict(result.scores), _score, "scores.", wrong)
    with written(folder / RESULT) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    for name, content in texts(result).items():
        with written(folder / f"{name}.txt") as file:
            file.write(content.encode())
    write_summary(folder, scores, summary)
    if wrong:
        raise ResultError(f"{folder}: its result is kept without {', '.join(wrong)}")
    return result._replace(**arrays, scores=scores)


def _each(
    values: Mapping[str, Any], convert: Callable[[Any], Any], prefix: str, wrong: list[str]
) -> dict[str, Any]:
    """The values converted; of those that cannot be, the name and the reason go to `wrong`."""
    converted = {}
    for name, value in values.items():
        try:
            converted[name] = convert(value)
        except Exception as error:  # as the values may be anything
            wrong.append(f"{prefix}{name} ({str(error).splitlines()[0]})")
    return converted


def _array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if jax.dtypes.issubdtype(array.dtype, np.floating) and array.dtype.kind == "V":
        # as bfloat16, which a file of NumPy's has no word for
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufcSU":
        raise TypeError(f"a {type(value).__name__}, which is no array of numbers")
    return array


def _score(value: Any) -> int | float | str:
    if isinstance(value, str):
        return value
    number = _array(value).item()
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{number}, which JSON has no number for")
    return number


def write_summary(folder: Path, scores: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Keep the scores and what else there is to say of a run."""
    text = json.dumps({**scores, **summary}, indent=2, allow_nan=False)
    with written(folder / SUMMARY) as file:
        file.write(f"{text}\n".encode())


def read_result(folder: Path, result: Any) -> Any:
    """The result that `write_result` kept, of the NamedTuple type `result`.

    Raises:
        UsageError: if it cannot be read.
    """
    files = {name: folder / f"{name}.txt" for name in result._fields}
    try:
        # bytes, as reading text changes the ends of lines
        found = {n: file.read_bytes().decode() for n, file in files.items() if file.is_file()}
        # numpy leaves a file open that it cannot read
        with (folder / RESULT).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return result(**arrays, **found, scores=read_summary(folder))
    # there is no one class of errors for all that can be wrong with a file
    except Exception as error:
        raise UsageError(
            f"{folder}: its result cannot be read ({type(error).__name__}); remove the folder to "
            "run it again"
        ) from None


def record(
    experiment: Experiment, config: Any, folder: Path, *, profile: bool = False,
    tensorboard: bool = False, wandb: str | None = None, start: Start | None = None,
) -> Any:  # fmt: skip
    """Run the experiment, and leave in the folder what it logs, what comes of it, and figures.

    Args:
        start: what its training begins with, if not with random parameters of its own. A run that
            goes on from a checkpoint can do without.

    Returns:
        The result, as it is kept; in a process that writes nothing, None.

    Raises:
        ResultError: once all that can be is kept, if that is not all of the result.
    """
    clock = time.perf_counter()
    mesh = meshes.make_mesh(config.parallel) if hasattr(config, WHERE) else None
    session = Session(SILENT.log, folder / CHECKPOINTS, hash_of(config), mesh, start=start)
    if not processes.is_first():
        experiment.run(config, session)
        return None
    if start is not None:
        with written(folder / INIT) as file:
            file.write(f"{start.sha256}\n".encode())
    sinks: list[Sink] = [JsonLines(folder / METRICS), _Replacing(folder)]
    if tensorboard:
        sinks.append(EventFiles(folder / TENSORBOARD))
    if wandb is not None:
        sinks.append(WeightsAndBiases(wandb, folder, dataclasses.asdict(config)))
    with logging_to(sinks) as log:
        traces = folder / PROFILE if profile else None
        result = experiment.run(config, replace(session, log=log, profile=traces))
    summary = {"wall_seconds": time.perf_counter() - clock, "seed": config.seed} | surroundings()
    if (init := kept_init(folder)) is not None:
        summary["init_sha256"] = init
    if not isinstance(result, experiment.Result) or not isinstance(result.scores, Mapping):
        raise ResultError(
            f"{experiment.file}: `run` returned no Result with scores: {result!r:.99}"
        )
    result = write_result(folder, result, summary)

    from experiments.figures import curves, save

    if experiment.LABELS:
        save(curves(read_metrics(folder), experiment.LABELS), folder / CURVES)
    save(experiment.plot(config, read_result(folder, experiment.Result)), folder / FIGURE)
    write_summary(folder, result.scores, summary | {"finished": True})
    _forget_replaced(folder)
    return result


def hash_of(config: Any) -> str:
    """Of what a config says, but for where it trains."""
    table = dataclasses.asdict(config)
    table.pop(WHERE, None)
    text = json.dumps(table, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def texts(result: Any) -> dict[str, str]:
    """The fields of a result that are text."""
    return {k: v for k, v in result._asdict().items() if isinstance(v, str)}


def surroundings() -> dict[str, Any]:
    """The versions and the machine that a number was measured with."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "numpy", "optax", "rnnattn")
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def _create_unique(parent: Path) -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in range(1, 1000):
        folder = parent / (stamp if suffix == 1 else f"{stamp}_{suffix}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise UsageError(f"--output: a thousand runs of this second are in {parent}; give a --name")


def _set_aside(folder: Path) -> None:
    if folder.is_symlink():
        raise UsageError(f"--overwrite: {folder} is not the folder of a run; it stays as it is")
    _kept_config("--overwrite", folder)
    with locked(folder):
        _forget_replaced(folder)
        folder.rename(_aside(folder))
    (_aside(folder) / LOCK).unlink(missing_ok=True)


def _aside(folder: Path) -> Path:
    """Where a run lies whose place another takes."""
    return folder.with_name(f".{folder.name}.removed")


def _forget_replaced(folder: Path) -> None:
    shutil.rmtree(_aside(folder), ignore_errors=True)


class _Replacing:
    """A sink: with the first record of a run, the one whose place it takes can go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log(self, record: Record) -> None:
        _forget_replaced(self._folder)

    def close(self) -> None:
        pass


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
