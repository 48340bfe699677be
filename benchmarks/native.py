"""The native kernels on a CPU: streaming, arithmetic, variants, networks, 16 bits, cores, costs.

And what inference could gain, and what rotary positions take before attention.

    python benchmarks/native.py --output benchmarks/results/NAME.json

How fast they are against peers, shape by shape, is for `lstm.py` and `attention.py`.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn
from benchmarks import attention, lstm, sweep, timing
from rnnattn import interop, native
from rnnattn.native import calls, load

PACKAGES = ["jax", "jaxlib", "numpy", "torch"]


# ---- one row, step by step ---------------------------------------------------------------------


def measure_streaming(rounds, D=256, H=256, T=256) -> dict[str, Any]:
    """`lstm_step` in a jitted loop over one row's steps; torch's LSTMCell in a loop of Python."""
    params, x, _ = lstm.make_problem(T, 1, D, H, dtype="float32")
    zeros = jnp.zeros((1, H))

    # `lstm_step` takes what is the faster; a step of `lstm` can be told
    steps = {
        "ours": lambda params, x, state: rnnattn.lstm_step(params, x, state),
        "ours, xla": lambda params, x, state: rnnattn.lstm(
            params, x[:, None], state, implementation="xla"
        )[1],
    }

    def loop(step):
        def run(params, x):
            start = rnnattn.LSTMState(zeros, zeros)
            return jax.lax.scan(lambda state, x: (step(params, x, state), None), start, x)[0]

        return timing.compiled(run, params, x)

    programs = {name: loop(step) for name, step in steps.items()}
    try:
        programs["torch"] = _cell_of_torch(params, x)
    except ImportError as error:
        print(f"  without torch: {error}")
    h = [np.asarray(program.call()[0]) for program in programs.values()]
    for other in h[1:]:
        np.testing.assert_allclose(other, h[0], atol=1e-4)
    times = timing.measure(programs, rounds)
    return {
        "shape": (1, D, H),
        "microseconds": {name: 1e6 * float(np.median(t)) / T for name, t in times.items()},
        "ratio": {
            name: timing.ratio(times[name], times["ours"])._asdict()
            for name in times
            if name != "ours"
        },
    }


def _cell_of_torch(params, x) -> timing.Program:
    import torch

    timing.prepare_torch(torch)
    cell = torch.nn.LSTMCell(x.shape[-1], params.w_h.shape[0])
    weights = interop.lstm_to_torch(params)
    cell.load_state_dict(
        {key.removesuffix("_l0"): torch.tensor(np.asarray(value)) for key, value in weights.items()}
    )
    steps = torch.tensor(np.asarray(x))
    zeros = torch.zeros(1, params.w_h.shape[0])

    def run():
        state = (zeros, zeros)
        with torch.no_grad():
            for step in steps:
                state = cell(step, state)
        return state

    return timing.Program(run)


def print_streaming(streaming):
    print(f"\none row, step by step, (B, D, H) = {streaming['shape']}: time / ours")
    for name, r in streaming["ratio"].items():
        print(
            f"  {name:<12}{timing.show_ratio(r)}   {streaming['microseconds'][name]:.1f} μs a step,"
            f" ours {streaming['microseconds']['ours']:.1f}"
        )


# ---- the rate of arithmetic --------------------------------------------------------------------


def measure_rates(rounds, size=2048) -> dict[str, Any]:
    """GFLOP/s of training, and of a matrix product in the same rounds.

    "Needed" counts the products that any gradient needs; "done", those that `lstm` with
    "states" and attention compute again as well.
    """
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = timing.compiled(jnp.matmul, matrix, matrix)
    cases: dict[str, tuple[timing.Program, float, float]] = {}
    for T, B, D, H in ((64, 64, 256, 512), (32, 256, 512, 512)):
        one = 2.0 * T * B * (D + H) * 4 * H
        problem, name = lstm.make_problem(T, B, D, H, dtype="float32"), f"lstm ({T}, {B}, {D}, {H})"
        states = lstm.ours(problem, residuals="states")["training"]
        cases[name] = (states, 3 * one, 4 * one)
        gates = lstm.ours(problem, residuals="gates")["training"]
        cases[f"{name}, gates"] = (gates, 3 * one, 3 * one)
    for causal in (False, True):
        shape = attention.Shape(1, 4096, 8, 64, causal)
        one = 2.0 * shape.logits * shape.K * (0.5 if causal else 1.0)
        gradient = attention.ours(attention.make_problem(shape, dtype="float32"))["gradient"]
        cases[f"attention ({shape})"] = (gradient, 6 * one, 7 * one)
    rows = {}
    for name, (program, needed, done) in cases.items():
        times = timing.measure({"product": product, name: program}, rounds)
        rate = 2.0 * size**3 / np.array(times["product"])
        share = lambda flops, rate=rate, t=times[name]: float(np.median(flops / np.array(t) / rate))
        rows[name] = {
            "milliseconds": 1e3 * float(np.median(times[name])),
            "product_gflops": float(np.median(rate)) / 1e9,
            "share_needed": share(needed),
            "share_done": share(done),
        }
    return rows


def print_rates(rates):
    print(
        "\nrate of arithmetic over that of a matrix product; of what is needed, and of what is done"
    )
    for name, row in rates.items():
        print(
            f"  {name:<34}{row['milliseconds']:9.1f} ms   needed {row['share_needed']:.2f}"
            f"   done {row['share_done']:.2f}   (product {row['product_gflops']:.0f} GFLOP/s)"
        )


# ---- what inference could gain -----------------------------------------------------------------


def measure_inference(rounds, seeds=(1, 5, 21), count=20) -> dict[str, Any]:
    """The time of its products alone over that of the LSTM forward, of problems of the sweep.

    The products are one, of all steps: as if nothing were recurrent.
    """
    rows = {}
    for shape in (shape for seed in seeds for shape in sweep.draw("inference", seed, count)):
        T, B, D, H = shape
        problem = lstm.make_problem(*shape, dtype="float32")
        operands = jnp.zeros((T * B, D + H), jnp.float32), jnp.zeros((D + H, 4 * H), jnp.float32)
        products = timing.compiled(jnp.matmul, *operands)
        times = timing.measure(
            {"ours": lstm.ours(problem)["forward"], "products": products}, rounds
        )
        share = timing.ratio(times["products"], times["ours"])._asdict()
        milliseconds = {name: 1e3 * float(np.median(t)) for name, t in times.items()}
        rows[f"{shape}"] = {"share": share, "milliseconds": milliseconds}
    return rows


def print_inference(rows):
    print("\ntime of the products alone, as one, / of the LSTM forward")
    for shape, row in rows.items():
        milliseconds = row["milliseconds"]["ours"]
        print(f"  {shape:<28}{timing.show_ratio(row['share'])}   {milliseconds:.3f} ms")
    mean = timing.geometric_mean([row["share"]["median"] for row in rows.values()])
    print(f"  geometric mean {mean:.2f}")


# ---- variants of the LSTM ----------------------------------------------------------------------

# Weights and options that change the cell.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "peepholes": ({"peephole": True}, {}),
    "clip": ({}, {"clip": 1.0}),
    "coupled": ({}, {"coupled": True}),
    "projection to H / 2": ({"narrowing": 2}, {}),
    "projection to H / 4": ({"narrowing": 4}, {}),
}


def measure_variants(rounds) -> dict[str, Any]:
    """Time of the plain LSTM over that of each variant, forward and training."""
    rows = {}
    for T, B, D, H in ((128, 32, 128, 128), (64, 64, 256, 256), (64, 1, 512, 512)):
        programs: dict[str, dict[str, timing.Program]] = {kind: {} for kind in lstm.KINDS}
        for name, (weights, options) in VARIANTS.items():
            made = lstm.ours(_problem_of_variant(T, B, D, H, **weights), **options)
            for kind, program in made.items():
                programs[kind][name] = program
        for kind in lstm.KINDS:
            times = timing.measure(programs[kind], rounds)
            rows[f"({T}, {B}, {D}, {H}), {kind}"] = {
                name: timing.ratio(times["plain"], t)._asdict() for name, t in times.items()
            }
    return rows


def _problem_of_variant(T, B, D, H, peephole=False, narrowing=1) -> lstm.Problem:
    R = H // narrowing
    params, x, dy = lstm.make_problem(T, B, D, H, dtype="float32")
    keys = jax.random.split(jax.random.key(1), 2)
    if peephole:
        params = params._replace(peephole=jax.random.normal(keys[0], (3, H), jnp.float32) / 8)
    if R < H:
        projection = jax.random.normal(keys[1], (H, R), jnp.float32) / H**0.5
        params = params._replace(w_h=params.w_h[:R], projection=projection)
    return lstm.Problem(params, x, dy[..., :R])


def print_variants(rows):
    print("\nvariants of the LSTM: time of the plain one / theirs")
    for shape, ratios in rows.items():
        print(f"  {shape}")
        for name, r in ratios.items():
            print(f"    {name:<22}{timing.show_ratio(r)}")


# ---- bfloat16, by how it is multiplied ---------------------------------------------------------


def measure_bfloat16(rounds) -> dict[str, Any]:
    """Time of float32 over that of bfloat16, by each instruction set that multiplies it."""
    of_lstm = [(64, 64, 256, 512), (128, 32, 128, 128), (50, 4, 256, 512)]
    of_attention = [
        attention.Shape(2, 1024, 8, 64, True),
        attention.Shape(4, 256, 8, 64, False),
        attention.Shape(1, 2048, 4, 128, True),
    ]
    problems: dict[str, tuple[Any, Any]] = {
        f"lstm {shape}": (lstm.ours, partial(lstm.make_problem, *shape)) for shape in of_lstm
    } | {
        f"attention {shape}": (attention.ours, partial(attention.make_problem, shape))
        for shape in of_attention
    }
    rows = {}
    for name, (ours, make_problem) in problems.items():
        programs = {"float32": ours(make_problem(dtype="float32"))}
        for how in load.found()[1]:
            if "_" in how:
                with mock.patch.object(calls, "instruction_set", how):
                    jax.clear_caches()
                    programs[how] = ours(make_problem(dtype="bfloat16"))
        for kind in programs["float32"]:
            times = timing.measure({how: made[kind] for how, made in programs.items()}, rounds)
            wide = times.pop("float32")
            rows[f"{name}, {kind}"] = {
                how: timing.ratio(wide, t)._asdict() for how, t in times.items()
            }
    return rows


def print_bfloat16(rows):
    print("\ntime in float32 / in bfloat16")
    for shape, ratios in rows.items():
        print(f"  {shape}")
        for how, r in ratios.items():
            print(f"    {how:<22}{timing.show_ratio(r)}")


# ---- several networks --------------------------------------------------------------------------

NETWORKS = [
    (A, T, B, H) for A in (2, 32) for T in (10, 100) for B in (1, 16) for H in (16, 64, 256)
]
MOST_PRODUCTS = 2**28  # of a forward pass


def measure_networks(rounds) -> dict[str, Any]:
    """Time of XLA's batch over ours, training A networks at once by `jax.vmap`, D = H."""
    rows = {}
    for A, T, B, H in NETWORKS:
        if A * T * B * 8 * H * H > MOST_PRODUCTS:
            continue
        init = lambda key, H=H: rnnattn.init_lstm(key, H, H, recurrent_init="uniform")
        params = jax.vmap(init)(jax.random.split(jax.random.key(0), A))
        x = jax.random.normal(jax.random.key(1), (A, B, T, H), jnp.float32)

        def training(params, x, how):
            loss = lambda params, x: jnp.sum(rnnattn.lstm(params, x, implementation=how)[0] ** 2)
            return jax.vmap(jax.grad(loss, (0, 1)))(params, x)

        programs = {
            name: timing.compiled(lambda p, x, how=how: training(p, x, how), params, x)
            for name, how in (("ours", None), ("ours, xla", "xla"))
        }
        times = timing.measure(programs, rounds)
        name = f"{A} of T {T}, B {B}, H {H}"
        rows[name] = timing.ratio(times["ours, xla"], times["ours"])._asdict()
    return rows


