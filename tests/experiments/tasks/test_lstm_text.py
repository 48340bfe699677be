"""The character model: its text, the state that goes from window to window, and what it reports."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rnnattn
from experiments.__main__ import main
from experiments.data.text import BUILT_IN, Windows, entropies, load_text, text_windows
from experiments.engine.config import UsageError
from experiments.engine.runs import read_result
from experiments.engine.training import compare
from experiments.models.text import (
    TextModelConfig,
    init_text,
    loss_under,
    predict,
    read_through,
    write,
    zero_states,
)
from experiments.tasks import lstm_text

CONFIG = "lstm_text"
MODEL = TextModelConfig(hidden_size=5, embedding_size=4, dropout=0.0, dtype="float64")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A text file whose next character is never in doubt for long, with an accent and a CRLF."""
    file = tmp_path_factory.mktemp("a story") / "story.txt"
    file.write_bytes(("the café is shut.\r\nthe cat is in.\r\n" * 60).encode())
    return file


@pytest.fixture(scope="module")
def params():
    return init_text(jax.random.key(0), 6, MODEL)


def characters(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 6, shape).astype(np.int32)


def windows(text, first=False):
    return Windows(text, np.asarray(first))


def test_a_tiny_run_learns_and_keeps_a_sample(story, tmp_path, capsys):
    sizes = (
        "--train.steps 60 --train.batch-size 4 --train.log-every 20 --train.evaluate-every 30"
        " --data.window 10 --model.hidden-size 12 --model.embedding-size 5 --model.layers 1"
        " --compare-steps 0 --sample-length 30 --train.learning-rate 3e-2"
    )
    options = ["--data.path", str(story), "--output", str(tmp_path), "--name", "tiny"]
    assert main(["run", CONFIG, *sizes.split(), *options]) == 0
    folder = tmp_path / "lstm_text" / "tiny"
    result, output = read_result(folder, lstm_text.Result), capsys.readouterr().out
    scores = json.loads((folder / "summary.json").read_text())
    assert result.sample == (folder / "sample.txt").read_bytes().decode()
    assert len(result.sample) == 30 and result.sample in output
    assert scores["data_sha256"] in output and len(scores["data_sha256"]) == 64
    assert scores["text_characters"] == len(story.read_bytes().decode())
    assert scores["vocabulary_size"] == len(set(story.read_bytes().decode()))
    for split in ("validation", "test"):
        assert 0 < scores[f"{split}_loss"] < scores[f"{split}_unigram_loss"]
        for name in ("", "unigram_", "bigram_"):
            bits = scores[f"{split}_{name}loss"] / math.log(2)
            np.testing.assert_allclose(scores[f"{split}_{name}bits_per_character"], bits)
    assert len(result.nats) == len(result.test) - 1
    np.testing.assert_allclose(result.nats.mean(), scores["test_loss"], rtol=1e-5)


def test_hand_and_autodiff_gradients_give_the_same_losses(params):
    text = characters(100)
    scores = compare(
        {"hand": loss_under("hand", 0.1), "autodiff": loss_under("autodiff", 0.1)},
        params,
        optax.sgd(0.5),
        lambda step: text_windows(text, step, rows=3, window=7),
        jax.random.key(1),
        carry=zero_states(params, 3),
        steps=20,
    )
    assert scores["hand_autodiff_loss_difference"] < 1e-10


def test_the_state_crosses_from_window_to_window(params):
    text = characters(3, 13)
    whole, last = predict(params, jnp.asarray(text[:, :-1]), zero_states(params, 3), "hand")
    loss, states, losses = jax.jit(loss_under("hand", 0.0)), zero_states(params, 3), []
    for start in (0, 4, 8):
        batch = windows(text[:, start : start + 5], first=start == 0)
        value, (_, states) = loss(params, batch, None, states)
        losses.append(value)
    nats = -jax.nn.log_softmax(whole)[np.arange(3)[:, None], np.arange(12), text[:, 1:]]
    parts = nats.reshape(3, 3, 4).mean(axis=(0, 2))
    np.testing.assert_allclose(losses, parts, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), states, last)


def test_the_gradient_stays_within_its_window(params):
    loss, text = loss_under("hand", 0.0), characters(2, 9)
    first, second = windows(text[:, :5], first=True), windows(text[:, 4:])

    def second_loss(params, before):
        _, (_, states) = loss(before, first, None, zero_states(params, 2))
        return loss(params, second, None, states)[0]

    inside, across = jax.jit(jax.grad(second_loss, argnums=(0, 1)))(params, params)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(across))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(inside))


def test_an_epoch_begins_without_a_state(params):
    loss, text = loss_under("hand", 0.0), characters(2, 5)
    full = jax.tree.map(lambda s: s + 0.5, zero_states(params, 2))
    anew, kept = (loss(params, windows(text, first), None, full)[0] for first in (True, False))
    assert anew == loss(params, windows(text, True), None, zero_states(params, 2))[0] != kept


def test_dropout_follows_from_the_key(params):
    batch, states = windows(characters(2, 5)), zero_states(params, 2)
    values = [loss_under("hand", 0.5)(params, batch, jax.random.key(k), states)[0] for k in (0, 1)]
    assert values[0] != values[1] != loss_under("hand", 0.0)(params, batch, None, states)[0]


