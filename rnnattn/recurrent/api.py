"""The LSTM as it is called: over one step and over a sequence; and the choice of a schedule.

Axes: B batch, T time, D input width, H hidden width, R width of h (H without a projection).
"""

from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat, SupportsIndex, Unpack

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import rnnattn.recurrent.native as native
import rnnattn.recurrent.pallas as pallas
from rnnattn.checks import Check, forward_mode
from rnnattn.dispatch import no_hopper, unserved_here
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
from rnnattn.recurrent.peers import run_cudnn, unserved_by_cudnn
from rnnattn.recurrent.placed import placed
from rnnattn.recurrent.problem import Options
from rnnattn.recurrent.run import run_sequence
from rnnattn.recurrent.units.lstm import LSTMParams, LSTMState, lstm_unit


def lstm_step(
    params: LSTMParams,
    x: Float[Array, "*B D"],
    state: LSTMState,
    *,
    clip: SupportsFloat | None = None,
    coupled: bool = False,
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> LSTMState:
    """One step (L1, L2): the state after `x`, given the state before it, and in its dtypes.

    Args:
        x: (B, D); B may be absent, or several axes, here and in the state.
        clip: bounds every pre-activation to ±clip, as ONNX does; None bounds nothing.
        coupled: f = 1 − i (CIFG); the forget gate's own weights then get a gradient of zero.
        implementation: as in `lstm`.
        noise: `zoneout`, `recurrent_dropout`, `candidate_dropout` and `key`, as in `lstm`: what is
            drawn depends on the key alone, so each step wants one of its own.
    Raises:
        ValueError: a shape or dtype is off; the message says which, what was expected and
            what came.
    Gradient:
        L3 to L8, with respect to `params`, `x` and `state`; keeps the pre-activations.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_lstm
        >>> params = init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> state = LSTMState(h=jnp.zeros((2, 5)), c=jnp.zeros((2, 5)))
        >>> lstm_step(params, jnp.ones((2, 3)), state).h.shape
        (2, 5)
    """
    function = "lstm_step"
    unit = lstm_unit(function, clip, coupled)
    x, state = checked_step(function, unit, params, x, state)
    Check(function).one_of("implementation", implementation, (None, "xla", "native"))
    rates, key = checked_noise(function, unit, params, **noise)
    options = Options(unit, residuals="gates", noise=rates)
    schedule = _suited(function, implementation, params, x, options)
    arguments = Arguments(x[None], state, key=key)
    with forward_mode("rnnattn.reference.lstm_step"):
        return run_sequence(function, schedule, options, True, params, arguments)[1]


def lstm(
    params: LSTMParams,
    x: Float[Array, "... D"],
    state: LSTMState | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    clip: SupportsFloat | None = None,
    coupled: bool = False,
    residuals: Literal["gates", "states"] | SupportsIndex | None = None,
    return_cells: bool = False,
    zoneout: SupportsFloat | Sequence[SupportsFloat] = 0.0,
    recurrent_dropout: SupportsFloat = 0.0,
    candidate_dropout: SupportsFloat = 0.0,
    key: PRNGKeyArray | None = None,
    implementation: Literal["xla", "native", "pallas", "cudnn"] | None = None,
) -> Any:
    """The hidden state after every step of `x`, and the state after the last one (L1, L2).

    Args:
        x: (B, T, D), or (T, B, D) with `time_major`; B may be absent, or several axes, here and in
            all that follows.
        state: the initial state; None is zeros.
        lengths: the valid steps of each row, 0 to T. Outputs past them are zero, whatever x holds
            there reaches nothing, and the returned state is that after the last valid step run
            (the initial state where the length is 0).
        mask: (B, T), or (T, B) with `time_major`, in any pattern. False marks a step that is not
            there: it holds the state and gives zero output, whatever x holds there reaches nothing,
            and a reset marked there takes effect at the next step that is. Beside `lengths`, both
            count.
        resets: (B, T), or (T, B) with `time_major`. True marks the first step of an episode in time
            order: nothing passes between it and the step before it, in either direction of running,
            as if the episodes ran apart, from zeros. A mark on the first step drops the initial
            state of a run forwards, and leaves the returned state of a run in reverse. NaN in steps
            of an episode of which the loss reads nothing reaches no gradient.
        reverse: run from the last valid step to the first; outputs stay in the order of x.
        time_major: x, y, mask and resets have T before B. Saves two transpositions.
        clip: bounds every pre-activation to ±clip, peephole terms included; None bounds nothing.
        coupled: f = 1 − i (CIFG); the forget gate's own weights then get a gradient of zero.
        residuals: what is kept for the gradient, beside y: "gates" (c and the pre-activations of
            each step), "states" (c of each step) or n (the state every n steps); what is not kept
            is computed again. The gradient is the same. Temporary memory of the gradient at T 4096,
            B 8, D = H = 256 in float32: 210 MiB, 84 MiB, and 13 MiB for n = 64;
            `rnnattn.reference.lstm` takes 516 (`python benchmarks/lstm.py --memory`). None chooses
            the fastest that is not too large: "gates" up to 256 MiB of these (5 T B H numbers, in
            float32 for 16-bit inputs), "states" up to 1 GiB of c, and beyond that n = ⌊√T⌋;
            "states" where T or B is symbolic.
        return_cells: also give c of every step, zero where y is; "xla" alone can.
        zoneout: the share of h and of c, in [0, 1), that keeps its last value in a step, drawn for
            each step; or a pair, of h and of c. Without `key`, each is made of that share of the
            last value and the rest of the new one, which is the expectation, for inference. "xla"
            alone can, here and in the next two.
        recurrent_dropout: the share of h that the products of a row read as zero, the same at all
            of its steps; what they read of the rest is scaled up by 1 / (1 − share).
        candidate_dropout: the share of g that is written to c as zero, drawn for each step; the
            rest is scaled up as well.
        key: what these three are drawn from, for each row and step by its number, so alike in every
            schedule (in `jax.shard_map`, by the row's number on its device). None draws nothing:
            dropout has no effect then, and zoneout that of its expectation.
        implementation: None takes "native" or "pallas" where they serve and were measured to be
            faster, and "xla" elsewhere.
            "xla" runs everywhere: one loop of several steps a turn on a GPU or TPU, and chunks that
            fit a cache on a CPU; what it takes of memory above is a CPU's.
            "native" is the kernels of `rnnattn.native` on a CPU, for 32 and 16 bits, and "xla" on
            other platforms.
            "pallas" is the kernels of `rnnattn.recurrent.hopper` on one NVIDIA GPU of the Hopper
            generation, in exported programs too, and "xla" on other platforms. It is for 16 bits
            and H 64, 128, 256, 384 or 512, without peepholes, projection, `clip`, `coupled`,
            `return_cells` and what is drawn. None takes it for 16 steps or more of up to 128 rows,
            with jax 0.11. On one TPU from the fifth generation on it is those of
            `rnnattn.recurrent.tpu`, for bfloat16 and float32 and multiples of 128 up to H 1024,
            without the same: they compile for a v5e and a v6e, were measured on none, and None
            never takes them. A call that one of the two can serve runs on XLA on the other's
            platform, unless that device is at hand: then it is refused.
            "cudnn" is for float32 on an NVIDIA GPU, without the same, `mask`, `resets` or
            `reverse`, and for lengths of at least 1; its gradient is cuDNN's own, of first order.
            It is refused from jax 0.11 on, with which its results were measured to be wrong.
    Returns:
        y (B, T, R), or (T, B, R) with `time_major`, in the dtype of x, (with `return_cells`) c
        (B, T, H) or (T, B, H), in the dtype of the state's c, and the final state, in the
        dtypes of the initial one. For 16-bit inputs c is float32, so that a sequence cut in two and
        chained equals one run; where it is given in 16 bits, it comes back so.
        A program that reads the final state alone, `lstm(…)[1]` under `jax.jit`, holds no y with
        "xla", and with `residuals=n` its gradient holds none either.
    Raises:
        ValueError: a shape, dtype or option is off; the message says which, what was expected and
            what came.
    Gradient:
        L3 to L8, with respect to `params`, `x` and `state`, from cotangents of y, of the cells and
        of both parts of the final state; lengths, mask, resets and what is drawn are constants. It
        can be differentiated again in reverse and forward mode; for `jax.jvp` of the function
        itself use `rnnattn.reference.lstm`.
        Under `jax.vmap` over x with shared weights, the weight gradient is one product for each
        example: let B be the batch instead.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rnnattn import init_lstm
        >>> params = init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> y, state = lstm(params, jnp.ones((2, 7, 3)), lengths=jnp.array([7, 4]))
        >>> y.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == state.h[1]).all())
        ((2, 7, 5), True, True)
    """
    function, check = "lstm", Check("lstm")
    unit = lstm_unit(function, clip, coupled)
    arguments = checked_sequence(
        function, unit, params, x, state, lengths, mask, resets, time_major
    )
    rates, key = checked_noise(
        function,
        unit,
        params,
        zoneout=zoneout,
        recurrent_dropout=recurrent_dropout,
        candidate_dropout=candidate_dropout,
        key=key,
    )
    arguments = arguments._replace(key=key)
    check.one_of("implementation", implementation, (None, "xla", "native", "pallas", "cudnn"))
    keeps = checked_residuals(function, residuals)
    x = arguments.x
    if keeps is None:
        keeps = suited_residuals(unit, params, x, time_major)
    options = Options(unit, bool(reverse), keeps, bool(return_cells), rates)
    if implementation == "cudnn":
        check.served("cudnn", unserved_by_cudnn(params, x, options, mask, resets))
        return run_cudnn(time_major, params, x, arguments.state, arguments.lengths)
    schedule = _suited(function, implementation, params, x, options)
    with forward_mode("rnnattn.reference.lstm"):
        outputs, final = run_sequence(function, schedule, options, time_major, params, arguments)
    return (outputs.y, *(outputs.rest or ()), final)


# What None chooses, by whether the kernels for a CPU and those for a GPU serve a call.
_FASTEST = {
    (False, False): CHUNKED,
    (True, False): native.NATIVE,
    (False, True): placed("rnnattn_lstm_on_gpu", {"cuda": pallas.WHERE_FASTER}),
    (True, True): placed(
        "rnnattn_lstm_16_bits", {"cpu": native.HALVES, "cuda": pallas.WHERE_FASTER}
    ),
}


def _suited(function, implementation, params, x, options):
    """The schedule that is asked for, or the fastest of those that serve."""
    check = Check(function)
    if implementation == "xla":
        return CHUNKED
    by_gpu = pallas.unserved_on_gpu(params, x, options)
    if implementation == "pallas":
        by_gpu, by_tpu = by_gpu or no_hopper(), pallas.unserved_on_tpu(params, x, options)
        check.served("pallas", unserved_here(by_gpu, by_tpu))
        return pallas.PALLAS[not by_gpu, not by_tpu]
    by_cpu = native.unserved(params, x, options)
    if implementation == "native":
        check.served("native", by_cpu)
        return native.NATIVE
    return _FASTEST[not by_cpu, not by_gpu]
