"""The long short-term memory (LSTM), with its gradient derived by hand.

    z = x w_x + h₋ w_h + b              pre-activations, four blocks in the order i, f, g, o
    i, f, o = σ(z_i), σ(z_f), σ(z_o)    g = tanh(z_g)                                   (L1)
    c = f ⊙ c₋ + i ⊙ g                  h = o ⊙ tanh(c)                                 (L2)

h₋ and c₋ are the state before the step. The gradient, with dh and dc what comes back from
outside and from the next step:

    dc ← dc + dh ⊙ o ⊙ (1 − tanh²c)                                                     (L3)
    dz_i = dc ⊙ g ⊙ i(1 − i)            dz_f = dc ⊙ c₋ ⊙ f(1 − f)
    dz_g = dc ⊙ i ⊙ (1 − g²)            dz_o = dh ⊙ tanh(c) ⊙ o(1 − o)                  (L4)
    dw_x = Σ xᵀ dz      dw_h = Σ h₋ᵀ dz      db = Σ dz      over batch and time         (L5, L6)
    dx = dz w_xᵀ        dh₋ = dz w_hᵀ                                                   (L7)
    dc₋ = dc ⊙ f                                                                        (L8)

Variants change single terms: peepholes p add p_i ⊙ c₋, p_f ⊙ c₋, p_o ⊙ c to z_i, z_f, z_o; a
coupled gate sets f = 1 − i; a clip bounds every z; a projection P makes h = (o ⊙ tanh c) P.

Axes: B batch, T time, D input width, H hidden width, R projected width (H without projection).
Sources: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate); Gers &
Schmidhuber 2000 (peepholes); Graves & Schmidhuber 2005 (the full gradient); Sak et al. 2014
(projection); Greff et al. 2015 (coupled gates). L1–L8 are the claims of the notes, corrected.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class LSTMParams(NamedTuple):
    """The weights of one layer and direction, multiplied on the right: x @ w_x + h @ w_h + b."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "R 4*H"]
    b: Float[Array, " 4*H"]
    peephole: Float[Array, "3 H"] | None = None
    projection: Float[Array, "H R"] | None = None


class LSTMState(NamedTuple):
    """What one step hands to the next. For 16-bit inputs c is float32, h is 16-bit."""

    h: Float[Array, "B R"]
    c: Float[Array, "B H"]


# ---- equations: one step, no loop -------------------------------------------------------------


class _Variant(NamedTuple):
    """What of the equations is fixed when a function is traced."""

    clip: float | None = None
    coupled: bool = False


class _Slopes(NamedTuple):
    """The local derivatives of a step: none depends on what comes back through time."""

    c: Array  # ∂m/∂c   = o ⊙ (1 − tanh²c)
    i: Array  # ∂c/∂z_i = g ⊙ i(1 − i)
    f: Array  # ∂c/∂z_f = c₋ ⊙ f(1 − f)
    g: Array  # ∂c/∂z_g = i ⊙ (1 − g²)
    o: Array  # ∂m/∂z_o = tanh(c) ⊙ o(1 − o)
    carry: Array  # ∂c/∂c₋ = f


