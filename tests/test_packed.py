"""Sequences packed behind one another: attention within each, and where they begin."""

import inspect
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rnnattn
from rnnattn import masks, native, packed_attention, reference
from rnnattn.attention import packed_attention_jvp
from rnnattn.precision import accumulator
from tests.attention_cases import (
    Case,
    assert_same,
    first_order,
    forward_mode,
    like,
    quick,
    second_order,
    small_blocks,  # noqa: F401
)

T, S, N, M, K, V = 8, 10, 4, 2, 3, 5
SEQUENCES = 3
examples = partial(settings, deadline=None, derandomize=True)


def make_packed(of_queries, of_keys, seed=0, sizes=(T, S, N, M, K, V), dtype=jnp.float64, **others):
    """Random queries, keys and values of sequences of these lengths; NaN in tokens of none."""
    T, S, N, M, K, V = sizes
    rng = np.random.default_rng(seed)
    draw: Any = lambda *shape: rng.normal(size=shape)
    query, key, value = draw(T, N, K), draw(S, M, K), draw(S, M, V)
    query[sum(of_queries) :] = np.nan
    key[sum(of_keys) :], value[sum(of_keys) :] = np.nan, np.nan
    floats = {"query": query, "key": key, "value": value, "sinks": draw(N), "scale": draw(N)}
    starts = {
        "cu_seqlens_query": np.cumsum([0, *of_queries]),
        "cu_seqlens_key": np.cumsum([0, *of_keys]),
    }
    floats = {name: jnp.asarray(x, dtype) for name, x in floats.items()}
    integers = {name: jnp.asarray(x, jnp.int32) for name, x in (starts | others).items()}
    return Case(floats, integers, {})


def visible(case, *, is_causal=False, local_window_size=(None, None)):
    """(T, S): whether a query may see a key, from what the arguments mean."""
    starts = (case.others[f"cu_seqlens_{name}"].tolist() for name in ("query", "key"))
    of_queries, of_keys = starts
    sees = np.zeros((case.floats["query"].shape[0], case.floats["key"].shape[0]), bool)
    left, right = local_window_size
    for i, (first, past) in enumerate(pairwise(of_queries)):
        first_key, past_key = of_keys[i : i + 2]
        aligned = (past_key - first_key) - (past - first)
        offset = case.others.get("query_offset", np.full(len(of_keys), aligned))
        for t in range(first, past):
            at = t - first + int(offset[i])
            for s in range(first_key, past_key):
                distance = s - first_key - at
                sees[t, s] = (
                    not (is_causal and distance > 0)
                    and (left is None or distance >= -left)
                    and (right is None or distance <= right)
                )
    return jnp.asarray(sees)


def masked(query, key, value, mask, bias=None, **options):
    """The same problem to the oracle: one row, and a mask of all queries and keys."""
    return reference.dot_product_attention(query, key, value, bias, mask, **options)


def without_nan(case, **options):
    others = {"mask": visible(case, **options)}
    return Case(jax.tree.map(jnp.nan_to_num, case.floats), others, {})


