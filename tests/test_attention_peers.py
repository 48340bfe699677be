"""Attention against what others compute: ONNX's cases, torch, `jax.nn`; and who takes a call."""

import importlib
import inspect
import sys
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import KVCache, dot_product_attention, update_cache
from rnnattn.attention import peers
from tests.attention_cases import (
    Sizes,
    assert_same,
    cotangents_for,
    first_order,
    like,
    make_case,
    quick,
)
from tests.lstm_cases import assert_close, relative_error

SCHEDULES = ["dense", "blockwise"]


# ---- ONNX's node cases ------------------------------------------------------------------------

# Outputs of a case that have no counterpart here; its Y is compared all the same.
LOGITS = {
    0: "logits before the soft cap, which no schedule keeps",
    1: "logits before the bias, which no schedule keeps",
    2: "logits before the softmax, which no schedule keeps",
}
CANNOT_RUN: dict[str, str] = {}  # by name, with the reason


@cache
def onnx_cases():
    pytest.importorskip("onnx")
    node = importlib.import_module("onnx.backend.test.case.node")
    importlib.import_module("onnx.backend.test.case.node.attention")
    found = [
        case for case in node._NodeTestCases if case.model.graph.node[0].op_type == "Attention"
    ]
    return {case.name: case for case in found if "expanded" not in case.name}


def _heads_behind_time(x, heads):
    """(B, heads, T, K) or (B, T, heads · K) → (B, T, heads, K)."""
    x = jnp.asarray(x)
    return jnp.moveaxis(x, 1, 2) if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1)


def _padded(mask, size):
    """ONNX's mask may end early: what follows is hidden."""
    hidden = False if mask.dtype == bool else -np.inf
    pad = [(0, 0)] * (mask.ndim - 1) + [(0, size - mask.shape[-1])]
    return jnp.asarray(np.pad(mask, pad, constant_values=hidden))


def _arguments(given, attributes):
    """ONNX's inputs and attributes as our arguments, and the cache after the step."""
    q = _heads_behind_time(given["Q"], attributes.get("q_num_heads"))
    k, v = (_heads_behind_time(given[n], attributes.get("kv_num_heads")) for n in "KV")
    others: dict[str, Any] = {}
    offset: Any = 0
    present = None
    if "past_key" in given:
        past, T = given["past_key"].shape[2], k.shape[1]
        room = lambda x: jnp.pad(_heads_behind_time(x, None), [(0, 0), (0, T), (0, 0), (0, 0)])
        length = jnp.full(q.shape[:1], past, jnp.int32)
        cache = KVCache(room(given["past_key"]), room(given["past_value"]), length)
        present = update_cache(cache, k, v)
        k, v, offset = present.key, present.value, past
    if "nonpad_kv_seqlen" in given:
        others["key_value_seq_lengths"] = jnp.asarray(given["nonpad_kv_seqlen"], jnp.int32)
        offset = others["key_value_seq_lengths"] - q.shape[1]
    if "attn_mask" in given:
        mask = _padded(given["attn_mask"], k.shape[1])
        others["mask" if mask.dtype == bool else "bias"] = mask
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    options = {
        "scale": attributes.get("scale"),
        "is_causal": bool(attributes.get("is_causal", 0)),
        "logits_soft_cap": attributes.get("softcap") or None,
        "local_window_size": tuple(None if side < 0 else side for side in sides),
    }
    return {"query": q, "key": k, "value": v, "query_offset": offset, **others}, options, present


