"""What training costs: operations and memory as XLA counts them, and a table for comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from experiments.engine.training import Loss, start, train_step


class Cost(NamedTuple):
    """Of one step of training."""

    flops: float
    """Operations on floating-point numbers. XLA counts the body of a loop once."""
    peak_bytes: float
    """Memory: the parameters, the optimiser's moments, the batch, and what is kept between."""


class Row(NamedTuple):
    """A line of the table: one way to train, over some seeds."""

    name: str
    accuracy: Sequence[float]
    """On the test images, one for each seed."""
    parameters: int
    seconds: float
    """Of training, without compilation."""
    flops: float
    """Of training in all."""
    peak_bytes: float


def step_cost(
    loss: Loss, params: PyTree, optimizer: optax.GradientTransformation, batch: Any,
    key: PRNGKeyArray, *, accumulate: int = 1,
) -> Cost:  # fmt: skip
    """What XLA says of the compiled step; NaN where a backend says nothing.

    It counts one of the `accumulate` parts of a batch, which are all alike: the operations are as
    many times that, with those of the optimiser, which are few.
    """
    state = start(params, optimizer)
    lowered = train_step.lower(
        loss, optimizer, state, batch, key, skip=False, mesh=None, accumulate=accumulate
    )
    compiled = lowered.compile()
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    counted = counted[0] if isinstance(counted, list) else counted or {}
    used = np.nan
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes
        used += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return Cost(accumulate * float(counted.get("flops", np.nan)), float(used))


def count(params: PyTree) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and with several values ± their standard deviation."""
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, which is also easy to read as it stands."""
    head = ("method", "test accuracy", "parameters", "training", "operations", "peak memory")
    cells = [
        (
            row.name,
            mean_and_spread(row.accuracy),
            f"{row.parameters:,}",
            f"{row.seconds:.1f} s",
            f"{row.flops / 1e12:.3f} TFLOP",
            f"{row.peak_bytes / 1e6:.1f} MB",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *cells]
    aligned = (
        [cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned) + "\n"


def cost_scores(params: PyTree, cost: Cost, steps: int) -> dict[str, float]:
    """What training for so many steps costs, as scores of a run."""
    counts = {"step_flops": cost.flops, "train_flops": cost.flops * steps}
    counts |= {"peak_bytes": cost.peak_bytes}
    known = {name: value for name, value in counts.items() if np.isfinite(value)}
    return {"parameters": count(params)} | known


def score_table(name: str, scores: Mapping[str, float]) -> str:
    """The table of a single run, from its scores."""
    read = lambda key: scores.get(key, np.nan)
    row = Row(
        name,
        [scores["test_accuracy"]],
        int(scores["parameters"]),
        scores["train_seconds"],
        read("train_flops"),
        read("peak_bytes"),
    )
    return table([row])
