"""What is computed again for the gradient: the gradient is the same, the memory less."""

from dataclasses import replace

import jax
import numpy as np

from experiments.data.text import Excerpts, Windows
from experiments.models import attention_text, text


def check_gradient_and_memory(loss_with, params, batch, *carry):
    """`loss_with(remat)` is the loss that computes again, or does not."""
    gradients, memory = [], []
    for remat in (False, True):
        gradient = jax.jit(jax.grad(loss_with(remat), has_aux=True))
        given = params, batch, jax.random.key(1), *carry
        compiled = gradient.lower(*given).compile()
        gradients.append(compiled(*given)[0])
        planned = compiled.memory_analysis()
        assert planned is not None
        memory.append(planned.temp_size_in_bytes)
    assert memory[1] < 0.8 * memory[0]
    for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert expected.any()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_text_model_is_the_same_and_the_memory_less():
    params = text.init_text(jax.random.key(0), 6, text.TextModelConfig(hidden_size=64))
    characters = np.random.default_rng(0).integers(0, 6, (8, 401)).astype(np.int32)
    batch, states = Windows(characters, np.asarray(True)), text.zero_states(params, 8)
    loss_with = lambda remat: text.loss_under("hand", 0.1, remat=remat)
    check_gradient_and_memory(loss_with, params, batch, states)


def test_the_gradient_of_the_transformer_of_text_is_the_same_and_the_memory_less():
    config = attention_text.TransformerConfig(width=32, depth=3, dropout=0.1)
    params = attention_text.init_transformer(jax.random.key(0), 6, config)
    characters = np.random.default_rng(0).integers(0, 6, (8, 401)).astype(np.int32)
    batch = Excerpts(characters[:, :-1], characters[:, 1:])
    check_gradient_and_memory(
        lambda remat: attention_text.loss_under(
            replace(config, remat="blocks" if remat else "none")
        ),
        params,
        batch,
    )
