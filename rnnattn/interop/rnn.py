"""The weights of a plain recurrent network in torch, Keras and Flax; see `rnnattn.interop`."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn.checks import Check
from rnnattn.interop.lstm import torch_entries, torch_layer
from rnnattn.interop.reader import Reader, flatten
from rnnattn.recurrent import RNNParams


def rnn_from_torch(
    state_dict: Mapping[str, Any], layer: int = 0, reverse: bool = False
) -> RNNParams:
    """One layer and direction of a `torch.nn.RNN`, or an `RNNCell`; the two biases are added.

    Args:
        state_dict, reverse: as in `lstm_from_torch`; a module with `bias=False` has zeros. Its
            `nonlinearity` is `activation` here.
    Raises:
        ValueError: a key is missing, is not one of an RNN, or its array has a wrong shape or dtype.
    Example:
        >>> weights = {"weight_ih_l0": np.ones((5, 3)), "weight_hh_l0": np.ones((5, 5))}
        >>> params = rnn_from_torch(weights)
        >>> params.w_x.shape, params.w_h.shape
        ((3, 5), (5, 5))
    """
    read, suffix, has_bias = torch_layer("rnn_from_torch", state_dict, layer, reverse)
    w_h = read("weight_hh" + suffix, "H H")
    w_x = read("weight_ih" + suffix, "H D")
    b = np.zeros(len(w_h), w_h.dtype)
    if has_bias:
        b = read("bias_ih" + suffix, "H") + read("bias_hh" + suffix, "H")
    read.finish()
    return _params(w_x.T, w_h.T, b)


def rnn_to_torch(params: RNNParams, layer: int = 0, reverse: bool = False) -> dict[str, np.ndarray]:
    """The entries of a `torch.nn.RNN`'s state dict for one layer and direction.

    The bias is `bias_ih`; `bias_hh` is zero.

    Raises:
        ValueError: an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_rnn(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in rnn_to_torch(params).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'weight_ih_l0': (5, 3), 'weight_hh_l0': (5, 5), 'bias_ih_l0': (5,),
         'bias_hh_l0': (5,)}
    """
    w_x, w_h, b = _arrays("rnn_to_torch", params)
    weights = {"weight_ih": w_x.T, "weight_hh": w_h.T, "bias_ih": b, "bias_hh": np.zeros_like(b)}
    return torch_entries(weights, layer, reverse)


def rnn_from_keras(weights: Mapping[str, Any]) -> RNNParams:
    """A Keras `SimpleRNN` or `SimpleRNNCell`, from `{w.name: w for w in layer.cell.weights}`.

    Args:
        weights: "kernel", "recurrent_kernel" and "bias"; no bias (`use_bias=False`) is zeros.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> weights = {"kernel": np.ones((3, 5)), "recurrent_kernel": np.ones((5, 5))}
        >>> rnn_from_keras(weights).b.shape
        (5,)
    """
    read = Reader("rnn_from_keras", weights)
    w_h = read("recurrent_kernel", "H H")
    w_x = read("kernel", "D H")
    b = read("bias", "H") if "bias" in weights else np.zeros(len(w_h), w_h.dtype)
    read.finish()
    return _params(w_x, w_h, b)


def rnn_to_keras(params: RNNParams) -> dict[str, np.ndarray]:
    """The weights of a Keras `SimpleRNN`, in the order that its `set_weights` takes.

    Raises:
        ValueError: an array of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_rnn(jax.random.key(0), input_size=3, hidden_size=5)
        >>> {key: value.shape for key, value in rnn_to_keras(params).items()}
        {'kernel': (3, 5), 'recurrent_kernel': (5, 5), 'bias': (5,)}
    """
    w_x, w_h, b = _arrays("rnn_to_keras", params)
    return {"kernel": w_x.copy(), "recurrent_kernel": w_h.copy(), "bias": b.copy()}


def rnn_from_flax(params: Mapping[str, Any]) -> RNNParams:
    """A `SimpleCell` of Flax, linen or nnx.

    Args:
        params: the arrays of the cell itself, as in `lstm_from_flax`. Its `residual`, which adds h
            to a step's output, is not among them.
    Raises:
        ValueError: a key is missing or unknown, or its array has a wrong shape or dtype.
    Example:
        >>> i = {"kernel": np.ones((3, 5)), "bias": np.zeros(5)}
        >>> rnn_from_flax({"i": i, "h": {"kernel": np.ones((5, 5))}}).w_x.shape
        (3, 5)
    """
    prefix = "dense_" if "dense_i" in params or "dense_h" in params else ""
    read = Reader("rnn_from_flax", flatten(params))
    w_h = read(f"{prefix}h.kernel", "H H")
    w_x, b = read(f"{prefix}i.kernel", "D H"), read(f"{prefix}i.bias", "H")
    read.finish()
    return _params(w_x, w_h, b)


def rnn_to_flax(
    params: RNNParams, form: Literal["linen", "nnx"] = "linen"
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a `SimpleCell` of Flax.

    Args:
        form: "linen" for `linen.SimpleCell`, "nnx" for `nnx.SimpleCell`.
    Raises:
        ValueError: `form` is unknown, or an array is of a wrong shape or dtype.
    Example:
        >>> import jax, rnnattn
        >>> params = rnnattn.init_rnn(jax.random.key(0), input_size=3, hidden_size=5)
        >>> list(rnn_to_flax(params)), list(rnn_to_flax(params, "nnx"))
        (['i', 'h'], ['dense_i', 'dense_h'])
    """
    w_x, w_h, b = _arrays("rnn_to_flax", params)
    Check("rnn_to_flax").one_of("form", form, ("linen", "nnx"))
    prefix = "dense_" if form == "nnx" else ""
    return {
        f"{prefix}i": {"kernel": w_x.copy(), "bias": b.copy()},
        f"{prefix}h": {"kernel": w_h.copy()},
    }


def _arrays(function, params):
    """The fields of `params` in NumPy."""
    read = Reader(function, {f"params.{key}": value for key, value in params._asdict().items()})
    w_h, w_x = read("params.w_h", "H H"), read("params.w_x", "D H")
    return w_x, w_h, read("params.b", "H")


def _params(w_x, w_h, b):
    """Copies, so that nobody's training in place reaches them."""
    return jax.tree.map(jnp.array, RNNParams(w_x, w_h, b))