def _accumulator(dtype):
    """16-bit numbers are summed in float32."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def _dot(x, w):
    return jnp.matmul(x, w, preferred_element_type=_accumulator(x.dtype))


def _where(condition, a, b):
    """`jnp.where` with a condition (…, B) on rows (…, B, width); no condition chooses `a`."""
    return a if condition is None else jnp.where(condition[..., None], a, b)


def _blocks(row):
    """The blocks i, f, g, o of a row (…, 4H)."""
    return jnp.split(row, 4, axis=-1)


def _halve(row):
    """½ on the blocks i, f, o: σ(z) = ½ + ½ tanh(½z), so that one tanh makes all four gates."""
    i, f, g, o = _blocks(row)
    return jnp.concatenate([0.5 * i, 0.5 * f, g, 0.5 * o], axis=-1)


def _clip_bounds(clip):
    """The bound of each block of a halved row."""
    return 0.5 * clip, 0.5 * clip, clip, 0.5 * clip


def _peephole_terms(peephole, c_prev, c):
    """What c adds to a halved row: the input and forget gate see c₋, the output gate c."""
    p_i, p_f, p_o = jnp.expand_dims(0.5 * peephole, range(1, c.ndim))
    return jnp.concatenate([p_i * c_prev, p_f * c_prev, jnp.zeros_like(c), p_o * c], axis=-1)


def _gates(a, variant):
    """L1: i, f, g, o from the halved row a = (½z_i, ½z_f, z_g, ½z_o)."""
    if variant.clip is not None:
        bounds = _clip_bounds(variant.clip)
        clipped = [jnp.clip(z, -κ, κ) for z, κ in zip(_blocks(a), bounds, strict=True)]
        a = jnp.concatenate(clipped, axis=-1)
    i, f, g, o = _blocks(jnp.tanh(a))
    i = 0.5 + 0.5 * i
    f = 1 - i if variant.coupled else 0.5 + 0.5 * f
    o = 0.5 + 0.5 * o
    return i, f, g, o


def _cell(a, c_prev, peephole, variant):
    """L1, L2: m = o ⊙ tanh(c), which is h where nothing is projected; c; a with its peepholes."""
    if peephole is None:
        i, f, g, o = _gates(a, variant)
        c = f * c_prev + i * g
    else:
        seen = a + _peephole_terms(peephole, c_prev, jnp.zeros_like(c_prev))
        i, f, g, _ = _gates(seen, variant)
        c = f * c_prev + i * g
        a = a + _peephole_terms(peephole, c_prev, c)
        *_, o = _gates(a, variant)
    return o * jnp.tanh(c), c, a


def _halve_params(params):
    """The weights as `_cell` wants them; what is added to rows is in the accumulator's dtype."""
    dtype = _accumulator(params.b.dtype)
    return params._replace(
        w_x=_halve(params.w_x),
        w_h=_halve(params.w_h),
        b=_halve(params.b.astype(dtype)),
        peephole=None if params.peephole is None else params.peephole.astype(dtype),
    )


def _advance(halved, from_x, state, valid, fresh, variant):
    """The state after a step, and a; `from_x` is ½(x w_x + b), halved as the weights are.

    valid, fresh: (B,) or None. A row that is not valid holds its state, a fresh one starts from 0.
    """
    h, c = state if fresh is None else (_where(fresh, 0, s) for s in state)
    m, c, a = _cell(from_x + _dot(h, halved.w_h), c, halved.peephole, variant)
    h = m.astype(h.dtype)
    if halved.projection is not None:
        h = _dot(h, halved.projection).astype(h.dtype)
    return LSTMState(_where(valid, h, state.h), _where(valid, c, state.c)), a


def _slopes(a, c_prev, c, variant):
    """The factors of L3, L4 and L8, and m. A pre-activation beyond the clip moves nothing."""
    i, f, g, o = _gates(a, variant)
    tanh_c = jnp.tanh(c)
    d_i = (g - c_prev if variant.coupled else g) * i * (1 - i)
    d_f = jnp.zeros_like(f) if variant.coupled else c_prev * f * (1 - f)
    d_g = i * (1 - g * g)
    d_o = tanh_c * o * (1 - o)
    if variant.clip is not None:
        bounds = _clip_bounds(variant.clip)
        d_i, d_f, d_g, d_o = (
            jnp.where(jnp.abs(z) > κ, 0, d)
            for d, z, κ in zip((d_i, d_f, d_g, d_o), _blocks(a), bounds, strict=True)
        )
    return _Slopes(o * (1 - tanh_c * tanh_c), d_i, d_f, d_g, d_o, f), o * tanh_c


def _cell_gradient(slopes, dm, dc, peephole):
    """L3, L4, L8: dz and dc₋ from the cotangents of m and c."""
    dz_o = dm * slopes.o
    dc = dc + dm * slopes.c
    if peephole is not None:
        p_i, p_f, p_o = peephole[:, None, :]
        dc = dc + dz_o * p_o
    dz_i = dc * slopes.i
    dz_f = dc * slopes.f
    dz_g = dc * slopes.g
    dc_prev = dc * slopes.carry
    if peephole is not None:
        dc_prev = dc_prev + dz_i * p_i + dz_f * p_f
    return jnp.concatenate([dz_i, dz_f, dz_g, dz_o], axis=-1), dc_prev


