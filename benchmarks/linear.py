"""Linear recurrences: beside copies of what they must read and write, and the associative scan.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/linear.py
    python benchmarks/linear.py --shapes 8,4096,256 --dtype bfloat16 --what linear_scan rglru

Training, on one thread: value and gradient from a cotangent of y, the least processor time of a few
calls, which other jobs disturb little. "copies" are those of as many
bytes by `numpy.copyto` between arrays that are there: half of what is read and written, h and its
gradient forward and back. Of a unit they come beside the matrix products before the loop and in
their gradient, "products". "scan" is the same by `jax.lax.associative_scan` under JAX's own
differentiation.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn
from benchmarks import timing
from rnnattn.linear import equations
from rnnattn.native import calls

SHAPES = [(1, 65536, 128), (8, 4096, 256), (32, 512, 256), (1, 1024, 256)]
UNITS = {
    "linear_scan": equations.LINEAR,
    "mingru": equations.MINGRU,
    "minlstm": equations.MINLSTM,
    "rglru": equations.RGLRU,
}
# Arrays like h that training reads and writes: p and h forward; p, h, dh and dp in the gradient.
ARRAYS = {"linear_scan": 3 + 5, "mingru": 3 + 6, "minlstm": 4 + 8, "rglru": 4 + 8}


def arguments(name, B, T, H, dtype):
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape, dtype)
    if name == "linear_scan":
        return jax.nn.sigmoid(draw(0, B, T, H)), draw(1, B, T, H)
    key = jax.random.key(2)
    if name == "rglru":
        params: Any = rnnattn.init_rglru(key, H, num_blocks=max(H // 64, 1), dtype=dtype)
    else:
        params = getattr(rnnattn, f"init_{name}")(key, H, H, dtype=dtype)
    return params, draw(1, B, T, H)


def project(name, first, x):
    return UNITS[name].project(*(((), (first, x)) if name == "linear_scan" else (first, x)), None)


def associative(name, first, x):
    inputs, weights = project(name, first, x)
    p = equations.blocks_of(inputs, x.shape[-1])
    rows = [w[None, None] for w in weights]
    a, b = UNITS[name].coefficients(p, rows, None)
    of_pair = lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1])
    return jax.lax.associative_scan(of_pair, (a, b), axis=1)[1].astype(x.dtype)


def training(function, dy, *args):
    y, pullback = jax.vjp(function, *args)
    return y, pullback(dy)


def programs(name, B, T, H, dtype):
    args = arguments(name, B, T, H, dtype)
    run = getattr(rnnattn, name)

    def of(function):
        like = jax.eval_shape(function, *args)
        dy = jax.tree.map(lambda y: jnp.ones(y.shape, y.dtype), like)
        return timing.compiled(partial(training, function), dy, *args)

    source, target = (np.ones(ARRAYS[name] * B * T * H // 2, dtype) for _ in range(2))
    found = {
        "ours": of(lambda *args: run(*args)[0]),
        "ours, xla": of(lambda *args: run(*args, implementation="xla")[0]),
        "scan": of(partial(associative, name)),
        "copies": timing.Program(lambda: np.copyto(target, source), wait=lambda _: None),
    }
    if name != "linear_scan":
        found["products"] = of(lambda *args: project(name, *args)[0])
    return found


def processor_seconds(programs, rounds):
    """The least of each program, in turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program.call()
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.process_time()
            program.call()
            times[name].append(time.process_time() - start)
    return {name: min(each) for name, each in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=UNITS, default=list(UNITS))
    shape = partial(timing.counts, names="B,T,H")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=timing.count, default=9)
    args = parser.parse_args()
    calls.threads = 1
    print("training, ms of processor time; others over ours; ours over copies and products")
    for name in args.what:
        for B, T, H in args.shapes:
            times = processor_seconds(programs(name, B, T, H, args.dtype), args.rounds)
            ours, least = times["ours"], times["copies"] + times.get("products", 0)
            others = "  ".join(f"{of} {times[of] / ours:5.2f}" for of in ("ours, xla", "scan"))
            print(
                f"{name:<12}{(B, T, H)!s:<18}{1e3 * ours:9.2f}  {others}  "
                f"over the least {ours / least:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
