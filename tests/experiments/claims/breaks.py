"""Changes of the library, or of what a claim rests on, that the claims have to notice."""

from collections.abc import Callable
from typing import NamedTuple


class Break(NamedTuple):
    """What a claim has to notice: `target`, a path to an attribute of a module, is replaced."""

    id: str
    target: str
    replacement: Callable
