"""The one training loop: it takes a loss and an optimiser, and knows no model.

A loss is `loss(params, batch, key) -> (scalar, metrics)`, where `key` is for whatever is random in
it. One that hands something on from step to step, as a recurrent state, has a carry as well:
`loss(params, batch, key, carry) -> (scalar, (metrics, carry))`. A batch function is
`batch(step) -> pytree of arrays`: as the data's order follows from the step alone, the step is all
there is to say about where a run stands in its data.
"""

import datetime
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, PRNGKeyArray, PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.engine import devices as meshes, processes
from experiments.engine.checkpoints import Progress as Kept, Record
from experiments.engine.config import Count, Fraction, NonNegative, Positive, Size, UsageError
from experiments.engine.session import SILENT, Session, Stopped, deferred_signals

Metrics = Mapping[str, Float[Array, ""]]
Loss = Callable[..., tuple[Float[Array, ""], Any]]


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, learning-rate schedule, logging and checkpoints."""

    steps: Count = 20
    """Optimiser steps."""
    init: Annotated[str | None, tyro.conf.arg(aliases=("--init",), metavar="RUN|FILE")] = None
    """Start from these weights: the folder of a run, or a .safetensors or .npz file."""
    batch_size: Size = 16
    """Examples in each step."""
    accumulate: Count = 1
    """Parts that a step takes its batch in, one after another, for less memory: the loss and the
    gradient are those of the whole batch, but for dropout, which each part draws for itself."""
    optimizer: Literal["adamw", "sgd", "lion"] = "adamw"
    """AdamW, gradient descent with momentum, or Lion, which wants about a tenth of AdamW's learning
    rate."""
    momentum: Fraction = 0.9
    """Of sgd: the share of the last step's direction that is added to the gradient."""
    learning_rate: Positive = 1e-2
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or cosine decay to zero."""
    warmup: Fraction = 0.05
    """Fraction of the steps over which the learning rate rises linearly from zero."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Biases, by their name, and all other
    arrays of one axis, as the scales of norms, are spared."""
    ema: Fraction = 0.0
    """Share of itself that an exponential mean of the parameters keeps at a step, as 0.999. It is
    evaluated beside them, as the splits validation_ema and test_ema, and kept for the --ema of
    export, evaluate and sample; 0: none."""
    clip_norm: Positive = 1.0
    """Clip gradients to this global norm."""
    log_every: Count = 5
    """Steps between log entries; training metrics are averaged over them."""
    evaluate_every: Count = 10
    """Steps between evaluations on held-out data."""
    checkpoint_every: Count = 500
    """Steps between checkpoints, for --resume; the last step is always saved."""
    checkpoints_kept: Count = 2
    """Number of recent checkpoints to keep."""
    best: str | None = None
    """Also keep the checkpoint with the best value of this metric, for example validation_loss: the
    highest accuracy, or the lowest of any other. Every evaluation then saves a checkpoint."""
    not_finite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinite loss or gradient: stop, or skip the step."""


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int32[Array, ""]
    params: PyTree
    optimizer: PyTree
    carry: PyTree = None
    """What the loss was handed by the step before, or None if it takes nothing."""


class Trained(NamedTuple):
    """What training leaves behind."""

    params: PyTree
    records: list[Record]
    compile_seconds: float
    train_seconds: float


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: a linear rise from zero, then constant or a cosine down to zero."""
    # at least the last step is left for what comes after
    warmup = min(round(config.warmup * config.steps), config.steps - 1)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, config.steps - warmup)
    else:
        rest = optax.constant_schedule(config.learning_rate)
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup + 1)
    # step 0 takes the first non-zero value of the rise: no step is spent on a rate of zero
    return optax.join_schedules([lambda step: rise(step + 1), rest], [warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The config's optimiser along its schedule, after clipping by global norm."""
    directions = {
        "adamw": optax.scale_by_adam(),
        "sgd": optax.trace(config.momentum),
        "lion": optax.scale_by_lion(),
    }
    parts = [
        optax.clip_by_global_norm(config.clip_norm),
        directions[config.optimizer],
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(make_schedule(config)),
    ]
    return optax.chain(*parts, *[exponential_mean(config.ema)] * (config.ema > 0))


