"""Attention by our kernels for a Hopper GPU, on a machine without one.

Around the kernels: plain JAX stands for them, sees whom the blocks and ranges say, and is given
small tiles. The kernels themselves: in Pallas' interpreter, which looks for races, where what the
tensor core reads of registers goes through shared memory. And what a program for a GPU has, what
runs elsewhere, what is refused.
"""

import importlib
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from rnnattn import dispatch, dot_product_attention, packed_attention, reference
from rnnattn.attention import cudnn, pallas
from rnnattn.attention.placed import backward_on_xla, forward_on_xla, placed
from tests.attention_cases import (
    Sizes,
    assert_same,
    attend,
    cotangents_for,
    make_case,
    of_call,
    of_halves,
    quick,
    relative_error,
    with_nan,
)

hopper = pytest.importorskip("rnnattn.attention.hopper")

# ---- around the kernels -----------------------------------------------------------------------

TILE, BLOCK = 8, 4
LOG2_E = float(np.log2(np.e))


def seen(reach, T, S, rows, columns, transposed=False):
    """(B, T, S), or (B, S, T): what a kernel shows of blocks of so many rows and columns."""
    if reach is None:
        return jnp.full((1, S, T) if transposed else (1, T, S), True)
    keys = jnp.arange(S, dtype=jnp.int32)[None, None]
    pairs = (keys >= reach.first[..., None]) & (keys < reach.past[..., None])
    if reach.query_segments is not None:
        pairs &= reach.query_segments[..., None] == reach.key_segments[:, None]
    pairs = jnp.swapaxes(pairs, 1, 2) if transposed else pairs
    begin, end, start, stop = (reach.blocks[..., i, None] for i in range(4))
    block = jnp.arange(pairs.shape[2] // columns, dtype=jnp.int32)[None, None]
    visited, whole = (block >= begin) & (block < end), (block >= start) & (block < stop)
    of_pairs = lambda x: jnp.repeat(jnp.repeat(x, rows, 1), columns, 2)
    return of_pairs(visited) & (of_pairs(whole) | pairs)


def of_rows(scale, query):
    """(B N,) → (B, N, 1, 1)."""
    return scale.reshape(query.shape[0], query.shape[2], 1, 1)


def logits(query, key, scale, soft_cap):
    """Before the bias."""
    s = of_rows(scale, query) * jnp.einsum("btnk,bsnk->bnts", query, key)
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def biased(s, bias):
    return s if bias is None else s + bias


def of_heads(x, N):
    return jnp.repeat(x, N // x.shape[2], 2)


def forward(query, key, value, scale, reach, *, soft_cap, dtype, bias=None):
    (_, T, N, _), S = query.shape, key.shape[1]
    assert T % TILE == S % TILE == 0 and dtype == jnp.float32
    sees = seen(reach, T, S, TILE, BLOCK)[:, None]
    s = biased(logits(query, of_heads(key, N), scale, soft_cap), bias)
    s = jnp.where(sees, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
    return jnp.einsum("bnts,bsnv->btnv", p, of_heads(value, N)), lse


def gradient(arrays, scale, reach, soft_cap, sees, bias):
    """Of each head: dq, dk, dv; and dS before scale and cap."""
    q, k, v, do, lse, delta = arrays
    k, v = (of_heads(x, q.shape[2]) for x in (k, v))
    s = logits(q, k, scale, soft_cap)
    p = jnp.where(sees[:, None], jnp.exp2(biased(s, bias) * LOG2_E - lse[..., None]), 0)
    ds = of_bias = p * (jnp.einsum("btnv,bsnv->bnts", do, v) - delta[..., None])
    if soft_cap is not None:
        ds *= 1 - (s / soft_cap) ** 2
    ds *= of_rows(scale, q)
    sums = partial(jnp.einsum, "bnts,btnc->bsnc")
    return jnp.einsum("bnts,bsnk->btnk", ds, k), sums(ds, q), sums(p, do), of_bias


def query_gradient(arrays, scale, reach, *, soft_cap, bias=None, bias_gradient=False):
    """Of dS no kernel writes the blocks that it does not visit."""
    T, S = arrays[0].shape[1], arrays[1].shape[1]
    sees = seen(reach, T, S, TILE, BLOCK)
    dq, *_, ds = gradient(arrays, scale, reach, soft_cap, sees, bias)
    blocks = sees.reshape(-1, T // TILE, TILE, S // BLOCK, BLOCK).any((2, 4))
    visited = jnp.repeat(jnp.repeat(blocks, TILE, 1), BLOCK, 2)[:, None]
    return [dq, jnp.where(visited, ds, jnp.nan)] if bias_gradient else [dq]


def key_gradient(arrays, scale, reach, *, soft_cap, bias=None):
    T, (B, S, M, _) = arrays[0].shape[1], arrays[1].shape
    sees = jnp.swapaxes(seen(reach, T, S, TILE, BLOCK, transposed=True), 1, 2)
    of_each = gradient(arrays, scale, reach, soft_cap, sees, bias)[1:3]
    return [x.reshape(B, S, M, -1, x.shape[3]).sum(3) for x in of_each]


@pytest.fixture
def stubs(monkeypatch):
    """A schedule whose kernels are these, on the CPU; those of a call that ran, by name."""
    ran: list[str] = []

    def stub(function):
        def run(*arguments, **options):
            ran.append(function.__name__)
            return function(*arguments, **options)

        monkeypatch.setattr(hopper, function.__name__, run)

    for function in (forward, query_gradient, key_gradient):
        stub(function)
    monkeypatch.setattr(hopper, "TILE", TILE)
    for name in ("FORWARD_KEYS", "BACKWARD_QUERIES"):
        monkeypatch.setattr(hopper, name, BLOCK)
    monkeypatch.setattr(hopper, "backward_keys", lambda K, V: BLOCK)
    return placed("rnnattn_pallas_stub", {"cpu": pallas.ON_HOPPER}), ran


ALL = ["forward", "query_gradient", "key_gradient"]
SIZES = Sizes(B=3, T=22, S=25, N=4, M=2, K=3, V=5)
SORTED = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (3, 25)), 1))
SHUFFLED = jnp.asarray(np.random.default_rng(1).integers(0, 4, (3, 25)))
LENGTHS = {
    "query_seq_lengths": jnp.array([22, 0, 9]),
    "key_value_seq_lengths": jnp.array([13, 25, 0]),
}
OFFSET = {"query_offset": jnp.array([3, -5, 40])}
WINDOW = {"local_window_size": (3, 9)}


def segments(ids):
    return {"query_segment_ids": ids[:, :22], "key_value_segment_ids": ids}


CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {"sizes": SIZES._replace(T=16, S=24)},
    "full": {},
    "one of each": {"sizes": Sizes(1, 1, 1, 1, 1, 1, 1)},
    "causal, capped": {"is_causal": True, "logits_soft_cap": 1.5},
    "window, offset": OFFSET | WINDOW,
    "lengths": LENGTHS | {"scale": (4,), "sinks": True},
    "segments": segments(SORTED) | {"is_causal": True, "sinks": True},
    "segments in no order": segments(SHUFFLED) | LENGTHS,
    "bias": {"bias": (3, 4, 22, 25)},
    "one bias for all, capped": LENGTHS | {"bias": (22, 25), "logits_soft_cap": 1.5},
    "a bias of each head, causal": {"bias": (1, 4, 22, 25), "is_causal": True, "sinks": True},
    "a bias of each row, segments": segments(SORTED) | {"bias": (3, 1, 22, 25)},
    "segments that keys have not": {
        "query_segment_ids": SORTED[:, :22],
        "key_value_segment_ids": jnp.where(SORTED == 2, 7, SORTED),
    }
    | WINDOW,
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_made_for_the_kernels_is_right(name, stubs):
    """Against the twin: O and L, and the gradient of all, from cotangents of both."""
    schedule, ran = stubs
    how = dict(CASES[name])
    case = make_case(how.pop("sizes", SIZES), dtype=jnp.float32, **how)
    cotangents = cotangents_for(case)
    expected = of_call(reference.dot_product_attention, case, cotangents)
    if "scale" not in case.floats:
        case, cotangents = with_nan(case, cotangents)
    actual = of_call(partial(attend, schedule), case, cotangents)
    assert ran == (ALL[:1] if "scale" in case.floats else ALL)
    assert_same(actual, expected, 1e-5)


def test_what_is_seen_and_not_finite_spreads_and_the_rest_does_not(stubs):
    """A query that sees a value of NaN has no output; the others have theirs."""
    schedule, _ = stubs
    case = make_case(SIZES._replace(T=25), dtype=jnp.float32, is_causal=True)
    cotangents = cotangents_for(case)
    expected = of_call(reference.dot_product_attention, case, cotangents)[0][0]
    floats = case.floats | {"value": case.floats["value"].at[:, 20, :, 0].set(jnp.nan)}
    (o, lse), d = of_call(partial(attend, schedule), case._replace(floats=floats), cotangents)
    assert_same(o[:, :20], expected[:, :20], 1e-5)
    assert jnp.isnan(o[:, 20:]).all() and jnp.isnan(lse[:, 20:]).all()
    assert jnp.isnan(d["key"]).any() and jnp.isnan(d["query"][:, 20:]).all()
    assert jnp.isfinite(d["query"][:, :20]).all()


def test_what_comes_back_and_is_not_finite_spreads(stubs):
    schedule, _ = stubs
    case = make_case(SIZES._replace(T=25), dtype=jnp.float32, is_causal=True)
    do, dlse = cotangents_for(case)
    d = of_call(partial(attend, schedule), case, (do.at[:, 9].set(jnp.inf), dlse))[1]
    assert all(jnp.isnan(d[name][:, :10]).all() for name in ("key", "value"))
    assert all(jnp.isfinite(d[name][:, 10:]).all() for name in ("query", "key", "value"))


def test_rows_of_vmap_have_scales_of_their_own(stubs):
    schedule, _ = stubs
    case = make_case(SIZES, dtype=jnp.float32, scale=(2,))
    scales, arrays = case.floats.pop("scale"), case.floats
    of_scale = lambda function: quick(
        jax.vmap(lambda scale, arrays: function(**arrays, scale=scale), (0, None))
    )(scales, arrays)
    expected = of_scale(reference.dot_product_attention)
    assert_same(of_scale(partial(attend, schedule)), expected, 1e-5)


# ---- the kernels ------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch, capsys):
    if jax.__version_info__ < (0, 11):
        pytest.skip("the interpreter of jax 0.10 fails on these kernels")
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    how = plgpu.InterpretGPUParams(detect_races=True)
    for name in ALL:
        monkeypatch.setattr(hopper, name, partial(getattr(hopper, name), interpret=how))
    yield
    assert "RACE" not in capsys.readouterr().out  # jax 0.11 prints what raises from 0.12 on


def ids(*shape):
    return jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 3, shape), -1))


