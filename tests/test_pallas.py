"""The schedule of the LSTM for a Hopper GPU, on a machine without one: its kernels in Pallas'
interpreter, which looks for races, against the schedule on XLA; what a program for a GPU has; what
runs elsewhere; what is refused.

The interpreter knows nothing of stores into other blocks' shared memory: in it, blocks exchange
through global memory.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from rnnattn import LSTMState, dispatch, init_lstm, lstm
from rnnattn.recurrent import chunked, pallas, placed
from rnnattn.recurrent.problem import Options, Outputs, Steps
from rnnattn.recurrent.rule import sequence
from rnnattn.recurrent.units.lstm import LSTM
from tests.lstm_cases import relative_error

hopper = pytest.importorskip("rnnattn.recurrent.hopper")

T, B, D = 3, 3, 2


def problem(H, dtype, masks=("lengths", "resets")):
    """Parameters, the initial state and the steps, with what comes back from each result."""
    rng = np.random.default_rng(H)
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)
    states = lambda: LSTMState(draw(dtype, B, H), draw(jnp.float32, B, H))
    valid = jnp.asarray(np.arange(T)[:, None] < np.array([T, 0, 2])) if "lengths" in masks else None
    fresh = jnp.asarray(rng.random((T, B)) < 0.3) if "resets" in masks else None
    if valid is not None and fresh is not None:
        fresh = fresh & valid
    params = init_lstm(jax.random.key(0), D, H, dtype=dtype)
    steps = Steps(draw(dtype, T, B, D), valid, fresh)
    return params, states(), steps, (Outputs(draw(dtype, T, B, H), None), states())


def results(halves, options, params, state, steps, cotangents):
    run, run_back = halves
    final, trace = run((options, True), params, state, steps)
    y = trace.y
    if isinstance(options.residuals, int):
        trace = trace._replace(y=None)
    return y, final, *run_back(options, params, state, steps, trace, cotangents)


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype != bool else x, tree)


@pytest.fixture
def interpreted(monkeypatch, capsys):
    if jax.__version_info__ < (0, 11):
        pytest.skip("the interpreter of jax 0.10 fails on these kernels")
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    how = plgpu.InterpretGPUParams(detect_races=True)
    for name in ("forward", "backward"):
        monkeypatch.setattr(hopper, name, partial(getattr(hopper, name), interpret=how))
    yield
    assert "RACE" not in capsys.readouterr().out  # jax 0.11 prints what raises from 0.12 on


CASES = [
    (64, jnp.bfloat16, Options(LSTM(), False, "states"), ("lengths", "resets")),
    (64, jnp.float16, Options(LSTM(), True, 2), ("lengths",)),
    (64, jnp.bfloat16, Options(LSTM(), True, "gates"), ("resets",)),
    (128, jnp.bfloat16, Options(LSTM(), True, "states"), ("resets",)),
    (256, jnp.float16, Options(LSTM(), False, "states"), ()),
]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("H", "dtype", "options", "masks"), CASES)
def test_the_kernels_are_about_as_exact_as_xla(H, dtype, options, masks):
    """Beside float32, of all results and gradients; one block, and clusters of two to eight."""
    arguments = problem(H, dtype, masks)
    got = results(pallas.ON_HOPPER, options, *arguments)
    on_xla = partial(results, (placed.forward_on_xla, chunked.backward), options)
    exact = on_xla(*in_float32(arguments))
    errors, of_xla = (
        jax.tree.leaves(jax.tree.map(relative_error, made, exact))
        for made in (in_float32(got), in_float32(on_xla(*arguments)))
    )
    floor = float(jnp.finfo(dtype).eps) / 4
    for error, other in zip(errors, of_xla, strict=True):
        assert error <= 4 * max(other, floor), (errors, of_xla)


def gradient(implementation, params, x):
    loss = lambda params, x: jnp.sum(
        lstm(params, x, time_major=True, implementation=implementation)[0].astype(jnp.float32)
    )
    return jax.grad(loss, (0, 1))(params, x)


def kernels_for_a_gpu(implementation, H, dtype, steps=T, rows=B):
    """How many a program has that is lowered here, and one that is exported."""
    params = init_lstm(jax.random.key(0), D, H, dtype=dtype)
    x = jnp.zeros((steps, rows, D), dtype)
    function = jax.jit(partial(gradient, implementation))
    here = function.trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    known = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    made = export.export(function, platforms=["cuda"], disabled_checks=known)(params, x)
    return [text.count("@mosaic_gpu_v2") for text in (here, str(made.mlir_module()))]


@pytest.mark.parametrize(
    ("H", "dtype"),
    [(64, jnp.float16), (128, jnp.bfloat16), (384, jnp.float16), (512, jnp.bfloat16)],
)
def test_a_program_for_a_gpu_has_the_kernels(H, dtype):
    assert kernels_for_a_gpu("pallas", H, dtype) == [2, 2]


@pytest.mark.parametrize(
    ("capability", "sizes", "count"),
    [((9, 0), (16, 128), 2), ((9, 0), (16, 129), 0), ((9, 0), (15, 1), 0), ((8, 0), (16, 1), 0)],
)
def test_none_chooses_the_kernels_where_they_were_measured(capability, sizes, count, monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(pallas, "gpu_capability", lambda: capability)
    count *= jax.__version_info__[:2] == (0, 11)
    assert kernels_for_a_gpu(None, 128, jnp.bfloat16, *sizes) == [count, 0]


def test_another_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="cannot serve a GPU that is not of the Hopper"):
        gradient(
            "pallas",
            init_lstm(jax.random.key(0), D, 64, dtype=jnp.bfloat16),
            jnp.zeros((1, 1, D), jnp.bfloat16),
        )


@pytest.mark.parametrize(
    ("residuals", "reverse"), [("gates", False), ("states", True), (2, False), (2, True)]
)
def test_elsewhere_xla_runs(residuals, reverse):
    params, state, steps, cotangents = problem(64, jnp.bfloat16)
    options = Options(LSTM(), reverse, residuals)

    @partial(jax.jit, static_argnums=0)
    def run(schedule, params, state, x):
        of_x = lambda params, state, x: sequence(
            schedule, options, params, state, steps._replace(x=x)
        )
        made, pullback = jax.vjp(of_x, params, state, x)
        return made, pullback(cotangents)

    made = [
        in_float32(run(s, params, state, steps.x))
        for s in (pallas.PALLAS[True, True], chunked.CHUNKED)
    ]
    errors = jax.tree.map(relative_error, *made)
    assert max(jax.tree.leaves(errors)) < 1e-3, errors


@pytest.mark.parametrize("over", ["x", "params"])
def test_vmap_and_second_order_are_those_of_xla(over):
    params, _, steps, _ = problem(64, jnp.bfloat16)
    x = steps.x[:, :1]

    def penalty(implementation, params, x):
        loss = lambda x: jnp.sum(
            lstm(params, x, time_major=True, implementation=implementation)[0].astype(jnp.float32)
        )
        return jnp.sum(jax.grad(loss)(x).astype(jnp.float32) ** 2)

    twice = lambda tree: jax.tree.map(lambda a: jnp.stack([a, 2 * a]), tree)
    given = (params, twice(x)) if over == "x" else (twice(params), x)
    axes = (None, 0) if over == "x" else (0, None)
    made = [
        jax.jit(jax.vmap(jax.grad(partial(penalty, name), (0, 1)), axes))(*given)
        for name in ("pallas", "xla")
    ]
    for ours, xla in zip(*map(jax.tree.leaves, made), strict=True):
        assert relative_error(ours.astype(jnp.float32), xla.astype(jnp.float32)) < 0.02


def test_what_the_kernels_cannot_serve_is_refused_by_name():
    def refused(message, H=64, dtype=jnp.bfloat16, x=(1, 2, 2), weights=None, **options):
        params = init_lstm(jax.random.key(0), 2, H, dtype=dtype, **(weights or {}))
        with pytest.raises(ValueError, match="`implementation='pallas'` cannot serve ") as error:
            lstm(params, jnp.zeros(x, dtype), implementation="pallas", **options)
        assert message in str(error.value)

    refused("the dtype float32", dtype=jnp.float32)
    refused("the hidden width 96 (64, 128, 256, 384 and 512 can be)", H=96)
    refused("peephole weights", weights={"peephole": True})
    refused("a projection", weights={"projection_size": 64})
    refused("`clip` or `coupled`", clip=1.0)
    refused("`clip` or `coupled`", coupled=True)
    refused("an array without elements", x=(1, 0, 2))
