"""Images with labels: what a data set of them is, its parts, and the batches that training sees."""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

WHITE = 255
"""What pixels that are whole numbers are at most."""


class Images(NamedTuple):
    """Pixels (B, rows, columns, channels), and the number of each image's class (B,)."""

    pixels: np.ndarray
    labels: np.ndarray


class ImageSet(NamedTuple):
    """A data set as it was read: pixels are whole numbers from 0 to 255, or fractions of 1."""

    train: Images
    test: Images | None
    """None if the data set has no test images of its own: the seed draws them from the others."""
    classes: tuple[str, ...]
    """Their names."""
    licence: str
    sha256: str
    """Of its file; of several, as of one that they make one after another."""


class Split(NamedTuple):
    """A data set as experiments use it: pixels are fractions of 1, and two parts are held out."""

    train: Images
    validation: Images
    test: Images
    classes: np.ndarray
    """Their names."""
    origin: dict[str, str]
    """Licence and checksum, as scores of a run."""


def sha256_of(*files: Path) -> str:
    """The checksum of a file, or of several one after another, as `cat … | sha256sum` has it."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def split(data: ImageSet, seed: int, dtype: str) -> Split:
    """A twelfth of the training images is for validation; or, without test images, 10 % of each
    class are, and 20 % to test. The seed draws them.

    Raises:
        ValueError: if there are too few of a class.
    """
    rest, test = data.train, data.test
    share = 1 / 12
    if test is None:
        rest, test = split_in_two(rest, 0.2, seed)
        share = 0.125
    train, validation = split_in_two(rest, share, seed)
    origin = {"data_licence": data.licence, "data_sha256": data.sha256}
    return Split(
        _in_fractions(train, dtype),
        _in_fractions(validation, dtype),
        _in_fractions(test, dtype),
        np.array(data.classes),
        origin,
    )


def _in_fractions(images: Images, dtype: str) -> Images:
    pixels, labels = images
    if pixels.dtype.kind == "f":
        return Images(pixels.astype(dtype), labels)
    # at once, as float64 of a large data set may be more than there is memory for
    return Images(np.divide(pixels, WHITE, dtype=dtype), labels)


def split_in_two(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """All but a `share` of each class, and that share, drawn by the seed.

    The draws are those of scikit-learn's `train_test_split`, stratified.

    Raises:
        ValueError: if there are too few of a class, or in all, for both parts to have each class.
    """
    labels = images.labels
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    of_second = math.ceil(share * len(labels))
    of_first = len(labels) - of_second
    if counts.min() < 2 or min(of_first, of_second) < len(counts):
        raise ValueError(f"{counts} of each class cannot be split by {share}")
    random = np.random.RandomState(seed)
    firsts = _apportioned(counts, of_first, random)
    seconds = _apportioned(counts - firsts, of_second, random)
    members = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
    drawn = [each[random.permutation(len(each))] for each in members]
    parts = (
        [each[:n] for each, n in zip(drawn, firsts, strict=True)],
        [each[n : n + m] for each, n, m in zip(drawn, firsts, seconds, strict=True)],
    )
    orders = [random.permutation(np.concatenate(part)) for part in parts]
    first, second = (Images(images.pixels[order], labels[order]) for order in orders)
    return first, second


def _apportioned(counts: np.ndarray, total: int, random: np.random.RandomState) -> np.ndarray:
    """How many of each class make up the total: by the largest remainders, ties drawn."""
    exact = counts / counts.sum() * total
    whole = np.floor(exact)
    rest = exact - whole
    missing = int(total - whole.sum())
    for value in np.unique(rest)[::-1]:
        if not missing:
            break
        (tied,) = np.nonzero(rest == value)
        chosen = random.choice(tied, size=min(len(tied), missing), replace=False)
        whole[chosen] += 1
        missing -= len(chosen)
    return whole.astype(int)


def image_batches(
    images: Images, seed: int, size: int, *, shift: int = 0, flip: bool = False
) -> Callable[[int], Images]:
    """The batch of each step: an epoch is one permutation of the images, drawn by the seed.

    A batch that meets the end of an epoch goes on into the next, so that all have one size.

    Args:
        shift: each image is moved by up to so many pixels along either axis, zeros coming in.
        flip: each image is mirrored, left to right, with probability 1/2.
    """
    total, rows, columns = images.pixels.shape[:3]

    # a batch may reach into the next epoch
    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(total)

    def batch(step: int) -> Images:
        begin, end = step * size, (step + 1) * size
        chosen = np.concatenate(
            [
                order(epoch)[max(0, begin - epoch * total) : end - epoch * total]
                for epoch in range(begin // total, (end - 1) // total + 1)
            ]
        )
        pixels = images.pixels[chosen]
        # a third number keeps draws apart from each other, and from those of the epochs' orders
        if shift:
            draw = np.random.default_rng((seed, step, 1))
            down, right = draw.integers(0, 2 * shift + 1, (2, size))
            padded = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
            row, column = down[:, None] + np.arange(rows), right[:, None] + np.arange(columns)
            pixels = padded[np.arange(size)[:, None, None], row[:, :, None], column[:, None]]
        if flip:
            mirrored = np.random.default_rng((seed, step, 2)).random(size) < 0.5
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return Images(pixels, images.labels[chosen])

    return batch
