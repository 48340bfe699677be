"""Caches for decoding: pages, places in a ring, 8 bits.

What attention makes of them is held against the reference on all tokens in a row; what decoding
makes of them against the full forward of a small model; and who has which page against a model in
plain Python, over random orders of calls.
"""

import inspect
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rnnattn import (
    RotatingCache,
    append,
    dequantise,
    drop,
    fork,
    free_pages,
    init_paged_cache,
    masks,
    paged_attention,
    quantise,
    reference,
    reference_counts,
    rotating_attention,
    truncate,
    update_rotating_cache,
)
from rnnattn.attention import native_parts
from rnnattn.native import calls, load
from tests.attention_cases import assert_same, quick

B, N, M, K, V = 3, 4, 2, 3, 5
LENGTHS = jnp.array([7, 0, 4])
EMPTY: Any = partial(init_paged_cache, num_heads=M, key_size=K, value_size=V)


def draw(*shape, seed=0, dtype: Any = jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def without_token(cache, lengths):
    """Where no token is, (P, page_size)."""
    P, page_size = cache.key.shape[:2]
    empty = np.ones((P, page_size), bool)
    for row, length in zip(np.asarray(cache.table), lengths, strict=True):
        for t in range(length):
            empty[row[t // page_size], t % page_size] = False
    return empty


def problem(T, lengths, page_size, *, seed=0, dtype: Any = jnp.float64, sizes=(N, M, K, V)):
    """Tokens of each row, the last T of them as queries too; and a cache of pages out of order."""
    n, m, k, v = sizes
    S, rows = max(lengths), len(lengths)
    floats = {
        "query": draw(rows, T, n, k, seed=seed, dtype=dtype),
        "key": draw(rows, S, m, k, seed=seed + 1, dtype=dtype),
        "value": draw(rows, S, m, v, seed=seed + 2, dtype=dtype),
    }
    of_row = -(-S // page_size) + 1
    empty = init_paged_cache(
        rows,
        pages=rows * of_row,
        page_size=page_size,
        pages_per_row=of_row,
        num_heads=m,
        key_size=k,
        value_size=v,
        dtype=dtype,
    )
    order = np.random.default_rng(seed).permutation(rows * of_row).reshape(rows, of_row)
    return floats, empty._replace(table=jnp.asarray(order, jnp.int32))


def filled(cache, key, value, lengths):
    """The cache with these tokens, by plain indexing.

    NaN where no token is, and pages that there are not where the table means nothing.
    """
    page_size, rows_of = cache.key.shape[1], np.asarray(lengths)[:, None]
    rows, at = np.nonzero(np.arange(key.shape[1])[None] < rows_of)
    page = np.asarray(cache.table)[rows, at // page_size]
    empty = without_token(cache, lengths)[:, :, None, None]
    put = lambda pages, x: (
        jnp.where(empty, jnp.nan, pages).at[page, at % page_size].set(x[rows, at])
    )
    beyond = np.arange(cache.table.shape[1])[None] * page_size >= rows_of
    return cache._replace(
        key=put(cache.key, key),
        value=put(cache.value, value),
        table=jnp.where(beyond, 10**6, cache.table),
        lengths=jnp.asarray(lengths, jnp.int32),
    )


# ---- attention --------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"local_window_size": (2, 0)},
    "sees all, capped, sinks, scales": {
        "is_causal": False,
        "logits_soft_cap": 2.0,
        "sinks": draw(N, seed=7),
        "scale": jnp.abs(draw(N, seed=8)),
    },
    "at another place": {"query_offset": jnp.array([1, 0, 2])},
    "functions": {
        "mask_function": (masks.window(4) | masks.sinks(1))
        & (lambda b, n, t, s: (s + t + n + b) % 4 > 0),
        "slopes": draw(N, seed=9),
    },
    "a prefix and distances": {
        "is_causal": False,
        "mask_function": (masks.causal() | masks.prefix(jnp.array([3, 0, 2], jnp.int32)))
        & (masks.window(3, 3) | masks.sinks(1)),
        "score_function": masks.alibi(masks.alibi_slopes(N)),
    },
    "a function and distances": {
        "is_causal": False,
        "mask_function": lambda b, n, t, s: (s + t + n + b) % 4 > 0,
        "score_function": masks.alibi(masks.alibi_slopes(N)),
    },
}


def with_score(options):
    """`slopes` are closed over by a score function."""
    if "slopes" not in options:
        return options
    options, slopes = dict(options), options["slopes"]
    del options["slopes"]

    def score(logit, b, n, t, s):
        return jnp.tanh(slopes[n] * logit) + (t - s + b).astype(logit.dtype) / 8

    return {**options, "score_function": score}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("T, page_size", [(1, 1), (4, 2)])
def test_attention_and_its_gradients_are_those_of_all_tokens_in_a_row(name, T, page_size):
    lengths = LENGTHS.tolist()
    floats, empty = problem(T, lengths, page_size)
    options = {k: x for k, x in OPTIONS[name].items() if not isinstance(x, jax.Array)}
    arrays = {k: x for k, x in OPTIONS[name].items() if isinstance(x, jax.Array)}
    offset = arrays.pop("query_offset", None)
    counts = jnp.array([T, 0, min(T, 3)])
    directions = draw(B, T, N, V, seed=3), draw(B, T, N, seed=4)

    def ours(floats):
        others = {n: x for n, x in floats.items() if n not in ("query", "key", "value")}
        cache = filled(empty, floats["key"], floats["value"], lengths)
        return paged_attention(
            floats["query"],
            cache,
            query_seq_lengths=counts,
            query_offset=offset,
            return_residual=True,
            implementation="xla",
            **with_score(others),
            **options,
        )

    def expected(floats):
        return reference.dot_product_attention(
            **with_score(floats),
            **{"is_causal": True, **options},
            query_seq_lengths=counts,
            key_value_seq_lengths=LENGTHS,
            query_offset=LENGTHS - counts if offset is None else offset,
            return_residual=True,
        )

    def run(function):
        def of(floats):
            results, back = jax.vjp(function, floats)
            return results, back(directions)

        return quick(of)({**floats, **arrays})

    assert_same(run(ours), run(expected))


def test_forward_mode_and_second_order_are_jaxs_own():
    floats, empty = problem(2, [3, 1, 5], 2)
    counts = jnp.array([2, 1, 2])

    def loss(paged, query, key, value):
        if paged:
            cache = filled(empty, key, value, [3, 1, 5])
            out = paged_attention(query, cache, query_seq_lengths=counts)
        else:
            lengths = jnp.array([3, 1, 5])
            out = reference.dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                query_seq_lengths=counts,
                key_value_seq_lengths=lengths,
                query_offset=lengths - counts,
            )
        return jnp.sum(jnp.sin(out))

    primals, tangents = tuple(floats.values()), tuple(draw(*x.shape) for x in floats.values())

    def hessian_vector(paged):
        gradient = jax.grad(partial(loss, paged), (0, 1, 2))
        return quick(lambda *xs: jax.jvp(gradient, xs, tangents))(*primals)

    assert_same(hessian_vector(True), hessian_vector(False))


SETS = list(load.found()[1])
OF_KERNELS = [name for name in OPTIONS if name not in ("functions", "at another place")]


@pytest.mark.skipif(not SETS, reason="no kernels")
@pytest.mark.parametrize("name", OF_KERNELS)
@pytest.mark.parametrize("T, dtype", [(1, "float32"), (3, "bfloat16"), (20, "float32")])
def test_kernels_read_through_the_page_table(name, T, dtype, monkeypatch):
    """More queries than are streamed, in blocks, and windows that begin within a page."""
    monkeypatch.setattr(native_parts, "FORWARD_BLOCK", 8)
    lengths = [150, 1, 64]
    floats, empty = problem(T, lengths, 64, dtype=dtype, sizes=(N, M, 20, 5))
    cache = filled(empty, floats["key"], floats["value"], lengths)
    counts = jnp.minimum(T, cache.lengths)
    options = {**OPTIONS[name], "query_seq_lengths": counts, "return_residual": True}
    if "local_window_size" in options:
        options["local_window_size"] = (70, 0)
    options = {
        n: x.astype(jnp.float32) if n in ("sinks", "scale") else x for n, x in options.items()
    }
    run = lambda **how: quick(lambda q: paged_attention(q, cache, **options, **how))(
        floats["query"]
    )
    wide = {n: x.astype(jnp.float64) for n, x in floats.items()}
    del options["query_seq_lengths"]
    expected = reference.dot_product_attention(
        **wide,
        **{"is_causal": True, **options},
        query_seq_lengths=counts,
        key_value_seq_lengths=cache.lengths,
        query_offset=cache.lengths - counts,
    )
    options["query_seq_lengths"] = counts
    assert_same(run(implementation="native"), expected, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.skipif(not SETS, reason="no kernels")
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set_reads_through_the_page_table(instruction_set, monkeypatch):
    monkeypatch.setattr(calls, "instruction_set", instruction_set)
    lengths = [150, 1, 64]
    for T, dtype in ((3, "bfloat16"), (20, "float32")):
        floats, empty = problem(T, lengths, 64, dtype=dtype, sizes=(N, M, 20, 5))
        cache = filled(empty, floats["key"], floats["value"], lengths)
        attend = lambda implementation, cache=cache, query=floats["query"]: quick(
            lambda q: paged_attention(
                q, cache, local_window_size=(70, 0), implementation=implementation
            )
        )(query)
        assert_same(attend("native"), attend("xla"), 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.skipif(not SETS, reason="no kernels")
def test_wrong_pages_are_errors_of_the_call():
    """Which `paged_attention` never hands over: it would read where nothing is."""
    f32, ints = np.float32, partial(np.array, dtype=np.int32)
    none, absent = np.zeros(0, f32), np.zeros(0, np.int32)
    shapes = (2, 1, 1, 4), (2, 1, 1, 1)
    results = [jax.ShapeDtypeStruct(shape, f32) for shape in shapes]

    def call(pages=((2, 0), (1, 2)), page_size=64):
        key = np.ones((3, page_size, 1, 4), f32)
        scale, mask = np.ones((1,) * 5, f32), np.zeros(0, np.bool_)
        return jax.ffi.ffi_call("rnnattn.attention_paged_forward.v5", results)(
            *(np.ones((2, 1, 1, 4), f32), key, key, scale, none, mask, ints([0])),
            *([absent] * 5),
            *(none, none, ints(pages)),
            is_causal=False,
            left=np.int64(-1),
            right=np.int64(-1),
            soft_cap=f32(0),
            **calls.call_attributes(),
        )

    np.testing.assert_allclose(call()[0], np.ones((2, 1, 1, 4)))
    for wrong, message in (
        ({"pages": ((2, 0), (1, 3))}, "pages: a page that there is not"),
        ({"pages": ((-1, 0), (1, 2))}, "pages: a page that there is not"),
        ({"pages": (2, 0)}, "pages: another rank than 2"),
        ({"page_size": 96}, "key: pages of an odd size"),
        ({"page_size": 0}, "key: pages of an odd size"),
    ):
        with pytest.raises(Exception, match=f"rnnattn: {message}"):
            jax.block_until_ready(call(**wrong))


def test_attention_is_mapped_over_an_axis_and_exported():
    floats, empty = problem(1, [3, 2, 1], 64, dtype=jnp.float32)
    cache = filled(empty, floats["key"], floats["value"], [3, 2, 1])
    queries = jnp.stack([floats["query"], 2 * floats["query"]])
    mapped = quick(jax.vmap(lambda q: paged_attention(q, cache)))(queries)
    assert_same(mapped, jnp.stack([quick(paged_attention)(q, cache) for q in queries]), 1e-6)

    def step(cache, query, key, value):
        cache = fork(append(cache, key, value), jnp.array([0, 0, 1]))
        cache = truncate(drop(cache, cache.overflowed), cache.lengths - 1)
        loss = lambda query: jnp.sum(paged_attention(query, cache))
        return cache, jax.grad(loss)(query), free_pages(cache)

    token = floats["key"][:, :1], floats["value"][:, :1]
    jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(
        cache, floats["query"], *token
    )


# ---- who has which page -----------------------------------------------------------------------

P, SIZE, PLACES, T = 7, 2, 4, 3
ROWS = range(B)


class Model:
    """Rows of pages, which are lists of tokens; rows that share a page have the same list."""

    def __init__(self):
        self.rows: list[list[list[int]]] = [[] for _ in ROWS]
        self.lengths, self.lost = [0] * B, [False] * B

    def pages(self):
        return {id(page): page for row in self.rows for page in row}

    def append(self, tokens, counts):
        free, short = P - len(self.pages()), False
        for b in ROWS:
            row, length, count = self.rows[b], self.lengths[b], counts[b]
            if not count:
                continue
            owners = sum(any(p is row[-1] for p in r) for r in self.rows) if row else 0
            copies = length % SIZE != 0 and owners > 1
            needed = -(-(length + count) // SIZE) - len(row) + copies
            if length + count > SIZE * PLACES:
                self.lost[b] = True
                continue
            if needed and (short or needed > free):
                short = self.lost[b] = True
                continue
            free -= needed
            if copies:
                row[-1] = list(row[-1])
            for t in range(length, length + count):
                if t % SIZE == 0:
                    row.append([0] * SIZE)
                row[-1][t % SIZE] = tokens[b][t - length]
            self.lengths[b] = length + count

    def fork(self, sources):
        self.rows = [list(self.rows[s]) for s in sources]
        self.lengths = [self.lengths[s] for s in sources]
        self.lost = [self.lost[s] for s in sources]

    def truncate(self, lengths):
        self.lengths = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]
        self.rows = [r[: -(-n // SIZE)] for r, n in zip(self.rows, self.lengths, strict=True)]

    def drop(self, rows):
        self.truncate([0 if gone else SIZE * PLACES for gone in rows])
        self.lost = [a and not b for a, b in zip(self.lost, rows, strict=True)]

    def tokens(self):
        return [[x for p in r for x in p][:n] for r, n in zip(self.rows, self.lengths, strict=True)]


of_rows = lambda each: st.tuples(*[each] * B)
CALLS = st.one_of(
    st.tuples(st.just("append"), of_rows(st.integers(0, T))),
    st.tuples(st.just("append"), of_rows(st.integers(0, T))),
    st.tuples(st.just("fork"), of_rows(st.integers(0, B - 1))),
    st.tuples(st.just("truncate"), of_rows(st.integers(0, SIZE * PLACES))),
    st.tuples(st.just("drop"), of_rows(st.booleans())),
)
RUN = {f.__name__: quick(inspect.unwrap(f)) for f in (append, fork, truncate, drop)}
COUNTS = quick(inspect.unwrap(reference_counts))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(CALLS, max_size=14))
def test_no_order_of_calls_loses_a_token_or_leaves_a_page_behind(calls):
    cache = init_paged_cache(
        B, pages=P, page_size=SIZE, pages_per_row=PLACES, num_heads=1, key_size=1, dtype=jnp.float64
    )
    model, numbers = Model(), itertools.count(1)
    for name, argument in calls:
        if name == "append":
            tokens = np.array([[next(numbers) for _ in range(T)] for _ in ROWS])
            x = jnp.asarray(tokens, jnp.float64)[:, :, None, None]
            cache = RUN["append"](cache, x, -x, jnp.array(argument))
            model.append(tokens.tolist(), argument)
        else:
            cache = RUN[name](cache, jnp.array(argument))
            getattr(model, name)(argument)
        assert cache.lengths.tolist() == model.lengths
        assert cache.overflowed.tolist() == model.lost
        table, key, value = (np.asarray(x) for x in (cache.table, cache.key, cache.value))
        for b, expected in enumerate(model.tokens()):
            held = key[table[b]].ravel()[: len(expected)].tolist()
            assert held == expected
            assert (-value[table[b]].ravel()[: len(expected)]).tolist() == expected
        counts = COUNTS(cache).tolist()
        assert sum(n > 0 for n in counts) == len(model.pages())
        assert sum(counts) == sum(map(len, model.rows))


def test_what_is_appended_has_a_gradient_also_where_a_page_is_copied():
    def last(key):
        cache = init_paged_cache(
            2, pages=3, page_size=2, pages_per_row=2, num_heads=1, key_size=1, dtype=jnp.float64
        )
        cache = append(cache, key[:, :1], key[:, :1], jnp.array([1, 0]))
        cache = append(fork(cache, jnp.array([0, 0])), key[:, 1:], key[:, 1:])
        return cache.key[cache.table].reshape(2, 4)[:, :2]

    key = draw(2, 2, 1, 1)
    jacobian = jax.jacrev(last)(key)[..., 0, 0]
    expected = np.zeros((2, 2, 2, 2))
    expected[:, 0, 0, 0] = expected[0, 1, 0, 1] = expected[1, 1, 1, 1] = 1
    np.testing.assert_array_equal(jacobian, expected)


# ---- decoding ---------------------------------------------------------------------------------

WORDS, LONGEST = 5, 12


class Net:
    """One layer of attention over words; `logits` is its full forward."""

    def __init__(self, seed=0):
        self.words, self.places = draw(WORDS, N * K, seed=seed), draw(LONGEST, N * K, seed=seed + 1)
        self.q, self.k = draw(N * K, N * K, seed=seed + 2), draw(N * K, M * K, seed=seed + 3)
        self.v, self.out = draw(N * K, M * V, seed=seed + 4), draw(N * V, WORDS, seed=seed + 5)

    def project(self, tokens, at):
        """q, k and v of tokens (B, T) at their positions."""
        x = self.words[tokens] + self.places[jnp.clip(at, 0, LONGEST - 1)]
        heads = lambda y, n: y.reshape(*tokens.shape, n, -1)
        return heads(x @ self.q, N), heads(x @ self.k, M), heads(x @ self.v, M)

    def read(self, attended):
        return 3 * attended.reshape(*attended.shape[:2], -1) @ self.out

    def logits(self, tokens, window=None):
        """(…, T, words) of tokens (…, T), by the reference."""
        at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        attend = partial(reference.dot_product_attention, local_window_size=window)
        return self.read(attend(*self.project(tokens, at), is_causal=True))


NET = Net()
PROMPTS, PROMPT_LENGTHS = jnp.array([[1, 2, 3, 0], [4, 0, 0, 0], [2, 2, 0, 0]]), [4, 1, 2]
NEW = 5


def by_full_forward(window=None):
    """What greedy decoding adds to each prompt, one whole forward for each token."""
    full = quick(lambda tokens: NET.logits(tokens, window))
    sequences = [PROMPTS[b, :n].tolist() for b, n in enumerate(PROMPT_LENGTHS)]
    for _ in range(NEW):
        padded = np.array([s + [0] * (LONGEST - len(s)) for s in sequences])
        logits = full(jnp.asarray(padded))
        for b, s in enumerate(sequences):
            s.append(int(jnp.argmax(logits[b, len(s) - 1])))
    return [s[n:] for s, n in zip(sequences, PROMPT_LENGTHS, strict=True)]


def after_prompts():
    """The cache with the prompts, but for the last word of each, which is the first to be read."""
    counts = jnp.array(PROMPT_LENGTHS) - 1
    _, k, v = NET.project(PROMPTS, jnp.arange(PROMPTS.shape[1], dtype=jnp.int32)[None])
    return counts, k, v, PROMPTS[jnp.arange(B), counts]


def test_greedy_decoding_is_that_of_the_full_forward():
    counts, k, v, token = after_prompts()

    def step(carry, _):
        cache, token = carry
        q, k, v = NET.project(token[:, None], cache.lengths[:, None])
        cache = append(cache, k, v)
        token = jnp.argmax(NET.read(paged_attention(q, cache))[:, 0], -1).astype(token.dtype)
        return (cache, token), token

    def decode():
        cache = EMPTY(B, pages=14, page_size=2, pages_per_row=6, dtype=jnp.float64)
        cache = append(cache, k, v, counts)
        return jax.lax.scan(step, (cache, token), length=NEW)

    (cache, _), tokens = quick(decode)()
    assert tokens.T.tolist() == by_full_forward()
    assert not cache.overflowed.any()


def test_decoding_within_a_window_needs_no_more_places_than_it():
    window = 2
    counts, k, v, token = after_prompts()
    places = window + 1

    def step(carry, _):
        cache, token = carry
        q, k, v = NET.project(token[:, None], cache.length[:, None])
        cache = update_rotating_cache(cache, k, v)
        out = rotating_attention(q, cache, window=window)
        token = jnp.argmax(NET.read(out)[:, 0], -1).astype(token.dtype)
        return (cache, token), token

    def decode():
        nan = partial(jnp.full, fill_value=jnp.nan)
        cache = RotatingCache(nan((B, places, M, K)), nan((B, places, M, V)), jnp.zeros(B, int))
        cache = update_rotating_cache(cache, k, v, counts)
        return jax.lax.scan(step, (cache, token), length=NEW)[1]

    assert quick(decode)().T.tolist() == by_full_forward((window, 0))


def test_beam_search_by_forks_finds_what_brute_force_does():
    """With a beam of 25 for three words, of which the first is given: of all 25 ways to go on."""
    beam, length = WORDS**2, 4

    def step(carry, _):
        cache, token, total = carry
        q, k, v = NET.project(token[:, None], cache.lengths[:, None])
        cache = append(cache, k, v)
        logits = jax.nn.log_softmax(NET.read(paged_attention(q, cache))[:, 0])
        total, best = jax.lax.top_k((total[:, None] + logits).ravel(), beam)
        rows, token = best // WORDS, (best % WORDS).astype(token.dtype)
        return (fork(cache, rows), token, total), (rows, token, free_pages(cache))

    def search():
        cache = EMPTY(beam, pages=60, page_size=2, pages_per_row=2, dtype=jnp.float64)
        total = jnp.full(beam, -jnp.inf).at[0].set(0)
        return jax.lax.scan(step, (cache, jnp.full(beam, 1), total), length=length - 1)

    (cache, _, total), (rows, tokens, _) = quick(search)()
    found: list[int] = []
    row = 0
    for source, words in reversed(list(zip(rows, tokens, strict=True))):
        found, row = [int(words[row]), *found], int(source[row])

    every = np.array([(1, *rest) for rest in itertools.product(range(WORDS), repeat=length - 1)])
    logits = jax.nn.log_softmax(quick(NET.logits)(jnp.asarray(every[:, :-1])))
    scores = np.take_along_axis(np.asarray(logits), every[:, 1:, None], 2).sum((1, 2))
    assert found == every[scores.argmax()][1:].tolist()
    np.testing.assert_allclose(total[0], scores.max(), rtol=1e-12)
    assert not cache.overflowed.any()
    assert int(free_pages(drop(cache, jnp.ones(beam, bool)))) == 60


def test_speculative_decoding_takes_back_what_is_not_accepted():
    drafted = 3
    counts, k, v, token = after_prompts()
    cache = EMPTY(B, pages=18, page_size=2, pages_per_row=7, dtype=jnp.float64)
    cache = append(cache, k, v, counts)

    @quick
    def verify(cache, tokens):
        """Each draft's successor, in one pass over all of them."""
        at = cache.lengths[:, None] + jnp.arange(drafted + 1, dtype=jnp.int32)[None]
        q, k, v = NET.project(tokens, at)
        grown = append(cache, k, v)
        following = jnp.argmax(NET.read(paged_attention(q, grown)), -1)
        right = jnp.cumprod((following[:, :-1] == tokens[:, 1:]).astype(jnp.int32), 1)
        accepted = jnp.sum(right, 1, dtype=jnp.int32)
        return truncate(grown, cache.lengths + 1 + accepted), following, accepted

    expected, rng = by_full_forward(), np.random.default_rng(0)
    found: list[list[int]] = [[] for _ in range(B)]
    some, none = False, False
    while min(map(len, found)) < NEW:
        # a draft that is often right: what comes next, but for some words
        drafts = np.zeros((B, drafted), int)
        for b in range(B):
            true = expected[b][len(found[b]) :][:drafted]
            drafts[b, : len(true)] = true
        drafts = np.where(rng.random(drafts.shape) < 0.4, (drafts + 1) % WORDS, drafts)
        tokens = jnp.concatenate([token[:, None], jnp.asarray(drafts)], 1)
        cache, following, accepted = verify(cache, tokens)
        some, none = some or bool(accepted.any()), none or not bool(accepted.all())
        for b in range(B):
            n = int(accepted[b])
            found[b] += [*drafts[b, :n].tolist(), int(following[b, n])]
        token = following[jnp.arange(B), accepted]
        assert cache.lengths.tolist() == [c + len(f) for c, f in zip(counts, found, strict=True)]
        assert len(set(cache.table.ravel().tolist())) <= 18
        if max(map(len, found)) + drafted + 4 > LONGEST:
            break
    assert some and none and not cache.overflowed.any()
    assert [f[:NEW] for f in found] == [e[: len(f)] for e, f in zip(expected, found, strict=True)]


# ---- places in a ring -------------------------------------------------------------------------


@pytest.mark.parametrize("T, window", [(1, 0), (1, 3), (2, 2)])
def test_a_rotating_cache_is_a_window_over_all_tokens(T, window):
    places, steps = 4, 4
    counts = jnp.array([[T, 0, T], [T, 1, T], [0, T, T], [T, 1, T]], jnp.int32)
    tokens = {"query": (N, K), "key": (M, K), "value": (M, V)}
    floats = {n: draw(steps, B, T, *shape, seed=i) for i, (n, shape) in enumerate(tokens.items())}
    floats["sinks"] = draw(N, seed=9)

    def ours(floats):
        def step(cache, x):
            query, key, value, counts = x
            cache = update_rotating_cache(cache, key, value, counts)
            out = rotating_attention(
                query,
                cache,
                window=window,
                query_seq_lengths=counts,
                sinks=floats["sinks"],
                implementation="xla",
            )
            return cache, out

        nan = partial(jnp.full, fill_value=jnp.nan)
        cache = RotatingCache(
            nan((B, places, M, K)), nan((B, places, M, V)), jnp.zeros(B, jnp.int32)
        )
        per_step = (floats["query"], floats["key"], floats["value"], counts)
        return jax.lax.scan(step, cache, per_step)[1]

    def expected(floats):
        """Every token of a row behind the others, and its queries one step after another."""
        end = jnp.cumsum(counts, 0)
        start = end - counts
        t = jnp.arange(T, dtype=jnp.int32)[None]
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        key, value = (jnp.zeros((B, steps * T + 1, M, n)) for n in (K, V))
        out = []
        for i in range(steps):
            at = jnp.where(t < counts[i][:, None], start[i][:, None] + t, steps * T)
            key = key.at[rows, at].set(floats["key"][i])
            value = value.at[rows, at].set(floats["value"][i])
            attend = partial(reference.dot_product_attention, sinks=floats["sinks"])
            out.append(
                attend(
                    floats["query"][i],
                    key,
                    value,
                    is_causal=True,
                    local_window_size=window,
                    query_seq_lengths=counts[i],
                    key_value_seq_lengths=end[i],
                    query_offset=start[i],
                )
            )
        return jnp.stack(out)

    def run(function):
        def of(floats):
            out, back = jax.vjp(function, floats)
            return out, back(draw(steps, B, T, N, V, seed=5))

        return quick(of)(floats)

    assert_same(run(ours), run(expected))


def test_of_more_tokens_than_places_the_last_remain():
    cache = RotatingCache(jnp.zeros((2, 3, 1, 1)), jnp.zeros((2, 3, 1, 1)), jnp.array([1, 0]))
    x = jnp.arange(5.0)[None, :, None, None] * jnp.ones((2, 1, 1, 1)) + 1
    cache = quick(update_rotating_cache)(cache, x, -x, jnp.array([9, 4]))
    assert cache.length.tolist() == [6, 4]
    assert sorted(cache.key[0].ravel().tolist()) == [3, 4, 5]
    assert cache.key[1].ravel().tolist() == [4, 2, 3]
    np.testing.assert_array_equal(cache.key, -cache.value)


# ---- 8 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_quantised_number_is_off_by_half_a_scale_at_most(dtype):
    x = draw(50, 1, 8, dtype=dtype) * jnp.asarray(10.0, dtype) ** draw(50, 1, 1, dtype=dtype)
    x = x.at[0].set(0)
    small, scale = quantise(x)
    back = dequantise(small, scale)
    assert small.dtype == jnp.int8 and back.dtype == scale.dtype
    error = jnp.abs(back - x.astype(back.dtype))
    assert (error <= scale[..., None] * 0.5000001).all() and not back[0].any()
    assert dequantise(small, scale, jnp.bfloat16).dtype == jnp.bfloat16


def test_attention_to_8_bits_is_off_by_a_hundredth():
    """Keys and values of a normal distribution, 64 wide: the error of the output, root mean square,
    is 0.9 % of the output's."""
    rows, S, width = 2, 96, 64
    q, k, v = (draw(rows, S, 2, width, seed=i, dtype=jnp.float32) for i in range(3))

    def attend(dtype):
        cache = init_paged_cache(
            rows, pages=12, page_size=16, pages_per_row=6, num_heads=2, key_size=width, dtype=dtype
        )
        return quick(lambda: paged_attention(q, append(cache, k, v)))()

    exact, rounded = attend(jnp.float32), attend(jnp.int8)
    share = float(jnp.sqrt(jnp.mean((rounded - exact) ** 2) / jnp.mean(exact**2)))
    assert rounded.dtype == jnp.float32 and 0.002 < share < 0.01


def test_8_bits_in_free_pages_reach_nothing_and_scales_have_a_gradient():
    key, value = (draw(B, 5, M, n, seed=n, dtype=jnp.float32) for n in (K, V))
    cache = EMPTY(B, pages=9, page_size=2, pages_per_row=3, dtype=jnp.int8)
    cache = append(cache, key, value, jnp.array([5, 0, 3]))
    query = draw(B, 1, N, K, dtype=jnp.float32)
    out = quick(paged_attention)(query, cache)
    nan = without_token(cache, [5, 0, 3])[:, :, None]
    assert cache.key_scale is not None and cache.value_scale is not None
    hidden = cache._replace(
        key_scale=jnp.where(nan, jnp.nan, cache.key_scale),
        value_scale=jnp.where(nan, jnp.nan, cache.value_scale),
    )
    loss = lambda scale, cache: jnp.sum(paged_attention(query, cache._replace(value_scale=scale)))
    assert_same(quick(paged_attention)(query, hidden), out, 0)
    slope = quick(jax.grad(loss))(hidden.value_scale, hidden)
    assert jnp.isfinite(slope).all() and slope.any()


# ---- what is refused --------------------------------------------------------------------------


def _bad_calls() -> dict[str, Any]:
    cache = EMPTY(2, pages=3, page_size=4, pages_per_row=2)
    k, v = jnp.ones((2, 1, M, K), jnp.float32), jnp.ones((2, 1, M, V), jnp.float32)
    query, ones = jnp.ones((2, 1, N, K), jnp.float32), jnp.ones(2, jnp.float32)
    ring = RotatingCache(
        jnp.ones((2, 3, M, K), jnp.float32), jnp.ones((2, 3, M, V), jnp.float32), jnp.zeros(2, int)
    )
    made: dict[str, Any] = {"pages": 3, "page_size": 4, "pages_per_row": 2}
    of = inspect.unwrap

    def call(function, *arguments):
        return lambda **change: lambda: of(function)(*arguments, **change)

    make = lambda **change: (
        lambda: of(init_paged_cache)(
            **{"batch": 2, **made, "num_heads": M, "key_size": K, **change}
        )
    )
    count = lambda **change: lambda: of(reference_counts)(cache._replace(**change))
    grow = lambda key=k, value=v, counts=None: lambda: of(append)(cache, key, value, counts)
    attend, turn = call(paged_attention, query, cache), call(rotating_attention, query, ring)
    put = lambda cache=ring, key=k, value=v, counts=None: (
        lambda: of(update_rotating_cache)(cache, key, value, counts)
    )
    return {
        "init_paged_cache: `pages` must be an integer of at least 1, got 0": make(pages=0),
        "init_paged_cache: `dtype` must be a floating dtype or int8, got int32": make(
            dtype=jnp.int32
        ),
        "`cache.key` must be of shape (P, page_size, M, K), got (3, 4, 2)": count(
            key=cache.key[..., 0]
        ),
        "`cache.value` must be of shape (P, page_size, M, V) to go with key's (3, 4, 2, 3), got": (
            count(value=cache.value[1:])
        ),
        "`cache.table` must be of shape (B, pages_per_row), got (2,)": count(
            table=cache.table[:, 0]
        ),
        "`cache.table` must be of integers, got float": count(table=cache.table.astype(float)),
        "`cache.lengths` must be of shape (B,) = (2,), got (1,)": count(lengths=cache.lengths[1:]),
        "`cache.lengths` must be of integers, got float": count(
            lengths=cache.lengths.astype(float)
        ),
        "append: `key` must be of shape (B, T, …) to go with the cache's (3, 4, 2, 3), got": (
            grow(key=k[:1])
        ),
        "append: `key` must be of the dtype of `cache.key`, float32, got bfloat16": grow(
            key=k.astype(jnp.bfloat16)
        ),
        "append: `key` must be of a floating dtype, got int8": lambda: of(append)(
            EMPTY(2, **made, dtype=jnp.int8), k.astype(jnp.int8), v
        ),
        "append: `value` must be of as many tokens as key, 1, got 2": grow(
            value=jnp.concatenate([v, v], 1)
        ),
        "append: `counts` must be of shape (B,) = (2,), got (1,)": grow(counts=cache.lengths[:1]),
        "append: `counts` must be of integers, got float32": grow(counts=ones),
        "fork: `source_rows` must be of shape (rows), got ()": call(fork, cache, 1)(),
        "fork: `source_rows` must be of integers, got float32": call(fork, cache, ones)(),
        "drop: `rows` must be of shape (B,) = (2,), got ()": call(drop, cache, True)(),
        "drop: `rows` must be of dtype bool, got int32": call(drop, cache, cache.lengths)(),
        "truncate: `lengths` must be of shape (B,) = (2,), got ()": call(truncate, cache, 1)(),
        "truncate: `lengths` must be of integers, got float32": call(truncate, cache, ones)(),
        "paged_attention: `query` must be of shape (B, T, N, K) to go with a cache of 2 rows of K "
        "= 3, got (1, 1, 4, 3)": call(paged_attention, query[:1], cache)(),
        "paged_attention: `query` must be of a multiple of the cache's 2 heads, got 3 heads": call(
            paged_attention, query[:, :, :3], cache
        )(),
        "paged_attention: `query` must be of the dtype of `cache.key`, float32, got bfloat16": call(
            paged_attention, query.astype(jnp.bfloat16), cache
        )(),
        "paged_attention: `query` must be of a floating dtype, got int8": call(
            paged_attention, query.astype(jnp.int8), EMPTY(2, **made, dtype=jnp.int8)
        )(),
        "`query_seq_lengths` must be of shape (B,) = (2,), got ()": attend(query_seq_lengths=1),
        "`query_seq_lengths` must be of integers, got float32": attend(query_seq_lengths=ones),
        "`query_offset` must be an integer or of shape (B,) = (2,), or None, got (1,)": attend(
            query_offset=cache.lengths[:1]
        ),
        "`query_offset` must be of integers, got float32": attend(query_offset=ones),
        "`mask_function` must be a function or None, got 3": attend(mask_function=3),
        "must be a prefix of one length or of 2, one for each row, got (3,)": attend(
            mask_function=masks.prefix(jnp.arange(3))
        ),
        "`scale` must be a number or of shape () or (N,) = (4,), got (2,)": attend(scale=ones),
        "`sinks` must be of shape (N,) = (4,), got (2,)": attend(sinks=ones),
        "`sinks` must be of a floating dtype, got int": attend(sinks=jnp.zeros(N, jnp.int32)),
        "`implementation` must be None, 'xla' or 'native', got 'dense'": attend(
            implementation="dense"
        ),
        "paged_attention: `implementation='native'` cannot serve pages of 4 tokens, no multiple of "
        "64; 'xla' can": attend(implementation="native"),
        "update_rotating_cache: `cache.key` must be of shape (B, W, M, K), got (2, 0, 2, 3)": put(
            ring._replace(key=ring.key[:, :0])
        ),
        "`cache.value` must be of shape (B, W, M, V) to go with key's (2, 3, 2, 3), got": put(
            ring._replace(value=ring.value[:, :1])
        ),
        "`cache.length` must be of shape (B,) = (2,), got (1,)": put(
            ring._replace(length=ring.length[:1])
        ),
        "`cache.length` must be of integers, got float32": put(ring._replace(length=ones)),
        "`key` must be of shape (B, T, …) to go with the cache's (2, 3, 2, 3), got": put(key=k[:1]),
        "`value` must be of the dtype of `cache.value`, float32, got bfloat16": put(
            value=v.astype(jnp.bfloat16)
        ),
        "update_rotating_cache: `value` must be of as many tokens as key, 1, got 2": put(
            value=jnp.concatenate([v, v], 1)
        ),
        "update_rotating_cache: `counts` must be of shape (B,) = (2,), got (1,)": put(
            counts=ring.length[:1]
        ),
        "update_rotating_cache: `counts` must be of integers, got float32": put(counts=ones),
        "rotating_attention: `query` must be of shape (B, T, N, K), got (1, 4, 3)": call(
            rotating_attention, query[0], ring
        )(window=1),
        "`window` must be an integer from 0 to 2, so that 3 places hold it for 1 queries, got 3": (
            turn(window=3)
        ),
        "`window` must be an integer from 0 to 2, so that 3 places hold it for 1 queries, got -1": (
            turn(window=-1)
        ),
        "rotating_attention: `query_seq_lengths` must be of shape (B,) = (2,), got ()": turn(
            window=1, query_seq_lengths=1
        ),
        "rotating_attention: `query_seq_lengths` must be of integers, got float32": turn(
            window=1, query_seq_lengths=ones
        ),
        "quantise: `x` must be of a floating dtype, got int32": call(quantise, cache.lengths)(),
        "quantise: `x` must be of at least one axis, got ()": call(quantise, ones[0])(),
        "dequantise: `x` must be of dtype int8, got int32": call(dequantise, cache.table, ones)(),
        "dequantise: `scale` must be of a floating dtype, got int32": call(
            dequantise, jnp.ones((2, 1), jnp.int8), cache.lengths
        )(),
        "dequantise: `scale` must be of shape that of x but for its last axis, = (2,), got ()": (
            call(dequantise, jnp.ones((2, 1), jnp.int8), ones[0])()
        ),
        "dequantise: `dtype` must be a floating dtype, got int32": call(
            dequantise, jnp.ones((2, 1), jnp.int8), ones
        )(dtype=jnp.int32),
    }


@pytest.mark.parametrize("message, call", _bad_calls().items())
def test_what_is_off_is_said(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


def test_what_a_rotating_cache_decides_by_itself_is_no_argument():
    query = jnp.ones((1, 1, 1, 1))
    cache = RotatingCache(query, query, jnp.zeros(1, int))
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        inspect.unwrap(rotating_attention)(query, cache, window=0, is_causal=True)
