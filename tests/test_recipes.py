"""The recipes of docs/architecture.md: their lists of files, and a schedule written by one."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rnnattn import lstm, reference
from rnnattn.attention import api as attention, equations, masking, problem, rule, xla
from rnnattn.attention.arguments import sorted_arguments
from rnnattn.recurrent import api, problem as sequences
from rnnattn.recurrent.unit import advance
from rnnattn.steps import select
from tests.attention_cases import assert_same, make_case, value_and_gradients
from tests.lstm_cases import assert_close, make_case as lstm_case, value_and_gradients as of_lstm

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^Files of `(\w+)`: (.*?)\.$", TEXT, re.M | re.S))
PLACES = ["rnnattn", "tests", "benchmarks", "README.md", "pyproject.toml"]
KINDS = {".py", ".cc", ".h", ".md", ".toml"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lists_every_file_that_knows_the_name(name):
    files = [f for place in PLACES for f in [ROOT / place, *(ROOT / place).rglob("*")]]
    files = [f for f in files if f.is_file() and f.suffix in KINDS]
    files = [f for f in files if f.name != Path(__file__).name and f.parent.name != "results"]
    word = re.compile(rf"\b{name}\b")
    know = {str(f.relative_to(ROOT)) for f in files if word.search(f.read_text(encoding="utf-8"))}
    assert know == set(re.findall(r"`([\w./-]+)`", RECIPES[name]))


def test_there_is_a_recipe_for_each_kind_of_addition():
    assert list(RECIPES) == ["coupled", "blockwise", "soft_cap", "lstm_from_haiku"]


# ---- a schedule of attention: one query after another ------------------------------------------


def _row(options, operands, mask, t):
    """Query t, and who it sees."""
    query = jax.lax.dynamic_slice_in_dim(operands.query, t, 1, 3)
    T, S = operands.query.shape[3], operands.key.shape[2]
    rows, columns = t + jnp.arange(1, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    cut = lambda x: x if x is None or x.shape[3] != T else jax.lax.dynamic_slice_in_dim(x, t, 1, 3)
    operands = operands._replace(query=query, bias=cut(operands.bias))
    mask = mask._replace(mask=cut(mask.mask))
    places = mask, rows, columns
    sees = masking.visible(options, *places)
    return operands, equations.score(options, operands, places, sees, None)


def forward(options, operands, mask):
    def row(t):
        of_row, scores = _row(options, operands, mask, t)
        return equations.Softmax.empty(of_row, 1).update(scores).finish()

    o, lse = jax.lax.map(row, jnp.arange(operands.query.shape[3], dtype=jnp.int32))
    return jnp.moveaxis(o[:, :, :, :, 0], 0, 3), jnp.moveaxis(lse[..., 0], 0, 3)


def backward(options, operands, mask, o, lse, do, dlse):
    _, pullback = jax.vjp(lambda operands: forward(options, operands, mask), operands)
    gradient = pullback((do.astype(o.dtype), dlse))[0]
    unwanted = {"bias": options.bias_gradient, "scale": options.scale_gradient}
    unwanted["score_arrays"] = options.score_gradient
    return gradient._replace(**{name: None for name, wanted in unwanted.items() if not wanted})


ROW_BY_ROW = problem.Schedule(xla.enter, forward, backward, xla.leave)


def test_a_schedule_of_attention_needs_the_contract_and_nothing_else():
    case = make_case(bias=(1, 4, 7, 10), mask=(3, 1, 7, 10), scale=(4,), sinks=True, is_causal=True)

    def by_row(query, key, value, bias=None, mask=None, **options):
        arguments = sorted_arguments("by_row", query, key, value, bias, mask, **options)
        return attention.call("by_row", rule.attend, arguments, ROW_BY_ROW)

    expected = value_and_gradients(case, reference.dot_product_attention)
    assert_same(value_and_gradients(case, by_row), expected)


# ---- a schedule of the LSTM: the plain scan -----------------------------------------------------


def run_plainly(options, params, state, steps):
    unit = options.unit
    weights = unit.prepare(params)

    def step(state, inputs):
        x, valid, fresh, *_ = inputs
        u = unit.inputs(weights, select(valid, x, 0))
        state, _ = advance(unit, weights, u, state, valid, fresh)
        return state, select(valid, state.h, 0)

    return jax.lax.scan(step, state, steps, reverse=options.reverse)


def forward_plainly(options, keeps, params, state, steps):
    final, y = run_plainly(options, params, state, steps)
    return final, sequences.Trace(y)


def backward_plainly(options, params, state, steps, trace, cotangents):
    run = lambda params, state, x: run_plainly(options, params, state, steps._replace(x=x))
    (dy, _), dfinal = cotangents
    return jax.vjp(run, params, state, steps.x)[1]((dfinal, dy))


def test_a_schedule_of_the_lstm_needs_the_contract_and_nothing_else(monkeypatch):
    case = lstm_case(6, 3, 2, 4)
    expected = of_lstm(reference.lstm, case)
    monkeypatch.setattr(api, "CHUNKED", sequences.Schedule(forward_plainly, backward_plainly))
    actual = of_lstm(partial(lstm, implementation="xla", residuals=5), case)
    assert_close(actual, expected, 1e-12)
