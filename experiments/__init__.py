"""Experiments that run from config files; `python -m experiments --help` is the command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from experiments.engine.finished import FinishedRun


def open(
    folder: "str | os.PathLike[str]", *, best: bool = False, ema: bool = False
) -> "FinishedRun":
    """A finished run, for a notebook: `config`, `metrics`, `result`, `scores`, `params`, `model`.

    Args:
        folder: of the run, as `outputs/lstm_digits/2026-01-31_12-00-00`.
        best: the parameters of the best checkpoint, which `train.best` had kept, not the newest.
        ema: the exponential mean of the parameters, which `train.ema` had kept, not the last.

    Raises:
        UsageError: in a sentence, if there is no run, if it is not finished, or if it is damaged.
    """
    # JAX takes most of a second to import, which `python -m experiments list` does without
    from pathlib import Path

    from experiments.engine.finished import open_run

    return open_run(Path(folder), best=best, ema=ema)
