"""The tiny sizes of experiments, as options of the command line."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from experiments.engine.experiment import find


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of what is no group, with their values."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def tiny_options(experiment: str) -> list[str]:
    """What makes any config of the experiment its tiny one."""
    options = []
    for key, value in leaves(find(experiment).TINY):
        group, dot, name = key.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            options.append(f"--{group}{dot}{'' if value else 'no-'}{name}")
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            options += [f"--{group}{dot}{name}", *map(str, values)]
    return options
