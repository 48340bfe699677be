"""The command line: `python -m experiments run CONFIG`, `… report` and `… list`."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Python's own handler waits for the main thread, which may be compiling, and raises where it
    # finds it, which may be where JAX drops the exception. There is nothing to tidy up after a run
    # that ends at once; a training that has something to keep asks for the signal.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import io
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from experiments.engine.config import Count, UsageError, check, claim, escaped, to_table
from experiments.engine.experiment import ROOT, Experiment, config_paths, find_config, read

PROGRAM = "python -m experiments"

LONGEST = 4096
"""Characters of an argument: as many as a path may have."""

NARROWEST = 20
"""Columns of a terminal: with fewer, the layout of a help never ends."""

MOST_SEEDS, MOST_JOBS, LONGEST_SAMPLE = 1000, 256, 1_000_000


@dataclass(frozen=True)
class List:
    """List all configs, each with what it shows."""


@dataclass(frozen=True)
class Options:
    """Options of every run."""

    name: str | None = None
    """Name of the run; by default, the date and time."""
    output: Path = Path("outputs")
    """Folder for results: a run is written to OUTPUT/CONFIG/NAME."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Repeat the run with N seeds, counting up from the config's: OUTPUT/CONFIG-NAME/seed-…"""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A small version that takes seconds: the experiment's defaults, on the config's data."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace an existing run of that name."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run of that name from its last checkpoint, or start it if there is none."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Save a JAX profiler trace of steps 3 to 7 in the run's folder."""
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write the metrics as TensorBoard event files."""
    wandb: Annotated[str | None, tyro.conf.arg(metavar="PROJECT")] = None
    """Also log to this Weights & Biases project; WANDB_MODE=offline logs to the run's folder."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0, for a run of several processes that all run this command."""
    processes: Count | None = None
    """Number of processes."""
    process: int | None = None
    """Index of this process, from 0."""
    cluster: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Detect the previous three from Slurm, Open MPI, Kubernetes or Cloud TPU."""


@dataclass(frozen=True, kw_only=True)
class Run(Options):
    """Run the experiment of a config file and save the results in a new folder.

    Every field of the config is also an option: `run CONFIG --help` lists them with their values.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A TOML file, or the name of a config in configs/, for example lstm_digits. Comes first."""


@dataclass(frozen=True)
class Report:
    """Test every claim of the notes and write the results to one HTML page.

    Existing results are reused unless something that they depend on has changed.
    """

    full: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the full-size configs, some of which take minutes; by default, sizes of seconds."""
    readme: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also update README.md, docs/claims.md and docs/notes.md; requires --full."""
    pdf: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also print the page to report.pdf; needs Chromium or Chrome."""
    output: Path = Path("outputs")
    """Folder for results; the page is written to OUTPUT/report."""


@dataclass(frozen=True)
class Sweep:
    """Run a config with every combination of some values, and compare the runs.

    Finished runs are kept, interrupted ones continued, and a failure does not stop the others.
    Options of `run CONFIG`, for example --quick or --train.steps 10, apply to all of the runs.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A TOML file, or the name of a config in configs/, for example lstm_digits. Comes first."""
    grid: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE,VALUE…")]
    """Keys of the config and their values, for example train.learning_rate=1e-3,3e-3 seed=0,1."""
    name: str = "sweep"
    """Name of the sweep; choose another when you change other options."""
    output: Path = Path("outputs")
    """Folder for results: runs are written to OUTPUT/CONFIG-NAME/RUN."""
    jobs: int = 1
    """Number of runs at a time, each in its own process; they share the devices."""
    part: Annotated[str | None, tyro.conf.arg(metavar="K/N")] = None
    """Only the K-th of N parts of the runs (from 1), for job arrays; the same command without it
    compares all of them afterwards."""


@dataclass(frozen=True)
class Seeds:
    """What `run CONFIG --seeds` makes a sweep of."""

    seeds: int
    seed: int | None = None
    name: str = "sweep"
    output: Path = Path("outputs")