def print_networks(rows):
    print("\nseveral LSTMs by vmap, training: time of XLA's batch / ours")
    for name, r in rows.items():
        print(f"  {name:<28}{timing.show_ratio(r)}")


# ---- rotary positions --------------------------------------------------------------------------

ROPE_SHAPES = [
    attention.Shape(8, 256, 8, 64, False),
    attention.Shape(4, 1024, 8, 64, True),
    attention.Shape(1, 1024, 32, 128, False),
]


def measure_rope(rounds) -> dict[str, Any]:
    """The share of `rope` of q and k in what it and attention take, forward and gradient."""
    rows = {}
    for shape in ROPE_SHAPES:
        problem = attention.make_problem(shape, dtype="float32")
        *operands, do = problem.arrays
        attend = lambda q, k, v, shape=shape: rnnattn.dot_product_attention(
            q, k, v, **shape.options
        )
        positions = jnp.arange(shape.T, dtype=jnp.int32)
        roped = lambda q, k, v, attend=attend, at=positions: attend(
            rnnattn.rope(q, at), rnnattn.rope(k, at), v
        )
        for kind in attention.KINDS:
            programs = {}
            for name, apply in (("bare", attend), ("roped", roped)):
                if kind == "forward":
                    programs[name] = timing.compiled(apply, *operands)
                else:
                    programs[name] = timing.compiled(attention.gradient_of(apply), *operands, do)
            times = timing.measure(programs, rounds)
            bare, with_rope = np.array(times["bare"]), np.array(times["roped"])
            rows[f"({shape}), {kind}"] = float(np.median(1 - bare / with_rope))
    return rows


