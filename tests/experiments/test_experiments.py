"""Every experiment that there is, found by its file: it runs, and its config, its result, its
figure and its claims are what they should be.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tomli_w

from experiments.__main__ import main
from experiments.engine.config import UsageError, to_table
from experiments.engine.experiment import config_paths, find, names, read
from experiments.engine.runs import (
    CHECKPOINTS,
    CONFIG,
    CURVES,
    FIGURE,
    METRICS,
    RESULT,
    SUMMARY,
    WHERE,
    check,
    finished,
    read_result,
    texts,
)
from tests.experiments.sizes import leaves


def write_config(path, experiment, config):
    path.write_text(tomli_w.dumps(to_table(experiment.name, config)))
    return path


@pytest.mark.parametrize("name", names())
def test_an_experiment_runs_at_its_tiny_size_and_leaves_what_it_says(name, tmp_path, capsys):
    experiment = find(name)
    path = write_config(tmp_path / "tiny.toml", experiment, experiment.TINY)
    assert main(["run", str(path), "--name", "x", "--output", str(tmp_path)]) == 0
    folder = tmp_path / "tiny" / "x"
    assert finished(folder)
    assert read(folder / CONFIG)[1] == experiment.TINY

    result = read_result(folder, experiment.Result)
    for field, value in result._asdict().items():
        assert field == "scores" or isinstance(value, np.ndarray | str), field
    files = {CONFIG, METRICS, SUMMARY, RESULT, FIGURE} | {f"{text}.txt" for text in texts(result)}
    if experiment.LABELS:
        files.add(CURVES)
    if hasattr(experiment.TINY, WHERE):
        files.add(CHECKPOINTS)
    assert {file.name for file in folder.iterdir()} == files

    figure = experiment.plot(experiment.TINY, result)
    assert figure.axes and (folder / FIGURE).stat().st_size > 10_000

    claims = experiment.claims(experiment.TINY, result)
    assert [claim.id for claim in claims] == list(experiment.CLAIMS)
    output = capsys.readouterr().out
    for claim in claims:
        assert f"{claim.id:4} {claim.verdict}: {experiment.CLAIMS[claim.id]}" in output


@pytest.mark.parametrize("name", names())
def test_a_default_config_is_valid_and_survives_being_written(name, tmp_path):
    experiment = find(name)
    path = write_config(tmp_path / "default.toml", experiment, experiment.Config())
    found, config = read(path)
    assert found.name == name and config == experiment.Config()


@pytest.mark.thorough
@pytest.mark.parametrize("name", names())
def test_no_number_is_too_large_for_any_key_to_be_checked(name, tmp_path):
    """Each is refused, or the experiment's own check accepts it without allocating anything."""
    experiment = find(name)
    for key, _ in leaves(experiment.Config()):
        for value in ("9223372036854775807", "1e300", "1048576"):
            for literal in (value, f"[{value}, {value}]"):
                file = tmp_path / "large.toml"
                file.write_text(f'experiment = "{name}"\n{key} = {literal}')
                try:
                    config = read(file)[1]
                    if key.startswith("train.") and key != "train.batch_size":
                        # no size of the model, which is checked sooner where it is tiny
                        config = replace(experiment.TINY, train=config.train)
                    check(experiment, config)
                except UsageError as error:
                    assert all(line.isprintable() for line in str(error).splitlines())


def test_every_experiment_has_a_config_and_every_claim_one_of_its_experiment():
    assert {read(path)[0].name for path in config_paths().values()} == set(names())
    of_claims = {name for name, module in names().items() if ".claims." in module}
    assert of_claims <= config_paths().keys()


def test_names_and_claims_are_there_once():
    """Of experiments and of configs, whichever folder they are in."""
    for root, ending in (("experiments", "py"), ("configs", "toml")):
        found = Counter(
            path.stem
            for path in (find("lstm_digits").file.parents[2] / root).glob(f"*/*.{ending}")
            if path.parent.name in ("tasks", "claims") and path.stem != "__init__"
        )
        assert found and set(found.values()) == {1}
    claims = Counter(id_ for name in names() for id_ in find(name).CLAIMS)
    assert claims and set(claims.values()) == {1}
