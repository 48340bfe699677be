"""Positions: sinusoids, the matrix that shifts them, and rotary embeddings in one and two axes.

    ω_m = base^(−2m/d),  m = 0 … d/2 − 1              the frequency of pair m, in radians per step
    e_t = [sin ω_0 t, cos ω_0 t, sin ω_1 t, cos ω_1 t, …]                                (P1)
    T^(k) e_t = e_{t+k},  T^(k) block-diagonal in [[cos ω_m k, sin ω_m k],
                                                   [−sin ω_m k, cos ω_m k]]          (P2, P3)
    y₁ = x₁ cos θ − x₂ sin θ      y₂ = x₂ cos θ + x₁ sin θ      θ = ω_m t                (P4)

P4 is the rotary embedding, y = a R(θ) x on each pair (x₁, x₂) of the features of a head: applied to
queries and keys it makes their product depend on t − s alone. a is 1, but for YaRN. R is
orthogonal and its derivative is a quarter turn of itself, so that the gradient is

    dx = a R(−θ) dy               dθ = x₁ dx₂ − x₂ dx₁

**Angles do not drift.** The product ω t in float32 is wrong by up to 0.06 near t = 2²⁰. Here ω is
known when a function is traced, so ω/2π is rounded in float64 to whole units of 2⁻³² turns. Times a
whole position that is a product of 32-bit integers: exact, for they wrap where an angle does. What
the rounding left, at most half a unit per step, and the fraction of a position, at most half a
step, leave products small enough for float32. So |Δcos| and |Δsin| stay below 1e-6 at every
position from −2³¹ to 2³¹ that the type of the positions can represent, traced or not. Where
positions, or what they are for, are float64, so are the angles.

Axes: B batch, T time, N heads, K head width, d the rotated part of it, J = d/2 pairs.
Sources: Vaswani et al. 2017, §3.5 (sinusoids); Su et al. 2021, arXiv 2104.09864 (rotary); Heo et
al. 2024, arXiv 2403.13298 (two axes); for the scalings see each. P1–P4 are the claims of the notes,
corrected.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Real

from rnnattn.checks import Check, forward_mode
from rnnattn.meshes import in_parts
from rnnattn.precision import varying_together


def sinusoids(
    positions: Real[ArrayLike, "..."],
    dim: SupportsIndex,
    *,
    base: SupportsFloat = 10_000.0,
    first: int = 0,
    dtype: Any = jnp.float32,
) -> Float[Array, "... {dim}"]:
    """The sine and cosine of every frequency at each position, e_t (P1).

    Args:
        positions: in steps, whole or not, of any shape.
        dim: d, even.
        base: the wavelengths run from 2π to 2π · base, exclusive, in steps. Above 1.
        first: the m of the first pair; 1 numbers the pairs as the notes do.
        dtype: of the result: float32, bfloat16, float16 or float64.
    Raises:
        ValueError: `dim` is not even and positive, `base` not a number above 1, `dtype` not a
            float, or `positions` are not numbers.
    Gradient:
        JAX's own, with respect to floating `positions`.
    Example:
        >>> sinusoids(jnp.arange(3), 4).round(2).tolist()[1]  # sin 1, cos 1, sin 0.01, cos 0.01
        [0.8399999737739563, 0.5399999618530273, 0.009999999776482582, 1.0]
    """
    check = Check("sinusoids")
    dim, base = check.integer("dim", dim, 0), _checked_base(check, base)
    check.multiple("dim", dim, 2)
    check.float_dtype("dtype", dtype)
    t = _as_positions(check, "positions", positions)
    return _run_sinusoids(dim, base, first, jax.dtypes.canonicalize_dtype(dtype), t)


def shift_matrix(
    offset: Real[ArrayLike, ""],
    dim: SupportsIndex,
    *,
    base: SupportsFloat = 10_000.0,
    first: int = 0,
    dtype: Any = jnp.float32,
) -> Float[Array, "{dim} {dim}"]:
    """T^(k), which moves sinusoids by `offset` k: T^(k) e_t = e_{t+k} for every t (P2, P3).

    It acts on a column; rows of sinusoids are shifted by `e @ shift_matrix(k).T`. It is orthogonal,
    of determinant 1, and T^(k) T^(l) = T^(k+l).

    Args:
        offset: in steps; may be negative and need not be whole.
        dim, base, first, dtype: as in `sinusoids`.
    Raises:
        ValueError: as `sinusoids` does; `offset` is not a scalar.
    Gradient:
        JAX's own, with respect to a floating `offset`.
    Example:
        >>> moved = shift_matrix(-2, 8) @ sinusoids(5, 8)
        >>> bool(jnp.allclose(moved, sinusoids(3, 8), atol=1e-6))
        True
    """
    check = Check("shift_matrix")
    dim, base = check.integer("dim", dim, 0), _checked_base(check, base)
    check.multiple("dim", dim, 2)
    check.float_dtype("dtype", dtype)
    k = _as_positions(check, "offset", offset)
    check(k.ndim == 0, "offset", "a scalar", f"shape {k.shape}")
    return _run_shift_matrix(dim, base, first, jax.dtypes.canonicalize_dtype(dtype), k)


# ---- frequencies ------------------------------------------------------------------------------


def _geometric(dim, base, first=0):
    """ω_m = base^(−2m/d) in float64."""
    m = np.arange(first, first + dim // 2)
    return float(base) ** (-2 * m / dim)


class Scaling:
    """What changes the frequencies of `rope`, so that it reaches beyond its training length.

    The fields of a scaling are named as in the `rope_scaling` of a checkpoint's `config.json`;
    where one has a default, None stands for it, as it does there.
    """

    def __post_init__(self):
        check = Check(type(self).__name__)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is None and field.default is not dataclasses.MISSING:
                object.__setattr__(self, field.name, field.default)  # the class is frozen
            elif not isinstance(value, bool):
                positive = value is not None and value > 0
                check(positive, field.name, "positive", repr(value))

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        """The frequencies of the `dim` / 2 pairs, in radians per step."""
        raise NotImplementedError

    @property
    def amplitude(self) -> float:
        """a, the length that a rotated pair of length 1 gets."""
        return 1.0

    def _check_below(self, low, high):
        below, above = getattr(self, low), getattr(self, high)
        got = f"{below!r} and {above!r}"
        Check(type(self).__name__)(below < above, low, f"below `{high}`", got)


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation: ω_m / factor (Chen et al. 2023, arXiv 2306.15595).

    Example:
        >>> LinearScaling(4.0).frequencies(4, 10_000.0).tolist()
        [0.25, 0.0025]
    """

    factor: float | int

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        return _geometric(dim, base) / self.factor


