"""What lengths, masks, segments, positions and resets hide reaches nothing, NaN and ∞ too.

Each way to hide × what holds NaN or ∞ × every output and gradient × schedule: a problem with
poisoned numbers gives bit for bit what it gives without. The gradient of what is poisoned is zero.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import LSTMState, dot_product_attention, lstm, native, reference
from rnnattn.attention import dot_product_attention_jvp
from tests.attention_cases import Sizes, make_case, quick, small_blocks  # noqa: F401
from tests.lstm_cases import make_case as make_lstm_case

POISON = [np.nan, np.inf]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.status()[0], reason="none"))


def assert_equal(actual, expected):
    for (path, a), (_, e) in zip(*map(jax.tree.leaves_with_path, (actual, expected)), strict=True):
        np.testing.assert_array_equal(a, e, jax.tree_util.keystr(path))


# ---- attention --------------------------------------------------------------------------------

B, T, S, N, M, K, V = SIZES = Sizes(B=2, T=5, S=6)
ints = lambda *numbers: jnp.asarray(numbers, jnp.int32)


def _mask(hidden_queries, hidden_keys):
    mask = np.ones((B, 1, T, S), bool)
    mask[:, :, hidden_queries] = False
    mask[..., hidden_keys] = False
    return jnp.asarray(mask)


def _of_one_head(mask):
    """The mask for the first head of each group, all for the others: what one sees, all meet."""
    heads = [mask if n % (N // M) == 0 else jnp.ones_like(mask) for n in range(N)]
    return jnp.concatenate(heads, 1)


FUTURE = jnp.asarray(np.triu(np.ones((T, S), bool), 1)[None, None] | (np.arange(T) != 2)[:, None])

# What hides; the queries of each row that then see nothing, and the keys that no query sees.
HIDING: dict[str, tuple[dict[str, Any], list[list[int]], list[list[int]]]] = {
    "query_lengths": (
        {"query_seq_lengths": ints(2, 0)},
        [[2, 3, 4], [0, 1, 2, 3, 4]],
        [[], [0, 1, 2, 3, 4, 5]],
    ),
    "key_lengths": (
        {"key_value_seq_lengths": ints(4, 0)},
        [[], [0, 1, 2, 3, 4]],
        [[4, 5], [0, 1, 2, 3, 4, 5]],
    ),
    "mask": ({"mask": _mask([1, 3], [4])}, [[1, 3]] * 2, [[4]] * 2),
    "mask of heads": ({"mask": _of_one_head(_mask([1], [4]))}, [[]] * 2, [[]] * 2),
    "segments": (
        {
            "query_segment_ids": jnp.asarray([[0, 0, 7, 1, 1], [7, 7, 7, 7, 7]]),
            "key_value_segment_ids": jnp.asarray([[0, 0, 1, 1, 9, 9], [0, 0, 0, 0, 0, 0]]),
        },
        [[2], [0, 1, 2, 3, 4]],
        [[4, 5], [0, 1, 2, 3, 4, 5]],
    ),
    "causal": (
        {"is_causal": True, "query_offset": ints(-2, 0)},
        [[0, 1], []],
        [[3, 4, 5], [5]],
    ),
    "window": (
        {"local_window_size": (1, 0), "query_offset": ints(4, -3)},
        [[3, 4], [0, 1, 2]],
        [[0, 1, 2], [2, 3, 4, 5]],
    ),
    "mask and causal": ({"mask": FUTURE, "is_causal": True}, [[2]] * 2, [[5]] * 2),
    "lengths and causal": (
        {"query_seq_lengths": ints(3, 5), "key_value_seq_lengths": ints(6, 2), "is_causal": True},
        [[3, 4], []],
        [[3, 4, 5], [2, 3, 4, 5]],
    ),
}

RULES: dict[str, Any] = {
    "dense": partial(dot_product_attention, implementation="dense"),
    "blockwise": partial(dot_product_attention, implementation="blockwise"),
    "native": partial(dot_product_attention, implementation="native"),
    "tangents": partial(dot_product_attention_jvp, implementation="blockwise"),
    "twin": reference.dot_product_attention,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hiding", "sinks"),
    [(name, False) for name in HIDING]
    + [(name, True) for name in ("query_lengths", "mask", "segments")],
)
@pytest.mark.parametrize("rule", ["dense", "blockwise", NATIVE, "tangents", "twin"])
def test_attention(hiding, sinks, rule, small_blocks):  # noqa: F811
    options, queries, keys = HIDING[hiding]
    case = make_case(SIZES, bias=(1, N, T, S), scale=(N,), sinks=sinks, dtype=jnp.float32)
    others = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    options = {name: x for name, x in options.items() if name not in others}
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    given = {**case.floats, "do": draw(B, T, N, V), "dlse": draw(B, T, N)}

    @quick
    def run(given, others):
        floats = {name: x for name, x in given.items() if name not in ("do", "dlse")}
        call = lambda floats: RULES[rule](**floats, **others, **options, return_residual=True)
        results, pullback = jax.vjp(call, floats)
        return results, pullback((given["do"], given["dlse"]))[0]

    expected = run(given, others)
    rows = {"query": queries, "do": queries, "dlse": queries, "key": keys, "value": keys}
    if sinks:  # L of a query that sees nothing is its sink, and what comes back to L is the sink's
        del rows["dlse"]
    if sinks and rule == "tangents" and {"mask", "query_segment_ids"} & others.keys():
        del rows[
            "do"
        ]  # reaches the sinks where the gradient is the transpose of a rule for tangents
    for name, hidden in rows.items():
        for number in POISON:
            poisoned = np.array(given[name])
            for b, at in enumerate(hidden):
                poisoned[b, at] = number
            actual = run({**given, name: jnp.asarray(poisoned)}, others)
            assert_equal(actual, expected)
            if name in actual[1]:
                for b, at in enumerate(hidden):
                    assert not np.any(actual[1][name][b, np.asarray(at, int)])


# ---- the LSTM ---------------------------------------------------------------------------------

STEPS, ROWS = 6, 3
RESETS = np.zeros((ROWS, STEPS), bool)
RESETS[0, 3] = RESETS[1, 2] = RESETS[1, 4] = RESETS[2, 0] = True
# the steps of each row whose outputs the loss reads, with these resets
READ = np.array([[0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)
LENGTHS = np.array([6, 0, 4])


@pytest.mark.slow
@pytest.mark.parametrize("residuals", ["states", "gates", 2])
@pytest.mark.parametrize("implementation", ["xla", NATIVE])
@pytest.mark.parametrize("hiding", ["lengths", "resets", "both"])
@pytest.mark.parametrize("reverse", [False, True])
def test_lstm(hiding, implementation, residuals, reverse):
    """NaN in what no step that counts reads, nor any on which an output depends that is read."""
    by_resets, by_lengths = hiding != "lengths", hiding != "resets"
    case = make_lstm_case(STEPS, ROWS, 3, 4, dtype=jnp.float32)
    options: dict[str, Any] = {"reverse": reverse}
    if by_lengths:
        options["lengths"] = jnp.asarray(LENGTHS)
    if by_resets:
        options["resets"] = jnp.asarray(RESETS)
    counts = np.arange(STEPS) < (LENGTHS if by_lengths else np.full(ROWS, STEPS))[:, None]
    read = READ & counts if by_resets else counts
    episode = np.cumsum(RESETS & counts, 1) if by_resets else np.zeros((ROWS, STEPS), int)
    # a step can be heard of only in its own episode, by those that run after it
    heard = np.array(
        [
            [
                any(
                    read[b, s] and episode[b, s] == episode[b, t]
                    for s in (range(t + 1) if reverse else range(t, STEPS))
                )
                and counts[b, t]
                for t in range(STEPS)
            ]
            for b in range(ROWS)
        ]
    )
    dy = jnp.where(read[..., None], case.cotangents[0], 0)
    if by_resets:  # of the final state, only that of the last row is read
        dstate = jax.tree.map(lambda d: d.at[:2].set(0), case.cotangents[1])
        last = 0 if reverse else (LENGTHS[2] if by_lengths else STEPS) - 1
        for t in range(STEPS):
            heard[2, t] |= counts[2, t] and episode[2, t] == episode[2, last]
    else:
        dstate = case.cotangents[1]

    @jax.jit
    def run(params, x, state, dy, dstate):
        call = partial(lstm, implementation=implementation, residuals=residuals, **options)
        outputs, pullback = jax.vjp(call, params, x, state)
        return outputs, pullback((dy, dstate))

    (y, last_state), gradient = run(case.params, case.x, case.state, dy, dstate)
    assert np.isfinite(np.asarray(y)).all() and heard.any() and not heard.all()
    starts = heard & (episode == (episode.max(1)[:, None] if reverse else 0))
    starting = starts.any(1) & ~(RESETS[:, 0] & by_resets & (not reverse))
    for number in POISON:
        x = jnp.where(heard[..., None], case.x, number)
        (poisoned, state), actual = run(case.params, x, case.state, dy, dstate)
        assert_equal(actual, gradient)
        assert_equal(poisoned[read], y[read])
        assert not np.any(np.asarray(actual[1])[~heard])
        first = 2 if by_resets else 0  # of the rows whose state is read
        assert_equal([s[first:] for s in state], [s[first:] for s in last_state])
        # what comes back to a step past the length
        past = jnp.where(counts[..., None], dy, number)
        assert_equal(run(case.params, case.x, case.state, past, dstate)[1], gradient)
    if hiding == "lengths":  # the state of a row without steps is passed on, and read by none
        state = LSTMState(*(s.at[1].set(np.nan) for s in case.state))
        assert_equal(run(case.params, case.x, state, dy, dstate)[1][:2], gradient[:2])
    else:
        state = LSTMState(*(jnp.where(starting[:, None], s, np.nan) for s in case.state))
        assert_equal(run(case.params, case.x, state, dy, dstate)[1][:2], gradient[:2])


def test_a_step_that_nothing_comes_back_to_still_has_a_second_derivative():
    """Zero times a derivative is zero; the derivative of the product with the zero is not."""
    case = make_lstm_case(STEPS, ROWS, 3, 4)
    share = jnp.zeros((ROWS, STEPS, 1)).at[:, 3:].set(1.0)

    def gradient(function, share):
        resets = jnp.asarray(RESETS)
        loss = lambda x: jnp.sum(share * function(case.params, x, resets=resets)[0])
        return jnp.sum(jax.grad(loss)(case.x) ** 2 + jax.grad(loss)(case.x))

    actual, expected = (
        jax.jit(jax.grad(partial(gradient, function)))(share) for function in (lstm, reference.lstm)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
    assert np.any(np.asarray(expected)[:, :2])


@pytest.mark.parametrize("rule", ["dense", "blockwise"])
def test_values_of_zero_still_have_a_second_derivative(rule):
    case = make_case(Sizes(B=1, T=3, S=4), is_causal=True, sinks=True)
    floats = {**case.floats, "value": jnp.zeros_like(case.floats["value"])}

    def hessian(function):
        loss = lambda floats: jnp.sum(jnp.sin(function(**floats, **case.options)))
        gradient = lambda floats: sum(
            jnp.sum(jnp.cos(d + 1)) for d in jax.tree.leaves(jax.grad(loss)(floats))
        )
        return quick(jax.grad(gradient))(floats)

    actual, expected = hessian(RULES[rule]), hessian(reference.dot_product_attention)
    for name, e in expected.items():
        np.testing.assert_allclose(actual[name], e, rtol=1e-9, atol=1e-12, err_msg=name)
