"""Attention by our kernels for a TPU, on a machine without one: in Pallas' interpreter, beside the
plain twin; and what a program for a TPU has. What is made for them is that of all kernels in
Pallas: tests/test_attention_pallas.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from rnnattn import dot_product_attention, reference
from rnnattn.attention import pallas, tpu
from rnnattn.attention.placed import backward_on_xla, forward_on_xla
from tests.attention_cases import (
    Sizes,
    assert_same,
    cotangents_for,
    make_case,
    of_call,
    of_halves,
    quick,
    relative_error,
    with_nan,
)

INTERPRETED = pallas.halves(
    pallas.Kernels(
        lambda T, S, K, V: pallas.Tiles(*3 * [tpu.tiles(T, S)]),
        partial(tpu.forward, interpret=True),
        partial(tpu.query_gradient, interpret=True),
        partial(tpu.key_gradient, interpret=True),
    )
)
SIZES = Sizes(B=2, T=22, S=25, N=4, M=2, K=3, V=5)


def ids(B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 3, (B, T)))


CASES: dict[str, dict[str, Any]] = {
    "all see all": {"sizes": SIZES._replace(T=16, S=24), "logits_soft_cap": 1.5, "sinks": True},
    "one of each": {"sizes": Sizes(1, 1, 1, 1, 1, 1, 1)},
    "some blocks of each tile": {
        "local_window_size": (3, 6),
        "query_offset": jnp.array([-5, 40]),  # queries that see nothing
    },
    "segments and lengths": {
        "is_causal": True,
        "logits_soft_cap": 1.5,
        "query_offset": 4,
        "query_segment_ids": ids(2, 22),
        "key_value_segment_ids": ids(2, 25, seed=1),
        "query_seq_lengths": jnp.array([22, 9]),
        "key_value_seq_lengths": jnp.array([13, 25]),
    },
}


def of_kernels(case, cotangents, halves=INTERPRETED):
    """O, L, and the gradient of query, key and value."""
    run = lambda floats, others, cotangents: of_halves(
        halves, case._replace(floats=floats, others=others), cotangents
    )
    return quick(run)(case.floats, case.others, cotangents)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_the_twin(name, monkeypatch):
    """In tiles of a few, and with NaN and ∞ where nobody looks."""
    monkeypatch.setattr(tpu, "LANES", 4)
    monkeypatch.setattr(tpu, "MOST_QUERIES", 8)
    monkeypatch.setattr(tpu, "MOST_KEYS", 12)
    how = dict(CASES[name])
    case = make_case(how.pop("sizes", SIZES), **how)
    cotangents = cotangents_for(case)
    (o, lse), d = of_call(reference.dot_product_attention, case, cotangents)
    made = of_kernels(*with_nan(case, cotangents))
    expected = o, jnp.swapaxes(lse, 1, 2), d["query"], d["key"], d["value"]
    assert_same([a.reshape(e.shape) for a, e in zip(made, expected, strict=True)], [*expected])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_are_as_exact_as_xla(dtype):
    """Beside float64, of all results and gradients; where all see all, and where not."""
    sizes = Sizes(1, 130, 256, 2, 1, 64, 32)
    case = make_case(sizes, dtype=dtype, is_causal=True, query_offset=100)
    cotangents = cotangents_for(case)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    on_xla = forward_on_xla, backward_on_xla
    exact = of_kernels(case._replace(floats=wide(case.floats)), wide(cotangents), on_xla)
    errors, of_xla = (
        jax.tree.map(relative_error, wide(of_kernels(case, cotangents, halves)), exact)
        for halves in (INTERPRETED, on_xla)
    )
    for ours, other in zip(errors, of_xla, strict=True):
        # 16 bits leave that much of what is not rounded before
        least = float(jnp.finfo(dtype).eps) / 4
        assert ours <= (1e-5 if dtype == jnp.float32 else 1.5 * max(other, least)), (errors, of_xla)


# ---- programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "K", "dtype", "options", "count"),
    [
        ("pallas", 128, jnp.bfloat16, {"is_causal": True}, 3),
        ("pallas", 80, jnp.float32, {}, 3),
        ("pallas", 64, jnp.float16, {}, 0),  # which those for a GPU can
        (None, 128, jnp.bfloat16, {"is_causal": True}, 0),
    ],
)
def test_a_program_for_a_tpu_has_the_kernels_where_they_are_asked_for(
    implementation, K, dtype, options, count
):
    def gradient(*qkv):
        attend = partial(dot_product_attention, implementation=implementation, **options)
        loss = lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32))
        return jax.grad(loss, (0, 1, 2))(*qkv)

    qkv = 3 * [jax.ShapeDtypeStruct((2, 9, 2, K), dtype)]
    exported = export.export(jax.jit(gradient), platforms=["tpu"])(*qkv)
    assert str(exported.mlir_module()).count("@tpu_custom_call") == count
