"""What breaks A1 to A9: see `tests.experiments.claims.breaks`.

A1 and A5 are about vectors and matrices alone, of which the library has no part: what is broken is
how they are drawn, or the linear algebra that they rest on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.dot_product_variance import _draw
from experiments.models.noisy_keys import draw_gamma
from rnnattn import dot_product_attention
from rnnattn.attention.dense import weights
from tests.experiments.claims.breaks import Break


def _uniform(random, width, samples):
    """Entries of variance 1 that are not normal."""
    q, k = random.uniform(-(3**0.5), 3**0.5, (2, samples, width))
    return np.vecdot(q, k), np.vecdot(q, q) / width


def _normalized(random, width, samples):
    """Products divided by √d."""
    products, squares = _draw(random, width, samples)
    return products / width**0.5, squares


def _scale_ignored(query, key, value, scale=None, **options):
    return dot_product_attention(query, key, value, **options)


def _doubled_logits(query, key, value, **options):
    return dot_product_attention(2 * query, key, value, **options)


def _permuted_values(query, key, value, **options):
    return dot_product_attention(query, key, jnp.flip(value, -3), **options)


def _sunk(query, key, value, **options):
    """As if there were a key more, of a logit of 0 and without a value."""
    sinks = jnp.zeros(query.shape[-2], query.dtype)
    return dot_product_attention(query, key, value, sinks=sinks, **options)


def _gradient_unscaled(query, key, value, scale, **options):
    """The gradient to the query lacks the scale, where there is one."""
    through = query / scale
    query = through + jax.lax.stop_gradient(query - through)
    return dot_product_attention(query, key, value, scale=scale, **options)


def _one_query(query, key, value, **options):
    """All heads have the query of the first."""
    query = jnp.broadcast_to(query[..., :1, :], query.shape)
    return dot_product_attention(query, key, value, **options)


def _shared_noise(random, shape):
    return np.broadcast_to(draw_gamma(random, (shape[0], *[1] * (len(shape) - 1))), shape)


ATTENTION = "rnnattn.dot_product_attention"

BREAKS = (
    Break("A1", "experiments.claims.dot_product_variance._draw", _uniform),
    Break("A1", "experiments.claims.dot_product_variance._draw", _normalized),
    Break("A2", ATTENTION, _scale_ignored),
    Break("A2", ATTENTION, _doubled_logits),
    Break("A2", ATTENTION, _gradient_unscaled),
    Break("A3", "rnnattn.attention.dense.weights", lambda s, lse: weights(s, lse + 1e-6)),
    Break("A3", ATTENTION, _sunk),
    Break("A4", ATTENTION, _scale_ignored),
    Break("A4", ATTENTION, _doubled_logits),
    Break("A4", ATTENTION, _permuted_values),
    Break("A5", "numpy.linalg.pinv", np.transpose),
    Break("A5", "numpy.linalg.qr", lambda a: (a, None)),
    Break("A6", ATTENTION, _scale_ignored),
    Break("A6", ATTENTION, _permuted_values),
    Break("A6", ATTENTION, _sunk),
    Break("A7", ATTENTION, _scale_ignored),
    Break("A7", ATTENTION, _doubled_logits),
    Break("A7", ATTENTION, _permuted_values),
    Break("A8", ATTENTION, _scale_ignored),
    Break("A8", ATTENTION, _doubled_logits),
    Break("A8", ATTENTION, _sunk),
    Break("A9", ATTENTION, _scale_ignored),
    Break("A9", ATTENTION, _one_query),
    Break("A9", "experiments.claims.multi_head_noise.draw_gamma", _shared_noise),
)
