"""The training loop, with models of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.engine.cost import step_cost
from experiments.engine.devices import ParallelConfig, make_mesh
from experiments.engine.session import Session
from experiments.engine.training import (
    TrainConfig,
    compare,
    decayed,
    fit,
    make_optimizer,
    make_schedule,
)
from experiments.models.vit import ViTConfig, build, functional


def square(params, batch, key):
    return jnp.sum((params - batch) ** 2), {}


def noisy(params, batch, key):
    return jnp.sum(params * jax.random.normal(key, params.shape, params.dtype)), {}


def train(loss, batch, key=0, **changes):
    options: dict[str, Any] = dict(evaluations={}, final={}) | changes
    names = {field.name for field in fields(TrainConfig)} & options.keys()
    settings: dict[str, Any] = dict(steps=7, log_every=3, evaluate_every=4)
    settings |= {name: options.pop(name) for name in names}
    params = jnp.array([4.0, 3.0], jnp.float32)
    config = TrainConfig(**settings)
    return fit(loss, params, optax.sgd(0.1), batch, jax.random.key(key), config, **options)


def ones(step):
    return np.ones(2, np.float32)


def test_a_quadratic_reaches_its_minimum():
    trained = train(square, ones, steps=100)
    np.testing.assert_allclose(trained.params, 1, rtol=1e-6)


def test_records_are_means_over_the_steps_since_the_last_and_the_rest_at_the_end():
    losses = [r["loss"] for r in train(square, ones, log_every=1).records]
    trained = train(square, ones)
    assert [r["step"] for r in trained.records] == [3, 6, 7]
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose([r["loss"] for r in trained.records], means, rtol=1e-12)


def test_evaluations_happen_on_their_steps_and_at_the_end():
    first = lambda params: {"first": params[0]}
    records = train(square, ones, evaluations={"a": first}, final={"b": first}).records
    steps = [(r["split"], r["step"]) for r in records if r["split"] != "train"]
    assert steps == [("a", 4), ("a", 7), ("b", 7)]


def test_batches_are_asked_for_by_step():
    asked = []

    def batch(step):
        asked.append(step)
        return ones(step)

    train(square, batch)
    assert asked[-7:] == list(range(7))


def test_randomness_follows_from_key_and_step():
    losses = lambda **options: [
        r["loss"] for r in train(noisy, ones, log_every=1, **options).records
    ]
    assert losses() == losses()
    assert losses(steps=4) == losses()[:4]
    assert losses(key=1) != losses()
    assert len(set(losses())) == 7


def test_the_step_is_traced_once():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return square(params, batch, key)

    train(counted, ones, steps=20)
    assert len(traces) == 1


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled in the meantime."""
    heard: list[str] = []

    def listener(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 2)])
def test_a_run_compiles_its_step_and_its_evaluations_once_and_nothing_later(data, fsdp):
    """Nor at the last step, which ends a window before its time, nor at any evaluation."""
    params = jnp.ones((32, 32), jnp.float32)
    session = Session(mesh=make_mesh(ParallelConfig(data, fsdp)))
    config = TrainConfig(steps=7, log_every=3, evaluate_every=2, batch_size=4)
    before_step = []

    def loss(params, batch, key):
        return jnp.mean((batch @ params) ** 2), {}

    def batch(step):
        before_step.append(len(compiled))
        return np.full((4, 32), step, np.float32)

    def run():
        before_step.clear()
        a, b, c = (lambda params, n=n: {"weight": params[0, n]} for n in range(3))
        fit(loss, params, optax.adam(0.1), batch, jax.random.key(0), config,
            evaluations={"a": a, "b": b}, final={"c": c}, session=session)  # fmt: skip

    with compilations() as compiled:
        run()
        # what is compiled once for all runs, as the sums of a zero state, is there already
        compiled.clear()
        run()
        to_lower, *steps = before_step
        assert steps == [to_lower + 4] * 7
        assert len(compiled) == 4


def test_runs_with_the_same_loss_and_optimiser_share_one_compiled_step():
    params, key, optimizer = jnp.zeros(5, jnp.float32), jax.random.key(0), optax.sgd(0.1)
    batch = np.ones(5, np.float32)
    config = TrainConfig(steps=2, log_every=2, evaluate_every=2)
    rest: dict[str, Any] = dict(evaluations={}, final={})
    first = lambda: step_cost(square, params, optimizer, batch, key)
    with compilations() as compiled:
        first()
        assert compiled  # they are heard
        compiled.clear()
        first()
        fit(square, params, optimizer, lambda step: batch, key, config, **rest)
        compare({"a": square, "b": square}, params, optimizer, lambda step: batch, key, steps=2)
        assert not compiled


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_the_first_step_that_is_not_finite_is_named(log_every):
    batch = lambda step: np.full(2, np.nan if step >= 4 else 1, np.float32)
    with pytest.raises(FloatingPointError, match=r"^step 5: loss is nan$"):
        train(square, batch, log_every=log_every)


def test_an_evaluation_that_is_not_finite_names_its_split():
    with pytest.raises(FloatingPointError, match=r"^step 4: validation size is inf$"):
        train(square, ones, evaluations={"validation": lambda p: {"size": p[0] / 0}})


