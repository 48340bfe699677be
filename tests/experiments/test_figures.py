"""Figures of images: of any number of classes, whatever their names, and of channels."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments.figures import (
    BLACK,
    MOST_NUMBERS,
    RED,
    attention_maps,
    confusion_matrix,
    image_gallery,
    new_figure,
    save,
)


@pytest.mark.parametrize("count", [2, 10, MOST_NUMBERS, MOST_NUMBERS + 1, 100])
def test_a_confusion_matrix_counts_any_number_of_classes(count, tmp_path):
    classes = [f"class {n}" for n in range(count)]
    labels = np.repeat(np.arange(count), 2)
    predictions = labels.copy()
    predictions[0] = count - 1
    figure = new_figure(5, 5)
    confusion_matrix(figure.subfigures(1, 1, squeeze=False)[0, 0], labels, predictions, classes)
    (axes,) = figure.axes
    shown = np.asarray(axes.images[0].get_array()) ** 2
    expected = 2 * np.eye(count)
    expected[0, 0], expected[0, -1] = 1, 1
    np.testing.assert_allclose(shown, expected)
    if count <= MOST_NUMBERS:
        assert [tick.get_text() for tick in axes.get_yticklabels()] == classes
        assert sorted(text.get_text() for text in axes.texts) == ["1", "1"] + ["2"] * (count - 1)
    else:
        assert not axes.texts
    save(figure, tmp_path / "x.png")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("classes, mistake", [("01", "1, is 0"), (("cat", "dog"), "dog\nis cat")])
def test_images_of_any_channels_are_shown_mistakes_first(channels, classes, mistake, tmp_path):
    images = np.random.default_rng(0).random((4, 6, 8, channels))
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6]])
    figure = new_figure(8, 8)
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    image_gallery(left, images, np.array([0, 0, 1, 1]), probabilities, classes)
    first, second = left.axes[:2]
    assert first.get_title().startswith(mistake) and first.get_title().endswith("(80%)")
    assert [to_hex(axes.title.get_color()).upper() for axes in (first, second)] == [RED, BLACK]
    drawn = np.asarray(first.images[0].get_array())
    np.testing.assert_allclose(drawn, images[1] if channels == 3 else images[1].mean(axis=-1))
    attention_maps(right, images, np.ones((4, 2, 3, 4)))
    save(figure, tmp_path / "x.png")
