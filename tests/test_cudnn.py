"""Attention by cuDNN in our own rule: which calls, how it is called, what is put right around it.

There is no GPU here, so a stub stands for cuDNN: plain JAX that gives O and the gradient in 16 bits
and L in float32, numbers of no meaning to queries that see no key, and NaN where it is given a
length of 0 or a bias of −∞.
"""

import json
import re
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from rnnattn import dot_product_attention
from rnnattn.attention import api, cudnn, native
from rnnattn.attention.arguments import checked, sorted_arguments
from rnnattn.attention.placed import placed
from tests.attention_cases import Sizes, assert_same, cotangents_for, make_case, quick

B, T, N, M, K = 3, 14, 4, 2, 8
SIZES = Sizes(B, T, T, N, M, K, K)
HIDDEN = -1e30


def _wide(*arrays):
    return (x.astype(jnp.float32) for x in arrays)


def _logits(problem, q, k, bias, lengths):
    (T, N), S = q.shape[1:3], k.shape[1]
    q, k = _wide(q, jnp.repeat(k, N // k.shape[2], 2))
    s = problem.scale * jnp.einsum("btnk,bsnk->bnts", q, k)
    if bias is not None:
        s = s + jnp.where(bias == -jnp.inf, jnp.nan, bias).astype(jnp.float32)
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    rows, columns = rows[None, None, :, None], columns[None, None, None]
    sees = jnp.full_like(s, True, bool)
    if problem.causal:
        sees &= columns <= rows
    if problem.window:
        sees &= columns > rows - problem.window
    if lengths is not None:
        assert all(n.dtype == jnp.int32 for n in lengths)
        of_queries, of_keys = (n[:, None, None, None] for n in lengths)
        s = s + jnp.where((of_queries > 0) & (of_keys > 0), 0, jnp.nan).astype(s.dtype)
        sees &= (rows < of_queries) & (columns < of_keys)
    return jnp.where(sees | jnp.isnan(s), s, HIDDEN)


def attend(problem, q, k, v, bias, lengths):
    """By a softmax in float32, its weights rounded to 16 bits."""
    s = _logits(problem, q, k, bias, lengths)
    lse = jax.nn.logsumexp(s, -1)
    p, v = _wide(jnp.exp(s - lse[..., None]).astype(q.dtype), v)
    o = jnp.einsum("bnts,bsnk->btnk", p, jnp.repeat(v, q.shape[2] // v.shape[2], 2))
    return o.astype(q.dtype), lse


def attend_gradient(arguments, o, lse, do, wants_dbias):
    problem, q, k, v, bias, lengths = arguments
    assert o.dtype == do.dtype == q.dtype and lse.dtype == jnp.float32
    G = q.shape[2] // k.shape[2]
    p = jnp.exp(_logits(problem, q, k, bias, lengths) - lse[..., None])
    q, o, do, k, v = _wide(q, o, do, *(jnp.repeat(x, G, 2) for x in (k, v)))
    delta = jnp.einsum("btnk,btnk->bnt", o, do)
    ds = p * (jnp.einsum("btnk,bsnk->bnts", do, v) - delta[..., None])
    of_group = lambda x: x.reshape(*x.shape[:2], -1, G, x.shape[3]).sum(3)
    dk = of_group(jnp.einsum("bnts,btnk->bsnk", problem.scale * ds, q))
    dv = of_group(jnp.einsum("bnts,btnk->bsnk", p, do))
    results = [jnp.einsum("bnts,bsnk->btnk", problem.scale * ds, k), dk, dv]
    if wants_dbias:
        shared = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        results.append(ds.sum(shared, keepdims=True))
    return [x.astype(jnp.bfloat16) for x in results]


@pytest.fixture
def called(monkeypatch):
    """What of cuDNN is called from now on, by the stub and on the CPU; as concrete arrays."""
    names: list[str] = []

    def stub(name, function):
        def call(*arguments):
            names.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(cudnn, "attend", stub("forward", attend))
    monkeypatch.setattr(cudnn, "attend_gradient", stub("backward", attend_gradient))
    monkeypatch.setattr(cudnn, "gpu_capability", lambda: (9, 0))
    on_cpu = placed("rnnattn_cudnn_stub", {"cpu": cudnn.HALVES})
    monkeypatch.setitem(api._CHOSEN, (False, "cudnn"), on_cpu)
    monkeypatch.setattr(native, "unserved", lambda *call: ["what is tested here"])
    cast(Any, api._run_attention).clear_cache()
    yield names
    cast(Any, api._run_attention).clear_cache()


BOTH = ["forward", "backward"]
LENGTHS = {
    "query_seq_lengths": jnp.array([T, 0, 5]),
    "key_value_seq_lengths": jnp.array([3, T, 0]),
}
FULL = (1, N, T, T)
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "full": (BOTH, {}),
    "causal": (BOTH, {"is_causal": True}),
    "causal, fewer queries": (BOTH, {"is_causal": True, "sizes": SIZES._replace(T=10)}),
    "causal, fewer keys": (BOTH, {"is_causal": True, "sizes": SIZES._replace(S=10)}),
    "window": (BOTH, {"local_window_size": (3, 0)}),
    "window, fewer queries": (
        BOTH,
        {"is_causal": True, "local_window_size": 3, "sizes": SIZES._replace(T=9)},
    ),
    "lengths": (BOTH, LENGTHS),
    "lengths, causal": (BOTH, {"is_causal": True, **LENGTHS}),
    "scale": (BOTH, {"number": 0.5}),
    "sinks": (BOTH, {"sinks": True}),
    "sinks, lengths": (BOTH, {"sinks": True, **LENGTHS}),
    "bias": (BOTH, {"bias": FULL}),
    "bias, causal, lengths": (BOTH, {"bias": FULL, "is_causal": True, **LENGTHS}),
    "a bias for each row": (BOTH, {"bias": (B, N, T, T)}),
    "a bias for all heads": (BOTH, {"bias": (T, T)}),
    "a window with a bias": (BOTH, {"bias": FULL, "local_window_size": (3, 0)}),
}


def _with_holes(case):
    """−∞ in a bias, for whole rows too, and NaN where nobody looks."""
    floats = dict(case.floats)
    if "bias" in floats:
        bias = floats["bias"].at[..., 3, :].set(-jnp.inf).at[..., 5, :4].set(-jnp.inf)
        floats["bias"] = bias.at[..., 0, 6].set(jnp.nan if case.options.get("is_causal") else 0)
    ends = {"query": "query_seq_lengths", "key": "key_value_seq_lengths"}
    ends["value"] = ends["key"]
    for name, end in ends.items():
        if end in case.others:
            past = jnp.arange(floats[name].shape[1])[None] >= case.others[end][:, None]
            floats[name] = jnp.where(past[:, :, None, None], jnp.nan, floats[name])
    return case._replace(floats=floats)


@pytest.mark.parametrize("name", CASES)
def test_what_cudnn_leaves_out_is_put_right(name, called):
    """Against float32: values and gradients; queries that see nothing; NaN in the padding."""
    expected_calls, how = CASES[name]
    how = dict(how)
    sizes, scale = how.pop("sizes", SIZES), how.pop("number", None)
    case = _with_holes(make_case(sizes, dtype=jnp.bfloat16, **how))
    do, _ = cotangents_for(case)
    if "query_seq_lengths" in case.others:
        past = jnp.arange(do.shape[1])[None] >= case.others["query_seq_lengths"][:, None]
        do = jnp.where(past[:, :, None, None], jnp.nan, do)

    def run(floats, do, **options):
        def call(floats):
            return dot_product_attention(
                **floats,
                **case.others,
                **case.options,
                **options,
                scale=scale,
                return_residual=True,
            )

        o, pullback, lse = jax.vjp(call, floats, has_aux=True)
        return o, lse, pullback(do)[0]

    actual = run(case.floats, do)
    assert called == expected_calls
    floats, do = jax.tree.map(lambda x: x.astype(jnp.float32), (case.floats, do))
    expected = quick(partial(run, implementation="xla"))(floats, do)
    assert called == expected_calls
    assert_same(actual, expected, 0.03)


def test_what_comes_back_to_the_log_sum_exp_is_left_to_xla(called):
    case = make_case(SIZES, dtype=jnp.bfloat16, is_causal=True)

    def loss(floats, **options):
        o, lse = dot_product_attention(**floats, is_causal=True, return_residual=True, **options)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(lse**2)

    actual = jax.grad(loss)(case.floats)
    assert called == ["forward"]
    assert_same(actual, jax.grad(partial(loss, implementation="xla"))(case.floats), 0.03)


def test_vmap_joins_its_axis_with_the_batch_and_second_derivatives_are_those_of_xla(called):
    case = make_case(SIZES, dtype=jnp.bfloat16, bias=FULL)
    floats = {name: jnp.stack([x, x[::-1]]) for name, x in case.floats.items() if name != "bias"}

    def loss(floats, bias, **options):
        o = dot_product_attention(**floats, bias=bias, is_causal=True, **options)
        return jnp.sum(o.astype(jnp.float32) ** 2)

    gradient = jax.grad(loss)
    of_each = lambda **options: jax.vmap(partial(gradient, **options), (0, None))
    actual = of_each()(floats, case.floats["bias"])
    assert called == BOTH
    expected = of_each(implementation="xla")(floats, case.floats["bias"])
    assert_same(actual, expected, 0.03)
    called.clear()
    twice = lambda **options: jax.jvp(
        lambda floats: gradient(floats, case.floats["bias"], **options),
        ({n: x[0] for n, x in floats.items()},),
        ({n: x[1] for n, x in floats.items()},),
    )
    assert_same(twice(), twice(implementation="xla"), 0.03)
    assert called == []


# ---- which calls ------------------------------------------------------------------------------


IDS = jnp.ones((B, T), jnp.int32)


def _targets(f, *arrays):
    lowered = jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",))
    return re.findall(r"custom_call @__cudnn\$fmha(\w+)", lowered.as_text())


def _shapes(dtype=jnp.bfloat16, width=64):
    return [jax.ShapeDtypeStruct((2, 256, 4, width), dtype)] * 3


def _loss(*arrays, **options):
    return jnp.sum(dot_product_attention(*arrays, **options).astype(jnp.float32))


@pytest.mark.parametrize(
    "capability, dtype, width, served",
    [
        ((9, 0), jnp.bfloat16, 64, True),
        ((8, 0), jnp.float16, 128, True),
        ((9, 0), jnp.bfloat16, 256, True),
        ((8, 9), jnp.bfloat16, 256, False),
        ((7, 5), jnp.float16, 64, False),
        ((), jnp.bfloat16, 64, False),
        ((9, 0), jnp.float32, 64, False),
        ((9, 0), jnp.bfloat16, 60, False),
    ],
)
def test_what_is_lowered_for_one_nvidia_gpu_calls_cudnn(
    capability, dtype, width, served, monkeypatch
):
    monkeypatch.setattr(cudnn, "gpu_capability", lambda: capability)
    calls = _targets(jax.grad(_loss, (0, 1, 2)), *_shapes(dtype, width))
    assert calls == (["Softmax", "SoftmaxBackward"] if served else [])


def test_other_programs_do_not_call_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "gpu_capability", lambda: (9, 0))
    shapes = _shapes()
    assert _targets(_loss, *shapes) == ["Softmax"]
    assert not _targets(partial(_loss, implementation="xla"), *shapes)
    exported = jax.export.export(jax.jit(_loss), platforms=["cuda"])(*shapes)
    assert "__cudnn" not in exported.mlir_module()
    assert "__cudnn" not in jax.jit(_loss).lower(*shapes).as_text()
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    shared = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows) for x in shapes]
    assert not _targets(_loss, *shared)


