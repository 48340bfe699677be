"""Weights from outside into a module."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rnnattn.checks import names_amiss


def load_weights(module: nnx.Module, weights: Mapping[Any, Any]) -> None:
    """Sets every parameter of `module` from a nested dictionary of arrays, as `interop` makes it.

    The arrays are copied. `nnx.to_pure_dict(nnx.state(module, nnx.Param))` is the way back.

    Raises:
        ValueError: a name is missing or unknown, or a shape or dtype is not the module's; all that
            is wrong is named, and nothing is set.
    Example:
        A checkpoint for the images it was trained on, then a model for larger patches of it:

        >>> from rnnattn import resize_patch_kernel
        >>> from rnnattn.nn import ViT
        >>> make = lambda patch_size, image_size: ViT(
        ...     patch_size=patch_size, image_size=image_size, width=8, depth=1, num_heads=2,
        ...     classes=3, rngs=nnx.Rngs(0),
        ... )
        >>> weights = nnx.to_pure_dict(nnx.state(make(4, 16), nnx.Param))
        >>> weights["stem"]["kernel"] = resize_patch_kernel(weights["stem"]["kernel"], 8)
        >>> load_weights(make(8, 32), weights)
    """
    own = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    given = nnx.traversals.flatten_mapping(weights)
    name = lambda path: ".".join(map(str, path))
    wrong = names_amiss(own, given, name)
    for path in own:
        if path in given:
            expected, got = own[path], given[path]
            if jnp.shape(got) != expected.shape:
                shapes = f"{expected.shape}, got {jnp.shape(got)}"
                wrong.append(f"`{name(path)}` must be of shape {shapes}")
            elif jnp.result_type(got) != expected.dtype:
                dtypes = f"{expected.dtype.name}, got {jnp.result_type(got).name}"
                wrong.append(f"`{name(path)}` must be of dtype {dtypes}")
    if wrong:
        raise ValueError(f"load_weights: {'; '.join(wrong)}")
    nnx.update(module, jax.tree.map(jnp.array, dict(weights)))


class Held(nnx.Module):
    """A module that holds the parameters of a function, each by its name as an `nnx.Param`."""

    def hold(self, params: Any) -> None:
        self.kind = type(params)
        for name, weight in params._asdict().items():
            setattr(self, name, nnx.data(None if weight is None else nnx.Param(weight)))

    @property
    def params(self) -> Any:
        """The weights as the functions take them."""
        read = lambda weight: None if weight is None else weight[...]
        return self.kind(*(read(getattr(self, name)) for name in self.kind._fields))
