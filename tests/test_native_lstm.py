"""The native schedule of the LSTM: against the plain twin in float64, for every instruction set
that runs here, and that it is there where it should be and nowhere else.

Tiles of the kernels are of 16, 8 or 4 hidden units and up to 6 rows, so some sizes are a little
over these, and some chunks shorter than the sequence.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rnnattn import LSTMParams, LSTMState, init_lstm, lstm, lstm_step, native, reference
from rnnattn.native import calls
from tests.lstm_cases import Case, assert_close, make_case, relative_error, value_and_gradients
from tests.native_cases import (
    NARROW_SETS,
    SETS,
    WIDE_SETS,
    masks,
    narrow,
    set_how,
    set_instruction_set,
    wide,
    with_nan_in_padding,
)

TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not SETS, reason=f"no kernels: {native.status().reason}")

native_lstm = partial(lstm, implementation="native")


@pytest.fixture(params=WIDE_SETS)
def instruction_set(request, monkeypatch):
    yield from set_instruction_set(monkeypatch, request.param)


def in_dtype(case, dtype):
    """A case of float32 in 16 bits, but for c."""
    given = jax.tree.map(lambda a: a.astype(dtype), case)
    y, last = given.cotangents
    last = last._replace(c=case.cotangents[1].c)
    return given._replace(state=given.state._replace(c=case.state.c), cotangents=(y, last))


def scaled_case(T, B, D, H, R=None, **weights) -> Case:
    """In float32, with pre-activations of size 1 whatever the widths."""
    case = make_case(T, B, D, H, R, **weights)
    w_x, w_h, _, peephole, projection = case.params
    params = case.params._replace(
        w_x=2 * w_x / D**0.5,
        w_h=2 * w_h / (R or H) ** 0.5,
        peephole=None if peephole is None else peephole / 2,
        projection=None if projection is None else projection / H**0.5,
    )
    return narrow(case._replace(params=params))


# Weights and options of a call.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "peepholes": ({"peephole": True}, {}),
    "clip": ({}, {"clip": 0.7}),
    "coupled": ({}, {"coupled": True}),
    "all": ({"peephole": True}, {"clip": 0.9, "coupled": True}),
}


# ---- the numbers ------------------------------------------------------------------------------

PROBLEMS = [
    ((2, 3, 2, 20), (), True, "plain"),
    ((1, 1, 1, 1, 1), (), True, "all"),
    ((9, 1, 1, 17), ("lengths", "resets"), False, "clip"),
    ((9, 2, 5, 1), ("resets",), True, "all"),
    ((3, 4, 60, 150, 37), (), False, "all"),  # few steps, weights that are not packed
    ((5, 13, 17, 33), ("lengths", "resets"), True, "plain"),
    ((70, 9, 1, 16, 5), ("lengths",), False, "coupled"),
    ((600, 4, 3, 8), ("lengths", "resets"), False, "plain"),
    ((3, 14, 40, 70), ("resets",), False, "peepholes"),
    ((1, 14, 5, 200, 90), ("lengths", "resets"), False, "plain"),
    ((2, 14, 90, 200, 97), ("lengths", "resets"), True, "peepholes"),  # block by block
    ((12, 2, 20, 130), ("lengths", "resets"), True, "peepholes"),  # x w_x of all steps at once
    ((11, 5, 20, 100, 35), ("lengths", "resets"), False, "all"),
    ((9, 1, 3, 130, 75), ("lengths", "resets"), True, "plain"),
]


@cache
def problem(shape, names, reverse, variant):
    """A case, the options of a call, and what must come out."""
    weights, options = VARIANTS[variant]
    case = scaled_case(*shape, **weights)
    options = {"reverse": reverse, **masks(shape[0], shape[1], names), **options}
    expected = value_and_gradients(partial(reference.lstm, **options), wide(case))
    if "lengths" in names:
        case = with_nan_in_padding(case, options["lengths"])
    return case, options, expected


@pytest.mark.parametrize("which", PROBLEMS)
@pytest.mark.parametrize("residuals", ["gates", "states", 4])
def test_value_and_gradients_match_the_plain_twin(which, residuals):
    case, options, expected = problem(*which)
    actual = value_and_gradients(partial(native_lstm, residuals=residuals, **options), case)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("which", PROBLEMS[2:])
def test_every_instruction_set_matches_the_plain_twin(which, instruction_set):
    case, options, expected = problem(*which)
    residuals = 5 if case.x.shape[1] > 5 else "states"
    actual = value_and_gradients(partial(native_lstm, residuals=residuals, **options), case)
    assert_close(actual, expected, TOLERANCE)


_size = st.one_of(st.just(1), st.integers(1, 9))


@settings(deadline=None, derandomize=True, max_examples=5)
@given(
    st.tuples(_size, _size, _size, st.one_of(_size, st.integers(15, 35)), st.none() | _size),
    st.sets(st.sampled_from(["lengths", "mask", "resets"])),
    st.booleans(),
    st.one_of(st.sampled_from(["gates", "states"]), _size),
    st.sampled_from(list(VARIANTS)),
)
def test_any_shape_and_options_match_the_plain_twin(shape, names, reverse, residuals, variant):
    case, options, expected = problem.__wrapped__(shape, sorted(names), reverse, variant)
    actual = value_and_gradients(partial(native_lstm, residuals=residuals, **options), case)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("B, R, variant", [(1, None, "plain"), (2, 260, "all"), (40, 97, "plain")])
def test_a_step_matches_the_plain_twin(B, R, variant, instruction_set):
    weights, options = VARIANTS[variant]
    case = scaled_case(1, B, 3, 200, R, **weights)
    case = case._replace(x=case.x[:, 0], cotangents=case.cotangents[1])
    step = partial(lstm_step, **options)
    expected = value_and_gradients(partial(reference.lstm_step, **options), wide(case))
    assert "rnnattn.lstm" in jax.jit(step).lower(*case[:3]).as_text()
    assert_close(value_and_gradients(step, case), expected, TOLERANCE)


def test_errors_are_no_larger_than_on_xla():
    case = scaled_case(60, 8, 16, 64)
    truth = value_and_gradients(reference.lstm, wide(case))
    error = lambda how: relative_error(value_and_gradients(partial(lstm, **how), case), truth)
    assert error({"implementation": "native"}) <= 2 * error({"implementation": "xla"})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, dtype):
    """Rows alone, in tiles of every height, and a product that is split over the threads."""
    not_packed = ((2, 4, 90, 150, 75), "gates")  # weights, where nothing is masked
    problems: list[tuple[Any, Any]] = [
        ((6, 1, 5, 40), 3),
        ((6, 17, 5, 40, 20), "gates"),
        ((2, 23, 90, 80, 30), "states"),
        ((2, 23, 90, 200, 97), "states"),  # weights that are packed block by block
        # units that are shared out, a barrier after each step
        *(
            ((30, B, 5, 150, R), residuals)
            for B, R in ((1, 75), (2, None), (3, 75), (5, None))
            for residuals in ("gates", "states", 4)
        ),
        ((9, 2, 300, 330), "states"),
        ((5, 8, 20, 240), "gates"),  # of few rows beside the weights
        not_packed,
    ]
    weights, variant = VARIANTS["all"]
    for shape, residuals in problems:
        names = () if (shape, residuals) == not_packed else ("lengths", "resets")
        case = in_dtype(scaled_case(*shape, **weights), dtype)
        options = masks(shape[0], shape[1], names) | variant
        run = partial(native_lstm, residuals=residuals, reverse=shape[1] % 2 == 0, **options)
        results = []
        for threads in (1, 2, 0):
            set_how(monkeypatch, threads=threads)
            results.append(value_and_gradients(run, case))
        for other in results[1:]:
            jax.tree.map(np.testing.assert_array_equal, results[0], other)


def test_several_programs_at_once_give_the_same_bits():
    """They share XLA's threads, and none waits for a place among them."""
    cases = [scaled_case(9, B, 5, 40) for B in (3, 8, 16, 17)] + [scaled_case(30, 2, 5, 150)] * 3
    gradients = jax.jit(lambda case: value_and_gradients(native_lstm, case))
    alone = list(map(gradients, cases))
    with ThreadPoolExecutor(len(cases)) as pool:
        together = pool.map(lambda case: [gradients(case) for _ in range(20)], cases)
        for results, expected in zip(together, alone, strict=True):
            for each in results:
                jax.tree.map(np.testing.assert_array_equal, each, expected)


