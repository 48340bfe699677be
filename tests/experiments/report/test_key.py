"""A result has the key of all that decides it, and of nothing else."""

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.claims import attention_averaging, key_noise, vit_resolution
from experiments.report import key
from rnnattn import native

FILES = {
    "experiments/claims/x.py": """
"A claim."
import numpy as np
from experiments.engine import steps
from experiments.report.evidence import Claim, interval
from experiments.figures import BLUE
from typing import NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES, TITLE = 100, "noise"
COLOURS = {"noise": BLUE}

class Config:
    seed: int = 0

class Result(NamedTuple):
    mean: "Mean"

class Mean(float):
    pass

def draw(config):
    "Noise."
    from scipy.stats import norm
    return norm.rvs(SAMPLES)

def run(config: Config, session) -> Result:
    return Result(interval(draw(config)))

def claims(config, result):
    return Claim("A1", TITLE)

def plot(result):
    import matplotlib
    return COLOURS[TITLE]
""",
    "experiments/report/evidence.py": """
from dataclasses import dataclass
LEVEL = 0.99
def interval(values):
    return values * LEVEL
@dataclass
class Claim:
    title: str
""",
    "experiments/figures.py": "BLUE = 1",
    "experiments/engine/steps.py": "def step():\n    return 1",
    "experiments/engine/__init__.py": "",
    "rnnattn/__init__.py": "from rnnattn.lstm import lstm",
    "rnnattn/lstm.py": "def lstm():\n    return 1",
    "rnnattn/native/src/kernels.cc": "int f();",
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(key, "ROOT", tmp_path)
    monkeypatch.setattr(key, "to_table", lambda name, config: {"seed": config.seed})
    return tmp_path


def key_of(root: Path, **config) -> str:
    return key.run_key("x", root / "experiments/claims/x.py", SimpleNamespace(seed=0, **config))


@pytest.mark.parametrize(
    "file, before, after",
    [
        ("claims/x.py", '"A1", TITLE', '"A2", TITLE'),
        ("claims/x.py", "import matplotlib", "import matplotlib, sklearn"),
        ("claims/x.py", '{"noise": BLUE}', '{"noise": BLUE, "signal": 2}'),
        ("claims/x.py", '"A claim."', '"A better claim."'),
        ("claims/x.py", "SAMPLES, TITLE =", "# a remark\nSAMPLES, TITLE  = "),
        ("claims/x.py", "import Figure", "import Figure, SubFigure"),
        ("report/evidence.py", "title: str", "title: str\n    colour: str"),
        ("figures.py", "1", "2"),
        # imported, and not used by what measures
        ("engine/steps.py", "return 1", "return 2"),
    ],
)
def test_what_is_said_and_drawn_of_a_result_is_not_in_its_key(file, before, after, root):
    was = key_of(root)
    change(root / "experiments" / file, before, after)
    assert key_of(root) == was


@pytest.mark.parametrize(
    "file, before, after",
    [
        ("experiments/claims/x.py", "seed: int = 0", "seed: int = 1"),
        ("experiments/claims/x.py", "return norm.rvs", "return 2 * norm.rvs"),
        ("experiments/claims/x.py", "SAMPLES, TITLE = 100", "SAMPLES, TITLE = 200"),
        # named in a text alone
        ("experiments/claims/x.py", "class Mean(float)", "class Mean(int)"),
        # done whatever is used
        ("experiments/claims/x.py", "def draw", "np.random.seed(1)\ndef draw"),
        ("experiments/claims/x.py", "def draw", "Config.seed = 3\ndef draw"),
        ("experiments/claims/x.py", "interval(draw", "steps.step() * interval(draw"),
        ("experiments/claims/x.py", "def draw", "steps.step()\ndef draw"),
        ("experiments/report/evidence.py", "values * LEVEL", "values / LEVEL"),
        ("experiments/report/evidence.py", "0.99", "0.95"),
        ("experiments/engine/__init__.py", "", "import os\nos.environ['x'] = 'y'"),
        ("rnnattn/native/src/kernels.cc", "int", "long"),
    ],
)
def test_what_measures_is_in_the_key(file, before, after, root):
    was = key_of(root)
    if file == "experiments/engine/__init__.py":
        change(root / "experiments/claims/x.py", "interval(draw", "steps.step() * interval(draw")
        was = key_of(root)
    change(root / file, before, after)
    assert key_of(root) != was


def test_all_of_the_library_is_in_the_key_of_what_uses_it(root):
    was = key_of(root)
    change(root / "rnnattn/lstm.py", "1", "2")
    assert key_of(root) == was
    change(root / "experiments/claims/x.py", '"Noise."', "from rnnattn import lstm")
    used = key_of(root)
    change(root / "rnnattn/lstm.py", "def lstm", "def unused():\n    pass\ndef lstm")
    assert len({was, used, key_of(root)}) == 3


def test_versions_device_kernels_and_data_are_in_the_key(root, monkeypatch, tmp_path):
    file, folder = tmp_path / "images.npz", tmp_path / "idx"
    file.write_bytes(b"1")
    folder.mkdir()
    (folder / "labels").write_bytes(b"1")

    def keys() -> list[str]:
        return [key_of(root, data=SimpleNamespace(path=str(path))) for path in (file, folder)]

    found = [keys()]
    for changed in (file, folder / "labels"):
        changed.write_bytes(b"2")
        found.append(keys())
    assert found[0][0] != found[1][0] == found[2][0] and found[0][1] == found[1][1] != found[2][1]
    version = importlib.metadata.version

    def update(patch: pytest.MonkeyPatch, package: str) -> None:
        patch.setattr(
            importlib.metadata, "version", lambda name: version(name) + "0" * (name == package)
        )

    for package in ("scipy", "jaxlib"):
        with monkeypatch.context() as patch:
            update(patch, package)
            found.append(keys())
    with monkeypatch.context() as patch:
        patch.setattr(native, "status", lambda: "off")
        found.append(keys())
    with monkeypatch.context() as patch:
        gpu = SimpleNamespace(platform="gpu", device_kind="H100")
        patch.setattr("jax.devices", lambda: [gpu])
        found.append(keys())
    assert len({first for first, _ in found}) == 6
    # scikit-learn is no business of what does not import it
    update(monkeypatch, "scikit-learn")
    assert keys() == found[2]


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_the_code_of_a_run_is_all_that_it_uses():
    code = key.code_of(Path(attention_averaging.__file__), "run")
    names = {path.relative_to(key.ROOT).as_posix() for path in code.statements}
    assert {
        "experiments/claims/attention_averaging.py", "experiments/engine/session.py",
        "rnnattn/__init__.py", "rnnattn/attention/api.py", "rnnattn/attention/dense.py",
        "rnnattn/attention/equations.py",
    } <= names  # fmt: skip
    assert not names & {
        "experiments/report/page.py", "experiments/__main__.py", "experiments/figures.py",
        "experiments/report/evidence.py",
    }  # fmt: skip


def test_the_versions_of_a_run_are_of_all_that_it_imports():
    packages = key.code_of(Path(vit_resolution.__file__), "run").packages
    assert "mlxtend" in packages or not find_spec("mlxtend")  # which is optional
    needed = {"flax", "jax", "jaxlib", "numpy", "optax", "scikit-learn"}
    assert needed <= set(key._distributions(packages))
    assert "scipy" in key.code_of(Path(key_noise.__file__), "run").packages