def _peephole_gradient(dz, c_prev, c):
    """dp_i = Σ dz_i ⊙ c₋, dp_f = Σ dz_f ⊙ c₋, dp_o = Σ dz_o ⊙ c."""
    dz_i, dz_f, _, dz_o = _blocks(dz)
    return jnp.stack([jnp.sum(t, (0, 1)) for t in (dz_i * c_prev, dz_f * c_prev, dz_o * c)])


# ---- schedule: chunks of steps, on XLA --------------------------------------------------------
#
# Time-major. A chunk's input projections are one matrix product before its steps, its weight
# gradients one after them, and all that is not sequential (a, the slopes) is computed for the
# whole chunk at once, in buffers small enough to stay in cache.


class _Schedule(NamedTuple):
    reverse: bool = False
    residuals: Literal["gates", "states"] | int = "states"
    variant: _Variant = _Variant()


class _Steps(NamedTuple):
    """What the steps read besides the state, each (T, B, …); None where a feature is not used."""

    x: Array
    valid: Array | None  # False past a row's length: the state is held, the output is zero
    fresh: Array | None  # True where the state is zeroed before the step


class _Trace(NamedTuple):
    """What the steps leave behind, each (T, B, …); None where it is recomputed."""

    y: Array | None
    c: Array | None
    a: Array | None


def _outer(x, dz):
    """Σ xᵀ dz over the leading axes, as (dzᵀ x)ᵀ: the faster of the two on a CPU."""
    x, dz = x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1])
    return (dz.T @ x.astype(dz.dtype)).T


def _chunk_length(residuals, T):
    """The steps of a chunk: what `residuals` says, else 8 to 32, a divisor of T if there is one."""
    if isinstance(residuals, int):
        return min(residuals, max(T, 1))
    if T <= 32:
        return max(T, 1)
    return max(range(8, 33), key=lambda n: (T % n == 0, n))


def _scan_chunks(chunk, carry, per_step, per_chunk, length, reverse):
    """Scan `chunk(carry, (per_step, per_chunk))`, which returns the same pair, over time.

    What is left of T after whole chunks is one shorter chunk at the end of the time axis.
    """
    T = per_step[0].x.shape[0]
    whole, rest = divmod(T, length)
    cut = whole * length
    split = lambda a: a[:cut].reshape(whole, length, *a.shape[1:])
    join = lambda a: a.reshape(cut, *a.shape[2:])
    body = (jax.tree.map(split, per_step), jax.tree.map(lambda a: a[:whole], per_chunk))
    if rest:
        tail = (jax.tree.map(lambda a: a[cut:], per_step), jax.tree.map(lambda a: a[-1], per_chunk))

    if rest and reverse:
        carry, (last_step, last_chunk) = chunk(carry, tail)
    carry, (per_step, per_chunk) = lax.scan(chunk, carry, body, reverse=reverse, unroll=whole == 1)
    per_step = jax.tree.map(join, per_step)
    if rest and not reverse:
        carry, (last_step, last_chunk) = chunk(carry, tail)
    if rest:
        append = lambda a, b: jnp.concatenate([a, b])
        per_step = jax.tree.map(append, per_step, last_step)
        per_chunk = jax.tree.map(lambda a, b: append(a, b[None]), per_chunk, last_chunk)
    return carry, (per_step, per_chunk)


def _chunk_forward(schedule, halved, state, steps, keep):
    """Run the steps of one chunk; `keep` names what of the trace besides y is wanted."""
    x = _where(steps.valid, steps.x, 0)
    from_x = _dot(x, halved.w_x) + halved.b[None, None]

    def step(state, inputs):
        from_x, valid, fresh = inputs
        state, a = _advance(halved, from_x, state, valid, fresh, schedule.variant)
        y = _where(valid, state.h, 0)
        return state, _Trace(y, state.c if "c" in keep else None, a if "a" in keep else None)

    xs = (from_x, steps.valid, steps.fresh)
    return lax.scan(step, state, xs, reverse=schedule.reverse, unroll=x.shape[0] == 1)


