"""Every recurrent unit on two tasks, with as many parameters each.

The adding problem, in which two marked values are to be remembered (Hochreiter & Schmidhuber 1997),
and the next character of a text.

Each is trained from several seeds, which are the same for all: the sequences of a seed are too.
What is random is what differs between seeds, so all of them are shown, beside the median.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray
from pydantic import Field

from experiments.data.adding import CONSTANT_MSE, DataConfig, abstract_sums, draw_sums
from experiments.data.text import Text, load_text, text_excerpts
from experiments.engine.config import Seed, Size
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training
from experiments.engine.session import SILENT, Session
from experiments.engine.training import Loss, TrainConfig, fit, make_optimizer
from experiments.models.units import (
    Unit,
    answers,
    init_unit,
    last_answer,
    size,
    width_like,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"loss": "mean squared error, or nats per character"}
"""What the metrics are, on an axis."""


@dataclass(frozen=True)
class TextConfig:
    """The text, and the length of the windows to train on."""

    path: str | None = None
    """A UTF-8 text file; by default, the documentation topics of Python's help()."""
    window: Size = 32
    """Characters in a window, which is read from a state of zeros."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Random seed of the initial weights, the sequences and the windows."""
    units: Annotated[tuple[Unit, ...], Field(min_length=1)] = ("lstm", "gru", "mingru")
    """The units to compare."""
    runs: Size = 1
    """Trainings of each unit on each task, from other weights on other sequences."""
    hidden_size: Size = 16
    """Hidden size of the LSTM; the others have the width at which they have as many parameters."""
    input_size: Size = 8
    """Width of what the units read."""
    data: DataConfig = field(default_factory=lambda: DataConfig(length=20, held_out=256))
    text: TextConfig = field(default_factory=TextConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=50, batch_size=16, learning_rate=1e-2, log_every=25, evaluate_every=50
        )
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    units=("lstm", "rglru"),
    runs=1,
    hidden_size=4,
    input_size=2,
    data=DataConfig(length=4, held_out=8),
    text=TextConfig(window=4),
    train=TrainConfig(steps=2, batch_size=4, log_every=1, evaluate_every=2),
)

TASKS = ("adding", "text")


class Result(NamedTuple):
    """By task and unit, in the order of TASKS and of the config's units."""

    widths: np.ndarray  # (task, unit)
    parameters: np.ndarray  # (task, unit)
    losses: np.ndarray  # (task, unit, run): on the test set
    microseconds: np.ndarray  # (task, unit): of a step of time in training, the median of the runs
    scores: dict[str, float]


class _Task(NamedTuple):
    """What a unit is trained on."""

    inputs: int
    answers: int
    steps: int  # of time, in a sequence
    loss: Callable[[Unit], Loss]
    batch: Callable[[PRNGKeyArray, int], Any]  # of a run's key and a step
    test: Callable[[PRNGKeyArray], Any]


def _adding(config: Config) -> _Task:
    def loss(unit: Unit) -> Loss:
        def mean_squared_error(params, batch, key):
            return jnp.mean((last_answer(unit, params, batch.x)[:, 0] - batch.sums) ** 2), {}

        return mean_squared_error

    def draw(key: PRNGKeyArray, rows: int) -> Any:
        return draw_sums(key, rows, config.data.length, "float32")

    return _Task(
        inputs=2,
        answers=1,
        steps=config.data.length,
        loss=loss,
        batch=lambda key, step: draw(jax.random.fold_in(key, step), config.train.batch_size),
        test=lambda key: draw(jax.random.fold_in(key, config.train.steps), config.data.held_out),
    )


def _text(config: Config) -> _Task:
    text, window = _load(config), config.text.window
    V = len(text.characters)

    def loss(unit: Unit) -> Loss:
        def nats(params, batch, key):
            read, after = batch
            logits = answers(unit, params, jax.nn.one_hot(read, V, dtype=jnp.float32))
            with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
                costs = optax.softmax_cross_entropy_with_integer_labels(logits, after)
            return jnp.mean(costs), {}

        return nats

    def batch(key: PRNGKeyArray, step: int) -> Any:
        seed = int(jax.random.key_data(key)[-1])
        excerpts = text_excerpts(text.train, seed, step, config.train.batch_size, window)
        return tuple(jnp.asarray(part, jnp.int32) for part in excerpts)

    def test(key: PRNGKeyArray) -> Any:
        rows = min(config.data.held_out, len(text.test) - window)
        excerpts = text_excerpts(text.test, 0, 0, rows, window)
        return tuple(jnp.asarray(part, jnp.int32) for part in excerpts)

    return _Task(V, V, window, loss, batch, test)


def _load(config: Config) -> Text:
    return load_text(config.text.path, rows=config.train.batch_size, window=20 * config.text.window)


def _tasks(config: Config) -> dict[str, _Task]:
    return {"adding": _adding(config), "text": _text(config)}