def decayed(params: PyTree) -> PyTree:
    """Which arrays weight decay falls on: those of several axes that are no bias.

    The name counts as well as the axes: a bias of several heads has two.
    """

    def falls_on(path: Any, x: Any) -> bool:
        return x.ndim > 1 and "bias" not in jax.tree_util.keystr(path, simple=True, separator="/")

    return jax.tree.map_with_path(falls_on, params)


class MeanState(NamedTuple):
    """What an exponential mean of the parameters keeps, under names that `read_params` knows."""

    steps: Int32[Array, ""]
    mean: PyTree


def exponential_mean(decay: float) -> optax.GradientTransformation:
    """Keeps a mean of the parameters after each step, and leaves the steps as they are.

    Of the parameters so many steps ago the weight is in proportion to that power of `decay`. The
    weights sum to one from the first step on, so that where training began has none.
    """

    def update(updates: PyTree, state: MeanState, params: PyTree) -> tuple[PyTree, MeanState]:
        steps, after = state.steps + 1, optax.apply_updates(params, updates)
        # (1 - decay) / (1 - decay^steps), whose last difference would cancel
        of_newest = (1 - decay) / -jnp.expm1(steps.astype(jnp.float32) * math.log(decay))
        move = lambda mean, new: mean + of_newest.astype(mean.dtype) * (new - mean)
        return updates, MeanState(steps, jax.tree.map(move, state.mean, after))

    init = lambda params: MeanState(jnp.zeros((), jnp.int32), params)
    return optax.GradientTransformation(init, update)


def evaluated(state: TrainState) -> dict[str, PyTree]:
    """The parameters that evaluations read, by what the name of a split is followed by."""
    is_mean = lambda x: isinstance(x, MeanState)
    for kept in jax.tree.leaves(state.optimizer, is_leaf=is_mean):
        if is_mean(kept):
            return {"": state.params, "_ema": kept.mean}
    return {"": state.params}


def start(
    params: PyTree, optimizer: optax.GradientTransformation, carry: PyTree = None
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry)


def shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where on the mesh each array of the state lies."""
    shared = meshes.shares(state._replace(carry=None), mesh)
    return shared._replace(carry=meshes.rows(state.carry, mesh))


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("skip", "mesh", "accumulate"))
def train_step(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, batch: Any,
    key: PRNGKeyArray, *, skip: bool, mesh: Mesh | None, accumulate: int = 1,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One step of the optimiser: the next state and the batch's metrics.

    The batch is taken in `accumulate` parts, one after another.
    With `skip`, a loss or a gradient that is not finite changes nothing but the number of the step,
    and the metrics say whether the step was `skipped`. With a mesh, the state comes out lying as it
    came in. It is compiled once for all runs with the same loss and optimiser: the same objects, as
    JAX tells functions apart by identity.
    """
    key = jax.random.fold_in(key, state.step)
    params = state.params
    if mesh is not None:
        # each is put together once, not its parts exchanged wherever it is used
        params = jax.lax.with_sharding_constraint(params, meshes.whole(mesh))
    differentiate = _differentiated if accumulate == 1 else partial(_in_turn, accumulate)
    grads, metrics, carry = differentiate(loss, params, batch, key, state.carry)
    # optax mixes its integer counts with floats, which strict promotion refuses
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
    after = TrainState(state.step, params, moments, carry)
    metrics |= {"gradient_norm": norm}
    if skip:
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        metrics["skipped"] = jnp.logical_not(finite).astype(metrics["loss"].dtype)
    after = after._replace(step=state.step + 1)
    if mesh is not None:
        after = jax.lax.with_sharding_constraint(after, shardings(after, mesh))
    return after, metrics


