"""A config may say only what differs from another, its base."""

import tomllib
from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.engine.config import UsageError
from experiments.engine.experiment import config_paths, read
from tests.experiments.sizes import tiny_options


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_what_a_config_does_not_say_is_as_its_base_has_it(tmp_path):
    path = write(tmp_path, "x.toml", 'base = "lstm_digits"\nseed = 3\n[train]\nsteps = 7\n')
    experiment, base = read(config_paths()["lstm_digits"])
    assert read(path) == (experiment, replace(base, seed=3, train=replace(base.train, steps=7)))


def test_a_base_is_a_path_from_the_folder_of_the_config_too(tmp_path):
    (tmp_path / "inside").mkdir()
    write(tmp_path, "b.toml", 'experiment = "lstm_adding"\nseed = 5\n[data]\nlength = 3\n')
    path = write(tmp_path / "inside", "x.toml", 'base = "../b.toml"\n[data]\nheld_out = 9\n')
    experiment, config = read(path)
    assert experiment.name == "lstm_adding" and config.seed == 5
    assert (config.data.length, config.data.held_out) == (3, 9)


def test_a_run_keeps_the_config_without_its_base(tmp_path):
    path = write(tmp_path, "x.toml", 'base = "lstm_adding"\nexperiment = "lstm_adding"\n')
    options = [*tiny_options("lstm_adding"), "--name", "x", "--output", str(tmp_path)]
    assert main(["run", str(path), *options]) == 0
    kept = tomllib.loads((tmp_path / "x" / "x" / "config.toml").read_text())
    assert "base" not in kept and kept["train"]["clip_norm"] == 1.0


def test_a_base_of_frequencies_is_a_key_as_any(tmp_path):
    path = write(tmp_path, "x.toml", 'experiment = "rotary_relative"\nbase = 500.0\n')
    assert read(path)[1].base == 500.0
    path = write(tmp_path, "y.toml", 'base = "x.toml"\nseed = 3\n')
    assert (read(path)[1].base, read(path)[1].seed) == (500.0, 3)


@pytest.mark.parametrize(
    "content, part",
    [
        ('base = "lstm_digit"', "there is no config lstm_digit; did you mean lstm_digits?"),
        ('base = "nowhere/b.toml"', "there is no config nowhere/b.toml"),
        ('experiment = "lstm_digits"\nbase = 3', "unknown key"),
        ('base = "vit_mnist"', "vit_mnist has a base itself, and only one level is read"),
        ('base = "x.toml"', "x.toml has a base itself"),
        ('base = "lstm_text"\nexperiment = "lstm_digits"',
         "lstm_text is of lstm_text, and this is of lstm_digits"),
    ],
)  # fmt: skip
def test_a_base_that_will_not_do_is_one_sentence(content, part, tmp_path, capsys):
    path = write(tmp_path, "x.toml", content)
    assert main(["run", str(path), "--output", str(tmp_path / "outputs")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{path}: base: ") and message.count("\n") == 1
    assert part in message and not (tmp_path / "outputs").exists()


def test_a_key_of_another_experiment_is_unknown_with_a_base_as_well(tmp_path):
    path = write(tmp_path, "x.toml", 'base = "lstm_digits"\n[data]\nlength = 3\n')
    with pytest.raises(UsageError, match=r"data\.length: unknown key"):
        read(path)
