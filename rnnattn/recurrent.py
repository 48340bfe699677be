"""The LSTM: over one step, a sequence, two directions and a stack of layers.

The equations and their gradient are in `rnnattn.cell`, the schedules that run them over time in
`rnnattn.chunked` and `rnnattn.native_lstm`; here are the arguments, their checks, and what is built
of sequences.

Axes: B batch, T time, D input width, H hidden width, R width of h (H without a projection).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import rnn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import rnnattn.chunked as chunked
import rnnattn.native_lstm as native_lstm
from rnnattn.cell import LSTMParams, LSTMState, Variant
from rnnattn.chunked import Schedule, Steps
from rnnattn.precision import accumulator, varying_together


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
    draw = accumulator(dtype)  # QR has no 16-bit version
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
    """One step (L1, L2): the state after `x`, given the state before it, and in its dtypes.

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
    schedule = Schedule(False, "gates", Variant(clip, coupled))
    native = not native_lstm.unserved(params, x, schedule.variant)
    _, state = _run(schedule, native, True, params, x[None], state, None, None)
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
    implementation: Literal["xla", "native", "cudnn"] | None = None,
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
            state of a run forwards, and leaves the returned state of a run in reverse. NaN in steps
            of an episode of which the loss reads nothing reaches no gradient.
        reverse: run from the last valid step to the first; outputs stay in the order of x.
        time_major: x, y and resets have T before B. Saves two transpositions.
        clip: bounds every pre-activation to ±clip, peephole terms included; None bounds nothing.
        coupled: f = 1 − i (CIFG); the forget gate's own weights then get a gradient of zero.
        residuals: what is kept for the gradient, beside y: "gates" (c and the pre-activations of
            each step), "states" (c of each step) or n (the state every n steps); what is not kept
            is computed again. The gradient is the same. Temporary memory of the gradient at T 4096,
            B 8, D = H = 256 in float32: 210 MiB, 84 MiB, and 13 MiB for n = 64; the plain twin
            takes 516 (`python benchmarks/lstm.py --memory`). "gates" is the fastest.
        implementation: "xla"; "native", the kernels of `rnnattn.native` on a CPU (and "xla"
            elsewhere), for float32 without a variant; "cudnn", on an NVIDIA GPU, for float32
            without a variant, resets or `reverse`, and lengths of at least 1 (its gradient is
            cuDNN's own, of first order); or None, which is "native" where that serves, and "xla"
            where not.
    Returns:
        y (B, T, R), or (T, B, R) with `time_major`, in the dtype of x, and the final state, in the
        dtypes of the initial one. For 16-bit inputs c is float32, so that a sequence cut in two and
        chained equals one run; where it is given in 16 bits, it comes back so.
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
    if implementation not in (None, "xla", "native", "cudnn"):
        raise ValueError(
            "lstm: `implementation` must be None, 'xla', 'native' or 'cudnn', "
            f"got {implementation!r}"
        )
    if implementation == "cudnn":
        _check_cudnn(params, x, clip is not None or coupled, resets, reverse)
        return _run_cudnn(time_major, params, x, state, lengths)
    variant = Variant(clip, coupled)
    unserved = [] if implementation == "xla" else native_lstm.unserved(params, x, variant)
    if implementation == "native" and unserved:
        raise ValueError(
            f"lstm: `implementation='native'` cannot serve {' or '.join(unserved)}; 'xla' can"
        )
    native = implementation != "xla" and not unserved
    schedule = Schedule(reverse, residuals, variant)
    return _run(schedule, native, time_major, params, x, state, lengths, resets)


def bidirectional_lstm(
    forward: LSTMParams,
    backward: LSTMParams,
    x: Float[Array, "... D"],
    states: tuple[LSTMState | None, LSTMState | None] = (None, None),
    **options: Any,
) -> tuple[Float[Array, "... width"], tuple[LSTMState, LSTMState]]:
    """`lstm` in both directions over the same `x`, side by side.

    Args:
        states: the initial states of the two; the backward one enters at the last valid step.
        options: those of `lstm`, `reverse` apart.
    Returns:
        y, the outputs of `forward` beside those of `backward`, both in the order of x; and the
        final states of the two.
    Raises:
        ValueError: as `lstm` does.
    Gradient:
        That of `lstm`, with respect to the parameters, `x` and `states`.
    Example:
        >>> ahead, back = (init_lstm(jax.random.key(k), 3, 5) for k in (0, 1))
        >>> y, (last, first) = bidirectional_lstm(ahead, back, jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 10)
    """
    return _both_directions(lstm, (forward, backward), x, states, options)


def stacked_lstm(
    layers: Sequence[LSTMParams | tuple[LSTMParams, LSTMParams]],
    x: Float[Array, "... D"],
    states: Sequence[Any] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    variational: bool = False,
    time_major: bool = False,
    **options: Any,
) -> tuple[Float[Array, "... R"], tuple[Any, ...]]:
    """Layers one above the other, each reading the outputs of the one below.

    Args:
        layers: from the bottom up; one is an `LSTMParams`, or a (forward, backward) pair of them.
        states: the initial state of each layer (a pair for a pair), or None for zeros.
        dropout_rate: the share of the outputs between two layers that is set to zero, in [0, 1);
            the rest is scaled up by 1 / (1 − rate).
        dropout_key: needed where `dropout_rate` is above 0.
        variational: drop the same outputs at every step (Gal & Ghahramani 2016).
        time_major, options: as in `lstm`.
    Returns:
        y, the outputs of the top layer, and the final states of all layers.
    Raises:
        ValueError: as `lstm` does; no layers, a number of states that is not that of the layers, a
            rate out of range, or no key for it.
    Gradient:
        That of `lstm`, with respect to `layers`, `x` and `states`; what is dropped is a constant.
    Example:
        Truncated back-propagation through time: carry the state, and stop its gradient.

        >>> layers = [init_lstm(jax.random.key(0), 3, 5), init_lstm(jax.random.key(1), 5, 5)]
        >>> def loss(layers, x, states):
        ...     y, states = stacked_lstm(layers, x, jax.lax.stop_gradient(states))
        ...     return (y**2).mean(), states
        >>> states = None
        >>> for window in jnp.split(jnp.ones((2, 12, 3)), 3, axis=1):
        ...     gradient, states = jax.grad(loss, has_aux=True)(layers, window, states)
    """
    dropout = _Dropout(dropout_rate, dropout_key, variational)
    return _stack(lstm, layers, x, states, dropout, {"time_major": time_major, **options})


class _Dropout(NamedTuple):
    rate: float
    key: PRNGKeyArray | None
    variational: bool


def _both_directions(run, pair, x, states, options):
    forward, backward = pair
    ahead, last = run(forward, x, states[0], **options)
    back, first = run(backward, x, states[1], reverse=True, **options)
    return jnp.concatenate([ahead, back], axis=-1), (last, first)


def _stack(run, layers, x, states, dropout, options):
    """`stacked_lstm` with `run` as its sequence."""
    _check_stack(layers, states, dropout)
    finals = []
    for n, layer in enumerate(layers):
        if n > 0 and dropout.rate > 0:
            key = jax.random.fold_in(dropout.key, n)
            time_axis = 0 if options["time_major"] else 1
            x = _drop(key, x, dropout.rate, time_axis if dropout.variational else None)
        state = None if states is None else states[n]
        if isinstance(layer, LSTMParams):
            x, final = run(layer, x, state, **options)
        else:
            x, final = _both_directions(run, layer, x, state or (None, None), options)
        finals.append(final)
    return x, tuple(finals)


@partial(jax.jit, static_argnames=("rate", "shared_axis"))
def _drop(key, x, rate, shared_axis):
    """Zero a share of x and scale up the rest, alike along `shared_axis`."""
    shape = [1 if axis == shared_axis else size for axis, size in enumerate(x.shape)]
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0)


