"""Problems drawn by chance, against peers: is there one at which ours is the slower?

    python benchmarks/sweep.py --seed 1 --what attention
    python benchmarks/sweep.py --seed 1 --what inference --count 20
    python benchmarks/sweep.py --seed 1 --what lstm gru --output benchmarks/results/NAME.json

Sizes are drawn from the ranges below, small ones as often as large ones, and drawn again where a
problem would take too long. Programs, checks and timing are those of `lstm.py`, `gru.py`,
`attention.py` and `inference.py`; the peer is torch, and in inference, the LSTM forward,
onnxruntime and OpenVINO. A seed says what is drawn: the same problems anywhere. The worst ten of
`lstm` and `attention` can be timed again there, by `--shapes`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention, gru, inference, lstm, timing

LSTM_SIZES = {"T": (1, 2000), "B": (1, 512), "D": (1, 512), "H": (16, 1024)}
ATTENTION_SIZES = {"B": (1, 64), "T": (1, 4096), "S": (1, 4096), "N": (1, 32), "K": (16, 256)}
# Multiply-adds of a forward pass, and numbers in the largest arrays: a problem of the one takes
# some hundred milliseconds to train on two cores.
MOST_WORK = 2**31
MOST_NUMBERS = 2**24


def draw_lstm(rng: np.random.Generator) -> tuple[int, ...]:
    """(T, B, D, H)."""
    while True:
        T, B, D, H = (_size(rng, *ends) for ends in LSTM_SIZES.values())
        if T * B * (D + H) * 4 * H <= MOST_WORK and T * B * (D + H) <= MOST_NUMBERS:
            return T, B, D, H


def draw_attention(rng: np.random.Generator) -> attention.Shape:
    """Self-attention, cross-attention or a step of decoding; causal, masked, grouped or not."""
    while True:
        B, T, S, N, K = (_size(rng, *ends) for ends in ATTENTION_SIZES.values())
        K = K // 8 * 8
        kind = rng.choice(["self", "cross", "decoding"], p=[0.4, 0.4, 0.2])
        heads = [m for m in range(1, N + 1) if N % m == 0]
        M = int(rng.choice(heads)) if rng.random() < 0.4 else N
        causal = bool(kind == "self" and rng.random() < 0.5)
        mask = bool(not causal and rng.random() < 0.3)
        if kind == "self":
            S = T
        if kind == "decoding":
            T = 1
        numbers = B * K * max(N * T, M * S)
        if S == 1:  # no weights to choose, and a gradient of rounding errors
            continue
        if B * N * T * S * K * 2 > MOST_WORK or numbers > MOST_NUMBERS:
            continue
        shape = attention.Shape(B, T, N, K, causal, mask=mask)
        return shape._replace(S=None if S == T else S, M=None if M == N else M)


def _size(rng, least, most):
    """A whole number, its logarithm evenly distributed."""
    return int(np.exp(rng.uniform(np.log(least), np.log(most + 1))))


class Benchmark(NamedTuple):
    """What is drawn, the benchmark that it is for, and whom ours is compared with."""

    draw: Callable[[np.random.Generator], Any]
    problem: Callable[..., Any]  # of a shape
    of: Any
    peers: dict[str, Callable[..., timing.Programs]]
    axes: str


def _make_lstm(shape, dtype):
    return lstm.make_problem(*shape, dtype=dtype)


def _make_gru(shape, dtype):
    return gru.make_problem(*shape, dtype=dtype)


AXES = "(T, B, D, H)"
BENCHMARKS = {
    "attention": Benchmark(
        draw_attention,
        attention.make_problem,
        attention,
        {"torch": attention.torch},
        "B, T, N, K, sees",
    ),
    "lstm": Benchmark(draw_lstm, _make_lstm, lstm, {"torch": lstm.torch}, AXES),
    "gru": Benchmark(draw_lstm, _make_gru, gru, {"torch": gru.torch}, AXES),
    "inference": Benchmark(draw_lstm, _make_lstm, inference, inference.PEERS, AXES),
}


def draw(what: str, seed: int, count: int) -> list[Any]:
    """The shapes of `count` problems."""
    rng = np.random.default_rng(seed)
    return [BENCHMARKS[what].draw(rng) for _ in range(count)]


def measure(what: str, seed: int, count: int, rounds: int, dtype: str) -> dict[str, Any]:
    """For each problem and kind, the time of each peer over ours."""
    _, make_problem, benchmark, peers, _ = BENCHMARKS[what]
    rows = []
    for shape in draw(what, seed, count):
        problem = make_problem(shape, dtype=dtype)
        programs = timing.build(benchmark.ours, peers, problem, f"({shape}) ")
        if len(programs) == 1:
            sys.exit("there is nothing to compare with")
        timing.check(programs, benchmark.outputs, dtype)
        rows.append({"shape": shape} | timing.compare(benchmark.KINDS, programs, rounds))
        ratios = (
            timing.show_ratio(rows[-1][kind][peer]["ratio"])
            for kind in benchmark.KINDS
            for peer in programs
            if peer != "ours"
        )
        print(f"  {shape!s:<40}", *ratios, flush=True)
    return timing.summarize(benchmark.KINDS, rows)


def show(what: str, speed: dict[str, Any]) -> None:
    """The distribution of each kind and peer, and the ten problems at which ours does worst."""
    of_peers = speed["geometric_mean"].items()
    for kind, peer, mean in ((kind, *item) for kind, means in of_peers for item in means.items()):
        ratio_of = lambda row, kind=kind, peer=peer: row[kind][peer]["ratio"]
        rows = sorted(speed["rows"], key=lambda row: ratio_of(row)["median"])
        ratios = [ratio_of(row)["median"] for row in rows]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if rows[1:] else ratios
        print(f"\n{what}, {kind}: time of {peer} / ours over {len(rows)} problems")
        print(f"  geometric mean {mean:.2f}, below 1: {sum(r < 1 for r in ratios)}")
        print("  quartiles", *(f"{q:.2f}" for q in quartiles), f"least {ratios[0]:.2f}")
        print(f"  the worst: {BENCHMARKS[what].axes}; ours in ms")
        for row in rows[:10]:
            milliseconds = row[kind]["ours"]["milliseconds"]
            print(f"  {row['shape']!s:<40}{milliseconds:>9.3f}  {timing.show_ratio(ratio_of(row))}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=timing.count, required=True)
    parser.add_argument("--what", nargs="+", choices=BENCHMARKS, default=["attention", "lstm"])
    parser.add_argument("--count", type=timing.count, default=40, help="problems of each")
    parser.add_argument("--rounds", type=timing.count, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=timing.new_file, help="a JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    packages = sorted({*attention.PACKAGES, *inference.PACKAGES, *lstm.PACKAGES})
    results: dict[str, Any] = {"machine": timing.machine(packages), "dtype": args.dtype}
    results |= {"seed": args.seed, "rounds": args.rounds}
    for what in args.what:
        of_seed = partial(measure, what, args.seed, args.count)
        results[what] = of_seed(args.rounds, args.dtype)
        show(what, results[what])
    if args.output:
        timing.write(args.output, results)


if __name__ == "__main__":
    main()
