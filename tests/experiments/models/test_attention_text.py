"""The transformer of text: what it sees, how it reads held-out text, and what it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.text import text_excerpts
from experiments.engine.config import UsageError
from experiments.models.attention_text import (
    TransformerConfig,
    attention_on,
    check_model,
    init_transformer,
    predict,
    read_through,
    write,
)

pytestmark = pytest.mark.slow

CHARACTERS = 6


def params(depth: int = 2):
    config = TransformerConfig(width=8, depth=depth, dtype="float64")
    return init_transformer(jax.random.key(0), CHARACTERS, config)


def characters(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CHARACTERS, shape).astype(np.int32)


@jax.jit
def predicted(params, x):
    return predict(params, x[None], attention_on(None))[0]


def logits(params, text: np.ndarray) -> np.ndarray:
    """Of the character after each of one text, of at most 16."""
    padded = np.pad(text, (0, 16 - len(text)))
    return np.asarray(predicted(params, padded)[: len(text)])


def test_a_prediction_follows_from_the_characters_before_alone():
    """As the tests below, of texts that are padded, take for granted."""
    x = characters(16)
    whole, before, after = logits(params(), x), x.copy(), x.copy()
    before[0], after[6:] = (x[0] + 1) % CHARACTERS, (x[6:] + 1) % CHARACTERS
    assert np.all(np.any(logits(params(), before) != whole, axis=1))
    np.testing.assert_array_equal(
        np.all(logits(params(), after) == whole, axis=1), [True] * 6 + [False] * 10
    )


@pytest.mark.parametrize("length, window", [(6, 8), (22, 8), (13, 5), (4, 1)])
def test_held_out_text_is_read_in_windows_that_overlap_by_half(length, window):
    text, model = characters(length), params()
    nats, correct = jax.jit(read_through, static_argnums=2)(model, text, window)
    expected, guessed, fresh = [], [], (window + 1) // 2
    for n, following in enumerate(text[1:]):
        # the first window that reaches the character
        start = max(0, -(-(n + 1 - window) // fresh)) * fresh
        found = logits(model, text[start : n + 1])[-1]
        expected.append(-jax.nn.log_softmax(found)[following])
        guessed.append(found.argmax() == following)
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    np.testing.assert_array_equal(correct, guessed)


@pytest.mark.parametrize("depth, window, prompt", [(2, 16, 3), (1, 4, 7)])
def test_what_is_written_is_what_the_model_expects_after_the_last_window(depth, window, prompt):
    """Of what is older, nothing reaches it through one block; through more, what others saw."""
    model, first = params(depth), characters(prompt)
    written = write(
        model, jnp.asarray(first), jax.random.key(0), length=9, window=window, temperature=0
    )
    text = list(first)
    for _ in range(9):
        text.append(logits(model, np.array(text[-window:], np.int32))[-1].argmax())
    assert written.tolist() == text[prompt:]


def test_excerpts_follow_from_the_seed_and_the_step_and_come_from_all_of_a_text():
    text = np.arange(40, dtype=np.int32)
    found = [text_excerpts(text, 1, step, rows=16, window=5) for step in range(20)]
    for each in found:
        assert each.characters.shape == (16, 5)
        np.testing.assert_array_equal(each.following, each.characters + 1)
        np.testing.assert_array_equal(np.diff(each.characters, axis=1), 1)
    starts = {int(start) for each in found for start in each.characters[:, 0]}
    assert starts == set(range(35))
    again = text_excerpts(text, 1, 3, rows=16, window=5)
    np.testing.assert_array_equal(again.characters, found[3].characters)
    other = text_excerpts(text, 2, 3, rows=16, window=5)
    assert np.any(other.characters != again.characters)


def test_heads_that_cannot_be_rotated_are_a_sentence():
    expected = r"model.width: should be a multiple of 2 × model.num_heads = 6, got 9"
    with pytest.raises(UsageError, match=expected):
        check_model(TransformerConfig(width=9, num_heads=3))