def _differentiated(
    loss: Loss, params: PyTree, batch: Any, key: PRNGKeyArray, carry: PyTree
) -> tuple[PyTree, dict[str, Array], PyTree]:
    """The gradient of a batch, its metrics with the loss, and what the loss carries on."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if carry is None:
        (value, metrics), grads = gradient(params, batch, key)
    else:
        (value, (metrics, carry)), grads = gradient(params, batch, key, carry)
    return grads, {"loss": value, **metrics}, carry


def _in_turn(
    parts: int, loss: Loss, params: PyTree, batch: Any, key: PRNGKeyArray, carry: PyTree
) -> tuple[PyTree, dict[str, Array], PyTree]:
    """The same of a batch in so many parts, of which one at a time is in memory."""

    def add(total: PyTree, part: Any) -> Any:
        number, batch, carry = part
        of_part = jax.random.fold_in(key, number)
        grads, metrics, carry = _differentiated(loss, params, batch, of_part, carry)
        return jax.tree.map(jnp.add, total, grads), (metrics, carry)

    numbered = (jnp.arange(parts, dtype=jnp.int32), in_parts(batch, parts), in_parts(carry, parts))
    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (metrics, carry) = jax.lax.scan(add, zeros, numbered)
    grads, metrics = (
        jax.tree.map(lambda x: x / parts, total),
        {name: jnp.mean(values, axis=0) for name, values in metrics.items()},
    )
    return grads, metrics, jax.tree.map(_joined, carry)


def in_parts(tree: PyTree, parts: int) -> PyTree:
    """Arrays (B, …) as (parts, B / parts, …), and numbers once for each part.

    Part n has the rows n, n + parts, …: where the rows are divided among devices, each has its
    share of every part.
    """

    def split(x: Any) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        return jnp.swapaxes(jnp.reshape(x, (-1, parts, *x.shape[1:])), 0, 1)

    return jax.tree.map(split, tree)


def _joined(x: Array) -> Array:
    """Undoes `in_parts`; of a number, the last part's."""
    return x[-1] if x.ndim == 1 else jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def fit(
    loss: Loss,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    batch: Callable[[int], Any],
    key: PRNGKeyArray,
    config: TrainConfig,
    *,
    carry: PyTree = None,
    evaluations: Mapping[str, Callable[[Any], Metrics]],
    final: Mapping[str, Callable[[Any], Metrics]],
    session: Session = SILENT,
    name: str = "",
    data_sha256: str = "",
) -> Trained:
    """Train, logging means of the metrics and evaluations on the way.

    The device is waited for at the logged steps only. Compilation happens once, beforehand. If the
    session has a checkpoint of this training, it goes on from there: all that it returns and logs,
    times apart, is what it would have been without the interruption. On a mesh, the batch of each
    step is divided among the devices, and all of them evaluate; what is returned is on one device.

    Args:
        carry: what the loss is given at the first step, if it has one.
        evaluations: by the name of a split, metrics of the parameters on it; also after the end.
            Those of an exponential mean of them, if the optimiser has one, are beside, as those of
            a split `<name>_ema`.
        final: the same, but after the end only.
        session: is given each record as it comes, keeps the checkpoints, and has the mesh.
        name: of this training, if the session has several.
        data_sha256: a checksum of the data, if they are from outside: no checkpoint of a training
            on others is gone on from.

    Raises:
        FloatingPointError: if a metric is not finite, naming the first such step and the metric.
        Stopped: after a checkpoint, if the process was asked to stop.
        UsageError: if the config's `best` is no metric of the evaluations.
    """
    state = start(session.begin(params), optimizer, carry)
    steps, skip, mesh = config.steps, config.not_finite == "skip", session.mesh
    if mesh is not None:
        state, batch, key = _spread(state, batch, key, mesh)
    _check_best(config.best, evaluations, state)
    kept_of = session.checkpoints(name, config.checkpoints_kept, config.best, data_sha256)
    with kept_of as checkpoints, _progress() as progress:
        # a second signal ends the process as it is, and the cursor should be there then
        progress.console.show_cursor(True)
        done, state, kept = (checkpoints and checkpoints.load(state, key)) or (
            0, state, Kept([], [], 0.0)
        )  # fmt: skip
        records: list[Record] = []
        window: list[Any] = list(kept.window)

        def emit(record: Record) -> None:
            records.append(record)
            session.log(record)

        def tell(record: Record) -> None:
            if not sys.stderr.isatty() and processes.is_first():
                seconds = (time.perf_counter() - clock) / (step - done) * (steps - step)
                with suppress(OSError):  # whoever read them may be gone; the run is kept
                    print(_line(name, record, steps, seconds), file=sys.stderr, flush=True)

        for record in kept.records:
            emit(record)
        if done == steps:
            return Trained(_gathered(state.params, mesh), records, 0.0, kept.seconds)

        bar = progress.add_task("compiling", total=steps, completed=done, values="")
        clock = time.perf_counter()
        step_of = train_step.lower(
            loss, optimizer, state, batch(0), key, skip=skip, mesh=mesh,
            accumulate=config.accumulate,
        )  # fmt: skip
        advance = step_of.compile()
        evaluate, conclude = (
            {split: jax.jit(f).lower(state.params).compile() for split, f in functions.items()}
            for functions in (evaluations, final)
        )
        compile_seconds = time.perf_counter() - clock
        progress.update(bar, description="training")

        clock = since = time.perf_counter()
        with deferred_signals(checkpoints is not None) as stop:
            left, wait = range(done + 1, steps + 1), lambda: jax.block_until_ready(state)
            for step in session.profiled(name, left, wait):
                state, metrics = advance(state, batch(step - 1), key)
                window.append(metrics)
                logged = step % config.log_every == 0 or step == steps
                if logged:
                    values = _mean(window, step)
                    speed = len(window) / (time.perf_counter() - since)
                    emit({"step": step, "split": "train", **values, "steps_per_second": speed})
                    tell(records[-1])
                    progress.update(bar, completed=step, values=_brief(values, speed))
                    window, since = [], time.perf_counter()
                best: dict[str, float] | None = None
                if step % config.evaluate_every == 0 or step == steps:
                    paused = time.perf_counter()
                    due = evaluate | conclude if step == steps else evaluate
                    pairs = itertools.product(due.items(), evaluated(state).items())
                    for (split, f), (suffix, params) in pairs:
                        split += suffix
                        values = _mean([f(params)], step, f"{split} ")
                        emit({"step": step, "split": split, **values})
                        tell(records[-1])
                        found = {f"{split}_{metric}": value for metric, value in values.items()}
                        if config.best in found:
                            best = {config.best: found[config.best]}
                    since += time.perf_counter() - paused
                # several processes, of which one may have been asked, agree where they wait anyway
                stopping = (logged or processes.alone()) and processes.any_says(stop.requested)
                last = step == steps or stopping
                if checkpoints and (best or last or step % config.checkpoint_every == 0):
                    window = _finite(window, step)
                    seconds = kept.seconds + time.perf_counter() - clock
                    progressed = Kept(records.copy(), window.copy(), seconds)
                    checkpoints.save(step, state, key, progressed, best)
                if stopping:
                    break
        if checkpoints:
            checkpoints.wait()
        # or it was asked to after its last step
        if stopping or processes.any_says(stop.requested):
            raise Stopped(f"stopped after step {step} of {steps}")
    seconds = kept.seconds + time.perf_counter() - clock
    return Trained(_gathered(state.params, mesh), records, compile_seconds, seconds)


