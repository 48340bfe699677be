"""The LSTM against its plain twin, torch, and what must hold of any LSTM."""

import re
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn
from jax.sharding import AxisType, PartitionSpec as P
from jax.test_util import check_grads

import rnnattn
from rnnattn import (
    LSTMParams,
    LSTMState,
    bidirectional_lstm,
    init_lstm,
    lstm,
    lstm_step,
    reference,
    stacked_lstm,
)
from rnnattn.recurrent import api, chunked, peers, stack
from rnnattn.recurrent.arguments import suited_residuals
from rnnattn.recurrent.problem import Options, Steps
from rnnattn.recurrent.units.lstm import LSTM
from tests.lstm_cases import assert_close, make_case, relative_error, value_and_gradients

SIZES = [(7, 3, 2, 4), (1, 1, 1, 1), (1, 2, 3, 1), (3, 1, 1, 5), (4, 2, 1, 1), (37, 2, 3, 3)]


@pytest.mark.parametrize("T, B, D, H", SIZES)
@pytest.mark.parametrize("reverse", [False, True])
def test_value_and_gradients_match_the_plain_twin(T, B, D, H, reverse):
    case = make_case(T, B, D, H)
    expected = value_and_gradients(partial(reference.lstm, reverse=reverse), case)
    assert_close(value_and_gradients(partial(lstm, reverse=reverse), case), expected, 1e-12)


@pytest.mark.parametrize("T, B, D, H", [(7, 3, 2, 4), (1, 1, 1, 1), (3, 1, 5, 2)])
@pytest.mark.parametrize("time_major", [False, True])
def test_value_and_gradients_match_torch(T, B, D, H, time_major):
    torch = pytest.importorskip("torch")
    case = make_case(T, B, D, H)
    if time_major:
        swap = lambda a: jnp.swapaxes(a, 0, 1)
        dy, dstate = case.cotangents
        case = case._replace(x=swap(case.x), cotangents=(swap(dy), dstate))

    layer = torch.nn.LSTM(D, H, batch_first=not time_major, dtype=torch.float64)
    tensor = lambda a: torch.tensor(np.asarray(a))
    with torch.no_grad():
        layer.weight_ih_l0.copy_(tensor(case.params.w_x.T))
        layer.weight_hh_l0.copy_(tensor(case.params.w_h.T))
        layer.bias_ih_l0.copy_(tensor(case.params.b))
        layer.bias_hh_l0.zero_()
    x = tensor(case.x).requires_grad_()
    h, c = (tensor(s)[None].requires_grad_() for s in case.state)
    y, (h_T, c_T) = layer(x, (h, c))
    dy, dstate = case.cotangents
    torch.autograd.backward((y, h_T[0], c_T[0]), (tensor(dy), *map(tensor, dstate)))

    array = lambda t: jnp.asarray(t.detach().numpy())
    dparams = LSTMParams(
        array(layer.weight_ih_l0.grad.T),
        array(layer.weight_hh_l0.grad.T),
        array(layer.bias_ih_l0.grad),
    )
    outputs = (array(y), LSTMState(array(h_T[0]), array(c_T[0])))
    gradients = (dparams, array(x.grad), LSTMState(array(h.grad[0]), array(c.grad[0])))
    actual = value_and_gradients(partial(lstm, time_major=time_major), case)
    assert_close(actual, (outputs, gradients), 1e-12)


@pytest.mark.parametrize("B, D, H", [(3, 2, 4), (1, 1, 1)])
def test_a_step_is_a_sequence_of_one(B, D, H):
    case = make_case(1, B, D, H)
    case = case._replace(x=case.x[:, 0], cotangents=case.cotangents[1])
    expected = value_and_gradients(reference.lstm_step, case)
    assert_close(value_and_gradients(lstm_step, case), expected, 1e-12)


def test_gradients_match_finite_differences_to_second_order():
    case = make_case(3, 2, 2, 2)
    check_grads(jax.jit(lstm), case[:3], order=2, modes=["rev"])
    check_grads(jax.jit(lstm_step), (case.params, case.x[:, 0], case.state), order=2, modes=["rev"])


def test_second_derivatives_match_the_plain_twin():
    case = make_case(5, 2, 2, 3)

    def second(function):
        loss = lambda x: jnp.sum(function(case.params, x, case.state)[0] ** 3)
        norm = lambda x: jnp.sum(jax.grad(loss)(x) ** 2)
        return jax.jit(lambda x: (jax.hessian(loss)(x), jax.grad(norm)(x)))(case.x)

    assert_close(second(lstm), second(reference.lstm), 1e-12)


