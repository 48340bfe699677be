"""X2, X3: the hand-derived gradient of the LSTM beside JAX's own, in float64 and in 16 bits.

One loss Σ w ⊙ y of one LSTM is differentiated with respect to its weights and its input: by
`rnnattn.lstm`, whose gradient is written by hand; by JAX through `rnnattn.reference.lstm`, the same
equations; and by JAX through a loop that does everything in the dtype of its arguments. Errors are
relative, in the Euclidean norm of all gradients. In 16 bits the truth is the gradient in float64 at
the same 16-bit weights and inputs.

A number that is rounded once to bfloat16, of 8 significant bits, is off by at most 2⁻⁸ of itself.
A sum over T steps that is rounded at each of them is off by a random walk, so by more like √T.

Axes: T time, B batch, D input width, H hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn
import rnnattn.reference
from experiments.engine import memory
from experiments.engine.config import Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.models.lstm_variants import run_steps
from experiments.report.evidence import Claim, above, below, each
from experiments.report.intervals import Exact, Mean
from rnnattn import LSTMParams, LSTMState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "X2": "The gradient by hand is that of automatic differentiation",
    "X3": "Sixteen bits cost the gradient one rounding, at any depth",
}

FLOAT64 = 1e-14
"""Relative error of a float64 gradient that two orders of summation leave."""

ROUNDING = 2.0**-8
"""Largest relative error of a number that is rounded to bfloat16."""

BY_HAND, BY_JAX, PLAIN = range(3)
LABELS_OF = ("by hand, rnnattn.lstm", "by JAX, the same equations", "by JAX, all in 16 bits")


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of weights and inputs."""
    lengths: Several[Size] = (1, 10, 100)
    """Steps T, rising; from the first to the last the errors in 16 bits are compared."""
    cases: Size = 8
    """Random LSTMs for each T."""
    batch_size: Size = 4
    input_size: Size = 8
    hidden_size: Size = 16


TINY = Config(lengths=(1, 60), hidden_size=8)


class Result(NamedTuple):
    """Relative errors by T and case."""

    float64_errors: np.ndarray
    """Of the gradient by hand from JAX's (T, case)."""
    same_bits: np.ndarray
    """Share of its numbers that are JAX's to the bit (T, case)."""
    errors: np.ndarray
    """In bfloat16 (BY_HAND, BY_JAX or PLAIN; T, case)."""
    scores: dict[str, float]


def plain_lstm(params: LSTMParams, x: jax.Array) -> tuple[jax.Array]:
    """The outputs of the LSTM (B, T, H), each operation rounded to the dtype of the arguments."""
    zeros = jnp.zeros((x.shape[0], params.w_h.shape[0]), x.dtype)
    return (run_steps(params, x.swapaxes(0, 1), LSTMState(zeros, zeros)).h.swapaxes(0, 1),)


def check(config: Config) -> None:
    """Raise a `UsageError` if there are not two rising T, or there is no memory for the longest."""
    if len(config.lengths) < 2 or sorted(set(config.lengths)) != list(config.lengths):
        raise UsageError(f"lengths: should be two or more, rising, got {config.lengths}")
    B, D, H = config.batch_size, config.input_size, config.hidden_size
    memory.check(8 * (config.lengths[-1] * B * (D + 16 * H) + 4 * H * (D + H)), "lengths × cells")


def run(config: Config, session: Session = SILENT) -> Result:
    """Differentiate every LSTM in every way."""
    B, D, H = config.batch_size, config.input_size, config.hidden_size
    with jax.enable_x64(True):
        hand, by_jax = _gradient(rnnattn.lstm), _gradient(rnnattn.reference.lstm)
        plain = _gradient(plain_lstm)

        def measure(T: int, case: int) -> list[float]:
            rng = np.random.default_rng([config.seed, T, case])
            draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
            params = LSTMParams(*(draw(*s) / H**0.5 for s in ((D, 4 * H), (H, 4 * H), (4 * H,))))
            full = params, draw(B, T, D), draw(B, T, H)
            of_hand, of_jax = hand(*full), by_jax(*full)
            half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), full)
            true = by_jax(*jax.tree.map(lambda a: a.astype(jnp.float64), half))
            errors = [_relative(gradient(*half), true) for gradient in (hand, by_jax, plain)]
            return [_relative(of_hand, of_jax), np.mean(of_hand == of_jax), *errors]

        found = np.array([
            [measure(T, case) for case in range(config.cases)] for T in config.lengths
        ])  # fmt: skip
    return Result(
        float64_errors=found[..., 0],
        same_bits=found[..., 1],
        errors=np.moveaxis(found[..., 2:], -1, 0),
        scores={"largest_float64_error": float(found[..., 0].max())},
    )


