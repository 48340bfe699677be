"""A vision transformer names images: digits of scikit-learn or of MNIST, or those of CIFAR-10."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data.images import image_batches
from experiments.data.sources import DataConfig, check_sizes, load_images, sizes_of
from experiments.engine.config import Seed
from experiments.engine.cost import cost_scores, score_table, step_cost
from experiments.engine.devices import ParallelConfig
from experiments.engine.model import Adopted, Model
from experiments.engine.session import SILENT, Session
from experiments.engine.training import (
    TrainConfig,
    final_scores,
    fit,
    make_optimizer,
)
from experiments.models.pretrained import adopt as pretrained
from experiments.models.vit import (
    ViTConfig,
    attention_received,
    build,
    check_memory,
    check_model,
    evaluation,
    functional,
    loss_of,
    position_similarity,
    read,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"loss": "cross-entropy (nats)", "accuracy": "share of images named correctly"}

SHOWN = 6
"""Test images whose attention is kept."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Random seed of the split, the initial weights and the order of the data."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    model=ViTConfig(width=8),
    train=TrainConfig(steps=4, batch_size=4, log_every=2, evaluate_every=2),
)


class Result(NamedTuple):
    """The test images with what the trained model makes of them."""

    images: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    """The names that labels stand for."""
    probabilities: np.ndarray
    attention: np.ndarray
    """Of the first images that have different labels: (images, depth, heads, rows, columns)."""
    attended: np.ndarray
    """Which images those are."""
    similarity: np.ndarray
    """Of positions: (rows, columns, rows, columns), or empty where none are added."""
    table: str
    scores: dict[str, Any]


def check(config: Config) -> None:
    """Raise a `UsageError` if the data or the model will not do."""
    data = load_images(config.data, config.seed, "float32")
    model = check_model(config.model, data.train.pixels.shape[1:], len(data.classes))
    check_memory(model, data[:3], config.train)


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on the images and name those of the test set."""
    data = load_images(config.data, config.seed, "float32")
    shape, test = data.train.pixels.shape[1:], data.test
    model = build(config.model, shape, len(data.classes), config.seed)
    params, apply = functional(model)
    loss, optimizer = loss_of(apply), make_optimizer(config.train)
    key = jax.random.key(config.seed)
    size, shift, flip = config.train.batch_size, config.data.shift, config.data.flip
    batch = image_batches(data.train, config.seed, size, shift=shift, flip=flip)
    trained = fit(
        loss,
        params,
        optimizer,
        batch,
        key,
        config.train,
        evaluations={"validation": evaluation(apply, data.validation)},
        final={"test": evaluation(apply, test)},
        session=session,
        data_sha256=data.origin["data_sha256"],
    )
    scores = final_scores(trained)
    cost = step_cost(loss, params, optimizer, batch(0), key, accumulate=config.train.accumulate)
    scores |= cost_scores(params, cost, config.train.steps)
    logits = jax.jit(read, static_argnums=0)(apply, trained.params, jnp.asarray(test.pixels))
    _, attended = np.unique(test.labels, return_index=True)
    attended = attended[:SHOWN]
    shown = jnp.asarray(test.pixels[attended])
    attention = attention_received(model, apply, trained.params, shown)
    nnx.update(model, trained.params)
    return Result(
        images=test.pixels,
        labels=test.labels,
        classes=data.classes,
        probabilities=np.asarray(jax.nn.softmax(logits, axis=-1)),
        attention=attention,
        attended=attended,
        similarity=position_similarity(model, shape[:2]),
        table=score_table("vision transformer", scores),
        scores=scores | data.origin,
    )


def model(config: Config, result: Result | None) -> Model:
    """The vision transformer: logits of images (B, rows, columns, channels)."""
    if result is None:
        data = load_images(config.data, config.seed, "float32")
        sizes = sizes_of(data.test.pixels, data.classes)
    else:
        sizes = sizes_of(result.images, result.classes)
    make = lambda: build(config.model, *sizes, config.seed)
    apply = functional(make())[1]

    def test() -> Callable[[Any], Any]:
        data = load_images(config.data, config.seed, "float32")
        check_sizes(data, sizes)
        return evaluation(apply, data.test)

    def adopt(arrays: Mapping[str, Any]) -> Adopted | None:
        return pretrained(make(), arrays, config.model.num_heads)

    return Model(
        init=lambda: functional(make())[0],
        apply=lambda params, pixels: apply(params, jnp.asarray(pixels)),
        test=test,
        adopt=adopt,
    )


def plot(config: Config, result: Result) -> "Figure":
    """Sample test images, every mistake first, the confusion matrix, and what is attended to."""
    from experiments.figures import (
        attention_maps,
        confusion_matrix,
        image_gallery,
        new_figure,
        similarity_maps,
    )

    predictions = result.probabilities.argmax(axis=-1)
    figure = new_figure(11, 10.4)
    upper, lower = figure.subfigures(2, 1, squeeze=False, hspace=0.03)[:, 0]
    left, matrix = upper.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    image_gallery(left, result.images, result.labels, result.probabilities, result.classes)
    confusion_matrix(matrix, result.labels, predictions, result.classes)
    positions = result.similarity.size > 0
    left, *others = lower.subfigures(1, 2 if positions else 1, squeeze=False)[0]
    attention_maps(left, result.images[result.attended], result.attention.mean(axis=2))
    for right_part in others:
        similarity_maps(right_part, result.similarity)
    share = np.mean(predictions == result.labels)
    figure.suptitle(f"{share:.1%} of {len(result.labels):,} test images named correctly")
    return figure
