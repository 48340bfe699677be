"""The NNX modules against the functions they call, and against flax's own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import rnnattn
from rnnattn import nn, stacked
from rnnattn.nn import LSTM, LSTMCell, MultiHeadAttention, attention_fn, load_weights
from tests.lstm_cases import assert_close, make_case

OPTIONS = {"dtype": jnp.float64}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projection_size", [None, 2])
def test_the_module_is_the_stack_of_its_weights(bidirectional, projection_size):
    module = LSTM(
        3,
        5,
        num_layers=2,
        bidirectional=bidirectional,
        projection_size=projection_size,
        rngs=nnx.Rngs(0),
        **OPTIONS,
    )
    x, lengths = make_case(4, 2, 3, 5).x, jnp.array([4, 2])
    y, states = jax.jit(lambda module, x: module(x, lengths=lengths))(module, x)
    assert_close((y, states), rnnattn.stacked_lstm(module.layers, x, lengths=lengths), 1e-12)
    again, _ = module(x, states)
    assert_close(again, rnnattn.stacked_lstm(module.layers, x, states)[0], 1e-12)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_the_cell_runs_over_any_leading_axes_in_flax_rnn(batch):
    cell = LSTMCell(3, 5, rngs=nnx.Rngs(0), clip=0.5, coupled=True, **OPTIONS)
    x = jax.random.normal(jax.random.key(0), (*batch, 7, 3))
    expected, _ = rnnattn.lstm(cell.params, x, clip=0.5, coupled=True)
    np.testing.assert_allclose(nnx.RNN(cell)(x), expected, atol=1e-12)


def test_the_lstm_hands_its_options_on():
    options: dict[str, Any] = {"clip": 0.5, "coupled": True, "residuals": 3}
    options["implementation"] = "xla"
    module = LSTM(3, 5, num_layers=2, rngs=nnx.Rngs(0), **options, **OPTIONS)
    x = jax.random.normal(jax.random.key(0), (2, 7, 3))
    expected, _ = rnnattn.stacked_lstm(module.layers, x, **options)
    np.testing.assert_array_equal(module(x)[0], expected)


def test_the_cell_plugs_into_flax_rnn():
    cell = LSTMCell(3, 5, rngs=nnx.Rngs(0), peephole=True, **OPTIONS)
    x = make_case(4, 2, 3, 5).x
    expected = rnnattn.lstm(cell.params, x)
    carry, y = nnx.RNN(cell, return_carry=True)(x)
    assert_close((y, carry), expected, 1e-12)
    y_reversed = nnx.RNN(cell, reverse=True, keep_order=True)(x)
    assert_close(y_reversed, rnnattn.lstm(cell.params, x, reverse=True)[0], 1e-12)


@pytest.mark.parametrize("name", ["MinGRU", "MinLSTM", "RGLRU"])
def test_units_without_a_product_in_the_loop_are_those_of_their_weights(name):
    make, run = getattr(rnnattn.nn, name), getattr(rnnattn, name.lower())
    sizes = (4,) if name == "RGLRU" else (4, 5)
    module = make(*sizes, rngs=nnx.Rngs(0), implementation="xla", **OPTIONS)
    x = jax.random.normal(jax.random.key(0), (2, 7, 4))
    masks = {
        "lengths": jnp.array([7, 4]),
        "mask": jnp.ones((2, 7), bool).at[0, 2].set(False),
        "resets": jnp.zeros((2, 7), bool).at[1, 2].set(True),
    }
    y, h = module(x, **masks)
    assert_close((y, h), run(module.params, x, **masks), 1e-12)
    assert_close(module(x, h), run(module.params, x, h), 1e-12)
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == len(module.params)


def test_an_optimizer_moves_every_weight():
    module = LSTM(
        3, 5, num_layers=2, bidirectional=True, projection_size=2, peephole=True, rngs=nnx.Rngs(0)
    )
    before = jax.tree.leaves(nnx.state(module, nnx.Param))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    x = jnp.ones((2, 4, 3), jnp.float32)
    gradient = nnx.grad(lambda module: jnp.sum(module(x)[0] ** 2))(module)
    optimizer.update(module, gradient)
    after = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert len(before) == 2 * 2 * 5
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


def test_dropout_is_for_training_only():
    module = LSTM(3, 5, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0), **OPTIONS)
    x = make_case(4, 2, 3, 5).x
    first, second = module(x)[0], module(x)[0]
    assert not np.array_equal(first, second)
    module.eval()
    assert_close(module(x)[0], rnnattn.stacked_lstm(module.layers, x)[0], 1e-12)
    module.train()
    assert not np.array_equal(module(x)[0], module(x)[0])


def test_no_layers_is_an_error():
    with pytest.raises(ValueError, match="`num_layers` must be at least 1, got 0"):
        LSTM(3, 5, num_layers=0, rngs=nnx.Rngs(0))


# ---- attention --------------------------------------------------------------------------------

B, T, S, D, N = 2, 5, 6, 16, 4
RNG = np.random.default_rng(0)
X, CONTEXT = (jnp.asarray(RNG.normal(size=(B, length, D))) for length in (T, S))
MASK = jnp.asarray(RNG.random((B, 1, T, T)) < 0.7) | jnp.eye(T, dtype=bool)[None, None]


def attention(seed=1, **options):
    """A module in float64 with every weight drawn, biases and norms too."""
    module = MultiHeadAttention(N, D, rngs=nnx.Rngs(seed), param_dtype=jnp.float64, **options)
    draw = np.random.default_rng(seed)
    redraw = lambda w: jnp.asarray(draw.normal(size=w.shape) * 0.5)
    nnx.update(module, jax.tree.map(redraw, nnx.state(module, nnx.Param)))
    return module


class Quiet:
    """To sow into: flax then does not hand over to `jax.nn`, whose softmax is in float32."""

    def sow(self, *_):
        return True


def flax_dense(*arguments, **options):
    return nnx.dot_product_attention(*arguments, **options | {"module": Quiet()})


def flax_attention(module, attention_fn=flax_dense, **options):
    """flax's module with the weights of ours."""
    *_, M, _ = module.key.kernel.shape
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = nnx.MultiHeadAttention(
            *(N, D),
            num_kv_heads=M,
            param_dtype=jnp.float64,
            attention_fn=attention_fn,
            rngs=nnx.Rngs(0),
            **options,
        )
    nnx.update(theirs, nnx.state(module, nnx.Param))
    return theirs


