"""Attention round a ring of devices, against attention on one of them; what jit keeps in parts.

The suite runs with eight devices of the CPU: see `conftest.py`.
"""

import inspect
import re
from collections import Counter
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rnnattn import dot_product_attention, init_lstm, lstm, native, parallel
from rnnattn.attention import ring as ring_schedule
from rnnattn.attention.problem import Options
from rnnattn.parallel import ring_attention, unzigzag, zigzag
from tests.attention_cases import (
    Sizes,
    assert_same,
    cotangents_for,
    first_order,
    like,
    make_case,
    outputs,
    quick,
    small_blocks,  # noqa: F401
    value_and_gradients,
)

DEVICES = [2, 4, 8]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def ring_of(devices, kind=AUTO):
    return jax.make_mesh((devices,), ("ring",), (kind,), devices=jax.devices()[:devices])


def placed(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


@pytest.fixture(autouse=True)
def nothing_traced_before():
    """Nor is what is traced here used elsewhere."""
    cast(Any, parallel._run_ring).clear_cache()
    yield
    cast(Any, parallel._run_ring).clear_cache()


# ---- equal to one device ------------------------------------------------------------------------

B, T, S, N, M, K, V = Sizes(2, 16, 16, 4, 2, 3, 5)

# What is fixed when a function is traced, and the devices it is tried on: T is 16, S as given.
VARIANTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "all keys": (DEVICES, {"S": 24, "logits_soft_cap": 1.5}),
    "causal": (DEVICES, {}),
    "causal, as if twice the length": ([2], {"S": 32}),
    "zigzag": ([4], {"layout": "zigzag"}),
    "causal with a window": ([4], {"local_window_size": (5, None)}),
    "zigzag with a window": ([4], {"layout": "zigzag", "local_window_size": (3, 1)}),
    "window to both sides": ([8], {"local_window_size": (3, 2)}),
}
RUNS = [(name, devices) for name, (several, _) in VARIANTS.items() for devices in several]

lengths = lambda size: st.lists(st.integers(0, size), min_size=B, max_size=B)


def _case(name):
    given = dict(VARIANTS[name][1])
    sizes = Sizes(B, T, given.pop("S", S), N, M, K, V)
    return make_case(sizes, scale=(N,), is_causal="causal" in name, **given)


