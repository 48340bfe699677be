"""Every public function under every switch of JAX: values and gradients are those without it.

A table of functions by a list of switches. Arguments are NumPy's, so that a switch acts on how they
are placed, too; what is expected is computed once for each function, in one compilation.
"""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnattn
from rnnattn import KVCache, LSTMParams, LSTMState, masks
from rnnattn.attention import dot_product_attention_jvp
from tests.attention_cases import QUICK, assert_same, quick

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
draw: Any = lambda *shape: np.asarray(RNG.normal(size=shape), np.float32)


class Case(NamedTuple):
    function: Any  # of the arguments by name, to a tree of arrays
    floats: dict[str, Any]  # what is differentiated
    others: dict[str, Any] = {}  # noqa: RUF012  # nobody changes it


def params(D, H):
    return LSTMParams(draw(D, 4 * H), draw(H, 4 * H), draw(4 * H))


SEQUENCE = {"p": params(2, 3), "x": draw(2, 3, 2), "state": LSTMState(draw(2, 3), draw(2, 3))}
MASKS = {"lengths": np.array([3, 2]), "resets": np.array([[False, True, False]] * 2)}
ATTENTION = {
    "query": draw(2, 4, 2, 2),
    "key": draw(2, 3, 1, 2),
    "value": draw(2, 3, 1, 3),
    "bias": draw(2, 4, 3),
    "scale": np.array([0.7, 0.5], np.float32),
    "sinks": draw(2),
}
HIDDEN = {"key_value_seq_lengths": np.array([3, 2]), "query_offset": np.array([0, 1])}
PLAIN = {name: ATTENTION[name] for name in ("query", "key", "value")}
TOKENS = {"rows": np.array([0, 1, 2]), "columns": np.array([2, 0, 1])}
LENGTH: Any = np.array([0, 2])
CACHE = KVCache(draw(2, 4, 1, 2), draw(2, 4, 1, 3), LENGTH)


# Parameters of the other units, D 2 and H 3.
GRU = rnnattn.GRUParams(draw(2, 9), draw(3, 9), draw(9), draw(3))
UNITS = {
    "gru": GRU,
    "rnn": rnnattn.RNNParams(draw(2, 3), draw(3, 3), draw(3)),
    "layer_norm_lstm": rnnattn.LayerNormLSTMParams(
        draw(2, 12), draw(3, 12), draw(12), draw(12), draw(12), draw(3), draw(3)
    ),
    "layer_norm_gru": rnnattn.LayerNormGRUParams(
        draw(2, 9), draw(3, 9), draw(9), draw(3), draw(9), draw(9)
    ),
    "slstm": rnnattn.SLSTMParams(draw(2, 12), draw(3, 1, 4), draw(12)),
}
FIELDS: dict[str, Any] = {"layer_norm_lstm": rnnattn.LSTMState, "slstm": rnnattn.SLSTMState}


def of_unit(name):
    """A unit over a sequence, and over one step."""
    fields = FIELDS.get(name)
    state = draw(2, 3) if fields is None else fields(*(draw(2, 3) for _ in fields._fields))
    given = {"p": UNITS[name], "state": state}
    run, step = (getattr(rnnattn, n) for n in (name, f"{name}_step"))
    return {
        name: Case(
            lambda p, x, state, **masks: run(p, x, state, **masks),
            {**given, "x": SEQUENCE["x"]},
            MASKS,
        ),
        f"{name}_step": Case(lambda p, x, state: step(p, x, state), {**given, "x": draw(2, 2)}),
    }


def attention(function=rnnattn.dot_product_attention, **options):
    """With all that has a gradient, and some of what hides."""
    return partial(function, is_causal=True, return_residual=True, **options)


def of_lstm(**options):
    return lambda p, x, state, **masks: rnnattn.lstm(p, x, state, **masks, **options)


