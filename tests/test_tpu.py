"""The schedule of the LSTM for a TPU, on a machine without one: its kernels in Pallas' interpreter,
beside the plain twin; what a program for a TPU has; what is refused.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from rnnattn import init_lstm, lstm, reference
from rnnattn.recurrent import chunked, tpu
from rnnattn.recurrent.arguments import time_major_steps
from rnnattn.recurrent.pallas import Loops, halves
from rnnattn.recurrent.placed import placed
from rnnattn.recurrent.problem import Options
from rnnattn.recurrent.rule import sequence
from rnnattn.recurrent.units.lstm import LSTM
from tests.lstm_cases import assert_close, make_case, relative_error, value_and_gradients

INTERPRETED = placed(
    "rnnattn_lstm_pallas_tpu_interpreted",
    {
        "cpu": halves(
            Loops(
                partial(tpu.forward, interpret=True),
                partial(tpu.backward, interpret=True),
                chunked.ON_CPU._replace(chunk_steps=5),
            )
        )
    },
)


def problem(T, B, H, masks, dtype=jnp.float64):
    """A time-major case and what its steps are marked with; what is padding holds NaN."""
    case = make_case(T, B, 2, H, dtype=dtype, seed=T)
    x, dy = (jnp.swapaxes(a, 0, 1) for a in (case.x, case.cotangents[0]))
    rng, marks = np.random.default_rng(B), {}
    if "lengths" in masks:
        lengths = np.resize([T, 0, T // 2], B)
        marks["lengths"] = jnp.asarray(lengths)
        x = jnp.where((np.arange(T)[:, None] < lengths)[..., None], x, jnp.nan)
    if "resets" in masks:
        marks["resets"] = jnp.asarray(rng.random((T, B)) < 0.3)
    return case._replace(x=x, cotangents=(dy, case.cotangents[1])), marks


def by(schedule, residuals, reverse, marks):
    def run(params, x, state):
        steps = time_major_steps(x, marks.get("lengths"), marks.get("resets"), reverse)
        options = Options(LSTM(), reverse, residuals)
        outputs, final = sequence(schedule, options, params, state, steps)
        return outputs.y, final

    return run


@pytest.mark.parametrize(
    ("sizes", "reverse", "residuals", "masks"),
    [
        ((1, 1), False, "states", ()),
        ((2, 3), True, "gates", ("lengths",)),
        ((3, 2), False, "states", ("resets",)),
        ((7, 11), False, 2, ("lengths", "resets")),
        ((7, 11), True, "states", ("lengths", "resets")),
    ],
)
def test_the_kernels_are_the_twin(sizes, reverse, residuals, masks, monkeypatch):
    """In tiles of 8 rows and chunks of 4 or 2 steps, within 5 that are made ready at once."""
    monkeypatch.setattr(tpu, "ROWS", 8)
    monkeypatch.setattr(tpu, "STREAMED", 300_000)
    T, B = sizes
    case, marks = problem(T, B, 4, masks)
    made = value_and_gradients(by(INTERPRETED, residuals, reverse, marks), case)
    twin = partial(reference.lstm, time_major=True, reverse=reverse, **marks)
    assert_close(made, value_and_gradients(twin, case))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_are_as_exact_as_xla(dtype):
    """Beside float64, of all results and gradients."""
    case, marks = problem(3, 9, 128, ("lengths", "resets"), dtype)
    exact = value_and_gradients(
        partial(reference.lstm, time_major=True, **marks),
        jax.tree.map(lambda a: a.astype(jnp.float64), case),
    )
    ours, xla = (
        jax.tree.leaves(
            jax.tree.map(
                relative_error, value_and_gradients(by(s, "states", False, marks), case), exact
            )
        )
        for s in (INTERPRETED, chunked.CHUNKED)
    )
    for error, other in zip(ours, xla, strict=True):
        assert error <= (1e-5 if dtype == jnp.float32 else 1.5 * other), (ours, xla)


def test_second_order_is_that_of_xla():
    case, marks = problem(2, 2, 4, ("resets",))

    def penalty(schedule, params, x):
        y = lambda x: by(schedule, "states", False, marks)(params, x, case.state)[0]
        return jnp.sum(jax.grad(lambda x: jnp.sum(y(x) ** 2))(x) ** 2)

    made = [
        jax.jit(jax.grad(partial(penalty, s), (0, 1)))(case.params, case.x)
        for s in (INTERPRETED, chunked.CHUNKED)
    ]
    assert_close(*made)


def gradient(implementation, params, x):
    def loss(params, x):
        y, _ = lstm(params, x, time_major=True, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    return jax.grad(loss, (0, 1))(params, x)


@pytest.mark.parametrize(
    ("implementation", "H", "dtype", "count"),
    [
        ("pallas", 128, jnp.bfloat16, 2),
        ("pallas", 1024, jnp.float32, 2),
        ("pallas", 64, jnp.bfloat16, 0),  # which those for a GPU can
        (None, 128, jnp.bfloat16, 0),
    ],
)
def test_a_program_for_a_tpu_has_the_kernels_where_they_are_asked_for(
    implementation, H, dtype, count
):
    params = jax.eval_shape(lambda: init_lstm(jax.random.key(0), 2, H, dtype=dtype))
    function = jax.jit(partial(gradient, implementation))
    exported = export.export(function, platforms=["tpu"])
    x = jax.ShapeDtypeStruct((3, 2, 2), dtype)
    assert str(exported(params, x).mlir_module()).count("@tpu_custom_call") == count


def test_a_call_is_refused_that_the_device_at_hand_cannot_run(monkeypatch):
    def call(H, dtype):
        params = jax.eval_shape(lambda: init_lstm(jax.random.key(0), 2, H, dtype=dtype))
        run = partial(lstm, implementation="pallas")
        jax.eval_shape(run, params, jax.ShapeDtypeStruct((1, 1, 2), dtype))

    def refused(message, *how):
        with pytest.raises(ValueError, match="`implementation='pallas'` cannot serve ") as error:
            call(*how)
        assert message in str(error.value)

    refused("the hidden width 1152 on a TPU (multiples of 128 up to 1024", 1152, jnp.float32)
    refused("the dtype float16 on a TPU", 1024, jnp.float16)
    call(128, jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    refused("the hidden width 64 on a TPU", 64, jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    refused("the dtype float32;", 128, jnp.float32)
