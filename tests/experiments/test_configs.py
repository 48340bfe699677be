"""Every config runs; what is wrong with a config, or a command, is said in one message."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from experiments.__main__ import main
from experiments.engine.config import claim
from experiments.engine.experiment import CONFIGS, ROOT, config_paths, read
from experiments.engine.runs import CONFIG, FIGURE
from experiments.engine.training import TrainConfig, make_schedule
from experiments.tasks import lstm_adding
from tests.experiments.sizes import tiny_options


def paths() -> list[Path]:
    return list(config_paths().values())


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_every_config_says_what_it_claims_and_how_to_run_it(path):
    assert claim(path)
    assert f"# python -m experiments run {path.stem}\n" in path.read_text()


def test_quick_takes_the_defaults_of_the_experiment_for_the_values_of_the_file(tmp_path):
    path = CONFIGS / "claims" / "attention_averaging.toml"
    options = ["--quick", "--betas", "1", "2", "--name", "x", "--output", str(tmp_path)]
    assert main(["run", str(path), *options]) == 0
    experiment, config = read(tmp_path / path.stem / "x" / CONFIG)
    assert config == replace(experiment.Config(), betas=(1.0, 2.0)) != read(path)[1]


def test_list_names_every_config_with_its_claim(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for path in paths():
        assert path.stem in output and claim(path) in output


def test_a_list_imports_no_library_that_computes():
    code = "import sys; from experiments.__main__ import main; main(['list']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "experiments.engine.experiment" in loaded
    assert not loaded & {"jax", "flax", "optax", "scipy", "sklearn", "matplotlib", "orbax"}


def test_a_run_imports_no_other_experiment_and_no_library_that_it_does_not_use(tmp_path):
    code = (
        "import sys; from experiments.__main__ import main; main(sys.argv[1:]); print(*sys.modules)"
    )
    options = ["run", "lstm_adding", *tiny_options("lstm_adding"), "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "experiments.tasks.lstm_adding" in loaded
    assert not loaded & {"flax", "sklearn", "scipy.stats", "pandas", "tensorboardX"}
    assert not any(name.startswith(("experiments.claims", "experiments.report")) for name in loaded)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["list", "--help"]]
)
def test_every_level_has_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "python -m experiments" in capsys.readouterr().out


def test_help_fits_the_narrowest_of_terminals(monkeypatch, capsys):
    """With a few columns less, its layout never ended."""
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        main(["run", "lstm_adding", "--help"])
    assert "--resume" in capsys.readouterr().out


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
    "experiment like no other": ('experiment = "os.system"', ["unknown 'os.system'; there are "]),
    "a long name for an experiment": (f'experiment = "{"x" * 50_000}"', ["unknown 'x", "; there"]),
    "more than 64 bits": (
        'experiment = "lstm_digits"\n[train]\nsteps = 99999999999999999999',
        ["train.steps: should be a number of at most 64 bits"],
    ),
    "more than 64 bits, in a list": (
        'experiment = "lstm_gradient"\nlengths = [1, 99999999999999999999]',
        ["lengths.1: should be a number of at most 64 bits"],
    ),
    "thousands of digits": (
        f'experiment = "lstm_digits"\nseed = {"9" * 5000}',
        ["not valid TOML: a number has too many digits"],
    ),
    "thousands of hexadecimal digits": (
        f'experiment = "lstm_digits"\nseed = 0x{"f" * 5000}', ["seed: should be a number"]
    ),
    "more steps than are counted": (
        'experiment = "lstm_digits"\n[train]\nsteps = 2147483648',
        ["train.steps: should be less than 2147483648"],
    ),
    "an infinite literal": (
        'experiment = "lstm_digits"\n[train]\nlearning_rate = 1e400', ["learning_rate", "finite"]
    ),
    "an infinite shift": (
        'experiment = "rotary_relative"\nshifts = [inf, 1.0]', ["shifts.0: should be less than"]
    ),
    "no values": ('experiment = "key_noise"\nbetas = []', ["betas: should have at least 1"]),
    "a number for a list": ('experiment = "key_noise"\nbetas = 1', ["betas: should be a list"]),
    "half a step": (
        'experiment = "lstm_digits"\n[train]\nsteps = 1.5',
        ["train.steps: should be a valid integer, got 1.5"],
    ),
    "lists in lists": (f"experiment = {'[' * 5000}{']' * 5000}", ["nested too deep"]),
    "lists in some lists": (
        f'experiment = "lstm_digits"\nseed = {"[" * 300}{"]" * 300}', ["seed", "nested too deep"]
    ),
    "tables in tables": (
        f'experiment = "lstm_digits"\na = {"{a = " * 5000}1{"}" * 5000}', ["nested too deep"]
    ),
    "a key of thousands of parts": (
        f'experiment = "lstm_digits"\n{".".join("a" * 5000)} = 1', ["a.a.a", "nested too deep"]
    ),
    "escapes in a key": (
        'experiment = "lstm_digits"\n"\\u001b[2J\\nseed" = 1', ["\\x1b[2J\\nseed: unknown key"]
    ),
    "a long key": (f'experiment = "lstm_digits"\n{"k" * 50_000} = 1', ["kkk … kkk", "unknown key"]),
    "megabytes": ("#" * 10**7, ["no config file: it has more than"]),
}  # fmt: skip


@pytest.mark.parametrize("content, parts", BAD.values(), ids=BAD)
def test_a_bad_config_is_one_line_that_names_file_and_key(content, parts, tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["run", str(file), "--output", str(tmp_path / "outputs")]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert message.removesuffix("\n").isprintable() and len(message) < 1000 + len(str(file))
    assert message.startswith(f"{file}: ")
    for part in parts:
        assert part in message
    assert not (tmp_path / "outputs").exists()


def test_of_many_unknown_keys_the_first_ten_are_named(tmp_path, capsys):
    file = tmp_path / "many.toml"
    keys = "\n".join(f"k{n} = 1" for n in range(5000))
    file.write_text(f'experiment = "lstm_digits"\n{keys}')
    assert main(["run", str(file)]) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and last == f"{file}: and 4,990 more"


def test_a_mark_at_the_start_of_the_text_is_no_part_of_it(tmp_path):
    file = tmp_path / "marked.toml"
    file.write_text('# A claim.\nexperiment = "lstm_digits"\nseed = 3', encoding="utf-8-sig")
    assert read(file)[1].seed == 3 and claim(file) == "A claim."


TOO_LARGE = {
    "lstm_digits": "--model.hidden-size 1048576",
    "lstm_adding": "--train.batch-size 1048576 --data.length 100000",
    "lstm_text": "--model.hidden-size 1048576",
    "attention_text": "--model.width 1048576",
    "lstm_gradient_training": "--hidden-size 1048576",
    "vit_digits": "--model.width 1048576",
    "vit_resolution": "--data.source digits --batch-size 1048576 --model.width 1024",
    "attention_averaging": "--several-keys 1048576",
    "attention_copying": "--draws 1000000 --keys 1000",
    "dot_product_variance": "--widths 1 --samples 1000000000",
    "key_noise": "--samples 1000000000",
    "multi_head_noise": "--heads 1000000 --samples 1000000",
    "softmax_saturation": "--keys 1000000",
    "subspace_projection": "--width 1000000 --rank 400000",
    "lstm_equations": "--hidden-size 1000000",
    "lstm_gradient": "--hidden-size 100000",
    "image_patches": "--grids 1000",
    "rotary_relative": "--dim 1000000",
    "sinusoidal_shift": "--dim 100000 --positions 1000000",
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_does_not_fit_into_memory_is_refused_before_anything_is_made(name, tmp_path, capsys):
    output = tmp_path / "outputs"
    options = [*tiny_options(name), *TOO_LARGE[name].split(), "--output", str(output)]
    assert main(["run", name, *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not output.exists()
    assert re.search(r"needs about [\d,.]+ .iB of memory, and there are [\d,.]+ .iB", message)


def test_a_missing_config_names_the_nearest(capsys):
    assert main(["run", str(CONFIGS / "tasks" / "lstm_digit.toml")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "no such config file" in message and "lstm_digits.toml?" in message


@pytest.mark.parametrize("command", [["run"], ["sweep", "--grid", "seed=0"]])
@pytest.mark.parametrize(
    "name, hint",
    [
        ("lstm_digit", "did you mean lstm_digits"),
        ("os.system", "no such config file; "),
        ("x" * 300, "`python -m experiments list` has all"),
    ],
)
def test_a_name_that_no_config_has_is_told_with_those_near_it(command, name, hint, capsys):
    assert main([command[0], name, *command[1:]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no such config" in message and hint in message


def test_a_config_is_found_by_its_name_wherever_one_is(tmp_path, monkeypatch):
    """Also where a folder has it, as that of its runs does."""
    monkeypatch.chdir(tmp_path)
    Path("attention_averaging").mkdir()
    options = ["--quick", "--name", "x", "--output", "."]
    assert main(["run", "attention_averaging", *options]) == 0
    assert Path("attention_averaging", "x", FIGURE).exists()


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
        main(["run", "lstm_digits", *options])
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
    path = CONFIGS / "tasks" / "lstm_digits.toml"
    assert main(["run", str(path), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(path) in message and part in message


def test_the_config_comes_first(capsys):
    assert main(["run", "--name", "x", "configs/tasks/lstm_digits.toml"]) == 2
    assert "the config comes first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, part",
    [
        ("x" * 10**7, "argument 2: has 10,000,000 characters: xxx"),
        ("\x1b[2Jx.toml", r"argument 2: has characters that are not printed: \x1b[2Jx.toml"),
        ("a\nb.toml", r"argument 2: has characters that are not printed: a\nb.toml"),
        ("\0", r"argument 2: has characters that are not printed: \x00"),
        ("\udcff.toml", r"argument 2: has characters that are not printed: \udcff.toml"),
    ],
    ids=["long", "escape", "newline", "NUL", "no text"],
)
def test_what_is_no_argument_is_shown_so_that_a_terminal_stands_it(argument, part, capsys):
    assert main(["run", argument]) == 2
    message = capsys.readouterr().err
    assert message.startswith(part) and len(message) < 1100
    assert message.removesuffix("\n").isprintable()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_of_any_share_leaves_a_step(share, steps, schedule):
    schedule = make_schedule(TrainConfig(steps=steps, warmup=share, schedule=schedule))
    with jax.numpy_dtype_promotion("standard"):
        rates = [float(schedule(step)) for step in range(steps)]
    assert all(0 < rate <= TrainConfig().learning_rate * (1 + 1e-6) for rate in rates)
    assert rates == sorted(rates[: steps - 1]) + rates[-1:] or share < 0.9


def asked_in_a_new_process(arguments, folder, **environment):
    """What a process that was asked so says, in bytes."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", "experiments", *arguments]
    environment = clean | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True)


