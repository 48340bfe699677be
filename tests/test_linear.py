"""Linear recurrences and their units: against the plain twins, against loops over episodes one by
one, and what must hold of any of them; on XLA and by the kernels.

What is compared in float32 is compared with the twin in float64.
"""

import re
from functools import cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.test_util import check_grads

import rnnattn
from rnnattn import MinGRUParams, MinLSTMParams, RGLRUParams, linear_scan, native, reference
from rnnattn.linear import api
from rnnattn.native import calls, load
from rnnattn.precision import accumulator
from tests.lstm_cases import assert_close

SETS = list(load.found()[1])
UNITS = ["linear_scan", "mingru", "minlstm", "rglru"]
needs_kernels = pytest.mark.skipif(not SETS, reason=f"no kernels: {native.status().reason}")
HOW = ["xla", pytest.param("native", marks=needs_kernels)]
DTYPES = {"xla": jnp.float64, "native": jnp.float32}
TOLERANCE = {"xla": 1e-12, "native": 2e-5}


class Case(NamedTuple):
    arrays: tuple[Any, ...]  # a, b and h0; or params, x and h
    cotangents: Any
    masks: dict[str, Any]


def draw_params(name, D, H, draw):
    if name == "rglru":
        G = 2 if H % 2 == 0 else 1
        w_r, w_i = (draw(G, H // G, H // G) for _ in range(2))
        return RGLRUParams(w_r, w_i, draw(H), draw(H), draw(H) - 2)
    make: Any = {"mingru": MinGRUParams, "minlstm": MinLSTMParams}[name]
    n = {"mingru": 2, "minlstm": 3}[name]
    return make(draw(D, n * H) / D**0.5, draw(n * H))


def make_case(name, B, T, H, dtype=jnp.float64, names=(), seed=0) -> Case:
    """Random numbers; the first row has all steps, the second none. Rounded to the dtype."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    state = lambda: draw(B, H).astype(accumulator(dtype))
    D = H if name == "rglru" else 3
    if name == "linear_scan":
        first = jax.nn.sigmoid(draw(B, T, H)), draw(B, T, H)
    else:
        first = draw_params(name, D, H, draw), draw(B, T, D)
    lengths = np.asarray([T, 0, *rng.integers(0, T + 1, B)], np.int32)[:B]
    masks = {
        "lengths": jnp.asarray(lengths),
        "mask": jnp.asarray(rng.random((B, T)) < 0.7),
        "resets": jnp.asarray(rng.random((B, T)) < 0.3),
    }
    return Case((*first, state()), (draw(B, T, H), state()), {n: masks[n] for n in names})


def wide(case):
    return jax.tree.map(lambda x: x if x.dtype in (bool, jnp.int32) else x.astype(float), case)


def value_and_gradients(function, case):
    @jax.jit
    def run(arrays, cotangents, masks):
        outputs, pullback = jax.vjp(lambda *arrays: function(*arrays, **masks), *arrays)
        return outputs, pullback(cotangents)

    return run(*case)


@cache
def expected_of(name, sizes, names, reverse, dtype):
    """A case, and what the twin in float64 makes of it."""
    B, T, H = sizes
    case = make_case(name, B, T, H, dtype, names)
    twin = partial(getattr(reference, name), reverse=reverse)
    return case, value_and_gradients(twin, wide(case))


def valid_steps(case, B, T):
    steps = np.arange(T) < np.asarray(case.masks.get("lengths", np.full(B, T)))[:, None]
    return steps & np.asarray(case.masks.get("mask", True))


def poisoned(name, case, shape, number=np.nan):
    """With this in the masked steps of what is read, and of what comes back."""
    hide = lambda x: jnp.where(jnp.asarray(valid_steps(case, *shape))[..., None], x, number)
    first, x, h = case.arrays
    arrays = (hide(first) if name == "linear_scan" else first, hide(x), h)
    return case._replace(arrays=arrays, cotangents=(hide(case.cotangents[0]), case.cotangents[1]))


# ---- against the plain twins ------------------------------------------------------------------

ALL = ("lengths", "mask", "resets")
PROBLEMS: list[tuple[tuple[int, int, int], tuple[str, ...], bool]] = [
    ((2, 7, 4), (), False),
    ((1, 1, 1), (), True),
    ((3, 9, 2), ALL, True),
    ((4, 12, 3), ALL, False),
]


@pytest.mark.parametrize("sizes, names, reverse", PROBLEMS)
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("how", HOW)
def test_value_and_gradients_match_the_plain_twin(how, name, sizes, names, reverse):
    case, expected = expected_of(name, sizes, names, reverse, DTYPES[how])
    case = poisoned(name, case, sizes[:2])
    run = partial(getattr(rnnattn, name), reverse=reverse, implementation=how)
    assert_close(value_and_gradients(run, case), expected, TOLERANCE[how])


@pytest.fixture
def elsewhere(monkeypatch):
    """The schedule on XLA of other places, on this CPU."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    cast(Any, api._run_linear).clear_cache()
    yield
    cast(Any, api._run_linear).clear_cache()


@pytest.mark.parametrize("sizes, names, reverse", PROBLEMS[1:])
@pytest.mark.parametrize("name", UNITS)
def test_the_associative_scan_matches_the_plain_twin(name, sizes, names, reverse, elsewhere):
    case, expected = expected_of(name, sizes, names, reverse, jnp.float64)
    case = poisoned(name, case, sizes[:2])
    run = partial(getattr(rnnattn, name), reverse=reverse, implementation="xla")
    assert_close(value_and_gradients(run, case), expected, 1e-12)


WIDE = [
    ((2, 5, 33), ALL, True, True),
    ((3, 6, 1040), (), False, False),
    ((1, 40, 18), ("resets",), False, True),
]


def set_how(monkeypatch, **how):
    for name, value in how.items():
        monkeypatch.setattr(calls, name, value)
    cast(Any, api._run_linear).clear_cache()


@needs_kernels
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("sizes, names, reverse, time_major", WIDE)
def test_every_instruction_set_matches_the_plain_twin(
    name, sizes, names, reverse, time_major, monkeypatch
):
    """Vectors are of 16, 8 or 4 channels, and an item of 512 at most."""
    case, (outputs, gradients) = expected_of(name, sizes, names, reverse, jnp.float32)
    case = poisoned(name, case, sizes[:2])
    swap = lambda x: jnp.swapaxes(x, 0, 1)
    if time_major:
        first, x, h = case.arrays
        masks = {n: m if n == "lengths" else swap(m) for n, m in case.masks.items()}
        arrays = (swap(first) if name == "linear_scan" else first, swap(x), h)
        case = Case(arrays, (swap(case.cotangents[0]), case.cotangents[1]), masks)
        dfirst, dx, dh = gradients
        gradients = (swap(dfirst) if name == "linear_scan" else dfirst, swap(dx), dh)
        outputs = swap(outputs[0]), outputs[1]
    run = partial(getattr(rnnattn, name), reverse=reverse, time_major=time_major)
    for instruction_set in SETS:
        set_how(monkeypatch, instruction_set=instruction_set)
        assert_close(value_and_gradients(run, case), (outputs, gradients), 2e-5)
    cast(Any, api._run_linear).clear_cache()


@needs_kernels
def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    case = make_case("rglru", 3, 70, 330, jnp.float32, ALL)
    results = []
    for threads in (1, 2, 0):
        set_how(monkeypatch, threads=threads)
        results.append(value_and_gradients(rnnattn.rglru, case))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    cast(Any, api._run_linear).clear_cache()


NARROW = [
    ("xla", jnp.bfloat16),
    *([("native", jnp.bfloat16), ("native", jnp.float16)] if SETS else []),
]


@pytest.mark.parametrize("how, dtype", NARROW)
@pytest.mark.parametrize("name", UNITS)
def test_16_bits_are_as_exact_as_the_plain_twin(name, how, dtype):
    """The root mean square of the error, against the plain twin in float64, and the dtypes.

    h₋ is read in 16 bits where the twin has it in float32.
    """
    case, truth, plain = narrow_problem(name, dtype)
    hand = value_and_gradients(partial(getattr(rnnattn, name), implementation=how), case)
    for ours, theirs, right in zip(*map(jax.tree.leaves, (hand, plain, truth)), strict=True):
        assert ours.dtype == theirs.dtype
        error = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))  # noqa: B023
        assert error(ours) <= 1.5 * error(theirs) + 1e-7 * np.max(np.abs(right))