def masked(slopes, table, query_ids, key_ids, **given):
    """By a mask that stays a function, and scores with floats of their own."""
    bias = masks.relative_bias(table)

    def score(logit, b, n, t, s):
        return bias(masks.alibi(slopes)(logit, b, n, t, s), b, n, t, s)

    documents = masks.document(query_ids, key_ids)
    shown = (masks.window(1) | masks.sinks(1)) & (documents | masks.dilated(2))
    shown &= masks.mapped(masks.dilated(1), 8, 8)
    return rnnattn.dot_product_attention(**given, mask_function=shown, score_function=score)


PAIR = {"a": draw(2, 3, 2), "b": draw(2, 3, 2), "h0": draw(2, 2)}


def of_linear(function):
    return lambda p, x, h, **masks: function(p, x, h, **masks)


def of_min(params, n, *steps):
    return {"p": params(draw(2, n * 3), draw(n * 3)), "x": draw(2, *steps, 2), "h": draw(2, 3)}


def of_blocks(*steps):
    gates = [draw(1, 2, 2), draw(1, 2, 2), draw(2), draw(2), draw(2)]
    return {"p": rnnattn.RGLRUParams(*gates), "x": draw(2, *steps, 2), "h": draw(2, 2)}


def update_cache(cache_key, cache_value, key, value, length):
    return rnnattn.update_cache(KVCache(cache_key, cache_value, length), key, value)


PAGES: Any = {"pages_key": draw(3, 2, 1, 2), "pages_value": draw(3, 2, 1, 3)}
TABLE: Any = {
    "table": np.array([[0, 1], [0, 0]], np.int32),
    "lengths": np.array([3, 1], np.int32),
    "overflowed": np.array([True, False]),
}
PAGED = rnnattn.PagedCache(**{n.removeprefix("pages_"): x for n, x in PAGES.items()}, **TABLE)
ROTATING = {"cache_key": draw(2, 3, 1, 2), "cache_value": draw(2, 3, 1, 3)}
TOKENS_OF_ROWS = {"key": draw(2, 1, 1, 2), "value": draw(2, 1, 1, 3)}


def paged(function, **options):
    """Of a cache in pages, and of more."""

    def call(pages_key, pages_value, table, lengths, overflowed, **others):
        cache = rnnattn.PagedCache(pages_key, pages_value, table, lengths, overflowed)
        if "query" in others:
            return function(others.pop("query"), cache, **others, **options)
        return function(cache, **others)

    return call


def rotating(function, **options):
    def call(cache_key, cache_value, length, **others):
        cache = rnnattn.RotatingCache(cache_key, cache_value, length)
        if "query" in others:
            return function(others.pop("query"), cache, **others, **options)
        return function(cache, **others)

    return call


CACHES = {
    "append": Case(
        paged(rnnattn.append), {**PAGES, **TOKENS_OF_ROWS}, {**TABLE, "counts": np.array([1, 1])}
    ),
    "fork": Case(paged(rnnattn.fork), PAGES, {**TABLE, "source_rows": np.array([1, 0, 1])}),
    "drop": Case(paged(rnnattn.drop), PAGES, {**TABLE, "rows": np.array([True, False])}),
    "truncate": Case(
        paged(lambda cache, upto: rnnattn.truncate(cache, upto)),
        PAGES,
        {**TABLE, "upto": np.array([2, 2])},
    ),
    "free_pages": Case(paged(rnnattn.free_pages), {}, {**PAGES, **TABLE}),
    "reference_counts": Case(paged(rnnattn.reference_counts), {}, {**PAGES, **TABLE}),
    "paged_attention": Case(
        paged(rnnattn.paged_attention, return_residual=True),
        {**PAGES, "query": draw(2, 2, 2, 2), "sinks": draw(2)},
        {**TABLE, "query_seq_lengths": np.array([2, 1])},
    ),
    "update_rotating_cache": Case(
        rotating(rnnattn.update_rotating_cache),
        {**ROTATING, **TOKENS_OF_ROWS},
        {"length": LENGTH, "counts": np.array([1, 0])},
    ),
    "rotating_attention": Case(
        rotating(rnnattn.rotating_attention, window=1),
        {**ROTATING, "query": draw(2, 2, 2, 2)},
        {"length": np.array([4, 2])},
    ),
    "quantise": Case(rnnattn.quantise, {"x": draw(2, 3)}),
    "dequantise": Case(
        rnnattn.dequantise, {"scale": draw(2)}, {"x": np.array([[1, -2], [3, 4]], np.int8)}
    ),
}


