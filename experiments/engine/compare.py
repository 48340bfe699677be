"""Several runs side by side: a table of their last scores, and their curves over one another."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.engine import runs
from experiments.engine.config import UsageError
from experiments.engine.cost import mean_and_spread
from experiments.engine.experiment import Experiment, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = "seed"
"""Runs that differ in this alone are repetitions of one another."""


class Run(NamedTuple):
    """A finished run, as it lies in its folder."""

    name: str
    experiment: Experiment
    records: list[dict[str, Any]]
    scores: dict[str, float]


def read_run(folder: Path) -> Run:
    """The run in the folder.

    Raises:
        UsageError: if there is none, if it is not finished, or if a file of it is damaged.
    """
    if not (folder / runs.CONFIG).is_file():
        raise UsageError(f"{folder}: is not the folder of a run")
    if not runs.finished(folder):
        raise UsageError(f"{folder}: is not finished; `run … --resume` goes on with it")
    experiment, _ = read(folder / runs.CONFIG)
    summary = runs.read_summary(folder)
    scores = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    return Run(folder.name, experiment, runs.read_metrics(folder), scores)


def shown_scores(found: Sequence[Run], labels: Mapping[str, str]) -> list[str]:
    """The scores worth a column: the last metrics of each split that have a label, and the time."""
    names = [f"{split}_{metric}" for split in ("test", "validation", "train") for metric in labels]
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


def curves(found: Sequence[Run], labels: Mapping[str, str]) -> "Figure":
    """The metrics of all runs by step; solid what is of training, dashed what is of validation."""
    from experiments.figures import overlaid_curves

    return overlaid_curves({run.name: run.records for run in found}, labels)


# ---- sweeps ---------------------------------------------------------------------------------


def parse_grid(grid: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key, from texts such as `train.learning_rate=1e-3,3e-3`.

    Raises:
        UsageError: if one is no such text.
    """
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
    """One value of each key, in every way there is."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def name_of(combination: Mapping[str, str]) -> str:
    """A name for a folder that tells the run from the others of its sweep."""
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in combination.items()]
    return re.sub(r"[^A-Za-z0-9._-]", "_", "_".join(parts))


def options_of(combination: Mapping[str, str]) -> list[str]:
    """The combination as options of `run`."""
    pairs = (
        (f"--{key.replace('_', '-')}", *value.split(" ")) for key, value in combination.items()
    )
    return list(itertools.chain.from_iterable(pairs))


def repetitions(found: Mapping[str, Run], grid: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The runs of a sweep by what they differ in, seeds apart."""
    rows: dict[str, list[Run]] = {}
    for name, run in found.items():
        rest = {key: value for key, value in grid[name].items() if key != SEED}
        rows.setdefault(name_of(rest) or run.experiment.name, []).append(run)
    return rows


def sweep_figure(rows: Mapping[str, Sequence[Run]], labels: Mapping[str, str]) -> "Figure":
    """The test scores that have a label, a line for each row, a dot for each run."""
    from experiments.figures import scores_by_row

    columns = [
        name
        for name in shown_scores([run for row in rows.values() for run in row], labels)
        if name.startswith("test_")
    ]
    scores = {
        labels[name.removeprefix("test_")]: {
            row: np.array([run.scores[name] for run in several if name in run.scores])
            for row, several in rows.items()
        }
        for name in columns
    }
    return scores_by_row(scores)
