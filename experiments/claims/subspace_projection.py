"""Taking a sum of two values apart again, when each lies in a subspace of its own (A5).

v_a ∈ span A and v_b ∈ span B, of dimension m each in R^d, given by the columns of A and B.

    printed       M (v_a + v_b) = v_a,  M = Aᵀ       m numbers: the coordinates of v_a
    corrected     Mᵀ M (v_a + v_b) = v_a             A orthonormal, A ⊥ B
                  A A⁺ (v_a + v_b) = v_a             A of full rank, A ⊥ B
                  [A 0] [A B]⁺ (v_a + v_b) = v_a     span A ∩ span B = {0}

Errors are relative, in the Euclidean norm. Coordinates are compared with v_a after being filled up
with zeros, as only vectors of one length can be.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from pydantic import Field

from experiments.engine import memory
from experiments.engine.config import Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, Evidence, equal
from experiments.report.intervals import Exact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A5": "A sum of two values can be taken apart by a projection",
}

ROUNDING = 1e-10
"""What float64 leaves of a relative error, for the conditions drawn here."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the subspaces and the values."""
    width: Size = 32
    """Dimension d of the values."""
    rank: Size = 5
    """Dimension m of each subspace."""
    draws: Size = 100
    """Random pairs of subspaces for each row."""
    angles: Several[Annotated[float, Field(ge=1e-3, le=90)]] = (5, 15, 30, 45, 60, 75, 90)
    """Angles between the two subspaces, in degrees, one or more of them below 90; all m principal
    angles are the same."""


TINY = Config(draws=5, width=12, rank=3)


