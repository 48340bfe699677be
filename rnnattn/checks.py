"""The checks of arguments: each a `ValueError` that names function, argument, expected and got.

In a function `lstm`:

    check = Check("lstm")
    check.integers("lengths", lengths)
    check(clip is None or clip > 0, "clip", "positive or None", clip)
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Check(NamedTuple):
    """What the arguments of one function have to be; arrays may be JAX's, NumPy's or numbers."""

    function: str

    def __call__(self, holds: Any, name: str, expected: str, got: Any) -> None:
        if not holds:
            raise ValueError(f"{self.function}: `{name}` must be {expected}, got {got}")

    def array(self, name: str, x: Any) -> jax.Array:
        """x as an array."""
        try:
            return jnp.asarray(x)
        except (TypeError, ValueError):  # None, words, lists of several lengths
            self(False, name, "an array of numbers", repr(x))
            raise

    def axes(self, name: str, x: Any, axes: str) -> None:
        """As many axes as `axes` names, such as "(B, T, D)"."""
        self(jnp.ndim(x) == axes.count(",") + 1, name, f"of shape {axes}", jnp.shape(x))

    def shape(self, name: str, x: Any, shape: tuple[Any, ...], axes: str) -> None:
        """The shape, of which `axes` tells the meaning."""
        self(jnp.shape(x) == shape, name, f"of shape {axes} = {shape}", jnp.shape(x))

    def floating(self, name: str, x: Any) -> None:
        self._kind(name, x, jnp.floating, "of a floating dtype")

    def integers(self, name: str, x: Any) -> None:
        self._kind(name, x, jnp.integer, "of integers")

    def booleans(self, name: str, x: Any) -> None:
        self._kind(name, x, jnp.bool_, "of dtype bool")

    def _kind(self, name, x, kind, expected):
        try:
            dtype = jnp.result_type(x)
        except (TypeError, ValueError):  # a word, say
            self(False, name, expected, repr(x))
            raise
        self(jnp.issubdtype(dtype, kind), name, expected, dtype.name)

    def dtype_of(self, name: str, x: Any, other: str, like: Any) -> None:
        """The dtype of another argument."""
        dtype, wanted = jnp.result_type(x), jnp.result_type(like)
        self(dtype == wanted, name, f"of the dtype of `{other}`, {wanted.name}", dtype.name)

    def float_dtype(self, name: str, dtype: Any) -> None:
        """A dtype for a result."""
        floating = jnp.issubdtype(dtype, jnp.floating)
        self(floating, name, "a floating dtype", jnp.dtype(dtype).name)

    def one_of(self, name: str, value: Any, names: Iterable[Any]) -> None:
        """A word, or None where that is among the names."""
        *others, last = map(repr, names)
        self(value in names, name, f"{', '.join(others)} or {last}", repr(value))

    def multiple(self, name: str, value: Any, divisor: int, of: str = "") -> None:
        """A positive multiple; `of` tells what the divisor is, such as "4 heads"."""
        holds = value > 0 and value % divisor == 0
        self(holds, name, f"a positive multiple of {of or divisor}", value)

    def integer(self, name: str, n: Any, least: int, expected: str = "") -> int:
        """An integer of Python, NumPy or JAX that is known when the function is traced."""
        number = _known(index, n)
        holds = number is not None and number >= least
        self(holds, name, expected or f"an integer of at least {least}", _shown(n))
        return index(n)

    def number(self, name: str, x: Any, above: float | int, expected: str) -> float:
        """A number of Python, NumPy or JAX that is known when the function is traced."""
        number = _known(float, x)
        self(number is not None and number > above, name, expected, _shown(x))
        return float(x)

    def pair(self, name: str, size: Any, *, or_one: bool = False) -> tuple[int, int]:
        """Rows and columns as a tuple, which jit can hash; with `or_one`, one number is both."""
        one = ", or one for both" if or_one else ""
        expected = f"(rows, columns), two integers of at least 1{one}"
        pair = (size, size) if or_one and not several(size) else size
        self(several(pair) and len(pair) == 2, name, expected, _shown(size))
        rows, columns = (_known(index, n) for n in pair)
        positive = rows is not None and columns is not None and min(rows, columns) > 0
        self(positive, name, expected, _shown(size))
        return index(pair[0]), index(pair[1])

    def patches(
        self, name: str, size: tuple[int, ...], patch_size: tuple[int, int], advice: str = ""
    ) -> tuple[int, int]:
        """How many rows and columns of patches there are in a size that they divide."""
        (rows, columns), (p, q) = size, patch_size
        expected = f"of (rows, columns) in multiples of `patch_size` {patch_size}"
        self(not (rows % p or columns % q), name, expected, f"{tuple(size)}{advice}")
        return rows // p, columns // q

    def share(self, name: str, rate: Any) -> float:
        """A rate of dropout."""
        number = _known(float, rate)
        self(number is not None and 0 <= number < 1, name, "a number in [0, 1)", _shown(rate))
        return float(rate)

    def single_key(self, name: str, key: Any) -> None:
        """A key of random numbers, of either kind, and no array of them."""
        dtype = getattr(key, "dtype", None)
        typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        self(typed or dtype == jnp.uint32, name, "a key, as of `jax.random.key`", repr(key))
        single = key.ndim == (0 if typed else 1)
        self(single, name, "a single key", f"an array {key.shape} of them")

    def flag(self, name: str, value: Any) -> bool:
        """True or False; a word, say, would be taken for True."""
        self(value in (True, False), name, "True or False", repr(value))
        return bool(value)

    def served(self, implementation: str, unserved: list[str]) -> None:
        """An implementation that is asked for by name, and what of the call it cannot serve."""
        if unserved:
            raise ValueError(
                f"{self.function}: `implementation={implementation!r}` cannot serve "
                f"{' or '.join(unserved)}; 'xla' can"
            )


@contextmanager
def forward_mode(instead: str) -> Iterator[None]:
    """Around the call of a custom rule: JAX's refusal of forward mode, with what to call instead.

    Where a caller's own `jax.jit` is traced, JAX refuses only after the call, without the advice.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" in str(error):
            error.add_note(f"`{instead}` has forward mode, and the same values.")
        raise


def several(x: Any) -> bool:
    """Whether an option is a sequence or an array of axes, and not one number."""
    return isinstance(x, tuple | list) or getattr(x, "ndim", 0) > 0


def _known(convert, x):
    """x by `operator.index` or `float`; None where it is no such number, or a traced one."""
    if isinstance(x, bool | np.bool | str) or several(x):
        return None
    try:
        return convert(x)
    except TypeError:
        return None


def _shown(x):
    parts = x if several(x) else [x]
    traced = any(isinstance(part, jax.core.Tracer) for part in parts)
    return "a traced value, which is known only when the program runs" if traced else repr(x)


def those_that_hold(reasons: Mapping[str, Any]) -> list[str]:
    return [reason for reason, holds in reasons.items() if holds]


def names_amiss(
    expected: Collection[Any], given: Collection[Any], shown: Callable[[Any], str] = str
) -> list[str]:
    """What is missing and what is unknown among names, to be said at once."""
    missing = [f"`{shown(name)}` is missing" for name in expected if name not in given]
    return missing + [f"`{shown(name)}` is unknown" for name in given if name not in expected]
