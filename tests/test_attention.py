"""Attention: its schedules against each other and a loop over rows, and what must hold of any.

The comparison with other implementations is in `test_attention_peers.py`.
"""

import inspect
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from rnnattn import (
    KVCache,
    dot_product_attention,
    reference,
    update_cache,
)
from rnnattn.attention import api, blocks, blockwise, dot_product_attention_jvp, dropout, xla
from rnnattn.attention.problem import Masking, Operands, Options
from tests.attention_cases import (
    Case,
    Sizes,
    assert_gradient,
    assert_same,
    caller,
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

SCHEDULES = ["dense", "blockwise"]
FUNCTIONS = [dot_product_attention, dot_product_attention_jvp]
examples = partial(settings, deadline=None, derandomize=True)


# ---- the truth, one row after another ---------------------------------------------------------


def sees(case):
    """(B, N, T, S): whether a query may see a key, from what the arguments mean."""
    (B, T, N, _), S = case.floats["query"].shape, case.floats["key"].shape[1]
    given = {name: np.asarray(x) for name, x in case.others.items() if name != "dropout_key"}
    window = case.options.get("local_window_size")
    left, right = window if isinstance(window, tuple) else (window, window)
    offset = np.broadcast_to(given.get("query_offset", case.options.get("query_offset", 0)), B)
    result = np.broadcast_to(given.get("mask", True), (B, N, T, S)).copy()
    for b in range(B):
        for t in range(T):
            for s in range(S):
                ahead = s - (t + offset[b])
                result[b, :, t, s] &= (
                    not (case.options.get("is_causal") and ahead > 0)
                    and (left is None or ahead >= -left)
                    and (right is None or ahead <= right)
                    and ("query_seq_lengths" not in given or t < given["query_seq_lengths"][b])
                    and (
                        "key_value_seq_lengths" not in given
                        or s < given["key_value_seq_lengths"][b]
                    )
                    and (
                        "query_segment_ids" not in given
                        or given["query_segment_ids"][b, t] == given["key_value_segment_ids"][b, s]
                    )
                )
    return result


def by_rows(case, factors=None):
    """O, L and the weights in NumPy; `factors` is what dropout multiplies the weights by."""
    q, k, v = (np.asarray(case.floats[name]) for name in ("query", "key", "value"))
    (B, T, N, K), (S, M), V = q.shape, k.shape[1:3], v.shape[-1]
    full = lambda name, default, shape: np.broadcast_to(case.floats.get(name, default), shape)
    bias, scale = full("bias", 0.0, (B, N, T, S)), full("scale", K**-0.5, (N,))
    sinks, cap = full("sinks", -np.inf, (N,)), case.options.get("logits_soft_cap")
    visible, factors = sees(case), np.ones((B, N, T, S)) if factors is None else factors
    out, lse, weights = np.zeros((B, T, N, V)), np.zeros((B, T, N)), np.zeros((B, N, T, S))
    for b, n, t in np.ndindex(B, N, T):
        seen, m = visible[b, n, t], n // (N // M)
        s = scale[n] * (k[b, seen, m] @ q[b, t, n])
        s = cap * np.tanh(s / cap) if cap else s
        s = s + bias[b, n, t, seen]
        lse[b, t, n] = np.logaddexp.reduce([*s, sinks[n]])
        p = np.exp(s - lse[b, t, n]) if np.isfinite(lse[b, t, n]) else np.zeros_like(s)
        weights[b, n, t, seen] = p * factors[b, n, t, seen]
        out[b, t, n] = weights[b, n, t, seen] @ v[b, seen, m]
    return out, lse, weights


def kept(case):
    """What dropout multiplies the weights by, read off the weights that are returned."""
    rate = case.options["dropout_rate"]
    weights = outputs(case, dot_product_attention, return_weights=True)[2]
    return np.where(np.asarray(weights) > 0, 1 / (1 - rate), 0)


# ---- every feature with every other -----------------------------------------------------------

B, T, S, N, M, K, V = Sizes()

# What is fixed when a function is traced, and the shapes of what broadcasts. All other arguments
# are there in each of them, and what they hold is drawn.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"bias": (B, N, T, S), "mask": (B, 1, T, S), "scale": ()},
    "window": {
        "local_window_size": (2, 1),
        "logits_soft_cap": 1.5,
        "bias": (1, N, 1, S),
        "mask": (T, S),
        "scale": (N,),
    },
    "causal": {
        "is_causal": True,
        "local_window_size": (5, None),
        "logits_soft_cap": 2.0,
        "bias": (B, 1, T, 1),
        "mask": (B, N, T, S),
        "scale": (N,),
    },
    "dropout": {"dropout_rate": 0.3, "bias": (T, S), "mask": (N, 1, S), "scale": ()},
}

TWICE = ["window", "causal"]  # differentiated twice

