"""Whether what is asked for fits this machine's memory, said before any of it is allocated.

What is estimated comes within a third of what XLA plans; it is compared with a `MARGIN`, so that
what would have fitted is not refused.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from experiments.engine.config import UsageError
from experiments.engine.training import Loss, TrainConfig, in_parts, make_optimizer, start

CONTAINERS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux, by either version of its control groups, says how much a container may have."""

MARGIN = 1.25
"""An estimate above so many times the memory that there is does not fit."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def of_machine() -> int:
    """Bytes of memory of this machine, or of the container that this runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CONTAINERS:
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def check(needed: int, what: str) -> None:
    """Raise a `UsageError` if `what` needs more bytes than the machine has."""
    _compare(needed, of_machine(), what)


def of_training(
    train: TrainConfig, loss: Loss, params: PyTree, batch: PyTree, *carry: PyTree
) -> int:
    """Bytes that a step of training takes: the parameters with what the optimiser keeps of them,
    before and after the step; the batch; and what the loss keeps for the gradient of a part of it.

    Args:
        loss: as `fit` takes it, and so the rest, whose arrays may be abstract.
    """
    parts = train.accumulate

    def kept(params: PyTree, batch: PyTree, carry: PyTree) -> Any:
        key = jax.random.key(0)
        return jax.vjp(lambda params: loss(params, batch, key, *carry), params, has_aux=True)

    part = batch, carry
    if parts > 1:
        first = lambda tree: jax.tree.map(lambda x: x[0], in_parts(tree, parts))
        part = jax.eval_shape(first, part)
    # what is kept are the leaves of the pullback
    _, pullback, _ = jax.eval_shape(kept, params, *part)
    state = jax.eval_shape(lambda params: start(params, make_optimizer(train)), params)
    sum_of_gradients = size_of(params) * (parts > 1)
    return 2 * size_of(state) + sum_of_gradients + size_of((batch, carry, pullback))


def check_training(
    train: TrainConfig, loss: Loss, params: PyTree, batch: PyTree, *carry: PyTree, data: PyTree
) -> None:
    """Raise a `UsageError` if a step of training, with the `data` beside it, takes more memory than
    there is; of the rest, see `of_training`."""
    devices = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in devices:
        there = int(devices["bytes_limit"]) * jax.device_count()
    else:
        there = of_machine() * jax.process_count()
    needed = of_training(train, loss, params, batch, *carry) + size_of(data)
    what = f"training {in_words(size_of(params))} of parameters on such a batch"
    _compare(needed, there, what)


def rows_like(tree: PyTree, number: int) -> PyTree:
    """Abstract arrays of so many rows like those of the tree's."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype), tree)


def size_of(tree: PyTree) -> int:
    """Bytes of the arrays of a tree, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def in_words(size: int) -> str:
    """As "1.5 GiB"."""
    power = min((max(size, 1).bit_length() - 1) // 10, len(UNITS) - 1)
    return f"{size / 2 ** (10 * power):,.1f} {UNITS[power]}" if power else f"{size} bytes"


def _compare(needed: int, there: int, what: str) -> None:
    if needed > MARGIN * there:
        raise UsageError(
            f"{what}: needs about {in_words(needed)} of memory, and there are {in_words(there)}"
        )
