"""On meshes of explicit axes, as `jax.make_mesh` makes them: types say how arrays are divided.

Value and gradient are those of one device; a result lies as the arguments do, and a gradient as
what it is the gradient of.
"""

import inspect
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import rnnattn
from rnnattn import (
    KVCache,
    LSTMParams,
    LSTMState,
    PagedCache,
    RotatingCache,
    append,
    bidirectional_lstm,
    conv_stem,
    crop_and_pad,
    dot_product_attention,
    lstm,
    lstm_step,
    masks,
    paged_attention,
    patchify,
    reference,
    resample_grid,
    resize_patch_kernel,
    rope,
    rope_2d,
    rope_mixed,
    rotating_attention,
    sinusoids,
    stacked_lstm,
    token_mask,
    unpatchify,
    update_cache,
    update_rotating_cache,
)
from rnnattn.attention import dot_product_attention_jvp
from tests.attention_cases import assert_same, quick

pytestmark = pytest.mark.slow

MESH = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
AUTO = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
ROWS, HEADS, BOTH = P("data"), P(None, None, "model"), P("data", None, "model")
WHOLE = P()
STATES: Any = (ROWS, ROWS)  # of h and c


class Case(NamedTuple):
    function: Any  # of arrays by name
    arguments: dict[str, Any]  # the shape of each, and how it is divided
    results: Any  # how each result is to be divided
    gathers: bool = False


def _lstm(function, D, H, **options):
    def run(x, h=None, c=None, lengths=None, **weights):
        state = None if h is None else LSTMState(h, c)
        given = {} if lengths is None else {"lengths": lengths}
        return function(LSTMParams(**weights), x, state, **given, **options)

    weights = {"w_x": ((D, 4 * H), WHOLE), "w_h": ((H, 4 * H), WHOLE), "b": ((4 * H,), WHOLE)}
    return run, weights


def _attention(**options):
    call = {"is_causal": True, "return_residual": True, **options}
    return lambda **arrays: dot_product_attention(**arrays, **call)


B, T, D, H, N, M, K = 4, 5, 4, 4, 4, 2, 4
RUN, WEIGHTS = _lstm(lstm, D, H)
STEP, _ = _lstm(lambda params, x, state: lstm_step(params, x, state), D, H)
REFERENCE, _ = _lstm(reference.lstm, D, H)
X = (B, T, D)
STATE = {"h": ((B, H), ROWS), "c": ((B, H), ROWS)}
QUERY, KEY = (B, T, N, K), (B, T, M, K)
IMAGES = (B, 4, 6, 2)


def heads(query=BOTH, key=BOTH, kv=M):
    shape = (B, T, kv, K)
    return {"query": (QUERY, query), "key": (shape, key), "value": (shape, key)}


def logits(of_heads="model"):
    return {
        "bias": ((N, T, T), P(of_heads)),
        "scale": ((N,), P(of_heads)),
        "sinks": ((N,), P(of_heads)),
        "key_value_seq_lengths": ((B,), ROWS),
    }


def _crop(images):
    images, valid = crop_and_pad(images, (5, 4))
    return images, token_mask(valid, (5, 2))


def _stack(x, **weights):
    layer = LSTMParams(**weights)
    return stacked_lstm([layer, layer], x, dropout_rate=0.3, dropout_key=jax.random.key(0))


def _cache(key, value, new, length):
    cache = KVCache(key, value, length)
    return tuple(update_cache(cache, new, new))


def _paged(key, value, query, new, sinks, lengths):
    """Rows share nothing of the pages, and these lie in no order."""
    table = jnp.array([[2 * b + 1, 2 * b] for b in range(B)], jnp.int32)
    cache = PagedCache(key, value, table, lengths, jnp.zeros(B, bool))
    cache = append(cache, new, new)
    own = masks.sinks(3) | (lambda b, n, t, s: (s + n + b) % 3 > 0)
    score = lambda logit, b, n, t, s: logit * (n - t).astype(logit.dtype)
    out = paged_attention(query, cache, sinks=sinks, mask_function=own, score_function=score)
    prefix = masks.causal() | masks.prefix(lengths)
    return cache.key, out + paged_attention(query, cache, is_causal=False, mask_function=prefix)


def _rotating(key, value, query, new, length):
    cache = update_rotating_cache(RotatingCache(key, value, length), new, new)
    return cache.key, rotating_attention(query, cache, window=1)


