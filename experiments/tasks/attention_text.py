"""A causal transformer with rotary positions writes text, character by character.

Each window of the training text is one sequence, which may lie on several devices: ring attention
(Liu, Zaharia & Abbeel 2023) brings keys and values to them all. Held-out text is read in windows of
the same length, which overlap by half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.text import (
    Excerpts,
    Text,
    TextResult,
    encode,
    load_text,
    result_of_text,
    scores_of_text,
    start_of_line,
    text_excerpts,
)
from experiments.engine.config import Seed, Size, UsageError
from experiments.engine.cost import cost_scores, step_cost
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training
from experiments.engine.model import Model
from experiments.engine.session import SILENT, Session
from experiments.engine.training import TrainConfig, final_scores, fit, make_optimizer
from experiments.models.attention_text import (
    TransformerConfig,
    TransformerParams,
    attention_on,
    check_model,
    init_transformer,
    loss_under,
    predict,
    read_through,
    write,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "loss": "cross-entropy (nats per character)",
    "accuracy": "share of characters guessed",
}

DIVIDES_SEQUENCE = True


@dataclass(frozen=True)
class DataConfig:
    """The text, and the length of the windows to train on."""

    path: str | None = None
    """A UTF-8 text file; by default, the documentation topics of Python's help()."""
    window: Size = 64
    """Characters in a window: the most that a prediction can look back on."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Random seed of the initial weights, the order of the data, dropout and the sample."""
    sample_length: Size = 100
    """Characters to generate after training."""
    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    sample_length=20,
    data=DataConfig(window=8),
    model=TransformerConfig(width=8),
    train=TrainConfig(steps=4, batch_size=4, log_every=2, evaluate_every=2),
)


Result = TextResult


def reading(config: Config, part: np.ndarray) -> Callable[[Any], dict[str, jax.Array]]:
    """Metrics of the parameters on a part of the text."""

    def metrics(params):
        nats, correct = read_through(
            params, jnp.asarray(part), config.data.window, config.model.dtype
        )
        return {"loss": jnp.mean(nats), "accuracy": jnp.mean(correct)}

    return metrics


def check(config: Config) -> None:
    """Raise a `UsageError` if the text or the model will not do, if the devices do not divide the
    windows, or if there is no memory to train on them."""
    check_model(config.model)
    devices, window = config.parallel.sequence, config.data.window
    # ring attention has each of them take two parts
    if devices > 1 and window % (2 * devices):
        raise UsageError(
            f"data.window: should be a multiple of 2 × parallel.sequence = {2 * devices}, got "
            f"{window}"
        )
    text = _load(config)
    with jax.enable_x64(config.model.dtype == "float64"):
        params = jax.eval_shape(
            lambda key: init_transformer(key, len(text.characters), config.model),
            jax.random.key(0),
        )
        # no larger than the text
        batch = text_excerpts(text.train, 0, 0, config.train.batch_size, window)
        data = text.train, text.validation, text.test
        check_training(config.train, loss_under(config.model), params, batch, data=data)


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on the first part of the text, read the rest, and write some more."""
    text, train, window = _load(config), config.train, config.data.window
    with jax.enable_x64(config.model.dtype == "float64"):
        init_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)

        def batch(step: int) -> Excerpts:
            return text_excerpts(text.train, config.seed, step, train.batch_size, window)

        params = init_transformer(init_key, len(text.characters), config.model)
        optimizer = make_optimizer(train)
        trained = fit(
            loss_under(config.model, session.mesh),
            params,
            optimizer,
            batch,
            train_key,
            train,
            evaluations={"validation": reading(config, text.validation)},
            final={"test": reading(config, text.test)},
            session=session,
            data_sha256=text.sha256,
        )
        on_one = loss_under(config.model)
        cost = step_cost(
            on_one, params, optimizer, batch(0), train_key, accumulate=train.accumulate
        )
        scores = scores_of_text(text, final_scores(trained)) | cost_scores(
            params, cost, train.steps
        )
        read = jax.jit(read_through, static_argnums=(2, 3))
        nats, _ = read(trained.params, jnp.asarray(text.test), window, config.model.dtype)
        prompt = jnp.asarray(start_of_line(text.characters))
        length = config.sample_length
        written = write(trained.params, prompt, sample_key, length=length, window=window)
        return result_of_text(text, trained, nats, written, scores)


def model(config: Config, result: Result | None) -> Model:
    """The transformer: logits (B, T, V) of the character after each of texts of one length."""

    @cache
    def characters() -> str:
        return _load(config).characters if result is None else "".join(map(chr, result.characters))

    def init() -> TransformerParams:
        init_key, _, _ = jax.random.split(jax.random.key(config.seed), 3)
        return init_transformer(init_key, len(characters()), config.model)

    def apply(params: TransformerParams, texts: Sequence[str]) -> jax.Array:
        x = jnp.array([encode(text, characters(), "a text") for text in texts])
        return predict(params, x, attention_on(None), dtype=config.model.dtype)

    def test() -> Callable[[Any], Any]:
        return reading(config, load_text(config.data.path, characters=characters()).test)

    def sample(
        params: TransformerParams, prompt: str | None, length: int, temperature: float, seed: int
    ) -> str:
        # so that without a prompt a run's own sample is written again
        _, _, key = jax.random.split(jax.random.key(seed), 3)
        known, window = characters(), config.data.window
        first = jnp.asarray(encode(prompt, known, "--prompt") if prompt else start_of_line(known))
        written = write(params, first, key, length=length, window=window, temperature=temperature)
        return "".join(known[number] for number in np.asarray(written))

    return Model(init, apply, test, sample=sample, x64=config.model.dtype == "float64")


def plot(config: Config, result: Result) -> "Figure":
    """The loss against what needs no memory, the cost of each place in a word, and an excerpt."""
    from experiments.figures import figure_of_text

    return figure_of_text(
        result.test, result.nats, result.curve, result.validation_curve, result.scores
    )


def _load(config: Config) -> Text:
    return load_text(config.data.path, rows=config.train.batch_size, window=config.data.window)
