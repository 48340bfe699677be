"""Training on several devices: where each array lies. What moves between them is left to jit.

batch, what the loss carries on   rows over `data` and `fsdp`; what comes second, the time of a
                                  sequence, over `sequence`
parameters, moments               over the devices of `fsdp`, along the longest axis that their
                                  number divides; small ones on every device
numbers, keys                     on every device
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from experiments.engine.config import Count, UsageError

DATA, FSDP, SEQUENCE = AXES = ("data", "fsdp", "sequence")
"""Of the mesh."""

ROWS = (DATA, FSDP)
"""Those that the rows of a batch are divided along."""

WHOLE_BELOW = 1024
"""Numbers in an array of which a copy on every device costs less than to send for its parts."""


@dataclass(frozen=True)
class ParallelConfig:
    """Devices to train on: data × fsdp × sequence of them.

    Losses are the same up to rounding, and a run can be resumed with other values.
    """

    data: Count = 1
    """Number of device groups; each has all parameters and a part of every batch."""
    fsdp: Count = 1
    """Devices in a group; parameters, optimiser state and examples are sharded over them."""
    sequence: Count = 1
    """Devices that share each sequence, with a part of it on each; for attention_text."""


def check(
    config: ParallelConfig, batch_size: int, accumulate: int = 1, *, divides_sequence: bool = False
) -> None:
    """Raise a `UsageError` if there are no such devices, or if they do not divide the batch.

    Args:
        accumulate: parts of the batch, each of which they have to divide.
        divides_sequence: whether the model is one whose sequences can lie on several devices.
    """
    if config.sequence > 1 and not divides_sequence:
        raise UsageError(
            "parallel.sequence: should be 1, as this experiment does not divide its sequences "
            f"among devices, got {config.sequence}"
        )
    rows = {"data": config.data, "fsdp": config.fsdp}
    sizes = rows | ({"sequence": config.sequence} if config.sequence > 1 else {})
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted > there:
        hint = "; JAX_NUM_CPU_DEVICES sets their number on a CPU" * (jax.default_backend() == "cpu")
        raise UsageError(
            f"{_product(sizes)}: should be at most the number of devices, got {there}{hint}"
        )
    if jax.process_count() > 1 and wanted != there:
        raise UsageError(
            f"{_product(sizes)}: should be the number of devices of all {jax.process_count()} "
            f"processes, got {there}"
        )
    if batch_size % (math.prod(rows.values()) * accumulate):
        parts = f"train.accumulate = {accumulate} times " * (accumulate > 1)
        raise UsageError(
            f"train.batch_size: should be a multiple of {parts}{_product(rows)}, got {batch_size}"
        )


def _product(sizes: Mapping[str, int]) -> str:
    """As "parallel.data × parallel.fsdp = 4 × 2 = 8"."""
    names = " × ".join(f"parallel.{name}" for name in sizes)
    numbers = " × ".join(map(str, sizes.values()))
    return f"{names} = {numbers} = {math.prod(sizes.values())}"


def make_mesh(config: ParallelConfig) -> Mesh | None:
    """The devices; None for a single one, whose programs need none."""
    shape = (config.data, config.fsdp, config.sequence)
    if math.prod(shape) == 1:
        return None
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for a tree of numbers, and of arrays whose first axis is that of the examples; with
    several devices to a sequence, the second is its time."""
    axes = (ROWS, SEQUENCE) if mesh.shape[SEQUENCE] > 1 else (ROWS,)
    return jax.tree.map(lambda x: NamedSharding(mesh, P(*axes[: x.ndim])), tree)


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