def _as_given(final, state):
    """The final state in the dtypes of the initial one, so that a loop can carry it."""
    return final if state is None else jax.tree.map(lambda x, s: x.astype(s.dtype), final, state)


def _full_state(params, state, B):
    """The initial state in the dtypes the steps carry; None is zeros."""
    H, dtype = params.w_h.shape[1] // 4, params.b.dtype
    if state is None:
        zeros = lambda width, dtype: jnp.zeros_like(params.b, dtype, shape=(B, width))
        return LSTMState(zeros(params.w_h.shape[0], dtype), zeros(H, accumulator(dtype)))
    return LSTMState(jnp.asarray(state.h), jnp.asarray(state.c, accumulator(dtype)))


def _steps(x, lengths, resets, reverse):
    """The masks of a time-major x; a reset past a row's length counts for nothing."""
    valid = None
    if lengths is not None:
        steps = jnp.arange(x.shape[0], dtype=jnp.int32)
        valid = steps[:, None] < lengths.astype(jnp.int32)[None, :]
    if resets is None:
        return Steps(x, valid, None)
    if valid is not None:
        resets = resets & valid
    if reverse:  # the step run after an episode's first is the last of the episode before
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    return Steps(x, valid, resets)


@partial(jax.jit, static_argnames=("schedule", "native", "time_major"))
def _run(schedule, native, time_major, params, x, state, lengths, resets):
    """`lstm` after its arguments are checked."""
    params, x, state, lengths, resets = varying_together((params, x, state, lengths, resets))
    if not time_major:
        x = jnp.swapaxes(x, 0, 1)
        resets = None if resets is None else jnp.swapaxes(resets, 0, 1)
    sequence = (native_lstm if native else chunked).sequence
    steps = _steps(x, lengths, resets, schedule.reverse)
    y, final = sequence(schedule, params, _full_state(params, state, x.shape[1]), steps)
    return (y if time_major else jnp.swapaxes(y, 0, 1)), _as_given(final, state)