@cache
def _of_the_twin_in(dtype):
    """A case in this dtype, and its results; the numbers before rounding are those of float64."""
    case = make_case(20, 4, 6, 8, dtype=dtype)
    return case, value_and_gradients(reference.lstm, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("residuals", ["gates", "states", 3])
def test_16_bit_error_is_at_most_twice_that_of_the_plain_twin(dtype, residuals):
    _, truth = _of_the_twin_in(jnp.float64)
    case, plain = _of_the_twin_in(dtype)
    hand = value_and_gradients(partial(lstm, residuals=residuals), case)
    assert [a.dtype for a in jax.tree.leaves(hand)] == [a.dtype for a in jax.tree.leaves(plain)]
    for ours, theirs, true in zip(*map(jax.tree.leaves, (hand, plain, truth)), strict=True):
        assert relative_error(ours, true) <= 2 * relative_error(theirs, true)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_and_gradients_keep_their_dtypes(dtype):
    case = make_case(3, 2, 2, 2, dtype=dtype)
    (y, state), gradients = value_and_gradients(lstm, case)
    assert y.dtype == state.h.dtype == dtype and state.c.dtype == jnp.float32
    like = (case.params, case.x, case.state)
    assert [g.dtype for g in jax.tree.leaves(gradients)] == [a.dtype for a in jax.tree.leaves(like)]


# ---- the gradient as printed in the notes -----------------------------------------------------


def _gradient_of_one_step(case, *, o_in_dc, c_prev_in_f):
    """L3 to L7 for one step from a cotangent of h, with the factors the notes leave out."""
    w_x, w_h, b = case.params[:3]
    x, (h, c_prev) = case.x[:, 0], case.state
    dh = case.cotangents[1].h
    i, f, g, o = np.split(np.asarray(x @ w_x + h @ w_h + b[None]), 4, axis=-1)
    i, f, g, o = 1 / (1 + np.exp(-i)), 1 / (1 + np.exp(-f)), np.tanh(g), 1 / (1 + np.exp(-o))
    tanh_c = np.tanh(f * c_prev + i * g)
    dc = dh * (1 - tanh_c**2) * (o if o_in_dc else 1)
    dz_f = dc * f * (1 - f) * (c_prev if c_prev_in_f else 1)
    blocks = [dc * g * i * (1 - i), dz_f, dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)]
    dz = np.concatenate(blocks, axis=-1)
    return x.T @ dz, h.T @ dz, dz.sum(0), dz @ w_x.T, dz @ w_h.T


@pytest.mark.parametrize(
    "o_in_dc, c_prev_in_f, right", [(False, False, False), (True, False, False), (True, True, True)]
)
def test_the_printed_gradient_fails_and_so_does_restoring_o_alone(o_in_dc, c_prev_in_f, right):
    case = make_case(1, 3, 2, 4)
    loss = lambda p, x, h: jnp.sum(
        lstm_step(p, x, LSTMState(h, case.state.c)).h * case.cotangents[1].h
    )
    dparams, dx, dh = jax.grad(loss, (0, 1, 2))(case.params, case.x[:, 0], case.state.h)
    printed = _gradient_of_one_step(case, o_in_dc=o_in_dc, c_prev_in_f=c_prev_in_f)
    errors = [relative_error(p, t) for p, t in zip(printed, (*dparams[:3], dx, dh), strict=True)]
    assert max(errors) < 1e-12 if right else min(errors) > 1e-2


# ---- features, each with its gradient ---------------------------------------------------------

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "peephole": ({"peephole": True}, {}),
    "projection": ({"R": 3}, {}),
    "clip": ({}, {"clip": 0.7}),
    "coupled": ({}, {"coupled": True}),
    "all": ({"peephole": True, "R": 3}, {"clip": 1.5, "coupled": True}),
    "peephole and clip": ({"peephole": True}, {"clip": 1.5}),
}


def _masks(T, B, *, seed=0):
    """Lengths with 0 and T among them, and resets; in padding as well."""
    rng = np.random.default_rng(seed)
    lengths = jnp.asarray([0, T, *rng.integers(1, T, size=B - 2)], jnp.int32)
    return {"lengths": lengths, "resets": jnp.asarray(rng.random((B, T)) < 0.3)}


@cache
def _variant(name, reverse):
    """A case, the options of a call, and what the plain twin makes of them."""
    sizes, options = VARIANTS[name]
    case = make_case(9, 4, 2, 5, **sizes)
    options = {**options, **_masks(9, 4), "reverse": reverse}
    return case, options, value_and_gradients(partial(reference.lstm, **options), case)