KERNEL_CASES: dict[str, tuple[Sizes, Any, dict[str, Any]]] = {
    "full": (Sizes(1, 128, 384, 1, 1, 64, 64), jnp.bfloat16, {}),
    "window, offset, groups, wide": (
        Sizes(1, 130, 256, 2, 1, 128, 64),
        jnp.float16,
        {"local_window_size": (100, 7), "query_offset": jnp.array([-20])},
    ),
    "segments, causal, capped": (
        Sizes(1, 200, 200, 2, 2, 64, 128),
        jnp.bfloat16,
        {
            "is_causal": True,
            "logits_soft_cap": 2.0,
            "query_segment_ids": ids(1, 200),
            "key_value_segment_ids": ids(1, 200),
        },
    ),
    "a bias of each head, causal, capped, groups": (
        Sizes(1, 200, 200, 2, 1, 64, 64),
        jnp.bfloat16,
        {"is_causal": True, "logits_soft_cap": 2.0, "bias": (1, 2, 200, 200)},
    ),
    "a bias of each row, wide": (
        Sizes(2, 128, 256, 2, 2, 128, 128),
        jnp.float16,
        {"bias": (2, 1, 128, 256)},
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernels_are_about_as_exact_as_xla(name):
    """Beside float32, of all results and gradients: weights are rounded, which XLA does not do."""
    sizes, dtype, how = KERNEL_CASES[name]
    case = make_case(sizes, dtype=dtype, **how)
    cotangents = cotangents_for(case)
    wide = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, tree
    )
    on_xla = forward_on_xla, backward_on_xla
    exact = of_halves(on_xla, case._replace(floats=wide(case.floats)), wide(cotangents))
    made = (of_halves(halves, case, cotangents) for halves in (pallas.ON_HOPPER, on_xla))
    errors, of_xla = (jax.tree.map(relative_error, wide(results), exact) for results in made)
    for ours, other in zip(errors, of_xla, strict=True):
        assert ours < 1.5 * max(other, float(jnp.finfo(dtype).eps) / 4), (errors, of_xla)


# ---- programs ---------------------------------------------------------------------------------

T = 256
IDS = {"query_segment_ids": ids(2, T), "key_value_segment_ids": ids(2, T)}
BIAS = {"bias": jnp.zeros((1, 2, T, T), jnp.bfloat16), "logits_soft_cap": 3.0}


def gradient_of(query, key, value, **options):
    def loss(*qkv):
        return jnp.sum(dot_product_attention(*qkv, **options).astype(jnp.float32))

    return jax.grad(loss, (0, 1, 2))(query, key, value)


def kernels_for_a_gpu(implementation, rows=T, dtype=jnp.bfloat16, **options):
    """How many a program has that is lowered here, and one that is exported."""
    query, key = (jax.ShapeDtypeStruct((2, n, 2, 64), dtype) for n in (rows, T))
    function = jax.jit(partial(gradient_of, implementation=implementation, **options))
    arrays = query, key, key
    here = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    known = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    made = export.export(function, platforms=["cuda"], disabled_checks=known)(*arrays)
    return [text.count("@mosaic_gpu_v2") for text in (here, str(made.mlir_module()))]


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "logits_soft_cap": 3.0}, IDS, BIAS])
def test_a_program_for_a_gpu_has_the_kernels(options):
    assert kernels_for_a_gpu("pallas", **options) == [3, 3]


