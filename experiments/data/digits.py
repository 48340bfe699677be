"""The 1,797 handwritten digits that ship inside scikit-learn: 8 × 8 pixels, in 17 grey levels.

They are the test set of "Optical Recognition of Handwritten Digits", of the UCI Machine Learning
Repository. scikit-learn itself takes a second to import: its file of them is read as it lies there.
"""

import importlib.util
from pathlib import Path

import numpy as np

from experiments.data.images import Images, ImageSet, sha256_of
from experiments.engine.config import UsageError


def read_digits(path: str | None) -> ImageSet:
    """All of them; there are no others at a path.

    Raises:
        UsageError: if there is a path, or scikit-learn is not installed.
    """
    if path is not None:
        raise UsageError(
            "--data.path: is for --data.source mnist or cifar10; digits are in scikit-learn"
        )
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UsageError("--data.source digits: are in scikit-learn: pip install scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    *pixels, labels = np.loadtxt(file, delimiter=",").T
    images = np.stack(pixels, axis=-1).reshape(-1, 8, 8, 1)
    return ImageSet(
        Images(images / 16, labels.astype(np.int32)),
        None,
        tuple("0123456789"),
        "CC BY 4.0",
        sha256_of(file),
    )
