"""The digits and their split are those of scikit-learn, which is not imported for them."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data import digits
from experiments.data.images import Images, split_in_two
from experiments.data.sources import DataConfig, load_images
from experiments.engine.config import UsageError


def split_by_scikit_learn(whole: Images, share: float, seed: int) -> list[Images]:
    parts = train_test_split(
        np.arange(len(whole.labels)), test_size=share, stratify=whole.labels, random_state=seed
    )
    return [Images(whole.pixels[part], whole.labels[part]) for part in parts]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for array, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, right, strict=True)


@pytest.mark.parametrize("seed", [0, 1, 2, 2**32 - 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digits_are_those_of_scikit_learn(seed, dtype):
    source = load_digits()
    pixels = (source.images / 16).astype(dtype)[..., None]
    whole = Images(pixels, source.target.astype(np.int32))
    rest, test = split_by_scikit_learn(whole, 0.2, seed)
    train, validation = split_by_scikit_learn(rest, 0.125, seed)
    assert_same(load_images(DataConfig(), seed, dtype)[:3], (train, validation, test))


@pytest.mark.parametrize("seed", range(40))
def test_a_split_of_any_classes_is_that_of_scikit_learn_or_refused_by_both(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, draw.integers(2, 11), draw.integers(5, 200)).astype(np.int32)
    whole, share = Images(np.arange(len(labels)), labels), draw.choice([1 / 12, 0.2, 0.33, 0.5])
    try:
        expected = split_by_scikit_learn(whole, share, seed)
    except ValueError:
        with pytest.raises(ValueError, match="cannot be split"):
            split_in_two(whole, share, seed)
    else:
        assert_same(split_in_two(whole, share, seed), expected)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        load_images(DataConfig(), 0, "float32")
