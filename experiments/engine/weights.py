"""Parameters from outside, which a training begins with: those of another run, or of a file.

Reading is strict: what is missing, left over or of another shape or dtype is an error that names
all of it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.engine import runs
from experiments.engine.checkpoints import differences, read_params
from experiments.engine.config import UsageError
from experiments.engine.experiment import Experiment
from experiments.engine.session import Start


def start(experiment: Experiment, config: Any) -> Start | None:
    """The parameters that `train.init` of the config names, if it names any.

    Raises:
        UsageError: if they cannot be read, or are not those of the config's model.
    """
    source = getattr(getattr(config, "train", None), "init", None)
    if source is None:
        return None
    if experiment.model is None:
        raise UsageError(
            f"--init: {experiment.name} does not say what it trains, by a `model` in its file"
        )
    model = experiment.model(config, None)
    arrays = read_arrays(source)
    with jax.enable_x64(model.x64):
        try:
            adopted = model.adopt(arrays) if model.adopt else None
        except ValueError as error:
            raise UsageError(f"--init: {source}: {error}") from None
        if adopted is None:
            like = jax.eval_shape(model.init)
            adopted = fitted(arrays, like, f"--init: {source}"), []
    params, changes = adopted
    return Start(params, _digest(arrays), changes)


def read_arrays(source: str) -> dict[str, np.ndarray]:
    """By name the arrays of a run's newest checkpoint, or of a file (.safetensors, .npz).

    Raises:
        UsageError: if it is neither, or cannot be read.
    """
    path = Path(source)
    if (path / runs.CONFIG).is_file():
        with jax.enable_x64(True):
            params = read_params(path / runs.CHECKPOINTS)
        return {name: np.asarray(leaf) for name, leaf in flattened(params).items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load

            return load(path.read_bytes())
        if path.suffix == ".npz":
            # numpy leaves a file open that it cannot read
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except OSError as error:
        raise UsageError(f"--init: {source}: cannot be read: {error.strerror}") from None
    # there is no one class of errors for all that can be wrong with a file
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--init: {source}: damaged, or no such file: {reason}") from None
    raise UsageError(
        f"--init: {source}: is neither the folder of a run nor a file .safetensors or .npz"
    )


def fitted(arrays: Mapping[str, Any], like: PyTree, source: object) -> PyTree:
    """The arrays, by name, as a tree like `like`.

    Raises:
        UsageError: naming all that is missing, left over or of another shape or dtype.
    """
    wanted = flattened(like)
    if wrong := differences(dict(arrays), wanted):
        raise UsageError(
            f"{source}: does not hold the parameters of this model: {'; '.join(wrong)}"
        )
    leaves = [jnp.asarray(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def flattened(tree: PyTree) -> dict[str, Any]:
    """The leaves, named as `rnnattn.interop.write_safetensors` names them."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()
