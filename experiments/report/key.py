"""A key of what an experiment measures: as long as it is the same, so would the result be.

It is made of the config, of the code that measures, of the packages that this imports, of the
device with its kernels, and of the data file that the config names. Verdicts, equations and figures
are no part of it: they are made anew from the result each time.

The code that measures is `run`, and whatever of this repository it comes to use: for each file the
statements, from the outermost level, that define a name in use. So a file may hold `run` beside
`claims` and `plot`, and a change to these two changes no key. What cannot be told apart is taken
whole: modules that are imported as such, and all of rnnattn. Comments and formatting are no part of
the code.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.engine.config import to_table
from experiments.engine.experiment import ROOT
from rnnattn import native

MEASURES = "run"
"""The function of an experiment that measures."""


class Code(NamedTuple):
    """What is imported, directly or not, by some code."""

    statements: dict[Path, list[str]]
    """By file of this repository."""
    packages: set[str]
    """Of others, as they are imported, or named."""


def run_key(name: str, file: Path, config: Any) -> str:
    """A hash of all that decides the result of the experiment in `file`."""
    code = code_of(file, MEASURES)
    device = jax.devices()[0]
    decisive = {
        "config": to_table(name, config),
        "code": {str(path.relative_to(ROOT)): code.statements[path] for path in code.statements},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _distributions(code.packages)},
        "device": f"{device.platform}: {device.device_kind}",
        "float64": jax.config.read("jax_enable_x64"),
        # of RNNATTN_NATIVE, what it comes to on this machine
        "kernels": native.status(),
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    kernels = sorted((ROOT / "rnnattn" / "native" / "src").glob("*"))
    for path in [*kernels, *_data_files(config)]:
        with path.open("rb") as content:
            contained = hashlib.file_digest(content, "sha256")
        digest.update(f"\0{path.name}\0".encode() + contained.digest())
    return digest.hexdigest()[:12]


def _data_files(config: Any) -> list[Path]:
    """The files of `data.path`, if the config has one; that it is missing is for others to say."""
    named = getattr(getattr(config, "data", None), "path", None)
    path = Path(named or "")
    inside = sorted(path.rglob("*")) if named and path.is_dir() else [path]
    return [each for each in inside if each.is_file()]


def _distributions(packages: set[str]) -> list[str]:
    """What to install for the packages, among what is installed."""
    known = _installed()
    return sorted({each for name in packages | {"jaxlib"} for each in known.get(name, ())})


@cache
def _installed() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


# ---- the code that is used ------------------------------------------------------------------


def code_of(file: Path, name: str) -> Code:
    """The statements that define `name` in the file, and all that these use."""
    code = Code({}, set())
    used: dict[Path, set[int]] = {}
    left: list[tuple[Path, str | None]] = [(file.resolve(), name)]
    seen: set[tuple[Path, str | None]] = set()
    while left:
        asked = path, wanted = left.pop()
        if asked in seen:
            continue
        seen.add(asked)
        module = _parse(path.read_bytes())
        # what defines no name is executed whatever is imported
        numbers = {n for n, names in enumerate(module.defines) if not names or wanted in names}
        if wanted is None or path.is_relative_to(ROOT / "rnnattn"):
            numbers = set(range(len(module.statements)))
        for n in numbers - used.setdefault(path, set()):
            left += [(path, each) for each in module.uses[n]]
            # as `find_spec("sklearn")` names one
            code.packages.update(module.uses[n] & _installed().keys())
            for node in module.imports[n]:
                left += _imported(node, path, code.packages)
        used[path] |= numbers
    for path, numbers in sorted(used.items()):
        module = _parse(path.read_bytes())
        code.statements[path] = [ast.dump(module.statements[n]) for n in sorted(numbers)]
    return code


class _Module(NamedTuple):
    """The statements of a file at its outermost level: of each, the names that it defines, those
    that it uses, and its imports."""

    statements: list[ast.stmt]
    defines: list[frozenset[str]]
    uses: list[frozenset[str]]
    imports: list[list[ast.Import | ast.ImportFrom]]


@cache
def _parse(content: bytes) -> _Module:
    body = [each for each in ast.parse(content).body if not _says_nothing(each)]
    statements = [part for each in body for part in _parts(each)]
    nodes = [list(ast.walk(each)) for each in statements]
    return _Module(
        statements,
        [_defined(each) for each in statements],
        [frozenset(filter(None, map(_used, each))) for each in nodes],
        [[n for n in each if isinstance(n, ast.Import | ast.ImportFrom)] for each in nodes],
    )


def _parts(statement: ast.stmt) -> list[ast.stmt]:
    """An import of several names as an import of each."""
    if isinstance(statement, ast.Import):
        return [ast.Import([alias]) for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        module, level = statement.module, statement.level
        return [ast.ImportFrom(module, [alias], level) for alias in statement.names]
    return [statement]


def _says_nothing(statement: ast.stmt) -> bool:
    """Whether it is there for readers and type checkers alone."""
    if isinstance(statement, ast.If):
        return isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _defined(statement: ast.stmt) -> frozenset[str]:
    """The names that a statement is there for; none if it does anything else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return frozenset([statement.name])
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names = [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
        return frozenset() if "*" in names else frozenset(names)
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        if not any(isinstance(node, ast.Attribute | ast.Subscript) for node in nodes):
            return frozenset(node.id for node in nodes if isinstance(node, ast.Name))
    return frozenset()


def _used(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    # as annotations and `getattr` have names
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        return node.value
    return None


def _imported(
    node: ast.Import | ast.ImportFrom, path: Path, packages: set[str]
) -> Iterator[tuple[Path, str | None]]:
    """The files, with a name or None for the whole, that are imported of this repository; other
    packages are added to `packages`."""
    if isinstance(node, ast.Import):
        asked: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
    else:
        package = ".".join(path.relative_to(ROOT).parent.parts) if node.level else None
        module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        asked = [(module, alias.name) for alias in node.names]
    for module, name in asked:
        parts = module.split(".")
        if parts[0] not in ("experiments", "rnnattn"):
            packages |= {parts[0]} - sys.stdlib_module_names
            continue
        for n in range(1, len(parts)):
            # what a package does when something in it is imported
            yield from ((file, "") for file in _file(parts[:n]))
        if name and (submodule := _file([*parts, name])):
            yield from ((file, "") for file in _file(parts))
            yield from ((file, None) for file in submodule)
        else:
            for file in _file(parts):
                defined = frozenset().union(*_parse(file.read_bytes()).defines)
                yield file, name if name in defined else None


def _file(parts: list[str]) -> list[Path]:
    """The source of a module of this repository, if there is one."""
    places = (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py"))
    return [path for path in places if path.is_file()][:1]