CASES = {
    "lstm": Case(of_lstm(), SEQUENCE, MASKS),
    "lstm on XLA": Case(of_lstm(implementation="xla"), SEQUENCE, MASKS),
    "lstm from zeros": Case(
        lambda p, x: rnnattn.lstm(p, x, residuals=2, clip=3.0),
        {"p": SEQUENCE["p"], "x": SEQUENCE["x"]},
    ),
    "lstm, drawn": Case(
        lambda seed, p, x, state, **masks: of_lstm(
            zoneout=(0.3, 0.2),
            recurrent_dropout=0.3,
            candidate_dropout=0.3,
            key=jax.random.wrap_key_data(seed),
        )(p, x, state, **masks),
        SEQUENCE,
        {**MASKS, "seed": np.array([0, 1], np.uint32)},
    ),
    "lstm_step": Case(
        lambda p, x, state: rnnattn.lstm_step(p, x, state), {**SEQUENCE, "x": draw(2, 2)}
    ),
    "bidirectional_lstm": Case(
        lambda ahead, back, x, **masks: rnnattn.bidirectional_lstm(ahead, back, x, **masks),
        {"ahead": params(2, 3), "back": params(2, 3), "x": SEQUENCE["x"]},
        {"lengths": MASKS["lengths"]},
    ),
    "stacked_lstm": Case(
        lambda layers, x, seed: rnnattn.stacked_lstm(
            layers, x, dropout_rate=0.3, dropout_key=jax.random.wrap_key_data(seed)
        ),
        {"layers": [params(2, 3), (params(3, 2), params(3, 2))], "x": SEQUENCE["x"]},
        {"seed": np.array([0, 1], np.uint32)},
    ),
    "linear_scan": Case(rnnattn.linear_scan, PAIR, MASKS),
    "mingru": Case(of_linear(rnnattn.mingru), of_min(rnnattn.MinGRUParams, 2, 3), MASKS),
    "mingru_step": Case(of_linear(rnnattn.mingru_step), of_min(rnnattn.MinGRUParams, 2)),
    "minlstm": Case(of_linear(rnnattn.minlstm), of_min(rnnattn.MinLSTMParams, 3, 3), MASKS),
    "minlstm_step": Case(of_linear(rnnattn.minlstm_step), of_min(rnnattn.MinLSTMParams, 3)),
    "rglru": Case(of_linear(rnnattn.rglru), of_blocks(3), MASKS),
    "rglru_step": Case(of_linear(rnnattn.rglru_step), of_blocks()),
    **{name: case for unit in UNITS for name, case in of_unit(unit).items()},
    "dot_product_attention": Case(attention(), ATTENTION, HIDDEN),
    "dot_product_attention, alone": Case(rnnattn.dot_product_attention, PLAIN),
    "dot_product_attention, numbers": Case(
        partial(
            rnnattn.dot_product_attention,
            scale=0.7,
            query_offset=-1,
            local_window_size=1,
            logits_soft_cap=2.0,
        ),
        PLAIN,
    ),
    "dot_product_attention, dense": Case(
        attention(implementation="dense", return_weights=True), ATTENTION, HIDDEN
    ),
    "dot_product_attention, blockwise": Case(
        lambda seed, **arrays: attention(implementation="blockwise")(
            **arrays, dropout_rate=0.3, dropout_key=jax.random.wrap_key_data(seed)
        ),
        ATTENTION,
        {**HIDDEN, "seed": np.array([0, 1], np.uint32)},
    ),
    "dot_product_attention, hidden": Case(
        rnnattn.dot_product_attention,
        PLAIN,
        {"key_value_seq_lengths": np.array([0, 2]), "query_seq_lengths": np.array([4, 1])},
    ),
    "dot_product_attention, masks": Case(
        masked,
        {**PLAIN, "slopes": draw(2), "table": draw(8, 2)},
        {"query_ids": np.array([0, 0, 1, 1]), "key_ids": np.array([[0, 1, 1], [0, 0, 1]])},
    ),
    "dot_product_attention_jvp": Case(attention(dot_product_attention_jvp), ATTENTION, HIDDEN),
    "packed_attention": Case(
        partial(rnnattn.packed_attention, is_causal=True, return_residual=True),
        {"query": draw(5, 2, 2), "key": draw(6, 1, 2), "value": draw(6, 1, 3), "sinks": draw(2)},
        {"cu_seqlens_query": np.array([0, 2, 5]), "cu_seqlens_key": np.array([0, 1, 4])},
    ),
    **CACHES,
    "packed_positions": Case(
        partial(rnnattn.packed_positions, tokens=4), {}, {"cu_seqlens": np.array([0, 1, 3])}
    ),
    "lengths_to_cu_seqlens": Case(
        rnnattn.lengths_to_cu_seqlens, {}, {"lengths": np.array([3, 0, 1])}
    ),
    "cu_seqlens_to_lengths": Case(
        rnnattn.cu_seqlens_to_lengths, {}, {"cu_seqlens": np.array([0, 1, 3])}
    ),
    "cu_seqlens_to_segment_ids": Case(
        partial(rnnattn.cu_seqlens_to_segment_ids, tokens=4),
        {},
        {"cu_seqlens": np.array([0, 1, 3])},
    ),
    "segment_ids_to_cu_seqlens": Case(
        partial(rnnattn.segment_ids_to_cu_seqlens, sequences=2),
        {},
        {"segment_ids": np.array([0, 0, 1, 2])},
    ),
    "update_cache": Case(
        update_cache,
        {
            "cache_key": CACHE.key,
            "cache_value": CACHE.value,
            "key": draw(2, 1, 1, 2),
            "value": draw(2, 1, 1, 3),
        },
        {"length": CACHE.length},
    ),
    "rope": Case(rnnattn.rope, {"x": draw(2, 3, 2, 4), "positions": draw(3)}),
    "rope of integers": Case(
        partial(rnnattn.rope, scaling=rnnattn.YaRNScaling(4.0, 2048), rotary_dim=2),
        {"x": draw(2, 3, 2, 4)},
        {"positions": np.array([0, 1, 2**20])},
    ),
    "mrope": Case(
        partial(rnnattn.mrope, sections=(1, 1)), {"x": draw(2, 3, 2, 4), "positions": draw(2, 3)}
    ),
    "xpos": Case(rnnattn.xpos, {"x": draw(2, 3, 2, 4), "positions": draw(3)}),
    "rope_2d": Case(rnnattn.rope_2d, {"x": draw(2, 3, 2, 4)}, TOKENS),
    "rope_mixed": Case(
        rnnattn.rope_mixed, {"x": draw(2, 3, 2, 4), "frequencies": draw(2, 2, 2)}, TOKENS
    ),
    "sinusoids": Case(partial(rnnattn.sinusoids, dim=4), {"positions": draw(3)}),
    "sinusoids of integers": Case(
        partial(rnnattn.sinusoids, dim=4), {}, {"positions": np.arange(3)}
    ),
    "shift_matrix": Case(partial(rnnattn.shift_matrix, dim=4), {"offset": draw()}),
    "patchify": Case(partial(rnnattn.patchify, patch_size=2), {"images": draw(1, 4, 2, 1)}),
    "unpatchify": Case(
        partial(rnnattn.unpatchify, size=(4, 2), patch_size=2), {"tokens": draw(1, 2, 4)}
    ),
    "resample_grid": Case(
        partial(rnnattn.resample_grid, old=(2, 3), new=(3, 2), prefix_tokens=1),
        {"embeddings": draw(7, 2)},
    ),
    "resize_patch_kernel": Case(
        partial(rnnattn.resize_patch_kernel, patch_size=3), {"kernel": draw(2, 2, 1, 2)}
    ),
    "crop_and_pad": Case(partial(rnnattn.crop_and_pad, size=(3, 4)), {"images": draw(1, 4, 2, 1)}),
    "token_mask": Case(
        partial(rnnattn.token_mask, patch_size=2),
        {},
        {"valid": np.array([[[True] * 2 + [False] * 4] * 2])},
    ),
    "conv_stem": Case(
        partial(rnnattn.conv_stem, grid=(2, 2)),
        {
            "images": draw(1, 5, 4, 1),
            "kernels": [draw(2, 2, 1, 2), draw(1, 1, 2, 2)],
            "biases": [draw(2), draw(2)],
        },
    ),
}
every = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True, scope="module")
def _compiled_in_a_hurry():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_table_is_complete():
    """Each public function of arrays is in it."""
    without = {"stem_strides"}  # of sizes
    without |= {name for name in rnnattn.__all__ if name.startswith("init_")}
    without |= {"bidirectional", "stacked"}  # what those of the LSTM call
    public = {n for n in rnnattn.__all__ if n[0].islower() and callable(getattr(rnnattn, n))}
    assert public - without == {name.split(",")[0].split(" ")[0] for name in CASES} - {
        "dot_product_attention_jvp"
    }


