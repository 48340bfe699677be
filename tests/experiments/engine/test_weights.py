"""A finished run is opened, evaluated and begun from; what does not fit is said in a sentence."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import experiments
from experiments.__main__ import main
from experiments.engine.config import UsageError
from experiments.engine.experiment import find, names
from experiments.engine.finished import EVALUATIONS
from tests.experiments.sizes import tiny_options

TASKS = [name for name in names() if find(name).model is not None]
LSTM, TEXT, ATTENTION = "lstm_digits", "lstm_text", "attention_text"


def run(name: str, output: Path, *options: str) -> int:
    own = ["--output", str(output), "--name", "x", *options]
    return main(["run", name, *tiny_options(name), *own])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function that gives the folder of a finished run of a task, which is run once."""
    output, done = tmp_path_factory.mktemp("finished"), set()

    def folder(name: str) -> Path:
        if name not in done:
            # a metric that all tasks have
            assert run(name, output, "--train.best", "validation_loss") == 0
            done.add(name)
        return output / name / "x"

    return folder


def kept_scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())


def test_all_tasks_say_what_they_train():
    assert {"lstm_adding", LSTM, TEXT, ATTENTION, "vit_digits"} <= set(TASKS)


# ---- experiments.open ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_an_opened_run_has_all_that_it_left(name, finished):
    opened = experiments.open(str(finished(name)))
    assert opened.config.train.steps == 4 and opened.experiment.name == name
    assert [r["step"] for r in opened.metrics if r["split"] == "train"] == [2, 4]
    assert opened.scores["finished"] is True
    assert isinstance(opened.result, find(name).Result)
    model: Any = opened.experiment.model
    like = model(opened.config, None).init()
    assert str(jax.tree.structure(opened.params)) == str(jax.tree.structure(like))
    first, last = jax.tree.leaves(like), jax.tree.leaves(opened.params)
    assert any(not np.array_equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("name", [LSTM, "vit_digits"])
def test_the_model_of_an_opened_run_answers_as_the_run_did(name, finished):
    opened = experiments.open(finished(name))
    probabilities = jax.nn.softmax(opened.model(opened.result.images), axis=-1)
    np.testing.assert_allclose(probabilities, opened.result.probabilities, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [TEXT, ATTENTION])
def test_a_model_of_text_gives_logits_of_the_next_character(name, finished):
    opened = experiments.open(finished(name))
    logits = opened.model(["any", "two"])
    assert logits.shape == (2, 3, len(opened.result.characters))
    with pytest.raises(UsageError, match=r"characters that the model does not know: '\\ue000'"):
        opened.model(["\ue000"])


def test_the_best_checkpoint_can_be_opened_in_place_of_the_newest(finished):
    opened = experiments.open(finished("lstm_adding"), best=True)
    losses = [r["loss"] for r in opened.metrics if r["split"] == "validation"]
    newest = experiments.open(finished("lstm_adding"))
    same = jax.tree.map(np.array_equal, opened.params, newest.params)
    assert all(jax.tree.leaves(same)) == (losses[-1] == min(losses))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The folder of a finished run of the text model, with a mean of its parameters."""
    output = tmp_path_factory.mktemp("averaged")
    assert run(TEXT, output, "--train.ema", "0.9") == 0
    return output / TEXT / "x"


def test_the_mean_of_the_parameters_can_be_opened_evaluated_and_exported(averaged, tmp_path):
    opened, last = (experiments.open(averaged, ema=ema) for ema in (True, False))
    assert str(jax.tree.structure(opened.params)) == str(jax.tree.structure(last.params))
    assert not np.array_equal(opened.params.w, last.params.w)
    assert main(["evaluate", str(averaged), "--ema"]) == 0
    scores = json.loads((averaged / EVALUATIONS).read_text().splitlines()[-1])
    kept = kept_scores(averaged)
    found = {name: value for name, value in scores.items() if name.startswith("test_")}
    assert found.keys() == {"test_ema_loss", "test_ema_accuracy"}
    assert found == {name: kept[name] for name in found}
    assert found["test_ema_loss"] != kept["test_loss"]
    file = tmp_path / "mean.safetensors"
    assert main(["export", str(averaged), "--ema", "--output", str(file)]) == 0
    np.testing.assert_array_equal(load_file(file)["w"], opened.params.w)


def test_the_mean_of_the_parameters_writes_text(averaged, capsys):
    text = sampled(averaged, capsys, "--ema", "--length", "9", "--seed", "1")
    assert text == experiments.open(averaged, ema=True).sample(length=9, seed=1)


@pytest.mark.parametrize("command", ["evaluate", "export", "sample"])
def test_of_a_run_without_a_mean_there_is_none(command, finished, tmp_path, monkeypatch, capsys):
    folder = finished(TEXT)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # of the run, where it is made here
    assert main([command, str(folder), "--ema"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "holds no mean of the parameters, which --train.ema keeps" in message
    assert not list(tmp_path.iterdir())


def test_what_is_no_finished_run_is_a_sentence(finished, tmp_path):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        experiments.open(tmp_path)
    folder = shutil.copytree(finished(LSTM), tmp_path / "x")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UsageError, match="no such folder of checkpoints"):
        _ = experiments.open(folder).params
    (folder / "summary.json").unlink()
    with pytest.raises(UsageError, match="is not finished"):
        experiments.open(folder)


def test_a_run_that_trains_nothing_has_no_model_and_says_so(tmp_path):
    assert run("lstm_equations", tmp_path) == 0
    opened = experiments.open(tmp_path / "lstm_equations" / "x")
    assert opened.result and not opened.metrics
    with pytest.raises(UsageError, match="lstm_equations does not say what it trains, by a `mode"):
        _ = opened.model


# ---- evaluate --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_scores_of_an_evaluation_are_those_of_the_run_to_the_bit(name, finished, capsys):
    folder = finished(name)
    assert main(["evaluate", str(folder)]) == 0
    *_, line = (folder / EVALUATIONS).read_text().splitlines()
    found = {key: value for key, value in json.loads(line).items() if key.startswith("test_")}
    assert found.keys() == {"test_loss", "test_accuracy"}
    assert found == {name: kept_scores(folder)[name] for name in found}
    assert format(found["test_loss"], ".6g") in capsys.readouterr().out


def test_scores_that_cannot_be_kept_are_printed_all_the_same(finished, tmp_path, capsys):
    folder = shutil.copytree(finished(LSTM), tmp_path / "x")
    path = folder / EVALUATIONS
    path.unlink(missing_ok=True)
    path.mkdir()  # which cannot be written to, even by root
    capsys.readouterr()
    assert main(["evaluate", str(folder)]) == 1
    out, message = capsys.readouterr()
    assert "test_loss" in out and "test_accuracy" in out
    assert message == f"{path}: the scores could not be kept: Is a directory\n"


def test_a_run_in_float64_is_evaluated_in_float64(tmp_path):
    assert run("lstm_adding", tmp_path, "--model.dtype", "float64") == 0
    opened = experiments.open(tmp_path / "lstm_adding" / "x")
    assert opened.params.w.dtype == np.float64
    scores = opened.evaluate()
    assert scores == {name: opened.scores[name] for name in scores}
    assert opened.model(np.zeros((1, 3, 2))).dtype == np.float64


def test_other_data_are_options_and_are_kept_with_the_scores(finished, tmp_path):
    folder = shutil.copytree(finished(TEXT), tmp_path / "x")
    known = "".join(map(chr, experiments.open(folder).result.characters))
    other = tmp_path / "other.txt"
    other.write_text(known[-30:] * 20)
    assert main(["evaluate", str(folder), "--best", "--data.path", str(other)]) == 0
    *_, line = (folder / EVALUATIONS).read_text().splitlines()
    evaluation = json.loads(line)
    assert evaluation["data"]["path"] == str(other) and evaluation["checkpoint"] == "best"
    assert evaluation["test_loss"] != kept_scores(folder)["test_loss"]


@pytest.mark.parametrize(
    "name, options, part",
    [
        (
            LSTM,
            ["--data.source", "mnist"],
            "has images of 4 × 6 × 1 pixels in 10 classes, and the run's",
        ),
        (LSTM, ["--data.shift", "7"], "shift: should be less than or equal to 3, got 7"),
        (TEXT, [], "has characters that the model does not know: '\\ue000'"),
    ],
)
def test_data_that_will_not_do_are_a_sentence(name, options, part, finished, tmp_path, capsys):
    from tests.experiments.data.test_mnist import arrays, write_npz

    path = write_npz(tmp_path, arrays()) if "mnist" in options else None
    if name == TEXT:
        path = tmp_path / "other.txt"
        path.write_text("\ue000" * 100)
    given = ["--data.path", str(path)] if path else []
    folder = finished(name)
    before = (folder / EVALUATIONS).read_bytes() if (folder / EVALUATIONS).exists() else None
    capsys.readouterr()
    assert main(["evaluate", str(folder), *options, *given]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and part in message
    assert before == ((folder / EVALUATIONS).read_bytes() if before is not None else None)


# ---- sample ----------------------------------------------------------------------------------


def sampled(folder: Path, capsys, *options: str) -> str:
    capsys.readouterr()
    assert main(["sample", str(folder), *options]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("name", [TEXT, ATTENTION])
def test_a_sample_without_options_is_that_of_the_run(name, finished, capsys):
    folder = finished(name)
    own = (folder / "sample.txt").read_bytes().decode()
    assert experiments.open(folder).sample(length=len(own)) == own


def test_a_sample_follows_from_its_options(finished, capsys):
    folder = finished(TEXT)
    options = ("--prompt", "The ", "--length", "40")
    once = sampled(folder, capsys, *options, "--seed", "1")
    assert once.startswith("The ") and once == sampled(folder, capsys, *options, "--seed", "1")
    assert once != sampled(folder, capsys, *options, "--seed", "2")


@pytest.mark.parametrize("name", [TEXT, ATTENTION])
def test_at_temperature_0_each_character_is_the_likeliest(name, finished, capsys):
    folder = finished(name)
    options = ("--prompt", "The ", "--length", "5", "--temperature", "0")
    text = sampled(folder, capsys, *options, "--seed", "1")
    assert text == sampled(folder, capsys, *options, "--seed", "2")
    opened = experiments.open(folder)
    logits = opened.model(["The " + opened.sample("The ", length=5, temperature=0)])[0]
    likeliest = opened.result.characters[np.argmax(logits, axis=-1)]
    assert "".join(map(chr, likeliest[3:8])) == opened.sample("The ", length=5, temperature=0)


def test_a_low_temperature_comes_near_the_likeliest(finished):
    opened = experiments.open(finished(TEXT))
    likeliest = opened.sample("The ", length=20, temperature=0)
    for temperature in (1e-6, 1e-40, 1e-300):
        assert opened.sample("The ", length=20, temperature=temperature) == likeliest


def test_at_a_temperature_of_any_size_all_characters_are_drawn_alike(finished):
    # in float32 that is infinite
    opened = experiments.open(finished(TEXT))
    hottest, hot = (opened.sample(length=20, temperature=each) for each in (1e300, 1e30))
    assert hottest == hot and len(set(hot)) > 5


@pytest.mark.parametrize(
    "name, options, part",
    [
        (TEXT, ["--prompt", "a\ue000"], "--prompt: has characters that the model does not know"),
        (TEXT, ["--temperature", "-1"], "--temperature: should be 0 or a number above, got -1"),
        (TEXT, ["--temperature", "nan"], "--temperature: should be"),
        (TEXT, ["--length", "0"], "--length: should be from 1 to"),
        (TEXT, ["--seed", "-1"], "--seed: should be from 0 to"),
        (LSTM, [], "lstm_digits writes no text"),
    ],
)
def test_what_cannot_be_written_is_a_sentence(name, options, part, finished, capsys):
    folder = finished(name)
    capsys.readouterr()
    assert main(["sample", str(folder), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and part in message


# ---- --init ----------------------------------------------------------------------------------

STILL = ("--train.learning-rate", "1e-30", "--train.best", "validation_loss")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_training_begins_with_the_parameters_of_a_run_or_a_file(name, finished, tmp_path):
    """At a rate at which nothing moves, it ends with them as well."""
    source = folder = finished(name)
    if name == "vit_digits":
        source = tmp_path / "params.safetensors"
        assert main(["export", str(folder), "--output", str(source)]) == 0
    assert run(name, tmp_path, "--init", str(source), *STILL) == 0
    opened, before = (experiments.open(each) for each in (tmp_path / name / "x", folder))
    same = jax.tree.map(np.array_equal, opened.params, before.params)
    assert all(jax.tree.leaves(same))
    assert opened.scores["test_loss"] == before.scores["test_loss"]
    config = tomllib.loads((tmp_path / name / "x" / "config.toml").read_text())
    assert config["train"]["init"] == str(source) == opened.config.train.init
    assert "init_sha256" not in before.scores and len(opened.scores["init_sha256"]) == 64


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_parameters_that_it_began_with(finished, tmp_path, capsys):
    folder = finished(LSTM)
    assert run(LSTM, tmp_path, "--init", str(folder)) == 0
    capsys.readouterr()
    assert run(LSTM, tmp_path, "--resume") == 2
    assert f'train.init was "{folder}" and would be null' in capsys.readouterr().err
    again = ["run", str(tmp_path / LSTM / "x" / "config.toml"), "--output", str(tmp_path)]
    assert main([*again, "--name", "again"]) == 0
    first, second = (kept_scores(tmp_path / LSTM / name) for name in ("x", "again"))
    assert second["init_sha256"] == first["init_sha256"]
    assert second["test_loss"] == first["test_loss"]


def test_all_that_differs_is_one_sentence_and_leaves_no_folder(finished, tmp_path, capsys):
    file, output = tmp_path / "params.safetensors", tmp_path / "outputs"
    assert main(["export", str(finished(LSTM)), "--output", str(file)]) == 0
    arrays = load_file(file)
    arrays["extra"] = arrays.pop("b")
    arrays["w"] = arrays["w"].astype(np.float16)
    arrays["lstm.w_h"] = arrays["lstm.w_h"][:2].copy()
    save_file(arrays, file)
    capsys.readouterr()
    assert run(LSTM, output, "--init", str(file)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(file) in message and not output.exists()
    for part in (
        "b: missing", "extra: not expected", "w: expected float32[3, 10], got float16[3, 10]",
        "lstm.w_h: expected float32[3, 12], got float32[2, 12]",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("nothing.safetensors", None, "cannot be read: No such file"),
        ("params.safetensors", b"no", "damaged, or no such file"),
        ("params.npz", b"no", "damaged, or no such file"),
        ("params.pt", b"no", "is neither the folder of a run nor a file .safetensors or .npz"),
    ],
)
def test_what_holds_no_parameters_is_a_sentence(name, content, part, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(LSTM, tmp_path / "outputs", "--init", str(tmp_path / name)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("--init: ") and part in message
    assert not (tmp_path / "outputs").exists()


def test_an_experiment_that_does_not_say_what_it_trains_takes_no_parameters(tmp_path, capsys):
    assert run("lstm_gradient_training", tmp_path, "--init", "x") == 2
    message = capsys.readouterr().err
    assert "--init: lstm_gradient_training does not say what it trains" in message