CASES = {
    "lstm": Case(RUN, {**WEIGHTS, "x": (X, ROWS), "lengths": ((B,), ROWS)}, (ROWS, STATES)),
    "lstm, from a state": Case(RUN, {**WEIGHTS, "x": (X, ROWS), **STATE}, (ROWS, STATES)),
    "lstm, on XLA": Case(
        _lstm(lstm, D, H, implementation="xla", residuals=2, reverse=True)[0],
        {**WEIGHTS, "x": (X, ROWS), "lengths": ((B,), WHOLE)},
        (ROWS, STATES),
    ),
    "lstm, by all devices": Case(
        RUN, {**WEIGHTS, "x": (X, P(("data", "model")))}, (P(("data", "model")),) * 2
    ),
    "lstm, replicated": Case(RUN, {**WEIGHTS, "x": (X, WHOLE)}, (WHOLE, (WHOLE, WHOLE))),
    "lstm, features": Case(
        RUN,
        {
            "w_x": ((D, 4 * H), P(None, "model")),
            "w_h": ((H, 4 * H), P("model")),
            "b": ((4 * H,), P("data")),
            "x": (X, BOTH),
            "h": ((B, H), P("data", "model")),
            "c": ((B, H), P("data", "model")),
        },
        (BOTH, (P("data", "model"),) * 2),
        gathers=True,
    ),
    "lstm_step": Case(STEP, {**WEIGHTS, "x": ((B, D), ROWS), **STATE}, STATES),
    "reference.lstm": Case(REFERENCE, {**WEIGHTS, "x": (X, ROWS)}, (ROWS, STATES)),
    "bidirectional_lstm": Case(
        lambda x, **w: bidirectional_lstm(LSTMParams(**w), LSTMParams(**w), x),
        {**WEIGHTS, "x": (X, ROWS)},
        (ROWS, (STATES, STATES)),
    ),
    "stacked_lstm": Case(_stack, {**WEIGHTS, "x": (X, ROWS)}, (ROWS, (STATES, STATES))),
    **{
        f"attention, {name}": Case(
            _attention(implementation=name), heads() | logits(), (BOTH, BOTH)
        )
        for name in ("dense", "blockwise", None)
    },
    "attention, rows": Case(
        _attention(implementation="blockwise"), heads(ROWS, ROWS) | logits(None), (ROWS, ROWS)
    ),
    "attention, replicated": Case(_attention(), heads(WHOLE, WHOLE), (WHOLE, WHOLE)),
    "attention, one key head": Case(_attention(), heads(key=ROWS, kv=1), (BOTH, BOTH)),
    "attention, heads by all": Case(
        _attention(implementation="blockwise"),
        heads(P(None, None, ("data", "model")), WHOLE),
        (P(None, None, ("data", "model")),) * 2,
        gathers=True,
    ),
    "attention, keys replicated": Case(_attention(), heads(key=WHOLE), (BOTH, BOTH), gathers=True),
    "attention, features": Case(
        _attention(),
        heads(P("data", None, None, "model"), P("data", None, None, "model")),
        (P("data", None, None, "model"), ROWS),
        gathers=True,
    ),
    "attention, dropout": Case(
        _attention(implementation="blockwise", dropout_rate=0.3, dropout_key=jax.random.key(1)),
        heads(),
        (BOTH, BOTH),
    ),
    "attention, weights": Case(
        _attention(return_weights=True, dropout_rate=0.3, dropout_key=jax.random.key(1)),
        heads(),
        (BOTH, BOTH, P("data", "model")),
    ),
    "attention, one row": Case(
        _attention(),
        {name: ((T, N, K), P(None, "model")) for name in ("query", "key", "value")},
        (P(None, "model"),) * 2,
    ),
    "rope": Case(rope, {"x": (QUERY, BOTH), "positions": ((T,), WHOLE)}, BOTH),
    "rope, features": Case(
        rope, {"x": (QUERY, P("data", None, None, "model")), "positions": ((B, T), ROWS)},
        P("data", None, None, "model"), gathers=True,
    ),
    "rope, positions of rows": Case(
        rope, {"x": (QUERY, HEADS), "positions": ((B, T), ROWS)}, BOTH, gathers=True
    ),
    "rope_2d": Case(
        partial(rope_2d, interleaved=True),
        {"x": (QUERY, BOTH), "rows": ((T,), WHOLE), "columns": ((B, T), ROWS)},
        BOTH,
    ),
    "rope_mixed": Case(
        rope_mixed,
        {
            "x": (QUERY, BOTH),
            "rows": ((T,), WHOLE),
            "columns": ((B, 1), ROWS),
            "frequencies": ((2, N, K // 2), P(None, "model")),
        },
        BOTH,
    ),
    "sinusoids": Case(lambda t: sinusoids(t, 4, dtype=t.dtype), {"t": ((B, T), ROWS)}, ROWS),
    "patchify": Case(lambda images: patchify(images, 2), {"images": (IMAGES, ROWS)}, ROWS),
    "unpatchify": Case(
        lambda tokens: unpatchify(tokens, (4, 6), 2), {"tokens": ((B, 6, 8), ROWS)}, ROWS
    ),
    "crop_and_pad": Case(_crop, {"images": (IMAGES, ROWS)}, (ROWS, ROWS)),
    "conv_stem": Case(
        lambda images, kernel, bias: conv_stem(images, [kernel], [bias], (2, 3)),
        {"images": (IMAGES, ROWS), "kernel": ((3, 3, 2, 4), WHOLE), "bias": ((4,), WHOLE)},
        ROWS,
    ),
    "resample_grid": Case(
        lambda embeddings: resample_grid(embeddings, (2, 3), (3, 3)),
        {"embeddings": ((6, 4), P("data", "model"))},
        P(None, "model"),
        gathers=True,
    ),
    "resize_patch_kernel": Case(
        lambda kernel: resize_patch_kernel(kernel, (3, 3)),
        {"kernel": ((2, 2, 2, 4), P(None, None, None, "model"))},
        P(None, None, None, "model"),
    ),
    "update_cache": Case(
        _cache,
        {"key": (KEY, BOTH), "value": (KEY, BOTH), "new": ((B, 2, M, K), BOTH)}
        | {"length": ((B,), ROWS)},
        (BOTH, BOTH, ROWS),
    ),
    "paged_attention": Case(
        _paged,
        {name: ((2 * B, 8, M, K), HEADS) for name in ("key", "value")}
        | {"query": ((B, 2, N, K), HEADS), "new": ((B, 2, M, K), HEADS)}
        | {"sinks": ((N,), P("model")), "lengths": ((B,), WHOLE)},
        (HEADS, HEADS),
    ),
    "rotating_attention": Case(
        _rotating,
        {"key": ((B, 4, M, K), BOTH), "value": ((B, 4, M, K), BOTH)}
        | {"query": ((B, 2, N, K), BOTH), "new": ((B, 2, M, K), BOTH), "length": ((B,), ROWS)},
        (BOTH, BOTH),
    ),
}  # fmt: skip


def _draw(case):
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith(("length", "lengths")):
            return jnp.asarray(rng.integers(0, T - 1, shape), jnp.int32)
        return jnp.asarray(rng.normal(size=shape))

    return {name: draw(name, shape) for name, (shape, _) in case.arguments.items()}


def _placed(case, mesh=MESH):
    specs = {name: spec for name, (_, spec) in case.arguments.items()}
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return {name: place(x, specs[name]) for name, x in _draw(case).items()}


def _floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _loss(function):
    """A sum that weighs all floating results, and these."""

    def loss(floats, others):
        results = function(**floats, **others)
        clean = [jnp.where(jnp.isinf(y), 0, y) for y in _floats(results)]
        return sum(jnp.sum(jnp.sin(y + n)) for n, y in enumerate(clean)), results

    return loss


def _split(arrays):
    of_kind = lambda kind: {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, kind)}
    return of_kind(jnp.floating), of_kind(jnp.integer)


def _types(tree):
    return jax.tree.map(jax.typeof, tree)


def _each(specs, tree):
    """One for each leaf."""
    if not isinstance(specs, tuple) or isinstance(specs, P):
        return [specs] * len(jax.tree.leaves(tree))
    return [of for part in zip(specs, tree, strict=True) for of in _each(*part)]


def _assert_placed(found, specs):
    """`specs` is a prefix of the tree of results."""
    for x, spec in zip(jax.tree.leaves(found), _each(specs, found), strict=True):
        padded = tuple(spec) + (None,) * (x.ndim - len(spec))
        assert tuple(jax.typeof(x).sharding.spec) == padded
        assert x.sharding.is_equivalent_to(NamedSharding(MESH, spec), x.ndim)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_one_device(name):
    case = CASES[name]
    run = quick(jax.value_and_grad(_loss(case.function), has_aux=True))
    arrays = _split(_placed(case))
    compiled = run.lower(*arrays).compile()
    (_, results), gradient = found = compiled(*arrays)
    assert_same(found, run(*_split(_draw(case))))
    _assert_placed(results, case.results)
    assert _types(gradient) == _types(arrays[0])
    moved = re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    assert bool(moved) == case.gathers


SOME = ["lstm, from a state", "attention, blockwise", "rope_2d", "conv_stem"]


@pytest.mark.parametrize("name", SOME)
def test_eager_calls_with_a_mesh_that_is_set_and_without(name):
    case = CASES[name]
    arrays, loss = _placed(case), _loss(case.function)
    _assert_placed(case.function(**arrays), case.results)
    with jax.set_mesh(MESH):
        floats, others = _split(arrays)
        (_, results), gradient = jax.value_and_grad(loss, has_aux=True)(floats, others)
    _assert_placed(results, case.results)
    assert _types(gradient) == _types(floats)
    (_, expected), slopes = jax.value_and_grad(loss, has_aux=True)(*_split(_draw(case)))
    assert_same((results, gradient), (expected, slopes))


@pytest.mark.parametrize("name", ["lstm", "attention, dense", "attention, blockwise", "rope"])
def test_the_gradient_can_be_differentiated(name):
    case = CASES[name]

    def product(floats, others):
        gradient = jax.grad(lambda floats: _loss(case.function)(floats, others)[0])
        return jax.jvp(gradient, (floats,), (floats,))[1]

    found, expected = (quick(product)(*_split(make(case))) for make in (_placed, _draw))
    assert_same(found, expected, rtol=1e-11)


def test_tangents():
    case = CASES["attention, rows"]

    def tangent(floats, others):
        call = partial(dot_product_attention_jvp, **others, is_causal=True)
        return jax.jvp(lambda floats: call(**floats), (floats,), (floats,))

    found, expected = (quick(tangent)(*_split(make(case))) for make in (_placed, _draw))
    assert_same(found, expected)
    _assert_placed(found, (ROWS, ROWS))


@pytest.mark.parametrize(
    "name, over",
    [
        ("attention, heads", "data"),
        ("attention, heads", None),
        ("attention", "data"),
        ("blockwise", None),
        ("lstm", None),
        ("rope, rows", "data"),
    ],
)
def test_vmap(name, over):
    """Over an axis that is divided itself, or is not."""
    function, inner = {
        "attention, heads": (lambda x: dot_product_attention(x, x, x, is_causal=True), HEADS),
        "rope, rows": (lambda x: rope(x, jnp.arange(T)), P("model")),
        "attention": (lambda x: dot_product_attention(x[0], x[0], x[0]), WHOLE),
        "blockwise": (
            lambda x: dot_product_attention(x, x, x, implementation="blockwise"),
            WHOLE,
        ),
        "lstm": (lambda x: lstm(_ones(), x[:, :, 0])[0], WHOLE),
    }[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *QUERY)))
    place = NamedSharding(MESH, P(over, *inner))

    def run(x):
        results, pullback = jax.vjp(jax.vmap(function), x)
        return results, pullback(jnp.sin(results))

    found = quick(run)(jax.device_put(x, place))
    assert_same(found, quick(run)(x))
    _assert_placed(found, P(over, *inner))


