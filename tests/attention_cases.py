"""Random attention problems, and what is computed of them in one compilation each."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import masks, reference
from rnnattn.attention import api, blocks, blockwise, dropout, native_parts, reduced, rule
from rnnattn.attention.arguments import problem, sorted_arguments
from rnnattn.attention.equations import finite_lse
from rnnattn.attention.xla import time_last
from rnnattn.precision import accumulator

# Small problems run for microseconds and compile for seconds.
QUICK = {"xla_backend_optimization_level": 0}


class Sizes(NamedTuple):
    B: int = 3
    T: int = 7
    S: int = 10
    N: int = 4
    M: int = 2
    K: int = 3
    V: int = 5


class Case(NamedTuple):
    floats: dict[str, jax.Array]  # what has a gradient, by the name of the argument
    others: dict[str, jax.Array]  # what has none
    options: dict[str, Any]  # what is fixed when a function is traced


def make_case(
    sizes=None, *, bias=None, mask=None, scale=None, sinks=False, dtype=jnp.float64, seed=0, **rest
):
    """`bias`, `mask` and `scale` are shapes; of the rest, arrays are passed as such."""
    B, T, S, N, M, K, V = sizes or Sizes()
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    floats = {"query": draw(B, T, N, K), "key": draw(B, S, M, K), "value": draw(B, S, M, V)}
    if bias is not None:
        floats["bias"] = draw(*bias)
    if scale is not None:
        floats["scale"] = draw(*scale)
    if sinks:
        floats["sinks"] = draw(N)
    others = {name: x for name, x in rest.items() if isinstance(x, jax.Array)}
    if mask is not None:
        others["mask"] = jnp.asarray(rng.random(mask) < 0.7)
    return Case(floats, others, {n: x for n, x in rest.items() if n not in others})


def like(tree, seed):
    """Random numbers in the shapes and dtypes of a tree: cotangents, tangents."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def caller(function, **options):
    """(floats, others) → (O, L)."""
    return lambda floats, others: function(**floats, **others, **options, return_residual=True)


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def outputs(case, function, **options):
    call = partial(function, **case.options, **{"return_residual": True, **options})
    return quick(lambda arrays: call(**arrays))({**case.floats, **case.others})


def cotangents_for(case):
    B, T, N, _ = case.floats["query"].shape
    query, value = case.floats["query"], case.floats["value"]
    wide = accumulator(query.dtype)
    shapes = ((B, T, N, value.shape[-1]), value.dtype), ((B, T, N), wide)
    return like(tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes), seed=11)


def first_order(function, **options):
    """(floats, others, cotangents) → outputs and gradients."""
    call = caller(function, **options)

    def run(floats, others, cotangents):
        results, pullback = jax.vjp(lambda floats: call(floats, others), floats)
        return results, pullback(cotangents)[0]

    return quick(run)


def forward_mode(function, **options):
    """(floats, others, tangents) → outputs and their tangents."""
    call = caller(function, **options)

    def run(floats, others, tangents):
        return jax.jvp(lambda floats: call(floats, others), (floats,), (tangents,))

    return quick(run)


def second_order(function, **options):
    """The gradient, and its derivatives along a direction: forward and reverse over reverse."""
    call = caller(function, **options)

    def run(floats, others, cotangents, direction):
        def gradient(floats, cotangents):
            return jax.vjp(lambda floats: call(floats, others), floats)[1](cotangents)[0]

        at, along = (floats, cotangents), (direction, cotangents)
        first, forward = jax.jvp(gradient, at, along)
        return first, forward, jax.vjp(gradient, *at)[1](direction)

    return quick(run)


def value_and_gradients(case, function, **options):
    run = first_order(function, **case.options, **options)
    return run(case.floats, case.others, cotangents_for(case))


def attend(schedule, query, key, value, **options):
    """A call by a schedule that is none of those with a name."""
    arguments = sorted_arguments("f", query, key, value, **options)
    return api.call("f", rule.attend, arguments, schedule)


def of_call(function, case, cotangents):
    """O and L, and the gradient from cotangents of both."""
    call = partial(function, **case.options, return_residual=True)

    def run(floats, others, cotangents):
        results, pullback = jax.vjp(lambda floats: call(**floats, **others), floats)
        return results, pullback(cotangents)[0]

    return quick(run)(case.floats, case.others, cotangents)


