"""rnnattn.lstm against its peers: time, temporary memory, and how time grows with length.

    python benchmarks/lstm.py --output benchmarks/results/NAME.json     the table of speeds
    python benchmarks/lstm.py --memory --linearity                      memory and growth instead

All programs get the same weights and inputs, time-major, and must agree before they are timed.
"forward" is y and the final state; "training" is y and the gradients with respect to x and all
weights, from a cotangent of y that is an argument. On a GPU, torch runs on it too.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn
from benchmarks import timing
from rnnattn import interop

SHAPES = [
    (784, 64, 1, 128),
    (128, 32, 128, 128),
    (64, 64, 256, 512),
    (32, 256, 512, 512),
    (512, 1, 64, 64),
    (28, 128, 28, 128),
]
PACKAGES = ["jax", "jaxlib", "numpy", "torch", "flax", "dm-haiku"]
KINDS = ("forward", "training")


class Problem(NamedTuple):
    """Weights, inputs and the cotangent of y; x (T, B, D), dy (T, B, H)."""

    params: rnnattn.LSTMParams
    x: jax.Array
    dy: jax.Array


def make_problem(T, B, D, H, *, dtype) -> Problem:
    keys = jax.random.split(jax.random.key(0), 3)
    params = rnnattn.init_lstm(keys[0], D, H, recurrent_init="uniform", dtype=dtype)
    draw = lambda key, width: jax.random.normal(key, (T, B, width), jnp.float32).astype(dtype)
    return Problem(params, draw(keys[1], D), draw(keys[2], H))


# ---- the programs: forward and training of each peer ------------------------------------------
#
# A forward program returns y first; a training program y, and the gradient of x last.

Programs = dict[str, timing.Program]


class Unavailable(Exception):
    """This peer cannot run here."""


def jax_programs(apply: Callable, weights: Any, x: jax.Array, dy: jax.Array) -> Programs:
    """`apply(weights, x)` returns (y, final state)."""

    def training(weights, x, dy):
        y, pullback, _ = jax.vjp(apply, weights, x, has_aux=True)
        return y, *pullback(dy)

    return {
        "forward": timing.compiled(apply, weights, x),
        "training": timing.compiled(training, weights, x, dy),
    }


def ours(problem: Problem, residuals="states") -> Programs:
    apply = lambda params, x: rnnattn.lstm(params, x, time_major=True, residuals=residuals)
    return jax_programs(apply, *problem)


def ours_gates(problem: Problem) -> Programs:
    return ours(problem, "gates")


def reference(problem: Problem) -> Programs:
    apply = lambda params, x: rnnattn.reference.lstm(params, x, time_major=True)
    return jax_programs(apply, *problem)


def flax(problem: Problem) -> Programs:
    from flax import linen

    params, x, dy = problem
    cell = linen.OptimizedLSTMCell(dy.shape[-1], param_dtype=x.dtype)
    rnn = linen.RNN(cell, time_major=True, return_carry=True)
    weights = {"params": {"cell": jax.tree.map(jnp.asarray, interop.lstm_to_flax(params))}}
    return jax_programs(lambda w, x: rnn.apply(w, x)[::-1], weights, x, dy)


def nnx(problem: Problem) -> Programs:
    from flax import nnx

    params, x, dy = problem
    sizes = x.shape[-1], dy.shape[-1]
    cell = nnx.OptimizedLSTMCell(*sizes, param_dtype=x.dtype, rngs=nnx.Rngs(0))
    weights = jax.tree.map(jnp.asarray, interop.lstm_to_flax(params, "nnx_optimized"))
    nnx.update(cell, weights)
    rnn = nnx.RNN(cell, time_major=True, return_carry=True, rngs=nnx.Rngs(0))
    graph, weights, rest = nnx.split(rnn, nnx.Param, ...)
    zeros = jnp.zeros(dy.shape[1:], x.dtype)

    def apply(weights, x):
        carry, y = nnx.merge(graph, weights, rest)(x, initial_carry=(zeros, zeros))
        return y, carry

    return jax_programs(apply, weights, x, dy)


def haiku(problem: Problem) -> Programs:
    import haiku as hk

    params, x, dy = problem

    def unroll(x):
        core = hk.LSTM(dy.shape[-1])
        state = jax.tree.map(lambda s: s.astype(x.dtype), core.initial_state(x.shape[1]))
        return hk.dynamic_unroll(core, x, state)

    apply = hk.without_apply_rng(hk.transform(unroll)).apply
    weights = {"lstm/linear": jax.tree.map(jnp.asarray, interop.lstm_to_haiku(params))}
    return jax_programs(apply, weights, x, dy)


def cudnn(problem: Problem) -> Programs:
    """`jax.experimental.rnn.lstm`, which wants the batch first and float32."""
    from jax.experimental import rnn

    if jax.default_backend() != "gpu":
        raise Unavailable("it needs a GPU")
    if problem.x.dtype != jnp.float32:
        raise Unavailable("it needs float32")
    (T, B, D), H = problem.x.shape, problem.dy.shape[-1]
    weights = jnp.concatenate([w.ravel() for w in interop.lstm_to_torch(problem.params).values()])
    zeros, lengths = jnp.zeros((1, B, H)), jnp.full((B,), T, jnp.int32)

    def apply(weights, x):
        y, h, c = rnn.lstm(
            *(jnp.swapaxes(x, 0, 1), zeros, zeros, weights, lengths),
            **dict(input_size=D, hidden_size=H, num_layers=1, dropout=0.0, bidirectional=False),
        )
        return jnp.swapaxes(y, 0, 1), (h, c)

    return jax_programs(apply, weights, problem.x, problem.dy)


def torch(problem: Problem) -> Programs:
    import torch

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise Unavailable("this build of torch has no CUDA")
    torch.set_num_threads(timing.cores())
    options: dict[str, Any] = {
        "device": "cuda" if on_gpu else "cpu",
        "dtype": getattr(torch, problem.x.dtype.name),
    }
    tensor = lambda array: torch.tensor(np.asarray(array, np.float32), **options)
    module = torch.nn.LSTM(problem.x.shape[-1], problem.dy.shape[-1], **options)
    weights = interop.lstm_to_torch(problem.params)
    module.load_state_dict({key: tensor(value) for key, value in weights.items()})
    x, dy = tensor(problem.x), tensor(problem.dy)
    leaf = x.clone().requires_grad_()
    leaves = [*module.parameters(), leaf]
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def forward():
        with torch.no_grad():
            y, state = module(x)
        wait()
        return y, state

    def training():
        y, _ = module(leaf)
        gradients = torch.autograd.grad(y, leaves, dy)
        wait()
        return y, *gradients

    return {"forward": timing.Program(forward), "training": timing.Program(training)}


PEERS: dict[str, Callable[[Problem], Programs]] = {
    "ours again": ours,
    "ours, gates": ours_gates,
    "reference": reference,
    "flax": flax,
    "nnx": nnx,
    "haiku": haiku,
    "torch": torch,
    "cudnn": cudnn,
}
DEFAULT_PEERS = ["ours again", "ours, gates", "reference", "flax", "haiku", "torch", "cudnn"]


def build(peers, problem) -> dict[str, Programs]:
    """The programs of ours and of each peer that is installed."""
    programs = {"ours": ours(problem)}
    for name in peers:
        try:
            programs[name] = PEERS[name](problem)
        except (ImportError, Unavailable) as error:
            print(f"  without {name}: {error}")
    return programs


def check(programs, tolerance):
    """All must give the same y, forward and in training, and the same gradient of x."""

    def results(program):
        (y, *_), (y_training, *_, dx) = (program[kind].call() for kind in KINDS)
        array = lambda a: np.asarray(a.detach().float().cpu() if hasattr(a, "detach") else a)
        return {"y": array(y), "y in training": array(y_training), "dx": array(dx)}

    expected = results(programs["ours"])
    for name in programs:
        for what, actual in results(programs[name]).items():
            e = expected[what].astype(np.float32)
            error = np.max(np.abs(actual.astype(np.float32) - e)) / np.max(np.abs(e))
            if not error <= tolerance:
                raise AssertionError(f"{name}: {what} is {error:.1e} off, over {tolerance:.0e}")


# ---- what is measured -------------------------------------------------------------------------


def measure_speed(shapes, peers, rounds, dtype) -> dict[str, Any]:
    """For each shape and kind, the time of each peer over ours."""
    exact = dtype == "float32" and jax.default_backend() == "cpu"
    rows = []
    for shape in shapes:
        programs = build(peers, make_problem(*shape, dtype=dtype))
        check(programs, 1e-4 if exact else 3e-2)
        row: dict[str, Any] = {"shape": shape}
        for kind in KINDS:
            kinds = {name: program[kind] for name, program in programs.items()}
            times = timing.measure(kinds, rounds)
            row[kind] = {
                name: {
                    "ratio": timing.ratio(times[name], times["ours"])._asdict(),
                    "milliseconds": 1e3 * float(np.median(times[name])),
                    "compile_seconds": kinds[name].compile_seconds,
                }
                for name in kinds
            }
        rows.append(row)
        print(f"  {shape} done", flush=True)
    means = {}
    for kind in KINDS:
        names = dict.fromkeys(name for row in rows for name in row[kind] if name != "ours")
        means[kind] = {
            name: timing.geometric_mean(
                [row[kind][name]["ratio"]["median"] for row in rows if name in row[kind]]
            )
            for name in names
        }
    return {"rows": rows, "geometric_mean": means}


def print_speed(speed):
    for kind in KINDS:
        means = speed["geometric_mean"][kind]
        print(f"\n{kind}: time of the peer / ours, median [quartiles]; ours in ms")
        print(f"{'(T, B, D, H)':<22}{'ours':>9}" + "".join(f"{name:>19}" for name in means))
        for row in speed["rows"]:
            line = f"{row['shape']!s:<22}{row[kind]['ours']['milliseconds']:>9.2f}"
            for name in means:
                r = row[kind][name]["ratio"] if name in row[kind] else None
                cell = f"{r['median']:.2f} [{r['lower']:.2f}–{r['upper']:.2f}]" if r else "–"
                line += f"{cell:>19}"
            print(line)
        print(f"{'geometric mean':<31}" + "".join(f"{mean:>19.2f}" for mean in means.values()))
    copies = [
        row[k]["ours again"] for row in speed["rows"] for k in KINDS if "ours again" in row[k]
    ]
    worst = max((abs(copy["ratio"]["median"] - 1) for copy in copies), default=0.0)
    if worst > 0.03:
        print(
            f"\nNot to be trusted: the identical program is {worst:.0%} off; is the machine idle?"
        )
    print("\nseconds to compile, forward + training, summed over the shapes")
    for name in ("ours", *speed["geometric_mean"]["forward"]):
        cells = [row[kind][name] for row in speed["rows"] for kind in KINDS if name in row[kind]]
        seconds = [cell["compile_seconds"] for cell in cells]
        if None not in seconds:
            print(f"  {name:<12}{sum(seconds):6.1f}")


def measure_memory(dtype, T=4096, B=8, D=256, H=256) -> dict[str, Any]:
    """MiB of temporary memory of the whole gradient, as XLA plans it, for each `residuals`."""
    problem = make_problem(T, B, D, H, dtype=dtype)
    functions: dict[str, Callable] = {
        str(residuals): lambda p, x, r=residuals: rnnattn.lstm(p, x, time_major=True, residuals=r)
        for residuals in ("gates", "states", 64)
    }
    functions["reference"] = lambda p, x: rnnattn.reference.lstm(p, x, time_major=True)
    dh = dc = jnp.zeros((B, H), dtype)
    mebibytes = {}
    for name, function in functions.items():

        def gradient(params, x, dy, dh, dc, function=function):
            (_, state), pullback = jax.vjp(function, params, x)
            dstate = rnnattn.LSTMState(dh.astype(state.h.dtype), dc.astype(state.c.dtype))
            return pullback((dy, dstate))

        analysis = jax.jit(gradient).lower(*problem, dh, dc).compile().memory_analysis()
        if analysis is None:
            raise NotImplementedError("this backend does not say how much memory a program needs")
        mebibytes[name] = analysis.temp_size_in_bytes / 2**20
    return {"shape": (T, B, D, H), "mebibytes": mebibytes}


def print_memory(memory):
    sizes = memory["mebibytes"]
    print(f"\ntemporary memory of the gradient at (T, B, D, H) = {memory['shape']}")
    for name, size in sizes.items():
        print(f"  {name:<12}{size:9.1f} MiB   reference / this {sizes['reference'] / size:6.2f}")


def measure_linearity(rounds, dtype, B=8, D=128, H=128) -> dict[str, Any]:
    """Microseconds per step, from short sequences to long ones."""
    lengths = (64, 256, 1024, 4096, 16384)
    programs = {T: ours(make_problem(T, B, D, H, dtype=dtype)) for T in lengths}
    result: dict[str, Any] = {"shape": ("T", B, D, H)}
    for kind in KINDS:
        times = timing.measure({str(T): programs[T][kind] for T in lengths}, rounds)
        result[kind] = {T: 1e6 * float(np.median(each)) / int(T) for T, each in times.items()}
    return result


def print_linearity(linearity):
    print(f"\nmicroseconds per step at (T, B, D, H) = {linearity['shape']}")
    for kind in KINDS:
        steps = linearity[kind]
        cells = "".join(f"   T {T}: {time:.1f}" for T, time in steps.items())
        spread = max(steps.values()) / min(steps.values())
        print(f"  {kind:<9}{cells}   largest / smallest {spread:.2f}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = lambda text: tuple(int(n) for n in text.split(","))
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="T,B,D,H")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=DEFAULT_PEERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--memory", action="store_true", help="temporary memory, and no speeds")
    parser.add_argument("--linearity", action="store_true", help="time per step, and no speeds")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args(argv)


def main():
    args = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    machine = timing.machine(PACKAGES)
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    results: dict[str, Any] = {"machine": machine, "dtype": args.dtype, "rounds": args.rounds}
    if args.memory:
        results["memory"] = measure_memory(args.dtype)
        print_memory(results["memory"])
    if args.linearity:
        results["linearity"] = measure_linearity(args.rounds, args.dtype)
        print_linearity(results["linearity"])
    if not (args.memory or args.linearity):
        results["speed"] = measure_speed(args.shapes, args.peers, args.rounds, args.dtype)
        print_speed(results["speed"])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
