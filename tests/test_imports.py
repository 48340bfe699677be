"""Imports go down only: experiments → rnnattn.nn → the primitives → jax; nothing in a circle."""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import rnnattn

ROOT = Path(__file__).resolve().parent.parent

# What any file of the library may import, and some of its parts besides.
EXTERNAL = {"jax", "jaxlib", "jaxtyping", "numpy", *sys.stdlib_module_names}
MORE = {"rnnattn.nn": {"flax"}, "rnnattn.interop": {"safetensors"}}
MORE["rnnattn.attention.peers"] = {"tokamax"}

# What the parts may import of the library, besides themselves: primitives none of each other.
HELPERS = {"rnnattn.checks", "rnnattn.meshes", "rnnattn.precision", "rnnattn.steps"}
PRIMITIVE = HELPERS | {
    "rnnattn.dispatch",
    "rnnattn.divided",
    "rnnattn.mosaic",
    "rnnattn.native",
    "rnnattn.packing",
}
PARTS = {
    "rnnattn.checks": set(),
    "rnnattn.meshes": set(),
    "rnnattn.masks": {"rnnattn.checks", "rnnattn.precision"},
    "rnnattn.packing": {"rnnattn.checks"},
    "rnnattn.precision": set(),
    "rnnattn.steps": {"rnnattn.checks", "rnnattn.precision"},
    "rnnattn.divided": {"rnnattn.precision"},
    "rnnattn.dispatch": {"rnnattn.divided", "rnnattn.precision"},
    "rnnattn.mosaic": set(),
    "rnnattn.native": set(),
    "rnnattn.attention": PRIMITIVE | {"rnnattn.masks"},
    "rnnattn.linear": PRIMITIVE,
    "rnnattn.recurrent": PRIMITIVE,
    "rnnattn.position": PRIMITIVE,
    "rnnattn.patches": PRIMITIVE,
    "rnnattn.parallel": HELPERS | {"rnnattn.attention"},
    "rnnattn.reference": HELPERS
    | {"rnnattn.attention", "rnnattn.linear", "rnnattn.position", "rnnattn.recurrent"},
    "rnnattn.interop": HELPERS | {"rnnattn.recurrent"},
    "rnnattn.nn": HELPERS
    | {
        "rnnattn.attention",
        "rnnattn.linear",
        "rnnattn.patches",
        "rnnattn.position",
        "rnnattn.recurrent",
    },
    "rnnattn": {"rnnattn"},
}

# The files of a primitive's folder, from the ground up: one imports those of its floor and below.
FLOORS = [
    {"noise"},
    {"unit"},
    {
        "problem",
        "units",
        "equations",
        "scaling",
        "masking",
        "functions",
        "dropout",
        "signature",
        "quantised",
        "blocks",
    },
    {
        "dense",
        "blockwise",
        "chunked",
        "xla",
        "placed",
        "native",
        "native_parts",
        "pair",
        "ulysses",
        "hopper",
        "pallas",
        "tpu",
        "kernels",
        "cudnn",
        "pages",
    },  # the schedules
    {"rule"},
    {"arguments", "reduced", "peers", "cache", "init"},
    {"run"},
    {"api", "family", "ring", "rotary"},
    {"packed", "paged", "rotating", "stack"},
    {"__init__"},
]


# The same for the folders of experiments. What lies in a folder of the last is found by its name
# alone, so that nothing has to be changed for one more, and nothing else imports it.
ENGINE = {"experiments.engine", "experiments.figures"}
FOUND_BY_NAME = ("experiments.tasks", "experiments.claims")
FOLDERS = {
    "experiments.engine": ENGINE,
    "experiments.figures": ENGINE,
    "experiments.data": ENGINE,
    "experiments.models": ENGINE,
    "experiments.report": ENGINE,
    "experiments.tasks": ENGINE | {"experiments.data", "experiments.models"},
    "experiments.claims": ENGINE
    | {"experiments.data", "experiments.models"}
    | {f"experiments.report.{name}" for name in ("evidence", "intervals", "quadrature")},
    "experiments": ENGINE | {"experiments.report"},
}


def modules(folder):
    """The files of a package by name, `rnnattn.nn` for its `__init__`."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return {_name(path): path for path in files}


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, known=()):
    """The names of modules a file imports; `from package import module` is the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


LIBRARY, EXPERIMENTS = modules("rnnattn"), modules("experiments")


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_only_what_lies_below(name):
    part = next(part for part in (".".join(name.split(".")[:2]), "rnnattn") if part in PARTS)
    more = set().union(*(names for at, names in MORE.items() if within(name, [at])))
    allowed = EXTERNAL | more | PARTS[part] | ({part} if part != "rnnattn" else set())
    wrong = [other for other in imported(LIBRARY[name], LIBRARY) if not within(other, allowed)]
    assert not wrong


@pytest.mark.parametrize("primitive", ["attention", "linear", "recurrent"])
def test_equations_lie_below_schedules_and_these_below_the_rule_and_the_arguments(primitive):
    floor = {file: n for n, files in enumerate(FLOORS) for file in files}
    prefix = f"rnnattn.{primitive}."
    for path in (ROOT / "rnnattn" / primitive).rglob("*.py"):
        own, *_ = path.relative_to(ROOT / "rnnattn" / primitive).with_suffix("").parts
        assert own in floor, f"{path.name}: say in FLOORS on which floor it is"
        others = [n for n in imported(path, LIBRARY) if n.startswith(prefix)]
        named = {n: n.removeprefix(prefix).partition(".")[0] for n in others}
        above = [n for n in others if floor[named[n]] > floor[own]]
        assert not above, f"{path.name} imports what lies above it"


def test_nothing_imports_in_a_circle():
    known = LIBRARY | EXPERIMENTS | modules("benchmarks")
    graph = {
        name: {other for other in imported(path, known) if other in known and other != name}
        for name, path in known.items()
    }
    for name in known:  # a package's own files are imported before it is whole
        for other in list(graph[name]):
            if name.startswith(f"{other}."):
                graph[name].discard(other)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_imports_only_the_folders_below(name):
    part = next(part for part in (".".join(name.split(".")[:2]), "experiments") if part in FOLDERS)
    inside = [n for n in imported(EXPERIMENTS[name], EXPERIMENTS) if within(n, ["experiments"])]
    # a folder's experiments do not import one another, but one that is a folder has its own files
    own = ".".join(name.split(".")[:3]) if part in FOUND_BY_NAME else part
    allowed = FOLDERS[part] | {own}
    wrong = [other for other in inside if not within(other, allowed)]
    assert not wrong
    assert not any(within(other, ["tests"]) for other in imported(EXPERIMENTS[name]))


def test_importing_the_library_imports_nothing_of_the_model_or_experiment_layer():
    code = "import sys, rnnattn; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = set(output.stdout.split())
    assert "rnnattn.recurrent" in loaded
    assert not loaded & {"flax", "optax", "matplotlib", "experiments", "torch"}


def test_the_rest_is_imported_when_it_is_asked_for():
    assert rnnattn.parallel.ring_attention.__name__ and rnnattn.nn.LSTM.__name__
    assert rnnattn.__version__ == importlib.metadata.version("rnnattn")
    with pytest.raises(AttributeError, match="has no attribute 'lstn'"):
        _ = rnnattn.lstn