@dataclass(frozen=True)
class Compare:
    """Compare finished runs of one experiment: scores, settings that differ, and curves."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN …")]
    """Folders of the runs. Those that differ only in the seed are averaged: mean ± deviation."""
    each: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One row for each run, even if runs differ only in the seed."""
    output: Path = Path("outputs/compare.png")
    """File for the figure."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which of a run's parameters."""

    best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use the best checkpoint, by the metric in train.best, instead of the newest."""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use the exponential mean of the parameters, which train.ema keeps, instead of the last."""


@dataclass(frozen=True)
class Export(Weights):
    """Save the parameters of a run to a safetensors file."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    output: Path = Path("params.safetensors")
    """File to write."""
    training: str = ""
    """For an experiment that trains several models: the folder of one in checkpoints/."""


@dataclass(frozen=True)
class Evaluate(Weights):
    """Print and save the test scores of a finished run, on its own data or on others.

    They are added to RUN/evaluations.jsonl. On the run's own data and device they are bitwise
    equal to those in its summary. `evaluate RUN --help` lists the options of the dataset.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder. Comes first."""


@dataclass(frozen=True)
class Sample(Weights):
    """Generate text with a finished run of a text model. Equal options give equal text."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    prompt: str | None = None
    """Text to continue; by default, generation starts at the beginning of a line."""
    length: Count = 500
    """Number of characters to generate."""
    temperature: float = 1.0
    """Values above 1 are more random, below 1 less; 0 always takes the most likely character."""
    seed: int | None = None
    """Random seed; by default, the run's."""


@dataclass(frozen=True)
class Completion:
    """Print a shell completion script for `experiments`, short for `python -m experiments`.

    It completes commands, configs and their options. For bash, add to ~/.bashrc:
    `source <(python -m experiments completion bash)`. For zsh, save it as `_experiments` in a
    folder of $fpath and add to ~/.zshrc: `experiments() { python -m experiments "$@" }`.
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell."""


COMMANDS: Any = Run | Report | List | Sweep | Compare | Evaluate | Sample | Export | Completion


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments ask.

    Returns:
        0 if done, 1 if the run failed, 2 if it could not be asked for or another process has it, 75
        if it was told to stop and can go on from a checkpoint, 130 if it was interrupted with
        nothing to keep: the command then ends by the signal, which shells call 130.
    """
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    # Orbax tells at length what is told here in a line
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        _check_arguments(arguments)
        if len(arguments) > 1 and arguments[0] == "run" and not arguments[1].startswith("-"):
            return _run(find_config(Path(arguments[1])), arguments[2:])
        if arguments[:1] == ["sweep"]:
            return _sweep(
                *tyro.cli(
                    Sweep, args=arguments[1:], prog=f"{PROGRAM} sweep", return_unknown_args=True
                )
            )
        if len(arguments) > 1 and arguments[0] == "evaluate" and not arguments[1].startswith("-"):
            return _evaluate(Path(arguments[1]), arguments[2:])
        command = tyro.cli(
            COMMANDS,
            args=arguments,
            prog=PROGRAM,
            description="Sequence models with hand-derived gradients, trained from config files.",
        )
        if isinstance(command, Run):
            raise UsageError(f"run: the config comes first: {PROGRAM} run {command.path} ...")
        if isinstance(command, Evaluate):
            raise UsageError(f"evaluate: the run comes first: {PROGRAM} evaluate {command.folder}")
        if isinstance(command, Completion):
            return _completion(command.shell)
        if isinstance(command, Sample):
            return _sample(command)
        if isinstance(command, Report):
            return _report(command)
        if isinstance(command, Export):
            return _export(command)
        return _compare(command) if isinstance(command, Compare) else _list()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}; a lower --train.learning-rate may help", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"stopped: no memory left: {error}; a smaller model or batch may fit",
              file=sys.stderr)  # fmt: skip
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"stopped: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit:
        raise
    except BaseException as error:
        return _ended(error, arguments)


def _ended(error: BaseException, arguments: Sequence[str]) -> int:
    """The exit code of a run that ended so, told in a line; any other error is raised."""
    import jax

    from experiments.engine import processes
    from experiments.engine.runs import ResultError
    from experiments.engine.session import Stopped

    if isinstance(error, Stopped):
        one = arguments[0] == "run" and "--seeds" not in _options_in(arguments)
        again = "--resume" if one else "the same command"
        print(f"{error}; {again} goes on from there", file=sys.stderr)
        return 75
    if isinstance(error, ResultError):
        print(f"stopped: {error}; mended, --resume goes on from there", file=sys.stderr)
        return 1
    if isinstance(error, jax.errors.JaxRuntimeError) and not processes.alone():
        reason = str(error).splitlines()[0]
        print(f"stopped: another process may have died ({reason}); --resume goes on from the last "
              "checkpoint", file=sys.stderr)  # fmt: skip
        return 1
    raise error


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise a `UsageError` if what the shell handed on was not meant as an argument."""
    before = ""
    for number, argument in enumerate(arguments, start=1):
        which = f"argument {number}" + (f", of {before}" if before.startswith("--") else "")
        if len(argument) > LONGEST:
            raise UsageError(f"{which}: has {len(argument):,} characters: {argument}")
        # Python has surrogates where bytes are no text
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in argument):
            raise UsageError(f"{which}: has characters that are not printed: {argument}")
        before = argument