def test_the_schedule_rises_from_the_first_step_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup=0.1, learning_rate=2.0)
    with jax.numpy_dtype_promotion("standard"):
        rates = np.array([make_schedule(config)(jnp.int32(step)) for step in range(101)])
    assert 0 < rates[0] < rates[1]
    np.testing.assert_allclose(rates.max(), 2.0)
    assert rates.argmax() == 10
    np.testing.assert_allclose(rates[100], 0, atol=1e-12)
    assert np.all(np.diff(rates[10:]) < 0)


def test_a_constant_schedule_without_warmup_is_constant():
    schedule = make_schedule(TrainConfig(schedule="constant", warmup=0.0, learning_rate=2.0))
    with jax.numpy_dtype_promotion("standard"):
        assert [float(schedule(jnp.int32(step))) for step in (0, 1, 99)] == [2.0] * 3


def test_long_gradients_are_clipped_before_the_optimiser():
    optimizer = make_optimizer(TrainConfig(clip_norm=1.0))
    params = jnp.zeros(2, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        _, state = optimizer.update(jnp.array([30.0, 40.0], jnp.float32), state, params)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moments, [0.06, 0.08], rtol=1e-6)


PARAMS = {"kernel": np.array([[3.0, -1.0]], np.float32), "bias": np.array([[2.0]], np.float32)}
PARAMS["scale"] = np.array([1.0], np.float32)


def stepped(steps: int = 1, gradient: float = 0.5, **changes: Any) -> dict[str, np.ndarray]:
    """How far the parameters move, in steps of a gradient that is the same for all numbers."""
    config = TrainConfig(schedule="constant", warmup=0.0, clip_norm=1e9, **changes)
    optimizer, params = make_optimizer(config), PARAMS
    grads = jax.tree.map(lambda x: np.full_like(x, gradient), PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: np.asarray(new - old), params, PARAMS)


@pytest.mark.parametrize(
    "name, steps, distance",
    # the gradient's sign, whatever its size; then the gradient, with 0.9 of the one before added
    [("adamw", 2, 2), ("lion", 2, 2), ("sgd", 1, 0.5), ("sgd", 2, 0.5 + 0.95)],
)
def test_optimisers_go_by_name(name, steps, distance):
    moved = stepped(steps, optimizer=name, learning_rate=0.1)
    for each in moved.values():
        np.testing.assert_allclose(each, -0.1 * distance, rtol=1e-5)


def test_the_momentum_is_an_option():
    moved = stepped(2, optimizer="sgd", momentum=0.5, learning_rate=0.1)
    np.testing.assert_allclose(moved["scale"], -0.1 * (0.5 + 0.75), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_weight_decay_spares_biases_and_norms(name):
    moved = stepped(gradient=0.0, optimizer=name, learning_rate=0.1, weight_decay=0.2)
    np.testing.assert_allclose(moved["kernel"], -0.1 * 0.2 * PARAMS["kernel"], rtol=1e-5)
    assert not moved["bias"].any() and not moved["scale"].any()


def test_weight_decay_knows_the_biases_of_the_vision_transformer():
    model = build(ViTConfig(width=8, pool="cls", stem="conv"), (8, 8, 1), 10)
    params, _ = functional(model)
    leaves, _ = jax.tree_util.tree_flatten_with_path(decayed(params))
    names = [jax.tree_util.keystr(path, simple=True) for path, falls_on in leaves if falls_on]
    assert {"kernel", "cls", "position"} == {
        part for name in names for part in ("kernel", "cls", "position", "bias") if part in name
    }
    assert sum("kernel" in name for name in names) == 10


def test_compare_sees_a_loss_that_differs():
    def twice(params, batch, key):
        return 2 * square(params, batch, key)[0], {}

    rest = (jnp.zeros(2, jnp.float32), optax.sgd(0.1), ones, jax.random.key(0))
    same = compare({"a": square, "b": square}, *rest, steps=3)
    other = compare({"a": square, "b": twice}, *rest, steps=3)
    assert same["a_b_loss_difference"] == 0
    assert other["a_b_loss_difference"] >= 0.5
    assert same["a_step_seconds"] > 0 and same["b_step_seconds"] > 0


def counting(params, batch, key, carry):
    return jnp.sum(params * carry), ({"carried": carry}, carry + batch)


def test_a_carry_goes_from_step_to_step():
    records = train(counting, lambda step: np.float32(step), log_every=1, carry=jnp.float32(5))
    assert [r["carried"] for r in records.records] == [5, 5, 6, 8, 11, 15, 20]


def test_compare_carries_for_each_loss_apart():
    def ahead(params, batch, key, carry):
        value, (metrics, carry) = counting(params, batch, key, carry)
        return value, (metrics, carry + 1)

    rest = (jnp.ones(2, jnp.float32), optax.sgd(0.0), lambda step: np.float32(1), jax.random.key(0))
    scores = compare({"a": counting, "b": ahead}, *rest, steps=3, carry=jnp.float32(1))
    np.testing.assert_allclose(scores["a_b_loss_difference"], 2 / 5)
