"""The other units as they are called, over one step and over a sequence.

Axes: B batch, T time, D input width, H hidden width.
"""

from typing import Any, Literal, SupportsIndex, Unpack

from jaxtyping import Array, Bool, Float, Int

import rnnattn.recurrent.native as native
from rnnattn.checks import Check, forward_mode
from rnnattn.recurrent.arguments import (
    Arguments,
    NoiseOptions,
    checked_noise,
    checked_residuals,
    checked_sequence,
    checked_step,
    suited_residuals,
)
from rnnattn.recurrent.chunked import CHUNKED
from rnnattn.recurrent.problem import Options
from rnnattn.recurrent.run import run_sequence
from rnnattn.recurrent.units.gru import GRUParams, gru_unit
from rnnattn.recurrent.units.layer_norm import (
    LayerNormGRU,
    LayerNormGRUParams,
    LayerNormLSTM,
    LayerNormLSTMParams,
)
from rnnattn.recurrent.units.lstm import LSTMState
from rnnattn.recurrent.units.rnn import RNNParams, rnn_unit
from rnnattn.recurrent.units.slstm import SLSTMParams, SLSTMState, slstm_unit


class UnitOptions(NoiseOptions, total=False):
    """Options that all units have in common; those of `rnnattn.gru`."""

    lengths: Int[Array, "*B"] | None
    mask: Bool[Array, "..."] | None
    resets: Bool[Array, "..."] | None
    reverse: bool
    time_major: bool
    residuals: Literal["gates", "states"] | SupportsIndex | None
    implementation: Literal["xla", "native"] | None