def _check_kernels() -> None:
    """Raise a `UsageError` if the environment asks for native kernels that there are not."""
    from rnnattn import native

    try:
        native.status()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _options_with(config: Any) -> Any:
    """A dataclass of the `Options`, with those of the config's fields beside them as `config`."""
    kind: Any = type(config)
    return dataclasses.make_dataclass(
        "Options",
        # without a name, the group gives its members no prefix
        [("config", Annotated[kind, tyro.conf.arg(name="")], field(default=config))],
        bases=(Options,),
        frozen=True,
    )


def _options(path: Path, experiment: str, config: Any, arguments: Sequence[str]) -> Any:
    """The options given, as an instance of `_options_with(config)`."""
    return tyro.cli(
        _options_with(config),
        args=arguments,
        prog=f"{PROGRAM} run {path}",
        description=f"{claim(path)}\n\nExperiment {experiment}, with defaults from {path}.",
    )


class Study(NamedTuple):
    """A run as it was asked for, checked."""

    path: Path
    arguments: Sequence[str]
    experiment: Experiment
    config: Any
    options: Any


def _prepare(path: Path, arguments: Sequence[str]) -> Study:
    from experiments.engine import processes, runs, sinks, weights

    experiment, config = read(path)
    options = _options(path, experiment.name, config, arguments)
    if options.quick:
        small = experiment.quick(options.config)
        options = _options(path, experiment.name, small, arguments)
    table = to_table(experiment.name, options.config)
    fields = {key: value for key, value in table.items() if key != "experiment"}
    config = check(type(config), fields, f"{path}, with the options given")
    for option in ("overwrite", "resume"):
        if getattr(options, option) and options.name is None:
            raise UsageError(f"--{option}: needs the --name of the run")
    several = options.cluster or options.processes is not None
    if several and options.name is None:
        raise UsageError("--processes, --cluster: need the --name of the run, the same for all")
    if (several or options.profile) and not hasattr(config, runs.WHERE):
        raise UsageError(
            "--profile, --processes, --cluster: are for what trains, which "
            f"{experiment.name} does not"
        )
    if options.overwrite and options.resume:
        raise UsageError("--resume: goes on with a run that --overwrite would remove; give one")
    if options.wandb is not None:
        sinks.wandb_init()
    if options.tensorboard:
        sinks.event_writer()
    _check_kernels()
    processes.join(options.coordinator, options.processes, options.process, cluster=options.cluster)
    processes.check_devices()
    processes.check_same(dataclasses.replace(options, process=None))
    runs.check(experiment, config)
    if not options.resume:  # a run that goes on has weights of its own
        weights.start(experiment, config)
    return Study(path, arguments, experiment, config, options)


def _run(path: Path, arguments: Sequence[str]) -> int:
    if "--seeds" in (options := _options_in(arguments)) and not {"-h", "--help"} & set(options):
        return _sweep(*_over_seeds(path, arguments))
    from experiments.engine import processes, runs

    study = _prepare(path, arguments)
    folder, result = _execute(study, runs.group_of(path))
    if not processes.is_first():
        return 0
    if result is None:
        print(f"{folder}: finished")
        return 0
    for name, text in runs.texts(result).items():
        print(f"---- {name}\n{_printable(text)}\n----")
    _print_scores(result.scores)
    for each in study.experiment.claims(study.config, result):
        print(f"{each.id:4} {each.verdict}: {study.experiment.CLAIMS[each.id]}")
    print(folder)
    return 0


