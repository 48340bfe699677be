"""Programs for several devices of a CPU: time on XLA over time with the kernels.

    python benchmarks/devices.py
    python benchmarks/devices.py --count 4 --studies ring

"rows": the rows of a batch are divided, by automatic axes of a mesh or explicit ones, forward and
training. "ring": `rnnattn.parallel.ring_attention`, causal, of one sequence. Nothing is compared
but our own schedules, in one process and in turns.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from rnnattn import dot_product_attention, init_lstm, lstm, parallel
from rnnattn.attention import native

LSTM_SHAPES = [(28, 128, 28, 128), (128, 32, 128, 128), (100, 8, 64, 256)]
ATTENTION_SHAPES = [(8, 256, 8, 64, False), (4, 1024, 8, 64, True), (32, 64, 4, 32, False)]
RING_LENGTHS = [1024, 4096]
KINDS = ("forward", "training")


def _of_kind(kind, function):
    """The function, or its gradient from a cotangent of ones, with respect to all arguments."""

    def training(*args):
        y, pullback = jax.vjp(function, *args)
        return pullback(jnp.ones_like(y))

    return function if kind == "forward" else training


def _print_ratio(label, programs, rounds):
    """Of the programs "xla" and "ours"."""
    times = timing.measure(programs, rounds)
    show = timing.show_ratio(timing.ratio(times["xla"], times["ours"])._asdict())
    print(f"  {label:<56}{show}   ours {1e3 * float(np.median(times['ours'])):.2f} ms", flush=True)


def _lstm_problem(T, B, D, H, put):
    """What applies an implementation, and its arguments."""
    params = jax.tree.map(put, init_lstm(jax.random.key(0), D, H))
    x = put(jnp.ones((B, T, D), jnp.float32), "rows")
    return (lambda how: lambda params, x: lstm(params, x, implementation=how)[0]), (params, x)


def _attention_problem(B, T, N, K, causal, put):
    draw = lambda n: jax.random.normal(jax.random.key(n), (B, T, N, K), jnp.float32)
    attend = partial(dot_product_attention, is_causal=causal)
    args = tuple(put(draw(n), "rows") for n in range(3))
    return (lambda how: partial(attend, implementation=how)), args


def rows(count, rounds):
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((count,), ("rows",), (axis_type,))

        def put(x, *axes, mesh=mesh):
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

        problems: dict[str, Any] = {}
        for shape in LSTM_SHAPES:
            problems[f"LSTM {shape}"] = _lstm_problem(*shape, put)
        for *sizes, causal in ATTENTION_SHAPES:
            name = f"attention {(*sizes,)}{', causal' if causal else ''}"
            problems[name] = _attention_problem(*sizes, causal, put)
        for name, (make, args) in problems.items():
            for kind in KINDS:
                programs = {
                    label: timing.compiled(_of_kind(kind, make(how)), *args)
                    for label, how in (("ours", "native"), ("xla", "xla"))
                }
                _print_ratio(f"{name}, {axis_type.name}, {kind}", programs, rounds)


def ring(count, rounds):
    mesh = jax.make_mesh((count,), ("ring",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "ring"))
    attend = partial(parallel.ring_attention, mesh=mesh, axis_name="ring", is_causal=True)
    for T in RING_LENGTHS:
        draw = lambda n, heads, T=T: jax.device_put(
            jax.random.normal(jax.random.key(n), (1, T, heads, 64), jnp.float32), sharding
        )
        args = draw(0, 4), draw(1, 2), draw(2, 2)
        for kind in KINDS:
            programs = {}
            for label, forced in (("ours", native.unserved), ("xla", lambda *_: ["forced"])):
                jax.clear_caches()
                with mock.patch.object(native, "unserved", forced):
                    programs[label] = timing.compiled(_of_kind(kind, attend), *args)
            _print_ratio(
                f"ring of {count}, T {T}, 4 heads of 64, 2 of keys, {kind}", programs, rounds
            )


STUDIES = {"rows": rows, "ring": ring}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=timing.count, default=2, help="devices")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--rounds", type=timing.count, default=9)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.count)
    print(f"{args.count} devices: time on XLA / with the kernels")
    for name in args.studies:
        STUDIES[name](args.count, args.rounds)


if __name__ == "__main__":
    main()
