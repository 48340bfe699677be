"""CIFAR-10 from small files in its two versions, whole and damaged, through both models."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.data.cifar10 import BINARY, CLASSES, PYTHON
from experiments.data.images import Split
from experiments.data.sources import DataConfig, load_images
from experiments.engine import memory
from experiments.engine.config import UsageError
from experiments.engine.experiment import find
from experiments.engine.runs import read_result, read_summary
from tests.experiments.sizes import tiny_options

COUNT = 30
"""Images in a file."""


def read(path: Path) -> Split:
    return load_images(DataConfig("cifar10", str(path)), 0, "float32")


def records(n: int) -> np.ndarray:
    """What the binary file n holds: a label and three planes of each image."""
    values = np.random.default_rng(n).integers(0, 256, (COUNT, 3073)).astype(np.uint8)
    values[:, 0] = np.arange(COUNT) % 10
    return values


def binary() -> dict[str, bytes]:
    return {name: records(n).tobytes() for n, name in enumerate(BINARY)}


def text(value: bytes) -> bytes:
    """A string of Python 2, as its pickles of protocol 2 have it."""
    return b"T" + struct.pack("<i", len(value)) + value


def whole(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def python2(
    values: bytes,
    labels: list[int],
    shape=(COUNT, 3072),
    array=b"cnumpy.core.multiarray\n_reconstruct\n",
) -> bytes:
    """The pickle that Python 2 makes of a dict with an array and a list."""
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + whole(0) + whole(1) + b"tR"
    dtype += b"(" + whole(3) + text(b"|") + b"NNN" + whole(-1) + whole(-1) + whole(0) + b"tb"
    made = array + b"(cnumpy\nndarray\n(" + whole(0) + b"t" + text(b"b") + b"tR"
    state = whole(1) + b"(" + b"".join(map(whole, shape)) + b"t" + dtype + b"\x89" + text(values)
    numbers = b"](" + b"".join(map(whole, labels)) + b"e"
    content = text(b"batch_label") + text(b"training batch 1 of 5")
    content += text(b"data") + made + b"(" + state + b"tb" + text(b"labels") + numbers
    return b"\x80\x02}(" + content + b"u."


def of_python() -> dict[str, bytes]:
    return {
        name: python2(records(n)[:, 1:].tobytes(), records(n)[:, 0].tolist())
        for n, name in enumerate(PYTHON)
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(
    file: Path, files: dict[str, bytes], mode: Literal["w:gz", "w:"] = "w:gz"
) -> Path:
    with tarfile.open(file, mode) as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


FORMS = {
    "binary folder": lambda path: write_folder(path, binary()),
    "binary archive": lambda path: write_archive(path, binary()),
    "binary archive, not compressed": lambda path: write_archive(path, binary(), "w:"),
    "Python folder": lambda path: write_folder(path, of_python()),
    "Python archive": lambda path: write_archive(path, of_python()),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_images_that_were_written(write, tmp_path):
    data = read(write(tmp_path / "cifar"))
    test = records(5)
    np.testing.assert_array_equal(data.test.labels, test[:, 0])
    planes = test[:, 1:].reshape(COUNT, 3, 32, 32) / np.float32(255)
    np.testing.assert_array_equal(data.test.pixels, planes.transpose(0, 2, 3, 1))
    # a twelfth of the other images is for validation
    assert [len(part.labels) for part in data[:3]] == [137, 13, COUNT]
    others = np.concatenate([data.train.pixels, data.validation.pixels])
    assert len(np.unique(others.reshape(5 * COUNT, -1), axis=0)) == 5 * COUNT
    assert tuple(data.classes) == CLASSES


def test_pickles_of_python_2_are_what_python_reads_in_them():
    """The files made here are such as Python's own loader, with NumPy's, takes."""
    loaded = pickle.loads(of_python()["test_batch"], encoding="bytes")
    np.testing.assert_array_equal(loaded[b"data"], records(5)[:, 1:])
    assert loaded[b"labels"] == records(5)[:, 0].tolist()


def test_the_checksum_is_that_of_the_archive_or_of_the_files_in_their_order(tmp_path):
    archive = write_archive(tmp_path / "cifar.tar.gz", binary())
    folder = write_folder(tmp_path / "folder", binary())
    for path, content in ((archive, archive.read_bytes()), (folder, b"".join(binary().values()))):
        expected = hashlib.sha256(content).hexdigest()
        assert read(path).origin["data_sha256"] == expected


def changed(files: dict[str, bytes], name: str, content: bytes) -> dict[str, bytes]:
    return files | {name: content}


VALUES, LABELS = records(1)[:, 1:].tobytes(), records(1)[:, 0].tolist()
DAMAGED = {
    "cut": (
        changed(binary(), BINARY[1], binary()[BINARY[1]][:-1]), "data_batch_2.bin: should hold"
    ),
    "empty": (changed(binary(), BINARY[5], b""), "test_batch.bin: should hold images of 3,073"),
    "a label of 10": (
        changed(binary(), BINARY[0], b"\x0a" + binary()[BINARY[0]][1:]),
        "data_batch_1.bin: labels should be from 0 to 9, got 10",
    ),
    "one missing": (dict(list(binary().items())[:-1]), "has no test_batch.bin"),
    "none": ({}, "has no data_batch_1"),
    "too few": (
        {name: content[: 2 * 3073] for name, content in binary().items()}, "too few images"
    ),
    "a pickle, cut": (
        changed(of_python(), PYTHON[1], of_python()[PYTHON[1]][:-9]), "data_batch_2: should be a p"
    ),
    "no pickle": (changed(of_python(), PYTHON[1], b"images"), "data_batch_2: should be a pickle"),
    "a pickle of a list": (
        changed(of_python(), PYTHON[1], pickle.dumps([1])), "should be a pickle"
    ),
    "a pickle with a label of 10": (
        changed(of_python(), PYTHON[1], python2(VALUES, [10, *LABELS[1:]])), "0 to 9, got 10"
    ),
    "a pickle with a label below 0": (
        changed(of_python(), PYTHON[1], python2(VALUES, [-1, *LABELS[1:]])), "should be a pickle"
    ),
    "a pickle with a label too few": (
        changed(of_python(), PYTHON[1], python2(VALUES, LABELS[1:])), "should be a pickle"
    ),
    "a pickle of smaller images": (
        changed(of_python(), PYTHON[1], python2(VALUES, LABELS, (COUNT, 3071))), "(images, 3072)"
    ),
    "a pickle with bytes missing": (
        changed(of_python(), PYTHON[1], python2(VALUES[:-1], LABELS)), "should be a pickle"
    ),
    "a pickle of no image": (
        changed(of_python(), PYTHON[1], python2(b"", [], (0, 3072))), "should be a pickle"
    ),
    "a pickle that names a function": (
        changed(of_python(), PYTHON[1], python2(VALUES, LABELS, array=b"cos\nsystem\n")),
        "what else may be in one is not loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", [write_folder, write_archive])
@pytest.mark.parametrize("files, part", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_one_message(write, files, part, tmp_path):
    path = write(tmp_path / "cifar", files)
    with pytest.raises(UsageError) as error:
        read(path)
    assert part in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Runs:
    """Makes a file when it is unpickled as Python does."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_pickle_would_do_is_not_done(protocol, tmp_path):
    proof = tmp_path / "done"
    content = pickle.dumps({b"data": Runs(proof), b"labels": [0]}, protocol)
    with pytest.raises(UsageError, match="is not loaded"):
        read(write_folder(tmp_path / "cifar", changed(of_python(), PYTHON[0], content)))
    assert not proof.exists()
    pickle.loads(content)
    assert proof.exists()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("files, name", [(binary, BINARY[0]), (of_python, PYTHON[0])])