@cache
def narrow_problem(name, dtype):
    """A case in 16 bits, what is right, and what the twin makes of it in 16 bits."""
    case, right = expected_of(name, (3, 20, 18), ("lengths", "resets"), False, dtype)
    return case, right, value_and_gradients(getattr(reference, name), case)


@pytest.mark.parametrize("name", UNITS[1:])
def test_a_step_is_a_sequence_of_one(name):
    case = make_case(name, 3, 1, 4)
    params, x, h = case.arrays
    case = Case((params, x[:, 0], h), case.cotangents[1], {})
    step = getattr(rnnattn, f"{name}_step")
    expected = value_and_gradients(getattr(reference, f"{name}_step"), case)
    assert_close(value_and_gradients(step, case), expected, 1e-12)


@pytest.mark.parametrize("name", UNITS)
def test_gradients_match_finite_differences_to_second_order(name):
    case = make_case(name, 2, 3, 2)
    check_grads(jax.jit(getattr(rnnattn, name)), case.arrays, order=2, modes=["rev"])


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("how", HOW)
def test_second_derivatives_match_the_plain_twin(name, how):
    """Forward over reverse, and reverse over reverse."""

    def second(function, case):
        first, x, h = case.arrays

        def gradient(x, h):
            y, last = function(first, x, h, **case.masks)
            return jnp.sum(y.astype(float) ** 3) + jnp.sum(jnp.sin(last.astype(float)))

        of_x = jax.grad(gradient)
        norm = lambda x: sum(
            jnp.sum(d.astype(float) ** 2) for d in jax.tree.leaves(jax.grad(gradient)(x, h))
        )
        forward = lambda x, v: jax.jvp(lambda x: of_x(x, h), (x,), (v,))[1]
        return jax.jit(lambda x: (forward(x, jnp.cos(x)), jax.grad(norm)(x)))(x)

    case = make_case(name, 3, 5, 2, DTYPES[how], ("lengths", "resets"))
    expected = second(getattr(reference, name), wide(case))
    run = partial(getattr(rnnattn, name), implementation=how)
    assert_close(second(run, case), expected, 10 * TOLERANCE[how])


