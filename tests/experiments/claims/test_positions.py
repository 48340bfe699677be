"""P1–P4: the evidence, and the verdicts that follow from it."""

from functools import partial

import numpy as np
import pytest

from experiments.claims import rotary_relative, sinusoidal_shift
from experiments.engine.config import UsageError

SHIFT = sinusoidal_shift.TINY
ROTARY = rotary_relative.TINY


@pytest.fixture(scope="module")
def shift() -> sinusoidal_shift.Result:
    return sinusoidal_shift.run(SHIFT)


@pytest.fixture(scope="module")
def rotary() -> rotary_relative.Result:
    return rotary_relative.run(ROTARY)


def verdicts(module, config, result) -> dict[str, str]:
    claims = module.claims(config, result)
    assert [claim.id for claim in claims] == list(module.CLAIMS)
    return {claim.id: claim.verdict for claim in claims}


judge_shift = partial(verdicts, sinusoidal_shift, SHIFT)
judge_rotary = partial(verdicts, rotary_relative, ROTARY)


def test_sinusoids_and_their_shift_hold_and_the_last_line_as_corrected(shift):
    assert judge_shift(shift) == {"P1": "holds", "P2": "holds", "P3": "holds as corrected"}
    assert shift.shift_errors.shape == shift.fit_errors.shape == (3, 3)
    assert shift.reading_errors.shape == (4, 3)


def test_other_frequencies_fail(shift):
    product = sinusoidal_shift.frequencies(SHIFT).product
    for other in (product, shift.usual_frequencies):
        assert judge_shift(shift._replace(found_frequencies=other))["P1"] == "fails"


def test_a_shift_that_misses_or_moves_with_t_fails(shift):
    transposed = shift._replace(shift_errors=shift.shift_errors[[1, 0, 2]])
    assert judge_shift(transposed)["P2"] == "fails"
    moving = shift.fit_errors.copy()
    moving[2] = 1e-3
    assert judge_shift(shift._replace(fit_errors=moving))["P2"] == "fails"
    drifting = shift._replace(float32_errors=shift.float32_errors[::-1])
    assert judge_shift(drifting)["P2"] == "fails"


def test_each_slip_of_the_last_line_is_seen_alone(shift):
    for slip in (1, 2, 3):
        order = [slip, *(k for k in range(4) if k != slip)]
        other = shift._replace(reading_errors=shift.reading_errors[order])
        assert judge_shift(other)["P3"] == "fails"
    no_slip = shift._replace(reading_errors=np.tile(shift.reading_errors[0], (4, 1)))
    assert judge_shift(no_slip)["P3"] == "undecided"


def test_frequencies_are_read_off_any_sinusoids():
    λ = np.array([0.9, 0.031, 2e-4])
    found = sinusoidal_shift.frequencies_of(lambda t: sinusoidal_shift.sinusoids_of(t, λ), 1e5)
    np.testing.assert_allclose(found, λ, rtol=1e-11)


def test_too_few_positions_to_find_a_matrix_from_are_refused():
    with pytest.raises(UsageError, match="positions: should be at least twice dim = 16, got 20"):
        sinusoidal_shift.check(sinusoidal_shift.Config(positions=20))


def test_rotary_products_are_relative(rotary):
    assert judge_rotary(rotary) == {"P4": "missing in the notes"}
    assert rotary.rotated.shape == rotary.rotated32.shape == (3, 21)
    np.testing.assert_allclose(
        rotary.rotated, np.tile(rotary_relative.closed_form(ROTARY), (3, 1)), atol=1e-9
    )


def test_what_is_not_relative_fails(rotary):
    wrong = {
        "rotated": rotary.query_only,
        "rotated32": rotary.plain32 + 1e-3,
        "law_errors": rotary.law_errors + np.array([0, 0, 1e-6, 0])[:, None],
        "gradient_errors": rotary.gradient_errors[[1, 0, 2]],
    }
    for field, value in wrong.items():
        assert judge_rotary(rotary._replace(**{field: value})) == {"P4": "fails"}, field


@pytest.mark.parametrize("module", [sinusoidal_shift, rotary_relative], ids=["shift", "rotary"])
def test_a_figure_names_its_axes(module, shift, rotary):
    figure = module.plot(*((SHIFT, shift) if module is sinusoidal_shift else (ROTARY, rotary)))
    assert len(figure.axes) == 3
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