def split(tree):
    """What is floating of a tree, and the rest."""
    leaves = jax.tree.leaves(tree)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    pick = lambda want: [x for x, f in zip(leaves, floating, strict=True) if f == want]
    return pick(True), pick(False)


def run(function, floats, others, cotangents):
    """All that comes of a call: the results and the gradient."""
    of_floats = lambda floats: split(function(**floats, **others))
    results, pullback, rest = jax.vjp(of_floats, floats, has_aux=True)
    return results, rest, pullback(cotangents)[0]


class Problem(NamedTuple):
    run: Any  # (floats, others, cotangents) → results
    arrays: Any  # these, NumPy's
    expected: Any


@cache
def problem(name) -> Problem:
    case = CASES[name]
    results, _ = jax.eval_shape(
        lambda: split(case.function(**placed({**case.floats, **case.others})))
    )
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=x.shape).astype(x.dtype) for x in results]
    arrays = (case.floats, case.others, cotangents)
    call = partial(run, case.function)
    return Problem(call, arrays, jax.tree.map(np.asarray, quick(call)(*placed(arrays))))


def placed(tree):
    """On the device, as the switches of the moment would have it."""
    return jax.tree.map(jnp.asarray, tree)


def assert_right(actual, name, rtol=1e-5):
    assert_same(actual, problem(name).expected, rtol)


