"""Images of any size as tokens: patches, resampled grids, padding with a mask, and a stem.

A patch of p × q pixels is a token (V1), in an image whose grid has G columns of patches:

    tokens[b, i·G + j, (r·q + c)·channels + k] = images[b, i·p + r, j·q + c, k]

An axis of n points is resampled to m by a matrix, y = W x, whose rows sum to 1:

    W[i, j] ∝ κ((j − u_i) / s)     u_i = (i + ½) n/m − ½     s = max(1, n/m)
    bilinear   κ(t) = 1 − |t| for |t| ≤ 1
    bicubic    κ(t) = 3/2 |t|³ − 5/2 t² + 1 for |t| ≤ 1,  −1/2 |t|³ + 5/2 t² − 4 |t| + 2 for |t| ≤ 2

u_i is where the middle of pixel i of the new axis lies on the old one; s widens the kernel where
the axis shrinks, which is the antialiasing. The bicubic kernel is that of Keys (1981) with a = −½,
as in torch with `antialias=True` and in `jax.image.resize`. Without it torch takes a = −¾, s = 1
and repeats the border: another matrix whether the axis shrinks or grows. A linear map w of a patch
x becomes one of the resized patch W x by the pseudo-inverse (FlexiViT, Beyer et al. 2022):

    w' = (W⁺)ᵀ w     ⟨w', W x⟩ = ⟨w, x⟩ wherever the patch does not shrink

Every size is (rows, columns) in Python integers, and no grid, patch or image need be square.

Axes: B batch, D width of a token; rows, columns and channels of an image by their names.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from rnnattn.checks import Check
from rnnattn.meshes import explicit_mesh, in_parts
from rnnattn.precision import accumulator

Pair = Sequence[SupportsIndex] | np.ndarray  # (rows, columns)
Size = SupportsIndex | Pair  # one number stands for both


def patchify(
    images: Shaped[Array, "B rows columns channels"], patch_size: Size
) -> Shaped[Array, "B tokens values"]:
    """Cut each image into patches, and lay each patch out as one row (V1).

    The grid of patches is read row by row, and so are the pixels of a patch; a pixel's channels
    lie side by side. So a convolution of stride `patch_size` whose kernel has the shape
    (*patch_size, channels, D) is `patchify(images, patch_size) @ kernel.reshape(-1, D)`.

    Args:
        patch_size: in pixels, (rows, columns); one number stands for both.
    Raises:
        ValueError: `patch_size` does not divide the image, or a shape is off.
    Gradient:
        `unpatchify` of the cotangent.
    Example:
        >>> patchify(jnp.zeros((2, 6, 8, 3)), (3, 2)).shape  # 2 × 4 patches
        (2, 8, 18)
    """
    check = Check("patchify")
    check.axes("images", images, "(B, rows, columns, channels)")
    p, q = check.pair("patch_size", patch_size, or_one=True)
    check.patches("images", images.shape[1:3], (p, q))
    return _on_mesh("patchify", _patchify, (p, q), _IMAGES, "B", images=images)


def _patchify(patch_size, images):
    B, *size, channels = images.shape
    (p, q), (rows, columns) = patch_size, (n // m for n, m in zip(size, patch_size, strict=True))
    split = images.reshape(B, rows, p, columns, q, channels)
    return split.swapaxes(2, 3).reshape(B, rows * columns, p * q * channels)


def unpatchify(
    tokens: Shaped[Array, "B tokens values"],
    size: Pair,
    patch_size: Size,
) -> Shaped[Array, "B rows columns channels"]:
    """The images that `patchify` cut into `tokens`, bit for bit.

    Args:
        size: of the images, in pixels.
        patch_size: as in `patchify`.
    Raises:
        ValueError: `patch_size` does not divide `size`, or `tokens` is not what such images give.
    Gradient:
        `patchify` of the cotangent.
    Example:
        >>> images = jnp.arange(96.0).reshape(1, 6, 8, 2)
        >>> bool((unpatchify(patchify(images, 2), (6, 8), 2) == images).all())
        True
    """
    check = Check("unpatchify")
    check.axes("tokens", tokens, "(B, tokens, values)")
    _, count, values = tokens.shape
    p, q = check.pair("patch_size", patch_size, or_one=True)
    size = check.pair("size", size)
    rows, columns = check.patches("size", size, (p, q))
    shape = f"(B, {rows * columns}, a multiple of {p * q})"
    expected = f"of shape {shape} for images of {size} in patches of {(p, q)}"
    fits = count == rows * columns and values % (p * q) == 0
    check(fits, "tokens", expected, tokens.shape)
    return _on_mesh("unpatchify", _unpatchify, (size, (p, q)), _TOKENS, "B", tokens=tokens)


def _unpatchify(sizes, tokens):
    B, _, values = tokens.shape
    (height, width), (p, q) = sizes
    split = tokens.reshape(B, height // p, width // q, p, q, values // (p * q))
    return split.swapaxes(2, 3).reshape(B, height, width, values // (p * q))


def resample_grid(
    embeddings: Float[Array, "old_tokens D"],
    old: Pair,
    new: Pair,
    *,
    method: Literal["bicubic", "bilinear"] = "bicubic",
    prefix_tokens: SupportsIndex = 0,
) -> Float[Array, "new_tokens D"]:
    """Position embeddings learned on the grid `old`, for the grid `new` (V2, V4).

    y = (W_rows ⊗ W_columns) x, with antialiasing. Bicubic is what timm's `resample_abs_pos_embed`
    computes. For 16-bit embeddings the sums are float32.

    Args:
        embeddings: those of the grid row by row, after the `prefix_tokens`.
        prefix_tokens: how many lead that have no place on the grid, as a class token; they come
            back unchanged, in front.
    Returns:
        `embeddings` itself where `old` is `new`.
    Raises:
        ValueError: the number of embeddings is not that of `old`, `method` is unknown, or a size
            or shape is off.
    Gradient:
        The map is linear: (W_rows ⊗ W_columns)ᵀ of the cotangent.
    Example:
        >>> table = jnp.ones((1 + 2 * 8, 5))
        >>> resample_grid(table, (2, 8), (4, 4), prefix_tokens=1).shape
        (17, 5)
    """
    check = Check("resample_grid")
    check.axes("embeddings", embeddings, "(tokens, D)")
    check.floating("embeddings", embeddings)
    old, new = check.pair("old", old), check.pair("new", new)
    check.one_of("method", method, _METHODS)
    prefix_tokens = check.integer("prefix_tokens", prefix_tokens, 0)
    tokens = prefix_tokens + old[0] * old[1]
    expected = f"of {prefix_tokens} + {old[0]} × {old[1]} = {tokens} tokens"
    check(len(embeddings) == tokens, "embeddings", expected, len(embeddings))
    if old == new:
        return embeddings
    how = (old, new, method, prefix_tokens)
    given = {"embeddings": embeddings}
    return _on_mesh("resample_grid", _resample_grid, how, _EMBEDDINGS, ".D", **given)


@partial(jax.jit, static_argnums=0)
def _resample_grid(how, embeddings):
    old, new, method, prefix_tokens = how
    prefix, grid = embeddings[:prefix_tokens], embeddings[prefix_tokens:]
    grid = _resize(grid.reshape(1, *old, -1), new, _METHODS[method])
    return jnp.concatenate([prefix, grid.reshape(new[0] * new[1], -1)])


def resize_patch_kernel(
    kernel: Float[Array, "rows columns channels D"],
    patch_size: Size,
    *,
    method: Literal["bicubic", "bilinear"] = "bilinear",
) -> Float[Array, "new_rows new_columns channels D"]:
    """The patch embedding `kernel` for patches of another size (V2).

    w' = (W⁺)ᵀ w: on patches resized by the same `method`, tokens stay what they were where no axis
    shrinks. Where one shrinks, w' is the nearest to it in the least-squares sense, over patches of
    independent pixels. A chain of resizings loses what its smallest patch cannot hold: resize from
    the master kernel. A bias needs no change.

    Args:
        kernel: as of a convolution; the weights of a linear map after `patchify` are
            `kernel.reshape(-1, D)`.
        patch_size: the new one, in pixels; one number stands for both axes.
        method: how the images are resized, with antialiasing. Bilinear is that of the paper, timm
            takes bicubic.
    Returns:
        `kernel` itself where the size is unchanged.
    Raises:
        ValueError: `method` is unknown, or a size or shape is off.
    Gradient:
        The map is linear: W⁺ of the cotangent.
    Example:
        >>> resize_patch_kernel(jnp.ones((4, 4, 3, 8)), (6, 5)).shape
        (6, 5, 3, 8)
    """
    check = Check("resize_patch_kernel")
    check.axes("kernel", kernel, "(rows, columns, channels, D)")
    check.floating("kernel", kernel)
    check.one_of("method", method, _METHODS)
    new = check.pair("patch_size", patch_size, or_one=True)
    if kernel.shape[:2] == new:
        return kernel
    how = (new, method)
    function = "resize_patch_kernel"
    return _on_mesh(function, _resize_patch_kernel, how, _KERNEL, "..CD", kernel=kernel)


@partial(jax.jit, static_argnums=0)
def _resize_patch_kernel(how, kernel):
    new, method = how
    # the pseudo-inverse of a Kronecker product is that of its factors: one small one for each axis
    weights = lambda n, m: np.linalg.pinv(_METHODS[method](n, m)).T
    rows, columns, channels, D = kernel.shape
    resized = _resize(kernel.reshape(1, rows, columns, channels * D), new, weights)
    return resized.reshape(*new, channels, D)


def crop_and_pad(
    images: Shaped[Array, "B rows columns channels"], size: Pair
) -> tuple[Shaped[Array, "B new_rows new_columns channels"], Bool[Array, "B new_rows new_columns"]]:
    """The images at `size`, cut where they are larger and padded with zeros where smaller (V5).

    Each axis by itself, about the middle: of an odd difference the last row or column is the one
    more that is cut or padded, as in `tf.image.resize_with_crop_or_pad`.

    Args:
        size: in pixels.
    Returns:
        The images, and which pixels are theirs: False is padding. Images of different sizes, each
        brought to one `size`, can then be concatenated to a batch, and so can their masks.
    Raises:
        ValueError: `size` or the shape is off.
    Gradient:
        The cotangent, cut where the images were padded and zero where they were cut.
    Example:
        >>> images, valid = crop_and_pad(jnp.ones((1, 5, 2, 3)), (3, 4))
        >>> images.shape, valid[0].astype(int).tolist()
        ((1, 3, 4, 3), [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    """
    check = Check("crop_and_pad")
    check.axes("images", images, "(B, rows, columns, channels)")
    size = check.pair("size", size)
    return _on_mesh("crop_and_pad", _crop_and_pad, size, _IMAGES, ("B", "B"), images=images)


@partial(jax.jit, static_argnames="size")
def _crop_and_pad(size, images):
    margins = []  # before and after, negative where the image is cut
    for n, m in zip(images.shape[1:3], size, strict=True):
        before = int((m - n) / 2)
        margins.append((before, m - n - before, 0))
    place = lambda x, margins: lax.pad(x, jnp.zeros((), x.dtype), margins)
    valid = place(jnp.ones(images.shape[:3], bool), [(0, 0, 0), *margins])
    return place(images, [(0, 0, 0), *margins, (0, 0, 0)]), valid


def token_mask(valid: Bool[Array, "B rows columns"], patch_size: Size) -> Bool[Array, "B tokens"]:
    """Which tokens of `patchify` hold at least one valid pixel (V5).

    A token with some valid pixels is valid, and carries its padding with it: what that holds must
    be fixed, as `crop_and_pad` leaves it, or `jnp.where(valid[..., None], images, 0)` makes it.

    Args:
        valid: True for a pixel of the image, False for padding.
        patch_size: as in `patchify`.
    Raises:
        ValueError: `patch_size` does not divide the mask, or its shape or dtype is off.
    Example:
        >>> _, valid = crop_and_pad(jnp.ones((1, 4, 2, 3)), (4, 8))
        >>> token_mask(valid, 2).tolist()  # padding, half padding, half padding, padding
        [[False, True, True, False, False, True, True, False]]
    """
    check = Check("token_mask")
    check.axes("valid", valid, "(B, rows, columns)")
    check.booleans("valid", valid)
    patch_size = check.pair("patch_size", patch_size, or_one=True)
    check.patches("valid", valid.shape[1:], patch_size)
    return patchify(valid[..., None], patch_size).any(axis=-1)


def conv_stem(
    images: Float[Array, "B rows columns channels"],
    kernels: Sequence[Float[Array, "..."]],
    biases: Sequence[Float[Array, "..."]],
    grid: Pair,
) -> Float[Array, "B tokens D"]:
    """Strided convolutions, then a mean, that bring images of any size to the `grid` (V6).

    The convolutions have a ReLU between them, none after the last (Xiao et al. 2021 end with a
    1 × 1 kernel), and strides that depend on the size of the images (`stem_strides`), so that the
    same weights serve all sizes. The mean takes what is left of n rows to m, and so the columns:
    row i is the mean of the rows from ⌊i n/m⌋ up to ⌈(i + 1) n/m⌉, as in torch's
    `adaptive_avg_pool2d`; it is taken in float32 for 16-bit images.

    Args:
        kernels: each (rows, columns, channels in, channels out), in the order they are applied.
            Zeros pad the image, (k − 1) // 2 before and k // 2 after an axis.
        biases: one (channels out,) for each kernel.
        grid: of the tokens, which come row by row.
    Raises:
        ValueError: the images are smaller than the grid, or a shape, dtype or size is off.
    Gradient:
        JAX's own, with respect to the images, kernels and biases.
    Example:
        >>> kernels = [jnp.ones((3, 3, 1, 4)), jnp.ones((3, 3, 4, 8))]
        >>> biases = [jnp.zeros(4), jnp.zeros(8)]
        >>> [conv_stem(jnp.ones((2, *size, 1)), kernels, biases, (7, 5)).shape
        ...  for size in ((28, 28), (17, 5))]
        [(2, 35, 8), (2, 35, 8)]
    """
    check = Check("conv_stem")
    check.axes("images", images, "(B, rows, columns, channels)")
    check.floating("images", images)
    _check_layers(check, images, kernels, biases)
    grid = check.pair("grid", grid)
    _check_covers(check, "images", images.shape[1:3], grid)
    given = {"images": images, "kernels": tuple(kernels), "biases": tuple(biases)}
    return _on_mesh("conv_stem", _conv_stem, grid, _IMAGES, "B", **given)


@partial(jax.jit, static_argnums=0)
def _conv_stem(grid, images, kernels, biases):
    x = images
    strides = stem_strides(x.shape[1:3], grid, [kernel.shape[:2] for kernel in kernels])
    for n, (kernel, bias, stride) in enumerate(zip(kernels, biases, strides, strict=True)):
        x = jax.nn.relu(x) if n > 0 else x
        # not "SAME", which shifts the window by a pixel between even and odd sizes
        padding = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
        layout = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=layout)
        x = x + bias[None, None, None, :]
    if x.shape[1:3] != grid:
        x = _resize(x, grid, _mean)
    return x.reshape(x.shape[0], grid[0] * grid[1], x.shape[3])


def stem_strides(
    size: Pair, grid: Pair, kernel_sizes: Sequence[Pair]
) -> tuple[tuple[int, int], ...]:
    """The strides of `conv_stem` for images of `size`, a (rows, columns) for each kernel.

    Along each axis a convolution halves n to ⌈n/2⌉ if the grid still fits into that and the kernel
    covers the step, being two pixels or more; else its stride there is 1.

    Args:
        size: of the images, in pixels.
        grid: of the tokens.
        kernel_sizes: in pixels, in the order of the convolutions.
    Raises:
        ValueError: `size` is smaller than `grid`, or not a size.
    Example:
        >>> stem_strides((28, 14), (7, 7), [(3, 3), (3, 3), (1, 1)])
        ((2, 2), (2, 1), (1, 1))
    """
    check = Check("stem_strides")
    size, grid = check.pair("size", size), check.pair("grid", grid)
    kernels = [check.pair("kernel_sizes", kernel) for kernel in kernel_sizes]
    _check_covers(check, "size", size, grid)
    rows = _axis_strides(size[0], grid[0], [kernel[0] for kernel in kernels])
    columns = _axis_strides(size[1], grid[1], [kernel[1] for kernel in kernels])
    return tuple(zip(rows, columns, strict=True))


def _axis_strides(n, m, kernel_sizes):
    strides = []
    for k in kernel_sizes:
        half = -(-n // 2)
        halved = k >= 2 and half >= m
        n = half if halved else n
        strides.append(2 if halved else 1)
    return strides


# ---- resizing by a matrix for each axis -------------------------------------------------------


def _bilinear(t):
    return np.maximum(1 - abs(t), 0)


def _bicubic(t):
    t = abs(t)
    inner = 1.5 * t**3 - 2.5 * t**2 + 1
    outer = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t <= 1, inner, np.where(t <= 2, outer, 0))


def _interpolation(kernel, n, m):
    """W (m, n) of the module's equations; in float64, whatever it will be applied to."""
    u = (np.arange(m) + 0.5) * (n / m) - 0.5
    w = kernel((np.arange(n) - u[:, None]) / max(1, n / m))
    return w / w.sum(axis=1, keepdims=True)


_METHODS = {
    "bicubic": partial(_interpolation, _bicubic),
    "bilinear": partial(_interpolation, _bilinear),
}


def _mean(n, m):
    """(m, n): row i is the mean of the points from ⌊i n/m⌋ up to ⌈(i + 1) n/m⌉."""
    i, j = np.arange(m)[:, None], np.arange(n)
    w = ((i * n // m <= j) & (j < -(-(i + 1) * n // m))).astype(float)
    return w / w.sum(axis=1, keepdims=True)


def _resize(images, new, weights):
    """`images` (B, rows, columns, D) at another size, each axis by its matrix `weights(n, m)`."""
    dtype = accumulator(images.dtype)
    rows, columns = (
        jnp.asarray(weights(n, m), dtype) for n, m in zip(images.shape[1:3], new, strict=True)
    )
    # in full precision: by default an accelerator rounds the factors, whose rows then no longer sum
    # to 1
    exact = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    return exact("ir,jc,brcd->bijd", rows, columns, images.astype(dtype)).astype(images.dtype)


# ---- on meshes of explicit axes ---------------------------------------------------------------


class _Axes(NamedTuple):
    """An argument and the letters of its axes; which of them are divided, and which may not be."""

    argument: str
    letters: str
    divided: str
    whole: tuple[tuple[str, str], ...] = ()


_IMAGES = _Axes("images", "Brck", "B", (("r", "rows"), ("c", "columns"), ("k", "channels")))
_TOKENS = _Axes("tokens", "Btv", "B", (("t", "tokens"), ("v", "values")))
_EMBEDDINGS = _Axes("embeddings", "tD", "D")
_KERNEL = _Axes("kernel", "rcCD", "D")


def _on_mesh(function, run, static, axes, results, **given):
    """`run(static, …)` of the arguments, on a mesh of explicit axes in parts."""
    if explicit_mesh(given) is None:
        return run(static, **given)
    return _run_in_parts(function, run, static, axes, results, given)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_in_parts(function, run, static, axes, results, given):
    letters = dict.fromkeys(given, "") | {axes.argument: axes.letters}
    run_parts = lambda given: run(static, **given)
    check, whole = Check(function), dict(axes.whole)
    return in_parts(check, run_parts, given, letters, results, divided=axes.divided, whole=whole)


# ---- checks -----------------------------------------------------------------------------------


def _check_covers(check, name, size, grid):
    covers = size[0] >= grid[0] and size[1] >= grid[1]
    check(covers, name, f"of (rows, columns) of at least `grid` {grid}", tuple(size))


def _check_layers(check, images, kernels, biases):
    paired = kernels and len(kernels) == len(biases)
    expected = "at least one, and as many as `biases`"
    check(paired, "kernels", expected, f"{len(kernels)} and {len(biases)}")
    channels = images.shape[3]
    for n, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        fits = jnp.ndim(kernel) == 4 and kernel.shape[2] == channels
        axes = f"(rows, columns, {channels}, channels out)"
        check(fits, f"kernels[{n}]", f"of shape {axes}", jnp.shape(kernel))
        channels = kernel.shape[3]
        check.shape(f"biases[{n}]", bias, (channels,), "(channels out,)")
        check.dtype_of(f"kernels[{n}]", kernel, "images", images)
        check.dtype_of(f"biases[{n}]", bias, "images", images)
