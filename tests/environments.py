"""Installs rnnattn beside other versions of Python and of jax, and sees that it works.

    python tests/environments.py            six environments
    python tests/environments.py --quick    two of them, the oldest and the newest; one wheel

In each, rnnattn is installed by `pip install .`; from a wheel that was built in another; and from
one whose kernels were built, against all advice, with the newest jaxlib, which an older one does
not take. The kernels are those that take the least time to build. However it comes, forward and
gradient have to be right and to export for all platforms, and either the kernels run, or the status
names the two versions that do not go together. The numbers are the greatest differences of value
and gradient from the plain twin's, in float32.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.12", "3.13")
JAX = ("0.10.0", "0.11.1", "newest")
ALL = [(python, jax) for python in PYTHONS for jax in JAX]
QUICK = [("3.12", "0.10.0"), ("3.13", "newest")]
HEADINGS = ("Python", "jax", "its FFI", "installed by", "built for", "kernels", "lstm", "attention")
LINE = "{:8}{:10}{:9}{:20}{:11}{:9}{:22}{}"


def main(quick):
    os.environ["RNNATTN_BUILD"] = "quick"
    wanted = QUICK if quick else ALL
    pythons = {version: find_python(version) for version in PYTHONS}
    for version, found in pythons.items():
        if found is None:
            print(f"no Python {version} here: its environments are left out")
    wanted = [(version, jax) for version, jax in wanted if pythons[version]]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = scratch / "sources"
        ignored = shutil.ignore_patterns(".*", "build", "outputs", "*.so", "*.egg-info")
        shutil.copytree(ROOT, sources, ignore=ignored)
        environments = [
            (version, make_environment(scratch / f"{version}-{jax}", pythons[version], jax))
            for version, jax in wanted
        ]
        newest = environments[-1][1]
        pip(newest, "install", "setuptools>=77")
        ways = {"wheel": make_wheel(newest, sources, scratch / "wheel")}
        if not quick:
            against_advice = make_wheel(newest, sources, scratch / "newest", "--no-build-isolation")
            ways |= {"pip install .": sources, "wheel of the newest": against_advice}
        print(LINE.format(*HEADINGS))
        for version, python in environments:
            for way, what in ways.items():
                pip(python, "uninstall", "--yes", "rnnattn")
                pip(python, "install", what)
                found = json.loads(run(python, "-P", __file__, "--probe", cwd=scratch))
                print(LINE.format(version, found["jax"], found["runs"], way, *found["results"]))


def find_python(version):
    """An interpreter of this version that runs, if there is one."""
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), *kept):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def make_environment(folder, python, jax):
    """The interpreter of a new one with this jax."""
    run(python, "-m", "venv", folder)
    own = folder / "bin/python"
    pip(own, "install", *(["jax"] if jax == "newest" else [f"jax=={jax}", f"jaxlib=={jax}"]))
    return own


def make_wheel(python, sources, folder, *options):
    pip(python, "wheel", "--no-deps", "--wheel-dir", folder, *options, sources)
    (wheel,) = folder.iterdir()
    return wheel


def pip(python, command, *arguments):
    run(python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments)


def run(*command, **options):
    """What the command prints; if it fails, the script ends with what it complained of."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def value_and_gradient(function, arguments):
    import jax
    import jax.numpy as jnp

    loss = lambda *x: jnp.sin(jax.tree.leaves(function(*x))[0]).sum()
    return function(*arguments), jax.grad(loss, range(len(arguments)))(*arguments)


def probe():
    """Within an environment: fails if something is not as it should be, and prints the facts."""
    import jax
    import jax.numpy as jnp

    import rnnattn
    from rnnattn import native

    kernels = import_module("rnnattn.native.kernels")
    assert not Path(rnnattn.__file__).is_relative_to(ROOT)
    assert jnp.ones(3).sum() == 3  # JAX itself
    status, built, runs = native.status(), kernels.ffi_version(), native.ffi_version()
    assert status.available == (built <= runs), status
    built, runs = (".".join(map(str, version)) for version in (built, runs))
    reason = status.reason or ""
    assert status.available or (built in reason and runs in reason), status

    params = rnnattn.init_lstm(jax.random.key(0), 8, 16)
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    q = jax.random.normal(jax.random.key(2), (2, 300, 2, 4))
    results = [built, "run" if status.available else "refused"]
    for name, arguments in (("lstm", (params, x)), ("dot_product_attention", (q, q + 1, q - 1))):
        ours, plain = (
            value_and_gradient(getattr(library, name), arguments)
            for library in (rnnattn, rnnattn.reference)
        )
        errors = [
            max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in zip(ours, plain, strict=True)
        ]
        assert max(errors) < 1e-5, (name, errors)
        results.append(", ".join(f"{error:.0e}" for error in errors))
        gradient = jax.jit(partial(value_and_gradient, getattr(rnnattn, name)))
        jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(arguments)
    print(json.dumps({"jax": jax.__version__, "runs": runs, "results": results}))


if __name__ == "__main__":
    if "--probe" in sys.argv:
        probe()
    else:
        main("--quick" in sys.argv)