@pytest.mark.parametrize(
    ("capability", "rows", "options", "count"),
    [
        ((9, 0), 256, IDS, 3),
        ((9, 0), 255, {"logits_soft_cap": 3.0}, 0),
        ((9, 0), 256, {"is_causal": True}, 0),  # which cuDNN serves
        ((9, 0), 256, BIAS, 0),
        ((8, 0), 256, IDS, 0),
    ],
)
def test_none_chooses_the_kernels_where_they_were_measured(
    capability, rows, options, count, monkeypatch
):
    jax.clear_caches()
    for module in (pallas, cudnn):
        monkeypatch.setattr(module, "gpu_capability", lambda: capability)
    count *= jax.__version_info__[:2] == (0, 11)
    assert kernels_for_a_gpu(None, rows, **options) == [count, 0]


def test_what_comes_back_to_the_log_sum_exp_of_cudnn_is_by_the_kernels(monkeypatch):
    jax.clear_caches()
    for module in (pallas, cudnn):
        monkeypatch.setattr(module, "gpu_capability", lambda: (9, 0))

    def loss(*qkv):
        o, lse = dot_product_attention(*qkv, is_causal=True, return_residual=True)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

    qkv = 3 * [jax.ShapeDtypeStruct((2, T, 2, 64), jnp.bfloat16)]
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [len(re.findall(name, text)) for name in (r"@__cudnn\$fmha", "@mosaic_gpu_v2")]
    assert calls == [1, 2 * (jax.__version_info__[:2] == (0, 11))]


