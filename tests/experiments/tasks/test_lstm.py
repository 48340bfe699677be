"""The two tasks of the LSTM: their data, and the same losses under either gradient."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.data.adding import draw_sums
from experiments.engine.session import Session
from experiments.engine.training import TrainConfig
from experiments.models.lstm import ModelConfig
from experiments.tasks import lstm_adding, lstm_digits


@pytest.mark.parametrize(
    "task, dtype, steps, rtol",
    [(lstm_digits, "float64", 100, 1e-9), (lstm_adding, "float32", 20, 1e-5)],
    ids=["digits", "adding"],
)
def test_hand_and_autodiff_gradients_give_the_same_losses(task, dtype, steps, rtol):
    """Each task and each precision once: the gradients themselves are held to the twin's, to 1e-12,
    in the tests of the library."""
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
