"""What the tests of the kernels of recurrent units share."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn.native import calls, load
from rnnattn.recurrent import run

SETS = list(load.found()[1])
# Those of bfloat16 take all other kernels from a set before them.
WIDE_SETS = [name for name in SETS if "_" not in name]
NARROW_SETS = [
    *((jnp.bfloat16, name) for name in SETS),
    *((jnp.float16, name) for name in WIDE_SETS),
]


def narrow(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def set_how(monkeypatch, **how):
    for name, value in how.items():
        monkeypatch.setattr(calls, name, value)
    cast(Any, run.run_sequence).clear_cache()


def set_instruction_set(monkeypatch, name):
    """For the time of a test: a generator, of a fixture."""
    set_how(monkeypatch, instruction_set=name)
    yield name
    cast(Any, run.run_sequence).clear_cache()


def masks(T, B, names):
    """Lengths with 0 and T among them, and resets; in padding as well."""
    rng = np.random.default_rng(1)
    lengths = jnp.asarray([T, 0, *rng.integers(1, T + 1, size=max(B - 2, 0))][:B], jnp.int32)
    marks = lambda share: jnp.asarray(rng.random((B, T)) < share)
    all_masks = {"lengths": lengths, "resets": marks(0.3), "mask": marks(0.7)}
    return {name: all_masks[name] for name in names}


def with_nan_in_padding(case, lengths):
    is_padding = (
        jnp.arange(case.x.shape[1], dtype=jnp.int32)[None, :, None] >= lengths[:, None, None]
    )
    return case._replace(x=jnp.where(is_padding, jnp.nan, case.x))