def test_another_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: (8, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="cannot serve a GPU that is not of the Hopper"):
        gradient_of(*3 * [jnp.ones((1, 4, 1, 64), jnp.bfloat16)], implementation="pallas")


def test_elsewhere_xla_runs():
    """With what has a rule of its own: a gradient of `scale`, `vmap`, packed sequences."""
    case = make_case(Sizes(2, 9, 9, 2, 1, 64, 64), dtype=jnp.bfloat16, is_causal=True, sinks=True)
    cotangents = cotangents_for(case)
    results = [
        of_call(partial(dot_product_attention, implementation=name), case, cotangents)
        for name in ("pallas", "xla")
    ]
    assert_same(results[0], results[1], 0.01)
    query, key, value = (case.floats[name][0] for name in ("query", "key", "value"))
    starts = jnp.array([0, 4, 9], jnp.int32)
    packed = [
        quick(partial(packed_attention, implementation=name))(query, key, value, starts)
        for name in ("pallas", "xla")
    ]
    assert_same(packed[0], packed[1], 0.01)


def test_what_the_kernels_cannot_serve_is_refused_by_name(monkeypatch):
    def refused(message, sizes=(1, 2, 2, 1, 1, 64, 64), dtype=jnp.bfloat16, **options):
        case = make_case(Sizes(*sizes), dtype=dtype, **options)
        message = f"`implementation='pallas'` cannot serve {message}"
        with pytest.raises(ValueError, match=re.escape(message)):
            dot_product_attention(
                **case.floats, **case.others, **case.options, implementation="pallas"
            )

    refused("the dtype float64 or the dtype float64 on a TPU;", dtype=jnp.float64)
    refused("`mask`", mask=(2, 2))
    refused("a bias that queries or keys share or `bias` on a TPU", bias=(1, 2))
    refused("dropout", dropout_rate=0.5, dropout_key=jax.random.key(0))
    refused("an array without elements", (1, 2, 0, 1, 1, 64, 64))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    refused("the dtype float32;", dtype=jnp.float32)
    refused("a width of 32 and 64 (64 and 128 can be)", (1, 2, 2, 1, 1, 32, 64))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    refused("the dtype float16 on a TPU;", dtype=jnp.float16)
    refused("a width of 512 and 64 on a TPU (up to 256 can be)", (1, 2, 2, 1, 1, 512, 64))