def _chunk_backward(schedule, params, halved, carry, steps, dy, trace, start):
    """The gradient of one chunk: (dparams, dstate) grows by it; dx is returned."""
    dparams, dstate = carry
    dtype = dstate.c.dtype
    peephole, projection = params.peephole, params.projection
    x = _where(steps.valid, steps.x, 0)

    if trace.c is None:
        _, trace = _chunk_forward(schedule, halved, start, steps, keep="ca")
    h_prev = _before(_where(steps.valid, trace.y, start.h[None]), start.h, schedule.reverse)
    c_prev = _before(trace.c, start.c, schedule.reverse)
    if steps.fresh is not None:
        h_prev, c_prev = _where(steps.fresh, 0, h_prev), _where(steps.fresh, 0, c_prev)
    a = trace.a
    if a is None:
        a = _dot(x, halved.w_x) + _dot(h_prev, halved.w_h) + halved.b[None, None]
        if peephole is not None:
            a = a + _peephole_terms(halved.peephole, c_prev, trace.c)
    slopes, m = _slopes(a, c_prev, trace.c, schedule.variant)

    w_x, w_h = params.w_x.astype(dtype), params.w_h.astype(dtype)
    if projection is not None:
        projection = projection.astype(dtype)
    if peephole is not None:
        peephole = peephole.astype(dtype)

    def step(after, inputs):
        dy, slopes, valid, fresh = inputs
        dh = _where(valid, after.h + dy, 0)
        dc = _where(valid, after.c, 0)
        dm = dh if projection is None else dh @ projection.T
        dz, dc = _cell_gradient(slopes, dm, dc, peephole)
        before = LSTMState(dz @ w_h.T, dc)
        if fresh is not None:
            before = LSTMState(*(_where(fresh, 0, d) for d in before))
        before = LSTMState(*(_where(valid, b, a) for a, b in zip(after, before, strict=True)))
        return before, (dz, None if projection is None else dh)

    xs = (dy.astype(dtype), slopes, steps.valid, steps.fresh)
    dstate, (dz, dh) = lax.scan(
        step, dstate, xs, reverse=not schedule.reverse, unroll=x.shape[0] == 1
    )

    grown = LSTMParams(
        w_x=dparams.w_x + _outer(x, dz),
        w_h=dparams.w_h + _outer(h_prev, dz),
        b=dparams.b + jnp.sum(dz, (0, 1)),
        peephole=None
        if peephole is None
        else dparams.peephole + _peephole_gradient(dz, c_prev, trace.c),
        projection=None if projection is None else dparams.projection + _outer(m, dh),
    )
    return (grown, dstate), (dz @ w_x.T).astype(x.dtype)


def _before(after, start, reverse):
    """The state before each step of a chunk from the states after them."""
    parts = [after[1:], start[None]] if reverse else [start[None], after[:-1]]
    return jnp.concatenate(parts)


def _forward(schedule, params, state, steps):
    halved = _halve_params(params)
    keep = {"gates": "ca", "states": "c"}.get(schedule.residuals, "")

    def chunk(state, inputs):
        (steps,), _ = inputs
        after, trace = _chunk_forward(schedule, halved, state, steps, keep)
        return after, (trace, state)

    length = _chunk_length(schedule.residuals, steps.x.shape[0])
    state, (trace, starts) = _scan_chunks(chunk, state, (steps,), (), length, schedule.reverse)
    return state, trace, starts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sequence(schedule, params, state, steps):
    """(y, final state) of a time-major sequence."""
    state, trace, _ = _forward(schedule, params, state, steps)
    return trace.y, state


def _sequence_fwd(schedule, params, state, steps):
    final, trace, starts = _forward(schedule, params, state, steps)
    kept = _Trace(None, None, None) if isinstance(schedule.residuals, int) else trace
    return (trace.y, final), (params, steps, kept, starts)


def _sequence_bwd(schedule, residuals, cotangents):
    """L3 to L8, chunk by chunk against the direction of running; see `_cell_gradient`."""
    params, steps, trace, starts = residuals
    dy, dstate = cotangents
    dtype = _accumulator(steps.x.dtype)
    halved = _halve_params(params)

    def chunk(carry, inputs):
        (steps, dy, trace), start = inputs
        carry, dx = _chunk_backward(schedule, params, halved, carry, steps, dy, trace, start)
        return carry, (dx, ())

    dparams = jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), params)
    carry = (dparams, jax.tree.map(lambda d: d.astype(dtype), dstate))
    length = _chunk_length(schedule.residuals, steps.x.shape[0])
    (dparams, dstate), (dx, _) = _scan_chunks(
        chunk, carry, (steps, dy, trace), starts, length, not schedule.reverse
    )
    cast = lambda d, like: d.astype(like.dtype)
    dparams = jax.tree.map(cast, dparams, params)
    dstate = LSTMState(dstate.h.astype(steps.x.dtype), dstate.c)
    return dparams, dstate, _Steps(dx, None, None)