lengths = lambda size: st.lists(st.integers(0, size), min_size=B, max_size=B)
drawn = st.fixed_dictionaries(
    {
        "query_seq_lengths": lengths(T),
        "key_value_seq_lengths": lengths(S),
        "query_offset": st.lists(st.integers(-T, S), min_size=B, max_size=B),
        "segments": st.integers(1, 3),
        "sorted": st.booleans(),
        "density": st.sampled_from([0.0, 0.4, 0.9, 1.0]),
        "infinite": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def _filled(variant, draw):
    """The case of a variant whose arrays hold what was drawn."""
    rng = np.random.default_rng(draw["seed"])
    case = make_case(**VARIANTS[variant], sinks=True, seed=draw["seed"])
    names = ("query_seq_lengths", "key_value_seq_lengths", "query_offset")
    others = {name: jnp.asarray(draw[name], jnp.int32) for name in names}
    for name, size in (("query_segment_ids", T), ("key_value_segment_ids", S)):
        ids = rng.integers(0, draw["segments"], (B, size))
        others[name] = jnp.asarray(np.sort(ids) if draw["sorted"] else ids, jnp.int32)
    others["mask"] = jnp.asarray(rng.random(case.others["mask"].shape) < draw["density"])
    if "dropout_rate" in case.options:
        others["dropout_key"] = jax.random.key(draw["seed"])
    floats = dict(case.floats)
    if draw["infinite"]:
        bias = floats["bias"]
        floats["bias"] = jnp.where(rng.random(bias.shape) < 0.3, -jnp.inf, bias)
        floats["sinks"] = floats["sinks"].at[1].set(-jnp.inf)
    return Case(floats, others, case.options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_feature_with_every_other(variant, small_blocks):  # noqa: F811
    """Dense and blockwise, in either mode, equal the reference, and that the loop over rows."""
    options = make_case(**VARIANTS[variant]).options
    expect = first_order(reference.dot_product_attention, **options)
    reverse = [first_order(dot_product_attention, **options, implementation=i) for i in SCHEDULES]
    blocks = {**options, "implementation": "blockwise"}
    if variant not in TWICE:  # there the twin's gradient is compared with its derivatives
        reverse.append(first_order(dot_product_attention_jvp, **blocks))
    expect_tangent = forward_mode(reference.dot_product_attention, **options)
    tangent = forward_mode(dot_product_attention_jvp, **blocks)

    @examples(max_examples=10)
    @given(drawn)
    def check(draw):
        case = _filled(variant, draw)
        arguments = (case.floats, case.others)
        expected = expect(*arguments, cotangents_for(case))
        for run in reverse:
            assert_same(run(*arguments, cotangents_for(case)), expected, 1e-11)
        along = like(case.floats, seed=3)
        assert_same(tangent(*arguments, along), expect_tangent(*arguments, along))
        factors = kept(case) if "dropout_rate" in case.options else None
        assert_same(expected[0], by_rows(case, factors)[:2])

    check()


@pytest.mark.slow
@pytest.mark.parametrize("variant", TWICE)
def test_second_derivatives_of_every_feature(variant, small_blocks):  # noqa: F811
    options = make_case(**VARIANTS[variant]).options
    expect = second_order(reference.dot_product_attention, **options)
    runs = [second_order(f, **options, implementation="blockwise") for f in FUNCTIONS]
    if variant == "causal":
        runs.append(second_order(dot_product_attention, **options, implementation="dense"))

    @examples(max_examples=4)
    @given(drawn)
    def check(draw):
        case = _filled(variant, draw)
        arguments = (case.floats, case.others, cotangents_for(case), like(case.floats, seed=5))
        expected = expect(*arguments)
        for run in runs:
            assert_same(run(*arguments), expected, 1e-11)

    check()


flags = st.fixed_dictionaries(
    {
        "T": st.sampled_from([1, 3, 4, 5]),  # queries with G = 1 come in blocks of 4
        "S": st.sampled_from([1, 3, 4, 5, 9]),
        "heads": st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
        "batch": st.sampled_from([1, 2]),
        "window": st.sampled_from([None, 0, 1, (0, 2), (1, None), (None, 0)]),
        "is_causal": st.booleans(),
        "offset": st.sampled_from([None, 0, 3, -1, "rows"]),
        "lengths": st.sampled_from(["", "queries", "keys", "both"]),
        "mask": st.none() | st.tuples(*[st.booleans()] * 4),
        "bias": st.none() | st.tuples(*[st.booleans()] * 4),
        "axes": st.integers(1, 4),
        "cap": st.sampled_from([None, 0.7]),
        "sinks": st.booleans(),
        "segments": st.booleans(),
        "scale": st.sampled_from([None, "number", (), "heads"]),
    }
)


def _flagged(f):
    """A case that has the features of some flags and no others."""
    n, m = f["heads"]
    sizes = Sizes(f["batch"], f["T"], f["S"], n, m, 2, 3)
    rng, logits = np.random.default_rng(1), (sizes.B, n, sizes.T, sizes.S)
    rest: dict[str, Any] = {"is_causal": f["is_causal"], "local_window_size": f["window"]}
    rest["logits_soft_cap"] = f["cap"]
    integers = lambda *shape, most: jnp.asarray(rng.integers(0, most + 1, shape), jnp.int32)
    if f["lengths"] in ("queries", "both"):
        rest["query_seq_lengths"] = integers(sizes.B, most=sizes.T)
    if f["lengths"] in ("keys", "both"):
        rest["key_value_seq_lengths"] = integers(sizes.B, most=sizes.S)
    if f["offset"] is not None:
        rows = integers(sizes.B, most=4) - 2
        rest["query_offset"] = rows if f["offset"] == "rows" else f["offset"]
    if f["segments"]:
        rest["query_segment_ids"] = integers(sizes.B, sizes.T, most=1)
        rest["key_value_segment_ids"] = integers(sizes.B, sizes.S, most=1)
    if f["scale"] == "number":
        rest["scale"] = -0.4
    scale = {"heads": (n,), (): ()}.get(f["scale"])
    shape = lambda full: (
        full and tuple(size if whole else 1 for size, whole in zip(logits, full, strict=True))
    )
    bias = shape(f["bias"])
    case = make_case(
        sizes,
        bias=bias and bias[-f["axes"] :],
        mask=shape(f["mask"]),
        sinks=f["sinks"],
        **({"scale": scale} if scale is not None else {}),
        **{k: v for k, v in rest.items() if k != "scale"},
    )
    return case._replace(options=case.options | ({"scale": -0.4} if "scale" in rest else {}))


@pytest.mark.slow
def test_every_feature_present_or_absent(small_blocks):  # noqa: F811
    """Axes of one, of a block and a little more or less; the two schedules and the loop."""

    @examples(max_examples=7)
    @given(flags)
    def check(f):
        case = _flagged(f)
        expected = value_and_gradients(case, reference.dot_product_attention)
        scaled = case
        if "scale" in case.options:
            scaled = case._replace(floats=case.floats | {"scale": jnp.asarray(-0.4)})
        assert_same(expected[0], by_rows(scaled)[:2])
        blocks = {"implementation": "blockwise"}
        assert_same(value_and_gradients(case, dot_product_attention, **blocks), expected)
        run = forward_mode(dot_product_attention_jvp, **case.options, **blocks)
        plain = forward_mode(reference.dot_product_attention, **case.options)
        along = like(case.floats, seed=3)
        arguments = (case.floats, case.others, along)
        assert_same(run(*arguments), plain(*arguments))

    check()


EVERYTHING = make_case(
    Sizes(2, 3, 4, 4, 2, 2, 3),
    bias=(1, 4, 1, 4),
    mask=(2, 1, 3, 4),
    scale=(4,),
    sinks=True,
    logits_soft_cap=2.0,
    query_seq_lengths=jnp.array([3, 2]),
    query_offset=jnp.array([1, 0]),
    local_window_size=(2, 2),
)


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_gradients_match_finite_differences(implementation, small_blocks):  # noqa: F811
    """And no argument's gradient is zero, from a cotangent of L alone either."""
    call = caller(dot_product_attention, **EVERYTHING.options, implementation=implementation)

    def losses(floats):
        out, lse = call(floats, EVERYTHING.others)
        return jnp.sum(out**2), jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) ** 2)

    for n in (0, 1):
        loss = lambda floats, n=n: losses(floats)[n]
        gradient = assert_gradient(loss, EVERYTHING.floats)
        for name, d in gradient.items():
            assert (n == 1 and name == "value") != bool(np.any(d)), name


@pytest.mark.slow
@pytest.mark.parametrize("implementation", SCHEDULES)
def test_third_order(implementation, small_blocks):  # noqa: F811
    case = make_case(Sizes(1, 3, 5, 2, 1, 2, 2), is_causal=True, query_offset=1)

    def third(function, **options):
        def loss(x):
            floats = case.floats | {
                "query": case.floats["query"] * x,
                "key": case.floats["key"] * x,
            }
            out, lse = caller(function, **case.options, **options)(floats, {})
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

        return quick(jax.jacfwd(jax.grad(jax.grad(loss))))(0.7)

    expected = third(reference.dot_product_attention)
    assert_same(third(dot_product_attention, implementation=implementation), expected, 1e-11)


def test_the_twin_serves_every_forward_mode(small_blocks):  # noqa: F811
    case = make_case(Sizes(1, 3, 5, 2, 1, 2, 2), is_causal=True, query_offset=2)
    floats, along = case.floats, like(case.floats, seed=2)

    def modes(function, **options):
        call = lambda floats: caller(function, **case.options, **options)(floats, {})

        def run(floats, along):
            _, tangent = jax.jvp(call, (floats,), (along,))
            _, linear = jax.linearize(call, floats)
            return tangent, linear(along), jax.jacfwd(call)(floats), jax.jacrev(call)(floats)

        return quick(run)(floats, along)

    expected = modes(reference.dot_product_attention)
    assert_same(modes(dot_product_attention_jvp, implementation="blockwise"), expected)
    assert_same(expected[0], expected[1])
    assert_same(expected[2], expected[3])


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_forward_mode_of_the_default_is_an_error(implementation):
    call = lambda q: dot_product_attention(q, q, q, implementation=implementation)
    q = jnp.ones((1, 2, 1, 3))
    with pytest.raises(TypeError) as caught:
        jax.jvp(call, (q,), (q,))
    message = "can't apply forward-mode autodiff (jvp) to a custom_vjp function"
    assert message in str(caught.value)
    assert message in " ".join((dot_product_attention.__doc__ or "").split())
    instead = "`rnnattn.attention.dot_product_attention_jvp` has forward mode"
    assert instead in " ".join(caught.value.__notes__)  # beside a note of JAX's own


# ---- rows that see nothing, and axes of none --------------------------------------------------


@pytest.mark.parametrize("implementation", SCHEDULES)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_that_sees_nothing(implementation, sinks, small_blocks):  # noqa: F811
    """Zeros; L is −∞ or the sink; only the sink gets a gradient, and that from L."""
    length = jnp.array([0, 3])
    case = make_case(Sizes(2, 3, 5), sinks=sinks, key_value_seq_lengths=length)
    (out, lse), gradient = value_and_gradients(
        case, dot_product_attention, implementation=implementation
    )
    assert not np.any(out[0])
    expected = case.floats["sinks"][None] if sinks else -np.inf
    np.testing.assert_array_equal(lse[0], np.broadcast_to(expected, lse[0].shape))
    for name in ("query", "key", "value"):
        assert not np.any(gradient[name][0]) and np.any(gradient[name][1])


EMPTY = [dict(T=0), dict(S=0), dict(B=0), dict(V=0), dict(N=0)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_axes_may_be_empty(function, empty):
    case = make_case(Sizes(**{**dict(B=2, T=3, S=4, N=2, M=1, K=2, V=3), **empty}), bias=())
    (out, lse), gradient = value_and_gradients(case, function, implementation="blockwise")
    assert out.shape == (*case.floats["query"].shape[:3], case.floats["value"].shape[-1])
    assert lse.shape == out.shape[:3]
    assert all(np.isfinite(d).all() for d in gradient.values())
    if "S" in empty:
        assert not out.any() and np.all(np.isneginf(lse))


def test_without_a_batch_axis():
    whole = make_case(
        Sizes(1, 5, 6),
        bias=(1, 4, 5, 6),
        mask=(1, 1, 5, 6),
        query_seq_lengths=jnp.array([4]),
        key_value_seq_lengths=jnp.array([6]),
        query_offset=jnp.array([1]),
        query_segment_ids=jnp.array([[0, 0, 1, 1, 1]]),
        key_value_segment_ids=jnp.array([[0, 0, 0, 1, 1, 1]]),
        is_causal=True,
    )
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    arguments: dict[str, Any] = {**whole.floats, **whole.others, **whole.options}
    wanted: dict[str, Any] = {"return_residual": True, "return_weights": True}
    of_one: dict[str, Any] = {
        name: x[0] if isinstance(x, jax.Array) else x for name, x in arguments.items()
    }
    one = dot_product_attention(**of_one, **wanted)
    assert_same(one, first(dot_product_attention(**arguments, **wanted)))
    # A shared bias or mask without a batch axis leaves the batch out, not the heads.
    shared = dot_product_attention(
        **{**arguments, "bias": whole.floats["bias"][0], "mask": whole.others["mask"][0]}
    )
    assert_same(shared, dot_product_attention(**arguments))


# ---- who reaches whom -------------------------------------------------------------------------

REACH: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "causal with an offset": {"is_causal": True, "query_offset": jnp.array([4])},
    "window": {"local_window_size": (2, 1), "query_offset": jnp.array([1])},
    "segments": {
        "query_segment_ids": jnp.array([[0, 0, 1, 1, 2, 7, 2]]),
        "key_value_segment_ids": jnp.array([[0, 0, 0, 1, 1, 2, 2, 5, 0, 1]]),
    },
    "lengths": {
        "is_causal": True,
        "query_seq_lengths": jnp.array([5]),
        "key_value_seq_lengths": jnp.array([3]),
    },
}


@pytest.mark.parametrize("implementation", SCHEDULES)
@pytest.mark.parametrize("name", REACH)
def test_a_query_reaches_what_it_sees_and_nothing_else(name, implementation, small_blocks):  # noqa: F811
    """∂(O_t, L_t)/∂(k_s, v_s) is zero exactly where t may not see s; ∂O_t/∂q_u where t ≠ u."""
    case = make_case(Sizes(1), **REACH[name])

    def rows(floats):
        out, lse = caller(dot_product_attention, **case.options, implementation=implementation)(
            floats, case.others
        )
        return out[0].sum((1, 2)) + jnp.where(lse == -jnp.inf, 0, lse)[0].sum(-1)

    jacobian = quick(jax.jacrev(rows))(case.floats)
    touched = {n: np.any(np.asarray(d) != 0, axis=(1, 3, 4)) for n, d in jacobian.items()}
    visible = sees(case)[0, 0]
    np.testing.assert_array_equal(touched["key"], visible)
    np.testing.assert_array_equal(touched["value"], visible)
    np.testing.assert_array_equal(touched["query"], np.diag(visible.any(1)))


POISONS = [jnp.nan, jnp.inf]
UNSEEN: dict[str, dict[str, Any]] = {
    "lengths": {
        "query_seq_lengths": jnp.array([7, 4, 0]),
        "key_value_seq_lengths": jnp.array([9, 0, 3]),
    },
    "mask": {"mask": jnp.asarray(np.arange(S) % 4 != np.array([[1], [2], [3]]))[:, None, None]},
    "causal": {"is_causal": True, "query_offset": jnp.array([0, 2, -9])},
    "segments": {
        "local_window_size": (4, 4),
        "query_segment_ids": jnp.broadcast_to(jnp.array([0, 0, 2, 2, 4, 4, 4]), (B, T)),
        "key_value_segment_ids": jnp.broadcast_to(
            jnp.array([0, 1, 2, 3, 4, 4, 3, 2, 1, 0]), (B, S)
        ),
    },
    "all": {
        "is_causal": True,
        "mask": jnp.asarray(np.arange(S) % 4 != 2)[None],
        "key_value_seq_lengths": jnp.array([6, 9, 2]),
        "query_segment_ids": jnp.broadcast_to(jnp.array([0, 0, 0, 0, 1, 1, 1]), (B, T)),
        "key_value_segment_ids": jnp.broadcast_to(
            jnp.array([0, 0, 2, 0, 0, 1, 1, 1, 1, 0]), (B, S)
        ),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSEEN)
def test_what_nobody_sees_may_be_nan_or_infinite(name, small_blocks):  # noqa: F811
    """Past lengths, masked for all, out of reach: to the last bit as if it were zero there."""
    arrays = {n: x for n, x in UNSEEN[name].items() if n != "mask"}
    case = make_case(bias=(B, N, T, S), logits_soft_cap=3.0, **arrays)
    if "mask" in UNSEEN[name]:
        case = case._replace(others=case.others | {"mask": UNSEEN[name]["mask"]})
    visible = sees(case)
    keys = visible.any((1, 2))  # the same for all heads
    queries = np.ones((B, T), bool)
    if "query_seq_lengths" in case.others:
        queries = np.arange(T) < np.asarray(case.others["query_seq_lengths"])[:, None]
    assert not keys.all()

    def filled(poison):
        put = lambda x, where: jnp.where(where, x, poison)
        return case._replace(
            floats={
                "query": put(case.floats["query"], queries[:, :, None, None]),
                "key": put(case.floats["key"], keys[:, :, None, None]),
                "value": put(case.floats["value"], keys[:, :, None, None]),
                "bias": put(case.floats["bias"], visible),
            }
        )

    cotangents, along = cotangents_for(case), like(case.floats, seed=3)
    for implementation in SCHEDULES:
        options = {**case.options, "implementation": implementation}
        for run, direction in (
            (first_order(dot_product_attention, **options), cotangents),
            (forward_mode(dot_product_attention_jvp, **options), along),
        )[: 2 if implementation == "blockwise" else 1]:
            clean = run(filled(0.0).floats, case.others, direction)
            assert_same(clean, clean)  # finite, but for L
            for poison in POISONS:
                assert_same(run(filled(poison).floats, case.others, direction), clean, 0)


# ---- dropout ----------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_keeps_the_mean():
    case = make_case(
        Sizes(2, 150, 140, 2, 1, 2, 2), dropout_rate=0.25, dropout_key=jax.random.key(1)
    )
    factors = kept(case)
    np.testing.assert_allclose(np.mean(factors == 0), 0.25, atol=0.01)  # 6 standard errors
    np.testing.assert_allclose(np.mean(factors), 1, atol=0.01)
    heads = factors.reshape(4, 150, 140)
    for axis in range(1, 3):  # neither heads nor rows nor columns nor tiles are alike
        distinct = np.unique(heads, axis=axis).shape[axis]
        assert distinct == heads.shape[axis] and not np.all(heads == np.flip(heads, axis))
    assert all(np.mean(heads[0] != head) > 0.3 for head in heads[1:])
    assert np.mean(heads[:, :12, :12] != heads[:, 128:140, 128:140]) > 0.3
    other = case._replace(others={"dropout_key": jax.random.key(2)})
    assert np.mean(factors != kept(other)) > 0.3
    np.testing.assert_array_equal(factors, kept(case))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_schedule_drops_the_same_weights(impl, small_blocks, monkeypatch):  # noqa: F811
    """Blocks that begin within a tile or reach over several; keys whose bits `vmap` changes too."""
    monkeypatch.setattr(dropout, "_TILE", 8)
    monkeypatch.setattr(blockwise, "FORWARD_BLOCK", (7, 10))
    monkeypatch.setattr(blockwise, "BACKWARD_BLOCK", (5, 6))
    monkeypatch.setattr(blockwise, "_TANGENT_LOGITS", 200)
    cast(Any, api._run_attention).clear_cache()
    sizes = Sizes(1, 11, 21, 2, 2, 2, 3)
    key = jax.random.key(0, impl=impl)
    case = make_case(sizes, dropout_rate=0.5, dropout_key=key)
    expected = value_and_gradients(case, dot_product_attention, implementation="dense")
    assert_same(expected[0], by_rows(case, kept(case))[:2])
    for function in FUNCTIONS if impl == "rbg" else FUNCTIONS[:1]:
        actual = value_and_gradients(case, function, implementation="blockwise")
        assert_same(actual, expected)


def test_a_raw_key_is_a_key():
    case = make_case(dropout_rate=0.5)
    attend = quick(partial(inspect.unwrap(dot_product_attention), **case.options))
    raw = attend(**case.floats, dropout_key=jax.random.PRNGKey(3))
    typed = attend(**case.floats, dropout_key=jax.random.key(3))
    np.testing.assert_array_equal(raw, typed)


def test_weights_are_those_applied_and_have_a_gradient():
    case = make_case(dropout_rate=0.3, dropout_key=jax.random.key(0), mask=(B, N, T, S), sinks=True)

    def loss(function, floats):
        out, lse, weights = function(
            **floats, **case.others, **case.options, return_residual=True, return_weights=True
        )
        cubes = jnp.sum(weights**3) + jnp.sum(out**3)
        return cubes + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) ** 2)

    results = outputs(case, dot_product_attention, return_weights=True)
    assert_same(results, by_rows(case, kept(case)))
    assert_gradient(partial(loss, dot_product_attention), case.floats)


