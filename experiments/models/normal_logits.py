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
    ahead = math.ceil(lead / step)
    step = lead / ahead if ahead else step
    reach = math.ceil(9 * deviation / step)
    mass = stats.norm.pdf(step * np.arange(-reach, reach + 1), 0, deviation)
    # t = e^u; past the logits' range, e^{−t e^z} is 0 above and t e^z is 0 below
    margin = math.ceil(40 / step)
    u = step * np.arange(-2 * reach - ahead - margin, 2 * reach + ahead + margin + 1)
    e = np.exp(np.minimum(u, 10.0))
    none, one, two = (
        np.clip(signal.fftconvolve(e**j * np.exp(-e), mass / mass.sum(), mode="valid"), 0, 1)
        for j in range(3)
    )
    others = none[ahead:] ** (leaders - 1) * none[: none.size - ahead] ** (keys - leaders)
    return step * float(np.sum(one[ahead:] * others)), step * float(np.sum(two[ahead:] * others))
