"""The two tasks of the LSTM: their data, and the same losses under either gradient."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.data.adding import draw_sums
from experiments.data.digits import digits_batch, split_digits
from experiments.engine.session import Session
from experiments.engine.training import TrainConfig
from experiments.models.lstm import ModelConfig
from experiments.tasks import lstm_adding, lstm_digits


@pytest.mark.parametrize("task", [lstm_digits, lstm_adding], ids=["digits", "adding"])
@pytest.mark.parametrize("dtype, steps, rtol", [("float32", 20, 1e-5), ("float64", 100, 1e-9)])
def test_hand_and_autodiff_gradients_give_the_same_losses(task, dtype, steps, rtol):
    losses = {}
    for gradient in ("hand", "autodiff"):
        config = task.Config(
            compare_steps=0,
            model=ModelConfig(hidden_size=8, gradient=gradient, dtype=dtype),
            train=TrainConfig(steps=steps, log_every=1, evaluate_every=steps),
        )
        records: list = []
        scores = task.run(config, Session(records.append)).scores
        assert "hand_step_seconds" not in scores
        losses[gradient] = [r["loss"] for r in records if r["split"] == "train"]
    assert len(losses["hand"]) == steps
    np.testing.assert_allclose(losses["hand"], losses["autodiff"], rtol=rtol, atol=0)


def test_the_gradients_are_compared_by_a_run_that_is_asked_to():
    train = TrainConfig(steps=2)
    scores = lstm_digits.run(lstm_digits.Config(compare_steps=5, train=train)).scores
    assert scores["hand_autodiff_loss_difference"] < 1e-5
    assert scores["hand_step_seconds"] > 0 and scores["autodiff_step_seconds"] > 0


@pytest.mark.parametrize("task", [lstm_digits, lstm_adding], ids=["digits", "adding"])
def test_another_seed_is_another_run(task):
    config = task.Config(compare_steps=0, train=TrainConfig(steps=2))
    first, other = (task.run(replace(config, seed=seed)).scores for seed in (0, 1))
    assert first["test_loss"] != other["test_loss"]


def test_the_split_holds_each_digit_once_with_every_class_in_its_share():
    parts = split_digits(0, "float32")
    assert [len(part.labels) for part in parts] == [1257, 180, 360]
    images = np.concatenate([part.images for part in parts])
    assert len(np.unique(images, axis=0)) == len(np.unique(images.round(6), axis=0)) == 1797
    assert images.min() == 0 and images.max() == 1
    for part in parts:
        shares = np.bincount(part.labels) / len(part.labels)
        np.testing.assert_allclose(shares, 0.1, atol=0.01)


def test_each_epoch_is_a_permutation_whatever_the_size_of_the_batch():
    train = split_digits(0, "float32")[0]
    total = len(train.labels)
    batches = [digits_batch(train, 5, step, 100, shift=0) for step in range(26)]
    images = np.concatenate([batch.images for batch in batches])
    for epoch in (0, 1):
        seen = images[epoch * total : (epoch + 1) * total]
        assert len(np.unique(seen, axis=0)) == total
    assert np.any(images[:total] != images[total : 2 * total])
    huge = digits_batch(train, 5, 0, 2600, shift=0)
    np.testing.assert_array_equal(huge.images, images)


def test_shifted_images_are_the_images_moved_and_all_moves_occur():
    train = split_digits(0, "float32")[0]
    plain = digits_batch(train, 0, 3, 200, shift=0)
    moved = digits_batch(train, 0, 3, 200, shift=1)
    np.testing.assert_array_equal(moved.labels, plain.labels)
    moves = set()
    for before, after in zip(plain.images, moved.images, strict=True):
        padded = np.pad(before, 1)
        windows = {(r, c): padded[r : r + 8, c : c + 8] for r in range(3) for c in range(3)}
        fits = [move for move, window in windows.items() if np.array_equal(window, after)]
        assert fits
        moves.update(fits)
    assert len(moves) == 9


def test_sums_are_of_two_marked_values_one_in_each_half():
    x, sums = draw_sums(jax.random.key(0), 500, 7, "float64")
    values, marks = np.asarray(x[..., 0]), np.asarray(x[..., 1])
    assert set(np.unique(marks)) == {0, 1}
    np.testing.assert_array_equal(marks[:, :3].sum(axis=1), 1)
    np.testing.assert_array_equal(marks[:, 3:].sum(axis=1), 1)
    assert marks.any(axis=0).all()
    np.testing.assert_allclose(sums, (values * marks).sum(axis=1), rtol=1e-15)


def test_a_constant_answer_has_the_loss_that_is_claimed():
    sums = np.asarray(draw_sums(jax.random.key(1), 100_000, 2, "float64").sums)
    np.testing.assert_allclose(np.mean((sums - 1) ** 2), lstm_adding.CONSTANT_MSE, rtol=0.02)
