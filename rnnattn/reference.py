"""The plain twins: the same equations, one step after another, under JAX's own differentiation.

Each function here equals its namesake in `rnnattn` and has no rule of its own, so that every
transformation applies: `jax.jvp`, `jacfwd`, `linearize`. It is the oracle of the tests, and the
plain way to say what the fast one computes.
"""

from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat, SupportsIndex, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, Real

from rnnattn.attention.api import call
from rnnattn.attention.arguments import sorted_arguments
from rnnattn.attention.packed import call_packed
from rnnattn.attention.rule import plain
from rnnattn.attention.signature import typed
from rnnattn.attention.xla import DENSE
from rnnattn.checks import Check
from rnnattn.linear.arguments import (
    at_start,
    at_the_end,
    checked_pair,
    checked_sequence as checked_linear_sequence,
    checked_step as checked_linear_step,
    on_mesh as linear_on_mesh,
)
from rnnattn.linear.equations import (
    LINEAR,
    MINGRU,
    MINLSTM,
    RGLRU,
    MinGRUParams,
    MinLSTMParams,
    RGLRUParams,
    advance as advance_linear,
    blocks_of,
)
from rnnattn.linear.problem import Options as LinearOptions
from rnnattn.position import (
    RopeOptions,
    Scaling,
    call_mrope,
    call_rope,
    call_rope_2d,
    call_rope_mixed,
    call_xpos,
    rotate_plain,
)
from rnnattn.recurrent.arguments import (
    NoiseOptions,
    SequenceOptions,
    StackOptions,
    checked_noise,
    checked_residuals,
    checked_sequence,
    checked_step,
    given_by_name,
    on_mesh,
    over_steps,
)
from rnnattn.recurrent.family import UnitOptions
from rnnattn.recurrent.noise import draw_steps
from rnnattn.recurrent.problem import Options, Outputs
from rnnattn.recurrent.stack import bidirectional, stacked
from rnnattn.recurrent.unit import advance, select_each
from rnnattn.recurrent.units.gru import GRUParams, gru_unit
from rnnattn.recurrent.units.layer_norm import (
    LayerNormGRU,
    LayerNormGRUParams,
    LayerNormLSTM,
    LayerNormLSTMParams,
)
from rnnattn.recurrent.units.lstm import LSTMParams, LSTMState, lstm_unit
from rnnattn.recurrent.units.rnn import RNNParams, rnn_unit
from rnnattn.recurrent.units.slstm import SLSTMParams, SLSTMState, slstm_unit
from rnnattn.steps import select

_IMPLEMENTATIONS = (None, "xla", "native", "pallas", "cudnn")  # which make no difference here


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
    """`rnnattn.lstm` as a scan over single steps, whatever `residuals` and `implementation` say.

    Gradient: JAX's own, in every mode.
    Example:
        >>> import jax, rnnattn
        >>> import jax.numpy as jnp
        >>> params = rnnattn.init_lstm(jax.random.key(0), input_size=3, hidden_size=5)
        >>> x = jnp.ones((2, 7, 3))
        >>> (y, state), (dy, dstate) = jax.jvp(lambda x: lstm(params, x), (x,), (x,))
        >>> dy.shape
        (2, 7, 5)
    """
    outputs, final = _run_plainly(
        "reference.lstm",
        lstm_unit("reference.lstm", clip, coupled),
        params,
        x,
        state,
        lengths=lengths,
        mask=mask,
        resets=resets,
        reverse=reverse,
        time_major=time_major,
        residuals=residuals,
        zoneout=zoneout,
        recurrent_dropout=recurrent_dropout,
        candidate_dropout=candidate_dropout,
        key=key,
        implementation=implementation,
        every_state=return_cells,
    )
    return (outputs.y, *(outputs.rest or ()), final)