def print_rope(rows):
    print("\nshare of rope in rope and attention")
    for name, share in rows.items():
        print(f"  {name:<40}{100 * share:5.1f} %")


# ---- cores -------------------------------------------------------------------------------------


def measure_cores(rounds, T=8192) -> dict[str, Any]:
    """One thread's time over that of all, of the gradient of attention with one head and sequence.

    A thread that waits for another may be busy waiting, so the time of processors says nothing.
    """
    shape = attention.Shape(1, T, 1, 64)
    problem = attention.make_problem(shape, dtype="float32")
    programs = {"ours": attention.ours(problem)["gradient"]}
    with mock.patch.object(calls, "threads", 1):
        jax.clear_caches()
        programs["ours, one thread"] = attention.ours(problem)["gradient"]
    try:
        programs |= _threads_of_torch(problem)
    except ImportError as error:
        print(f"  without torch: {error}")
    times = timing.measure(programs, rounds)
    speed_up = {
        name: timing.ratio(times[f"{name}, one thread"], times[name])._asdict()
        for name in ("ours", "torch")
        if name in times
    }
    return {"shape": shape, "speed_up": speed_up} | {
        "milliseconds": {name: 1e3 * float(np.median(t)) for name, t in times.items()}
    }


def _threads_of_torch(problem) -> dict[str, timing.Program]:
    import torch

    gradient = attention.torch(problem)["gradient"].call

    def with_threads(number):
        def call():
            torch.set_num_threads(number)
            return gradient()

        return timing.Program(call)

    return {"torch": with_threads(timing.cores()), "torch, one thread": with_threads(1)}


