"""V1 and V2 are judged by what the library computes: with another embedding they fail."""

import numpy as np
import pytest

from experiments.claims.image_patches import TINY, check, claims, counts, permutation_error, run
from experiments.engine.config import UsageError
from tests.experiments.claims.breaks_images import BREAKS


def verdicts(config=TINY):
    return {claim.id: claim.verdict for claim in claims(config, run(config))}


def test_the_library_cuts_images_as_the_notes_have_it():
    assert verdicts() == {"V1": "holds", "V2": "holds as corrected"}


@pytest.mark.parametrize("wrong", [b for b in BREAKS if b.id in ("V1", "V2")])
def test_another_cut_fails(wrong, monkeypatch):
    monkeypatch.setattr(wrong.target, wrong.replacement)
    assert verdicts()[wrong.id] == "fails"


def test_what_depends_on_what_is_counted():
    # three pixels: the first is in both tokens, the second in one, the third in none
    derivative = np.array([[[2.0, 0, 0], [0, 1, 0]], [[0.5, 0, 0], [0, 0, 0]]])
    assert counts(derivative) == (2, pytest.approx(2 / 3), 2)


@pytest.mark.parametrize(
    "matrix, error",
    [
        ([[0, 1], [1, 0]], 0),
        ([[1, 0], [1, 0]], 1),
        ([[0.75, 0.25], [0.25, 0.75]], 0.25),
        ([[1, 0], [0, 0]], 1),
    ],
)
def test_a_permutation_has_one_1_in_each_row_and_column(matrix, error):
    assert permutation_error(np.array(matrix, float)[:, None]) == error


def test_sizes_are_multiples_of_the_first():
    with pytest.raises(UsageError, match=r"grids: should be multiples of the first, 4, .*\(4, 6\)"):
        check(type(TINY)(grids=(4, 6)))
