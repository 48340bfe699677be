"""An LSTM writes text, character by character (Graves 2013; Karpathy 2015).

Each row of a batch reads on where it stopped a step ago: the state goes from window to window, its
gradient does not (truncated back-propagation through time). An epoch begins with a state of zeros.
Held-out text is read in one go, from its first character to its last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from experiments.data.text import (
    Text,
    TextResult,
    Windows,
    encode,
    load_text,
    result_of_text,
    scores_of_text,
    start_of_line,
    text_windows,
)
from experiments.engine.config import Seed, Size
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training
from experiments.engine.model import Model
from experiments.engine.session import SILENT, Session
from experiments.engine.training import (
    Loss,
    TrainConfig,
    compare,
    final_scores,
    fit,
    make_optimizer,
)
from experiments.models.lstm import GRADIENTS, Dtype, Gradient
from experiments.models.text import (
    TextModelConfig,
    TextParams,
    init_text,
    loss_under,
    predict,
    read_through,
    write,
    zero_states,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "loss": "cross-entropy (nats per character)",
    "accuracy": "share of characters guessed",
}
"""What the metrics are, on an axis."""


@dataclass(frozen=True)
class DataConfig:
    """The text, and the length of the windows to train on."""

    path: str | None = None
    """A UTF-8 text file; by default, the documentation topics of Python's help()."""
    window: Size = 8
    """Characters in a training window: the length of truncated backpropagation."""


@dataclass(frozen=True)
class Config:
    """The defaults are a size for tests: seconds on one core."""

    seed: Seed = 0
    """Random seed of the initial weights, dropout and the sample."""
    compare_steps: Annotated[int, Field(ge=0, lt=2**31)] = 3
    """Steps to time with each of the two gradients after training; 0 for none."""
    sample_length: Size = 100
    """Characters to generate after training."""
    data: DataConfig = field(default_factory=DataConfig)
    model: TextModelConfig = field(default_factory=TextModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    compare_steps=2,
    sample_length=20,
    data=DataConfig(window=5),
    model=TextModelConfig(hidden_size=3),
    train=TrainConfig(steps=4, batch_size=4, log_every=2, evaluate_every=2),
)


Result = TextResult


def reading(
    part: np.ndarray, gradient: Gradient, dtype: Dtype
) -> Callable[[Any], dict[str, jax.Array]]:
    """Metrics of the parameters on a part of the text."""

    def metrics(params):
        nats, correct = read_through(params, jnp.asarray(part), gradient, dtype)
        return {"loss": jnp.mean(nats), "accuracy": jnp.mean(correct)}

    return metrics


def check(config: Config) -> None:
    """Raise a `UsageError` if the text will not do, or there is no memory to train on it."""
    text, rows = _load(config), config.train.batch_size
    with jax.enable_x64(config.model.dtype == "float64"):
        params = jax.eval_shape(
            lambda key: init_text(key, len(text.characters), config.model), jax.random.key(0)
        )
        states = jax.eval_shape(lambda params: zero_states(params, rows), params)
        # no larger than the text
        batch = text_windows(text.train, 0, rows, config.data.window)
        loss = _loss(config, config.model.gradient)
        data = text.train, text.validation, text.test
        check_training(config.train, loss, params, batch, states, data=data)


def run(config: Config, session: Session = SILENT) -> Result:
    """Train on the first part of the text, read the rest, and write some more."""
    text, gradient, dtype = _load(config), config.model.gradient, config.model.dtype
    with jax.enable_x64(dtype == "float64"):
        init_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
        size, window = config.train.batch_size, config.data.window

        def batch(step: int) -> Windows:
            return text_windows(text.train, step, size, window)

        params = init_text(init_key, len(text.characters), config.model)
        carry, optimizer = zero_states(params, size), make_optimizer(config.train)
        trained = fit(
            _loss(config, gradient),
            params,
            optimizer,
            batch,
            train_key,
            config.train,
            carry=carry,
            evaluations={"validation": reading(text.validation, gradient, dtype)},
            final={"test": reading(text.test, gradient, dtype)},
            session=session,
            data_sha256=text.sha256,
        )
        scores = scores_of_text(text, final_scores(trained))
        if config.compare_steps:
            both: dict[str, Loss] = {name: _loss(config, name) for name in GRADIENTS}
            scores |= compare(
                both,
                session.begin(params),
                optimizer,
                batch,
                train_key,
                carry=carry,
                steps=config.compare_steps,
                accumulate=config.train.accumulate,
            )
        read = jax.jit(read_through, static_argnums=(2, 3))
        nats, _ = read(trained.params, jnp.asarray(text.test), gradient, dtype)
        prompt = jnp.asarray(start_of_line(text.characters))
        written = write(trained.params, prompt, sample_key, length=config.sample_length)
        return result_of_text(text, trained, nats, written, scores)


def model(config: Config, result: Result | None) -> Model:
    """The stack of LSTMs: logits (B, T, V) of the character after each of texts of one length."""
    gradient, dtype = config.model.gradient, config.model.dtype

    @cache
    def characters() -> str:
        return _load(config).characters if result is None else "".join(map(chr, result.characters))

    def init() -> TextParams:
        init_key, _, _ = jax.random.split(jax.random.key(config.seed), 3)
        return init_text(init_key, len(characters()), config.model)

    def apply(params: TextParams, texts: Sequence[str]) -> jax.Array:
        x = jnp.array([encode(text, characters(), "a text") for text in texts])
        return predict(params, x, zero_states(params, len(x)), gradient, dtype=dtype)[0]

    def test() -> Callable[[Any], Any]:
        return reading(load_text(config.data.path, characters=characters()).test, gradient, dtype)

    def sample(
        params: TextParams, prompt: str | None, length: int, temperature: float, seed: int
    ) -> str:
        # so that without a prompt a run's own sample is written again
        _, _, key = jax.random.split(jax.random.key(seed), 3)
        known = characters()
        first = encode(prompt, known, "--prompt") if prompt else start_of_line(known)
        written = write(params, jnp.asarray(first), key, length=length, temperature=temperature)
        return "".join(known[number] for number in np.asarray(written))

    return Model(init, apply, test, sample=sample, x64=dtype == "float64")


def plot(config: Config, result: Result) -> "Figure":
    """The loss against what needs no memory, the cost of each place in a word, and an excerpt."""
    from experiments.figures import figure_of_text

    return figure_of_text(
        result.test, result.nats, result.curve, result.validation_curve, result.scores
    )


def _loss(config: Config, gradient: Gradient) -> Loss:
    model = config.model
    return loss_under(gradient, model.dropout, model.dtype, model.remat == "states")


def _load(config: Config) -> Text:
    return load_text(config.data.path, rows=config.train.batch_size, window=config.data.window)
