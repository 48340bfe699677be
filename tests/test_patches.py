"""Patches, resampled grids, padding and the stem: against torch, and what must hold of any of them.

The maps of this file are linear, so most of their truth is an identity that holds to the last bit
or to rounding; sizes are never only squares.
"""

import inspect
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from rnnattn.patches import (
    conv_stem,
    crop_and_pad,
    patchify,
    resample_grid,
    resize_patch_kernel,
    stem_strides,
    token_mask,
    unpatchify,
)

GRIDS = [
    ((2, 8), (4, 4)),
    ((1, 5), (1, 9)),
    ((6, 1), (2, 1)),
    ((7, 3), (4, 9)),
    ((14, 5), (3, 2)),
    ((3, 4), (1, 1)),
    ((1, 1), (3, 2)),
    ((5, 4), (5, 6)),
]
small = st.integers(1, 4)


def normal(*shape, dtype=jnp.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_adjoint(function, x):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ and A(2x) = 2A(x): the gradient is the transpose of a linear map."""
    out, vjp = jax.vjp(function, x)
    y = normal(*out.shape, seed=1)
    np.testing.assert_allclose(jnp.vdot(out, y), jnp.vdot(x, vjp(y)[0]), rtol=1e-12)
    np.testing.assert_allclose(function(2 * x), 2 * out, rtol=1e-12)


# ---- patches ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(small, small, small, small, small, small)
def test_patches_hold_their_pixels_and_give_the_images_back(B, rows, columns, p, q, channels):
    size = (rows * p, columns * q)
    images = np.arange(B * size[0] * size[1] * channels).reshape(B, *size, channels)
    there = lambda images: patchify(images, (p, q))
    there_and_back = jax.jit(lambda x: (there(x), unpatchify(there(x), size, (p, q))))
    tokens, back = map(np.asarray, there_and_back(images))
    assert tokens.shape == (B, rows * columns, p * q * channels)
    for i, j in np.ndindex(rows, columns):
        patch = images[:, i * p : (i + 1) * p, j * q : (j + 1) * q]
        np.testing.assert_array_equal(tokens[:, i * columns + j], patch.reshape(B, -1))
    np.testing.assert_array_equal(back, images)


def test_one_number_is_a_square_patch():
    images = normal(2, 6, 9, 2)
    np.testing.assert_array_equal(patchify(images, 3), patchify(images, (3, 3)))
    np.testing.assert_array_equal(unpatchify(patchify(images, 3), (6, 9), 3), images)


def test_a_linear_map_of_patches_is_a_strided_convolution():
    images, kernel = normal(2, 6, 8, 3), normal(3, 2, 3, 5, seed=1)
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lax.conv_general_dilated(images, kernel, (3, 2), "VALID", dimension_numbers=layout)
    linear = patchify(images, (3, 2)) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(linear, conv.reshape(2, 8, 5), rtol=1e-12, atol=1e-12)


def test_each_gradient_of_patches_is_the_inverse():
    images, dtokens = normal(2, 6, 8, 3), normal(2, 8, 18, seed=1)
    _, vjp = jax.vjp(lambda images: patchify(images, (3, 2)), images)
    np.testing.assert_array_equal(vjp(dtokens)[0], unpatchify(dtokens, (6, 8), (3, 2)))
    _, vjp = jax.vjp(lambda tokens: unpatchify(tokens, (6, 8), (3, 2)), dtokens)
    np.testing.assert_array_equal(vjp(images)[0], patchify(images, (3, 2)))


# ---- grids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", GRIDS)
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resampling_matches_torch_with_antialias(old, new, method):
    """As timm's `resample_abs_pos_embed` calls it.

    No grid here loses all columns but one: torch 2.13 then gives the first row's value to each row.
    """
    torch = pytest.importorskip("torch")
    x = normal(old[0] * old[1], 3)
    grid = torch.tensor(np.asarray(x)).reshape(1, *old, 3).permute(0, 3, 1, 2)
    resize = partial(torch.nn.functional.interpolate, size=new, mode=method)
    expected = resize(grid, antialias=True)[0].permute(1, 2, 0).reshape(-1, 3).numpy()
    actual = resample_grid(x, old, new, method=method)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("old, new", [((2, 8), (4, 4)), ((1, 5), (1, 9))])
@pytest.mark.parametrize("method, name", [("bicubic", "cubic"), ("bilinear", "linear")])
def test_resampling_matches_jax_image(old, new, method, name):
    x = normal(*old, 3)
    expected = jax.image.resize(x, (*new, 3), name, antialias=True).reshape(-1, 3)
    actual = resample_grid(x.reshape(-1, 3), old, new, method=method)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
def test_an_unchanged_grid_is_the_same_array(dtype):
    x = normal(2 + 15, 3, dtype=dtype)
    assert resample_grid(x, (3, 5), (3, 5), prefix_tokens=2) is x
    jitted = jax.jit(lambda x: resample_grid(x, (3, 5), (3, 5), prefix_tokens=2))(x)
    np.testing.assert_array_equal(jitted, x)


@pytest.mark.parametrize("old, new", GRIDS)
def test_a_constant_grid_stays_constant(old, new):
    x = jnp.tile(normal(1, 3), (old[0] * old[1], 1))
    expected = np.tile(x[:1], (new[0] * new[1], 1))
    np.testing.assert_allclose(resample_grid(x, old, new), expected, rtol=1e-14)


def test_an_axis_resampled_is_the_same_for_every_line_and_order():
    """Rows and columns are not mixed up: a grid transposed gives the result transposed."""
    x = normal(2, 8, 3)
    wide = resample_grid(x.reshape(-1, 3), (2, 8), (5, 4)).reshape(5, 4, 3)
    tall = resample_grid(x.swapaxes(0, 1).reshape(-1, 3), (8, 2), (4, 5)).reshape(4, 5, 3)
    np.testing.assert_allclose(wide, tall.swapaxes(0, 1), rtol=1e-12, atol=1e-14)
    row = resample_grid(x[0], (1, 8), (1, 4))
    doubled = resample_grid(jnp.stack([x[0], x[0]]).reshape(-1, 3), (2, 8), (2, 4))
    np.testing.assert_allclose(doubled, np.tile(row, (2, 1)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_prefix_tokens_stay_in_front_unchanged(dtype):
    x = normal(2 + 16, 3, dtype=dtype)
    y = resample_grid(x, (2, 8), (3, 5), prefix_tokens=2)
    assert y.shape == (2 + 15, 3) and y.dtype == dtype
    np.testing.assert_array_equal(y[:2], x[:2])
    np.testing.assert_array_equal(y[2:], resample_grid(x[2:], (2, 8), (3, 5)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_is_summed_in_float32_and_rounded_once(dtype):
    x = normal(16, 3, dtype=dtype)
    expected = resample_grid(x.astype(jnp.float32), (2, 8), (4, 4)).astype(dtype)
    np.testing.assert_array_equal(resample_grid(x, (2, 8), (4, 4)), expected)
    kernel = normal(4, 2, 3, 2, dtype=dtype)
    expected = resize_patch_kernel(kernel.astype(jnp.float32), (6, 5)).astype(dtype)
    np.testing.assert_array_equal(resize_patch_kernel(kernel, (6, 5)), expected)


def test_the_gradient_of_resampling_is_its_transpose():
    assert_adjoint(lambda x: resample_grid(x, (2, 8), (4, 3), prefix_tokens=1), normal(17, 3))


# ---- patch kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "old, new", [((4, 4), (8, 8)), ((2, 5), (3, 5)), ((3, 2), (4, 9)), ((1, 1), (2, 3))]
)
def test_a_resized_kernel_sees_in_a_larger_patch_what_the_kernel_saw(old, new, method):
    kernel, patch = normal(*old, 3, 5), normal(old[0] * old[1], 3, seed=1)
    larger = resample_grid(patch, old, new, method=method)
    resized = resize_patch_kernel(kernel, new, method=method)
    np.testing.assert_allclose(
        larger.reshape(-1) @ resized.reshape(-1, 5),
        patch.reshape(-1) @ kernel.reshape(-1, 5),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("old, new", [((8, 6), (3, 4)), ((8, 3), (5, 6)), ((14, 5), (3, 1))])
def test_a_kernel_that_shrinks_is_the_least_squares_solution(old, new):
    """min ‖Wᵀ w' − w‖, with W taken whole, column by column, from `resample_grid`."""
    kernel = normal(*old, 2, 3)
    W = resample_grid(jnp.eye(old[0] * old[1]), old, new, method="bilinear")
    expected = np.linalg.lstsq(W.T, kernel.reshape(W.shape[1], -1), rcond=None)[0]
    actual = resize_patch_kernel(kernel, new).reshape(W.shape[0], -1)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_an_unchanged_kernel_is_the_same_array():
    kernel = normal(3, 3, 2, 5)
    assert resize_patch_kernel(kernel, 3) is kernel
    assert resize_patch_kernel(kernel, (3, 3)) is kernel


def test_the_gradient_of_resizing_a_kernel_is_its_transpose():
    assert_adjoint(lambda w: resize_patch_kernel(w, (3, 6)), normal(4, 5, 2, 3))


# ---- crop and pad -----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 7)] * 2), st.tuples(*[st.integers(1, 7)] * 2))
def test_crop_and_pad_keeps_the_middle_and_marks_it(old, new):
    images = 1 + np.arange(2 * old[0] * old[1] * 3.0).reshape(2, *old, 3)
    placed, valid = map(np.asarray, jax.jit(crop_and_pad, static_argnums=1)(images, new))
    assert placed.shape == (2, *new, 3) and valid.shape == (2, *new)
    rows, columns = min(old[0], new[0]), min(old[1], new[1])

    def middle(x, size):
        top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
        return x[:, top : top + rows, left : left + columns]

    np.testing.assert_array_equal(middle(placed, new), middle(images, old))
    assert middle(valid, new).all() and valid.sum() == 2 * rows * columns
    np.testing.assert_array_equal(placed != 0, np.broadcast_to(valid[..., None], placed.shape))


def test_one_axis_is_cropped_while_the_other_is_padded():
    images = jnp.arange(1, 11, dtype=jnp.uint8).reshape(1, 5, 2, 1)
    placed, valid = crop_and_pad(images, (2, 5))
    assert placed.dtype == jnp.uint8
    assert placed[0, :, :, 0].tolist() == [[0, 3, 4, 0, 0], [0, 5, 6, 0, 0]]
    assert valid[0].tolist() == [[False, True, True, False, False]] * 2


def test_the_gradient_of_crop_and_pad_is_its_transpose():
    assert_adjoint(lambda images: crop_and_pad(images, (3, 6))[0], normal(2, 5, 3, 2))


def test_a_token_is_valid_where_a_pixel_of_it_is():
    valid = np.zeros((2, 4, 6), bool)
    valid[0, 1, 2] = valid[1, 2:, :3] = True
    tokens = token_mask(jnp.asarray(valid), (2, 3))
    assert tokens.tolist() == [[True, False, False, False], [False, False, True, False]]
    assert token_mask(jnp.asarray(valid), 1).tolist() == valid.reshape(2, -1).tolist()


# ---- stem -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(0, 170), st.integers(0, 170)),
    st.lists(st.tuples(small, small), max_size=4),
)
def test_strides_halve_while_the_grid_fits(grid, excess, kernel_sizes):
    size = tuple(m + n for m, n in zip(grid, excess, strict=True))
    for n, m, axis in zip(size, grid, (0, 1), strict=True):
        for stride, k in zip(stem_strides(size, grid, kernel_sizes), kernel_sizes, strict=True):
            assert stride[axis] == (2 if k[axis] > 1 and (n + 1) // 2 >= m else 1)
            n = -(-n // stride[axis])
        assert n >= m


def _layers(*widths, side=3, dtype=jnp.float64):
    kernels = [normal(side, side, *pair, dtype=dtype) for pair in pairwise(widths)]
    return kernels, [normal(D, dtype=dtype, seed=1) for D in widths[1:]]


@pytest.mark.parametrize("size", [(28, 28), (14, 14), (7, 5), (31, 6), (8, 45), (7, 100)])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_the_same_weights_bring_any_size_to_the_grid(size, side):
    """Shapes alone need no compilation; the values are those of the tests below."""
    kernels, biases = _layers(2, 3, 4, side=side)
    images = jax.ShapeDtypeStruct((2, *size, 2), jnp.float64)
    tokens = jax.eval_shape(lambda x: conv_stem(x, kernels, biases, (7, 5)), images)
    assert tokens.shape == (2, 35, 4)


@pytest.mark.parametrize("size, grid", [((9, 8), (3, 5)), ((13, 22), (4, 3))])
def test_the_stem_is_strided_convolutions_and_an_adaptive_mean(size, grid):
    torch = pytest.importorskip("torch")
    images, (kernels, biases) = normal(2, *size, 2), _layers(2, 3, 4)
    tensor = lambda a: torch.tensor(np.asarray(a))
    x = tensor(images).permute(0, 3, 1, 2)
    strides = stem_strides(size, grid, [(3, 3), (3, 3)])
    for n, (kernel, bias, stride) in enumerate(zip(kernels, biases, strides, strict=True)):
        x = torch.relu(x) if n else x
        weight = tensor(kernel).permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, weight, tensor(bias), stride, padding=1)
    assert tuple(x.shape[2:]) != grid
    x = torch.nn.functional.adaptive_avg_pool2d(x, grid)
    expected = x.permute(0, 2, 3, 1).reshape(2, -1, 4).numpy()
    actual = conv_stem(images, kernels, biases, grid)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_stem_of_one_kernel_is_the_patch_embedding():
    images, kernel, bias = normal(2, 6, 8, 3), normal(2, 2, 3, 5), normal(5, seed=1)
    expected = patchify(images, 2) @ kernel.reshape(-1, 5) + bias[None, None]
    actual = conv_stem(images, [kernel], [bias], (3, 4))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_stem_keeps_the_dtype_of_the_images():
    def call(dtype):
        kernels, biases = _layers(2, 3, 4, dtype=dtype)
        return conv_stem(normal(1, 9, 8, 2, dtype=dtype), kernels, biases, (3, 3))

    exact, half = call(jnp.float64), call(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    error = abs(half.astype(jnp.float64) - exact).max() / abs(exact).max()
    assert error < 2e-2


# ---- transformations --------------------------------------------------------------------------


def _calls(dtype):
    """Every public function of arrays as one of one argument, with that argument."""
    kernels, biases = _layers(2, 3, dtype=dtype)
    images = normal(1, 7, 6, 2, dtype=dtype)
    return {
        "patchify": (lambda x: patchify(x, (7, 2)), images),
        "unpatchify": (lambda x: unpatchify(x, (7, 6), (7, 2)), normal(1, 3, 28, dtype=dtype)),
        "resample_grid": (lambda x: resample_grid(x, (2, 7), (4, 3)), normal(14, 2, dtype=dtype)),
        "resize_patch_kernel": (lambda w: resize_patch_kernel(w, (3, 5)), kernels[0][:2]),
        "crop_and_pad": (lambda x: crop_and_pad(x, (4, 8))[0], images),
        "token_mask": (
            lambda x: x * token_mask(x[..., 0] > 0, 1).reshape(1, 7, 6, 1).astype(x.dtype),
            images,
        ),
        "conv_stem": (lambda x: conv_stem(x[0], x[1], x[2], (3, 2)), (images, kernels, biases)),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", _calls(jnp.float32))
def test_everything_exports_for_gpu_and_tpu(name, dtype):
    function, x = _calls(dtype)[name]
    loss = lambda x: jnp.sum(function(x).astype(jnp.float32) ** 2)
    for f in (loss, jax.grad(loss)):
        jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(x)


def test_a_second_eager_call_compiles_nothing():
    compilations = []
    listener = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    calls = _calls(jnp.float32)
    for function, x in calls.values():
        function(x)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for function, x in calls.values():
            function(x)
        assert not compilations
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
        assert compilations  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


# ---- errors -----------------------------------------------------------------------------------


def _bad_calls() -> dict[str, Any]:
    images, tokens = jnp.zeros((1, 6, 8, 3)), jnp.zeros((1, 8, 18))
    table, kernel, bias = jnp.zeros((17, 2)), jnp.zeros((3, 3, 3, 4)), jnp.zeros(4)
    mask = jnp.zeros((1, 6, 8), bool)
    # unwrapped, since the type checker of the suite would be quicker
    bind = lambda function: (
        lambda *args, **options: partial(inspect.unwrap(function), *args, **options)
    )
    cut, join, resample, resize = map(
        bind, (patchify, unpatchify, resample_grid, resize_patch_kernel)
    )
    place, tokens_of, strides = map(bind, (crop_and_pad, token_mask, stem_strides))
    stem = partial(bind(conv_stem), images)
    pair = "must be (rows, columns), two integers of at least 1, or one for both"
    return {
        "patchify: `images` must be of shape (B, rows, columns, channels), got (6, 8, 3)": cut(
            images[0], 2
        ),
        "`images` must be of (rows, columns) in multiples of `patch_size` (4, 4), got (6, 8)": cut(
            images, 4
        ),
        f"`patch_size` {pair}, got 0": cut(images, 0),
        f"`patch_size` {pair}, got (2, 2, 2)": cut(images, (2, 2, 2)),
        f"`patch_size` {pair}, got 2.0": cut(images, 2.0),
        "unpatchify: `tokens` must be of shape (B, tokens, values), got (8, 18)": join(
            tokens[0], (6, 8), (3, 2)
        ),
        "`tokens` must be of shape (B, 4, a multiple of 12) for images of (6, 8) in patches of "
        "(3, 4), got (1, 8, 18)": join(tokens, (6, 8), (3, 4)),
        "`tokens` must be of shape (B, 8, a multiple of 6) for images of (6, 8) in patches of "
        "(3, 2), got (1, 8, 17)": join(tokens[..., :17], (6, 8), (3, 2)),
        "`size` must be of (rows, columns) in multiples of `patch_size` (3, 2), got (6, 7)": join(
            tokens, (6, 7), (3, 2)
        ),
        "`size` must be (rows, columns), two integers of at least 1, got 6": join(
            tokens, 6, (3, 2)
        ),
        "`embeddings` must be of 0 + 2 × 8 = 16 tokens, got 17": resample(table, (2, 8), (4, 4)),
        "resample_grid: `embeddings` must be of shape (tokens, D), got (1, 17, 2)": resample(
            table[None], (1, 17), (4, 4)
        ),
        "resample_grid: `embeddings` must be of a floating dtype, got int32": resample(
            table.astype(jnp.int32), (1, 17), (4, 4)
        ),
        "resample_grid: `method` must be 'bicubic' or 'bilinear', got 'nearest'": resample(
            table, (1, 17), (4, 4), method="nearest"
        ),
        "`old` must be (rows, columns), two integers": resample(table, (17,), (4, 4)),
        "`new` must be (rows, columns), two integers": resample(table, (1, 17), (4, 0)),
        "`prefix_tokens` must be an integer of at least 0, got -1": resample(
            table, (2, 9), (4, 4), prefix_tokens=-1
        ),
        "`kernel` must be of shape (rows, columns, channels, D), got (3, 3, 3)": resize(
            kernel[..., 0], 4
        ),
        "`kernel` must be of a floating dtype, got int32": resize(kernel.astype(jnp.int32), 4),
        "resize_patch_kernel: `method` must be 'bicubic' or 'bilinear', got 'area'": resize(
            kernel, 4, method="area"
        ),
        "resize_patch_kernel: `patch_size` must be (rows, columns)": resize(kernel, (4, 0)),
        "crop_and_pad: `images` must be of shape": place(images[0], (4, 4)),
        "crop_and_pad: `size` must be (rows, columns)": place(images, (4, -4)),
        "token_mask: `valid` must be of shape (B, rows, columns), got (1, 6, 8, 3)": tokens_of(
            images, 2
        ),
        "token_mask: `valid` must be of dtype bool, got float64": tokens_of(images[..., 0], 2),
        "token_mask: `valid` must be of (rows, columns) in multiples of": tokens_of(mask, 4),
        "conv_stem: `images` must be of shape": bind(conv_stem)(
            images[0], [kernel], [bias], (2, 2)
        ),
        "conv_stem: `images` must be of a floating dtype": bind(conv_stem)(
            images.astype(jnp.uint8), [kernel], [bias], (2, 2)
        ),
        "`images` must be of (rows, columns) of at least `grid` (7, 2), got (6, 8)": stem(
            [kernel], [bias], (7, 2)
        ),
        "conv_stem: `grid` must be (rows, columns)": stem([kernel], [bias], (7, 2, 1)),
        "`kernels` must be at least one, and as many as `biases`, got 1 and 2": stem(
            [kernel], [bias, bias], (2, 2)
        ),
        "as many as `biases`, got 0 and 0": stem([], [], (2, 2)),
        "`kernels[1]` must be of shape (rows, columns, 4, channels out), got (3, 3, 3, 4)": stem(
            [kernel, kernel], [bias, bias], (2, 2)
        ),
        "`biases[0]` must be of shape (channels out,) = (4,), got (3,)": stem(
            [kernel], [bias[:3]], (2, 2)
        ),
        "`kernels[0]` must be of the dtype of `images`, float64, got float32": stem(
            [kernel.astype(jnp.float32)], [bias], (2, 2)
        ),
        "stem_strides: `size` must be of (rows, columns) of at least `grid` (2, 9), got (6, 8)": (
            strides((6, 8), (2, 9), [(3, 3)])
        ),
        "`kernel_sizes` must be (rows, columns)": strides((6, 8), (2, 2), [(3,)]),
    }


@pytest.mark.parametrize("message, call", _bad_calls().items())
def test_a_bad_argument_is_an_error_that_names_it(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
