"""An LSTM with a linear read-out of its last output: the model of the LSTM tasks.

    y = LSTM(x),   answer = y_T W + b

Axes: B batch, T time, D input width, H hidden width, O answer width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import rnnattn
import rnnattn.reference
from experiments.engine.config import Size
from experiments.engine.session import Session
from experiments.engine.training import (
    Loss,
    TrainConfig,
    Trained,
    compare,
    final_scores,
    fit,
    make_optimizer,
)

Gradient = Literal["hand", "autodiff"]


@dataclass(frozen=True)
class ModelConfig:
    """The LSTM and how its gradient is computed."""

    hidden_size: Size = 16
    """Hidden size of the LSTM."""
    gradient: Gradient = "hand"
    """The library's hand-derived gradient, or JAX's autodiff through a plain scan."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of parameters, data and arithmetic."""


class ReadoutParams(NamedTuple):
    """Weights of the model."""

    lstm: rnnattn.LSTMParams
    w: Float[Array, "H O"]
    b: Float[Array, " O"]


init_lstm = jax.jit(rnnattn.init_lstm, static_argnums=(1, 2), static_argnames="dtype")
"""The library's, compiled as one program: its operations one by one take a second to compile."""


def init_readout(
    key: PRNGKeyArray, input_size: int, output_size: int, config: ModelConfig
) -> ReadoutParams:
    """Random weights: the library's for the LSTM, variance 1/H for the read-out."""
    lstm_key, w_key = jax.random.split(key)
    dtype = jnp.dtype(config.dtype)
    lstm = init_lstm(lstm_key, input_size, config.hidden_size, dtype=dtype)
    w = jax.random.normal(w_key, (config.hidden_size, output_size), dtype)
    return ReadoutParams(lstm, w / config.hidden_size**0.5, jnp.zeros((output_size,), dtype))


def abstract_readout(input_size: int, output_size: int, config: ModelConfig) -> ReadoutParams:
    """The shapes and dtypes of the weights, none of which are made."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda key: init_readout(key, input_size, output_size, config), key)


def read_out(
    params: ReadoutParams, x: Float[Array, "B T D"], gradient: Gradient
) -> Float[Array, "B O"]:
    """The model's answer to each sequence, differentiated as `gradient` says."""
    lstm = rnnattn.lstm if gradient == "hand" else rnnattn.reference.lstm
    _, state = lstm(params.lstm, x)
    return state.h @ params.w + params.b[None, :]


def evaluation(loss: Loss, data: Any, key: PRNGKeyArray) -> Callable[[Any], dict[str, Array]]:
    """Metrics of the parameters on held-out `data`."""
    data = jax.tree.map(jnp.asarray, data)

    def metrics(params):
        value, others = loss(params, data, key)
        return {"loss": value, **others}

    return metrics


def train_readout(
    loss: Callable[[Gradient], Loss],
    params: ReadoutParams,
    batch: Callable[[int], Any],
    key: PRNGKeyArray,
    held_out: dict[str, Any],
    *,
    model: ModelConfig,
    train: TrainConfig,
    compare_steps: int,
    session: Session,
) -> tuple[Trained, dict[str, float]]:
    """Train the model, evaluate it on `held_out`, and set the two gradients side by side.

    Args:
        loss: the task's loss under either gradient.
        held_out: batches by split; all but "test" are also evaluated during training.

    Returns:
        What training left, and scores: `<split>_<metric>` at the end, times, and the comparison of
        the gradients over the first `compare_steps` steps.
    """

    evaluations = {
        split: evaluation(loss(model.gradient), data, key) for split, data in held_out.items()
    }
    final = {"test": evaluations.pop("test")}
    optimizer = make_optimizer(train)
    trained = fit(
        loss(model.gradient),
        params,
        optimizer,
        batch,
        key,
        train,
        evaluations=evaluations,
        final=final,
        session=session,
    )
    scores = final_scores(trained)
    if compare_steps:
        both = {name: loss(name) for name in ("hand", "autodiff")}
        first = session.begin(params)
        scores |= compare(both, first, optimizer, batch, key, steps=compare_steps)
    return trained, scores
