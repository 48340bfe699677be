"""Training on several devices is training on one; the suite has eight: see `conftest.py`."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.__main__ import main
from experiments.data.images import image_batches
from experiments.data.sources import DataConfig, load_images
from experiments.data.text import load_text, text_windows
from experiments.engine import devices as mesh
from experiments.engine.config import UsageError
from experiments.engine.devices import ParallelConfig
from experiments.engine.session import Session
from experiments.engine.training import (
    Loss,
    TrainConfig,
    Trained,
    fit,
    make_optimizer,
    shardings,
    start,
    train_step,
)
from experiments.models import text as lstm_text, vit

STEPS, ROWS = 20, 24
TRAIN = TrainConfig(
    steps=STEPS, batch_size=ROWS, log_every=1, evaluate_every=STEPS, checkpoint_every=3
)
KEY = 3


class Task(NamedTuple):
    """What `fit` is given of a model."""

    loss: Loss
    params: Any
    batch: Any
    carry: Any = None


@cache
def lstm(dtype: str) -> Task:
    """Two layers with dropout between them, and states that go on from step to step."""
    text = load_text(None, rows=ROWS, window=5)
    model = lstm_text.TextModelConfig(hidden_size=16, dtype=dtype)  # type: ignore[arg-type]
    params = lstm_text.init_text(jax.random.key(0), len(text.characters), model)
    return Task(
        lstm_text.loss_under("hand", 0.3),
        params,
        lambda step: text_windows(text.train, step, ROWS, 5),
        lstm_text.zero_states(params, ROWS),
    )


@cache
def transformer(dtype: str) -> Task:
    digits = load_images(DataConfig(), 0, dtype).train
    config = vit.ViTConfig(width=32, dropout=0.2, drop_path=0.2)
    params, apply = vit.functional(vit.build(config, (8, 8, 1), 10))
    return Task(vit.loss_of(apply), params, image_batches(digits, 0, ROWS, shift=1))


TASKS = {"lstm": lstm, "vit": transformer}
OPTIMIZER = make_optimizer(TRAIN)


def train(
    task: Task, data: int = 1, fsdp: int = 1, folder: Path | None = None, accumulate: int = 1,
    **change,
) -> Trained:  # fmt: skip
    task = task._replace(**change)
    session = Session(folder=folder, mesh=mesh.make_mesh(ParallelConfig(data, fsdp)))
    return fit(
        task.loss, task.params, OPTIMIZER, task.batch, jax.random.key(KEY),
        replace(TRAIN, accumulate=accumulate),
        carry=task.carry, evaluations={}, final={"last": size_of}, session=session,
    )  # fmt: skip


def size_of(params):
    return {"size": sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))}


def losses(trained: Trained) -> np.ndarray:
    return np.array([r["loss"] for r in trained.records if r["split"] == "train"])


@cache
def on_one(model: str, dtype: str) -> Trained:
    return train(TASKS[model](dtype))


DIVISIONS = [(2, 1), (2, 2), (1, 8)]
# every model and every dtype in every division, and every model in every dtype that it has
LOSSES = [
    *(("lstm", "float64", 1e-9, *division) for division in DIVISIONS),
    *(("vit", "float32", 1e-5, *division) for division in DIVISIONS),
    ("lstm", "float32", 1e-5, 2, 2),
]
OFTEN = ("lstm", "float64", 1e-9, 2, 2), ("vit", "float32", 1e-5, 1, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, dtype, tolerance, data, fsdp",
    [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.thorough) for case in LOSSES],
)
def test_losses_are_those_of_one_device(model, dtype, tolerance, data, fsdp):
    one = on_one(model, dtype)
    several = train(TASKS[model](dtype), data, fsdp)
    assert len(losses(several)) == STEPS
    np.testing.assert_allclose(losses(several), losses(one), rtol=tolerance)
    before, after = (float(trained.records[-1]["size"]) for trained in (one, several))
    np.testing.assert_allclose(after, before, rtol=1e-4)
    # what is left is on one device, for whatever is done with it next
    for x in jax.tree.leaves(several.params):
        assert x.devices() == {jax.devices()[0]}


@pytest.mark.slow
@pytest.mark.parametrize("model", TASKS)
def test_a_batch_in_parts_has_the_same_losses_on_several_devices(model):
    task = TASKS[model]("float32")
    one, several = train(task, accumulate=3), train(task, 2, 2, accumulate=3)
    np.testing.assert_allclose(losses(several), losses(one), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, accumulate", [(8, 1, 1), (2, 4, 1), (2, 4, 3)])
@pytest.mark.parametrize("model", TASKS)
def test_only_parameters_are_gathered(model, data, fsdp, accumulate):
    """Each once, and only with fsdp: no device sees the others' examples, or what comes of them."""
    task, devices = TASKS[model]("float32"), mesh.make_mesh(ParallelConfig(data, fsdp))
    assert devices is not None
    state = start(task.params, OPTIMIZER, task.carry)
    state = mesh.put(state, shardings(state, devices))
    batch = task.batch(0)
    batch = mesh.put(batch, mesh.rows(batch, devices))
    step = train_step.lower(
        task.loss, OPTIMIZER, state, batch, jax.random.key(KEY), skip=False, mesh=devices,
        accumulate=accumulate,
    ).compile()  # fmt: skip
    hlo = step.as_text() or ""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", hlo)
    gathered = Counter(tuple(sorted(map(int, shape.split(",")))) for shape in shapes)
    params = jax.tree.leaves(state.params)
    cut = Counter(tuple(sorted(x.shape)) for x in params if not x.sharding.is_fully_replicated)
    assert bool(cut) == bool(gathered) == (fsdp > 1)
    # that of a small one may be gathered, too, with what it was computed beside
    assert cut <= gathered and set(gathered) <= {tuple(sorted(x.shape)) for x in params}
    assert not re.search("all-to-all|collective-permute", hlo)
    for x in jax.tree.leaves((batch, state.carry)):
        assert x.ndim == 0 or x.addressable_data(0).shape[0] == ROWS // 8
    after, _ = step(state, batch, jax.random.key(KEY))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_what_is_large_is_cut_along_its_longest_axis_that_can_be():
    devices = mesh.make_mesh(ParallelConfig(2, 4))
    assert devices is not None
    shapes = {
        (32, 64): P(None, "fsdp"),
        (64, 32): P("fsdp"),
        (64, 66): P("fsdp"),
        (33, 66): P(),
        (2, 512, 8): P(None, "fsdp"),
        (1024,): P("fsdp"),
        (1020,): P(),
        (): P(),
    }
    tree = {shape: jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes}
    found = mesh.shares(tree, devices)
    assert {shape: sharding.spec for shape, sharding in found.items()} == shapes


