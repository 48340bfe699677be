"""X5: what the LSTM's gradient keeps of the forward pass, counted and measured.

An array of all hidden states takes T B H numbers; call that 1. The gradient of Σ w ⊙ y needs y, 1,
as w is given, and besides

    residuals="gates"     c and four pre-activations of every step      5
    residuals="states"    c of every step                               1
    residuals=n           h and c of every n-th step                    2/n

What is measured is the temporary memory that XLA plans for the compiled gradient, with the CPU's
kernels in float32, where rows of one step are small. Automatic differentiation of
`rnnattn.reference.lstm` stands beside, and so does the time of each, which is not judged.

Axes: T time, B batch, D input width, H hidden width.
"""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import rnnattn
import rnnattn.reference
from experiments.engine import memory
from experiments.engine.config import Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, above, each
from experiments.report.intervals import Exact
from rnnattn import LSTMParams, native

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "X5": "What the LSTM's gradient keeps can be counted",
}

SMALL = 0.03
"""Share of the memory that rows of single steps may take."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of the input."""
    length: Size = 256
    batch_size: Size = 16
    input_size: Size = 16
    hidden_size: Size = 64
    every: Several[Size] = (4, 16, 64)
    """The n of `residuals=n`."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    """Times that each gradient is timed, in turn."""


TINY = Config(every=(8,), rounds=1)


class Result(NamedTuple):
    """By policy, "gates", "states" and each n, and last for automatic differentiation."""

    temporary: np.ndarray
    """Bytes over those of all hidden states."""
    seconds: np.ndarray
    """(policy, round)."""
    scores: dict[str, float]


def policies(config: Config) -> tuple[Any, ...]:
    """What `residuals` is, by policy."""
    return ("gates", "states", *config.every)


def counted(config: Config) -> np.ndarray:
    """The memory by policy, as it is counted above."""
    return np.array([1 + 5, 1 + 1, *(1 + 2 / n for n in config.every)])


def check(config: Config) -> None:
    """Raise a `UsageError` if there are no kernels, or what is small would not be, or no memory."""
    if not native.status().available:
        raise UsageError(f"residual_memory: needs the kernels, got {native.status().reason}")
    # of every policy there are some three rows of one step besides
    least = math.ceil(3 / SMALL)
    if config.length < least:
        raise UsageError(f"length: should be at least {least}, got {config.length}")
    needed = 20 * 4 * config.length * config.batch_size * config.hidden_size
    memory.check(needed, "length × batch_size × hidden_size")


def run(config: Config, session: Session = SILENT) -> Result:
    """Compile and time every gradient."""
    T, B, D, H = config.length, config.batch_size, config.input_size, config.hidden_size
    draw = np.random.default_rng(config.seed).standard_normal
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(False):
        array = lambda *shape: jnp.asarray(draw(shape) / H**0.5, jnp.float32)
        params = LSTMParams(array(D, 4 * H), array(H, 4 * H), array(4 * H))
        arguments = params, array(T, B, D), array(T, B, H)

        def gradient(lstm: Any, **options: Any) -> jax.stages.Compiled:
            def loss(params, x, w):
                return jnp.sum(lstm(params, x, time_major=True, **options)[0] * w)

            return jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()

        gradients = [gradient(rnnattn.lstm, residuals=each) for each in policies(config)]
        gradients.append(gradient(rnnattn.reference.lstm))
        seconds = []
        for _ in range(config.rounds + 1):
            of_round = []
            for each in gradients:
                start = time.perf_counter()
                jax.block_until_ready(each(*arguments))
                of_round.append(time.perf_counter() - start)
            seconds.append(of_round)
    plans: list[Any] = [each.memory_analysis() for each in gradients]
    planned = [plan.temp_size_in_bytes for plan in plans]
    return Result(
        temporary=np.array(planned) / (4 * T * B * H),
        # the first round warms up
        seconds=np.array(seconds[1:]).T,
        scores={"bytes_of_states": float(4 * T * B * H)},
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """X5, for each policy."""
    names = [f'"{policy}"' if isinstance(policy, str) else policy for policy in policies(config)]
    *ours, autodiff = (Exact(value, SMALL * value) for value in result.temporary)
    predicted = counted(config)
    return (
        Claim(
            "X5",
            r"\text{gates: } 1 + 5,\quad \text{states: } 1 + 1,\quad n\text{: } 1 + \tfrac{2}{n}"
            r"\quad\text{times } T B H",
            "The temporary memory of the compiled gradient is, for every policy, that which is "
            f"counted, to {SMALL:.0%}; automatic differentiation takes more than any.",
            right=(
                *each("memory over that of all states, residuals = {}", names, predicted, ours),
                above("memory over that of all states, automatic differentiation",
                      predicted.max(), autodiff),
            ),
        ),
    )  # fmt: skip


def plot(config: Config, result: Result) -> "Figure":
    """Memory and time of every policy."""
    from experiments.figures import BLACK, BLUE, ORANGE, new_figure

    figure = new_figure(9, 4)
    sizes, times = figure.subplots(1, 2)
    names = [*(f"residuals={policy!r}" for policy in policies(config)), "autodiff"]
    places = np.arange(len(names))
    colours = [*[BLUE] * (len(names) - 1), ORANGE]
    sizes.barh(places, result.temporary, color=colours, label="measured")
    sizes.plot(counted(config), places[:-1], "|", color=BLACK, markersize=18, label="counted")
    sizes.set(xlabel="memory of the gradient, in T · B · H numbers")
    sizes.legend(fontsize=8, loc="upper right")
    median = np.median(result.seconds, axis=1)
    times.barh(places, median / median[0], color=colours)
    times.set(xlabel='time of the gradient over that of "gates"')
    for axes in (sizes, times):
        axes.set_yticks(places, names if axes is sizes else [])
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    return figure
