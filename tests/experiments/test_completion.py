"""The scripts with which shells complete commands, configs and options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.engine.experiment import config_paths

COMMANDS = (
    "compare", "completion", "evaluate", "export", "list", "report", "run", "sample", "sweep"
)  # fmt: skip


@pytest.fixture(scope="module")
def bash(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("bash") / "completion.bash"
    command = [sys.executable, "-m", "experiments", "completion", "bash"]
    with file.open("w") as script:
        subprocess.run(command, stdout=script, check=True)
    return file


def completed(script: Path, *words: str) -> list[str]:
    """What bash would complete the last of the words to."""
    code = (
        f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _experiments; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", code, "bash", "experiments", *words],
        capture_output=True, text=True, check=True, env=os.environ | {"PATH": path},
    )  # fmt: skip
    return done.stdout.split()


def test_bash_accepts_the_script(bash):
    subprocess.run(["bash", "-n", str(bash)], check=True)


@pytest.mark.parametrize(
    "words, expected",
    [
        ([""], ["-h", "--help", *COMMANDS]),
        (["run", ""], ["-h", "--help", *config_paths()]),
        (["run", "lstm_d"], ["lstm_digits"]),
        (["sweep", "lstm_d"], ["lstm_digits"]),
        (["run", "lstm_digits", "--train.st"], ["--train.steps"]),
        (["run", "lstm_digits", "--res"], ["--resume"]),
        (["run", "lstm_digits", "--model.gradient", ""], ["hand", "autodiff"]),
        (["sweep", "lstm_digits", "--jo"], ["--jobs"]),
        (["run", "lstm_text", "--data.w"], ["--data.window"]),
        (["sample", "x", "--temp"], ["--temperature"]),
        (["export", "x/"], []),
    ],
)
def test_bash_completes_commands_configs_options_and_values(words, expected, bash):
    assert sorted(completed(bash, *words)) == sorted(expected)


def test_the_script_for_zsh_names_commands_and_configs(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef experiments\n")
    assert all(f"'{name}'" in script or f'"{name}"' in script
               for name in (*COMMANDS, *config_paths()))  # fmt: skip
