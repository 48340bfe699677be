"""Where configs are found: `configs/tasks` and `configs/claims`, by the names of their files."""

import difflib
import os
from pathlib import Path

from experiments.engine.config import UsageError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def config_paths() -> dict[str, Path]:
    """The config files by name: those of tasks, then those of claims."""
    folders = (CONFIGS / "tasks", CONFIGS / "claims")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def find_config(path: Path) -> Path:
    """The config file that is meant: one at this path, or one of `configs/` of this name.

    Raises:
        UsageError: if it is a bare name that no config has; of a path, its reader tells.
    """
    # `os.path`, as a name may be too long for a file's
    if os.path.isfile(path) or len(path.parts) != 1 or path.suffix:
        return path
    paths = config_paths()
    if path.name in paths:
        return Path(os.path.relpath(paths[path.name]))
    if os.path.exists(path):
        return path
    near = difflib.get_close_matches(path.name[:200], paths, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m experiments list` has all"
    raise UsageError(f"{path}: no such config; {hint}")
