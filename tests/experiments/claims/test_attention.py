"""A1 to A9: predictions, verdicts, and measurements that would change them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.claims import (
    attention_averaging,
    attention_copying,
    dot_product_variance,
    key_noise,
    multi_head_noise,
    softmax_saturation,
    subspace_projection,
)
from experiments.engine.config import UsageError
from experiments.models.normal_logits import weight_moments
from experiments.report.intervals import Mean, Quantile, Share, variance

SEED = 7
"""Fixed before the tests were first run."""

LEVEL = 1e-3
"""Of what is drawn here, with that seed."""

MODULES = (
    dot_product_variance,
    softmax_saturation,
    attention_copying,
    attention_averaging,
    subspace_projection,
    key_noise,
    multi_head_noise,
)


def holds(measurement: Any, predicted: float) -> bool:
    _, low, high = measurement.interval(LEVEL)
    return low <= predicted <= high


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_predictions_are_the_values_derived_for_the_notes():
    """The table of exact values under A9 in the list of claims, and A8's 0.2210."""
    for beta, one, both, positive in (
        (5.0, (0.49470, 0.149015), (0.38355, 0.025916), 0.016006),
        (10.0, (0.49998, 0.195321), (0.42878, 0.022832), 0.008623),
        (20.0, (0.50000, 0.222019), (0.44705, 0.020463), 0.004198),
    ):
        config = multi_head_noise.Config(beta=beta)
        specialised = multi_head_noise.specialised_moments(beta, 10)
        given = multi_head_noise.specialised_moments(beta, 10, low=0.0)
        for found in (key_noise.swing_moments(beta, 10), multi_head_noise.one_head_moments(config)):
            np.testing.assert_allclose(found, one, atol=6e-6)
        np.testing.assert_allclose(specialised, both, atol=6e-6)
        np.testing.assert_allclose([specialised[1], given[1]], [both[1], positive], atol=6e-7)
    assert key_noise.noisy_query_variance(10.0, 10) == pytest.approx(0.2210, abs=5e-5)
    assert multi_head_noise.lost_share(10.0, 10) == pytest.approx(0.135, abs=5e-4)
    assert multi_head_noise.lost_share(math.inf, 10) == pytest.approx(0.079, abs=5e-4)


@pytest.mark.parametrize(
    "keys, deviation, lead, leaders",
    [(5, 3.0, 0.0, 1), (16, 40.0, 0.0, 1), (10, 0.1, 1.0, 2), (4, 2.0, 3.0, 2), (2, 0.5, 9.0, 2)],
)
def test_moments_of_a_weight_are_those_of_direct_sampling(keys, deviation, lead, leaders):
    logits = deviation * np.random.default_rng(SEED).standard_normal((100_000, keys))
    logits[:, :leaders] += lead
    weight = softmax(logits)[:, 0]
    mean, square = weight_moments(keys, deviation, lead, leaders)
    assert holds(Mean.of(weight), mean) and holds(variance(weight), square - mean**2)


def test_moments_of_a_weight_where_they_are_known():
    for deviation in (1e-3, 1.0, 64.0):
        mean, square = weight_moments(6, deviation)
        assert mean == pytest.approx(1 / 6, rel=1e-12) and 1 / 36 < square < 1 / 6
    mean, square = weight_moments(2, 0.01, lead=5.0, leaders=2)
    # the logit difference is N(0, 2 · 0.01²), and the weight ½ and a quarter of it
    assert square - mean**2 == pytest.approx(2e-4 / 16, rel=1e-3)


def leading(random: np.random.Generator, keys: int, width: int, count: int):
    """A normal number that leads the others, a norm of q, and the weight of such a draw: by
    importance sampling, of a lead that is as short as it has to be for a gradient."""
    norm = np.sqrt(random.chisquare(width, count))
    others = random.standard_normal((count, keys - 1))
    lead = random.exponential(1.5 / norm)
    x = np.concatenate([(others.max(axis=1) + lead)[:, None], others], axis=1)
    weight = keys * stats.norm.pdf(x[:, 0]) / stats.expon.pdf(lead, scale=1.5 / norm)
    return x, norm, weight


def through(random: np.random.Generator, x: np.ndarray, norm: np.ndarray, width: int):
    """‖J‖_F and ‖KᵀJg‖ by the reduced law: K is K q / ‖q‖ along q, and normal across it."""
    p = softmax(norm[:, None] * x)
    squares = np.sum(p**2, axis=1)
    jacobian = np.sqrt(np.maximum(squares - 2 * np.sum(p**3, axis=1) + squares**2, 0))
    g = random.standard_normal(x.shape)
    g -= g[:, :1]
    back = p * (g - np.sum(p * g, axis=1, keepdims=True))
    across = np.sum(back**2, axis=1) * random.chisquare(width - 1, len(x))
    return jacobian, np.sqrt(across + np.sum(x * back, axis=1) ** 2)