@pytest.mark.parametrize("options", [{}, {"pool": "cls", "position": "rope2d"}], ids=str)
def test_a_vit_with_a_batch_in_parts(options):
    sizes: dict[str, Any] = {"patch_size": 2, "width": 16, "depth": 1, "num_heads": 2, "classes": 3}
    model = rnnattn.nn.ViT(
        **sizes, channels=1, image_size=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options
    )
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 4, 1)))

    def of(images, valid):
        return lambda model: jnp.sum(jnp.sin(model(images, valid)))

    _assert_trained_alike(model, of, images, images[..., 0] > -1)


def test_a_stack_of_lstms_with_a_batch_in_parts():
    module = rnnattn.nn.LSTM(
        3, 4, num_layers=2, bidirectional=True, dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)))
    of = lambda x, lengths: lambda module: jnp.sum(jnp.sin(module(x, lengths=lengths)[0]))
    _assert_trained_alike(module, of, x, jnp.array([5, 3, 0, 1]))


def _assert_trained_alike(module, of, *arrays):
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @quick
    def run(params, *arrays):
        return jax.value_and_grad(lambda params: of(*arrays)(nnx.merge(graph, params, rest)))(
            params
        )

    expected = run(params, *arrays)
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(MESH, spec))
    placed = (place(params, WHOLE), *place(arrays, ROWS))
    assert_same(run(*placed), expected)
    with jax.set_mesh(MESH):
        assert_same(run(*placed), expected)