def with_nan(case, cotangents):
    """NaN and ∞ where nobody looks, or is looked at."""
    q, k, v = (case.floats[name] for name in ("query", "key", "value"))
    of = partial(reference.dot_product_attention, **case.options, return_weights=True)
    pairs = quick(lambda arrays: of(**arrays)[1])({**case.floats, **case.others}) > 0
    rows = jnp.any(pairs, (1, 3))[:, :, None, None]
    keys = jnp.any(pairs, (1, 2))[:, :, None, None]
    floats = case.floats | {
        "query": jnp.where(rows, q, jnp.nan),
        "key": jnp.where(keys, k, jnp.inf),
        "value": jnp.where(keys, v, jnp.nan),
    }
    do, dlse = cotangents
    return case._replace(floats=floats), (jnp.where(rows, do, jnp.nan), dlse)


def relative_error(actual, expected):
    """Over all elements, those of −∞ apart, which are to be the same."""
    np.testing.assert_array_equal(actual == -jnp.inf, expected == -jnp.inf)
    actual, expected = (jnp.where(x == -jnp.inf, 0, x) for x in (actual, expected))
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def of_halves(halves, case, cotangents):
    """O, L and the gradient, without the rule: the interpreter's callbacks go through none."""
    arguments = sorted_arguments("f", **case.floats, **case.others, **case.options)
    operands, masking = problem(arguments[1], arguments[0])
    options = arguments[1]._replace(scale_gradient=False)
    o, lse = halves[0](options, operands, masking)
    do, dlse = cotangents
    given = do.reshape(o.shape), time_last(dlse.reshape(o.shape[:-1]))
    d = halves[1](options, operands, masking, o, finite_lse(lse), *given)
    return o, lse, *d[:3]


def assert_same(actual, expected, rtol=1e-12):
    """Each leaf on its own scale, with −∞ in the same places and no NaN.

    What cancels to zero may leave a rounding error behind, unless rtol is 0.
    """
    numbers = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    actual, expected = numbers(actual), numbers(expected)
    hidden = lambda tree: [x == -np.inf for x in jax.tree.leaves(tree)]
    for a, e in zip(hidden(actual), hidden(expected), strict=True):
        np.testing.assert_array_equal(a, e)
    finite = lambda tree: jax.tree.map(lambda x: np.where(x == -np.inf, 0, x), tree)
    pairs = zip(*map(jax.tree.leaves_with_path, map(finite, (actual, expected))), strict=True)
    for (path, a), (_, e) in pairs:
        name = jax.tree_util.keystr(path)
        assert a.shape == e.shape and np.isfinite(e).all(), name
        atol = rtol * max(np.max(np.abs(e), initial=0), 1e-3)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=name)


def assert_gradient(loss, arguments, rtol=1e-7):
    """Reverse mode against central differences, one leaf at a time along a random direction."""
    value, gradient = quick(loss), quick(jax.grad(loss))(arguments)
    step, direction = 1e-5, like(arguments, seed=7)
    leaves, tree = jax.tree.flatten(arguments)
    along, d = jax.tree.leaves(direction), jax.tree.leaves(gradient)
    for n, leaf in enumerate(leaves):
        put = lambda x, n=n: jax.tree.unflatten(tree, [*leaves[:n], x, *leaves[n + 1 :]])
        ahead, behind = (value(put(leaf + sign * step * along[n])) for sign in (1, -1))
        np.testing.assert_allclose(
            jnp.vdot(d[n], along[n]), (ahead - behind) / (2 * step), rtol=rtol, atol=rtol
        )
    return gradient


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a problem of a few rows; nothing traced with other sizes is used again."""
    monkeypatch.setattr(blockwise, "FORWARD_BLOCK", (4, 4))
    monkeypatch.setattr(blockwise, "BACKWARD_BLOCK", (4, 3))
    monkeypatch.setattr(blockwise, "RANGES_BLOCK", (4, 3))
    monkeypatch.setattr(blockwise, "_TANGENT_LOGITS", 96)
    monkeypatch.setattr(blockwise, "_LEAST_TANGENT_BLOCK", 3)
    monkeypatch.setattr(native_parts, "FORWARD_BLOCK", 3)
    monkeypatch.setattr(native_parts, "BACKWARD_BLOCK", 4)
    monkeypatch.setattr(native_parts, "PAIRS", 1)
    monkeypatch.setattr(dropout, "_TILE", 4)
    for module in (masks, reduced, blocks):
        monkeypatch.setattr(module, "MAP_BLOCK", 3)
    cast(Any, api._run_attention).clear_cache()
    yield
    cast(Any, api._run_attention).clear_cache()
