"""L3–L8: four gradients of an LSTM against finite differences, as a function of the steps T.

The gradients are those of `lstm_variants`: as printed, with o restored, with o and c_{t−1}
restored, and right; the library's is set beside them. The truth is (E(θ + h) − E(θ − h)) / 2h, in
float64, for every single weight, input and state, and for every gate and cell of every step, which
are nudged from outside. Two steps h are extrapolated to order h⁴ (Richardson), twice: how far the
two results are apart is the noise that no error can be told from.

E is linear in the outputs, with random coefficients: in h_1 … h_T as the notes have it, and once
more with c_T besides. At T = 1 with c_0 ≠ 0 the first three gradients differ, from T = 2 on the
last two.

Axes: C cases, T time, B batch, D input width, H hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Scale, Seed, Several, Size
from experiments.engine.session import SILENT, Session
from experiments.models.lstm_variants import (
    GRADIENTS,
    Case,
    Gradients,
    Steps,
    back_propagate,
    run_steps,
    true_gradient,
)
from experiments.report.evidence import Claim, Evidence, equal
from experiments.report.intervals import Exact
from rnnattn import LSTMParams, LSTMState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLAIMS = {
    "L3": "The gradient that reaches the cell state",
    "L4": "The gradients of the four gates",
    "L5": "The gradients of the weights",
    "L6": "The gradients of the biases",
    "L7": "The gradients of the input and of the previous output",
    "L8": "The gradient that the cell state carries back in time",
}

TOLERANCE = 1e-8
"""A smaller relative error is none; the differences are worth about ten times more."""

GATES = ("i", "f", "g", "o")
WEIGHTS = tuple(f"w_{side}{gate}" for side in "xh" for gate in GATES)
BIASES = tuple(f"b_{gate}" for gate in GATES)
OUTSIDE = (*WEIGHTS, *BIASES, "x", "x_T", "h_0", "c_0")
"""What a caller of the LSTM can differentiate; `x_T` is the last input alone."""
QUANTITIES = (*OUTSIDE, *Steps._fields, "θ")
"""And what lies inside; θ is all of w_x, w_h and b as one vector."""
PRINTED, O_RESTORED, NO_CARRY, RIGHT, LIBRARY = METHODS = (*GRADIENTS, "rnnattn.lstm")
THROUGH_H, THROUGH_BOTH = range(2)
"""What E depends on: h_1 … h_T, or c_T as well."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: seconds on one core."""

    seed: Seed = 0
    """Random seed of weights, inputs, states and losses."""
    lengths: Several[Size] = (1, 2, 3, 5)
    """The T of the sequences; without 1 and 2 the claims stay undecided."""
    cases: Size = 20
    """Random LSTMs for each T."""
    batch_size: Size = 2
    input_size: Size = 3
    hidden_size: Size = 4
    weight_scale: Scale = 0.5
    """Standard deviation of weights and biases; that of inputs and initial states is 1."""
    step: Annotated[float, Field(ge=1e-6, le=0.1)] = 2e-3
    """The largest h of the difference quotients."""


TINY = Config(lengths=(1, 2), cases=3, hidden_size=3, input_size=2)


class Result(NamedTuple):
    """Relative errors, and the factors that the notes leave out; all without units."""

    errors: np.ndarray  # (E, method, T, quantity, case); NaN for what lies inside the library
    noise: np.ndarray  # (E, T, quantity, case)
    cosines: np.ndarray  # (method, T, case): of the angle between a gradient of θ and the true one
    gate_errors: np.ndarray  # L4 (from the true dE/dc_t or the printed, gate, case), first T
    rest_errors: np.ndarray  # L7, o restored, without the f term (x or h_prev, case), first T
    factors: np.ndarray  # (o, c_{t−1} or f; as it is or as it is missing, sample), first T
    scores: dict[str, float]


# ---- gradients ---------------------------------------------------------------------------------


def draw_cases(config: Config, T: int) -> Case:
    """The random LSTMs for sequences of T steps, along a leading axis."""
    rng = np.random.default_rng([config.seed, T])
    C, B, D, H = config.cases, config.batch_size, config.input_size, config.hidden_size
    draw = lambda *shape: jnp.asarray(rng.normal(size=(C, *shape)))
    weights = [config.weight_scale * draw(*shape) for shape in ((D, 4 * H), (H, 4 * H), (4 * H,))]
    state = LSTMState(draw(B, H), draw(B, H))
    return Case(LSTMParams(*weights), draw(T, B, D), state, draw(T, B, H), draw(B, H))


