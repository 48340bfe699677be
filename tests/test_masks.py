"""Masks and scores as functions of places: against all logits at once, from what each means."""

from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnattn
from rnnattn import masks, reference
from rnnattn.attention import dot_product_attention_jvp, native
from rnnattn.attention.arguments import checked, sorted_arguments, with_functions
from rnnattn.attention.problem import Options
from tests.attention_cases import (
    Case,
    Sizes,
    assert_same,
    cotangents_for,
    first_order,
    forward_mode,
    like,
    make_case,
    outputs,
    quick,
    second_order,
    small_blocks,  # noqa: F401
    value_and_gradients,
)

dot_product_attention: Any = rnnattn.dot_product_attention
B, T, S, N = 3, 7, 10, 4  # of `make_case`
ints = partial(jnp.array, dtype=jnp.int32)
IDS = ints([[0, 0, 1, 1, 1, 2, 2, 2, 2, 3], [1] * 10, [4, 4, 4, 5, 5, 0, 0, 7, 8, 8]])
LENGTHS = ints([4, 0, 10])
OFFSET = ints([2, 0, 3])
SCHEDULES = ("dense", "blockwise")


def by_hand(name, b, t, s):
    """Whether a key is shown, in plain numbers."""
    ids, lengths = IDS.tolist()[b], LENGTHS.tolist()
    return {
        "causal": s <= t,
        "window": t - 2 <= s <= t + 1,
        "left alone": s >= t - 3,
        "right alone": s <= t + 2,
        "all of it": True,
        "prefix": s <= t or s < lengths[b],
        "one prefix": s < 4,
        "document": ids[t] == ids[s] and s <= t,
        "two documents": ids[t] == ids[s] and IDS.tolist()[0][t] == IDS.tolist()[0][s],
        "dilated": (t - s) % 3 == 0,
        "sinks": s <= t and (s >= t - 2 or s < 2),
        "near or late": t - 1 <= s <= t or s >= lengths[b],
        "hidden prefix": not s < lengths[b],
        "before it": s < t - 2,
        "far keys": s < t - 2 or s > t + 1,
        "window in a prefix": (s <= t and s < lengths[b]) or s < 2,
        "own function": (s + t + b) % 2 == 0 and s <= t,
        "prefix and function": s < lengths[b] and (s * t) % 3 < 2,
    }[name]


parity = lambda b, n, t, s: (s + t + b) % 2 == 0
MASKS: dict[str, Any] = {
    "causal": masks.causal(),
    "window": masks.window(2, 1),
    "left alone": masks.window(3),
    "right alone": masks.window(right=2),
    "all of it": masks.window(),
    "prefix": masks.causal() | masks.prefix(LENGTHS),
    "one prefix": masks.prefix(4),
    "document": masks.document(IDS) & masks.causal(),
    "two documents": masks.document(IDS) & masks.document(IDS[0]),
    "dilated": masks.dilated(3),
    "sinks": masks.causal() & (masks.window(2) | masks.sinks(2)),
    "near or late": masks.window(1, 0) | ~masks.prefix(LENGTHS),
    "hidden prefix": ~masks.prefix(LENGTHS),
    "before it": masks.causal() & ~masks.window(2),
    "far keys": ~masks.window(2, 1),
    "window in a prefix": (masks.causal() & masks.prefix(LENGTHS)) | masks.sinks(2),
    "own function": parity & masks.causal(),
    "prefix and function": masks.prefix(LENGTHS) & (lambda b, n, t, s: (s * t) % 3 < 2),
}


def seen(name, offset=None):
    at = offset.tolist() if offset is not None else [0] * B
    table = [
        [[by_hand(name, b, t + at[b], s) for s in range(S)] for t in range(T)] for b in range(B)
    ]
    return jnp.asarray(np.array(table)[:, None])


@cache
def of_mask():
    """The twin, of a mask of all queries and keys: one compilation for all."""
    return first_order(reference.dot_product_attention)