def print_cores(cores):
    print(f"\none thread's time / all threads', gradient of attention ({cores['shape']})")
    for name, speed_up in cores["speed_up"].items():
        print(f"  {name:<12}{timing.show_ratio(speed_up)}   {cores['milliseconds'][name]:.1f} ms")


# ---- what they cost ----------------------------------------------------------------------------


def measure_cost(rounds) -> dict[str, Any]:
    """What the kernels add to `import rnnattn` and take at first use, and the extension's size."""
    imports, loads = [], []
    for _ in range(rounds):
        log = _python("-X", "importtime", "-c", "import rnnattn").stderr
        own = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+rnnattn\.native[\w.]*$", log, re.M)
        imports.append(sum(map(int, own)) / 1e3)
        code = (
            "import time, rnnattn.native, jax; jax.devices(); t = time.perf_counter();"
            "rnnattn.native.status(); print(1e3 * (time.perf_counter() - t))"
        )
        loads.append(float(_python("-c", code).stdout))
    from rnnattn.native import kernels

    return {
        "import_milliseconds": float(np.median(imports)),
        "first_use_milliseconds": float(np.median(loads)),
        "megabytes": Path(kernels.__file__).stat().st_size / 1e6,
    }


def _python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def print_cost(cost):
    print(
        f"\nimport rnnattn: {cost['import_milliseconds']:.1f} ms for the modules of the kernels;"
        f" first use {cost['first_use_milliseconds']:.1f} ms; extension {cost['megabytes']:.2f} MB"
    )


STUDIES: dict[str, tuple[Callable[[int], Any], Callable[[Any], None]]] = {
    "streaming": (measure_streaming, print_streaming),
    "rates": (measure_rates, print_rates),
    "inference": (measure_inference, print_inference),
    "variants": (measure_variants, print_variants),
    "bfloat16": (measure_bfloat16, print_bfloat16),
    "networks": (measure_networks, print_networks),
    "rope": (measure_rope, print_rope),
    "cores": (measure_cores, print_cores),
    "cost": (measure_cost, print_cost),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--rounds", type=timing.count, default=9)
    parser.add_argument("--output", type=timing.new_file, help="a JSON file for the results")
    args = parser.parse_args()
    status = native.status()
    if not status.available:
        sys.exit(f"there are no native kernels here: {status.reason}")
    print(f"instruction set: {status.instruction_set}")
    results: dict[str, Any] = {"machine": timing.machine(PACKAGES)}
    for name in args.studies:
        measure, show = STUDIES[name]
        results[name] = measure(args.rounds)
        show(results[name])
    if args.output:
        timing.write(args.output, results)


if __name__ == "__main__":
    main()