# ---- against loops over episodes --------------------------------------------------------------


def _by_hand(name, params, x, h, fresh):
    """a and b of one step, as the papers have them."""
    σ = lambda z: 1 / (1 + np.exp(-z))
    if name == "linear_scan":
        return x
    if name == "mingru":
        z, candidate = np.split(x @ params.w_x + params.b, 2)
        return 1 - σ(z), σ(z) * candidate
    if name == "minlstm":
        f, i, candidate = np.split(x @ params.w_x + params.b, 3)
        return σ(f) / (σ(f) + σ(i)), σ(i) / (σ(f) + σ(i)) * candidate
    blocks = x.reshape(len(params.w_r), -1)
    gate = lambda w, b: σ(np.concatenate([p @ m for p, m in zip(blocks, w, strict=True)]) + b)
    a = np.exp(-8 * np.log1p(np.exp(params.decay)) * gate(params.w_r, params.b_r))
    return a, (1 if fresh else np.sqrt(1 - a**2)) * gate(params.w_i, params.b_i) * x


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("reverse", [False, True])
def test_episodes_run_apart_and_masked_steps_are_as_if_they_were_not_there(name, reverse):
    B, T, H = 5, 9, 2
    case = make_case(name, B, T, H, names=ALL, seed=3)
    valid = valid_steps(case, B, T)
    first, x, h0 = jax.tree.map(np.asarray, case.arrays)
    y, last = np.zeros((B, T, H)), np.array(h0)
    for row in range(B):
        marks, kept, mark = np.asarray(case.masks["resets"][row]), [], False
        for t in range(T):  # the steps that are left, and whether an episode begins with each
            mark |= marks[t]
            if valid[row, t]:
                kept.append((t, mark))
                mark = False
        starts = [begins for _, begins in kept]
        if reverse:
            kept, starts = kept[::-1], [False, *starts[:0:-1]][: len(kept)]
        for (t, _), fresh in zip(kept, starts, strict=True):
            given = (first[row, t], x[row, t]) if name == "linear_scan" else x[row, t]
            a, b = _by_hand(name, first, given, last[row], fresh)
            last[row] = a * (0 if fresh else last[row]) + b
            y[row, t] = last[row]
    run = partial(getattr(reference, name), reverse=reverse, **case.masks)
    assert_close(run(*case.arrays), (y, last), 1e-12)


