"""From a TOML file to an experiment's frozen `Config`, strictly.

A config file is data: it is parsed by `tomllib`, never executed, and its `experiment` is only ever
looked up among the names that there are. Whatever is wrong with it becomes one `UsageError`, whose
message names the file, the dotted key and the nearest right name.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(gt=0, lt=2**31)]
"""A whole number above zero, as JAX counts steps."""

Size = Annotated[int, Field(gt=0, le=2**20)]
"""The length of an axis. What several come to is for `experiments.engine.memory` to judge."""

Layers = Annotated[int, Field(gt=0, le=64)]
"""How many of something there are above one another, each with a program of its own to compile."""

Samples = Annotated[int, Field(ge=100, le=10**9)]
"""Random draws, enough for an interval."""

Logit = Annotated[float, Field(ge=1e-6, le=700)]
"""A positive number whose exponential is a float64 other than 1."""

Scale = Annotated[float, Field(ge=1e-3, le=10)]
"""A standard deviation of weights, at which gates neither stand still nor are all shut."""

Base = Annotated[float, Field(ge=2, le=1e9)]
"""Of the frequencies of positions."""

Position = Annotated[float, Field(ge=-1e9, le=1e9)]
"""Steps, forwards or backwards, not necessarily whole."""

T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(min_length=1)]
"""One or more."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above zero."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number, zero or above."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of 32 bits, which numpy, scikit-learn and JAX all take."""


BYTES = 2**16
"""No config file is longer."""

LEVELS = 3
"""A config has groups, their members, and lists of numbers among these."""

SHOWN = 10
"""Of many things that are wrong, the first so many are told."""


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what, where and what would.

    Each argument is a line of it. As a line quotes what it was given, it is printed cut in the
    middle if it is very long, and with escapes for what would move a terminal's cursor.
    """

    def __str__(self) -> str:
        short = (f"{s[:600]} … {s[-300:]}" if len(s) > 1000 else s for s in self.args)
        return "\n".join(map(escaped, short))


def escaped(line: str) -> str:
    """With what would move a terminal's cursor written as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def read_table(
    path: Path, experiments: Collection[str], configs: Mapping[str, Path]
) -> tuple[str, dict[str, Any]]:
    """The experiment that the TOML file at `path` names, one of `experiments`, and the rest of it.

    A file with a `base`, the name of one of `configs` or the path of a file from its own folder,
    says only what differs from that: its values take the place of the base's, key by key. (A `base`
    that is a number is a key of the experiment's own, as of frequencies.)

    Raises:
        UsageError: if a file cannot be read, names none of the experiments or another than its
            base, or if its base has a base.
    """
    table = _parse(path)
    if not isinstance(table.get("base"), str):
        return _experiment(table, path, experiments), table
    named = table.pop("base")
    base = configs.get(named, path.parent / named)
    if not base.is_file():
        nearest = _nearest(named, configs)
        hint = f"; did you mean {nearest}?" if nearest else ""
        raise UsageError(f"{path}: base: there is no config {named}{hint}")
    values = _parse(base)
    if isinstance(values.get("base"), str):
        raise UsageError(f"{path}: base: {named} has a base itself, and only one level is read")
    of_base = _experiment(values, base, experiments)
    experiment = _experiment({"experiment": of_base} | table, path, experiments)
    table.pop("experiment", None)
    if experiment != of_base:
        raise UsageError(f"{path}: base: {named} is of {of_base}, and this is of {experiment}")
    for key, value in table.items():
        group = values.get(key)
        both = isinstance(group, dict) and isinstance(value, dict)
        values[key] = group | value if both else value
    return experiment, values


def _experiment(table: dict[str, Any], path: Path, experiments: Collection[str]) -> str:
    """The experiment that a table names, which is taken from it."""
    names = ", ".join(sorted(experiments))
    if "experiment" not in table:
        raise UsageError(f'{path}: missing key "experiment", one of {names}')
    experiment = table.pop("experiment")
    if not isinstance(experiment, str):
        raise UsageError(f"{path}: experiment: should be a name, one of {names}")
    if experiment not in experiments:
        nearest = _nearest(experiment, experiments)
        hint = f"did you mean {nearest}?" if nearest else f"there are {names}"
        quoted = repr(experiment[:100] + "…" * (len(experiment) > 100))
        raise UsageError(f"{path}: experiment: unknown {quoted}; {hint}")
    return experiment