def test_files_with_a_few_bytes_changed_are_read_or_refused(files, name, seed, tmp_path):
    draw = np.random.default_rng(seed)
    folder = write_folder(tmp_path / "cifar", files())
    content = files()[name]
    for _ in range(50):
        damaged = bytearray(content[: draw.integers(len(content)) if draw.random() < 0.2 else None])
        # most of what is no pixel lies at the ends
        ends = [*range(400), *range(len(damaged) - 400, len(damaged))]
        for place in draw.choice(ends, 3):
            if 0 <= place < len(damaged):
                damaged[place] = draw.integers(256)
        (folder / name).write_bytes(damaged)
        try:
            read(folder)
        except UsageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_an_archive_cut_short_is_one_message(share, tmp_path):
    path = write_archive(tmp_path / "cifar.tar.gz", binary())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UsageError, match=r"neither a whole \.tar\.gz of CIFAR-10 nor a folder"):
        read(path)


def test_what_is_no_place_of_files_is_one_message(tmp_path, capsys):
    with pytest.raises(UsageError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a device or a pipe"):
        read(Path("/dev/zero"))
    output = tmp_path / "outputs"
    assert main(["run", "vit_cifar10", "--quick", "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "needs --data.path" in message and not output.exists()


@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_more_than_the_memory_is_refused_before_it_is_read(write, tmp_path, monkeypatch):
    path = write(tmp_path / "cifar", binary())
    monkeypatch.setattr(memory, "of_machine", lambda: 1000)
    with pytest.raises(UsageError, match=r"unpacked,: needs about .* of memory"):
        read(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, experiment", [("vit_cifar10", "vit_digits"), ("cifar10_rows_lstm", "lstm_digits")]
)
def test_both_models_train_on_it(config, experiment, tmp_path):
    path = write_archive(tmp_path / "cifar.tar.gz", binary())
    data = ["--data.source", "cifar10", "--data.path", str(path), "--data.flip"]
    sizes = [*tiny_options(experiment), *data]
    assert main(["run", config, *sizes, "--name", "x", "--output", str(tmp_path)]) == 0
    folder = tmp_path / config / "x"
    result = read_result(folder, find(experiment).Result)
    assert result.images.shape == (COUNT, 32, 32, 3) and result.probabilities.shape == (COUNT, 10)
    assert tuple(result.classes) == CLASSES
    summary = read_summary(folder)
    assert summary["data_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.isfinite(summary["test_loss"])


@pytest.mark.thorough
def test_the_study_of_resolution_takes_images_in_colour(tmp_path):
    path = write_folder(tmp_path / "cifar", of_python())
    data = ["--data.source", "cifar10", "--data.path", str(path)]
    options = [*tiny_options("vit_resolution"), *data, "--name", "x", "--output", str(tmp_path)]
    assert main(["run", "vit_resolution", *options]) == 0
    result = read_result(tmp_path / "vit_resolution" / "x", find("vit_resolution").Result)
    assert result.images_whole.shape == (3, 32, 32, 3)
    means = result.images_whole.reshape(3, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(result.images_small, means, rtol=1e-6)
