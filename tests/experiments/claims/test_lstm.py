"""L1–L8: the evidence, the verdicts that follow from it, and the gradients that it is about."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnattn
from experiments.claims import lstm_equations, lstm_gradient, lstm_gradient_training
from experiments.claims.lstm_gradient import LIBRARY, METHODS, NO_CARRY, PRINTED, QUANTITIES, RIGHT
from experiments.data.adding import DataConfig
from experiments.engine.session import Session
from experiments.engine.training import TrainConfig
from experiments.models import lstm_variants
from experiments.models.lstm_variants import GRADIENTS
from tests.lstm_cases import assert_close, relative_error

SMALL = lstm_gradient.TINY


@pytest.fixture(scope="module")
def result() -> lstm_gradient.Result:
    return lstm_gradient.run(SMALL)


def verdicts(module, config, result) -> dict[str, str]:
    claims = module.claims(config, result)
    assert [claim.id for claim in claims] == list(module.CLAIMS)
    return {claim.id: claim.verdict for claim in claims}


def test_the_notes_gradient_holds_as_corrected(result):
    expected = dict.fromkeys(("L3", "L5", "L6", "L7"), "holds as corrected")
    expected |= {"L4": "holds only under a stated condition", "L8": "missing in the notes"}
    assert verdicts(lstm_gradient, SMALL, result) == expected


def test_every_error_is_there_but_those_inside_the_library(result):
    assert result.errors.shape == (2, len(METHODS), 2, len(QUANTITIES), 3)
    assert result.noise.shape == (2, 2, len(QUANTITIES), 3)
    missing = np.isnan(result.errors).any(axis=(0, 2, 4))
    inside = np.isin(QUANTITIES, lstm_variants.Steps._fields)
    np.testing.assert_array_equal(missing[METHODS.index(LIBRARY)], inside)
    assert not missing[: METHODS.index(LIBRARY)].any()


def test_the_noise_of_the_differences_is_far_below_the_tolerance(result):
    assert result.noise.max() < lstm_gradient.TOLERANCE
    right = result.errors[:, METHODS.index(RIGHT)]
    assert right.max() < lstm_gradient.TOLERANCE / 10


def with_errors_of(result, method, other):
    """The result as if `method` were as good or bad as `other`."""
    errors = result.errors.copy()
    errors[:, METHODS.index(method)] = errors[:, METHODS.index(other)]
    return result._replace(errors=errors)


def test_a_wrong_correction_fails(result):
    assert verdicts(lstm_gradient, SMALL, with_errors_of(result, RIGHT, PRINTED))["L3"] == "fails"
    for wrong in (PRINTED, NO_CARRY):
        found = verdicts(lstm_gradient, SMALL, with_errors_of(result, LIBRARY, wrong))
        assert [found[id] for id in ("L5", "L6", "L7", "L8")] == ["fails"] * 4
    swapped = result._replace(gate_errors=result.gate_errors[::-1])
    assert verdicts(lstm_gradient, SMALL, swapped)["L4"] == "fails"
    other = result._replace(factors=result.factors * np.array([1, 0.99])[:, None])
    assert verdicts(lstm_gradient, SMALL, other)["L3"] == "fails"
    spoilt = result._replace(rest_errors=result.rest_errors + 1e-3)
    assert verdicts(lstm_gradient, SMALL, spoilt)["L7"] == "fails"


def test_a_print_without_a_slip_or_too_much_noise_leaves_it_undecided(result):
    same = with_errors_of(result, PRINTED, RIGHT)
    assert verdicts(lstm_gradient, SMALL, same)["L3"] == "undecided"
    noisy = result._replace(noise=result.noise + 10)
    assert set(verdicts(lstm_gradient, SMALL, noisy).values()) == {"undecided"}


def test_one_step_says_nothing_of_what_is_carried_and_two_nothing_of_the_rest(result):
    def only(k):
        config = replace(SMALL, lengths=SMALL.lengths[k])
        part = result._replace(errors=result.errors[:, :, k], noise=result.noise[:, k])
        return verdicts(lstm_gradient, config, part)

    first = only(slice(0, 1))
    assert first["L8"] == "undecided" and first["L3"] == "holds as corrected"
    later = only(slice(1, 2))
    assert [later[id] for id in ("L3", "L5", "L6", "L7")] == ["undecided"] * 4


def test_differences_are_exact_for_a_polynomial_of_degree_four():
    x = np.array([0.3, -1.2])
    with jax.enable_x64(True):
        point = {"x": jnp.asarray(x)}
        estimate, noise = lstm_variants.differences(
            lambda p: jnp.sum(p["x"] ** 4 + p["x"] ** 3), point, 0.5
        )
    np.testing.assert_allclose(estimate["x"], 4 * x**3 + 3 * x**2, rtol=1e-12)
    assert np.max(np.abs(noise["x"])) < 1e-12


def draw_case(T):
    cases = lstm_gradient.draw_cases(SMALL, T)
    return jax.tree.map(lambda a: a[0], cases)


def test_a_nudge_where_a_quantity_is_read_is_not_one_where_it_is_made():
    with jax.enable_x64(True):
        case = draw_case(2)
        true, _ = lstm_variants.true_gradient(case, 4e-3)
        # h_1 is read by step 2 and by the loss
        read = true.steps.h[0] - case.dy[0]
        np.testing.assert_allclose(read, true.steps.h_prev[1], atol=1e-9)
        assert_close(true.state, (true.steps.h_prev[0], true.steps.c_prev[0]), rtol=1e-12)


def test_only_the_right_gradient_is_that_of_autodiff():
    """Of h_T alone, as training uses it."""
    with jax.enable_x64(True):
        params, x = draw_case(3)[:2]
        gradient = lambda last: jax.jit(
            jax.grad(lambda params, x: jnp.sum(jnp.sin(last(params, x))), (0, 1))
        )(params, x)
        expected = gradient(lambda p, x: rnnattn.reference.lstm(p, x, time_major=True)[1].h)
        for name, terms in GRADIENTS.items():
            error = relative_error(gradient(partial(lstm_variants.last_output, terms)), expected)
            assert error < 1e-12 if name == RIGHT else error > 0.1


# ---- L1, L2 ------------------------------------------------------------------------------------

EQUATIONS = lstm_equations.Config(length=3, batch_size=2, hidden_size=3)


@pytest.fixture(scope="module")
def equations() -> lstm_equations.Result:
    return lstm_equations.run(EQUATIONS)


def test_the_printed_equations_hold(equations):
    found = verdicts(lstm_equations, EQUATIONS, equations)
    assert found == {"L1": "holds", "L2": "holds"}


def test_other_equations_fail(equations):
    judge = partial(verdicts, lstm_equations, EQUATIONS)
    exchanged = equations._replace(found_gates=equations.found_gates[[1, 0, 2, 3]])
    assert judge(exchanged) == {"L1": "fails", "L2": "holds"}
    bare = equations._replace(printed_states=equations.bare_states)
    assert judge(bare) == {"L1": "holds", "L2": "fails"}


# ---- training ----------------------------------------------------------------------------------


def test_every_gradient_trains_from_the_same_start():
    config = lstm_gradient_training.Config(
        runs=1,
        hidden_size=4,
        data=DataConfig(length=6, held_out=8),
        train=TrainConfig(steps=6, batch_size=4, log_every=2, evaluate_every=6),
    )
    records: list = []
    result = lstm_gradient_training.run(config, Session(records.append))
    assert result.losses.shape == (4, 1, 3)
    assert result.test_losses.shape == result.cosines.shape == (4, 1)
    np.testing.assert_allclose(result.cosines[-1], 1, rtol=1e-5)
    assert np.all(result.cosines[:-1] < 0.999)
    assert {record["gradient"] for record in records} == set(GRADIENTS)
    # the gradients differ, so the weights part after the first step
    assert len(np.unique(result.losses[:, 0, -1])) == 4


@pytest.mark.parametrize("module", [lstm_gradient, lstm_equations], ids=["gradient", "equations"])
def test_a_figure_names_its_axes(module, result, equations):
    figure = module.plot(*((SMALL, result) if module is lstm_gradient else (EQUATIONS, equations)))
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) >= 2 and all(axes.get_xlabel() for axes in panels)
    assert panels[0].get_ylabel()


def test_a_figure_is_drawn_for_long_sequences_alone():
    config = lstm_gradient.Config(lengths=(4,), cases=2, hidden_size=2, input_size=1)
    figure = lstm_gradient.plot(config, lstm_gradient.run(config))
    assert any(
        "T = 4" in label.get_text() for axes in figure.axes for label in axes.get_yticklabels()
    )
