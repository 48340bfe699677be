"""A query half-way between two orthonormal keys averages their values (A6).

q = β(k_a + k_b):   c − ½(v_a + v_b) = δ (mean of the other values − ½(v_a + v_b)),
                    δ = (n−2) / (n−2 + 2e^β) ≤ ½ (n−2) e^{−β}
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Logit, Seed, Several, Size
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, below, each, equal
from experiments.report.intervals import Exact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "A6": "A query half-way between two keys averages their values",
}

ROUNDING = 1e-12
"""What float64 leaves of numbers of order 1."""

CLOSE = 0.01
"""An output within this, relative to the values' distances, is the average."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the keys' directions and the values."""
    several_keys: Several[Annotated[Size, Field(ge=3)]] = (3, 10, 100)
    """Numbers n of keys."""
    betas: Several[Logit] = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0)
    """Lengths β of the query along each of the two keys, rising."""


TINY = Config(several_keys=(3, 6))


class Result(NamedTuple):
    """The weights and the output against n and β; the first axis is n, the second β."""

    weights: np.ndarray
    rest: np.ndarray
    distance: np.ndarray
    identity_error: np.ndarray
    scores: dict[str, float]


def left_over(beta: Any, keys: Any) -> Any:
    """δ, the weight of all keys but the two."""
    return (keys - 2) / (keys - 2 + 2 * np.exp(beta))


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the keys."""
    memory.check(3 * 8 * max(config.several_keys) ** 2, "several_keys")


def run(config: Config, session: Session = SILENT) -> Result:
    """Attend between two of n random orthonormal keys with queries of each length."""
    random = np.random.default_rng(config.seed)
    betas = np.array(config.betas)
    weights, distances, errors = [], [], []
    with jax.enable_x64(True):
        for n in config.several_keys:
            key = np.linalg.qr(random.standard_normal((n, n)))[0]
            value = random.standard_normal((n, n))
            query = betas[:, None] * (key[0] + key[1])
            # one query for each β, one head, no batch
            out, applied = rnnattn.dot_product_attention(
                jnp.asarray(query)[:, None], jnp.asarray(key)[:, None],
                jnp.asarray(value)[:, None], scale=1.0, return_weights=True,
            )  # fmt: skip
            c, p = np.asarray(out)[:, 0], np.asarray(applied)[0]
            middle, others = value[:2].mean(axis=0), value[2:].mean(axis=0)
            delta = left_over(betas, np.array(n))[:, None]
            errors.append(np.max(np.abs(c - middle - delta * (others - middle)), axis=1))
            distances.append(np.linalg.norm(c - middle, axis=1) / np.linalg.norm(others - middle))
            weights.append(p[:, :2])
    pairs = np.array(weights)
    rest = 1 - pairs.sum(axis=2)
    return Result(
        weights=pairs,
        rest=rest,
        distance=np.array(distances),
        identity_error=np.array(errors),
        scores={"smallest_rest": float(rest.min())},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """A6: the exact distance from the average, for every n and β."""
    longest, n = config.betas[-1], np.array(config.several_keys)
    distances = [Exact(x, ROUNDING) for x in result.distance[:, -1]]
    from_average = (
        f"‖c − ½(v_a + v_b)‖ over the distance of the other values' mean, β = {longest:g}"
    )
    right = (
        *each(f"{from_average}, n = {{}}", n, left_over(longest, n), distances,
              left_over(longest / np.sqrt(n), n), "logits scaled by 1/√n"),
        equal(
            "largest error of the formula of c, all β and n",
            0, Exact(result.identity_error.max(), ROUNDING),
            result.distance.max(), "c = ½(v_a + v_b) at every β",
        ),
        equal(
            "largest difference between α_a and α_b, all β and n",
            0, Exact(np.max(np.abs(np.diff(result.weights, axis=2))), ROUNDING),
        ),
        below(f"{from_average}, largest of all n", CLOSE, Exact(result.distance[:, -1].max())),
    )  # fmt: skip
    return (
        Claim(
            "A6",
            r"q = \beta(k_a + k_b):\quad c - \tfrac12(v_a + v_b) = \delta\Big("
            r"\overline{v}_{\text{others}} - \tfrac12(v_a + v_b)\Big),\quad "
            r"\delta = \frac{n-2}{n-2+2e^\beta}",
            "The distance of the output from the average of the two values is δ times that of the "
            "other values' mean, to the rounding of float64, for every n and β; at the largest β "
            f"it is below {CLOSE:g}.",
            right,
            note="β must be large against ln n: δ ≤ ½(n−2)e^{−β}.",
            printed_equation=r"q = \beta(K_a + K_b),\ \beta \gg 0:\quad "
            r"c \approx \tfrac12(v_a + v_b)",
        ),
    )


def plot(config: Config, result: Result) -> "Figure":
    """Weights of the two keys and the distance from the average, against β."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, new_figure

    figure = new_figure(10, 4)
    weights, distance = figure.subplots(1, 2)
    grid = np.linspace(0, max(config.betas), 200)
    looks = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "v", ":"))
    for i, n in enumerate(config.several_keys):
        colour, marker, line = looks[i % len(looks)]
        delta = left_over(grid, n)
        weights.plot(grid, (1 - delta) / 2, color=colour, linestyle=line, label=f"theory, n = {n}")
        distance.plot(grid, delta, color=colour, linestyle=line, label=f"theory, n = {n}")
        for axes, values in ((weights, result.weights[i, :, 0]), (distance, result.distance[i])):
            axes.plot(config.betas, values, marker, color=colour, label=f"measured, n = {n}")
    weights.axhline(0.5, color=BLACK, linewidth=1)
    weights.set(xlabel="query length β", ylabel="weight of $v_a$, and of $v_b$")
    ylabel = "distance of c from the average\n(in distances of the others' mean)"
    distance.set(xlabel="query length β", ylabel=ylabel, yscale="log")
    for axes in (weights, distance):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