KEPT = [
    ((64, (32,), 128, jnp.float32), "gates"),
    # 255 MiB of c and the pre-activations, and twice as much
    ((2**10, (2**7,), 512 // 5, jnp.float32), "gates"),
    ((2**10, (2**7, 2), 512 // 5, jnp.float32), "states"),
    ((2**10, (2**7, 2), 512 // 5, jnp.bfloat16), "states"),
    ((2**9, (2**7,), 512 // 5, jnp.float64), "gates"),
    # 1 GiB of c, and more
    ((2**18, (), 2**10, jnp.float32), "states"),
    ((2**18 + 1, (), 2**10, jnp.float32), 2**9),
    ((0, (4,), 8, jnp.float32), "gates"),
]


@pytest.mark.parametrize("sizes, kept", KEPT)
def test_what_is_kept_is_chosen_by_its_memory(sizes, kept):
    T, batch, H, dtype = sizes
    array: Any = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    params = LSTMParams(array(1, 4 * H), array(H, 4 * H), array(4 * H))
    assert suited_residuals(LSTM(), params, array(*batch, T, 1), False) == kept


def test_what_is_kept_by_default_is_what_the_rule_says(monkeypatch):
    case = make_case(9, 2, 3, 4)
    seen = []

    def rule(unit, params, x, time_major):
        seen.append((unit, x.shape, time_major))
        return 4

    monkeypatch.setattr(api, "suited_residuals", rule)
    loss = lambda run: lambda x: jnp.sum(run(case.params, x)[0] ** 2)
    left_open, given = (
        str(jax.make_jaxpr(jax.grad(loss(run)))(case.x))
        for run in (lstm, partial(lstm, residuals=4))
    )
    assert seen == [(LSTM(), (2, 9, 3), False)]
    assert left_open == given


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("residuals", ["gates", "states", 4])
def test_every_variant_matches_the_plain_twin(name, residuals):
    case, options, expected = _variant(name, residuals == "states")
    actual = value_and_gradients(partial(lstm, residuals=residuals, **options), case)
    assert_close(actual, expected, 1e-12)


REMAINDERS = 37, 3, 2, 7  # a prime number of steps, and a width no other test has compiled


@cache
def _with_remainders(reverse):
    case = make_case(*REMAINDERS)
    options = {**_masks(*REMAINDERS[:2]), "reverse": reverse}
    return case, options, value_and_gradients(partial(reference.lstm, **options), case)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("residuals", ["gates", "states", 16])
def test_remainders_of_chunks_match_the_plain_twin(reverse, residuals, monkeypatch):
    T, B, _, H = REMAINDERS
    sizes = chunked.ON_CPU._replace(chunk_bytes=8 * B * 4 * H * 10)
    monkeypatch.setattr(chunked, "ON_CPU", sizes)
    case, options, expected = _with_remainders(reverse)
    problem = Options(LSTM(), residuals=residuals)
    steps = Steps(case.x.swapaxes(0, 1), None, None)
    length = chunked.chunk_length(sizes, problem, case.params, steps)
    assert 1 < length < T and T % length
    actual = value_and_gradients(partial(lstm, residuals=residuals, **options), case)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("function", [lstm, reference.lstm])
@pytest.mark.parametrize("reverse", [False, True])
def test_padded_rows_equal_rows_run_one_by_one(function, reverse):
    lengths = np.array([0, 6, 1, 4])
    case = make_case(6, 4, 2, 3)
    padding = np.arange(6)[None, :, None] >= lengths[:, None, None]
    case = case._replace(x=jnp.where(padding, jnp.nan, case.x))
    case = case._replace(
        cotangents=(jnp.where(padding, jnp.nan, case.cotangents[0]), case.cotangents[1])
    )
    run = partial(function, lengths=jnp.asarray(lengths), reverse=reverse)
    (y, state), (dparams, dx, dstate) = value_and_gradients(run, case)

    summed = jax.tree.map(jnp.zeros_like, case.params)
    for row, length in enumerate(lengths):
        this = slice(row, row + 1)
        pick = lambda s, this=this: LSTMState(s.h[this], s.c[this])
        alone = case._replace(
            x=case.x[this, :length],
            state=pick(case.state),
            cotangents=(case.cotangents[0][this, :length], pick(case.cotangents[1])),
        )
        outputs, gradients = value_and_gradients(partial(reference.lstm, reverse=reverse), alone)
        assert_close((y[this, :length], pick(state)), outputs, 1e-12)
        assert_close((dx[this, :length], pick(dstate)), gradients[1:], 1e-12)
        assert not np.any(y[row, length:]) and not np.any(dx[row, length:])
        summed = jax.tree.map(jnp.add, summed, gradients[0])
    assert_close(dparams, summed, 1e-12)


def test_a_row_of_length_zero_returns_the_initial_state_and_its_cotangent():
    case = make_case(4, 2, 2, 3)
    run = partial(lstm, lengths=jnp.zeros(2, jnp.int32))
    (_, state), (dparams, _, dstate) = value_and_gradients(run, case)
    assert_close((state, dstate), (case.state, case.cotangents[1]), 0)
    assert not any(np.any(d) for d in jax.tree.leaves(dparams))


@pytest.mark.parametrize("function", [lstm, reference.lstm])
@pytest.mark.parametrize("reverse", [False, True])
def test_resets_equal_episodes_run_apart(function, reverse):
    starts = [0, 3, 4, 8, 9]  # the last is T
    case = make_case(9, 2, 2, 3)
    resets = jnp.zeros((2, 9), bool).at[:, jnp.asarray(starts[1:-1])].set(True)

    def apart(params, x, state):
        zeros = jax.tree.map(jnp.zeros_like, state)
        first, last = (-1, 0) if reverse else (0, -1)
        episodes = list(pairwise(starts))
        initial = [state if e == episodes[first] else zeros for e in episodes]
        runs = [
            reference.lstm(params, x[:, a:b], s, reverse=reverse)
            for (a, b), s in zip(episodes, initial, strict=True)
        ]
        return jnp.concatenate([y for y, _ in runs], axis=1), runs[last][1]

    actual = value_and_gradients(partial(function, resets=resets, reverse=reverse), case)
    assert_close(actual, value_and_gradients(apart, case), 1e-12)


@pytest.mark.parametrize("other", [False, True])
def test_cells_of_every_step_have_their_cotangents(other):
    options: Any = {"reverse": other, "time_major": other}
    case = make_case(6, 3, 2, 4, peephole=True)
    swap = (lambda a: jnp.swapaxes(a, 0, 1)) if other else lambda a: a
    masks: Any = {
        "lengths": jnp.array([6, 0, 3]),
        "mask": swap(jnp.ones((3, 6), bool).at[0, 2].set(False)),
        "resets": swap(jnp.zeros((3, 6), bool).at[0, 3].set(True)),
    }
    dy, dlast = case.cotangents
    dcells = swap(jnp.asarray(np.random.default_rng(2).normal(size=(3, 6, 4))))
    case = case._replace(x=swap(case.x), cotangents=(swap(dy), dcells, dlast))
    run = lambda f, keeps: partial(f, return_cells=True, residuals=keeps, **options, **masks)
    expected = value_and_gradients(run(reference.lstm, None), case)
    (y, cells, last), _ = expected
    alone = lstm(case.params, case.x, case.state, **options, **masks)
    assert_close(y, alone[0], 1e-12)
    assert_close(swap(cells)[0, 0 if other else 5], last.c[0], 1e-14)
    for keeps in ("gates", "states", 4):
        assert_close(value_and_gradients(run(lstm, keeps), case), expected, 1e-12)


def test_a_coupled_forget_gate_has_no_gradient_of_its_own():
    case = make_case(4, 2, 2, 3)
    _, (dparams, *_) = value_and_gradients(partial(lstm, coupled=True), case)
    for d in dparams[:3]:
        assert not np.any(jnp.split(d, 4, axis=-1)[1])


@pytest.mark.parametrize(
    "few, small, products", [(True, True, 2), (False, False, 2), (False, True, 1)]
)
def test_many_rows_and_small_weights_take_one_product_a_step(few, small, products, monkeypatch):
    """Else the inputs of a chunk are one product before its steps."""
    B = chunked._FEW_ROWS - 1 if few else chunked._FEW_ROWS
    sizes = chunked.ON_CPU._replace(merged_bytes=2**20 if small else 0)
    monkeypatch.setattr(chunked, "ON_CPU", sizes)
    case = make_case(3, B, 2, 6 if small else 9)  # sizes that nothing else has compiled
    steps = Steps(case.x.swapaxes(0, 1), None, None)
    run = partial(chunked.forward_in, sizes, Options(LSTM()), False)
    assert str(jax.make_jaxpr(run)(case.params, case.state, steps)).count("dot_general") == products
    expected = value_and_gradients(reference.lstm, case)
    assert_close(value_and_gradients(lstm, case), expected, 1e-12)


def test_cudnn_gets_the_weights_it_wants(monkeypatch):
    """No GPU here: JAX's own reference of the cuDNN LSTM stands in, fed by the same call."""
    case = make_case(4, 3, 2, 5, dtype=jnp.float32)

    def lstm_ref(x, h, c, weights, lengths, D, H, layers, dropout, bidirectional):
        unpacked = rnn.unpack_lstm_weights(weights, D, H, layers, bidirectional)
        return rnn.lstm_ref(x, h, c, *unpacked, lengths, D, H, layers, dropout, bidirectional)

    monkeypatch.setattr(rnn, "lstm", lstm_ref)
    with jax.numpy_rank_promotion("allow"):
        lengths = jnp.array([4, 1, 3])
        run = peers.run_cudnn
        actual = run(False, case.params, case.x, case.state, lengths)
        swapped, _ = run(True, case.params, case.x.swapaxes(0, 1), case.state, lengths)
        full = run(False, case.params, case.x, case.state, None)
    assert_close(actual, lstm(case.params, case.x, case.state, lengths=lengths), 1e-6)
    assert_close(swapped.swapaxes(0, 1), actual[0], 1e-6)
    assert_close(full, lstm(case.params, case.x, case.state), 1e-6)


# ---- two directions and stacks ----------------------------------------------------------------


def _stack_case(widths, *, T=5, B=3, R=None):
    """Parameters of a stack of bidirectional layers, with the case of its bottom one."""
    pairs: list[Any] = [
        tuple(make_case(T, B, D, 4, R, seed=seed).params for seed in (2 * n, 2 * n + 1))
        for n, D in enumerate(widths)
    ]
    states: list[Any] = [
        tuple(make_case(T, B, D, 4, R, seed=seed).state for seed in (9 + n, 19 + n))
        for n, D in enumerate(widths)
    ]
    return pairs, make_case(T, B, widths[0], 4, R).x, states


@pytest.mark.parametrize("lengths", [None, (5, 1, 3)])
@pytest.mark.parametrize("R", [None, 2])
def test_a_bidirectional_stack_matches_torch(lengths, R):
    torch = pytest.importorskip("torch")
    layers, x, states = _stack_case([2, 2 * (R or 4)], R=R)
    options: dict[str, Any] = {} if lengths is None else {"lengths": jnp.asarray(lengths)}
    y, finals = stacked_lstm(layers, x, states, **options)

    layer = torch.nn.LSTM(
        2, 4, 2, batch_first=True, bidirectional=True, proj_size=R or 0, dtype=torch.float64
    )
    tensor = lambda a: torch.tensor(np.asarray(a))
    weights: dict[str, np.ndarray] = {}
    for n, pair in enumerate(layers):
        for params, reverse in zip(pair, (False, True), strict=True):
            weights |= rnnattn.interop.lstm_to_torch(params, n, reverse)
    layer.load_state_dict({name: tensor(w) for name, w in weights.items()})
    flat = [state for pair in states for state in pair]
    initial = tuple(torch.stack([tensor(s) for s in part]) for part in zip(*flat, strict=True))
    packed = tensor(x)
    if lengths is not None:
        pack = torch.nn.utils.rnn.pack_padded_sequence
        packed = pack(packed, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    expected, (h, c) = layer(packed, initial)
    if lengths is not None:
        expected, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    assert_close(y, expected.detach().numpy(), 1e-12)
    for final, h_n in zip(jax.tree.leaves(finals)[::2], h, strict=True):
        assert_close(final, h_n.detach().numpy(), 1e-12)
    for final, c_n in zip(jax.tree.leaves(finals)[1::2], c, strict=True):
        assert_close(final, c_n.detach().numpy(), 1e-12)


def test_the_gradient_of_a_stack_matches_the_plain_twin():
    layers, x, states = _stack_case([2, 8])
    options: dict[str, Any] = {
        "dropout_rate": 0.5,
        "dropout_key": jax.random.key(3),
        **_masks(5, 3),
    }

    def gradient(function):
        loss = lambda *args: jnp.sum(function(*args, **options)[0] ** 2)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(layers, x, states)

    assert_close(gradient(stacked_lstm), gradient(reference.stacked_lstm), 1e-12)
    (forward, backward), state = layers[0], states[0]
    y, _ = bidirectional_lstm(forward, backward, x, state)
    assert_close(y, reference.bidirectional_lstm(forward, backward, x, state)[0], 1e-12)


@pytest.mark.parametrize("time_major", [False, True])
def test_dropout_between_layers_drops_its_share_and_keeps_the_mean(time_major):
    x = jnp.ones((50, 40, 30))
    drop = partial(stack._drop, jax.random.key(0), x, 0.25)
    dropped = np.asarray(drop(None))
    assert set(np.unique(dropped)) == {0.0, 1 / 0.75}
    np.testing.assert_allclose(np.mean(dropped == 0), 0.25, atol=0.01)  # 5.7 standard errors
    axis = 0 if time_major else 1
    alike = np.asarray(drop(axis))
    assert np.all(alike == np.take(alike, [0], axis)) and not np.all(dropped == dropped[:, :1])


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("time_major", [False, True])
def test_every_layer_of_a_stack_drops_for_itself(time_major, variational):
    """Layers that hand on what they read: what is left of ones tells what was dropped."""
    layers = [make_case(1, 1, 1, 1).params] * 3
    left, _ = stack.stacked(
        lambda _, x, state, **options: (x, state),
        layers,
        jnp.ones((40, 50, 30)),
        dropout_rate=0.5,
        dropout_key=jax.random.key(0),
        variational=variational,
        time_major=time_major,
    )
    assert set(np.unique(left)) == {0.0, 4.0}  # twice 1 / (1 − ½)
    draws = left.size / (left.shape[1 - time_major] if variational else 1)
    bound = 1.25 / np.sqrt(draws)  # 2.9 standard errors
    np.testing.assert_allclose(np.mean(left > 0), 0.25, atol=bound)
    constant = [bool(np.all(left == np.take(left, [0], axis))) for axis in range(3)]
    in_time = 0 if time_major else 1
    assert constant == [variational and axis == in_time for axis in range(3)]


def test_dropout_needs_a_key_and_none_is_applied_to_the_top():
    layers = [init_lstm(jax.random.key(n), 3, 3, dtype=jnp.float64) for n in (0, 1)]
    x = make_case(4, 2, 3, 3).x
    plain, _ = stacked_lstm(layers[:1], x)
    dropped, _ = stacked_lstm(layers[:1], x, dropout_rate=0.9, dropout_key=jax.random.key(0))
    assert_close(dropped, plain, 0)
    keys = [
        stacked_lstm(layers, x, dropout_rate=0.5, dropout_key=jax.random.key(k))[0]
        for k in (1, 1, 2)
    ]
    assert np.array_equal(keys[0], keys[1]) and not np.array_equal(keys[0], keys[2])


# ---- theorems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_a_sequence_cut_in_two_and_chained_equals_one_run(dtype):
    params, x, state, _ = make_case(7, 2, 3, 4, dtype=dtype)
    whole = lstm(params, x, state)
    first, middle = lstm(params, x[:, :3], state)
    second, last = lstm(params, x[:, 3:], middle)
    assert_close((jnp.concatenate([first, second], axis=1), last), whole, 1e-14)


def test_running_in_reverse_equals_running_on_the_flipped_sequence():
    params, x, state, _ = make_case(7, 2, 3, 4)
    y, final = lstm(params, x, state, reverse=True)
    flipped, flipped_final = lstm(params, jnp.flip(x, 1), state)
    assert_close((y, final), (jnp.flip(flipped, 1), flipped_final), 1e-14)


def test_an_output_depends_on_no_later_input():
    """∂y_t/∂x_s = 0 for s > t: a cotangent on y_t alone leaves the later dx exactly zero."""
    params, x, state, _ = make_case(6, 1, 2, 3)
    dx = jax.jacrev(lambda x: lstm(params, x, state)[0][0].sum(-1))(x)[:, 0]
    influence = np.any(np.asarray(dx) != 0, axis=-1)
    np.testing.assert_array_equal(influence, np.tri(6, dtype=bool))


def test_an_empty_sequence_returns_the_initial_state_and_its_cotangent():
    case = make_case(0, 2, 3, 4)
    (y, state), (_, _, dstate) = value_and_gradients(lstm, case)
    assert y.shape == (2, 0, 4)
    assert_close((state, dstate), (case.state, case.cotangents[1]), 0)


# ---- transformations --------------------------------------------------------------------------


def test_vmap_over_parameters_and_inputs_equals_a_loop():
    cases = [make_case(4, 2, 2, 3, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *cases)

    def run(params, x, state, cotangents):
        outputs, pullback = jax.vjp(lstm, params, x, state)
        return outputs, pullback(cotangents)

    batched = jax.jit(jax.vmap(run))(*stacked)
    for n, case in enumerate(cases):
        one = jax.tree.map(lambda a, n=n: a[n], batched)
        assert_close(one, value_and_gradients(lstm, case), 1e-12)
    shared = jax.jit(jax.vmap(lambda x: lstm(cases[0].params, x)[0]))(stacked.x)
    assert_close(shared[1], lstm(cases[0].params, cases[1].x)[0], 1e-12)


def test_a_second_eager_call_compiles_nothing():
    params, x, state, _ = make_case(5, 2, 3, 13)  # a width no other test has compiled
    loss = lambda params: lstm(params, x, state)[0].sum()
    calls = [lambda: lstm(params, x, state), lambda: lstm_step(params, x[:, 0], state)]
    compilations = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for call in [*calls, lambda: jax.grad(loss)(params)]:
            call()
            assert compilations  # the listener hears
            compilations.clear()
            call()
            assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_everything_exports_for_gpu_and_tpu(dtype):
    params, x, state, _ = make_case(5, 2, 3, 4, dtype=dtype)
    loss = lambda params, x, state: jnp.sum(lstm(params, x, state)[0].astype(jnp.float32))
    step = lambda params, x, state: lstm_step(params, x[:, 0], state).c.sum()
    for function in (loss, step):
        for f in (function, jax.grad(function, argnums=(0, 1, 2))):
            platforms = ("cpu", "cuda", "tpu")
            jax.export.export(jax.jit(f), platforms=platforms)(params, x, state)


@pytest.mark.slow
@pytest.mark.parametrize("residuals", ["gates", "states", 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_batch_may_be_divided_by_shard_map(residuals, dtype):
    """The parameters are the same on all devices, and so their gradient is the sum."""
    case = make_case(5, 4, 3, 2, dtype=dtype)
    lengths = jnp.array([5, 3, 0, 1], jnp.int32)
    run = partial(lstm, residuals=residuals)
    mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    divided = jax.shard_map(
        lambda params, x, lengths: run(params, x, lengths=lengths),
        mesh=mesh,
        in_specs=(P(), P("b"), P("b")),
        out_specs=P("b"),
    )
    # from zeros, which the function makes itself
    actual = value_and_gradients(lambda params, x, _: divided(params, x, lengths), case)
    expected = value_and_gradients(lambda params, x, _: run(params, x, lengths=lengths), case)
    assert_close(actual, expected, 1e-12 if dtype == jnp.float64 else 1e-5)


# ---- parameters and errors --------------------------------------------------------------------


def test_initial_weights_have_orthogonal_gates_and_an_open_forget_gate():
    params = init_lstm(jax.random.key(0), 3, 8, dtype=jnp.float64)
    for block in jnp.split(params.w_h, 4, axis=-1):
        np.testing.assert_allclose(block.T @ block, np.eye(8), atol=1e-12)
    assert 0.9 < abs(params.w_x).max() <= 1  # √(3/D)
    np.testing.assert_array_equal(params.b, np.repeat([0.0, 1.0, 0.0, 0.0], 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
def test_initial_weights_come_in_every_dtype_and_variant(dtype):
    params = init_lstm(
        jax.random.key(0),
        3,
        8,
        projection_size=2,
        peephole=True,
        recurrent_init="uniform",
        dtype=dtype,
    )
    shapes = {"w_x": (3, 32), "w_h": (2, 32), "b": (32,), "peephole": (3, 8), "projection": (8, 2)}
    assert {k: v.shape for k, v in params._asdict().items()} == shapes
    assert all(w.dtype == dtype for w in jax.tree.leaves(params))
    assert abs(params.w_h).max() <= 8**-0.5


def _bad_calls():
    params, x, state, _ = make_case(4, 2, 3, 5)
    run = lambda **change: lambda: lstm(**{"params": params, "x": x, "state": state, **change})
    short = jnp.zeros(3, jnp.int32)
    return {
        "`x` must be of shape (*B, T, D), got (3,)": run(x=x[0, 0]),
        "`params` must be a NamedTuple of weights, as its `init_…` gives, got dict": run(
            params=params._asdict()
        ),
        "`x` must be of a floating dtype, got int64": run(x=x.astype(jnp.int64)),
        "`params.w_x` must be of shape (D of `x`, 4H) = (3, 20), got (4, 20)": run(
            params=params._replace(w_x=jnp.zeros((4, 20)))
        ),
        "`params.w_h` must be of shape (H, 4H), got (5, 21)": run(
            params=params._replace(w_h=jnp.zeros((5, 21)))
        ),
        "`params.b` must be of shape (4H,) = (20,), got (5,)": run(
            params=params._replace(b=jnp.zeros(5))
        ),
        "`params.peephole` must be of shape (3, H) = (3, 5), got (5, 3)": run(
            params=params._replace(peephole=jnp.zeros((5, 3)))
        ),
        "`params.projection` must be of shape (H, R) = (5, 5), got (5, 2)": run(
            params=params._replace(projection=jnp.zeros((5, 2)))
        ),
        "`params.w_x` must be of the dtype of `x`, float32, got float64": run(
            x=x.astype(jnp.float32)
        ),
        "`state.h` must be of shape (B, H) = (2, 5), got (1, 5)": run(
            state=LSTMState(state.h[:1], state.c)
        ),
        "`state.h` must be of the dtype of `x`, float64, got float32": run(
            state=LSTMState(state.h.astype(jnp.float32), state.c)
        ),
        "`state.c` must be of dtype float64, got float32": run(
            state=LSTMState(state.h, state.c.astype(jnp.float32))
        ),
        "`lengths` must be of shape (B,) = (2,), got (3,)": run(lengths=short),
        "`lengths` must be of integers, got float64": run(lengths=jnp.zeros(2)),
        "`resets` must be of shape (B, T) = (2, 4), got (4, 2)": run(
            resets=jnp.zeros((4, 2), bool)
        ),
        "`resets` must be of dtype bool, got int32": run(resets=jnp.zeros((2, 4), jnp.int32)),
        "`clip` must be a positive number or None, got -1": run(clip=-1),
        "`residuals` must be 'gates', 'states', a number of steps of at least 1 or None, "
        "got 0": run(residuals=0),
        "`implementation` must be None, 'xla', 'native', 'pallas' or 'cudnn', got 'cuda'": run(
            implementation="cuda"
        ),
        "`implementation='cudnn'` cannot serve the dtype float64 or `clip` or `coupled` or "
        "`resets` or `reverse`": run(
            implementation="cudnn", clip=1.0, resets=jnp.zeros((2, 4), bool), reverse=True
        ),
        "`layers` must be at least one layer, got none": lambda: stacked_lstm([], x),
        "`states` must be one for each of the 1 layers, got 2": lambda: stacked_lstm(
            [params], x, [state, state]
        ),
        "`dropout_rate` must be a number in [0, 1), got 1.0": lambda: stacked_lstm(
            [params], x, dropout_rate=1.0
        ),
        "`dropout_key` must be given where `dropout_rate` is above 0, got None": lambda: (
            stacked_lstm([params], x, dropout_rate=0.1)
        ),
        "`hidden_size` must be an integer of at least 1, got 0": lambda: init_lstm(
            jax.random.key(0), 1, 0
        ),
        "`recurrent_init` must be 'orthogonal' or 'uniform', got 'glorot'": lambda: init_lstm(
            jax.random.key(0),
            1,
            1,
            recurrent_init="glorot",  # type: ignore[arg-type]
        ),
        "`dtype` must be a floating dtype, got int32": lambda: init_lstm(
            jax.random.key(0), 1, 1, dtype=jnp.int32
        ),
    }


@pytest.mark.parametrize("message", _bad_calls())
@pytest.mark.usefixtures("only_own_checks")
def test_a_bad_argument_is_an_error_that_names_it(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _bad_calls()[message]()


def test_the_layer_that_does_not_fit_is_named():
    params, x, *_ = make_case(4, 2, 3, 5)
    with pytest.raises(ValueError, match=r"`params\.w_x`") as refusal:
        stacked_lstm([params, params], x)
    assert refusal.value.__notes__ == ["In `layers[1]`."]


@pytest.mark.parametrize("name", ["lstm", "lstm_step"])
def test_the_refusal_of_forward_mode_names_the_twin(name):
    params = init_lstm(jax.random.key(0), 2, 3, dtype=jnp.float64)
    state = LSTMState(jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    x = jnp.ones((1, 2) if name == "lstm_step" else (1, 4, 2))
    in_forward_mode = lambda f: jax.jvp(lambda x: f(params, x, state), (x,), (x,))
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        in_forward_mode(getattr(rnnattn, name))
    assert f"`rnnattn.reference.{name}` has forward mode" in " ".join(caught.value.__notes__)
    in_forward_mode(getattr(reference, name))


FACE = """
    lstm lstm_step bidirectional_lstm stacked_lstm init_lstm LSTMParams LSTMState
    bidirectional stacked
    linear_scan mingru mingru_step init_mingru MinGRUParams minlstm minlstm_step init_minlstm
    MinLSTMParams rglru rglru_step init_rglru RGLRUParams
    gru gru_step init_gru GRUParams rnn rnn_step init_rnn RNNParams
    layer_norm_lstm layer_norm_lstm_step init_layer_norm_lstm LayerNormLSTMParams
    layer_norm_gru layer_norm_gru_step init_layer_norm_gru LayerNormGRUParams
    slstm slstm_step init_slstm SLSTMParams SLSTMState
    dot_product_attention KVCache update_cache
    PagedCache init_paged_cache append fork drop truncate free_pages reference_counts
    paged_attention RotatingCache update_rotating_cache rotating_attention quantise dequantise
    packed_attention packed_positions lengths_to_cu_seqlens cu_seqlens_to_lengths
    cu_seqlens_to_segment_ids segment_ids_to_cu_seqlens
    sinusoids shift_matrix rope rope_2d rope_mixed mrope xpos LinearScaling NTKScaling YaRNScaling
    Llama3Scaling DynamicNTKScaling LongRoPEScaling PRoPEScaling
    patchify unpatchify resample_grid resize_patch_kernel crop_and_pad token_mask conv_stem
    stem_strides interop reference masks
"""


def test_the_public_face_has_these_names_and_each_says_what_it_is():
    assert set(rnnattn.__all__) == set(FACE.split())
    assert rnnattn.nn and rnnattn.parallel and rnnattn.__version__
    for name in rnnattn.__all__:
        thing = getattr(rnnattn, name)
        assert thing.__doc__, name
        is_tree = issubclass(type(thing), type) and hasattr(thing, "_fields")
        if callable(thing) and not is_tree:  # a record of arrays has nothing to show
            assert ">>> " in thing.__doc__, name
