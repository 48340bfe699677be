"""P4: rotations by the position compose, and make inner products depend on t − s alone.

    T^(k) T^(l) = T^(k+l)      T^(−k) = T^(k)ᵀ      det T^(k) = 1
    ⟨R(t) q, R(s) k⟩ = Σ_m |q_m| |k_m| cos(ω_m (t − s) + φ_m),   φ_m the angle from k_m to q_m
    the gradient of R(θ) x is the rotation by −θ

Pairs are taken for complex numbers, q_m and k_m, for the prediction; the library rotates real ones.
Beside it stand rivals that also put positions in: adding the sinusoids to q and k, and rotating
with float32 angles ω t as they come.

Axes: d features in d/2 pairs; q and k of length 1, so that their product is at most 1; t, s in
steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Base, Position, Seed, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, Evidence, equal
from experiments.report.intervals import Exact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "P4": "Rotations compose, and rotary positions are relative",
}

FLOAT64 = 1e-9
"""Cosines of float64 angles up to 2²² steps are good to 1e-9."""

FLOAT32 = 4e-6
"""The library's cosines are each good to 1e-6 in float32, at any position up to 2³¹."""

LAWS = (
    "T$^{(k)}$T$^{(l)}$ = T$^{(k+l)}$",
    "T$^{(−k)}$ = T$^{(k)}$ᵀ",
    "det T$^{(k)}$ = 1",
    "rope(x, k) = T$^{(−k)}$x",
)


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of q and k."""
    dim: Annotated[Size, Field(ge=4, multiple_of=2)] = 32
    """Number d of features of a head."""
    base: Base = 10_000.0
    shifts: Annotated[tuple[Position, ...], Field(min_length=2)] = (1, 7, -3, 2.5, -0.25, 1000)
    """k of the matrices T^(k), in steps; each is composed with the one after it."""
    distances: Annotated[Size, Field(ge=2)] = 200
    """t − s goes from 0 to so many steps."""
    powers: Annotated[tuple[Annotated[int, Field(ge=0, le=29)], ...], Field(min_length=2)] = (
        0,
        4,
        8,
        12,
        16,
        18,
        20,
        22,
    )
    """s is 2 to these powers: where on the line of positions a product is taken."""


TINY = Config(dim=6, distances=20, shifts=(1, -2, 0.5), powers=(0, 8, 20))


class Result(NamedTuple):
    """Inner products of vectors of length 1, and largest errors; all without units."""

    law_errors: np.ndarray  # (LAWS, k)
    inverse_errors: np.ndarray  # |T^(k) T^(l) − T^(k−l)|, what a wrong sign would do: (k,)
    rotated: np.ndarray  # inner products in float64: (s, t − s)
    query_only: np.ndarray  # the same with k left as it is
    added: np.ndarray  # the same with sinusoids added, and the whole brought to length 1 or less
    rotated32: np.ndarray  # in float32
    plain32: np.ndarray  # in float32, with angles ω t rounded to float32
    gradient_errors: np.ndarray  # of R(−θ) dy and of R(+θ) dy, from differences; of jax.grad
    scores: dict[str, float]


def _rope(x: Any, positions: Any, base: float, inverse: bool = False) -> jax.Array:
    """`rnnattn.rope` of one vector x at each of the positions: (T, d)."""
    rows = jnp.broadcast_to(x, (1, positions.size, 1, x.size))
    turned = rnnattn.rope(rows, positions, base=base, interleaved=True, inverse=inverse)
    return turned[0, :, 0]


def matrix_laws(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The largest error of each of LAWS for each k, and of the first with l of the wrong sign."""
    d, base = config.dim, config.base
    T = lambda k: np.asarray(rnnattn.shift_matrix(jnp.float64(k), d, base=base, dtype=jnp.float64))
    x = jnp.asarray(np.random.default_rng(config.seed).normal(size=d))
    largest = lambda a: float(np.max(np.abs(a)))
    errors, wrong = [], []
    for k, other in zip(config.shifts, np.roll(config.shifts, -1), strict=True):
        turned = _rope(x, jnp.asarray([k], jnp.float64), base)[0]
        errors.append([
            largest(T(k) @ T(other) - T(k + other)),
            largest(T(-k) - T(k).T),
            abs(np.linalg.det(T(k)) - 1),
            largest(turned - T(-k) @ x),
        ])  # fmt: skip
        wrong.append(largest(T(k) @ T(other) - T(k - other)))
    return np.array(errors).T, np.array(wrong)


