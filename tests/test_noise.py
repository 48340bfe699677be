"""Zoneout and recurrent dropout, in every unit: against the twin, and by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import rnnattn
from rnnattn import gru, gru_step, init_lstm, lstm, lstm_step, reference
from rnnattn.recurrent import noise
from tests.lstm_cases import assert_close, relative_error, value_and_gradients
from tests.units import UNITS, make_case

T, B, D, H = 6, 3, 3, 4
KEY = jax.random.key(3)
MASKED: dict[str, Any] = {
    "lengths": jnp.array([T, 0, 4]),
    "mask": jnp.ones((B, T), bool).at[0, 1:3].set(False).at[2, 0].set(False),
    "resets": jnp.zeros((B, T), bool).at[0, 4].set(True).at[2, 2].set(True),
}


def drawn(unit, **options) -> dict[str, Any]:
    """All that can be random in a unit."""
    rates: dict[str, Any] = {"zoneout": 0.3, "recurrent_dropout": 0.4, "key": KEY}
    return rates | ({"candidate_dropout": 0.25} if unit.candidate else {}) | options


# ---- every unit, against its twin ---------------------------------------------------------------

# what is kept for the gradient
KEPT = {
    "lstm": "gates",
    "gru": 4,
    "gru, reset before": "states",
    "rnn": "gates",
    "layer-norm lstm": 4,
    "layer-norm gru": "gates",
    "slstm": "states",
}


@pytest.mark.parametrize("name", KEPT)
def test_values_and_gradients_match_the_plain_twin(name):
    family = UNITS[name]
    case = make_case(family, T, B, D, H)
    here = (jnp.arange(T)[None] < MASKED["lengths"][:, None]) & MASKED["mask"]
    case = case._replace(x=jnp.where(here[..., None], case.x, jnp.nan))
    options = drawn(family.unit, reverse=KEPT[name] == "states", **MASKED)
    expected = value_and_gradients(partial(family.twin, **options), case)
    actual = value_and_gradients(partial(family.run, residuals=KEPT[name], **options), case)
    assert_close(actual, expected, 1e-12)


CHOICES: dict[str, Any] = {
    "zoneout of h": ("lstm", {"zoneout": (0.4, 0), "key": KEY}),
    "zoneout of c": ("lstm", {"zoneout": (0, 0.4), "key": KEY}),
    "the expectation": ("lstm", {"zoneout": (0.2, 0.5)}),
    "of the candidate": ("gru", {"candidate_dropout": 0.4, "key": KEY}),
    "of what is read": ("gru, reset before", {"recurrent_dropout": 0.4, "key": KEY}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_each_alone_matches_the_plain_twin(choice):
    name, options = CHOICES[choice]
    family = UNITS[name]
    case = make_case(family, 5, 2, 1, 2)
    expected = value_and_gradients(partial(family.twin, **options), case)
    actual = value_and_gradients(partial(family.run, residuals="gates", **options), case)
    assert_close(actual, expected, 1e-12)


def test_variants_of_the_lstm_have_it_too():
    rng = np.random.default_rng(0)
    family = UNITS["lstm"]
    case = make_case(family, T, B, D, H)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = case.params._replace(w_h=draw(2, 4 * H), peephole=draw(3, H), projection=draw(H, 2))
    state, dstate = (s._replace(h=s.h[:, :2]) for s in (case.state, case.cotangents[1]))
    case = case._replace(params=params, state=state)
    case = case._replace(cotangents=(draw(B, T, 2), draw(B, T, H), dstate))
    options = drawn(family.unit, coupled=True, clip=1.0, return_cells=True, zoneout=(0.2, 0.5))
    expected = value_and_gradients(partial(reference.lstm, **options), case)
    assert_close(value_and_gradients(partial(lstm, **options), case), expected, 1e-12)


def test_second_derivatives_match_the_plain_twin():
    family = UNITS["gru"]
    case = make_case(family, 4, 2, 2, 3)

    def hessian_vector(run):
        def loss(params):
            y, last = run(params, case.x, case.state, **drawn(family.unit))
            return jnp.sum(y**3) + jnp.sum(last**2)

        return jax.jvp(jax.grad(loss), (case.params,), (case.params,))[1]

    expected = jax.jit(partial(hessian_vector, family.twin))()
    assert_close(jax.jit(partial(hessian_vector, family.run))(), expected, 1e-10)


def test_16_bit_error_is_at_most_twice_that_of_the_plain_twin():
    family = UNITS["lstm"]
    case = make_case(family, T, B, D, H, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), case)
    options = drawn(family.unit)
    exact = value_and_gradients(partial(family.twin, **options), wide)
    plain = relative_error(value_and_gradients(partial(family.twin, **options), case), exact)
    made = value_and_gradients(partial(family.run, **options), case)
    assert relative_error(made, exact) < 2 * plain
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(made[1]) == dtypes(case[:3])


# ---- by hand ------------------------------------------------------------------------------------


def by_hand(name, case, zoneout, recurrent_dropout, candidate_dropout, key):
    """An LSTM or a GRU in NumPy, a step after another, and all states."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    w_x, w_h, b, *others = map(np.asarray, jax.tree.leaves(case.params))
    rates = noise.Noise((zoneout,) * UNITS[name].fields, recurrent_dropout, candidate_dropout)
    rows = noise.row_keys(key, B)
    reads = np.asarray(noise.draw_reads(rates, rows, H)) / (1 - recurrent_dropout)
    before = [np.asarray(s) for s in jax.tree.leaves(case.state)]
    states = []
    of_steps = noise.draw_steps(rates, noise.step_keys(rows, T), before)
    for t in range(T):
        h = before[0] * reads
        e = np.asarray(of_steps.candidate[t]) / (1 - candidate_dropout)
        a, s = np.asarray(case.x)[:, t] @ w_x + b[None], h @ w_h
        if name == "lstm":
            i, f, g, o = np.split(a + s, 4, axis=-1)
            c = sigmoid(f) * before[1] + sigmoid(i) * e * np.tanh(g)
            made = [sigmoid(o) * np.tanh(c), c]
        else:
            a_r, a_z, a_n = np.split(a, 3, axis=-1)
            s_r, s_z, s_n = np.split(s, 3, axis=-1)
            r, z = sigmoid(a_r + s_r), sigmoid(a_z + s_z)
            n = np.tanh(a_n + r * (s_n + others[0][None]))
            made = [(1 - z) * e * n + z * before[0]]  # z reads all of h
        zoned = [np.asarray(Z[t]) for Z in of_steps.zoned]
        before = [np.where(Z, s, m) for Z, s, m in zip(zoned, before, made, strict=True)]
        states.append(before)
    return [np.stack(s, axis=1) for s in zip(*states, strict=True)]


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_twin_is_what_is_written_here(name):
    family = UNITS[name]
    case = make_case(family, T, B, D, H)
    options = drawn(family.unit)
    more = {"return_cells": True} if name == "lstm" else {}
    *states, last = family.twin(*case[:3], **options, **more)
    expected = by_hand(name, case, **options)
    assert_close(states, expected, 1e-14)
    assert_close(jax.tree.leaves(last), [s[:, -1] for s in expected], 1e-14)