def _check_best(
    best: str | None, evaluations: Mapping[str, Callable[[Any], Metrics]], state: TrainState
) -> None:
    if best is None:
        return
    names = [
        f"{split}{suffix}_{key}"
        for split, f in evaluations.items()
        for suffix in evaluated(state)
        for key in jax.eval_shape(f, state.params)
    ]
    if best not in names:
        there = f"one of {', '.join(names)}" if names else "left out, as nothing is evaluated"
        raise UsageError(f"train.best: should be {there}, got {best}")


def _spread(
    state: TrainState, batch: Callable[[int], Any], key: PRNGKeyArray, mesh: Mesh
) -> tuple[TrainState, Callable[[int], Any], PRNGKeyArray]:
    """What training begins with, and the batches to come, where they belong on the mesh."""

    def divided(step: int) -> Any:
        examples = batch(step)
        return meshes.put(examples, meshes.rows(examples, mesh))

    placed = meshes.put(state, shardings(state, mesh))
    return placed, divided, meshes.put(key, meshes.whole(mesh))


def _gathered(params: PyTree, mesh: Mesh | None) -> PyTree:
    return params if mesh is None else meshes.take(params, mesh)


def final_scores(trained: Trained) -> dict[str, float]:
    """The last values of each split, named `<split>_<metric>`, and the times."""
    last = {
        f"{record['split']}_{name}": float(value)
        for record in trained.records
        for name, value in record.items()
        if name not in ("step", "split")
    }
    times = ("compile_seconds", "train_seconds")
    return last | {name: getattr(trained, name) for name in times}