@partial(jax.jit, static_argnames="time_major")
def _run_cudnn(time_major, params, x, state, lengths):
    """`lstm` by `jax.experimental.rnn`: batch first, weights transposed in one row, two biases."""
    if time_major:
        x = jnp.swapaxes(x, 0, 1)
    B, T, D = x.shape
    h, c = _full_state(params, state, B)
    if lengths is None:
        lengths = jnp.full((B,), T)
    transposed = [params.w_x.T.ravel(), params.w_h.T.ravel(), params.b, jnp.zeros_like(params.b)]
    weights, H = jnp.concatenate(transposed), params.w_h.shape[0]
    y, h, c = rnn.lstm(x, h[None], c[None], weights, lengths.astype(jnp.int32), D, H, 1, 0.0, False)
    return (jnp.swapaxes(y, 0, 1) if time_major else y), LSTMState(h[0], c[0])


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
    if jnp.result_type(state.c) not in (dtype, accumulator(dtype)):
        raise ValueError(
            f"{function}: `state.c` must be {accumulator(dtype).name}, got {_dtype_name(state.c)}"
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


def _check_cudnn(params, x, variant, resets, reverse):
    refused = {
        f"the dtype {_dtype_name(x)}": jnp.result_type(x) != jnp.float32,
        "peephole weights": params.peephole is not None,
        "a projection": params.projection is not None,
        "`clip` or `coupled`": variant,
        "`resets`": resets is not None,
        "`reverse`": reverse,
        "a machine without a GPU": jax.default_backend() != "gpu",
    }
    found = [reason for reason, holds in refused.items() if holds]
    if found:
        raise ValueError(
            f"lstm: `implementation='cudnn'` cannot serve {' or '.join(found)}; 'xla' can"
        )


def _check_stack(layers, states, dropout):
    if not layers:
        raise ValueError("stacked_lstm: `layers` must hold at least one layer, got none")
    if states is not None and len(states) != len(layers):
        raise ValueError(
            f"stacked_lstm: `states` must hold one for each of the {len(layers)} layers, "
            f"got {len(states)}"
        )
    if not 0 <= dropout.rate < 1:
        raise ValueError(f"stacked_lstm: `dropout_rate` must be in [0, 1), got {dropout.rate!r}")
    if dropout.rate > 0 and dropout.key is None:
        raise ValueError("stacked_lstm: `dropout_rate` above 0 needs a `dropout_key`, got None")