_sequence.defvjp(_sequence_fwd, _sequence_bwd)


def _full_state(params, state, B):
    """The initial state in the dtypes the steps carry; None is zeros."""
    H, dtype = params.w_h.shape[1] // 4, params.b.dtype
    if state is None:
        h = jnp.zeros((B, params.w_h.shape[0]), dtype)
        return LSTMState(h, jnp.zeros((B, H), _accumulator(dtype)))
    return LSTMState(jnp.asarray(state.h), jnp.asarray(state.c, _accumulator(dtype)))


def _steps(x, lengths, resets, reverse):
    """The masks of a time-major x; a reset past a row's length counts for nothing."""
    valid = None
    if lengths is not None:
        steps = jnp.arange(x.shape[0], dtype=jnp.int32)
        valid = steps[:, None] < lengths.astype(jnp.int32)[None, :]
    if resets is None:
        return _Steps(x, valid, None)
    if valid is not None:
        resets = resets & valid
    if reverse:  # the step run after an episode's first is the last of the episode before
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    return _Steps(x, valid, resets)


@partial(jax.jit, static_argnames=("schedule", "time_major"))
def _run(schedule, time_major, params, x, state, lengths, resets):
    """`lstm` after its arguments are checked."""
    if not time_major:
        x = jnp.swapaxes(x, 0, 1)
        resets = None if resets is None else jnp.swapaxes(resets, 0, 1)
    state = _full_state(params, state, x.shape[1])
    y, state = _sequence(schedule, params, state, _steps(x, lengths, resets, schedule.reverse))
    return (y if time_major else jnp.swapaxes(y, 0, 1)), state


# ---- the public face --------------------------------------------------------------------------


