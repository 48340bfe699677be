"""An LSTM reads handwritten digits row by row, of scikit-learn's 8 × 8 pixels or MNIST's 28 × 28.

loss = -log softmax(answer)[label],   averaged over the batch
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from experiments.data.digits import Digits, digits_batch
from experiments.data.images import DataConfig, check_size, load_images
from experiments.engine.config import Seed
from experiments.engine.cost import cost_scores, score_table, step_cost
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training, rows_like
from experiments.engine.model import Model
from experiments.engine.session import SILENT, Session
from experiments.engine.training import Loss, TrainConfig, make_optimizer
from experiments.models.lstm import (
    Gradient,
    ModelConfig,
    abstract_readout,
    evaluation,
    init_readout,
    read_out,
    train_readout,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LABELS = {"loss": "cross-entropy (nats)", "accuracy": "share of digits read correctly"}
"""What the metrics are, on an axis."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Random seed of the split, the initial weights and the order of the data."""
    compare_steps: Annotated[int, Field(ge=0, lt=2**31)] = 3
    """Steps to time with each of the two gradients after training; 0 for none."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    compare_steps=2,
    model=ModelConfig(hidden_size=3),
    train=TrainConfig(steps=4, batch_size=4, log_every=2, evaluate_every=2),
)


class Result(NamedTuple):
    """The test images with what the trained model makes of them."""

    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    table: str
    scores: dict[str, float]


def loss_under(gradient: Gradient) -> Loss:
    """Cross-entropy and accuracy of a batch of digits."""

    def loss(params, batch, key):
        logits = read_out(params, batch.images, gradient)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = jax.lax.argmax(logits, 1, jnp.int32) == batch.labels
        return jnp.mean(entropy), {"accuracy": jnp.mean(correct, dtype=logits.dtype)}

    return loss


def check(config: Config) -> None:
    """Raise a `UsageError` if the digits are not there, or there is no memory to train on them."""
    with jax.enable_x64(config.model.dtype == "float64"):
        train, validation, test = load_images(config.data, config.seed, config.model.dtype)
        params = abstract_readout(train.images.shape[-1], 10, config.model)
        batch = rows_like(train, config.train.batch_size)
        data = train, validation, test
        check_training(loss_under(config.model.gradient), params, batch, data=data)


def flops_of_sequence(config: ModelConfig, rows: int, columns: int) -> int:
    """Operations of the matrix products that train on one image: forward, and twice that back.

    By hand, as XLA counts the body of the loop over the rows once.
    """
    return 3 * rows * 2 * (columns + config.hidden_size) * 4 * config.hidden_size


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on the digits and read the test set."""
    with jax.enable_x64(config.model.dtype == "float64"):
        train, validation, test = load_images(config.data, config.seed, config.model.dtype)

        def batch(step: int) -> Digits:
            size, shift = config.train.batch_size, config.data.shift
            return digits_batch(train, config.seed, step, size, shift)

        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        params = init_readout(init_key, train.images.shape[-1], 10, config.model)
        trained, scores = train_readout(
            loss_under,
            params,
            batch,
            train_key,
            {"validation": validation, "test": test},
            model=config.model,
            train=config.train,
            compare_steps=config.compare_steps,
            session=session,
        )
        loss, optimizer = loss_under(config.model.gradient), make_optimizer(config.train)
        cost = step_cost(loss, params, optimizer, batch(0), train_key)
        of_image = flops_of_sequence(config.model, *train.images.shape[1:])
        cost = cost._replace(flops=float(of_image * config.train.batch_size))
        scores |= cost_scores(params, cost, config.train.steps)
        logits = read_out(trained.params, jnp.asarray(test.images), config.model.gradient)
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        rows = score_table("LSTM, row by row", scores)
        return Result(test.images, test.labels, probabilities, rows, scores)


def model(config: Config, result: Result | None) -> Model:
    """The LSTM with its read-out: logits of images (B, rows, columns)."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    gradient, dtype = config.model.gradient, config.model.dtype

    def shape() -> tuple[int, ...]:
        held = load_images(config.data, config.seed, dtype)[0] if result is None else result
        return held.images.shape[1:]

    def test() -> Callable[[Any], Any]:
        digits = load_images(config.data, config.seed, dtype)[2]
        check_size(digits, shape())
        return evaluation(loss_under(gradient), digits, train_key)

    return Model(
        init=lambda: init_readout(init_key, shape()[-1], 10, config.model),
        apply=lambda params, images: read_out(params, jnp.asarray(images, dtype), gradient),
        test=test,
        x64=dtype == "float64",
    )


def plot(config: Config, result: Result) -> "Figure":
    """Sample test images with their predictions, every mistake first, and the confusion matrix."""
    from experiments.figures import confusion_matrix, digit_gallery, new_figure

    predictions = result.probabilities.argmax(axis=-1)
    figure = new_figure(11, 5.2)
    left, matrix = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    digit_gallery(left, result.images, result.labels, result.probabilities)
    confusion_matrix(matrix, result.labels, predictions)
    share = np.mean(predictions == result.labels)
    figure.suptitle(f"{share:.1%} of {len(result.labels)} test digits read correctly")
    return figure
