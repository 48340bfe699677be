"""The weights of an LSTM in torch, Keras, Flax, Haiku and ONNX; see `rnnattn.interop`."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn.checks import Check
from rnnattn.interop.reader import Reader, flatten
from rnnattn.recurrent import LSTMParams


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
    read, suffix, has_bias = torch_layer("lstm_from_torch", state_dict, layer, reverse)
    has_projection = "weight_hr" + suffix in read.weights
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
    w_x, w_h, b, _, projection = _arrays("lstm_to_torch", params, "projection")
    weights = {"weight_ih": w_x.T, "weight_hh": w_h.T, "bias_ih": b, "bias_hh": np.zeros_like(b)}
    if projection is not None:
        weights["weight_hr"] = projection.T
    return torch_entries(weights, layer, reverse)


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
    read = Reader("lstm_from_keras", weights)
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
            `variables["params"]["cell"]` of a linen `RNN`, `nnx.state(cell)`. In a linen model
            the cell has a name of its own, as `variables["params"]["LSTMCell_0"]`.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> dense_h = {"kernel": np.ones((5, 20)), "bias": np.zeros(20)}
        >>> lstm_from_flax({"dense_i": {"kernel": np.ones((3, 20))}, "dense_h": dense_h}).w_x.shape
        (3, 20)
    """
    weights = flatten(params)
    read = Reader("lstm_from_flax", weights)
    if any("dense_" in str(name) for name in weights):
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
    Check("lstm_to_flax").one_of("form", form, ("linen", "nnx", "nnx_optimized"))
    if form == "nnx_optimized":
        return {
            "dense_i": {"kernel": w_x.copy()},
            "dense_h": {"kernel": w_h.copy(), "bias": b.copy()},
        }
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
    read = Reader("lstm_from_haiku", params)
    b = reordered(read("b", "4H"), "igfo", "ifgo")
    H = len(b) // 4
    w = reordered(read("w", "rows 4H"), "igfo", "ifgo")
    read.finish()
    read.check(len(w) > H, "w", f"of D + H rows, H = {H}", len(w))
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
    return {"w": reordered(w, "ifgo", "igfo"), "b": reordered(b, "ifgo", "igfo")}


def lstm_from_onnx(weights: Mapping[str, Any], direction: int = 0) -> LSTMParams:
    """One direction of an ONNX `LSTM` node, from its inputs W, R and, if it has them, B and P.

    The two biases are added; no B is zeros, no P is no peepholes. For a row of length 0
    onnxruntime gives zeros as Y_h and Y_c, even with an initial state; `rnnattn.lstm` gives that.

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
    read = Reader("lstm_from_onnx", weights)
    w_h = read("R", "directions 4H H")
    directions, G, _ = w_h.shape
    w_x = read("W", "directions 4H D")
    b = read("B", "directions 8H") if "B" in weights else np.zeros((directions, 2 * G), w_h.dtype)
    peephole = read("P", "directions 3H") if "P" in weights else None
    read.finish()
    known = 0 <= direction < directions
    read.check(known, "direction", f"from 0 to {directions - 1}", direction)
    gates = lambda array: reordered(array, "iofg", "ifgo")
    if peephole is not None:
        peephole = reordered(peephole[direction], "iof", "ifo").reshape(3, -1)
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
    gates = lambda array: reordered(array, "ifgo", "iofg")
    weights = {
        "W": gates(w_x).T,
        "R": gates(w_h).T,
        "B": np.concatenate([gates(b), np.zeros_like(b)]),
    }
    if peephole is not None:
        weights["P"] = reordered(peephole.reshape(-1), "ifo", "iof")
    return {key: np.array(value, order="C")[None] for key, value in weights.items()}


def _arrays(function, params, *supported):
    """The fields of `params` in NumPy; peephole and projection only for a format that has them."""
    given = {key: value for key, value in params._asdict().items() if value is not None}
    read = Reader(function, {f"params.{key}": value for key, value in given.items()})
    for key in ("peephole", "projection"):
        served = key not in given or key in supported
        read.check(served, f"params.{key}", "None, since the format has none", "an array")
    b = read("params.b", "4H")
    w_h = read("params.w_h", "R 4H" if "projection" in given else "H 4H")
    w_x = read("params.w_x", "D 4H")
    peephole = read("params.peephole", "3 H") if "peephole" in given else None
    projection = read("params.projection", "H R") if "projection" in given else None
    return LSTMParams(w_x, w_h, b, peephole, projection)


def _params(w_x, w_h, b, peephole=None, projection=None):
    """Copies, so that nobody's training in place reaches them."""
    return jax.tree.map(jnp.array, LSTMParams(w_x, w_h, b, peephole, projection))


def reordered(array, source, target):
    """The blocks of the last axis, one for each letter, from one order of gates to another."""
    blocks = dict(zip(source, np.split(array, len(source), axis=-1), strict=True))
    return np.ascontiguousarray(np.concatenate([blocks[gate] for gate in target], axis=-1))


def torch_layer(function, state_dict, layer, reverse):
    """What reads a layer and direction, the end of its names, and whether there are biases."""
    suffix = _torch_suffix(layer, reverse)
    if suffix == "_l0" and "weight_hh" in state_dict:  # a cell's
        suffix = ""
    of_layer = {key: value for key, value in state_dict.items() if key.endswith(suffix)}
    has_bias = any(key.startswith("bias_") for key in state_dict)
    return Reader(function, of_layer or state_dict), suffix, has_bias


def torch_entries(weights, layer, reverse):
    """The weights of a layer and direction by their names in a module's state dict."""
    suffix = _torch_suffix(layer, reverse)
    return {key + suffix: np.array(value, order="C") for key, value in weights.items()}


def _torch_suffix(layer, reverse):
    return f"_l{layer}_reverse" if reverse else f"_l{layer}"
