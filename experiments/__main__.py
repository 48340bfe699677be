"""The command line: `python -m experiments run CONFIG`, `… report` and `… list`."""

import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import (
    attention_averaging,
    attention_copying,
    dot_product_variance,
    key_noise,
    lstm_adding,
    lstm_digits,
    lstm_equations,
    lstm_gradient,
    lstm_gradient_training,
    lstm_text,
    multi_head_noise,
    report,
    rotary_relative,
    runs,
    sinusoidal_shift,
    softmax_saturation,
    subspace_projection,
    vit_digits,
    vit_resolution,
)
from experiments.config import UsageError, check, claim, read, to_table
from experiments.session import Stopped

EXPERIMENTS: dict[str, Any] = {
    "attention_averaging": attention_averaging,
    "attention_copying": attention_copying,
    "dot_product_variance": dot_product_variance,
    "key_noise": key_noise,
    "lstm_adding": lstm_adding,
    "lstm_digits": lstm_digits,
    "lstm_equations": lstm_equations,
    "lstm_gradient": lstm_gradient,
    "lstm_gradient_training": lstm_gradient_training,
    "lstm_text": lstm_text,
    "multi_head_noise": multi_head_noise,
    "rotary_relative": rotary_relative,
    "sinusoidal_shift": sinusoidal_shift,
    "softmax_saturation": softmax_saturation,
    "subspace_projection": subspace_projection,
    "vit_digits": vit_digits,
    "vit_resolution": vit_resolution,
}
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PROGRAM = "python -m experiments"


@dataclass(frozen=True)
class List:
    """Name every config, with its claim."""


@dataclass(frozen=True)
class Options:
    """What can be said of any run."""

    name: str | None = None
    """Name of the run; without one, the run is named by the time."""
    output: Path = Path("outputs")
    """Folder that runs are kept in, as OUTPUT/CONFIG/NAME."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A size of seconds: the experiment's own defaults in place of the file's values."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the run of that name."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run of that name from its last checkpoint; from the start if it has none."""


@dataclass(frozen=True, kw_only=True)
class Run(Options):
    """Run the experiment of a config file, and keep what comes of it in a folder of its own.

    Every field of the config is an option too: `run CONFIG --help` lists them with their values.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A TOML file, as configs/lstm_digits.toml; it comes first."""


@dataclass(frozen=True)
class Report:
    """Put every claim of the notes to the test, and write what comes of it as one page.

    Results that are there and unchanged, in config and code, are used again.
    """

    full: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the sizes of configs/, some of which take minutes; without it, sizes of seconds."""
    readme: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also bring the table of claims in README.md up to date."""
    output: Path = Path("outputs")
    """Folder that runs are kept in; the page goes to OUTPUT/report."""


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments ask.

    Returns:
        0 if done, 1 if the run failed, 2 if it could not be asked for, 75 if it was told to stop
        and `--resume` goes on with it, 130 if it was interrupted with nothing to keep.
    """
    # Orbax warns at length of what is told here in a line
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if len(arguments) > 1 and arguments[0] == "run" and not arguments[1].startswith("-"):
            return _run(Path(arguments[1]), arguments[2:])
        command = tyro.cli(
            Run | Report | List,
            args=arguments,
            prog=PROGRAM,
            description="Sequence models with hand-derived gradients, trained from config files.",
        )
        if isinstance(command, Run):
            raise UsageError(f"run: the config comes first: {PROGRAM} run {command.path} ...")
        return _report(command) if isinstance(command, Report) else _list()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}; a lower --train.learning-rate may help", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{stopped}; --resume goes on from there", file=sys.stderr)
        return 75
    except OSError as error:
        print(f"stopped: cannot write {error.filename or 'a file'}: {error.strerror or error}",
              file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _options(path: Path, experiment: str, config: Any, arguments: Sequence[str]) -> Any:
    """The `Options` given, with those of the config's fields beside them as `config`."""
    kind: Any = type(config)
    options = dataclasses.make_dataclass(
        "Options",
        # without a name, the group gives its members no prefix
        [("config", Annotated[kind, tyro.conf.arg(name="")], field(default=config))],
        bases=(Options,),
        frozen=True,
    )
    return tyro.cli(
        options,
        args=arguments,
        prog=f"{PROGRAM} run {path}",
        description=f"{claim(path)}\n\nExperiment {experiment}, with the values of {path}.",
    )


def _run(path: Path, arguments: Sequence[str]) -> int:
    experiment, config = read(path, {name: e.Config for name, e in EXPERIMENTS.items()})
    options = _options(path, experiment, config, arguments)
    if options.quick:
        options = _options(path, experiment, type(config)(), arguments)
    table = to_table(experiment, options.config)
    fields = {key: value for key, value in table.items() if key != "experiment"}
    config = check(type(config), fields, f"{path}, with the options given")
    for option in ("overwrite", "resume"):
        if getattr(options, option) and options.name is None:
            raise UsageError(f"--{option}: needs the --name of the run")
    if options.overwrite and options.resume:
        raise UsageError("--resume: goes on with a run that --overwrite would remove; give one")
    module = EXPERIMENTS[experiment]
    if hasattr(module, "check"):
        module.check(config)
    table = to_table(experiment, config)
    output, group, name = options.output, runs.group_of(path), options.name
    if options.resume:
        folder = runs.reopen(output, group, name, table)
        if runs.finished(folder):
            print(f"{folder}: finished")
            return 0
    else:
        folder = runs.create(output, group, name, overwrite=options.overwrite)
    command = shlex.join([*PROGRAM.split(), "run", str(path), *arguments])
    runs.write_config(folder, table, command)
    result = runs.record(module, config, folder)
    for name, text in runs.texts(result).items():
        print(f"---- {name}\n{text}\n----")
    for name, value in result.scores.items():
        print(f"{name:32} {value if isinstance(value, str) else format(value, '.6g')}")
    if hasattr(module, "claims"):
        for each in module.claims(config, runs.read_result(folder, module.Result)):
            print(f"{each.id:4} {each.verdict}: {each.title}")
    print(folder)
    return 0


def _report(command: Report) -> int:
    sizes = report.sizes(EXPERIMENTS, CONFIGS, full=command.full)
    findings = report.measure(EXPERIMENTS, sizes, command.output)
    folder = command.output / "report"
    report.write(findings, folder, full=command.full)
    if command.readme:
        report.update_readme(ROOT / "README.md", findings.rows)
    for row in findings.rows:
        print(f"{row.id:4} {row.verdict}: {row.title}")
    for error in findings.errors:
        print(error)
    print(folder / report.PAGE)
    return int(bool(findings.errors))


def _list() -> int:
    paths = sorted(CONFIGS.glob("*.toml"))
    names = [os.path.relpath(path) for path in paths]
    width = max(map(len, names), default=0)
    for name, path in zip(names, paths, strict=True):
        print(f"{name:{width}}  {claim(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
