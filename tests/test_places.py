"""Schedules on XLA in the sizes of where a program runs: which they are, and that all agree."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rnnattn import dot_product_attention, init_lstm, lstm, reference
from rnnattn.attention import api as attention, blockwise
from rnnattn.recurrent import chunked, run as recurrent
from tests import attention_cases
from tests.lstm_cases import assert_close, make_case, value_and_gradients

T, B, H = 64, 64, 128
WHOLE, TURN = f"tensor<{T}x{B}x{4 * H}xf32>", f"tensor<8x8x{B}x{4 * H}xf32>"


def _run(params, x, **options):
    return lstm(params, x, time_major=True, **options)[0]


def _exported(f, platforms, *arrays):
    return jax.export.export(jax.jit(f), platforms=platforms)(*arrays).mlir_module()


def _lowered(f, platforms, *arrays):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=platforms).as_text()


@pytest.fixture(scope="module")
def arrays():
    params = init_lstm(jax.random.key(0), input_size=2, hidden_size=H)
    return params, jnp.ones((T, B, 2), jnp.float32)


@pytest.mark.parametrize("text", [_exported, _lowered])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_an_lstm_elsewhere_than_on_a_cpu_is_one_chunk_in_turns_of_steps(
    text, implementation, arrays
):
    run = partial(_run, implementation=implementation)
    gradient = jax.grad(lambda *arrays: jnp.sum(run(*arrays)))
    for f in (run, gradient):
        for platform in ("cuda", "tpu"):
            program = text(f, (platform,), *arrays)
            assert WHOLE in program and TURN in program
        assert TURN not in text(f, ("cpu",), *arrays)
    if text is _exported:
        both = text(run, ("cpu", "cuda"), *arrays)
        one = text(run, ("cuda",), *arrays)
        assert TURN in both and both.count("stablehlo.while") > one.count("stablehlo.while")


def test_on_several_devices_too(arrays):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    params, x = arrays
    rows = jax.device_put(x, NamedSharding(mesh, P(None, "rows")))
    assert TURN in _lowered(_run, ("cuda",), params, rows)
    in_parts = jax.shard_map(
        _run, mesh=mesh, in_specs=(P(), P(None, "rows")), out_specs=P(None, "rows")
    )
    assert TURN.replace(f"x{B}x", f"x{B // 2}x") in _lowered(in_parts, ("cuda",), params, rows)


def test_blocks_elsewhere_than_on_a_cpu_are_large():
    x = jnp.ones((1, 2048, 1, 8), jnp.float32)
    run = lambda x: dot_product_attention(x, x, x, is_causal=True)
    for f in (run, jax.grad(lambda x: jnp.sum(run(x)))):
        for platform in ("cuda", "tpu"):
            assert "2048x2048xf32" in _exported(f, (platform,), x)
        assert "2048x2048xf32" not in _exported(f, ("cpu",), x)


@pytest.mark.parametrize(
    "rows, heads, length, block",
    [
        (32, 8, 1024, (512, 512)),
        (8, 8, 4096, (1024, 1024)),
        (2, 8, 16384, (2048, 2048)),
        (8, 8, 16, (128, 65536)),
        (1024, 64, 512, (128, 128)),
    ],
)
def test_a_block_has_few_logits_of_all_heads_together(rows, heads, length, block):
    query: Any = jax.ShapeDtypeStruct((rows, heads, 1, length, 64), jnp.float32)
    empty: Any = None
    assert blockwise._large_block(blockwise.Operands(query, empty, empty, empty)) == block


# ---- all agree --------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """The sizes of other places on this CPU, small enough to leave a rest of chunk and turn."""
    small = chunked.ELSEWHERE._replace(chunk_steps=5, turn=3, turn_of_few=2)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    monkeypatch.setattr(chunked, "ELSEWHERE", small)
    monkeypatch.setattr(blockwise, "BLOCK_LOGITS", 3 * 4 * 4 * 4)
    monkeypatch.setattr(blockwise, "_LEAST_BLOCK", 3)
    for run in (recurrent.run_sequence, attention._run_attention):
        cast(Any, run).clear_cache()
    yield
    for run in (recurrent.run_sequence, attention._run_attention):
        cast(Any, run).clear_cache()


LENGTHS = jnp.array([7, 0, 4])
RESETS = jnp.zeros((3, 7), bool).at[0, 3].set(True).at[2, 1].set(True)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"lengths": LENGTHS, "resets": RESETS, "reverse": True, "clip": 2.0},
    "gates": {"residuals": "gates", "lengths": LENGTHS},
    "every 2": {"residuals": 2, "resets": RESETS, "coupled": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_lstm_is_the_same_in_all_sizes(variant, elsewhere):
    options = VARIANTS[variant]
    widths = {"R": 2, "peephole": True} if variant == "everything" else {}
    case = make_case(7, 3, 2, 4, **widths)
    twin = {name: x for name, x in options.items() if name != "residuals"}
    expected = value_and_gradients(partial(reference.lstm, **twin), case)
    assert_close(value_and_gradients(partial(lstm, **options), case), expected, 1e-12)


def test_blocks_are_the_same_in_all_sizes(elsewhere):
    case = attention_cases.make_case(
        bias=(1, 4, 7, 10), sinks=True, is_causal=True, local_window_size=(4, 0)
    )
    run = partial(attention_cases.value_and_gradients, case, dot_product_attention)
    attention_cases.assert_same(run(implementation="blockwise"), run(implementation="dense"))