def _run_plainly(
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
    every_state=False,
    **noise,
):
    """The outputs and the final state of a unit, whose steps run one after another."""
    given = (lengths, mask, resets, time_major)
    arguments = checked_sequence(function, unit, params, x, state, *given)
    rates, key = checked_noise(function, unit, params, **noise)
    arguments = arguments._replace(key=key)
    checked_residuals(function, residuals)
    Check(function).one_of("implementation", implementation, _IMPLEMENTATIONS)
    options = Options(unit, bool(reverse), every_state=every_state, noise=rates)

    def run(params, state, steps):
        weights = unit.prepare(params)
        reads, steps = steps.reads, steps._replace(reads=None)

        def step(state, inputs):
            x, valid, fresh, keys, _ = inputs
            u = unit.inputs(weights, select(valid, x, 0))
            drawn = draw_steps(rates, keys, state)._replace(reads=reads)
            state, _ = advance(unit, weights, u, state, valid, fresh, rates, drawn)
            h, *rest = select_each(valid, tuple(state), 0)
            return state, Outputs(h, (*rest,) if every_state else None)

        final, outputs = lax.scan(step, state, steps, reverse=reverse)
        return outputs, final

    over = lambda given: over_steps(run, options, time_major, **given)
    given = given_by_name(time_major, params, arguments)
    return on_mesh(function, over, options, time_major, given)


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
    """`rnnattn.lstm_step` without its rule.

    Gradient: JAX's own, in every mode.
    """
    unit = lstm_unit("reference.lstm_step", clip, coupled)
    x, state = checked_step("reference.lstm_step", unit, params, x, state)
    return lstm(params, x[None], state, time_major=True, clip=clip, coupled=coupled, **noise)[1]


def gru(
    params: GRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    reset_after: bool = True,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.gru` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    unit = gru_unit("reference.gru", reset_after)
    y, final = _run_unit("reference.gru", unit, params, x, None if h is None else (h,), **options)
    return y, final[0]


def gru_step(
    params: GRUParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    reset_after: bool = True,
    implementation: Literal["xla", "native"] | None = None,
    **noise: Unpack[NoiseOptions],
) -> Float[Array, "*B H"]:
    """`rnnattn.gru_step` without its rule.

    Gradient: JAX's own, in every mode.
    """
    unit = gru_unit("reference.gru_step", reset_after)
    x, state = checked_step("reference.gru_step", unit, params, x, (h,))
    return gru(params, x[None], state[0], reset_after=reset_after, time_major=True, **noise)[1]


def rnn(
    params: RNNParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.rnn` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    state = None if h is None else (h,)
    y, final = _run_unit(
        "reference.rnn", rnn_unit("reference.rnn", activation), params, x, state, **options
    )
    return y, final[0]


def layer_norm_lstm(
    params: LayerNormLSTMParams,
    x: Float[Array, "... D"],
    state: LSTMState | None = None,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], LSTMState]:
    """`rnnattn.layer_norm_lstm` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    return _run_unit("reference.layer_norm_lstm", LayerNormLSTM(), params, x, state, **options)


def layer_norm_gru(
    params: LayerNormGRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.layer_norm_gru` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    state = None if h is None else (h,)
    y, final = _run_unit("reference.layer_norm_gru", LayerNormGRU(), params, x, state, **options)
    return y, final[0]


def slstm(
    params: SLSTMParams,
    x: Float[Array, "... D"],
    state: SLSTMState | None = None,
    *,
    forget_gate: Literal["sigmoid", "exponential"] = "sigmoid",
    **options: Unpack[UnitOptions],
) -> tuple[Float[Array, "... H"], SLSTMState]:
    """`rnnattn.slstm` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    return _run_unit(
        "reference.slstm", slstm_unit("reference.slstm", forget_gate), params, x, state, **options
    )


def _run_unit(function, unit, params, x, state, **options):
    """h of every step, and the final state."""
    outputs, final = _run_plainly(function, unit, params, x, state, **options)
    return outputs.y, final


def bidirectional_lstm(
    forward: LSTMParams,
    backward: LSTMParams,
    x: Float[Array, "... D"],
    states: tuple[LSTMState | None, LSTMState | None] | None = None,
    **options: Unpack[SequenceOptions],
) -> tuple[Float[Array, "... width"], tuple[LSTMState, LSTMState]]:
    """`rnnattn.bidirectional_lstm` over plain scans.

    Gradient: JAX's own, in every mode.
    """
    return bidirectional(lstm, forward, backward, x, states, **options)