# ---- 16 bits ----------------------------------------------------------------------------------

NARROW_PROBLEMS = [
    ((9, 1, 1, 17), ("lengths", "resets"), False, "plain", 4),
    ((12, 2, 3, 130, 75), ("lengths", "resets"), True, "peepholes", "states"),
    ((6, 13, 17, 33, 9), ("lengths",), False, "all", "gates"),
    ((7, 14, 40, 70), ("resets",), True, "peepholes", 3),
    ((2, 4, 60, 150, 37), (), True, "all", "gates"),  # few steps, weights that are not packed
    ((2, 2, 3, 5, 60), (), False, "plain", "gates"),  # the same, h wider than all gates
    ((60, 37, 21, 40), (), False, "plain", "states"),  # two chunks, one summed in two parts
]


@cache
def narrow_problem(dtype, shape, names, reverse, variant, residuals):
    """A case, the options of a call, what must come out, and what comes out on XLA."""
    weights, options = VARIANTS[variant]
    case = in_dtype(scaled_case(*shape, **weights), dtype)
    options = {"reverse": reverse, **masks(shape[0], shape[1], names), **options}
    expected = value_and_gradients(partial(reference.lstm, **options), wide(case))
    if "lengths" in names:
        case = with_nan_in_padding(case, options["lengths"])
    options["residuals"] = residuals
    on_xla = value_and_gradients(partial(lstm, implementation="xla", **options), case)
    return case, options, expected, on_xla


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
@pytest.mark.parametrize("problem", NARROW_PROBLEMS)
def test_16_bits_are_as_exact_as_on_xla(dtype, problem, instruction_set):
    """The root mean square of the error, against the plain twin in float64, and the dtypes."""
    case, options, expected, on_xla = narrow_problem(dtype, *problem)
    run = partial(lstm, **options)
    assert "rnnattn.lstm_forward" in jax.jit(run).lower(*case[:3]).as_text()
    actual = value_and_gradients(run, case)
    leaves = map(jax.tree.leaves, (actual, on_xla, expected))
    for ours, theirs, right in zip(*leaves, strict=True):
        assert ours.dtype == theirs.dtype
        error = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))  # noqa: B023
        assert error(ours) <= 1.1 * error(theirs) + 1e-7 * np.max(np.abs(right))


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
@pytest.mark.parametrize("B, R, variant", [(1, 37, "plain"), (3, None, "all"), (40, 97, "plain")])
def test_a_step_in_16_bits_matches_the_plain_twin(B, R, variant, dtype, instruction_set):
    weights, options = VARIANTS[variant]
    case = in_dtype(scaled_case(1, B, 3, 200, R, **weights), dtype)
    case = case._replace(x=case.x[:, 0], cotangents=case.cotangents[1])
    step = partial(lstm_step, **options)
    expected = value_and_gradients(partial(reference.lstm_step, **options), wide(case))
    assert "rnnattn.lstm" in jax.jit(step).lower(*case[:3]).as_text()
    assert_close(value_and_gradients(step, case), expected, float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
def test_every_number_of_16_bits_comes_back_as_it_was(dtype, instruction_set):
    """Through the state of rows that run no step, forward and in the gradient."""
    numbers = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    h, c = numbers.reshape(256, 256), jnp.zeros((256, 256), jnp.float32)
    params = init_lstm(jax.random.key(0), 1, 256, dtype=dtype)
    lengths, x = jnp.zeros(256, jnp.int32), jnp.ones((256, 1, 1), dtype)
    run = lambda h: native_lstm(params, x, LSTMState(h, c), lengths=lengths)[1].h
    last, pullback = jax.vjp(run, h)
    for back in (last, *pullback(h)):
        np.testing.assert_array_equal(np.asarray(back, np.float32), np.asarray(h, np.float32))


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
def test_what_16_bits_cannot_hold_is_rounded_as_by_jax(dtype, instruction_set):
    """h = tanh c where the gates are open and nothing comes in: so many that there are ties."""
    B, H = 2**14, 2**6
    b = jnp.concatenate([jnp.full(H, z) for z in (-100.0, 100, 0, 100)])
    params = LSTMParams(jnp.zeros((1, 4 * H)), jnp.zeros((H, 4 * H)), b)
    c = np.geomspace(1e-9, 3, B * H).reshape(B, H) * np.resize([[1], [-1]], (B, 1))
    c = jnp.asarray(c, jnp.float32)
    c = c.at[0, 0].set(jnp.nan)

    def run(dtype):
        narrow = jax.tree.map(lambda a: a.astype(dtype), params)
        state = LSTMState(jnp.zeros((B, H), dtype), c)
        return native_lstm(narrow, jnp.zeros((B, 1, 1), dtype), state)[0]

    rounded = run(jnp.float32).astype(dtype)
    np.testing.assert_array_equal(
        np.asarray(run(dtype), np.float32), np.asarray(rounded, np.float32)
    )


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
def test_sums_beyond_16_bits_are_infinite(dtype, instruction_set):
    """As in float32, rounded: db is summed over rows, each of which fits."""
    case = in_dtype(scaled_case(2, 40, 3, 20), dtype)
    large = float(jnp.finfo(dtype).max) / 3

    def gradient(case):
        loss = lambda params: jnp.sum(native_lstm(params, case.x)[0].astype(jnp.float32)) * large
        return jax.grad(loss)(case.params).b

    db, right = gradient(case), gradient(narrow(case)).astype(dtype)
    assert jnp.isinf(db).any()
    np.testing.assert_array_equal(jnp.isinf(db), jnp.isinf(right))


@cache
def uneven_problem(which):
    """A case in bfloat16 of numbers of very different sizes, or of many steps that the gradient
    goes back through; what must come out, and what comes out on XLA."""
    rng = np.random.default_rng(1)
    case = scaled_case(*((300, 2, 3, 48) if which == "long memory" else (12, 9, 21, 48)))
    uneven = lambda tree, sigma: jax.tree.map(
        lambda a: a * jnp.asarray(rng.lognormal(0, sigma, a.shape), a.dtype), tree
    )
    if which == "long memory":
        of_y, of_last = case.cotangents
        b = case.params.b.at[48:96].add(4)
        case = case._replace(
            params=case.params._replace(b=b), cotangents=(jnp.zeros_like(of_y), of_last)
        )
    elif which == "outliers":
        w_x, w_h = uneven((case.params.w_x, case.params.w_h), 1)
        params = case.params._replace(w_x=w_x / 2, w_h=w_h / 2)
        cotangents = uneven(case.cotangents, 2)
        case = Case(params, uneven(case.x, 2), case.state, cotangents)
    elif which == "rare tokens":
        tokens = np.minimum(rng.zipf(1.3, size=(9, 12)), 21) - 1
        case = case._replace(x=jnp.asarray(np.eye(21)[tokens], jnp.float32))
    case = in_dtype(case, jnp.bfloat16)
    on_xla = value_and_gradients(partial(lstm, implementation="xla"), case)
    return case, value_and_gradients(reference.lstm, wide(case)), on_xla


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
@pytest.mark.parametrize("which", ["long memory", "outliers", "rare tokens"])
def test_16_bits_are_as_exact_where_sizes_differ(which, instruction_set):
    """The root mean square of the error, and the median of the relative error."""
    case, expected, on_xla = uneven_problem(which)
    leaves = map(jax.tree.leaves, (value_and_gradients(native_lstm, case), on_xla, expected))
    for ours, theirs, right in zip(*leaves, strict=True):
        difference = lambda x: np.abs(np.asarray(x, np.float64) - right)  # noqa: B023
        of_all = lambda x: np.sqrt(np.mean(difference(x) ** 2))  # noqa: B023
        of_each = lambda x: np.median(difference(x) / (np.abs(right) + 1e-30))  # noqa: B023
        assert of_all(ours) <= 1.3 * of_all(theirs) + 1e-7 * np.max(np.abs(right))
        assert of_each(ours) <= 1.3 * of_each(theirs) + 1e-6


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
def test_the_largest_sums_in_16_bits_fit(instruction_set):
    """Blocks of numbers alike, of one sign: dz of i and f, the weights, and x and h₋."""
    B, D, H = 64, 40, 32
    alike = lambda value, *shape: jnp.full(shape, value, jnp.bfloat16)
    g = 0.7808  # where dz_i and dz_g are alike, and c₋ = g makes dz_f so
    b = jnp.concatenate([alike(z, H) for z in (0, 0, np.arctanh(g), 0)])
    params = LSTMParams(alike(1, D, 4 * H), alike(1, H, 4 * H), b)
    h, c = alike(2**-9, B, H), jnp.full((B, H), g, jnp.float32)
    state = LSTMState(h, c)
    case = Case(params, alike(2**-9, B, 1, D), state, (alike(1, B, 1, H), state))
    expected = value_and_gradients(reference.lstm, wide(case))
    assert_close(value_and_gradients(native_lstm, case), expected, float(jnp.finfo(h.dtype).eps))


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
def test_gradients_in_16_bits_are_linear_in_cotangents_of_any_size(instruction_set):
    """To the bit, as their sizes are powers of 2."""
    case = in_dtype(scaled_case(5, 3, 7, 20), jnp.bfloat16)
    gradients = jax.jit(lambda case: value_and_gradients(native_lstm, case)[1])
    scaled = lambda tree, power: jax.tree.map(lambda a: a * jnp.asarray(2.0**power, a.dtype), tree)
    once = gradients(case)
    for power in (-60, 60):
        results = gradients(case._replace(cotangents=scaled(case.cotangents, power)))
        jax.tree.map(np.testing.assert_array_equal, results, scaled(once, power))


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_cotangents_that_are_no_numbers_reach_what_they_reach_on_xla(
    dtype, instruction_set, poison
):
    """All of a row before them, and all of the weights that their units have."""
    case = in_dtype(scaled_case(3, 5, 7, 40), dtype)
    of_y, of_last = case.cotangents
    of_last = jax.tree.map(jnp.zeros_like, of_last)
    reached = []
    for t in (0, 2):
        poisoned = case._replace(cotangents=(of_y.at[2, t, 19].set(poison), of_last))
        for how in ("native", "xla"):
            results = value_and_gradients(partial(lstm, implementation=how), poisoned)[1]
            reached.append(jax.tree.map(lambda a: np.asarray(jnp.isfinite(a)), results))
    jax.tree.map(np.testing.assert_array_equal, reached[0], reached[1])
    jax.tree.map(np.testing.assert_array_equal, reached[2], reached[3])
    assert reached[0][1][[0, 1, 3, 4]].all() and not reached[0][1][2, 0].any()


def test_saturated_gates_and_infinite_inputs_behave_as_on_xla():
    params, x = narrow(init_lstm(jax.random.key(0), 2, 20)), jnp.ones((4, 6, 2), jnp.float32)
    x = x.at[0].set(1e30).at[1].set(-1e30).at[2, 3].set(jnp.inf).at[3, 2].set(jnp.nan)
    run = lambda how: lstm(params, x, implementation=how)
    assert_close_with_nan = partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(assert_close_with_nan, run("native"), run("xla"))


# ---- transformations --------------------------------------------------------------------------


def second_order(function, case):
    """A gradient of a gradient, with respect to the weights and x."""

    def norm(params, x):
        loss = lambda *leaves: jnp.sum(function(*leaves, case.state)[0] ** 3)
        gradients = jax.grad(loss, (0, 1))(params, x)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients))

    return jax.jit(jax.grad(norm, (0, 1)))(case.params, case.x)