def gradients_of(case: Case) -> Gradients:
    """The gradient by each of METHODS, along a leading axis."""
    steps = run_steps(case.params, case.x, case.state)
    terms = jax.tree.map(lambda *flags: jnp.array(flags), *GRADIENTS.values())
    by_hand = jax.vmap(back_propagate, (0, None, None))(terms, case, steps)
    lstm = partial(rnnattn.lstm, time_major=True)
    _, pullback = jax.vjp(lstm, case.params, case.x, case.state)
    last = LSTMState(jnp.zeros_like(case.dc_last), case.dc_last)
    dparams, dx, dstate = pullback((case.dy, last))
    # the library does not show what happens inside
    unknown = jax.tree.map(lambda s: jnp.full_like(s, jnp.nan), steps)
    library = Gradients(dparams, dx, dstate, unknown)
    return jax.tree.map(lambda hand, own: jnp.concatenate([hand, own[None]]), by_hand, library)


@jax.jit
def differentiate(cases: Case, step: float) -> tuple[Gradients, Gradients, Gradients, Steps]:
    """Of each case: the true gradient, its noise, those by METHODS, and the steps themselves."""

    def one(case):
        steps = run_steps(case.params, case.x, case.state)
        return *true_gradient(case, step), gradients_of(case), steps

    return jax.lax.map(one, cases)


# ---- errors ------------------------------------------------------------------------------------


def quantities(gradients: Gradients) -> list[np.ndarray]:
    """The parts of gradients, in the order of QUANTITIES, each as vectors (…, size)."""
    lead = gradients.params.b.shape[:-1]
    flat = lambda a: a.reshape(*lead, -1)
    parts = gradients.params[:3]
    blocks = [flat(b) for part in parts for b in np.split(part, 4, axis=-1)]
    inputs = [flat(gradients.x), flat(gradients.x[..., -1, :, :])]
    rest = [flat(a) for a in (*gradients.state, *gradients.steps)]
    return [*blocks, *inputs, *rest, np.concatenate([flat(part) for part in parts], axis=-1)]


def relative_errors(gradients: Gradients, true: Gradients) -> np.ndarray:
    """|a − e| / |e| of each quantity, in the Euclidean norm: (quantity, …)."""
    pairs = zip(quantities(gradients), quantities(true), strict=True)
    return np.stack([relative(a, e) for a, e in pairs])


def relative(a: np.ndarray, e: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - e, axis=-1) / np.linalg.norm(e, axis=-1)


