"""The native schedule of attention: against the reference in float64, for every instruction set
that runs here, and that it is there where it should be and nowhere else.

Blocks of the kernels are of 256 keys and 48 queries, or 64 keys where a key/value head has no more
than 16 queries, so some sizes are a little over these.
"""

from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rnnattn import dot_product_attention, masks, native, packed_attention, reference
from rnnattn.attention import api, dot_product_attention_jvp
from rnnattn.native import calls, load
from tests.attention_cases import (
    Sizes,
    assert_same,
    cotangents_for,
    first_order,
    like,
    make_case,
    outputs,
    quick,
    second_order,
    value_and_gradients,
)
from tests.native_cases import NARROW_SETS, SETS, WIDE_SETS
from tests.test_attention import VARIANTS, _filled, drawn
from tests.test_packed import cotangents as packed_cotangents, make_packed, masked, without_nan

examples = partial(settings, deadline=None, derandomize=True)
NATIVE: dict[str, Any] = {"implementation": "native"}
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not SETS, reason=f"no kernels: {native.status().reason}")


def narrow(case):
    """The case in float32."""
    return case._replace(floats=jax.tree.map(lambda x: x.astype(jnp.float32), case.floats))


def wide(tree):
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if is_float(x) else x, tree)


def assert_native_is_right(case, **options):
    """Outputs and gradients, in float32 against float64."""
    case = narrow(case)
    actual = value_and_gradients(case, dot_product_attention, **NATIVE, **options)
    expect = first_order(reference.dot_product_attention, **case.options)
    expected = expect(wide(case.floats), case.others, wide(cotangents_for(case)))
    assert_same(actual, expected, TOLERANCE)


def set_how(monkeypatch, **how):
    for name, value in how.items():
        monkeypatch.setattr(calls, name, value)
    cast(Any, api._run_attention).clear_cache()


@pytest.fixture(params=WIDE_SETS)
def instruction_set(request, monkeypatch):
    set_how(monkeypatch, instruction_set=request.param)
    yield request.param
    cast(Any, api._run_attention).clear_cache()


# ---- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dropout"])
def test_every_feature_with_every_other(variant, instruction_set):
    options = make_case(**VARIANTS[variant]).options
    expect = first_order(reference.dot_product_attention, **options)
    run = first_order(dot_product_attention, **options, **NATIVE)

    @examples(max_examples=15)
    @given(drawn)
    def check(draw):
        case = narrow(_filled(variant, draw))
        actual = run(case.floats, case.others, cotangents_for(case))
        expected = expect(wide(case.floats), case.others, wide(cotangents_for(case)))
        assert_same(actual, expected, TOLERANCE)

    check()


def _of_all_kinds(sizes, **rest):
    B, T, S, N, *_ = sizes
    rng = np.random.default_rng(2)
    ids = lambda size: jnp.asarray(np.sort(rng.integers(0, 3, (B, size))), jnp.int32)
    return make_case(
        sizes,
        bias=(1, N, T, S),
        mask=(B, 1, 1, S),
        sinks=True,
        query_segment_ids=ids(T),
        key_value_segment_ids=ids(S),
        query_seq_lengths=jnp.asarray(rng.integers(T // 2, T + 1, B), jnp.int32),
        **rest,
    )


SIZES = {
    "one of all": Sizes(1, 1, 1, 1, 1, 1, 1),
    "some blocks": Sizes(1, 293, 521, 2, 1, 16, 33),
    "a step of decoding": Sizes(2, 1, 300, 6, 2, 8, 8),
    "few queries of many heads": Sizes(1, 13, 258, 18, 2, 5, 1),
    "as many rows as are streamed": Sizes(1, 8, 131, 4, 2, 16, 32),
    "one row more": Sizes(1, 17, 131, 2, 2, 16, 32),
    "keys in parts": Sizes(1, 1, 1030, 2, 2, 33, 17),
    "keys of many rows in parts": Sizes(1, 40, 1030, 1, 1, 3, 5),
    "wide heads": Sizes(1, 97, 257, 1, 1, 130, 67),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, instruction_set):
    cap = {"logits_soft_cap": 1.5} if name == "wide heads" else {}  # and nothing else
    assert_native_is_right(
        make_case(SIZES[name], is_causal=name == "some blocks", query_offset=9, **cap)
    )


PACKED = {
    "few rows": ([3, 0, 5], [40, 9, 130]),
    "short ones": ([20, 1, 0, 49, 30, 7], [20, 1, 0, 49, 30, 7]),
    "long ones": ([60, 300, 5], [270, 280, 20]),
}


@pytest.mark.parametrize("name", PACKED)
def test_sizes_of_packed_sequences(name, instruction_set):
    of_each = PACKED[name]
    heads = (2, 2) if name == "long ones" else (4, 2)
    sizes = (sum(of_each[0]) + 9, sum(of_each[1]) + 3, *heads, 16, 20)
    case = make_packed(*of_each, sizes=sizes, dtype=jnp.float32)
    options: dict[str, Any] = {"is_causal": True, "local_window_size": (250, None)}
    truth = without_nan(case, **options)
    given_back, plain = packed_cotangents(case)
    expected = first_order(masked)(wide(truth.floats), truth.others, wide(plain))
    run = first_order(packed_attention, **options, **NATIVE)
    assert_same(run(case.floats, case.others, given_back), expected, TOLERANCE)


STREAMED = Sizes(2, 3, 530, 4, 2, 16, 20)


def test_several_blocks_of_everything_streamed(instruction_set):
    """Keys and values that are read where they are, the values not in whole vectors."""
    how = {"local_window_size": (250, 40), "query_offset": jnp.array([200, 520])}
    assert_native_is_right(_of_all_kinds(STREAMED, logits_soft_cap=2.0, **how))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 1), (1, 1, 1, 530), (3, 530)], ids=str)
