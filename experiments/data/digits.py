"""The 1,797 handwritten digits that ship inside scikit-learn: 8 × 8 pixels, in 17 grey levels."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Images (B, rows, columns) with pixels in [0, 1], and their labels (B,)."""

    images: np.ndarray
    labels: np.ndarray


def split_digits(seed: int, dtype: str) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits: 70, 10 and 20 % of each class, drawn by the seed."""
    source = load_digits()
    images = (source.images / 16).astype(dtype)
    return split_in_three(Digits(images, source.target.astype(np.int32)), seed)


def split_in_three(digits: Digits, seed: int) -> tuple[Digits, Digits, Digits]:
    """70, 10 and 20 % of each class, drawn by the seed."""
    rest, test = split_in_two(digits, 0.2, seed)
    train, validation = split_in_two(rest, 0.125, seed)
    return train, validation, test


def split_in_two(digits: Digits, share: float, seed: int) -> tuple[Digits, Digits]:
    """All but a `share` of each class, and that share, drawn by the seed."""
    parts = train_test_split(
        np.arange(len(digits.labels)), test_size=share, stratify=digits.labels, random_state=seed
    )
    first, second = (Digits(digits.images[part], digits.labels[part]) for part in parts)
    return first, second


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
