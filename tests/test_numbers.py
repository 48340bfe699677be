"""Numbers and arrays of every kind that people hand over: Python's, NumPy's, JAX's, and lists."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnattn
from rnnattn import KVCache, LSTMState, init_lstm, lstm, reference

KINDS: dict[str, Any] = {
    "NumPy": lambda n: np.float32(n) if isinstance(n, float) else np.int64(n),
    "0-d": lambda n: np.asarray(n),
    "JAX": lambda n: jnp.asarray(n),
}


def plain(function):
    """Without the type checker of the suite, which would be quicker."""
    return inspect.unwrap(function)


def attend(**options):
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 5, 2, 4)) for n in range(3))
    return plain(rnnattn.dot_product_attention)(q, k, v, **options)


def unroll(**options):
    params = init_lstm(jax.random.key(0), 3, 4)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3), params.b.dtype)
    return plain(lstm)(params, x, **options)


def turn(function, *sizes, **options):
    positions = [jnp.arange(5)] * len(sizes)
    return plain(function)(jnp.ones((1, 5, 2, 8)), *positions, **options)


images, table = jnp.ones((1, 4, 4, 2)), jnp.ones((5, 3))
ones = jnp.ones((1, 3, 2), jnp.float32)
key = jax.random.key(0)
# What takes a number, and a number for it: an int where it counts, else a float.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "window": (lambda n: attend(local_window_size=n), 1),
    "a side of the window": (lambda n: attend(local_window_size=(n, None)), 1),
    "a window of two": (lambda n: attend(local_window_size=[n, n]), 2),
    "soft cap": (lambda n: attend(logits_soft_cap=n), 2.5),
    "dropout": (lambda n: attend(dropout_rate=n, dropout_key=key), 0.25),
    "scale": (lambda n: attend(scale=n), 0.5),
    "offset": (lambda n: attend(query_offset=n, is_causal=True), 2),
    "causal": (lambda n: attend(is_causal=n), 1),
    "residuals": (lambda n: unroll(residuals=n), 2),
    "clip": (lambda n: unroll(clip=n), 0.5),
    "stack's dropout": (
        lambda n: plain(rnnattn.stacked_lstm)(
            [init_lstm(key, 2, 2)] * 2, ones, dropout_rate=n, dropout_key=key
        ),
        0.25,
    ),
    "base": (lambda n: turn(rnnattn.rope, 1, base=n), 500.0),
    "a whole base": (lambda n: turn(rnnattn.rope_2d, 1, 2, base=n), 500),
    "rotary width": (lambda n: turn(rnnattn.rope, 1, rotary_dim=n), 4),
    "width of sinusoids": (lambda n: plain(rnnattn.sinusoids)(jnp.arange(3), n), 4),
    "width of a shift": (lambda n: plain(rnnattn.shift_matrix)(1, n), 4),
    "patch": (lambda n: plain(rnnattn.patchify)(images, n), 2),
    "a side of a patch": (lambda n: plain(rnnattn.patchify)(images, [n, 1]), 2),
    "size": (lambda n: plain(rnnattn.crop_and_pad)(images, (n, 4)), 3),
    "prefix": (lambda n: plain(rnnattn.resample_grid)(table, (2, 2), (2, 1), prefix_tokens=n), 1),
    "patch of a kernel": (lambda n: plain(rnnattn.resize_patch_kernel)(images, n), 3),
    "strides": (lambda n: plain(rnnattn.stem_strides)((n, n), (2, 2), [(3, 3)]), 8),
}


def same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_is_a_number(option, kind):
    call, n = OPTIONS[option]
    n = bool(n) if option == "causal" else n
    number = KINDS[kind](n) if option != "causal" else np.bool(n)
    same(call(number), call(n))


TRACED = [name for name in OPTIONS if name not in ("scale", "offset", "causal")]


@pytest.mark.parametrize("option", TRACED)
def test_a_traced_value_where_a_constant_is_needed_gets_a_sentence(option):
    call, n = OPTIONS[option]
    with pytest.raises(ValueError, match=r"must be .*got a traced value"):
        jax.jit(lambda n: call(n))(n)


@pytest.mark.parametrize("bad", [True, "2", 1.5, [2, 2, 2], None])
def test_what_is_no_integer_is_refused(bad):
    with pytest.raises(ValueError, match=r"`residuals` must be|`patch_size` must be"):
        unroll(residuals=bad) if bad is not None else plain(rnnattn.patchify)(images, bad)


def test_lists_and_numpy_arrays_are_arrays():
    q = np.random.default_rng(0).normal(size=(2, 3, 1, 2)).astype(np.float32)
    lengths = [3, 1]
    expected = rnnattn.dot_product_attention(*map(jnp.asarray, (q, q, q)))
    same(plain(rnnattn.dot_product_attention)(q, q, q), expected)
    expected = unroll(lengths=jnp.array([5, 2]), resets=jnp.zeros((2, 5), bool))
    resets = np.zeros((2, 5), bool)
    same(unroll(lengths=[5, 2], resets=resets.tolist()), expected)
    x, positions = jnp.ones((1, 3, 1, 4)), np.arange(3)
    expected = rnnattn.rope(x, jnp.asarray(positions))
    same(plain(rnnattn.rope)(np.asarray(x), positions.tolist()), expected)
    out = plain(rnnattn.dot_product_attention)(q, q, q, query_seq_lengths=lengths)
    assert not out[1, 1:].any()


def test_a_cache_of_numpy():
    zeros: Any = np.zeros((1, 4, 1, 2), np.float32), np.zeros(1, np.int32)
    cache = KVCache(zeros[0], *zeros)
    token = np.ones((1, 1, 1, 2), np.float32)
    grown = plain(rnnattn.update_cache)(cache, token, token)
    expected = rnnattn.update_cache(
        KVCache(*map(jnp.asarray, cache)), *map(jnp.asarray, [token] * 2)
    )
    same(grown, expected)


# ---- axes ---------------------------------------------------------------------------------------


def bits(*shape):
    return jax.random.bernoulli(jax.random.key(3), 0.7, shape)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [rnnattn.dot_product_attention, reference.dot_product_attention])
def test_attention_over_any_leading_axes(attend):
    """As a loop over them, whatever of them an argument has."""
    A, B, T, S, N = 2, 3, 4, 5, 2
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
    q, k, v = draw(0, A, B, T, N, 3), draw(1, A, B, S, N, 3), draw(2, A, B, S, N, 3)
    lengths = jnp.arange(A * B).reshape(A, B) % S
    ids = jnp.zeros((A, B, T), int), jnp.arange(S)[None, None] // 3 * jnp.ones((A, B, 1), int)
    shapes = [
        (),
        (S,),
        (N, T, S),
        (1, 1, N, T, S),
        (A, 1, 1, T, S),
        (1, B, N, 1, S),
        (A, B, N, T, S),
    ]
    for shape in shapes:
        bias, mask = draw(4, *shape), bits(*shape)
        of_row = lambda x, i: x if x.ndim < 4 else jnp.broadcast_to(x, (A, B, *x.shape[-3:]))[i]
        options = {"query_segment_ids": ids[0], "key_value_segment_ids": ids[1]}
        options |= {"key_value_seq_lengths": lengths, "query_offset": lengths}
        run = partial(attend, is_causal=True, return_residual=True)
        out, lse = run(q, k, v, bias, mask, **options)
        assert out.shape == q.shape and lse.shape == (A, B, T, N)
        for i in ((0, 1), (1, 2)):
            row = {name: x[i] for name, x in options.items()}
            alone = run(q[i], k[i], v[i], of_row(bias, i), of_row(mask, i), **row)
            np.testing.assert_allclose(out[i], alone[0], atol=1e-12)
            np.testing.assert_allclose(lse[i], alone[1], atol=1e-12)


def test_one_row_may_say_that_it_is_one():
    """As in `jax.nn`: (T, N, K) with lengths (1,), and a mask and a bias (1, 1, T, S)."""
    q = jax.random.normal(key, (4, 2, 3))
    mask, bias, lengths = bits(1, 1, 4, 4), jnp.ones((1, 1, 4, 4)), jnp.array([3], jnp.int32)
    for options in ({"mask": mask}, {"bias": bias}, {"key_value_seq_lengths": lengths}):
        ours = rnnattn.dot_product_attention(q, q, q, **options)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            theirs = jax.nn.dot_product_attention(q, q, q, **options)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_bias_of_integers_is_a_constant():
    q, bias = jax.random.normal(key, (1, 4, 2, 3)), jnp.arange(4).reshape(1, 1, 1, 4)
    attend = lambda q, bias: rnnattn.dot_product_attention(q, q, q, bias)
    same(attend(q, bias), attend(q, bias.astype(q.dtype)))
    gradient = jax.grad(lambda *args: attend(*args).sum(), (0, 1), allow_int=True)(q, bias)
    assert gradient[1].dtype == jax.dtypes.float0


def test_heads_of_width_zero_see_the_mean():
    q, v = jnp.ones((1, 3, 1, 0)), jax.random.normal(key, (1, 3, 1, 2))
    out = rnnattn.dot_product_attention(q, q, v)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), out.shape))


LEADING = [(), (2,), (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("run", [lstm, reference.lstm])
@pytest.mark.parametrize("batch", LEADING)
@pytest.mark.parametrize("time_major", [False, True])
def test_the_lstm_over_any_leading_axes(run, batch, time_major):
    """As of one batch axis, and back; the gradient too."""
    T, rows = 4, int(np.prod(batch))
    params, first = init_lstm(key, 3, 5, dtype=jnp.float64), len(batch)
    x = jax.random.normal(key, (*batch, T, 3))
    state = LSTMState(*jax.random.normal(key, (2, *batch, 5)))
    lengths, resets = jnp.arange(rows).reshape(batch) % 5, bits(*batch, T)
    flat = lambda a, axes=1: a.reshape(rows, *a.shape[first:])
    expected, last = run(
        params,
        flat(x),
        LSTMState(*map(flat, state)),
        lengths=lengths.reshape(-1),
        resets=flat(resets),
    )
    move = lambda a: jnp.moveaxis(a, first, 0) if time_major else a
    y, final = run(
        params, move(x), state, lengths=lengths, resets=move(resets), time_major=time_major
    )
    np.testing.assert_allclose(y, move(expected.reshape(*batch, T, 5)), atol=1e-14)
    for a, b in zip(final, last, strict=True):
        np.testing.assert_allclose(a, b.reshape(*batch, 5), atol=1e-14)
    y, final = run(params, move(x), time_major=time_major)
    assert y.shape == (*move(x).shape[:-1], 5) and final.c.shape == (*batch, 5)


@pytest.mark.parametrize("step", [rnnattn.lstm_step, reference.lstm_step])
@pytest.mark.parametrize("batch", LEADING)
def test_a_step_over_any_leading_axes(step, batch):
    params = init_lstm(key, 3, 5, dtype=jnp.float64)
    x, state = jnp.ones((*batch, 3)), LSTMState(*jnp.ones((2, *batch, 5)))
    after = step(params, x, state, implementation="xla")
    one = step(params, jnp.ones((1, 3)), LSTMState(*jnp.ones((2, 1, 5))))
    for a, b in zip(after, one, strict=True):
        np.testing.assert_allclose(a, jnp.broadcast_to(b[0], (*batch, 5)), atol=1e-14)


def test_vmap_over_rows_without_a_batch_axis():
    params = init_lstm(key, 3, 5, dtype=jnp.float64)
    x = jax.random.normal(key, (2, 4, 3))
    y, _ = jax.vmap(lambda x: lstm(params, x))(x)
    np.testing.assert_allclose(y, lstm(params, x)[0], atol=1e-14)


def test_twins_take_every_option_of_their_namesakes():
    for name in ("lstm", "lstm_step", "bidirectional_lstm", "stacked_lstm", "rope", "rope_2d"):
        ours, twin = (inspect.signature(getattr(m, name)) for m in (rnnattn, reference))
        assert list(ours.parameters) == list(twin.parameters), name


def test_an_unknown_option_of_a_unit_is_named():
    gru: Any = rnnattn.gru
    params = rnnattn.init_gru(jax.random.key(0), 1, 2)
    with pytest.raises(TypeError, match=r"^gru\(\) got an unexpected keyword argument 'length'"):
        gru(params, jnp.ones((1, 2, 1), jnp.float32), length=1)


@pytest.mark.parametrize("name", ["dot_product_attention", "dot_product_attention_jvp"])
def test_an_unknown_option_is_named(name):
    q = jnp.ones((1, 2, 1, 2))
    function: Any = getattr(rnnattn.attention, name)
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'is_casual'"):
        function(q, q, q, is_casual=True)
    with pytest.raises(ValueError, match="`reverse` must be left out"):
        pair = [init_lstm(key, 2, 2)] * 2
        plain(rnnattn.bidirectional_lstm)(*pair, jnp.ones((1, 2, 2)), reverse=True)
