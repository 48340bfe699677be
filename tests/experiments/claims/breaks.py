"""Changes of the library after which a claim's verdict has to be another one.

`BREAKS` of the files `breaks_*.py` hold them, one or more for each claim. That each does change its
verdict shows that the verdict rests on the library, and not on numbers that agree by construction.
"""

from collections.abc import Callable
from typing import NamedTuple


class Break(NamedTuple):
    """Something else in the place of a part of what a claim rests on."""

    id: str
    """The claim's."""
    target: str
    """The path of the attribute that is replaced, as `pytest.MonkeyPatch.setattr` takes it."""
    replacement: Callable
