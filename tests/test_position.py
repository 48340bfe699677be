"""Positions: theorems of rotations, angles against float64, gradients against the plain twins."""

import importlib
import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

import rnnattn
from rnnattn import reference
from rnnattn.position import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    PRoPEScaling,
    YaRNScaling,
    mrope,
    rope,
    rope_2d,
    rope_mixed,
    rotary,
    shift_matrix,
    sinusoids,
    xpos,
)
from tests.lstm_cases import assert_close

YARN = YaRNScaling(4.0, original_max_position_embeddings=64)


def _draw(*shape, dtype=jnp.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# ---- sinusoids and the matrix that shifts them ------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_sinusoids_are_those_of_the_notes(first):
    t, d = np.array([[-3.5, 0.0], [1.0, 77.25]]), 6
    actual = sinusoids(t, d, first=first, dtype=jnp.float64)
    for m in range(first, first + d // 2):
        f = 10_000 ** (2 * m / d)
        pair = np.stack([np.sin(t / f), np.cos(t / f)], axis=-1)
        column = 2 * (m - first)
        np.testing.assert_allclose(actual[..., column : column + 2], pair, atol=1e-12)


STEPS = st.floats(-1e4, 1e4)


@given(k=STEPS, more=STEPS, t=STEPS)
@settings(max_examples=30, deadline=None)
def test_shift_matrices_are_a_group_of_rotations_that_moves_sinusoids(k, more, t):
    """P2, P3: the print's transpose would move the other way."""
    T = partial(shift_matrix, dim=6, first=1, dtype=jnp.float64)
    e = partial(sinusoids, dim=6, first=1, dtype=jnp.float64)
    np.testing.assert_allclose(T(k) @ e(t), e(t + k), atol=1e-10)
    np.testing.assert_allclose(T(k).T @ e(t), e(t - k), atol=1e-10)
    np.testing.assert_allclose(T(k) @ T(more), T(k + more), atol=1e-10)
    np.testing.assert_allclose(T(-k), T(k).T, atol=1e-10)
    np.testing.assert_allclose(np.linalg.det(T(k)), 1, atol=1e-10)


def test_sinusoids_take_a_gradient_of_positions():
    t = _draw(2, 3)
    check_grads(jax.jit(partial(sinusoids, dim=4, dtype=jnp.float64)), (t,), order=1)


# ---- angles that do not drift -----------------------------------------------------------------

# Every position near 0 and near 2^20, and one in 97 between, both signs; primes meet no period.
FAR = 2**20
WHOLE = np.concatenate([np.arange(1000), np.arange(0, FAR, 97), np.arange(FAR - 1000, FAR + 1)])
WHOLE = np.concatenate([WHOLE, -WHOLE]).astype(np.int32)
FRACTIONS = np.random.default_rng(0).uniform(-FAR, FAR, 20_000).astype(np.float32)
FRACTIONS = np.concatenate([FRACTIONS, FRACTIONS / 1000])


def _drift(waves, positions, frequencies, amplitude=1.0):
    """The largest error of (sin, cos), each (…, J), against float64."""
    exact = positions[:, None].astype(np.float64) * frequencies
    return max(
        np.max(np.abs(np.asarray(ours, np.float64) - amplitude * function(exact)))
        for ours, function in zip(waves, (np.sin, np.cos), strict=True)
    )


@pytest.mark.parametrize("base, d", [(1e4, 128), (5e5, 64)])
@pytest.mark.parametrize("positions", [WHOLE, FRACTIONS], ids=["whole", "fractions"])
def test_sinusoids_do_not_drift(base, d, positions):
    e = jax.jit(partial(sinusoids, dim=d, base=base))(positions)
    assert e.dtype == jnp.float32
    waves = e[:, ::2], e[:, 1::2]
    assert _drift(waves, positions, base ** (-np.arange(0, d, 2) / d)) < 5e-7


@pytest.mark.parametrize(
    "scaling, x64",
    [(None, False), (LinearScaling(3.0), True), (YARN, False), (Llama3Scaling(), True)],
)
def test_rotations_do_not_drift(scaling, x64):
    base, d = 500_000.0, 128
    ω = base ** (-np.arange(0, d, 2) / d)
    if scaling is not None:
        ω = scaling.frequencies(d, base)
    with jax.enable_x64(x64):
        x = jnp.repeat(jnp.array([1, 0], jnp.float32), d // 2).reshape(1, 1, 1, d)
        x = jnp.broadcast_to(x, (1, WHOLE.size, 1, d))  # every pair is (1, 0)
        cos, sin = jnp.split(jax.jit(partial(rope, base=base, scaling=scaling))(x, WHOLE), 2, -1)
    waves = sin[0, :, 0], cos[0, :, 0]
    assert cos.dtype == jnp.float32
    assert _drift(waves, WHOLE, ω, 1.0 if scaling is None else scaling.amplitude) < 5e-7


def test_angles_hold_at_the_ends_of_32_bits():
    t = np.array([-(2**31), 2**31 - 1, 2**30 + 7], np.int32)
    e = sinusoids(t, 64)
    ω = (10_000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.longdouble)
    exact = t[:, None].astype(np.longdouble) * ω
    np.testing.assert_allclose(e[:, ::2], np.sin(exact).astype(np.float64), atol=1e-6)
    np.testing.assert_allclose(e[:, 1::2], np.cos(exact).astype(np.float64), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.float16])
def test_positions_of_every_type_mean_the_same(dtype):
    t = np.array([0, 1, 100])
    np.testing.assert_allclose(sinusoids(t.astype(dtype), 4), sinusoids(t, 4), atol=1e-6)


def test_a_position_that_is_no_number_gives_none():
    assert np.all(np.isnan(sinusoids(np.array([np.nan, np.inf], np.float32), 4)))


# ---- rotary embeddings ------------------------------------------------------------------------


def test_interleaved_rope_is_the_shift_matrix_of_minus_the_position():
    x, t = _draw(2, 5, 3, 8), _draw(2, 5) * 10
    turn = jax.vmap(jax.vmap(lambda x, t: x @ shift_matrix(-t, 8, dtype=jnp.float64).T))
    np.testing.assert_allclose(rope(x, t, interleaved=True), turn(x, t), atol=1e-12)


def test_the_two_pairings_differ_by_a_permutation():
    x, t = _draw(1, 4, 2, 6), jnp.arange(4)
    order = np.array([0, 3, 1, 4, 2, 5])  # half-split features, pair by pair
    np.testing.assert_array_equal(rope(x, t)[..., order], rope(x[..., order], t, interleaved=True))


@given(shift=st.integers(-1000, 1000))
@settings(max_examples=20, deadline=None)
def test_products_of_queries_and_keys_depend_on_distance_alone(shift):
    q, k, t = _draw(1, 4, 2, 8), _draw(1, 4, 2, 8, seed=1), jnp.arange(4)
    logits = lambda t: jnp.einsum("btnk,bsnk->bnts", rope(q, t), rope(k, t))
    np.testing.assert_allclose(logits(t + shift), logits(t), atol=1e-9)


@pytest.mark.parametrize("interleaved, rotary_dim", [(False, None), (True, 4)])
def test_norms_are_kept_and_the_inverse_undoes(interleaved, rotary_dim):
    x, t = _draw(2, 3, 2, 8), jnp.array([0, 5, 12345])
    options: Any = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    y = rope(x, t, **options)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(rope(y, t, inverse=True, **options), x, atol=1e-12)
    scaled = rope(x, t, scaling=YARN, **options)
    np.testing.assert_allclose(
        rope(scaled, t, scaling=YARN, inverse=True, **options), x, atol=1e-12
    )


@pytest.mark.parametrize("scaling", [None, YARN])
def test_a_partial_rotation_is_one_of_the_first_features(scaling):
    x, t = _draw(1, 3, 2, 10), jnp.arange(3)
    y = rope(x, t, rotary_dim=4, scaling=scaling)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(y[..., :4], rope(x[..., :4], t, scaling=scaling))


def test_positions_may_differ_by_row_or_be_shared():
    x, t = _draw(2, 3, 2, 4), jnp.array([[0, 1, 2], [7, 8, 9]])
    y = rope(x, t)
    for row in range(2):
        np.testing.assert_array_equal(y[row], rope(x[row], t[row]))
        np.testing.assert_array_equal(
            y[:, row], rope(x[:, row : row + 1], t[:, row : row + 1])[:, 0]
        )
    np.testing.assert_array_equal(rope(x, 5), rope(x, jnp.full((2, 3), 5)))


# ---- gradients --------------------------------------------------------------------------------


class Case(NamedTuple):
    rule: Any
    plain: Any
    arguments: tuple[Any, ...]  # all floating, all differentiated


def _rope_case(x_shape, t_shape, **options):
    arguments = (_draw(*x_shape), 10 * _draw(*t_shape, seed=1))
    return Case(partial(rope, **options), partial(reference.rope, **options), arguments)


def _mixed_case(x_shape, rows, columns, heads, **options):
    f = _draw(2, heads, x_shape[-1] // 2, seed=2)
    arguments = (_draw(*x_shape), _draw(*rows, seed=1), _draw(*columns, seed=3), f)
    return Case(partial(rope_mixed, **options), partial(reference.rope_mixed, **options), arguments)


def _axial_case(x_shape, rows, columns, **options):
    arguments = (_draw(*x_shape), _draw(*rows, seed=1), _draw(*columns, seed=3))
    return Case(partial(rope_2d, **options), partial(reference.rope_2d, **options), arguments)


CASES = {
    "plain": _rope_case((2, 5, 3, 8), (5,)),
    "rows": _rope_case((2, 5, 3, 8), (2, 5), interleaved=True),
    "one of all": _rope_case((1, 1, 1, 2), (1,)),
    "one row": _rope_case((1, 4, 1, 6), (1, 4), interleaved=True, rotary_dim=2),
    "one step": _rope_case((3, 1, 2, 4), (3, 1)),
    "a scalar": _rope_case((2, 3, 1, 4), ()),
    "every option": _rope_case(
        (2, 5, 3, 8), (1, 5), base=50.0, rotary_dim=6, scaling=YARN, inverse=True
    ),
    "axial": _axial_case((2, 5, 3, 8), (5,), (2, 1), scaling=YARN),
    "axial interleaved": _axial_case((1, 1, 1, 4), (1,), (), interleaved=True, inverse=True),
    "mixed": _mixed_case((2, 5, 3, 8), (5,), (2, 5), 3),
    "mixed, shared": _mixed_case((2, 1, 3, 2), (1,), (), 1, interleaved=True, inverse=True),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_match_the_plain_twin(name):
    rule, plain, arguments = CASES[name]
    dy = _draw(*arguments[0].shape, seed=9)

    @jax.jit
    def run(arguments, dy):
        both = [jax.vjp(function, *arguments) for function in (rule, plain)]
        return [(y, pullback(dy)) for y, pullback in both]

    actual, expected = run(arguments, dy)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("name, order", [("every option", 2), ("mixed", 1)])
def test_gradients_match_finite_differences(name, order):
    case = CASES[name]
    check_grads(jax.jit(case.rule), case.arguments, order=order, modes=["rev"])


def test_second_derivatives_match_the_plain_twin():
    x, t = CASES["every option"].arguments

    def second(function):
        loss = lambda x, t: jnp.sum(function(x, t) ** 3)
        norm = lambda x, t: sum(jnp.sum(d**2) for d in jax.grad(loss, (0, 1))(x, t))
        return jax.jit(lambda x, t: (jax.hessian(loss, (0, 1))(x, t), jax.grad(norm, (0, 1))(x, t)))

    actual, expected = (second(f)(x[:1, :2], t[:, :2]) for f in CASES["every option"][:2])
    assert_close(actual, expected, 1e-11)


def test_the_gradient_is_the_rotation_back():
    x, t, dy = _draw(2, 5, 3, 8), jnp.arange(5), _draw(2, 5, 3, 8, seed=1)
    (dx,) = jax.vjp(lambda x: rope(x, t), x)[1](dy)
    np.testing.assert_array_equal(dx, rope(dy, t, inverse=True))


@pytest.mark.parametrize("t", [jnp.arange(5), jnp.arange(5.0)], ids=["whole", "floating"])
def test_x_is_kept_only_for_angles_that_are_differentiated(t):
    x = _draw(2, 5, 3, 8)
    kept = lambda *pullback: max(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept(jax.vjp(lambda x: rope(x, t), x)[1]) == 5 * 4  # cos θ, sin θ
    assert kept(jax.vjp(rope, x, jnp.arange(5.0))[1]) == x.size


def test_whole_positions_have_no_gradient():
    x = _draw(1, 3, 1, 4)
    loss = lambda x, t: jnp.sum(rope(x, t) ** 2)
    _, dt = jax.grad(loss, (0, 1), allow_int=True)(x, jnp.arange(3))
    assert dt.dtype == jax.dtypes.float0


def test_forward_mode_is_that_of_the_twin():
    x, t = _draw(1, 3, 1, 4), _draw(3)
    y, dy = jax.jvp(reference.rope, (x, t), (x, jnp.zeros(3)))
    np.testing.assert_allclose(y, dy, atol=1e-15)  # linear in x
    tables = {"rope": (x, t), "rope_2d": (x, t, t), "rope_mixed": (x, t, t, _draw(2, 1, 2))}
    for name, arguments in tables.items():
        with pytest.raises(TypeError, match="custom_vjp") as caught:
            jax.jvp(getattr(rnnattn, name), arguments, arguments)
        assert f"`rnnattn.reference.{name}` has forward mode" in " ".join(caught.value.__notes__)


def test_vmap_equals_a_loop():
    x, t = _draw(3, 2, 4, 1, 4), _draw(4)
    gradients = lambda x, t: jax.grad(lambda x, t: jnp.sum(rope(x, t) ** 3), (0, 1))(x, t)
    batched = jax.vmap(gradients, in_axes=(0, None))(x, t)
    for n in range(3):
        one = jax.tree.map(lambda a, n=n: a[n], batched)
        assert_close(one, gradients(x[n], t), 1e-12)


# ---- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_rotated_in_float32_and_rounded_once(dtype):
    x, t = _draw(2, 5, 3, 8, dtype=dtype), jnp.arange(5, dtype=jnp.float32) * 1000
    loss = lambda x, t: jnp.sum(rope(x, t).astype(jnp.float32))
    grad = jax.jit(jax.grad(loss, (0, 1)))
    wide = x.astype(jnp.float32)
    np.testing.assert_array_equal(rope(x, t), rope(wide, t).astype(dtype))
    (dx, dt), (wide_dx, wide_dt) = grad(x, t), grad(wide, t)
    assert dx.dtype == dtype and dt.dtype == jnp.float32
    np.testing.assert_array_equal(dx, wide_dx.astype(dtype))
    np.testing.assert_allclose(dt, wide_dt, rtol=1e-5)


def test_results_and_gradients_keep_their_dtypes():
    """Positions, x and frequencies may each be of any type."""
    x, t = _draw(1, 2, 1, 4, dtype=jnp.float32), _draw(2)
    f = _draw(2, 1, 2, dtype=jnp.bfloat16)
    loss = lambda x, rows, columns, f: jnp.sum(rope_mixed(x, rows, columns, f) + rope(x, rows))
    gradients = jax.grad(loss, (0, 1, 2, 3))(x, t, t.astype(jnp.float16), f)
    assert [g.dtype.name for g in gradients] == ["float32", "float64", "float16", "bfloat16"]
    assert rope_2d(x, t, jnp.arange(2)).dtype == jnp.float32
    assert sinusoids(t, 4).dtype == jnp.float32
    assert shift_matrix(3, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_float64_is_really_float64():
    t = np.array([0, 1000, FAR])
    exact = t[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    e = sinusoids(t, 8, dtype=jnp.float64)
    np.testing.assert_allclose(e[:, ::2], np.sin(exact), atol=1e-9)
    y = rope(jnp.repeat(jnp.array([1.0, 0.0]), 4).reshape(1, 1, 1, 8), t[-1:])
    np.testing.assert_allclose(y.ravel()[:4], np.cos(exact[-1]), atol=1e-9)


# ---- two axes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"interleaved": True, "scaling": YARN, "inverse": True}])
def test_axial_rope_is_one_rope_for_each_half(options: Any):
    x = _draw(2, 6, 3, 8)
    rows, columns = jnp.divmod(jnp.arange(6), 3)
    one: Any = partial(rope, base=100.0, **options)
    expected = jnp.concatenate([one(x[..., :4], rows), one(x[..., 4:], columns)], axis=-1)
    np.testing.assert_allclose(rope_2d(x, rows, columns, **options), expected, atol=1e-15)


def test_mixed_frequencies_hold_the_axial_ones():
    """Interleaved, pairs of the two halves of the head are pairs of the whole."""
    x = _draw(2, 6, 3, 8)
    rows, columns = jnp.divmod(jnp.arange(6), 3)
    ω = jnp.asarray(100.0 ** (-np.arange(0, 4, 2) / 4))
    f = jnp.kron(jnp.eye(2), ω[None])[:, None]  # rows turn the first pairs, columns the rest
    mixed = rope_mixed(x, rows, columns, f, interleaved=True)
    np.testing.assert_allclose(mixed, rope_2d(x, rows, columns, interleaved=True), atol=1e-14)


@pytest.mark.parametrize("mixed", [False, True])
def test_products_depend_on_the_distance_in_the_grid_alone(mixed):
    q, k = _draw(1, 6, 2, 8), _draw(1, 6, 2, 8, seed=1)
    rows, columns = jnp.divmod(jnp.arange(6), 3)
    f = _draw(2, 2, 4, seed=2)
    turn: Any = partial(rope_mixed, frequencies=f) if mixed else rope_2d

    def logits(down, right):
        at = (rows + down, columns + right)
        return jnp.einsum("btnk,bsnk->bnts", turn(q, *at), turn(k, *at))

    np.testing.assert_allclose(logits(11, -4), logits(0, 0), atol=1e-11)


def test_mixed_rope_has_an_inverse():
    x, f, t = _draw(1, 6, 2, 8), _draw(2, 1, 4), jnp.arange(6)
    y = rope_mixed(x, t, -t, f)
    np.testing.assert_allclose(rope_mixed(y, t, -t, f, inverse=True), x, atol=1e-14)


# ---- published numbers ------------------------------------------------------------------------

# Inverse frequencies and attention factors by transformers 5.24.0, ROPE_INIT_FUNCTIONS (float32).
# The rows of LongRoPE and of dynamic NTK are by transformers 4.57.1.
SHORT = (1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
LONG = (1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 30.0, 32.0)
PUBLISHED = {
    "linear": (
        LinearScaling(4.0),
        (16, 10_000.0),
        [
            0.25,
            0.079056941,
            0.0250000004,
            0.00790569466,
            0.00249999994,
            0.000790569466,
            0.000250000012,
            7.90569466e-05,
        ],
        1.0,
    ),
    # "dynamic", factor 2, at length 4096 of a model of 2048: 2 · 4096 / 2048 − (2 − 1) = 3
    "NTK": (
        NTKScaling(3.0),
        (16, 10_000.0),
        [
            1.0,
            0.270296127,
            0.0730599985,
            0.0197478328,
            0.00533776265,
            0.00144277664,
            0.000389976922,
            0.000105409257,
        ],
        1.0,
    ),
    "YaRN": (
        YaRNScaling(4.0, original_max_position_embeddings=2048),
        (16, 10_000.0),
        [
            1.0,
            0.316227764,
            0.100000001,
            0.025693506,
            0.00624999963,
            0.00138349656,
            0.000250000012,
            7.90569466e-05,
        ],
        1.138629436111989,
    ),
    "YaRN of gpt-oss": (
        YaRNScaling(32.0, original_max_position_embeddings=4096, truncate=False),
        (16, 150_000.0),
        [
            1.0,
            0.225418001,
            0.0508132726,
            0.00679495931,
            0.000456483918,
            1.8188337e-05,
            4.09997847e-06,
            9.24208962e-07,
        ],
        1.3465735902799727,
    ),
    "YaRN of DeepSeek-V3": (
        YaRNScaling(40.0, original_max_position_embeddings=4096, attention_factor=1.0),
        (16, 10_000.0),
        [
            1.0,
            0.316227764,
            0.100000001,
            0.0239147246,
            0.00512499968,
            0.000849862176,
            2.49999994e-05,
            7.90569447e-06,
        ],
        1.0,
    ),
    "Llama 3.1": (
        Llama3Scaling(),
        (16, 500_000.0),
        [
            1.0,
            0.193922758,
            0.0376060307,
            0.00729266508,
            0.000524846022,
            3.42810235e-05,
            6.64786967e-06,
            1.28917316e-06,
        ],
        1.0,
    ),
    "Llama 3.2": (
        Llama3Scaling(factor=32.0),
        (16, 500_000.0),
        [
            1.0,
            0.193922758,
            0.0376060307,
            0.00729266508,
            0.000429556705,
            8.57025589e-06,
            1.66196742e-06,
            3.22293289e-07,
        ],
        1.0,
    ),
    "LongRoPE, short": (
        LongRoPEScaling(SHORT, LONG, 4096, 131_072, length=4096),
        (16, 10_000.0),
        [
            1.0,
            0.28747976,
            0.06666667,
            0.015811389,
            0.0033333334,
            0.00079056947,
            0.00019999999,
            5.2704629e-05,
        ],
        1.1902380714238083,
    ),
    "LongRoPE, long": (
        LongRoPEScaling(SHORT, LONG, 4096, 131_072),
        (16, 10_000.0),
        [
            1.0,
            0.15811388,
            0.025,
            0.0039528473,
            0.00062499999,
            0.00013176158,
            3.3333334e-05,
            9.8821183e-06,
        ],
        1.1902380714238083,
    ),
    "dynamic NTK, within": (
        DynamicNTKScaling(2.0, 2048, length=1024),
        (16, 10_000.0),
        [1.0, 0.31622776, 0.1, 0.031622779, 0.0099999998, 0.0031622779, 0.001, 0.00031622779],
        1.0,
    ),
    "dynamic NTK, beyond": (
        DynamicNTKScaling(2.0, 2048, length=8192),
        (16, 10_000.0),
        [
            1.0,
            0.23948137,
            0.057351321,
            0.013734572,
            0.0032891738,
            0.00078769587,
            0.00018863847,
            4.5175395e-05,
        ],
        1.0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scalings_give_the_published_numbers(name):
    scaling, (d, base), expected, amplitude = PUBLISHED[name]
    np.testing.assert_allclose(scaling.frequencies(d, base), expected, rtol=3e-7)
    assert math.isclose(scaling.amplitude, amplitude, rel_tol=1e-12)


def test_several_axes_are_those_of_qwen():
    """By transformers 4.57.1, apply_multimodal_rotary_pos_emb, sections (2, 3, 3), in float32."""
    x = (jnp.arange(64) % 7 - 3).reshape(1, 4, 1, 16).astype(jnp.float32)
    positions = jnp.array([[0, 3, 3, 7], [0, 4, 5, 7], [0, 1, 9, 7]])
    expected = [
        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, -3.0, -2.0],
        [
            0.989992,
            -0.812649,
            0.142224,
            1.605559,
            3.117568,
            -2.99366,
            -1.998999,
            -1.0,
            -0.14112,
            0.582754,
            2.23154,
            3.22834,
            -2.877632,
            -2.009477,
            -1.001999,
            -0.000316,
        ],
        [
            -1.272233,
            -1.272439,
            4.071024,
            -2.647666,
            -1.947521,
            -0.999595,
            -0.009,
            0.994304,
            -1.838865,
            3.373559,
            -1.194471,
            -2.44742,
            -1.098709,
            -0.028457,
            0.99996,
            2.002838,
        ],
        [
            4.232666,
            3.399156,
            -0.885467,
            -0.9756,
            -0.069943,
            0.955487,
            1.978951,
            3.006633,
            -0.290747,
            -1.20239,
            -2.053277,
            -0.219556,
            0.997551,
            2.021644,
            3.013927,
            -2.993352,
        ],
    ]
    np.testing.assert_allclose(mrope(x, positions, (2, 3, 3))[0, :, 0], expected, atol=2e-6)
    same = mrope(x, positions[:, 3:], (2, 3, 3))  # text
    np.testing.assert_allclose(same, rope(x, positions[0, 3:]), atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_of_xpos_fade_with_the_distance(interleaved):
    q, k, d = _draw(1, 1, 1, 6), _draw(1, 1, 1, 6, seed=1), 6
    t, s = 9, 2
    turn = partial(xpos, interleaved=interleaved, scale_base=16.0)
    product = jnp.sum(turn(q, jnp.array([t])) * turn(k, jnp.array([s]), downscale=True))
    pairs = lambda x: x.reshape(3, 2) if interleaved else x.reshape(2, 3).T
    expected = 0.0
    for m, (a, b) in enumerate(zip(pairs(q), pairs(k), strict=True)):
        θ = 10_000.0 ** (-2 * m / d) * (t - s)
        zeta = ((2 * m / d + 0.4) / 1.4) ** ((t - s) / 16)
        dot, cross = a @ b, a[0] * b[1] - a[1] * b[0]
        expected += zeta * (dot * math.cos(θ) + cross * math.sin(θ))
    np.testing.assert_allclose(product, expected, rtol=1e-6)


def test_the_highest_frequencies_alone_turn():
    x = _draw(1, 5, 2, 8)
    scaling = PRoPEScaling(0.75)
    np.testing.assert_array_equal(scaling.frequencies(8, 100.0)[3:], 0)
    np.testing.assert_allclose(scaling.frequencies(8, 100.0)[:3], 100.0 ** (-np.arange(3) / 4))
    y = rope(x, jnp.arange(5), scaling=scaling)
    np.testing.assert_array_equal(y[..., [3, 7]], x[..., [3, 7]])


@pytest.mark.parametrize("name", ["mrope", "xpos"])
def test_gradients_of_several_axes_and_of_fading(name):
    x, t = _draw(2, 3, 2, 8), jnp.array([0.5, 3.0, 7.25])
    arguments = (x, jnp.stack([t, 2 * t]), (3, 1)) if name == "mrope" else (x, t)
    at, fixed = arguments[:2], arguments[2:]
    weights = _draw(*x.shape, seed=1)
    loss = lambda f, *at: jnp.sum(weights * f(*at, *fixed) ** 2)
    rule, twin = partial(loss, getattr(rnnattn, name)), partial(loss, getattr(reference, name))
    gradients = [jax.jit(jax.grad(f, argnums=(0, 1)))(*at) for f in (rule, twin)]
    assert_close(*gradients)
    along = (weights, jnp.ones_like(at[1]))
    tangents = [
        jax.jit(lambda *at, f=f: jax.jvp(jax.grad(f), at, along)[1])(*at) for f in (rule, twin)
    ]
    assert_close(*tangents)
    check_grads(jax.jit(twin), at, order=1, modes=["fwd"], rtol=1e-5, atol=1e-5)


def test_rotations_match_the_onnx_cases():
    pytest.importorskip("onnx")
    importlib.import_module("onnx.backend.test.case.node.rotaryembedding")
    node = importlib.import_module("onnx.backend.test.case.node")
    cases = [c for c in node._NodeTestCases if c.name.startswith("test_rotary_embedding")]
    cases = [c for c in cases if "expanded" not in c.name]
    assert len(cases) >= 8
    for case in cases:
        (op,) = case.model.graph.node
        options = {a.name: a.i for a in op.attribute}
        inputs, (expected,) = case.data_sets[0]
        x, cos, sin, *ids = map(jnp.asarray, inputs)
        heads_first = x.ndim == 4  # (B, N, T, K), else (B, T, N·K)
        x = (
            jnp.swapaxes(x, 1, 2)
            if heads_first
            else x.reshape(*x.shape[:2], options["num_heads"], -1)
        )
        if ids:
            cos, sin = cos[ids[0]], sin[ids[0]]
        interleaved = bool(options.get("interleaved", 0))
        y = rotary._rotation(interleaved, x, cos[:, :, None], sin[:, :, None])
        y = jnp.swapaxes(y, 1, 2) if heads_first else y.reshape(expected.shape)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-7, err_msg=case.name)


# ---- transformations, parameters and errors ---------------------------------------------------


def test_a_second_eager_call_compiles_nothing():
    x, t, f = _draw(1, 3, 1, 12), _draw(3), _draw(2, 1, 6)  # a width no other test has compiled
    calls = [
        lambda: sinusoids(t, 12),
        lambda: shift_matrix(3, 12),
        lambda: rope(x, t),
        lambda: rope_2d(x, t, t),
        lambda: jax.grad(lambda f: rope_mixed(x, t, t, f).sum())(f),
    ]
    compilations = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for call in calls:
            call()
            assert compilations  # the listener hears
            compilations.clear()
            call()
            assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU backend's fusions")
def test_a_cosine_is_computed_once_for_all_heads_and_rows():
    """Fused into the rotation, it would be computed for each of them."""
    x = _draw(4, 64, 8, 32, dtype=jnp.float32)
    text = jax.jit(rope).lower(x, jnp.arange(64)).compile().as_text() or ""
    computations = [part for part in text.split("\n\n") if " cosine(" in part]
    assert computations and not any("f32[4,64,8," in part for part in computations)


@pytest.mark.parametrize("x64", [False, True])
def test_everything_exports_for_gpu_and_tpu(x64):
    with jax.enable_x64(x64):
        x, t = jnp.ones((1, 3, 2, 8), jnp.bfloat16), jnp.arange(3.0)
        f = jnp.ones((2, 2, 4), jnp.float32)
        total = lambda y: jnp.sum(y.astype(jnp.float32))

        def loss(x, t, f):
            waves = sinusoids(t, 8) @ shift_matrix(t[0], 8)
            turned = rope(x, t, scaling=YARN), rope_2d(x, t, t), rope_mixed(x, t, t, f)
            more = mrope(x, jnp.stack([t, t]), (1, 3)), xpos(x, t)
            whole = rope(x, jnp.arange(3), interleaved=True)
            return sum(map(total, (waves, *turned, *more, whole)))

        for function in (loss, jax.grad(loss, argnums=(0, 1, 2))):
            jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(x, t, f)


def test_none_in_a_config_stands_for_the_default():
    config = {"beta_fast": None, "beta_slow": None, "attention_factor": None, "truncate": None}
    assert YaRNScaling(4.0, 64, **config) == YARN


def _bad_calls() -> dict[str, Any]:
    x, t, f = _draw(2, 5, 3, 8), jnp.arange(5), _draw(2, 3, 4)
    wrong: Any = "linear"
    axes = "the axes of `x` before its heads, (2, 5)"
    before = f"must be of a shape that broadcasts to {axes}, got"
    return {
        "sinusoids: `dim` must be a positive multiple of 2, got 3": lambda: sinusoids(t, 3),
        "sinusoids: `base` must be a number above 1, got 1": lambda: sinusoids(t, 2, base=1),
        "sinusoids: `dtype` must be a floating dtype, got int32": lambda: sinusoids(
            t, 2, dtype=jnp.int32
        ),
        "sinusoids: `positions` must be of integers or of a floating dtype, got bool": lambda: (
            sinusoids(t > 1, 2)
        ),
        "shift_matrix: `dim` must be a positive multiple of 2, got 0": lambda: shift_matrix(1, 0),
        "shift_matrix: `offset` must be a scalar, got shape (5,)": lambda: shift_matrix(t, 2),
        "rope: `x` must be of shape (B, T, N, K), got (3, 8)": lambda: rope(x[0, 0], 1),
        "rope: `x` must be of a floating dtype, got int64": lambda: rope(x.astype(jnp.int64), t),
        "rope: `x.shape[-1]` must be a positive multiple of 2, got 7": lambda: rope(x[..., :7], t),
        "rope: `rotary_dim` must be a positive multiple of 2, got 3": lambda: rope(
            x, t, rotary_dim=3
        ),
        "rope: `rotary_dim` must be at most K = 8, got 10": lambda: rope(x, t, rotary_dim=10),
        f"rope: `positions` {before} (3,)": lambda: rope(x, t[:3]),
        f"rope: `positions` {before} (2, 1, 5)": lambda: rope(x, jnp.zeros((2, 1, 5))),
        f"reference.rope: `positions` {before} (2,)": lambda: reference.rope(x, t[:2]),
        "rope: `base` must be a number above 1, got 0.5": lambda: rope(x, t, base=0.5),
        "rope: `scaling` must be a Scaling or None, got 'linear'": lambda: rope(
            x, t, scaling=wrong
        ),
        "rope_2d: `x.shape[-1]` must be a positive multiple of 4, got 6": lambda: rope_2d(
            x[..., :6], t, t
        ),
        f"rope_2d: `rows` {before} (4,)": lambda: rope_2d(x, t[:4], t),
        f"rope_mixed: `columns` {before} (4,)": lambda: rope_mixed(x, t, t[:4], f),
        "rope_mixed: `frequencies` must be of shape (2, N, K/2) = (2, 3, 4) or (2, 1, 4), "
        "got (2, 2, 4)": lambda: rope_mixed(x, t, t, f[:, :2]),
        "rope_mixed: `frequencies` must be of a floating dtype, got int32": lambda: rope_mixed(
            x, t, t, f.astype(jnp.int32)
        ),
        "LinearScaling: `factor` must be positive, got 0": lambda: LinearScaling(0),
        "PRoPEScaling: `p` must be at most 1, got 2": lambda: PRoPEScaling(2),
        "LongRoPEScaling: `short_factor` must be positive, got (1.0, 0)": lambda: LongRoPEScaling(
            (1.0, 0), (1.0, 1.0), 4, 8
        ),
        "LongRoPEScaling: `long_factor` must be of 4 factors, one for each pair, got 2": lambda: (
            rope(x, t, scaling=LongRoPEScaling((1.0, 1.0), (1.0, 1.0), 4, 8))
        ),
        "mrope: `x.shape[-1]` must be a positive multiple of 2, got 7": lambda: mrope(
            x[..., :7], t[None], (4,)
        ),
        "mrope: `positions` must be of shape (A, …, T), got ()": lambda: mrope(x, 1, (4,)),
        "mrope: `sections` must be an integer of at least 0, got 2.0": lambda: mrope(
            x,
            t[None],
            (2.0,),  # type: ignore[arg-type]
        ),
        "mrope: `sections` must be 1 integers, one for each axis, whose sum is K/2 = 4, got (3,)": (
            lambda: mrope(x, t[None], (3,))
        ),
        f"mrope: `positions` {before} (4,)": lambda: mrope(x, t[None, :4], (4,)),
        "xpos: `x.shape[-1]` must be a positive multiple of 2, got 7": lambda: xpos(x[..., :7], t),
        f"xpos: `positions` {before} (4,)": lambda: xpos(x, t[:4]),
        "xpos: `scale_base` must be a positive number, got 0": lambda: xpos(x, t, scale_base=0),
        "xpos: `gamma` must be a positive number, got 0": lambda: xpos(x, t, gamma=0),
        "YaRNScaling: `factor` must be positive, got None": lambda: YaRNScaling(
            None,  # type: ignore[arg-type]
            64,
        ),
        "YaRNScaling: `beta_slow` must be below `beta_fast`, got 3.0 and 2.0": lambda: YaRNScaling(
            2.0, 64, beta_fast=2.0, beta_slow=3.0
        ),
        "Llama3Scaling: `low_freq_factor` must be below `high_freq_factor`, got 4.0 and 4.0": (
            lambda: Llama3Scaling(low_freq_factor=4.0)
        ),
    }


@pytest.mark.parametrize("message", _bad_calls())
@pytest.mark.usefixtures("only_own_checks")
def test_a_bad_argument_is_an_error_that_names_it(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _bad_calls()[message]()