def check(config: type, table: Mapping[str, Any], source: str) -> Any:
    """An instance of the dataclass `config` holding `table`, whose types and ranges are right.

    Args:
        source: where the table comes from, for the message.

    Raises:
        UsageError: with one line for each key that is unknown, missing, ill-typed or out of range.
    """
    if strange := _strange(table):
        raise UsageError(f"{source}: {strange}")
    try:
        # strict mode takes a table for a dataclass, and an array for a tuple, only from JSON
        return TypeAdapter(config).validate_json(
            json.dumps(table, default=str), strict=True, extra="forbid"
        )
    except ValidationError as error:
        found = error.errors(include_url=False)
        # a list is also said to be too short for the values in it that are wrong
        lists = {detail["loc"][:-1] for detail in found}
        details = [d for d in found if d["type"] != "too_short" or d["loc"] not in lists]
        lines = [f"{source}: {_explain(config, table, detail)}" for detail in details[:SHOWN]]
        if len(details) > SHOWN:
            lines.append(f"{source}: and {len(details) - SHOWN:,} more")
        raise UsageError(*lines) from None


def to_table(experiment: str, config: Any) -> dict[str, Any]:
    """The content of the TOML file that is read as `config` again."""
    return {"experiment": experiment} | _without_none(dataclasses.asdict(config))


def on_same_data(config: Any) -> Any:
    """The defaults of an experiment, a size of seconds, on the data that `config` names."""
    small = type(config)()
    data = getattr(config, "data", None)
    named = {key: getattr(data, key) for key in ("source", "path") if hasattr(data, key)}
    return (
        dataclasses.replace(small, data=dataclasses.replace(small.data, **named))
        if named
        else small
    )


def claim(path: Path) -> str:
    """The first line of the comment that heads the config file at `path`."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = lines.readline(BYTES)
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except FileNotFoundError:
        beside = [str(other) for other in path.parent.glob("*.toml")]
        hint = _nearest(str(path), beside) or "`python -m experiments list` names them all"
        hint = f"did you mean {hint}?" if hint in beside else hint
        raise UsageError(f"{path}: no such config file; {hint}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder, not a config file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > BYTES:
        raise UsageError(f"{path}: is no config file: it has more than {BYTES:,} bytes")
    try:
        # some editors begin a text in UTF-8 with a mark
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not valid TOML: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: lists or tables are nested too deep for a config") from None
    except ValueError:
        # Python's own, of a decimal number with thousands of digits
        raise UsageError(f"{path}: not valid TOML: a number has too many digits") from None


def _strange(value: Any, key: str = "", levels: int = LEVELS) -> str | None:
    """What there is in a table that TOML can say and no config can hold, or None."""
    inside: Any = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{key}: should be a number of at most 64 bits"
    if inside and not levels:
        return f"{key}: lists or tables are nested too deep for a config"
    found = (
        _strange(each, f"{key}.{name}" if key else str(name), levels - 1) for name, each in inside
    )
    return next(filter(None, found), None)


OWN_WORDS = {
    "dataclass_type": "should be a table",
    "tuple_type": "should be a list",
    "int_from_float": "should be a valid integer",
}
"""In place of pydantic's, which knows its input as JSON."""


def _explain(config: type, table: Mapping[str, Any], detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        hint = _nearest(key, _keys(config))
        return f"{key}: unknown key" + (f"; did you mean {hint}?" if hint else "")
    value: Any = table
    for part in detail["loc"]:
        value = value[part] if isinstance(value, Mapping | list | tuple) else value
    if detail["type"] == "too_short":
        expected = f"should have at least {detail['ctx']['min_length']} values"
    else:
        expected = detail["msg"].replace("Input should be", "should be")
    got = "a table" if isinstance(value, Mapping) else json.dumps(value, default=str)
    return f"{key}: {OWN_WORDS.get(detail['type'], expected)}, got {got}"


def _keys(config: type) -> Iterator[str]:
    """Every dotted key of a config, groups before their members."""
    for field in dataclasses.fields(config):
        yield field.name
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from (f"{field.name}.{key}" for key in _keys(field.type))


def _nearest(wrong: str, right: Any) -> str | None:
    """The name of `right` nearest to `wrong`; for dotted keys, also by the last part alone."""
    if len(wrong) > 200:
        # no name is, and to compare takes time in proportion
        return None
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
