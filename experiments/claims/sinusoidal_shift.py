"""P1–P3: sinusoidal positions, and the matrix that shifts them.

    e_t = [sin λ_1 t, cos λ_1 t, sin λ_2 t, …],  λ_m = 1/f_m = 10000^(−2m/d)               (P1)
    T^(k) e_t = e_{t+k} for every t, T^(k) block-diagonal in Φ_m^(k)                       (P2)
    Φ_m^(k) = [[cos λ_m k, sin λ_m k], [−sin λ_m k, cos λ_m k]]                             (P3)

The notes print P3 transposed, with λ_m = 10000^(+2m/d). Nothing is taken from the library's
formulas: the wavelengths are read off its sinusoids, as the turn of each pair from t to t + k, and
T^(k) is found by least squares from pairs (e_t, e_{t+k}), twice, for early t and for late t.

Axes: d features in J = d/2 pairs, m = 1 … J as in the notes; t and k in steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Base, Position, Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, Evidence, equal
from experiments.report.intervals import Exact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLAIMS = {
    "P1": "Positions as sines and cosines",
    "P2": "A shift of position is a fixed linear map",
    "P3": "The blocks of that map are rotations",
}

FLOAT64 = 1e-9
"""Sines of float64 angles up to 1e5 steps are good to 1e-11; matrices found from them, to 1e-10."""

FLOAT32 = 2e-6
"""The library's sinusoids are each good to 1e-6 in float32, at any position."""

READINGS = ("corrected", "transposed", "λ = 10000^(+2m/d)", "printed: both")
"""Of P3: transposed or not, λ with one sign or the other."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the positions t."""
    dim: Annotated[Size, Field(ge=4, multiple_of=2)] = 16
    """Number d of features."""
    base: Base = 10_000.0
    offsets: Several[Position] = (1, 7, -3, 2.5, -0.25, 100)
    """The shifts k, in steps: forwards, backwards and not whole."""
    positions: Size = 200
    """Positions t for each shift."""
    reach: Annotated[float, Field(ge=1, le=1e12)] = 1e5
    """Positions t are drawn from 0 to this, not whole."""
    powers: Several[Annotated[int, Field(ge=0, le=30)]] = (6, 10, 14, 18, 20, 24, 28, 30)
    """The float32 errors are measured near t = 2 to these powers."""


TINY = Config(dim=6, positions=40, offsets=(1, -2, 0.5), powers=(6, 20))


