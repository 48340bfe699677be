"""What is built of sequences: two directions, and a stack of layers.

Axes: B batch, T time, D input width, H hidden width, R width of h (H without a projection).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, SupportsFloat, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rnnattn.checks import Check
from rnnattn.recurrent.api import lstm
from rnnattn.recurrent.arguments import SequenceOptions, StackOptions
from rnnattn.recurrent.units.lstm import LSTMParams, LSTMState


def bidirectional_lstm(
    forward: LSTMParams,
    backward: LSTMParams,
    x: Float[Array, "... D"],
    states: tuple[LSTMState | None, LSTMState | None] | None = None,
    **options: Unpack[SequenceOptions],
) -> tuple[Float[Array, "... width"], tuple[LSTMState, LSTMState]]:
    """`lstm` in both directions over the same `x`, side by side.

    Args:
        states: the initial states of the two, or None for zeros; the backward one enters at the
            last valid step.
        options: those of `lstm`, `reverse` apart; of `key` each direction has its own.
    Returns:
        y, the outputs of `forward` beside those of `backward`, both in the order of x; and the
        final states of the two.
    Raises:
        ValueError: as `lstm` does.
    Gradient:
        That of `lstm`, with respect to the parameters, `x` and `states`.
    Example:
        >>> from rnnattn import init_lstm
        >>> ahead, back = (init_lstm(jax.random.key(k), 3, 5) for k in (0, 1))
        >>> y, (last, first) = bidirectional_lstm(ahead, back, jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 10)
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
    """Layers one above the other, each reading the outputs of the one below.

    Args:
        layers: from the bottom up; one is an `LSTMParams`, or a (forward, backward) pair of them.
        states: the initial state of each layer (a pair for a pair), or None for zeros.
        dropout_rate: the share of the outputs between two layers that is set to zero, in [0, 1);
            the rest is scaled up by 1 / (1 − rate).
        dropout_key: needed where `dropout_rate` is above 0.
        variational: drop the same outputs at every step (Gal & Ghahramani 2016).
        time_major, options: as in `lstm`; of `key` each layer has its own.
    Returns:
        y, the outputs of the top layer, and the final states of all layers.
    Raises:
        ValueError: as `lstm` does; no layers, a number of states that is not that of the layers, a
            rate out of range, or no key for it.
    Gradient:
        That of `lstm`, with respect to `layers`, `x` and `states`; what is dropped is a constant.
    Example:
        Truncated back-propagation through time: carry the state, and stop its gradient.

        >>> from rnnattn import init_lstm
        >>> layers = [init_lstm(jax.random.key(0), 3, 5), init_lstm(jax.random.key(1), 5, 5)]
        >>> def loss(layers, x, states):
        ...     y, states = stacked_lstm(layers, x, jax.lax.stop_gradient(states))
        ...     return (y**2).mean(), states
        >>> states = None
        >>> for window in jnp.split(jnp.ones((2, 12, 3)), 3, axis=1):
        ...     gradient, states = jax.grad(loss, has_aux=True)(layers, window, states)
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


def bidirectional(
    run: Callable[..., Any],
    forward: Any,
    backward: Any,
    x: Float[Array, "... D"],
    states: Any = None,
    **options: Any,
) -> tuple[Float[Array, "... width"], tuple[Any, Any]]:
    """Any unit in both directions over the same `x`, side by side.

    Args:
        run: the unit over a sequence, such as `rnnattn.gru`.
        forward, backward: its parameters, and `states` its initial states, as in
            `bidirectional_lstm`.
        options: those of `run`, `reverse` apart; of `key` each direction has its own.
    Returns:
        As `bidirectional_lstm`.
    Raises:
        ValueError: as `run` does.
    Gradient:
        That of `run`, with respect to the parameters, `x` and `states`.
    Example:
        >>> from rnnattn import gru, init_gru
        >>> ahead, back = (init_gru(jax.random.key(k), 3, 5) for k in (0, 1))
        >>> y, (last, first) = bidirectional(gru, ahead, back, jnp.ones((2, 7, 3)))
        >>> y.shape
        (2, 7, 10)
    """
    return _both_directions("bidirectional", run, (forward, backward), x, states, options)


def stacked(
    run: Callable[..., Any],
    layers: Sequence[Any],
    x: Float[Array, "... D"],
    states: Sequence[Any] | None = None,
    *,
    dropout_rate: SupportsFloat = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    variational: bool = False,
    time_major: bool = False,
    **options: Any,
) -> tuple[Float[Array, "... width"], tuple[Any, ...]]:
    """Layers of any unit one above the other, each reading the outputs of the one below.

    Args:
        run: the unit over a sequence, such as `rnnattn.gru`.
        layers: from the bottom up; its parameters, or a (forward, backward) pair of them.
        states, dropout_rate, dropout_key, variational: as in `stacked_lstm`.
        time_major, options: those of `run`; of `key` each layer has its own.
    Returns:
        y, the outputs of the top layer, and the final states of all layers.
    Raises:
        ValueError: as `run` does and `stacked_lstm`.
    Gradient:
        That of `run`, with respect to `layers`, `x` and `states`; what is dropped is a constant.
    Example:
        >>> from rnnattn import gru, init_gru
        >>> layers = [init_gru(jax.random.key(0), 3, 5), init_gru(jax.random.key(1), 5, 5)]
        >>> y, states = stacked(gru, layers, jnp.ones((2, 7, 3)))
        >>> y.shape, len(states)
        ((2, 7, 5), 2)
    """
    function = "stacked"
    check = Check(function)
    _check_no_cells(check, options)
    dropout = _checked_dropout(function, layers, states, dropout_rate, dropout_key)
    options["time_major"] = time_major
    keys = _keys(dropout_key, len(layers)) if dropout > 0 else ()
    key = options.pop("key", None)
    if key is not None:
        check.single_key("key", key)
    of_layers = None if key is None else _keys(key, len(layers))
    x, finals = jnp.asarray(x), []
    for n, layer in enumerate(layers):
        if n > 0 and dropout > 0:
            time_axis = 0 if time_major else x.ndim - 2
            x = _drop(keys[n], x, dropout, time_axis if variational else None)
        state = None if states is None else states[n]
        if of_layers is not None:
            options["key"] = of_layers[n]
        try:
            if hasattr(layer, "_fields"):  # parameters, and no pair of them
                x, final = run(layer, x, state, **options)
            else:
                x, final = _both_directions(function, run, layer, x, state, options)
        except ValueError as error:
            error.add_note(f"In `layers[{n}]`.")
            raise
        finals.append(final)
    return x, tuple(finals)


def _both_directions(function, run, pair, x, states, options):
    forward, backward = pair
    check = Check(function)
    check("reverse" not in options, "reverse", "left out: both directions are run", "it")
    _check_no_cells(check, options)
    of_each = states is None or (len(states) == 2 and not hasattr(states, "_fields"))
    check(of_each, "states", "a pair of states, or None", type(states).__name__)
    state_ahead, state_back = (None, None) if states is None else states
    of_ahead, of_back = options, options
    if options.get("key") is not None:
        check.single_key("key", options["key"])
        of_ahead, of_back = ({**options, "key": key} for key in _keys(options["key"], 2))
    ahead, last = run(forward, x, state_ahead, **of_ahead)
    back, first = run(backward, x, state_back, reverse=True, **of_back)
    return jnp.concatenate([ahead, back], axis=-1), (last, first)


def _check_no_cells(check, options):
    given = options.get("return_cells", False)
    check(not given, "return_cells", "left out: of several layers y alone is returned", given)


@partial(jax.jit, static_argnames="count")
def _keys(key, count):
    """A key for each layer or direction."""
    return tuple(jax.random.fold_in(key, n) for n in range(count))


@partial(jax.jit, static_argnames=("rate", "shared_axis"))
def _drop(key, x, rate, shared_axis):
    """Zero a share of x and scale up the rest, alike along `shared_axis`."""
    shape = [1 if axis == shared_axis else size for axis, size in enumerate(x.shape)]
    # a float32, so that x64 mode draws the same bits
    keep = jax.random.bernoulli(key, jnp.float32(1 - rate), shape)
    return jnp.where(keep, x / (1 - rate), 0)


def _checked_dropout(function, layers, states, rate, key):
    check = Check(function)
    one = hasattr(layers, "_fields")
    check(not one, "layers", "a sequence of layers", f"one, {type(layers).__name__}")
    check(layers, "layers", "at least one layer", "none")
    if states is not None:
        expected = f"one for each of the {len(layers)} layers"
        check(len(states) == len(layers), "states", expected, len(states))
    rate = check.share("dropout_rate", rate)
    needed = rate > 0 and key is None
    check(not needed, "dropout_key", "given where `dropout_rate` is above 0", None)
    if rate > 0:
        check.single_key("dropout_key", key)
    return rate
