"""The weights of a GRU in torch, Keras, Flax, Haiku and ONNX; see `rnnattn.interop`."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn.checks import Check
from rnnattn.interop.lstm import reordered, torch_entries, torch_layer
from rnnattn.interop.reader import Reader, flatten
from rnnattn.recurrent import GRUParams


def gru_from_torch(
    state_dict: Mapping[str, Any], layer: int = 0, reverse: bool = False
) -> GRUParams:
    """One layer and direction of a `torch.nn.GRU`, or a `GRUCell`; for `reset_after=True`.

    Args:
        state_dict, reverse: as in `lstm_from_torch`; a module with `bias=False` has zeros.
    Raises:
        ValueError: a key is missing, is not one of a GRU, or its array has a wrong shape or dtype.
    Example:
        >>> weights = {"weight_ih_l0": np.ones((15, 3)), "weight_hh_l0": np.ones((15, 5))}
        >>> params = gru_from_torch(weights)
        >>> params.w_x.shape, params.w_h.shape, params.b_n.shape
        ((3, 15), (5, 15), (5,))
    """
    read, suffix, has_bias = torch_layer("gru_from_torch", state_dict, layer, reverse)
    w_h = read("weight_hh" + suffix, "3H H")
    w_x = read("weight_ih" + suffix, "3H D")
    b_x = b_h = np.zeros(len(w_h), w_h.dtype)
    if has_bias:
        b_x, b_h = read("bias_ih" + suffix, "3H"), read("bias_hh" + suffix, "3H")
    read.finish()
    return _params(w_x.T, w_h.T, *_biases(b_x, b_h))


def gru_to_torch(params: GRUParams, layer: int = 0, reverse: bool = False) -> dict[str, np.ndarray]:
    """The entries of a `torch.nn.GRU`'s state dict for one layer and direction.

    `bias_hh` is b_n, and zero for the other gates.

    Raises:
        ValueError: an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in gru_to_torch(params).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'weight_ih_l0': (15, 3), 'weight_hh_l0': (15, 5), 'bias_ih_l0': (15,),
         'bias_hh_l0': (15,)}
    """
    w_x, w_h, b, b_n = _arrays("gru_to_torch", params)
    weights = {"weight_ih": w_x.T, "weight_hh": w_h.T, "bias_ih": b, "bias_hh": _of_h(b, b_n)}
    return torch_entries(weights, layer, reverse)


def gru_from_keras(weights: Mapping[str, Any]) -> GRUParams:
    """A Keras `GRU` or `GRUCell`, from `{w.name: w for w in layer.cell.weights}`.

    Args:
        weights: "kernel", "recurrent_kernel" and "bias", (2, 3H) for `reset_after=True` and (3H,)
            for `reset_after=False`, whose b_n is None; no bias (`use_bias=False`) is zeros.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> weights = {"kernel": np.ones((3, 15)), "recurrent_kernel": np.ones((5, 15))}
        >>> gru_from_keras(weights | {"bias": np.ones((2, 15))}).b_n.shape
        (5,)
    """
    read = Reader("gru_from_keras", weights)
    w_h = read("recurrent_kernel", "H 3H")
    w_x = read("kernel", "D 3H")
    b, b_n = np.zeros(w_h.shape[1], w_h.dtype), None
    gates = lambda array: reordered(array, "zrn", "rzn")
    if "bias" in weights and np.ndim(weights["bias"]) == 2:
        b, b_n = _biases(*map(gates, read("bias", "2 3H")))
    elif "bias" in weights:
        b = gates(read("bias", "3H"))
    read.finish()
    return _params(gates(w_x), gates(w_h), b, b_n)


def gru_to_keras(params: GRUParams, *, reset_after: bool = True) -> dict[str, np.ndarray]:
    """The weights of a Keras `GRU`, in the order that its `set_weights` takes.

    Args:
        reset_after: the layer's own; its bias is (2, 3H), or (3H,) without.
    Raises:
        ValueError: an array of a wrong shape or dtype, or a b_n for `reset_after=False`.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in gru_to_keras(params).items()}
        {'kernel': (3, 15), 'recurrent_kernel': (5, 15), 'bias': (2, 15)}
    """
    w_x, w_h, b, b_n = _arrays("gru_to_keras", params, reset_after)
    gates = lambda array: reordered(array, "rzn", "zrn")
    bias = gates(np.stack([b, _of_h(b, b_n)]) if reset_after else b)
    return {"kernel": gates(w_x), "recurrent_kernel": gates(w_h), "bias": bias}


def gru_from_flax(params: Mapping[str, Any]) -> GRUParams:
    """A GRU cell of Flax, linen or nnx; for `reset_after=True`.

    Args:
        params: the arrays of the cell itself, as in `lstm_from_flax`.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> dense_i = {"kernel": np.ones((3, 15)), "bias": np.zeros(15)}
        >>> gru_from_flax({"dense_i": dense_i, "dense_h": {"kernel": np.ones((5, 15))}}).w_x.shape
        (3, 15)
    """
    weights = flatten(params)
    read = Reader("gru_from_flax", weights)
    if any("dense_" in str(name) for name in weights):
        w_h = read("dense_h.kernel", "H 3H")
        w_x = read("dense_i.kernel", "D 3H")
        b, b_n = read("dense_i.bias", "3H"), np.zeros(len(w_h), w_h.dtype)
    else:
        w_h = np.concatenate([read(f"h{gate}.kernel", "H H") for gate in "rzn"], axis=1)
        w_x = np.concatenate([read(f"i{gate}.kernel", "D H") for gate in "rzn"], axis=1)
        b = np.concatenate([read(f"i{gate}.bias", "H") for gate in "rzn"])
        b_n = read("hn.bias", "H")
    read.finish()
    return _params(w_x, w_h, b, b_n)


def gru_to_flax(
    params: GRUParams, form: Literal["linen", "nnx"] = "linen"
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a GRU cell of Flax.

    Args:
        form: "linen" for `linen.GRUCell`, "nnx" for `nnx.GRUCell`, which has no b_n.
    Raises:
        ValueError: `form` is unknown, b_n is not zero where the form has none, or an array is of a
            wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> list(gru_to_flax(params)), list(gru_to_flax(params, "nnx"))
        (['ir', 'iz', 'in', 'hr', 'hz', 'hn'], ['dense_i', 'dense_h'])
    """
    w_x, w_h, b, b_n = _arrays("gru_to_flax", params)
    check = Check("gru_to_flax")
    check.one_of("form", form, ("linen", "nnx"))
    if form == "nnx":
        check(not np.any(b_n), "params.b_n", "zero, since the format has none", "another")
        return {
            "dense_i": {"kernel": w_x.copy(), "bias": b.copy()},
            "dense_h": {"kernel": w_h.copy()},
        }
    gate = lambda array: [block.copy() for block in np.split(array, 3, axis=-1)]
    tree = {
        f"i{name}": {"kernel": kernel, "bias": bias}
        for name, kernel, bias in zip("rzn", gate(w_x), gate(b), strict=True)
    }
    tree |= {f"h{name}": {"kernel": kernel} for name, kernel in zip("rzn", gate(w_h), strict=True)}
    tree["hn"]["bias"] = b_n.copy()
    return tree