class Result(NamedTuple):
    """Frequencies in radians per step, and largest errors over t and features, without units."""

    usual_frequencies: np.ndarray  # λ_m with m from 0
    found_frequencies: np.ndarray  # read off the library's sinusoids with first=1
    values_error: np.ndarray  # of sinusoids(first=1): from P1 as it is, and from the product
    shift_errors: np.ndarray  # |T e_t − e_{t+k}|: (T^(k), its transpose, or the identity; k)
    fit_errors: np.ndarray  # of T^(k) by least squares: (early, late, early − late; k)
    reading_errors: np.ndarray  # |Φ e_t − e_{t+k}|: (READINGS, k)
    backward_errors: np.ndarray  # |Φ e_t − e_{t−k}|: (READINGS, k)
    both_wrong_errors: np.ndarray  # |Φ e_t − e_{t+k}|, with λ = 10000^(+2m/d) in e_t as well: (k,)
    float32_errors: np.ndarray  # of the shift by 1: (library, plain float32 angles; power)
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raises `UsageError` if there are too few positions to find T^(k) from, or no memory."""
    if config.positions < 2 * config.dim:
        raise UsageError(
            f"positions: should be at least twice dim = {config.dim}, got {config.positions}"
        )
    memory.check(3 * 8 * config.dim * (config.dim + config.positions), "dim × positions")


class Frequencies(NamedTuple):
    """λ_m, in radians per step (J,)."""

    printed: np.ndarray  # of P1
    inverse: np.ndarray  # of the last line of P3
    product: np.ndarray  # of f_m = 10000 · 2m/d, as the notes' print shows it


def frequencies(config: Config) -> Frequencies:
    """Those that the notes may mean."""
    d, base = config.dim, config.base
    m = np.arange(1, d // 2 + 1)
    return Frequencies(base ** (-2.0 * m / d), base ** (2.0 * m / d), 1 / (base * 2 * m / d))


def sinusoids_of(t: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """[sin λ_1 t, cos λ_1 t, …] for each t, in the dtype of the angles."""
    angles = t[..., None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*t.shape, -1)


def blocks_of(k: float, frequencies: np.ndarray, transposed: bool) -> np.ndarray:
    """Block-diagonal in [[cos λk, sin λk], [−sin λk, cos λk]], or that transposed."""
    matrix = np.zeros((2 * frequencies.size, 2 * frequencies.size))
    for m, angle in enumerate(k * frequencies):
        block = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        matrix[2 * m : 2 * m + 2, 2 * m : 2 * m + 2] = block.T if transposed else block
    return matrix


def frequencies_of(sinusoids: Callable[[np.ndarray], np.ndarray], reach: float) -> np.ndarray:
    """λ_m of sinusoids, in radians per step: the turn of each pair over longer and longer k.

    A turn is known only modulo 2π: each k tells which one the next k, twice as long, is near.
    """
    turn, k = np.zeros(1), 1.0
    frequencies = np.zeros(1)
    while k <= reach:
        start, end = (sinusoids(np.array(t)).reshape(-1, 2) for t in (0.0, k))
        turn = np.arctan2(end[:, 0], end[:, 1]) - np.arctan2(start[:, 0], start[:, 1])
        turn += 2 * np.pi * np.round((frequencies * k - turn) / (2 * np.pi))
        frequencies, k = turn / k, 2 * k
    return frequencies


def run(config: Config, session: Session = SILENT) -> Result:
    """Shift sinusoids by every k, and measure how far they land from where they should."""
    d, base = config.dim, config.base
    right, wrong, product = frequencies(config)
    rng = np.random.default_rng(config.seed)
    early, late = (
        np.sort(rng.uniform(low, high, config.positions))
        for low, high in ((0, config.reach), (3 * config.reach, 4 * config.reach))
    )
    largest = lambda a: float(np.max(np.abs(a)))

    with jax.enable_x64(True):

        def e(t, first=1):
            t = jnp.asarray(t, jnp.float64)
            return np.asarray(rnnattn.sinusoids(t, d, base=base, first=first, dtype=jnp.float64))

        shifts, fits, readings, backwards, both_wrong = [], [], [], [], []
        for k in config.offsets:
            matrix = np.asarray(
                rnnattn.shift_matrix(jnp.float64(k), d, base=base, first=1, dtype=jnp.float64)
            )
            there, back = e(early + k), e(early - k)
            maps = (matrix, matrix.T, np.eye(d))
            shifts.append([largest(e(early) @ map.T - there) for map in maps])
            found = [np.linalg.lstsq(e(t), e(t + k), rcond=None)[0].T for t in (early, late)]
            fits.append([*(largest(f - matrix) for f in found), largest(found[0] - found[1])])
            printed = [blocks_of(k, λ, flip) for λ in (right, wrong) for flip in (False, True)]
            readings.append([largest(e(early) @ Φ.T - there) for Φ in printed])
            backwards.append([largest(e(early) @ Φ.T - back) for Φ in printed])
            # early positions, for angles of 10000 t would leave float64 few digits
            near = early / config.reach
            both_wrong.append(largest(
                sinusoids_of(near, wrong) @ printed[2].T - sinusoids_of(near + k, wrong)
            ))  # fmt: skip
        found_frequencies = frequencies_of(e, config.reach)
        usual = frequencies_of(lambda t: e(t, first=0), config.reach)
        values = [largest(e(early) - sinusoids_of(early, λ)) for λ in (right, product)]

    errors = [_float32_errors(2**power, d, base) for power in config.powers]
    return Result(
        usual_frequencies=usual,
        found_frequencies=found_frequencies,
        values_error=np.array(values),
        shift_errors=np.array(shifts).T,
        fit_errors=np.array(fits).T,
        reading_errors=np.array(readings).T,
        backward_errors=np.array(backwards).T,
        both_wrong_errors=np.array(both_wrong),
        float32_errors=np.array(errors).T,
        scores={"largest_shift_error": float(np.max(np.array(shifts)[:, 0]))},
    )


def _float32_errors(start: int, d: int, base: float, count: int = 64) -> list[float]:
    """|T^(1) e_t − e_{t+1}| in float32 near `start`, by the library and with plain angles λ t."""
    t = np.arange(start, start + count, dtype=np.int32)
    λ = (base ** (-2.0 * np.arange(1, d // 2 + 1) / d)).astype(np.float32)
    matrix = np.asarray(rnnattn.shift_matrix(1, d, base=base, first=1))
    e = lambda t: np.asarray(rnnattn.sinusoids(t, d, base=base, first=1))
    # the angle λ t is rounded to float32 before the sine is taken of it
    plain = lambda t: sinusoids_of(t.astype(np.float32), λ)
    return [float(np.max(np.abs(f(t) @ matrix.T - f(t + 1)))) for f in (e, plain)]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """P1 and P2, which hold as printed, and P3, which does not."""
    # sines of angles of k · 10000 keep so many digits less
    coarse = 4 * float(np.finfo(float).eps * (np.max(np.abs(config.offsets)) + 1) * config.base)

    def none(name: str, errors: np.ndarray, tolerance: float, *rival: object) -> Evidence:
        error, best = float(np.max(errors)), None
        if rival:
            best = float(np.min(np.asarray(rival[0])))
        return equal(name, 0, Exact(error, tolerance), best, str(rival[1]) if rival else "")

    theory = frequencies(config)
    off = lambda λ: np.max(np.abs(result.found_frequencies / λ - 1))
    shift, transposed, still = result.shift_errors
    early, late, between = result.fit_errors
    corrected, flipped, wrong_λ, printed = result.reading_errors
    library, plain = result.float32_errors
    return (
        Claim(
            "P1",
            r"e_t = [\sin(t/f_1), \cos(t/f_1), \ldots, \cos(t/f_{d/2})],\quad"
            r" f_m = 1/\lambda_m = 10000^{2m/d}",
            "The frequencies read off rnnattn.sinusoids(first=1) are 10000^(−2m/d), m = 1 … d/2, "
            f"and its values those of the formula, to {FLOAT64:g}; neither are they those of the "
            "product 10000 · 2m/d, which the print shows, nor of an m that starts from 0.",
            right=(
                none("relative error of the frequencies", off(theory.printed), FLOAT64,
                     off(theory.product), "a product, 10000 · 2m/d"),
                none("relative error of the frequencies", off(theory.printed), FLOAT64,
                     off(result.usual_frequencies), "m from 0"),
                none("error of the values", result.values_error[0], FLOAT64,
                     result.values_error[1], "a product, 10000 · 2m/d"),
            ),
            note="Read with the exponent, which the print has lost. The usual m runs from 0; "
            "rnnattn offers both.",
            printed_equation=r"e_t = [\sin(t/f_1), \cos(t/f_1), \ldots, \cos(t/f_{d/2})],\quad"
            r" f_m = \frac{1}{\lambda_m} := 10000\,\frac{2m}{d}",
        ),
        Claim(
            "P2",
            r"T^{(k)} e_t = e_{t+k} \text{ for every } t,\quad"
            r" \Phi_m^{(k)} = \begin{bmatrix} \cos \lambda_m k & -\sin \lambda_m k \\"
            r" \sin \lambda_m k & \cos \lambda_m k \end{bmatrix}^{\!\top}",
            f"|T e_t − e_t+k| stays below {FLOAT64:g} for every k, forwards, backwards and not "
            "whole, and all t; least squares finds the same T from early and from late t; and the "
            "block without its transpose, or no shift at all, does not do for any k.",
            right=(
                none("error of the shift, worst k and t", shift, FLOAT64,
                     transposed, "without the transpose, best k"),
                none("the same, by least squares from early t", early, FLOAT64,
                     still, "no shift, best k"),
                none("the same, from late t", late, FLOAT64),
                none("difference of early and late", between, FLOAT64),
                none("error of a shift by 1 in float32, worst t", library, FLOAT32,
                     np.max(plain), "plain float32 angles, worst t"),
            ),
        ),
        Claim(
            "P3",
            r"\Phi_m^{(k)} = \begin{bmatrix} \cos \lambda_m k & \sin \lambda_m k \\"
            r" -\sin \lambda_m k & \cos \lambda_m k \end{bmatrix},\quad"
            r" \lambda_m = 10000^{\mathbf{-}2m/d}",
            f"Without the transpose and with λ = 10000^(−2m/d), |Φ e_t − e_t+k| stays below "
            f"{FLOAT64:g} for every k and t; with either slip it does not, for any k.",
            right=(
                none("error of the shift, worst k and t", corrected, FLOAT64,
                     printed, "as printed, best k"),
                none("the same", corrected, FLOAT64, flipped, "transposed, best k"),
                none("the same", corrected, FLOAT64, wrong_λ, "λ = 10000^(+2m/d), best k"),
                none("transposed: error against e_t−k", result.backward_errors[1], FLOAT64),
                none("λ = 10000^(+2m/d) in Φ and in e_t", result.both_wrong_errors, coarse),
            ),
            printed=(
                none("as printed, worst k and t", printed, FLOAT64),
                none("as printed, but for λ", flipped, FLOAT64),
                none("as printed, but for the transpose", wrong_λ, FLOAT64),
            ),
            note="Two slips on the last line: the transpose maps t to t − k, and λ is the inverse "
            "of P1's. With the wrong λ in e_t as well the identity would still hold.",
            printed_equation=r"\Phi_m^{(k)} ="
            r" \begin{bmatrix} \cos \lambda_m k & \sin \lambda_m k \\"
            r" -\sin \lambda_m k & \cos \lambda_m k \end{bmatrix}^{\!\top},\quad"
            r" \lambda_m = 10000^{2m/d}",
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Wavelengths, errors of the shift by reading of P3, and what float32 does to it."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, new_figure

    theory, offsets = frequencies(config), np.array(config.offsets)
    figure = new_figure(12, 4.4)
    left, middle, right = figure.subplots(1, 3)
    m = np.arange(1, result.found_frequencies.size + 1)
    for λ, style, colour, label in (
        (theory.printed, "-", BLACK, "10000$^{2m/d}$"),
        (theory.product, "--", ORANGE, "10000 · 2m/d, as the print reads"),
        (result.usual_frequencies, ":", GREEN, "m from 0, as is usual"),
    ):
        left.plot(m, 1 / λ, style, color=colour, label=label)
    left.plot(m, 1 / result.found_frequencies, "o", color=BLUE, markerfacecolor="none",
              label="read off rnnattn.sinusoids")  # fmt: skip
    left.set(xlabel="pair m", ylabel="f$_m$ (steps per radian)", yscale="log")

    order = np.argsort(offsets)
    places = np.arange(order.size)
    rows = (*result.reading_errors, result.both_wrong_errors)
    marks = zip(
        (*READINGS, "λ = 10000^(+2m/d), in e$_t$ too"),
        ("o", "s", "D", "x", "+"), (BLUE, ORANGE, GREEN, RED, BLACK), rows, strict=True,
    )  # fmt: skip
    for label, marker, colour, errors in marks:
        middle.plot(places, errors[order], marker, color=colour, label=label,
                    markerfacecolor="none", markersize=7)  # fmt: skip
    middle.axhline(FLOAT64, color=BLACK, linestyle=":", linewidth=1, label="tolerance")
    middle.set_xticks(places, [f"{k:g}" for k in offsets[order]], fontsize=8)
    middle.set(xlabel="shift k (steps)", ylabel="largest |Φ e$_t$ − e$_{t+k}$|", yscale="log",
               ylim=(1e-14, 10))  # fmt: skip

    for errors, marker, colour, label in zip(
        result.float32_errors, "os", (BLUE, ORANGE),
        ("rnnattn", "plain float32 angles λt"), strict=True,
    ):  # fmt: skip
        right.plot(2.0 ** np.array(config.powers), errors, marker + "-", color=colour, label=label)
    right.set(xlabel="position t (steps)", ylabel="largest |T$^{(1)}$ e$_t$ − e$_{t+1}$|, float32",
              xscale="log", yscale="log")  # fmt: skip
    _finish(left, middle, right)
    figure.suptitle("Sinusoidal positions: what a shift is, and how well it shifts")
    return figure


def _finish(*every: "Axes") -> None:
    for axes in every:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best")