@pytest.mark.parametrize(
    "reason, options",
    [
        ("the dtype float32", {"dtype": jnp.float32}),
        ("a width of 6 and 6", {"sizes": SIZES._replace(K=6, V=6)}),
        ("a width of 8 and 16", {"sizes": SIZES._replace(V=16)}),
        ("a single query or key", {"sizes": SIZES._replace(T=1)}),
        ("`mask`", {"mask": (T, T)}),
        ("segment ids", {"query_segment_ids": IDS, "key_value_segment_ids": IDS}),
        ("`query_offset`", {"query_offset": 2}),
        ("`logits_soft_cap`", {"logits_soft_cap": 30.0}),
        ("dropout", {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}),
        ("a window without a causal side", {"local_window_size": 3}),
        (
            "a window with lengths or fewer keys",
            {"local_window_size": (2, 0), "query_seq_lengths": jnp.array([3, 0, 1])},
        ),
        ("an array as `scale`", {"scale": ()}),
        ("a bias that queries or keys share", {"bias": (B, 1, 1, T)}),
        (
            "a bias for an odd number of queries or keys",
            {"bias": (13, 13), "sizes": SIZES._replace(T=13, S=13)},
        ),
    ],
)
def test_what_is_not_handed_over(reason, options):
    case = make_case(options.pop("sizes", SIZES), **{"dtype": jnp.bfloat16, **options})
    assert _unserved(case.floats, **case.others, **case.options) == [reason]