def _printable(text: str) -> str:
    """With all but the ends of lines escaped that would move a terminal's cursor."""
    return re.sub(r"[^\r\n]+|\r(?!\n)", lambda part: escaped(part[0]), text)


def _print_scores(scores: Mapping[str, Any]) -> None:
    width = max(map(len, scores), default=0)
    for name, value in scores.items():
        print(f"{name:{width}} {value if isinstance(value, str) else format(value, '.6g')}")


def _execute(study: Study, group: str) -> tuple[Path, Any]:
    """The folder of the run, and what came of it; None if it was finished before."""
    import jax

    from experiments.engine import processes, runs
    from experiments.engine.files import locked
    from experiments.engine.session import Stopped

    path, arguments, experiment, config, options = study
    table = to_table(experiment.name, config)
    folder: Path = options.output / group / (options.name or "")
    is_new = not (options.resume and os.path.lexists(folder))
    # before anything is removed, which may be where they are
    start = _start(study, folder)

    def begin(held: ExitStack) -> bool:
        nonlocal folder
        if options.resume:
            folder = runs.reopen(options.output, group, options.name, table)
            if runs.finished(folder):
                return False
        else:
            folder = runs.create(options.output, group, options.name, overwrite=options.overwrite)
        held.enter_context(locked(folder))
        command = shlex.join([*PROGRAM.split(), "run", str(path), *arguments])
        runs.write_config(folder, table, command)
        return True

    with ExitStack() as held:
        if not processes.of_first(lambda: begin(held)):
            return folder, None
        asked = {name: getattr(options, name) for name in ("profile", "tensorboard", "wandb")}
        try:
            if start is not None and processes.is_first():
                for change in start.changes:
                    print(f"{config.train.init}: {change}", file=sys.stderr)
            return folder, runs.record(experiment, config, folder, start=start, **asked)
        except UsageError:
            if is_new and processes.is_first():
                runs.take_back(folder)
            raise
        except Stopped as stopped:  # --resume wants the name, which may be the date and time
            raise Stopped(f"{folder}: {stopped}") from None
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            if "RESOURCE_EXHAUSTED" not in reason:
                raise
            raise MemoryError(reason) from None


def _start(study: Study, folder: Path) -> Any:
    """The weights from outside that a training begins with, if any.

    A run that goes on from a checkpoint of its own can do without them, and does if they are not
    those that it began with.
    """
    from experiments.engine import processes, runs, weights

    goes_on = study.options.resume and runs.trains(folder)
    kept = runs.kept_init(folder) if goes_on else None
    try:
        start = weights.start(study.experiment, study.config)
    except UsageError:
        if kept is None:
            raise
        start = None
    if kept is None or runs.finished(folder) or (start is not None and start.sha256 == kept):
        return start
    if processes.is_first():
        init = study.config.train.init
        print(f"{init}: no longer has what the run began with; it goes on from its checkpoint",
              file=sys.stderr)  # fmt: skip
    return None


def _report(command: Report) -> int:
    if command.readme and not command.full:
        raise UsageError("--readme: what README.md says is of --full; give both")
    from experiments.engine import processes
    from experiments.engine.files import locked
    from experiments.report import documents, page

    browser = page.browser() if command.pdf else ""
    _check_kernels()
    processes.check_devices()
    folder = command.output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    # a second report would draw the same figures, and each take the other's half-written files
    with locked(folder):
        findings = page.measure(page.sizes(full=command.full), command.output)
        page.write(findings, folder, full=command.full)
        if command.readme:
            documents.update(ROOT, findings.rows)
        if browser:
            page.print_pdf(folder, browser)
    for row in findings.rows:
        print(f"{row.id:4} {row.verdict}: {row.title}")
    for error in findings.errors:
        print(error)
    print(folder / page.PAGE)
    return int(bool(findings.errors))


def _options_in(arguments: Sequence[str]) -> list[str]:
    return [each.partition("=")[0] for each in arguments if each.startswith("-")]


