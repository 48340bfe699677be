"""The LSTM by cuDNN, as `jax.experimental.rnn` calls it."""

from functools import partial

import jax
import jax.numpy as jnp

from rnnattn.checks import those_that_hold
from rnnattn.recurrent.arguments import as_given, time_back, time_first
from rnnattn.recurrent.noise import QUIET
from rnnattn.recurrent.unit import full_state
from rnnattn.recurrent.units.lstm import LSTM, LSTMState
from rnnattn.steps import batch_of


def unserved_by_cudnn(params, x, options, mask, resets):
    """What of a call cuDNN cannot serve."""
    return those_that_hold(
        {
            f"the dtype {jnp.result_type(x).name}": jnp.result_type(x) != jnp.float32,
            "peephole weights": params.peephole is not None,
            "a projection": params.projection is not None,
            "`clip` or `coupled`": options.unit != LSTM(),
            "`mask`": mask is not None,
            "`resets`": resets is not None,
            "`return_cells`": options.every_state,
            "zoneout or dropout": options.noise != QUIET,
            "`reverse`": options.reverse,
            "a machine without a GPU": jax.default_backend() != "gpu",
            # benchmarks/README.md, "On a GPU"
            "jax from 0.11 on, whose cuDNN LSTM was measured to be wrong": jax.__version_info__
            >= (0, 11),
        }
    )


@partial(jax.jit, static_argnames="time_major")
def run_cudnn(time_major, params, x, state, lengths):
    """`lstm` by `jax.experimental.rnn`: batch first, weights transposed in one row, two biases."""
    from jax.experimental import rnn

    batch = batch_of(x, time_major)
    x = jnp.swapaxes(time_first(x, batch, time_major), 0, 1)
    B, T, D = x.shape
    h, c = full_state(LSTM(), params, state, B, x.dtype)
    lengths = jnp.full((B,), T) if lengths is None else lengths.reshape(B)
    transposed = [params.w_x.T.ravel(), params.w_h.T.ravel(), params.b, jnp.zeros_like(params.b)]
    weights, H = jnp.concatenate(transposed), params.w_h.shape[0]
    y, h, c = rnn.lstm(x, h[None], c[None], weights, lengths.astype(jnp.int32), D, H, 1, 0.0, False)
    y = time_back(jnp.swapaxes(y, 0, 1), batch, time_major)
    return y, as_given(LSTMState(h[0], c[0]), state, batch)