def gradient_errors(config: Config) -> np.ndarray:
    """Largest errors of R(−θ) dy, R(+θ) dy and `jax.grad` from differences of ⟨dy, R(θ) x⟩.

    The function is linear in x: a central difference has no error but rounding, whatever its step.
    """
    x, dy = np.random.default_rng(config.seed + 1).normal(size=(2, config.dim))
    position = jnp.array([12.5])
    loss = lambda x: jnp.sum(jnp.asarray(dy) * _rope(x, position, config.base)[0])
    unit = jnp.eye(config.dim)
    true = jax.vmap(lambda e: (loss(x + e) - loss(x - e)) / 2)(unit)
    back, forth = (
        _rope(jnp.asarray(dy), position, config.base, inverse)[0] for inverse in (True, False)
    )
    found = (back, forth, jax.grad(loss)(jnp.asarray(x)))
    return np.array([np.max(np.abs(a - true)) for a in found])


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the matrices, or for the rotated vectors."""
    memory.check(3 * 8 * config.dim**2, "dim²")
    memory.check(3 * 8 * config.dim * config.distances, "dim × distances")


def _query_and_key(config: Config) -> np.ndarray:
    q, k = np.random.default_rng(config.seed).normal(size=(2, config.dim))
    return np.stack([q / np.linalg.norm(q), k / np.linalg.norm(k)])


def _pairs(x: np.ndarray) -> np.ndarray:
    return x[0::2] + 1j * x[1::2]


def _frequencies(config: Config) -> np.ndarray:
    return config.base ** (-2.0 * np.arange(config.dim // 2) / config.dim)


def closed_form(config: Config) -> np.ndarray:
    """The product of query and key by t − s, as theory has it."""
    q, k = _query_and_key(config)
    turns = np.exp(1j * _frequencies(config) * np.arange(config.distances + 1)[:, None])
    return np.real(np.sum(_pairs(q) * np.conj(_pairs(k)) * turns, axis=-1))


def run(config: Config, session: Session = SILENT) -> Result:
    """Take products all along the line of positions."""
    d, base = config.dim, config.base
    (q, k), ω = _query_and_key(config), _frequencies(config)
    starts, distances = 2 ** np.array(config.powers), np.arange(config.distances + 1)

    def products(put_in: Callable[[np.ndarray, np.ndarray], Any], rotate_key: bool = True) -> Any:
        rows = []
        for s in starts:
            key = put_in(k, np.array([s]))[0] if rotate_key else k
            rows.append(np.asarray(put_in(q, s + distances)) @ np.asarray(key))
        return np.array(rows, np.float64)

    def plain(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        angles = t[:, None].astype(np.float32) * ω.astype(np.float32)
        turned = _pairs(x.astype(np.float32)) * (np.cos(angles) + 1j * np.sin(angles))
        return np.stack([turned.real, turned.imag], axis=-1).reshape(len(t), d)

    rotate32 = lambda x, t: _rope(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.int32), base)
    rotated32, plain32 = products(rotate32), products(plain)
    with jax.enable_x64(True):
        laws, wrong = matrix_laws(config)
        rotate = lambda x, t: _rope(jnp.asarray(x), jnp.asarray(t), base)
        # sinusoids have the length √(d/2)
        sinusoids = lambda t: np.asarray(
            rnnattn.sinusoids(jnp.asarray(t), d, base=base, dtype=jnp.float64)
        )
        add = lambda x, t: (x + sinusoids(t) / (d / 2) ** 0.5) / 2
        gradients = gradient_errors(config)
        rotated = products(rotate)
        query_only, added = products(rotate, rotate_key=False), products(add)
    return Result(
        law_errors=laws,
        inverse_errors=wrong,
        rotated=rotated,
        query_only=query_only,
        added=added,
        rotated32=rotated32,
        plain32=plain32,
        gradient_errors=gradients,
        scores={"largest_difference": float(np.max(np.abs(rotated - closed_form(config))))},
    )


def spread(products: np.ndarray) -> np.ndarray:
    """How far products at one t − s lie apart, over all s."""
    return np.ptp(products, axis=0)


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """P4, which follows from P2."""

    def none(name: str, value: Any, tolerance: float, rival: Any, rival_name: str) -> Evidence:
        return equal(name, 0, Exact(np.max(value), tolerance), np.min(rival), rival_name)

    predicted = closed_form(config)
    off = lambda products: np.max(np.abs(products - predicted))
    back, forth, grad = result.gradient_errors
    return (
        Claim(
            "P4",
            r"T^{(k)} T^{(l)} = T^{(k+l)},\; T^{(-k)} = T^{(k)\top},\; \det T^{(k)} = 1,\quad"
            r" \langle R(t) q, R(s) k \rangle ="
            r" \sum_m |q_m| |k_m| \cos(\omega_m (t-s) + \varphi_m)",
            "Products of a rotated query and key at one t − s are the closed form, wherever s is, "
            f"to {FLOAT64:g} in float64 and {FLOAT32:g} in float32; they are not if the key is not "
            "rotated, if sinusoids are added instead, or with plain float32 angles. The matrices "
            "obey the laws of rotations, and the gradient is the rotation back.",
            right=(
                none("product from the closed form, worst s and t", np.abs(off(result.rotated)),
                     FLOAT64, off(result.query_only), "key not rotated"),
                none("products at one t − s, spread over s", spread(result.rotated), FLOAT64,
                     np.max(spread(result.added)), "sinusoids added"),
                none("product in float32, worst s and t", off(result.rotated32), FLOAT32,
                     off(result.plain32), "plain float32 angles"),
                none("T^(k) T^(l) − T^(k+l)", result.law_errors[0], FLOAT64,
                     result.inverse_errors, "T^(k−l), best k"),
                *(
                    equal(name, 0, Exact(np.max(errors), FLOAT64))
                    for name, errors in zip(
                        ("T^(−k) − T^(k)ᵀ", "det T^(k) − 1", "rope(x, k) − T^(−k) x"),
                        result.law_errors[1:], strict=True,
                    )
                ),
                none("gradient as the rotation back, from differences", back, FLOAT64,
                     forth, "rotated on"),
                none("gradient of rnnattn.rope, from differences", grad, FLOAT64,
                     forth, "rotated on"),
            ),
            note="The notes stop at P2, from which this follows. RoPE's usual block is the "
            "transpose of P3's: it rotates the other way round.",
            in_notes=False,
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Products by t − s, their error by s, and the laws."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, new_figure

    figure = new_figure(12, 4.4)
    left, middle, right = figure.subplots(1, 3)
    n, predicted = np.arange(config.distances + 1), closed_form(config)
    left.plot(n, predicted, color=BLACK, label="closed form")
    for row, (products, colour, marker, label) in enumerate((
        (result.rotated, BLUE, "o", "rotated"),
        (result.added, ORANGE, "s", "sinusoids added"),
        (result.query_only, RED, "x", "key not rotated"),
    )):  # fmt: skip
        shown = slice(3 * row, None, max(len(n) // 20, 1))
        for i, scores in enumerate(products[:4]):
            name = f"{label}, 4 places s" if i == 0 else None
            left.plot(n[shown], scores[shown], marker, color=colour, markersize=4, label=name,
                      markerfacecolor="none")  # fmt: skip
    left.set(xlabel="t − s (steps)", ylabel="inner product of q at t and k at s")
    low, high = left.get_ylim()
    left.set_ylim(low - 0.45 * (high - low), high)  # room for the legend

    for products, colour, marker, label in (
        (result.rotated, BLUE, "o", "rnnattn, float64"),
        (result.rotated32, GREEN, "D", "rnnattn, float32"),
        (result.plain32, ORANGE, "s", "plain float32 angles ωt"),
        (result.query_only, RED, "x", "key not rotated"),
    ):
        errors = np.max(np.abs(products - predicted), axis=-1)
        middle.plot(2.0 ** np.array(config.powers), errors, marker + "-", color=colour, label=label)
    middle.set(xlabel="position s (steps)", ylabel="largest error of the product, over t − s",
               xscale="log", yscale="log", ylim=(1e-22, 10))  # fmt: skip

    marks = zip(LAWS, "osDx", (BLUE, ORANGE, GREEN, RED), result.law_errors, strict=True)
    places = np.arange(len(config.shifts))
    for label, marker, colour, errors in marks:
        # zero has no place on a log scale
        right.plot(places, np.maximum(errors, 1e-17), marker, color=colour, label=label,
                   markerfacecolor="none")  # fmt: skip
    right.plot(places, result.inverse_errors, "+", color=BLACK, markersize=9,
               label="T$^{(k)}$T$^{(l)}$ = T$^{(k−l)}$ (wrong)")  # fmt: skip
    right.set_xticks(places, [f"{k:g}" for k in config.shifts])
    right.set(xlabel="shift k (steps); l is the next one", yscale="log",
              ylabel="largest error of the law", ylim=(3e-18, 1e2))  # fmt: skip
    for axes, place in ((left, "lower center"), (middle, "lower center"), (right, "center")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=place)
    figure.suptitle("Rotary positions: products depend on t − s alone")
    return figure
