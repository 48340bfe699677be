"""What an experiment is, and how it and its config are found.

An experiment is a file of `experiments/tasks` or `experiments/claims`, or a folder there with an
`__init__.py`. The file's name is the experiment's, and in it there are

    Config        A frozen dataclass with a `seed`. Its fields are the keys of a config file and the
                  options of `run`; the string below a field is its help. The defaults are the size
                  of --quick: seconds on one core. With a field `parallel`, a `ParallelConfig`, and
                  `train`, a `TrainConfig`, it is one that trains: on several devices, too.
    Result        A NamedTuple of arrays (`np.ndarray`), texts (`str`, each a file of its own) and
                  `scores: dict[str, Any]`, numbers and texts that head the run's summary. It holds
                  what was measured; what the config or theory says is theirs to say again.
    run(config, session) -> Result
    plot(config, result) -> the figure, from what was saved of the result
    TINY          A Config of a second or so, for the tests.

and, where they are needed,

    check(config)            Raises a `UsageError` if the config will not do, before anything is
                             written.
    quick(config) -> Config  The size of --quick, if it is not the defaults on the config's data.
    LABELS                   The metrics whose curves are drawn, with what they are on an axis.
    CLAIMS                   The titles of the claims that it tests, by their ids.
    claims(config, result)   An `experiments.report.evidence.Claim` for each of them.
    model(config, result)    What it trains, an `experiments.engine.model.Model`: with it there are
                             --init, `evaluate`, `sample` and `experiments.open(folder).model`. What
                             the config leaves to the data, as how many characters there are, is
                             taken from the result of a finished run; before a run, that is None.
    DIVIDES_SEQUENCE         True if its loss takes batches (B, T) of which each device has a part
                             of T: `parallel.sequence` may then be above 1.
    BESIDE                   The experiment of the report beside whose figure this one's stands.

It is imported when it is asked for, and looked over before it runs.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from experiments.engine.config import UsageError, check, on_same_data, read_table

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FOLDERS = ("tasks", "claims")
"""Of `experiments` and of `configs`."""


@dataclass(frozen=True)
class Experiment:
    """One that was found: what its file defines, and what takes the place of what it does not."""

    name: str
    file: Path
    Config: Any
    Result: Any
    run: Callable[[Any, Any], Any]
    plot: Callable[[Any, Any], Any]
    TINY: Any
    check: Callable[[Any], None] = lambda config: None
    quick: Callable[[Any], Any] = on_same_data
    LABELS: Mapping[str, str] = field(default_factory=dict)
    CLAIMS: Mapping[str, str] = field(default_factory=dict)
    claims: Callable[[Any, Any], tuple] = lambda config, result: ()
    model: Callable[[Any, Any], Any] | None = None
    DIVIDES_SEQUENCE: bool = False
    BESIDE: str = ""


NEEDED = {
    "Config": "a frozen dataclass with a `seed: Seed = 0`",
    "Result": "a NamedTuple of arrays, texts and `scores: dict[str, Any]`",
    "run": "`def run(config, session)`, which returns a Result",
    "plot": "`def plot(config, result)`, which returns a figure",
    "TINY": "`TINY = Config(...)`, a size of a second, for the tests",
}
"""What an experiment has to define, as it is asked for."""

ARGUMENTS = {
    "run": ("config", "session"),
    "plot": ("config", "result"),
    "check": ("config",),
    "quick": ("config",),
    "claims": ("config", "result"),
    "model": ("config", "result"),
}


def names() -> dict[str, str]:
    """The experiments, from a listing of their folders: the module of each by its name."""
    return {
        module.name: f"experiments.{folder}.{module.name}"
        for folder in FOLDERS
        for module in pkgutil.iter_modules([str(ROOT / "experiments" / folder)])
    }


def find(name: str) -> Experiment:
    """The experiment of that name, imported.

    Raises:
        UsageError: if what its file defines is no experiment, saying what would mend it.
    """
    module = importlib.import_module(names()[name])
    wrong = next(_wrong(module), None)
    if wrong:
        raise UsageError(f"{os.path.relpath(str(module.__file__))}: {wrong}")
    parts = {each.name for each in fields(Experiment)}
    defined = {part: value for part, value in vars(module).items() if part in parts}
    return Experiment(**defined | {"name": name, "file": Path(str(module.__file__))})


def _wrong(module: ModuleType) -> Iterator[str]:
    """What there is against the module as an experiment; later things may rest on earlier ones."""
    yield from (
        f"has no `{part}`; give it {what}"
        for part, what in NEEDED.items()
        if not hasattr(module, part)
    )
    yield from _wrong_config(module.Config)
    yield from _wrong_result(module.Result)
    for name, arguments in ARGUMENTS.items():
        function = getattr(module, name, None)
        if function is not None and not _takes(function, len(arguments)):
            yield f"`{name}` should be a function of ({', '.join(arguments)})"
    if not isinstance(module.TINY, module.Config):
        yield f"`TINY` should be a Config, got {type(module.TINY).__name__}"
    if hasattr(module, "CLAIMS") != hasattr(module, "claims"):
        yield "`CLAIMS` and `claims(config, result)` go together; give it both or neither"
    for name in ("LABELS", "CLAIMS"):
        texts = getattr(module, name, {})
        if not (isinstance(texts, dict) and all(isinstance(x, str) for x in texts.values())):
            yield f"`{name}` should be a dict of texts, as {{'loss': 'squared error'}}"
    for id_ in getattr(module, "CLAIMS", ()):
        if not re.fullmatch(r"[A-Z][0-9]+", id_):
            yield f"`CLAIMS`: an id should be a capital letter and a number, as A10, got {id_!r}"


def _wrong_config(config: Any) -> Iterator[str]:
    params = getattr(config, "__dataclass_params__", None)
    if params is None or not params.frozen:
        yield f"`Config` should be {NEEDED['Config']}"
    try:
        TypeAdapter(config)
        default = config()
    except (PydanticUserError, TypeError) as error:
        reason = str(error).partition(". ")[0]
        yield f"`Config`: {reason}; its fields are numbers, texts, tuples of them, and groups"
    if not isinstance(getattr(default, "seed", None), int):
        yield "`Config` has no `seed`; give it `seed: Seed = 0`, of experiments.engine.config"
    if hasattr(default, "parallel") and not hasattr(getattr(default, "train", None), "batch_size"):
        yield "`Config` has `parallel` and no `train`; give it a TrainConfig, or neither"


def _wrong_result(result: Any) -> Iterator[str]:
    if not hasattr(result, "_fields"):
        yield f"`Result` should be {NEEDED['Result']}"
    if "scores" not in result._fields:
        yield "`Result` has no `scores`; give it `scores: dict[str, Any]`"
    try:
        kinds = typing.get_type_hints(result)
    except (NameError, TypeError) as error:
        yield f"`Result`: an annotation cannot be read: {error}"
    for name, kind in kinds.items():
        array = np.ndarray in (kind, typing.get_origin(kind), getattr(kind, "array_type", None))
        expected = name == "scores" or kind is str or array
        if not expected:
            shown = getattr(kind, "__name__", kind)
            yield (
                f"`Result.{name}` is of type {shown}, which is not saved; make it an np.ndarray, "
                "a str or one of the `scores`"
            )


def _takes(function: Any, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    return True


# ---- configs ------------------------------------------------------------------------------------


def config_paths() -> dict[str, Path]:
    """The config files by name: those of tasks, then those of claims."""
    folders = [CONFIGS / folder for folder in FOLDERS]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def find_config(path: Path) -> Path:
    """The config file that is meant: one at this path, or one of `configs/` of this name.

    Raises:
        UsageError: if it is a bare name that no config has; of a path, its reader tells.
    """
    # `os.path`, as a name may be too long for a file's
    if os.path.isfile(path) or len(path.parts) != 1 or path.suffix:
        return path
    paths = config_paths()
    if path.name in paths:
        return Path(os.path.relpath(paths[path.name]))
    if os.path.exists(path):
        return path
    near = difflib.get_close_matches(path.name[:200], paths, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m experiments list` has all"
    raise UsageError(f"{path}: no such config; {hint}")


def read(path: Path) -> tuple[Experiment, Any]:
    """The experiment that the TOML file at `path` names, and its `Config` as the file gives it.

    Raises:
        UsageError: if the file cannot be read, or does not hold exactly such a config.
    """
    name, table = read_table(path, names(), config_paths())
    experiment = find(name)
    return experiment, check(experiment.Config, table, str(path))