@dataclass(frozen=True)
class NTKScaling(Scaling):
    """A larger base, base · factor^(d/(d−2)): ω_0 stays, the last is divided by factor.

    Peng et al. 2023, arXiv 2309.00071, §3.1. "Dynamic" NTK scaling by s at length L, of a model
    trained at length L₀, is this one with factor = s L / L₀ − (s − 1).

    Example:
        >>> NTKScaling(4.0).frequencies(4, 10_000.0).tolist()
        [1.0, 0.0025]
    """

    factor: float | int

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        if dim == 2:  # ω_0 alone
            return _geometric(dim, base)
        return _geometric(dim, base * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YaRNScaling(Scaling):
    """Fast pairs stay, slow ones are interpolated, those between are mixed; y grows by a.

        ω'_m = (1 − r_m) ω_m + r_m ω_m / factor,      a = 0.1 ln(factor) + 1

    r_m rises from 0 to 1, linearly in m, between the pair that turns `beta_fast` times within the
    original length and the one that turns `beta_slow` times: as in the code of Peng et al. 2023,
    arXiv 2309.00071, and in the models trained with it. (In its text r is linear in the turns.)

    Args:
        original_max_position_embeddings: the length of training, in steps.
        attention_factor: a; None computes it. DeepSeek's `mscale` s and `mscale_all_dim` t mean
            (0.1 s ln(factor) + 1) / (0.1 t ln(factor) + 1).
        truncate: let r begin and end at whole m.
    Example:
        >>> scaling = YaRNScaling(4.0, original_max_position_embeddings=2048)
        >>> (scaling.frequencies(16, 10_000.0) * 10_000.0 ** (np.arange(8) / 8)).round(4).tolist()
        [1.0, 1.0, 1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25]
    """

    factor: float | int
    original_max_position_embeddings: int
    beta_fast: float | int | None = 32.0
    beta_slow: float | int | None = 1.0
    attention_factor: float | int | None = None
    truncate: bool | None = True

    def __post_init__(self):
        super().__post_init__()
        self._check_below("beta_slow", "beta_fast")

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        ω = _geometric(dim, base)
        slowed = lambda turns: self.original_max_position_embeddings / (2 * math.pi * turns)
        start, end = (
            dim * math.log(slowed(turns)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, dim - 1)
        r = np.clip((np.arange(dim // 2) - start) / max(end - start, 1e-3), 0, 1)
        return (1 - r) * ω + r * ω / self.factor

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return max(0.1 * math.log(self.factor) + 1, 1.0)


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Fast pairs stay, slow ones are interpolated, those between are mixed by how often they turn.

        ω'_m = s_m ω_m + (1 − s_m) ω_m / factor,      s_m = (n_m − low) / (high − low) in [0, 1]

    n_m is how often the pair turns within the original length, low and high are
    `low_freq_factor` and `high_freq_factor`. The defaults are those of Llama 3.1 (Llama team 2024,
    arXiv 2407.21783; formula from the code published with it).

    Example:
        >>> scaled = Llama3Scaling().frequencies(128, 500_000.0)
        >>> scaled[0].item(), round(500_000.0 ** (-126 / 128) / scaled[-1].item(), 6)
        (1.0, 8.0)
    """

    factor: float | int = 8.0
    low_freq_factor: float | int = 1.0
    high_freq_factor: float | int = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        super().__post_init__()
        self._check_below("low_freq_factor", "high_freq_factor")

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        ω = _geometric(dim, base)
        turns = self.original_max_position_embeddings * ω / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        s = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return s * ω + (1 - s) * ω / self.factor


# ---- rotary embeddings ------------------------------------------------------------------------


def rope(
    x: Float[Array, "*batch T N K"],
    positions: Real[ArrayLike, "..."],
    *,
    base: SupportsFloat = 10_000.0,
    rotary_dim: SupportsIndex | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """Each pair of features of x turned by +ω_m times its position (P4).

    Args:
        x: queries or keys, (B, T, N, K).
        positions: in steps, whole or not: (T,), (B, T), or what broadcasts to (B, T).
        base: the wavelengths run from 2π to 2π · base, exclusive, in steps. Above 1.
        rotary_dim: d, even: how many of the K features, from the first on, are rotated; None is
            all. The rest are returned as they are.
        interleaved: a pair is two neighbours, 2m and 2m + 1, and
            `rope(x, p) == shift_matrix(-p) @ x`; else it is m and m + d/2.
        scaling: changes the frequencies, and with YaRN the length of the result.
        inverse: undo: R(−θ) / a.
    Returns:
        Like x. 16-bit x is rotated in float32 and rounded once.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        dx = a R(−θ) dy, and dt = Σ ω_m (x₁ dx₂ − x₂ dx₁) where positions are floats that are
        differentiated; x is kept only then, cos θ and sin θ always. It can be differentiated again
        in reverse and forward mode; for `jax.jvp` of the function itself use
        `rnnattn.reference.rope`.
    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)  # one pair, (1, 0)
        >>> rope(x, jnp.array([2])).ravel().round(2).tolist()  # cos 2, sin 2
        [-0.41999998688697815, 0.9099999666213989]
    """
    options = RopeOptions(base, rotary_dim, interleaved, scaling, inverse)
    return call_rope("rope", _rotate, x, positions, options)


def rope_2d(
    x: Float[Array, "*batch T N K"],
    rows: Real[ArrayLike, "..."],
    columns: Real[ArrayLike, "..."],
    *,
    base: SupportsFloat = 100.0,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rope` in two axes: the first half of each head turned by rows, the second by columns.

    Equal to `rope(x[..., : K // 2], rows)` beside `rope(x[..., K // 2 :], columns)`. A token at
    (0, 0) stays as it is. Interleaved, it is the axial form of rope-vit (Heo et al. 2024), rows
    first; the form that pairs features m and m + K/2 of the whole head (DINOv3, Pixtral) is
    `rope_mixed` with frequencies that are zero for one of the two axes.

    Args:
        rows, columns: of each token, in patches, whole or not: (T,), (B, T), or what broadcasts.
        base: as in `rope`; images are small, hence 100.
        interleaved, scaling, inverse: as in `rope`.
    Raises:
        ValueError: as `rope` does; K is not a multiple of 4.
    Gradient:
        That of `rope`, with respect to `x`, and to `rows` and `columns` where they are floats.
    Example:
        >>> rows, columns = jnp.divmod(jnp.arange(6), 3)  # a 2 by 3 grid
        >>> rope_2d(jnp.ones((1, 6, 2, 8)), rows, columns).shape
        (1, 6, 2, 8)
    """
    options = RopeOptions(base, None, interleaved, scaling, inverse)
    return call_rope_2d("rope_2d", _rotate, x, rows, columns, options)


def rope_mixed(
    x: Float[Array, "*batch T N K"],
    rows: Real[ArrayLike, "..."],
    columns: Real[ArrayLike, "..."],
    frequencies: Float[Array, "..."],
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rope` in two axes at once: θ = f_r · row + f_c · column, with frequencies to be learned.

    The mixed form of Heo et al. 2024: a pair can then turn along a diagonal.

    Args:
        rows, columns: of each token, in patches, whole or not: (T,), (B, T), or what broadcasts.
        frequencies: (2, N, K/2), in radians per patch: f_r and f_c of every head and pair; (2, 1,
            K/2) shares them. θ is a plain product in float32, exact to 1e-6 only where |θ| is
            below about 10, since frequencies are not known when the function is traced.
        interleaved, inverse: as in `rope`.
    Raises:
        ValueError: as `rope` does; K is odd, or `frequencies` have another shape.
    Gradient:
        That of `rope`, with respect to `x` and `frequencies`: df_r = Σ row dθ and df_c =
        Σ column dθ; and to `rows` and `columns` where they are floats.
    Example:
        Frequencies as rope-vit begins with: of axial size, each head turned by a random angle.

        >>> size = 10.0 ** (-jnp.arange(4) / 4).reshape(1, 1, 4)
        >>> angle = jax.random.uniform(jax.random.key(0), (2, 1), maxval=2 * jnp.pi)
        >>> frequencies = size * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        >>> rows, columns = jnp.divmod(jnp.arange(6), 3)  # a 2 by 3 grid
        >>> rope_mixed(jnp.ones((1, 6, 2, 8)), rows, columns, frequencies).shape
        (1, 6, 2, 8)
    """
    return call_rope_mixed(
        "rope_mixed", _rotate, x, rows, columns, frequencies, interleaved, inverse
    )


# ---- the equations ----------------------------------------------------------------------------


def _angles(positions, frequencies, dtype):
    """θ = ω t, (…, J), in radians; in float32 modulo 2π, by way of turns (module docstring)."""
    t, ω = positions[..., None], frequencies.reshape([1] * positions.ndim + [-1])
    if _wide(t.dtype, dtype) == np.float64:
        return t.astype(np.float64) * ω
    per_step = ω / (2 * math.pi)
    if jnp.issubdtype(t.dtype, jnp.integer):
        return 2 * math.pi * _whole_turns(t, per_step)
    t = t.astype(np.float32)
    whole = jnp.round(t)
    turns = _whole_turns(whole.astype(np.int32), per_step)
    return 2 * math.pi * (turns + (t - whole) * per_step.astype(np.float32))


def _whole_turns(t, per_step):
    """t · per_step modulo 1, in [−½, ½], for integers t and known float64 turns per step."""
    units = per_step * 2.0**32
    known = np.round(units)
    rest = jnp.round(t.astype(np.float32) * (units - known).astype(np.float32))
    total = t.astype(np.uint32) * (known % 2.0**32).astype(np.uint32)  # both wrap, as angles do
    total = total + rest.astype(np.int32).astype(np.uint32)
    return lax.bitcast_convert_type(total, np.int32).astype(np.float32) * 2.0**-32


def _rotation(interleaved, x, cos, sin):
    """P4 on the first 2J features of x (…, K), with cos and sin (…, J), in at least float32."""
    x, cos, sin = (a.astype(_wide(x.dtype)) for a in (x, cos, sin))
    turned, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    x1, x2 = _pairs(interleaved, turned)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return jnp.concatenate([_join(interleaved, y1, y2), still], axis=-1)


def _angle_gradient(interleaved, x, dx, shape):
    """dθ = x₁ dx₂ − x₂ dx₁, summed over the axes that share an angle."""
    x1, x2 = _pairs(interleaved, x[..., : 2 * shape[-1]].astype(dx.dtype))
    dx1, dx2 = _pairs(interleaved, dx[..., : 2 * shape[-1]])
    dθ = x1 * dx2 - x2 * dx1
    shared = tuple(axis for axis, size in enumerate(shape) if size != dθ.shape[axis])
    return jnp.sum(dθ, shared, keepdims=True)


def _pairs(interleaved, x):
    """The first and the second features of all pairs."""
    if not interleaved:
        return jnp.split(x, 2, axis=-1)
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return pairs[..., 0], pairs[..., 1]


def _join(interleaved, x1, x2):
    if not interleaved:
        return jnp.concatenate([x1, x2], axis=-1)
    return jnp.stack([x1, x2], axis=-1).reshape(*x1.shape[:-1], 2 * x1.shape[-1])


def _circle(angles):
    """cos θ and sin θ, brought to a length of 1."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # On a CPU, XLA counts sin and cos as cheap, so it fuses them into each operation that reads
    # them, where they are computed again for every head and row of the batch. It counts a division
    # as expensive and does not repeat it: divided by their length, they are computed once.
    length = jnp.sqrt(cos * cos + sin * sin)
    return cos / length, sin / length


def rotate_plain(interleaved, amplitude, x, angles):
    """y = a R(θ) x, in the dtype of x; x and angles have the same number of axes."""
    cos, sin = _circle(angles)
    return _rotation(interleaved, x, amplitude * cos, amplitude * sin).astype(x.dtype)


_rotate = jax.custom_vjp(rotate_plain, nondiff_argnums=(0, 1))


def _rotate_fwd(interleaved, amplitude, x, angles):
    # x is needed for the gradient of the angles alone. Where they are constant, an empty array
    # stands in for it, not None: the residuals must have the same tree in both cases, since JAX may
    # read those of one trace with the tree of another.
    kept = x.value if angles.perturbed else jnp.zeros(0, x.value.dtype)
    cos, sin = _circle(angles.value)
    cos, sin = amplitude * cos, amplitude * sin
    return _rotation(interleaved, x.value, cos, sin).astype(x.value.dtype), (kept, cos, sin)


def _rotate_bwd(interleaved, amplitude, residuals, dy):
    """dx = a R(−θ) dy      dθ = x₁ dx₂ − x₂ dx₁"""
    x, cos, sin = residuals
    dx = _rotation(interleaved, dy, cos, -sin)
    constant = x.ndim < dy.ndim
    dθ = None if constant else _angle_gradient(interleaved, x, dx, cos.shape).astype(cos.dtype)
    return dx.astype(dy.dtype), dθ


_rotate.defvjp(_rotate_fwd, _rotate_bwd, symbolic_zeros=True)


# ---- from arguments to angles -----------------------------------------------------------------


class RopeOptions(NamedTuple):
    """What of a call is fixed when it is traced."""

    base: Any
    rotary_dim: Any
    interleaved: bool
    scaling: Scaling | None
    inverse: bool

    def angles(self, positions, dim, dtype):
        if self.scaling is None:
            return _angles(positions, _geometric(dim, self.base), dtype)
        return _angles(positions, self.scaling.frequencies(dim, self.base), dtype)

    def rotate(self, rotate, x, angles):
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        if self.inverse:
            return rotate(self.interleaved, 1 / amplitude, x, -angles)
        return rotate(self.interleaved, amplitude, x, angles)


@partial(jax.jit, static_argnames=("dim", "base", "first", "dtype"))
def _run_sinusoids(dim, base, first, dtype, positions):
    angles = _angles(positions, _geometric(dim, base, first), dtype)
    cos, sin = _circle(angles)
    return _join(True, sin, cos).astype(dtype)


@partial(jax.jit, static_argnames=("dim", "base", "first", "dtype"))
def _run_shift_matrix(dim, base, first, dtype, offset):
    angles = _angles(offset, _geometric(dim, base, first), dtype)
    cos, sin = map(jnp.diag, _circle(angles))
    blocks = jnp.stack([_join(True, cos, sin), _join(True, -sin, cos)], axis=1)
    return blocks.reshape(dim, dim).astype(dtype)


def call_rope(function, rotate, x, positions, options):
    """`rope` by `_rotate` or `rotate_plain`."""
    check = Check(function)
    x, options = _checked_x(check, x), _checked_options(check, options)
    K, d = x.shape[-1], options.rotary_dim
    if d is None:
        check.multiple("x.shape[-1]", K, 2)
        d = K
    d = check.integer("rotary_dim", d, 0)
    check.multiple("rotary_dim", d, 2)
    check(d <= K, "rotary_dim", f"at most K = {K}", d)
    options = options._replace(rotary_dim=d)
    t = _positions_of(check, "positions", positions, x)
    with forward_mode("rnnattn.reference.rope"):
        return _run_rope(function, rotate, options, x, t)


@partial(jax.jit, static_argnames=("function", "rotate", "options"))
def _run_rope(function, rotate, options, x, t):
    def run(x, positions):
        angles = options.angles(_align(positions, x), options.rotary_dim, x.dtype)
        return options.rotate(rotate, x, angles)

    return _on_mesh(function, run, {"x": x, "positions": t})


def call_rope_2d(function, rotate, x, rows, columns, options):
    """`rope_2d` by `_rotate` or `rotate_plain`."""
    check = Check(function)
    x, options = _checked_x(check, x), _checked_options(check, options)
    check.multiple("x.shape[-1]", x.shape[-1], 4)
    rows = _positions_of(check, "rows", rows, x)
    columns = _positions_of(check, "columns", columns, x)
    with forward_mode("rnnattn.reference.rope_2d"):
        return _run_rope_2d(function, rotate, options, x, rows, columns)


@partial(jax.jit, static_argnames=("function", "rotate", "options"))
def _run_rope_2d(function, rotate, options, x, rows, columns):
    def run(x, rows, columns):
        half, dtype = x.shape[-1] // 2, _wide(x.dtype, rows.dtype, columns.dtype)
        by_axis = [options.angles(_align(t, x), half, dtype) for t in (rows, columns)]
        angles = jnp.stack(jnp.broadcast_arrays(*by_axis), axis=-2)
        halves = x.reshape(*x.shape[:-1], 2, half)
        return options.rotate(rotate, halves, angles).reshape(x.shape)

    return _on_mesh(function, run, {"x": x, "rows": rows, "columns": columns})


def call_rope_mixed(function, rotate, x, rows, columns, frequencies, interleaved, inverse):
    """`rope_mixed` by `_rotate` or `rotate_plain`."""
    check = Check(function)
    x, frequencies = _checked_x(check, x), jnp.asarray(frequencies)
    N, K = x.shape[-2:]
    check.multiple("x.shape[-1]", K, 2)
    own, shared = (2, N, K // 2), (2, 1, K // 2)
    expected = f"of shape (2, N, K/2) = {own} or {shared}"
    check(frequencies.shape in (own, shared), "frequencies", expected, frequencies.shape)
    check.floating("frequencies", frequencies)
    rows = _positions_of(check, "rows", rows, x)
    columns = _positions_of(check, "columns", columns, x)
    with forward_mode("rnnattn.reference.rope_mixed"):
        return _run_rope_mixed(
            function, rotate, interleaved, inverse, x, rows, columns, frequencies
        )


@partial(jax.jit, static_argnames=("function", "rotate", "interleaved", "inverse"))
def _run_rope_mixed(function, rotate, interleaved, inverse, x, rows, columns, frequencies):
    def run(x, rows, columns, frequencies):
        dtype = _wide(x.dtype, rows.dtype, columns.dtype, frequencies.dtype)
        rows, columns = (_align(t, x)[..., None].astype(dtype) for t in (rows, columns))
        f_r, f_c = jnp.expand_dims(frequencies.astype(dtype), range(1, x.ndim - 1))
        angles = rows * f_r + columns * f_c
        return rotate(interleaved, 1.0, x, -angles if inverse else angles)

    given = {"x": x, "rows": rows, "columns": columns, "frequencies": frequencies}
    return _on_mesh(function, run, given)


def _on_mesh(function, run, given):
    """`run` of the arguments by name; on a mesh of explicit axes, in parts of tokens and heads."""
    before_heads = given["x"].ndim - 2
    tokens = "".join(chr(ord("a") + n) for n in range(before_heads))
    axes = {name: tokens[before_heads - t.ndim :] for name, t in given.items() if name != "x"}
    axes |= {"x": tokens + "NK", "frequencies": ".N"}
    run_parts = lambda given: run(**varying_together(given))
    check, divided = Check(function), tokens + "N"
    return in_parts(check, run_parts, given, axes, axes["x"], divided=divided, whole={})


def _align(positions, x):
    """Positions (…, T) with the axes of x before its last: (…, T, 1)."""
    missing = x.ndim - 2 - positions.ndim
    return positions.reshape(*[1] * missing, *positions.shape, 1)


def _wide(*dtypes):
    """float64 if it is among the dtypes, else float32."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


# ---- checks -----------------------------------------------------------------------------------


def _checked_base(check, base):
    return check.number("base", base, 1, "a number above 1")


def _checked_x(check, x):
    x = jnp.asarray(x)
    check(x.ndim >= 3, "x", "of shape (B, T, N, K)", x.shape)
    check.floating("x", x)
    return x


def _checked_options(check, options):
    scaling = options.scaling
    check(isinstance(scaling, Scaling | None), "scaling", "a Scaling or None", repr(scaling))
    return options._replace(base=_checked_base(check, options.base))


def _as_positions(check, name, positions):
    positions = jnp.asarray(positions)
    real = jnp.issubdtype(positions.dtype, jnp.number) and not jnp.iscomplexobj(positions)
    check(real, name, "of integers or of a floating dtype", positions.dtype.name)
    return positions


def _positions_of(check, name, positions, x):
    """Positions of the tokens of x."""
    positions = _as_positions(check, name, positions)
    given, wanted = positions.shape, x.shape[:-2]
    sizes = zip(given[::-1], wanted[::-1], strict=False)
    fits = len(given) <= len(wanted) and all(size in (1, want) for size, want in sizes)
    axes = f"the axes of `x` before its heads, {wanted}"
    check(fits, name, f"of a shape that broadcasts to {axes}", given)
    return positions