@cache
def second_order_problem(reverse, variant):
    weights, options = VARIANTS[variant]
    case = scaled_case(5, 3, 2, 3, 2, **weights)
    options = {"reverse": reverse, **masks(5, 3, ("lengths", "resets")), **options}
    return case, options, second_order(partial(reference.lstm, **options), wide(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    "residuals, reverse, variant",
    [("gates", True, "plain"), ("states", False, "all"), (2, True, "plain")],
)
def test_second_derivatives_match_the_plain_twin(residuals, reverse, variant):
    case, options, expected = second_order_problem(reverse, variant)
    actual = second_order(partial(native_lstm, residuals=residuals, **options), case)
    assert_close(actual, expected, 10 * TOLERANCE)


VMAPS = {
    "the batch": (None, 0, None, None),
    "the batch, its lengths and state": (None, 0, 0, 0),
    "the weights": (0, None, 0, None),
    "the weights and the batch": (0, 0, None, None),
}


@pytest.mark.parametrize("what", VMAPS)
def test_vmap_matches_one_call_for_each(what):
    """The axis joins the batch, but for one of weights, along which a loop runs.

    Gradients of weights that are shared, for each example, are left to XLA.
    """
    axes = VMAPS[what]
    weights, options = VARIANTS["all"]
    case = scaled_case(22, 3, 2, 5, 3, **weights)
    lengths = jnp.asarray([4, 0, 2], jnp.int32)
    shared = (case.params, case.x, lengths, case.state)
    stack = lambda a: jnp.stack([a, (a / 2).astype(a.dtype)])
    mapped = lambda tree, axis: tree if axis is None else jax.tree.map(stack, tree)
    arguments = [mapped(tree, axis) for tree, axis in zip(shared, axes, strict=True)]

    def run(how, params, x, lengths, state):
        return lstm(params, x, state, lengths=lengths, implementation=how, **options)

    def loss(how, params, x, lengths, state):
        results = jax.vmap(partial(run, how), axes)(params, x, lengths, state)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(results))

    both = [
        jax.jit(
            lambda *arguments, how=how: (
                jax.vmap(partial(run, how), axes)(*arguments),
                jax.grad(partial(loss, how), (0, 1, 3))(*arguments),
            )
        )
        for how in ("native", "xla")
    ]
    assert_close(both[0](*arguments), both[1](*arguments), TOLERANCE)
    text = both[0].lower(*arguments).as_text()
    assert "rnnattn.lstm_forward" in text
    assert ("rnnattn.lstm_backward" in text) == what.startswith("the weights")


