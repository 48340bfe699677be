"""Weights from and to torch, Keras, Flax, Haiku and ONNX; those of a ViT, timm and Google's.

All LSTMs compute z = x w_x + h w_h + b, and lay it out in their own way:

    rnnattn     gates i, f, g, o    w_x (D, 4H), w_h (R, 4H)         one bias
    torch       gates i, f, g, o    transposed                       two biases, added
    Keras       gates i, f, g, o    as here                          one bias
    Flax        gates i, f, g, o    as here, or one array a gate     one bias, with w_h
    Haiku       gates i, g, f, o    w_x above w_h in one array       one bias; 1 is added to f's
    ONNX        gates i, o, f, g    transposed, a leading axis       two biases, joined; peepholes
                                    for the directions               in the order i, o, f

Each format is a plain mapping from names to arrays (anything `numpy.asarray` takes), so none of
these packages is imported. What is read is copied, what is written is NumPy. The dtype is kept,
but for float64 where `jax_enable_x64` is off: JAX then makes it float32. An import of an export
gives the same numbers, exactly, but for Haiku's forget bias.

The weights of a ViT are a nested dictionary here, as `rnnattn.nn.load_weights` takes it: `stem`,
`cls` (for pool "cls"), `position` (learned), `blocks` by number, each with `norm1`, `attention`,
`norm2`, `fc1` and `fc2`, then `norm` and `head`. Kernels multiply on the right: (in, out). timm's
are transposed, with query, key and value in one array; Google's are as here, under other names.

Axes: D input width, H hidden width, R projected width (H without projection); in a ViT, D width
of a token, F hidden width of a block, N heads, K head width.
Sources: the documentation of `torch.nn.LSTM` and of the ONNX operator `LSTM`; the code of
`keras.layers.LSTM`, `flax.linen.LSTMCell`, `flax.nnx.LSTMCell` and `haiku.LSTM`; for ViTs that of
timm's `vision_transformer.py`, which names what google-research's `vision_transformer` and
`big_vision` store.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rnnattn.cell import LSTMParams


def lstm_from_torch(
    state_dict: Mapping[str, Any], layer: int = 0, reverse: bool = False
) -> LSTMParams:
    """One layer and direction of a `torch.nn.LSTM`, or an `LSTMCell`, from its `state_dict()`.

    The two biases are added; a module with `bias=False` has zeros.

    Args:
        state_dict: with the names of the module itself, without a prefix; a cell's are without
            the number of a layer.
        reverse: the backward direction of a bidirectional module.
    Raises:
        ValueError: a key is missing, is not one of an LSTM, or its array has a wrong shape or
            dtype. Keys of other layers and directions are not looked at.
    Example:
        >>> weights = {"weight_ih_l0": np.ones((20, 3)), "weight_hh_l0": np.ones((20, 5))}
        >>> biases = {"bias_ih_l0": np.ones(20), "bias_hh_l0": np.ones(20)}
        >>> params = lstm_from_torch(weights | biases)
        >>> params.w_x.shape, params.w_h.shape, float(params.b[0])
        ((3, 20), (5, 20), 2.0)
    """
    suffix = _torch_suffix(layer, reverse)
    if suffix == "_l0" and "weight_hh" in state_dict:  # a cell's
        suffix = ""
    own = {key: value for key, value in state_dict.items() if key.endswith(suffix)}
    has_bias = any(key.startswith("bias_") for key in state_dict)
    has_projection = "weight_hr" + suffix in own
    read = _Reader("lstm_from_torch", own or state_dict)
    w_h = read("weight_hh" + suffix, "4H R" if has_projection else "4H H")
    w_x = read("weight_ih" + suffix, "4H D")
    b = np.zeros(len(w_h), w_h.dtype)
    if has_bias:
        b = read("bias_ih" + suffix, "4H") + read("bias_hh" + suffix, "4H")
    projection = read("weight_hr" + suffix, "R H").T if has_projection else None
    read.finish()
    return _params(w_x.T, w_h.T, b, projection=projection)


def lstm_to_torch(
    params: LSTMParams, layer: int = 0, reverse: bool = False
) -> dict[str, np.ndarray]:
    """The entries of a `torch.nn.LSTM`'s state dict for one layer and direction.

    The bias is `bias_ih`; `bias_hh` is zero.

    Raises:
        ValueError: `params` has peepholes, or an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in lstm_to_torch(params).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'weight_ih_l0': (20, 3), 'weight_hh_l0': (20, 5), 'bias_ih_l0': (20,),
         'bias_hh_l0': (20,)}
    """
    suffix = _torch_suffix(layer, reverse)
    w_x, w_h, b, _, projection = _arrays("lstm_to_torch", params, "projection")
    weights = {"weight_ih": w_x.T, "weight_hh": w_h.T, "bias_ih": b, "bias_hh": np.zeros_like(b)}
    if projection is not None:
        weights["weight_hr"] = projection.T
    return {key + suffix: np.array(value, order="C") for key, value in weights.items()}


def lstm_from_keras(weights: Mapping[str, Any]) -> LSTMParams:
    """A Keras `LSTM` or `LSTMCell`, from `{w.name: w for w in layer.cell.weights}`.

    Args:
        weights: "kernel", "recurrent_kernel" and "bias"; no bias (`use_bias=False`) is zeros.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> weights = {"kernel": np.ones((3, 20)), "recurrent_kernel": np.ones((5, 20))}
        >>> lstm_from_keras(weights).b.shape
        (20,)
    """
    read = _Reader("lstm_from_keras", weights)
    w_h = read("recurrent_kernel", "H 4H")
    w_x = read("kernel", "D 4H")
    b = read("bias", "4H") if "bias" in weights else np.zeros(w_h.shape[1], w_h.dtype)
    read.finish()
    return _params(w_x, w_h, b)


def lstm_to_keras(params: LSTMParams) -> dict[str, np.ndarray]:
    """The weights of a Keras `LSTM`, in the order that its `set_weights` takes.

    Raises:
        ValueError: `params` has peepholes or a projection, or an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> list(lstm_to_keras(params))
        ['kernel', 'recurrent_kernel', 'bias']
    """
    w_x, w_h, b, *_ = _arrays("lstm_to_keras", params)
    return {"kernel": w_x.copy(), "recurrent_kernel": w_h.copy(), "bias": b.copy()}


def lstm_from_flax(params: Mapping[str, Any]) -> LSTMParams:
    """An LSTM cell of Flax, linen or nnx, `LSTMCell` or `OptimizedLSTMCell`.

    Args:
        params: the arrays of the cell itself: `variables["params"]` of a linen cell,
            `variables["params"]["cell"]` of a linen `RNN`, `nnx.state(cell)`.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> dense_h = {"kernel": np.ones((5, 20)), "bias": np.zeros(20)}
        >>> lstm_from_flax({"dense_i": {"kernel": np.ones((3, 20))}, "dense_h": dense_h}).w_x.shape
        (3, 20)
    """
    read = _Reader("lstm_from_flax", _flatten(params))
    if "dense_i" in params or "dense_h" in params:
        w_h = read("dense_h.kernel", "H 4H")
        w_x = read("dense_i.kernel", "D 4H")
        b = read("dense_h.bias", "4H")
    else:
        f = "if_" if "if_" in params else "if"
        w_h = np.concatenate([read(f"h{gate}.kernel", "H H") for gate in "ifgo"], axis=1)
        w_x = np.concatenate([read(f"{k}.kernel", "D H") for k in ("ii", f, "ig", "io")], axis=1)
        b = np.concatenate([read(f"h{gate}.bias", "H") for gate in "ifgo"])
    read.finish()
    return _params(w_x, w_h, b)


def lstm_to_flax(
    params: LSTMParams, form: Literal["linen", "nnx", "nnx_optimized"] = "linen"
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of an LSTM cell of Flax.

    Args:
        form: "linen" for both of linen's cells, "nnx" for `nnx.LSTMCell`, "nnx_optimized" for
            `nnx.OptimizedLSTMCell`.
    Raises:
        ValueError: `form` is unknown, or `params` has peepholes or a projection, or an array of a
            wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> list(lstm_to_flax(params)), list(lstm_to_flax(params, "nnx_optimized"))
        (['ii', 'if', 'ig', 'io', 'hi', 'hf', 'hg', 'ho'], ['dense_i', 'dense_h'])
    """
    w_x, w_h, b, *_ = _arrays("lstm_to_flax", params)
    if form == "nnx_optimized":
        return {
            "dense_i": {"kernel": w_x.copy()},
            "dense_h": {"kernel": w_h.copy(), "bias": b.copy()},
        }
    if form not in ("linen", "nnx"):
        raise ValueError(
            f"lstm_to_flax: `form` must be 'linen', 'nnx' or 'nnx_optimized', got {form!r}"
        )
    gate = lambda array: [block.copy() for block in np.split(array, 4, axis=-1)]
    names = ("ii", "if" if form == "linen" else "if_", "ig", "io")
    tree = {name: {"kernel": kernel} for name, kernel in zip(names, gate(w_x), strict=True)}
    for name, kernel, bias in zip("ifgo", gate(w_h), gate(b), strict=True):
        tree["h" + name] = {"kernel": kernel, "bias": bias}
    return tree


