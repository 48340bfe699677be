"""A vision transformer that was trained elsewhere, fitted to a model here: to be fine-tuned."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from rnnattn import resample_grid, resize_patch_kernel
from rnnattn.interop import vit_from_google, vit_from_timm
from rnnattn.nn import ViT, load_weights


def adopt(model: ViT, arrays: Mapping[str, Any], num_heads: int) -> tuple[PyTree, list[str]] | None:
    """The model's parameters from the arrays of a file of timm's or of Google's; None of another.

    Patches of another size are resized, positions resampled to the model's grid; colours are added
    up for a model that sees grey, and a head for other classes begins anew. The model's own
    parameters change with it.

    Returns:
        The parameters, and a line for each change.

    Raises:
        ValueError: if the arrays are not those of such a model, naming all that differs.
    """
    if "patch_embed.proj.weight" in arrays:
        weights = vit_from_timm(arrays, num_heads)
    elif any(name.endswith("embedding/kernel") for name in arrays):
        weights = vit_from_google(arrays)
    else:
        return None
    changes = []
    kernel, patch = weights["stem"]["kernel"], model.patch_size
    if kernel.shape[2] == 3 and model.channels == 1:
        # what a grey image, as all three colours, would be made of it
        kernel = kernel.sum(axis=2, keepdims=True)
        changes.append("the patch kernel's three colours are added up to one grey")
    if kernel.shape[:2] != patch:
        changes.append(f"the patch kernel is resized from {_by(kernel.shape[:2])} to {_by(patch)}")
        kernel = resize_patch_kernel(kernel, patch)
    weights["stem"]["kernel"] = kernel
    prefix = int("cls" in weights)
    side = math.isqrt(len(weights["position"]) - prefix)
    old, new = (side, side), model.base_grid
    if side**2 == len(weights["position"]) - prefix and old != new:
        changes.append(f"positions are resampled from {_by(old)} to {_by(new)} patches")
        weights["position"] = resample_grid(weights["position"], old, new, prefix_tokens=prefix)
    own = nnx.to_pure_dict(nnx.state(model.head, nnx.Param))
    had, classes = len(weights["head"]["bias"]), len(own["bias"])
    if had != classes:
        changes.append(f"the head for {had:,} classes is replaced by a new one for {classes:,}")
        # as wide as the file's, so that another width is told with all the rest that differs
        width = len(weights["head"]["kernel"])
        zeros = jnp.zeros((width, classes), weights["head"]["kernel"].dtype)
        weights["head"] = {"kernel": zeros, "bias": zeros[0]}
    load_weights(model, weights)
    return nnx.state(model, nnx.Param), changes


def _by(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))
