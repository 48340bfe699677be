"""Schedules on XLA in the sizes of where a program runs: which they are, and that all agree."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rnnattn import init_lstm, lstm, reference
from rnnattn.recurrent import api as recurrent, chunked
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


# ---- all agree --------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """The sizes of other places on this CPU, small enough to leave a rest of chunk and turn."""
    small = chunked.ELSEWHERE._replace(chunk_steps=5, turn=3, turn_of_few=2)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    monkeypatch.setattr(chunked, "ELSEWHERE", small)
    cast(Any, recurrent._run_lstm).clear_cache()
    yield
    cast(Any, recurrent._run_lstm).clear_cache()


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