def _width(config: Config, task: _Task, unit: Unit) -> int:
    """At which the unit has as many parameters as the LSTM."""
    sizes = task.inputs, config.input_size
    like = jax.eval_shape(
        lambda key: init_unit(key, "lstm", *sizes, config.hidden_size, task.answers),
        jax.random.key(0),
    )
    if unit == "lstm":
        return config.hidden_size
    return width_like(unit, *sizes, task.answers, size(like))


def check(config: Config) -> None:
    """Raise a `UsageError` if the text will not do, or there is no memory to train."""
    for name, task in _tasks(config).items():
        for unit in config.units:
            init = lambda key, unit=unit, task=task: init_unit(
                key, unit, task.inputs, config.input_size, _width(config, task, unit), task.answers
            )
            params = jax.eval_shape(init, jax.random.key(0))
            batch, test = (
                _abstract(config, name, rows)
                for rows in (config.train.batch_size, config.data.held_out)
            )
            check_training(config.train, task.loss(unit), params, batch, data=test)


def _abstract(config: Config, task: str, rows: int) -> Any:
    """The shapes of a batch of so many rows."""
    if task == "adding":
        return abstract_sums(rows, config.data.length, "float32")
    return (jax.ShapeDtypeStruct((rows, config.text.window), jnp.int32),) * 2


def run(config: Config, session: Session = SILENT) -> Result:
    """Train each unit on each task, from several seeds."""
    quiet = replace(session, log=SILENT.log)  # records are logged with the unit's name
    rows: dict[str, list[Any]] = {"widths": [], "parameters": [], "losses": [], "times": []}
    for name, task in _tasks(config).items():
        for unit in config.units:
            width = _width(config, task, unit)
            losses, times = [], []
            for n, key in enumerate(jax.random.split(jax.random.key(config.seed), config.runs)):
                trained = _train(config, task, unit, width, key, quiet, f"{name}, {unit}, run {n}")
                for record in trained.records:
                    session.log(record | {"task": name, "unit": unit, "run": n})
                losses.append(float(trained.records[-1]["loss"]))
                times.append(1e6 * trained.train_seconds / (config.train.steps * task.steps))
            rows["widths"].append(width)
            rows["parameters"].append(size(trained.params))
            rows["losses"].append(losses)
            rows["times"].append(np.median(times))
    shape = (len(TASKS), len(config.units))
    by_unit = np.array(rows["losses"], np.float64).reshape(*shape, config.runs)
    return Result(
        widths=np.array(rows["widths"]).reshape(shape),
        parameters=np.array(rows["parameters"]).reshape(shape),
        losses=by_unit,
        microseconds=np.array(rows["times"], np.float64).reshape(shape),
        scores={"constant_loss": CONSTANT_MSE}
        | {
            f"{task}_{unit}": float(np.median(by_unit[t, u]))
            for t, task in enumerate(TASKS)
            for u, unit in enumerate(config.units)
        },
    )


def _train(
    config: Config,
    task: _Task,
    unit: Unit,
    width: int,
    key: PRNGKeyArray,
    session: Session,
    name: str,
) -> Any:
    init_key, data_key, test_key, train_key = jax.random.split(key, 4)
    sizes = task.inputs, config.input_size, width, task.answers
    loss, test = task.loss(unit), task.test(test_key)
    return fit(
        loss,
        init_unit(init_key, unit, *sizes),
        make_optimizer(config.train),
        lambda step: task.batch(data_key, step),
        train_key,
        config.train,
        evaluations={},
        final={"test": lambda params: {"loss": loss(params, test, train_key)[0]}},
        session=session,
        name=name,
    )


def plot(config: Config, result: Result) -> "Figure":
    """The loss of every run on both tasks, with what each unit is and takes."""
    from experiments.figures import BLACK, BLUE, ORANGE, new_figure

    figure = new_figure(11, 4.8)
    both = zip(TASKS, figure.subplots(1, 2), (BLUE, ORANGE), strict=True)
    for t, (task, axes, colour) in enumerate(both):
        for u, losses in enumerate(result.losses[t]):
            axes.plot(losses, np.full(len(losses), u), "o", color=colour, markerfacecolor="none")
            axes.plot(np.median(losses), u, "|", color=BLACK, markersize=18, markeredgewidth=2)
        labels = [
            f"{unit}\nH {result.widths[t, u]}, {result.parameters[t, u]:,} parameters, "
            f"{result.microseconds[t, u]:.0f} μs a step"
            for u, unit in enumerate(config.units)
        ]
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        if task == "adding":
            axes.set_xscale("log")
            axes.axvline(CONSTANT_MSE, color=BLACK, linewidth=1, linestyle=":")
            axes.set_title(f"Adding problem, T {config.data.length}: test MSE (dotted: always 1)")
        else:
            axes.set_title("Next character: test nats")
    figure.suptitle(f"Units of as many parameters, {config.runs} seeds each (bars: medians)")
    return figure