def _gradient(lstm: Callable[[Any, Any], Any]) -> Callable[..., np.ndarray]:
    """The gradient of Σ w ⊙ y with respect to weights and input, as one float64 vector."""

    def loss(params, x, w):
        return jnp.sum((lstm(params, x)[0] * w).astype(jnp.float64))

    gradient = jax.jit(jax.grad(loss, (0, 1)))

    def flat(*arguments: Any) -> np.ndarray:
        leaves = jax.tree.leaves(gradient(*arguments))
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    return flat


def _relative(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """X2 in float64, X3 in bfloat16."""
    first, last = config.lengths[0], config.lengths[-1]
    worst = [Exact(errors.max(), FLOAT64) for errors in result.float64_errors]
    growth = [Mean.of_normal(np.log2(errors[-1] / errors[0])) for errors in result.errors]
    name = f"doublings of the error from T = {first} to T = {last}"
    return (
        Claim(
            "X2",
            r"\nabla_{\text{by hand}} = \nabla_{\text{autodiff}}\quad\text{to rounding, not to the"
            r" bit}",
            "In float64 the relative difference of the two gradients of all weights and inputs "
            f"stays below {FLOAT64:.0e} in the worst case at every T; not all of their numbers are "
            "the same to the bit, as sums are taken in another order.",
            right=(
                *each("relative difference in float64, worst case, T = {}", config.lengths, 0,
                      worst),
                below(f"share of numbers that are the same to the bit, T = {last}", 1,
                      Exact(result.same_bits[-1].max())),
            ),
        ),
        Claim(
            "X3",
            r"\frac{\lVert \nabla_{16} - \nabla\rVert}{\lVert\nabla\rVert} \le 2^{-8}"
            r"\text{ at every } T\quad\text{(by hand)}",
            "In bfloat16 the relative error of the gradient by hand stays below that of one "
            "rounding in the worst case at every T; automatic differentiation of the same "
            "equations, which sums the weights' gradient in 16 bits, loses more with every step.",
            right=(
                *(
                    below(f"by hand: relative error, worst case, T = {T}", ROUNDING,
                          Exact(errors.max()))
                    for T, errors in reversed([*zip(config.lengths, result.errors[BY_HAND],
                                                    strict=True)])
                ),
                below(f"by hand: {name}", 1, growth[BY_HAND]),
                above(f"by JAX, the same equations: {name}", 1, growth[BY_JAX]),
            ),
            note="Weights, inputs and states are kept in 16 bits; sums of products, the cell state "
            "and its gradient in float32.",
            news="In bfloat16 an LSTM's gradient by hand costs one rounding at any depth; the "
            "error of automatic differentiation grows with it.",
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Errors against T in both precisions."""
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED, new_figure

    figure = new_figure(10, 4)
    wide, half = figure.subplots(1, 2)
    T = np.array(config.lengths)
    wide.plot(T, result.float64_errors, "o", color=BLUE, markersize=3)
    wide.axhline(np.finfo(float).eps, color=BLACK, linestyle="--", label="2$^{-52}$")
    wide.set(ylabel="relative difference of the gradient by hand from JAX's", title="float64")
    styles = zip(result.errors, (BLUE, ORANGE, RED), LABELS_OF, strict=True)
    for errors, colour, label in styles:
        half.plot(T, np.median(errors, axis=1), "o-", color=colour, label=label)
        half.fill_between(T, errors.min(1), errors.max(1), color=colour, alpha=0.2, linewidth=0)
    half.axhline(ROUNDING, color=BLACK, linestyle="--", label="one rounding, 2$^{-8}$")
    middle = np.median(result.errors[BY_JAX], axis=1)
    half.plot(T, middle[-1] * np.sqrt(T / T[-1]), color=GREEN, linestyle=":", label="√T")
    half.set(ylabel="relative error of the gradient", title="bfloat16 (median, range of cases)")
    for axes in (wide, half):
        axes.set(xlabel="steps T", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
