"""Does a comparison with the plain twin notice every sign and factor of the gradients?

    python tests/mutate.py [name of a function, or a part of it]

Each function of a backward pass is changed in one place at a time: + and − exchanged, a factor or
divisor dropped, f(x, …) made x, a number doubled (0 made 1), a minus sign or `not` left out, a
comparison turned round. With the changed function in place the gradients of a few small problems
are computed anew and compared with those of the plain twin, what `rnnattn.reference` runs, under
JAX's own differentiation. A change that leaves all of them as they were has survived: nothing
would notice that error. Exits with 1 if there is one. The tests run a sample.
"""

import ast
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run this file as a script
if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # as for the tests, before anything is computed

from rnnattn import masks, parallel, reference
from rnnattn.attention import (
    blocks,
    blockwise,
    dense,
    equations as attention,
    native,
    native_parts,
    pallas as attention_pallas,
    placed,
    ring,
    rule,
    tpu as attention_tpu,
)
from rnnattn.attention.arguments import Arrays, numbered, problem, with_functions
from rnnattn.attention.masking import two_ranges
from rnnattn.attention.placed import backward_on_xla, forward_on_xla
from rnnattn.attention.problem import Masking, Operands, Options, Schedule
from rnnattn.attention.xla import heads_first, time_first, time_last
from rnnattn.linear import equations as linear, rule as linear_rule, xla as linear_xla
from rnnattn.linear.arguments import masks_of
from rnnattn.linear.problem import Options as LinearOptions, Schedule as LinearSchedule
from rnnattn.position import rotary
from rnnattn.recurrent import chunked, noise, pallas, rule as lstm_rule, tpu, unit
from rnnattn.recurrent.arguments import checked_noise, time_major_steps, with_noise
from rnnattn.recurrent.noise import row_keys
from rnnattn.recurrent.problem import (
    Options as LSTMOptions,
    Outputs,
    Schedule as LSTMSchedule,
)
from rnnattn.recurrent.unit import Unit
from rnnattn.recurrent.units import gru, layer_norm, lstm, rnn, slstm
from tests import attention_cases, units
from tests.lstm_cases import assert_close, make_case, value_and_gradients
from tests.test_linear import (
    make_case as make_linear_case,
    value_and_gradients as linear_value_and_gradients,
)

ROOT = Path(__file__).resolve().parent.parent

_NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
}


class Mutant(NamedTuple):
    """A function of a backward pass, changed in one place."""

    function: Callable
    line: int
    change: str
    code: CodeType

    @property
    def name(self):
        return _name(self.function)

    @property
    def place(self):
        return f"{_path(self.function).relative_to(ROOT)}:{self.line}"


class Problem(NamedTuple):
    """What computes derivatives by a rule of the library, and what they should be."""

    run: Callable[[], Any]
    expected: Any


def _name(function):
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


def _path(function):
    return Path(sys.modules[function.__module__].__file__ or "").resolve()


