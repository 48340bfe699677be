"""Under bfloat16 it is arithmetic alone that has 16 bits."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.data.images import Images
from experiments.data.text import Excerpts, Windows
from experiments.engine.experiment import find
from experiments.engine.session import SILENT
from experiments.engine.training import TrainConfig, make_optimizer, start, train_step
from experiments.models import attention_text, lstm, text, vit
from experiments.tasks import lstm_digits
from rnnattn import native

IMAGES = Images(np.full((4, 8, 8, 1), 0.5, np.float32), np.arange(4, dtype=np.int32))
TASKS = ("lstm_digits", "lstm_adding", "lstm_text", "vit_digits", "attention_text")


def reader(gradient: lstm.Gradient) -> tuple[Any, ...]:
    model = lstm.ModelConfig(hidden_size=4, dtype="bfloat16")
    params = lstm.init_readout(jax.random.key(0), 8, 10, model)
    return lstm_digits.loss_under(gradient, "bfloat16"), params, IMAGES, None


def writer(gradient: lstm.Gradient) -> tuple[Any, ...]:
    params = text.init_text(
        jax.random.key(0), 6, text.TextModelConfig(hidden_size=4, dtype="bfloat16")
    )
    windows = Windows(np.zeros((4, 6), np.int32), np.asarray(True))
    loss = text.loss_under(gradient, 0.1, "bfloat16")
    return loss, params, windows, text.zero_states(params, 4)


def transformer() -> tuple[Any, ...]:
    model = vit.ViTConfig(width=8, stem="conv", position="rope2d", dtype="bfloat16")
    params, apply = vit.functional(vit.build(model, (8, 8, 1), 10))
    return vit.loss_of(apply), params, IMAGES, None


def attentive_writer() -> tuple[Any, ...]:
    model = attention_text.TransformerConfig(width=8, dropout=0.1, dtype="bfloat16")
    params = attention_text.init_transformer(jax.random.key(0), 6, model)
    windows = Excerpts(np.zeros((4, 6), np.int32), np.zeros((4, 6), np.int32))
    return attention_text.loss_under(model), params, windows, None


def products(jaxpr: Any) -> list[Any]:
    """The matrix products and convolutions of a program, and of those that it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(equation)
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


MODELS = {
    "reader": lambda: reader("hand"),
    "reader, autodiff": lambda: reader("autodiff"),
    "writer": lambda: writer("hand"),
    "writer, autodiff": lambda: writer("autodiff"),
    "transformer": transformer,
    "attentive writer": attentive_writer,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_products_read_bfloat16_and_all_that_is_kept_is_float32(model):
    loss, params, batch, carry = model()
    state = start(params, make_optimizer(TrainConfig()), carry)
    step = lambda state: train_step(
        loss, make_optimizer(TrainConfig()), state, batch, jax.random.key(0), skip=False, mesh=None
    )
    after, metrics = jax.eval_shape(step, state)
    for leaf in jax.tree.leaves((after, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    forward = lambda params, batch: loss(
        params, batch, jax.random.key(0), *([] if carry is None else [carry])
    )
    program = jax.make_jaxpr(forward)(params, jax.tree.map(jnp.asarray, batch))
    read = [x.aval.dtype for product in products(program.jaxpr) for x in product.invars]
    if model in (transformer, attentive_writer):
        # attention's weights, and the values that they weigh, where no kernel has both
        assert read.count(jnp.dtype(jnp.float32)) == (0 if native.status().available else 2)
        read = [dtype for dtype in read if dtype != jnp.float32]
    assert read and set(read) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.thorough
@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_near_what_it_does_in_float32(name):
    task = find(name)
    scores = []
    for dtype in ("float32", "bfloat16"):
        config = replace(task.TINY, model=replace(task.TINY.model, dtype=dtype))
        task.check(config)
        result = task.run(config, SILENT)
        scores.append(result.scores)
        for value in result:
            assert getattr(value, "dtype", None) != jnp.bfloat16
    assert scores[0]["test_loss"] != scores[1]["test_loss"]
    np.testing.assert_allclose(scores[1]["test_loss"], scores[0]["test_loss"], rtol=0.05)
