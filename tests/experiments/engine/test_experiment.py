"""What is no experiment is told before it runs, and what is no result without losing the rest."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.engine import experiment
from experiments.engine.config import UsageError
from experiments.engine.experiment import find, names
from experiments.engine.runs import finished

TOY = """
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from experiments.engine.config import Count, Seed
from experiments.engine.devices import ParallelConfig


@dataclass(frozen=True)
class Config:
    seed: Seed = 0
    count: Count = 3


class Result(NamedTuple):
    squares: np.ndarray
    words: str
    scores: dict[str, Any]


TINY = Config(count=2)


def run(config, session):
    return Result(np.arange(config.count) ** 2, "some", {"sum": 5})


def plot(config, result):
    from experiments.figures import new_figure

    figure = new_figure(3, 3)
    figure.subplots().plot(result.squares)
    return figure
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that makes `toy` an experiment, with changes to its source, and gives its file."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(experiment, "names", lambda: {"toy": "toy"})
    (tmp_path / "toy.toml").write_text('experiment = "toy"\n')

    def write(**changes: tuple[str, str]) -> Path:
        source = TOY
        for old, new in changes.values():
            assert old in source
            source = source.replace(old, new)
        (tmp_path / "toy.py").write_text(source)
        sys.modules.pop("toy", None)
        # what was compiled is known by the second that its source is of
        sys.dont_write_bytecode = True
        return tmp_path / "toy.py"

    yield write
    sys.modules.pop("toy", None)
    sys.dont_write_bytecode = False


def run(folder: Path, *options: str) -> int:
    config, output = str(folder / "toy.toml"), str(folder / "outputs")
    return main(["run", config, "--name", "x", "--output", output, *options])


def test_a_file_with_what_an_experiment_needs_is_one(toy, tmp_path, capsys):
    toy()
    assert run(tmp_path) == 0 and finished(tmp_path / "outputs" / "toy" / "x")
    found = find("toy")
    found.check(found.TINY)
    assert found.claims(found.TINY, None) == ()
    assert found.quick(found.TINY) == found.Config() and not (found.LABELS or found.BESIDE)


WRONG = {
    "no plot": (("def plot(", "def draw("), ["has no `plot`", "def plot(config, result)"]),
    "no size for tests": (("TINY =", "SMALL ="), ["has no `TINY`", "TINY = Config(...)"]),
    "no Result": (("class Result", "class Found"), ["has no `Result`", "a NamedTuple of arrays"]),
    "run of the config alone": (("run(config, session)", "run(config)"), ["`run`", "(config, ses"]),
    "plot of the result alone": (("plot(config, result)", "plot(result)"), ["`plot` should be"]),
    "a constant for a function": (("def plot(config", "plot = 3\ndef _plot(config"), ["`plot`"]),
    "a check of two": (("TINY =", "def check(a, b): ...\nTINY ="), ["`check`", "(config)"]),
    "TINY of another class": (("TINY = Config(count=2)", "TINY = 3"), ["`TINY`", "got int"]),
    "a number in the result": (
        ("words: str", "loss: float"),
        ["`Result.loss` is of type float", "make it an np.ndarray, a str or one of the `scores`"],
    ),
    "an array of JAX's in the result": (
        ("words: str", "words: jnp.ndarray"), ["`Result.words` is of", "Array, which is not saved"]
    ),
    "an annotation of nothing": (("words: str", "words: 'Nothing'"), ["annotation", "'Nothing'"]),
    "no scores": (("    scores: dict[str, Any]\n", ""), ["has no `scores`", "dict[str, Any]"]),
    "a result that is no tuple": (("(NamedTuple)", ""), ["`Result` should be a NamedTuple"]),
    "no seed": (("    seed: Seed = 0\n", ""), ["has no `seed`", "seed: Seed = 0"]),
    "a config that can be changed": (("(frozen=True)", ""), ["`Config` should be a frozen data"]),
    "a config of no known type": (("count: Count = 3", "count: np.random.Generator = 3"),
                                  ["`Config`", "Generator", "numbers, texts"]),
    "devices and no training": (
        ("count: Count = 3", "count: Count = 3\n    parallel: ParallelConfig = ParallelConfig()"),
        ["has `parallel` and no `train`"],
    ),
    "claims and no titles": (
        ("TINY =", "def claims(config, result): ...\nTINY ="), ["`CLAIMS` and `claims(config, res"]
    ),
    "a claim without a number": (
        ("TINY =", "CLAIMS = {'A': 'one'}\ndef claims(config, result): ...\nTINY ="),
        ["`CLAIMS`: an id should be a capital letter and a number", "got 'A'"],
    ),
    "titles that are no dict": (("TINY =", "LABELS = ('loss',)\nTINY ="), ["`LABELS`", "a dict"]),
}  # fmt: skip