def test_a_state_is_held_or_made_and_on_average_the_expectation():
    case = make_case(UNITS["lstm"], 1, B, D, H)
    shares, many = (0.2, 0.6), 2000
    x, state = case.x[:, 0], case.state
    step = partial(lstm_step, case.params, x, state, zoneout=shares)
    states = jax.jit(jax.vmap(lambda key: step(key=key)))(jax.random.split(KEY, many))
    made, expected = lstm_step(case.params, x, state), step()
    for p, s, held, new, mean in zip(shares, states, state, made, expected, strict=True):
        is_held = s == held[None]
        assert np.all(is_held | (abs(s - new[None]) < 1e-14))
        assert_close(mean, p * held + (1 - p) * new, 1e-14)
        deviation = (p * (1 - p) / many) ** 0.5
        assert np.all(abs(np.mean(is_held, axis=0) - p) < 5 * deviation)
        assert np.all(abs(np.mean(s, axis=0) - mean) < 5 * deviation * abs(held - new) + 1e-12)


def test_what_is_read_is_the_same_at_every_step_and_on_average_all():
    rates, many = noise.Noise((), 0.3, 0.4), 4000
    rows = noise.row_keys(KEY, many)
    reads = noise.draw_reads(rates, rows, 2)
    of_steps = noise.draw_steps(rates, noise.step_keys(rows, 2), [jnp.zeros((many, 3))])
    for share, kept in ((0.7, reads), (0.6, of_steps.candidate[0]), (0.6, of_steps.candidate[1])):
        assert np.all(abs(np.mean(kept, axis=0) - share) < 5 * (share * (1 - share) / many) ** 0.5)
    assert np.any(of_steps.candidate[0] != of_steps.candidate[1])
    assert_close(
        noise.read(rates, reads, jnp.ones((5, many, 2))),
        np.stack(5 * [np.asarray(reads) / 0.7]),
        1e-12,
    )