# ---- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_an_rglru_close_to_a_of_1_is_exact_and_so_is_its_gradient(how):
    """λ r down to 1e-12: 1 − a² in float32 would be a few bits, or zero with an infinite slope."""
    H = 40
    zeros, b_r = jnp.zeros((H, 1, 1)), jnp.linspace(-25, 5, H)
    params = RGLRUParams(zeros, zeros, b_r, jnp.zeros(H), jnp.full(H, -4.0))
    steps, state = jnp.ones((1, 3, H)), jnp.ones((1, H))
    case = Case((params, steps, state), (steps, jnp.zeros((1, H))), {})
    expected = value_and_gradients(reference.rglru, case)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), case)
    y, gradients = value_and_gradients(partial(rnnattn.rglru, implementation=how), narrow)
    np.testing.assert_allclose(y[0], expected[0][0], rtol=1e-5)
    for ours, right in zip(gradients[0][2:], expected[1][0][2:], strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_gates_that_are_all_but_closed_let_through_what_they_should(how):
    """z = σ(−20) is 2e-9, and f and i of σ(−120) and σ(−110) share a state as 1 to e¹⁰."""
    x = jnp.zeros((1, 50, 1), jnp.float32)
    weights = lambda *b: (jnp.zeros((1, len(b)), jnp.float32), jnp.asarray(b, jnp.float32))
    y, _ = rnnattn.mingru(MinGRUParams(*weights(-20, 1.0)), x, implementation=how)
    np.testing.assert_allclose(y[0, -1, 0], 50 / (1 + np.exp(20)), rtol=1e-5)
    run = lambda b, h: rnnattn.minlstm(MinLSTMParams(weights(0, 0, 0)[0], b), x, h[None, None])
    for f, i in ((-120, -110), (-110, -120), (-200, 100), (100, -200)):
        b = jnp.asarray([f, i, 1], jnp.float32)
        (y, _), pullback = jax.vjp(run, b, jnp.float32(3))
        a = np.exp(np.logaddexp(0, -i) - np.logaddexp(0, -f))  # f / i
        assert np.isclose(y[0, 0, 0], (3 * a + 1) / (a + 1), rtol=1e-5)
        assert all(np.isfinite(d).all() for d in pullback((y, y[:, -1])))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_in_episodes_that_the_loss_does_not_read_reaches_no_gradient(how, reverse):
    B, T, H = 2, 6, 3
    resets = jnp.zeros((B, T), bool).at[:, 2].set(True).at[:, 4].set(True)
    read = jnp.asarray([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
    for name in UNITS:
        case = make_case(name, B, T, H, jnp.float32)
        first, x, h = case.arrays
        dy, _ = case.cotangents
        case = case._replace(
            masks={"resets": resets},
            cotangents=(jnp.where(read[..., None], dy, 0), jnp.zeros((B, H), jnp.float32)),
        )
        run = partial(getattr(rnnattn, name), reverse=reverse, implementation=how)
        expected = value_and_gradients(run, case)[1]
        hide = lambda x: jnp.where(read[..., None], x, jnp.nan)
        arrays = (hide(first) if name == "linear_scan" else first, hide(x), h)
        actual = value_and_gradients(run, case._replace(arrays=arrays))[1]
        assert_close(actual, expected, 1e-6)


def test_a_step_that_nothing_comes_back_to_still_has_a_second_derivative():
    case = make_case("mingru", 2, 6, 3, names=("resets",))
    params, x, _ = case.arrays
    share = jnp.zeros((2, 6, 1)).at[:, 3:].set(1.0)

    def gradient(function, share):
        loss = lambda x: jnp.sum(share * function(params, x, **case.masks)[0])
        return jnp.sum(jax.grad(loss)(x) ** 2 + jax.grad(loss)(x))

    actual, expected = (
        jax.jit(jax.grad(partial(gradient, f)))(share) for f in (rnnattn.mingru, reference.mingru)
    )
    assert_close(actual, expected, 1e-9)
    assert np.any(np.asarray(expected)[:, :3])


# ---- theorems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_a_sequence_cut_in_two_and_chained_equals_one_run(name, dtype):
    first, x, h = make_case(name, 2, 7, 4, dtype).arrays
    run = getattr(rnnattn, name)
    part = lambda at: first[:, at] if name == "linear_scan" else first
    early, middle = run(part(slice(3)), x[:, :3], h)
    late, last = run(part(slice(3, 7)), x[:, 3:], middle)
    assert_close((jnp.concatenate([early, late], 1), last), run(first, x, h), 1e-14)


@pytest.mark.parametrize("name", UNITS)
def test_an_empty_sequence_returns_the_initial_state_and_its_cotangent(name):
    case = make_case(name, 2, 0, 4)
    (y, last), (_, _, dh) = value_and_gradients(getattr(rnnattn, name), case)
    assert y.shape == (2, 0, 4)
    assert_close((last, dh), (case.arrays[2], case.cotangents[1]), 0)


def test_any_leading_axes():
    case = make_case("rglru", 6, 5, 4, names=ALL)
    params, x, h = case.arrays
    y, last = rnnattn.rglru(params, x, h, **case.masks)
    split = lambda x: x.reshape(2, 3, *x.shape[1:])
    masks = {name: split(mask) for name, mask in case.masks.items()}
    many = rnnattn.rglru(params, split(x), split(h), **masks)
    assert_close(many, (split(y), split(last)), 1e-14)
    masks = {name: m if name == "lengths" else jnp.moveaxis(m, -1, 0) for name, m in masks.items()}
    many = rnnattn.rglru(params, jnp.moveaxis(split(x), 2, 0), split(h), time_major=True, **masks)
    assert_close((jnp.moveaxis(many[0], 0, 2), many[1]), (split(y), split(last)), 1e-14)
    one = rnnattn.rglru(params, x[3], **{name: mask[3] for name, mask in case.masks.items()})
    again = rnnattn.rglru(params, x, **case.masks)
    assert_close(one, (again[0][3], again[1][3]), 1e-14)


# ---- transformations --------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(None, 0, None), (0, 0, 0)])
def test_vmap_equals_a_loop(axes):
    cases = [make_case("minlstm", 2, 4, 3, jnp.float32, ("resets",), seed) for seed in range(2)]
    shared = [case.arrays for case in cases]
    arrays = [
        cases[0].arrays[n] if axis is None else jax.tree.map(lambda *x: jnp.stack(x), *each)
        for n, (axis, each) in enumerate(zip(axes, zip(*shared, strict=True), strict=True))
    ]
    run = partial(rnnattn.minlstm, **cases[0].masks)

    def both(*arrays):
        outputs, pullback = jax.vjp(run, *arrays)
        return outputs, pullback(cases[0].cotangents)

    mapped = jax.jit(jax.vmap(both, axes))
    found, alone = mapped(*arrays), jax.jit(both)
    for n in range(2):
        pick = lambda x, axis, n=n: x if axis is None else jax.tree.map(lambda x: x[n], x)
        one = alone(*map(pick, arrays, axes))
        assert_close(jax.tree.map(lambda x, n=n: x[n], found), one, 1e-5)
    text = mapped.lower(*arrays).as_text()
    assert ("rnnattn.linear_forward" in text) == (bool(SETS) and axes[0] is None)


def test_a_second_eager_call_compiles_nothing():
    params, x, h = make_case("mingru", 2, 5, 13).arrays
    loss = lambda params: rnnattn.mingru(params, x, h)[0].sum()
    calls = [lambda: rnnattn.mingru_step(params, x[:, 0], h), lambda: jax.grad(loss)(params)]
    compilations = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for call in calls:
            call()
            assert compilations
            compilations.clear()
            call()
            assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize("name", UNITS)
def test_everything_exports_for_gpu_and_tpu(name):
    case = make_case(name, 2, 5, 4, jnp.bfloat16, ALL)

    def loss(*arrays):
        y, last = getattr(rnnattn, name)(*arrays, **case.masks)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(last)

    for f in (loss, jax.grad(loss, argnums=(0, 1, 2))):
        exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*case.arrays)
        assert "rnnattn.linear" not in exported.mlir_module()
    if SETS:
        assert "rnnattn.linear_backward" in jax.jit(jax.grad(loss)).lower(*case.arrays).as_text()


@needs_kernels
def test_rows_may_lie_on_several_devices():
    """By `jax.jit`, in `jax.shard_map`, on a mesh of explicit axes; all have the same weights."""
    case = make_case("rglru", 4, 5, 2, jnp.float32, ("lengths", "resets"))
    params, x, h = case.arrays
    expected = value_and_gradients(rnnattn.rglru, case)
    results = (P("b"), P("b"))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("b",), axis_types=(kind,), devices=jax.devices()[:2])
        place = lambda spec, tree, mesh=mesh: jax.device_put(tree, NamedSharding(mesh, spec))
        arrays = (place(P(), params), place(P("b"), x), place(P("b"), h))
        placed = Case(arrays, place(P("b"), case.cotangents), place(P("b"), case.masks))
        with jax.set_mesh(mesh):
            assert_close(value_and_gradients(rnnattn.rglru, placed), expected, 1e-5)
        if kind == AxisType.Auto:
            run = lambda params, x, h, masks: rnnattn.rglru(params, x, h, **masks)
            specs = (P(), P("b"), P("b"), P("b"))
            parts = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=results)
            divided = lambda *arrays, parts=parts, **masks: parts(*arrays, masks)
            actual = value_and_gradients(divided, case)
            assert_close(actual, expected, 1e-5)
            lowered = jax.jit(lambda arrays, masks: rnnattn.rglru(*arrays, **masks))
            text = lowered.lower(placed.arrays, placed.masks).compile().as_text()
            assert "rnnattn.linear_forward" in (text or "")


