"""What kernels in Pallas Mosaic GPU share: between memory and registers, in every jax."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def load(ref: Any, layout: Any, **how: Any) -> Any:
    """From memory into registers; jax 0.10 wants an index apart from the reference."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, **how)


def store(ref: Any, value: Any) -> None:
    """From registers into global memory, in pieces smaller than its sectors."""
    if hasattr(plgpu, "store"):  # from jax 0.12 on, where an assignment wants whole sectors
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
