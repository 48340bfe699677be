"""The 1,797 handwritten digits that ship inside scikit-learn: 8 × 8 pixels, in 17 grey levels.

scikit-learn itself takes a second to import: its file of digits is read as it lies there.
"""

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.engine.config import UsageError


class Digits(NamedTuple):
    """Images (B, rows, columns) with pixels in [0, 1], and their labels (B,)."""

    images: np.ndarray
    labels: np.ndarray


def split_digits(seed: int, dtype: str) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits: 70, 10 and 20 % of each class, drawn by the seed.

    Raises:
        UsageError: if scikit-learn is not installed.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UsageError("--data.source digits: are in scikit-learn: pip install scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    *pixels, labels = np.loadtxt(file, delimiter=",").T
    images = np.stack(pixels, axis=-1).reshape(-1, 8, 8)
    return split_in_three(Digits((images / 16).astype(dtype), labels.astype(np.int32)), seed)


def split_in_three(digits: Digits, seed: int) -> tuple[Digits, Digits, Digits]:
    """70, 10 and 20 % of each class, drawn by the seed."""
    rest, test = split_in_two(digits, 0.2, seed)
    train, validation = split_in_two(rest, 0.125, seed)
    return train, validation, test


def split_in_two(digits: Digits, share: float, seed: int) -> tuple[Digits, Digits]:
    """All but a `share` of each class, and that share, drawn by the seed.

    The draws are those of scikit-learn's `train_test_split`, stratified.

    Raises:
        ValueError: if there are too few of a class, or in all, for both parts to have each class.
    """
    labels = digits.labels
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
    first, second = (Digits(digits.images[order], labels[order]) for order in orders)
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


def digits_batch(digits: Digits, seed: int, step: int, size: int, shift: int) -> Digits:
    """The batch of step `step`: each epoch is one permutation of the digits, drawn by the seed.

    A batch that meets the end of an epoch goes on into the next, so that all have one size.

    Args:
        shift: each image is moved by up to so many pixels along either axis, zeros coming in.
    """
    total = len(digits.labels)
    positions = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(total)
        for epoch in range(positions[0] // total, positions[-1] // total + 1)
    }
    chosen = np.array([orders[position // total][position % total] for position in positions])
    images = digits.images[chosen]
    if shift:
        # a third number keeps these draws apart from those of the epochs' orders
        down, right = np.random.default_rng((seed, step, 1)).integers(0, 2 * shift + 1, (2, size))
        padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2))
        images = windows[np.arange(size), down, right]
    return Digits(images, digits.labels[chosen])