def lstm_from_haiku(params: Mapping[str, Any]) -> LSTMParams:
    """A Haiku `LSTM`, from the parameters of its linear layer (`params["lstm/linear"]`).

    Haiku adds 1 to the forget gate when it runs; here the bias contains it. That addition rounds:
    the forget bias comes out to half a unit in the last place.

    Args:
        params: "w" (D + H, 4H), the rows of the input first, and "b".
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> params = lstm_from_haiku({"w": np.ones((3 + 5, 20)), "b": np.zeros(20)})
        >>> params.w_x.shape, params.w_h.shape, float(params.b[5])
        ((3, 20), (5, 20), 1.0)
    """
    read = _Reader("lstm_from_haiku", params)
    b = _reorder(read("b", "4H"), "igfo", "ifgo")
    H = len(b) // 4
    w = _reorder(read("w", "rows 4H"), "igfo", "ifgo")
    read.finish()
    if len(w) <= H:
        raise ValueError(f"lstm_from_haiku: `w` must have D + H rows, H = {H}, got {len(w)}")
    b[H : 2 * H] += 1
    return _params(w[:-H], w[-H:], b)


def lstm_to_haiku(params: LSTMParams) -> dict[str, np.ndarray]:
    """The parameters of the linear layer of a Haiku `LSTM`, its 1 taken off the forget bias.

    `lstm_from_haiku` gives the forget bias b back to the rounding of b − 1, so within
    ε(1 + |b|) with ε the dtype's spacing at 1, and exactly for ½ ≤ b ≤ 2; all else exactly.

    Raises:
        ValueError: `params` has peepholes or a projection, or an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in lstm_to_haiku(params).items()}
        {'w': (8, 20), 'b': (20,)}
    """
    w_x, w_h, b, *_ = _arrays("lstm_to_haiku", params)
    H = len(w_h)
    b = b.copy()
    b[H : 2 * H] -= 1
    w = np.concatenate([w_x, w_h])
    return {"w": _reorder(w, "ifgo", "igfo"), "b": _reorder(b, "ifgo", "igfo")}


