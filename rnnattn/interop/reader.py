"""Arrays by name, read and checked against one another."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rnnattn.checks import Check, names_amiss


class Reader:
    """Reads arrays by key, checks their shapes against one another, and that no key is left."""

    def __init__(self, function, weights):
        self.check, self.weights = Check(function), weights
        self.sizes = {"": 1}
        self.dtypes: dict[str, np.dtype] = {}

    def __call__(self, key, axes):
        """The array at `key`, of shape `axes`: "4H D" is (4H, D); a letter is learned when met."""
        if key not in self.weights:
            names = list(self.weights)
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            below = [name.removesuffix(key) for name in map(str, names) if name.endswith(f".{key}")]
            hint = f"; give what is below `{below[0][:-1]}`, alone" if below else ""
            missing = f"`{key}` is missing, got {names[:20]}{more}{hint}"
            raise ValueError(f"{self.check.function}: {missing}")
        array = as_numpy(self.check, key, self.weights[key])
        terms = [_term(axis) for axis in axes.split()]
        if array.ndim == len(terms):
            for (factor, letter), size in zip(terms, array.shape, strict=True):
                if size > 0 and size % factor == 0:
                    self.sizes.setdefault(letter, size // factor)
        known = all(letter in self.sizes for _, letter in terms)
        expected = tuple(factor * self.sizes.get(letter, 0) for factor, letter in terms)
        names = "(" + axes.replace(" ", ", ") + (",)" if len(terms) == 1 else ")")
        sizes = f" = {expected}" if known else ""
        fits = known and array.shape == expected
        self.check(fits, key, f"of shape {names}{sizes}", array.shape)
        self._check_dtype(key, array.dtype)
        return array

    def finish(self):
        """A key that is not read is a mistake."""
        for key in self.weights:
            if key not in self.dtypes:
                function, expected = self.check.function, list(self.dtypes)
                raise ValueError(f"{function}: `{key}` is unknown, expected {expected}")

    def _check_dtype(self, key, dtype):
        # Compared in NumPy's dtypes: where jax_enable_x64 is off, float64 is float32 to JAX.
        floating = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 8
        self.check(floating, key, "of a floating dtype", dtype)
        for other, expected in self.dtypes.items():
            self.check(dtype == expected, key, f"of the dtype of `{other}`, {expected}", dtype)
        self.dtypes[key] = dtype


def _term(axis):
    """4 and "H" of "4H"; 3 and "" of "3"."""
    letter = axis.lstrip("0123456789")
    return int(axis.removesuffix(letter) or 1), letter


def read_all(function, weights, axes):
    """The arrays named in `axes`; `ValueError` for all that is missing, unknown or wrong."""
    wrong = names_amiss(axes, weights)
    read, arrays = Reader(function, weights), {}
    for name in axes:
        if name in weights:
            try:
                arrays[name] = read(name, axes[name])
            except ValueError as error:
                wrong.append(str(error).removeprefix(f"{function}: "))
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{function}: {'; '.join(wrong[:20])}{more}")
    return arrays


def as_numpy(check, name, array):
    """An array of any library in NumPy, its bytes in the order of this machine."""
    try:
        in_numpy = np.asarray(array)
        return in_numpy.astype(in_numpy.dtype.newbyteorder("="), copy=False)
    except (TypeError, RuntimeError, ValueError) as error:
        got = f"{type(array).__name__}: {error}"
        raise ValueError(f"{check.function}: `{name}` must be an array, got {got}") from error


def flatten(tree):
    """{"ii": {"kernel": a}} → {"ii.kernel": a}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat
