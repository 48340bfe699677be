"""An LSTM with a linear read-out of its last output: the model of the LSTM tasks.

    y = LSTM(x),   answer = y_T W + b

Axes: B batch, T time, D input width, H hidden width, O answer width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

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
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
Dtype = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig:
    """The LSTM and how its gradient is computed."""

    hidden_size: Size = 16
    """Hidden size of the LSTM."""
    gradient: Gradient = "hand"
    """The library's hand-derived gradient, or JAX's autodiff through a plain scan."""
    dtype: Dtype = "float32"
    """Precision of the arithmetic, the parameters and the data; with bfloat16, only the arithmetic
    has 16 bits: cell states, logits, the loss and the optimiser state stay float32, too."""


class ReadoutParams(NamedTuple):
    """Weights of the model."""

    lstm: rnnattn.LSTMParams
    w: Float[Array, "H O"]
    b: Float[Array, " O"]


def kept_dtype(dtype: Dtype) -> str:
    """That of parameters and data, for arithmetic in `dtype`."""
    return "float32" if dtype == "bfloat16" else dtype


def computed_in(dtype: Dtype | None, tree: PyTree) -> PyTree:
    """The arrays for arithmetic in `dtype`; None is their own."""
    return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype), tree)


init_lstm = jax.jit(rnnattn.init_lstm, static_argnums=(1, 2), static_argnames="dtype")
"""The library's, compiled as one program: its operations one by one take a second to compile."""


def init_readout(
    key: PRNGKeyArray, input_size: int, output_size: int, config: ModelConfig
) -> ReadoutParams:
    """Random weights: the library's for the LSTM, variance 1/H for the read-out."""
    lstm_key, w_key = jax.random.split(key)
    dtype = jnp.dtype(kept_dtype(config.dtype))
    lstm = init_lstm(lstm_key, input_size, config.hidden_size, dtype=dtype)
    w = jax.random.normal(w_key, (config.hidden_size, output_size), dtype)
    return ReadoutParams(lstm, w / config.hidden_size**0.5, jnp.zeros((output_size,), dtype))


def abstract_readout(input_size: int, output_size: int, config: ModelConfig) -> ReadoutParams:
    """The shapes and dtypes of the weights, none of which are made."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda key: init_readout(key, input_size, output_size, config), key)


def read_out(
    params: ReadoutParams, x: Float[Array, "B T D"], gradient: Gradient, dtype: Dtype | None = None
) -> Float[Array, "B O"]:
    """The model's answer to each sequence, differentiated as `gradient` says.

    Args:
        dtype: of the arithmetic; None is that of the parameters, in which the answer is.
    """
    lstm = rnnattn.lstm if gradient == "hand" else rnnattn.reference.lstm
    of_lstm, w, x = computed_in(dtype, (params.lstm, params.w, x))
    _, state = lstm(of_lstm, x)
    return (state.h @ w).astype(params.b.dtype) + params.b[None, :]


def evaluation(loss: Loss, data: Any, key: PRNGKeyArray) -> Callable[[Any], dict[str, Array]]:
    """Metrics of the parameters on held-out `data`."""
    data = jax.tree.map(jnp.asarray, data)

    def metrics(params):
        value, others = loss(params, data, key)
        return {"loss": value, **others}

    return metrics


def train_readout(
    loss: Callable[[Gradient, Dtype], Loss],
    params: ReadoutParams,
    batch: Callable[[int], Any],
    key: PRNGKeyArray,
    held_out: dict[str, Any],
    *,
    model: ModelConfig,
    train: TrainConfig,
    compare_steps: int,
    session: Session,
    data_sha256: str = "",
) -> tuple[Trained, dict[str, float]]:
    """Train the model, evaluate it on `held_out`, and set the two gradients side by side.

    Args:
        loss: the task's loss under either gradient, with arithmetic in a dtype.
        held_out: batches by split; all but "test" are also evaluated during training.

    Returns:
        What training left, and scores: `<split>_<metric>` at the end, times, and the comparison of
        the gradients over the first `compare_steps` steps.
    """

    of_run = loss(model.gradient, model.dtype)
    evaluations = {split: evaluation(of_run, data, key) for split, data in held_out.items()}
    final = {"test": evaluations.pop("test")}
    optimizer = make_optimizer(train)
    trained = fit(
        of_run,
        params,
        optimizer,
        batch,
        key,
        train,
        evaluations=evaluations,
        final=final,
        session=session,
        data_sha256=data_sha256,
    )
    scores = final_scores(trained)
    if compare_steps:
        both: dict[str, Loss] = {name: loss(name, model.dtype) for name in GRADIENTS}
        scores |= compare(
            both,
            session.begin(params),
            optimizer,
            batch,
            key,
            steps=compare_steps,
            accumulate=train.accumulate,
        )
    return trained, scores
