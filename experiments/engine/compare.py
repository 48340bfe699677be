"""Several runs side by side: a table of their last scores, and their curves over one another."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.engine import runs
from experiments.engine.config import UsageError
from experiments.engine.cost import mean_and_spread
from experiments.engine.experiment import Experiment, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = ("test", "test_ema", "validation", "validation_ema", "train")

SEED = "seed"
"""Runs that differ in this alone are repetitions of one another."""

LONGEST_NAME = 150
"""Characters of a folder's name, with room for what is written beside it."""


class Run(NamedTuple):
    """A finished run, as it lies in its folder."""

    name: str
    experiment: Experiment
    config: Any
    records: list[dict[str, Any]]
    scores: dict[str, float]


def read_run(folder: Path) -> Run:
    """The run in the folder.

    Raises:
        UsageError: if there is none, if it is not finished, or if a file of it is damaged.
    """
    if not (folder / runs.CONFIG).is_file():
        raise UsageError(f"{folder}: is not the folder of a run, such as outputs/CONFIG/NAME")
    if not runs.finished(folder):
        raise UsageError(f"{folder}: is not finished; `run … --resume` goes on with it")
    experiment, config = read(folder / runs.CONFIG)
    summary = runs.read_summary(folder)
    scores = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    records = runs.read_metrics(folder, experiment.LABELS)
    return Run(folder.name, experiment, config, records, scores)


def shown_scores(found: Sequence[Run], labels: Mapping[str, str]) -> list[str]:
    """The scores worth a column: the last metrics of each split that have a label, and the time."""
    names = [f"{split}_{metric}" for split in SPLITS for metric in labels]
    names.append("train_seconds")
    return [name for name in names if any(name in run.scores for run in found)]


