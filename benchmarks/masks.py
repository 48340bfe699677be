"""Masks and scores as functions beside what says the same without them.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/masks.py
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/masks.py --T 4096 --rounds 15

Attention forward and with its gradient, B 1, float32, on one thread: the least processor time of a
few calls, in turns, which other jobs disturb little. A row names a function and what it is compared
with: the ratio is the other's time over that by the function. Temporaries are those of the
gradient, in MiB.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.linear import processor_seconds
from rnnattn import dot_product_attention, masks
from rnnattn.native import calls


def pairs(T, N):
    """By name: the options by a function, and those without one."""
    slopes = masks.alibi_slopes(N)
    t = jnp.arange(T, dtype=jnp.int32)
    distance = jnp.abs(t[:, None] - t[None]).astype(jnp.float32)
    window = masks.window(255, 0) | masks.sinks(4)
    near = (t[:, None] - t[None] < 256) | (t[None] < 4)
    causal: dict[str, Any] = {"is_causal": True}
    as_mask = {"mask_function": masks.causal()}
    return {
        "causal, beside is_causal": (as_mask, causal),
        "prefix-LM, beside a mask": (
            {"mask_function": masks.causal() | masks.prefix(T // 8)},
            {"mask": (t[:, None] >= t[None]) | (t[None] < T // 8)},
        ),
        "window and sinks, beside a mask": (
            {"mask_function": masks.causal() & window},
            {"mask": near & (t[:, None] >= t[None])},
        ),
        "ALiBi, beside a bias": (
            {**as_mask, "score_function": masks.alibi(slopes)},
            {**causal, "bias": -slopes[:, None, None] * distance[None]},
        ),
        "T5, beside a bias, both constant": (
            {**as_mask, "score_function": masks.relative_bias(jnp.ones((32, N)))},
            {**causal, "bias": jnp.ones((N, T, T))},
        ),
    }


def forward(options, q, k, v):
    return dot_product_attention(q, k, v, **options)


def training(options, q, k, v):
    return jax.value_and_grad(lambda *args: forward(options, *args).sum(), (0, 1, 2))(q, k, v)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--T", type=timing.count, default=2048)
    parser.add_argument("--heads", type=timing.count, default=8)
    parser.add_argument("--width", type=timing.count, default=64)
    parser.add_argument("--rounds", type=timing.count, default=5)
    args = parser.parse_args()
    calls.threads = 1
    shape = (3, 1, args.T, args.heads, args.width)
    q, k, v = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    print(f"T {args.T}, {args.heads} heads of width {args.width}: the other's time over ours")
    for name, (ours, other) in pairs(args.T, args.heads).items():
        shown = []
        for run in (forward, training):
            programs = [timing.compiled(partial(run, of), q, k, v) for of in (ours, other)]
            times = processor_seconds(
                dict(zip(("ours", "other"), programs, strict=True)), args.rounds
            )
            shown.append(f"{times['other'] / times['ours']:5.2f} ({1e3 * times['ours']:.0f} ms)")
        memory = [
            timing.temporary_mebibytes(partial(training, of), q, k, v) for of in (ours, other)
        ]
        print(
            f"{name:<34}forward {shown[0]}  training {shown[1]}  "
            f"temporaries {memory[0]:.0f} beside {memory[1]:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