def lstm_from_onnx(weights: Mapping[str, Any], direction: int = 0) -> LSTMParams:
    """One direction of an ONNX `LSTM` node, from its inputs W, R and, if it has them, B and P.

    The two biases are added; no B is zeros, no P is no peepholes.

    Args:
        weights: each array with its leading axis, one entry for each direction of the node.
        direction: which entry: 0 is the node's only one, or the forward one of two.
    Raises:
        ValueError: a key is missing or unknown, its array has a wrong shape or dtype, or there is
            no such direction.
    Example:
        >>> params = lstm_from_onnx({"W": np.ones((1, 20, 3)), "R": np.ones((1, 20, 5))})
        >>> params.w_x.shape, params.w_h.shape, params.peephole
        ((3, 20), (5, 20), None)
    """
    read = _Reader("lstm_from_onnx", weights)
    w_h = read("R", "directions 4H H")
    directions, G, _ = w_h.shape
    w_x = read("W", "directions 4H D")
    b = read("B", "directions 8H") if "B" in weights else np.zeros((directions, 2 * G), w_h.dtype)
    peephole = read("P", "directions 3H") if "P" in weights else None
    read.finish()
    if not 0 <= direction < directions:
        raise ValueError(
            f"lstm_from_onnx: `direction` must be from 0 to {directions - 1}, got {direction}"
        )
    gates = lambda array: _reorder(array, "iofg", "ifgo")
    if peephole is not None:
        peephole = _reorder(peephole[direction], "iof", "ifo").reshape(3, -1)
    b_x, b_h = np.split(b[direction], 2)
    return _params(gates(w_x[direction].T), gates(w_h[direction].T), gates(b_x + b_h), peephole)