def _changes(node) -> Iterator[ast.expr]:
    """What may stand in place of `node`."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield ast.BinOp(left, ast.Sub(), right)
        case ast.BinOp(left, ast.Sub(), right):
            yield ast.BinOp(left, ast.Add(), right)
        case ast.BinOp(left, ast.Mult(), right):
            yield left
            yield right
        case ast.BinOp(left, ast.Div(), _):
            yield left
        case ast.Call(ast.Name(), [first, *_]) if not isinstance(first, ast.Starred):
            yield first
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield operand
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            yield ast.Constant(2 * value or 1)
        case ast.Compare(left, [operator], right):
            if type(operator) in _NEGATED:
                yield ast.Compare(left, [_NEGATED[type(operator)]()], right)


def _slots(parent):
    """Each child of a node, as a container and the key it is found by."""
    for field, value in ast.iter_fields(parent):
        if isinstance(value, list):
            yield from ((value, n) for n in range(len(value)))
        else:
            yield vars(parent), field


def _definition(function):
    tree = ast.parse(_path(function).read_text(encoding="utf-8"))
    *classes, name = function.__qualname__.split(".")
    body = tree.body
    for within in classes:
        (body,) = (n.body for n in body if isinstance(n, ast.ClassDef) and n.name == within)
    (found,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    return found


def _compiled(function, tree):
    module = ast.Module([tree], type_ignores=[])
    return compile(module, f"<changed {_name(function)}>", "exec")


def _mutants_of(function):
    tree = _definition(function)
    for parent in ast.walk(tree):
        for container, key in _slots(parent):
            node = container[key]
            for other in _changes(node):
                shown = parent if isinstance(node, ast.Constant | ast.UnaryOp) else node
                before = ast.unparse(shown)
                container[key] = ast.copy_location(other, node)
                after = ast.unparse(shown if shown is parent else other)
                code = _compiled(function, tree)
                container[key] = node
                yield Mutant(function, node.lineno, f"{before} → {after}", code)


@cache
def mutants() -> list[Mutant]:
    """All changes, in the order of the source; those of `EQUIVALENT` are among them."""
    by_line = lambda function: sorted(_mutants_of(function), key=lambda m: m.line)
    return [mutant for function in FUNCTIONS for mutant in by_line(function)]


def unchanged(function: Callable) -> Mutant:
    """The function as it is, by the way of a mutant."""
    tree = _definition(function)
    return Mutant(function, tree.lineno, "as it is", _compiled(function, tree))


# ---- problems: recurrent units -----------------------------------------------------------------


def _sequence_problem(
    unit,
    twin,
    case,
    residuals,
    *,
    reverse=False,
    lengths=None,
    resets=None,
    unread=None,
    key=None,
    schedule=chunked.CHUNKED,
    **rates,
):
    """A time-major case, run forwards. Not through `sequence`, whose compilations are kept.

    The input of steps that the loss does not read, (T, B), is NaN for the rule alone.
    """
    masks: Any = {"lengths": lengths, "resets": resets, "reverse": reverse}
    random: Any = {"key": key, **rates}
    _, expected = value_and_gradients(partial(twin, time_major=True, **masks, **random), case)
    known, key = checked_noise("mutate", unit, case.params, **random)
    options = LSTMOptions(unit, reverse, residuals, noise=known)
    x = case.x if unread is None else jnp.where(unread[..., None], jnp.nan, case.x)
    steps = time_major_steps(x, lengths, resets, reverse)
    state, dlast = (
        type(unit.widths(case.params))(*_fields(s)) for s in (case.state, case.cotangents[1])
    )
    if key is not None:
        steps = with_noise(known, steps, state, row_keys(key, x.shape[1]))
    _, kept = lstm_rule._sequence_fwd(schedule, options, case.params, state, steps)

    def run():
        with jax.disable_jit():  # many steps of few kinds: faster than to compile them
            bwd = lstm_rule._sequence_bwd
            outputs = Outputs(case.cotangents[0], None)
            dparams, dstate, dsteps = bwd(schedule, options, kept, (outputs, dlast))
        return dparams, dsteps.x, dstate if len(dstate) > 1 else dstate[0]

    return Problem(run, expected)


def _fields(state):
    """Of a state, which is an array where it has one field."""
    return state if isinstance(state, tuple) else (state,)


def _time_major(case):
    swap = lambda a: jnp.swapaxes(a, 0, 1)
    dy, dstate = case.cotangents
    return case._replace(x=swap(case.x), cotangents=(swap(dy), dstate))


@cache
def lstm_problems() -> list[Problem]:
    """All features at once, in three chunks; the coupled gate; no feature."""
    T, B, D, H, R = 6, 3, 2, 3, 3  # R = H: fewer shapes, fewer programs to compile
    lengths = jnp.array([T, 3, 4])
    resets = jnp.zeros((T, B), bool).at[[2, 0, 3], [0, 1, 2]].set(True)
    every = _time_major(make_case(T, B, D, H, R, peephole=True))
    padding = jnp.arange(T)[:, None] >= lengths[None, :]
    every = every._replace(x=jnp.where(padding[..., None], jnp.nan, every.x))
    options: Any = {"lengths": lengths, "resets": resets}
    # row 0 is read before its reset, row 1 behind it, row 2 in its final state alone
    unread = jnp.array([[t >= 3, t < 2, t < 2] for t in range(T)])
    read = _time_major(make_case(T, B, D, H))
    dy, dstate = read.cotangents
    dy = jnp.where(unread[..., None], 0, dy).at[:, 2].set(0)
    dstate = jax.tree.map(lambda d: d.at[0].set(0), dstate)
    read = read._replace(cotangents=(dy, dstate))
    marks = jnp.zeros((T, B), bool).at[[3, 2, 2], [0, 1, 2]].set(True)
    with jax.disable_jit():
        return [
            _lstm_problem(every, 2, clip=1.0, **options),
            _lstm_problem(every, "states", reverse=True, clip=1.0, coupled=True, **options),
            _lstm_problem(_time_major(make_case(T, B, D, H)), "gates"),
            _lstm_problem(read, "states", resets=marks, unread=unread),
            _lstm_problem(every, 2, **options, **_drawn(lstm.LSTM)),
            _lstm_problem(every, 2, coupled=True, **options, **_drawn(lstm.LSTM)),
            _lstm_problem(_time_major(make_case(T, B, D, H)), "gates", zoneout=(0.3, 0.4)),
        ]


def _drawn(unit):
    """What is random in the steps of a unit: all that can be."""
    rates = {"zoneout": 0.4, "recurrent_dropout": 0.3, "key": jax.random.key(0)}
    return rates | ({"candidate_dropout": 0.4} if unit.candidate else {})


def _lstm_problem(case, residuals, *, clip=None, coupled=False, **masks):
    twin = partial(reference.lstm, clip=clip, coupled=coupled)
    return _sequence_problem(lstm.LSTM(clip, coupled), twin, case, residuals, **masks)


@cache
def tpu_problems() -> list[Problem]:
    """The kernels for a TPU in the interpreter; H 3, which only the interpreter takes."""
    T, B, D, H = 3, 2, 4, 3
    interpreted = pallas.halves(
        pallas.Loops(
            partial(tpu.forward, interpret=True),
            lambda *arrays, **how: tpu.backward(*arrays, **how, interpret=True),
            chunked.ON_CPU._replace(chunk_steps=2),
        )
    )
    forward, backward = interpreted
    schedule = LSTMSchedule(
        lambda options, keeps, *arrays: forward((options, keeps), *arrays), backward
    )
    case = _time_major(make_case(T, B, D, H))
    masks: Any = {
        "lengths": jnp.array([T, 2]),
        "resets": jnp.zeros((T, B), bool).at[[1, 1], [0, 1]].set(True),
    }
    return [
        _lstm_problem(case, "states", schedule=schedule, reverse=True, **masks),
        _lstm_problem(case, 2, schedule=schedule),
    ]


@cache
def _unit_problems(name) -> list[Problem]:
    """A unit of `tests/units.py`, from what is kept and from the states alone."""
    family = units.UNITS[name]
    T, B = 4, 2
    case = _time_major(units.make_case(family, T, B, 3, 2))
    resets = jnp.zeros((T, B), bool).at[2, 0].set(True)
    with jax.disable_jit():
        return [
            _sequence_problem(family.unit, family.twin, case, "gates"),
            _sequence_problem(
                family.unit, family.twin, case, "states", lengths=jnp.array([T, 2]), resets=resets
            ),
            _sequence_problem(family.unit, family.twin, case, "gates", **_drawn(family.unit)),
            _sequence_problem(
                family.unit, family.twin, case, "states", **_drawn(family.unit) | {"zoneout": 0.0}
            ),
        ]


def unit_problems():
    """The other units."""
    names = ("rnn", "rnn, relu", "layer-norm lstm", "layer-norm gru", "slstm", "slstm, exponential")
    return [problem for name in names for problem in _unit_problems(name)]


def gru_problems():
    return _unit_problems("gru") + _unit_problems("gru, reset before")


# ---- problems: linear units ---------------------------------------------------------------------


def _linear_problem(name, unit, by_steps, *, reverse, T=5, time_major=False, unread=None):
    """A masked case, or one with `unread` steps: for the rule alone, what these hold is NaN."""
    B, H = 3, 2
    names: tuple[str, ...] = ("mask", "resets") if T > 1 else ()
    case = make_linear_case(name, B, T, H, names=names, seed=3)
    if time_major:
        swap = lambda x: jnp.swapaxes(x, 0, 1)
        first, x, h = case.arrays
        case = case._replace(arrays=(swap(first) if name == "linear_scan" else first, swap(x), h))
        case = case._replace(cotangents=(swap(case.cotangents[0]), case.cotangents[1]))
        case = case._replace(masks={n: swap(mask) for n, mask in case.masks.items()})
    if name == "rglru":  # λ is 0 in a channel
        params = case.arrays[0]
        params = params._replace(decay=params.decay.at[0].set(-800))
        case = case._replace(arrays=(params, *case.arrays[1:]))
    if unread is not None:
        dy, dlast = case.cotangents
        dy, dlast = jnp.where(unread[..., None], 0, dy), jnp.where(unread[:, -1:], 0, dlast)
        begins = jnp.diff(unread.astype(jnp.int32), axis=1, prepend=unread[:, :1].astype(jnp.int32))
        case = case._replace(cotangents=(dy, dlast), masks={"resets": begins != 0})
    twin = partial(getattr(reference, name), reverse=reverse, time_major=time_major)
    _, expected = linear_value_and_gradients(twin, case)
    options = LinearOptions(unit(), reverse, time_major)
    first, x, h0 = case.arrays
    params, x = ((), (first, x)) if name == "linear_scan" else (first, x)
    leaf = jax.tree.leaves(x)[0]
    masks = masks_of(options, leaf, None, case.masks.get("mask"), case.masks.get("resets"))
    hidden = jnp.zeros(leaf.shape[:2], bool) if masks[0] is None else ~masks[0]
    hidden = hidden if unread is None else hidden | unread
    x = jax.tree.map(lambda x: jnp.where(hidden[..., None], jnp.nan, x), x)
    halves = (
        (linear_xla.forward_by_steps, lambda *args: linear_xla.backward_by_steps(*args))
        if by_steps
        else (linear_xla.forward_at_once, lambda *args: linear_xla.backward_at_once(*args))
    )
    schedule = LinearSchedule(*halves)
    _, kept = linear_rule._sequence_fwd(schedule, options, params, x, h0, masks)

    def run():
        with jax.disable_jit():
            dparams, dx, dh0, _ = linear_rule._sequence_bwd(
                schedule, options, kept, case.cotangents
            )
        return (*dx, dh0) if name == "linear_scan" else (dparams, dx, dh0)

    return Problem(run, expected)


# Units of which the gradient is looked up when it is called, as it may be a changed one.
_UNITS = {
    "linear_scan": lambda: linear.LINEAR._replace(
        gradient=lambda *args: linear.linear_gradient(*args)
    ),
    "mingru": lambda: linear.MINGRU._replace(gradient=lambda *args: linear.mingru_gradient(*args)),
    "minlstm": lambda: linear.MINLSTM._replace(
        gradient=lambda *args: linear.minlstm_gradient(*args)
    ),
    "rglru": lambda: linear.RGLRU._replace(gradient=lambda *args: linear.rglru_gradient(*args)),
}


@cache
def linear_problems() -> list[Problem]:
    """Each unit, each schedule, both directions, both layouts; a loss that reads some episodes."""
    unread = jnp.asarray([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 1]], bool)
    with jax.disable_jit():
        return [
            _linear_problem("rglru", _UNITS["rglru"], True, reverse=False),
            _linear_problem("minlstm", _UNITS["minlstm"], True, reverse=True, time_major=True),
            _linear_problem("mingru", _UNITS["mingru"], False, reverse=True, time_major=True),
            _linear_problem("linear_scan", _UNITS["linear_scan"], True, reverse=False),
            _linear_problem("rglru", _UNITS["rglru"], False, reverse=False),
            _linear_problem("rglru", _UNITS["rglru"], False, reverse=False, T=1),
            _linear_problem("mingru", _UNITS["mingru"], True, reverse=False, T=4, unread=unread),
        ]


# ---- problems: attention ----------------------------------------------------------------------


class _Case(NamedTuple):
    """Operands, and a direction and a cotangent to differentiate with."""

    options: Options
    operands: Operands
    masking: Masking
    tangents: Operands
    do: jax.Array
    dlse: jax.Array
    blind: int | None  # the query that sees nothing, if there is one

    def twin(self, operands):
        """O and L as `reference.dot_product_attention` has them."""
        return dense.forward(self.options, operands, self.masking)


def _case(seed, options, arrays: Callable[[Callable], Arrays], blind=None):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    given, options = with_functions("f", arrays(draw), options)
    operands, masking = problem(options, numbered(options, given))
    operands = heads_first(operands)
    tangents = jax.tree.map(lambda x: draw(*x.shape), operands)
    *rows, _ = operands.query.shape
    do, dlse = draw(*rows, operands.value.shape[-1]), draw(*rows)
    return _Case(options, operands, masking, tangents, do, dlse, blind)


def _bent(factors, logit, b, n, t, s):
    """A score function that closes over an array."""
    return jnp.sin(factors[n] * logit) + factors[0] * (s - t - b).astype(logit.dtype)


@cache
def _everything() -> _Case:
    """All features at once: rows that see nothing, blocks that overlap, blocks to be skipped.

    The sink of −∞ gives such a row an L of −∞ even so.
    """
    B, T, S, N, M, K, V = 2, 5, 7, 4, 2, 3, 2
    mask = jnp.arange(B * T * S).reshape(B, 1, T, S) % 5 > 0
    arrays = lambda draw: Arrays(
        query=draw(B, T, N, K),
        key=draw(B, S, M, K),
        value=draw(B, S, M, V),
        bias=draw(1, N, T, S),
        mask=mask.at[:, :, 1].set(False),
        scale=draw(N),
        query_seq_lengths=jnp.array([T, 4]),
        key_value_seq_lengths=jnp.array([5, S]),
        query_offset=jnp.array([2, 1]),
        sinks=draw(N).at[1].set(-jnp.inf),
        dropout_key=jax.random.key(0),
    )
    functions: Any = {
        "mask_function": lambda b, n, t, s: (s + t + n) % 7 > 0,
        "score_function": partial(_bent, jnp.array([0.7, 1.2, -0.4, 0.9])),
    }
    return _case(0, Options(True, (4, None), 1.5, 0.3, **functions), arrays, blind=1)


@cache
def _little() -> _Case:
    """A bias that the queries share, and a key that none of them sees."""
    B, T, S, N, K = 2, 4, 6, 2, 3
    mask = jnp.arange(S) != 2
    arrays = lambda draw: Arrays(
        draw(B, T, N, K), draw(B, S, N, K), draw(B, S, N, K), draw(B, 1, 1, S), mask
    )
    return _case(1, Options(score_function=partial(_bent, jnp.array([0.7, 1.2]))), arrays)


def _in_small_blocks(function, *args):
    """The results, from a program that is compiled for this call alone, and in a hurry."""
    hurry: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    fresh = lambda *args: function(*args)  # nothing that was traced before is found again
    sizes: dict[str, Any] = {"FORWARD_BLOCK": (4, 4), "BACKWARD_BLOCK": (4, 3)}
    sizes |= {"_TANGENT_LOGITS": 64, "_LEAST_TANGENT_BLOCK": 3}
    with mock.patch.multiple(blockwise, **sizes):
        return jax.jit(fresh).lower(*args).compile(hurry)(*args)


def _gradient_problem(case, backward, *, all_cotangents=True):
    """The rule of `attend`; with all cotangents, or none of L, and no gradient of bias and scale.

    What comes back to a query that sees nothing is NaN for the rule alone.
    """

    def expected(operands, do, dlse):
        results, pullback = jax.vjp(case.twin, operands)
        return results, pullback((do, dlse))[0]

    dlse = case.dlse if all_cotangents else jnp.zeros_like(case.dlse)
    results, gradient = _in_small_blocks(expected, case.operands, case.do, dlse)
    if not all_cotangents:
        dlse = SymbolicZero(jax.typeof(dlse))
        gradient = gradient._replace(bias=None, scale=None, score_arrays=None)

    def gradient_of(operands, results, do):
        schedule = Schedule(heads_first, case.twin, backward, heads_first)
        asked = (jnp.zeros(int(all_cotangents), bool),) * 3
        residuals = (operands, case.masking, *results, asked)
        return rule._attend_bwd(schedule, case.options, residuals, (do, dlse))[0]

    do = case.do if case.blind is None else case.do.at[:, :, :, case.blind].set(jnp.nan)
    return Problem(lambda: _in_small_blocks(gradient_of, case.operands, results, do), gradient)


@cache
def dense_problems() -> list[Problem]:
    backward = lambda *args: dense.backward(*args)
    return [
        _gradient_problem(_everything(), backward),
        _gradient_problem(_little(), backward),
        _gradient_problem(_little(), backward, all_cotangents=False),
    ]


@cache
def blockwise_problems() -> list[Problem]:
    """Head by head, as on a CPU; all heads together, as elsewhere."""

    def together(options, operands, masking, o, lse, do, dlse):
        dbias = jnp.zeros_like(operands.bias) if options.bias_gradient else None
        arrays = operands.score_arrays if options.score_gradient else None
        shared = dbias, jax.tree.map(jnp.zeros_like, arrays)
        rows = ((o, lse), (do, dlse))
        gradient = blockwise._backward_blocks(options, operands, masking, *rows, shared)
        dq, dk, dv, dscale, (dbias, darrays) = gradient
        return Operands(dq, dk, dv, dscale, dbias, None, darrays)

    return [
        _gradient_problem(_everything(), lambda *args: blockwise.backward(*args)),
        _gradient_problem(_little(), together),
        _gradient_problem(_little(), together, all_cotangents=False),
    ]


@cache
def parts_problems() -> list[Problem]:
    """Of keys, each by XLA in place of the kernels: blocks under a function, and two ranges."""

    def of_part(options, operands, masking, *rows):
        assert options.mask_function is None and not two_ranges(masking.key_ranges)
        return backward_on_xla(options, operands, masking, *rows)

    def backward(blind, block, options, operands, masking, o, lse, do, dlse):
        if blind is not None:
            query = operands.query.at[:, :, :, blind].set(jnp.nan)
            operands = operands._replace(query=query)
        to_arguments = lambda q, k, v: (time_first(q), *(jnp.swapaxes(x, 1, 2) for x in (k, v)))
        given = Operands(*to_arguments(*operands[:3]), *operands[3:])._replace(sinks=None)
        rows = time_first(o), lse, time_first(do), dlse
        as_made = lambda d, operands: d  # and so in float64
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(native, "_backward_of_part", of_part))
            for module in (native, native_parts, placed):
                stack.enter_context(mock.patch.object(module, "as_given", as_made))
            few: dict[str, Any] = {"BACKWARD_BLOCK": block, "PAIRS": 1}
            stack.enter_context(mock.patch.multiple(native_parts, **few))
            d = native._backward(options, given, masking, *rows)
        return d._replace(
            query=time_last(d.query),
            key=jnp.swapaxes(d.key, 1, 2),
            value=jnp.swapaxes(d.value, 1, 2),
            sinks=attention.sinks_gradient(operands.sinks, lse, attention.row_sums(do, o), dlse),
        )

    def problem_of(seed, mask, bias, *, blind=None, block=3, **how):
        B, T, S, N, M, K, V = 2, 5, 7, 4, 2, 3, 2
        arrays = lambda draw: Arrays(
            query=draw(B, T, N, K),
            key=draw(B, S, M, K),
            value=draw(B, S, M, V),
            bias=draw(*bias),
            mask=jnp.arange(T)[:, None] != (T if blind is None else blind),
            scale=draw(N),
            query_offset=jnp.array([2, 1]),
            sinks=draw(N),
        )
        score = partial(_bent, jnp.array([0.7, 1.2, -0.4, 0.9]))
        options = Options(False, None, 1.5, mask_function=mask, score_function=score)
        case = _case(seed, options, arrays, blind)
        return _gradient_problem(case, partial(backward, blind, block), **how)

    function = masks.causal() & (lambda b, n, t, s: (s + t + n) % 5 > 0)
    near_or_first = masks.causal() & (masks.window(2) | masks.sinks(1))
    return [
        problem_of(2, function, (1, 4, 5, 7), blind=1),
        problem_of(3, function, (2, 1, 1, 7)),
        problem_of(4, function, (1, 4, 5, 1), all_cotangents=False),
        problem_of(5, function, (1, 4, 5, 1), block=7),
        problem_of(6, near_or_first, (1, 4, 5, 1), all_cotangents=False),
        problem_of(7, near_or_first, (1, 4, 5, 1)),
        problem_of(8, None, (1, 4, 5, 1)),
    ]


def _ring_problem(devices, more, **options):
    """Round a ring of so many devices, in float64 and so by XLA; with rows that see nothing."""
    case = attention_cases.make_case(
        attention_cases.Sizes(1, 16, 16, 2, 1, 3, 2), scale=(2,), **more, **options
    )
    cotangents = attention_cases.cotangents_for(case)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("ring",), auto, devices=jax.devices()[:devices])
    how = {**options, "mesh": mesh, "axis_name": "ring"}

    def results(function, **how):
        run = attention_cases.first_order(function, **how)
        return run(case.floats, case.others, cotangents)

    def of_ring():
        jax.clear_caches()  # nothing that was traced before is found again
        return results(parallel.ring_attention, **how)

    return Problem(of_ring, results(reference.dot_product_attention, **options))


@cache
def ring_problems() -> list[Problem]:
    function = masks.causal() & (lambda b, n, t, s: (s * t + n) % 5 != 3)
    near_or_first = masks.causal() & (masks.window(2) | masks.sinks(1))
    score = partial(_bent, jnp.array([0.7, 1.2]))
    ids = jnp.arange(16)[None] // 7
    segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    lengths = {"query_seq_lengths": jnp.array([13]), "key_value_seq_lengths": jnp.array([11])}
    return [
        _ring_problem(4, {"bias": (1, 2, 16, 16), "sinks": True, **lengths}, is_causal=True),
        _ring_problem(2, {"bias": (1, 1, 1, 16), "mask": (1, 1, 16, 16)}),
        _ring_problem(2, segments, mask_function=function, score_function=score, is_causal=True),
        _ring_problem(4, {}, mask_function=near_or_first),
    ]


def _tangent_problem(case):
    expected = lambda operands, tangents: jax.jvp(case.twin, (operands,), (tangents,))
    results, result_tangents = _in_small_blocks(expected, case.operands, case.tangents)

    def tangent_of(operands, results, tangents):
        o, lse = results
        return blockwise._tangent(case.options, operands, case.masking, o, lse, tangents)

    arguments = case.operands, results, case.tangents
    return Problem(lambda: _in_small_blocks(tangent_of, *arguments), result_tangents)


@cache
def tangent_problems() -> list[Problem]:
    return [_tangent_problem(_everything()), _tangent_problem(_little())]


def _kernel_problem(sizes, **options):
    """The gradient by the kernels for a TPU in the interpreter, from O and L as XLA has them."""
    case = attention_cases.make_case(sizes, **options)
    cotangents = attention_cases.cotangents_for(case)
    twin = reference.dot_product_attention
    _, expected = attention_cases.of_call(twin, case, cotangents)
    case, cotangents = attention_cases.with_nan(case, cotangents)

    def backward(*arrays):
        interpreted = lambda kernel: lambda *args, **how: kernel(*args, **how, interpret=True)
        kernels = attention_pallas.Kernels(
            lambda T, S, K, V: attention_pallas.Tiles(*3 * [attention_tpu.tiles(T, S)]),
            attention_tpu.forward,
            interpreted(attention_tpu.query_gradient),
            interpreted(attention_tpu.key_gradient),
        )
        return attention_pallas._backward(kernels, *arrays)

    def gradient(floats, cotangents):
        halves = forward_on_xla, backward
        of_floats = case._replace(floats=floats)
        return attention_cases.of_halves(halves, of_floats, cotangents)[2:]

    def run():
        few: dict[str, Any] = {"LANES": 2, "MOST_QUERIES": 4, "MOST_KEYS": 6}
        with mock.patch.multiple(attention_tpu, **few):
            made = _in_small_blocks(gradient, case.floats, cotangents)
        names = ("query", "key", "value")
        return {n: d.reshape(expected[n].shape) for n, d in zip(names, made, strict=True)}

    return Problem(run, expected)


@cache
def kernel_problems() -> list[Problem]:
    """Queries that see nothing, tiles that see nothing, whole or in part; keys for half a tile."""
    return [
        _kernel_problem(
            attention_cases.Sizes(1, 7, 12, 2, 1, 3, 2),
            is_causal=True,
            logits_soft_cap=1.5,
            local_window_size=(6, None),
            query_offset=jnp.array([2]),
            query_seq_lengths=jnp.array([6]),
            query_segment_ids=jnp.array([[0, 0, 1, 0, 0, 0, 0]]),
            key_value_segment_ids=jnp.array([[0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0]]),
        ),
        _kernel_problem(attention_cases.Sizes(1, 4, 9, 2, 2, 3, 2)),
    ]


# ---- problems: rotary positions ---------------------------------------------------------------


def _rotary_problem(interleaved):
    """Angles that the rows of a batch and the heads share; two features that are not rotated."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, 3, 4, 6))) for _ in range(2))
    angles, amplitude = jnp.asarray(rng.normal(size=(1, 3, 1, 2))), 1.3
    twin = partial(rotary.rotate_plain, interleaved, amplitude)
    expected = jax.vjp(twin, x, angles)[1](dy)
    residuals = (x, amplitude * jnp.cos(angles), amplitude * jnp.sin(angles))
    run = lambda: rotary._rotate_bwd(interleaved, amplitude, residuals, dy)
    return Problem(run, expected)


