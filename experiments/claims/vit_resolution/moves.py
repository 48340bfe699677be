"""The ways from a vision transformer for small images to one for images twice as large (V2–V6)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

import rnnattn
from experiments.engine.training import Loss
from experiments.models.vit import Shape, ViTConfig, build, functional, loss_of
from rnnattn.nn import ViT, load_weights

Method = Literal["learned", "sincos2d", "rope2d", "crop", "pad", "conv", "kernel"]

MOVES = {
    "learned": "learned grid, interpolated",
    "sincos2d": "2-D sinusoids, stretched",
    "rope2d": "2-D rotary, stretched",
    "crop": "cropped to the small size",
    "pad": "padded small images, masked",
    "conv": "convolutional stem",
    "kernel": "patch kernel, resized",
}
"""The ways from small images to large ones."""


class Network(NamedTuple):
    """A model whatever its weights, and how it takes its images."""

    config: ViTConfig
    shape: Shape
    """Of the images that its positions refer to."""
    classes: int
    model: ViT
    apply: Callable[..., Any]
    loss: Loss


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Images (B, rows, columns, channels) at half their size: the mean of each 2 × 2 pixels."""
    B, rows, columns, channels = pixels.shape
    squares = pixels.reshape(B, rows // 2, 2, columns // 2, 2, channels)
    return squares.mean(axis=(2, 4), dtype=pixels.dtype)


def make_network(
    config: ViTConfig, shape: Shape, classes: int, fit_to: tuple[int, int] | None = None
) -> Network:
    """The network whose positions refer to images of `shape`.

    Args:
        fit_to: all images are cropped and padded to it, and the padding is masked.
    """
    model = build(config, shape, classes)
    _, plain = functional(model)

    def apply(params, pixels, key=None, **options):
        if fit_to is None:
            return plain(params, pixels, key, **options)
        fitted, valid = rnnattn.crop_and_pad(pixels, fit_to)
        return plain(params, fitted, key, valid=valid, **options)

    return Network(config, shape, classes, model, apply, loss_of(apply))


def make_networks(
    model: ViTConfig, methods: Sequence[str], shape: Shape, classes: int
) -> dict[str, tuple[Network, Network]]:
    """By method, the networks for small images and for whole ones of `shape`."""
    rows, columns, channels = shape
    half = (rows // 2, columns // 2, channels)
    # methods that share a network share its training and its compiled steps
    network = cache(make_network)
    networks: dict[str, tuple[Network, Network]] = {}
    for method in methods:
        small, whole = configs_of(model, method)
        if method == "pad":
            both = network(whole, shape, classes, fit_to=shape[:2])
            networks[method] = both, both
        elif method == "crop":
            cropped = network(small, half, classes, fit_to=half[:2])
            networks[method] = network(small, half, classes), cropped
        else:
            # the stem's grid, and what sinusoids and rotations are stretched to, stay those of
            # small images
            own = shape if method in ("learned", "kernel") else half
            networks[method] = network(small, half, classes), network(whole, own, classes)
    return networks


def move(method: str, small: Network, whole: Network, params: Any) -> Any:
    """The parameters of the network for small images, for that of whole ones."""
    tree = nnx.to_pure_dict(params)
    if method == "kernel":
        kernel = tree["stem"]["kernel"]
        tree["stem"]["kernel"] = rnnattn.resize_patch_kernel(kernel, whole.model.patch_size)
    if method == "learned":
        old, new = (network.model.grid(network.shape[:2]) for network in (small, whole))
        position, prefix = tree["position"], small.model.prefix
        tree["position"] = rnnattn.resample_grid(position, old, new, prefix_tokens=prefix)
    model = nnx.clone(whole.model)
    load_weights(model, tree)
    return functional(model)[0]


def configs_of(model: ViTConfig, method: str) -> tuple[ViTConfig, ViTConfig]:
    """The model for small images, and that for whole ones."""
    position = method if method in ("sincos2d", "rope2d") else "learned"
    stem = "conv" if method == "conv" else "patch"
    small = replace(model, position=position, stem=stem)  # type: ignore[arg-type]
    larger = 2 * small.patch_size if method == "kernel" else small.patch_size
    return small, replace(small, patch_size=larger)