def lstm_to_onnx(params: LSTMParams) -> dict[str, np.ndarray]:
    """The inputs W, R, B and, with peepholes, P of an ONNX `LSTM` node of one direction.

    The bias is the first half of B; the other is zero. For a bidirectional node, concatenate the
    arrays of both directions on the first axis.

    Raises:
        ValueError: `params` has a projection, or an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in lstm_to_onnx(params).items()}
        {'W': (1, 20, 3), 'R': (1, 20, 5), 'B': (1, 40)}
    """
    w_x, w_h, b, peephole, _ = _arrays("lstm_to_onnx", params, "peephole")
    gates = lambda array: _reorder(array, "ifgo", "iofg")
    weights = {
        "W": gates(w_x).T,
        "R": gates(w_h).T,
        "B": np.concatenate([gates(b), np.zeros_like(b)]),
    }
    if peephole is not None:
        weights["P"] = _reorder(peephole.reshape(-1), "ifo", "iof")
    return {key: np.array(value, order="C")[None] for key, value in weights.items()}


# ---- vision transformers ----------------------------------------------------------------------


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
    arrays = _read_all(function, state_dict, _timm_axes(depth, "cls_token" in state_dict))
    D, N = len(arrays["norm.weight"]), num_heads
    if N < 1 or D % N:
        raise ValueError(f"{function}: `num_heads` must divide the width {D}, got {N}")
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
            off, and what is beside it left out.
    Raises:
        ValueError: names are missing or unknown, or arrays have a wrong shape or dtype; all of
            them are listed.
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
    own = {name[len(prefix) :]: x for name, x in weights.items() if name.startswith(prefix)}
    form = "big_vision" if "pos_embedding" in own else "vision_transformer"
    depth = _depth(own, "Transformer/encoderblock_", "/")
    names, axes = _google_names(depth, form), _vit_axes(depth, "cls" in own)
    leading = {"cls": "1 1 D", "position": "1 tokens D"}
    expected = {names[ours]: leading.get(ours, shape) for ours, shape in axes.items()}
    arrays = _read_all("vit_from_google", own, expected)
    return _nested(
        {ours: arrays[names[ours]][0] if ours in leading else arrays[names[ours]] for ours in axes}
    )


def vit_to_google(
    weights: Mapping[str, Any],
    form: Literal["vision_transformer", "big_vision"] = "vision_transformer",
) -> dict[str, np.ndarray]:
    """The arrays of a ViT checkpoint of google-research, by name and without a prefix.

    Args:
        weights: of a `rnnattn.nn.ViT` with learned positions and the patch stem.
        form: whose names: those of the repository `vision_transformer` or of `big_vision`.
    Raises:
        ValueError: as `vit_from_google` does; `form` is unknown.
    Example:
        See `vit_from_google`.
    """
    if form not in ("vision_transformer", "big_vision"):
        raise ValueError(
            f"vit_to_google: `form` must be 'vision_transformer' or 'big_vision', got {form!r}"
        )
    arrays, depth = _own_arrays("vit_to_google", weights)
    names = _google_names(depth, form)
    leading = lambda ours, array: array[None] if ours in ("cls", "position") else array
    return {
        names[ours]: np.array(leading(ours, array), order="C") for ours, array in arrays.items()
    }


# ---- files ------------------------------------------------------------------------------------

