"""Does a comparison with the plain twin notice every sign and factor of the LSTM's gradient?

    python tests/mutate.py

Each function of the backward pass is changed in one place at a time: + and − exchanged, a factor
dropped, a number doubled (0 made 1), a minus sign or `not` left out, a comparison turned round.
With the changed function in place the gradients of three small problems are computed anew and
compared with `rnnattn.reference` under JAX's own differentiation. A change that leaves all of them
as they were has survived: nothing would notice that error. Exits with 1 if there is one. The tests
run a sample.
"""

import ast
import sys
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run this file as a script

from rnnattn import cell, chunked, recurrent, reference
from tests.lstm_cases import assert_close, make_case, value_and_gradients

ROOT = Path(__file__).resolve().parent.parent

# The schedule looks all of them up in `chunked`.
FUNCTIONS: dict[str, ModuleType] = {
    "slopes_of": cell,
    "cell_gradient": cell,
    "peephole_gradient": cell,
    "_chunk_backward": chunked,
}

# Changes that change no gradient, and why.
EQUIVALENT = {
    ("cell_gradient", "axis=-1 → axis=1"): "the arrays of one step have two axes",
    (
        "_chunk_backward",
        "where(steps.valid, steps.x, 0) → where(steps.valid, steps.x, 1)",
    ): "any finite number would do: dz is zero at steps past a row's length",
}

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
    """A function of the backward pass, changed in one place."""

    name: str
    line: int
    change: str
    code: CodeType

    @property
    def place(self):
        path = Path(FUNCTIONS[self.name].__file__ or "").resolve()
        return f"{path.relative_to(ROOT)}:{self.line}"


class Problem(NamedTuple):
    """What the backward pass is given, and the gradients it should return."""

    schedule: chunked.Schedule
    residuals: Any
    cotangents: Any
    expected: Any


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


def _definition(name):
    tree = ast.parse(Path(FUNCTIONS[name].__file__ or "").read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return found


def _compiled(name, tree):
    module = ast.Module([tree], type_ignores=[])
    return compile(module, f"<changed {name}>", "exec")


def _mutants_of(name):
    tree = _definition(name)
    for parent in ast.walk(tree):
        for container, key in _slots(parent):
            node = container[key]
            for other in _changes(node):
                shown = parent if isinstance(node, ast.Constant | ast.UnaryOp) else node
                before = ast.unparse(shown)
                container[key] = ast.copy_location(other, node)
                after = ast.unparse(shown if shown is parent else other)
                code = _compiled(name, tree)
                container[key] = node
                yield Mutant(name, node.lineno, f"{before} → {after}", code)


def mutants() -> list[Mutant]:
    """All changes, in the order of the source; those of `EQUIVALENT` are among them."""
    found = [mutant for name in FUNCTIONS for mutant in _mutants_of(name)]
    return sorted(found, key=lambda m: (list(FUNCTIONS).index(m.name), m.line))


def unchanged(name) -> Mutant:
    """The function as it is, by the way of a mutant."""
    return Mutant(name, _definition(name).lineno, "as it is", _compiled(name, _definition(name)))


def _problem(
    case, residuals, *, reverse=False, lengths=None, resets=None, clip=None, coupled=False
):
    """A time-major case, run forwards. Not through `sequence`, whose compilations are kept."""
    twin = partial(
        reference.lstm,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        time_major=True,
        clip=clip,
        coupled=coupled,
    )
    _, expected = value_and_gradients(twin, case)
    schedule = chunked.Schedule(reverse, residuals, chunked.Variant(clip, coupled))
    steps = recurrent._steps(case.x, lengths, resets, reverse)
    _, kept = chunked._sequence_fwd(schedule, case.params, case.state, steps)
    return Problem(schedule, kept, case.cotangents, expected)


def _time_major(case):
    swap = lambda a: jnp.swapaxes(a, 0, 1)
    dy, dstate = case.cotangents
    return case._replace(x=swap(case.x), cotangents=(swap(dy), dstate))


@cache
def problems() -> list[Problem]:
    """All features at once, in three chunks; the coupled gate; no feature."""
    T, B, D, H, R = 6, 3, 2, 3, 3  # R = H: fewer shapes, fewer programs to compile
    lengths = jnp.array([T, 3, 4])
    resets = jnp.zeros((T, B), bool).at[[2, 0, 3], [0, 1, 2]].set(True)
    every = _time_major(make_case(T, B, D, H, R, peephole=True))
    padding = jnp.arange(T)[:, None] >= lengths[None, :]
    every = every._replace(x=jnp.where(padding[..., None], jnp.nan, every.x))
    options: Any = {"lengths": lengths, "resets": resets, "clip": 1.0}
    with jax.disable_jit():
        return [
            _problem(every, 2, **options),
            _problem(every, "states", reverse=True, coupled=True, **options),
            _problem(_time_major(make_case(T, B, D, H)), "gates"),
        ]


def noticed(mutant: Mutant) -> str | None:
    """What the mutant is noticed by: the name of an exception, or None if it survives.

    Nothing is compiled, so that no compilation of the function as it was is used again.
    """
    scope: dict[str, Any] = {}
    exec(mutant.code, vars(FUNCTIONS[mutant.name]), scope)
    given = problems()
    with mock.patch.object(chunked, mutant.name, scope[mutant.name]), jax.disable_jit():
        for schedule, residuals, cotangents, expected in given:
            try:
                dparams, dstate, dsteps = chunked._sequence_bwd(schedule, residuals, cotangents)
                assert_close((dparams, dsteps.x, dstate), expected, 1e-9)
            except Exception as error:
                return type(error).__name__
    return None


def main() -> int:
    for name in FUNCTIONS:
        if error := noticed(unchanged(name)):
            print(f"{name} fails as it is: {error}")
            return 1
    found = mutants()
    survivors, wrong = 0, set(EQUIVALENT) - {(m.name, m.change) for m in found}
    for mutant in found:
        key = (mutant.name, mutant.change)
        error = noticed(mutant)
        if error:
            verdict = "killed" if error == "AssertionError" else f"killed by {error}"
            wrong |= {key} & set(EQUIVALENT)
        elif key in EQUIVALENT:
            verdict = f"equivalent: {EQUIVALENT[key]}"
        else:
            verdict = "SURVIVED"
            survivors += 1
        print(f"{mutant.place}: {mutant.change}  {verdict}", flush=True)
    for name, change in sorted(wrong):
        print(f"listed as equivalent, but not found or not so: {name}: {change}")
    print(f"{len(found)} mutants, {len(EQUIVALENT)} equivalent, {survivors} survived")
    return 1 if survivors or wrong else 0


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    warnings.simplefilter("error")
    sys.exit(main())