def case_of(mask=None, seed=0, offset=None, **options) -> Case:
    more = {} if offset is None else {"query_offset": offset}
    more |= {} if mask is None else {"mask": mask}
    case = make_case(seed=seed, **options)
    return case._replace(others={**case.others, **more})


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_shows_what_it_says(name, small_blocks):  # noqa: F811
    """Value by value; what hides behind it is NaN; in every schedule, and by the kernels."""
    mask, expected = MASKS[name], seen(name, OFFSET)
    for b in range(B):
        t = jnp.arange(T, dtype=jnp.int32)[:, None] + OFFSET[b]
        s = jnp.arange(S, dtype=jnp.int32)[None]
        found = jnp.broadcast_to(mask(jnp.int32(b), jnp.int32(0), t, s), (T, S))
        np.testing.assert_array_equal(found, expected[b, 0])
    case = case_of(offset=OFFSET)
    hidden = ~expected.any((1, 2))[:, :, None, None]
    empty = ~expected.any((1, 3))[:, :, None, None]
    poison = {"query": empty, "key": hidden, "value": hidden}
    nan = {n: jnp.where(at, jnp.nan, case.floats[n]) for n, at in poison.items()}
    others = case.others | {"mask": expected}
    truth = of_mask()(case.floats, others, cotangents_for(case))
    actual = value_and_gradients(
        case._replace(floats=nan),
        dot_product_attention,
        mask_function=mask,
        implementation="blockwise",
    )
    assert_same(actual, truth)
    single = {n: x.astype(jnp.float32) for n, x in nan.items()}
    kernels = partial(value_and_gradients, Case(single, case.others, {}), dot_product_attention)
    if native.unserved(single["query"], single["value"], options_of(mask)[1]) == []:
        assert_same(kernels(mask_function=mask, implementation="native"), truth, 1e-5)


def options_of(mask=None, **others):
    """Arrays and options of a call, after what masks have in other words is said in those."""
    case = case_of(dtype=jnp.float32)
    arguments = sorted_arguments("f", **case.floats, mask_function=mask, **others)
    return with_functions("f", *checked("f", *arguments))


def test_what_is_known_otherwise_is_no_function():
    _, options = options_of(masks.causal() & masks.window(3, 2) & masks.window(None, 4))
    assert options.is_causal and options.window == (3, 2) and options.mask_function is None
    _, options = options_of(masks.window(3), local_window_size=(4, 1))
    assert options.window == (3, 1)
    arrays, options = options_of(masks.document(IDS[0]))
    assert options.mask_function is None and arrays.query_segment_ids.shape == (B, T)
    np.testing.assert_array_equal(arrays.key_value_segment_ids, jnp.tile(IDS[:1], (B, 1)))
    arrays, options = options_of(
        masks.causal() & ~masks.prefix(LENGTHS), query_seq_lengths=ints([7, 5, 0])
    )
    assert (options.is_causal, options.mask_function) == (False, None)
    assert arrays.query_seq_lengths is None
    np.testing.assert_array_equal(arrays.key_ranges[0, :, 0], 4)
    np.testing.assert_array_equal(arrays.key_ranges[1, :5, 1], jnp.arange(1, 6))
    first, past = arrays.key_ranges[2].T
    assert (past <= first).all()


BY_PARTS = {
    "two ranges": lambda: MASKS["sinks"],
    "blocks": lambda: masks.mapped(masks.dilated(2) | masks.prefix(LENGTHS), 2 * T, S, batch=B),
    "one block": lambda: masks.dilated(2) | parity,
}


@pytest.mark.parametrize("name", BY_PARTS)
def test_parts_by_the_kernels_with_every_option(name, request):
    """Each adds its share of what is not rounded to 16 bits before."""
    if name == "blocks":
        request.getfixturevalue("small_blocks")
    mask, slopes = BY_PARTS[name](), jnp.asarray(np.random.default_rng(2).uniform(size=N))
    case = make_case(
        bias=(1, N, T, S),
        scale=(N,),
        sinks=True,
        mask=(B, 1, T, S),
        logits_soft_cap=2.0,
        query_offset=OFFSET,
        key_value_seq_lengths=ints([10, 9, 8]),
        query_segment_ids=ints([[0] * 5 + [1] * 2] * B),
        key_value_segment_ids=ints([[0] * 7 + [1] * 3] * B),
    )

    def run(dtype, attend, **how):
        floats = jax.tree.map(lambda x: x.astype(dtype), {**case.floats, "slopes": slopes})

        def attend_by(slopes, **arguments):
            score = masks.alibi(slopes)
            return attend(**arguments, mask_function=mask, score_function=score, **how)

        return value_and_gradients(case._replace(floats=floats), attend_by)

    expected = run(jnp.float64, reference.dot_product_attention)
    x = jnp.ones(1, jnp.float32)
    if native.unserved(x, x, Options()):
        pytest.skip("no kernels")
    for dtype, rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
        assert_same(run(dtype, dot_product_attention, implementation="native"), expected, rtol)


# ---- with all the rest ---------------------------------------------------------------------------


def mask_of_all(mapped=lambda mask, *_, **__: mask):
    by_function = mapped(masks.dilated(2) | masks.prefix(LENGTHS), S, S, batch=B)
    return masks.window(5, 4) & by_function & masks.document(IDS)


