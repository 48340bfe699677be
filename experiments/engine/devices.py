"""Training on several devices: where each array lies. What moves between them is left to jit.

batch, what the loss carries on   rows over all devices
parameters, moments               over the devices of `fsdp`, along the longest axis that their
                                  number divides; small ones on every device
numbers, keys                     on every device
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from experiments.engine.config import Count, UsageError

DATA, FSDP = "data", "fsdp"

WHOLE_BELOW = 1024
"""Numbers in an array of which a copy on every device costs less than to send for its parts."""


@dataclass(frozen=True)
class ParallelConfig:
    """Devices to train on: data × fsdp of them.

    Losses are the same up to rounding, and a run can be resumed with other values.
    """

    data: Count = 1
    """Number of device groups; each has all parameters and a part of every batch."""
    fsdp: Count = 1
    """Devices in a group; parameters, optimiser state and examples are sharded over them."""


def check(config: ParallelConfig, batch_size: int, accumulate: int = 1) -> None:
    """Raise a `UsageError` if there are no such devices, or if they do not divide the batch.

    Args:
        accumulate: parts of the batch, each of which they have to divide.
    """
    wanted, there = config.data * config.fsdp, jax.device_count()
    named = f"parallel.data × parallel.fsdp = {config.data} × {config.fsdp} = {wanted}"
    if wanted > there:
        hint = "; JAX_NUM_CPU_DEVICES sets their number on a CPU" * (jax.default_backend() == "cpu")
        raise UsageError(f"{named}: should be at most the number of devices, got {there}{hint}")
    if jax.process_count() > 1 and wanted != there:
        raise UsageError(
            f"{named}: should be the number of devices of all {jax.process_count()} processes, "
            f"got {there}"
        )
    if batch_size % (wanted * accumulate):
        parts = f"train.accumulate = {accumulate} times " * (accumulate > 1)
        named = f"{parts}{named}"
        raise UsageError(f"train.batch_size: should be a multiple of {named}, got {batch_size}")


def make_mesh(config: ParallelConfig) -> Mesh | None:
    """The devices; None for a single one, whose programs need none."""
    shape = (config.data, config.fsdp)
    if shape == (1, 1):
        return None
    devices = jax.devices()[: config.data * config.fsdp]
    return jax.make_mesh(shape, (DATA, FSDP), (AxisType.Auto, AxisType.Auto), devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for a tree of arrays whose first axis is that of the examples, and of numbers."""
    return jax.tree.map(lambda x: NamedSharding(mesh, P((DATA, FSDP)) if x.ndim else P()), tree)


def shares(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for a tree of parameters or of what an optimiser keeps of them."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _share(x.shape, mesh.shape[FSDP])), tree)


def _share(shape: tuple[int, ...], devices: int) -> P:
    divided = [axis for axis, n in enumerate(shape) if n % devices == 0]
    if devices == 1 or math.prod(shape) < WHOLE_BELOW or not divided:
        return P()
    longest = max(divided, key=lambda axis: shape[axis])
    return P(*[None] * longest, FSDP)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """The arrays, which every process has whole, where they belong."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding))
        return jax.make_array_from_process_local_data(sharding, x, x.shape)

    return jax.tree.map(place, tree, shardings)


def take(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays whole, on the first device of this process, whatever devices they were on."""
    everywhere = jax.device_put(tree, whole(mesh))
    return jax.tree.map(lambda x: x.addressable_data(0), everywhere)