def test_programs_for_a_cpu_call_the_kernels_and_exported_ones_do_not():
    params = narrow(init_lstm(jax.random.key(0), 3, 5))
    x = jax.ShapeDtypeStruct((2, 4, 3), jnp.float32)
    loss = lambda params, x: jnp.sum(lstm(params, x)[0])
    for function in (loss, jax.grad(loss)):
        assert "rnnattn.lstm" in jax.jit(function).lower(params, x).as_text()
        for platforms in (("cpu",), ("cpu", "cuda", "tpu")):
            exported = jax.export.export(jax.jit(function), platforms=platforms)(params, x)
            assert "rnnattn.lstm_" not in exported.mlir_module()
    foreign = jax.jit(loss).trace(params, x).lower(lowering_platforms=("cuda",))
    assert "rnnattn.lstm" not in foreign.as_text()


# ---- what it cannot serve ---------------------------------------------------------------------

UNSERVED = {
    "the dtype float64": make_case(2, 2, 2, 2),
    "an array without elements": narrow(make_case(0, 2, 2, 2)),
}


@pytest.mark.parametrize("why", UNSERVED)
def test_what_it_cannot_serve_is_an_error_and_left_to_xla(why):
    case = UNSERVED[why]
    run = lambda **how: lstm(case.params, case.x, **how)
    with pytest.raises(ValueError, match=f"'native'` cannot serve .*{why}"):
        run(implementation="native")
    jax.eval_shape(run)