@pytest.mark.parametrize(
    "variable, value, parts",
    [
        ("RNNATTN_NATIVE", "banana", ["RNNATTN_NATIVE", "'banana'"]),
        ("JAX_PLATFORMS", "cuda", ["JAX_PLATFORMS=cuda", "no such devices"]),
        ("JAX_PLATFORMS", "banana", ["JAX_PLATFORMS=banana", "no such devices"]),
    ],
)
def test_devices_and_kernels_that_are_not_there_leave_no_folder(variable, value, parts, tmp_path):
    config = "attention_averaging"
    done = asked_in_a_new_process(["run", config, "--name", "x"], tmp_path, **{variable: value})
    message = done.stderr.decode()
    assert done.returncode == 2, message
    assert message.count("\n") == 1 and all(part in message for part in parts)
    assert not list(tmp_path.iterdir())


ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("arguments", [["list"], ["--help"]], ids=["list", "help"])
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "latin-1"}, ASCII_ONLY], ids=["latin-1", "ASCII"]
)
def test_a_terminal_without_utf_8_is_shown_what_it_can_show(arguments, environment, tmp_path):
    done = asked_in_a_new_process(arguments, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "error", [MemoryError("that"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: that")]
)
def test_a_run_that_finds_no_memory_says_so_and_the_others_of_a_sweep_go_on(
    error, tmp_path, monkeypatch, capsys
):
    def run(config, session):
        if config.seed == 0:
            raise error
        return real(config, session)

    real = lstm_adding.run
    monkeypatch.setattr(lstm_adding, "run", run)
    tiny = tmp_path / "tiny.toml"
    tiny.write_text('experiment = "lstm_adding"\ncompare_steps = 0\n[train]\nsteps = 2\n')
    assert main(["run", str(tiny), "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("stopped: no memory left: ") and message.count("\n") == 1
    assert main(["sweep", str(tiny), "--grid", "seed=0,1", "--output", str(tmp_path)]) == 1
    assert "seed-0: failed: " in capsys.readouterr().out
    assert (tmp_path / "tiny-sweep" / "seed-1" / FIGURE).is_file()