@cache
def rotary_problems() -> list[Problem]:
    return [_rotary_problem(False), _rotary_problem(True)]


# ---- the check --------------------------------------------------------------------------------

# Each function, and the problems that its changes are tried on.
FUNCTIONS: dict[Callable, Callable[[], list[Problem]]] = {
    noise.zoneout_gradient: lstm_problems,
    noise._shared: lstm_problems,
    noise.read: lstm_problems,
    noise.read_gradient: lstm_problems,
    noise._kept_of: lstm_problems,
    noise.of_candidate: lstm_problems,
    noise.scaled: lstm_problems,
    lstm.memory_slopes: lstm_problems,
    lstm.slopes_of: lstm_problems,
    lstm.cell_gradient: lstm_problems,
    lstm.gradient_of_gates: lstm_problems,
    lstm.peephole_gradient: lstm_problems,
    lstm.LSTM.slopes: lstm_problems,
    lstm.LSTM.preactivations: lstm_problems,
    lstm.LSTM.step_gradient: lstm_problems,
    lstm.LSTM.gradient: lstm_problems,
    unit.outer: lstm_problems,
    gru.ResetAfter.preactivations: gru_problems,
    gru.ResetAfter.slopes_of: gru_problems,
    gru.ResetAfter.step_gradient: gru_problems,
    gru.ResetAfter.gradient: gru_problems,
    gru.ResetBefore.preactivations: gru_problems,
    gru.ResetBefore.slopes_of: gru_problems,
    gru.ResetBefore.step_gradient: gru_problems,
    gru.ResetBefore.gradient: gru_problems,
    gru.slopes_of_gates: gru_problems,
    gru.gradient_of_gates: gru_problems,
    gru.of_inputs: gru_problems,
    rnn.RNN.slopes: unit_problems,
    rnn.RNN.slope: unit_problems,
    rnn.RNN.step_gradient: unit_problems,
    rnn.RNN.gradient: unit_problems,
    layer_norm.norm_gradient: unit_problems,
    layer_norm._Normed.h_gradient: unit_problems,
    layer_norm._Normed.gradient_of_norms: unit_problems,
    layer_norm.LayerNormLSTM.slopes: unit_problems,
    layer_norm.LayerNormLSTM.step_gradient: unit_problems,
    layer_norm.LayerNormLSTM.gradient: unit_problems,
    layer_norm.LayerNormGRU.slopes: unit_problems,
    layer_norm.LayerNormGRU.step_gradient: unit_problems,
    layer_norm.LayerNormGRU.gradient: unit_problems,
    slstm.SLSTM.slopes: unit_problems,
    slstm.SLSTM.step_gradient: unit_problems,
    slstm.SLSTM.gradient: unit_problems,
    slstm.to_heads: unit_problems,
    chunked._chunk_backward: lstm_problems,
    chunked._with_outputs: lstm_problems,
    chunked.states_of_steps: lstm_problems,
    chunked.kept_of_steps: lstm_problems,
    lstm_rule.steps_read: lstm_problems,
    pallas._run_back: tpu_problems,
    tpu.backward: tpu_problems,
    linear.linear_gradient: linear_problems,
    linear.mingru_gradient: linear_problems,
    linear.minlstm_gradient: linear_problems,
    linear.rglru_gradient: linear_problems,
    linear._shares: linear_problems,
    linear._decay: linear_problems,
    linear.blocks_of: linear_problems,
    linear.inputs_of: linear_problems,
    linear_xla.backward_by_steps: linear_problems,
    linear_xla.backward_at_once: linear_problems,
    linear_rule._gradient: linear_problems,
    linear_rule.steps_read: linear_problems,
    attention.weights: dense_problems,
    attention.logits_gradient: dense_problems,
    attention.cap_gradient: dense_problems,
    attention.score_gradient: dense_problems,
    attention.sinks_gradient: dense_problems,
    attention.sink_weights: dense_problems,
    attention.row_sums: dense_problems,
    attention.sum_to: dense_problems,
    attention.block_gradient: dense_problems,
    dense.backward: dense_problems,
    rule._attend_bwd: dense_problems,
    rule.instantiated: dense_problems,
    rule.as_given: dense_problems,
    blockwise._backward_blocks: blockwise_problems,
    native._backward: parts_problems,
    native_parts.backward: parts_problems,
    native_parts.widened: parts_problems,
    native_parts._backward_of_blocks: parts_problems,
    native_parts._block: parts_problems,
    blocks.visible_in: parts_problems,
    ring._backward_round: ring_problems,
    ring._masking_of_pair: ring_problems,
    ring._cut_logits: ring_problems,
    attention_pallas._backward: kernel_problems,
    attention_tpu._weights_and_gradient: kernel_problems,
    attention_tpu._summed: kernel_problems,
    attention_tpu.query_gradient: kernel_problems,
    attention_tpu.key_gradient: kernel_problems,
    attention.block_tangent: tangent_problems,
    attention.finish_tangent: tangent_problems,
    blockwise._tangent: tangent_problems,
    rotary._rotation: rotary_problems,
    rotary._rotate_bwd: rotary_problems,
    rotary._angle_gradient: rotary_problems,
}

