"""X4: what the rounding of RoPE's angles costs far from the start of a text.

An angle t ω_m that is computed as a float32 product is off by its own rounding and by that of ω_m,
so by up to 2⁻²³ t ω_m: nothing at the first thousand positions, and a visible part of a turn at a
million. `rnnattn.rope` counts whole turns exactly. Both rotate the same random queries and keys,
n steps apart, at positions t from 2^p to 2^(p+1), and are compared with float64.

Axes: B draws of t, q and k; d features in J = d/2 pairs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic import Field

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Base, Samples, Seed, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, above, below
from experiments.report.intervals import Exact, Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "X4": "Float32 angles spoil rotary positions far out",
}

FLOAT32 = 1e-6
"""Error of a sine or cosine that `rnnattn.rope` stays below."""

VISIBLE = 1e-3
"""Root mean square error of an attention logit of variance 1 that counts: that of bfloat16's own
rounding of the logit."""

OURS, PLAIN = range(2)


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: a second on one core."""

    seed: Seed = 0
    """Random seed of positions, queries and keys."""
    dim: Annotated[Size, Field(ge=4, multiple_of=2)] = 64
    """Number d of features."""
    base: Base = 10_000.0
    distance: Size = 5
    """Steps from key to query."""
    powers: Annotated[
        tuple[Annotated[int, Field(ge=4, le=29)], ...], Field(min_length=2)
    ] = (7, 10, 13, 15, 17, 19, 20, 22)  # fmt: skip
    """Positions are drawn from 2 to these powers to twice that, rising; the last is judged."""
    samples: Samples = 500
    """Draws for each power."""


TINY = Config(powers=(8, 20), samples=100)


class Result(NamedTuple):
    """By power."""

    circle_errors: np.ndarray
    """Largest error of (sin, cos) of an angle, OURS and PLAIN (2, power)."""
    logit_errors: np.ndarray
    """`Mean` of the squared error of a logit, OURS and PLAIN (2, power, 4)."""
    scores: dict[str, float]


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the draws."""
    memory.check(20 * 8 * config.samples * config.dim, "samples × dim")


def run(config: Config, session: Session = SILENT) -> Result:
    """Rotate queries and keys at every power."""
    random = np.random.default_rng(config.seed)
    B, d = config.samples, config.dim
    ω = config.base ** (-2.0 * np.arange(d // 2) / d)

    def ours(t: np.ndarray, x: np.ndarray) -> np.ndarray:
        rows = jnp.asarray(x, jnp.float32)[:, None, None]
        positions = jnp.asarray(t, jnp.int32)[:, None]
        turned = rnnattn.rope(rows, positions, base=config.base, interleaved=True)
        return np.asarray(turned, np.float64)[:, 0, 0]

    def by(angles: np.ndarray, x: np.ndarray) -> np.ndarray:
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def plain(t: np.ndarray, x: np.ndarray) -> np.ndarray:
        # float32 in the product alone, so that nothing else is measured
        return by((t.astype(np.float32)[:, None] * ω.astype(np.float32)).astype(float), x)

    exact = lambda t, x: by(t[:, None] * ω, x)
    unit = np.tile([1.0, 0.0], (B, d // 2))
    circles, logits = [], []
    for power in config.powers:
        t = random.integers(2**power, 2 ** (power + 1), B)
        q, k = random.standard_normal((2, B, d)).astype(np.float32).astype(float)
        score = lambda rotate, t=t, q=q, k=k: (
            np.vecdot(rotate(t, q), rotate(t - config.distance, k)) / d**0.5
        )
        ways = (ours, plain)
        off = [(way(t, unit) - exact(t, unit)).reshape(B, -1, 2) for way in ways]
        circles.append([np.max(np.linalg.norm(each, axis=-1)) for each in off])
        logits.append([Mean.of((score(way) - score(exact)) ** 2) for way in ways])
    return Result(
        circle_errors=np.array(circles).T,
        logit_errors=np.array(logits).swapaxes(0, 1),
        scores={"largest_error": float(np.max(np.array(circles)[:, OURS]))},
    )


def bounds(config: Config) -> np.ndarray:
    """What a float32 product may be off by at the farthest positions of each power."""
    # of the fastest angle but the first, whose product of whole numbers is exact
    fastest = config.base ** (-2.0 / config.dim)
    return 2.0**-23 * 2.0 ** (np.array(config.powers) + 1) * fastest


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """X4, at the farthest positions."""
    power = config.powers[-1]
    at = f"positions 2^{power} to 2^{power + 1}"
    bound = bounds(config)[-1]
    ours, theirs = result.circle_errors
    squared = [Mean(*row[-1]) for row in result.logit_errors]
    return (
        Claim(
            "X4",
            r"|\operatorname{fl}(t\,\omega_m) - t\,\omega_m| \lesssim 2^{-23}\, t\,\omega_m",
            f"Farthest out, angles that are float32 products are off by no more than the bound of "
            f"rounding, and by more than a tenth of it; the logits that follow from them by more "
            f"than {VISIBLE:g} (root mean square); rnnattn.rope stays below {FLOAT32:g} at every "
            "position, and its logits below what counts.",
            right=(
                above(f"squared error of a logit of variance 1, float32 products, {at}",
                      VISIBLE**2, squared[PLAIN]),
                below(f"squared error of a logit of variance 1, rnnattn.rope, {at}",
                      VISIBLE**2, squared[OURS]),
                below(f"largest error of (sin, cos), float32 products, {at}", bound,
                      Exact(theirs[-1])),
                above(f"largest error of (sin, cos), float32 products, {at}", bound / 10,
                      Exact(theirs[-1])),
                below("largest error of (sin, cos), rnnattn.rope, all positions", FLOAT32,
                      Exact(ours.max())),
            ),
            news="Rotary angles as float32 products are off by a part of a turn at positions "
            "around a million, and attention's logits by a percent; rnnattn.rope is exact to 3e-7 "
            "at any position.",
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Errors of angles and of logits against the position."""
    from experiments.figures import BLACK, BLUE, ORANGE, new_figure

    figure = new_figure(9, 4)
    angles, logits = figure.subplots(1, 2)
    t = 2.0 ** np.array(config.powers)
    for k, colour, label in ((PLAIN, ORANGE, "float32 products"), (OURS, BLUE, "rnnattn.rope")):
        angles.plot(t, result.circle_errors[k], "o-", color=colour, label=label)
        logits.plot(t, np.sqrt(result.logit_errors[k, :, 0]), "o-", color=colour, label=label)
    angles.plot(t, bounds(config), color=BLACK, linestyle="--", label="bound of rounding")
    logits.axhline(VISIBLE, color=BLACK, linestyle="--", label="bfloat16's own rounding")
    angles.set_ylabel("largest error of (sin, cos)")
    logits.set_ylabel("error of a logit of variance 1 (root mean square)")
    for axes in (angles, logits):
        axes.set(xlabel="position t", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
