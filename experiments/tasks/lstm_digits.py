"""An LSTM reads images row by row: digits of scikit-learn or of MNIST, or those of CIFAR-10.

loss = -log softmax(answer)[label],   averaged over the batch
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from pydantic import Field

from experiments.data.images import image_batches
from experiments.data.sources import DataConfig, check_sizes, load_images, sizes_of
from experiments.engine.config import Seed
from experiments.engine.cost import cost_scores, score_table, step_cost
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training, rows_like
from experiments.engine.model import Model
from experiments.engine.session import SILENT, Session
from experiments.engine.training import Loss, TrainConfig, make_optimizer
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


LABELS = {"loss": "cross-entropy (nats)", "accuracy": "share of images named correctly"}
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
    classes: np.ndarray
    """The names that labels stand for."""
    probabilities: np.ndarray
    table: str
    scores: dict[str, Any]


def by_rows(pixels: Any) -> Any:
    """Images as sequences of their rows, (B, rows, columns · channels)."""
    return pixels.reshape(*pixels.shape[:2], -1)


def loss_under(gradient: Gradient, dtype: Dtype | None = None) -> Loss:
    """Cross-entropy and accuracy of a batch of images."""

    def loss(params, batch, key):
        logits = read_out(params, by_rows(batch.pixels), gradient, dtype)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = jax.lax.argmax(logits, 1, jnp.int32) == batch.labels
        return jnp.mean(entropy), {"accuracy": jnp.mean(correct, dtype=logits.dtype)}

    return loss


def check(config: Config) -> None:
    """Raise a `UsageError` if the images are not there, or there is no memory to train on them."""
    with jax.enable_x64(config.model.dtype == "float64"):
        data = load_images(config.data, config.seed, kept_dtype(config.model.dtype))
        width = by_rows(data.train.pixels).shape[-1]
        params = abstract_readout(width, len(data.classes), config.model)
        batch = rows_like(data.train, config.train.batch_size)
        loss = loss_under(config.model.gradient, config.model.dtype)
        check_training(config.train, loss, params, batch, data=data[:3])


def flops_of_sequence(config: ModelConfig, rows: int, width: int) -> int:
    """Operations of the matrix products that train on one image: forward, and twice that back.

    By hand, as XLA counts the body of the loop over the rows once.
    """
    return 3 * rows * 2 * (width + config.hidden_size) * 4 * config.hidden_size


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on the images and read those of the test set."""
    with jax.enable_x64(config.model.dtype == "float64"):
        data = load_images(config.data, config.seed, kept_dtype(config.model.dtype))
        size, shift, flip = config.train.batch_size, config.data.shift, config.data.flip
        batch = image_batches(data.train, config.seed, size, shift=shift, flip=flip)
        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        test = data.test
        rows, width = by_rows(test.pixels).shape[1:]
        params = init_readout(init_key, width, len(data.classes), config.model)
        trained, scores = train_readout(
            loss_under,
            params,
            batch,
            train_key,
            {"validation": data.validation, "test": test},
            model=config.model,
            train=config.train,
            compare_steps=config.compare_steps,
            session=session,
            data_sha256=data.origin["data_sha256"],
        )
        gradient, dtype = config.model.gradient, config.model.dtype
        loss, optimizer = loss_under(gradient, dtype), make_optimizer(config.train)
        cost = step_cost(
            loss, params, optimizer, batch(0), train_key, accumulate=config.train.accumulate
        )
        of_image = flops_of_sequence(config.model, rows, width)
        cost = cost._replace(flops=float(of_image * config.train.batch_size))
        scores |= cost_scores(params, cost, config.train.steps)
        sequences = by_rows(jnp.asarray(test.pixels))
        logits = read_out(trained.params, sequences, gradient, dtype)
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        table = score_table("LSTM, row by row", scores)
        return Result(
            test.pixels, test.labels, data.classes, probabilities, table, scores | data.origin
        )


def model(config: Config, result: Result | None) -> Model:
    """The LSTM with its read-out: logits of images (B, rows, columns, channels)."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    gradient, dtype = config.model.gradient, config.model.dtype

    if result is None:
        data = load_images(config.data, config.seed, kept_dtype(dtype))
        sizes = sizes_of(data.test.pixels, data.classes)
    else:
        sizes = sizes_of(result.images, result.classes)

    def init() -> PyTree:
        (_, columns, channels), classes = sizes
        return init_readout(init_key, columns * channels, classes, config.model)

    def test() -> Callable[[Any], Any]:
        data = load_images(config.data, config.seed, kept_dtype(dtype))
        check_sizes(data, sizes)
        return evaluation(loss_under(gradient, dtype), data.test, train_key)

    def apply(params: PyTree, pixels: Any) -> jax.Array:
        pixels = jnp.asarray(pixels, kept_dtype(dtype))
        return read_out(params, by_rows(pixels), gradient, dtype)

    return Model(init, apply, test, x64=dtype == "float64")


def plot(config: Config, result: Result) -> "Figure":
    """Sample test images with their predictions, every mistake first, and the confusion matrix."""
    from experiments.figures import confusion_matrix, image_gallery, new_figure

    predictions = result.probabilities.argmax(axis=-1)
    figure = new_figure(11, 5.2)
    left, matrix = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    image_gallery(left, result.images, result.labels, result.probabilities, result.classes)
    confusion_matrix(matrix, result.labels, predictions, result.classes)
    share = np.mean(predictions == result.labels)
    figure.suptitle(f"{share:.1%} of {len(result.labels)} test images named correctly")
    return figure