_BLOCK = "int((_TANGENT_LOGITS / heads) ** 0.5) if isinstance(heads, int) else"

# Changes that change no gradient, and why.
EQUIVALENT = {
    (
        "equations.rglru_gradient",
        "jnp.where(vanishes, 1, β) → jnp.where(vanishes, 2, β)",
    ): "any divisor would do where the quotient is not used",
    (
        "equations._decay",
        "jnp.where(vanishes, 1, square) → jnp.where(vanishes, 2, square)",
    ): "any positive number would do where the root is not used",
    (
        "equations._decay",
        "square == 0 → square == 1",
    ): "the root of 0 is 0: its slope, which is not, is asked for by the twin alone",
    ("pallas._run_back", "accumulator(dtype) → dtype"): "the problems are in float64",
    (
        "pallas._backward",
        "backward_on_xla(options, operands, masking, o, lse, do, dlse) → options",
    ): "no problem asks for the gradient of the scale: tests/test_attention_pallas.py does",
    ("equations.blocks_of", "accumulator(x.dtype) → x.dtype"): "the problems are in float64",
    ("equations.inputs_of", "blocks[0] → blocks[1]"): "all blocks are of one width",
    (
        "xla.backward_by_steps",
        "_as_bits(jnp.zeros_like(x)) → jnp.zeros_like(x)",
    ): "the problems are in float64",
    (
        "xla.backward_by_steps",
        "select(valid, x, 0) → select(valid, x, 1)",
    ): "any finite number would do: dh is zero at steps that do not count",
    (
        "xla.backward_by_steps",
        "select(valid, h_prev, 0) → select(valid, h_prev, 1)",
    ): "any finite number would do: dh is zero at steps that do not count",
    (
        "rule.steps_read",
        "jnp.any(dlast != 0, -1) → jnp.any(dlast != 0, 1)",
    ): "the last h has two axes",
    (
        "rule.steps_read",
        "running(jnp.add, own, 0, axis, back) → running(jnp.add, own, 1, axis, back)",
    ): "what it begins with is read where the number of steps is symbolic",
    (
        "rule.steps_read",
        "running(jnp.maximum, jnp.where(fresh, read, 0), 0, axis, back) → "
        "running(jnp.maximum, jnp.where(fresh, read, 0), 1, axis, back)",
    ): "what it begins with is read where the number of steps is symbolic",
    (
        "chunked.states_of_steps",
        "select_each(steps.valid, s, 0) → select_each(steps.valid, s, 1)",
    ): "any finite number would do: dz is zero at steps that do not count",
    (
        "chunked.kept_of_steps",
        "select(steps.valid, trace.kept, 0) → select(steps.valid, trace.kept, 1)",
    ): "any finite number would do: dz is zero at steps that do not count",
    (
        "chunked._chunk_backward",
        "_unroll(turn, x) → turn",
    ): "how many steps are in one turn of the loop",
    (
        "chunked._chunk_backward",
        "widened(outputs) → outputs",
    ): "the problems are in float64",
    ("chunked._chunk_backward", "accumulator(x.dtype) → x.dtype"): "the problems are in float64",
    ("noise.read", "accumulator(h.dtype) → h.dtype"): "the problems are in float64",
    (
        "blockwise._backward_blocks",
        "jnp.where(first_time[None, None, None], lse, -jnp.inf) → "
        "jnp.where(first_time[None, None, None], lse, jnp.inf)",
    ): "an L of either infinity makes the weights of a row zero",
    (
        "blockwise._backward_blocks",
        "_longest_block(BACKWARD_BLOCK, operands, masking, head) → BACKWARD_BLOCK",
    ): "the size of the blocks",
    (
        "blockwise._backward_blocks",
        "head is None → head is not None",
    ): "blocks that a function does not show add nothing if they are visited",
    (
        "blockwise._tangent",
        "partial(jax.checkpoint, prevent_cse=False) → jax.checkpoint",
    ): "what is computed again, and how, not what comes out",
    (
        "native._backward",
        "as_given(d._replace(query=xla.time_first(scale) * d.query, scale=dscale), operands) → "
        "d._replace(query=xla.time_first(scale) * d.query, scale=dscale)",
    ): "the problems are in float64",
    (
        "native_parts.backward",
        "as_given(jax.tree.map(lambda *parts: sum(parts), *parts), operands) → "
        "jax.tree.map(lambda *parts: sum(parts), *parts)",
    ): "the problems are in float64",
    (
        "native_parts._backward_of_blocks",
        "as_given(jax.lax.scan(query_block, start, grid.blocks())[0], operands) → "
        "jax.lax.scan(query_block, start, grid.blocks())[0]",
    ): "the problems are in float64",
    (
        "native_parts._backward_of_blocks",
        "accumulator(x.dtype) → x.dtype",
    ): "the problems are in float64",
    ("native_parts.widened", "accumulator(x.dtype) → x.dtype"): "the problems are in float64",
    (
        "native_parts._backward_of_blocks",
        "jnp.where(first_time[None, None, None], lse_i, -jnp.inf) → "
        "jnp.where(first_time[None, None, None], lse_i, jnp.inf)",
    ): "an L of either infinity makes the weights of a row zero",
    (
        "native_parts._backward_of_blocks",
        "_block(options, grid, operands, masking, 0, 0) → "
        "_block(options, grid, operands, masking, 1, 0)",
    ): "the last block is the first",
    (
        "native_parts._backward_of_blocks",
        "_block(options, grid, operands, masking, 0, 0) → "
        "_block(options, grid, operands, masking, 0, 1)",
    ): "the last block is the first",
    (
        "slstm.SLSTM.slopes",
        "jnp.where(after.n == 0, 1, after.n) → jnp.where(after.n == 0, 2, after.n)",
    ): "any finite number would do: nothing comes back to steps that do not count",
    ("rotary._rotation", "_wide(x.dtype) → x.dtype"): "the problems are in float64",
    (
        "rule._attend_bwd",
        "as_given(gradient, operands) → gradient",
    ): "the problems are in float64; tests/test_sixteen_bits.py holds the dtypes",
    (
        "rule._attend_bwd",
        "lse_gradient=not isinstance(cotangents[1], SymbolicZero) → "
        "lse_gradient=isinstance(cotangents[1], SymbolicZero)",
    ): "only cuDNN's schedule reads it: tests/test_cudnn.py",
    (
        "rotary._angle_gradient",
        "tuple((axis for axis, size in enumerate(shape) if size != dθ.shape[axis])) → "
        "(axis for axis, size in enumerate(shape) if size != dθ.shape[axis])",
    ): "jnp.sum takes any iterable",
}
EQUIVALENT |= {
    ("blockwise._tangent", change): "the size of the blocks"
    for change in (
        "isinstance(heads, int) → heads",
        f"{_BLOCK} 0 → {_BLOCK} 1",
        "_TANGENT_LOGITS / heads → _TANGENT_LOGITS",
        "(_TANGENT_LOGITS / heads) ** 0.5 → (_TANGENT_LOGITS / heads) ** 1.0",
        "max(rows, _LEAST_TANGENT_BLOCK) → rows",
        "o.shape[0] * o.shape[1] → o.shape[0]",
        "o.shape[0] * o.shape[1] → o.shape[1]",
        "o.shape[0] → o.shape[1]",
        "o.shape[1] → o.shape[2]",
    )
}


