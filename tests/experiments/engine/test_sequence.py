"""Training on windows that lie on several devices is training on one; the suite has eight."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.data.text import load_text, text_excerpts
from experiments.engine import devices as mesh
from experiments.engine.devices import ParallelConfig
from experiments.engine.session import Session
from experiments.engine.training import (
    TrainConfig,
    Trained,
    fit,
    make_optimizer,
    shardings,
    start,
    train_step,
)
from experiments.models.attention_text import TransformerConfig, init_transformer, loss_under
from tests.experiments.sizes import tiny_options

pytestmark = pytest.mark.slow

STEPS, ROWS, WINDOW = 20, 8, 32
TEXT = load_text(None, rows=ROWS, window=WINDOW)
KEY = 3


def train_config(accumulate: int) -> TrainConfig:
    return TrainConfig(
        steps=STEPS,
        batch_size=ROWS,
        accumulate=accumulate,
        log_every=1,
        evaluate_every=STEPS,
        checkpoint_every=3,
    )


OPTIMIZER = make_optimizer(train_config(1))


def model(dtype: str) -> TransformerConfig:
    return TransformerConfig(width=32, num_heads=4, dropout=0.2, dtype=dtype)  # type: ignore[arg-type]


@cache
def params(dtype: str):
    return init_transformer(jax.random.key(0), len(TEXT.characters), model(dtype))


def batch(step: int):
    return text_excerpts(TEXT.train, 0, step, ROWS, WINDOW)


def train(
    shape: tuple[int, int, int], dtype: str = "float32", folder: Path | None = None,
    accumulate: int = 1, remat: Literal["none", "blocks"] = "none", batch=batch,
) -> Trained:  # fmt: skip
    devices = mesh.make_mesh(ParallelConfig(*shape))
    return fit(
        loss_under(replace(model(dtype), remat=remat), devices), params(dtype), OPTIMIZER, batch,
        jax.random.key(KEY),
        train_config(accumulate), evaluations={}, final={},
        session=Session(folder=folder, mesh=devices),
    )  # fmt: skip


def losses(trained: Trained) -> np.ndarray:
    return np.array([r["loss"] for r in trained.records if r["split"] == "train"])


@cache
def on_one(dtype: str = "float32", accumulate: int = 1) -> np.ndarray:
    return losses(train((1, 1, 1), dtype, accumulate=accumulate))


@pytest.mark.parametrize(
    "shape, dtype, tolerance, accumulate, remat",
    [
        *(
            pytest.param(shape, "float32", 1e-5, 1, "none", marks=pytest.mark.thorough)
            for shape in ((1, 1, 2), (1, 1, 8), (2, 1, 1))
        ),
        ((2, 1, 2), "float64", 1e-9, 1, "blocks"),
        ((2, 2, 2), "float32", 1e-5, 2, "none"),
    ],
)
def test_losses_are_those_of_one_device(shape, dtype, tolerance, accumulate, remat):
    """With dropout, too, which follows from a character's place in the whole batch."""
    several = losses(train(shape, dtype, accumulate=accumulate, remat=remat))
    assert len(several) == STEPS and several[-1] < 0.8 * several[0]
    np.testing.assert_allclose(several, on_one(dtype, accumulate), rtol=tolerance)


def test_a_device_has_its_part_of_each_window_and_is_sent_no_other_but_keys_and_values():
    devices = mesh.make_mesh(ParallelConfig(2, 2, 2))
    assert devices is not None
    state = start(params("float32"), OPTIMIZER)
    state = mesh.put(state, shardings(state, devices))
    placed = mesh.put(batch(0), mesh.rows(batch(0), devices))
    for x in placed:
        assert x.addressable_data(0).shape == (ROWS // 4, WINDOW // 2)
    step = train_step.lower(
        loss_under(model("float32"), devices), OPTIMIZER, state, placed, jax.random.key(KEY),
        skip=False, mesh=devices,
    ).compile()  # fmt: skip
    hlo = step.as_text() or ""
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", hlo)
    of_params = {tuple(sorted(x.shape)) for x in jax.tree.leaves(state.params)}
    assert {tuple(sorted(map(int, shape.split(",")))) for shape in gathered} <= of_params
    assert "collective-permute" in hlo and "all-to-all" not in hlo


def test_checkpoints_open_on_any_number_of_devices_to_a_sequence(tmp_path):
    def until(step):
        if step == 5:
            raise RuntimeError("no luck")
        return batch(step)

    with pytest.raises(RuntimeError, match="no luck"):
        train((1, 1, 2), folder=tmp_path, batch=until)
    again = train((2, 1, 4), folder=tmp_path)
    np.testing.assert_allclose(losses(again), on_one(), rtol=1e-5)


# ---- from the command line -------------------------------------------------------------------


def run(name: str, output: Path, *options: str) -> int:
    own = ["--output", str(output), "--name", "x", *options]
    return main(["run", name, *tiny_options(name), *own])


def test_a_run_is_profiled_and_goes_on_with_other_devices(tmp_path):
    assert run("attention_text", tmp_path, "--parallel.sequence", "2", "--profile") == 0
    folder = tmp_path / "attention_text" / "x"
    assert list((folder / "profile").rglob("*.trace.json.gz"))
    (folder / "summary.json").unlink()
    assert run("attention_text", tmp_path, "--resume", "--parallel.sequence", "4") == 0
    assert "sequence = 4\n" in (folder / "config.toml").read_text()


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "attention_text",
            ["--parallel.sequence", "3"],
            "data.window: should be a multiple of 2 × parallel.sequence = 6, got 8\n",
        ),
        (
            "attention_text",
            ["--parallel.sequence", "4", "--parallel.data", "4"],
            "parallel.data × parallel.fsdp × parallel.sequence = 4 × 1 × 4 = 16: should be at most "
            "the number of devices, got 8; JAX_NUM_CPU_DEVICES sets their number on a CPU\n",
        ),
        (
            "attention_text",
            ["--parallel.sequence", "2", "--parallel.data", "3"],
            "train.batch_size: should be a multiple of parallel.data × parallel.fsdp = "
            "3 × 1 = 3, got 4\n",
        ),
        (
            "lstm_text",
            ["--parallel.sequence", "2"],
            "parallel.sequence: should be 1, as this experiment does not divide its sequences "
            "among devices, got 2\n",
        ),
    ],
)
def test_devices_that_will_not_do_are_an_error_before_anything_is_written(
    name, options, message, tmp_path, capsys
):
    assert run(name, tmp_path / "outputs", *options) == 2
    assert capsys.readouterr().err == message
    assert not (tmp_path / "outputs").exists()
