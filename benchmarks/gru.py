"""rnnattn.gru and torch.nn.GRU, for `sweep.py`: the programs of a problem, as in `lstm.py`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import rnnattn
from benchmarks import lstm, timing
from rnnattn import interop

KINDS = lstm.KINDS
outputs = lstm.outputs


class Problem(NamedTuple):
    """Weights, inputs and the cotangent of y; x (T, B, D), dy (T, B, H)."""

    params: rnnattn.GRUParams
    x: jax.Array
    dy: jax.Array


def make_problem(T, B, D, H, *, dtype) -> Problem:
    keys = jax.random.split(jax.random.key(0), 3)
    params = rnnattn.init_gru(keys[0], D, H, recurrent_init="uniform", dtype=dtype)
    draw = lambda key, width: jax.random.normal(key, (T, B, width), jnp.float32).astype(dtype)
    return Problem(params, draw(keys[1], D), draw(keys[2], H))


def ours(problem: Problem) -> timing.Programs:
    apply = lambda params, x: rnnattn.gru(params, x, time_major=True)
    return lstm.jax_programs(apply, *problem)


def torch(problem: Problem) -> timing.Programs:
    return lstm.torch_programs("GRU", interop.gru_to_torch(problem.params), problem)
