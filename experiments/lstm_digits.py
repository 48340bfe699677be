"""An LSTM reads handwritten digits row by row: eight steps of eight pixels, then one of ten names.

loss = -log softmax(answer)[label],   averaged over the batch
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from experiments.config import Seed
from experiments.digits import Digits, digits_batch, split_digits
from experiments.lstm_readout import Gradient, ModelConfig, init_readout, read_out, train_readout
from experiments.training import Loss, Record, TrainConfig, ignore

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LABELS = {"loss": "cross-entropy (nats)", "accuracy": "share of digits read correctly"}
"""What the metrics are, on an axis."""


@dataclass(frozen=True)
class DataConfig:
    """What training does to the images; held-out images stay as they are."""

    shift: Annotated[int, Field(ge=0, le=3)] = 1
    """Training images are moved at random by up to so many pixels along each axis."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Decides the split, the initial weights and the order of the data."""
    compare_steps: Annotated[int, Field(ge=0)] = 3
    """After training, the first so many steps are run and timed under both gradients; 0: none."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Result(NamedTuple):
    """The test images with what the trained model makes of them."""

    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    scores: dict[str, float]


def loss_under(gradient: Gradient) -> Loss:
    """Cross-entropy and accuracy of a batch of digits."""

    def loss(params, batch, key):
        logits = read_out(params, batch.images, gradient)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = jax.lax.argmax(logits, 1, jnp.int32) == batch.labels
        return jnp.mean(entropy), {"accuracy": jnp.mean(correct, dtype=logits.dtype)}

    return loss


def run(config: Config, log: Callable[[Record], None] = ignore) -> Result:
    """Train on the digits and read the test set."""
    with jax.enable_x64(config.model.dtype == "float64"):
        train, validation, test = split_digits(config.seed, config.model.dtype)

        def batch(step: int) -> Digits:
            size, shift = config.train.batch_size, config.data.shift
            return digits_batch(train, config.seed, step, size, shift)

        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        trained, scores = train_readout(
            loss_under,
            init_readout(init_key, train.images.shape[-1], 10, config.model),
            batch,
            train_key,
            {"validation": validation, "test": test},
            model=config.model,
            train=config.train,
            compare_steps=config.compare_steps,
            log=log,
        )
        logits = read_out(trained.params, jnp.asarray(test.images), config.model.gradient)
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        return Result(test.images, test.labels, probabilities, scores)


def plot(result: Result) -> "Figure":
    """Sample test images with their predictions, every mistake first, and the confusion matrix."""
    from experiments.figures import confusion_matrix, digit_gallery, new_figure

    predictions = result.probabilities.argmax(axis=-1)
    wrong = np.flatnonzero(predictions != result.labels)
    right = np.flatnonzero(predictions == result.labels)
    figure = new_figure(11, 5.2)
    left, matrix = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    digit_gallery(left, result.images, result.labels, result.probabilities, [*wrong, *right])
    confusion_matrix(matrix, result.labels, predictions)
    share = len(right) / len(result.labels)
    figure.suptitle(f"{share:.1%} of {len(result.labels)} test digits read correctly")
    return figure