def test_an_lstm_sums_its_weight_gradients_once():
    """After the chunks, where by automatic axes each chunk sums them."""
    case = CASES["lstm, on XLA"]
    run = jax.jit(jax.grad(lambda *of: _loss(case.function)(*of)[0]))

    def sums_in_loops(mesh):
        text = run.lower(*_split(_placed(case, mesh))).compile().as_text() or ""
        assert re.search(r"all-reduce(-start)?\(", text)
        parts = [part for part in text.split("\n}\n") if "ENTRY" not in part]
        return any(re.search(r"all-reduce(-start)?\(", part) for part in parts)

    assert sums_in_loops(AUTO) and not sums_in_loops(MESH)


@pytest.mark.parametrize("name", [*SOME, "patchify", "update_cache"])
def test_without_explicit_axes_a_program_is_as_it_was(name):
    case = CASES[name]
    for arrays in (_draw(case), _placed(case, AUTO)):
        with jax.set_mesh(AUTO):
            program = str(jax.make_jaxpr(lambda arrays: case.function(**arrays))(arrays))
        assert not re.search(r"shard_map|reshard|mesh_cast", program)


@pytest.mark.parametrize("name", ["attention, blockwise", "rope"])
def test_within_a_shard_map_over_another_axis(name):
    """Rows by the caller's `jax.shard_map`, heads by their type."""
    case = CASES[name]
    floats, _ = _split(_placed(case))
    whole, _ = _split(_draw(case))
    rows = {n: ROWS if "data" in case.arguments[n][1] else WHOLE for n in floats}
    loss = lambda floats: _loss(case.function)(floats, {})[0]

    def part(floats):
        value, gradient = jax.value_and_grad(loss)(floats)
        return jax.lax.psum(value, "data"), gradient

    divided = jax.shard_map(
        part, mesh=MESH, in_specs=(rows,), out_specs=(P(), rows), axis_names={"data"}
    )
    assert_same(quick(divided)(floats), quick(jax.value_and_grad(loss))(whole))


