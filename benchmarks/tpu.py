"""What the kernels for TPUs should take: a prediction from what their compiler made, without a TPU.

    python -m benchmarks tpu
    python -m benchmarks tpu --chips v5e --what attention

It needs libtpu, which `make accelerators` installs. Programs are compiled to the end, and the
compiler is asked for the machine code of each kernel: bundles of instructions that run in the same
cycle. Those of a loop are what a turn of it takes, waits for results of the matrix unit included,
but not for memory. That is added as bytes over the published bandwidth of HBM, where it is longer;
what is not in a kernel, as the larger of FLOPs over the published rate and XLA's own count of bytes
over bandwidth. Nothing here was held against a TPU.
"""

import argparse
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Chip(NamedTuple):
    """As Google's pages of Cloud TPU have them, but for the clock.

    A v5e's clock follows from its rate: four units of 128 × 128 multiply and add. That of a v6e is
    an assumption: its two units of 256 × 256 then take two rows of 16 bits in a cycle.
    """

    clock: float
    bandwidth: float
    rate: float  # of products in bfloat16


CHIPS = {"v5e": Chip(1.5e9, 819e9, 197e12), "v6e": Chip(1.75e9, 1638e9, 918e12)}
STEPS, ROWS = 512, 128  # T and B of the LSTM
WIDTHS = (256, 512, 1024)
# B, T, N, K, and the keys to the left that a query sees, None for all
ATTENTION = [
    (8, 4096, 8, 64, True, None),
    (8, 4096, 8, 64, False, None),
    (8, 4096, 8, 128, True, None),
    (2, 16384, 8, 64, True, None),
    (2, 16384, 8, 64, True, 1024),
    (1, 16384, 32, 64, True, None),
]
_IDLE = 50  # cycles of a turn that does nothing: the scalar instructions around it


class Compiler:
    """Compiles for one chip, and reads what was made."""

    def __init__(self, name: str, folder: Path):
        from jax.experimental import topologies

        self.folder = folder
        shape = {"chips_per_host_bounds": [2, 2, 1]}
        self.device = topologies.get_topology_desc(f"{name}:2x2", "tpu", **shape).devices[0]

    def __call__(self, function, *arrays) -> tuple[Any, list[list[int]]]:
        """The program, and of each kernel, in their order, the bundles of loops by their depth."""
        import jax

        for path in self.folder.iterdir():
            path.unlink()
        place = jax.sharding.SingleDeviceSharding(self.device)
        there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        program = jax.jit(function).lower(*jax.tree.map(there, arrays)).compile()
        return program, [_loops(path.read_text()) for path in self._kernels()]

    def _kernels(self):
        for path in sorted(self.folder.glob("*-schedule-analysis_final_bundles.txt")):
            # the program as a whole names its kernels, too
            if "-TLP-" in path.name or '"tpu_custom_call"' not in path.read_text():
                continue
            of_kernel = re.sub(r"-\d+-schedule-analysis_final_bundles.txt$", "", path.name)
            (code,) = (
                p
                for p in self.folder.glob(f"{of_kernel}-*")
                if re.search(r"\d-final_bundles", p.name)
            )
            yield code


def _loops(code: str) -> list[int]:
    """The bundles of the longest loop of each depth, from the outermost on, without inner ones."""
    longest: dict[int, int] = {}
    running: dict[int, int] = {}
    for label, marks in re.findall(r"(?m)^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?: *(>*)", code):
        depth = len(marks)
        # some bundles have no marks behind a branch in a loop
        running[depth] = 1 if label == "LB" else running.get(depth, 0) + 1
        if depth:
            longest[depth] = max(longest.get(depth, 0), running[depth])
    return [longest[depth] for depth in sorted(longest)]


# ---- the LSTM -----------------------------------------------------------------------------------


def lstm(compiler: Compiler, chip: Chip) -> None:
    import jax
    import jax.numpy as jnp

    from rnnattn import init_lstm, lstm as run

    def forward(params, x):
        return run(params, x, time_major=True, implementation="pallas", residuals="states")[0]

    def training(params, x, dy):
        y, pullback = jax.vjp(forward, params, x)
        return y, *pullback(dy)

    print(
        f"\nThe LSTM in bfloat16, D = H, B {ROWS}, T {STEPS}: cycles of a step's loop, forward and "
        "back; μs of a step: both loops, and what XLA makes of all else in training, at most\n"
    )
    print("| H | cycles | share of the rate of a product | μs, loops | μs, all else |")
    print("|---|---:|---:|---:|---:|")
    for H in WIDTHS:
        array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        params = jax.eval_shape(lambda H=H: init_lstm(jax.random.key(0), H, H, dtype=jnp.bfloat16))
        x = array((STEPS, ROWS, H))
        program, loops = compiler(training, params, x, x)
        cycles = [of_kernel[-1] for of_kernel in loops]
        product = 2 * ROWS * H * 4 * H
        # forward x w_x; back both products again, both gradients of weights, and dx
        other = 6 * product / chip.rate
        chunks = STEPS / _steps_of_chunk(H)
        moved = program.cost_analysis()["bytes accessed"] * chunks / STEPS / chip.bandwidth
        seconds = [max(n / chip.clock, product / chip.rate) for n in cycles]
        share = [product / s / chip.rate for s in seconds]
        print(
            f"| {H} | {' / '.join(map(str, cycles))} | {' / '.join(f'{s:.0%}' for s in share)} | "
            f"{' / '.join(f'{1e6 * s:.2f}' for s in seconds)} | "
            f"{1e6 * max(other, moved):.1f} |",
            flush=True,
        )