# ---- weights and errors -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_initial_weights(dtype):
    key = jax.random.key(0)
    gru = rnnattn.init_mingru(key, 3, 8, dtype=dtype)
    lstm = rnnattn.init_minlstm(key, 3, 8, forget_bias=2.0, dtype=dtype)
    lru = rnnattn.init_rglru(key, 800, num_blocks=100, dtype=dtype)
    assert all(x.dtype == dtype for x in jax.tree.leaves((gru, lstm, lru)))
    assert gru.w_x.shape == (3, 16) and lstm.w_x.shape == (3, 24) and lru.w_i.shape == (100, 8, 8)
    assert 0.9 < abs(gru.w_x).max() <= 1 and 0.6 < abs(lru.w_r).max() < 0.62  # √(3 / inputs)
    np.testing.assert_array_equal(lstm.b, np.repeat([2.0, 0, 0], 8))
    slowest = np.exp(-8 * np.log1p(np.exp(np.asarray(lru.decay, np.float64))))
    assert 0.89 < slowest.min() < 0.91 and 0.998 < slowest.max() < 0.9995
    assert abs(slowest.mean() - 0.9495) < 0.004


def _bad_calls():
    x, h = jnp.ones((2, 4, 4)), jnp.ones((2, 4))
    gru = MinGRUParams(jnp.ones((4, 8)), jnp.ones(8))
    lru = RGLRUParams(*[jnp.ones((2, 2, 2))] * 2, *[jnp.ones(4)] * 3)
    scan: Any = lambda **change: lambda: linear_scan(**{"a": x, "b": x, **change})
    unit: Any = lambda **change: lambda: rnnattn.mingru(**{"params": gru, "x": x, **change})
    blocks: Any = lambda **change: lambda: rnnattn.rglru(lru._replace(**change), x)
    key = jax.random.key(0)
    init: Any = rnnattn.init_minlstm
    return {
        "`a` must be of shape (*B, T, H), got (4,)": scan(a=x[0, 0]),
        "`a` must be of a floating dtype, got int64": scan(a=jnp.ones((2, 4, 4), int)),
        "`b` must be of shape (*B, T, H) = (2, 4, 4), got (2, 4)": scan(b=h),
        "`b` must be of the dtype of `a`, float64, got float32": scan(b=x.astype(jnp.float32)),
        "`h0` must be of shape (B, H) = (2, 4), got (4,)": scan(h0=h[0]),
        "`h0` must be of dtype float64, got float32": scan(h0=h.astype(jnp.float32)),
        "`implementation` must be None, 'xla' or 'native', got 'cudnn'": scan(
            implementation="cudnn"
        ),
        "`implementation='native'` cannot serve ": scan(implementation="native"),
        "`x` must be of shape (T, *B, D), got (4,)": unit(x=x[0, 0], time_major=True),
        "`params.b` must be of shape (2H,), got (7,)": unit(params=gru._replace(b=jnp.ones(7))),
        "`params.w_x` must be of shape (D, 2H) = (4, 8), got (3, 8)": unit(
            params=gru._replace(w_x=jnp.ones((3, 8)))
        ),
        "`params.w_x` must be of the dtype of `x`, float32, got float64": unit(
            x=x.astype(jnp.float32)
        ),
        "`h` must be of shape (B, H) = (2, 4), got (2, 1)": unit(h=h[:, :1]),
        "`lengths` must be of shape (B,) = (2,), got (3,)": unit(lengths=jnp.ones(3, int)),
        "`lengths` must be of integers, got float64": unit(lengths=jnp.ones(2)),
        "`mask` must be of shape (B, T) = (2, 4), got (4, 2)": unit(mask=jnp.ones((4, 2), bool)),
        "`resets` must be of dtype bool, got int64": unit(resets=jnp.ones((2, 4), int)),
        "`params.w_r` must be of shape (G, K, K) where G K is the width of x, 4, got (1, 2, 2)": (
            blocks(w_r=jnp.ones((1, 2, 2)))
        ),
        "`params.w_i` must be of shape (G, K, K) = (2, 2, 2), got (4, 1, 1)": blocks(
            w_i=jnp.ones((4, 1, 1))
        ),
        "`params.decay` must be of shape (H,) = (4,), got (1,)": blocks(decay=jnp.ones(1)),
        "mingru_step: `x` must be of shape (*B, D), got ()": lambda: rnnattn.mingru_step(
            gru, jnp.float32(1), h
        ),
        "mingru_step: `x` must be of a floating dtype, got int64": lambda: rnnattn.mingru_step(
            gru, jnp.ones((2, 4), int), h
        ),
        "mingru_step: `h` must be of shape (B, H) = (2, 4), got (4,)": lambda: rnnattn.mingru_step(
            gru, x[:, 0], h[0]
        ),
        "reference.rglru: `implementation` must be None": lambda: reference.rglru(
            lru,
            x,
            implementation="cuda",  # type: ignore[arg-type]
        ),
        "`hidden_size` must be at least 1, got 0": lambda: init(key, 1, 0),
        "`dtype` must be a floating dtype, got int32": lambda: init(key, 1, 1, dtype=jnp.int32),
        "`num_blocks` must be at least 1, got 0": lambda: rnnattn.init_rglru(key, 4, num_blocks=0),
        "`hidden_size` must be a positive multiple of 3 blocks, got 4": lambda: rnnattn.init_rglru(
            key, 4, num_blocks=3
        ),
        "init_rglru: `dtype` must be a floating dtype, got int32": lambda: rnnattn.init_rglru(
            key, 4, dtype=jnp.int32
        ),
    }


