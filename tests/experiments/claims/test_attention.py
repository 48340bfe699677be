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
from experiments.report import evidence as claims

SEED = 7
"""Fixed before the tests were first run."""

MODULES = (
    dot_product_variance,
    softmax_saturation,
    attention_copying,
    attention_averaging,
    subspace_projection,
    key_noise,
    multi_head_noise,
)


def test_predictions_are_the_values_derived_for_the_notes():
    """The table of exact values under A9 in the list of claims, and A8's 0.2210."""
    for beta, one, both, positive in (
        (5.0, 0.149015, 0.025916, 0.016006),
        (10.0, 0.195321, 0.022832, 0.008623),
        (20.0, 0.222019, 0.020463, 0.004198),
    ):
        found = (
            key_noise.swing_variance(beta, 10),
            multi_head_noise.specialised_variance(beta, 10),
            multi_head_noise.specialised_variance(beta, 10, low=0.0),
        )
        np.testing.assert_allclose(found, (one, both, positive), atol=6e-7)
    lost = 1 - stats.norm.cdf((1 - math.log(9) / 10) * math.sqrt(2))
    assert lost == pytest.approx(0.135, abs=5e-4)


def test_the_trace_of_the_jacobian_is_that_of_direct_sampling():
    logits = 3 * np.random.default_rng(SEED).standard_normal((200_000, 5))
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    square = claims.mean_interval(np.sum(p**2, axis=1), 1e-3)
    assert square.low < 5 * softmax_saturation.mean_square(5, 3.0) < square.high
    # at a norm of almost 0 all weights are alike
    assert softmax_saturation.mean_square(5, 0.01) == pytest.approx(1 / 25, rel=1e-3)


def test_near_ties_are_those_of_direct_sampling():
    ordered = np.sort(np.random.default_rng(SEED).standard_normal((100_000, 4)), axis=1)
    gap = ordered[:, -1] - ordered[:, -2]
    law = softmax_saturation.gap_law(4)
    for by in (0.0, 0.5, 1.5):
        share = claims.share_interval(int(np.sum(gap > by)), gap.size, 1e-3)
        assert share.low <= np.interp(by, law.gap, law.exceeds) <= share.high + 1e-12
    slope = (law.exceeds[0] - law.exceeds[1]) / law.gap[1]
    assert slope == pytest.approx(softmax_saturation.tie_density(4), rel=0.01)


# one by one, each of these makes its claim fail
WRONG: list[tuple[Any, str, str, Callable]] = [
    (dot_product_variance, "A1", "variance", lambda x: x / 2),
    (dot_product_variance, "A1", "kurtosis", lambda x: x / 2),
    (softmax_saturation, "A2", "trace", lambda x: x[::-1]),
    (attention_copying, "A3", "sum_error", lambda x: x + 1e-6),
    (attention_copying, "A3", "lowest", lambda x: x - 1),
    (attention_copying, "A4", "tied", lambda x: x - 1e-6),
    (attention_copying, "A4", "weights", lambda x: x * 0.5),
    (attention_copying, "A4", "distances", lambda x: x + 1),
    (subspace_projection, "A5", "projector", lambda x: x + 1e-6),
    (subspace_projection, "A5", "oblique", lambda x: x + 1e-6),
    (attention_averaging, "A6", "distance", lambda x: x / 2),
    (attention_averaging, "A6", "identity_error", lambda x: x + 1e-6),
    (key_noise, "A7", "spread_variance", lambda x: x / 4),
    (key_noise, "A8", "beta_variance", lambda x: 2 * x),
    (key_noise, "A8", "swung", lambda x: 2 * x),
    (key_noise, "A8", "formula_error", lambda x: x + 1e-6),
    (multi_head_noise, "A9", "independent", lambda x: x / 1.5),
    (multi_head_noise, "A9", "specialised", lambda x: x / 2),
    (multi_head_noise, "A9", "identical_difference", lambda x: x + 1e-9),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_claims_hold_at_a_tiny_size_and_fail_if_a_measurement_is_wrong(module):
    config = replace(module.TINY, seed=SEED)
    module.check(config)
    result = module.run(config)
    for name, array in result._asdict().items():
        assert name == "scores" or np.all(np.isfinite(array)), name
    found = module.claims(config, result)
    for claim in found:
        contradicted = [e for e in claim.right if e.status == "contradicted"]
        assert claim.verdict != "fails", contradicted
    for other, id_, field, change in WRONG:
        if other is module:
            wrong = result._replace(**{field: change(getattr(result, field))})
            verdicts = {claim.id: claim.verdict for claim in module.claims(config, wrong)}
            assert verdicts[id_] == "fails", field
    assert {id_ for other, id_, _, _ in WRONG if other is module} == set(module.CLAIMS)


def test_the_condition_and_the_correction_have_to_be_shown():
    config = attention_copying.Config(draws=5, keys=3)
    result = attention_copying.run(config)
    wrong = result._replace(length_weights=np.ones_like(result.length_weights))
    verdicts = [attention_copying.claims(config, each)[1].verdict for each in (result, wrong)]
    assert verdicts == ["holds only under a stated condition", "undecided"]

    settings = subspace_projection.Config(draws=5, width=12, rank=3)
    found = subspace_projection.run(settings)
    # the printed matrix would give the vector
    printed = found._replace(coordinates=found.projector, numbers=np.array(settings.width))
    assert subspace_projection.claims(settings, found)[0].verdict == "holds as corrected"
    assert subspace_projection.claims(settings, printed)[0].verdict != "holds as corrected"


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
        (key_noise, dict(blurred_beta=10.0)),
        (subspace_projection, dict(width=10, rank=5)),
        (softmax_saturation, dict(widths=(16, 64))),
        (softmax_saturation, dict(widths=(1024, 256))),
    ],
)
def test_settings_that_could_show_nothing_are_refused(module, changes):
    with pytest.raises(UsageError):
        module.check(replace(module.Config(), **changes))
    module.check(module.Config())