def stacked_lstm(
    layers: Sequence[LSTMParams | tuple[LSTMParams, LSTMParams]],
    x: Float[Array, "... D"],
    states: Sequence[Any] | None = None,
    *,
    dropout_rate: SupportsFloat = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    variational: bool = False,
    time_major: bool = False,
    **options: Unpack[StackOptions],
) -> tuple[Float[Array, "... R"], tuple[Any, ...]]:
    """`rnnattn.stacked_lstm` over plain scans.

    Gradient: JAX's own, in every mode.
    """
    return stacked(
        lstm,
        layers,
        x,
        states,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        variational=variational,
        time_major=time_major,
        **options,
    )


def linear_scan(
    a: Float[Array, "... H"],
    b: Float[Array, "... H"],
    h0: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.linear_scan` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jnp.full((2, 7, 3), 0.5)
        >>> (h, last), (dh, dlast) = jax.jvp(linear_scan, (x, x), (x, x))
        >>> dh.shape, dlast.shape
        ((2, 7, 3), (2, 3))
    """
    function = "reference.linear_scan"
    arguments = checked_pair(function, a, b, h0, lengths, mask, resets, time_major)
    return _run_linear(function, LINEAR, arguments, reverse, time_major, implementation)


def mingru(
    params: MinGRUParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.mingru` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    function = "reference.mingru"
    masks = lengths, mask, resets
    arguments = checked_linear_sequence(function, params, x, h, *masks, time_major)
    return _run_linear(function, MINGRU, arguments, reverse, time_major, implementation)


def mingru_step(
    params: MinGRUParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """`rnnattn.mingru_step` without its rule.

    Gradient: JAX's own, in every mode.
    """
    arguments = checked_linear_step("reference.mingru_step", params, x, h)
    return _run_linear("reference.mingru_step", MINGRU, arguments, False, True, implementation)[1]


def minlstm(
    params: MinLSTMParams,
    x: Float[Array, "... D"],
    h: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.minlstm` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    function = "reference.minlstm"
    masks = lengths, mask, resets
    arguments = checked_linear_sequence(function, params, x, h, *masks, time_major)
    return _run_linear(function, MINLSTM, arguments, reverse, time_major, implementation)


def minlstm_step(
    params: MinLSTMParams,
    x: Float[Array, "*B D"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """`rnnattn.minlstm_step` without its rule.

    Gradient: JAX's own, in every mode.
    """
    arguments = checked_linear_step("reference.minlstm_step", params, x, h)
    return _run_linear("reference.minlstm_step", MINLSTM, arguments, False, True, implementation)[1]


def rglru(
    params: RGLRUParams,
    x: Float[Array, "... H"],
    h: Float[Array, "*B H"] | None = None,
    *,
    lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    resets: Bool[Array, "..."] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    implementation: Literal["xla", "native"] | None = None,
) -> tuple[Float[Array, "... H"], Float[Array, "*B H"]]:
    """`rnnattn.rglru` as a scan over single steps.

    Gradient: JAX's own, in every mode.
    """
    function = "reference.rglru"
    masks = lengths, mask, resets
    arguments = checked_linear_sequence(function, params, x, h, *masks, time_major)
    return _run_linear(function, RGLRU, arguments, reverse, time_major, implementation)


def rglru_step(
    params: RGLRUParams,
    x: Float[Array, "*B H"],
    h: Float[Array, "*B H"],
    *,
    implementation: Literal["xla", "native"] | None = None,
) -> Float[Array, "*B H"]:
    """`rnnattn.rglru_step` without its rule.

    Gradient: JAX's own, in every mode.
    """
    arguments = checked_linear_step("reference.rglru_step", params, x, h)
    return _run_linear("reference.rglru_step", RGLRU, arguments, False, True, implementation)[1]


def _run_linear(function, unit, arguments, reverse, time_major, implementation):
    Check(function).one_of("implementation", implementation, (None, "xla", "native"))
    options = LinearOptions(unit, bool(reverse), bool(time_major))

    def run(**given):
        params, x, start, (valid, fresh), batch = at_start(options, **given)
        inputs, weights = unit.project(params, x, valid)
        rows = [w[None] for w in weights]

        def step(h, inputs):
            inputs, valid, fresh = inputs
            column = None if fresh is None else fresh[:, None]
            p = [select(valid, p, 0) for p in blocks_of(inputs, h.shape[-1])]
            a, b = unit.coefficients(p, rows, column)
            h_prev = h if fresh is None else select(fresh, 0, h)
            h = select(valid, advance_linear(a, h_prev, b), h)
            return h, select(valid, h, 0).astype(inputs[0].dtype)

        time_first = lambda x: jnp.moveaxis(x, options.time_axis, 0)
        steps = jax.tree.map(time_first, (inputs, valid, fresh))
        last, y = lax.scan(step, start, steps, reverse=options.reverse)
        y = jnp.moveaxis(y, 0, options.time_axis)
        return at_the_end(options, y, last, given["h0"], batch)

    return linear_on_mesh(function, run, options.time_major, arguments)


@typed
def dot_product_attention(
    query: Float[Array, "*B T N K"],
    key: Float[Array, "*B S M K"],
    value: Float[Array, "*B S M V"],
    bias: Real[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    **options: Any,
) -> Any:
    """`rnnattn.dot_product_attention` with all logits at once and no rule of its own.

    Gradient: JAX's own, in every mode.
    Example:
        >>> import jax.numpy as jnp
        >>> q, k, v = jnp.ones((3, 2, 5, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True).shape
        (2, 5, 4, 8)
    """
    function = "reference.dot_product_attention"
    arguments = sorted_arguments(function, query, key, value, bias, mask, **options)
    return call(function, plain, arguments, DENSE)


def packed_attention(
    query: Float[Array, "T N K"],
    key: Float[Array, "S M K"],
    value: Float[Array, "S M V"],
    cu_seqlens_query: Int[Array, " starts"],
    cu_seqlens_key: Int[Array, " starts"] | None = None,
    *,
    query_offset: SupportsIndex | Int[Array, "..."] | None = None,
    **options: Any,
) -> Any:
    """`rnnattn.packed_attention` with all logits at once and no rule of its own.

    Gradient: JAX's own, in every mode.
    """
    function, starts = "reference.packed_attention", (cu_seqlens_query, cu_seqlens_key)
    return call_packed(
        function, plain, query, key, value, starts, query_offset, options, schedule=DENSE
    )


def rope(
    x: Float[Array, "*batch T N K"],
    positions: Real[ArrayLike, "..."],
    *,
    base: SupportsFloat = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rnnattn.rope` without its rule.

    Gradient: JAX's own, in every mode.
    """
    options = RopeOptions(base, rotary_dim, interleaved, scaling, inverse)
    return call_rope("reference.rope", rotate_plain, x, positions, options)


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
    """`rnnattn.rope_2d` without its rule.

    Gradient: JAX's own, in every mode.
    """
    options = RopeOptions(base, None, interleaved, scaling, inverse)
    return call_rope_2d("reference.rope_2d", rotate_plain, x, rows, columns, options)


def rope_mixed(
    x: Float[Array, "*batch T N K"],
    rows: Real[ArrayLike, "..."],
    columns: Real[ArrayLike, "..."],
    frequencies: Float[Array, "..."],
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Float[Array, "*batch T N K"]:
    """`rnnattn.rope_mixed` without its rule.

    Gradient: JAX's own, in every mode.
    """
    return call_rope_mixed(
        "reference.rope_mixed", rotate_plain, x, rows, columns, frequencies, interleaved, inverse
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
    """`rnnattn.mrope` without its rule.

    Gradient: JAX's own, in every mode.
    """
    options = RopeOptions(base, None, interleaved, scaling, inverse)
    return call_mrope("reference.mrope", rotate_plain, x, positions, sections, options)


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
    """`rnnattn.xpos` without its rule.

    Gradient: JAX's own, in every mode.
    """
    options = RopeOptions(base, None, interleaved, None, False)
    function, scales = "reference.xpos", (downscale, scale_base, gamma)
    return call_xpos(function, rotate_plain, x, positions, options, *scales)
