"""What training is estimated to take, beside what XLA plans, and what the machine has."""

import jax
import numpy as np
import pytest

from experiments.data.adding import draw_sums
from experiments.data.sources import DataConfig, load_images
from experiments.data.text import Excerpts
from experiments.engine import memory
from experiments.engine.config import UsageError
from experiments.engine.cost import step_cost
from experiments.engine.training import TrainConfig, make_optimizer
from experiments.models.attention_text import TransformerConfig, init_transformer, loss_under
from experiments.models.lstm import ModelConfig, abstract_readout, init_readout
from experiments.models.vit import ViTConfig, build, check_model, functional, loss_of
from experiments.tasks import lstm_adding, lstm_digits

DIGITS = load_images(DataConfig(), 0, "float32").train


def vision_transformer(size):
    """Loss, parameters, those that are abstract, and a batch."""
    config = ViTConfig(width=16 * size, depth=2, patch_size=2)
    params, apply = functional(build(config, (8, 8, 1), 10))
    abstract, _ = functional(check_model(config, (8, 8, 1), 10))
    return loss_of(apply), params, abstract, DIGITS


def reader(size):
    config = ModelConfig(16 * size)
    params = init_readout(jax.random.key(0), 8, 10, config)
    return lstm_digits.loss_under("hand"), params, abstract_readout(8, 10, config), DIGITS


def adder(size):
    config = ModelConfig(8 * size)
    params = init_readout(jax.random.key(0), 2, 1, config)
    batch = draw_sums(jax.random.key(1), 64 * size, 50, "float32")
    return lstm_adding.loss_under("hand"), params, abstract_readout(2, 1, config), batch


def writer(size):
    config = TransformerConfig(width=16 * size, depth=2)
    params = init_transformer(jax.random.key(0), 10, config)
    zeros = np.zeros((1, 64), np.int32)
    return loss_under(config), params, params, Excerpts(zeros, zeros)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("task", [vision_transformer, reader, adder, writer])
def test_the_estimate_is_within_a_third_of_what_xla_plans(task, size):
    with jax.enable_x64(False):
        loss, params, abstract, batch = task(size)
        estimate = memory.of_training(TrainConfig(), loss, abstract, memory.rows_like(batch, 1200))
        batch = jax.tree.map(lambda x: jax.numpy.resize(x, (1200, *x.shape[1:])), batch)
        planned = step_cost(
            loss, params, make_optimizer(TrainConfig()), batch, jax.random.key(0)
        ).peak_bytes
    assert planned / 1.5 < estimate < planned * memory.MARGIN


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    whole = memory.of_machine()
    limits = [tmp_path / "memory.max", tmp_path / "not there"]
    monkeypatch.setattr(memory, "CONTAINERS", limits)
    for text, expected in (("max", whole), (str(2**62), whole), ("123456\n", 123456)):
        limits[0].write_text(text)
        assert memory.of_machine() == expected
    memory.check(123456, "a little")
    with pytest.raises(UsageError, match=r"much: needs about 195.3 KiB of memory, and there are"):
        memory.check(200_000, "much")


@pytest.mark.parametrize(
    "size, words",
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"),
     (2**80, "1,048,576.0 EiB")],
)  # fmt: skip
def test_sizes_are_read_at_a_glance(size, words):
    assert memory.in_words(size) == words
