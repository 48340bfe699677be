"""A batch in parts, one after another, is the batch; it takes less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data.images import Images
from experiments.data.text import text_windows
from experiments.engine.cost import step_cost
from experiments.engine.memory import of_training, rows_like
from experiments.engine.training import TrainConfig, fit, in_parts, make_optimizer
from experiments.models import text, vit

ROWS = 12


def reader() -> dict[str, Any]:
    """Two LSTMs whose states go on from step to step."""
    model = text.TextModelConfig(hidden_size=8, dtype="float64")
    params = text.init_text(jax.random.key(0), 5, model)
    characters = np.random.default_rng(0).integers(0, 5, 500).astype(np.int32)
    return {
        "loss": text.loss_under("hand", 0.0),
        "params": params,
        "batch": lambda step: text_windows(characters, step, ROWS, 7),
        "carry": text.zero_states(params, ROWS),
    }


def transformer() -> dict[str, Any]:
    params, apply = vit.functional(vit.build(vit.ViTConfig(width=16, depth=2), (8, 8, 1), 10))
    labels = np.arange(ROWS, dtype=np.int32) % 10
    return {
        "loss": vit.loss_of(apply),
        "params": jax.tree.map(lambda x: x.astype(jnp.float64), params),
        "batch": lambda step: Images(np.random.default_rng(step).random((ROWS, 8, 8, 1)), labels),
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", [reader, transformer])
def test_losses_and_parameters_are_those_of_the_whole_batch(task):
    whole, parts = (
        fit(
            **task(), optimizer=optax.sgd(0.3), key=jax.random.key(0),
            config=TrainConfig(steps=9, log_every=1, evaluate_every=9, accumulate=accumulate),
            evaluations={}, final={},
        )
        for accumulate in (1, 4)
    )  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        parts.params, whole.params,
    )  # fmt: skip
    for name in ("loss", "accuracy", "gradient_norm"):
        found, expected = (
            np.array([r[name] for r in trained.records]) for trained in (parts, whole)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert whole.records[0]["loss"] != whole.records[-1]["loss"]


def test_each_part_has_random_draws_of_its_own():
    def noise(params, batch, key):
        return params * jax.random.normal(key, (), params.dtype), {}

    def norm_with(accumulate):
        trained = fit(
            noise, jnp.float32(0), optax.sgd(1.0), lambda step: np.zeros(8), jax.random.key(0),
            TrainConfig(steps=1, log_every=1, accumulate=accumulate), evaluations={}, final={},
        )  # fmt: skip
        return -float(trained.params)

    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, n), (), jnp.float32) for n in range(4)]
    np.testing.assert_allclose(norm_with(4), np.mean(draws), rtol=1e-6)
    assert norm_with(1) == jax.random.normal(key, (), jnp.float32)


def test_a_part_has_rows_from_all_over_the_batch():
    parts = in_parts({"rows": np.arange(6), "number": np.asarray(5)}, 2)
    assert parts["rows"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert parts["number"].tolist() == [5, 5]


@pytest.mark.slow
def test_it_takes_less_memory_and_as_many_operations_and_is_estimated_to():
    params, apply = vit.functional(vit.build(vit.ViTConfig(width=32, depth=2), (8, 8, 1), 10))
    loss, key = vit.loss_of(apply), jax.random.key(0)
    batch = Images(np.zeros((1200, 8, 8, 1), np.float32), np.zeros(1200, np.int32))
    costs, estimates = [], []
    for accumulate in (1, 8):
        config = TrainConfig(accumulate=accumulate)
        optimizer = make_optimizer(config)
        costs.append(step_cost(loss, params, optimizer, batch, key, accumulate=accumulate))
        estimates.append(of_training(config, loss, params, rows_like(batch, 1200)))
    assert costs[1].peak_bytes < costs[0].peak_bytes / 3
    np.testing.assert_allclose(costs[1].flops, costs[0].flops, rtol=0.05)
    for cost, estimate in zip(costs, estimates, strict=True):
        assert cost.peak_bytes / 1.5 < estimate < cost.peak_bytes * 1.25
