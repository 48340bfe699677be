"""The dropout of attention weights: the same bits whichever block asks, in every schedule."""

import jax
import jax.numpy as jnp
from jax import lax

_TILE = 128  # the keep bits are drawn for squares of this size


def dropout_keys(key, B, M, G):
    """A key for each batch row and query head.

    Of the one kind whose bits are the same under `vmap`, whatever the kind of `key`.
    """
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    of_rows = fold(key, jnp.arange(B, dtype=jnp.uint32))
    return jax.vmap(fold, (0, None))(of_rows, jnp.arange(M * G, dtype=jnp.uint32)).reshape(B, M, G)


def dropout_mask(options, masking, first_row, first_column, T, S):
    """Z for T queries and S keys from the given ones on; None without dropout.

    The bits of tile (⌊t/128⌋, ⌊s/128⌋) come from the two indices folded into the head's key, so
    that they are the same whichever block asks.
    """
    if options.dropout_rate == 0:
        return None
    rate, keys = options.dropout_rate, masking.dropout_keys
    if masking.corner is not None:
        first_row, first_column = masking.corner[0] + jnp.array([first_row, first_column])

    def tiles(first, size):
        """The tiles that cover `size` from `first` on, wherever it lies in its own."""
        n = (size + _TILE - 2) // _TILE + 1
        return first // _TILE + jnp.arange(n, dtype=jnp.int32)

    def tile(key, i, j):
        key = jax.random.fold_in(jax.random.fold_in(key, i), j)
        # a float32, so that x64 mode draws the same bits
        return jax.random.bernoulli(key, jnp.float32(1 - rate), (_TILE, _TILE))

    rows, columns = tiles(first_row, T), tiles(first_column, S)
    grid = jax.vmap(jax.vmap(tile, (None, None, 0)), (None, 0, None))
    bits = jax.vmap(grid, (0, None, None))(keys.reshape(-1), rows, columns)
    bits = jnp.swapaxes(bits, 2, 3)
    bits = bits.reshape(*keys.shape, rows.size * _TILE, columns.size * _TILE)
    start = (0, 0, 0, first_row - rows[0] * _TILE, first_column - columns[0] * _TILE)
    bits = lax.dynamic_slice(bits, [jnp.int32(n) for n in start], (*keys.shape, T, S))
    return jnp.where(bits, 1 / (1 - rate), 0)


def drop(p, z):
    return p if z is None else p * z.astype(p.dtype)