def test_on_a_mesh_of_one_device_kernels_serve():
    """Where there are any: the program is that for one device but for the types."""
    one = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    x = jax.device_put(jnp.ones(QUERY, jnp.float32), NamedSharding(one, ROWS))
    run = jax.jit(lambda x: dot_product_attention(x, x, x))
    program = run.lower(x).as_text()
    assert ("rnnattn.attention_forward" in program) == rnnattn.native.status().available
    assert "manual_computation" not in program
    assert jax.typeof(run(x)).sharding.spec == P("data", None, None, None)


def _ones():
    return LSTMParams(*(jnp.ones(shape) for shape, _ in WEIGHTS.values()))


def _bad_calls():
    place = lambda shape, *spec: jax.device_put(jnp.ones(shape), NamedSharding(MESH, P(*spec)))
    attend, run = (inspect.unwrap(f) for f in (dot_product_attention, lstm))
    params = _ones()
    rows, x = place(QUERY, "data"), place((B, 4, D), "data")
    along = lambda axis: f"must be whole along {axis}"
    late = place((B, 4, N, K), "data", "model")
    even = place((B, 4, N, K), "data")
    return {
        f"lstm: `x` {along('time on a mesh of explicit axes')}": lambda: run(params, late[..., 0]),
        f"dot_product_attention: `query` {along('the queries (see `ring_attention`)')}": lambda: (
            attend(late, even, even)
        ),
        f"dot_product_attention: `key` {along('the keys (see `ring_attention`)')}": lambda: attend(
            even, late, even
        ),
        "dot_product_attention: `value` must be divided along B as `query` is, by ('data',)": (
            lambda: attend(rows, rows, place(QUERY, "model"))
        ),
        "lstm: `state.h` must be divided along B as `x` is, by ('data',), got P('model', None)": (
            lambda: run(params, x, LSTMState(place((B, H), "model"), jnp.ones((B, H))))
        ),
        "dot_product_attention: `key` must be divided along N by other mesh axes than the rest": (
            lambda: attend(rows, place(QUERY, None, None, "data"), rows)
        ),
        "dot_product_attention: `key` must be of a size along axis 2 that the 2 parts of N": (
            lambda: attend(
                place((B, T, 6, K)), *[place((B, T, 3, K))] * 2, place((6, T, T), "model")
            )
        ),
        f"patchify: `images` {along('rows')}": lambda: inspect.unwrap(patchify)(
            place(IMAGES, "data", "model"), 2
        ),
    }


@pytest.mark.parametrize("message, call", _bad_calls().items())
def test_what_cannot_be_divided_is_refused_in_a_sentence(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
