"""The native schedule of the GRU: against the plain twin in float64, for every instruction set that
runs here. What it shares with that of the LSTM, `tests/test_native_lstm.py` tests there."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import GRUParams, gru, gru_step, native, reference
from rnnattn.native import calls
from tests.lstm_cases import assert_close, value_and_gradients
from tests.native_cases import (
    SETS,
    masks,
    set_how,
    set_instruction_set,
    wide,
    with_nan_in_padding,
)
from tests.units import Case

TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not SETS, reason=f"no kernels: {native.status().reason}")

native_gru = partial(gru, implementation="native")


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    yield from set_instruction_set(monkeypatch, request.param)


def scaled_case(T, B, D, H, dtype=jnp.float32, has_b_n=True) -> Case:
    """With pre-activations of size 1 whatever the widths."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    w_x, w_h = draw(D, 3 * H) / D**0.5, draw(H, 3 * H) / H**0.5
    params = GRUParams(w_x, w_h, draw(3 * H) / 2, draw(H) / 2 if has_b_n else None)
    return Case(params, draw(B, T, D), draw(B, H), (draw(B, T, H), draw(B, H)))


# A step, and few steps of few rows; rows that are shared out; units that are; one step in blocks;
# several chunks.
PROBLEMS = [
    ((1, 1, 1, 1), (), True, False),
    ((2, 3, 2, 20), (), False, True),
    ((5, 13, 17, 33), ("lengths", "resets"), True, True),
    ((9, 1, 3, 130), ("lengths", "resets"), False, True),
    ((1, 14, 5, 260), ("lengths", "resets"), False, False),
    ((600, 4, 3, 8), ("lengths", "resets"), False, True),
]


@cache
def problem(shape, names, reverse, has_b_n):
    """A case, the options of a call, and what must come out."""
    T, B, D, H = shape
    case = scaled_case(T, B, D, H, has_b_n=has_b_n)
    options: Any = {"reverse": reverse, **masks(shape[0], shape[1], names)}
    expected = value_and_gradients(partial(reference.gru, **options), wide(case))
    if "lengths" in names:
        case = with_nan_in_padding(case, options["lengths"])
    return case, options, expected


@pytest.mark.parametrize("which", PROBLEMS)
@pytest.mark.parametrize("residuals", ["gates", "states", 4])
def test_value_and_gradients_match_the_plain_twin(which, residuals):
    case, options, expected = problem(*which)
    actual = value_and_gradients(partial(native_gru, residuals=residuals, **options), case)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("which", PROBLEMS[1:4])
def test_every_instruction_set_matches_the_plain_twin(which, instruction_set):
    case, options, expected = problem(*which)
    residuals = 3 if case.x.shape[0] == 1 else "states"
    actual = value_and_gradients(partial(native_gru, residuals=residuals, **options), case)
    assert_close(actual, expected, TOLERANCE)


@cache
def narrow_problem(dtype, shape, names, reverse, residuals):
    """A case, the options of a call, what must come out, and what comes out on XLA."""
    T, B, D, H = shape
    case = scaled_case(T, B, D, H, dtype)
    options = {"reverse": reverse, **masks(shape[0], shape[1], names)}
    expected = value_and_gradients(partial(reference.gru, **options), wide(case))
    if "lengths" in names:
        case = with_nan_in_padding(case, options["lengths"])
    options["residuals"] = residuals
    on_xla = value_and_gradients(partial(gru, implementation="xla", **options), case)
    return case, options, expected, on_xla


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "which",
    [((12, 2, 3, 131), ("lengths",), True, "states"), ((7, 13, 17, 33), ("resets",), False, 3)],
)
def test_16_bits_are_as_exact_as_on_xla(dtype, which, instruction_set):
    """The root mean square of the error, against the plain twin in float64, and the dtypes."""
    case, options, expected, on_xla = narrow_problem(dtype, *which)
    actual = value_and_gradients(partial(native_gru, **options), case)
    leaves = map(jax.tree.leaves, (actual, on_xla, expected))
    for ours, theirs, right in zip(*leaves, strict=True):
        assert ours.dtype == theirs.dtype
        error = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))  # noqa: B023
        assert error(ours) <= 1.5 * error(theirs) + 1e-7 * np.max(np.abs(right))


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    for shape, residuals in [((6, 17, 5, 40), "gates"), ((30, 2, 5, 150), 4)]:
        case, options = scaled_case(*shape), masks(*shape[:2], ("lengths", "resets"))
        results = []
        for threads in (1, 2):
            set_how(monkeypatch, threads=threads)
            run = partial(native_gru, residuals=residuals, **options)
            results.append(value_and_gradients(run, case))
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_what_is_kept_for_the_gradient_is_what_xla_keeps():
    case, options = scaled_case(5, 3, 4, 7), masks(5, 3, ("resets",))
    run = lambda how: partial(gru, implementation=how, residuals="gates", **options)
    ours, theirs = [
        jax.tree.leaves(jax.jit(lambda *of, how=how: jax.vjp(run(how), *of)[1])(*case[:3]))
        for how in ("native", "xla")
    ]
    assert_close(ours, theirs, TOLERANCE)


def test_programs_for_a_cpu_call_the_kernels_and_exported_ones_do_not():
    case = scaled_case(4, 2, 3, 5)
    loss = lambda params, x: jnp.sum(gru(params, x)[0])
    step = lambda params, x: jnp.sum(gru_step(params, x[:, 0], case.state))
    for function, half in ((loss, "forward"), (jax.grad(loss), "backward"), (step, "forward")):
        text = jax.jit(function).lower(case.params, case.x).as_text()
        assert f"rnnattn.gru_{half}.v1" in text
    exported = jax.export.export(jax.jit(jax.grad(loss)))(case.params, case.x)
    assert "rnnattn.gru_" not in exported.mlir_module()


def test_the_reset_before_the_product_is_left_to_xla():
    case = scaled_case(2, 2, 2, 2, has_b_n=False)
    run = lambda **how: gru(case.params, case.x, reset_after=False, **how)
    with pytest.raises(ValueError, match="'native'` cannot serve units but"):
        run(implementation="native")
    assert "rnnattn.gru" not in jax.jit(run).lower().as_text()


@pytest.mark.parametrize("wrong", ["w_x", "b", "b_n", "h", "y"])
def test_a_kernel_refuses_a_wrong_shape(wrong):
    T, B, D, H = 3, 2, 4, 5
    shapes = {"x": (T, B, D), "w_x": (D, 3 * H), "w_h": (H, 3 * H), "b": (3 * H,), "b_n": (H,)}
    shapes |= {"h": (B, H), "valid": (0,), "fresh": (0,), "y": (T, B, H)}
    shapes[wrong] = (*shapes[wrong][:-1], shapes[wrong][-1] + 1)
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shapes.pop("y"), (B, H), (0,), (0,))]
    flags = ("valid", "fresh")
    arrays = [jnp.ones(s, bool if name in flags else jnp.float32) for name, s in shapes.items()]
    options = {"reverse": False, "interval": np.int64(0), **calls.call_attributes()}
    call = jax.jit(partial(jax.ffi.ffi_call("rnnattn.gru_forward.v1", results), **options))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"rnnattn: {wrong}: another shape"):
        jax.block_until_ready(call(*arrays))