def _over_seeds(path: Path, arguments: Sequence[str]) -> tuple[Sweep, list[str]]:
    """The sweep that `run … --seeds` asks for, and the options of its runs."""
    asked, options = tyro.cli(
        Seeds, args=arguments, prog=f"{PROGRAM} run {path}", return_unknown_args=True
    )
    if not 1 <= asked.seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds: should be from 1 to {MOST_SEEDS}, got {asked.seeds}")
    _check_for_several(options)
    first = asked.seed
    if first is None:
        first = _prepare(path, options).config.seed
    seeds = ",".join(str(first + n) for n in range(asked.seeds))
    return Sweep(path, (f"seed={seeds}",), asked.name, asked.output), options


def _check_for_several(options: Sequence[str]) -> None:
    """Raise a `UsageError` if an option can be one of a single run only."""
    of_one = ("overwrite", "resume", "coordinator", "processes", "process", "cluster", "seeds")
    for option in set(_options_in(options)) & {f"--{name}" for name in of_one}:
        raise UsageError(f"{option}: is for one run; several go on by themselves, each by itself")


def _sweep(command: Sweep, options: Sequence[str]) -> int:
    from experiments.engine import compare, runs

    path, grid = find_config(command.path), compare.parse_grid(command.grid)
    _check_sweep(command, grid, options)
    group = f"{runs.group_of(path)}-{command.name}"
    combinations = compare.combinations(grid)
    each = dict(zip(compare.names_of(combinations), combinations, strict=True))
    places = compare.parse_part(command.part or "1/1", len(each))
    place_of = {list(each)[place]: place for place in places}
    prepared = _prepare_all(path, options, {name: each[name] for name in place_of})
    try:
        (command.output / group).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot write {error.filename}: {error.strerror}") from None
    failed: dict[str, str] = {}
    if command.jobs > 1:
        left = {
            name: f"{place + 1}/{len(each)}"
            for name, place in place_of.items()
            if not runs.finished(command.output / group / name)
        }
        failed = _run_in_processes(command, options, left)
    found, failed = _run_in_turn(command, group, prepared, failed)
    failures = "".join(f"\n{name}: failed: {error}\n" for name, error in failed.items())
    if command.part:
        print(f"part {command.part}: {len(found)} of {len(prepared)} runs are finished\n{failures}")
    else:
        labels = next(iter(prepared.values())).experiment.LABELS
        _show_sweep(command.output / group, compare.repetitions(found, each), labels, failures)
    return int(bool(failed))


def _check_sweep(command: Sweep, grid: Mapping[str, Any], options: Sequence[str]) -> None:
    """Raise a `UsageError` if the grid and the options do not go together, or one is off."""
    from experiments.engine import runs

    for key in grid.keys() & {option.name for option in dataclasses.fields(Options)}:
        raise UsageError(f"--grid: {key} is an option of the command, and no key of the config")
    for key in grid.keys() & {name[2:].replace("-", "_") for name in _options_in(options)}:
        raise UsageError(f"--grid: {key} is given as an option, too")
    _check_for_several(options)
    runs.check_name(command.name)
    if not 1 <= command.jobs <= MOST_JOBS:
        raise UsageError(f"--jobs: should be from 1 to {MOST_JOBS}, got {command.jobs}")


def _prepare_all(
    path: Path, options: Sequence[str], combinations: Mapping[str, Mapping[str, str]]
) -> dict[str, Study]:
    """The runs of a sweep by name: what is wrong with any is said before the first begins."""
    from experiments.engine import compare, runs

    prepared = {
        name: _prepare(path, [*options, *compare.options_of(combination)])
        for name, combination in combinations.items()
    }
    runs_of: dict[str, str] = {}
    for name, study in prepared.items():
        same = runs_of.setdefault(runs.hash_of(study.config), name)
        if same != name:
            raise UsageError(f"--grid: {same} and {name} would be one run; give each value once")
    return prepared


def _run_in_processes(
    command: Sweep, options: Sequence[str], parts: Mapping[str, str]
) -> dict[str, str]:
    """Run those of the sweep's runs that are `parts` of it, each by itself; those that failed."""
    from experiments.engine import jobs

    alike = [sys.executable, "-m", "experiments", "sweep", str(command.path), *options]
    alike += ["--grid", *command.grid, "--output", str(command.output)]
    alike += ["--name", command.name, "--part"]
    return jobs.run_all({name: [*alike, part] for name, part in parts.items()}, command.jobs)