def test_a_bias_and_a_mask_that_are_shared_streamed(shape):
    if len(shape) == 4:
        assert_native_is_right(make_case(STREAMED, bias=shape, sinks=True))
    assert_native_is_right(make_case(STREAMED, mask=shape, is_causal=True, query_offset=400))


@pytest.mark.parametrize("window", [(3, 0), (0, 4), (2, None)], ids=str)
def test_a_window_and_nothing_else(window):
    """What position alone hides is hidden without a look at each logit."""
    assert_native_is_right(make_case(Sizes(1, 50, 70, 1, 1, 3, 2), local_window_size=window))


def test_several_blocks_of_everything(instruction_set):
    sizes = Sizes(2, 203, 530, 4, 2, 7, 9)
    assert_native_is_right(
        _of_all_kinds(sizes, local_window_size=(150, 40), query_offset=jnp.array([0, 320]))
    )


BIASES = [(1, 1, 1, 1), (3, 1, 70, 1), (1, 1, 1, 300), (3, 4, 70, 300), (1, 4, 70, 300)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_the_gradient_of_a_bias_that_is_shared(shape):
    sizes = Sizes(3, 70, 300, 4, 2, 4, 4)
    assert_native_is_right(make_case(sizes, bias=shape, logits_soft_cap=1.5, is_causal=True))


MASKS = [(1, 1, 1, 1), (3, 1, 70, 1), (1, 4, 1, 300), (70, 300)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_a_mask_that_is_shared_by_several_blocks(shape):
    """Along the keys as well: then it shows and hides whole rows."""
    assert_native_is_right(make_case(Sizes(3, 70, 300, 4, 2, 4, 4), mask=shape))


@pytest.mark.parametrize("T", [100, 5], ids=["packed", "streamed"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": 480}], ids=bool)
def test_blocks_that_a_mask_shows_to_none_or_to_all(T, options, instruction_set):
    """Of whole vectors of keys and of parts of them; what nobody sees is NaN."""
    S = 600
    case = narrow(make_case(Sizes(1, T, S, 3, 3, 16, 16), mask=(1, 3, T, S), **options))
    mask = np.zeros((1, 3, T, S), bool)
    mask[:, 0, :, 64:176] = mask[:, 1, :, 70:171] = True
    mask[:, 1:, T // 2 :, 256:512] = True
    mask[:, 2, :, 520:] = np.asarray(case.others["mask"])[:, 2, :, 520:]
    mask[:, 2, T - 1] = False
    case.others["mask"] = jnp.asarray(mask)
    expected = value_and_gradients(case, dot_product_attention, implementation="dense")
    unseen = ~np.swapaxes(mask.any(2), 1, 2)[..., None]
    spoiled = {n: jnp.where(unseen, jnp.nan, case.floats[n]) for n in ("key", "value")}
    spoiled["query"] = case.floats["query"].at[:, T - 1, 2].set(jnp.nan)
    case = case._replace(floats=case.floats | spoiled)
    assert_same(value_and_gradients(case, dot_product_attention, **NATIVE), expected, TOLERANCE)


def scored(function):
    """`function` with a score of distances, its floats an argument like any other."""

    def call(*, slopes=None, table=None, **arguments):
        score = masks.alibi(slopes) if table is None else masks.relative_bias(table)
        return function(**arguments, score_function=score)

    return call


def scored_case(name):
    """With one offset for all rows, or one for each; heads of a group have numbers of their own."""
    of_blocks, of_streamed = Sizes(2, 130, 530, 4, 2, 7, 9), Sizes(2, 3, 530, 4, 2, 16, 20)
    each = jnp.array([200, 520])
    rng = np.random.default_rng(4)
    if name == "blocks":
        case, floats = _of_all_kinds(of_blocks, query_offset=320), {"slopes": rng.uniform(size=4)}
    elif name == "streamed":
        cap = {"logits_soft_cap": 2.0, "local_window_size": (250, 40)}
        case = _of_all_kinds(of_streamed, query_offset=each, **cap)
        floats = {"table": rng.normal(size=(8, 4))}
    else:
        sizes = Sizes(1, 1, 1, 1, 1, 1, 1) if name == "one of all" else of_blocks
        how = {} if name == "one of all" else {"is_causal": True, "query_offset": each[::-1]}
        case, floats = make_case(sizes, scale=(), **how), {"table": rng.normal(size=(8, sizes.N))}
    return narrow(case._replace(floats=case.floats | jax.tree.map(jnp.asarray, floats)))


@cache
def expected_of_scored(name):
    case = scored_case(name)
    expect = first_order(scored(reference.dot_product_attention), **case.options)
    return expect(wide(case.floats), case.others, wide(cotangents_for(case)))


@pytest.mark.parametrize("name", ["blocks", "streamed", "in a table", "one of all"])
def test_sizes_of_a_score_by_distance(name, instruction_set):
    """Values and gradients, those of the slopes and the table as well."""
    actual = value_and_gradients(scored_case(name), scored(dot_product_attention), **NATIVE)
    assert_same(actual, expected_of_scored(name), TOLERANCE)


def test_a_score_by_distance_in_all_transformations():
    """Twice differentiated, and under `vmap`: its own floats as well as what it adds to."""
    case = narrow(make_case(Sizes(2, 5, 9, 4, 2, 3, 3), query_offset=jnp.array([4, 3])))
    case = case._replace(floats=case.floats | {"slopes": jnp.arange(1.0, 5, dtype=jnp.float32)})
    arguments = (case.floats, case.others, cotangents_for(case), like(case.floats, seed=5))
    expected = second_order(scored(reference.dot_product_attention))(*wide(arguments))
    run = scored(dot_product_attention)
    assert_same(second_order(run, **NATIVE)(*arguments), expected, TOLERANCE)

    slopes = case.floats.pop("slopes")
    floats, given = case.floats, cotangents_for(case)

    def gradients(query, slopes, floats):
        call = lambda floats: run(
            **(floats | {"slopes": floats.get("slopes", slopes)}),
            **case.others,
            return_residual=True,
            **NATIVE,
        )
        results, pullback = jax.vjp(call, floats | {"query": query})
        return results, pullback(given)[0]

    query = floats["query"]
    several = jnp.stack([query, 2 * query]), jnp.stack([slopes, 2 * slopes])
    tries: Any = (((0, None), {}), ((0, None), {"slopes": slopes}), ((0, 0), {}))
    for axes, more in tries:
        one = partial(gradients, floats=floats | more)
        program = jax.jit(jax.vmap(one, axes))
        of_each = several[0], several[1] if axes[1] == 0 else slopes
        kernels = "rnnattn.attention_backward" in program.lower(*of_each).as_text()
        assert kernels == (axes == (0, None) and not more)
        actual = program(*of_each)
        for n in range(2):
            right = quick(one)(several[0][n], several[1][n] if axes[1] == 0 else slopes)
            assert_same(jax.tree.map(lambda x, n=n: x[n], actual), right, TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_score_by_distance_in_16_bits(dtype):
    case = scored_case("in a table")
    case = case._replace(floats=jax.tree.map(lambda x: x.astype(dtype), case.floats))
    case.floats.pop("scale")  # whose gradient is made in float32
    expect = first_order(scored(reference.dot_product_attention), **case.options)
    given = cotangents_for(case)
    expected = expect(wide(case.floats), case.others, wide(given))
    assert_rounded_once(case, given, expected, scored(dot_product_attention))


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Also where the keys of one head are shared out, and with a bias that heads share."""
    for case in (
        make_case(Sizes(1, 290, 1100, 2, 1, 32, 32), bias=(1, 1, 290, 1100), is_causal=True),
        make_case(Sizes(3, 200, 300, 4, 4, 16, 16), bias=(1, 1, 200, 1), mask=(200, 300)),
        make_case(Sizes(1, 50, 9000, 1, 1, 64, 64), mask=(50, 9000), sinks=True),
        make_case(Sizes(1, 2, 9000, 4, 2, 64, 64), bias=(1, 1, 2, 9000), is_causal=True),
        scored_case("blocks"),
        in_bfloat16(100, 1100, 32, is_causal=True),
    ):
        results = []
        if case.floats["query"].dtype == jnp.float64:
            case = narrow(case)
        run = scored(dot_product_attention) if "slopes" in case.floats else dot_product_attention
        for threads in (1, 0):
            set_how(monkeypatch, threads=threads)
            results.append(value_and_gradients(case, run, **NATIVE))
        jax.tree.map(np.testing.assert_array_equal, *results)


# ---- 16 bits ----------------------------------------------------------------------------------


def _exact(case, cotangents=None):
    expect = first_order(reference.dot_product_attention, **case.options)
    given = cotangents or cotangents_for(case)
    return expect(wide(case.floats), wide(case.others), wide(given))


@cache
def narrow_problem(dtype, packed):
    """A case of everything, of keys that are packed or streamed, what comes back to it, and what
    must come out.

    Widths of 33 are not in whole pairs, those of 48 and 80 in whole vectors of numbers, not of
    pairs; 80 are more than one tile of a product takes.
    """
    sizes = Sizes(2, 131, 290, 4, 2, 33, 80) if packed else Sizes(2, 3, 531, 4, 2, 48, 33)
    soft_cap = None if packed else 2.0
    case = _of_all_kinds(
        sizes, query_offset=jnp.array([0, 240]), logits_soft_cap=soft_cap, scale=(4,), dtype=dtype
    )
    # a constant: the gradient of a scale is made in float32
    case.others["scale"] = case.floats.pop("scale")
    if packed:  # a mean, which dS k must not show
        case.floats["key"] = case.floats["key"] + jnp.asarray(8, dtype)
    expected = _exact(case)
    past = np.arange(sizes.T) >= np.asarray(case.others["query_seq_lengths"])[:, None]
    query, do = (
        jnp.where(past[..., None, None], jnp.nan, x)
        for x in (case.floats["query"], cotangents_for(case)[0])
    )
    # the other row has NaN in queries and in what comes back to them alone
    hidden = ~case.others["mask"][:, 0, 0, :, None, None].at[1].set(True)
    spoiled = {n: jnp.where(hidden, jnp.nan, case.floats[n]) for n in ("key", "value")}
    cotangents = (do, cotangents_for(case)[1])
    return case._replace(floats=case.floats | {"query": query} | spoiled), cotangents, expected


@pytest.mark.parametrize("dtype, instruction_set", NARROW_SETS, indirect=["instruction_set"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "streamed"])
def test_16_bits_are_those_of_float64_rounded_once(dtype, packed, instruction_set):
    """But for what float32 leaves, or fixed point; with NaN where nobody looks."""
    case, cotangents, expected = narrow_problem(dtype, packed)
    in_fixed_point = instruction_set == "avx512_bf16" and dtype == jnp.bfloat16 and packed
    tolerance = 1e-4 if in_fixed_point else TOLERANCE
    actual = assert_rounded_once(case, cotangents, expected, tolerance=tolerance)
    # where nothing is kept, O is rounded by the kernel
    alone = outputs(case, dot_product_attention, **NATIVE)
    jax.tree.map(np.testing.assert_array_equal, alone, actual[0])


def test_the_gradient_of_a_scale_in_16_bits():
    case = make_case(Sizes(1, 5, 9, 2, 1, 3, 3), scale=(2,), dtype=jnp.bfloat16)
    assert_rounded_once(case, cotangents_for(case), _exact(case))


def assert_rounded_once(
    case, cotangents, expected, function=dot_product_attention, tolerance=TOLERANCE
):
    run = first_order(function, **case.options, **NATIVE)
    actual = run(case.floats, case.others, cotangents)
    given = ((case.floats["value"], jnp.zeros((), jnp.float32)), case.floats)
    for ours, right, of in zip(*map(jax.tree.leaves, (actual, expected, given)), strict=True):
        assert ours.dtype == of.dtype
        ours, right = np.asarray(ours, np.float64), np.asarray(right)
        finite = right != -np.inf
        np.testing.assert_array_equal(ours == -np.inf, ~finite)
        ours, right = ours[finite], right[finite]
        rounding = float(jnp.finfo(of.dtype).eps) / 2 * np.abs(right)
        assert np.all(np.abs(ours - right) <= rounding + tolerance * np.max(np.abs(right)))
    return actual


def in_bfloat16(T, S, width, heads=1, **options):
    sizes = Sizes(1, T, S, heads, heads, width, width)
    return make_case(sizes, dtype=jnp.bfloat16, **options)


@cache
def uneven_problem(which):
    """A case in bfloat16 of numbers of very different sizes, or that cancel, and what must come."""
    if which == "a window":  # of heads for each of which all keys are in one block
        case = in_bfloat16(200, 200, 64, heads=4, is_causal=True, local_window_size=(40, 0))
        return case, _exact(case)
    case = in_bfloat16(200, 200, 64)
    rng = np.random.default_rng(1)
    if which == "a mean of the keys":
        case.floats["key"] += jnp.bfloat16(16)
    else:
        shape, sigma = {"outliers": ((200, 64), 1.5), "outlying columns": ((1, 64), 1)}[which]
        for name in ("key", "value"):
            uneven = jnp.asarray(rng.lognormal(0, sigma, shape), jnp.bfloat16)
            case.floats[name] *= uneven[None, :, None]
    return case, _exact(case)


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
@pytest.mark.parametrize(
    "which", ["a window", "a mean of the keys", "outliers", "outlying columns"]
)
def test_16_bits_are_as_exact_where_sizes_differ(which, instruction_set):
    """Errors of gradients in root mean square, beside those of exact ones rounded once."""
    case, expected = uneven_problem(which)
    actual = value_and_gradients(case, dot_product_attention, **NATIVE)
    for name in ("query", "key", "value"):
        ours, right = (of[name] for _, of in (actual, expected))
        once = jnp.asarray(right, jnp.bfloat16)
        of_ours, of_once = (
            np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2)) for x in (ours, once)
        )
        assert of_ours <= 1.1 * of_once, name


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
def test_what_is_not_seen_changes_no_bit(instruction_set):
    """However large it is: neither later keys and values, nor queries before a key."""
    case = in_bfloat16(90, 90, 40, is_causal=True)
    gradients = first_order(dot_product_attention, **case.options, **NATIVE)
    do, dlse = cotangents_for(case)
    results, of = gradients(case.floats, case.others, (do, dlse))
    t, large = 41, jnp.bfloat16(1e20)
    later = {n: case.floats[n].at[:, t:].multiply(large) for n in ("key", "value")}
    changed, of_changed = gradients(case.floats | later, case.others, (do, dlse))
    early = lambda results, of: [np.asarray(x)[:, :t] for x in (*results, of["query"])]
    jax.tree.map(np.testing.assert_array_equal, early(results, of), early(changed, of_changed))
    earlier = {"query": case.floats["query"].at[:, :t].multiply(large)}
    cotangents = (do.at[:, :t].multiply(large), dlse)
    _, of_changed = gradients(case.floats | earlier, case.others, cotangents)
    late = lambda of: [np.asarray(of[n])[:, t:] for n in ("key", "value")]
    jax.tree.map(np.testing.assert_array_equal, late(of), late(of_changed))


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
def test_the_largest_sums_in_16_bits_fit(instruction_set):
    """Products of numbers alike in all places: P and values, and dS with queries and with keys."""
    case = in_bfloat16(96, 96, 64)
    largest = 255 / 128
    sign, half = (-1.0) ** np.arange(96)[:, None], np.arange(64) < 32
    fill = lambda x: jnp.asarray(
        np.broadcast_to(x, (96, 64))[None, :, None] * largest, jnp.bfloat16
    )
    # all logits are 0; half of each value is alike, the other makes the signs of dS, which those of
    # the keys are
    case.floats["query"] = fill(1)
    case.floats["key"] = fill(sign * (-1.0) ** np.arange(64))
    case.floats["value"] = fill(np.where(half, 1, sign))
    do = fill(np.where(half, 2.0**-6, 1))
    cotangents = do, jnp.zeros((1, 96, 1), jnp.float32)
    assert_rounded_once(case, cotangents, _exact(case, cotangents))


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
def test_gradients_in_16_bits_are_linear_in_cotangents_of_any_size(instruction_set):
    """To the bit, as their sizes are powers of 2."""
    case = in_bfloat16(60, 70, 36)
    run = first_order(dot_product_attention, **NATIVE)
    scaled = lambda tree, power: jax.tree.map(lambda x: x * jnp.asarray(2.0**power, x.dtype), tree)
    cotangents = cotangents_for(case)
    once = run(case.floats, case.others, cotangents)[1]
    for power in (-60, 60):
        results = run(case.floats, case.others, scaled(cotangents, power))[1]
        jax.tree.map(np.testing.assert_array_equal, results, scaled(once, power))


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
@pytest.mark.parametrize("name", ["query", "key", "value", "do"])
def test_what_is_no_number_spoils_in_16_bits_what_it_spoils_in_xla(name, instruction_set):
    case = in_bfloat16(60, 70, 36)
    do, dlse = cotangents_for(case)
    floats = case.floats
    for bad in (jnp.nan, jnp.inf):
        if name == "do":
            given = floats, case.others, (do.at[0, 3, 0, 33].set(bad), dlse)
        else:
            given = floats | {name: floats[name].at[0, 3, 0, 33].set(bad)}, case.others, (do, dlse)
        finite = [
            jax.tree.map(
                np.isfinite, first_order(dot_product_attention, implementation=how)(*given)
            )
            for how in ("native", "xla")
        ]
        jax.tree.map(np.testing.assert_array_equal, *finite)


# ---- NaN and infinity -------------------------------------------------------------------------


@cache
def hidden_problem(T, K):
    """A case with NaN and ∞ in what is hidden, which keys that are, and what must come out."""
    case = narrow(
        make_case(
            Sizes(2, T, 300, 4, 2, K, K),
            mask=(2, 1, 1, 300),
            is_causal=True,
            query_offset=220 - T,
            query_seq_lengths=jnp.array([T - 2, T]),
            key_value_seq_lengths=jnp.array([150, 210]),
            query_segment_ids=jnp.zeros((2, T), int),
            key_value_segment_ids=jnp.zeros((2, 300), int).at[:, 50:60].set(1),
            logits_soft_cap=2.0 if K == 5 else None,
        )
    )
    mask = case.others["mask"].at[:, 0, 0, 20:40].set(False)
    case.others["mask"] = mask
    t, s = np.arange(T), np.arange(300)
    queries, keys = (
        np.asarray(case.others[f"{of}_seq_lengths"])[:, None] for of in ("query", "key_value")
    )
    hidden = ~np.asarray(mask)[:, 0, 0] | (s >= keys) | (s >= 50) & (s < 60) | (s >= 220)
    rows = t >= queries
    last = hidden[..., None, None] & (np.arange(K) == K - 1)  # behind the last whole vector
    spoiled = {
        "query": jnp.where(rows[..., None, None], jnp.nan, case.floats["query"]),
        "key": jnp.where(last, jnp.nan, case.floats["key"]),
        "value": jnp.where(last, jnp.inf, case.floats["value"]),
    }
    expected = value_and_gradients(case, dot_product_attention, implementation="dense")
    return case._replace(floats=case.floats | spoiled), hidden, expected


@pytest.mark.parametrize("T", [120, 7], ids=["packed", "streamed"])
@pytest.mark.parametrize("K", [5, 16])
def test_what_is_hidden_may_be_nan(T, K, instruction_set):
    """By lengths, the mask, segments or the window; it gets a gradient of zero."""
    case, hidden, expected = hidden_problem(T, K)
    actual = value_and_gradients(case, dot_product_attention, **NATIVE)
    assert_same(actual, expected, TOLERANCE)
    assert not np.any(np.asarray(actual[1]["key"])[hidden])


def test_what_is_hidden_while_decoding_may_be_nan():
    """By the length of one row, by the window of the other, and by nothing else."""
    lengths = jnp.array([13, 40])
    case = narrow(
        make_case(
            Sizes(2, 1, 40, 2, 2, 16, 16),
            is_causal=True,
            query_offset=lengths - 1,
            key_value_seq_lengths=lengths,
            local_window_size=(20, 0),
        )
    )
    expected = value_and_gradients(case, dot_product_attention, implementation="dense")
    s, length = np.arange(40), np.asarray(lengths)[:, None]
    hidden = ((s >= length) | (s < length - 21))[..., None, None]
    spoiled = {n: jnp.where(hidden, jnp.nan, case.floats[n]) for n in ("key", "value")}
    case = case._replace(floats=case.floats | spoiled)
    assert_same(value_and_gradients(case, dot_product_attention, **NATIVE), expected, TOLERANCE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_seen_spoils_what_it_spoils_in_xla(name, bad):
    case = narrow(make_case(Sizes(1, 5, 9, 1, 1, 3, 3), is_causal=True, query_offset=2))
    floats = case.floats | {name: case.floats[name].at[0, 3, 0, 1].set(bad)}
    finite = lambda implementation: jax.tree.map(
        lambda x: np.isfinite(x).astype(int),
        outputs(case._replace(floats=floats), dot_product_attention, implementation=implementation),
    )
    # What XLA spoils besides, in rows that do not see it, is no part of the promise.
    ours, xla = finite("native"), finite("dense")
    jax.tree.map(lambda a, b: np.testing.assert_array_less(b - 1, a), ours, xla)
    assert not ours[0].all()


# ---- transformations --------------------------------------------------------------------------


def test_second_derivatives_are_those_of_the_xla_schedule():
    case = narrow(make_case(Sizes(), bias=(3, 1, 7, 10), is_causal=True, query_offset=2))
    arguments = (case.floats, case.others, cotangents_for(case), like(case.floats, seed=5))
    options = case.options
    expected = second_order(reference.dot_product_attention, **options)(*wide(arguments))
    for function in (dot_product_attention, dot_product_attention_jvp):
        actual = second_order(function, **options, **NATIVE)(*arguments)
        assert_same(actual, expected, TOLERANCE)


@pytest.mark.parametrize("batched", [("query",), ("bias", "mask"), ("sinks", "value")], ids=str)
def test_vmap(batched):
    """As one after another: the axis is joined with the batch, but for sinks."""
    case = narrow(make_case(Sizes(), bias=(1, 4, 1, 10), mask=(3, 1, 7, 10), sinks=True))
    arrays = {**case.floats, **case.others}
    cotangents = cotangents_for(case)
    several = {n: jnp.stack([arrays[n], jnp.roll(arrays[n], 1, -1)], -1) for n in batched}

    def run(several):
        floats = {n: several.get(n, x) for n, x in case.floats.items()}
        others = {n: several.get(n, x) for n, x in case.others.items()}
        call = lambda floats: dot_product_attention(
            **floats, **others, return_residual=True, **NATIVE
        )
        results, pullback = jax.vjp(call, floats)
        return results, pullback(cotangents)[0]

    program = jax.jit(jax.vmap(run, -1))
    actual = program(several)
    for i in range(2):
        one = quick(run)({n: x[..., i] for n, x in several.items()})
        assert_same(jax.tree.map(lambda x, i=i: x[i], actual), one, TOLERANCE)
    joined = "rnnattn.attention_backward" in program.lower(several).as_text()
    assert joined == ("sinks" not in batched)


def test_programs_for_a_cpu_call_the_kernels_and_exported_ones_do_not():
    q = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)
    loss = lambda q: jnp.sum(dot_product_attention(q, q, q, is_causal=True))
    for function in (loss, jax.grad(loss)):
        assert "rnnattn.attention" in jax.jit(function).lower(q).as_text()
        for platforms in (("cpu",), ("cpu", "cuda", "tpu")):
            exported = jax.export.export(jax.jit(function), platforms=platforms)(q)
            assert "rnnattn.attention_" not in exported.mlir_module()
    foreign = jax.jit(loss).trace(q).lower(lowering_platforms=("cuda",))
    assert "rnnattn.attention" not in foreign.as_text()


@pytest.mark.parametrize(
    ("B", "T", "N", "M"), [(2, 1, 3, 3), (2, 1, 4, 1), (2, 5, 1, 1), (1, 1, 1, 1), (1, 2, 2, 1)]
)
def test_no_result_is_copied(B, T, N, M):
    """As XLA did where two axes of a result that a reshape joins were of size 1."""
    array = lambda *shape: jax.ShapeDtypeStruct((B, *shape, 8), jnp.float32)
    operands = array(T, N), array(6, M), array(6, M)

    def gradients(operands, do):
        o, pullback = jax.vjp(partial(dot_product_attention, **NATIVE), *operands)
        return o, pullback(do)

    program = str(jax.jit(gradients).lower(operands, array(T, N)).compile().as_text())
    assert "rnnattn.attention_backward" in program
    assert " copy(" not in program and " transpose(" not in program


# ---- what it cannot serve, and where it is not -------------------------------------------------


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (make_case(), "the dtype float64"),
        (make_case(dtype=jnp.float32, dropout_rate=0.1, dropout_key=jax.random.key(0)), "drop"),
        (make_case(Sizes(V=0), dtype=jnp.float32), "an array without elements"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_serve_is_an_error_and_left_to_xla(case, why):
    run = lambda **how: dot_product_attention(**case.floats, **case.others, **case.options, **how)
    with pytest.raises(ValueError, match=rf"'native'` cannot serve .*{why}"):
        run(**NATIVE)
    jax.eval_shape(run)


def test_a_bias_of_another_dtype_is_served():
    case = narrow(make_case(bias=(1, 4, 7, 10)))
    case.floats["bias"] = case.floats["bias"].astype(jnp.bfloat16)
    _, gradient = value_and_gradients(case, dot_product_attention, **NATIVE)
    assert gradient["bias"].dtype == jnp.bfloat16


def test_wrong_shapes_are_errors_of_the_call():
    f32, shape = np.float32, jax.ShapeDtypeStruct
    absent = [np.zeros(0, t) for t in (f32, np.bool_)]
    integers = [np.zeros(0, np.int32)] * 5
    q, k, v = np.ones((1, 4, 1, 3), f32), np.ones((1, 5, 1, 3), f32), np.ones((1, 5, 1, 2), f32)
    scale = np.ones((1,) * 5, f32)
    results = [shape((1, 4, 1, 2), f32), shape((1, 1, 1, 4), f32)]

    none = np.zeros(0, f32)

    def call(
        q=q, k=k, v=v, scale=scale, offset=(0,), distances=none, results=results, **attributes
    ):
        arguments = (
            q,
            k,
            v,
            scale,
            *absent,
            np.asarray(offset, np.int32),
            *integers,
            distances,
            none,
        )
        options = {
            "is_causal": False,
            "left": np.int64(-1),
            "right": np.int64(-1),
            "soft_cap": f32(0),
            **calls.call_attributes(),
            **attributes,
        }
        return jax.ffi.ffi_call("rnnattn.attention_forward.v5", results)(*arguments, **options)

    np.testing.assert_allclose(call()[0], np.ones((1, 4, 1, 2)))
    for wrong, name in (
        ({"k": np.ones((1, 5, 1, 4), f32)}, "key"),
        ({"k": np.ones((1, 6, 1, 3), f32)}, "value"),
        ({"v": np.ones((1, 5, 2, 2), f32)}, "value"),
        ({"q": np.ones((1, 1, 1, 4, 3), f32)}, "query"),
        ({"q": np.ones((1, 4, 1, 3), np.int32)}, "query"),
        ({"q": np.ones((1, 0, 1, 3), f32)}, "query"),
        ({"k": np.ones((1, 5, 2, 3), f32)}, "query: heads"),
        ({"k": np.ones((1, 5, 0, 3), f32)}, "query: heads"),
        ({"scale": np.ones((2, 1, 1, 1, 1), f32)}, "scale"),
        ({"scale": np.ones((0, 1, 1, 1, 1), f32)}, "scale"),
        ({"offset": (0, 0)}, "offset"),
        ({"distances": np.ones((1, 1, 1, 1, 1), f32)}, "by_distance: too few"),
        ({"distances": np.ones((1, 1, 1, 4, 8), f32)}, "by_distance"),
        ({"results": [results[0], shape((1, 1, 1, 5), f32)]}, "lse"),
        ({"instruction_set": np.int64(7)}, "instruction_set"),
    ):
        with pytest.raises(Exception, match=f"rnnattn: {name}"):
            jax.block_until_ready(call(**wrong))


@pytest.fixture
def fresh():
    """`status` as in a new process, in the test and after it."""
    load.found.cache_clear()
    yield
    load.found.cache_clear()


def test_status_and_the_environment_variable(monkeypatch, fresh):
    monkeypatch.delenv("RNNATTN_NATIVE", raising=False)
    assert native.status() == (True, SETS[0], None)
    for name in SETS:
        load.found.cache_clear()
        monkeypatch.setenv("RNNATTN_NATIVE", name)
        assert native.status() == (True, name, None)
    load.found.cache_clear()
    monkeypatch.setenv("RNNATTN_NATIVE", "sse")
    with pytest.raises(ValueError, match=rf"RNNATTN_NATIVE: expected one of '{SETS[0]}'.*'sse'"):
        native.status()
    load.found.cache_clear()
    monkeypatch.setenv("RNNATTN_NATIVE", "off")
    assert native.status() == (False, None, "RNNATTN_NATIVE is 'off'")
    case = narrow(make_case())
    with pytest.raises(ValueError, match=r"cannot serve this installation .*'off'"):
        outputs(case, dot_product_attention, **NATIVE)
    outputs(case, dot_product_attention)


def test_where_jaxlib_registers_by_another_name(monkeypatch, fresh):
    monkeypatch.delenv("RNNATTN_NATIVE", raising=False)
    monkeypatch.setattr(load, "xla_client", None)
    assert native.status() == (True, SETS[0], None)


def test_without_the_extension(monkeypatch, fresh):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(load, "import_module", missing)
    assert native.status().available is False
    assert "No module named 'rnnattn.native.kernels'" in (native.status().reason or "")
    outputs(narrow(make_case()), dot_product_attention)