# ---- which schedule, and what it skips --------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """The schedules that run from now on, in order."""
    names: list[str] = []
    for name in ("DENSE", "BLOCKWISE"):
        schedule = getattr(xla, name)

        def forward(*args, name=name, schedule=schedule):
            names.append(name.lower())
            return schedule.forward(*args)

        monkeypatch.setattr(xla, name, schedule._replace(forward=forward))
    return names


def test_the_schedule_is_chosen_by_the_size_of_a_head(ran):
    def of(t, s, **options):
        ran.clear()
        q, k = jnp.ones((1, t, 1, 2)), jnp.ones((1, s, 1, 2))
        jax.eval_shape(lambda: dot_product_attention(q, k, k, **options))
        return ran

    assert of(256, 255) == ["dense"]
    assert of(256, 256) == ["blockwise"]
    assert of(1, 2**16 - 1) == ["dense"]
    assert of(1, 2**16, implementation="xla") == ["blockwise"]
    assert of(2**16, 1, implementation="dense") == ["dense"]
    assert of(3, 4, implementation="blockwise") == ["blockwise"]
    assert of(3, 4, implementation="xla") == ["dense"]
    assert of(0, 4, implementation="blockwise") == ["dense"]
    assert xla.DENSE_LOGITS == 2**16  # as the docstring says
    shape = jax.eval_shape(
        partial(dot_product_attention, return_weights=True), *[jnp.ones((1, 256, 1, 2))] * 3
    )[1]
    assert shape.shape == (1, 1, 256, 256) and ran == ["dense"]