# What the format calls each dtype that it has.
_FILE_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def write_safetensors(path: str | os.PathLike, params: PyTree) -> None:
    """Any tree of arrays as a file of named arrays, which holds no code; needs safetensors.

    A leaf is named by its way from the root: `lstm.w_x`, `layers.0.b`. Arrays are JAX's or NumPy's,
    however they lie in memory or on devices.

    Args:
        path: of the file. One that is there stays as it is until the new one is complete.
        params: dictionaries, lists, (named) tuples or registered nodes of arrays.
    Raises:
        ValueError: before anything is written: a leaf is no array, or of a dtype that the format
            does not have (of JAX's those of 2 and 4 bits, complex128 and some of 8 bits); two
            leaves have one name; a name is no text, or is "__metadata__".
        OSError: the file cannot be written.
    Example:
        >>> import tempfile, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), 3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(f"{folder}/lstm.safetensors", params)
        ...     again = read_safetensors(f"{folder}/lstm.safetensors", params)
        >>> bool(jnp.all(again.w_h == params.w_h))
        True
    """
    function = "write_safetensors"
    _import_safetensors(function)
    from safetensors.numpy import save

    named = _named(function, params)
    content = save({name: _as_in_a_file(function, name, leaf) for name, leaf in named.items()})
    path = Path(path)
    whole = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with open(whole, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


def read_safetensors(path: str | os.PathLike, like: PyTree) -> PyTree:
    """The tree that `write_safetensors` wrote, of arrays of JAX; needs safetensors.

    Args:
        like: a tree of the same structure, of arrays or `jax.ShapeDtypeStruct`.
    Raises:
        ValueError: an array is missing, left over or of another shape or dtype than `like` has, by
            name, or of 64 bits where `jax_enable_x64` is off; or the file is damaged, or none of
            the kind.
        OSError: the file cannot be read.
    Example: see `write_safetensors`.
    """
    function = "read_safetensors"
    safetensors = _import_safetensors(function)
    content = Path(path).read_bytes()
    try:
        found = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{function}: {path}: damaged, or not a safetensors file: {error}"
        ) from None
    expected = _named(function, like)
    wrong = [f"`{name}` is missing" for name in expected.keys() - found.keys()]
    wrong += [f"`{name}` is not expected" for name in found.keys() - expected.keys()]
    arrays = {}
    for name in expected.keys() & found.keys():
        leaf, array = expected[name], found[name]
        dtype = _FILE_DTYPES.get(array["dtype"], array["dtype"])
        want, got = f"{leaf.dtype.name}{list(leaf.shape)}", f"{dtype}{array['shape']}"
        if want != got:
            wrong.append(f"`{name}`: expected {want}, got {got}")
            continue
        dtype = np.dtype(leaf.dtype)
        in_numpy = np.ndarray(leaf.shape, dtype.newbyteorder("<"), array["data"])
        arrays[name] = jnp.asarray(in_numpy.astype(dtype.newbyteorder("="), copy=False))
        if arrays[name].dtype != dtype.newbyteorder("="):
            wrong.append(f"`{name}`: {dtype.name} needs jax_enable_x64")
    if wrong:
        raise ValueError(f"{function}: {path}: {'; '.join(sorted(wrong))}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def _import_safetensors(function):
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{function} needs safetensors: `pip install safetensors`, or rnnattn with its extra "
            "`experiments`",
            name="safetensors",
        ) from error
    return safetensors


def _named(function, tree):
    """The leaves by name, in their order."""
    paths: dict[str, Any] = {}
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = ".".join(jax.tree_util.keystr((key,), simple=True) for key in path)
        way = jax.tree_util.keystr(path)
        if name in paths:
            raise ValueError(f"{function}: {paths[name]} and {way} have one name, `{name}`")
        if name == "__metadata__":
            raise ValueError(f"{function}: the format keeps the name `{name}` for itself")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{function}: the name {name!r} is no text") from None
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise ValueError(f"{function}: `{name}` must be an array, got {type(leaf).__name__}")
        paths[name], leaves[name] = way, leaf
    return leaves


def _as_in_a_file(function, name, leaf):
    """The leaf in NumPy and in one piece, little-endian, of a dtype that the format has."""
    try:
        array = np.asarray(leaf)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{function}: `{name}` must be an array: {error}") from error
    if array.dtype.name not in _FILE_DTYPES.values():
        raise ValueError(
            f"{function}: `{name}` must have a dtype that the format has, "
            f"{', '.join(_FILE_DTYPES.values())}, got {array.dtype}"
        )
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)


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


def _depth(weights, before, after):
    """How many blocks the names tell of, at least one."""
    own = [name for name in weights if name.startswith(before)]
    numbers = {name.removeprefix(before).partition(after)[0] for name in own}
    return max(sum(number.isdecimal() for number in numbers), 1)


def _own_arrays(function, weights):
    """Our nested weights in NumPy, by joined names, checked; and the number of blocks."""
    flat = _flatten(weights)
    depth = _depth(flat, "blocks.", ".")
    return _read_all(function, flat, _vit_axes(depth, "cls" in flat)), depth