# ---- checkpoints -----------------------------------------------------------------------------


def fails_at(fatal: int, batch):
    def until(step):
        if step == fatal:
            raise RuntimeError("no luck")
        return batch(step)

    return until


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, shapes", [("lstm", [(2, 2), (1, 1), (1, 8)]), ("vit", [(2, 2)])], ids=TASKS
)
def test_checkpoints_open_on_any_number_of_devices(model, shapes, tmp_path):
    task = TASKS[model]("float32")
    for fatal, shape in zip((5, 9, 15), shapes, strict=False):
        with pytest.raises(RuntimeError, match="no luck"):
            train(task, shape[0], shape[1], tmp_path, batch=fails_at(fatal, task.batch))
    again = train(task, 2, 1, tmp_path)
    np.testing.assert_allclose(losses(again), losses(on_one(model, "float32")), rtol=1e-5)


def test_a_run_goes_on_as_if_it_was_not_cut_off_on_devices_like_those_before(tmp_path):
    task = lstm("float32")
    whole = train(task, 2, 2)
    with pytest.raises(RuntimeError, match="no luck"):
        train(task, 2, 2, tmp_path, batch=fails_at(11, task.batch))
    again = train(task, 2, 2, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    np.testing.assert_array_equal(losses(again), losses(whole))


def test_a_checkpoint_of_another_shape_is_an_error_on_any_devices(tmp_path):
    task = lstm("float32")
    with pytest.raises(RuntimeError, match="no luck"):
        train(task, 1, 4, tmp_path, batch=fails_at(4, task.batch))
    params = task.params._replace(w=task.params.w[:, :-1], b=task.params.b[:-1])
    with pytest.raises(UsageError, match="training/params/w: expected "):
        train(task, 2, 2, tmp_path, params=params)


# ---- from the command line -------------------------------------------------------------------

ADDING = (
    "--train.steps 4 --train.batch-size 8 --train.log-every 2 --train.evaluate-every 2"
    " --model.hidden-size 16 --compare-steps 0 --data.length 4 --data.held-out 8"
).split()


def run(output: Path, *options: str) -> int:
    return main(["run", "lstm_adding", *ADDING, "--output", str(output),
                 "--name", "x", *options])  # fmt: skip


def test_a_run_goes_on_with_other_devices_and_says_so_in_its_config(tmp_path, capsys):
    assert run(tmp_path, "--parallel.data", "2", "--parallel.fsdp", "4") == 0
    folder = tmp_path / "lstm_adding" / "x"
    result = (folder / "result.npz").read_bytes()
    (folder / "summary.json").unlink()
    assert run(tmp_path, "--resume", "--parallel.data", "2", "--seed", "5") == 2
    message = capsys.readouterr().err
    assert "seed" in message and "parallel" not in message
    assert run(tmp_path, "--resume", "--parallel.data", "2") == 0
    assert (folder / "result.npz").read_bytes() == result
    assert "[parallel]\ndata = 2\nfsdp = 1\n" in (folder / "config.toml").read_text()


@pytest.mark.parametrize(
    "options, parts",
    [
        (
            ["--parallel.data", "4", "--parallel.fsdp", "4"],
            ["parallel.data × parallel.fsdp = 4 × 4 = 16", "at most", "got 8", "JAX_NUM_CPU_DEV"],
        ),
        (
            ["--parallel.data", "3"],
            ["train.batch_size", "multiple of parallel.data × parallel.fsdp = 3 × 1", "got 8"],
        ),
        (
            ["--parallel.data", "2", "--train.accumulate", "3"],
            ["multiple of train.accumulate = 3 times parallel.data × parallel.fsdp = 2", "got 8"],
        ),
        (["--train.accumulate", "3"], ["multiple of train.accumulate = 3", "got 8"]),
        (["--parallel.fsdp", "0"], ["parallel.fsdp: should be greater than 0, got 0"]),
    ],
)
def test_devices_that_will_not_do_are_an_error_before_anything_compiles(
    options, parts, tmp_path, capsys
):
    with jax.no_tracing():
        assert run(tmp_path / "outputs", *options) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in parts:
        assert part in message
    assert not (tmp_path / "outputs").exists()