@pytest.mark.slow
def test_onnx_cases():
    """Every node case of the installed package: each runs, or is listed with the reason."""
    helper = pytest.importorskip("onnx.helper")
    cases = onnx_cases()
    assert len(cases) >= 93 and set(CANNOT_RUN) <= set(cases)
    attend = quick_attend()
    for name, case in cases.items():
        if name in CANNOT_RUN:
            continue
        (node,) = case.model.graph.node
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs, expected = case.data_sets[0]
        given = dict(zip([n for n in node.input if n], inputs, strict=True))
        wanted = dict(zip([n for n in node.output if n], expected, strict=True))
        arguments, options, present = _arguments(given, attributes)
        mode = attributes.get("qk_matmul_output_mode", 0)
        weights = "qk_matmul_output" in wanted and mode == 3
        results = {"present": present}
        if weights:
            out, results["qk_matmul_output"] = attend(arguments, return_weights=True, **options)
        else:
            out = attend(arguments, **options)
        results["Y"] = out
        if present is not None:
            results |= {"present_key": present.key, "present_value": present.value}
        # a float16 or bfloat16 expectation is itself rounded at every step
        atol = {"float16": 2e-3, "bfloat16": 3e-2}.get(str(given["Q"].dtype), 1e-5)
        for output, value in wanted.items():
            if output not in results:
                assert (output, mode in LOGITS) == ("qk_matmul_output", True), name
                continue
            actual = np.asarray(results[output])
            assert actual.dtype == value.dtype or output == "qk_matmul_output", name
            if value.ndim == 3 and actual.ndim == 4:
                actual = actual.reshape(value.shape)
            elif actual.ndim == 4 and output != "qk_matmul_output":
                actual = np.moveaxis(actual, 2, 1)
            value, actual = np.asarray(value, np.float64), np.asarray(actual, np.float64)
            np.testing.assert_allclose(actual, value, rtol=1e-3, atol=atol, err_msg=name)


def quick_attend():
    """One compilation for each set of shapes and options, however many cases share it."""

    @cache
    def compiled(**options):
        return quick(lambda arguments: dot_product_attention(**arguments, **options))

    return lambda arguments, **options: compiled(**options)(arguments)


# ---- torch ------------------------------------------------------------------------------------

BROADCASTS = [
    (1, 1, 1, 514),
    (2, 1, 1, 514),
    (1, 2, 1, 514),
    (2, 2, 267, 514),
    (2, 1, 267, 1),  # rows that see all or nothing
    (1, 1, 267, 514),
    (1, 514),
    (267, 514),
]
SDPA: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "plain": (Sizes(1, 267, 514, 2, 2, 8, 8), {}),
    "longer": (Sizes(1, 514, 1030, 2, 2, 4, 4), {}),
    "causal": (Sizes(1, 1030, 1030, 1, 1, 8, 8), {"is_causal": True}),
    "grouped": (Sizes(2, 267, 267, 4, 2, 8, 8), {"is_causal": True}),
    "negative scale": (Sizes(1, 267, 514, 2, 2, 8, 8), {"scale": -0.3}),
    **{
        f"mask {shape}": (Sizes(2, 267, 514, 2, 2, 4, 4), {"mask": shape})
        for shape in BROADCASTS[::2]
    },
    **{
        f"bias {shape}": (Sizes(2, 267, 514, 2, 2, 4, 4), {"bias": shape})
        for shape in BROADCASTS[1::2]
    },
    "band": (Sizes(1, 514, 514, 2, 1, 8, 8), {"bias": (514, 514), "band": 40}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SDPA)
def test_torch(name):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    sizes, options = SDPA[name]
    options = dict(options)
    scale, band = options.pop("scale", None), options.pop("band", None)
    case = make_case(sizes, **options)
    if band:
        distance = np.arange(sizes.S)[None] - np.arange(sizes.T)[:, None]
        bias = jnp.where(np.abs(distance) > band, -jnp.inf, case.floats["bias"])
        bias = bias.at[3].set(-jnp.inf)  # and a row that sees nothing
        case = case._replace(floats=case.floats | {"bias": bias})
    if scale is not None:
        case = case._replace(options={**case.options, "scale": scale})

    tensors = {n: torch.tensor(np.asarray(x), requires_grad=True) for n, x in case.floats.items()}
    q, k, v = (tensors[n].transpose(1, 2) for n in ("query", "key", "value"))
    mask = torch.tensor(np.asarray(case.others["mask"])) if "mask" in case.others else None
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        tensors.get("bias", mask),
        is_causal=case.options.get("is_causal", False),
        scale=scale,
        enable_gqa=sizes.N != sizes.M,
    ).transpose(1, 2)
    cotangents = cotangents_for(case)[0], jnp.zeros(case.floats["query"].shape[:3])
    out.backward(torch.tensor(np.asarray(cotangents[0])))

    both = name in ("plain", "band", "grouped")
    # of the broadcasts every other one: the rest are those of the grid in `test_attention.py`
    for implementation in SCHEDULES if both else [SCHEDULES[list(SDPA).index(name) % 2]]:
        run = first_order(dot_product_attention, **case.options, implementation=implementation)
        (actual, _), gradient = run(case.floats, case.others, cotangents)
        assert_close(actual, out.detach().numpy(), 1e-12)
        assert_close(gradient, {n: t.grad.numpy() for n, t in tensors.items()}, 1e-12)


