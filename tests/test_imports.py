"""Imports go down only: experiments → rnnattn.nn → the primitives → jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"jax", "jaxlib", "jaxtyping", "numpy"} | {
    "collections",
    "dataclasses",
    "functools",
    "importlib",
    "math",
    "typing",
}

# What a module of the library may import besides; the primitives import none of each other.
ALLOWED = {
    "__init__": {"rnnattn"},
    "attention": {
        "rnnattn.blockwise",
        "rnnattn.dense",
        "rnnattn.native",
        "rnnattn.native_attention",
        "rnnattn.precision",
        "rnnattn.scores",
        "tokamax",
    },
    "blockwise": {"rnnattn.scores"},
    "cell": {"rnnattn.precision"},
    "chunked": {"rnnattn.cell", "rnnattn.precision"},
    "dense": {"rnnattn.scores"},
    "native": {"os", "pathlib", "re", "rnnattn.native"},
    "native_attention": {"rnnattn.native", "rnnattn.scores"},
    "native_lstm": {"rnnattn.cell", "rnnattn.chunked", "rnnattn.native"},
    "parallel": {
        "rnnattn.attention",
        "rnnattn.blockwise",
        "rnnattn.precision",
        "rnnattn.scores",
    },
    "patches": {"rnnattn.precision"},
    "position": set(),
    "precision": set(),
    "recurrent": {
        "rnnattn.cell",
        "rnnattn.chunked",
        "rnnattn.native_lstm",
        "rnnattn.precision",
    },
    "reference": {"rnnattn.attention", "rnnattn.cell", "rnnattn.position", "rnnattn.recurrent"},
    "scores": {"rnnattn.precision"},
    "interop": {"os", "pathlib", "secrets", "rnnattn.cell", "safetensors"},
    "nn": {
        "flax",
        "rnnattn.attention",
        "rnnattn.cell",
        "rnnattn.patches",
        "rnnattn.position",
        "rnnattn.precision",
        "rnnattn.recurrent",
    },
}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def _within(name, allowed):
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("path", sorted((ROOT / "rnnattn").glob("*.py")), ids=lambda p: p.stem)
def test_the_library_imports_only_what_lies_below(path):
    wrong = [name for name in _imports(path) if not _within(name, LIBRARY | ALLOWED[path.stem])]
    assert not wrong


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_training_imports_no_model(path):
    names = set(_imports(path))
    assert not _within("tests", names)
    if path.stem in ("training", "config", "runs"):
        models = {"rnnattn.nn", "rnnattn.recurrent", "rnnattn.attention", "flax"}
        assert not names & models


def test_importing_the_library_imports_nothing_of_the_model_or_experiment_layer():
    code = "import sys, rnnattn; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = set(output.stdout.split())
    assert "rnnattn.recurrent" in loaded
    assert not loaded & {"flax", "optax", "matplotlib", "experiments", "torch"}