@pytest.mark.parametrize("change, parts", WRONG.values(), ids=WRONG)
def test_what_is_no_experiment_is_told_in_a_line_before_anything_runs(
    change, parts, toy, tmp_path, capsys
):
    file = toy(change=change)
    assert run(tmp_path) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{file.name}: " in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("kind", ["NDArray[np.float64]", "Float[np.ndarray, 'B 2']"])
def test_arrays_may_say_what_is_in_them(kind, toy):
    toy(change=("squares: np.ndarray", f"squares: {kind}"))
    assert find("toy").Result


CONVERTED = {
    "jnp.arange(3)": np.arange(3),
    "jnp.ones(2, jnp.bfloat16)": np.ones(2, np.float32),
    "0.5": np.array(0.5),
    "[1, 2]": np.array([1, 2]),
    "np.float32(2)": np.array(2, np.float32),
    "True": np.array(True),
}


@pytest.mark.parametrize("value, expected", CONVERTED.items(), ids=CONVERTED)
def test_numbers_and_arrays_of_other_kinds_are_kept_as_numpys(value, expected, toy, tmp_path):
    toy(
        change=("np.arange(config.count) ** 2", value), scores=('"sum": 5', '"sum": jnp.float32(5)')
    )
    assert run(tmp_path) == 0
    folder = tmp_path / "outputs" / "toy" / "x"
    kept = np.load(folder / "result.npz")["squares"]
    np.testing.assert_array_equal(kept, expected)
    assert kept.dtype.kind == expected.dtype.kind
    assert json.loads((folder / "summary.json").read_text())["sum"] == 5.0


REFUSED = {
    "squares, None": ("np.arange(config.count) ** 2", "None", "squares (a NoneType"),
    "squares, a dict": ("np.arange(config.count) ** 2", "{'a': 1}", "squares (a dict"),
    "squares, ragged": ("np.arange(config.count) ** 2", "[[1], [1, 2]]", "squares ("),
    "squares, dates": ("np.arange(config.count) ** 2", "np.datetime64('now')", "squares (a date"),
    "a score, nan": ('"sum": 5', '"sum": float("nan")', "scores.sum (nan"),
    "a score, an array": ('"sum": 5', '"sum": np.arange(3)', "scores.sum ("),
    "a score, None": ('"sum": 5', '"sum": None', "scores.sum (a NoneType"),
}


@pytest.mark.parametrize("old, new, part", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_told_and_all_else_is_kept(old, new, part, toy, tmp_path, capsys):
    toy(change=(old, new))
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"is kept without {part}" in message, message
    folder = tmp_path / "outputs" / "toy" / "x"
    assert (folder / "words.txt").read_text() == "some"
    assert "wall_seconds" in json.loads((folder / "summary.json").read_text())
    if "scores" in part:
        np.testing.assert_array_equal(np.load(folder / "result.npz")["squares"], [0, 1, 4])
    assert not finished(folder)
    toy()
    assert run(tmp_path, "--resume") == 0 and finished(folder)


@pytest.mark.parametrize("what", ["None", "{'squares': 1}", "Result(np.ones(3), 'some', 5)"])
def test_a_run_that_returns_no_result_says_so(what, toy, tmp_path, capsys):
    toy(change=('Result(np.arange(config.count) ** 2, "some", {"sum": 5})', what))
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "`run` returned no Result with scores" in message


def test_a_file_or_a_folder_is_an_experiment_by_its_name(tmp_path, monkeypatch):
    for name in ("tasks/one.py", "claims/two/__init__.py", "claims/two/part.py", "tasks/x.toml"):
        path = tmp_path / "experiments" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    assert names() == {"one": "experiments.tasks.one", "two": "experiments.claims.two"}


def test_a_violation_names_the_file_from_where_one_stands(toy, tmp_path, monkeypatch):
    toy(change=("TINY =", "SMALL ="))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^toy\.py: has no `TINY`; give it `TINY = Config"):
        find("toy")