def test_torch_in_float32():
    """Its CPU flash kernel, at the tolerances of its own tests."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    case = make_case(Sizes(1, 267, 514, 2, 2, 8, 8), dtype=jnp.float32)
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    tensors = {n: torch.tensor(np.asarray(x), requires_grad=True) for n, x in case.floats.items()}
    cotangents = cotangents_for(case)[0], jnp.zeros(case.floats["query"].shape[:3], jnp.float32)
    with flash:
        q, k, v = (tensors[n].transpose(1, 2) for n in ("query", "key", "value"))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out.backward(torch.tensor(np.asarray(cotangents[0])))
    run = first_order(dot_product_attention, implementation="blockwise")
    (actual, _), gradient = run(case.floats, {}, cotangents)
    close = partial(np.testing.assert_allclose, rtol=5e-6, atol=1e-5)
    close(actual, out.detach().numpy())
    for name, d in gradient.items():
        close(d, tensors[name].grad.numpy())


# ---- in place of jax.nn -----------------------------------------------------------------------


def test_the_arguments_are_those_of_jax_nn():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = list(inspect.signature(dot_product_attention).parameters.values())
    for mine, other in zip(ours, theirs.values(), strict=False):
        assert (mine.name, mine.kind, mine.default) == (other.name, other.kind, other.default)
    assert len(ours) > len(theirs) > 10


# Where the meaning is the same: key lengths of at least 1, no row that sees nothing, T = S with a
# window or causal mask.
DROP_IN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 2},
    "sides": {"local_window_size": (3, 1)},
    "causal window": {"local_window_size": (3, 0), "is_causal": True},
    "lengths": {
        "query_seq_lengths": jnp.array([7, 7], jnp.int32),
        "key_value_seq_lengths": jnp.array([3, 7], jnp.int32),
    },
    "mask and bias": {"mask": (2, 1, 7, 7), "bias": (1, 4, 7, 7)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("name", DROP_IN)
def test_jax_nn(name):
    options = dict(DROP_IN[name])
    scale = options.pop("scale", None)
    case = make_case(Sizes(2, 7, 7, 4, 2, 5, 5), dtype=jnp.float32, **options)
    if "mask" in case.others:
        diagonal = jnp.eye(7, dtype=bool)[None, None]
        case = case._replace(others={"mask": case.others["mask"] | diagonal})
    if scale is not None:
        case = case._replace(options={"scale": scale})

    def run(function, **more):
        def loss(floats):
            results = function(
                **floats, **case.others, **case.options, **more, return_residual=True
            )
            return jnp.sum(results[0] ** 2), results  # the gradient of L is none there

        return quick(jax.value_and_grad(loss, has_aux=True))(case.floats)

    expected = _as_users_run_it(run)(jax.nn.dot_product_attention)
    for implementation in SCHEDULES:
        assert_same(run(dot_product_attention, implementation=implementation), expected, 1e-5)


def _as_users_run_it(function):
    """`jax.nn` mixes dtypes and ranks in ways the suite forbids, and so do its derivatives."""

    def run(*args, **options):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **options)

    return run


def _plain_float16(query, key, value, bias, **_):
    """With logits and softmax in float32; `jax.nn` has no gradient in float16 on a CPU."""
    k, v = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    s = jnp.einsum("btnk,bsnk->bnts", query, k, preferred_element_type=jnp.float32)
    s = s * query.shape[-1] ** -0.5 + bias.astype(jnp.float32)
    p = jax.nn.softmax(s).astype(v.dtype)
    return jnp.einsum("bnts,bsnv->btnv", p, v), jax.nn.logsumexp(s, -1)


@pytest.mark.parametrize("implementation", SCHEDULES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_error_is_at_most_twice_that_of_the_same_precision(dtype, implementation):
    """Of outputs, and of gradients, which are allowed three times; L, in float32, is far closer."""
    sizes = Sizes(2, 48, 80, 4, 2, 16, 16)
    case = make_case(sizes, dtype=dtype, bias=(1, 4, 48, 80))
    exact = case._replace(floats=jax.tree.map(lambda x: x.astype(jnp.float64), case.floats))
    weights = like(cotangents_for(case)[0], seed=9)

    def run(case, function, **options):
        def loss(floats):
            out, lse = function(**floats, **options, return_residual=True)
            dot = jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32))
            return dot.astype(jnp.float64), (out, lse)

        (_, results), gradient = quick(jax.value_and_grad(loss, has_aux=True))(case.floats)
        return results, gradient

    truth, true_gradient = run(exact, dot_product_attention, implementation="dense")
    peer = _plain_float16 if dtype == jnp.float16 else jax.nn.dot_product_attention
    half, half_gradient = _as_users_run_it(run)(case, peer)
    (out, lse), gradient = run(case, dot_product_attention, implementation=implementation)
    assert relative_error(out, truth[0]) <= 2 * relative_error(half[0], truth[0])
    assert lse.dtype == jnp.float32 and relative_error(lse, truth[1]) < 1e-5
    for name, d in gradient.items():
        assert d.dtype == dtype
        allowed = 3 * relative_error(half_gradient[name], true_gradient[name])
        assert relative_error(d, true_gradient[name]) <= allowed, name


# ---- calls that are handed over ---------------------------------------------------------------

HALF = make_case(Sizes(2, 4, 6, 4, 2, 8, 8), dtype=jnp.bfloat16)
Q, KEY, VALUE = (HALF.floats[name] for name in ("query", "key", "value"))
SERVED: dict[str, Any] = {
    "is_causal": True,
    "scale": 0.5,
    "local_window_size": (3, 0),
    "query_seq_lengths": jnp.array([4, 3]),
    "key_value_seq_lengths": jnp.array([6, 2]),
}


def _spy(calls):
    def attend(*args, **options):
        calls.append((args, options))
        return jnp.zeros((*args[0].shape[:-1], args[2].shape[-1]), args[0].dtype)

    return attend


def _handed(calls, **expected):
    """The one call's arrays and options, checked but for those that are given here."""
    ((q, k, v, bias, mask), options) = calls.pop()
    assert not calls and q.ndim == k.ndim == v.ndim == 4
    for name, wanted in expected.items():
        actual = {"bias": bias, "mask": mask, **options}[name]
        if isinstance(wanted, jax.Array):
            np.testing.assert_array_equal(actual, wanted)
            assert actual.dtype == wanted.dtype, name
        else:
            assert actual == wanted, name
    return q