def _zigzagged(tree, devices, order=zigzag):
    """Of arrays (B, T, …), by name."""
    has_places = lambda name: not name.endswith("lengths") and name != "scale"
    return {n: order(x, devices) if has_places(n) else x for n, x in tree.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name, devices", RUNS)
def test_equals_attention_on_one_device(name, devices, small_blocks):  # noqa: F811
    """O, L and all gradients, with lengths (0 among them), segments and grouped heads."""
    case = _case(name)
    options = {n: x for n, x in case.options.items() if n != "layout"}
    run = first_order(ring_attention, **case.options, mesh=ring_of(devices), axis_name="ring")
    expect = first_order(dot_product_attention, **options)
    size = case.floats["key"].shape[1]

    @settings(deadline=None, derandomize=True, max_examples=4)
    @given(lengths(T), lengths(size), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
    def check(of_queries, of_keys, segments, in_order, seed):
        rng = np.random.default_rng(seed)
        others = {
            "query_seq_lengths": jnp.asarray(of_queries, jnp.int32),
            "key_value_seq_lengths": jnp.asarray(of_keys, jnp.int32),
        }
        for name, n in (("query_segment_ids", T), ("key_value_segment_ids", size)):
            ids = rng.integers(0, segments, (B, n))
            others[name] = jnp.asarray(np.sort(ids) if in_order else ids, jnp.int32)
        cotangents = cotangents_for(case)
        expected = expect(case.floats, others, cotangents)
        if case.options.get("layout") != "zigzag":
            return assert_same(run(case.floats, others, cotangents), expected)
        there = [_zigzagged(tree, devices) for tree in (case.floats, others)]
        results, gradient = run(*there, tuple(zigzag(x, devices) for x in cotangents))
        results = tuple(unzigzag(x, devices) for x in results)
        assert_same((results, _zigzagged(gradient, devices, unzigzag)), expected)

    check()


@pytest.mark.skipif(not native.status().available, reason=f"no kernels: {native.status().reason}")
@pytest.mark.parametrize("name, devices", [("all keys", 2), ("causal", 4), ("zigzag", 4)])
def test_kernels_attend_to_the_chunks(name, devices):
    """In float32, against one device in float64; with lengths, 0 among them, and segments."""
    case = _case(name)
    options = {n: x for n, x in case.options.items() if n != "layout"}
    ids = lambda size: jnp.asarray(np.sort(np.resize([0, 1, 1], (B, size))), jnp.int32)
    others = {
        "query_seq_lengths": jnp.array([16, 7], jnp.int32),
        "key_value_seq_lengths": jnp.array([11, 0], jnp.int32),
        "query_segment_ids": ids(T),
        "key_value_segment_ids": ids(case.floats["key"].shape[1]),
    }
    cotangents = cotangents_for(case)
    expected = first_order(dot_product_attention, **options)(case.floats, others, cotangents)
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    reorder, restore = (lambda x, devices: x,) * 2
    if "layout" in case.options:
        reorder, restore = zigzag, unzigzag
    there = [_zigzagged(tree, devices, reorder) for tree in (narrow(case.floats), others)]
    there.append(tuple(reorder(x, devices) for x in narrow(cotangents)))
    run = first_order(ring_attention, **case.options, mesh=ring_of(devices), axis_name="ring")
    program = run.lower(*there).as_text()
    assert all(f"rnnattn.attention_{half}" in program for half in ("forward", "backward"))
    results, gradient = run(*there)
    results = tuple(restore(x, devices) for x in results)
    assert_same((results, _zigzagged(gradient, devices, restore)), expected, 1e-5)


OF_LOGITS: dict[str, dict[str, Any]] = {
    "of rows and heads, causal": {"bias": (B, N, T, T), "mask": (B, 1, T, T), "is_causal": True},
    "shared, in a zigzag": {"bias": (1, 1, T, T), "mask": (N, T, 1), "layout": "zigzag"},
    "of keys": {"bias": (N, 1, 24), "mask": (1, 24), "S": 24},
}


@pytest.mark.parametrize(
    "name, devices, dtype",
    [(name, d, jnp.float64) for name, d in zip(OF_LOGITS, (2, 4, 8), strict=True)]
    + [("of rows and heads, causal", 4, jnp.float32)],
)
def test_bias_mask_and_sinks(name, devices, dtype, small_blocks):  # noqa: F811
    """On XLA, and in float32 by the kernels where they are, against one device in float64."""
    given = dict(OF_LOGITS[name])
    layout = given.pop("layout", "contiguous")
    lengths = {"key_value_seq_lengths": jnp.array([T, 5])}
    case = make_case(Sizes(B, T, given.pop("S", T), N, M, K, V), sinks=True, **given, **lengths)
    expected = value_and_gradients(case, dot_product_attention)
    in_place = lambda x, devices, axis=1: x
    reorder: Any = zigzag if layout == "zigzag" else in_place
    restore: Any = unzigzag if layout == "zigzag" else in_place

    def of_all(tree, order):
        """Of time on axis 1, and on the last two of what is of logits."""

        def of_logits(x):
            for axis in (-2, -1):
                x = x if x.shape[axis] == 1 else order(x, devices, axis=axis)
            return x

        by_name = {"sinks": lambda x: x, "key_value_seq_lengths": lambda x: x}
        by_name |= dict.fromkeys(("bias", "mask"), of_logits)
        return {n: by_name.get(n, lambda x: order(x, devices))(x) for n, x in tree.items()}

    narrow = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    options = {"mesh": ring_of(devices), "axis_name": "ring", "layout": layout}
    run = first_order(ring_attention, **case.options, **options)
    there = of_all(narrow(case.floats), reorder), of_all(case.others, reorder)
    cotangents = tuple(reorder(x, devices) for x in narrow(cotangents_for(case)))
    (o, lse), gradient = run(*there, cotangents)
    results = restore(o, devices), restore(lse, devices)
    rtol = 1e-12 if dtype == jnp.float64 else 1e-5
    assert_same((results, of_all(gradient, restore)), expected, rtol)


@pytest.mark.parametrize("is_causal", [False, True])
def test_within_shard_map_a_device_gives_its_parts(is_causal):
    case = make_case(Sizes(2, 16, 16, 4, 2, 3, 5), is_causal=is_causal)
    mesh = ring_of(4)
    ring = partial(ring_attention, axis_name="ring", **case.options)

    def loss(attend, q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)))

    there = jax.shard_map(ring, mesh=mesh, in_specs=P(None, "ring"), out_specs=P(None, "ring"))
    arrays = [case.floats[name] for name in ("query", "key", "value")]
    found = jax.jit(jax.value_and_grad(partial(loss, there), (0, 1, 2)))(*arrays)
    expected = jax.value_and_grad(partial(loss, partial(dot_product_attention, **case.options)),
                                  (0, 1, 2))(*arrays)  # fmt: skip
    assert_same(found, expected)
    again = jax.shard_map(
        partial(ring, mesh=mesh), mesh=mesh, in_specs=P(None, "ring"), out_specs=P(None, "ring"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"None within `jax\.shard_map`"):
        again(*arrays)


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_lengths_and_segments(is_causal):
    """And with axes of one; causal, a chunk is of one row too."""
    case = make_case(Sizes(1, 8, 8, 1, 1, 1, 1), is_causal=is_causal)
    options = {"mesh": ring_of(4), "axis_name": "ring", "scale": -0.4}
    expected = value_and_gradients(case, dot_product_attention, scale=-0.4)
    assert_same(value_and_gradients(case, ring_attention, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_batch_and_heads_may_be_in_parts_as_well(kind):
    """Results and gradients lie where the arguments do."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "ring", "model"), (kind,) * 3)
    whole = make_case(
        Sizes(4, 8, 8),
        is_causal=True,
        scale=(4,),
        **{
            "query_seq_lengths": jnp.array([8, 5, 0, 7]),
            "key_value_seq_lengths": jnp.array([8, 8, 3, 6]),
        },
    )
    rows, specs = P("data", "ring", "model"), {"scale": P("model")}
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    floats = {name: place(x, specs.get(name, rows)) for name, x in whole.floats.items()}
    others = {name: place(x, P("data")) for name, x in whole.others.items()}
    axes = {"axis_name": "ring", "batch_axis_name": "data", "head_axis_name": "model"}
    run = first_order(ring_attention, **axes, mesh=mesh, is_causal=True)
    cotangents = placed(cotangents_for(whole), mesh, *rows)
    results, gradient = run(floats, others, cotangents)
    assert_same((results, gradient), value_and_gradients(whole, dot_product_attention))
    for x in (*results, *(gradient[name] for name in ("query", "key", "value"))):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, rows), x.ndim)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_mesh_may_be_set(devices):
    """And one device is a ring too, of any T and S."""
    case = make_case(Sizes(2, 8, 12, 2, 1) if devices == 2 else Sizes(2, 5, 7), is_causal=True)
    expected = outputs(case, dot_product_attention)
    mesh = ring_of(devices)
    with jax.set_mesh(mesh):
        here = case._replace(floats=placed(case.floats, mesh, None, "ring"))
        assert_same(outputs(here, ring_attention, axis_name="ring"), expected)


# ---- rows that see nothing, and what nobody sees ------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_what_nobody_sees_may_be_nan_or_infinite(dtype):
    """To the last bit as if it were zero there; a row that sees nothing is zero, its L −∞."""
    limits = {
        "query_seq_lengths": jnp.array([16, 0, 9]),
        "key_value_seq_lengths": jnp.array([5, 16, 0]),
    }
    case = make_case(Sizes(3, 16, 16), is_causal=True, dtype=dtype, **limits)
    run = first_order(ring_attention, **case.options, mesh=ring_of(4), axis_name="ring")

    def filled(poison):
        def fill(name, x):
            limit = limits["query_seq_lengths" if name == "query" else "key_value_seq_lengths"]
            past = jnp.arange(16)[None] >= limit[:, None]
            return jnp.where(past[:, :, None, None], poison, x)

        floats = {name: fill(name, x) for name, x in case.floats.items()}
        return run(floats, limits, cotangents_for(case))

    (out, lse), gradient = expected = filled(0.0)
    assert not out[1:].any() and np.isneginf(lse[1:]).all()
    assert not any(d[1:].any() for d in gradient.values())
    assert all(d[0].any() for d in gradient.values())
    for poison in (jnp.nan, jnp.inf):
        jax.tree.map(np.testing.assert_array_equal, filled(poison), expected)


# ---- the layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", DEVICES)
def test_a_zigzag_takes_from_both_ends(devices):
    x = jnp.arange(4 * devices).reshape(1, -1)
    parts = np.asarray(zigzag(x, devices)).reshape(devices, 4)
    last = 4 * devices - 1
    for i, part in enumerate(parts):
        assert part.tolist() == [2 * i, 2 * i + 1, last - 2 * i - 1, last - 2 * i]
    np.testing.assert_array_equal(unzigzag(zigzag(x, devices), devices), x)
    np.testing.assert_array_equal(zigzag(x[0], devices, axis=-1), zigzag(x, devices)[0])


def _visits(monkeypatch, devices, T, S, **options):
    """How often each device attended to a pair of chunks at each stop: forward, and backward."""
    visits: Counter = Counter()
    over_pairs = ring_schedule._over_pairs

    def recorded(ring, options, problem, stop, attend, carry):
        def attend_and_count(carry, *rest):
            count = lambda device, stop: visits.update([(int(device), int(stop))])
            jax.debug.callback(count, jax.lax.axis_index("ring"), stop)
            return attend(carry, *rest)

        return over_pairs(ring, options, problem, stop, attend_and_count, carry)

    monkeypatch.setattr(ring_schedule, "_over_pairs", recorded)
    case = make_case(Sizes(1, T, S, 1, 1, 2, 2))
    attend = lambda floats: ring_attention(
        **floats, mesh=ring_of(devices), axis_name="ring", **options
    )
    out, pullback = jax.vjp(attend, case.floats)
    jax.effects_barrier()
    forward = dict(visits)
    visits.clear()
    jax.block_until_ready(pullback(out))
    jax.effects_barrier()
    return forward, dict(visits)


def test_causal_work_is_balanced_and_what_lies_beyond_the_diagonal_is_skipped(monkeypatch):
    """At home one whole pair of chunks and two halves, elsewhere two whole ones, of four."""
    expected = {(device, stop): 2 for device in range(4) for stop in range(4)}
    expected |= {(device, 0): 3 for device in range(4)}
    for counted in _visits(monkeypatch, 4, 16, 16, is_causal=True):
        assert counted == expected


def test_a_window_visits_its_neighbours_only(monkeypatch):
    """Left alone in its order, and no further round than the window: here of a device's width."""
    visits = _visits(monkeypatch, 4, 16, 16, is_causal=True, local_window_size=(4, None))
    expected = {(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)}
    for counted in visits:
        assert counted == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("window", [None, (0, 0), (1, 0), (3, 3), (2, None), (None, 1), (40, 40)])
def test_stops_are_those_between_which_something_is_seen(chunks, window):
    """Whatever a query sees is visited, and the first and last of the stops are needed."""
    for devices, t, s in ((4, 2, 2), (2, 4, 2), (3, 2, 4)):
        ring = ring_schedule.Ring("ring", devices, chunks)
        for is_causal in (False, True):
            options = Options(is_causal, window)
            T, S = t * devices * chunks, s * devices * chunks
            first, last = ring_schedule.stops_of(ring, options, T, S)
            home = np.zeros(2 * devices, int)
            for device, held in enumerate(ring.places()):
                home[held] = device
            left, right = window or (None, None)
            right = 0 if is_causal else right
            ahead = np.arange(S)[None] - np.arange(T)[:, None]
            seen = np.ones_like(ahead, bool)
            seen &= True if left is None else ahead >= -left
            seen &= True if right is None else ahead <= right
            queries, keys = np.nonzero(seen)
            moved = home[queries // t] - home[keys // s]
            stops = range(first, last + 1)
            assert {int(n) % devices for n in moved} <= {n % devices for n in stops}
            assert len(stops) == min(devices, moved.max() - moved.min() + 1)


# ---- memory and communication -------------------------------------------------------------------


def _compiled(devices, size, **options):
    """The gradient at B 1, N 4, M 2, K 64 in float32, from shapes alone."""
    mesh = ring_of(devices)
    place = NamedSharding(mesh, P(None, "ring"))
    shape = lambda heads: jax.ShapeDtypeStruct((1, size, heads, 64), jnp.float32, sharding=place)

    def loss(q, k, v):
        return jnp.sum(ring_attention(q, k, v, mesh=mesh, axis_name="ring", **options) ** 2)

    return quick(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(2), shape(2)).compile()


def _temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.slow
def test_memory_of_a_device_falls_with_their_number():
    """All but a few blocks of a fixed size: seven times q, k and v. Nothing is gathered."""
    two, four, eight = (_compiled(n, 32_768, is_causal=True) for n in DEVICES)
    blocks = 3
    assert _temporaries(four) <= _temporaries(two) / 2 + blocks
    assert _temporaries(eight) <= _temporaries(four) / 2 + blocks
    part = 32_768 // 8 * 4 * 64  # the numbers in a device's q; k and v are half as large each
    assert _temporaries(eight) <= 7 * (1 + 1 / 2) * 4 * part / 2**20 + blocks
    arrays = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", eight.as_text())
    assert max(int(np.prod([int(n) for n in size.split(",")])) for size in arrays) <= part
    assert not re.search(r"all-gather|all-to-all|all-reduce", eight.as_text())


def test_memory_of_a_bias_falls_with_their_number():
    """Its rows stay where their queries are, and so does its gradient, in half as much again."""

    def temporaries(devices, T=2048):
        mesh = ring_of(devices)
        place = lambda *spec: NamedSharding(mesh, P(*spec))
        of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(*spec))
        x, bias = of((1, T, 2, 8), None, "ring"), of((1, 2, T, T), None, None, "ring")

        def loss(x, bias):
            out = ring_attention(x, x, x, mesh=mesh, axis_name="ring", bias=bias, is_causal=True)
            return jnp.sum(out**2)

        compiled = quick(jax.grad(loss, (0, 1))).lower(x, bias).compile()
        assert not re.search(r"all-gather|all-to-all", compiled.as_text())
        return _temporaries(compiled)

    two, eight = temporaries(2), temporaries(8)
    assert eight <= two / 4 + 3


# ---- precision, and other modes -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sums_are_as_good_as_on_one_device(dtype):
    case = make_case(Sizes(1, 64, 64, 2, 1, 8, 8), dtype=dtype, is_causal=True)
    wide = case._replace(floats={n: x.astype(jnp.float64) for n, x in case.floats.items()})
    exact = outputs(wide, dot_product_attention)[0]
    out, lse = outputs(case, ring_attention, mesh=ring_of(8), axis_name="ring")
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    error = lambda out: float(jnp.sqrt(jnp.mean((out.astype(jnp.float64) - exact) ** 2)))
    if dtype == jnp.float32:
        assert error(out) <= jnp.finfo(dtype).eps
    else:
        assert error(out) <= 1.25 * error(outputs(case, dot_product_attention)[0])


@pytest.mark.slow
def test_forward_mode_over_the_gradient_and_no_other():
    length = {"key_value_seq_lengths": jnp.array([8, 0])}
    of_logits = {"bias": (1, 2, 8, 8), "mask": (2, 1, 8, 8), "sinks": True}
    case = make_case(Sizes(2, 8, 8, 2, 1), is_causal=True, **of_logits, **length)

    def loss(function, **options):
        def run(floats):
            call = {**floats, **case.others, **case.options, **options}
            out, lse = function(**call, return_residual=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isinf(lse), 0, lse)))

        return run

    def product(loss):
        along = like(case.floats, seed=3)
        return quick(lambda floats: jax.jvp(jax.grad(loss), (floats,), (along,)))(case.floats)

    of_ring = loss(ring_attention, mesh=ring_of(2), axis_name="ring")
    assert_same(product(of_ring), product(loss(dot_product_attention)))
    twice = lambda floats: jax.vjp(jax.grad(of_ring), floats)[1](floats)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.eval_shape(twice, case.floats)
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jvp(of_ring, (case.floats,), (case.floats,))


def test_a_second_eager_call_compiles_nothing():
    x = placed(jnp.ones((1, 8, 2, 3)), ring_of(2), None, "ring")
    call = lambda: ring_attention(x, x, x, mesh=ring_of(2), axis_name="ring", is_causal=True)
    call()
    with jax.no_tracing():
        call()


def test_exports_for_gpu_and_tpu():
    x = jax.ShapeDtypeStruct((1, 16, 2, 3), jnp.float32)
    mesh = ring_of(4)

    def gradient(x):
        loss = lambda x: ring_attention(x, x, x, mesh=mesh, axis_name="ring", is_causal=True)
        return jax.vjp(loss, x)[1](x)

    place = NamedSharding(mesh, P(None, "ring"))
    run = jax.jit(gradient, in_shardings=place)
    jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(x)


# ---- errors -------------------------------------------------------------------------------------


def _bad_calls() -> dict[str, Any]:
    case = make_case(Sizes(2, 8, 16, 4, 2, 6, 7))
    q, k, v = (case.floats[name] for name in ("query", "key", "value"))
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "ring"))
    # unwrapped, since the type checker of the suite would be quicker
    attend, turn = inspect.unwrap(ring_attention), inspect.unwrap(zigzag)
    given = {"query": q, "key": k, "value": v, "mesh": mesh, "axis_name": "ring"}
    run = lambda **change: lambda: attend(**{**given, **change})
    axes = "of the mesh's axes ('data', 'ring'), got"
    return {
        "ring_attention: `mesh` must be given, or set by `jax.set_mesh`, got": run(mesh=None),
        f"`axis_name` must be {axes} ('sequence',)": run(axis_name="sequence"),
        f"`batch_axis_name` must be {axes} ('rows', 'data')": run(batch_axis_name=["rows", "data"]),
        f"`head_axis_name` must be {axes} ('model',)": run(head_axis_name="model"),
        "`axis_name` must be another than ('ring',), got ('ring',)": run(batch_axis_name="ring"),
        "`head_axis_name` must be another than ('data', 'ring'), got ('data',)": run(
            batch_axis_name="data", head_axis_name="data"
        ),
        "`layout` must be 'contiguous' or 'zigzag', got 'striped'": run(layout="striped"),
        "`query` must be of four axes, none of them empty, got (8, 4, 6)": run(
            query=q[0], key=k[0], value=v[0]
        ),
        "`key` must be of four axes, none of them empty, got (2, 0, 2, 6)": run(
            key=k[:, :0], value=v[:, :0]
        ),
        "`query` must be of a T that the mesh cuts into 4 equal parts, got 7": run(query=q[:, :7]),
        "`key` must be of a S that the mesh cuts into 4 equal parts, got 15": run(
            key=k[:, :15], value=v[:, :15]
        ),
        "`query` must be of a T that the mesh cuts into 8 equal parts, got 4": run(
            query=q[:, :4], is_causal=True
        ),
        "`key` must be of a S that the mesh cuts into 8 equal parts, got 12": run(
            key=k[:, :12], value=v[:, :12], layout="zigzag"
        ),
        "`query` must be of a B that the mesh cuts into 2 equal parts, got 1": run(
            query=q[:1], key=k[:1], value=v[:1], batch_axis_name="data"
        ),
        "`key` must be of a M that the mesh cuts into 2 equal parts, got 1": run(
            key=k[:, :, :1], value=v[:, :, :1], head_axis_name="data"
        ),
        "ring_attention: `key` must be of shape (B, S, M, K) to go with query's": run(key=k[:1]),
        "`scale` must be a number or of shape () or (N,) = (4,), got (2,)": run(scale=jnp.ones(2)),
        "zigzag: `x` must be of a size that 8 chunks divide along axis 1, got 12": (
            lambda: turn(jnp.zeros((2, 12)), 4)
        ),
        "zigzag: `axis` must be one of the 1 axes of `x`, got 1": lambda: turn(jnp.zeros(8), 4),
        "zigzag: `devices` must be at least 1, got 0": lambda: turn(jnp.zeros((1, 8)), 0),
    }


@pytest.mark.parametrize("message, call", _bad_calls().items())
def test_a_bad_argument_is_an_error_that_names_it(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


# ---- the LSTM under jit -------------------------------------------------------------------------


@pytest.mark.parametrize("residuals", ["states", "gates", 4])
def test_a_batch_in_parts_stays_in_parts(residuals):
    """Of the LSTM's steps no device sees another's rows; of weight gradients, the sum."""
    mesh = jax.make_mesh((8,), ("data",), (AUTO,))
    params = init_lstm(jax.random.key(0), 3, 5, dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 9, 3)))
    lengths = jnp.arange(16, dtype=jnp.int32) % 10

    def loss(params, x, lengths):
        y, state = lstm(params, x, lengths=lengths, residuals=residuals)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.c**2), y

    run = quick(jax.value_and_grad(loss, (0, 1), has_aux=True))
    arguments = (placed(params, mesh), placed(x, mesh, "data"), placed(lengths, mesh, "data"))
    compiled = run.lower(*arguments).compile()
    moved = re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    assert not moved
    actual = compiled(*arguments)
    assert_same(actual, run(params, x, lengths))
    (_, y), (_, dx) = actual
    for rows in (y, dx):
        assert rows.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), rows.ndim)