class Result(NamedTuple):
    """Relative errors of each draw; by (angle, draw) where B is not orthogonal to A."""

    coordinates: np.ndarray
    coordinates_of_a: np.ndarray
    projector: np.ndarray
    skewed_projector: np.ndarray
    skewed_pseudoinverse: np.ndarray
    intersecting_oblique: np.ndarray
    orthogonal: np.ndarray
    orthogonal_predicted: np.ndarray
    oblique: np.ndarray
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raise a UsageError if two such subspaces do not fit, into the space or into memory, or if all
    are orthogonal."""
    if config.width <= 2 * config.rank:
        raise UsageError(f"width: should be more than twice the rank, got {config.width}")
    if min(config.angles) == 90:
        raise UsageError(f"angles: at least one should be below 90, got {config.angles}")
    memory.check(3 * 8 * config.width * 2 * config.rank, "width × rank")


def run(config: Config, session: Session = SILENT) -> Result:
    """Draw subspaces and values, and take their sums apart."""
    random = np.random.default_rng(config.seed)
    rank, width = config.rank, config.width

    def basis(columns: int) -> np.ndarray:
        return np.linalg.qr(random.standard_normal((width, columns)))[0]

    def error(found: np.ndarray, right: np.ndarray) -> float:
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    def sum_of(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y = random.standard_normal((2, rank))
        return x, a @ x, a @ x + b @ y

    def oblique(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.hstack([a, np.zeros_like(b)]) @ np.linalg.pinv(np.hstack([a, b]))

    rows: list[tuple[float, ...]] = []
    for _ in range(config.draws):
        both = basis(2 * rank)
        a, b = both[:, :rank], both[:, rank:]
        x, v_a, total = sum_of(a, b)
        coordinates = a.T @ total
        # a basis of the same subspace that is not orthonormal
        skewed = a @ random.standard_normal((rank, rank))
        _, skewed_v_a, skewed_total = sum_of(skewed, b)
        # one direction of B lies in span A
        shared = np.hstack([a[:, :1], b[:, 1:]])
        _, shared_v_a, shared_total = sum_of(a, shared)
        rows.append(
            (
                error(np.pad(coordinates, (0, width - rank)), v_a),
                error(coordinates, x),
                error(a @ coordinates, v_a),
                error(skewed @ (skewed.T @ skewed_total), skewed_v_a),
                error(skewed @ (np.linalg.pinv(skewed) @ skewed_total), skewed_v_a),
                error(oblique(a, shared) @ shared_total, shared_v_a),
            )
        )
    columns = np.array(rows).T

    by_angle = []
    for angle in np.deg2rad(config.angles):
        errors = []
        for _ in range(config.draws):
            both = basis(2 * rank)
            a = both[:, :rank]
            b = np.cos(angle) * a + np.sin(angle) * both[:, rank:]
            x, y = random.standard_normal((2, rank))
            v_a, v_b = a @ x, b @ y
            predicted = np.cos(angle) * np.linalg.norm(v_b) / np.linalg.norm(v_a)
            straight = error(a @ (a.T @ (v_a + v_b)), v_a)
            errors.append((straight, predicted, error(oblique(a, b) @ (v_a + v_b), v_a)))
        by_angle.append(errors)
    # (angle, draw, kind)
    angled = np.array(by_angle)
    return Result(
        coordinates=columns[0],
        coordinates_of_a=columns[1],
        projector=columns[2],
        skewed_projector=columns[3],
        skewed_pseudoinverse=columns[4],
        intersecting_oblique=columns[5],
        orthogonal=angled[:, :, 0],
        orthogonal_predicted=angled[:, :, 1],
        oblique=angled[:, :, 2],
        scores={"projector_error": float(columns[2].max())},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A5: the projector gives the vector, the printed matrix its coordinates."""
    count = f"of {len(result.projector)} draws"
    printed = Exact(result.coordinates.min(), ROUNDING)
    slanted = Exact(result.orthogonal[np.array(config.angles) < 90].min(), ROUNDING)
    skewed = Exact(result.skewed_projector.min(), ROUNDING)

    def exact(name: str, errors: np.ndarray, rival: Exact, rival_name: str) -> Evidence:
        largest = Exact(errors.max(), ROUNDING)
        return equal(f"{name}, largest error {count}", 0, largest, rival, rival_name)

    right = (
        exact("MᵀM(v_a + v_b) against v_a", result.projector, printed, "M alone"),
        exact("M(v_a + v_b) against the coordinates of v_a", result.coordinates_of_a,
              printed, "against v_a itself"),
        exact("a's not orthonormal: AA⁺(v_a + v_b) against v_a", result.skewed_pseudoinverse,
              skewed, "MᵀM"),
        exact("A not ⊥ B: [A 0][A B]⁺(v_a + v_b) against v_a", result.oblique,
              slanted, "the orthogonal projector"),
        exact("A not ⊥ B: error of MᵀM against cos θ ‖v_b‖ / ‖v_a‖",
              np.abs(result.orthogonal - result.orthogonal_predicted), slanted, "no error"),
    )  # fmt: skip
    as_printed = equal(f"M(v_a + v_b) against v_a, smallest error {count}", 0, printed)
    beyond = equal(
        f"span A ∩ span B ≠ {{0}}: [A 0][A B]⁺(v_a + v_b) against v_a, smallest error {count}",
        0, Exact(result.intersecting_oblique.min(), ROUNDING),
    )  # fmt: skip
    return (
        Claim(
            "A5",
            r"M = [a_1^\top; \dots; a_m^\top]:\quad M^\top M\,(v_a + v_b) = v_a"
            r"\quad(A \perp B,\ a_i \text{ orthonormal})",
            "The corrected formulas give v_a back to the rounding of float64, each where the "
            "simpler one does not; the printed M v gives m numbers that are not v_a.",
            right,
            printed=(as_printed,),
            beyond=(beyond,),
            note="M(v_a + v_b) are the coordinates of v_a in A. Where A and B are not orthogonal "
            "the oblique projector does it, and nothing does once they share a direction.",
            printed_equation=r"M = [a_1^\top; \dots; a_m^\top] \Rightarrow "
            r"M(v_a + v_b) = Mv_a + Mv_b = v_a",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Relative errors of each formula, and of two projectors against the angle."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, new_figure

    figure = new_figure(10, 4)
    formulas, angles = figure.subplots(1, 2)
    rows = (
        ("Mv, as printed", result.coordinates, RED),
        ("Mv against coordinates", result.coordinates_of_a, BLUE),
        ("MᵀMv", result.projector, BLUE),
        ("MᵀMv, a's not orthonormal", result.skewed_projector, ORANGE),
        ("AA⁺v, a's not orthonormal", result.skewed_pseudoinverse, BLUE),
        ("[A 0][A B]⁺v, direction shared", result.intersecting_oblique, ORANGE),
    )
    spread = np.linspace(-0.25, 0.25, len(result.projector))
    for place, (_, errors, colour) in enumerate(rows):
        formulas.plot(np.maximum(errors, 1e-17), place + spread, ".", color=colour, alpha=0.5)
    formulas.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    formulas.invert_yaxis()
    formulas.set(xlabel="relative error, one point for each draw", xscale="log",
                 title="$v = v_a + v_b$, A ⊥ B")  # fmt: skip

    def middle(errors: np.ndarray) -> np.ndarray:
        return np.maximum(np.median(errors, axis=1), 1e-17)

    # at 90° the median is the rounding of cos 90°
    angles.plot(config.angles, middle(result.orthogonal_predicted), color=BLACK,
                label=r"theory, $\cos θ\; \Vert v_b\Vert / \Vert v_a\Vert$")  # fmt: skip
    angles.plot(config.angles, middle(result.orthogonal), "o", color=ORANGE,
                label="orthogonal projector MᵀM")  # fmt: skip
    angles.plot(config.angles, middle(result.oblique), "s", color=GREEN,
                label="oblique projector [A 0][A B]⁺")  # fmt: skip
    angles.set(
        xlabel="angle θ between the subspaces (degrees)",
        ylabel="relative error, median of the draws",
        yscale="log",
        title="A not orthogonal to B",
    )
    for axes in (formulas, angles):
        axes.grid(alpha=0.3)
    angles.legend(fontsize=8)
    return figure
