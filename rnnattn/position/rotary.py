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

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Real

from rnnattn.checks import Check, forward_mode
from rnnattn.meshes import in_parts
from rnnattn.position.scaling import Scaling, geometric
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


def mrope(
    x: Float[Array, "*batch T N K"],
    positions: Real[ArrayLike, "..."],
    sections: Sequence[int],
    *,
    base: SupportsFloat = 10_000.0,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rope` in several axes: of the pairs of a head, each section is turned by one of them.

    The multimodal form of Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, §2.1), with time, rows and
    columns as axes. A token at the same position of every axis, as those of text, is turned as by
    `rope`.

    Args:
        positions: (A, T), (A, B, T), or what broadcasts: of each of the A axes, as in `rope`.
        sections: how many of the K/2 pairs follow each axis, from the fastest pair on; Qwen2-VL
            has (16, 24, 24) at K = 128.
        base, interleaved, scaling, inverse: as in `rope`; Qwen2-VL has a base of 10⁶.
    Raises:
        ValueError: as `rope` does; `sections` are not A integers whose sum is K/2.
    Gradient:
        That of `rope`, with respect to `x`, and to `positions` where they are floats.
    Example:
        >>> time, rows, columns = jnp.zeros(6, int), *jnp.divmod(jnp.arange(6), 3)
        >>> mrope(jnp.ones((1, 6, 2, 16)), jnp.stack([time, rows, columns]), (2, 3, 3)).shape
        (1, 6, 2, 16)
    """
    options = RopeOptions(base, None, interleaved, scaling, inverse)
    return call_mrope("mrope", _rotate, x, positions, sections, options)


def xpos(
    x: Float[Array, "*batch T N K"],
    positions: Real[ArrayLike, "..."],
    *,
    downscale: bool = False,
    scale_base: SupportsFloat = 512.0,
    gamma: SupportsFloat = 0.4,
    base: SupportsFloat = 10_000.0,
    interleaved: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rope`, and pair m times ζ_m^(t / scale_base): products of far tokens fade (Sun et al. 2022).

        ζ_m = (2m/d + γ) / (1 + γ)

    Queries grow by what keys shrink, so that their product has ζ_m^((t − s) / scale_base): for
    causal attention. arXiv 2212.10554, §3.1.

    Args:
        positions: as in `rope`. Differences alone count: of long sequences, subtract the middle
            from both, for the factors to stay within what the dtype can represent.
        downscale: for keys: ζ_m^(−t / scale_base).
        scale_base: in steps, positive.
        gamma: γ, positive; 0.4 as published.
        base, interleaved: as in `rope`.
    Raises:
        ValueError: as `rope` does; `scale_base` or `gamma` is not positive.
    Gradient:
        That of `rope` times the factor, with respect to `x`, and to `positions` where they are
        floats. Twice differentiable; for `jax.jvp` use `rnnattn.reference.xpos`.
    Example:
        >>> q = k = jnp.ones((1, 3, 1, 4))
        >>> t = jnp.arange(3)
        >>> q, k = xpos(q, t), xpos(k, t, downscale=True)
        >>> bool(jnp.isclose((q[0, 2] * k[0, 1]).sum(), (q[0, 1] * k[0, 0]).sum()))
        True
    """
    options = RopeOptions(base, None, interleaved, None, False)
    return call_xpos("xpos", _rotate, x, positions, options, downscale, scale_base, gamma)


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


def _fading(positions, dim, scale_base, gamma):
    """ζ_m^(t / scale_base), (…, J), in at least float32."""
    ζ = (2 * np.arange(dim // 2) / dim + gamma) / (1 + gamma)
    t = positions.astype(_wide(positions.dtype))[..., None] / scale_base
    return jnp.exp(t * np.log(ζ).astype(t.dtype).reshape([1] * positions.ndim + [-1]))


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

    def frequencies(self, dim):
        if self.scaling is None:
            return geometric(dim, self.base)
        return self.scaling.frequencies(dim, self.base)

    def angles(self, positions, dim, dtype):
        return _angles(positions, self.frequencies(dim), dtype)

    def rotate(self, rotate, x, angles):
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        if self.inverse:
            return rotate(self.interleaved, 1 / amplitude, x, -angles)
        return rotate(self.interleaved, amplitude, x, angles)


@partial(jax.jit, static_argnames=("dim", "base", "first", "dtype"))
def _run_sinusoids(dim, base, first, dtype, positions):
    angles = _angles(positions, geometric(dim, base, first), dtype)
    cos, sin = _circle(angles)
    return _join(True, sin, cos).astype(dtype)


@partial(jax.jit, static_argnames=("dim", "base", "first", "dtype"))
def _run_shift_matrix(dim, base, first, dtype, offset):
    angles = _angles(offset, geometric(dim, base, first), dtype)
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


def call_mrope(function, rotate, x, positions, sections, options):
    """`mrope` by `_rotate` or `rotate_plain`."""
    check = Check(function)
    x, options = _checked_x(check, x), _checked_options(check, options)
    K, positions = x.shape[-1], _as_positions(check, "positions", positions)
    check.multiple("x.shape[-1]", K, 2)
    check(positions.ndim > 0, "positions", "of shape (A, …, T)", positions.shape)
    sections = tuple(check.integer("sections", n, 0) for n in sections)
    fits = len(sections) == positions.shape[0] and sum(sections) == K // 2
    expected = f"{positions.shape[0]} integers, one for each axis, whose sum is K/2 = {K // 2}"
    check(fits, "sections", expected, sections)
    by_axis = [_positions_of(check, "positions", t, x) for t in positions]
    with forward_mode("rnnattn.reference.mrope"):
        return _run_mrope(function, rotate, options, sections, x, by_axis)


@partial(jax.jit, static_argnames=("function", "rotate", "options", "sections"))
def _run_mrope(function, rotate, options, sections, x, by_axis):
    names = [f"positions[{n}]" for n in range(len(sections))]

    def run(x, **by_axis):
        frequencies = options.frequencies(x.shape[-1])
        parts, first = [], 0
        for name, pairs in zip(names, sections, strict=True):
            ω = frequencies[first : first + pairs]
            parts.append(_angles(_align(by_axis[name], x), ω, x.dtype))
            first += pairs
        shape = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
        parts = [jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts]
        return options.rotate(rotate, x, jnp.concatenate(parts, axis=-1))

    return _on_mesh(function, run, {"x": x, **dict(zip(names, by_axis, strict=True))})


def call_xpos(function, rotate, x, positions, options, downscale, scale_base, gamma):
    """`xpos` by `_rotate` or `rotate_plain`."""
    check = Check(function)
    x, options = _checked_x(check, x), _checked_options(check, options)
    check.multiple("x.shape[-1]", x.shape[-1], 2)
    t = _positions_of(check, "positions", positions, x)
    scale_base = check.number("scale_base", scale_base, 0, "a positive number")
    gamma = check.number("gamma", gamma, 0, "a positive number")
    scale_base = -scale_base if downscale else scale_base
    with forward_mode("rnnattn.reference.xpos"):
        return _run_xpos(function, rotate, options, scale_base, gamma, x, t)


@partial(jax.jit, static_argnames=("function", "rotate", "options", "scale_base", "gamma"))
def _run_xpos(function, rotate, options, scale_base, gamma, x, t):
    def run(x, positions):
        K, t = x.shape[-1], _align(positions, x)
        fading = _fading(t, K, scale_base, gamma)
        wide = _wide(x.dtype, fading.dtype)
        turned = options.rotate(rotate, x.astype(wide), options.angles(t, K, x.dtype))
        factors = _join(options.interleaved, fading, fading)
        return (factors.astype(wide) * turned).astype(x.dtype)

    return _on_mesh(function, run, {"x": x, "positions": t})


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