def compare(
    losses: Mapping[str, Loss],
    params: PyTree,
    optimizer: optax.GradientTransformation,
    batch: Callable[[int], Any],
    key: PRNGKeyArray,
    *,
    carry: PyTree = None,
    steps: int,
    accumulate: int = 1,
) -> dict[str, float]:
    """Take the first `steps` steps of a run under each of `losses`, turn by turn.

    Returns:
        `<name>_step_seconds`, the median time of a step under each, and
        `<name>_<name>_loss_difference`, the largest relative difference of their losses at a step.
    """
    first = start(params, optimizer, carry)
    compiled = {
        name: train_step.lower(
            loss, optimizer, first, batch(0), key, skip=False, mesh=None, accumulate=accumulate
        ).compile()
        for name, loss in losses.items()
    }
    states = dict.fromkeys(losses, first)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    difference = 0.0
    for step in range(steps):
        data = jax.block_until_ready(batch(step))
        values = []
        for name, advance in compiled.items():
            clock = time.perf_counter()
            states[name], metrics = jax.block_until_ready(advance(states[name], data, key))
            seconds[name].append(time.perf_counter() - clock)
            values.append(float(metrics["loss"]))
        largest = max(map(abs, values)) or 1.0
        difference = max(difference, (max(values) - min(values)) / largest)
    medians = {f"{name}_step_seconds": float(np.median(t)) for name, t in seconds.items()}
    return medians | {f"{'_'.join(losses)}_loss_difference": difference}


def _finite(window: list[Any], last: int, split: str = "") -> list[dict[str, float]]:
    """The numbers of a window of metrics that ends with step `last`.

    Raises:
        FloatingPointError: if one of a step that was not skipped is not finite.
    """
    fetched = jax.device_get(window)
    for step, metrics in enumerate(fetched, start=last - len(fetched) + 1):
        # a compiled function returns its metrics sorted by name; the loss is to be named first
        for name in sorted(metrics, key=lambda name: name != "loss"):
            if not np.isfinite(metrics[name]) and not metrics.get("skipped"):
                raise FloatingPointError(f"step {step}: {split}{name} is {metrics[name]}")
    return [{name: float(value) for name, value in metrics.items()} for metrics in fetched]


def _mean(window: list[Any], last: int, split: str = "") -> dict[str, float]:
    """Means over a window of metrics that ends with step `last`, of the steps not skipped.

    Raises:
        FloatingPointError: if one is not finite, or if every step was skipped.
    """
    numbers = _finite(window, last, split)
    taken = [metrics for metrics in numbers if not metrics.get("skipped")]
    if not taken:
        raise FloatingPointError(f"step {last}: the last {len(window)} steps were all skipped")
    names = sorted(taken[0], key=lambda name: name != "loss")
    means = {name: float(np.mean([metrics[name] for metrics in taken])) for name in names}
    if "skipped" in means:
        means["skipped"] = len(numbers) - len(taken)
    return means


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (processes.is_first() and sys.stdout.isatty() and sys.stderr.isatty()),
    )


def _brief(values: Mapping[str, float], speed: float) -> str:
    shown = [f"{name} {values[name]:.4f}" for name in ("loss", "accuracy") if name in values]
    return "  ".join([*shown, f"{speed:.0f} steps/s"])


def _line(name: str, record: Record, steps: int, seconds: float) -> str:
    """A record for a log, with what is left of the training."""
    numbers = {key: value for key, value in record.items() if key not in ("step", "split")}
    shown = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    left = datetime.timedelta(seconds=round(seconds))
    of_training = f"{name}: " if name else ""
    return f"{of_training}step {record['step']} of {steps}: {record['split']}: {shown}; {left} left"