def eager(name):
    """One call after the other, as in a notebook."""
    call, arrays, _ = problem(name)
    return call(*placed(arrays))


def compiled(name):
    """In one program, traced anew."""
    call, arrays, _ = problem(name)
    return quick(lambda *arrays: call(*arrays))(*placed(arrays))


# ---- what is switched on around a call ----------------------------------------------------------


def switched(*contexts):
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


def not_finite_is_an_error():
    return switched(jax.debug_nans(True), jax.debug_infs(True))


# Of switches that do not touch each other each fails as if it was alone.
AROUND: dict[str, Any] = {
    "disable_jit": (eager, jax.disable_jit),
    "debug_nans and debug_infs": (eager, not_finite_is_an_error),
    "not enable_x64, another device": (
        eager,
        lambda: switched(jax.enable_x64(False), jax.default_device(jax.devices()[-1])),
    ),
    "all that a program is compiled under": (
        compiled,
        lambda: switched(
            not_finite_is_an_error(),
            jax.checking_leaks(),
            jax.enable_checks(True),
            jax.log_compiles(),
            jax.explain_cache_misses(True),
            jax.default_matmul_precision("highest"),
            jax.numpy_dtype_promotion("standard"),  # the suite runs with "strict" and "raise"
            jax.numpy_rank_promotion("allow"),
        ),
    ),
}


# Operation by operation these take longer than all others together, and have none of their own:
# others run the same blocks, draws and angles.
LONG = ("lstm, drawn", "dot_product_attention, blockwise", "dot_product_attention_jvp", "rope")


# One of each kind is enough of what takes long: programs, and operations one by one.
KINDS = ("lstm_step", "linear_scan", "dot_product_attention, alone", "rope", "patchify")


