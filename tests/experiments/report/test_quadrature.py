"""Expectations under the normal law."""

import math

import pytest
from scipy import special

from experiments.report.quadrature import normal_expectation, normal_moments


def test_polynomials_conditions_and_steep_functions():
    assert normal_moments(lambda x: x, 1.0, 0.5) == pytest.approx((1, 0.5), rel=1e-12)
    half = normal_expectation(lambda x: x, low=0)
    assert half == pytest.approx(math.sqrt(2 / math.pi), rel=1e-12)
    steep = normal_expectation(lambda x: special.expit(300 * x))
    assert steep == pytest.approx(0.5, rel=1e-12)