@pytest.mark.parametrize("message", _bad_calls())
@pytest.mark.usefixtures("only_own_checks")
def test_a_bad_argument_is_an_error_that_names_it(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _bad_calls()[message]()


def test_the_refusal_of_forward_mode_names_the_twin():
    x = jnp.ones((1, 4, 2))
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        jax.jvp(lambda x: linear_scan(x, x), (x,), (x,))
    assert "`rnnattn.reference.linear_scan` has forward mode" in " ".join(caught.value.__notes__)
    jax.jvp(lambda x: reference.linear_scan(x, x), (x,), (x,))


@needs_kernels
@pytest.mark.parametrize("wrong", ["p", "w", "h0", "valid", "unit"])
def test_a_kernel_refuses_what_does_not_fit(wrong):
    B, T, H = 2, 3, 4
    arrays = {"p": (B, T, 2 * H), "second": (0,), "third": (0,), "w": (2, H), "h0": (B, H)}
    arrays |= {"valid": (B, T), "fresh": (0,)}
    if wrong != "unit":
        arrays[wrong] = (*arrays[wrong][:-1], arrays[wrong][-1] + 1)
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, H), (B, H))]
    call = jax.ffi.ffi_call("rnnattn.linear_forward.v1", results)
    options = {"unit": np.int64(4 if wrong == "unit" else 1), "reverse": False, "time_major": False}
    given = [
        jnp.ones(s, bool if n in ("valid", "fresh") else jnp.float32) for n, s in arrays.items()
    ]
    run = jax.jit(partial(call, **options, **calls.call_attributes()))
    named = {"h0": "p"}.get(wrong, wrong)  # the width of h0 is what p is held against
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"rnnattn: {named}: "):
        jax.block_until_ready(run(*given))