def _subclasses(kind):
    for sub in kind.__subclasses__():
        yield from (sub, *_subclasses(sub))


def noticed(*changed: Mutant) -> str | None:
    """What changed functions are noticed by: the name of an exception, or None if they survive.

    Every module of the library, and every unit, that has such a function gets the changed one in
    its place.
    """
    families = dict.fromkeys(FUNCTIONS[mutant.function] for mutant in changed)
    problems = [problem for family in families for problem in family()]
    modules = [module for name, module in sys.modules.items() if name.startswith("rnnattn.")]
    with ExitStack() as stack:
        for mutant in changed:
            function, name = mutant.function, mutant.function.__name__
            scope: dict[str, Any] = {}
            exec(mutant.code, vars(sys.modules[function.__module__]), scope)
            for place in [*modules, *_subclasses(Unit)]:
                if vars(place).get(name) is function:
                    stack.enter_context(mock.patch.object(place, name, scope[name]))
        for problem in problems:
            try:
                assert_close(problem.run(), problem.expected, 1e-9)
            except Exception as error:
                return type(error).__name__
    return None


def main(part="") -> int:
    functions = [function for function in FUNCTIONS if part in _name(function)]
    for function in functions:
        if error := noticed(unchanged(function)):
            print(f"{_name(function)} fails as it is: {error}")
            return 1
    found = [mutant for mutant in mutants() if mutant.function in functions]
    names = [_name(function) for function in functions]
    listed = {(name, change) for name, change in EQUIVALENT if name in names}
    survivors, wrong = 0, listed - {(m.name, m.change) for m in found}
    for mutant in found:
        key = (mutant.name, mutant.change)
        error = noticed(mutant)
        if error:
            verdict = "killed" if error == "AssertionError" else f"killed by {error}"
            wrong |= {key} & listed
        elif key in listed:
            verdict = f"equivalent: {EQUIVALENT[key]}"
        else:
            verdict = "SURVIVED"
            survivors += 1
        print(f"{mutant.place}: {mutant.change}  {verdict}", flush=True)
    for name, change in sorted(wrong):
        print(f"listed as equivalent, but not found or not so: {name}: {change}")
    print(f"{len(found)} mutants, {len(listed)} equivalent, {survivors} survived")
    return 1 if survivors or wrong else 0


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    warnings.simplefilter("error")
    sys.exit(main(*sys.argv[1:]))
