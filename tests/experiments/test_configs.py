"""Every config runs; what is wrong with a config, or a command, is said in one message."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.__main__ import CONFIGS, EXPERIMENTS, main
from experiments.config import claim, read, to_table
from experiments.runs import CHECKPOINTS, CONFIG, CURVES, FIGURE, METRICS, RESULT, SUMMARY

TINY_TRAINING = (
    "--train.steps 4 --train.batch-size 4 --train.log-every 2 --train.evaluate-every 2"
    " --model.hidden-size 3 --compare-steps 2"
)
TINY_VIT = (
    "--train.steps 4 --train.batch-size 4 --train.log-every 2 --train.evaluate-every 2"
    " --model.width 8 --model.depth 1 --model.num-heads 2"
)
TINY = {
    "attention_averaging": "--several-keys 3 --betas 1 2",
    "attention_copying": "--draws 3 --keys 3 --scales 1 --lengths 0.5 1",
    "dot_product_variance": "--widths 1 4 --samples 1000",
    "key_noise": "--samples 100 --keys 3 --several-keys 2 --betas 1",
    "multi_head_noise": "--samples 100 --keys 3 --several-keys 2 --betas 10 --heads 2",
    "softmax_saturation": "--widths 4 1024 --samples 100 --keys 3",
    "subspace_projection": "--width 5 --rank 2 --draws 2",
    "lstm_adding": f"{TINY_TRAINING} --data.length 4 --data.held-out 8",
    "lstm_digits": TINY_TRAINING,
    "lstm_equations": "--length 2 --hidden-size 2",
    "lstm_gradient": "--lengths 1 --cases 2 --hidden-size 2",
    "lstm_gradient_training": (
        "--train.steps 2 --train.batch-size 4 --train.log-every 1 --train.evaluate-every 2"
        " --runs 1 --hidden-size 3 --data.length 4 --data.held-out 8"
    ),
    "lstm_text": f"{TINY_TRAINING} --data.window 5 --sample-length 20",
    "mnist_rows_lstm": f"{TINY_TRAINING} --data.source digits",
    "rotary_relative": "--dim 4 --distances 5 --powers 0 8",
    "sinusoidal_shift": "--dim 4 --positions 20 --offsets 1 2.5 --powers 6",
    "vit_digits": TINY_VIT,
    "vit_mnist": f"{TINY_VIT} --data.source digits",
    "vit_resolution": (
        f"{TINY_VIT} --data.source digits --runs 1 --tune-steps 2 --methods learned pad"
    ),
}
TEXTS = {
    "lstm_digits": {"table.txt"},
    "lstm_text": {"sample.txt"},
    "mnist_rows_lstm": {"table.txt"},
    "vit_digits": {"table.txt"},
    "vit_mnist": {"table.txt"},
    "vit_resolution": {"table.txt", "verdicts.txt"},
}
TRAINING = {name for name, options in TINY.items() if "--train.steps" in options}
TYPES = {name: experiment.Config for name, experiment in EXPERIMENTS.items()}


def paths() -> list[Path]:
    return sorted(CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_every_config_runs_at_a_tiny_size(path, tmp_path):
    assert path.stem in TINY, f"{path.name} has no tiny size in this test's table"
    options = ["--name", "tiny", "--output", str(tmp_path)]
    assert main(["run", str(path), *TINY[path.stem].split(), *options]) == 0
    folder = tmp_path / path.stem / "tiny"
    # what logs nothing has no curves
    curves = {CURVES} if EXPERIMENTS[read(path, TYPES)[0]].LABELS else set()
    files = {CONFIG, METRICS, SUMMARY, RESULT, FIGURE} | curves | TEXTS.get(path.stem, set())
    if path.stem in TRAINING:
        files.add(CHECKPOINTS)
    assert {file.name for file in folder.iterdir()} == files


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_every_config_says_what_it_claims_and_how_to_run_it(path):
    assert claim(path)
    assert f"# python -m experiments run configs/{path.name}\n" in path.read_text()


def test_quick_takes_the_defaults_of_the_experiment_for_the_values_of_the_file(tmp_path):
    path = CONFIGS / "attention_averaging.toml"
    options = ["--quick", "--betas", "1", "2", "--name", "x", "--output", str(tmp_path)]
    assert main(["run", str(path), *options]) == 0
    name, config = read(tmp_path / path.stem / "x" / CONFIG, TYPES)
    assert config == replace(TYPES[name](), betas=(1.0, 2.0)) != read(path, TYPES)[1]


def test_every_experiment_has_a_config():
    assert {read(path, TYPES)[0] for path in paths()} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_default_config_is_valid_and_survives_being_written(name, tmp_path):
    import tomli_w

    file = tmp_path / "default.toml"
    file.write_text(tomli_w.dumps(to_table(name, TYPES[name]())))
    assert read(file, TYPES) == (name, TYPES[name]())


def test_list_names_every_config_with_its_claim(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for path in paths():
        assert path.name in output and claim(path) in output


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["list", "--help"]]
)
def test_every_level_has_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "python -m experiments" in capsys.readouterr().out


def test_help_of_a_run_lists_each_field_with_meaning_type_and_present_value(tmp_path, capsys):
    file = tmp_path / "x.toml"
    file.write_text('# A claim.\nexperiment = "lstm_digits"\n[train]\nsteps = 1234\n')
    with pytest.raises(SystemExit):
        main(["run", str(file), "--help"])
    output = capsys.readouterr().out
    assert "A claim." in output
    assert "--train.steps INT" in output
    assert "Optimiser steps. (default: 1234)" in output
    assert "--model.gradient {hand,autodiff}" in output


BAD = {
    "unknown key": (
        'experiment = "lstm_digits"\n[train]\nstep = 3',
        ["train.step:", "did you mean train.steps?"],
    ),
    "key of a group at the top": (
        'experiment = "lstm_digits"\nsteps = 3',
        ["steps:", "did you mean train.steps?"],
    ),
    "key of another experiment": (
        'experiment = "lstm_digits"\n[data]\nlength = 3',
        ["data.length:", "unknown key"],
    ),
    "wrong type": (
        'experiment = "lstm_digits"\n[train]\nsteps = "many"',
        ["train.steps:", "integer", '"many"'],
    ),
    "boolean for an integer": (
        'experiment = "lstm_digits"\nseed = true',
        ["seed:", "integer", "true"],
    ),
    "value for a group": ('experiment = "lstm_digits"\ntrain = 3', ["train:", "got 3"]),
    "out of range": (
        'experiment = "lstm_digits"\n[train]\nsteps = 0',
        ["train.steps:", "greater than 0", "got 0"],
    ),
    "not a number": (
        'experiment = "lstm_digits"\n[train]\nlearning_rate = nan',
        ["train.learning_rate:", "finite"],
    ),
    "infinite": (
        'experiment = "lstm_digits"\n[train]\nclip_norm = inf',
        ["train.clip_norm:", "finite"],
    ),
    "no such choice": (
        'experiment = "lstm_digits"\n[model]\ngradient = "mine"',
        ["model.gradient:", "'hand' or 'autodiff'", '"mine"'],
    ),
    "date": (
        'experiment = "lstm_digits"\nseed = 2020-01-01',
        ["seed:", "integer"],
    ),
    "bad TOML": ('experiment = "lstm_digits"\nseed = = 1', ["not valid TOML", "line 2"]),
    "not text": (b"experiment = \xff", ["not valid TOML", "UTF-8"]),
    "unknown experiment": ('experiment = "lstm_digit"', ["experiment:", "lstm_digits?"]),
    "dotted path for an experiment": ('experiment = "os.system"', ["experiment:", "lstm_digits"]),
    "experiment of another type": ("experiment = [1]", ["experiment:", "lstm_digits"]),
    "no experiment": ("seed = 1", ["experiment", "lstm_digits"]),
}  # fmt: skip


@pytest.mark.parametrize("content, parts", BAD.values(), ids=BAD)
def test_a_bad_config_is_one_line_that_names_file_and_key(content, parts, tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["run", str(file), "--output", str(tmp_path / "outputs")]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{file}: ")
    for part in parts:
        assert part in message
    assert not (tmp_path / "outputs").exists()


def test_a_missing_config_names_the_nearest(capsys):
    assert main(["run", str(CONFIGS / "lstm_digit.toml")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "no such config file" in message and "lstm_digits.toml?" in message


def test_a_folder_is_no_config(tmp_path, capsys):
    assert main(["run", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: is a folder, not a config file\n"


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--train.step", "3"], ["--train.steps"]),
        (["--train.steps", "many"], ["--train.steps", "many"]),
        (["--model.dtype", "float16"], ["--model.dtype", "float16", "float64"]),
    ],
)
def test_a_bad_option_names_the_right_one(options, parts, capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", str(CONFIGS / "lstm_digits.toml"), *options])
    assert end.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "options, part",
    [
        (["--train.steps", "-1"], "train.steps: should be greater than 0, got -1"),
        (["--train.learning-rate", "inf"], "train.learning_rate: should be a finite number"),
        (["--data.shift", "9"], "data.shift: should be less than or equal to 3, got 9"),
    ],
)
def test_an_option_out_of_range_is_one_line_that_names_file_and_key(options, part, capsys):
    path = CONFIGS / "lstm_digits.toml"
    assert main(["run", str(path), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(path) in message and part in message


def test_the_config_comes_first(capsys):
    assert main(["run", "--name", "x", "configs/lstm_digits.toml"]) == 2
    assert "the config comes first" in capsys.readouterr().err