def _steps_of_chunk(H: int) -> int:
    """Of a chunk: XLA counts what is in a loop once."""
    import jax
    import jax.numpy as jnp

    from rnnattn import init_lstm
    from rnnattn.recurrent import chunked
    from rnnattn.recurrent.arguments import time_major_steps
    from rnnattn.recurrent.problem import Options
    from rnnattn.recurrent.units.lstm import LSTM

    def length():
        params = init_lstm(jax.random.key(0), H, H, dtype=jnp.bfloat16)
        steps = time_major_steps(jnp.zeros((STEPS, ROWS, H), jnp.bfloat16), None, None, False)
        options = Options(LSTM(), False, "states")
        found.append(chunked.chunk_length(chunked.ELSEWHERE, options, params, steps))

    found: list[int] = []
    jax.eval_shape(length)
    return found[0]


# ---- attention ----------------------------------------------------------------------------------


def attention(compiler: Compiler, chip: Chip) -> None:
    print(
        "\nAttention in bfloat16: cycles of a turn of each kernel, with a tile of 512 queries and "
        "1024 keys that all see all / of which some do not; ms forward, and of the gradient, with "
        "the arrays' way into the layout of the kernels and back, at most; TFLOP/s in the kernels\n"
    )
    print("| B, T, N, K | cycles | ms, forward | TFLOP/s | ms, gradient | TFLOP/s |")
    print("|---|---:|---:|---:|---:|---:|")
    cycles: dict[int, list[tuple[int, int]]] = {}
    for B, T, N, K, causal, left in ATTENTION:
        if K not in cycles:
            cycles[K] = list(
                zip(_turns(compiler, K, False), _turns(compiler, K, True), strict=True)
            )
        of_heads = B * N
        whole, part, idle = _tiles(T, causal, left)
        kernels = [
            of_heads * _kernel_time(chip, K, taken, (whole, part, idle)) for taken in cycles[K]
        ]
        array = 2 * of_heads * T * K / chip.bandwidth
        # each array is read and written to change its layout: q, k, v, o; and also dO, dq, dk, dv
        around = 2 * 4 * array, 2 * 8 * array
        pairs = sum(min(t + 1, T if left is None else left + 1) if causal else T for t in range(T))
        shown = f"{B}, {T}, {N}, {K}, {'causal' if causal else 'full'}"
        shown += "" if left is None else f", window {left}"
        products = 2 * of_heads * pairs * K
        spent = kernels[0], sum(kernels[1:])
        print(
            f"| {shown} | {', '.join(f'{a} / {b}' for a, b in cycles[K])} | "
            f"{1e3 * (spent[0] + around[0]):.2f} | {2 * products / spent[0] / 1e12:.0f} | "
            f"{1e3 * (spent[1] + around[1]):.2f} | {5 * products / spent[1] / 1e12:.0f} |",
            flush=True,
        )


def _turns(compiler, K, masked):
    """The cycles of a turn of each kernel, of tiles that all see all, or some not."""
    import jax
    import jax.numpy as jnp

    from rnnattn import dot_product_attention

    def training(q, k, v, do):
        attend = partial(dot_product_attention, is_causal=masked, implementation="pallas")
        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    _, loops = compiler(training, *4 * [jax.ShapeDtypeStruct((1, 2048, 2, K), jnp.bfloat16)])
    return [sum(of_kernel) for of_kernel in loops]


def _tiles(T, causal, left):
    """How many pairs of tiles of a head all see all in, some do, and turns that do nothing."""
    from rnnattn.attention import tpu

    queries, keys = tpu.tiles(T, T)
    whole = part = most = 0
    for start in range(0, T, queries):
        of_tile = 0
        for first in range(0, T, keys):
            behind = causal and first > start + queries - 1
            before = left is not None and first + keys - 1 < start - left
            if behind or before:
                continue
            of_tile += 1
            all_see = not causal or first + keys - 1 <= start
            if all_see and (left is None or first >= start + queries - 1 - left):
                whole += 1
            else:
                part += 1
        most = max(most, of_tile)
    return whole, part, most * (T // queries) - whole - part


def _kernel_time(chip, K, cycles, counts):
    """Of a head: turns, or what they wait for."""
    from rnnattn.attention import tpu

    (of_whole, of_both), (whole, part, idle) = cycles, counts
    # a loop with a mask has both ways, of which a turn takes one
    taken = of_whole, of_both - of_whole if part else 0
    moved = 2 * tpu.MOST_KEYS * 2 * K / chip.bandwidth
    turns = [max(n / chip.clock, moved) for n in taken]
    return whole * turns[0] + part * turns[1] + idle * _IDLE / chip.clock


WHAT = {"lstm": lstm, "attention": attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no service is asked which TPU this machine has
    with tempfile.TemporaryDirectory() as folder:
        # before libtpu is there: what it is told it reads once
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = flags
        for name in args.chips:
            print(f"\n## {name}")
            for what in args.what:
                WHAT[what](Compiler(name, Path(folder)), CHIPS[name])


if __name__ == "__main__":
    main()
