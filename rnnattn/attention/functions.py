"""Functions of positions that a caller gives: which keys a query sees, and what becomes of a logit.

Such a function is traced once, on single integers: arrays that it closes over become operands, of
which those of floats have a gradient. Schedules then ask for whole blocks of its values, which only
have the axes that the function depends on.

Axes: B batch, M key/value heads, G query heads to one of them, T queries, S keys.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn.masks import ByDistance
from rnnattn.precision import varying_together

_PLACES = ("b", "n", "t", "s")


class Traced:
    """A function that was traced, without the arrays that it closed over.

    Equal to another that does the same steps, so that what was compiled for one serves both.
    """

    def __init__(self, jaxpr, *, by_distance):
        self.jaxpr = jaxpr
        self.reads = _read(jaxpr, len(_PLACES))
        self.by_distance = by_distance  # adds to a logit what depends on n and s − t alone
        self._form = _form(jaxpr), by_distance
        self._hash = hash(self._form)

    def __eq__(self, other):
        return isinstance(other, Traced) and self._form == other._form

    def __hash__(self):
        return self._hash

    def __call__(self, arrays, *arguments):
        dtypes = [var.aval.dtype for var in self.jaxpr.constvars]
        arrays = [x.astype(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]
        return _run(self.jaxpr, arrays, arguments)[0]


def trace(check, name, function, dtype=None):
    """The function of (b, n, t, s), behind a logit if there is a `dtype`, and what it closes over.

    It has to give a Boolean, or a number of the dtype.
    """
    place = jax.ShapeDtypeStruct((), jnp.int32)
    logit = () if dtype is None else (jax.ShapeDtypeStruct((), dtype),)
    wanted = jnp.dtype(jnp.bool if dtype is None else dtype)
    check(callable(function), name, "a function or None", repr(function))
    given = (*("logit" for _ in logit), *_PLACES)
    check(_takes(function, given), name, f"a function of ({', '.join(given)})", repr(function))
    closed, result = jax.make_jaxpr(function, return_shape=True)(*logit, *[place] * 4)
    one = isinstance(result, jax.ShapeDtypeStruct)
    shown = f"{result.dtype.name}{result.shape}" if one else f"a {type(result).__name__}"
    holds = one and (result.shape, result.dtype) == ((), wanted)
    expected = f"a function that gives {wanted.name} of the shape of its arguments, ()"
    check(holds, name, expected, shown)
    traced = Traced(closed.jaxpr, by_distance=isinstance(function, ByDistance))
    return traced, tuple(map(jnp.asarray, closed.consts))


def _takes(function, arguments):
    """Whether a function can be called so, as far as it says what it takes."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _run(jaxpr, arrays, arguments):
    """The steps again, on arrays that in `jax.shard_map` may vary where traced ones did not."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*arrays, *arguments), strict=True))
    read = lambda var: var.val if _is_literal(var) else values[var]
    for step in jaxpr.eqns:
        given = varying_together([read(var) for var in step.invars])
        primitive = step.primitive
        if primitive.name in ("jit", "pjit"):
            found = _run(step.params["jaxpr"].jaxpr, step.params["jaxpr"].consts, given)
        elif primitive.name in ("pvary", "pcast"):  # they have been
            found = given
        elif "call_jaxpr" in step.params:  # a custom rule's
            found = _alone(jaxpr, step)(*given)
        else:
            found = primitive.bind(*given, **step.params)
            found = found if primitive.multiple_results else [found]
        values.update(zip(step.outvars, found, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _alone(jaxpr, step):
    """One step of a function as a function of all that it reads."""
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

    variables = list(dict.fromkeys(var for var in step.invars if not _is_literal(var)))
    shape = {"constvars": [], "invars": variables, "outvars": step.outvars, "eqns": [step]}
    one = ClosedJaxpr(jaxpr.replace(**shape), [])

    def run(*given):
        places = {id(var): x for var, x in zip(step.invars, given, strict=True)}
        return jaxpr_as_fun(one)(*(places[id(var)] for var in variables))

    return run


def _is_literal(var):
    return hasattr(var, "val")


def _read(jaxpr, count):
    """Which of the last `count` arguments the result depends on."""
    sources = {var: {n} for n, var in enumerate(jaxpr.invars[-count:])}
    read = lambda variables: set().union(
        *(sources.get(var, set()) for var in variables if not _is_literal(var))
    )
    for equation in jaxpr.eqns:
        found = read(equation.invars)
        sources.update(dict.fromkeys(equation.outvars, found))
    return tuple(n in read(jaxpr.outvars) for n in range(count))


def _form(jaxpr):
    """What two traces that do the same have in common, and others have not; it can be hashed."""
    numbers: dict[Any, int] = {}

    def of_variable(var):
        if _is_literal(var):
            return "literal", str(var.aval), np.asarray(var.val).tobytes()
        return numbers.setdefault(var, len(numbers)), str(var.aval)

    def of_parameter(x):
        if isinstance(x, tuple | list):
            return tuple(map(of_parameter, x))
        if hasattr(x, "eqns") and hasattr(x, "consts"):
            return _form(x.jaxpr), tuple(map(id, x.consts))
        if hasattr(x, "eqns"):
            return _form(x)
        try:
            hash(x)
        except TypeError:
            return id(x)
        return x

    def of_equation(equation):
        parameters = sorted(equation.params.items())
        return (
            equation.primitive,
            tuple((name, of_parameter(x)) for name, x in parameters),
            tuple(map(of_variable, equation.invars)),
            tuple(map(of_variable, equation.outvars)),
        )

    arguments = tuple(map(of_variable, (*jaxpr.constvars, *jaxpr.invars)))
    equations = tuple(map(of_equation, jaxpr.eqns))
    return arguments, equations, tuple(map(of_variable, jaxpr.outvars))


def in_order(function, floats, others):
    """What a function closes over, from what has a gradient and what has none."""
    floats, others = iter(floats), iter(others)
    return [next(floats if is_float(var.aval) else others) for var in function.jaxpr.constvars]


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _over_block(function, arrays, places, *logits):
    """The values of a function for a block, of five axes, 1 where it does not depend on one.

    `places` are b (B,), n (M, G), t (#B, T) and s (S,).
    """
    b, n, t, s = places
    reads_b, reads_n, reads_t, reads_s = function.reads
    by_row = reads_t and t.shape[0] != 1
    places = (b, n, t if by_row else t.reshape(-1), s)
    given = [x if read else jnp.int32(0) for x, read in zip(places, function.reads, strict=True)]
    axes = [
        (reads_b, False, by_row, False),
        (False, reads_n, False, False),
        (False, reads_n, False, False),
        (False, False, reads_t, False),
        (False, False, False, reads_s),
    ]
    of_one = lambda *arguments: function(arrays, *arguments)
    shared = []
    for axis in reversed(range(5)):
        mapped = [0] * len(logits) + [0 if has else None for has in axes[axis]]
        if all(n is None for n in mapped):
            shared.append(axis)
        else:
            of_one = jax.vmap(of_one, mapped)
    return jnp.expand_dims(of_one(*logits, *given), sorted(shared))


def shown(function, masking, rows, columns):
    """What the mask function shows of rows and columns: five axes, 1 where shared."""
    places = _places(masking, rows, columns)
    return _over_block(function, masking.functions.of_mask, places)


def _places(masking, rows, columns):
    given = masking.functions
    t = rows[None] + masking.offset[:, None]
    if masking.corner is not None:
        first_key = masking.corner[0, 1]
        t, columns = t + first_key, columns + first_key
    return given.rows, given.heads, t, columns


def scored(function, places, s, floats):
    """The logits s after the score function, which closes over `floats`, among others.

    `places`: the masking, and the rows and columns of s.
    """
    if function is None:
        return s
    arrays = in_order(function, floats, places[0].functions.of_score)
    return _over_block(function, arrays, _places(*places), s)


def of_distances(function, masking, T, S, floats):
    """What a function that is `by_distance` adds, (#B, M, G, 1, T + S − 1): of s − t from 1 − T on.

    That is what the last of T queries would add to its logits with as many keys.
    """
    shape = (masking.offset.size, *masking.functions.heads.shape, 1, T + S - 1)
    last, keys = jnp.full(1, T - 1, jnp.int32), jnp.arange(T + S - 1, dtype=jnp.int32)
    return scored(function, (masking, last, keys), jnp.zeros(shape, jnp.float32), floats)
