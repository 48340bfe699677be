"""Expectations under the normal law, by quadrature."""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

# solving for them costs more than any one integral
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of Gauss–Legendre of order 16, a row between each two edges."""
    half = np.diff(edges)[:, None] / 2
    return edges[:-1, None] + half * (1 + _NODES), half * _WEIGHTS


def normal_expectation(
    function: Callable[[np.ndarray], np.ndarray],
    mean: float = 0.0,
    variance: float = 1.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """E[function(γ)] for γ ~ N(mean, variance), given low < γ < high, by quadrature.

    Gauss–Legendre of order 16 on 400 panels out to 12 standard deviations, which is exact to 1e-12
    for softmax weights with logits up to some hundreds. Gauss–Hermite is not: the poles of a steep
    softmax come near the real axis, and it knows no condition.
    """
    deviation = math.sqrt(variance)
    start, stop = max(low, mean - 12 * deviation), min(high, mean + 12 * deviation)
    points, weights = panels(np.linspace(start, stop, 401))
    mass = weights * stats.norm.pdf(points, mean, deviation)
    return float(np.sum(mass * function(points)) / np.sum(mass))


def normal_moments(
    function: Callable[[np.ndarray], np.ndarray],
    mean: float = 0.0,
    variance: float = 1.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[float, float]:
    """Mean and variance of function(γ), under the law of `normal_expectation`."""
    law = (mean, variance, low, high)
    centre = normal_expectation(function, *law)
    return centre, normal_expectation(lambda x: (function(x) - centre) ** 2, *law)
