"""The vision transformer, its blocks and its stems; equations and axes as in `rnnattn.nn`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from rnnattn.checks import Check
from rnnattn.meshes import explicit_sharding
from rnnattn.nn.attention import LayerNorm, MultiHeadAttention
from rnnattn.patches import conv_stem, patchify, resample_grid, token_mask
from rnnattn.position import rope_2d, sinusoids
from rnnattn.precision import accumulator


class Block(nnx.Module):
    """A pre-norm block of a transformer's encoder: attention, then two layers with a GELU between.

    The GELU is exact (erf), ε of the LayerNorms is 1e-6, as in timm.

    Args:
        features, num_heads, rope: as in `MultiHeadAttention`.
        hidden: the width between the two layers.
        dropout_rate: after each of the three linear maps.
        attention_dropout_rate: on the attention weights.
        drop_path_rate: the chance, for each row of the batch, that a branch is left out; what
            stays is scaled up.
    Example:
        >>> Block(32, 4, hidden=64, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 32))).shape
        (2, 5, 32)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        hidden: int,
        rope: bool | Callable[..., Any] = False,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.xavier_uniform(), **dtypes)
        self.norm1 = LayerNorm(features, **dtypes)
        self.attention = MultiHeadAttention(
            num_heads, features, rope=rope, dropout_rate=attention_dropout_rate, rngs=rngs, **dtypes
        )
        self.norm2 = LayerNorm(features, **dtypes)
        self.fc1 = linear(features, hidden, rngs=rngs)
        self.fc2 = linear(hidden, features, rngs=rngs)
        self.dropout = _dropout(dropout_rate, rngs)
        self.drop_path = _dropout(drop_path_rate, rngs, broadcast_dims=(1, 2))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        rngs: nnx.Rngs | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Any:
        """x (B, T, D) and, if asked for, the attention weights; `options` go to the attention."""
        drop, drop_path = partial(self.dropout, rngs=rngs), partial(self.drop_path, rngs=rngs)
        attended = self.attention(
            self.norm1(x), rngs=rngs, return_weights=return_weights, **options
        )
        y, *weights = attended if return_weights else (attended,)
        x = x + drop_path(drop(y))
        hidden = drop(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        x = x + drop_path(drop(self.fc2(hidden)))
        return (x, *weights) if return_weights else x


class Activations(NamedTuple):
    """What `ViT` computes on the way, T counting the class token (the first, if there is one)."""

    embedded: Float[Array, "B T D"]  # tokens with their positions, before the first block
    blocks: tuple[Float[Array, "B T D"], ...]  # tokens after each block
    weights: tuple[Float[Array, "B N T T"], ...]  # attention weights of each block
    normalized: Float[Array, "B T D"]  # tokens after the last LayerNorm
    pooled: Float[Array, "B D"]  # what the head reads
    mask: Bool[Array, "B T"] | None  # which tokens hold valid pixels


class ViT(nnx.Module):
    """A vision transformer for images of any size, square or not.

    With `valid`, padding takes part in nothing: its pixels are set to zero, its tokens are hidden
    from attention and left out of the mean. Logits and gradients are then bit for bit independent
    of what it holds, even of NaN.

    Args:
        patch_size: in pixels, (rows, columns); one number stands for both.
        width: D, of a token.
        mlp_ratio: the hidden width of a block, in units of `width`.
        classes: how many logits.
        channels: of the images.
        image_size: in pixels, one number or (rows, columns): the size that positions refer to.
            Needed by learned positions and the convolutional stem. For images of another size
            learned positions are resampled (`rnnattn.resample_grid`); 2-D sinusoids and rotations
            stretch to it, row i of n becoming (i + ½) m/n − ½ on the grid of m, or, with None, go
            on counting patches.
        position: "learned", "sincos2d" (half of the width for rows, half for columns, of
            `rnnattn.sinusoids`), "rope2d" (`rnnattn.rope_2d` on queries and keys) or "none".
        pool: "mean" of the tokens, or "cls": a token of its own, in front.
        stem: "patch", a linear map of each patch, or "conv": `rnnattn.conv_stem`, which brings
            images of any size to the grid of `image_size` (V6), by a 3 × 3 convolution for each
            halving that the patch size takes and a 1 × 1 convolution.
        dropout_rate: of tokens, and in the blocks after each linear map.
        attention_dropout_rate: of attention weights.
        drop_path_rate: stochastic depth: the chance that a branch of the last block is left out
            for an image; it grows linearly from 0 at the first block.
        dtype: of the computation, logits included; None is that of images and weights together.
        param_dtype: of the weights.
        rngs: streams `params` and, with any dropout, `dropout`.
    Raises:
        ValueError: an option is unknown or out of range, or sizes do not divide.
    Example:
        >>> model = ViT(
        ...     patch_size=2, width=32, depth=2, num_heads=4, classes=10, channels=1, image_size=8,
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> model(jnp.ones((3, 8, 8, 1))).shape, model(jnp.ones((3, 16, 10, 1))).shape
        ((3, 10), (3, 10))
    """

    def __init__(
        self,
        *,
        patch_size: int | tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float | int = 4,
        classes: int,
        channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        position: Literal["learned", "sincos2d", "rope2d", "none"] = "learned",
        pool: Literal["mean", "cls"] = "mean",
        stem: Literal["patch", "conv"] = "patch",
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check = Check("ViT")
        check.one_of("position", position, ("learned", "sincos2d", "rope2d", "none"))
        check.one_of("pool", pool, ("mean", "cls"))
        check.one_of("stem", stem, ("patch", "conv"))
        for name, number in {"depth": depth, "classes": classes, "channels": channels}.items():
            check(number > 0, name, "at least 1", number)
        for name, rate in {"dropout_rate": dropout_rate, "drop_path_rate": drop_path_rate}.items():
            check(0 <= rate < 1, name, "in [0, 1)", rate)
        check(width % num_heads == 0, "width", f"a multiple of {num_heads} heads", width)
        K = width // num_heads
        check(position != "sincos2d" or width % 4 == 0, "width", "a multiple of 4", width)
        check(position != "rope2d" or K % 4 == 0, "width", f"{num_heads} heads times 4 n", width)
        self.patch_size = check.pair("patch_size", patch_size, or_one=True)
        self.position_scheme, self.pool, self.channels = position, pool, channels
        self.base_grid: Any = None
        if image_size is not None:
            size = check.pair("image_size", image_size, or_one=True)
            self.base_grid = self._patches("image_size", size)
        for name, value, needing in (("position", position, "learned"), ("stem", stem, "conv")):
            needs = f"given for {name} {needing!r}"
            check(self.base_grid or value != needing, "image_size", needs, None)

        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        if stem == "conv":
            self.stem = ConvStem(channels, width, self.patch_size, self.base_grid, rngs, **dtypes)
        else:
            self.stem = PatchStem(channels, width, self.patch_size, rngs, **dtypes)
        self.cls = nnx.data(None)
        if pool == "cls":
            self.cls = nnx.data(nnx.Param(jnp.zeros((1, width), param_dtype)))
        self.position = nnx.data(None)
        if position == "learned":
            tokens = math.prod(self.base_grid) + self.prefix
            draw = nnx.initializers.normal(0.02)(rngs.params(), (tokens, width), param_dtype)
            self.position = nnx.data(nnx.Param(draw))
        self.dropout = _dropout(dropout_rate, rngs)
        self.blocks = nnx.List(
            Block(
                width,
                num_heads,
                hidden=round(width * mlp_ratio),
                rope=_rotate_2d if position == "rope2d" else False,
                dropout_rate=dropout_rate,
                attention_dropout_rate=attention_dropout_rate,
                drop_path_rate=drop_path_rate * n / max(depth - 1, 1),
                rngs=rngs,
                **dtypes,
            )
            for n in range(depth)
        )
        self.norm = LayerNorm(width, **dtypes)
        zeros = nnx.initializers.zeros_init()
        self.head = nnx.Linear(width, classes, kernel_init=zeros, rngs=rngs, **dtypes)

    @overload
    def __call__(
        self,
        images: Float[Array, "B rows columns channels"],
        valid: Bool[Array, "B rows columns"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        capture: Literal[False] = False,
    ) -> Float[Array, "B classes"]: ...

    @overload
    def __call__(
        self,
        images: Float[Array, "B rows columns channels"],
        valid: Bool[Array, "B rows columns"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        capture: Literal[True],
    ) -> tuple[Float[Array, "B classes"], Activations]: ...

    def __call__(
        self,
        images: Float[Array, "B rows columns channels"],
        valid: Bool[Array, "B rows columns"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        capture: bool = False,
    ) -> Any:
        """Logits (B, classes), and with `capture` also the `Activations`.

        Args:
            valid: which pixels are of the image, as `rnnattn.crop_and_pad` gives it; a token with
                one of them is valid. For the patch stem only. An image without any reads zeros.
            rngs: the stream `dropout` to draw from in place of the module's own.
            capture: attention is then dense.
        Raises:
            ValueError: the patch size does not divide the images (crop or pad them, or use the
                convolutional stem), or a shape or dtype is off.
        """
        self._check(images, valid)
        size = (images.shape[1], images.shape[2])
        mask = None
        if valid is not None:
            images = jnp.where(valid[..., None], images, 0)
            mask = token_mask(valid, self.patch_size)
        x = self.stem(images)
        if self.cls is not None:
            cls = self.cls[...].astype(x.dtype)[None]
            shape, place = (len(x), 1, x.shape[2]), explicit_sharding(x)
            cls = jnp.broadcast_to(cls, shape, out_sharding=place)
            x = jnp.concatenate([cls, x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        table = self.position_table(size)
        if table is not None:
            x = x + table[None].astype(x.dtype)
        x = embedded = self.dropout(x, rngs=rngs)
        options = {
            "mask": None if mask is None else mask[:, None, None, :],
            "positions": self._coordinates(size) if self.position_scheme == "rope2d" else None,
        }
        blocks, weights = [], []
        for block in self.blocks:
            x = block(x, rngs=rngs, return_weights=capture, **options)
            if capture:
                x, of_block = x
                blocks.append(x)
                weights.append(of_block)
        normalized = self.norm(x)
        pooled = normalized[:, 0] if self.cls is not None else _masked_mean(normalized, mask)
        logits = self.head(pooled)
        if not capture:
            return logits
        kept = Activations(embedded, tuple(blocks), tuple(weights), normalized, pooled, mask)
        return logits, kept

    @property
    def prefix(self) -> int:
        """How many tokens stand before those of the image."""
        return int(self.pool == "cls")

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) of tokens that images of `size` have.

        Raises:
            ValueError: the patch size does not divide `size`.
        """
        if isinstance(self.stem, ConvStem):
            return self.stem.grid
        return self._patches("images", size)

    def position_table(self, size: tuple[int, int]) -> Float[Array, "T D"] | None:
        """What is added to the tokens of images of `size`; None where nothing is.

        The class token is in front, if there is one; 2-D sinusoids leave it as it is.

        Raises:
            ValueError: the patch size does not divide `size`.
        """
        if self.position_scheme == "learned":
            new = self.grid(size)
            return resample_grid(self.position[...], self.base_grid, new, prefix_tokens=self.prefix)
        if self.position_scheme != "sincos2d":
            return None
        dtype = self.head.param_dtype
        halves = [
            sinusoids(t[self.prefix :], self.head.in_features // 2, dtype=dtype)
            for t in self._coordinates(size)
        ]
        table = jnp.concatenate(halves, axis=-1)
        return jnp.pad(table, ((self.prefix, 0), (0, 0)))

    def _coordinates(self, size):
        """The row and the column of each token; of the class token, 0 and 0: no rotation."""
        grid = self.grid(size)
        axes = [
            np.arange(n, dtype=np.int32) if m in (None, n) else _stretched(n, m)
            for n, m in zip(grid, self.base_grid or (None, None), strict=True)
        ]
        return [np.pad(t.ravel(), (self.prefix, 0)) for t in np.meshgrid(*axes, indexing="ij")]

    def _patches(self, name, size):
        advice = "; `rnnattn.crop_and_pad` makes them so"
        return Check("ViT").patches(name, size, self.patch_size, advice)

    def _check(self, images, valid):
        check = Check("ViT")
        fits = images.ndim == 4 and images.shape[3] == self.channels
        check(fits, "images", f"of shape (B, rows, columns, {self.channels})", images.shape)
        check.floating("images", images)
        if valid is not None:
            check.shape("valid", valid, images.shape[:3], "(B, rows, columns)")
            served = not isinstance(self.stem, ConvStem)
            check(served, "valid", "None with the conv stem", "an array")
        self.grid(images.shape[1:3])


class PatchStem(nnx.LinearGeneral):
    """Images to tokens by a linear map of each patch; `kernel` (rows, columns, channels, D)."""

    def __init__(self, channels, width, patch_size, rngs, **dtypes):
        super().__init__((*patch_size, channels), width, axis=(-3, -2, -1), rngs=rngs, **dtypes)

    def __call__(self, images):
        tokens = patchify(images, self.in_features[:2])
        return super().__call__(tokens.reshape(*tokens.shape[:2], *self.in_features))


class ConvStem(nnx.Module):
    """Images of any size to tokens on one grid: `rnnattn.conv_stem`.

    n 3 × 3 convolutions, 2ⁿ the patch size or the next power above it, whose widths double up to
    `width`, and a 1 × 1 one.
    """

    def __init__(self, channels, width, patch_size, grid, rngs, **dtypes):
        self.grid, self.dtype = grid, dtypes["dtype"]
        halvings = max(1, math.ceil(math.log2(max(patch_size))))
        widths = [max(1, width >> n) for n in reversed(range(halvings))] + [width]
        sizes = [3] * halvings + [1]
        self.layers = nnx.List(
            nnx.Conv(before, after, (k, k), rngs=rngs, **dtypes)
            for before, after, k in zip([channels, *widths], widths, sizes, strict=False)
        )

    def __call__(self, images):
        kernels = [layer.kernel[...] for layer in self.layers]
        biases = [layer.bias[...] for layer in self.layers]
        dtype = self.dtype or jnp.result_type(images, kernels[0])
        images, kernels, biases = jax.tree.map(lambda x: x.astype(dtype), (images, kernels, biases))
        return conv_stem(images, kernels, biases, self.grid)


def _rotate_2d(x, positions):
    return rope_2d(x, *positions)


def _stretched(n, m):
    """Where the middles of n patches lie on an axis of m, in float32: u_i of `rnnattn.patches`."""
    return ((np.arange(n) + 0.5) * (m / n) - 0.5).astype(np.float32)


def _masked_mean(x, mask):
    """The mean of the tokens of x (B, T, D) that are not hidden."""
    if mask is None:
        return jnp.mean(x, axis=1)
    wide = accumulator(x.dtype)
    kept = jnp.where(mask[..., None], x, 0).astype(wide)
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(wide)
    return (kept.sum(axis=1) / count).astype(x.dtype)


def _dropout(rate, rngs, **options):
    return nnx.Dropout(rate, rngs=rngs if rate > 0 else None, **options)