def test_a_bias_of_more_bits_keeps_them():
    case = make_case(SIZES, dtype=jnp.bfloat16, bias=FULL)
    floats = {**case.floats, "bias": case.floats["bias"].astype(jnp.float32)}
    assert _unserved(floats) == ["a bias of float32"]


def _unserved(floats, **how):
    return cudnn.unserved(*checked("f", *sorted_arguments("f", **floats, **how)))


# ---- how cuDNN is called ----------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("causal, window", [(False, 0), (True, 0), (True, 5)])
def test_the_calls_are_those_of_jax(with_bias, lengths, causal, window, monkeypatch):
    """The same custom calls in the same layouts; what JAX says besides is protobuf's default."""
    jaxs = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(jaxs, "check_cudnn_version", lambda: 91000)
    mask = ["PADDING"] * lengths + ["CAUSAL"] * causal
    problem = cudnn.Problem(0.3, causal, window)
    dtype = jnp.float16 if with_bias else jnp.bfloat16
    q, k = (jax.ShapeDtypeStruct((3, n, heads, 64), dtype) for n, heads in ((128, 4), (64, 2)))
    bias = jax.ShapeDtypeStruct((1, 4, 128, 64), dtype) if with_bias else None
    of_rows = (jax.ShapeDtypeStruct((3,), jnp.int32),) * 2 if lengths else None

    def theirs(q, k, v, bias, lengths, do):
        how = {
            "scale": 0.3,
            "mask_type": jaxs.MaskType["_".join(mask) or "NO_MASK"],
            "sliding_window_length": window or None,
            "return_residual": True,
        }
        attend = lambda q, k, v, bias: jaxs.dot_product_attention(
            q, k, v, bias, None, *(lengths or (None, None)), **how
        )
        (o, lse), pullback = jax.vjp(attend, q, k, v, bias)
        return o, lse, *pullback((do, jnp.zeros_like(lse)))

    def ours(q, k, v, bias, lengths, do):
        arguments = (problem, q, k, v, bias, lengths)
        o, lse = cudnn.attend(*arguments)
        return o, lse, *cudnn.attend_gradient(arguments, o, lse, do, bias is not None)

    def calls(f):
        lowered = jax.jit(f).trace(q, k, k, bias, of_rows, q).lower(lowering_platforms=("cuda",))
        found = re.findall(
            r"custom_call @(\S+?)\(.*?backend_config = (\".*?\"), (.*)", lowered.as_text()
        )
        return [(name, json.loads(_unquoted(config)), rest) for name, config, rest in found]

    ours_, theirs_ = calls(ours), calls(theirs)
    assert len(ours_) == 2
    for (name, config, rest), (their_name, their_config, their_rest) in zip(
        ours_, theirs_, strict=True
    ):
        assert (name, rest) == (their_name, their_rest)
        assert _said(their_config) == _said(config)


def _unquoted(text):
    return text[1:-1].replace("\\22", '"')


def _said(config):
    """Without what is protobuf's default anyway."""
    if not isinstance(config, dict):
        return config
    said = {name: _said(x) for name, x in config.items()}
    default: tuple[Any, ...] = ("0", [], "PRIMITIVE_TYPE_INVALID", 0, False, {})
    return {name: x for name, x in said.items() if x not in default}
