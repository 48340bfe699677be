"""Moments of a softmax weight whose logits are independent normal numbers (A2, A7), exactly.

With z_i the logits, 1/(Σ e^{z_i})^j = ∫ t^{j−1} e^{−t Σ e^{z_i}} dt / (j−1)!, so that

    E p_1 = ∫ E[e^{z_1} e^{−te^{z_1}}] Π_{i>1} E[e^{−te^{z_i}}] dt
    E p_1² = ∫ t E[e^{2z_1} e^{−te^{z_1}}] Π_{i>1} E[e^{−te^{z_i}}] dt
"""

import math

import numpy as np
from scipy import signal, stats


def weight_moments(
    keys: int, deviation: float, lead: float = 0.0, leaders: int = 1
) -> tuple[float, float]:
    """E p_1 and E p_1² for logits N(0, deviation²), of which the first `leaders` are N(lead, …).

    By the trapezoidal rule over log t, and over the logits as a convolution: the integrands are
    analytic and die out, so steps of 0.2 for e^{−e^u}, and of a quarter of the deviation for a
    normal law, leave 1e-14.
    """
    step = min(0.2, deviation / 4)
    reach = math.ceil(9 * deviation / step)
    mass = stats.norm.pdf(step * np.arange(-reach, reach + 1), 0, deviation)
    # t = e^u; past the logits' range, e^{−t e^z} is 0 above and t e^z is 0 below
    margin = math.ceil(40 / step)
    ahead = math.ceil(lead / step)
    u = step * np.arange(-2 * reach - margin - ahead, 2 * reach + margin + 1)

    def expected(power: int, u: np.ndarray) -> np.ndarray:
        e = np.exp(np.minimum(u, 10.0))
        values = signal.fftconvolve(e**power * np.exp(-e), mass / mass.sum(), mode="valid")
        return np.clip(values, 0, 1)

    others = expected(0, u + lead) ** (leaders - 1) * expected(0, u) ** (keys - leaders)
    mean, square = (step * float(np.sum(expected(j, u + lead) * others)) for j in (1, 2))
    return mean, square
