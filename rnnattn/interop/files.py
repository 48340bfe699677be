"""Trees of arrays in files of the format safetensors."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rnnattn.checks import Check, names_amiss
from rnnattn.interop.reader import as_numpy

# What the format calls each dtype that it has.
_FILE_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def write_safetensors(path: str | os.PathLike, params: PyTree) -> None:
    """Any tree of arrays as a file of named arrays, which holds no code; needs safetensors.

    A leaf is named by its way from the root: `lstm.w_x`, `layers.0.b`. Arrays are JAX's or NumPy's,
    however they lie in memory or on devices.

    Args:
        path: of the file. One that is there stays as it is until the new one is complete.
        params: dictionaries, lists, (named) tuples or registered nodes of arrays.
    Raises:
        ValueError: before anything is written: a leaf is no array, or of a dtype that the format
            does not have (of JAX's those of 2 and 4 bits, complex128 and some of 8 bits); two
            leaves have one name; a name is no text, or is "__metadata__".
        OSError: the file, which it names, cannot be written.
    Example:
        >>> import tempfile, rnnattn
        >>> params = rnnattn.init_lstm(jax.random.key(0), 3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(f"{folder}/lstm.safetensors", params)
        ...     again = read_safetensors(f"{folder}/lstm.safetensors", params)
        >>> bool(jnp.all(again.w_h == params.w_h))
        True
    """
    function = "write_safetensors"
    _import_safetensors(function)
    from safetensors.numpy import save

    named = _named(function, params)
    content = save({name: _as_stored(function, name, leaf) for name, leaf in named.items()})
    path = Path(path)
    whole = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with open(whole, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(path)
    except OSError as error:
        # which would name the file written aside
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            whole.unlink()


def read_safetensors(path: str | os.PathLike, like: PyTree) -> PyTree:
    """The tree that `write_safetensors` wrote, of arrays of JAX; needs safetensors.

    Args:
        like: a tree of the same structure, of arrays or `jax.ShapeDtypeStruct`.
    Raises:
        ValueError: an array is missing, left over or of another shape or dtype than `like` has, by
            name, or of 64 bits where `jax_enable_x64` is off; or the file is damaged, or none of
            the kind.
        OSError: the file cannot be read.
    Example: see `write_safetensors`.
    """
    function = "read_safetensors"
    safetensors = _import_safetensors(function)
    content = Path(path).read_bytes()
    try:
        found = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{function}: {path}: damaged, or not a safetensors file: {error}"
        ) from None
    expected = _named(function, like)
    wrong = names_amiss(expected, found)
    arrays = {}
    for name in expected.keys() & found.keys():
        leaf, array = expected[name], found[name]
        dtype = _FILE_DTYPES.get(array["dtype"], array["dtype"])
        want, got = f"{leaf.dtype.name}{list(leaf.shape)}", f"{dtype}{array['shape']}"
        if want != got:
            wrong.append(f"`{name}` must be {want}, got {got}")
            continue
        dtype = np.dtype(leaf.dtype)
        in_numpy = np.ndarray(leaf.shape, dtype.newbyteorder("<"), array["data"])
        arrays[name] = jnp.asarray(in_numpy.astype(dtype.newbyteorder("="), copy=False))
        if arrays[name].dtype != dtype.newbyteorder("="):
            wrong.append(f"`{name}`: {dtype.name} needs jax_enable_x64")
    if wrong:
        raise ValueError(f"{function}: {path}: {'; '.join(sorted(wrong))}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def _import_safetensors(function):
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{function} needs safetensors: `pip install safetensors`, or rnnattn with its extra "
            "`files`",
            name="safetensors",
        ) from error
    return safetensors


def _named(function, tree):
    """The leaves by name, in their order."""
    paths: dict[str, Any] = {}
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        in_full = jax.tree_util.keystr(path)
        if name in paths:
            raise ValueError(f"{function}: {paths[name]} and {in_full} have one name, `{name}`")
        if name == "__metadata__":
            raise ValueError(f"{function}: the format keeps the name `{name}` for itself")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{function}: the name {name!r} is no text") from None
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        Check(function)(is_array, name, "an array", type(leaf).__name__)
        paths[name], leaves[name] = in_full, leaf
    return leaves


def _as_stored(function, name, leaf):
    """The leaf in NumPy and in one piece, little-endian, of a dtype that the format has."""
    check, dtypes = Check(function), _FILE_DTYPES.values()
    array = as_numpy(check, name, leaf)
    expected = f"of a dtype that the format has, {', '.join(dtypes)}"
    check(array.dtype.name in dtypes, name, expected, array.dtype)
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
