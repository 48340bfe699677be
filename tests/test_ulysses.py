"""Attention over several devices by an exchange of heads, against attention on one device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rnnattn import dot_product_attention, masks, native
from rnnattn.parallel import ring_attention, zigzag
from tests.attention_cases import (
    Sizes,
    assert_same,
    cotangents_for,
    first_order,
    like,
    make_case,
    quick,
    small_blocks,  # noqa: F401
    value_and_gradients,
)
from tests.test_parallel import AUTO, EXPLICIT, placed, ring_of

B, T, S, N, M = 2, 8, 16, 8, 2
SIZES = Sizes(B, T, S, N, M, 3, 5)
IDS = {
    "query_segment_ids": jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0) // 3,
    "key_value_segment_ids": jnp.arange(S, dtype=jnp.int32)[None].repeat(B, 0) // 6,
}
LENGTHS = {"query_seq_lengths": jnp.array([T, 5]), "key_value_seq_lengths": jnp.array([0, 13])}
VARIANTS: dict[str, dict[str, Any]] = {
    "bias of all heads": {"bias": (B, N, T, S), "sinks": True, "logits_soft_cap": 1.5},
    "bias that heads share": {"bias": (1, 1, T, S), "mask": (B, 1, T, S), "is_causal": True},
    "bias of keys": {"bias": (N, 1, S), "mask": (1, S), "scale": (N,), **LENGTHS},
    "dropout": {"dropout_rate": 0.3, "dropout_key": jax.random.key(1), **IDS},
    "window": {"local_window_size": (3, 1), "mask": (N, T, 1)},
    "dropout, causal": {"dropout_rate": 0.3, "dropout_key": jax.random.key(1), "is_causal": True},
}


RUNS = [(n, d, "ulysses") for n, d in zip(VARIANTS, (8, 4, 2, 8, 2, 4), strict=True)]
OF_RING = [("dropout", 8, "ring"), ("dropout, causal", 4, "ring")]


@pytest.mark.parametrize("name, devices, method", RUNS + OF_RING)
def test_equals_attention_on_one_device(name, devices, method, small_blocks):  # noqa: F811
    """O, L and all gradients; with 8 devices a query is alone, and a head of keys on four.

    Round a ring what is dropped is that of the places of chunks, which it holds in a zigzag.
    """
    case = make_case(SIZES, **VARIANTS[name])
    expected = value_and_gradients(case, dot_product_attention)
    options = {"mesh": ring_of(devices), "axis_name": "ring", "method": method}
    assert_same(value_and_gradients(case, ring_attention, **options), expected)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_batch_and_heads_may_be_in_parts_as_well(kind, method):
    case = make_case(SIZES, bias=(B, N, T, S), sinks=True, dropout_rate=0.2, mask=(B, 1, T, S))
    case.others["dropout_key"] = jax.random.key(3)
    expected = value_and_gradients(case, dot_product_attention)
    axes = ("data", "ring", "model")
    mesh = jax.make_mesh((2, 2, 2), axes, (kind,) * 3)
    rows = {name: (*axes,) for name in ("query", "key", "value")}
    places = {**rows, "bias": ("data", "model", "ring"), "mask": ("data", None, "ring")}
    put = lambda tree: {
        name: placed(x, mesh, *places.get(name, ("model",) if name == "sinks" else ()))
        for name, x in tree.items()
    }
    names = {"axis_name": "ring", "batch_axis_name": "data", "head_axis_name": "model"}
    run = first_order(ring_attention, **case.options, **names, mesh=mesh, method=method)
    given = [put(tree) for tree in (case.floats, case.others)]
    with jax.set_mesh(mesh):
        cotangents = tuple(placed(x, mesh, *axes) for x in cotangents_for(case))
        found = run(*given, cotangents)
    assert_same(jax.tree.map(np.asarray, found), expected)


PREFIX = masks.causal() | masks.prefix(jnp.array([3, 9]))
SOME = masks.as_mask(lambda b, n, t, s: (s + n + b) % 3 > 0)
FUNCTIONS = {
    "ranges": PREFIX,
    "ranges and a function": PREFIX & SOME,
    "causal and a function": masks.causal() & SOME,
    "two ranges": masks.causal() & (masks.window(2) | masks.sinks(1)),
    "a map": masks.mapped(SOME, 16, 16, batch=2, heads=8),
}


@pytest.mark.parametrize(
    "devices, method, name",
    [
        (8, "ulysses", "ranges"),
        (2, "ulysses", "ranges and a function"),
        (2, "ring", "ranges and a function"),
        (4, "ring", "causal and a function"),
        (8, "ring", "two ranges"),
        (8, "ring", "a map"),
    ],
)
def test_functions_are_of_rows_heads_and_positions_of_the_whole(devices, method, name):
    """Masks that come down to ranges, ones that do not, and what a score closes over."""
    mask = FUNCTIONS[name]
    case = make_case(SIZES, query_seq_lengths=jnp.array([T, 3]))
    slopes = jnp.asarray(np.random.default_rng(1).normal(size=(B, N)))

    def run(attend, **options):
        def call(floats, slopes):
            tilted = lambda logit, b, n, t, s: logit + slopes[b, n] * (t - s).astype(logit.dtype)
            given = {**floats, **case.others, **options, "mask_function": mask}
            return attend(**given, score_function=tilted, return_residual=True)

        def gradients(floats, slopes):
            results, pullback = jax.vjp(call, floats, slopes)
            return results, pullback(cotangents_for(case))

        return quick(gradients)(case.floats, slopes)

    several = run(ring_attention, mesh=ring_of(devices), axis_name="ring", method=method)
    assert_same(several, run(dot_product_attention))


@pytest.mark.skipif(not native.status().available, reason=f"no kernels: {native.status().reason}")
def test_kernels_attend_under_functions():
    """In float32, with a score of distances, against one device in float64."""
    case = make_case(SIZES, bias=(1, N, T, S))
    slopes = jnp.asarray(np.random.default_rng(1).uniform(size=N))
    mask = FUNCTIONS["causal and a function"]

    def run(attend, dtype, **options):
        def loss(floats, slopes):
            score = masks.alibi(slopes)
            return jnp.sin(attend(**floats, **options, mask_function=mask, score_function=score))

        floats, of_dtype = jax.tree.map(lambda x: x.astype(dtype), (case.floats, slopes))
        whole = jax.grad(lambda *floats: loss(*floats).sum(), (0, 1))
        text = jax.jit(whole).lower(floats, of_dtype).as_text()
        return quick(whole)(floats, of_dtype), "rnnattn.attention_backward" in text

    several = run(ring_attention, jnp.float32, mesh=ring_of(4), axis_name="ring")
    assert several[1]
    assert_same(several[0], run(dot_product_attention, jnp.float64)[0], 1e-5)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("layout, method", [("zigzag", "ring"), ("contiguous", "ulysses")])
def test_documents_are_those_of_positions_wherever_these_lie(layout, method, kind):
    """A mask that comes down to segment ids, which nobody has reordered or placed."""
    floats = make_case(SIZES).floats
    documents = masks.document(IDS["query_segment_ids"], IDS["key_value_segment_ids"])
    mask = documents & SOME if method == "ring" else documents
    mesh, order = ring_of(2, kind), zigzag if layout == "zigzag" else lambda x, devices: x
    options: dict[str, Any] = {"mesh": mesh, "axis_name": "ring", "layout": layout}
    there = {n: placed(order(x, 2), mesh, None, "ring") for n, x in floats.items()}
    found = ring_attention(**there, **options, method=method, mask_function=mask)
    expected = order(dot_product_attention(**floats, mask_function=mask), 2)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12)


def test_masks_that_a_ring_knows_go_round_it():
    case = make_case(SIZES)
    known = {"mask_function": masks.causal() & masks.window(left=3)}
    options = {"mesh": ring_of(2), "axis_name": "ring", "method": "ring"}
    expected = value_and_gradients(case, dot_product_attention, **known)
    assert_same(value_and_gradients(case, ring_attention, **known, **options), expected)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_within_shard_map_a_device_gives_its_parts(method):
    case = make_case(SIZES, bias=(1, N, T, S), is_causal=True)
    mesh, cut = ring_of(4), P(None, "ring")
    attend = partial(ring_attention, axis_name="ring", method=method, **case.options)

    def loss(attend, q, k, v, bias):
        return jnp.sum(jnp.sin(attend(q, k, v, bias)))

    there = jax.shard_map(
        lambda q, k, v, bias: attend(q, k, v, bias=bias),
        mesh=mesh,
        in_specs=(cut, cut, cut, P(None, None, "ring")),
        out_specs=cut,
    )
    run = lambda attend: quick(jax.value_and_grad(partial(loss, attend), (0, 1, 2, 3)))
    arrays = [case.floats[name] for name in ("query", "key", "value", "bias")]
    one = partial(dot_product_attention, **case.options)
    assert_same(run(there)(*arrays), run(one)(*arrays))


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_what_nobody_sees_may_be_nan(method):
    case = make_case(SIZES, mask=(1, 1, T, S))
    case.others["mask"] = case.others["mask"].at[..., 3].set(False)
    options = {"mesh": ring_of(4), "axis_name": "ring", "method": method}
    expected = value_and_gradients(case, ring_attention, **options)
    for name in ("key", "value"):
        case.floats[name] = case.floats[name].at[:, 3].set(jnp.nan)
    (o, _), gradient = value_and_gradients(case, ring_attention, **options)
    assert_same((o, gradient), (expected[0][0], expected[1]))


def test_every_order_of_derivative_passes_the_exchanges():
    case = make_case(Sizes(1, 4, 4, 2, 1, 2, 2), bias=(1, 2, 4, 4))
    along = like(case.floats, seed=3)

    def products(attend):
        loss = lambda floats: jnp.sum(jnp.sin(attend(**floats)))
        forward = lambda floats: jax.jvp(jax.grad(loss), (floats,), (along,))[1]
        reverse = lambda floats: jax.vjp(jax.grad(loss), floats)[1](along)[0]
        return quick(lambda floats: (forward(floats), reverse(floats)))(case.floats)

    several = partial(ring_attention, mesh=ring_of(2), axis_name="ring", method="ulysses")
    assert_same(products(several), products(dot_product_attention))


@pytest.mark.slow
def test_memory_of_a_device_falls_with_their_number():
    """And nothing is sent but heads and times, that change places."""

    def compiled(devices):
        mesh = ring_of(devices)
        place = lambda *spec: NamedSharding(mesh, P(*spec))

        def gradient(q, k, v, mask, do):
            options = {"axis_name": "ring", "method": "ulysses", "mask": mask}
            attend = partial(ring_attention, mesh=mesh, **options)
            return jax.vjp(attend, q, k, v)[1](do)

        shapes = [(1, 4096, 8, 16)] * 3 + [(1, 8, 1, 4096), (1, 4096, 8, 16)]
        dtypes = [jnp.float32] * 3 + [jnp.bool_, jnp.float32]
        cut = place(None, "ring")
        given = [
            jax.ShapeDtypeStruct(s, d, sharding=place() if d == jnp.bool_ else cut)
            for s, d in zip(shapes, dtypes, strict=True)
        ]
        return jax.jit(gradient, out_shardings=cut).lower(*given).compile()

    two, eight = (compiled(n) for n in (2, 8))
    taken = lambda program: program.memory_analysis().temp_size_in_bytes
    assert taken(eight) <= 0.3 * taken(two)
    assert "all-to-all" in eight.as_text()
    assert "all-gather" not in eight.as_text() and "all-reduce" not in eight.as_text()


def test_exports_for_gpu_and_tpu():
    x = jax.ShapeDtypeStruct((1, 16, 4, 3), jnp.float32)
    mesh = ring_of(4)

    def gradient(x):
        attend = lambda x: ring_attention(x, x, x, mesh=mesh, axis_name="ring", method="ulysses")
        return jax.vjp(attend, x)[1](x)

    run = jax.jit(gradient, in_shardings=NamedSharding(mesh, P(None, "ring")))
    jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(x)


def _bad_calls() -> dict[str, Any]:
    case = make_case(Sizes(2, 8, 16, 6, 2, 6, 7))
    mesh = jax.sharding.AbstractMesh((4,), ("ring",), (AxisType.Auto,))
    run = lambda **change: (
        lambda: ring_attention(**{**case.floats, "mesh": mesh, "axis_name": "ring", **change})
    )
    mask = jnp.ones((8, 16), bool)
    return {
        "`method` must be None, 'ring' or 'ulysses', got 'star'": run(method="star"),
        "`query` must be of heads that 4 devices divide, which exchange them, got 6 heads": run(
            method="ulysses"
        ),
        "`layout` must be 'contiguous' where heads are exchanged, got 'zigzag'": run(
            method="ulysses", layout="zigzag"
        ),
        "`bias` must be of a shape that broadcasts to (B, N, T, S) = (2, 6, 8, 16), got (3,)": run(
            bias=jnp.ones(3)
        ),
        "`mask` must be of dtype bool, got float64": run(mask=jnp.ones((8, 16))),
        "`bias` must be of a floating": run(bias=mask),
        "`mask_function` must be None within `jax.shard_map`, got one that is given": lambda: (
            jax.shard_map(
                lambda q: ring_attention(q, q, q, axis_name="ring", mask_function=masks.causal()),
                mesh=ring_of(4),
                in_specs=P(None, "ring"),
                out_specs=P(None, "ring"),
            )(case.floats["query"])
        ),
    }


@pytest.mark.parametrize("message, call", _bad_calls().items())
def test_a_bad_argument_is_an_error_that_names_it(message, call, only_own_checks):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
