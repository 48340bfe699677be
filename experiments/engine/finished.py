"""A finished run, opened: for a notebook, and for what is asked of it afterwards."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from experiments.engine import runs
from experiments.engine.checkpoints import read_params
from experiments.engine.compare import read_run
from experiments.engine.config import UsageError
from experiments.engine.experiment import Experiment
from experiments.engine.files import naming
from experiments.engine.model import Model
from experiments.engine.weights import fitted, flattened

EVALUATIONS = "evaluations.jsonl"
"""Scores that a run was given later, a line for each evaluation."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left in its folder. What takes time to read is read when it is asked for."""

    folder: Path
    experiment: Experiment
    config: Any
    metrics: list[dict[str, Any]]
    """The records, in order: `step`, `split`, and values by name."""
    scores: dict[str, Any]
    """The summary."""
    best: bool = False
    """Whether the parameters are those of the best checkpoint, and not of the newest."""
    ema: bool = False
    """Whether they are the exponential mean that `train.ema` kept, and not those of a step."""

    @cached_property
    def result(self) -> Any:
        """The experiment's `Result`.

        Raises:
            UsageError: if it cannot be read.
        """
        return runs.read_result(self.folder, self.experiment.Result)

    @cached_property
    def params(self) -> PyTree:
        """The trained parameters, as the experiment's `model` takes them; in dictionaries where an
        experiment has none.

        Raises:
            UsageError: if there are none that can be read, or if they are not those of the config.
        """
        with jax.enable_x64(True):
            folder = self.folder / runs.CHECKPOINTS
            params = read_params(folder, best=self.best, ema=self.ema)
        if self.experiment.model is None:
            return params
        with jax.enable_x64(self.functions.x64):
            like = jax.eval_shape(self.functions.init)
            return fitted(flattened(params), like, self.folder / runs.CHECKPOINTS)

    @cached_property
    def functions(self) -> Model:
        """What the experiment trains, as functions of the parameters.

        Raises:
            UsageError: if the experiment's file does not say.
        """
        return self._functions_with(self.config)

    @cached_property
    def model(self) -> Callable[..., Any]:
        """The trained model: a function of what it reads.

        Raises:
            UsageError: as for `params` and `functions`.
        """
        functions, params = self.functions, self.params

        def apply(*inputs: Any) -> Any:
            with jax.enable_x64(functions.x64):
                return functions.apply(params, *inputs)

        return apply

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """The scores on the test data, by the names that the summary has.

        On the run's own data, on the same device, they are those of the summary to the bit.

        Args:
            data: in place of the `data` of the config.

        Raises:
            UsageError: if the data cannot be read or will not do, or if a score is not finite.
        """
        config = self.config if data is None else replace(self.config, data=data)
        # of memory, too, as what is enough to train is to evaluate
        self.experiment.check(config)
        functions = self._functions_with(config)
        with jax.enable_x64(functions.x64):
            metrics = jax.jit(functions.test())(self.params)
            split = "test_ema" if self.ema else "test"
            scores = {f"{split}_{name}": float(value) for name, value in metrics.items()}
        for name, value in scores.items():
            if not np.isfinite(value):
                raise UsageError(f"{self.folder}: on these data {name} is {value}")
        return scores

    def sample(
        self,
        prompt: str | None = None,
        *,
        length: int = 500,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Text that the model goes on with after the prompt; the same for the same arguments.

        Args:
            temperature: above 1 more random, below 1 less; at 0 the likeliest of characters.
            seed: the run's, if it is left out.

        Raises:
            UsageError: if the experiment is none that writes, or if it does not know a character.
        """
        functions = self.functions
        if functions.sample is None:
            raise UsageError(f"{self.folder}: {self.experiment.name} writes no text")
        with jax.enable_x64(functions.x64):
            seed = self.config.seed if seed is None else seed
            return functions.sample(self.params, prompt, length, temperature, seed)

    def _functions_with(self, config: Any) -> Model:
        if self.experiment.model is None:
            raise UsageError(
                f"{self.folder}: {self.experiment.name} does not say what it trains, by a `model` "
                "in its file"
            )
        return self.experiment.model(config, self.result)


def open_run(folder: Path, *, best: bool = False, ema: bool = False) -> FinishedRun:
    """The run in the folder.

    Raises:
        UsageError: if there is none, if it is not finished, or if a file of it is damaged.
    """
    run = read_run(folder)
    summary = runs.read_summary(folder)
    return FinishedRun(folder, run.experiment, run.config, run.records, summary, best, ema)


def keep_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add a line to the evaluations of the run."""
    path = folder / EVALUATIONS
    with naming(path), path.open("ab") as lines:
        lines.write(f"{json.dumps(evaluation, allow_nan=False)}\n".encode())