def around_calls():
    for name, switch in itertools.product(CASES, AROUND):
        if switch == "disable_jit" and name in LONG:
            continue
        is_long = switch == "disable_jit" or AROUND[switch][0] is compiled
        marks = [pytest.mark.thorough] if is_long and name not in KINDS else []
        yield pytest.param(name, switch, marks=marks)


@pytest.mark.parametrize("name, switch", list(around_calls()))
def test_around_a_call(name, switch):
    problem(name)
    call, context = AROUND[switch]
    with context():
        actual = call(name)
    assert_right(actual, name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].floats])
def test_what_is_not_a_number_is_named(name):
    """In the arguments, and in what comes back."""
    call, (floats, others, cotangents), _ = problem(name)

    def poisoned(tree, poison):
        leaves, structure = jax.tree.flatten(placed(tree))
        return jax.tree.unflatten(structure, [jnp.full_like(leaves[0], poison), *leaves[1:]])

    others, poison = placed(others), poisoned(floats, jnp.nan)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        call(poison, others, placed(cotangents))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        call(placed(floats), others, poisoned(cotangents, jnp.nan))
    poison = poisoned(floats, jnp.inf)
    results = call(poison, others, placed(cotangents))
    infinite = any(jnp.isinf(x).any() for x in jax.tree.leaves(results[0]))
    if infinite:
        with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
            call(poison, others, placed(cotangents))


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("numbers")])
def test_nothing_goes_to_the_device_unasked(name):
    """Traced anew, eagerly and in a program; a number given goes there as in any function of JAX.

    Eagerly the value alone, since JAX's own gradient sends constants.
    """
    call, arrays, expected = problem(name)
    on_device = jax.block_until_ready(placed(arrays))
    jax.clear_caches()
    floats, others, _ = on_device
    with jax.transfer_guard("disallow"):
        results = CASES[name].function(**floats, **others)
        actual = quick(lambda *arrays: call(*arrays))(*on_device)
    assert_same(split(results), expected[:2], 1e-5)
    assert_right(actual, name)


# ---- what a call is wrapped in ------------------------------------------------------------------


def at_compile_time(call, arrays):
    def constant():
        with jax.ensure_compile_time_eval():
            return call(*placed(arrays))

    return quick(constant)()