def test_means_of_near_ties_are_those_of_the_reduced_law_and_not_their_limits():
    random, n, d = np.random.default_rng(SEED), 16, 4096
    x, norm, weight = leading(random, n, d, 300_000)
    jacobian, gradient = through(random, x, norm, d)
    theory, limit = softmax_saturation.near_ties(n, d), softmax_saturation.tie_density(n)
    for drawn, exact, in_the_limit in (
        (jacobian, theory.jacobian(), limit / math.sqrt(d)),
        (gradient, theory.gradient(), limit * math.sqrt(2 / math.pi)),
    ):
        mean = Mean.of(weight * drawn)
        assert holds(mean, exact) and not holds(mean, in_the_limit)


@pytest.mark.parametrize("keys", [3, 16])
def test_shares_and_quantiles_of_near_ties_are_those_of_the_reduced_law(keys):
    random, d = np.random.default_rng(SEED), 1024
    x, norm = random.standard_normal((100_000, keys)), np.sqrt(random.chisquare(d, 100_000))
    # the largest first, from which `through` takes differences
    _, gradient = through(random, -np.sort(-x, axis=1), norm, d)
    theory = softmax_saturation.near_ties(keys, d)
    for length in (1e-6, 1e-3, 1.0, 10.0):
        assert holds(Share.of(gradient < length), theory.below(length))
    for probability in (0.3, 0.5, 0.7):
        assert holds(Quantile(gradient, probability), theory.quantile(probability))


def test_near_ties_of_three_logits_are_all_there_is():
    """Then the trace is that of the whole softmax, but for the spread of ‖q‖."""
    theory = softmax_saturation.near_ties(3, 1024)
    whole = softmax_saturation.mean_trace(3, 1024, softmax_saturation.UNSCALED)
    assert theory.trace() == pytest.approx(whole, rel=1e-5)
    assert theory.mass.sum() == pytest.approx(1, rel=1e-9)


def times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """Of measurements, in a row each, other values with the same errors."""
    return lambda rows: rows * np.array([factor] + [1.0] * (rows.shape[-1] - 1))