# ---- what is drawn ------------------------------------------------------------------------------


def test_rates_of_zero_and_dropout_without_a_key_are_the_program_without():
    case = make_case(UNITS["gru"], T, B, D, H, dtype=jnp.float32)
    program = lambda **options: str(jax.make_jaxpr(partial(gru, **options))(*case[:3]))
    none = program()
    assert program(zoneout=0.0, recurrent_dropout=0, candidate_dropout=0, key=KEY) == none
    assert program(recurrent_dropout=0.5, candidate_dropout=0.5) == none
    assert program(zoneout=0.5) != none


def test_steps_draw_alike_however_many_there_are_and_rows_apart():
    case = make_case(UNITS["lstm"], T, B, D, H)
    of = partial(drawn, UNITS["lstm"].unit)
    run = lambda x, state, **options: lstm(case.params, x, state, **of(**options))
    y, _ = run(case.x, case.state)
    cut, _ = run(case.x[:2, :4], jax.tree.map(lambda s: s[:2], case.state))
    assert_close(cut, y[:2, :4], 1e-14)
    other, _ = run(case.x, case.state, key=jax.random.key(4))
    alike, _ = run(jnp.ones_like(case.x), None)
    assert np.any(other != y) and np.any(alike[0] != alike[1])


def test_a_step_is_a_sequence_of_one():
    case = make_case(UNITS["gru"], 1, B, D, H)
    options = drawn(UNITS["gru"].unit)
    after = gru_step(case.params, case.x[:, 0], case.state, **options)
    assert_close(after, gru(case.params, case.x, case.state, **options)[1], 1e-14)
    assert_close(after, reference.gru_step(case.params, case.x[:, 0], case.state, **options), 1e-14)
    case = make_case(UNITS["lstm"], 1, B, D, H)
    options = drawn(UNITS["lstm"].unit)
    state = lstm_step(case.params, case.x[:, 0], case.state, **options)
    expected = reference.lstm_step(case.params, case.x[:, 0], case.state, **options)
    assert_close(state, expected, 1e-14)


def test_axes_of_a_batch_and_time_first_and_none_are_as_one():
    case = make_case(UNITS["gru"], T, 4, D, H)
    run: Any = partial(gru, **drawn(UNITS["gru"].unit))
    y, last = run(case.params, case.x, case.state)
    pairs = lambda a: a.reshape(2, 2, *a.shape[1:])
    assert_close(run(case.params, pairs(case.x), pairs(case.state)), (pairs(y), pairs(last)), 1e-14)
    first = run(case.params, case.x.swapaxes(0, 1), case.state, time_major=True)
    assert_close(first, (y.swapaxes(0, 1), last), 1e-14)
    assert_close(run(case.params, case.x[0], case.state[0]), (y[0], last[0]), 1e-14)


def test_it_exports_for_gpu_and_tpu_and_of_any_size():
    case = make_case(UNITS["slstm"], 5, 2, 3, 4, dtype=jnp.float32)
    everywhere = ("cpu", "cuda", "tpu")
    slstm = UNITS["slstm"]
    run: Any = lambda *case: value_and_gradients(partial(slstm.run, **drawn(slstm.unit)), case)
    assert jax.export.export(jax.jit(run), platforms=everywhere)(*case).platforms == everywhere
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, 3), jnp.float32)
    run = lambda params, x, key: slstm.run(params, x, **drawn(slstm.unit, key=key))
    exported = jax.export.export(jax.jit(run))(case.params, x, jax.random.PRNGKey(0))
    given = (case.params, case.x, jax.random.PRNGKey(0))
    assert_close(exported.call(*given), run(*given), 1e-5)


