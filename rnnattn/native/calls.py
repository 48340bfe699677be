"""How kernels are called."""

from typing import Any

import numpy as np

from rnnattn.native.load import found

# Tests set these.
instruction_set: str | None = None  # the one of `status`
threads = 0  # all of XLA's


def call_attributes() -> dict[str, Any]:
    """Attributes of every call of a kernel."""
    status, sets = found()
    chosen = sets[instruction_set or status.instruction_set or ""]
    return {"instruction_set": np.int64(chosen), "threads": np.int64(threads)}