def a_score(slopes, table, logit, b, n, t, s):
    """Bent, and with floats that are read by place and as they are; b and s are places, too."""
    near = masks.relative_bias(table, max_distance=5)(logit, b, n, t, s)
    bent = jnp.tanh(slopes[n] * near) + jnp.sum(slopes) * (s - b).astype(logit.dtype) / 8
    return masks.alibi(slopes)(bent, b, n, t, s)


def with_functions_of(function, floats, others, **options):
    """`slopes` and `table` are closed over."""
    floats = dict(floats)
    score = partial(a_score, floats.pop("slopes"), floats.pop("table"))
    mask = mask_of_all(masks.mapped)
    return function(**floats, **others, mask_function=mask, score_function=score, **options)


def dense_reference(floats, others, *, return_residual):
    """All logits at once, from the words of the docstring."""
    q, k, v = (jnp.repeat(floats[n], N // floats[n].shape[2], 2) for n in ("query", "key", "value"))
    places = jnp.ix_(*(jnp.arange(n, dtype=jnp.int32) for n in (B, N, T, S)))
    b, n, t, s = places
    t = t + others["query_offset"].astype(jnp.int32)[:, None, None, None]
    logits = floats["scale"][None, :, None, None] * jnp.einsum("btnk,bsnk->bnts", q, k)
    logits = 1.5 * jnp.tanh(logits / 1.5) + floats["bias"]
    logits = a_score(floats["slopes"], floats["table"], logits, b, n, t, s)
    shown = mask_of_all()(b, n, t, s) & others["mask"]
    shown &= s < others["key_value_seq_lengths"][:, None, None, None]
    shown &= t - others["query_offset"][:, None, None, None] < 6
    ids = (others["query_segment_ids"], others["key_value_segment_ids"])
    shown &= ids[0][:, None, :, None] == ids[1][:, None, None]
    logits = jnp.where(shown, logits, -jnp.inf)
    sinks = jnp.broadcast_to(floats["sinks"][None, :, None, None], (B, N, T, 1))
    logits = jnp.concatenate([logits, sinks], 3)
    lse = jax.nn.logsumexp(logits, 3)
    p = jnp.exp(logits - lse[..., None])[..., :-1]
    o = jnp.einsum("bnts,bsnv->btnv", p, v)
    return o, jnp.moveaxis(lse, 1, 2)


@pytest.fixture(scope="module")
def everything():
    case = make_case(
        bias=(1, N, T, S),
        mask=(B, 1, T, S),
        scale=(N,),
        sinks=True,
        query_offset=OFFSET,
        query_seq_lengths=ints([6, 6, 6]),
        key_value_seq_lengths=ints([10, 9, 8]),
        query_segment_ids=ints([[0] * 5 + [1] * 2] * B),
        key_value_segment_ids=ints([[0] * 7 + [1] * 3] * B),
    )
    rng = np.random.default_rng(5)
    floats = case.floats | {
        "slopes": jnp.asarray(rng.uniform(0.2, 1, N)),
        "table": jnp.asarray(rng.normal(size=(8, N))),
    }
    return case._replace(floats=floats)


def on(function, implementation):
    return lambda **arguments: with_functions_of(
        function,
        {n: arguments.pop(n) for n in list(arguments) if n in FLOATS},
        {n: arguments.pop(n) for n in list(arguments) if n != "return_residual"},
        implementation=implementation,
        logits_soft_cap=1.5,
        **arguments,
    )


FLOATS = ("query", "key", "value", "bias", "scale", "sinks", "slopes", "table")


def dense(**arguments):
    floats = {n: arguments.pop(n) for n in FLOATS}
    residual = arguments.pop("return_residual")
    return dense_reference(floats, arguments, return_residual=residual)


def test_values_gradients_and_tangents_with_every_option(everything, small_blocks):  # noqa: F811
    floats, others, _ = everything
    expected = value_and_gradients(everything, dense)
    along = like(floats, seed=3)
    tangents = forward_mode(dense)(floats, others, along)
    twin = on(reference.dot_product_attention, None)
    assert_same(value_and_gradients(everything, twin), expected)
    for implementation in SCHEDULES:
        run = on(dot_product_attention, implementation)
        assert_same(value_and_gradients(everything, run), expected)
        run = on(dot_product_attention_jvp, implementation)
        assert_same(forward_mode(run)(floats, others, along), tangents)


@pytest.mark.parametrize(
    "implementation", [pytest.param("dense", marks=pytest.mark.slow), "blockwise"]
)
def test_second_derivatives_with_every_option(everything, implementation, small_blocks):  # noqa: F811
    floats, others, _ = everything
    given = like(jax.eval_shape(lambda: dense(**floats, **others, return_residual=True)), 11)
    arguments = (floats, others, given, like(floats, seed=3))
    expected = second_order(dense)(*arguments)
    run = second_order(on(dot_product_attention, implementation))
    assert_same(run(*arguments), expected, 1e-11)


def test_a_mask_is_an_argument_of_a_program():
    """A tree of its arrays: another length is no other program."""
    case, counted = case_of(), []

    @jax.jit
    def run(mask, score):
        counted.append(mask)
        return dot_product_attention(**case.floats, mask_function=mask, score_function=score)

    score = masks.alibi(masks.alibi_slopes(N).astype(jnp.float64))
    for lengths in (LENGTHS, LENGTHS[::-1]):
        mask = masks.causal() | masks.prefix(lengths)
        mask &= masks.mapped(masks.dilated(2), T, S)
        expected = dot_product_attention(
            **case.floats, mask_function=mask, score_function=score, implementation="dense"
        )
        assert_same(run(mask, score), expected)
    assert len(counted) == 1


def test_dropout_drops_the_same_weights(small_blocks):  # noqa: F811
    score = lambda logit, b, n, t, s: logit * (1 + n.astype(logit.dtype))
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(0), "score_function": score}
    options |= {"mask_function": masks.dilated(2)}
    case = case_of()
    expected = value_and_gradients(case, reference.dot_product_attention, **options)
    actual = value_and_gradients(case, dot_product_attention, **options, implementation="blockwise")
    assert_same(actual, expected)


def test_the_number_of_head_and_row_counts(small_blocks):  # noqa: F811
    """Of heads in groups, one head after another and all together; of several axes, numbered."""
    one = lambda b, n, t, s: (b + 2 * n + s) % 3 > 0
    b, n, s = (jnp.arange(size) for size in (B, N, S))
    s = s[None, None, None]
    expected = (b[:, None, None, None] + 2 * n[None, :, None, None] + s) % 3 > 0
    case = case_of()
    truth = outputs(case_of(expected), reference.dot_product_attention)
    for implementation in SCHEDULES:
        run = partial(outputs, case, dot_product_attention, implementation=implementation)
        assert_same(run(mask_function=one), truth)
    twice = lambda x: jnp.stack([x, x])[:, 1:]
    floats = jax.tree.map(twice, case.floats)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    actual = outputs(case._replace(floats=floats), dot_product_attention, mask_function=one)
    flattened = case._replace(floats=jax.tree.map(flat, floats))
    expected = outputs(flattened, dot_product_attention, mask_function=one)
    assert_same(jax.tree.map(flat, actual), expected)
    alone = jax.tree.map(lambda x: x[0], case.floats)
    actual = outputs(case._replace(floats=alone), dot_product_attention, mask_function=one)
    assert_same(actual, jax.tree.map(lambda x: x[0], truth))


def test_axes_of_one_and_of_none():
    case = make_case(Sizes(1, 1, 1, 1, 1, 1, 1))
    score = lambda logit, b, n, t, s: 2 * logit
    for implementation in SCHEDULES:
        o, lse = outputs(
            case,
            dot_product_attention,
            mask_function=masks.sinks(1),
            score_function=score,
            implementation=implementation,
        )
        np.testing.assert_allclose(o, case.floats["value"], rtol=1e-12)
        expected = 2 * jnp.vdot(case.floats["query"], case.floats["key"])
        np.testing.assert_allclose(lse[0, 0, 0], expected, rtol=1e-12)
    empty = jnp.ones((2, 3, 1, 2)), jnp.ones((2, 0, 1, 2)), jnp.ones((2, 0, 1, 2))
    out = dot_product_attention(*empty, mask_function=masks.dilated(2), score_function=score)
    np.testing.assert_array_equal(out, jnp.zeros((2, 3, 1, 2)))


# ---- what is ready made --------------------------------------------------------------------------


def test_slopes_of_alibi():
    halves = [0.5**n for n in range(1, 9)]
    assert masks.alibi_slopes(8).tolist() == halves
    between = [0.5 ** (n / 2) for n in (1, 3, 5, 7)]  # of 16 heads, every other
    np.testing.assert_allclose(masks.alibi_slopes(12), [*halves, *between], rtol=1e-6)


def bucket_of(distance, buckets, max_distance, *, bidirectional):
    """As Raffel et al. have it, one distance s − t at a time."""
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    share = np.log(distance / exact) / np.log(max_distance / exact)
    return start + min(exact + int(share * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_relative_positions(bidirectional):
    table = jnp.arange(32.0, dtype=jnp.float32)[:, None]
    bias = masks.relative_bias(table, bidirectional=bidirectional, max_distance=100)
    distances = np.arange(-150, 151)
    found = bias(jnp.float32(0), 0, jnp.int32(0), jnp.int32(0), jnp.asarray(distances, jnp.int32))
    expected = [bucket_of(d, 32, 100, bidirectional=bidirectional) for d in distances.tolist()]
    np.testing.assert_array_equal(found, expected)


# ---- programs ------------------------------------------------------------------------------------


def tokens(T, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, T, 2, 8), dtype)


def with_table(x, table, implementation="xla", more=MASKS["all of it"]):
    return dot_product_attention(
        *(x, x, x),
        mask_function=masks.causal() & (masks.window(64) | masks.sinks(2)) & more,
        score_function=masks.relative_bias(table),
        implementation=implementation,
    ).sum()


@pytest.mark.slow
def test_memory_is_linear():
    """That of the gradient, the table's included, and of a Hessian-vector product."""
    table = jax.ShapeDtypeStruct((32, 2), jnp.float32)

    def temporaries(function, T):
        compiled = jax.jit(function).lower(tokens(T), table).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    gradient = jax.grad(with_table, (0, 1))
    few = temporaries(gradient, 8192)
    assert few < 10 * 2**20 and temporaries(gradient, 65_536) < 10 * few
    product = lambda *args: jax.jvp(gradient, args, args)[1]
    assert temporaries(product, 16_384) < 10 * temporaries(product, 2048)


def test_blocks_that_show_nothing_are_left_out():
    """A block that is visited would leave NaN behind. A map says which, and no one looks again."""
    x = jnp.ones((1, 1024, 1, 4), jnp.float32)

    def score(logit, b, n, t, s):
        hidden = (s // 512 == 1) & (t // 512 == 0)
        return jnp.where(hidden, jnp.nan, logit)

    shown = lambda b, n, t, s: s // 512 <= t // 512
    all_of_it = masks.as_mask(lambda b, n, t, s: s >= 0)
    by_map = masks.Mapped(all_of_it, masks.mapped(shown, 1024, 1024).blocks)

    def run(mask, x):
        return dot_product_attention(
            *(x, x, x), mask_function=mask, score_function=score, implementation="blockwise"
        )

    for mask in (shown, by_map):
        out, pullback = quick(lambda x, mask=mask: jax.vjp(partial(run, mask), x))(x)
        np.testing.assert_allclose(out, x, rtol=1e-6)
        assert np.isfinite(pullback(x)[0]).all()


def test_blocks_that_a_map_leaves_out_are_left_out_by_the_kernels():
    """A map that hides what its function shows: no one looks at that again."""
    x = jax.random.normal(jax.random.key(0), (1, 1024, 2, 4), jnp.float32)
    if native.unserved(x, x, Options()):
        pytest.skip("no kernels")
    own = lambda b, n, t, s: s // 512 == t // 512
    all_of_it = masks.as_mask(lambda b, n, t, s: s >= 0)
    by_map = masks.Mapped(all_of_it, masks.mapped(own, 1024, 1024).blocks)

    def run(implementation, mask):
        attend = lambda x: dot_product_attention(
            x, x, x, mask_function=mask, implementation=implementation
        )
        out, pullback = jax.vjp(attend, x)
        return out, pullback(x)

    assert_same(run("native", by_map), run("xla", own), 1e-5)


def test_which_schedule_runs_a_function():
    x = jnp.ones((1, 300, 1, 4), jnp.float32)
    if native.unserved(x, x, Options()):
        pytest.skip("no kernels")
    loss = lambda x, **how: dot_product_attention(x, x, x, **how).sum()
    text = lambda **how: jax.jit(jax.grad(partial(loss, **how))).lower(x).as_text()
    for kernel in ("rnnattn.attention_forward", "rnnattn.attention_backward"):
        assert kernel in text(mask_function=masks.dilated(2))
        assert kernel not in text(score_function=lambda logit, b, n, t, s: 2 * logit)


def test_a_map_of_blocks_leaves_nothing_out(small_blocks):  # noqa: F811
    """Of rows, heads and places with an offset, also beyond what it knows; an axis of vmap."""
    sparse = lambda b, n, t, s: (s // 3 + t // 4 + n // 2 + b) % 3 == 0
    mask = masks.mapped(sparse, T, S, batch=B, heads=N)
    assert mask.blocks.shape == (B, N, 3, 4) and 0.3 < mask.blocks.mean() < 0.8
    case = case_of(offset=OFFSET)
    expected = value_and_gradients(
        case, dot_product_attention, mask_function=sparse, implementation="dense"
    )
    actual = value_and_gradients(
        case, dot_product_attention, mask_function=mask, implementation="blockwise"
    )
    assert_same(actual, expected)
    some = masks.mapped(lambda b, n, t, s: (s // 3 + t // 3) % 3 == 0, 2 * T, S) & parity
    run = lambda mask: outputs(
        case_of(), dot_product_attention, mask_function=mask, implementation="blockwise"
    )
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), some)
    each = jax.tree.map(lambda x: x[1], jax.vmap(run)(stacked))
    assert_same(each, run(lambda *at: some(*at)))


def test_a_function_that_does_the_same_is_compiled_once():
    x = jnp.ones((1, 4, 2, 8), jnp.float32)

    def call(scale):
        factor = jnp.full(2, scale, jnp.float32)
        return dot_product_attention(
            *(x, x, x),
            mask_function=masks.dilated(2) & (lambda b, n, t, s: s < t + 2),
            score_function=lambda logit, b, n, t, s: jnp.where(s > 1, logit, logit * factor[n]),
        )

    first = call(1.0)
    compilations: list[str] = []
    listener = lambda event, *_, **__: (
        compilations.append(event) if "backend_compile" in event else None
    )
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        second = call(3.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compilations
    assert first.shape == second.shape


def test_functions_that_differ_are_told_apart():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 1, 8)), jnp.float32)
    run = lambda score: dot_product_attention(x, x, x, score_function=score)
    scores = [
        lambda logit, b, n, t, s: logit * 2,
        lambda logit, b, n, t, s: logit * 3,
        lambda logit, b, n, t, s: logit + s.astype(logit.dtype),
        lambda logit, b, n, t, s: logit + t.astype(logit.dtype) * s.astype(logit.dtype),
        lambda logit, b, n, t, s: jax.lax.cond(s > 1, jnp.sin, jnp.cos, logit),
        lambda logit, b, n, t, s: jax.lax.cond(s > 1, jnp.cos, jnp.sin, logit),
    ]
    found = [run(score) for score in scores]
    for a in range(len(found)):
        for b in range(a):
            assert np.abs(found[a] - found[b]).max() > 1e-4


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_functions_with_rules_and_branches_of_their_own(implementation):
    """As of JAX's: their derivatives are not lost, and what they close over is found."""
    case = case_of()
    slopes = jnp.asarray(np.random.default_rng(1).normal(size=N))

    def score(slopes, logit, b, n, t, s):
        bent = jax.nn.relu(logit * slopes[n]) + jax.nn.gelu(logit)
        return bent + jax.lax.cond(s > 2, jnp.sin, lambda x: x * slopes[0], logit)

    def loss(floats, slopes, attend, **options):
        out = attend(**floats, score_function=partial(score, slopes), **options)
        return jnp.cos(out).sum()

    run = lambda attend, **options: quick(
        jax.value_and_grad(partial(loss, attend=attend, **options), (0, 1))
    )(case.floats, slopes)
    expected = run(reference.dot_product_attention)
    assert_same(run(dot_product_attention, implementation=implementation), expected)

    def twice(x):  # a rule that is not the derivative of what it belongs to
        return 2 * x

    ruled = jax.custom_jvp(twice)
    ruled.defjvp(lambda primals, tangents: (ruled(*primals), 5 * tangents[0]))
    of = lambda rule: jax.grad(
        lambda a: dot_product_attention(
            **case.floats,
            score_function=lambda logit, b, n, t, s: rule(a) * logit,
            implementation=implementation,
        ).sum()
    )(1.0)
    np.testing.assert_allclose(of(ruled), 2.5 * of(twice), rtol=1e-12)


def test_under_vmap():
    """Arrays that a function closes over may have the axis, and rows are numbered within it."""
    case = case_of(dtype=jnp.float32)
    slopes = jnp.asarray(np.random.default_rng(1).uniform(size=(2, N)), jnp.float32)

    def attend(slopes, query):
        one = lambda b, n, t, s: (s + t + b) % 3 > 0
        floats = case.floats | {"query": query}
        options = {"mask_function": one, "score_function": masks.alibi(slopes)}
        return dot_product_attention(**floats, **options)

    query = jnp.stack([case.floats["query"], 2 * case.floats["query"]])
    loss = lambda slopes, query: jnp.cos(jax.vmap(attend)(slopes, query)).sum()
    apart = lambda slopes, query: sum(
        jnp.cos(attend(*both)).sum() for both in zip(slopes, query, strict=True)
    )
    actual, expected = (quick(jax.grad(f, (0, 1)))(slopes, query) for f in (loss, apart))
    assert_same(actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", SCHEDULES)
def test_exports_for_every_platform(implementation):
    table = jax.ShapeDtypeStruct((32, 2), jnp.float32)
    more = masks.mapped(masks.dilated(2), 600, 600)
    run = partial(with_table, implementation=implementation, more=more)
    gradient = jax.grad(run, (0, 1))
    exported = jax.export.export(jax.jit(gradient), platforms=("cpu", "cuda", "tpu"))
    assert exported(tokens(600), table).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.slow
def test_exports_with_symbolic_sizes():
    scope = jax.export.SymbolicScope()
    shape = jax.export.symbolic_shape("B, T, 2, 8", scope=scope)
    run = jax.grad(lambda x: with_table(x, jnp.ones((32, 2), jnp.float32)))
    program = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 2, 8)), jnp.float32)
    np.testing.assert_allclose(program.call(x), run(x), atol=2e-5)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_on_a_mesh(kind):
    """Rows and heads keep their numbers where they are divided; closed over is what all have."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=jax.devices()[:4])
    case = make_case(dtype=jnp.float32)
    floats = jax.tree.map(lambda x: jnp.concatenate([x, 2 * x])[:4], case.floats)
    slopes = masks.alibi_slopes(N)

    def loss(floats, slopes):
        out = dot_product_attention(
            **floats,
            mask_function=lambda b, n, t, s: (s + n + 2 * b) % 3 > 0,
            score_function=masks.alibi(slopes),
        )
        return jnp.cos(out).sum()

    run = quick(jax.value_and_grad(loss, (0, 1)))
    expected = run(floats, slopes)
    with jax.set_mesh(mesh):
        at = jax.sharding.NamedSharding(mesh, jax.P("data", None, "model"))
        placed = jax.tree.map(lambda x: jax.device_put(x, at), floats)
        actual = run(placed, slopes)
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_in_shard_map(in_blocks, request):
    if in_blocks:
        request.getfixturevalue("small_blocks")
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    case = make_case(dtype=jnp.float32)
    floats = jax.tree.map(lambda x: x[:2], case.floats)

    def attend(floats, slopes):
        return dot_product_attention(
            **floats,
            mask_function=masks.sinks(2) | masks.dilated(2),
            score_function=masks.alibi(slopes),
        )

    rows = jax.P("data")
    there = jax.shard_map(attend, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)
    slopes = masks.alibi_slopes(N)
    gradient = lambda f: quick(jax.grad(lambda *args: jnp.cos(f(*args)).sum(), (0, 1)))
    assert_same(gradient(there)(floats, slopes), gradient(attend)(floats, slopes), 1e-5)


def test_in_16_bits():
    case = case_of(dtype=jnp.bfloat16)
    slopes = masks.alibi_slopes(N).astype(jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (case.floats, slopes))

    def run(implementation, floats, slopes):
        loss = lambda floats, slopes: dot_product_attention(
            **floats,
            mask_function=masks.dilated(2),
            score_function=masks.alibi(slopes),
            implementation=implementation,
        )
        out, pullback = jax.vjp(loss, floats, slopes)
        return out, pullback(jnp.ones_like(out))

    expected = run("dense", *wide)
    for implementation in SCHEDULES:
        actual = run(implementation, case.floats, slopes)
        dtypes = {x.dtype for x in jax.tree.leaves(actual)}
        assert dtypes == {jnp.dtype(jnp.bfloat16)}
        assert_same(actual, expected, 3e-2)


def test_a_module_passes_them_on():
    nnx = pytest.importorskip("flax.nnx")
    attention = rnnattn.nn.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8), jnp.float32)
    expected = attention(x, is_causal=True)
    np.testing.assert_allclose(attention(x, mask_function=masks.causal()), expected, atol=1e-6)
    cache = attention.init_cache(2, 6)
    mask = masks.causal() & (masks.window(1) | masks.sinks(1))
    whole, parts = attention(x, mask_function=mask), []
    for t in range(5):
        y, cache = attention(x[:, t : t + 1], mask_function=mask, cache=cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


# ---- wrong calls ---------------------------------------------------------------------------------

X = jnp.ones((2, 3, 2, 4), jnp.float32)
attend: Any = partial(dot_product_attention, X, X, X)
packed: Any = partial(rnnattn.packed_attention, X[0], X[0], X[0], jnp.array([0, 3]))
WRONG: dict[str, Any] = {
    "dot_product_attention: `mask_function` must be a function or None, got True": lambda: attend(
        mask_function=True
    ),
    "`mask_function` must be a function that gives bool of the shape of its arguments, (), got "
    "int32()": lambda: attend(mask_function=lambda b, n, t, s: s),
    "got bool(3,)": lambda: attend(mask_function=lambda b, n, t, s: jnp.zeros(3, bool)),
    "got a tuple": lambda: attend(mask_function=lambda b, n, t, s: (s > 1, s)),
    "`score_function` must be a function that gives float32 of the shape of its arguments, (), "
    "got int32()": lambda: attend(score_function=lambda logit, b, n, t, s: s),
    "a prefix of one length or of 2, one for each row, got (3,)": lambda: attend(
        mask_function=~masks.prefix(jnp.arange(3)) | masks.causal()
    ),
    "a document of at least 3 queries, of one row or of 2, got (2,)": lambda: attend(
        mask_function=masks.document(jnp.arange(2), jnp.arange(3)) & masks.causal()
    ),
    "a document of 3 keys, of one row or of 2, got (4,)": lambda: attend(
        mask_function=masks.document(jnp.arange(4))
    ),
    "cannot serve a `score_function` that is no bias by distance; 'xla' can": lambda: attend(
        score_function=lambda logit, b, n, t, s: -logit, implementation="native"
    ),
    "cannot serve `mask_function`": lambda: attend(
        mask_function=masks.prefix(2), implementation="tokamax"
    ),
    "packed_attention: `mask_function` must be a function or None, got True": lambda: packed(
        mask_function=True
    ),
    "packed_attention: `mask_function` must be a prefix of one length or of 1": lambda: packed(
        mask_function=masks.prefix(jnp.arange(2))
    ),
    "masks.window: `left` must be an integer of at least 0, or None, got -1": lambda: masks.window(
        -1
    ),
    "masks.window: `right`": lambda: masks.window(right=-1),
    "masks.prefix: `lengths` must be of integers": lambda: masks.prefix(jnp.ones(2)),
    "masks.prefix: `lengths` must be a number or of shape (B,), got (1, 1)": lambda: masks.prefix(
        jnp.ones((1, 1), int)
    ),
    "masks.document: `key_ids` must be of integers": lambda: masks.document(
        jnp.arange(2), jnp.ones(2)
    ),
    "masks.document: `query_ids` must be of shape (S,) or (B, S)": lambda: masks.document(
        jnp.int32(1)
    ),
    "masks.dilated: `step` must be an integer of at least 1": lambda: masks.dilated(0),
    "masks.mapped: `mask` must be a function, got 3": lambda: masks.mapped(cast(Any, 3), 1, 1),
    "masks.mapped: `mask` must be a function that gives a Boolean": lambda: masks.mapped(
        lambda b, n, t, s: s, 1, 1
    ),
    "masks.mapped: `key_length` must be an integer of at least 1": lambda: masks.mapped(
        masks.causal(), 1, 0
    ),
    "masks.mapped: `batch` must be given, as the mask depends on the row": lambda: masks.mapped(
        parity, 1, 1
    ),
    "masks.mapped: `heads` must be an integer of at least 1": lambda: masks.mapped(
        masks.causal(), 1, 1, heads=0
    ),
    "be mapped for 2 rows, 2 heads, 3 queries and 1 blocks of keys, got (3, 1, 1, 1), with 128 "
    "queries in a block": lambda: attend(
        mask_function=masks.causal() & masks.mapped(parity, 3, 3, batch=3)
    ),
    "133 queries and 1 blocks of keys, got (1, 1, 1, 1)": lambda: attend(
        mask_function=masks.mapped(masks.dilated(2), 3, 3), query_offset=130
    ),
    "masks.sinks: `count` must be an integer of at least 0": lambda: masks.sinks(-1),
    "masks.alibi: `slopes` must be of shape (N,)": lambda: masks.alibi(jnp.ones((1, 2))),
    "masks.alibi: `slopes` must be of a floating dtype": lambda: masks.alibi(jnp.arange(2)),
    "masks.alibi_slopes: `heads` must be": lambda: masks.alibi_slopes(0),
    "masks.relative_bias: `table` must be of shape (buckets, N)": lambda: masks.relative_bias(
        jnp.ones(8)
    ),
    "masks.relative_bias: `table` must be of a floating dtype": lambda: masks.relative_bias(
        jnp.ones((8, 1), int)
    ),
    "masks.relative_bias: `table` must be a positive multiple of 4 buckets": lambda: (
        masks.relative_bias(jnp.ones((6, 1)))
    ),
    "masks.relative_bias: `max_distance` must be above 2": lambda: masks.relative_bias(
        jnp.ones((8, 1)), max_distance=2
    ),
}


def _bad_calls():
    return WRONG


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_say_what_is_wrong(message, only_own_checks):
    with pytest.raises(ValueError) as error:
        WRONG[message]()
    assert message in str(error.value)