def cotangents(case):
    """NaN comes back to the output of queries that belong to nothing; numbers, to the oracle."""
    query, value = case.floats["query"], case.floats["value"]
    shape = (*query.shape[:2], value.shape[-1])
    do, dlse = like(
        (
            jax.ShapeDtypeStruct(shape, value.dtype),
            jax.ShapeDtypeStruct(shape[:2], accumulator(query.dtype)),
        ),
        seed=11,
    )
    end = case.others["cu_seqlens_query"][-1]
    outside = jnp.arange(query.shape[0], dtype=end.dtype)[:, None, None] >= end
    return (jnp.where(outside, jnp.nan, do), dlse), (do, dlse)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"local_window_size": (2, 1), "logits_soft_cap": 1.5},
    "causal": {"is_causal": True, "local_window_size": (4, None), "logits_soft_cap": 2.0},
}
SEEN_BY = ("is_causal", "local_window_size")
lengths = lambda total: (
    st.lists(st.integers(0, total), min_size=SEQUENCES, max_size=SEQUENCES)
    .map(lambda cuts: sorted(min(cut, total) for cut in cuts))
    .map(lambda cuts: [b - a for a, b in zip([0, *cuts[:-1]], cuts, strict=True)])
)
drawn = st.tuples(lengths(T), lengths(S), st.integers(0, 2**16))
offsets = st.lists(st.integers(-T, S), min_size=SEQUENCES, max_size=SEQUENCES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_with_every_other(variant, small_blocks):  # noqa: F811
    """Values, gradients and tangents are those of a mask of all queries and keys."""
    options = VARIANTS[variant]
    of_mask = {name: options[name] for name in options if name in SEEN_BY}
    others = {name: options[name] for name in options if name not in SEEN_BY}
    aligned = variant == "plain"
    expect, expect_tangent = first_order(masked, **others), forward_mode(masked, **others)
    schedules = ("dense", "blockwise")
    runs = [first_order(packed_attention, **options, implementation=i) for i in schedules]
    tangent = forward_mode(packed_attention_jvp, **options, implementation="blockwise")

    @examples(max_examples=10)
    @given(drawn, offsets)
    def check(draw, offset):
        of_queries, of_keys, seed = draw
        placed: Any = {} if aligned else {"query_offset": offset}
        case = make_packed(of_queries, of_keys, seed, **placed)
        truth = without_nan(case, **of_mask)
        given_back, plain = cotangents(case)
        expected = expect(truth.floats, truth.others, plain)
        for run in runs:
            assert_same(run(case.floats, case.others, given_back), expected)
        along = like(case.floats, seed=3)
        expected = expect_tangent(truth.floats, truth.others, along)
        assert_same(tangent(case.floats, case.others, along), expected)

    check()


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_second_derivatives(implementation, small_blocks):  # noqa: F811
    options = {"is_causal": True, "local_window_size": (4, None)}
    case = make_packed([4, 0, 3], [3, 2, 4])
    truth = without_nan(case, **options)
    given_back, plain = cotangents(case)
    run = second_order(packed_attention, **options, implementation=implementation)
    along = like(case.floats, seed=5)
    actual = run(case.floats, case.others, given_back, along)
    assert_same(actual, second_order(masked)(truth.floats, truth.others, plain, along))


def test_one_by_one():
    """The twin, and the function, equal calls for each sequence."""
    case = make_packed([3, 1, 4], [3, 1, 4], sizes=(T, T, N, M, K, V))
    del case.others["cu_seqlens_key"]
    starts = case.others["cu_seqlens_query"].tolist()
    whole = case._replace(floats=jax.tree.map(jnp.nan_to_num, case.floats))
    arrays = {name: whole.floats[name] for name in ("query", "key", "value")}
    parts = [
        reference.dot_product_attention(
            *(x[first:past] for x in arrays.values()), is_causal=True, return_residual=True
        )
        for first, past in pairwise(starts)
    ]
    expected = tuple(jnp.concatenate(x) for x in zip(*parts, strict=True))
    how: dict[str, Any] = {"is_causal": True, "return_residual": True}
    for function in (reference.packed_attention, packed_attention):
        assert_same(quick(partial(function, **how))(**arrays, **case.others), expected)


def a_score(slope, logit, b, n, t, s):
    return logit + slope * jnp.sin((2 * t - s + b).astype(logit.dtype))


def with_slopes(function):
    """`function` with functions of places within a sequence; that of scores has slopes."""

    def call(*, slopes, **arguments):
        score = lambda logit, b, n, t, s: a_score(slopes[n], logit, b, n, t, s)
        return function(**arguments, mask_function=MASK, score_function=score)

    return call


LENGTHS = jnp.array([2, 0, 3])  # of each sequence
IDS = jnp.array([[0, 0, 1, 1, 1], [3] * 5, [1, 1, 1, 2, 2]])
MASK = (
    (masks.causal() | masks.prefix(LENGTHS))
    & masks.window(3)
    & masks.document(IDS)
    & (masks.window(1) | masks.sinks(1))
    & (lambda b, n, t, s: (b + n + t + s) % 3 > 0)
)


def test_functions_of_places_within_a_sequence(small_blocks):  # noqa: F811
    """Of a sequence's number, and of places in it: its last query is at its last key."""
    case = make_packed([3, 0, 4], [4, 2, 3])
    case = case._replace(floats=case.floats | {"slopes": jnp.arange(1.0, N + 1)})
    b, t = jnp.array([0] * 3 + [2] * 5), jnp.array([1, 2, 3, -1, 0, 1, 2, 3])
    s = jnp.array([0, 1, 2, 3, 0, 1, 0, 1, 2, 3])
    axes = b[None, :, None], jnp.arange(N)[:, None, None], t[None, :, None], s[None, None]
    places = [x.astype(jnp.int32) for x in axes]

    def dense(slopes, mask, **arguments):
        bias = a_score(slopes[:, None, None], jnp.float64(0), *places)
        return masked(**arguments, mask=mask[None] & MASK(*places), bias=bias)

    truth = without_nan(case)
    given_back, plain = cotangents(case)
    expected = first_order(dense)(truth.floats, truth.others, plain)
    run = first_order(with_slopes(partial(packed_attention, implementation="blockwise")))
    assert_same(run(case.floats, case.others, given_back), expected)
    twin = with_slopes(reference.packed_attention)
    whole = jax.tree.map(jnp.nan_to_num, case.floats)
    assert_same(first_order(twin)(whole, case.others, plain), expected)


@pytest.mark.skipif(not native.status().available, reason=f"no kernels: {native.status().reason}")
def test_ranges_and_scores_by_distance_run_by_the_kernels():
    case = make_packed([3, 0, 4], [3, 0, 4], sizes=(T, T, N, M, K, V), dtype=jnp.float32)
    del case.others["cu_seqlens_key"]
    case = case._replace(floats=case.floats | {"slopes": jnp.arange(1.0, N + 1, dtype=jnp.float32)})

    def attend(slopes, **arguments):
        shown = (masks.causal() | masks.prefix(LENGTHS)) & (masks.window(1) | masks.sinks(1))
        score = masks.alibi(slopes)
        return packed_attention(**arguments, mask_function=shown, score_function=score)

    given_back, plain = cotangents(case)
    whole = jax.tree.map(jnp.nan_to_num, case.floats)
    expected = first_order(partial(attend, implementation="dense"))(whole, case.others, plain)
    run = first_order(partial(attend, implementation="native"))
    assert_same(run(case.floats, case.others, given_back), expected, 1e-5)


def test_dropout_drops_what_it_says():
    case = make_packed([3, 5], [4, 6])
    floats = {**case.floats, "value": jnp.ones_like(case.floats["value"])}
    key: Any = jax.random.key(1)
    run = partial(packed_attention, dropout_rate=0.5, dropout_key=key)
    out = quick(lambda floats, others: run(**floats, **others))(floats, case.others)
    assert not np.allclose(out, out[:1, :1])


def test_memory_is_linear():
    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((tokens, 1, 8), jnp.float32)
        starts = jax.ShapeDtypeStruct((9,), jnp.int32)
        loss = lambda x, starts: packed_attention(x, x, x, starts, implementation="xla").sum()
        compiled = jax.jit(jax.grad(loss)).lower(x, starts).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(32_768) < 10 * temporaries(4096)


def test_a_second_eager_call_compiles_nothing():
    case = make_packed([3, 5], [4, 6], dtype=jnp.float32)
    call = lambda: packed_attention(**case.floats, **case.others, is_causal=True)
    call()
    compilations: list[str] = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compilations


def test_it_exports_for_gpu_and_tpu():
    case = make_packed([3, 5], [4, 6], dtype=jnp.float32)
    for run, direction in (
        (first_order(packed_attention, is_causal=True), cotangents(case)[1]),
        (forward_mode(packed_attention_jvp, local_window_size=1), case.floats),
    ):
        exported = jax.export.export(jax.jit(inspect.unwrap(run)), platforms=("cpu", "cuda", "tpu"))
        exported(case.floats, case.others, direction)


def test_it_is_mapped_over_batches():
    cases = [
        make_packed(of, of, seed, sizes=(T, T, N, M, K, V))
        for seed, of in enumerate(([3, 5], [1, 2]))
    ]
    trees = [{**case.floats, **case.others} for case in cases]
    run = lambda arrays: packed_attention(**arrays, is_causal=True)
    together = quick(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *trees))
    assert_same(list(together), [quick(run)(tree) for tree in trees])