def score_table(rows: Mapping[str, Sequence[Run]], labels: Mapping[str, str]) -> str:
    """Scores in Markdown: a line for each row, mean ± spread where it is of several runs."""
    columns = shown_scores([run for row in rows.values() for run in row], labels)
    lines = [["run", "runs", *columns]]
    for name, row in rows.items():
        cells = []
        for column in columns:
            values = [run.scores[column] for run in row if column in run.scores]
            cells.append(mean_and_spread(values) if values else "–")
        lines.append([name, str(len(row)), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def differences(rows: Mapping[str, Sequence[Run]]) -> list[str]:
    """A line for each setting that is not the same in all rows, seeds and devices apart."""
    settings = {name: dict(_settings(asdict(row[0].config))) for name, row in rows.items()}
    names = dict.fromkeys(key for each in settings.values() for key in each)
    lines = []
    for key in names:
        values = {name: each.get(key) for name, each in settings.items()}
        if key != SEED and len({repr(value) for value in values.values()}) > 1:
            lines.append(f"{key}: " + ", ".join(f"{v} ({name})" for name, v in values.items()))
    return lines


def _settings(table: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{group}{key}.")
        elif group != f"{runs.WHERE}.":
            yield f"{group}{key}", value


def by_config(found: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs in rows: those whose configs differ in the seed alone are one."""
    alike: dict[str, list[Run]] = {}
    for run in found:
        alike.setdefault(runs.hash_of(replace(run.config, seed=0)), []).append(run)
    names = [[run.name for run in row] for row in alike.values()]
    beginnings = [_beginning(of_row) for of_row in names]
    labels = [
        of_row[0] if len(of_row) == 1 else f"{beginning}*" if beginning else ", ".join(of_row)
        for of_row, beginning in zip(names, beginnings, strict=True)
    ]
    if len(set(labels)) < len(labels):
        labels = [", ".join(of_row) for of_row in names]
    return dict(zip(labels, alike.values(), strict=True))


def _beginning(names: Sequence[str]) -> str:
    """What all of the names begin with."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in alike)


def curves(rows: Mapping[str, Sequence[Run]], labels: Mapping[str, str]) -> "Figure":
    """The metrics of all rows by step; solid what is of training, dashed what is of validation."""
    from experiments.figures import overlaid_curves

    return overlaid_curves(
        {name: [run.records for run in row] for name, row in rows.items()}, labels
    )


# ---- sweeps ---------------------------------------------------------------------------------


def parse_grid(grid: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key, from texts such as `train.learning_rate=1e-3,3e-3`.

    Raises:
        UsageError: if one is no such text, or if there is none.
    """
    if not grid:
        raise UsageError("--grid: give keys and their values, as seed=0,1,2")
    values: dict[str, list[str]] = {}
    for text in grid:
        key, equals, several = text.partition("=")
        key = key.replace("-", "_")
        if not (re.fullmatch(r"[a-z0-9_.]+", key) and equals and all(several.split(","))):
            raise UsageError(f"--grid: {text!r} should be a key and its values, as seed=0,1,2")
        if key in values:
            raise UsageError(f"--grid: {key} is given twice")
        values[key] = several.split(",")
    return values


def combinations(values: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """One value of each key, in every way there is.

    Raises:
        UsageError: if a value is given twice.
    """
    for key, several in values.items():
        if len(set(several)) < len(several):
            raise UsageError(f"--grid: {key} has a value twice, of which two runs would be one")
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def names_of(combinations: Sequence[Mapping[str, str]]) -> list[str]:
    """A folder's name for each combination, which are of the same keys: no two are the same.

    A name says the last part of each key, and the value. Where that is not all there is to say, as
    a character of the value is none for a folder or the name would be long, some digits of a hash
    follow. So a combination has the same name in whatever sweep it is, unless what it is made of
    can be read in two ways there.
    """
    keys = list(combinations[0])
    lasts = [key.rpartition(".")[2] for key in keys]
    shown = [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]
    plain = ["_".join(map("-".join, zip(shown, c.values(), strict=True))) for c in combinations]
    names = [re.sub(r"[^A-Za-z0-9._-]", "_", text)[:LONGEST_NAME] for text in plain]
    return [
        name
        if name == text and plain.count(text) == 1
        else f"{name}-{hashlib.sha256(json.dumps(combination).encode()).hexdigest()[:8]}"
        for name, text, combination in zip(names, plain, combinations, strict=True)
    ]


def parse_part(part: str, number: int) -> range:
    """Which of so many combinations are the K-th of N parts, from a text such as `2/8`.

    Every N-th is, so that the parts are about as much work whatever the first key is.

    Raises:
        UsageError: if it is no such text.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    which, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= which <= parts:
        raise UsageError(f"--part: should be K/N, with K from 1 to N, as 2/8, got {part}")
    return range(which - 1, number, parts)


def options_of(combination: Mapping[str, str]) -> list[str]:
    """The combination as options of `run`."""
    pairs = (
        (f"--{key.replace('_', '-')}", *value.split(" ")) for key, value in combination.items()
    )
    return list(itertools.chain.from_iterable(pairs))


def repetitions(found: Mapping[str, Run], grid: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The runs of a sweep by what they differ in, seeds apart."""
    rows: dict[tuple[str, ...], list[Run]] = {}
    rests = [{key: value for key, value in grid[name].items() if key != SEED} for name in found]
    for run, rest in zip(found.values(), rests, strict=True):
        rows.setdefault(tuple(rest.values()), []).append(run)
    distinct = list({tuple(rest.values()): rest for rest in rests}.values())
    names = names_of(distinct) if distinct else []
    return {
        name or row[0].experiment.name: row for name, row in zip(names, rows.values(), strict=True)
    }


def sweep_figure(rows: Mapping[str, Sequence[Run]], labels: Mapping[str, str]) -> "Figure":
    """The test scores that have a label, a line for each row, a dot for each run."""
    from experiments.figures import scores_by_row

    there = shown_scores([run for row in rows.values() for run in row], labels)
    columns = [f"test_{metric}" for metric in labels if f"test_{metric}" in there]
    scores = {
        labels[name.removeprefix("test_")]: {
            row: np.array([run.scores[name] for run in several if name in run.scores])
            for row, several in rows.items()
        }
        for name in columns
    }
    return scores_by_row(scores)