def prepared(call, arrays):
    """With residuals computed again, compiled ahead of time, and in the place of its arguments."""
    again = partial(run, jax.checkpoint(call.args[0]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    with warnings.catch_warnings(), jax.default_matmul_precision("F32_F32_F32"):
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        program = jax.jit(again, donate_argnums=(0, 2), compiler_options=QUICK).lower(*shapes)
        return program.compile()(*jax.tree.map(jnp.array, arrays))


WITHIN = {f.__name__: f for f in (at_compile_time, prepared)}


@pytest.mark.parametrize("wrapper", WITHIN)
@every
def test_within(name, wrapper):
    call, arrays, _ = problem(name)
    assert_right(WITHIN[wrapper](call, arrays), name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(CASES)[::3])
def test_threads(name):
    """Of every third: what threads share is JAX's caches, whatever the function."""
    problem(name)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(how, name) for how in (compiled, eager, compiled)]
    for result in results:
        assert_right(result.result(), name)


# ---- several processes --------------------------------------------------------------------------


def in_another_process(code, *arguments, **environment):
    """What a process prints that has this module and no settings of the suite."""
    code = f"from tests.test_switches import *\n{code}"
    environment = {**os.environ, "JAX_ENABLE_X64": "1", **environment}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_all(path):
    """The results of all cases, each in one program."""
    results = {name: jax.tree.map(np.asarray, problem(name).expected) for name in CASES}
    Path(path).write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The results of a process that compiles, and of one that finds what was compiled."""
    folder = tmp_path_factory.mktemp("cache")
    code = """
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
write_all(sys.argv[1])
print(sum(hits))
"""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "1",
    }
    hits = [int(in_another_process(code, folder / name, **settings)) for name in "ab"]
    assert hits[1] >= hits[0] + len(CASES), hits
    return [pickle.loads((folder / name).read_bytes()) for name in "ab"]


@pytest.mark.thorough
@every
def test_programs_kept_on_disk(name, cached):
    for results in cached:
        assert_right(results[name], name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork(tmp_path):
    """Before JAX is used: it cannot be forked after."""
    code = """
rnnattn.native.status()
child = os.fork()
write_few(sys.argv[1] + str(child > 0))
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    in_another_process(code, tmp_path / "results")
    for parent in (True, False):
        for name, results in pickle.loads((tmp_path / f"results{parent}").read_bytes()).items():
            assert_right(results, name)


FEW = ["lstm", "dot_product_attention", "rope"]


def write_few(path):
    results = {name: problem(name).expected for name in FEW}
    Path(path).write_bytes(pickle.dumps(results))


# ---- copies -------------------------------------------------------------------------------------

COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}
VALUES = {
    "LSTMParams": SEQUENCE["p"],
    "LSTMState": SEQUENCE["state"],
    "KVCache": CACHE,
    "PagedCache": PAGED,
    "RotatingCache": rnnattn.RotatingCache(ROTATING["cache_key"], ROTATING["cache_value"], LENGTH),
    "LinearScaling": rnnattn.LinearScaling(2.0),
    "NTKScaling": rnnattn.NTKScaling(2.0),
    "YaRNScaling": rnnattn.YaRNScaling(2.0, 16),
    "Llama3Scaling": rnnattn.Llama3Scaling(),
    "DynamicNTKScaling": rnnattn.DynamicNTKScaling(2.0, 16, 32),
    "LongRoPEScaling": rnnattn.LongRoPEScaling((1.0,), (2.0,), 16, 32),
    "PRoPEScaling": rnnattn.PRoPEScaling(0.5),
}
MODULES: dict[str, Any] = {
    "LSTMCell": (
        lambda: rnnattn.nn.LSTMCell(2, 3, peephole=True, rngs=nnx.Rngs(0)),
        lambda m: m(m.initialize_carry((2, 2)), jnp.ones((2, 2), jnp.float32)),
    ),
    "LSTM": (
        lambda: rnnattn.nn.LSTM(
            2, 3, num_layers=2, bidirectional=True, dropout_rate=0.5, rngs=nnx.Rngs(0)
        ),
        lambda m: m(jnp.ones((2, 3, 2), jnp.float32)),
    ),
    "MultiHeadAttention": (
        lambda: rnnattn.nn.MultiHeadAttention(
            2, 4, rope=True, qk_norm=True, dropout_rate=0.5, rngs=nnx.Rngs(0)
        ),
        lambda m: m(jnp.ones((1, 3, 4), jnp.float32)),
    ),
    "ViT": (
        lambda: rnnattn.nn.ViT(
            patch_size=2,
            width=4,
            depth=1,
            num_heads=1,
            classes=2,
            position="rope2d",
            stem="conv",
            image_size=4,
            channels=1,
            dropout_rate=0.5,
            rngs=nnx.Rngs(0),
        ),
        lambda m: m(jnp.ones((1, 4, 4, 1), jnp.float32)),
    ),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_copies_of_values(name, how):
    of_jax = jax.tree.map(
        lambda x: x if isinstance(x, rnnattn.position.Scaling) else jnp.array(x), VALUES[name]
    )
    for value in (VALUES[name], of_jax):
        same = COPIES[how](value)
        assert type(same) is type(value)
        jax.tree.map(np.testing.assert_array_equal, same, value)
        if isinstance(value, rnnattn.position.Scaling):
            assert same == value and hash(same) == hash(value)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_copies_of_modules(name, how):
    """The state of the graph, keys of dropout included, goes on where it stood."""
    make, call = MODULES[name]
    module = make()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        call(module)
        if how == "pickle":
            graph, state = nnx.split(module)
            same = nnx.merge(*COPIES[how]((graph, state)))
        else:
            same = copy.deepcopy(module)
        for _ in range(2):
            jax.tree.map(np.testing.assert_array_equal, call(same), call(module))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_functions(how):
    for name in rnnattn.__all__:
        if callable(function := getattr(rnnattn, name)):
            assert COPIES[how](function) is function
            assert COPIES[how](partial(function, 1)).func is function