def test_blockwise_loops_and_dense_does_not():
    q = jnp.ones((1, 600, 1, 2))
    for implementation, loops in (("dense", False), ("blockwise", True)):
        f = jax.grad(
            lambda q, i=implementation: dot_product_attention(q, q, q, implementation=i).sum()
        )
        assert ("while" in str(jax.make_jaxpr(f)(q))) == loops


def _hull(needed):
    """[first, past) of the blocks of keys that some query of a block needs."""
    (found,) = np.nonzero(needed)
    return (found[0], found[-1] + 1) if len(found) else None


VISITS: dict[str, tuple[Options, dict[str, Any]]] = {
    "causal": (Options(is_causal=True), {}),
    "causal with offsets": (Options(is_causal=True), {"offset": [4, 1]}),
    "causal, no key": (Options(is_causal=True), {"offset": [-30, -40]}),
    "window": (Options(window=(3, 2)), {"offset": [1, 2]}),
    "left": (Options(window=(4, None), is_causal=True), {}),
    "right": (Options(window=(None, 1)), {}),
    "keys": (Options(), {"key_lengths": [3, 9]}),
    "no keys": (Options(), {"key_lengths": [0, 0]}),
    "queries": (Options(is_causal=True), {"query_lengths": [5, 10]}),
    "segments": (
        Options(),
        {
            "query_segments": np.sort(np.arange(2 * 21).reshape(2, 21) % 5),
            "key_segments": np.sort(np.arange(2 * 26).reshape(2, 26) % 5),
        },
    ),
    "segments apart": (
        Options(is_causal=True),
        {"query_segments": np.zeros((2, 21), int), "key_segments": np.ones((2, 26), int)},
    ),
}


