"""The native schedules of the GRU and the plain unit: against the plain twins in float64, for every
instruction set that runs here. What they share with that of the LSTM, `tests/test_native_lstm.py`
tests there."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import GRUParams, RNNParams, gru, gru_step, native, reference, rnn, rnn_step
from rnnattn.native import calls
from tests.lstm_cases import assert_close, value_and_gradients
from tests.native_cases import (
    NARROW_SETS,
    SETS,
    WIDE_SETS,
    masks,
    set_how,
    set_instruction_set,
    wide,
    with_nan_in_padding,
)
from tests.units import Case

TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not SETS, reason=f"no kernels: {native.status().reason}")

# By name: blocks of columns in a weight, the functions, their twins and the options.
UNITS: dict[str, Any] = {
    "after": (3, gru, gru_step, reference.gru, {}),
    "after, no b_n": (3, gru, gru_step, reference.gru, {}),
    "before": (3, gru, gru_step, reference.gru, {"reset_after": False}),
    "rnn": (1, rnn, rnn_step, reference.rnn, {}),
    "relu": (1, rnn, rnn_step, reference.rnn, {"activation": "relu"}),
}


def on(name, implementation, **options):
    """The function of a unit, on the kernels or on XLA."""
    _, run, _, _, own = UNITS[name]
    return partial(run, implementation=implementation, **own, **options)


def twin(name, **options):
    *_, run, own = UNITS[name]
    return partial(run, **own, **options)


@pytest.fixture(params=WIDE_SETS)
def instruction_set(request, monkeypatch):
    yield from set_instruction_set(monkeypatch, request.param)


def scaled_case(name, T, B, D, H, dtype=jnp.float32) -> Case:
    """With pre-activations of size 1 whatever the widths."""
    rng, blocks = np.random.default_rng(0), UNITS[name][0]
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    weights = draw(D, blocks * H) / D**0.5, draw(H, blocks * H) / H**0.5, draw(blocks * H) / 2
    if blocks == 1:
        # relu grows without bound where weights are larger
        params: Any = RNNParams(weights[0], weights[1] / 2, weights[2])
    else:
        params = GRUParams(*weights, draw(H) / 2 if name == "after" else None)
    return Case(params, draw(B, T, D), draw(B, H), (draw(B, T, H), draw(B, H)))


# A step, and few steps of few rows; rows that are shared out; units that are; one step in blocks;
# several chunks.
PROBLEMS = [
    ("after", (1, 1, 1, 1), (), True),
    ("after, no b_n", (2, 3, 2, 20), (), False),
    ("after", (5, 13, 17, 33), ("lengths", "resets"), True),
    ("after", (3, 4, 60, 150), (), True),
    ("after, no b_n", (9, 1, 3, 130), ("lengths", "resets"), False),
    ("after", (1, 14, 5, 260), ("lengths", "resets"), False),
    ("after, no b_n", (600, 4, 3, 8), ("lengths", "resets"), False),
    ("before", (1, 1, 1, 1), (), True),
    ("before", (2, 3, 2, 20), (), False),
    ("before", (5, 13, 17, 33), ("lengths", "resets"), True),
    ("before", (3, 4, 60, 150), (), True),
    ("before", (9, 1, 3, 290), ("lengths", "resets"), False),
    ("before", (300, 8, 3, 8), ("lengths", "resets"), False),
    ("relu", (1, 1, 1, 1), (), True),
    ("rnn", (2, 3, 2, 20), (), False),
    ("relu", (5, 13, 17, 75), ("lengths", "resets"), True),
    ("rnn", (3, 4, 60, 350), (), True),
    ("rnn", (9, 1, 3, 390), ("lengths", "resets"), False),
    ("relu", (1, 14, 5, 390), ("lengths", "resets"), False),
    ("rnn", (300, 8, 3, 8), ("lengths", "resets"), False),
]
OF_EVERY_SET = [PROBLEMS[i] for i in (1, 2, 3, 4, 8, 9, 10, 11, 14, 15, 16, 17)]


@cache
def problem(name, shape, names, reverse):
    """A case, the options of a call, and what must come out."""
    case = scaled_case(name, *shape)
    options: Any = {"reverse": reverse, **masks(shape[0], shape[1], names)}
    expected = value_and_gradients(twin(name, **options), wide(case))
    if "lengths" in names:
        case = with_nan_in_padding(case, options["lengths"])
    return case, options, expected


@pytest.mark.parametrize("which", PROBLEMS, ids=str)
@pytest.mark.parametrize("residuals", ["gates", "states", 4])
def test_value_and_gradients_match_the_plain_twin(which, residuals):
    case, options, expected = problem(*which)
    run = on(which[0], "native", residuals=residuals, **options)
    assert_close(value_and_gradients(run, case), expected, TOLERANCE)


@pytest.mark.parametrize("which", OF_EVERY_SET, ids=str)
def test_every_instruction_set_matches_the_plain_twin(which, instruction_set):
    case, options, expected = problem(*which)
    run = on(which[0], "native", residuals=3 if case.x.shape[0] == 1 else "states", **options)
    assert_close(value_and_gradients(run, case), expected, TOLERANCE)


@cache
def narrow_problem(name, dtype, shape, names, reverse, residuals):
    """A case, the options of a call, what must come out, and what comes out on XLA."""
    T, B, D, H = shape
    case = scaled_case(name, T, B, D, H, dtype)
    options = {"reverse": reverse, **masks(shape[0], shape[1], names)}
    expected = value_and_gradients(twin(name, **options), wide(case))
    if "lengths" in names:
        case = with_nan_in_padding(case, options["lengths"])
    options["residuals"] = residuals
    return case, options, expected, value_and_gradients(on(name, "xla", **options), case)


NARROW = [
    ((12, 2, 3, 131), ("lengths",), True, "states"),
    ((2, 4, 60, 150), (), True, "gates"),
    ((7, 37, 17, 33), ("resets",), False, 3),
]


@pytest.mark.parametrize("which", NARROW, ids=str)
@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
def test_16_bits_are_as_exact_as_on_xla(which, dtype, instruction_set):
    """The root mean square of the error, against the plain twin in float64, and the dtypes."""
    case, options, expected, on_xla = narrow_problem("after", dtype, *which)
    actual = value_and_gradients(on("after", "native", **options), case)
    leaves = map(jax.tree.leaves, (actual, on_xla, expected))
    for ours, theirs, right in zip(*leaves, strict=True):
        assert ours.dtype == theirs.dtype
        error = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))  # noqa: B023
        assert error(ours) <= 1.1 * error(theirs) + 1e-7 * np.max(np.abs(right))


@pytest.mark.parametrize("name", ["after", "before", "rnn"])
def test_any_number_of_threads_gives_the_same_bits(name, monkeypatch):
    for shape, residuals in [((6, 17, 5, 40), "gates"), ((30, 2, 5, 300), 4)]:
        case, options = scaled_case(name, *shape), masks(*shape[:2], ("lengths", "resets"))
        results = []
        for threads in (1, 2):
            set_how(monkeypatch, threads=threads)
            run = on(name, "native", residuals=residuals, **options)
            results.append(value_and_gradients(run, case))
        jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("name", ["after", "before", "rnn"])
def test_what_is_kept_for_the_gradient_is_what_xla_keeps(name):
    case, options = scaled_case(name, 5, 3, 4, 7), masks(5, 3, ("resets",))
    run = lambda how: on(name, how, residuals="gates", **options)
    ours, theirs = [
        jax.tree.leaves(jax.jit(lambda *of, how=how: jax.vjp(run(how), *of)[1])(*case[:3]))
        for how in ("native", "xla")
    ]
    assert_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("name", ["after", "before", "rnn"])
def test_programs_for_a_cpu_call_the_kernels_and_exported_ones_do_not(name):
    case = scaled_case(name, 4, 2, 3, 5)
    _, run, step_of, _, own = UNITS[name]
    loss = lambda params, x: jnp.sum(run(params, x, **own)[0])
    step = lambda params, x: jnp.sum(step_of(params, x[:, 0], case.state, **own))
    for function, half in ((loss, "forward"), (jax.grad(loss), "backward"), (step, "forward")):
        text = jax.jit(function).lower(case.params, case.x).as_text()
        assert f"rnnattn.{run.__name__}_{half}.v" in text
    exported = jax.export.export(jax.jit(jax.grad(loss)))(case.params, case.x)
    assert f"rnnattn.{run.__name__}_" not in exported.mlir_module()


@pytest.mark.parametrize("wrong", ["w_x", "b", "b_n", "h", "y", "a", "reset_after"])
def test_a_kernel_refuses_a_wrong_shape(wrong):
    T, B, D, H = 3, 2, 4, 5
    shapes = {"x": (T, B, D), "w_x": (D, 3 * H), "w_h": (H, 3 * H), "b": (3 * H,), "b_n": (H,)}
    shapes |= {"h": (B, H), "valid": (0,), "fresh": (0,), "y": (T, B, H), "a": (T, B, 4 * H)}
    after = wrong != "reset_after"
    if after:
        shapes[wrong] = (*shapes[wrong][:-1], shapes[wrong][-1] + 1)
    made = (shapes.pop("y"), (B, H), shapes.pop("a"), (0,))
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in made]
    flags = ("valid", "fresh")
    arrays = [jnp.ones(s, bool if name in flags else jnp.float32) for name, s in shapes.items()]
    options = {"reverse": False, "reset_after": after, "interval": np.int64(0)}
    call = jax.ffi.ffi_call("rnnattn.gru_forward.v2", results)
    message = f"{wrong}: another shape" if after else "b_n: one where the reset is before"
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"rnnattn: {message}"):
        jax.block_until_ready(jax.jit(partial(call, **options, **calls.call_attributes()))(*arrays))