def _both_ways(name, calls):
    """A batch and one row of it: what the other library is given."""
    mask, bias = jnp.ones((4, 6), bool), jnp.ones((4, 1, 6), jnp.bfloat16)
    attend = partial(dot_product_attention, implementation=name)
    out = attend(Q, KEY, VALUE, bias, mask, **SERVED)
    assert out.shape == Q.shape
    lengths = {n: x.astype(jnp.int32) for n, x in SERVED.items() if isinstance(x, jax.Array)}
    fixed = {n: x for n, x in SERVED.items() if n not in lengths}
    q = _handed(calls, bias=bias[None], mask=mask[None, None], **fixed, **lengths)
    assert q is Q
    one = {**SERVED, "query_seq_lengths": jnp.array(3), "key_value_seq_lengths": jnp.array(2)}
    assert attend(Q[0], KEY[0], VALUE[0], **one).shape == Q.shape[1:]
    lengths = {
        "query_seq_lengths": jnp.array([3], jnp.int32),
        "key_value_seq_lengths": jnp.array([2], jnp.int32),
    }
    _handed(calls, bias=None, mask=None, **fixed, **lengths)
    attend(Q, KEY, VALUE)
    unused = dict.fromkeys(SERVED) | {"is_causal": False}
    _handed(calls, **unused)