def gru_step(
    params: GRUParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    reset_after: bool = True,
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> Float[Array, "*B H"]:
    """One step (G1 to G3): h after `x`, given h before it.

    Args:
        x: (B, D); B may be absent, or several axes, here and in h.
        reset_after, implementation: as in `gru`.
        noise: `zoneout`, `recurrent_dropout`, `candidate_dropout` and `key`, as in `gru`; what is
            drawn depends on the key alone, so each step wants one of its own.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and
            what came.
    Gradient:
        G4 to G7, with respect to `params`, `x` and `h`; keeps the pre-activations.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_gru
        >>> params = init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> gru_step(params, jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
        (2, 5)
    """
    unit = gru_unit("gru_step", reset_after)
    return run_step("gru_step", unit, params, x, (h,), implementation, noise)[0]


def gru(
    params: GRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    reset_after: bool = True,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """h after every step of `x`, and after the last one (G1 to G3).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        h: the initial state; None is zeros.
        reset_after: the reset gate is applied behind the product with h, as cuDNN, torch and
            Keras have it, or before it, as Cho et al. 2014 (and Keras' `reset_after=False`), with
            `params.b_n` None; two products one after the other in each step then.
        lengths: the valid steps of each row, 0 to T; outputs past them are zero.
        mask: (B, T), or (T, B) with `time_major`; False marks a step that is not there: it holds h
            and gives zero output.
        resets: (B, T), or (T, B); True marks the first step of an episode in time order.
        reverse: run from the last valid step to the first; outputs stay in the order of x.
        residuals: what is kept for the gradient beside y: "gates" (the pre-activations of each
            step), "states" (nothing) or n (h every n steps); None chooses by memory.
        zoneout: the share of h that keeps its last value in a step.
        recurrent_dropout: the share of h that the products read as zero, the same at all steps;
            z ⊙ h₋ reads all of it.
        candidate_dropout: the share of n that is written to h as zero.
        key: what these three are drawn from; None draws nothing. All of these are as in `lstm`,
            which says more of each.
        implementation: "xla"; "native", the kernels of `rnnattn.native` on a CPU (and "xla"
            elsewhere), for float32 and, with the reset after the product, 16 bits; or None, which
            is "native" where these serve and "xla" elsewhere.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, and the final h, in the dtype of x.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        G4 to G7, with respect to `params`, `x` and `h`, from cotangents of y and the final h;
        lengths, mask, resets and what is drawn are constants. It can be differentiated again in
        reverse and forward mode; for `jax.jvp` of the function itself use `rnnattn.reference.gru`.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_gru
        >>> params = init_gru(jax.random.key(0), input_size=3, hidden_size=5)
        >>> y, h = gru(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == h[1]).all())
        ((2, 7, 5), True, True)
    """
    state = None if h is None else (h,)
    y, final = run_unit("gru", gru_unit("gru", reset_after), params, x, state, **options)
    return y, final[0]


def rnn_step(
    params: RNNParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> Float[Array, "*B H"]:
    """One step (R1): h after `x`, given h before it.

    Args:
        x: (B, D); B may be absent, or several axes, here and in the state.
        activation: as in `rnn`.
        implementation, noise: as in `gru_step`.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        R2 to R4, with respect to `params`, `x` and `h`; keeps the pre-activations.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_rnn
        >>> params = init_rnn(jax.random.key(0), input_size=3, hidden_size=4)
        >>> rnn_step(params, jnp.ones((2, 3)), jnp.zeros((2, 4))).shape
        (2, 4)
    """
    unit = rnn_unit("rnn_step", activation)
    return run_step("rnn_step", unit, params, x, (h,), implementation, noise)[0]


def rnn(
    params: RNNParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """The plain recurrent network: h after every step of `x`, and after the last one (R1).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        h: the initial state; None is zeros.
        activation: φ, "tanh" or "relu".
        options: those of `gru`, which says what each is; the states' other fields are kept for the
            gradient with "states", and the pre-activations as well with "gates".
            `candidate_dropout` is refused: h is all that there is. The kernels are for float32.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the final h, too.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        R2 to R4, with respect to `params`, `x` and `h`, from cotangents of y and of all of the
        final state; lengths, mask and resets are constants. It can be differentiated again in
        reverse and forward mode; for `jax.jvp` of the function itself use `rnnattn.reference.rnn`.
    Source:
        Elman 1990; Le, Jaitly & Hinton 2015 for relu.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_rnn
        >>> params = init_rnn(jax.random.key(0), input_size=3, hidden_size=4)
        >>> y, state = rnn(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 5]))
        >>> y.shape, bool((y[1, 5:] == 0).all())
        ((2, 7, 4), True)
    """
    state = None if h is None else (h,)
    y, final = run_unit("rnn", rnn_unit("rnn", activation), params, x, state, **options)
    return y, final[0]


def layer_norm_lstm_step(
    params: LayerNormLSTMParams,
    x: Float[Array, "*B D"],
    state: LSTMState,
    *,
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> LSTMState:
    """One step (N2, N3): the state after `x`, given that before it.

    Args:
        x: (B, D); B may be absent, or several axes, here and in the state.
        implementation, noise: as in `gru_step`.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        N1, N4 and N6, with respect to `params`, `x` and `state`; keeps the pre-activations and the
        products with h.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import LSTMState, init_layer_norm_lstm
        >>> params = init_layer_norm_lstm(jax.random.key(0), input_size=3, hidden_size=4)
        >>> state = LSTMState(h=jnp.zeros((2, 4)), c=jnp.zeros((2, 4)))
        >>> layer_norm_lstm_step(params, jnp.ones((2, 3)), state).h.shape
        (2, 4)
    """
    unit = LayerNormLSTM()
    return run_step("layer_norm_lstm_step", unit, params, x, state, implementation, noise)


def layer_norm_lstm(
    params: LayerNormLSTMParams,
    x: Float[Array, "... D"],
    state: LSTMState | None = None,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], LSTMState]:
    """The LSTM with layer normalisation: h after every step of `x`, and the final state (N2, N3).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        state: the initial state; None is zeros.
        options: those of `gru`, which says what each is; the states' other fields are kept for the
            gradient with "states", and the pre-activations and the products with h as well with
            "gates". `zoneout` may be a pair, of h and of c; `candidate_dropout` is of g.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the final state, c in
        float32 for 16-bit inputs.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        N1, N4 and N6, with respect to `params`, `x` and `state`, from cotangents of y and of all of
        the final state; lengths, mask and resets are constants. It can be differentiated again in
        reverse and forward mode; for `jax.jvp` of the function itself use
        `rnnattn.reference.layer_norm_lstm`.
    Source:
        Ba, Kiros & Hinton 2016: norms of x w_x and of h w_h over all gates, apart, and of c on its
        way into h alone; gains without biases but for that of c. Haste has the same.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_layer_norm_lstm
        >>> params = init_layer_norm_lstm(jax.random.key(0), input_size=3, hidden_size=4)
        >>> y, state = layer_norm_lstm(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 5]))
        >>> y.shape, bool((y[1, 5:] == 0).all())
        ((2, 7, 4), True)
    """
    return run_unit("layer_norm_lstm", LayerNormLSTM(), params, x, state, **options)


def layer_norm_gru_step(
    params: LayerNormGRUParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> Float[Array, "*B H"]:
    """One step (N5): h after `x`, given h before it.

    Args:
        x: (B, D); B may be absent, or several axes, here and in the state.
        implementation, noise: as in `gru_step`.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        N1, N6 and those of the GRU, with respect to `params`, `x` and `h`; keeps the pre-
        activations and the products with h.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_layer_norm_gru
        >>> params = init_layer_norm_gru(jax.random.key(0), input_size=3, hidden_size=4)
        >>> layer_norm_gru_step(params, jnp.ones((2, 3)), jnp.zeros((2, 4))).shape
        (2, 4)
    """
    unit = LayerNormGRU()
    return run_step("layer_norm_gru_step", unit, params, x, (h,), implementation, noise)[0]


def layer_norm_gru(
    params: LayerNormGRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """The GRU with layer normalisation: h after every step of `x`, and after the last one (N5).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        h: the initial state; None is zeros.
        options: those of `gru`, which says what each is; the states' other fields are kept for the
            gradient with "states", and the pre-activations and the products with h as well with
            "gates".
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the final h, too.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        N1, N6 and those of the GRU, with respect to `params`, `x` and `h`, from cotangents of y and
        of all of the final state; lengths, mask and resets are constants. It can be differentiated
        again in reverse and forward mode; for `jax.jvp` of the function itself use
        `rnnattn.reference.layer_norm_gru`.
    Source:
        Ba, Kiros & Hinton 2016, in the form of Haste: the reset gate after the product and its
        norm.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_layer_norm_gru
        >>> params = init_layer_norm_gru(jax.random.key(0), input_size=3, hidden_size=4)
        >>> y, state = layer_norm_gru(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 5]))
        >>> y.shape, bool((y[1, 5:] == 0).all())
        ((2, 7, 4), True)
    """
    state = None if h is None else (h,)
    y, final = run_unit("layer_norm_gru", LayerNormGRU(), params, x, state, **options)
    return y, final[0]


def slstm_step(
    params: SLSTMParams,
    x: Float[Array, "*B D"],
    state: SLSTMState,
    *,
    forget_gate: Literal["sigmoid", "exponential"] = "sigmoid",
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> SLSTMState:
    """One step (S1 to S3): the state after `x`, given that before it.

    Args:
        x: (B, D); B may be absent, or several axes, here and in the state.
        forget_gate: as in `slstm`.
        implementation, noise: as in `gru_step`.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        S4 to S7, with respect to `params`, `x` and `state`; keeps the pre-activations.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import SLSTMState, init_slstm
        >>> params = init_slstm(jax.random.key(0), input_size=3, hidden_size=4)
        >>> zeros = jnp.zeros((2, 4))
        >>> slstm_step(params, jnp.ones((2, 3)), SLSTMState(zeros, zeros, zeros, zeros)).h.shape
        (2, 4)
    """
    unit = slstm_unit("slstm_step", forget_gate)
    return run_step("slstm_step", unit, params, x, state, implementation, noise)


def slstm(
    params: SLSTMParams,
    x: Float[Array, "... D"],
    state: SLSTMState | None = None,
    *,
    forget_gate: Literal["sigmoid", "exponential"] = "sigmoid",
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], SLSTMState]:
    """The sLSTM of xLSTM: h after every step of `x`, and the final state (S1 to S3).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        state: the initial state; None is zeros.
        forget_gate: what f is of its pre-activation. The input gate is an exponential always; m
            keeps both in range, at any pre-activation.
        options: those of `gru`, which says what each is; the states' other fields are kept for the
            gradient with "states", and the pre-activations as well with "gates". `zoneout` is of h
            alone, as m says what c and n are multiplied by; `candidate_dropout` is of g.
    Returns:
        y (B, T, H), or (T, B, H) with `time_major`, in the dtype of x, and the final state, all but
        h in float32 for 16-bit inputs.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        S4 to S7, with respect to `params`, `x` and `state`, from cotangents of y and of all of the
        final state; lengths, mask and resets are constants. It can be differentiated again in
        reverse and forward mode; for `jax.jvp` of the function itself use
        `rnnattn.reference.slstm`.
    Source:
        Beck et al. 2024, with heads as w_h has blocks.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_slstm
        >>> params = init_slstm(jax.random.key(0), input_size=3, hidden_size=4)
        >>> y, state = slstm(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 5]))
        >>> y.shape, bool((y[1, 5:] == 0).all())
        ((2, 7, 4), True)
    """
    return run_unit("slstm", slstm_unit("slstm", forget_gate), params, x, state, **options)


def run_step(function, unit, params, x, state, implementation, noise):
    """The state after a step."""
    x, state = checked_step(function, unit, params, x, state)
    rates, key = checked_noise(function, unit, params, **noise)
    options = Options(unit, residuals="gates", noise=rates)
    schedule = _suited(function, implementation, params, x, options)
    arguments = Arguments(x[None], state, key=key)
    with forward_mode(f"rnnattn.reference.{function}"):
        return run_sequence(function, schedule, options, True, params, arguments)[1]


def run_unit(
    function,
    unit,
    params,
    x,
    state,
    *,
    lengths=None,
    mask=None,
    resets=None,
    reverse=False,
    time_major=False,
    residuals=None,
    implementation=None,
    **noise,
) -> tuple[Array, Any]:
    """h of every step, and the final state."""
    given = (lengths, mask, resets, time_major)
    arguments = checked_sequence(function, unit, params, x, state, *given)
    rates, key = checked_noise(function, unit, params, **noise)
    keeps = checked_residuals(function, residuals)
    if keeps is None:
        keeps = suited_residuals(unit, params, arguments.x, time_major)
    options = Options(unit, bool(reverse), keeps, noise=rates)
    schedule = _suited(function, implementation, params, arguments.x, options)
    with forward_mode(f"rnnattn.reference.{function}"):
        outputs, final = run_sequence(
            function, schedule, options, time_major, params, arguments._replace(key=key)
        )
    return outputs.y, final


def _suited(function, implementation, params, x, options):
    """The schedule that is asked for, or the kernels where they serve."""
    check = Check(function)
    check.one_of("implementation", implementation, (None, "xla", "native"))
    unserved = [] if implementation == "xla" else native.unserved(params, x, options)
    if implementation == "native":
        check.served("native", unserved)
    return CHUNKED if implementation == "xla" or unserved else native.NATIVE
