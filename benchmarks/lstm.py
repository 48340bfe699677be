"""rnnattn.lstm against its peers: time, temporary memory, and how time grows with length.

    python benchmarks/lstm.py --output benchmarks/results/NAME.json     the table of speeds
    python benchmarks/lstm.py --memory --linearity                      memory and growth instead

All programs get the same weights and inputs, time-major, and must agree before they are timed.
"forward" is y and the final state; "training" is y and the gradients with respect to x and all
weights, from a cotangent of y that is an argument. On a GPU, torch runs on it too.
"""

import sys
from collections.abc import Callable
from functools import partial
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


def jax_programs(apply: Callable, weights: Any, x: jax.Array, dy: jax.Array) -> timing.Programs:
    """`apply(weights, x)` returns (y, final state)."""

    def training(weights, x, dy):
        y, pullback, _ = jax.vjp(apply, weights, x, has_aux=True)
        return y, *pullback(dy)

    return {
        "forward": timing.compiled(apply, weights, x),
        "training": timing.compiled(training, weights, x, dy),
    }


def ours(problem: Problem, **options) -> timing.Programs:
    apply = lambda params, x: rnnattn.lstm(params, x, time_major=True, **options)
    return jax_programs(apply, *problem)


def reference(problem: Problem) -> timing.Programs:
    apply = lambda params, x: rnnattn.reference.lstm(params, x, time_major=True)
    return jax_programs(apply, *problem)


def flax(problem: Problem) -> timing.Programs:
    from flax import linen

    params, x, dy = problem
    cell = linen.OptimizedLSTMCell(dy.shape[-1], param_dtype=x.dtype)
    rnn = linen.RNN(cell, time_major=True, return_carry=True)
    weights = {"params": {"cell": jax.tree.map(jnp.asarray, interop.lstm_to_flax(params))}}
    return jax_programs(lambda w, x: rnn.apply(w, x)[::-1], weights, x, dy)


def nnx(problem: Problem) -> timing.Programs:
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


def haiku(problem: Problem) -> timing.Programs:
    import haiku as hk

    params, x, dy = problem

    def unroll(x):
        core = hk.LSTM(dy.shape[-1])
        state = jax.tree.map(lambda s: s.astype(x.dtype), core.initial_state(x.shape[1]))
        return hk.dynamic_unroll(core, x, state)

    apply = hk.without_apply_rng(hk.transform(unroll)).apply
    weights = {"lstm/linear": jax.tree.map(jnp.asarray, interop.lstm_to_haiku(params))}
    return jax_programs(apply, weights, x, dy)


def cudnn(problem: Problem) -> timing.Programs:
    """`jax.experimental.rnn.lstm`, which wants the batch first and float32."""
    from jax.experimental import rnn

    if jax.default_backend() != "gpu":
        raise timing.Unavailable("it needs a GPU")
    if problem.x.dtype != jnp.float32:
        raise timing.Unavailable("it needs float32")
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


def torch(problem: Problem, lengths: np.ndarray | None = None) -> timing.Programs:
    return torch_programs("LSTM", interop.lstm_to_torch(problem.params), problem, lengths)


def torch_programs(
    name: str, weights: dict[str, Any], problem: Any, lengths: np.ndarray | None = None
) -> timing.Programs:
    """Of a module of `torch.nn`. With `lengths`, what goes in and out is packed, and stays so."""
    import torch

    wait = timing.prepare_torch(torch)
    x, dy = timing.to_torch(torch, problem.x), timing.to_torch(torch, problem.dy)
    options: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    module = getattr(torch.nn, name)(problem.x.shape[-1], problem.dy.shape[-1], **options)
    tensor = lambda array: torch.tensor(np.asarray(array, np.float32))
    module.load_state_dict({key: tensor(value) for key, value in weights.items()})
    run = module
    if lengths is not None:
        pack = partial(
            torch.nn.utils.rnn.pack_padded_sequence,
            lengths=torch.tensor(lengths), enforce_sorted=False,
        )  # fmt: skip
        packed, dy = pack(x), pack(dy).data
        x = packed.data

        def run(x):
            y, state = module(packed._replace(data=x))
            return y.data, state

    leaf = x.clone().requires_grad_()
    leaves = [*module.parameters(), leaf]

    def forward():
        with torch.no_grad():
            return run(x)

    def training():
        y, _ = run(leaf)
        return y, *torch.autograd.grad(y, leaves, dy)

    program = partial(timing.Program, wait=wait)
    return {"forward": program(forward), "training": program(training)}


PEERS: dict[str, Callable[[Problem], timing.Programs]] = {
    "ours again": ours,
    "ours, gates": partial(ours, residuals="gates"),
    "ours, states": partial(ours, residuals="states"),
    "ours, xla": partial(ours, implementation="xla"),
    "reference": reference,
    "flax": flax,
    "nnx": nnx,
    "haiku": haiku,
    "torch": torch,
    "cudnn": cudnn,
}
DEFAULT_PEERS = [
    "ours again",
    "ours, states",
    "ours, xla",
    "reference",
    "flax",
    "haiku",
    "torch",
    "cudnn",
]


def outputs(programs: timing.Programs) -> dict[str, Any]:
    """What all peers must agree on: y, forward and in training, and the gradient of x."""
    (y, *_), (y_training, *_, dx) = (programs[kind].call() for kind in KINDS)
    return {"y": y, "y in training": y_training, "dx": dx}


# ---- what is measured -------------------------------------------------------------------------


def measure_speed(shapes, peers, rounds, dtype) -> dict[str, Any]:
    """For each shape and kind, the time of each peer over ours."""
    rows = []
    for shape in shapes:
        problem = make_problem(*shape, dtype=dtype)
        programs = timing.build(ours, {name: PEERS[name] for name in peers}, problem)
        timing.check(programs, outputs, dtype)
        rows.append({"shape": shape} | timing.compare(KINDS, programs, rounds))
        print(f"  {shape} done", flush=True)
    return timing.summarize(KINDS, rows)


def print_speed(speed):
    timing.print_ratios(speed, "(T, B, D, H)", 22)
    timing.print_trust_and_compilation(speed)


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

        mebibytes[name] = timing.temporary_mebibytes(gradient, *problem, dh, dc)
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
    shapes = {
        "type": lambda text: timing.counts(text, "T,B,D,H"),
        "default": SHAPES,
        "metavar": "T,B,D,H",
    }
    studies = {"memory": "temporary memory", "linearity": "time per step"}
    parser = timing.parser(__doc__.splitlines()[0], shapes, PEERS, DEFAULT_PEERS, studies)
    return parser.parse_args(argv)


def main():
    args = parse()
    timing.report(
        *(args, PACKAGES),
        speed=timing.Study(
            lambda: measure_speed(args.shapes, args.peers, args.rounds, args.dtype), print_speed
        ),
        memory=timing.Study(lambda: measure_memory(args.dtype), print_memory),
        linearity=timing.Study(lambda: measure_linearity(args.rounds, args.dtype), print_linearity),
    )


if __name__ == "__main__":
    main()
