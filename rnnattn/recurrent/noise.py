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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rnnattn.precision import accumulator

_READS, _CANDIDATE, _FIELDS = 0, 1, 2  # what of a row or step is drawn


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
    folded = _folded(_keys(rows), jnp.arange(T, dtype=jnp.uint32))
    return jnp.swapaxes(folded, 0, 1)


def draw_reads(noise, rows, width):
    """`Drawn.reads`, from the keys of rows; None without recurrent dropout."""
    rate = noise.recurrent_dropout
    return None if rate == 0 else _draw(rows, _READS, 1 - rate, width)


def draw_steps(noise, keys, state):
    """The rest of `Drawn`, from the keys of steps: the same whichever steps are asked for."""
    if keys is None:
        return NOTHING
    zoned = (
        None if p == 0 else _draw(keys, _FIELDS + n, p, s.shape[-1])
        for n, (p, s) in enumerate(zip(noise.zoneout, state, strict=False))
    )
    rate = noise.candidate_dropout
    width = state[-1].shape[-1]
    return Drawn(None, (*zoned,), None if rate == 0 else _draw(keys, _CANDIDATE, 1 - rate, width))


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
    if p == 0:
        return d, jnp.zeros_like(d)
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
    return jnp.where(jnp.expand_dims(reads, range(x.ndim - 2)), x / (1 - rate), 0)


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


def _draw(keys, what, share, width):
    """A share of True, of a width, from the data of keys (…, 2)."""

    def one(key):
        # a float32, so that x64 mode draws the same bits
        return jax.random.bernoulli(jax.random.fold_in(key, what), jnp.float32(share), (width,))

    for _ in range(keys.ndim - 1):
        one = jax.vmap(one)
    return one(_keys(keys))
