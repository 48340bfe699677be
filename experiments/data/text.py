"""Text as numbers: one file, or the English prose that ships inside Python, split in three."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import memory
from experiments.engine.config import UsageError
from experiments.engine.training import Trained

BUILT_IN = "pydoc_data.topics"
"""The text without a path: the topics of Python's `help()`, each paragraph once. Versions of
Python differ in it."""


class Text(NamedTuple):
    """Contiguous parts of a text, as positions in its sorted `characters`."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    characters: str
    sha256: str
    """Of the whole text, encoded in UTF-8."""


class Windows(NamedTuple):
    """What a step reads, (B, T + 1), each row's last character being the next window's first."""

    characters: np.ndarray
    first: np.ndarray
    """Whether the text begins anew here, so that nothing has been read before."""


class Excerpts(NamedTuple):
    """Windows from anywhere in a text, (B, T), and the character after each of theirs."""

    characters: np.ndarray
    following: np.ndarray


def load_text(
    path: str | None, *, rows: int = 1, window: int = 1, characters: str | None = None
) -> Text:
    """The file at `path`, or the built-in prose: 90 % to train on, 5 % to validate, 5 % to test.

    Args:
        characters: those that a model knows; without them, those of the text.

    Raises:
        UsageError: if the file cannot be read, is not text, cannot fill `rows` of one `window`, or
            has a character that is not among the `characters`.
    """
    content = _built_in() if path is None else _read(Path(path))
    # as many characters as fill one batch of 90 %, and two in each of the other parts
    least = max(40, -(-10 * (rows * window + 1) // 9))
    if len(content) < least:
        raise UsageError(
            f"{path or BUILT_IN}: too short: has {len(content)} characters, but rows that read "
            f"{rows} × {window} at a step need {least}"
        )
    characters = characters or "".join(sorted(set(content)))
    text = encode(content, characters, str(path or BUILT_IN))
    train, validation, test = np.split(text, [len(text) * 90 // 100, len(text) * 95 // 100])
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return Text(train, validation, test, characters, sha256)


def encode(content: str, characters: str, source: str) -> np.ndarray:
    """The text as positions in `characters`.

    Args:
        source: where the text comes from, for the message.

    Raises:
        UsageError: if it has others.
    """
    numbers = {character: number for number, character in enumerate(characters)}
    if unknown := sorted(set(content) - numbers.keys()):
        shown = ", ".join(map(repr, unknown[:10])) + ", …" * (len(unknown) > 10)
        raise UsageError(f"{source}: has characters that the model does not know: {shown}")
    return np.array([numbers[character] for character in content], np.int32)


def text_windows(text: np.ndarray, step: int, rows: int, window: int) -> Windows:
    """The windows of step `step`: each row reads on in its own contiguous part of the text.

    The parts are as long as each other; after their last whole window, an epoch begins at their
    first again.
    """
    length = (len(text) - 1) // rows
    place = step % (length // window)
    starts = np.arange(rows) * length + place * window
    return Windows(text[starts[:, None] + np.arange(window + 1)], np.asarray(place == 0))


def text_excerpts(text: np.ndarray, seed: int, step: int, rows: int, window: int) -> Excerpts:
    """The windows of step `step`, whose places follow from it and the seed alone."""
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - window, rows)
    read = starts[:, None] + np.arange(window)
    return Excerpts(text[read], text[read + 1])


class TextResult(NamedTuple):
    """The test text, what reading it cost, the loss on the way there, and what the model writes."""

    test: np.ndarray
    """Code points."""
    characters: np.ndarray
    """Code points of those that the model knows, in its order."""
    nats: np.ndarray
    """-log p of each character of the test text but the first."""
    curve: np.ndarray
    """Step and training loss of each record."""
    validation_curve: np.ndarray
    sample: str
    scores: dict[str, Any]


def result_of_text(
    text: Text, trained: Trained, nats: Any, written: Any, scores: dict[str, Any]
) -> TextResult:
    """What training on the text and reading the rest came to.

    Args:
        nats: of the test text.
        written: the characters of the sample, by number.
    """
    points = np.array([ord(character) for character in text.characters], np.int32)
    curve, held_out = (
        np.array([(r["step"], r["loss"]) for r in trained.records if r["split"] == split])
        for split in ("train", "validation")
    )
    sample = "".join(text.characters[number] for number in np.asarray(written))
    return TextResult(points[text.test], points, np.asarray(nats), curve, held_out, sample, scores)


def scores_of_text(text: Text, scores: dict[str, float]) -> dict[str, Any]:
    """The scores with those of held-out text also in bits, and beside what needs no memory."""
    more: dict[str, Any] = {
        "data_sha256": text.sha256,
        "text_characters": len(text.train) + len(text.validation) + len(text.test),
        "vocabulary_size": len(text.characters),
    }
    for split, part in {"validation": text.validation, "test": text.test}.items():
        losses = dict(zip(("unigram_", "bigram_"), entropies(part), strict=True))
        for name, nats in {"": scores[f"{split}_loss"], **losses}.items():
            more[f"{split}_{name}loss"] = nats
            more[f"{split}_{name}bits_per_character"] = nats / math.log(2)
    return scores | more


def start_of_line(characters: str) -> np.ndarray:
    """What a sample begins after where there is no prompt: the end of a line, if there are any."""
    return np.array([max(0, characters.find("\n"))], np.int32)


def entropies(text: np.ndarray) -> tuple[float, float]:
    """Nats per character, after the first, that no model of one or of two characters is below.

    H(next) and H(next | this), of the frequencies in this very text: a model of single characters
    or of pairs reaches them only by having been fitted to it.
    """
    size = text.max() + 1
    pairs = np.bincount(text[:-1].astype(np.int64) * size + text[1:], minlength=size * size)
    p = pairs.reshape(size, size) / pairs.sum()
    both = _entropy(p)
    return _entropy(p.sum(axis=0)), both - _entropy(p.sum(axis=1))


def _entropy(p: np.ndarray) -> float:
    # 0 − 0 has no sign
    return 0.0 - float(np.sum(p[p > 0] * np.log(p[p > 0])))


def _built_in() -> str:
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    # topics quote one another: of what is to be held out, a sixth would be in the training text
    return "\n\n".join({paragraph.strip(): paragraph for paragraph in paragraphs}.values())


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder, not a text file")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is a device or a pipe, not a text file")
        # its bytes, characters, and for each a number of Python's and one of NumPy's
        memory.check(14 * path.stat().st_size, f"{path}, as numbers,")
        # decoded as it is, line ends included
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such text file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text, from byte {error.start} on") from None