def init_lstm(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    projection_size: int | None = None,
    peephole: bool = False,
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal",
    dtype: Any = jnp.float32,
) -> LSTMParams:
    """Weights for `lstm`: input weights uniform in ±√(3/D), biases zero but for the forget gate's.

    Args:
        forget_bias: the forget gate's bias; 1 lets memory through (Jozefowicz et al. 2015).
        projection_size: R, the width h is projected to, as torch's `proj_size`; None for none.
        peephole: adds peephole weights, zero at first.
        recurrent_init: "orthogonal" makes the block of each gate orthogonal (Saxe et al. 2014);
            "uniform" draws all weights from ±1/√H, as torch does.
        dtype: float32, bfloat16, float16 or float64.
    Raises:
        ValueError: a size is below 1, `recurrent_init` is unknown or `dtype` not a float.
    Example:
        >>> params = init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> params.w_x.shape, params.w_h.shape, params.b.shape
        ((3, 20), (5, 20), (20,))
    """
    D, H, R = input_size, hidden_size, projection_size
    for name, size in {"input_size": D, "hidden_size": H, "projection_size": R}.items():
        if size is not None and size < 1:
            raise ValueError(f"init_lstm: `{name}` must be at least 1, got {size}")
    if recurrent_init not in ("orthogonal", "uniform"):
        raise ValueError(
            f"init_lstm: `recurrent_init` must be 'orthogonal' or 'uniform', got {recurrent_init!r}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"init_lstm: `dtype` must be a floating type, got {jnp.dtype(dtype).name}")
    width = H if R is None else R
    draw = _accumulator(dtype)  # QR has no 16-bit version
    uniform = lambda key, shape, bound: jax.random.uniform(key, shape, draw, -bound, bound)
    orthogonal = jax.nn.initializers.orthogonal(dtype=draw)

    key_x, key_h, key_p = jax.random.split(key, 3)
    if recurrent_init == "uniform":
        w_x, w_h = uniform(key_x, (D, 4 * H), H**-0.5), uniform(key_h, (width, 4 * H), H**-0.5)
    else:
        w_x = uniform(key_x, (D, 4 * H), (3 / D) ** 0.5)
        gates = [orthogonal(k, (width, H), draw) for k in jax.random.split(key_h, 4)]
        w_h = jnp.concatenate(gates, axis=-1)
    b = jnp.zeros(4 * H, draw).at[H : 2 * H].set(forget_bias)
    return LSTMParams(
        w_x.astype(dtype),
        w_h.astype(dtype),
        b.astype(dtype),
        jnp.zeros((3, H), dtype) if peephole else None,
        None if R is None else uniform(key_p, (H, R), H**-0.5).astype(dtype),
    )


def lstm_step(
    params: LSTMParams,
    x: Float[Array, "B D"],
    state: LSTMState,
    *,
    clip: float | None = None,
    coupled: bool = False,
) -> LSTMState:
    """One step (L1, L2): the state after `x`, given the state before it.

    Args:
        clip: bounds every pre-activation to ±clip, as ONNX does; None bounds nothing.
        coupled: f = 1 − i (CIFG); the forget gate's own weights then get a gradient of zero.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and
            what came.
    Gradient:
        L3 to L8, with respect to `params`, `x` and `state`; keeps the pre-activations.
    Example:
        >>> params = init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> state = LSTMState(h=jnp.zeros((2, 5)), c=jnp.zeros((2, 5)))
        >>> lstm_step(params, jnp.ones((2, 3)), state).h.shape
        (2, 5)
    """
    _check_array("lstm_step", "x", x, "(B, D)")
    _check_params("lstm_step", params, x)
    _check_state("lstm_step", params, state, x.shape[0])
    _check_clip("lstm_step", clip)
    schedule = _Schedule(False, "gates", _Variant(clip, coupled))
    _, state = _run(schedule, True, params, x[None], state, None, None)
    return state


def lstm(
    params: LSTMParams,
    x: Float[Array, "... D"],
    state: LSTMState | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    clip: float | None = None,
    coupled: bool = False,
    residuals: Literal["gates", "states"] | int = "states",
    implementation: Literal["xla"] | None = None,
) -> tuple[Float[Array, "... R"], LSTMState]:
    """The hidden state after every step of `x`, and the state after the last one (L1, L2).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`.
        state: the initial state; None is zeros.
        lengths: the valid steps of each row, 0 to T. Outputs past them are zero, whatever x holds
            there reaches nothing, and the returned state is that after the last valid step run
            (the initial state where the length is 0).
        resets: (B, T), or (T, B) with `time_major`. True marks the first step of an episode in time
            order: nothing passes between it and the step before it, in either direction of running,
            as if the episodes ran apart, from zeros. A mark on the first step drops the initial
            state of a run forwards, and leaves the returned state of a run in reverse.
        reverse: run from the last valid step to the first; outputs stay in the order of x.
        time_major: x, y and resets have T before B. Saves two transpositions.
        clip: bounds every pre-activation to ±clip, peephole terms included; None bounds nothing.
        coupled: f = 1 − i (CIFG); the forget gate's own weights then get a gradient of zero.
        residuals: what is kept for the gradient: "gates" (c and the pre-activations of each step),
            "states" (c of each step) or n (the state every n steps); what is not kept is computed
            again. The gradient is the same.
        implementation: "xla", or None, which chooses.
    Returns:
        y (B, T, R), or (T, B, R) with `time_major`, in the dtype of x, and the final state. For
        16-bit inputs c is float32, so that a sequence cut in two and chained equals one run.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        L3 to L8, with respect to `params`, `x` and `state`, from cotangents of y and both parts of
        the final state; lengths and resets are constants. It can be differentiated again in
        reverse and forward mode; for `jax.jvp` of the function itself use `rnnattn.reference.lstm`.
        Under `jax.vmap` over x with shared weights, the weight gradient is one product for each
        example: let B be the batch instead.
    Example:
        >>> params = init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> y, state = lstm(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == state.h[1]).all())
        ((2, 7, 5), True, True)
    """
    _check_sequence("lstm", params, x, state, lengths, resets, time_major, clip)
    if residuals not in ("gates", "states") and not (type(residuals) is int and residuals > 0):
        raise ValueError(
            "lstm: `residuals` must be 'gates', 'states' or a number of steps of at least 1, "
            f"got {residuals!r}"
        )
    if implementation not in (None, "xla"):
        raise ValueError(f"lstm: `implementation` must be None or 'xla', got {implementation!r}")
    schedule = _Schedule(reverse, residuals, _Variant(clip, coupled))
    return _run(schedule, time_major, params, x, state, lengths, resets)


# ---- checks -----------------------------------------------------------------------------------


def _dtype_name(array):
    return jnp.result_type(array).name


def _check_array(function, name, array, shape):
    """A floating array with as many axes as `shape` names."""
    if jnp.ndim(array) != shape.count(",") + 1:
        raise ValueError(f"{function}: `{name}` must have shape {shape}, got {jnp.shape(array)}")
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{function}: `{name}` must be floating, got {_dtype_name(array)}")


def _check_sequence(function, params, x, state, lengths, resets, time_major, clip):
    _check_array(function, "x", x, "(T, B, D)" if time_major else "(B, T, D)")
    _check_params(function, params, x)
    B = x.shape[1] if time_major else x.shape[0]
    _check_state(function, params, state, B)
    _check_masks(function, lengths, resets, B, x.shape[:2])
    _check_clip(function, clip)


def _check_shape(function, name, array, shape, meaning):
    if jnp.shape(array) != shape:
        raise ValueError(
            f"{function}: `{name}` must have shape {meaning} = {shape}, got {jnp.shape(array)}"
        )


def _check_params(function, params, x):
    D = x.shape[-1]
    if jnp.ndim(params.w_h) != 2 or params.w_h.shape[1] % 4 or params.w_h.shape[1] == 0:
        raise ValueError(
            f"{function}: `params.w_h` must have shape (H, 4H), got {jnp.shape(params.w_h)}"
        )
    R, H = params.w_h.shape[0], params.w_h.shape[1] // 4
    _check_shape(function, "params.w_x", params.w_x, (D, 4 * H), "(D, 4H)")
    _check_shape(function, "params.b", params.b, (4 * H,), "(4H,)")
    if params.projection is None:
        _check_shape(function, "params.w_h", params.w_h, (H, 4 * H), "(H, 4H)")
    else:
        _check_shape(function, "params.projection", params.projection, (H, R), "(H, R)")
    if params.peephole is not None:
        _check_shape(function, "params.peephole", params.peephole, (3, H), "(3, H)")
    for name, value in params._asdict().items():
        if value is not None and jnp.result_type(value) != jnp.result_type(x):
            raise ValueError(
                f"{function}: `params.{name}` must have the dtype of `x`, {_dtype_name(x)}, "
                f"got {_dtype_name(value)}"
            )


def _check_state(function, params, state, B):
    if state is None:
        return
    R, H, dtype = params.w_h.shape[0], params.w_h.shape[1] // 4, jnp.result_type(params.b)
    _check_shape(function, "state.h", state.h, (B, R), "(B, H)" if R == H else "(B, R)")
    _check_shape(function, "state.c", state.c, (B, H), "(B, H)")
    if jnp.result_type(state.h) != dtype:
        raise ValueError(
            f"{function}: `state.h` must have the dtype of `x`, {dtype.name}, "
            f"got {_dtype_name(state.h)}"
        )
    if jnp.result_type(state.c) not in (dtype, _accumulator(dtype)):
        raise ValueError(
            f"{function}: `state.c` must be {_accumulator(dtype).name}, got {_dtype_name(state.c)}"
        )


def _check_masks(function, lengths, resets, B, leading):
    if lengths is not None:
        _check_shape(function, "lengths", lengths, (B,), "(B,)")
        if not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
            raise ValueError(f"{function}: `lengths` must be integers, got {_dtype_name(lengths)}")
    if resets is not None:
        _check_shape(function, "resets", resets, leading, "the first two axes of `x`")
        if jnp.result_type(resets) != jnp.bool_:
            raise ValueError(f"{function}: `resets` must be Boolean, got {_dtype_name(resets)}")


def _check_clip(function, clip):
    if clip is not None and not clip > 0:
        raise ValueError(f"{function}: `clip` must be positive or None, got {clip!r}")