def value_and_gradient(call, *arguments):
    """Of a loss that no symmetry hides anything from; flax is not written for strict promotion."""
    weights = jnp.asarray(np.random.default_rng(5).normal(size=D))

    def loss(*arguments):
        y = call(*arguments)
        return jnp.einsum("...d,d->", jnp.sin(y), weights), y

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        numbers = tuple(range(len(arguments)))
        run = jax.jit(jax.value_and_grad(loss, numbers, has_aux=True, allow_int=True))
        (_, y), gradient = run(*arguments)
    floating = lambda g: jnp.issubdtype(g.dtype, jnp.floating)
    return y, [g for g in jax.tree.leaves(gradient) if floating(g)]


def assert_same(actual, expected):
    """Some gradients are zero, that of a bias of the keys for one."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2, "qk_norm": True}])
def test_the_module_is_that_of_flax(options):
    ours = attention(**options)
    theirs = flax_attention(ours, normalize_qk="qk_norm" in options, decode=False)
    call = lambda m, x: m(x, mask=MASK)
    assert_same(value_and_gradient(call, ours, X), value_and_gradient(call, theirs, X))


def test_heads_of_a_width_of_their_own_and_no_biases():
    """(x W_q)(x W_k)ᵀ by hand; a width that `features` is no multiple of."""
    module = attention(head_width=5, num_key_value_heads=2, use_bias=False)
    assert sorted(jax.tree.leaves(jax.tree.map(jnp.shape, nnx.state(module, nnx.Param)))) == sorted(
        [D, N, 5, D, 2, 5, D, 2, 5, N, 5, D]
    )
    q, k, v = (
        jnp.einsum("btd,dnk->btnk", X, linear.kernel[...])
        for linear in (module.query, module.key, module.value)
    )
    k, v = (jnp.repeat(x, N // 2, axis=2) for x in (k, v))
    weights = jax.nn.softmax(jnp.einsum("btnk,bsnk->bnts", q, k) / np.sqrt(5), axis=-1)
    y = jnp.einsum("bnts,bsnk,nkd->btd", weights, v, module.out.kernel[...])
    assert_close(module(X), y, 1e-12)
    assert module.init_cache(B, 3).key.shape == (B, 3, 2, 5)


def test_cross_attention_lengths_and_weights():
    module = attention()
    lengths = jnp.array([4, 0])
    call = partial(module, key_value_seq_lengths=lengths)
    y, weights = call(X, CONTEXT, return_weights=True)
    assert weights.shape == (B, N, T, S)
    sums = jnp.array([1.0, 0.0])[:, None, None]  # the second row sees nothing
    assert_close(weights.sum(-1), jnp.broadcast_to(sums, (B, N, T)), 1e-12)
    mask = (jnp.arange(S)[None] < lengths[:, None])[:, None, None, :]
    assert_close(y, module(X, CONTEXT, mask=mask), 1e-12)
    out = jnp.einsum("bnts,bsnk->btnk", weights, module.value(CONTEXT))
    assert_close(y, module.out(out), 1e-12)


def test_steps_with_a_cache_are_the_causal_forward_pass():
    module = attention(num_key_value_heads=2, qk_norm=True, rope=True)
    expected = module(X, is_causal=True)
    step = jax.jit(lambda module, x, cache: module(x, is_causal=True, cache=cache))
    y, cache = step(module, X[:, :2], module.init_cache(B, 7))
    outputs = [y]
    for t in range(2, T):
        y, cache = step(module, X[:, t : t + 1], cache)
        outputs.append(y)
    assert cache.length.tolist() == [T, T]
    assert_close(jnp.concatenate(outputs, axis=1), expected, 1e-12)


def test_a_padded_prompt_goes_on_from_its_own_length():
    module = attention(rope=True)
    _, cache = module(X, is_causal=True, cache=module.init_cache(B, 8))
    cache = cache._replace(length=jnp.array([3, 5], jnp.int32))
    y, _, weights = module(CONTEXT[:, :1], is_causal=True, cache=cache, return_weights=True)
    assert (weights[0, ..., 4:] == 0).all()
    joined = jnp.concatenate([X[:1, :3], CONTEXT[:1, :1]], axis=1)
    assert_close(y[:1], module(joined, is_causal=True)[:, -1:], 1e-12)


def test_without_a_causal_mask_the_whole_cache_is_seen():
    module = attention()
    y, _ = module(X, cache=module.init_cache(B, 8))
    assert_close(y, module(X), 1e-12)


class Mixed(nnx.Module):
    """Learned rotary frequencies, as a hook with weights."""

    def __init__(self):
        self.frequencies = nnx.Param(jnp.asarray(RNG.normal(size=(2, N, 1))))

    def __call__(self, x, positions):
        half = jnp.broadcast_to(self.frequencies[...], (2, N, x.shape[-1] // 2))
        rows, columns = positions
        return rnnattn.rope_mixed(x, rows, columns, half)


def test_rope_takes_a_function_or_a_module():
    plain = attention(rope=True)
    hooked = attention(rope=partial(rnnattn.rope, base=10_000.0))
    assert_close(plain(X), hooked(X), 1e-12)
    assert_close(plain(X, positions=jnp.arange(T) + 7), plain(X), 1e-12)
    assert np.abs(plain(X) - attention()(X)).max() > 1e-3
    module = MultiHeadAttention(N, 2 * N, rope=Mixed(), rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    positions = jnp.divmod(jnp.arange(T), 2)
    loss = lambda module: jnp.sum(module(X[..., : 2 * N], positions=positions) ** 2)
    gradient = nnx.grad(loss)(module)
    assert np.abs(gradient["rope"]["frequencies"][...]).min() > 0


@pytest.mark.slow
def test_dropout_of_weights_is_for_training_only():
    module, plain = attention(dropout_rate=0.5), attention()
    run = jax.jit(lambda module, key: module(X, rngs=nnx.Rngs(dropout=key), return_weights=True))
    keys = jax.random.split(jax.random.key(0))
    (y, weights), (again, _), (other, _) = (run(module, keys[n]) for n in (0, 0, 1))
    np.testing.assert_array_equal(y, again)
    assert 0 < np.mean(weights == 0) < 1 and not np.array_equal(y, other)
    assert not np.array_equal(*(nnx.jit(lambda m: m(X))(module) for _ in range(2)))
    module.eval()
    assert_close(module(X), plain(X), 1e-12)


def test_sixteen_bits():
    module = MultiHeadAttention(N, D, dtype=jnp.bfloat16, rope=True, rngs=nnx.Rngs(0))
    x = X.astype(jnp.float32)
    y, cache = module(x, is_causal=True, cache=module.init_cache(B, 8))
    assert y.dtype == cache.key.dtype == jnp.bfloat16
    wide = MultiHeadAttention(N, D, rope=True, rngs=nnx.Rngs(0))
    assert_close(y.astype(jnp.float32), wide(x, is_causal=True), 3e-2)


ATTENTION_ERRORS = {
    "`features` must be a positive multiple of 4 heads, got 10": lambda: MultiHeadAttention(
        4, 10, rngs=nnx.Rngs(0)
    ),
    "`num_key_value_heads` must be a divisor of `num_heads` = 4, got 3": lambda: attention(
        num_key_value_heads=3
    ),
    "`head_width` must be at least 1, got 0": lambda: attention(head_width=0),
    r"`dropout_rate` must be in \[0, 1\), got 1.5": lambda: attention(dropout_rate=1.5),
    "`query_offset` must be left to the module, got 1": lambda: attention()(X, query_offset=1),
    "`context` must be None with `cache`": lambda: attention()(
        X, CONTEXT, cache=attention().init_cache(B, 8)
    ),
    "`context` must be None with `positions`": lambda: attention()(
        X, CONTEXT, positions=jnp.arange(T)
    ),
}


@pytest.mark.parametrize("message", ATTENTION_ERRORS)
def test_a_wrong_argument_is_named(message):
    with pytest.raises(ValueError, match=f"^MultiHeadAttention: {message}"):
        ATTENTION_ERRORS[message]()


def test_weights_are_checked_before_they_are_loaded():
    module, other = attention(), attention(seed=2)
    weights = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    load_weights(module, weights)
    assert_close(module(X), other(X), 0)
    wrong = weights | {
        "query": {"kernel": jnp.ones((D, D)), "bias": weights["query"]["bias"]},
        "key": {"kernel": weights["key"]["kernel"].astype(jnp.float32)},
        "extra": jnp.ones(1),
    }
    before = module(X)
    with pytest.raises(ValueError) as caught:
        load_weights(module, wrong)
    assert str(caught.value) == (
        "load_weights: `key.bias` is missing; `extra` is unknown; `key.kernel` must be of dtype "
        "float64, got float32; `query.kernel` must be of shape (16, 4, 4), got (16, 16)"
    )
    assert_close(module(X), before, 0)


# ---- in flax's own modules --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "mask", "causal", "two batch axes"])
def test_flax_nnx_with_our_attention(case):
    base = attention(num_key_value_heads=2)
    x, mask = X, MASK if case == "mask" else None
    if case == "two batch axes":
        x, mask = jnp.stack([X, 2 * X, -X]), MASK  # over the last batch axis
    call = lambda m, x: m(x, mask=mask, is_causal=case == "causal")
    results = [
        value_and_gradient(call, flax_attention(base, decode=False, **options), x)
        for options in ({"attention_fn": attention_fn}, {})
    ]
    assert_same(*results)


@pytest.mark.parametrize("causal", [False, True])
def test_flax_linen_with_our_attention(causal):
    make = partial(linen.MultiHeadDotProductAttention, N, param_dtype=jnp.float64)
    mask = linen.make_causal_mask(X[..., 0]) if causal else MASK
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights = jax.jit(make().init)(jax.random.key(0), X)
    results = [
        value_and_gradient(lambda w, x, m=module: m.apply(w, x, mask=mask), weights, X)
        for module in (make(attention_fn=attention_fn), make())
    ]
    assert_same(*results)


def test_flax_decodes_with_our_attention():
    base = attention()
    expected = base(X, is_causal=True)
    module = flax_attention(base, decode=True, attention_fn=attention_fn)
    module.init_cache(X.shape, jnp.float64)
    decoder = linen.MultiHeadDotProductAttention(
        N, param_dtype=jnp.float64, decode=True, attention_fn=attention_fn
    )
    weights = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = jax.eval_shape(decoder.init, jax.random.key(0), X)["cache"]
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
        for t in range(T):
            x = X[:, t : t + 1]
            assert_close(module(x), expected[:, t : t + 1], 1e-12)
            y, state = decoder.apply({"params": weights, "cache": state}, x, mutable=["cache"])
            state = state["cache"]
            assert_close(y, expected[:, t : t + 1], 1e-12)


def test_flax_sows_our_weights():
    base = attention()
    module = flax_attention(base, decode=False, attention_fn=attention_fn)
    _, expected = base(X, return_weights=True)
    run = nnx.capture(lambda m, x: m(x, sow_weights=True), nnx.Intermediate)
    _, sown = run(module, X)
    assert_close(jax.tree.leaves(sown), [expected], 1e-12)
    plain = linen.MultiHeadDotProductAttention(
        N, param_dtype=jnp.float64, attention_fn=attention_fn
    )
    weights = {"params": nnx.to_pure_dict(nnx.state(base, nnx.Param))}
    _, sown = plain.apply(weights, X, sow_weights=True, mutable=["intermediates"])
    assert_close(jax.tree.leaves(sown), [expected], 1e-12)


def test_dropout_in_flax():
    options = {"attention_fn": attention_fn, "decode": False, "dropout_rate": 0.5}
    base = attention()
    module = flax_attention(base, broadcast_dropout=False, **options)
    shared = flax_attention(base, **options)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert not np.array_equal(module(X, deterministic=False), module(X, deterministic=False))
        assert_close(module(X, deterministic=True), base(X), 1e-12)
        assert_close(shared(X, deterministic=True), base(X), 1e-12)
        with pytest.raises(ValueError, match="`broadcast_dropout` must be False with dropout"):
            shared(X, deterministic=False)


def test_what_flax_asks_for_and_we_do_not_have_is_an_error():
    q = jnp.ones((1, 2, 1, 4))
    unserved: dict[str, Any] = {
        "precision": jax.lax.Precision.HIGHEST,
        "qk_attn_weights_einsum": jnp.einsum,
        "attn_weights_value_einsum": jnp.einsum,
    }
    for name, value in unserved.items():
        with pytest.raises(ValueError, match=f"^attention_fn: `{name}` must be None"):
            attention_fn(q, q, q, **{name: value})
    narrow, exact = attention_fn(q, q, q, dtype=jnp.float32), attention_fn(q, q, q)
    assert narrow.dtype == jnp.float32 and exact.dtype == jnp.float64


@pytest.mark.parametrize("name", ["GRU", "RNN", "LayerNormLSTM", "LayerNormGRU", "SLSTM"])
def test_a_stack_of_any_unit_is_its_functions(name):
    module = getattr(nn, name)(3, 4, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0), **OPTIONS)
    x, lengths = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3))), jnp.array([5, 2])
    cell = module.forward[0]
    y, states = module(x, lengths=lengths)
    expected = stacked(cell.run, module.layers, x, lengths=lengths)
    jax.tree.map(np.testing.assert_array_equal, (y, states), expected)
    carry = cell.initialize_carry((2, 3))
    _, h = cell(carry, x[:, 0])
    np.testing.assert_allclose(h, cell.run(cell.params, x)[0][:, 0], atol=1e-14)
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, states[0][0])
