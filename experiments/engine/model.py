"""What an experiment trains, as functions of its parameters: for what begins before a run or comes
after it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import PyTree

Adopted = tuple[PyTree, list[str]]
"""Parameters, and a line for each change that it took to make them of a file's arrays."""


class Model(NamedTuple):
    """The functions are called with `jax_enable_x64` as `x64` says."""

    init: Callable[[], PyTree]
    """The parameters that a training of the config begins with."""
    apply: Callable[..., Any]
    """`apply(params, *inputs)`: the trained model, as it answers outside training."""
    test: Callable[[], Callable[[PyTree], Mapping[str, Any]]]
    """Loads the config's data and returns the function that a run has for its test scores, of the
    parameters, to be compiled."""
    adopt: Callable[[Mapping[str, Any]], Adopted | None] | None = None
    """Parameters from the arrays of a file, by name, if it is one of another library; None if it is
    not. Raises a `ValueError` where the arrays do not fit."""
    sample: Callable[[PyTree, str | None, int, float, int], str] | None = None
    """`sample(params, prompt, length, temperature, seed)`: text that goes on from the prompt."""
    x64: bool = False
    """Whether it computes in float64."""