@pytest.mark.parametrize("name", VISITS)
def test_blocks_nobody_needs_are_not_visited(name):
    """The blocks of keys that are visited are those from the first that is needed to the last."""
    options, arrays = VISITS[name]
    (rows, columns), (t, s) = (4, 5), (21, 26)
    grid = blocks.Grid(blocks.in_blocks(t, rows), blocks.in_blocks(s, columns))
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in ({"offset": [0]} | arrays).items()}
    masking = Masking(**arrays)
    visits = blocks.blocks_to_visit(options, grid, masking)
    first, past = map(np.asarray, quick(jax.vmap(visits))(grid.blocks())[:2])

    names = {
        "offset": "query_offset",
        "query_lengths": "query_seq_lengths",
        "key_lengths": "key_value_seq_lengths",
        "query_segments": "query_segment_ids",
        "key_segments": "key_value_segment_ids",
    }
    case = make_case(
        Sizes(2, t, s, 1, 1),
        is_causal=options.is_causal,
        local_window_size=options.window,
        **{names[name]: x for name, x in arrays.items()},
    )
    visible = sees(case).any((0, 1))
    skipped = 0
    for i in range(grid.queries.count):
        in_rows = visible[np.asarray(grid.queries.indices(i))]
        edges = range(0, s, grid.keys.block)
        needed = [bool(in_rows[:, a : a + grid.keys.block].any()) for a in edges]
        assert _hull(needed) == ((first[i], past[i]) if past[i] > first[i] else None)
        skipped += grid.keys.count - (past[i] - first[i])
    assert skipped > 0


def test_a_band_costs_its_width():
    """Blocks visited at T 65,536: a window's grow with T, all pairs' with its square."""
    size = 2**16
    query: Any = jax.ShapeDtypeStruct((1, 1, 1, size, 64), jnp.float32)
    key: Any = jax.ShapeDtypeStruct((1, 1, size, 64), jnp.float32)
    operands = Operands(query, key, key, jnp.ones((1, 1, 1, 1, 1), jnp.float32))
    grid = blockwise._grid(operands, blockwise.FORWARD_BLOCK)

    def visited(options):
        visits = blocks.blocks_to_visit(options, grid, Masking(jnp.zeros(1, jnp.int32)))
        first, past, _ = quick(jax.vmap(visits))(grid.blocks())
        return int(jnp.sum(past - first))

    n = grid.queries.count
    assert visited(Options()) == n * grid.keys.count
    assert visited(Options(is_causal=True)) == n * (n + 1) // 2
    assert visited(Options(window=(256, 0))) <= 2 * n


# ---- memory -----------------------------------------------------------------------------------


def _compiled(transform, size, implementation="blockwise", **options):
    """The compiled gradient or other at B 1, N 4, K 64 in float32, from shapes alone."""
    x = jax.ShapeDtypeStruct((1, size, 4, 64), jnp.float32)
    options = {"is_causal": True, "implementation": implementation, **options}
    loss = lambda function, *args: jnp.sum(function(*args, **options) ** 2)
    return quick(transform(loss)).lower(x, x, x).compile()


def _gradient(loss):
    return jax.grad(partial(loss, dot_product_attention), (0, 1, 2))


def _temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def _largest(compiled):
    """The most numbers in any array of a compiled program."""
    import re

    sizes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in size.split(",")])) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False])
def test_memory_of_the_gradient_is_linear(is_causal):
    small, large = (_compiled(_gradient, size, is_causal=is_causal) for size in (4096, 65_536))
    assert _temporaries(small) <= 48
    assert _temporaries(large) <= 16 * _temporaries(small)
    assert _largest(small) <= 4096 * 4 * 64 < 4096**2
    assert _largest(large) <= 65_536 * 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_memory_of_a_hessian_vector_product(function, mode):
    def product(loss):
        gradient = jax.grad(partial(loss, function), (0, 1, 2))

        def run(*args):
            if mode == "forward over reverse":
                return jax.jvp(gradient, args, args)[1]
            return jax.vjp(gradient, *args)[1](args)

        return run

    assert _temporaries(_compiled(product, 2048)) <= 90


# ---- precision --------------------------------------------------------------------------------


