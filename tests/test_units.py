"""What holds of every recurrent unit: by the contract, against its plain twin."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rnnattn import slstm
from tests.lstm_cases import assert_close, relative_error, value_and_gradients
from tests.units import UNITS, make_case

each_unit = pytest.mark.parametrize("family", UNITS.values(), ids=UNITS.keys())

T, B, D, H = 7, 4, 3, 4
RNG = np.random.default_rng(1)
LENGTHS = jnp.array([T, 0, 3, 5])
MASK = jnp.asarray(RNG.random((B, T)) < 0.6).at[0, :2].set(False).at[2, -1].set(False)
RESETS = jnp.asarray(RNG.random((B, T)) < 0.3)
EVERY = {"lengths": LENGTHS, "mask": MASK, "resets": RESETS}
OPTIONS = {
    "plain, gates": {"residuals": "gates"},
    "plain, states": {"residuals": "states"},
    "every 3": {"residuals": 3},
    "everything": EVERY | {"residuals": "states"},
    "everything, gates, reversed": EVERY | {"residuals": "gates", "reverse": True},
    "everything, every 2, reversed": EVERY | {"residuals": 2, "reverse": True},
}


def counted(options):
    """The steps that count, (B, T)."""
    steps = jnp.ones((B, T), bool)
    if "lengths" in options:
        steps &= jnp.arange(T)[None] < LENGTHS[:, None]
    return steps & options["mask"] if "mask" in options else steps


@each_unit
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients_match_the_plain_twin(family, options):
    case = make_case(family, T, B, D, H)
    nothing = ~counted(options)[..., None]
    case = case._replace(x=jnp.where(nothing, jnp.nan, case.x))
    expected = value_and_gradients(partial(family.twin, **options), case)
    assert_close(value_and_gradients(partial(family.run, **options), case), expected, 1e-12)
    assert np.all(np.where(nothing, expected[0][0], 0) == 0)


@each_unit
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 3, 1), (3, 1, 1, 2)])
def test_axes_of_one_match_the_plain_twin(family, sizes):
    case = make_case(family, *sizes)
    expected = value_and_gradients(family.twin, case)
    # the norm of one number is 0 at every number, and its gradient a difference of equal ones
    assert_close(value_and_gradients(family.run, case), expected, 1e-8)


@each_unit
@pytest.mark.parametrize("reverse", [False, True])
def test_a_masked_row_is_the_row_without_its_steps(family, reverse):
    case = make_case(family, T, 1, D, H)
    steps = [1, 3, 4]
    mask = jnp.zeros((1, T), bool).at[0, jnp.array(steps)].set(True)
    y, last = family.run(case.params, case.x, case.state, mask=mask, reverse=reverse)
    packed, end = family.run(case.params, case.x[:, jnp.array(steps)], case.state, reverse=reverse)
    assert_close((y[:, jnp.array(steps)], last), (packed, end), 1e-14)
    assert np.all(np.where(mask[..., None], 0, y) == 0)


@each_unit
def test_resets_equal_episodes_run_apart(family):
    case = make_case(family, T, 1, D, H)
    resets = jnp.zeros((1, T), bool).at[0, 4].set(True)
    y, last = family.run(case.params, case.x, case.state, resets=resets)
    first, _ = family.run(case.params, case.x[:, :4], case.state)
    second, end = family.run(case.params, case.x[:, 4:])
    assert_close((y, last), (jnp.concatenate([first, second], axis=1), end), 1e-14)


@each_unit
def test_a_reset_at_a_masked_step_takes_effect_at_the_next(family):
    case = make_case(family, T, 1, D, H)
    mask = jnp.ones((1, T), bool).at[0, 2].set(False)
    marked = lambda t: jnp.zeros((1, T), bool).at[0, t].set(True)
    for reverse in (False, True):
        run = partial(family.run, case.params, case.x, case.state, mask=mask, reverse=reverse)
        assert_close(run(resets=marked(2)), run(resets=marked(3)), 1e-14)


@each_unit
def test_a_step_is_a_sequence_of_one(family):
    case = make_case(family, 1, B, D, H)
    after = family.step(case.params, case.x[:, 0], case.state)
    assert_close(after, family.run(case.params, case.x, case.state)[1], 1e-14)


@each_unit
def test_derivatives_match_finite_differences_to_second_order(family):
    case = make_case(family, 3, 2, 2, 2)
    loss = lambda params, x, state: sum(
        jnp.vdot(a, b)
        for a, b in zip(
            jax.tree.leaves(family.run(params, x, state)),
            jax.tree.leaves(case.cotangents),
            strict=True,
        )
    )
    check_grads(jax.jit(loss), case[:3], order=2, modes=["rev"], rtol=1e-4)


@each_unit
def test_second_derivatives_match_the_plain_twin(family):
    case = make_case(family, 4, 2, 2, 3)

    def hessian_vector(run, outer):
        def loss(params):
            y, last = run(params, case.x, case.state, lengths=jnp.array([4, 2]))
            return jnp.sum(y**3) + sum(jnp.sum(s**2) for s in jax.tree.leaves(last))

        gradient = jax.grad(loss)
        if outer == "forward":
            return jax.jvp(gradient, (case.params,), (case.params,))[1]
        inner = lambda params: sum(
            jnp.vdot(g, p)
            for g, p in zip(
                jax.tree.leaves(gradient(params)), jax.tree.leaves(case.params), strict=True
            )
        )
        return jax.grad(inner)(case.params)

    expected = jax.jit(partial(hessian_vector, family.twin, "forward"))()
    for outer in ("forward", "reverse"):
        assert_close(jax.jit(partial(hessian_vector, family.run, outer))(), expected, 1e-10)


@each_unit
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_error_is_at_most_twice_that_of_the_plain_twin(family, dtype):
    case = make_case(family, T, B, D, H, dtype=dtype)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), case)
    exact = value_and_gradients(family.twin, wide)
    plain = relative_error(value_and_gradients(family.twin, case), exact)
    made = value_and_gradients(family.run, case)
    assert relative_error(made, exact) < 2 * plain
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(made[1]) == dtypes(case[:3])


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exponential"])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_an_slstm_is_finite_at_any_preactivation(forget_gate, size):
    case = make_case(UNITS["slstm"], 9, 3, 2, 4, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    b = jnp.asarray(rng.choice([-size, size], size=(3, 16)), jnp.float32)
    for row in b:
        params = case.params._replace(b=row)
        run = lambda params, x: slstm(params, x, forget_gate=forget_gate)[0]
        y, pullback = jax.vjp(run, params, case.x)
        assert np.all(np.isfinite(y)) and np.all(np.abs(y) <= 1.001)
        assert all(np.all(np.isfinite(d)) for d in jax.tree.leaves(pullback(case.cotangents[0])))


@each_unit
def test_everything_exports_for_gpu_and_tpu(family):
    case = make_case(family, 5, 2, 3, 4, dtype=jnp.float32)
    everywhere = ("cpu", "cuda", "tpu")
    run = jax.jit(lambda *case: value_and_gradients(family.run, case))
    assert jax.export.export(run, platforms=everywhere)(*case).platforms == everywhere


@each_unit
def test_the_batch_may_be_divided_by_shard_map(family):
    case = make_case(family, T, 4, D, H)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), rows, rows), out_specs=(P(), rows))
    def parts(params, x, state):
        loss = lambda params, x: jnp.sum(family.run(params, x, state)[0] ** 2)
        return jax.grad(loss, (0, 1))(params, x)

    loss = lambda params, x: jnp.sum(family.run(params, x, case.state)[0] ** 2)
    expected = jax.jit(jax.grad(loss, (0, 1)))(case.params, case.x)
    assert_close(jax.jit(parts)(*case[:3]), expected, 1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_program_that_reads_the_final_state_alone_holds_no_outputs(name):
    steps, rows, width = 2**14, 4, 64
    case = jax.eval_shape(lambda: make_case(UNITS[name], 1, rows, width, width, dtype=jnp.float32))
    x = jax.ShapeDtypeStruct((steps, rows, width), jnp.float32)
    run = partial(UNITS[name].run, time_major=True, residuals=128, implementation="xla")
    outputs = steps * rows * width * 4

    def memory(reads, of_program):
        loss = lambda params, x: sum(jnp.sum(a**2) for a in jax.tree.leaves(reads(run(params, x))))
        compiled = jax.jit(of_program(loss)).lower(case.params, x).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    for of_program in (lambda loss: loss, jax.grad):
        assert memory(lambda results: results, of_program) > outputs
        assert memory(lambda results: results[1], of_program) < outputs / 2


@each_unit
def test_a_second_eager_call_compiles_nothing(family):
    case = make_case(family, 5, 2, 3, 11)  # a width no other test has compiled
    calls = [lambda: family.run(*case[:3]), lambda: family.step(case[0], case.x[:, 0], case.state)]
    compilations = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for call in calls:
            call()
            compilations.clear()
            call()
            assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