def test_cudnn_gets_the_call(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", _spy(calls))
    _both_ways("cudnn", calls)
    dot_product_attention(Q, KEY, VALUE, implementation="cudnn")
    _handed(calls, implementation="cudnn")


def test_tokamax_gets_the_call(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=_spy(calls)))
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    _both_ways("tokamax", calls)
    dot_product_attention(Q, KEY, VALUE, implementation="tokamax", logits_soft_cap=3.0)
    _handed(calls, logits_soft_cap=3.0)


def test_tokamax():
    pytest.importorskip("tokamax")
    case = make_case(Sizes(2, 16, 16, 4, 2, 8, 8), dtype=jnp.float32, is_causal=True)
    arguments = {**case.floats, **case.options}
    expected = dot_product_attention(**arguments)
    actual = dot_product_attention(**arguments, implementation="tokamax")
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


NEITHER: dict[str, dict[str, Any]] = {
    "`query_offset`": {"query_offset": 1},
    "segment ids": {
        "query_segment_ids": jnp.zeros((2, 4), jnp.int32),
        "key_value_segment_ids": jnp.zeros((2, 6), jnp.int32),
    },
    "`sinks`": {"sinks": jnp.zeros(4, jnp.bfloat16)},
    "dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
    "`return_residual`": {"return_residual": True},
    "an array as `scale`": {"scale": jnp.ones(())},
    "an open side of `local_window_size`": {"local_window_size": (None, 0)},
}
REFUSED: dict[str, dict[str, dict[str, Any]]] = {
    "cudnn": {
        **NEITHER,
        "`logits_soft_cap`": {"logits_soft_cap": 2.0},
        "a value width other than the key's": {"value": VALUE[..., :6]},
        "the dtype float32": {
            n: x.astype(jnp.float32)
            for n, x in zip(("query", "key", "value"), (Q, KEY, VALUE), strict=True)
        },
    },
    "tokamax": {
        **NEITHER,
        "`logits_soft_cap` with a bias": {
            "logits_soft_cap": 2.0,
            "bias": jnp.zeros((), jnp.bfloat16),
        },
    },
}


@pytest.mark.parametrize(
    "name, reason", [(name, reason) for name, reasons in REFUSED.items() for reason in reasons]
)
def test_what_another_library_cannot_serve_is_an_error(name, reason, monkeypatch):
    """It says what, and who can; and 'xla' does."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    arguments = {"query": Q, "key": KEY, "value": VALUE, **REFUSED[name][reason]}
    with pytest.raises(ValueError) as caught:
        dot_product_attention(**arguments, implementation=name)
    message = f"dot_product_attention: `implementation='{name}'` cannot serve {reason}; 'xla' can"
    assert str(caught.value) == message
    jax.eval_shape(lambda: dot_product_attention(**arguments, implementation="xla"))


def test_another_library_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    served: dict[Any, str] = {
        "cudnn": "`sinks` or a machine without a GPU",
        "tokamax": "`sinks` or an environment without the package",
    }
    for name, reason in served.items():
        with pytest.raises(ValueError, match=f"cannot serve {reason}; 'xla' can"):
            dot_product_attention(
                Q, KEY, VALUE, sinks=jnp.zeros(4, jnp.bfloat16), implementation=name
            )


def test_none_hands_nothing_over(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", _spy(calls))
    for implementation in (None, "xla"):
        jax.eval_shape(
            lambda i=implementation: dot_product_attention(Q, KEY, VALUE, implementation=i)
        )
    assert not calls