@pytest.mark.parametrize("length", [9, 10])
def test_held_out_text_is_read_as_one(params, length, monkeypatch):
    monkeypatch.setattr("experiments.models.text.READ_AT_ONCE", 4)
    text = characters(length)
    nats, correct = read_through(params, jnp.asarray(text), "hand")
    logits, _ = predict(params, jnp.asarray(text[None, :-1]), zero_states(params, 1), "autodiff")
    expected = -jax.nn.log_softmax(logits[0])[np.arange(length - 1), text[1:]]
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    np.testing.assert_array_equal(correct, np.asarray(logits[0]).argmax(axis=-1) == text[1:])


def test_what_is_written_follows_the_model(params):
    b = jnp.arange(6.0)
    certain = params._replace(w=params.w * 0, b=jnp.where(b == 4, 1e3, 0))
    prompt, key = jnp.array([0], jnp.int32), jax.random.key(0)
    assert write(certain, prompt, key, length=7).tolist() == [4] * 7
    loose = params._replace(w=params.w * 0, b=b / 2)
    for temperature in (1.0, 2.0):
        chances = jax.nn.softmax(b / 2 / temperature)
        written = write(loose, prompt, key, length=4000, temperature=temperature)
        np.testing.assert_allclose(np.bincount(written) / 4000, chances, atol=0.03)


def test_each_row_reads_on_and_starts_anew_with_the_epoch():
    text = np.arange(3 * 11 + 1, dtype=np.int32)
    steps = [text_windows(text, step, rows=3, window=5) for step in range(4)]
    assert [bool(w.first) for w in steps] == [True, False, True, False]
    np.testing.assert_array_equal(steps[0].characters[1], np.arange(11, 17))
    np.testing.assert_array_equal(steps[1].characters[:, 0], steps[0].characters[:, -1])
    np.testing.assert_array_equal(steps[2].characters, steps[0].characters)


def test_the_parts_of_a_text_are_the_text(story):
    text, content = load_text(str(story), rows=2, window=3), story.read_bytes().decode()
    parts = np.concatenate([text.train, text.validation, text.test])
    assert "".join(text.characters[number] for number in parts) == content
    assert [len(text.train), len(text.validation)] == [len(content) * 9 // 10, len(content) // 20]


def test_the_built_in_text_has_each_paragraph_once():
    text = load_text(None, rows=1, window=1)
    parts = np.concatenate([text.train, text.validation, text.test])
    paragraphs = "".join(text.characters[number] for number in parts).split("\n\n")
    assert len({p.strip() for p in paragraphs}) >= len(paragraphs) - 1
    assert len(parts) > 200_000


def test_entropies_of_a_text_that_is_easily_counted():
    single, pairs = entropies(np.array([0, 1, 0, 1, 0, 2, 0, 2, 0], np.int32))
    # half the characters are 0, a quarter each the others; after a 0 there are two choices
    np.testing.assert_allclose([single, pairs], [1.5 * math.log(2), 0.5 * math.log(2)])


BAD = {
    "missing": (None, ["no such text file"]),
    "empty": (b"", ["too short", "has 0 characters"]),
    "short": (b"to be" * 20, ["has 100 characters", "32 × 64", "2277"]),
    "not text": (b"abc\xff" * 1000, ["not UTF-8", "byte 3"]),
}


@pytest.mark.parametrize("content, parts", BAD.values(), ids=BAD)
def test_a_text_that_will_not_do_is_one_message_and_no_run(content, parts, tmp_path, capsys):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["run", CONFIG, "--data.path", str(file), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith(f"{file}: ")
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_text_and_the_built_in_text_has_a_name(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        load_text(str(tmp_path), rows=1, window=1)
    with pytest.raises(UsageError, match=BUILT_IN):
        load_text(None, rows=10_000, window=1000)


def test_the_shortest_text_that_will_do(tmp_path):
    for size in (2277, 2276):
        (tmp_path / "text").write_text(("ab" * size)[:size])
        if size == 2276:
            with pytest.raises(UsageError):
                load_text(str(tmp_path / "text"), rows=32, window=64)
        else:
            text = load_text(str(tmp_path / "text"), rows=32, window=64)
            assert text_windows(text.train, 5, 32, 64).characters.shape == (32, 65)


def test_the_stack_is_the_librarys(params):
    assert len(params.layers) == MODEL.layers
    assert all(isinstance(layer, rnnattn.LSTMParams) for layer in params.layers)


def test_what_a_model_writes_moves_no_cursor(tmp_path, capsys):
    file = tmp_path / "text"
    file.write_bytes(b"\x1b[2J\0\x07\r \r\n" * 200)
    options = "--train.steps 2 --compare-steps 0 --model.hidden-size 2 --sample-length 200".split()
    config = "lstm_text"
    output = ["--output", str(tmp_path / "outputs"), "--name", "x"]
    assert main(["run", config, "--quick", "--data.path", str(file), *options, *output]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b" in shown and not set("\x1b\0\x07\r") & set(shown.replace("\r\n", ""))
    # the file is as it was written
    assert b"\x1b" in (tmp_path / "outputs" / "lstm_text" / "x" / "sample.txt").read_bytes()
