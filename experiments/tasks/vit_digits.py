"""A vision transformer reads handwritten digits: 8 × 8 pixels of scikit-learn's, or MNIST's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data.digits import Digits, digits_batch
from experiments.data.images import DataConfig, check_size, load_images
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

LABELS = {"loss": "cross-entropy (nats)", "accuracy": "share of digits read correctly"}

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
    probabilities: np.ndarray
    attention: np.ndarray
    """Of the first images that have different labels: (images, depth, heads, rows, columns)."""
    attended: np.ndarray
    """Which images those are."""
    similarity: np.ndarray
    """Of positions: (rows, columns, rows, columns), or empty where none are added."""
    table: str
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raise a `UsageError` if the data or the model will not do."""
    data = load_images(config.data, config.seed, "float32")
    model = check_model(config.model, data[0].images.shape[1:])
    check_memory(model, data, config.train.batch_size)


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on the digits and read the test set."""
    train, validation, test = load_images(config.data, config.seed, "float32")
    size = train.images.shape[1:]
    model = build(config.model, size, config.seed)
    params, apply = functional(model)
    loss, optimizer = loss_of(apply), make_optimizer(config.train)
    key = jax.random.key(config.seed)

    def batch(step: int) -> Digits:
        return digits_batch(train, config.seed, step, config.train.batch_size, config.data.shift)

    trained = fit(
        loss,
        params,
        optimizer,
        batch,
        key,
        config.train,
        evaluations={"validation": evaluation(apply, validation)},
        final={"test": evaluation(apply, test)},
        session=session,
    )
    scores = final_scores(trained)
    cost = step_cost(loss, params, optimizer, batch(0), key)
    scores |= cost_scores(params, cost, config.train.steps)
    logits = jax.jit(read, static_argnums=0)(apply, trained.params, jnp.asarray(test.images))
    _, attended = np.unique(test.labels, return_index=True)
    attended = attended[:SHOWN]
    shown = jnp.asarray(test.images[attended])
    attention = attention_received(model, apply, trained.params, shown)
    nnx.update(model, trained.params)
    return Result(
        images=test.images,
        labels=test.labels,
        probabilities=np.asarray(jax.nn.softmax(logits, axis=-1)),
        attention=attention,
        attended=attended,
        similarity=position_similarity(model, size),
        table=score_table("vision transformer", scores),
        scores=scores,
    )


def model(config: Config, result: Result | None) -> Model:
    """The vision transformer: logits of images (B, rows, columns)."""
    held = load_images(config.data, config.seed, "float32")[0] if result is None else result
    size = held.images.shape[1:]
    apply = functional(build(config.model, size, config.seed))[1]

    def test() -> Callable[[Any], Any]:
        digits = load_images(config.data, config.seed, "float32")[2]
        check_size(digits, size)
        return evaluation(apply, digits)

    def adopt(arrays: Mapping[str, Any]) -> Adopted | None:
        return pretrained(build(config.model, size, config.seed), arrays, config.model.num_heads)

    return Model(
        init=lambda: functional(build(config.model, size, config.seed))[0],
        apply=lambda params, images: apply(params, jnp.asarray(images)),
        test=test,
        adopt=adopt,
    )


def plot(config: Config, result: Result) -> "Figure":
    """Sample test images, every mistake first, the confusion matrix, and what is attended to."""
    from experiments.figures import (
        attention_maps,
        confusion_matrix,
        digit_gallery,
        new_figure,
        similarity_maps,
    )

    predictions = result.probabilities.argmax(axis=-1)
    figure = new_figure(11, 10.4)
    upper, lower = figure.subfigures(2, 1, squeeze=False, hspace=0.03)[:, 0]
    left, matrix = upper.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    digit_gallery(left, result.images, result.labels, result.probabilities)
    confusion_matrix(matrix, result.labels, predictions)
    positions = result.similarity.size > 0
    left, *others = lower.subfigures(1, 2 if positions else 1, squeeze=False)[0]
    attention_maps(left, result.images[result.attended], result.attention.mean(axis=2))
    for right_part in others:
        similarity_maps(right_part, result.similarity)
    share = np.mean(predictions == result.labels)
    figure.suptitle(f"{share:.1%} of {len(result.labels):,} test digits read correctly")
    return figure
