"""Attention to orthonormal keys, one of which has an uncertain length (notes, A8 and A9)."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

import rnnattn

VARIANCE = 0.5
"""Of γ, in the notes."""


def weight_of_first(
    query: Float[Array, "B T N K"], key: Float[Array, "B S M K"]
) -> Float[Array, "B T N"]:
    """The weight of the first value in the output of each head; the logits are not scaled."""
    value = jnp.zeros((*key.shape[:3], 1), key.dtype).at[:, 0].set(1)
    return rnnattn.dot_product_attention(query, key, value, scale=1.0)[..., 0]


def stretched_keys(gamma: Float[Array, "B M"], keys: int) -> Float[Array, "B S M K"]:
    """Orthonormal keys of which the first is γ times as long, for each draw and head (A8)."""
    eye = jnp.broadcast_to(jnp.eye(keys, dtype=gamma.dtype)[None, :, None, :],
                           (len(gamma), keys, gamma.shape[1], keys))  # fmt: skip
    return eye.at[:, 0, :, 0].set(gamma)


def draw_gamma(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """γ ~ N(1, ½)."""
    return random.normal(1.0, math.sqrt(VARIANCE), shape)


def predicted_weight(gamma: np.ndarray, beta: float, keys: int) -> np.ndarray:
    """w_a of A8, the exact softmax 1 / (1 + e^{β(1−γ)} + (n−2) e^{−βγ})."""
    return special.expit(beta * gamma - log_rest(beta, keys))


def log_rest(beta: float, keys: int) -> float:
    """ln(e^β + n − 2): the logit of a at which its weight is ½."""
    return math.log(math.exp(beta) + keys - 2)


def in_chunks(function: Callable[[Array], Array], samples: np.ndarray, keys: int) -> np.ndarray:
    """The function of the samples, so many at a time that their keys take 16 MiB.

    All chunks are of one size, the last filled up, so that one compiled program serves them.
    """
    count = -(-len(samples) * keys**2 // 2**21)
    size = -(-len(samples) // count)
    filled = np.resize(samples, (count, size, *samples.shape[1:]))
    parts = [np.asarray(function(jnp.asarray(chunk))) for chunk in filled]
    return np.concatenate(parts)[: len(samples)]
