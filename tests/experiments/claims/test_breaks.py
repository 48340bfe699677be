"""Every claim can fail: each notices a change of the library, or of what it rests on."""

import jax
import pytest

from experiments.engine.experiment import Experiment, find, names
from experiments.engine.session import SILENT
from tests.experiments.claims import (
    breaks_attention,
    breaks_images,
    breaks_lstm,
    breaks_positions,
    breaks_project,
)
from tests.experiments.claims.breaks import Break
from tests.experiments.claims.documents import VERDICTS, assert_stated

pytestmark = pytest.mark.slow

BREAKS = (
    *breaks_attention.BREAKS,
    *breaks_images.BREAKS,
    *breaks_lstm.BREAKS,
    *breaks_positions.BREAKS,
    *breaks_project.BREAKS,
)

OF_CLAIMS = [name for name, module in names().items() if ".claims." in module]

TRAINED = "vit_resolution"
"""Decided by no size of a second: its breaks are made in `test_vit_resolution`."""


MADE_HERE = [change for change in BREAKS if change.id not in find(TRAINED).CLAIMS]


def experiment_of(id: str) -> Experiment:
    return next(found for found in map(find, OF_CLAIMS) if id in found.CLAIMS)


def verdicts(experiment: Experiment) -> dict[str, str]:
    config = experiment.TINY
    result = experiment.run(config, SILENT)
    return {claim.id: claim.verdict for claim in experiment.claims(config, result)}


@pytest.fixture
def compiled_anew():
    """What was compiled before a change would go on as it was, and after it as it is not."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", [name for name in OF_CLAIMS if name != TRAINED])
def test_the_tiny_size_of_a_study_has_the_verdicts_of_the_readme(name):
    experiment = find(name)
    config = experiment.TINY
    found = experiment.claims(config, experiment.run(config, SILENT))
    expected = {id_: VERDICTS[id_] for id_ in experiment.CLAIMS}
    assert {claim.id: claim.verdict for claim in found} == expected
    for claim in found:
        assert_stated(experiment.CLAIMS[claim.id], claim)


@pytest.mark.thorough
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("change", MADE_HERE, ids=lambda change: f"{change.id} {change.target}")
def test_a_claim_notices_a_change_that_makes_it_wrong(change: Break, monkeypatch):
    monkeypatch.setattr(change.target, change.replacement)
    verdict = verdicts(experiment_of(change.id))[change.id]
    assert verdict in ("fails", "undecided")


def test_every_claim_has_a_change_to_notice():
    claims = {id for name in OF_CLAIMS for id in find(name).CLAIMS}
    assert {change.id for change in BREAKS} == claims