def _run_in_turn(
    command: Sweep, group: str, prepared: Mapping[str, Study], failed: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Finish, or begin, all but those that failed before: the runs by name, and all that failed."""
    from experiments.engine import compare

    found, failed = {}, dict(failed)
    for name, study in prepared.items():
        if name in failed:
            continue
        own = dataclasses.replace(study.options, name=name, output=command.output, resume=True)
        if len(prepared) > 1:
            # above what it says of itself
            print(f"{name}:", file=sys.stderr)
        try:
            done, _ = _execute(study._replace(options=own), group)
            found[name] = compare.read_run(done)
        except Exception as error:
            failed[name] = _told(error)
            print(f"{name}: {failed[name]}", file=sys.stderr)
    return found, failed


def _show_sweep(
    folder: Path, rows: Mapping[str, Any], labels: Mapping[str, str], failures: str
) -> None:
    """Print the table of the rows, and write it and the figures into the folder."""
    from experiments.engine import compare, runs
    from experiments.engine.files import written
    from experiments.figures import save

    table = compare.score_table(rows, labels) + failures
    # first, as the folder may be one that nothing can be written in
    print(table)
    with written(folder / "sweep.md") as file:
        file.write(table.encode())
    save(compare.sweep_figure(rows, labels), folder / "sweep.png")
    if rows and labels:
        save(compare.curves(rows, labels), folder / runs.CURVES)
    print(folder)


def _told(error: Exception) -> str:
    """What ended a run, in a line; of what is nobody's to expect, with where it comes from."""
    import jax

    from experiments.engine.runs import ResultError

    text = next(iter(str(error).splitlines()), "")
    kind = type(error).__name__
    expected = (UsageError, ResultError, FloatingPointError, MemoryError, OSError)
    if isinstance(error, (*expected, jax.errors.JaxRuntimeError)):
        return text or kind
    traceback.print_exception(error)
    return ": ".join(filter(None, (kind, text)))


def _compare(command: Compare) -> int:
    from experiments.engine import compare
    from experiments.figures import save

    if not command.folders:
        raise UsageError("compare: give the folder of a run or more")
    found = [compare.read_run(folder) for folder in command.folders]
    experiments = sorted({run.experiment.name for run in found})
    if len(experiments) != 1:
        raise UsageError(f"compare: runs of one experiment only, got {', '.join(experiments)}")
    labels = found[0].experiment.LABELS
    if not labels:
        raise UsageError(f"compare: {experiments[0]} logs no metrics to compare")
    # the names of folders may be the same where the folders above differ
    names = [run.name for run in found]
    if len(set(names)) < len(names):
        found = [
            run._replace(name=str(folder))
            for run, folder in zip(found, command.folders, strict=True)
        ]
    command.output.parent.mkdir(parents=True, exist_ok=True)
    rows = {run.name: [run] for run in found} if command.each else compare.by_config(found)
    save(compare.curves(rows, labels), command.output)
    print(compare.score_table(rows, labels))
    if settings := compare.differences(rows):
        print("The settings that differ:", *settings, sep="\n  ", end="\n\n")
    print(command.output)
    return 0


def _export(command: Export) -> int:
    from experiments.engine import runs
    from experiments.engine.checkpoints import read_params
    from rnnattn.interop import write_safetensors

    if not (command.folder / runs.CONFIG).is_file():
        raise UsageError(
            f"{command.folder}: is not the folder of a run, such as outputs/CONFIG/NAME"
        )
    if command.output.is_dir():
        raise UsageError(f"--output: {command.output} is a folder")
    checkpoints = command.folder / runs.CHECKPOINTS / command.training
    params = read_params(checkpoints, best=command.best, ema=command.ema)
    command.output.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(command.output, params)
    print(command.output)
    return 0


def _evaluate(folder: Path, arguments: Sequence[str]) -> int:
    from experiments.engine.finished import keep_evaluation, open_run

    run = open_run(folder)
    data: Any = getattr(run.config, "data", None)
    kind: Any = type(data)
    group = [("data", kind, field(default=data))] if dataclasses.is_dataclass(data) else []
    options: Any = tyro.cli(
        dataclasses.make_dataclass("Options", group, bases=(Weights,), frozen=True),
        args=arguments,
        prog=f"{PROGRAM} evaluate {folder}",
        description=Evaluate.__doc__,
    )
    if group:
        data = check(kind, dataclasses.asdict(options.data), f"{folder}, with the options given")
    _check_kernels()
    scores = dataclasses.replace(run, best=options.best, ema=options.ema).evaluate(data)
    of = {"data": dataclasses.asdict(data)} if group else {}
    # first, as they took time to compute and may not be kept
    _print_scores(scores)
    evaluation = {**of, "checkpoint": "best" if options.best else "newest", **scores}
    try:
        keep_evaluation(folder, evaluation)
    except OSError as error:
        print(f"{error.filename}: the scores could not be kept: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _sample(command: Sample) -> int:
    from experiments.engine.finished import open_run

    if not 1 <= command.length <= LONGEST_SAMPLE:
        raise UsageError(f"--length: should be from 1 to {LONGEST_SAMPLE:,}, got {command.length}")
    if not 0 <= command.temperature < float("inf"):
        raise UsageError(f"--temperature: should be 0 or a number above, got {command.temperature}")
    if command.seed is not None and not 0 <= command.seed < 2**32:
        raise UsageError(f"--seed: should be from 0 to {2**32 - 1}, got {command.seed}")
    run = open_run(command.folder, best=command.best, ema=command.ema)
    _check_kernels()
    written = run.sample(
        command.prompt, length=command.length, temperature=command.temperature, seed=command.seed
    )
    print(_printable((command.prompt or "") + written))
    return 0


def _completion(shell: str) -> int:
    """Print tyro's script for commands among which `run` has one for each config."""
    configs = {name: read(path)[1] for name, path in config_paths().items()}
    # the name of a config takes the place of the path that it stands for
    fields = [
        ("path", tyro.conf.Suppress[Path], field(default=Path())),
        ("grid", Sweep.__annotations__["grid"], field(default=())),
    ]
    sweep = dataclasses.make_dataclass("Sweep", fields, bases=(Sweep,), frozen=True)
    kinds: dict[Any, Any] = {
        Run: _of_one("run", {name: _options_with(config) for name, config in configs.items()}),
        Sweep: _of_one("sweep", dict.fromkeys(configs, sweep)),
    }
    commands = reduce(or_, [kinds.get(each, each) for each in typing.get_args(COMMANDS)])
    with suppress(SystemExit):
        tyro.cli(commands, args=["--tyro-print-completion", shell], prog="experiments")
    if shell == "bash":
        # names of files, where tyro has nothing to say
        print(
            "_experiments() { _tyro_experiments; [[ ${COMPREPLY[*]} ]] || COMPREPLY=(); }\n"
            "complete -o default -F _experiments experiments\n"
            'experiments() { python -m experiments "$@"; }'
        )
    return 0


def _of_one(name: str, kinds: Mapping[str, Any]) -> Any:
    """The command of that name as one that has others within it, by their names."""
    inside = [
        Annotated[kind, tyro.conf.subcommand(each, prefix_name=False)]
        for each, kind in kinds.items()
    ]
    one = Annotated[reduce(or_, inside), tyro.conf.arg(name="")]  # type: ignore[valid-type]
    return Annotated[dataclasses.make_dataclass("Of", [("one", one)]), tyro.conf.subcommand(name)]


def _list() -> int:
    paths = config_paths()
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        print(f"{name:{width}}  {claim(path)}")
    return 0


def _tell_unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Keep silent of files that are read or written for an event loop of Orbax' that has failed."""
    if str(lost.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(lost)


if __name__ == "__main__":
    sys.unraisablehook = _tell_unraisable
    # Python has none where they were closed
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr)
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a question mark for what a terminal's encoding does not have
        sys.stdout.reconfigure(errors="replace")
    if sys.argv[1:] == ["list"]:
        # which needs no JAX: that takes most of a second to import
        sys.exit(main(["list"]))
    from experiments.engine.processes import leaving

    with leaving():
        sys.exit(main(sys.argv[1:]))