NO_OPTIONS = {"reverse": False, "clip": np.float32(0), "coupled": False}


@pytest.mark.parametrize("wrong", ["x", "w_x", "b", "peephole", "projection", "c", "valid", "y"])
def test_a_kernel_refuses_a_wrong_shape(wrong):
    T, B, D, H, R = 3, 2, 4, 5, 2
    shapes = {"x": (T, B, D), "w_x": (D, 4 * H), "w_h": (R, 4 * H), "b": (4 * H,)}
    shapes |= {"peephole": (3, H), "projection": (H, R), "h": (B, R), "c": (B, H)}
    shapes |= {"valid": (T, B), "fresh": (0,), "y": (T, B, R)}
    shapes[wrong] = (*shapes[wrong][:-1], shapes[wrong][-1] + 1)
    result = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    results = [result(s) for s in (shapes.pop("y"), (B, R), (B, H), *[(0,)] * 4)]
    flags = ("valid", "fresh")
    arrays = [jnp.ones(s, bool if name in flags else jnp.float32) for name, s in shapes.items()]
    call = jax.ffi.ffi_call("rnnattn.lstm_forward.v2", results)
    options = {"interval": np.int64(0), **NO_OPTIONS, **calls.call_attributes()}
    named = {"x": "w_x"}.get(wrong, wrong)  # the width of x is what w_x is held against
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"rnnattn: {named}: another shape"):
        jax.block_until_ready(jax.jit(partial(call, **options))(*arrays))


def test_a_kernel_refuses_another_dtype():
    case = make_case(2, 2, 2, 2)
    state = LSTMState(*narrow(case.state))
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 2, 2), (2, 2), (2, 2))]
    results += [jax.ShapeDtypeStruct((0,), jnp.float32)] * 4
    call = jax.ffi.ffi_call("rnnattn.lstm_forward.v2", results)
    no_masks = [jnp.zeros(0, bool)] * 2
    options = {"interval": np.int64(0), **NO_OPTIONS, **calls.call_attributes()}
    run = jax.jit(partial(call, **options))
    absent = jnp.zeros(0, jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="rnnattn: x: another dtype"):
        jax.block_until_ready(
            run(case.x, *narrow(case.params)[:3], absent, absent, *state, *no_masks)
        )