def test_float64_is_float64():
    case = make_case(Sizes(1, 20, 300, 2, 1, 8, 8))
    for implementation in SCHEDULES:
        actual = outputs(case, dot_product_attention, implementation=implementation)
        assert_same(actual, by_rows(case)[:2], 1e-14)


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_large_logits_do_not_overflow(implementation, small_blocks):  # noqa: F811
    case = make_case(scale=())
    case = case._replace(floats=case.floats | {"scale": jnp.asarray(1e4)})
    expected = by_rows(case)[:2]
    assert np.abs(expected[1]).max() > 1e4
    assert_same(outputs(case, dot_product_attention, implementation=implementation), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", SCHEDULES)
def test_outputs_and_gradients_keep_their_dtypes(dtype, implementation):
    case = make_case(bias=(T, S), sinks=True, scale=(N,), dtype=dtype)
    wide = {"bias": jnp.float32, "sinks": jnp.float64, "scale": jnp.float32}
    floats = {name: x.astype(wide.get(name, dtype)) for name, x in case.floats.items()}
    for function in FUNCTIONS:
        run = first_order(function, implementation=implementation)
        (out, lse), gradient = jax.eval_shape(run, floats, {}, cotangents_for(case))
        assert out.dtype == dtype and lse.dtype == jnp.float32
        assert {n: d.dtype for n, d in gradient.items()} == {n: x.dtype for n, x in floats.items()}


# ---- what must hold of any attention ----------------------------------------------------------


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_two_halves_of_the_keys_combine_by_their_log_sum_exp(implementation):
    case = make_case()
    attend = partial(outputs, function=dot_product_attention, implementation=implementation)
    halves = []
    for half in (slice(0, 6), slice(6, None)):
        floats = case.floats | {n: case.floats[n][:, half] for n in ("key", "value")}
        halves.append(attend(case._replace(floats=floats)))
    lse = np.logaddexp(halves[0][1], halves[1][1])
    out = sum(np.asarray(o) * np.exp(part - lse)[..., None] for o, part in halves)
    assert_same((out, lse), attend(case))


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_the_order_of_the_keys_does_not_matter(implementation, small_blocks):  # noqa: F811
    case = make_case(mask=(B, N, T, S), bias=(1, 1, T, S))
    order = np.random.default_rng(0).permutation(S)
    moved = {n: case.floats[n][:, order] for n in ("key", "value")}
    moved["bias"] = case.floats["bias"][..., order]
    permuted = case._replace(
        floats=case.floats | moved, others={"mask": case.others["mask"][..., order]}
    )
    attend = partial(outputs, function=dot_product_attention, implementation=implementation)
    assert_same(attend(permuted), attend(case))


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_groups_equal_repeated_heads(implementation, small_blocks):  # noqa: F811
    grouped = make_case()
    repeat = lambda x: jnp.repeat(x, N // M, axis=2)
    wide = {n: repeat(grouped.floats[n]) for n in ("key", "value")}
    single = grouped._replace(floats=grouped.floats | wide)
    run = partial(
        value_and_gradients, function=dot_product_attention, implementation=implementation
    )
    results, gradient = run(single)
    summed = {
        n: d.reshape(B, S, M, N // M, -1).sum(3) if n != "query" else d for n, d in gradient.items()
    }
    assert_same(run(grouped), (results, summed))


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_a_constant_bias_shifts_the_log_sum_exp_alone(implementation):
    case = make_case()
    out, lse = outputs(case, dot_product_attention, implementation=implementation)
    shifted = case._replace(floats=case.floats | {"bias": jnp.full((N, 1, 1), 3.5)})
    run = partial(value_and_gradients, function=dot_product_attention)
    results, gradient = run(shifted, implementation=implementation)
    assert_same(results, (out, lse + 3.5))
    dlse = cotangents_for(case)[1]
    assert_same(gradient["bias"], dlse.sum((0, 1))[:, None, None])


def test_a_window_wider_than_any_sequence_hides_nothing():
    q = make_case(Sizes(1, 5, 5, 1, 1)).floats["query"]
    attend_by: Any = partial(dot_product_attention, q, q, q)
    for implementation in SCHEDULES:
        attend = partial(attend_by, implementation=implementation)
        for side in (2**30, 2**31 - 1, 2**31, 10**12):
            assert_same(attend(local_window_size=side, query_offset=2), attend())
            causal = attend(local_window_size=(side, side), is_causal=True)
            assert_same(causal, attend(is_causal=True))


# ---- decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", SCHEDULES)
def test_steps_with_a_cache_equal_the_whole(implementation, small_blocks):  # noqa: F811
    """A prompt of three, then token by token; rows hold prompts of different lengths."""
    prompts, steps = np.array([3, 1, 2]), 3
    sizes = Sizes(B, 6, 6)
    case = make_case(sizes)
    attend = quick(
        partial(dot_product_attention, is_causal=True, implementation=implementation),
    )
    whole = np.asarray(attend(**case.floats))

    empty = lambda x: jnp.zeros((B, 8, *x.shape[2:]), x.dtype)
    cache = KVCache(empty(case.floats["key"]), empty(case.floats["value"]), jnp.zeros(B, jnp.int32))
    start = {name: x[:, :3] for name, x in case.floats.items()}
    cache = update_cache(cache, start["key"], start["value"])
    out = attend(start["query"], cache.key, cache.value)
    for b, length in enumerate(prompts):
        assert_same(out[b, :length], whole[b, :length])

    cache = cache._replace(length=jnp.asarray(prompts, jnp.int32))
    for n in range(steps):
        at = prompts + n
        token = {name: x[np.arange(B), at][:, None] for name, x in case.floats.items()}
        offset, cache = cache.length, quick(update_cache)(cache, token["key"], token["value"])
        out = attend(token["query"], cache.key, cache.value, query_offset=offset)
        assert_same(out[:, 0], whole[np.arange(B), at])
        np.testing.assert_array_equal(cache.length, at + 1)


def test_what_a_cache_has_no_room_for_is_counted_but_not_stored():
    cache = KVCache(jnp.zeros((2, 3, 1, 1)), jnp.zeros((2, 3, 1, 2)), jnp.array([0, 2]))
    key = jnp.array([[1.0, 2.0], [3.0, 4.0]])[..., None, None]
    full = update_cache(cache, key, jnp.concatenate([key, -key], -1))
    assert full.key[..., 0, 0].tolist() == [[1, 2, 0], [0, 0, 3]]
    assert full.value[1, :, 0].tolist() == [[0, 0], [0, 0], [3, -3]]
    assert full.length.tolist() == [2, 4]


def test_the_gradient_goes_through_a_cache():
    old, new = make_case(Sizes(2, 1, 4, 2, 1)), make_case(Sizes(2, 2, 2, 2, 1), seed=1)
    length = jnp.array([2, 1])

    def loss(arguments):
        key, value, more, query = arguments
        cache = update_cache(KVCache(key, value, length), more, more @ jnp.ones((K, V)))
        out = dot_product_attention(
            query, cache.key, cache.value, is_causal=True, query_offset=length
        )
        return jnp.sum(out**2)

    arguments = (
        old.floats["key"],
        old.floats["value"],
        new.floats["key"],
        new.floats["query"],
    )
    assert_gradient(loss, arguments)


# ---- transformations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, implementation",
    [
        (dot_product_attention, "dense"),
        (dot_product_attention, "blockwise"),
        (dot_product_attention_jvp, "dense"),
    ],
)
def test_vmap_equals_a_loop(function, implementation, small_blocks):  # noqa: F811
    """Over everything, lengths included, and over the keys alone."""
    cases = [
        make_case(
            Sizes(2, 3, 5, 2, 1, 2, 3),
            bias=(2, 1, 5),
            seed=seed,
            query_seq_lengths=jnp.array([seed, 3]),
            key_value_seq_lengths=jnp.array([5, 4 - seed]),
            query_offset=jnp.array([seed - 1, 2]),
            is_causal=True,
        )
        for seed in range(3)
    ]
    options = {**cases[0].options, "implementation": implementation}
    run = first_order(function, **options)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    arguments = [(case.floats, case.others, cotangents_for(case)) for case in cases]
    mapped = quick(jax.vmap(inspect.unwrap(run)))(*stack(arguments))
    assert_same(mapped, stack([run(*a) for a in arguments]))

    floats, others, cotangents = arguments[0]
    keys = jnp.stack([case.floats["key"] for case in cases])
    of_key = lambda run, key: run(floats | {"key": key}, others, cotangents)
    mapped = quick(jax.vmap(partial(of_key, inspect.unwrap(run))))(keys)
    assert_same(mapped, stack([of_key(run, key) for key in keys]))


def test_a_second_eager_call_compiles_nothing():
    case = make_case(Sizes(2, 3, 4, 2, 1, 13, 3), sinks=True, is_causal=True)  # a width of its own
    compilations: list[str] = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    calls: list[Any] = []
    for function in FUNCTIONS:
        for implementation in SCHEDULES:
            call = caller(function, **case.options, implementation=implementation)
            calls.append(lambda call=call: call(case.floats, {}))
    loss = lambda q: dot_product_attention(q, case.floats["key"], case.floats["value"]).sum()
    calls.append(lambda: jax.grad(loss)(case.floats["query"]))
    other: dict[str, Any] = {"query_offset": 3, "scale": 0.3}  # numbers of Python's that may change
    calls.append(lambda: dot_product_attention(**case.floats, **other))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for call in calls:
            call()
            assert compilations  # the listener hears
            compilations.clear()
            call()
            assert not compilations
        other |= {"query_offset": 4, "scale": 0.4}
        calls[-1]()
        assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", SCHEDULES)
def test_everything_exports_for_gpu_and_tpu(implementation):
    key = jax.random.key(0)  # no argument, since a key cannot be one of an exported function
    plain = make_case(is_causal=True)
    full = make_case(
        bias=(1, N, T, S),
        mask=(B, 1, 1, S),
        scale=(N,),
        sinks=True,
        dtype=jnp.bfloat16,
        key_value_seq_lengths=jnp.array([1, 2, 3]),
        query_segment_ids=jnp.zeros((B, T), jnp.int32),
        key_value_segment_ids=jnp.zeros((B, S), jnp.int32),
        local_window_size=(3, None),
        logits_soft_cap=2.0,
        dropout_rate=0.1,
    )
    for case, dropout_key in ((plain, None), (full, key)):
        options = {**case.options, "implementation": implementation, "dropout_key": dropout_key}
        for run, direction in (
            (first_order(dot_product_attention, **options), cotangents_for(case)),
            (forward_mode(dot_product_attention_jvp, **options), case.floats),
        ):
            export = jax.export.export(
                jax.jit(inspect.unwrap(run)), platforms=("cpu", "cuda", "tpu")
            )
            export(case.floats, case.others, direction)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [*SCHEDULES, None])
def test_the_batch_may_be_divided_by_shard_map(implementation, small_blocks):  # noqa: F811
    """The bias and the sinks are the same on all devices, and so their gradient is the sum."""
    case = make_case(
        Sizes(4, 9, 9, 2, 1, 3, 2),
        bias=(1, 2, 9, 9),
        sinks=True,
        key_value_seq_lengths=jnp.array([9, 3, 0, 7], jnp.int32),
        is_causal=True,
    )
    of_rows = lambda name: P() if name in ("bias", "sinks", "scale") else P("b")
    specs = [{name: of_rows(name) for name in arrays} for arrays in (case.floats, case.others)]
    mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    call = caller(dot_product_attention, **case.options, implementation=implementation)
    divided = jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=P("b"))

    def gradients(call):
        return jax.jit(lambda *x: jax.vjp(lambda f: call(f, x[1]), x[0])[1](x[2]))(
            case.floats, case.others, cotangents_for(case)
        )

    assert_same(gradients(divided), gradients(call))


