"""CIFAR-10 (Krizhevsky 2009): 32 × 32 pixels in colour, from its archive or the unpacked folder.

The archive comes in two versions, which hold the same: of an image its label and three planes of
1,024 bytes, red, green and blue. In the binary version these follow one another; in the Python one
each file is a pickle of Python 2, of a dict with an array and a list. A pickle may run whatever it
likes when it is loaded as such: here, its arrays are descriptions that are read, and it is refused
if there is anything else in it than these, numbers and texts in dicts and lists.
"""

import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.images import Images, ImageSet, sha256_of
from experiments.engine import memory
from experiments.engine.config import UsageError

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

PYTHON = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
BINARY = tuple(f"{name}.bin" for name in PYTHON)
"""The names of the files; the last holds the test images."""

VALUES = 3 * 32 * 32
"""Of an image."""


def read_cifar10(path: str | None) -> ImageSet:
    """The images at the path, with those of the archive's own test set.

    Args:
        path: cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or a folder that one unpacks to.
    Raises:
        UsageError: if there is no path, or what is there is not CIFAR-10.
    """
    if path is None:
        raise UsageError(
            "--data.source cifar10: needs --data.path, as cifar-10-binary.tar.gz or the folder "
            "cifar-10-batches-bin"
        )
    place = Path(path)
    content = _read_folder(place) if place.is_dir() else _read_archive(place)
    names = BINARY if any(name in content for name in BINARY) else PYTHON
    missing = [name for name in names if name not in content]
    if missing:
        raise UsageError(
            f"{path}: should hold {BINARY[0]} to {BINARY[-2]} and {BINARY[-1]}, or the same "
            f"without .bin; has no {missing[0]}"
        )
    read = _read_records if names is BINARY else _read_pickle
    parts = [read(f"{path}: {name}", content[name]) for name in names]
    sha256 = sha256_of(*(place / name for name in names) if place.is_dir() else [place])
    return ImageSet(_joined(parts[:-1]), parts[-1], CLASSES, "none is stated", sha256)


def _joined(parts: list[Images]) -> Images:
    pixels, labels = zip(*parts, strict=True)
    return Images(np.concatenate(pixels), np.concatenate(labels))


# ---- files ------------------------------------------------------------------------------------


def _read_folder(path: Path) -> dict[str, bytes]:
    """Those of the files that there are."""
    files = [path / name for name in BINARY + PYTHON if (path / name).is_file()]
    try:
        _check_size(path, sum(file.stat().st_size for file in files))
        return {file.name: file.read_bytes() for file in files}
    except OSError as error:
        raise UsageError(f"--data.path: {path}: cannot be read: {error.strerror}") from None


def _read_archive(path: Path) -> dict[str, bytes]:
    """Those of the files that are in the archive, whatever folder they lie in."""
    if path.exists() and not path.is_file():
        raise UsageError(f"--data.path: {path}: is a device or a pipe, not a file")
    content, size = {}, 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in BINARY + PYTHON:
                    size += member.size
                    # an archive can say that it unpacks to any size
                    _check_size(path, size)
                    unpacked = archive.extractfile(member)
                    content[name] = unpacked.read() if unpacked else b""
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"--data.path: {path}: no such file or folder") from None
    # of tarfile and its decompressors: there is no one class for all that can be wrong
    except Exception:
        raise UsageError(
            f"--data.path: {path}: neither a whole .tar.gz of CIFAR-10 nor a folder of its files"
        ) from None
    return content


def _check_size(path: Path, size: int) -> None:
    # the bytes, and once more as arrays
    memory.check(2 * size, f"--data.path: {path}, unpacked,")


# ---- their content ----------------------------------------------------------------------------


def _read_records(source: str, content: bytes) -> Images:
    """The images of a file of the binary version."""
    if not content or len(content) % (1 + VALUES):
        raise UsageError(
            f"{source}: should hold images of {1 + VALUES:,} bytes each, got {len(content):,} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + VALUES)
    return _images(source, records[:, 1:], records[:, 0])


def _images(source: str, values: np.ndarray, labels: np.ndarray) -> Images:
    wrong = labels[labels >= len(CLASSES)]
    if wrong.size:
        raise UsageError(f"{source}: labels should be from 0 to {len(CLASSES) - 1}, got {wrong[0]}")
    pixels = values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(pixels), labels.astype(np.int32))


class _Described:
    """What a pickle calls with which arguments, and the state that it gives what comes of that;
    none of which is done."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
"""What a pickle has to name to say that it holds an array."""


class _Reader(pickle.Unpickler):
    """Imports nothing and calls nothing that a pickle names."""

    def find_class(self, module: str, name: str) -> type[_Described]:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _Described


def _read_pickle(source: str, content: bytes) -> Images:
    """The images of a file of the Python version."""
    wrong = UsageError(
        f"{source}: should be a pickle of data, an array (images, {VALUES}) of bytes, and labels, "
        "a list of as many whole numbers; what else may be in one is not loaded"
    )
    try:
        # texts of Python 2 are bytes
        found = _Reader(io.BytesIO(content), encoding="bytes").load()
        _, shape, dtype, by_columns, values = found[b"data"].state
        labels = found[b"labels"]
        kind = dtype.arguments[0]
    # a pickle can be wrong in any way that a program can
    except Exception:
        raise wrong from None
    if not (
        isinstance(found, Mapping)
        and kind in (b"u1", "u1")
        and isinstance(values, bytes)
        and isinstance(labels, list)
        and all(type(label) is int and label in range(256) for label in labels)
        and shape == (len(labels), VALUES)
        and len(values) == len(labels) * VALUES > 0
        and not by_columns
    ):
        raise wrong
    pixels = np.frombuffer(values, np.uint8).reshape(shape)
    return _images(source, pixels, np.array(labels))
