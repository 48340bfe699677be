"""What is random in the steps of a recurrent unit: its equations, and the bits they are drawn from.

    s = Z ⊙ s₋ + (1 − Z) ⊙ ŝ        zoneout of a field s of the state: ŝ is what the step makes of
                                    it, and Z is 1 with probability p                       (Z1)
    h̃ = d ⊙ h₋                      what the products of a step read of h₋, d the same at every
                                    step: 1 / (1 − q) with probability 1 − q, or 0          (Z2)
    g̃ = e ⊙ g                       what a step writes to the memory of its candidate g, e drawn
                                    for each step, as d is                                  (Z3)

Z2 and Z3 have an expectation of h₋ and of g; that of Z1 is the same with p in place of Z, which is
what runs where nothing is drawn. The gradient, with dh̃ what comes back to h̃:

    dŝ = (1 − Z) ⊙ ds               ds₋ = Z ⊙ ds + what comes back through ŝ                (Z4)
    dh₋ += d ⊙ dh̃                                                                           (Z5)

and that of e is in the units, which say what their candidate is. Z, d and e are constants. Sources:
Krueger et al. 2017 (Z1); Gal & Ghahramani 2016 (Z2); Semeniuta, Severyn & Barth 2016 (Z3).

Axes: T time, B batch, H hidden width, R width of h.
"""

from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rnnattn.precision import accumulator


class Noise(NamedTuple):
    """The rates, fixed when a function is traced."""

    zoneout: tuple[float, ...] = ()  # of each field of the state; empty without
    recurrent_dropout: float = 0.0
    candidate_dropout: float = 0.0


class Drawn(NamedTuple):
    """What was drawn; None where nothing was."""

    reads: Array | None = None  # which of h the products read: (B, R), the same for all steps
    zoned: tuple[Array | None, ...] = ()  # which of each field keep their value: (T, B, width)
    candidate: Array | None = None  # which of the candidate are written: (T, B, H)


QUIET, NOTHING = Noise(), Drawn()


def row_keys(key, B):
    """A key for each row, as its data: (B, 2).

    Of the one kind whose bits are the same under `vmap`, whatever the kind of `key`.
    """
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return _folded(key[None], jnp.arange(B, dtype=jnp.uint32))[0]


def step_keys(rows, T):
    """A key for each step of each row, as its data: (T, B, 2)."""
    folded = _folded(_keys(rows), 1 + jnp.arange(T, dtype=jnp.uint32))
    return jnp.swapaxes(folded, 0, 1)


def draw_reads(noise, rows, width):
    """`Drawn.reads`, from the keys of rows; None without recurrent dropout."""
    rate = noise.recurrent_dropout
    if rate == 0:
        return None
    keys = _folded(_keys(rows), jnp.zeros(1, jnp.uint32))[:, 0]
    return _uniform(keys, width) >= rate


def draw_steps(noise, keys, state):
    """The rest of `Drawn`, from the keys of steps: the same whichever steps are asked for."""
    if keys is None:
        return NOTHING
    widths = [s.shape[-1] for s in state]
    rates = [*(noise.zoneout or len(state) * (0.0,)), noise.candidate_dropout]
    widths = [n if rate > 0 else 0 for n, rate in zip([*widths, widths[-1]], rates, strict=True)]
    parts = jnp.split(_uniform(keys, sum(widths)), list(accumulate(widths))[:-1], axis=-1)
    drawn = [u < p if p > 0 else None for u, p in zip(parts, rates, strict=True)]
    *zoned, dropped = drawn
    return Drawn(None, (*zoned,), None if dropped is None else ~dropped)


def zoneout(noise, zoned, before, after):
    """Z1: the state after a step, from that before it and what the step makes of it."""
    if not noise.zoneout:
        return after
    fields = zip(noise.zoneout, zoned or len(after) * (None,), before, after, strict=True)
    return type(after)(*(_mixed(p, Z, s, made) for p, Z, s, made in fields))


def _mixed(p, Z, before, after):
    if p == 0:
        return after
    if Z is not None:
        return jnp.where(Z, before, after)
    wide = accumulator(after.dtype)
    return (p * before.astype(wide) + (1 - p) * after.astype(wide)).astype(after.dtype)


def zoneout_gradient(noise, zoned, dafter):
    """Z4: what comes back to what a step makes of the state, and past it to the state before."""
    if not noise.zoneout:
        return dafter, None
    fields = zip(noise.zoneout, zoned or len(dafter) * (None,), dafter, strict=True)
    dmade, dheld = zip(*(_shared(p, Z, d) for p, Z, d in fields), strict=True)
    return type(dafter)(*dmade), type(dafter)(*dheld)


def _shared(p, Z, d):
    if Z is None:
        return (1 - p) * d, p * d
    return jnp.where(Z, 0, d), jnp.where(Z, d, 0)


def read(noise, reads, h):
    """Z2: h as the products of a step, or of many, read it."""
    if reads is None:
        return h
    wide = h.astype(accumulator(h.dtype))
    return _kept_of(wide, noise.recurrent_dropout, reads).astype(h.dtype)


def read_gradient(noise, reads, dh):
    """Z5: what comes back to h₋ through the products."""
    return dh if reads is None else _kept_of(dh, noise.recurrent_dropout, reads)


def _kept_of(x, rate, reads):
    return jnp.where(jnp.broadcast_to(reads, x.shape), x / (1 - rate), 0)


def of_candidate(noise, candidate, dtype):
    """e, in the dtype of sums; None without."""
    if candidate is None:
        return None
    return jnp.where(candidate, jnp.asarray(1 / (1 - noise.candidate_dropout), dtype), 0)


def scaled(x, e):
    """e ⊙ x; no e leaves x."""
    return x if e is None else x * e


def _keys(data):
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def _folded(keys, numbers):
    """The data of keys (N,) with numbers (M,) folded in: (N, M, 2)."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return jax.random.key_data(fold(keys, numbers))


def _uniform(keys, width):
    """Numbers in [0, 1), of a width, from the data of keys (…, 2)."""
    # float32 in x64 mode, too, which then draws the same bits
    draw = lambda key: jax.random.uniform(key, (width,), jnp.float32)
    for _ in range(keys.ndim - 1):
        draw = jax.vmap(draw)
    return draw(_keys(keys))
