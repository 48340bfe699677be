"""The kernels in programs for several devices on automatic axes: each device runs its part.

Value and gradient are those of one device, results lie as the arguments do, and nothing of them is
sent but sums.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rnnattn import LSTMParams, dot_product_attention, lstm, masks, native
from tests.attention_cases import assert_same, quick

pytestmark = pytest.mark.skipif(
    not native.status().available, reason=f"no kernels: {native.status().reason}"
)

T, D, H, N, M, K = 6, 3, 8, 8, 2, 4
ROWS, EACH = P("data"), P(("model", "data"))


def mesh_of(*sizes):
    names, kinds = ("data", "model")[: len(sizes)], (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, kinds, devices=jax.devices()[: np.prod(sizes)])


def _lstm(residuals, **options):
    def run(x, lengths, **weights):
        params = LSTMParams(**weights)
        return lstm(params, x, lengths=lengths, residuals=residuals, **options)

    return run


def _attention(slopes=None, **arrays):
    score = None if slopes is None else masks.alibi(slopes)
    return dot_product_attention(
        **arrays, score_function=score, is_causal=True, return_residual=True
    )


def _sequence(B, rows, dtype=jnp.float32):
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    arrays = {"w_x": draw(D, 4 * H), "w_h": draw(H, 4 * H) / 2, "b": draw(4 * H)}
    placed = {
        "x": (draw(B, T, D), rows),
        "lengths": (jnp.arange(B, dtype=jnp.int32) % T, P(*rows[:1])),
    }
    return {name: (x, P()) for name, x in arrays.items()} | placed


def _heads(B, rows=None, heads=None, *, kv=M, divides_keys=True, shared=False):
    """With a bias and a mask of each row and head, or for all of them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    whole, of_keys = P(), P(rows, None, heads if divides_keys else None)
    of_logits = (draw(1, 1, T, T), whole) if shared else (draw(B, N, T, T), P(rows, heads))
    return {
        "query": (draw(B, T, N, K), P(rows, None, heads)),
        "key": (draw(B, T, kv, K), of_keys),
        "value": (draw(B, T, kv, K), of_keys),
        "bias": of_logits,
        "scale": (draw(N), whole),
        "sinks": (draw(N), whole),
        "key_value_seq_lengths": (jnp.arange(B, dtype=jnp.int32) % T + 1, P(rows)),
        "mask": (of_logits[0] > -1, of_logits[1]),
    }


class Case(NamedTuple):
    function: Any
    arrays: dict[str, Any]  # by name, with how they lie
    result: P  # how the first result is to lie
    mesh: tuple[int, ...] = (2, 2)
    sent: tuple[str, ...] = ()  # by what, beside sums


CASES = {
    "lstm": Case(_lstm("states"), _sequence(4, ROWS), ROWS, (4,)),
    "lstm, gates": Case(_lstm("gates", reverse=True), _sequence(6, EACH), EACH, (3, 2)),
    "lstm, every 2 steps": Case(_lstm(2), _sequence(4, ROWS), ROWS),
    "lstm, bfloat16": Case(_lstm("states"), _sequence(4, EACH, jnp.bfloat16), EACH),
    "lstm, replicated": Case(_lstm("states"), _sequence(4, P()), P()),
    "lstm, one row": Case(_lstm("states"), _sequence(1, P()), P()),
    "lstm, time": Case(_lstm("states"), _sequence(2, P(None, "data")), P(), sent=("all-gather",)),
    "attention, rows": Case(_attention, _heads(4, "data"), ROWS, (4,)),
    "attention, rows and heads": Case(
        _attention, _heads(2, "data", "model"), P("data", None, "model")
    ),
    "attention, what rows and heads share": Case(
        _attention, _heads(2, "data", "model", shared=True), P("data", None, "model")
    ),
    "attention, a score by distance": Case(
        _attention,
        _heads(2, "data", "model") | {"slopes": (masks.alibi_slopes(N), P())},
        P("data", None, "model"),
    ),
    "attention, one key head": Case(
        _attention, _heads(2, "data", "model", kv=1, divides_keys=False), P("data", None, "model")
    ),
    "attention, heads among more devices than key heads": Case(
        _attention,
        _heads(1, None, "data", divides_keys=False),
        P(None, None, "data"),
        (4,),
        sent=("all-gather",),
    ),
}


def _with_gradient(function, arrays):
    def loss(floats):
        results = function(**{**arrays, **floats})
        clean = [jnp.where(jnp.isinf(y), 0, y) for y in jax.tree.leaves(results)]
        return sum(
            jnp.sum(jnp.sin(y + n).astype(jnp.float32)) for n, y in enumerate(clean)
        ), results

    floats = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return jax.value_and_grad(loss, has_aux=True)(floats)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_one_device(name):
    case = CASES[name]
    mesh = mesh_of(*case.mesh)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    arrays = {name: place(*of) for name, of in case.arrays.items()}
    run = quick(lambda arrays: _with_gradient(case.function, arrays))
    compiled = run.lower(arrays).compile()
    text = compiled.as_text() or ""
    assert re.search(r"rnnattn\.\w+_forward", text) and re.search(r"rnnattn\.\w+_backward", text)
    sent = re.findall(r"all-gather|all-to-all|collective-permute", text)
    assert {*sent} == {*case.sent}
    found = compiled(arrays)
    result = jax.tree.leaves(found[0][1])[0]
    assert result.sharding.is_equivalent_to(NamedSharding(mesh, case.result), result.ndim)
    expected = run({name: x for name, (x, _) in case.arrays.items()})
    narrow = result.dtype == jnp.bfloat16
    assert_same(found, expected, 0.03 if narrow else 1e-5)