def gru_from_haiku(params: Mapping[str, Any]) -> GRUParams:
    """A Haiku `GRU`, from its parameters (`params["gru"]`); for `reset_after=False`.

    Haiku's z weighs the new h where ours weighs the old one: the signs of that gate change.

    Args:
        params: "w_i", "w_h" and "b".
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> weights = {"w_i": np.ones((3, 15)), "w_h": np.ones((5, 15)), "b": np.zeros(15)}
        >>> gru_from_haiku(weights).w_h.shape
        (5, 15)
    """
    read = Reader("gru_from_haiku", params)
    w_h = read("w_h", "H 3H")
    w_x, b = read("w_i", "D 3H"), read("b", "3H")
    read.finish()
    gates = lambda array: _turned(reordered(array, "zrn", "rzn"))
    return _params(gates(w_x), gates(w_h), gates(b), None)


def gru_to_haiku(params: GRUParams) -> dict[str, np.ndarray]:
    """The parameters of a Haiku `GRU`, whose reset gate is before the product.

    Raises:
        ValueError: `params` has a b_n, or an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> key = jax.random.key(0)
        >>> params = rnnattn.init_gru(key, input_size=3, hidden_size=5, reset_after=False)
        >>> {key: value.shape for key, value in gru_to_haiku(params).items()}
        {'w_i': (3, 15), 'w_h': (5, 15), 'b': (15,)}
    """
    w_x, w_h, b, _ = _arrays("gru_to_haiku", params, False)
    gates = lambda array: reordered(_turned(array), "rzn", "zrn")
    return {"w_i": gates(w_x), "w_h": gates(w_h), "b": gates(b)}