def cosines(gradients: Gradients, true: Gradients) -> np.ndarray:
    """Of the angles between gradients of θ and the true ones."""
    a, e = quantities(gradients)[-1], quantities(true)[-1]
    return np.sum(a * e, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(e, axis=-1)


def gate_errors(dc: np.ndarray, true: Steps, steps: Steps) -> np.ndarray:
    """L4: errors of dE/di, dE/df, dE/dg, dE/do as they follow from dE/dc and the true dE/dh."""
    found = (dc * steps.g, dc * steps.c_prev, dc * steps.i, true.h * np.tanh(steps.c))
    flat = lambda a: a.reshape(len(a), -1)
    return np.stack([relative(flat(a), flat(getattr(true, gate)))
                     for gate, a in zip(GATES, found, strict=True)])  # fmt: skip


def without_f(gradients: Gradients, params: LSTMParams) -> list[np.ndarray]:
    """L7: dE/dx and dE/dh₋ of each case but for the term of the forget gate, as vectors."""
    dz_f = np.split(gradients.steps.z, 4, axis=-1)[1]
    terms = (dz_f @ np.split(w, 4, axis=-1)[1][:, None].mT for w in map(np.asarray, params[:2]))
    sums = (gradients.x, gradients.steps.h_prev)
    return [(dx - term).reshape(len(dx), -1) for dx, term in zip(sums, terms, strict=True)]


def left_out(true: Steps, found: Steps, steps: Steps) -> np.ndarray:
    """o, c_{t−1} and f of the last step, where nothing comes back from later ones; each as the
    forward pass has it, and as the quotient of the true gradient and the one without it."""
    last = lambda a: a[..., -1, :, :].reshape(-1)
    dz_f = lambda z: np.split(last(z).reshape(-1, 4, steps.f.shape[-1]), 4, axis=1)[1].ravel()
    printed, o_restored = (jax.tree.map(lambda a, k=k: a[:, k], found) for k in (0, 1))
    return np.array([
        [last(steps.o), last(true.c) / last(printed.c)],
        [last(steps.c_prev), dz_f(true.z) / dz_f(o_restored.z)],
        [last(steps.f), last(true.c_prev) / last(true.c)],
    ])  # fmt: skip


# ---- the experiment ----------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raise a `UsageError` if there is no memory for the gradients of all cases."""
    B, D, H = config.batch_size, config.input_size, config.hidden_size
    # each of the methods', the true one and its noise
    weights, states = 4 * H * (D + H + 1), max(config.lengths) * B * (D + 6 * H)
    memory.check((len(METHODS) + 2) * 8 * config.cases * (weights + states), "cases")


def run(config: Config, session: Session = SILENT) -> Result:
    """Measure every gradient at every T."""
    errors, noise, angles = [], [], []
    with jax.enable_x64(True):
        for T in config.lengths:
            cases = draw_cases(config, T)
            through_h = cases._replace(dc_last=jnp.zeros_like(cases.dc_last))
            for losses in (through_h, cases):
                true, difference, found, steps = jax.tree.map(
                    np.asarray, differentiate(losses, config.step)
                )
                by_method = jax.tree.map(lambda e: e[:, None], true)
                errors.append(relative_errors(found, by_method))
                noise.append(relative_errors(jax.tree.map(np.add, true, difference), true))
                if losses is through_h:
                    angles.append(cosines(found, by_method))
                    if T == config.lengths[0]:
                        cells = (true.steps.c, found.steps.c[:, 0])
                        in_gates = np.stack([gate_errors(dc, true.steps, steps) for dc in cells])
                        factors = left_out(true.steps, found.steps, steps)
                        o_restored = jax.tree.map(lambda a: a[:, 1], found)
                        rest = [without_f(each, cases.params) for each in (o_restored, true)]
    # from ((T, E), quantity, case, method) to (E, method, T, quantity, case)
    apart = lambda a: np.stack(a).reshape(len(config.lengths), 2, *a[0].shape)
    return Result(
        errors=apart(errors).transpose(1, 4, 0, 2, 3),
        noise=apart(noise).swapaxes(0, 1),
        cosines=np.stack(angles).transpose(2, 0, 1),
        gate_errors=in_gates,
        rest_errors=np.stack([relative(*pair) for pair in zip(*rest, strict=True)]),
        factors=factors,
        scores={"largest_noise": float(np.max(noise))},
    )


# ---- the claims --------------------------------------------------------------------------------


def pick(
    config: Config,
    result: Result,
    method: str,
    names: Sequence[str],
    steps: Callable[[np.ndarray], Any] = lambda T: T > 0,
    losses: Sequence[int] = (THROUGH_H, THROUGH_BOTH),
) -> np.ndarray:
    """The errors by a method, of quantities by name, at chosen T; [NaN] if there are none."""
    chosen = result.errors[list(losses), METHODS.index(method)][:, steps(np.array(config.lengths))]
    chosen = chosen[:, :, [QUANTITIES.index(name) for name in names]]
    return chosen.ravel() if chosen.size else np.array([np.nan])


def none(name: str, errors: np.ndarray, tolerance: float, *rival: Any) -> Evidence:
    """Evidence that there is no error, even in the worst case; the rival is named with its best."""
    worst = Exact(np.max(errors), tolerance)
    return equal(f"{name}: relative error, worst case", 0, worst, *rival)


def some(name: str, errors: np.ndarray, tolerance: float) -> Evidence:
    """The same for a statement that is to be shown wrong: its median."""
    return equal(f"{name}: relative error, median case", 0, Exact(np.median(errors), tolerance))


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """L3 to L8: what the corrected gradient and the printed one are worth."""
    # an error can be told from none only down to the noise of the differences
    tolerance = max(TOLERANCE, float(np.max(result.noise)))
    one, more = (lambda T: T == 1), (lambda T: T >= 2)
    get, h_alone = partial(pick, config, result), (THROUGH_H,)
    first = f"T = {config.lengths[0]}"
    criterion = (
        "Against finite differences in float64, over all random LSTMs and T, the relative error of "
        f"the corrected statement stays below {tolerance:.0e} in the worst case, and that of the "
        "printed one does not even in the best."
    )

    def slope(name: str, k: int) -> Evidence:
        is_, missing = result.factors[k]
        value = float(np.sum(is_ * missing) / np.sum(is_ * is_))
        return equal(f"{name}, slope, {first}", 1, Exact(value, tolerance), 0, "no such factor")

    def rows(names: Sequence[str], method: str, at: Callable = one, losses: Any = h_alone) -> Any:
        return float(np.min(get(method, names, at, losses))), f"{method}, best case"

    forget = {"L5": ("w_xf", "w_hf"), "L6": ("b_f",), "L7": ("x", "h_prev")}
    every = {"L5": WEIGHTS, "L6": BIASES, "L7": ("x", "h_0")}
    others = {
        "L5": tuple(name for name in WEIGHTS if name not in forget["L5"]),
        "L6": tuple(name for name in BIASES if name not in forget["L6"]),
    }
    equations = {
        "L5": r"\frac{\partial E}{\partial w_{xf}} = \sum \frac{\partial E}{\partial c_t} \odot"
        r" \mathbf{c_{t-1}} \odot f(1-f)\, x_t^\top",
        "L6": r"\frac{\partial E}{\partial b_f} = \sum \frac{\partial E}{\partial c_t} \odot"
        r" \mathbf{c_{t-1}} \odot f(1-f)",
        "L7": r"\frac{\partial E}{\partial x_t} = \sum_{u \in \{i,f,g,o\}} w_{xu}^\top"
        r" \frac{\partial E}{\partial z_u},\quad \frac{\partial E}{\partial z_f} ="
        r" \frac{\partial E}{\partial c_t} \odot \mathbf{c_{t-1}} \odot f(1-f)",
    }
    notes = {
        "L5": "The notes' rows of the forget gate lack c₋, which their own dE/df has. The other "
        "rows are right, given L3.",
        "L6": "The notes' dE/db_f lacks c₋. The other biases are right, given L3.",
        "L7": "The forget gate's term lacks c₋ in both. This dE/dh₋ is the part through step t; "
        "step t − 1 adds its own.",
    }
    of_f = r"E_{\text{delta}} \cdot (1 - \tanh^2(c_t)) \cdot f(1-f)"
    as_printed = {
        "L5": rf"\frac{{dE}}{{dw_{{xf}}}} = {of_f} \cdot x_t",
        "L6": rf"\frac{{dE}}{{db_f}} = {of_f}",
        "L7": rf"\frac{{dE}}{{dx_t}} = \ldots + {of_f} \cdot w_{{xf}}",
    }
    what = {"L5": "the weights", "L6": "the biases", "L7": "x and h₀"}

    def through_forget_gate(id: str) -> Claim:
        names = forget[id]
        of = " and ".join(names).replace("h_prev", "h₋")
        right = [
            none(f"{what[id]}, rnnattn.lstm", get(LIBRARY, every[id]), tolerance,
                 *rows(names, O_RESTORED)),
            none(f"{of}, all T, corrected", get(RIGHT, names), tolerance,
                 *rows(names, O_RESTORED)),
        ]  # fmt: skip
        if id in others:
            errors = get(O_RESTORED, others[id], one, h_alone)
            right.append(none("those of i, g and o, printed, given L3, T = 1", errors, tolerance))
        else:
            name = f"{of} but for the term of f, printed, given L3, {first}"
            right.append(none(name, result.rest_errors, tolerance))
        right.append(slope("missing factor of dE/dz_f over c₋", 1))
        printed = (
            some(
                f"{of}, printed, given L3, T = 1", get(O_RESTORED, names, one, h_alone), tolerance
            ),
            some(f"{of}, as printed, T = 1", get(PRINTED, names, one, h_alone), tolerance),
        )
        return Claim(
            id, equations[id], criterion, tuple(right), printed, note=notes[id],
            printed_equation=as_printed[id],
        )  # fmt: skip

    by_true, by_printed = result.gate_errors
    output = ("w_xo", "w_ho", "b_o")
    through_c = tuple(name for name in (*WEIGHTS, *BIASES) if name not in output)
    return (
        Claim(
            "L3",
            r"\frac{\partial E}{\partial c_t} = \frac{\partial E}{\partial h_t} \odot \mathbf{o}"
            r" \odot (1 - \tanh^2 c_t) + \frac{\partial E}{\partial c_{t+1}} \odot f_{t+1}",
            criterion,
            right=(
                none("dE/dc_t, all T, corrected", get(RIGHT, ["c"]), tolerance,
                     *rows(["c"], PRINTED)),
                none("what goes through c_t, rnnattn.lstm", get(LIBRARY, through_c), tolerance,
                     *rows(through_c, PRINTED)),
                slope("missing factor of dE/dc_t over o", 0),
                none("w_xo, w_ho, b_o, printed, T = 1", get(PRINTED, output, one, h_alone),
                     tolerance),
            ),
            printed=(
                some("dE/dc_t, printed, T = 1", get(PRINTED, ["c"], one, h_alone), tolerance),
                some("dE/dx, printed, T = 1", get(PRINTED, ["x"], one, h_alone), tolerance),
            ),
            note="The notes leave out o, and with it spoil every gradient that goes through c_t; "
            "those of the output gate do not.",
            news="An LSTM's gradient without the factor o is off by about its own length and still "
            "trains: no loss curve gives it away.",
            printed_equation=r"\frac{dE}{dc_t} = E_{\text{delta}} \cdot (1 - \tanh^2(c_t)),\quad"
            r" E_{\text{delta}} = \frac{dE}{dh_t}",
        ),
        Claim(
            "L4",
            r"\frac{\partial E}{\partial o} = \frac{\partial E}{\partial h_t} \odot \tanh c_t,\;"
            r" \frac{\partial E}{\partial g} = \frac{\partial E}{\partial c_t} \odot i,\;"
            r" \frac{\partial E}{\partial i} = \frac{\partial E}{\partial c_t} \odot g,\;"
            r" \frac{\partial E}{\partial f} = \frac{\partial E}{\partial c_t} \odot c_{t-1},\;"
            r" \frac{\partial E}{\partial (i \odot g)} = \frac{\partial E}{\partial c_t}",
            "With dE/dc_t and dE/dh_t by finite differences, the formulas give the gradients of "
            f"the gates and of i ⊙ g to {tolerance:.0e} in the worst case. The condition: with the "
            "printed dE/dc_t of L3 they do not.",
            right=(
                none(f"i, f, g, o, from the true dE/dc_t, {first}", by_true, tolerance,
                     float(np.min(by_printed[:3])), "i, f, g from the printed dE/dc_t, best case"),
                none("i, f, g, o, all T, corrected", get(RIGHT, GATES), tolerance),
                none("input_gate = i ⊙ g, all T, corrected", get(RIGHT, ["i_g"]), tolerance,
                     *rows(["i_g"], PRINTED)),
            ),
            beyond=(
                some(f"i, f, g, from the printed dE/dc_t, {first}", by_printed[:3], tolerance),
                some("input_gate, printed, T = 1", get(PRINTED, ["i_g"], one, h_alone), tolerance),
            ),
            note="Right under the condition that dE/dc_t is that of L3 as corrected.",
        ),
        *(through_forget_gate(id) for id in ("L5", "L6", "L7")),
        Claim(
            "L8",
            r"\frac{\partial E}{\partial c_{t-1}} = \frac{\partial E}{\partial c_t} \odot f",
            criterion,
            right=(
                none("all of θ, x, h₀, c₀, T ≥ 2, rnnattn.lstm",
                     get(LIBRARY, ("θ", "x", "h_0", "c_0"), more), tolerance,
                     *rows(("θ", "x"), NO_CARRY, more)),
                none("dE/dc₋ of every step, corrected", get(RIGHT, ["c_prev"]), tolerance,
                     *rows(["c_prev"], NO_CARRY, more)),
                slope("dE/dc₋ over dE/dc_t, over f", 2),
                none("without it, θ and x, T = 1", get(NO_CARRY, ("θ", "x"), one), tolerance),
                none("without it, output gate, T = 2",
                     get(NO_CARRY, output, lambda T: T == 2), tolerance),
                none("without it, last input, all T", get(NO_CARRY, ["x_T"]), tolerance),
            ),
            printed=(
                some("without it, all of θ, T ≥ 2", get(NO_CARRY, ["θ"], more, h_alone),
                     tolerance),
            ),
            note="The notes say nothing of dE/dc₋. Without it only T = 1 is right; at T = 2 the "
            "output gate's weights still are, and the last input's gradient at any T. What "
            "training with each gradient comes to: configs/claims/lstm_gradient_training.toml.",
            in_notes=False,
        ),
    )  # fmt: skip


# ---- the figure --------------------------------------------------------------------------------


def plot(config: Config, result: Result) -> "Figure":
    """Error against T, the factors that are missing, and which gradients are right."""
    from experiments.figures import new_figure

    figure = new_figure(11, 8.4)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.1))[:, 0]
    left, *factors = top.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
    _error_by_length(left, config, result)
    names = ("o_t", "c_{t-1}", "f_t")
    titles = (
        "dE/dc$_t$ over\nthe printed",
        "dE/dz$_f$ over the\nprinted, given L3",
        "dE/dc$_{t-1}$ over\ndE/dc$_t$",
    )
    for axes, name, title, pair in zip(factors, names, titles, result.factors, strict=True):
        _factor(axes, name, title, *pair)
    _table_of_errors(bottom.subplots(), config, result)
    count = result.errors.shape[-1]
    figure.suptitle(f"Gradients of an LSTM against finite differences, {count} random cases each")
    return figure


