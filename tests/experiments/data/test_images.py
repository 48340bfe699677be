"""Images of any channels and classes: their split, their checksum, and the batches of an epoch."""

import hashlib
from typing import get_args

import numpy as np
import pytest

from experiments.data.images import Images, ImageSet, image_batches, sha256_of, split
from experiments.data.sources import READERS, DataConfig, Source, load_images


def coloured(count=60, rows=5, columns=7):
    """Images of three channels that are all different, in three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, rows, columns, 3)).astype(np.uint8)
    return Images(pixels, (np.arange(count) % 3).astype(np.int32))


def test_every_source_has_its_reader():
    assert set(READERS) == set(get_args(Source))


def test_the_split_holds_each_digit_once_with_every_class_in_its_share():
    parts = load_images(DataConfig(), 0, "float32")[:3]
    assert [len(part.labels) for part in parts] == [1257, 180, 360]
    images = np.concatenate([part.pixels for part in parts])
    assert len(np.unique(images, axis=0)) == len(np.unique(images.round(6), axis=0)) == 1797
    assert images.min() == 0 and images.max() == 1
    for part in parts:
        shares = np.bincount(part.labels) / len(part.labels)
        np.testing.assert_allclose(shares, 0.1, atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes_are_split_as_the_same_fractions_are(dtype):
    whole, classes = coloured(), ("a", "b", "c")
    fractions = Images(whole.pixels / 255, whole.labels)
    of_bytes, of_fractions = (
        split(ImageSet(images, None, classes, "none", ""), 4, dtype)
        for images in (whole, fractions)
    )
    for part, other in zip(of_bytes[:3], of_fractions[:3], strict=True):
        assert part.pixels.dtype == dtype
        np.testing.assert_array_equal(part.pixels, other.pixels)
        np.testing.assert_array_equal(part.labels, other.labels)
    assert list(of_bytes.classes) == list(classes)


def test_the_checksum_is_that_of_the_files_one_after_another(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two" * 10**6)
    whole = b"one" + b"two" * 10**6
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(whole).hexdigest()


def test_each_epoch_is_a_permutation_whatever_the_size_of_the_batch():
    train = load_images(DataConfig(), 0, "float32").train
    total = len(train.labels)
    batch = image_batches(train, 5, 100)
    images = np.concatenate([batch(step).pixels for step in range(26)])
    for epoch in (0, 1):
        seen = images[epoch * total : (epoch + 1) * total]
        assert len(np.unique(seen, axis=0)) == total
    assert np.any(images[:total] != images[total : 2 * total])
    np.testing.assert_array_equal(image_batches(train, 5, 2600)(0).pixels, images)


@pytest.mark.parametrize("size", [1, 4, 60, 61, 150])
def test_a_batch_follows_from_its_step_whichever_came_before(size):
    batch = image_batches(coloured(), 3, size, shift=2, flip=True)
    forwards = [batch(step) for step in range(20)]
    for step in reversed(range(20)):
        again = batch(step)
        np.testing.assert_array_equal(again.pixels, forwards[step].pixels)
        np.testing.assert_array_equal(again.labels, forwards[step].labels)


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    whole, drawn = coloured(), []
    default_rng = np.random.default_rng

    def recording(seed):
        drawn.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", recording)
    batch = image_batches(whole, 3, 8)
    for step in range(20):
        batch(step)
    assert drawn == [(3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize("shift", [1, 2])
def test_shifted_images_are_the_images_moved_and_all_moves_occur(shift):
    whole = coloured()
    rows, columns = whole.pixels.shape[1:3]
    places = range(2 * shift + 1)
    plain = image_batches(whole, 0, 400)(3)
    moved = image_batches(whole, 0, 400, shift=shift)(3)
    np.testing.assert_array_equal(moved.labels, plain.labels)
    moves = set()
    for before, after in zip(plain.pixels, moved.pixels, strict=True):
        padded = np.pad(before, ((shift, shift), (shift, shift), (0, 0)))
        windows = {(r, c): padded[r : r + rows, c : c + columns] for r in places for c in places}
        fits = [move for move, window in windows.items() if np.array_equal(window, after)]
        assert fits
        moves.update(fits)
    assert len(moves) == len(places) ** 2


def test_half_of_the_images_are_mirrored_and_the_shift_is_as_without():
    whole = coloured()
    before = whole.pixels.copy()
    plain = image_batches(whole, 0, 400, shift=1)(3)
    flipped = image_batches(whole, 0, 400, shift=1, flip=True)(3)
    np.testing.assert_array_equal(flipped.labels, plain.labels)
    mirrored = np.array(
        [not np.array_equal(a, b) for a, b in zip(plain.pixels, flipped.pixels, strict=True)]
    )
    assert 0.4 < mirrored.mean() < 0.6
    np.testing.assert_array_equal(flipped.pixels[mirrored], plain.pixels[mirrored, :, ::-1])
    np.testing.assert_array_equal(whole.pixels, before)