def gru_from_onnx(
    weights: Mapping[str, Any], direction: int = 0, *, linear_before_reset: bool = False
) -> GRUParams:
    """One direction of an ONNX `GRU` node, from its inputs W, R and, if it has one, B.

    Args:
        weights, direction: as in `lstm_from_onnx`.
        linear_before_reset: the node's attribute, which is `reset_after` here.
    Raises:
        ValueError: a key is missing or unknown, its array has a wrong shape or dtype, or there is
            no such direction.
    Example:
        >>> params = gru_from_onnx({"W": np.ones((1, 15, 3)), "R": np.ones((1, 15, 5))})
        >>> params.w_x.shape, params.w_h.shape, params.b_n
        ((3, 15), (5, 15), None)
    """
    read = Reader("gru_from_onnx", weights)
    w_h = read("R", "directions 3H H")
    directions, G, _ = w_h.shape
    w_x = read("W", "directions 3H D")
    b = read("B", "directions 6H") if "B" in weights else np.zeros((directions, 2 * G), w_h.dtype)
    read.finish()
    known = 0 <= direction < directions
    read.check(known, "direction", f"from 0 to {directions - 1}", direction)
    gates = lambda array: reordered(array, "zrn", "rzn")
    b_x, b_h = map(gates, np.split(b[direction], 2))
    biases = _biases(b_x, b_h) if linear_before_reset else (b_x + b_h, None)
    return _params(gates(w_x[direction].T), gates(w_h[direction].T), *biases)


def gru_to_onnx(params: GRUParams, *, linear_before_reset: bool = False) -> dict[str, np.ndarray]:
    """The inputs W, R and B of an ONNX `GRU` node of one direction; see `lstm_to_onnx`.

    Args:
        linear_before_reset: the node's attribute, which is `reset_after` here.
    Raises:
        ValueError: an array of a wrong shape or dtype, or a b_n without `linear_before_reset`.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> weights = gru_to_onnx(params, linear_before_reset=True)
        >>> {key: value.shape for key, value in weights.items()}
        {'W': (1, 15, 3), 'R': (1, 15, 5), 'B': (1, 30)}
    """
    w_x, w_h, b, b_n = _arrays("gru_to_onnx", params, linear_before_reset)
    gates = lambda array: reordered(array, "rzn", "zrn")
    weights = {
        "W": gates(w_x).T,
        "R": gates(w_h).T,
        "B": np.concatenate([gates(b), gates(_of_h(b, b_n))]),
    }
    return {key: np.array(value, order="C")[None] for key, value in weights.items()}


def _biases(b_x, b_h):
    """b and b_n from the biases of x w_x and of h w_h, blocks r, z, n."""
    h_r, h_z, h_n = np.split(b_h, 3)
    return b_x + np.concatenate([h_r, h_z, np.zeros_like(h_n)]), h_n


def _of_h(b, b_n):
    """The bias of h w_h: that of n alone."""
    return np.concatenate([np.zeros(2 * len(b_n), b.dtype), b_n])


def _turned(array):
    """The same with the signs of z changed: σ(−a) = 1 − σ(a)."""
    r, z, n = np.split(array, 3, axis=-1)
    return np.concatenate([r, -z, n], axis=-1)


def _arrays(function, params, reset_after=True):
    """The fields of `params` in NumPy; no b_n is zeros."""
    given = {key: value for key, value in params._asdict().items() if value is not None}
    read = Reader(function, {f"params.{key}": value for key, value in given.items()})
    fits = reset_after or "b_n" not in given
    read.check(fits, "params.b_n", "None where the reset is before the product", "an array")
    b = read("params.b", "3H")
    w_h, w_x = read("params.w_h", "H 3H"), read("params.w_x", "D 3H")
    b_n = read("params.b_n", "H") if "b_n" in given else np.zeros(len(w_h), b.dtype)
    return w_x, w_h, b, b_n


def _params(w_x, w_h, b, b_n):
    """Copies, so that nobody's training in place reaches them."""
    return jax.tree.map(jnp.array, GRUParams(w_x, w_h, b, b_n))