def _error_by_length(axes: "Axes", config: Config, result: Result) -> None:
    from experiments.figures import BLACK, BLUE, GREEN, ORANGE, RED

    styles = zip(METHODS, (RED, ORANGE, GREEN, BLUE, BLACK), "o^sD+", strict=True)
    θ = QUANTITIES.index("θ")
    for k, (method, colour, marker) in enumerate(styles):
        low, median, high = np.quantile(
            result.errors[THROUGH_H, k, :, θ], [0.05, 0.5, 0.95], axis=-1
        )
        line = ":" if method == LIBRARY else "-"
        axes.plot(config.lengths, median, line, color=colour, marker=marker, label=method)
        if method != LIBRARY:
            axes.fill_between(config.lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(
        xlabel="steps T", ylabel="relative error of dE/dθ\n(median, 5–95 %)", yscale="log",
        xticks=config.lengths,
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")


def _factor(axes: "Axes", name: str, title: str, factor: np.ndarray, missing: np.ndarray) -> None:
    from experiments.figures import BLACK, BLUE, ORANGE

    ends = np.array([factor.min(), factor.max()])
    axes.plot(ends, ends, color=BLACK, linewidth=1, label="corrected")
    without = 0 if name == "f_t" else 1
    axes.axhline(without, color=ORANGE, linestyle="--", label="printed" if without else "left out")
    shown = slice(0, 200)
    axes.plot(factor[shown], missing[shown], "o", color=BLUE, markersize=4,
              markerfacecolor="none", label="measured")  # fmt: skip
    axes.set_xlabel(f"${name}$ in the forward pass")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _table_of_errors(axes: "Axes", config: Config, result: Result) -> None:
    shown = [k for k, T in enumerate(config.lengths) if T <= 3] or [0]
    medians = np.median(result.errors[THROUGH_H, :, :, : len(OUTSIDE)], axis=-1)
    rows = medians[:, shown].reshape(-1, len(OUTSIDE))
    exponents = np.log10(np.maximum(rows, 1e-16))
    image = axes.imshow(exponents, cmap="cividis", vmin=-12, vmax=0, aspect="auto")
    for (row, column), error in np.ndenumerate(rows):
        right = error < TOLERANCE
        axes.text(column, row, "✓" if right else f"{error:.0%}", ha="center", va="center",
                  fontsize=9, color="white" if right else "black")  # fmt: skip
    labels = [f"${name.replace('_', '_{')}}}$" if "_" in name else f"${name}$" for name in OUTSIDE]
    axes.set_xticks(range(len(OUTSIDE)), labels)
    labels = [f"{method}, T = {config.lengths[k]}" for method in METHODS for k in shown]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for row in range(len(shown), len(labels), len(shown)):
        axes.axhline(row - 0.5, color="white", linewidth=2)
    axes.set_xlabel("gradient with respect to")
    axes.figure.colorbar(image, ax=axes, label="log₁₀ of the median relative error", pad=0.01)
