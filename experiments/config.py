"""From a TOML file to an experiment's frozen `Config`, strictly.

A config file is data: it is parsed by `tomllib`, never executed, and its `experiment` is only ever
looked up among the names it is given. Whatever is wrong with it becomes one `UsageError`, whose
message names the file, the dotted key and the nearest right name.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(gt=0)]
"""A whole number above zero."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above zero."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number, zero or above."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of 32 bits, which numpy, scikit-learn and JAX all take."""


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what, where and what would."""


def read(path: Path, types: Mapping[str, type]) -> tuple[str, Any]:
    """The experiment that the TOML file at `path` names, and its `Config` as the file gives it.

    Args:
        types: the `Config` of every experiment, by the experiment's name.

    Raises:
        UsageError: if the file cannot be read, or does not hold exactly such a config.
    """
    table = _parse(path)
    if "experiment" not in table:
        raise UsageError(f'{path}: missing key "experiment", one of {", ".join(sorted(types))}')
    experiment = table.pop("experiment")
    if not isinstance(experiment, str) or experiment not in types:
        hint = _nearest(str(experiment), types) or f"one of {', '.join(sorted(types))}"
        raise UsageError(f"{path}: experiment: unknown {experiment!r}; did you mean {hint}?")
    return experiment, check(types[experiment], table, str(path))


def check(config: type, table: Mapping[str, Any], source: str) -> Any:
    """An instance of the dataclass `config` holding `table`, whose types and ranges are right.

    Args:
        source: where the table comes from, for the message.

    Raises:
        UsageError: with one line for each key that is unknown, missing, ill-typed or out of range.
    """
    try:
        # strict mode takes a table for a dataclass, and an array for a tuple, only from JSON
        return TypeAdapter(config).validate_json(
            json.dumps(table, default=str), strict=True, extra="forbid"
        )
    except ValidationError as error:
        lines = [_explain(config, table, detail) for detail in error.errors()]
        raise UsageError("\n".join(f"{source}: {line}" for line in lines)) from None


def to_table(experiment: str, config: Any) -> dict[str, Any]:
    """The content of the TOML file that `read` turns into `config` again."""
    return {"experiment": experiment} | _without_none(dataclasses.asdict(config))


def claim(path: Path) -> str:
    """The first line of the comment that heads the config file at `path`."""
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [str(other) for other in path.parent.glob("*.toml")]
        hint = _nearest(str(path), beside) or "`python -m experiments list` names them all"
        hint = f"did you mean {hint}?" if hint in beside else hint
        raise UsageError(f"{path}: no such config file; {hint}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder, not a config file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not valid TOML: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def _explain(config: type, table: Mapping[str, Any], detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        hint = _nearest(key, _keys(config))
        return f"{key}: unknown key" + (f"; did you mean {hint}?" if hint else "")
    value: Any = table
    for part in detail["loc"]:
        value = value[part] if isinstance(value, Mapping | list | tuple) else value
    expected = detail["msg"].replace("Input should be", "should be")
    got = "a table" if isinstance(value, Mapping) else json.dumps(value, default=str)
    return f"{key}: {expected}, got {got}"


def _keys(config: type) -> Iterator[str]:
    """Every dotted key of a config, groups before their members."""
    for field in dataclasses.fields(config):
        yield field.name
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from (f"{field.name}.{key}" for key in _keys(field.type))


def _nearest(wrong: str, right: Any) -> str | None:
    """The name of `right` nearest to `wrong`; for dotted keys, also by the last part alone."""
    names = list(right)
    if close := difflib.get_close_matches(wrong, names, n=1):
        return close[0]
    lasts = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(wrong.rpartition(".")[2], lasts, n=1)
    return lasts[close[0]] if close else None


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    # TOML has no null: None is written by leaving the key out
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