# ---- where sequences begin --------------------------------------------------------------------


@pytest.mark.parametrize("of_each, more", [([3, 0, 2], 1), ([1], 0)])
def test_lengths_starts_ids_and_positions_are_the_same_in_other_words(of_each, more):
    starts = rnnattn.lengths_to_cu_seqlens(jnp.array(of_each))
    assert starts.tolist() == [sum(of_each[:i]) for i in range(len(of_each) + 1)]
    assert rnnattn.cu_seqlens_to_lengths(starts).tolist() == of_each
    tokens = sum(of_each) + more
    ids = rnnattn.cu_seqlens_to_segment_ids(starts, tokens)
    expected = [i for i, n in enumerate([*of_each, more]) for _ in range(n)]
    assert ids.tolist() == expected
    assert rnnattn.segment_ids_to_cu_seqlens(ids, len(of_each)).tolist() == starts.tolist()
    positions = [t for n in [*of_each, more] for t in range(n)]
    assert rnnattn.packed_positions(starts, tokens).tolist() == positions


def test_tokens_in_front_of_the_first_sequence_belong_to_none():
    starts = jnp.array([2, 5])
    assert rnnattn.cu_seqlens_to_segment_ids(starts, 6).tolist() == [-1, -1, 0, 0, 0, 1]
    assert rnnattn.packed_positions(starts, 6).tolist() == [0, 1, 0, 1, 2, 0]
    x = jnp.ones((6, 1, 2)).at[:2].set(jnp.nan).at[5].set(jnp.nan)
    out = packed_attention(x, x, x, starts)
    np.testing.assert_array_equal(out[:, 0, 0], [0, 0, 1, 1, 1, 0])


