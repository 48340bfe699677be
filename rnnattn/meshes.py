"""Functions on meshes of explicit axes, where the type of an array says how it is divided.

`jax.make_mesh` makes such axes. There a function of the library runs within `jax.shard_map`, each
device on its part of what can be divided: rows of a batch, heads. What else an argument is divided
along, as the features of a head, is gathered first, and divided again in the results. Arrays whose
types name no such mesh are none of this module's business.

An axis of an array is named by a letter, the same for all axes of a kind, "." for one without a
name. An axis of one element is shared by all parts.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def in_parts(check, function, arguments, axes, results, *, divided, whole):
    """`function(arguments)`, on a mesh of explicit axes by parts.

    Args:
        check: the `Check` of the function that is called.
        arguments: a dict of trees of arrays, by the names of the arguments.
        axes: by the same names, the letters of each array, in the same tree or a part of it from
            the root; axes behind the last letter have no name.
        results: the letters of each result, in the tree of the results.
        divided: the letters along which the function can be divided.
        whole: those along which no argument may be, and what to call them.
    """
    mesh = explicit_mesh(arguments)
    if mesh is None or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return function(arguments)
    named, letters = {}, []
    for argument, tree in arguments.items():
        for path, x in jax.tree.leaves_with_path(tree):
            named[argument + jax.tree_util.keystr(path)] = x
        words = [] if tree is None else jax.tree.leaves(jax.tree.broadcast(axes[argument], tree))
        letters += words
    letters = [
        word.ljust(jnp.ndim(x), ".") for word, x in zip(letters, named.values(), strict=True)
    ]
    along = _along(check, named, letters, divided, whole)

    # what divides into one part leaves an array whole: then kernels for one device serve
    parts = {
        letter: tuple(name for name in names if mesh.shape[name] > 1)
        for letter, names in along.items()
        if letter in divided
    }

    def placed(name, x, word):
        """How the parts of an argument are to lie."""
        places = [parts.get(letter, ()) for letter in word]
        for n, (size, letter, names) in enumerate(zip(jnp.shape(x), word, places, strict=True)):
            count = _parts(mesh, names)
            expected = f"of a size along axis {n} that the {count} parts of {letter} divide"
            check(size == 1 or size % count == 0, name, expected, size)
            places[n] = names if size % count == 0 else ()
        return _spec(places)

    specs = [placed(*of) for of in zip(named, named.values(), letters, strict=True)]
    moved = [_moved(mesh, x, spec) for x, spec in zip(named.values(), specs, strict=True)]

    def as_given(leaves):
        leaves = iter(leaves)
        return {
            argument: jax.tree.map(lambda _: next(leaves), tree)
            for argument, tree in arguments.items()
        }

    def spec_of(along, word):
        taken: set[str] = set()
        places = []
        for letter in word:
            names = along.get(letter, ())
            places.append(() if taken & set(names) else names)
            taken |= set(names)
        return _spec(places)

    manual = {name for names in parts.values() for name in names}
    run = function
    if manual:
        # within a `jax.shard_map` of the caller's, XLA refuses what one like this keeps for its
        # gradient, but for the arguments
        run = jax.shard_map(
            jax.checkpoint(function) if mesh.manual_axes else function,
            mesh=mesh,
            in_specs=(as_given(specs),),
            out_specs=jax.tree.map(partial(spec_of, parts), results),
            axis_names=manual,
        )
    found = run(as_given(moved))
    return jax.tree.map(lambda x, word: _moved(mesh, x, spec_of(along, word)), found, results)


def explicit_mesh(tree):
    """The mesh of the arrays if it has explicit axes, else None."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if mesh.explicit_axes:
            return mesh
    return None


def explicit_sharding(x):
    """That of an array on a mesh of explicit axes, else None."""
    return None if explicit_mesh(x) is None else jax.typeof(x).sharding


def parts_of(x, axis):
    """Into how many parts the type of an array says that an axis of it is divided."""
    mesh = explicit_mesh(x)
    return 1 if mesh is None else _parts(mesh, _names(x)[axis])


def _along(check, named, letters, divided, whole):
    """The mesh axes that each letter is divided along, by the first argument that says so."""
    along, first = {}, {}

    def see(letter, name, names):
        if letter not in along:
            along[letter], first[letter] = names, name
        expected = f"divided along {letter} as `{first[letter]}` is, by {along[letter]}"
        check(names == along[letter], name, expected, jax.typeof(named[name]).sharding.spec)

    axes = [
        (letter, name, names)
        for (name, x), word in zip(named.items(), letters, strict=True)
        for letter, names in zip(word, _names(x), strict=True)
        if names
    ]
    for letter, name, names in axes:
        spec = jax.typeof(named[name]).sharding.spec
        kind = whole.get(letter)
        check(not kind, name, f"whole along {kind} on a mesh of explicit axes", spec)
        if letter in divided:
            see(letter, name, names)
            taken = {n for other in along if other != letter for n in along[other]}
            expected = f"divided along {letter} by other mesh axes than the rest, {tuple(taken)}"
            check(not taken & set(names), name, expected, spec)
    for letter, _, names in axes:
        if letter not in (*divided, "."):
            along.setdefault(letter, names)
    return along


def _names(x):
    """The names of mesh axes that each axis of an array is divided by."""
    spec = tuple(jax.typeof(x).sharding.spec)
    names = [(n,) if isinstance(n, str) else tuple(n or ()) for n in spec]
    return names + [()] * (jnp.ndim(x) - len(names))


def _parts(mesh, names):
    return math.prod(mesh.shape[name] for name in names)


def _spec(places):
    return PartitionSpec(*(names or None for names in places))


def _moved(mesh, x, spec):
    """An array divided as `spec` says."""
    sharding = NamedSharding(mesh, spec)
    return jax.sharding.reshard(x, sharding)
