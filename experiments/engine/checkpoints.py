"""Checkpoints of a training, from which it goes on after any interruption as if there was none.

A checkpoint is a folder `<step>` with the state of the training as arrays and the rest as JSON.
Orbax writes it aside and renames it when it is whole, so that a process that is killed leaves the
ones before it, and nothing that looks like one. With the arrays' files are their checksums, as
`sha256sum` writes and checks them, and with the rest is its own: one that is not as it was written
is not used.

Reading is strict. Orbax would cast an array of another dtype; here whatever is missing, left over
or of another shape or dtype is an error that names it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from experiments.engine import processes
from experiments.engine.config import UsageError
from experiments.engine.files import naming

SUMS = "SHA256SUMS"

Record = dict[str, int | float | str]
"""One line of metrics: `step` (how many are done), `split`, and values by name."""


class Progress(NamedTuple):
    """What of a training is no array."""

    records: list[Record]
    """All so far."""
    window: list[dict[str, float]]
    """Metrics of the steps since the last record."""
    seconds: float
    """Spent on training, by however many processes."""


class Checkpoints:
    """Those of one training, the newest few, in a folder of their own.

    Args:
        best: a metric; the checkpoint with the best of those saved is kept, too.
        data: a checksum of the data.
    """

    def __init__(
        self, folder: Path, kept: int, config_hash: str, best: str | None = None, data: str = ""
    ) -> None:
        # a second to import, and not needed by runs that keep none
        from orbax.checkpoint import v1 as ocp

        self._folder = folder.absolute()
        self._config_hash = config_hash
        self._data = data
        self._saving = 0
        self._pending: Any = None
        context = ocp.Context()
        # once all is written, before the folder is renamed
        context.asynchronous.post_finalization_callback = lambda: _write_sums(
            self._folder / f"{self._saving}.orbax-checkpoint-tmp"
        )
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(kept)]
        if best is not None:
            keep.append(
                policies.BestN(n=1, get_metric_fn=rank, keep_checkpoints_without_metrics=False)
            )
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        # a process that died would be waited for
        if kind is not jax.errors.JaxRuntimeError or processes.alone():
            with self._writing():
                self._orbax.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Whatever keeps Orbax from writing is an `OSError`, but for the death of a process."""
        try:
            with naming(self._folder):
                yield
        except (OSError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise OSError(None, reason, str(self._folder)) from error

    def save(
        self, step: int, state: PyTree, key: PRNGKeyArray, progress: Progress,
        metric: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Begin to write the state after `step`; what goes wrong is raised by the next call.

        It is written while training goes on: nothing of what is given may be changed afterwards.

        Args:
            metric: the one to choose the best by, if it is known at this step.
        """
        self.wait()
        self._saving = step
        hashes = {"config_hash": self._config_hash, "data_sha256": self._data}
        rest = {**hashes, "step": step, **progress._asdict()}
        with self._writing():
            self._pending = self._orbax.save_checkpointables_async(
                step,
                {"state": _with_key(state, key)},
                metrics=metric,
                custom_metadata={**rest, "sha256": _digest(rest)},
                # one of this step that could not be read is in the way
                overwrite=True,
                force=True,
            )

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            OSError: if it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._writing():
                pending.result()

    def load(self, state: PyTree, key: PRNGKeyArray) -> tuple[int, PyTree, Progress] | None:
        """The newest that can be read: the steps done, the state, and the rest; None if there is
        none.

        Args:
            state, key: what the state and the key have to be like; the key has to be the same.

        Raises:
            UsageError: if it is of another config or key, or not like `state`, or if none can be
                read.
        """
        found = list(reversed(self._orbax.checkpoints))
        wanted = jax.tree.map(_abstract, _with_key(state, key))
        for checkpoint in found:
            # in one process, that all may come to the same
            if not processes.of_first(partial(_is_intact, Path(checkpoint.path))):
                continue
            try:
                metadata = self._orbax.checkpointables_metadata(checkpoint.step)
                kept, has = _verified(metadata.custom_metadata), metadata.metadata["state"]
                if (step := kept.pop("step", checkpoint.step)) != checkpoint.step:
                    raise ValueError(f"it is of step {step}")
                # older ones have no checksum of the data
                config_hash, data = kept.pop("config_hash"), kept.pop("data_sha256", self._data)
                progress = Progress(**kept)
                if not _leaves(has):
                    raise ValueError("its arrays are damaged")
                if config_hash == self._config_hash and not differences(has, wanted):
                    loaded = self._orbax.load_checkpointables(checkpoint.step, {"state": wanted})
            # there is no one class of errors for all that can be wrong with a file
            except Exception as error:
                _warn(checkpoint.path, _reason(error))
                continue
            if config_hash != self._config_hash:
                raise UsageError(f"{checkpoint.path}: is a checkpoint of another config")
            if data != self._data:
                raise UsageError(f"{checkpoint.path}: is a checkpoint of a training on other data")
            if differing := differences(has, wanted):
                raise UsageError(*(f"{checkpoint.path}: {line}" for line in differing))
            if not jnp.array_equal(loaded["state"]["key"], jax.random.key_data(key)):
                raise UsageError(f"{checkpoint.path}: is a checkpoint of another random key")
            return checkpoint.step, loaded["state"]["training"], progress
        if found:
            raise UsageError(
                f"{self._orbax.directory}: none of its checkpoints can be read; --overwrite the "
                "run to start anew"
            )
        return None


def rank(metric: Mapping[str, float]) -> float:
    """More is better: of an accuracy the highest, of all else, as a loss, the lowest."""
    ((name, value),) = metric.items()
    return value if name.endswith("accuracy") else -value


def read_params(folder: Path, *, best: bool = False, ema: bool = False) -> PyTree:
    """The parameters of the newest checkpoint, or of the best, in dictionaries.

    Args:
        ema: their exponential mean in its place.

    Raises:
        UsageError: if there is none, none that was kept as the best, or no mean; or if it is
            damaged, as one before it would pass for the one that was asked for.
    """
    from orbax.checkpoint import v1 as ocp

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of checkpoints")
    with ocp.training.Checkpointer(folder.absolute()) as checkpointer:
        found = list(checkpointer.checkpoints)
        if best:
            found = [checkpoint for checkpoint in found if checkpoint.metrics]
            found.sort(key=lambda checkpoint: rank(checkpoint.metrics))
            if not found:
                raise UsageError(f"{folder}: none was kept as the best, which --train.best names")
        if not found:
            raise UsageError(f"{folder}: holds no checkpoint")
        checkpoint = found[-1]
        damage = _damage(Path(checkpoint.path))
        if not damage:
            try:
                metadata = checkpointer.checkpointables_metadata(checkpoint.step)
                wanted = jax.tree.map(_on_first_device, metadata.metadata["state"])
                loaded = checkpointer.load_checkpointables(checkpoint.step, {"state": wanted})
            # there is no one class of errors for all that can be wrong with a file
            except Exception as error:
                damage = _reason(error)
        if damage:
            raise UsageError(
                f"{checkpoint.path}: cannot be read ({damage}); without that folder, the "
                "checkpoint before it is taken"
            )
    training = loaded["state"]["training"]
    return _mean(training["optimizer"], folder) if ema else training["params"]


def _mean(optimizer: Any, folder: Path) -> PyTree:
    """Of what the optimiser keeps, the mean of the parameters, by the names that it has there."""
    for part in optimizer:
        if isinstance(part, Mapping) and part.keys() == {"steps", "mean"}:
            return part["mean"]
    raise UsageError(f"{folder}: holds no mean of the parameters, which --train.ema keeps")


def _on_first_device(leaf: Any) -> jax.ShapeDtypeStruct:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def _sums(folder: Path) -> str:
    """The checksums of the files in the checkpoint's state, a line for each."""
    lines = []
    for path in sorted(path for path in (folder / "state").rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _write_sums(folder: Path) -> None:
    with naming(folder / SUMS), (folder / SUMS).open("w", encoding="utf-8") as file:
        file.write(_sums(folder))
        file.flush()
        os.fsync(file.fileno())


def _is_intact(folder: Path) -> bool:
    """Whether the files of a checkpoint are as they were written; tells of one that is not used."""
    if damage := _damage(folder):
        _warn(folder, damage)
    return not damage


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint whose files are not as they were written; else nothing."""
    if not (folder / SUMS).exists():
        print(f"{folder}: has no {SUMS}, so it is used as it is", file=sys.stderr)
        return ""
    try:
        return "" if (folder / SUMS).read_bytes() == _sums(folder).encode() else "damaged files"
    except OSError as error:
        return _reason(error)


def _digest(rest: Mapping[str, Any]) -> str:
    """Of what a checkpoint has beside its arrays."""
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _verified(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint has beside its arrays, less its digest; a `ValueError` if that differs."""
    rest = dict(metadata)
    digest = rest.pop("sha256", None)
    if digest is not None and digest != _digest(rest):
        raise ValueError("its metadata are damaged")
    return rest


def _warn(path: Any, reason: str) -> None:
    print(f"{path}: cannot be read, so it is not used ({reason})", file=sys.stderr)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def differences(has: PyTree, wanted: PyTree) -> list[str]:
    """What is missing, left over, or of another shape or dtype, a line for each, by path."""
    found, expected = _leaves(has), _leaves(wanted)
    lines = [f"{path}: missing" for path in expected.keys() - found.keys()]
    lines += [f"{path}: not expected" for path in found.keys() - expected.keys()]
    for path in found.keys() & expected.keys():
        a, b = found[path], expected[path]
        if (tuple(a.shape), a.dtype) != (tuple(b.shape), b.dtype):
            lines.append(f"{path}: expected {_describe(b)}, got {_describe(a)}")
    return sorted(lines)


def _leaves(tree: PyTree) -> Mapping[str, Any]:
    """Leaves by path; Orbax' metadata have dictionaries where the state has named tuples."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(jax.tree_util.keystr((part,), simple=True) for part in path): leaf
        for path, leaf in pairs
    }


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _with_key(state: PyTree, key: PRNGKeyArray) -> dict[str, PyTree]:
    return {"training": state, "key": jax.random.key_data(key)}
