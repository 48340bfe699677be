"""What training does with each gradient of the notes: the adding problem of `lstm_adding`, learned
with the gradient as printed, with o restored, with o and c_{t−1} restored, and right (L3–L8).

Everything but the gradient is the same: initial weights, sequences, optimiser. No claim rests on
the loss curves, for a wrong gradient may well go downhill: how far those of the notes lean towards
the right one, as a cosine, is measured at the first step.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.data.adding import CONSTANT_MSE, DataConfig, Sums, abstract_sums, draw_sums
from experiments.engine.config import Seed, Size
from experiments.engine.devices import ParallelConfig
from experiments.engine.memory import check_training
from experiments.engine.session import SILENT, Session
from experiments.engine.training import (
    Loss,
    TrainConfig,
    Trained,
    fit,
    make_optimizer,
)
from experiments.models.lstm import ModelConfig, ReadoutParams, abstract_readout, init_readout
from experiments.models.lstm_variants import GRADIENTS, Terms, last_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = "lstm_gradient"

LABELS = {"loss": "mean squared error"}
"""What the metrics are, on an axis."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the initial weights and the sequences."""
    runs: Size = 2
    """Trainings with each gradient, from other weights on other sequences."""
    hidden_size: Size = 32
    """Width H of the LSTM's state."""
    data: DataConfig = field(default_factory=lambda: DataConfig(length=50, held_out=512))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=500, batch_size=32, learning_rate=1e-2, log_every=20, evaluate_every=500
        )
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    runs=1,
    hidden_size=3,
    data=DataConfig(length=4, held_out=8),
    train=TrainConfig(steps=2, batch_size=4, log_every=1, evaluate_every=2),
)


class Result(NamedTuple):
    """Mean squared errors by gradient (in the order of GRADIENTS) and run."""

    steps: np.ndarray  # optimiser steps of the losses
    losses: np.ndarray  # (gradient, run, step): means over the steps since the last
    test_losses: np.ndarray  # (gradient, run)
    cosines: np.ndarray  # (gradient, run): with the right gradient, at the first step
    scores: dict[str, float]


def loss_under(terms: Terms) -> Loss:
    """Mean squared error of a batch, differentiated as `terms` says."""

    def loss(params, batch, key):
        h = last_output(terms, params.lstm, jnp.swapaxes(batch.x, 0, 1))
        answer = (h @ params.w + params.b[None, :])[:, 0]
        return jnp.mean((answer - batch.sums) ** 2), {}

    return loss


@jax.jit
def cosines_of(params: ReadoutParams, batch: Sums) -> Float[Array, " gradient"]:
    """Of the angle between each gradient of all weights and the right one."""
    gradients = [
        ravel_pytree(jax.grad(loss_under(terms), has_aux=True)(params, batch, None)[0])[0]
        for terms in GRADIENTS.values()
    ]
    units = jnp.stack([g / jnp.linalg.norm(g) for g in gradients])
    return units @ units[-1]


def _start(config: Config, key: PRNGKeyArray) -> tuple[ReadoutParams, Callable[[int], Sums], Sums]:
    """Weights, the batch of each step, and the test set of one training."""
    init_key, data_key, test_key = jax.random.split(key, 3)

    def draw(key: PRNGKeyArray, size: int) -> Sums:
        return draw_sums(key, size, config.data.length, "float32")

    params = init_readout(init_key, 2, 1, ModelConfig(config.hidden_size))
    batch = lambda step: draw(jax.random.fold_in(data_key, step), config.train.batch_size)
    return params, batch, draw(test_key, config.data.held_out)


def _train(
    config: Config,
    terms: Terms,
    params: ReadoutParams,
    batch: Callable[[int], Sums],
    test: Sums,
    key: PRNGKeyArray,
    session: Session,
    name: str,
) -> Trained:
    """The records are those of the training loss, and at last that of the test set."""
    loss = loss_under(terms)
    return fit(
        loss,
        params,
        make_optimizer(config.train),
        batch,
        key,
        config.train,
        evaluations={},
        final={"test": lambda params: {"loss": loss(params, test, key)[0]}},
        session=session,
        name=name,
    )


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory to train."""
    params = abstract_readout(2, 1, ModelConfig(config.hidden_size))
    batch, test = (
        abstract_sums(size, config.data.length, "float32")
        for size in (config.train.batch_size, config.data.held_out)
    )
    for terms in GRADIENTS.values():
        check_training(config.train, loss_under(terms), params, batch, data=test)


def run(config: Config, session: Session = SILENT) -> Result:
    """Train with each gradient, several times."""
    curves, test_losses, cosines = [], [], []
    # the records get the gradient's name before they are logged
    quiet = replace(session, log=SILENT.log)
    for n, key in enumerate(jax.random.split(jax.random.key(config.seed), config.runs)):
        params, batch, test = _start(config, key)
        cosines.append(cosines_of(params, batch(0)))
        for name, terms in GRADIENTS.items():
            name_of_run = f"run {n}, {name}"
            trained = _train(config, terms, params, batch, test, key, quiet, name_of_run)
            for record in trained.records:
                session.log(record | {"gradient": name})
            *curve, last = trained.records
            curves.append([record["loss"] for record in curve])
            test_losses.append(float(last["loss"]))
    shape = (config.runs, len(GRADIENTS))
    return Result(
        steps=np.array([record["step"] for record in curve]),
        losses=np.array(curves, np.float64).reshape(*shape, -1).swapaxes(0, 1),
        test_losses=np.array(test_losses, np.float64).reshape(shape).T,
        cosines=np.array(cosines).T,
        scores={
            "constant_loss": CONSTANT_MSE,
            **{
                f"test_loss_{name.replace(' ', '_')}": float(np.median(test_losses[k :: shape[1]]))
                for k, name in enumerate(GRADIENTS)
            },
        },
    )


def plot(config: Config, result: Result) -> "Figure":
    """The loss curves, every run of them, and the loss on the test set."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, new_figure

    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.8, 1))
    runs = result.losses.shape[1]
    styles = zip(GRADIENTS, (RED, ORANGE, GREEN, BLUE), ("--", "-.", ":", "-"), strict=True)
    for k, (name, colour, line) in enumerate(styles):
        for losses in result.losses[k]:
            left.plot(result.steps, losses, color=colour, linestyle=line, alpha=0.4, linewidth=1)
        typical = np.exp(np.mean(np.log(result.losses[k]), axis=0))
        left.plot(result.steps, typical, color=colour, linestyle=line, linewidth=2.2, label=name)
        right.plot(np.full(runs, k), result.test_losses[k], "o", color=colour,
                   markerfacecolor="none")  # fmt: skip
    for axes in (left, right):
        axes.axhline(CONSTANT_MSE, color=BLACK, linewidth=1, label="always answering 1: 1/6")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    left.set(xlabel="optimiser step", ylabel="mean squared error (training)")
    left.legend(fontsize=8, loc="lower left")
    labels = [
        f"{textwrap.fill(name, 10)}\ncos {np.mean(cosines):.2f}"
        for name, cosines in zip(GRADIENTS, result.cosines, strict=True)
    ]
    right.set_xticks(range(len(labels)), labels, fontsize=8)
    right.set(ylabel="mean squared error (test)", xlim=(-0.5, len(labels) - 0.5))
    figure.suptitle(
        f"Adding problem: {runs} trainings with each gradient (bold: geometric mean; cos: with the "
        "right gradient, at the first step)",
        fontsize=10,
    )
    return figure
