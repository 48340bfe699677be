"""Functions of arrays that lie on several devices by automatic axes: each device has a part.

How such arrays are divided XLA knows alone, and not before a program is compiled: it then asks what
a device is to do with its parts. The axes of an array are named by letters, as in
`rnnattn.meshes`; an axis of one element is shared by all parts.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rnnattn.precision import accumulator


class Division(NamedTuple):
    """Along which axes a function can be divided; a result without such an axis is a sum over it.

    `arguments` and `results` have the letters of each array, in their tree or a part of it from
    the root; axes behind the last letter have no name.
    """

    letters: str
    arguments: Any
    results: Any

    def of(self, words, tree):
        """For each axis of each array, the letter that it can be divided along, or None."""
        leaves = jax.tree.leaves(tree)
        words = jax.tree.leaves(jax.tree.broadcast(_present(words, tree), tree))
        return [
            [
                letter if letter in self.letters and size != 1 else None
                for letter, size in zip(word.ljust(len(x.shape), "."), x.shape, strict=True)
            ]
            for word, x in zip(words, leaves, strict=True)
        ]


def _present(words, tree):
    """The words of what there is of a tree."""
    if tree is None or not isinstance(words, tuple):
        return None if tree is None else words
    found = [_present(*pair) for pair in zip(words, tree, strict=True)]
    return words._make(found) if hasattr(words, "_make") else tuple(found)


def can_be_divided(platform, count):
    """Whether a program for so many devices can be one that XLA asks for parts of."""
    config: Any = jax.config
    # without the pointers, JAX's cache on disk would not tell functions apart
    told_apart = not config.jax_remove_custom_partitioning_ptr_from_cache_key
    by_rule = config.jax_use_shardy_partitioner
    return by_rule and told_apart and jax.device_count(platform) >= count


def lowered_in_parts(platform, function, division, trees, results, context, *leaves):
    """`function` of leaves, lowered in a program for several devices of a platform.

    Args:
        trees, results: of the shapes of arguments and results, which the leaves are of.
    """
    # importing this takes a while
    from jax.experimental.custom_partitioning import custom_partitioning

    arguments = division.of(division.arguments, trees)
    results = division.of(division.results, results)
    divided = custom_partitioning(function)
    divided.def_partition(
        partial(_partition, function, arguments, results),
        decode_shardings=False,
        sharding_rule=_rule(arguments, results),
    )
    module = context.module_context
    count = module.axis_context.num_devices
    # a lowered program knows how many devices it is for, not which: any stand for their places
    devices = tuple(jax.devices(platform)[:count])
    axes = mlir.ShardingContext(count, devices, _in_prime_axes(context.avals_in, count))
    context = context.replace(module_context=module.replace(axis_context=axes))
    return mlir.lower_fun(divided, multiple_results=True)(context, *leaves)


def _rule(arguments, results):
    """What XLA is told: which axes are divided alike, and that no others are."""
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule

    whole: list[str] = []

    def factor(letter):
        if letter is None:
            whole.append(f"whole{len(whole)}")
        return letter or whole[-1]

    mappings = (
        tuple(ArrayMapping(*map(factor, letters)) for letters in arrays)
        for arrays in (arguments, results)
    )
    return SdyShardingRule(*mappings, need_replication_factors=tuple(whole))


def _partition(function, arguments, results, mesh, given, _):
    """What XLA asks for: a device's part of the work, and how results and arguments are to lie."""
    along = _along(mesh, given, arguments)

    def placed(letters):
        return NamedSharding(mesh, PartitionSpec(*(along.get(letter) for letter in letters)))

    def part(*leaves):
        made = zip(function(*leaves), results, strict=True)
        return [_summed(x, [n for n in along if n not in letters], along) for x, letters in made]

    return mesh, part, [*map(placed, results)], (*map(placed, arguments),)


def _summed(x, letters, along):
    """The sum over the parts along these; 16 bits are summed in more."""
    names = [name for letter in letters for name in along[letter]]
    return jax.lax.psum(x.astype(accumulator(x.dtype)), names).astype(x.dtype) if names else x


def _along(mesh, arrays, all_letters):
    """The mesh axes that each letter is divided along, by the first array of which it is."""
    along: dict[str, tuple[str, ...]] = {}
    for x, letters in zip(arrays, all_letters, strict=True):
        for axis, letter in enumerate(letters):
            if letter and letter not in along:
                names = _names(mesh, x, axis)
                taken = {name for others in along.values() for name in others}
                if names and not taken & set(names):
                    along[letter] = names
    return along


def _names(mesh, x, axis):
    """The mesh axes, the slowest first, that divide an axis of an array into equal parts.

    None where it is whole, or divided in another way.
    """
    try:
        indices = x.sharding.devices_indices_map(x.shape)
    except ValueError:  # of parts that are not equal
        return ()
    starts = [indices[device][axis].start or 0 for device in mesh.devices.flat]
    parts = np.unique(starts, return_inverse=True)[1].reshape(mesh.devices.shape)
    strides = [parts[tuple(step)] for step in np.eye(parts.ndim, dtype=int)]
    cut = sorted(np.flatnonzero(strides), key=lambda n: -strides[n])
    if not cut:
        return ()
    places, sizes = np.indices(parts.shape), parts.shape
    as_cut = np.ravel_multi_index([places[n] for n in cut], [sizes[n] for n in cut])
    return tuple(mesh.axis_names[n] for n in cut) if np.array_equal(parts, as_cut) else ()


def _in_prime_axes(types, count):
    """The mesh that types name, its axes cut into ones of prime sizes, as XLA may cut them."""
    meshes = [x.sharding.mesh for x in types if x.sharding.mesh.size == count]
    sizes = meshes[0].axis_sizes if meshes else (count,)
    primes = [prime for size in sizes for prime in _prime_factors(size)]
    return AbstractMesh(tuple(primes), tuple(f"axis{n}" for n in range(len(primes))))


def _prime_factors(n):
    least = next((m for m in range(2, math.isqrt(n) + 1) if n % m == 0), n)
    return [] if n == 1 else [least, *_prime_factors(n // least)]