def _read_all(function, weights, axes):
    """The arrays named in `axes`; `ValueError` for all that is missing, unknown or wrong."""
    wrong = [f"`{name}` is missing" for name in axes if name not in weights]
    wrong += [f"`{name}` is unknown" for name in weights if name not in axes]
    read, arrays = _Reader(function, weights), {}
    for name in axes:
        if name in weights:
            try:
                arrays[name] = read(name, axes[name])
            except ValueError as error:
                wrong.append(str(error).removeprefix(f"{function}: "))
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{function}: {'; '.join(wrong[:20])}{more}")
    return arrays


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


# ---- reading, and checking what is read -------------------------------------------------------


class _Reader:
    """Reads arrays by key, checks their shapes against one another, and that no key is left."""

    def __init__(self, function, weights):
        self.function, self.weights = function, weights
        self.sizes = {"": 1}
        self.dtypes: dict[str, np.dtype] = {}

    def __call__(self, key, axes):
        """The array at `key`, of shape `axes`: "4H D" is (4H, D); a letter is learned when met."""
        if key not in self.weights:
            names = list(self.weights)
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            raise ValueError(f"{self.function}: `{key}` is missing, got {names[:20]}{more}")
        try:
            array = np.asarray(self.weights[key])
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.function}: `{key}` must be an array: {error}") from error
        terms = [_term(axis) for axis in axes.split()]
        if array.ndim == len(terms):
            for (factor, letter), size in zip(terms, array.shape, strict=True):
                if size > 0 and size % factor == 0:
                    self.sizes.setdefault(letter, size // factor)
        known = all(letter in self.sizes for _, letter in terms)
        expected = tuple(factor * self.sizes.get(letter, 0) for factor, letter in terms)
        if not known or array.shape != expected:
            names = "(" + axes.replace(" ", ", ") + (",)" if len(terms) == 1 else ")")
            sizes = f" = {expected}" if known else ""
            raise ValueError(
                f"{self.function}: `{key}` must have shape {names}{sizes}, got {array.shape}"
            )
        self._check_dtype(key, array.dtype)
        return array

    def finish(self):
        """A key that is not read is a mistake."""
        for key in self.weights:
            if key not in self.dtypes:
                raise ValueError(
                    f"{self.function}: `{key}` is unknown, expected {list(self.dtypes)}"
                )

    def _check_dtype(self, key, dtype):
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
            raise ValueError(f"{self.function}: `{key}` must be floating, got {dtype}")
        for other, expected in self.dtypes.items():
            if dtype != expected:
                raise ValueError(
                    f"{self.function}: `{key}` must have the dtype of `{other}`, {expected}, "
                    f"got {dtype}"
                )
        self.dtypes[key] = dtype


def _term(axis):
    """4 and "H" of "4H"; 3 and "" of "3"."""
    letter = axis.lstrip("0123456789")
    return int(axis.removesuffix(letter) or 1), letter


def _arrays(function, params, *supported):
    """The fields of `params` in NumPy; peephole and projection only for a format that has them."""
    given = {key: value for key, value in params._asdict().items() if value is not None}
    for key in ("peephole", "projection"):
        if key in given and key not in supported:
            raise ValueError(f"{function}: `params.{key}` must be None: the format has none")
    read = _Reader(function, {f"params.{key}": value for key, value in given.items()})
    b = read("params.b", "4H")
    w_h = read("params.w_h", "R 4H" if "projection" in given else "H 4H")
    w_x = read("params.w_x", "D 4H")
    peephole = read("params.peephole", "3 H") if "peephole" in given else None
    projection = read("params.projection", "H R") if "projection" in given else None
    return LSTMParams(w_x, w_h, b, peephole, projection)


def _params(w_x, w_h, b, peephole=None, projection=None):
    """Copies, so that nobody's training in place reaches them."""
    return jax.tree.map(jnp.array, LSTMParams(w_x, w_h, b, peephole, projection))


def _reorder(array, source, target):
    """The blocks of the last axis, one for each letter, from one order of gates to another."""
    blocks = dict(zip(source, np.split(array, len(source), axis=-1), strict=True))
    return np.ascontiguousarray(np.concatenate([blocks[gate] for gate in target], axis=-1))


def _torch_suffix(layer, reverse):
    return f"_l{layer}_reverse" if reverse else f"_l{layer}"


def _flatten(tree):
    """{"ii": {"kernel": a}} → {"ii.kernel": a}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": leaf for name, leaf in _flatten(value).items()}
        else:
            flat[key] = value
    return flat