def test_devices_draw_for_their_rows():
    family = UNITS["layer-norm gru"]
    case = make_case(family, T, 4, D, H)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = jax.random.split(KEY, 2)
    run: Any = lambda *of, key: family.run(*of, **drawn(family.unit, key=key))

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), *3 * (P("data"),)), out_specs=(P(), P("data"))
    )
    def parts(params, x, h, key):
        loss = lambda params, x: jnp.sum(run(params, x, h, key=key[0])[0] ** 2)
        return jax.grad(loss, (0, 1))(params, x)

    def loss(params, x):
        of_device = lambda x, h, key: run(params, x, h, key=key)[0]
        x, h = (a.reshape(2, 2, *a.shape[1:]) for a in (x, case.state))
        return jnp.sum(jax.vmap(of_device)(x, h, keys) ** 2)

    expected = jax.jit(jax.grad(loss, (0, 1)))(case.params, case.x)
    assert_close(jax.jit(parts)(*case[:3], keys), expected, 1e-12)


def test_a_mesh_of_explicit_axes_draws_as_one_device():
    case = make_case(UNITS["gru"], T, 4, D, H)
    run = jax.jit(partial(gru, **drawn(UNITS["gru"].unit)))
    expected = run(*case[:3])
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))):
        x, h = (jax.device_put(a, P("data")) for a in (case.x, case.state))
        assert_close(run(case.params, x, h), expected, 1e-14)


# ---- layers -------------------------------------------------------------------------------------


def test_layers_and_directions_draw_apart():
    params = init_lstm(jax.random.key(0), 4, 4, dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)))
    options: Any = {"recurrent_dropout": 0.5, "zoneout": 0.3}
    y, _ = rnnattn.bidirectional_lstm(params, params, x, key=KEY, **options)
    ahead, back = (jax.random.fold_in(KEY, n) for n in (0, 1))
    assert_close(y[..., :4], lstm(params, x, key=ahead, **options)[0], 1e-14)
    assert_close(y[..., 4:], lstm(params, x, key=back, reverse=True, **options)[0], 1e-14)
    y, _ = rnnattn.stacked_lstm([params, params], x, key=KEY, **options)
    below, _ = lstm(params, x, key=ahead, **options)
    assert_close(y, lstm(params, below, key=back, **options)[0], 1e-14)


@pytest.mark.parametrize("module", [rnnattn.nn.LSTM, rnnattn.nn.SLSTM])
def test_a_module_draws_while_it_is_trained(module):
    options: Any = {"zoneout": 0.5, "recurrent_dropout": 0.5}
    layers = module(2, 4, num_layers=2, **options, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 5, 2), jnp.float32)
    assert np.any(layers(x)[0] != layers(x)[0])
    layers.eval()
    run = layers.forward[0].run
    assert_close(layers(x)[0], rnnattn.stacked(run, layers.layers, x, zoneout=0.5)[0], 1e-6)


# ---- errors -------------------------------------------------------------------------------------


def _bad_calls():
    case = make_case(UNITS["lstm"], 4, 2, 3, 5)
    rnn = make_case(UNITS["rnn"], 4, 2, 3, 5)
    run = lambda **options: lambda: lstm(*case[:3], **options)
    return {
        "lstm: `zoneout` must be a number in [0, 1), got 1.0": run(zoneout=1.0),
        "lstm: `zoneout` must be a number, or one for each of h, c, got (0.1,)": run(
            zoneout=(0.1,)
        ),
        "lstm: `recurrent_dropout` must be a number in [0, 1), got -1": run(recurrent_dropout=-1),
        "lstm: `candidate_dropout` must be a number in [0, 1), got 'h'": run(candidate_dropout="h"),
        "lstm: `key` must be a single key, got an array (3,) of them": run(
            zoneout=0.1, key=jax.random.split(KEY, 3)
        ),
        "rnn: `candidate_dropout` must be 0 where a unit has no candidate beside its state, got "
        "0.1": lambda: rnnattn.rnn(*rnn[:3], candidate_dropout=0.1),
        "lstm: `implementation='native'` cannot serve the dtype float64 or zoneout or dropout": run(
            zoneout=0.1, implementation="native"
        ),
    }


@pytest.mark.parametrize("message", _bad_calls())
@pytest.mark.usefixtures("only_own_checks")
def test_a_bad_argument_is_an_error_that_names_it(message):
    with pytest.raises(ValueError) as caught:
        _bad_calls()[message]()
    assert str(caught.value).startswith(message)