# ---- errors -----------------------------------------------------------------------------------


def _bad_calls() -> dict[str, Any]:
    case = make_case(Sizes(2, 3, 5, 4, 2, 6, 7))
    q, k, v = (case.floats[name] for name in ("query", "key", "value"))
    # unwrapped, since the type checker of the suite would be quicker
    attend = inspect.unwrap(dot_product_attention)
    run = lambda **change: lambda: attend(**{"query": q, "key": k, "value": v, **change})
    one = lambda **change: run(**{"query": q[0], "key": k[0], "value": v[0], **change})
    twin = inspect.unwrap(dot_product_attention_jvp)
    plain = inspect.unwrap(reference.dot_product_attention)
    cache = KVCache(k, v, jnp.array([0, 1]))
    grow = lambda cache=cache, key=k[:, :2], value=v[:, :2]: (
        lambda: inspect.unwrap(update_cache)(cache, key, value)
    )
    i32, ids = jnp.int32, jnp.zeros((2, 3), jnp.int32)
    implementations = "None, 'dense', 'blockwise', 'xla', 'native', 'pallas', 'cudnn' or 'tokamax'"
    window = "`local_window_size` must be None, an integer of at least 0, or a pair of them, None "
    return {
        "dot_product_attention: `query` must be of shape (*B, T, N, K), got (4, 6)": (
            run(query=q[0, 0])
        ),
        "`key` must be of shape (B, S, M, K) to go with query's (2, 3, 4, 6), got (2, 5, 2, 5)": (
            run(key=k[..., :5])
        ),
        "`key` must be of shape (B, S, M, K) to go with query's (2, 3, 4, 6), got (5, 2, 6)": (
            run(key=k[0])
        ),
        "`key` must be of shape (S, M, K) to go with query's (3, 4, 6), got (2, 5, 2, 6)": (
            one(key=k)
        ),
        "`value` must be of shape (B, S, M, V) to go with key's (2, 5, 2, 6), got (2, 4, 2, 7)": (
            run(value=v[:, :4])
        ),
        "`query` must be of a multiple of key's 2 heads, got 3 heads": run(query=q[:, :, :3]),
        "`query` must be of a multiple of key's 0 heads, got 4 heads": run(
            key=k[:, :, :0], value=v[:, :, :0]
        ),
        "`query` must be of a floating dtype, got int64": run(query=q.astype(jnp.int64)),
        "`query` must be of a floating dtype, got complex128": run(query=q.astype(jnp.complex128)),
        "`key` must be of the dtype of `query`, float64, got float32": run(
            key=k.astype(jnp.float32)
        ),
        "`value` must be of the dtype of `query`, float64, got bfloat16": run(
            value=v.astype(jnp.bfloat16)
        ),
        "`bias` must be of a shape that broadcasts to (B, N, T, S) = (2, 4, 3, 5), got (2, 3, 5)": (
            run(bias=jnp.zeros((2, 3, 5)))
        ),
        "`bias` must be of a shape that broadcasts to (N, T, S) = (4, 3, 5), got (2, 4, 3, 5)": (
            one(bias=jnp.zeros((2, 4, 3, 5)))
        ),
        "`bias` must be of a floating dtype, got bool": run(bias=jnp.ones((3, 5), bool)),
        "`mask` must be of a shape that broadcasts to (B, N, T, S) = (2, 4, 3, 5), got (5, 3)": (
            run(mask=jnp.ones((5, 3), bool))
        ),
        "`mask` must be of dtype bool, got float64": run(mask=jnp.ones((3, 5))),
        "`scale` must be a number or of shape () or (N,) = (4,), got (2,)": run(scale=jnp.ones(2)),
        "`scale` must be of a floating dtype, got int32": run(scale=jnp.ones(4, i32)),
        "`query_seq_lengths` must be of shape (B,) = (2,), got (3,)": run(
            query_seq_lengths=jnp.ones(3, i32)
        ),
        "`query_seq_lengths` must be of integers, got float64": run(query_seq_lengths=jnp.ones(2)),
        "`key_value_seq_lengths` must be of shape (B,) = (2,), got ()": run(
            key_value_seq_lengths=jnp.ones((), i32)
        ),
        "`key_value_seq_lengths` must be of shape (), got (2,)": one(
            key_value_seq_lengths=jnp.ones(2, i32)
        ),
        "`query_offset` must be an integer or of shape (B,) = (2,), got (4,)": run(
            query_offset=jnp.ones(4, i32)
        ),
        "`query_offset` must be an integer or of shape (), got (2,)": one(
            query_offset=jnp.ones(2, i32)
        ),
        "`query_offset` must be of integers, got float64": run(query_offset=1.0),
        "`key_value_segment_ids` must be given where `query_segment_ids` is, got None": run(
            query_segment_ids=ids
        ),
        "`query_segment_ids` must be given where `key_value_segment_ids` is, got None": run(
            key_value_segment_ids=jnp.zeros((2, 5), i32)
        ),
        "`query_segment_ids` must be of shape (2, 3), got (2, 5)": run(
            query_segment_ids=jnp.zeros((2, 5), i32), key_value_segment_ids=ids
        ),
        "`key_value_segment_ids` must be of shape (2, 5), got (2, 3)": run(
            query_segment_ids=ids, key_value_segment_ids=ids
        ),
        "`query_segment_ids` must be of integers, got float64": run(
            query_segment_ids=jnp.zeros((2, 3)), key_value_segment_ids=jnp.zeros((2, 5), i32)
        ),
        "`sinks` must be of shape (N,) = (4,), got (2,)": run(sinks=jnp.ones(2)),
        "`sinks` must be of a floating dtype, got int32": run(sinks=jnp.ones(4, i32)),
        f"{window}for an open side, got -1": run(local_window_size=-1),
        f"{window}for an open side, got -2": run(local_window_size=(1, -2)),
        f"{window}for an open side, got (1,)": run(local_window_size=(1,)),
        f"{window}for an open side, got 1.5": run(local_window_size=1.5),
        "`logits_soft_cap` must be a positive number or None, got 0.0": run(logits_soft_cap=0.0),
        "`logits_soft_cap` must be a positive number or None, got Array([1., 1.], ": run(
            logits_soft_cap=jnp.ones(2)
        ),
        "`dropout_rate` must be a number in [0, 1), got 1.0": run(dropout_rate=1.0),
        "`dropout_rate` must be a number in [0, 1), got -0.1": run(dropout_rate=-0.1),
        "`dropout_key` must be given where `dropout_rate` is above 0, got None": run(
            dropout_rate=0.1
        ),
        "`dropout_key` must be a single key, got an array (3,) of them": run(
            dropout_rate=0.1, dropout_key=jax.random.split(jax.random.key(0), 3)
        ),
        f"`implementation` must be {implementations}, got 'flash'": run(implementation="flash"),
        "`implementation` must be None, 'xla' or 'dense' where `return_weights` is set, got "
        "'blockwise'": run(return_weights=True, implementation="blockwise"),
        "dot_product_attention_jvp: `implementation` must be None, 'xla', 'dense' or 'blockwise', "
        "got 'cudnn'": lambda: twin(q, k, v, implementation="cudnn"),
        "reference.dot_product_attention: `implementation` must be None, 'xla', 'dense' or "
        "'blockwise', got 'tokamax'": lambda: plain(q, k, v, implementation="tokamax"),
        "dot_product_attention_jvp: `key` must be of shape": lambda: twin(q, k[0], v),
        "update_cache: `key` must be of shape (B, T, …) to go with the cache's (2, 5, 2, 6), got "
        "(2, 2, 1, 6)": grow(key=k[:, :2, :1]),
        "`value` must be of shape (B, T, …) to go with the cache's (2, 5, 2, 7), got (1, 2,": (
            grow(value=v[:1, :2])
        ),
        "`key` must be of the dtype of `cache.key`, float64, got float32": grow(
            key=k[:, :2].astype(jnp.float32)
        ),
        "`value` must be of as many tokens as key, 2, got 1": grow(value=v[:, :1]),
        "`key` must be of at most the 1 tokens the cache has room for, got 2": grow(
            cache=KVCache(k[:, :1], v[:, :1], cache.length)
        ),
        "`cache.key` must be of shape (B, S, M, K), got (5, 2, 6)": grow(
            cache=cache._replace(key=k[0])
        ),
        "`cache.value` must be of shape (B, S, M, V) to go with key's (2, 5, 2, 6), got "
        "(2, 4, 2, 7)": grow(cache=cache._replace(value=v[:, :4])),
        "`cache.length` must be of shape (B,) = (2,), got ()": grow(
            cache=cache._replace(length=jnp.zeros((), i32))
        ),
        "`cache.length` must be of integers, got float64": grow(
            cache=cache._replace(length=jnp.zeros(2))
        ),
    }


@pytest.mark.parametrize("message, call", _bad_calls().items())
def test_a_bad_argument_is_an_error_that_names_it(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
