"""The weights of a vision transformer in timm and google-research; see `rnnattn.interop`."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rnnattn.checks import Check
from rnnattn.interop.reader import flatten, read_all


def vit_from_timm(state_dict: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    """The weights of a timm `VisionTransformer`, from its `state_dict()`.

    For models with learned positions that normalise before they pool, with or without a class
    token: those of the paper, AugReg and DeiT among them.

    Args:
        num_heads: of the model; its arrays do not tell.
    Raises:
        ValueError: names are missing or unknown, or arrays have a wrong shape or dtype; all of
            them are listed. `num_heads` does not divide the width.
    Example:
        >>> from flax import nnx
        >>> from rnnattn.nn import ViT, load_weights
        >>> model = ViT(
        ...     patch_size=4, image_size=8, width=8, depth=1, num_heads=2, classes=3, pool="cls",
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> state_dict = vit_to_timm(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        >>> state_dict["blocks.0.attn.qkv.weight"].shape
        (24, 8)
        >>> load_weights(model, vit_from_timm(state_dict, num_heads=2))
    """
    function = "vit_from_timm"
    depth = _depth(state_dict, "blocks.", ".")
    arrays = read_all(function, state_dict, _timm_axes(depth, "cls_token" in state_dict))
    D, N = len(arrays["norm.weight"]), num_heads
    divides = N >= 1 and D % N == 0
    Check(function)(divides, "num_heads", f"a divisor of the width {D}", N)
    weights = {
        "stem.kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "position": arrays["pos_embed"][0],
    }
    if "cls_token" in arrays:
        weights["cls"] = arrays["cls_token"][0]
    for n in range(depth):
        ours, theirs = f"blocks.{n}.attention", f"blocks.{n}.attn"
        kernels = np.split(arrays[f"{theirs}.qkv.weight"].T, 3, axis=1)
        biases = np.split(arrays[f"{theirs}.qkv.bias"], 3)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            weights[f"{ours}.{name}.kernel"] = kernel.reshape(D, N, -1)
            weights[f"{ours}.{name}.bias"] = bias.reshape(N, -1)
        weights[f"{ours}.out.kernel"] = arrays[f"{theirs}.proj.weight"].T.reshape(N, -1, D)
        weights[f"{ours}.out.bias"] = arrays[f"{theirs}.proj.bias"]
    for theirs, ours in _timm_plain(depth).items():
        weights[ours] = arrays[theirs].T
    return _nested(weights)


def vit_to_timm(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of a timm `VisionTransformer`.

    Args:
        weights: of a `rnnattn.nn.ViT` with learned positions and the patch stem.
    Raises:
        ValueError: as `vit_from_timm` does.
    Example:
        See `vit_from_timm`.
    """
    arrays, depth = _own_arrays("vit_to_timm", weights)
    D = len(arrays["norm.scale"])
    state_dict = {
        "patch_embed.proj.weight": arrays["stem.kernel"].transpose(3, 2, 0, 1),
        "pos_embed": arrays["position"][None],
    }
    if "cls" in arrays:
        state_dict["cls_token"] = arrays["cls"][None]
    for n in range(depth):
        ours, theirs = f"blocks.{n}.attention", f"blocks.{n}.attn"
        projections = [f"{ours}.{name}" for name in ("query", "key", "value")]
        kernels = [arrays[f"{name}.kernel"].reshape(D, -1) for name in projections]
        state_dict[f"{theirs}.qkv.weight"] = np.concatenate(kernels, axis=1).T
        biases = [arrays[f"{name}.bias"].ravel() for name in projections]
        state_dict[f"{theirs}.qkv.bias"] = np.concatenate(biases)
        state_dict[f"{theirs}.proj.weight"] = arrays[f"{ours}.out.kernel"].reshape(-1, D).T
        state_dict[f"{theirs}.proj.bias"] = arrays[f"{ours}.out.bias"]
    for theirs, ours in _timm_plain(depth).items():
        state_dict[theirs] = arrays[ours].T
    return {name: np.array(array, order="C") for name, array in state_dict.items()}


def vit_from_google(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a ViT of google-research's `vision_transformer` or `big_vision`.

    Those were trained with the GELU that approximates erf by tanh; `rnnattn.nn.ViT` has the exact
    one, as timm has when it loads them: its outputs differ in the third or fourth digit.

    Args:
        weights: of the checkpoint's `.npz`, by name; a prefix "params/" or "opt/target/" is taken
            off, and what is beside it left out. Where big_vision's positions have no row for the
            class token, which it adds after them, the row is zeros.
    Raises:
        ValueError: names are missing or unknown, or arrays have a wrong shape or dtype; all of
            them are listed. There is a layer `pre_logits`, which `rnnattn.nn.ViT` does not have.
    Example:
        >>> from flax import nnx
        >>> from rnnattn.nn import ViT, load_weights
        >>> model = ViT(
        ...     patch_size=4, image_size=8, width=8, depth=1, num_heads=2, classes=3, pool="cls",
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> weights = vit_to_google(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        >>> weights["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape
        (8, 32)
        >>> load_weights(model, vit_from_google(weights))
    """
    prefixes = ("params/", "opt/target/")
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in weights)), "")
    theirs = {name[len(prefix) :]: x for name, x in weights.items() if name.startswith(prefix)}
    if any(name.startswith("pre_logits/") for name in theirs):
        raise ValueError(
            "vit_from_google: `pre_logits` is a layer that `rnnattn.nn.ViT` does not have; to "
            "fine-tune the rest, as Google does, leave its arrays out and give a head of zeros: "
            "`head/kernel` of shape (D, classes), `head/bias` of shape (classes,)"
        )
    form = "big_vision" if "pos_embedding" in theirs else "vision_transformer"
    depth = _depth(theirs, "Transformer/encoderblock_", "/")
    axes = _vit_axes(depth, "cls" in theirs)
    names = {ours: name for ours, name in _google_names(depth, form).items() if ours in axes}
    leading = {"cls": "1 1 D", "position": "1 tokens D"}
    expected = {names[ours]: leading.get(ours, shape) for ours, shape in axes.items()}
    arrays = read_all("vit_from_google", theirs, expected)
    own = {
        ours: arrays[name][0] if ours in leading else arrays[name] for ours, name in names.items()
    }
    if form == "big_vision" and "cls" in own and not _counts_class_token(own["position"]):
        own["position"] = np.pad(own["position"], ((1, 0), (0, 0)))
    return _nested(own)


def vit_to_google(
    weights: Mapping[str, Any],
    form: Literal["vision_transformer", "big_vision"] = "vision_transformer",
) -> dict[str, np.ndarray]:
    """The arrays of a ViT checkpoint of google-research, by name and without a prefix.

    Args:
        weights: of a `rnnattn.nn.ViT` with learned positions and the patch stem.
        form: whose names: those of the repository `vision_transformer` or of `big_vision`, which
            adds positions before there is a class token: the token's own is added to it.
    Raises:
        ValueError: as `vit_from_google` does; `form` is unknown.
    Example:
        See `vit_from_google`.
    """
    function = "vit_to_google"
    Check(function).one_of("form", form, ("vision_transformer", "big_vision"))
    arrays, depth = _own_arrays(function, weights)
    names = _google_names(depth, form)
    if form == "big_vision" and "cls" in arrays:
        of_class_token, grid = np.split(arrays["position"], [1])
        arrays |= {"cls": arrays["cls"] + of_class_token, "position": grid}
    leading = lambda ours, array: array[None] if ours in ("cls", "position") else array
    return {
        names[ours]: np.array(leading(ours, array), order="C") for ours, array in arrays.items()
    }


def _vit_axes(depth, has_cls):
    """The names of our own arrays, nested ones joined by dots, and their axes."""
    axes = {"norm.scale": "D", "norm.bias": "D"}
    axes |= {"cls": "1 D"} if has_cls else {}
    axes |= {"position": "tokens D", "stem.kernel": "rows columns channels D", "stem.bias": "D"}
    for n in range(depth):
        axes |= {f"blocks.{n}.norm{k}.{x}": "D" for k in (1, 2) for x in ("scale", "bias")}
        for name in ("query", "key", "value"):
            axes[f"blocks.{n}.attention.{name}.kernel"] = "D N K"
            axes[f"blocks.{n}.attention.{name}.bias"] = "N K"
        axes[f"blocks.{n}.attention.out.kernel"] = "N K D"
        axes[f"blocks.{n}.attention.out.bias"] = "D"
        axes |= {f"blocks.{n}.fc1.kernel": "D F", f"blocks.{n}.fc1.bias": "F"}
        axes |= {f"blocks.{n}.fc2.kernel": "F D", f"blocks.{n}.fc2.bias": "D"}
    return axes | {"head.kernel": "D classes", "head.bias": "classes"}


def _timm_axes(depth, has_cls):
    """The same for timm's."""
    axes = {"norm.weight": "D"}  # first, for D is learned from it
    axes |= {"cls_token": "1 1 D"} if has_cls else {}
    axes |= {"pos_embed": "1 tokens D", "patch_embed.proj.weight": "D channels rows columns"}
    for n in range(depth):
        attention = {"qkv.weight": "3D D", "qkv.bias": "3D", "proj.weight": "D D", "proj.bias": "D"}
        axes |= {f"blocks.{n}.attn.{name}": shape for name, shape in attention.items()}
    own = _vit_axes(depth, has_cls)
    transposed = lambda name: " ".join(reversed(own[name].split()))
    return axes | {theirs: transposed(ours) for theirs, ours in _timm_plain(depth).items()}


def _timm_plain(depth):
    """timm's names, and ours, of the arrays that are transposed and no more."""
    modules = {"norm": ("norm", "scale"), "head": ("head", "kernel")}
    for n in range(depth):
        for k in (1, 2):
            modules[f"blocks.{n}.norm{k}"] = (f"blocks.{n}.norm{k}", "scale")
            modules[f"blocks.{n}.mlp.fc{k}"] = (f"blocks.{n}.fc{k}", "kernel")
    names = {"patch_embed.proj.bias": "stem.bias"}
    for theirs, (ours, weight) in modules.items():
        names |= {f"{theirs}.weight": f"{ours}.{weight}", f"{theirs}.bias": f"{ours}.bias"}
    return names


def _google_names(depth, form):
    """Google's name for each of ours."""
    number = {
        "vision_transformer": {"attention": 1, "norm2": 2, "mlp": 3},
        "big_vision": {"attention": 0, "norm2": 1, "mlp": 0},
    }[form]
    position = "Transformer/posembed_input/pos_embedding"
    fixed = {"cls": "cls", "position": "pos_embedding" if form == "big_vision" else position}
    modules = {"norm": "Transformer/encoder_norm", "stem": "embedding", "head": "head"}
    for n in range(depth):
        ours, theirs = f"blocks.{n}", f"Transformer/encoderblock_{n}"
        attention = f"{theirs}/MultiHeadDotProductAttention_{number['attention']}"
        modules |= {
            f"{ours}.norm1": f"{theirs}/LayerNorm_0",
            f"{ours}.norm2": f"{theirs}/LayerNorm_{number['norm2']}",
            f"{ours}.fc1": f"{theirs}/MlpBlock_{number['mlp']}/Dense_0",
            f"{ours}.fc2": f"{theirs}/MlpBlock_{number['mlp']}/Dense_1",
        }
        for name in ("query", "key", "value", "out"):
            modules[f"{ours}.attention.{name}"] = f"{attention}/{name}"
    renamed = lambda ours: "/".join([modules[ours.rpartition(".")[0]], ours.rpartition(".")[2]])
    return {ours: fixed.get(ours) or renamed(ours) for ours in _vit_axes(depth, True)}


def _counts_class_token(position):
    """Whether it is one row more than a square grid: big_vision's own rule for old files."""
    return math.isqrt(len(position) - 1) ** 2 == len(position) - 1


def _depth(weights, before, after):
    """How many blocks the names tell of, at least one."""
    of_blocks = [name for name in weights if name.startswith(before)]
    numbers = {name.removeprefix(before).partition(after)[0] for name in of_blocks}
    return max(sum(number.isdecimal() for number in numbers), 1)


def _own_arrays(function, weights):
    """Our nested weights in NumPy, by joined names, checked; and the number of blocks."""
    flat = flatten(weights)
    depth = _depth(flat, "blocks.", ".")
    return read_all(function, flat, _vit_axes(depth, "cls" in flat)), depth


def _nested(flat):
    """{"blocks.0.fc1.bias": a} → {"blocks": {0: {"fc1": {"bias": a}}}}, with copies in JAX."""
    tree: dict[Any, Any] = {}
    for name, array in flat.items():
        *path, last = (int(part) if part.isdecimal() else part for part in name.split("."))
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = jnp.array(array)
    return tree