# ---- what is refused --------------------------------------------------------------------------


def _bad_calls() -> dict[str, Any]:
    case = make_packed([3, 5], [4, 6])
    attend = inspect.unwrap(packed_attention)
    run = lambda **change: lambda: attend(**{**case.floats, **case.others, **change})
    q, starts = case.floats["query"], case.others["cu_seqlens_query"]
    twin = inspect.unwrap(reference.packed_attention)
    of = lambda name: inspect.unwrap(getattr(rnnattn, name))
    return {
        "packed_attention: `query` must be of shape (T, N, K), got (1, 8, 4, 3)": run(
            query=q[None]
        ),
        "`cu_seqlens_query` must be of shape (sequences + 1,), of one sequence at least, got (1": (
            run(cu_seqlens_query=starts[:1])
        ),
        "`cu_seqlens_query` must be of integers, got float64": run(
            cu_seqlens_query=starts.astype(float)
        ),
        "`cu_seqlens_key` must be of shape (sequences + 1,) as of the queries = (3,), got (2,)": (
            run(cu_seqlens_key=starts[:2])
        ),
        "`query_offset` must be an integer or of shape (sequences,) = (2,), or None, got (3,)": (
            run(query_offset=starts)
        ),
        "`query_offset` must be of integers, got float": run(query_offset=0.5),
        "`implementation` must be None, 'dense', 'blockwise', 'xla', 'native' or 'pallas', "
        "got 'cudnn'": run(implementation="cudnn"),
        "reference.packed_attention: `return_weights` must be left out, got True": lambda: twin(
            **case.floats, **case.others, return_weights=True
        ),
        "lengths_to_cu_seqlens: `lengths` must be of shape (sequences), got ()": lambda: of(
            "lengths_to_cu_seqlens"
        )(1),
        "lengths_to_cu_seqlens: `lengths` must be of integers": lambda: of("lengths_to_cu_seqlens")(
            jnp.ones(2)
        ),
        "segment_ids_to_cu_seqlens: `segment_ids` must be of shape (tokens), got ()": lambda: of(
            "segment_ids_to_cu_seqlens"
        )(1, 1),
        "segment_ids_to_cu_seqlens: `segment_ids` must be of integers": lambda: of(
            "segment_ids_to_cu_seqlens"
        )(jnp.ones(2), 1),
        "segment_ids_to_cu_seqlens: `sequences` must be an integer of at least 1": lambda: of(
            "segment_ids_to_cu_seqlens"
        )(starts, 0),
        "packed_positions: `tokens` must be an integer of at least 0": lambda: of(
            "packed_positions"
        )(starts, -1),
    }


@pytest.mark.parametrize("message", _bad_calls())
def test_what_is_off_is_said(message):
    with pytest.raises(ValueError) as caught:
        _bad_calls()[message]()
    assert message in str(caught.value)


def test_forward_mode_is_refused_with_advice():
    x, starts = jnp.ones((2, 1, 2)), jnp.array([0, 2])
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        jax.jvp(lambda x: packed_attention(x, x, x, starts), (x,), (x,))
    assert "packed_attention_jvp` has forward mode" in " ".join(caught.value.__notes__)
