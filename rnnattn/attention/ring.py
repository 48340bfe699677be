"""Attention to a sequence that lies on several devices: keys and values travel round a ring.

Each of D devices keeps its queries. Keys and values move on by one device at a time; whoever holds
them makes the O and L of its own queries and these keys (`rnnattn.attention.pair`), and merges them
with those of the keys that came by before, which are disjoint from these:

    L = log(e^L₁ + e^L₂)                O = e^(L₁ − L) O₁ + e^(L₂ − L) O₂

Backward, L is that of all keys, and so P = e^(s − L) of a block needs nothing of the other blocks:
its parts of dq, dk and dv are those of `rnnattn.attention.equations`, and what is left to do is to
add them up:

    forward     travels: k, v                       stays: q, O, L, bias
    backward    travels: k, v, dk, dv               stays: q, O, L, dO, dL, dq, bias, dbias

A bias and a mask stay with their queries, T/D of them and all keys, of which each stop reads the
columns of those that a device holds. Functions and dropout are of the places of chunks in the whole
sequence. Sinks join the softmax when all keys have been.

A device holds 1/D of the queries, 1/D of the keys and the 1/D that comes next. With a causal mask
the end of a sequence has more to do than its beginning, and so each device takes two of 2D chunks,
one from either end. Wherever its keys come from, it then has two pairs of chunks to attend to:

    D = 4       contiguous   0 1 | 2 3 | 4 5 | 6 7
                zigzag       0 7 | 1 6 | 2 5 | 3 4

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
Sources: Liu, Zaharia & Abbeel 2023 (ring attention); Brandon et al. 2023 (striped attention: work
balanced under a causal mask); Dubey et al. 2024, section 3.3.2 (2D chunks, two on each device).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import rnnattn.attention.pair as pair
from rnnattn.attention.arguments import problem
from rnnattn.attention.equations import joined, merged
from rnnattn.attention.masking import any_in_reach, only_seeing, rows_in_reach
from rnnattn.attention.problem import Masking, Operands
from rnnattn.attention.rule import as_given, instantiated, wanted
from rnnattn.attention.xla import heads_first
from rnnattn.precision import accumulator, varying_together

# What of the arguments has the order of the sequence along axis 1.
IN_ORDER = ("query", "key", "value", "query_segment_ids", "key_value_segment_ids")


def zigzag_order(devices):
    """(D, 2): the chunks of each device."""
    first = np.arange(devices, dtype=np.int32)
    return np.stack([first, 2 * devices - 1 - first], 1)


class Ring(NamedTuple):
    """Who holds what. After n stops a device holds what is at home n devices before it."""

    axis_name: str
    devices: int
    chunks: int  # on each device: 1, or 2 in a zigzag
    stops: tuple[int, int] = (0, 0)  # the first and the last that have anything to see

    def places(self):
        """(devices, chunks): where in the sequence lies what each device has at home."""
        contiguous = np.arange(self.devices, dtype=np.int32)[:, None]
        return zigzag_order(self.devices) if self.chunks == 2 else contiguous

    def pairs(self):
        """(a, b), a chunk of queries and one of keys, for all of a device."""
        n = jnp.arange(self.chunks**2, dtype=jnp.int32)
        return n // self.chunks, n % self.chunks

    def every_stop(self):
        first, last = self.stops
        return jnp.arange(first, last + 1, dtype=jnp.int32)

    def cut(self, x, n, axis):
        """Chunk n of what a device holds."""
        if x is None or self.chunks == 1:
            return x
        size = x.shape[axis] // self.chunks
        return lax.dynamic_slice_in_dim(x, n * size, size, axis)

    def put(self, x, chunk, n, axis):
        if self.chunks == 1:
            return chunk
        return lax.dynamic_update_slice_in_dim(x, chunk, n * chunk.shape[axis], axis)

    def add(self, x, chunk, n, axis):
        return self.put(x, self.cut(x, n, axis) + chunk, n, axis)

    def place(self, x, keys, stop, a, b):
        """Where in x, of the own queries and all keys, lie chunk a of these and b of those held.

        Its corner and its size, for a device that holds so many keys.
        """
        home = (lax.axis_index(self.axis_name) - stop) % self.devices
        t, s = x.shape[3] // self.chunks, keys // self.chunks
        row, rows = (a * t, t) if x.shape[3] > 1 else (0, 1)
        column, columns = ((home * self.chunks + b) * s, s) if x.shape[4] > 1 else (0, 1)
        corner = [jnp.asarray(n, jnp.int32) for n in (0, 0, 0, row, column)]
        return corner, (*x.shape[:3], rows, columns)

    def move(self, tree, stops=1):
        """To the device that many further on, all round the ring."""
        D = self.devices
        if stops % D == 0:
            return tree
        route = [(device, (device + stops) % D) for device in range(D)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, route), tree)


def ring_of(axis_name, devices, layout, options):
    """The ring, and whether chunks have to change places for the work to be balanced."""
    to_left, _ = options.window or (None, None)
    uneven = layout == "contiguous" and options.is_causal and to_left is None
    ring = Ring(axis_name, devices, 2 if devices > 1 and (uneven or layout == "zigzag") else 1)
    return ring, ring.chunks == 2 and layout == "contiguous"


def stops_of(ring, options, T, S):
    """The stops from the first to the last at which some device may see something.

    Negative ones count against the direction of travel: a window to both sides, or a zigzag with a
    window, sees the neighbours on either side.
    """
    D, C = ring.devices, ring.chunks
    t, s, places = T // (D * C), S // (D * C), ring.places()
    offset = t * places[:, None, :, None] - s * places[None, :, None, :]
    with jax.ensure_compile_time_eval():
        offsets = Masking(jnp.asarray(offset.reshape(-1), jnp.int32))
        busy = np.asarray(any_in_reach(options, offsets, 0, t - 1, s)).reshape(offset.shape)
    device, home = np.nonzero(busy.any((2, 3)))
    first, last = (int(n) for n in ((device - home).min(initial=D), (device - home).max(initial=0)))
    return (min(first, last), last) if last - first < D else (0, D - 1)


class _Held(NamedTuple):
    """What travels."""

    key: Array
    value: Array
    segments: Array | None


def _masking_of_pair(ring, masking, T, S, stop, a, b):
    """Who may see whom among chunk a of the device's own T queries and b of the S keys it holds."""
    device, places = lax.axis_index(ring.axis_name), jnp.asarray(ring.places())
    row = places[device, a] * (T // ring.chunks)
    column = places[(device - stop) % ring.devices, b] * (S // ring.chunks)
    behind = lambda lengths, place: None if lengths is None else lengths - place
    ranges = masking.key_ranges
    if ranges is not None:  # of all queries, in the order of the sequence
        ranges = lax.dynamic_slice_in_dim(ranges, row, T // ring.chunks, 1)
        ranges = jnp.maximum(ranges, 0) - column
    return Masking(
        offset=(row - column)[None],
        mask=_cut_logits(ring, masking.mask, S, stop, a, b),
        dropout_keys=masking.dropout_keys,
        key_ranges=ranges,
        functions=masking.functions,
        corner=jnp.stack([row, column])[None],
        query_lengths=behind(masking.query_lengths, row),
        key_lengths=behind(masking.key_lengths, column),
        query_segments=ring.cut(masking.query_segments, a, 1),
        key_segments=ring.cut(masking.key_segments, b, 1),
    )


def _cut_logits(ring, x, keys, stop, a, b):
    return None if x is None else lax.dynamic_slice(x, *ring.place(x, keys, stop, a, b))


def _over_pairs(ring, options, problem, stop, attend, carry):
    """`attend(carry, operands, masking, a, b, stop)` for each pair of chunks that sees anything."""
    operands, masking = problem
    T, S = operands.query.shape[3], operands.key.shape[2]

    def visit(carry, ab):
        a, b = ab
        of_pair = _masking_of_pair(ring, masking, T, S, stop, a, b)

        def see(carry):
            chunks = Operands(
                ring.cut(operands.query, a, 3),
                ring.cut(operands.key, b, 2),
                ring.cut(operands.value, b, 2),
                operands.scale,
                _cut_logits(ring, operands.bias, S, stop, a, b),
                None,
                operands.score_arrays,
            )
            return attend(carry, chunks, of_pair, a, b, stop)

        rows, keys = T // ring.chunks, S // ring.chunks
        in_reach = any_in_reach(options, of_pair, 0, rows - 1, keys)
        if of_pair.key_ranges is not None:
            in_reach = rows_in_reach(options, of_pair, rows, keys)
        some = jnp.any(in_reach)
        return lax.cond(some, see, lambda carry: carry, carry), None

    return lax.scan(visit, carry, ring.pairs())[0]


def _holding(operands, masking, held):
    """Operands and masking with the keys that a device holds in place of its own."""
    operands = operands._replace(key=held.key, value=held.value)
    return operands, masking._replace(key_segments=held.segments)


def _forward_round(ring, options, operands, masking):
    """O and L of a device's queries."""

    def attend(seen, operands, masking, a, b, _):
        o, lse = (ring.cut(x, a, 3) for x in seen)
        more = merged(o, lse, *pair.forward(options, operands, masking))
        return tuple(ring.put(x, chunk, a, 3) for x, chunk in zip(seen, more, strict=True))

    def visit(seen, held, stop):
        there = _holding(operands, masking, held)
        return _over_pairs(ring, options, there, stop, attend, seen)

    def step(carry, stop):
        seen, held = carry
        coming = ring.move(held)  # under way while this is computed
        return (visit(seen, held, stop), coming), None

    q, k, v, *_ = operands
    wide, rows = accumulator(q.dtype), q.shape[:4]
    seen = (
        jnp.zeros_like(v, wide, shape=(*rows, v.shape[-1])),
        jnp.full_like(v, -jnp.inf, wide, shape=rows),
    )
    (first, last), stops = ring.stops, ring.every_stop()
    held = ring.move(_Held(k, v, masking.key_segments), first)
    if last > first:
        (seen, held), _ = lax.scan(step, (seen, held), stops[:-1])
    o, lse = visit(seen, held, stops[-1])
    return o, lse


def _backward_round(ring, options, operands, masking, o, lse, do, dlse):
    """The gradient of a device's operands, in the accumulator's dtype."""
    seeing = lse > -jnp.inf
    per_row = (o, lse, only_seeing(seeing, do), only_seeing(seeing, dlse))

    def attend(gradient, operands, masking, a, b, stop):
        (dq, dscale, dbias, darrays), dk, dv = gradient
        of_a = (ring.cut(x, a, 3) for x in per_row)
        d = pair.gradient(options, operands, masking, *of_a)
        dscale = None if dscale is None else dscale + d.scale
        if dbias is not None:
            corner, size = ring.place(dbias, k.shape[2], stop, a, b)
            added = lax.dynamic_slice(dbias, corner, size) + d.bias
            dbias = lax.dynamic_update_slice(dbias, added, corner)
        darrays = jax.tree.map(jnp.add, darrays, d.score_arrays)
        dq, dk = ring.add(dq, d.query, a, 3), ring.add(dk, d.key, b, 2)
        return (dq, dscale, dbias, darrays), dk, ring.add(dv, d.value, b, 2)

    zeros = lambda x: jnp.zeros_like(x, lse.dtype)
    q, k, v, scale, bias, *_ = operands

    def visit(home, held, stop):
        """What stays at home after this stop, and what it adds to dk and dv, which travel."""
        start, there = (home, zeros(k), zeros(v)), _holding(operands, masking, held)
        home, *added = _over_pairs(ring, options, there, stop, attend, start)
        return home, added

    def step(carry, stop):
        home, held, dheld = carry
        coming, dheld = ring.move(held), ring.move(dheld)
        home, added = visit(home, held, stop)
        return (home, coming, jax.tree.map(jnp.add, dheld, added)), None

    (first, last), stops = ring.stops, ring.every_stop()
    held = ring.move(_Held(k, v, masking.key_segments), first)
    dbias = None if bias is None or not options.bias_gradient else zeros(bias)
    darrays = jax.tree.map(zeros, operands.score_arrays) if options.score_gradient else None
    home = (zeros(q), zeros(scale) if options.scale_gradient else None, dbias, darrays)
    home, dheld = visit(home, held, stops[0])
    if last > first:
        (home, _, dheld), _ = lax.scan(step, (home, ring.move(held), dheld), stops[1:])
    (dq, dscale, dbias, darrays), (dk, dv) = home, ring.move(dheld, -last)
    return Operands(dq, dk, dv, dscale, dbias, None, darrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(ring, options, operands, masking):
    """O and L of a device's queries over all keys."""
    return _forward_round(ring, options, operands, masking)


def _attend_fwd(ring, options, operands, masking):
    """Keeps the device's operands, O and L, and what of scale, bias and score is differentiated."""
    asked = tuple(map(wanted, (operands.scale, operands.bias, operands.score_arrays)))
    operands, masking = jax.tree.map(lambda x: x.value, (operands, masking))
    o, lse = _forward_round(ring, options, operands, masking)
    return (o, lse), (operands, masking, o, lse, asked)


def _attend_bwd(ring, options, residuals, cotangents):
    """dq = Σ dS k and dbias at home; dk = Σ dSᵀ q and dv = Σ Pᵀ dO on their way round."""
    *kept, asked = residuals
    wants_scale, wants_bias, wants_score = (flag.size > 0 for flag in asked)
    options = options._replace(
        scale_gradient=wants_scale, bias_gradient=wants_bias, score_gradient=wants_score
    )
    operands = kept[0]
    gradient = _backward_round(ring, options, *kept, *instantiated(cotangents, operands))
    return as_given(gradient, operands), None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def attend_to_parts(ring, exchanged, options, arrays):
    """O and L of what one device holds."""
    arrays = varying_together(arrays)
    if exchanged:
        to = lambda x: None if x is None else _to_zigzag(ring, x)
        arrays = arrays._replace(**{name: to(getattr(arrays, name)) for name in IN_ORDER})
    # Lengths count from where the sequence begins, and so wait for its chunks.
    apart = arrays._replace(query_seq_lengths=None, key_value_seq_lengths=None)
    if arrays.function_arrays is not None:  # places of a chunk are in no map
        of_mask, of_score, _ = arrays.function_arrays
        apart = apart._replace(function_arrays=(of_mask, of_score, ()))
    operands, masking = problem(options, apart)
    operands = heads_first(operands)
    lengths = lambda x: None if x is None else x.astype(jnp.int32)
    masking = masking._replace(
        query_lengths=lengths(arrays.query_seq_lengths),
        key_lengths=lengths(arrays.key_value_seq_lengths),
    )
    if exchanged:
        operands = operands._replace(bias=_logits_to_zigzag(ring, operands.bias))
        masking = masking._replace(mask=_logits_to_zigzag(ring, masking.mask))
    B, T, N, _ = arrays.query.shape
    o, lse = _attend(ring, options, operands._replace(sinks=None), masking)
    if operands.sinks is not None:
        sees = lse > -jnp.inf
        share, lse = joined(lse, operands.sinks)
        o = only_seeing(sees, share[..., None] * o)
    rows = lambda x: jnp.moveaxis(x.reshape(B, N, T, *x.shape[4:]), 1, 2)
    results = rows(o.astype(arrays.value.dtype)), rows(lse)
    return tuple(_from_zigzag(ring, x) if exchanged else x for x in results)


def _routes(ring):
    """Where the even chunk of each device goes, and its odd one: the other way for the return."""
    home = {int(n): device for device, pair in enumerate(zigzag_order(ring.devices)) for n in pair}
    return [[(device, home[2 * device + odd]) for device in range(ring.devices)] for odd in (0, 1)]


def _to_zigzag(ring, x, axis=1):
    """From chunks 2i and 2i + 1 of an axis to i and 2D − 1 − i. Each device gets one even chunk."""
    halves = jnp.split(x, 2, axis)
    pairs = zip(halves, _routes(ring), strict=True)
    even, odd = (lax.ppermute(half, ring.axis_name, route) for half, route in pairs)
    return jnp.concatenate(_swapped(ring, even, odd), axis)


def _logits_to_zigzag(ring, x):
    """Of the device's queries and all keys, neither of which has to have an axis."""
    if x is None:
        return None
    x = x if x.shape[3] == 1 else _to_zigzag(ring, x, 3)
    if x.shape[4] == 1:
        return x
    chunks = jnp.split(x, 2 * ring.devices, 4)
    return jnp.concatenate([chunks[n] for n in zigzag_order(ring.devices).reshape(-1)], 4)


def _from_zigzag(ring, x):
    back = [[(there, here) for here, there in route] for route in _routes(ring)]
    halves = _swapped(ring, *jnp.split(x, 2, axis=1))
    pairs = zip(halves, back, strict=True)
    halves = [lax.ppermute(half, ring.axis_name, route) for half, route in pairs]
    return jnp.concatenate(halves, axis=1)


def _swapped(ring, a, b):
    """(a, b) on even devices and (b, a) on odd ones."""
    is_even = lax.axis_index(ring.axis_name) % 2 == 0
    return jnp.where(is_even, a, b), jnp.where(is_even, b, a)
