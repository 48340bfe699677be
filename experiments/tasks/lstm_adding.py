"""The adding problem: the sum of the two marked values of a long sequence (Hochreiter and
Schmidhuber 1997, experiment 4).

At each step the LSTM sees a value, uniform on [0, 1], and a mark, which is 1 at one step of the
first half and at one of the second, and 0 elsewhere. Answering always 1, the mean of the sums, has
a mean squared error of their variance, 2/12 = 1/6.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from pydantic import Field

from experiments.data.adding import CONSTANT_MSE, DataConfig, Sums, abstract_sums, draw_sums
from experiments.engine.config import Seed
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training
from experiments.engine.model import Model
from experiments.engine.session import SILENT, Session
from experiments.engine.training import Loss, TrainConfig
from experiments.models.lstm import (
    Dtype,
    Gradient,
    ModelConfig,
    abstract_readout,
    evaluation,
    init_readout,
    kept_dtype,
    read_out,
    train_readout,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 0.04
"""A sum counts as found within this distance, as in the paper."""

LABELS = {"loss": "mean squared error", "accuracy": f"share of sums within {TOLERANCE}"}
"""What the metrics are, on an axis."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Random seed of the sequences and the initial weights."""
    compare_steps: Annotated[int, Field(ge=0, lt=2**31)] = 3
    """Steps to time with each of the two gradients after training; 0 for none."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    compare_steps=2,
    data=DataConfig(length=4, held_out=8),
    model=ModelConfig(hidden_size=3),
    train=TrainConfig(steps=4, batch_size=4, log_every=2, evaluate_every=2),
)


class Result(NamedTuple):
    """Sums of the test set, those that the trained model finds, and the loss on the way."""

    sums: np.ndarray
    predictions: np.ndarray
    steps: np.ndarray
    losses: np.ndarray
    scores: dict[str, float]


def loss_under(gradient: Gradient, dtype: Dtype | None = None) -> Loss:
    """Mean squared error of a batch, and the share of its sums found within the tolerance."""

    def loss(params, batch, key):
        error = read_out(params, batch.x, gradient, dtype)[:, 0] - batch.sums
        found = jnp.abs(error) < TOLERANCE
        return jnp.mean(error**2), {"accuracy": jnp.mean(found, dtype=error.dtype)}

    return loss


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory to train."""
    length, dtype = config.data.length, kept_dtype(config.model.dtype)
    with jax.enable_x64(dtype == "float64"):
        params = abstract_readout(2, 1, config.model)
        batch = abstract_sums(config.train.batch_size, length, dtype)
        held_out = [abstract_sums(config.data.held_out, length, dtype)] * 2
        loss = loss_under(config.model.gradient, config.model.dtype)
        check_training(config.train, loss, params, batch, data=held_out)


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on ever new sequences and test on others."""
    with jax.enable_x64(config.model.dtype == "float64"):
        keys = jax.random.split(jax.random.key(config.seed), 5)
        init_key, data_key, train_key, validation_key, test_key = keys

        def draw(key: PRNGKeyArray, size: int) -> Sums:
            return draw_sums(key, size, config.data.length, kept_dtype(config.model.dtype))

        test = draw(test_key, config.data.held_out)
        trained, scores = train_readout(
            loss_under,
            init_readout(init_key, 2, 1, config.model),
            lambda step: draw(jax.random.fold_in(data_key, step), config.train.batch_size),
            train_key,
            {"validation": draw(validation_key, config.data.held_out), "test": test},
            model=config.model,
            train=config.train,
            compare_steps=config.compare_steps,
            session=session,
        )
        model = config.model
        predictions = read_out(trained.params, test.x, model.gradient, model.dtype)[:, 0]
        curve = [record for record in trained.records if record["split"] == "train"]
        return Result(
            sums=np.asarray(test.sums),
            predictions=np.asarray(predictions),
            steps=np.array([record["step"] for record in curve]),
            losses=np.array([record["loss"] for record in curve]),
            scores={"constant_loss": CONSTANT_MSE, **scores},
        )


def model(config: Config, result: Result | None) -> Model:
    """The LSTM with its read-out: the sums that it finds in sequences (B, T, 2)."""
    init_key, _, train_key, _, test_key = jax.random.split(jax.random.key(config.seed), 5)
    gradient, dtype = config.model.gradient, config.model.dtype

    def test() -> Callable[[Any], Any]:
        sums = draw_sums(test_key, config.data.held_out, config.data.length, kept_dtype(dtype))
        return evaluation(loss_under(gradient, dtype), sums, train_key)

    return Model(
        init=lambda: init_readout(init_key, 2, 1, config.model),
        apply=lambda params, x: read_out(
            params, jnp.asarray(x, kept_dtype(dtype)), gradient, dtype
        )[:, 0],
        test=test,
        x64=dtype == "float64",
    )


def plot(config: Config, result: Result) -> "Figure":
    """Found against true sums, and the loss against that of the constant answer."""
    from experiments.figures import loss_curve, new_figure, predicted_against_true

    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    predicted_against_true(left, result.sums, result.predictions, TOLERANCE)
    loss_curve(right, result.steps, result.losses, "always answering 1: MSE 1/6", CONSTANT_MSE)
    mse = np.mean((result.predictions - result.sums) ** 2)
    figure.suptitle(f"Adding problem: test MSE {mse:.5f} over {len(result.sums)} sequences")
    return figure
