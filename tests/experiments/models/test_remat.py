"""What is computed again for the gradient: the gradient is the same, the memory less."""

import jax
import numpy as np

from experiments.data.text import Windows
from experiments.models import text


def test_the_gradient_of_the_text_model_is_the_same_and_the_memory_less():
    params = text.init_text(jax.random.key(0), 6, text.TextModelConfig(hidden_size=64))
    characters = np.random.default_rng(0).integers(0, 6, (8, 401)).astype(np.int32)
    batch, states = Windows(characters, np.asarray(True)), text.zero_states(params, 8)
    gradients, memory = [], []
    for remat in (False, True):
        loss = text.loss_under("hand", 0.1, remat=remat)
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        given = params, batch, jax.random.key(1), states
        compiled = gradient.lower(*given).compile()
        gradients.append(compiled(*given)[0])
        planned = compiled.memory_analysis()
        assert planned is not None
        memory.append(planned.temp_size_in_bytes)
    assert memory[1] < 0.8 * memory[0]
    for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert expected.any()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