# one by one, each of these makes its claim fail
WRONG: list[tuple[Any, str, str, Callable]] = [
    (dot_product_variance, "A1", "mean", lambda x: x + np.array([9, 0, 0, 0])),
    (dot_product_variance, "A1", "variance", times(0.5)),
    (dot_product_variance, "A1", "kurtosis_given_q", times(0.5)),
    (dot_product_variance, "A1", "kurtosis", times(0.5)),
    (dot_product_variance, "A1", "drawn", lambda x: 1.5 * x),
    (softmax_saturation, "A2", "drawn", lambda x: x[::-1]),
    (softmax_saturation, "A2", "logit_variance", times(2)),
    (softmax_saturation, "A2", "gradient_error", lambda x: x + 1e-6),
    (attention_copying, "A3", "sum_error", lambda x: x + 1e-6),
    (attention_copying, "A3", "lowest", lambda x: x - 1),
    (attention_copying, "A4", "tied", lambda x: x - 1e-6),
    (attention_copying, "A4", "weights", lambda x: x * 0.5),
    (attention_copying, "A4", "distances", lambda x: x + 1),
    (attention_copying, "A4", "length_weights", lambda x: x + 1e-6),
    (subspace_projection, "A5", "projector", lambda x: x + 1e-6),
    (subspace_projection, "A5", "coordinates_of_a", lambda x: x + 1e-6),
    (subspace_projection, "A5", "skewed_pseudoinverse", lambda x: x + 1e-6),
    (subspace_projection, "A5", "oblique", lambda x: x + 1e-6),
    (subspace_projection, "A5", "orthogonal", lambda x: x + 1e-6),
    (attention_averaging, "A6", "distance", lambda x: x / 2),
    (attention_averaging, "A6", "weights", lambda x: x * [1, 1.1]),
    (attention_averaging, "A6", "identity_error", lambda x: x + 1e-6),
    (key_noise, "A7", "blurred_mean", times(0.9)),
    (key_noise, "A7", "blurred_variance", times(0.25)),
    (key_noise, "A8", "swing_mean", times(0.5)),
    (key_noise, "A8", "swing_variance", times(2)),
    (key_noise, "A8", "swung", times(0.5)),
    (key_noise, "A8", "noisy_query_variance", times(0.5)),
    (key_noise, "A8", "formula_error", lambda x: x + 1e-6),
    (multi_head_noise, "A9", "one", times(0.5)),
    (multi_head_noise, "A9", "independent", times(1 / 1.5)),
    (multi_head_noise, "A9", "specialised", times(0.5)),
    (multi_head_noise, "A9", "positive", times(0.5)),
    (multi_head_noise, "A9", "keys_specialised", times(0.5)),
    (multi_head_noise, "A9", "lost", times(0.5)),
    (multi_head_noise, "A9", "identical_difference", lambda x: x + 1e-9),
    (multi_head_noise, "A9", "noiseless", lambda x: x - 1e-6),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_claims_hold_at_a_tiny_size_and_not_if_a_measurement_is_wrong_or_no_number(module):
    config = replace(module.TINY, seed=SEED)
    module.check(config)
    result = module.run(config)
    for name, array in result._asdict().items():
        assert name == "scores" or np.all(np.isfinite(array)), name
    for claim in module.claims(config, result):
        not_held = [e for e in claim.evidence["right"] if e.status != "supported"]
        assert claim.verdict not in ("fails", "undecided"), not_held
    for other, id_, field, change in WRONG:
        if other is module:
            found = getattr(result, field)
            for wrong, verdicts in (
                (change(found), {"fails"}),
                (np.full_like(found, np.nan), {"fails", "undecided"}),
            ):
                claims = module.claims(config, result._replace(**{field: wrong}))
                assert {c.verdict for c in claims if c.id == id_} <= verdicts, field
    assert {id_ for other, id_, _, _ in WRONG if other is module} == set(module.CLAIMS)


# and with each of these, nothing shows that the correction, or the condition, is needed
NOT_SHOWN: list[tuple[Any, str, str, Callable]] = [
    (attention_copying, "A4", "tied_short", lambda result: result.tied),
    (subspace_projection, "A5", "coordinates", lambda result: result.projector),
    (subspace_projection, "A5", "intersecting_oblique", lambda result: result.projector),
    (key_noise, "A7", "short_mean", lambda result: result.blurred_mean[:3]),
    (multi_head_noise, "A9", "identical", lambda result: result.independent[0]),
]


@pytest.mark.parametrize("module, id_, field, other", NOT_SHOWN)
def test_the_condition_and_the_correction_have_to_be_shown(module, id_, field, other):
    result = module.run(module.TINY)
    changed = result._replace(**{field: other(result)})
    verdicts = {claim.id: claim.verdict for claim in module.claims(module.TINY, changed)}
    assert verdicts[id_] == "undecided"


def test_where_the_other_keys_take_part_the_swing_is_not_about_a_half():
    config = key_noise.Config(seed=SEED, samples=4000, beta=1.0, betas=(1.0, 40.0))
    swing = key_noise.claims(config, key_noise.run(config))[1]
    assert swing.verdict == "holds"
    means = [e.predicted for e in swing.right if e.name.startswith("mean")]
    np.testing.assert_allclose(means[:2], [0.22374, 0.5], atol=1e-4)
    assert len({e.name for e in swing.right}) == len(swing.right)


def test_too_few_samples_are_undecided():
    config = multi_head_noise.Config(
        seed=SEED, samples=100, keys=4, heads=(2,), betas=(10.0,), several_keys=(2,)
    )
    assert multi_head_noise.claims(config, multi_head_noise.run(config))[0].verdict == "undecided"


@pytest.mark.parametrize(
    "module, changes",
    [
        (key_noise, dict(spreads=(1.0, 0.1, 0.01))),
        (key_noise, dict(spreads=(0.1, 1.0))),
        (key_noise, dict(blurred_beta=5.0)),
        (key_noise, dict(short_betas=(1.0, 8.0))),
        (subspace_projection, dict(width=10, rank=5)),
        (subspace_projection, dict(angles=(90.0,))),
        (softmax_saturation, dict(widths=(16, 64))),
        (softmax_saturation, dict(widths=(1024, 256))),
        (softmax_saturation, dict(widths=(1024,), keys=100)),
        (softmax_saturation, dict(widths=(2**14,), samples=300)),
        (multi_head_noise, dict(betas=(10.0, 700.0), samples=1000)),
    ],
)
def test_settings_that_could_show_nothing_are_refused(module, changes):
    with pytest.raises(UsageError):
        module.check(replace(module.Config(), **changes))
    module.check(module.Config())
