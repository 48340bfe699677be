"""Attention of packed sequences beside padded ones.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/packed.py
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/packed.py --T 4096 --rounds 15

Causal attention of some sequences forward and with its gradient, float32, on one thread: the least
processor time of a few calls, in turns, which other jobs disturb little. Sequences are of T tokens
each, or of lengths drawn from 1 to T. Beside `packed_attention` are the same sequences padded to T,
with their lengths as arguments, and padded without a word about it: a causal mask keeps a query
from the padding behind it, and what comes of the padding is thrown away. The ratio is the other's
time over that of the packed ones.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.linear import processor_seconds
from rnnattn import dot_product_attention, lengths_to_cu_seqlens, packed_attention
from rnnattn.native import calls


def packed(lengths, q, k, v):
    return packed_attention(q, k, v, lengths_to_cu_seqlens(lengths), is_causal=True)


def with_lengths(lengths, q, k, v):
    of_each = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return dot_product_attention(q, k, v, **of_each, is_causal=True)


def without_lengths(lengths, q, k, v):
    return dot_product_attention(q, k, v, is_causal=True)


def training(attend, lengths, q, k, v):
    loss = lambda *args: attend(lengths, *args).sum()
    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--T", type=timing.count, default=1024)
    parser.add_argument("--sequences", type=timing.count, default=8)
    parser.add_argument("--heads", type=timing.count, default=8)
    parser.add_argument("--width", type=timing.count, default=64)
    parser.add_argument("--rounds", type=timing.count, default=5)
    args = parser.parse_args()
    calls.threads = 1
    B, T = args.sequences, args.T
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
    print(f"{B} sequences of up to {T}, {args.heads} heads of width {args.width}: time over packed")
    for name, of_each in {
        "equal lengths": np.full(B, T),
        "drawn lengths": rng.integers(1, T + 1, B),
    }.items():
        lengths = jnp.asarray(of_each, jnp.int32)
        tokens = draw(of_each.sum(), args.heads, args.width)
        padded = draw(B, T, args.heads, args.width)
        arrays = {packed: tokens, with_lengths: padded, without_lengths: padded}
        for kind in ("forward", "training"):
            programs = {
                attend.__name__: timing.compiled(
                    attend if kind == "forward" else partial(training, attend), lengths, *x
                )
                for attend, x in arrays.items()
            }
            times = processor_seconds(programs, args.rounds)
            ours = times["packed"]
            shown = "  ".join(
                f"{other} {times[other] / ours:5.2f}" for other in times if other != "packed"
            )
            print(f"{name:<15}{kind:<9}{1e3 * ours:8.0f} ms  padded {shown}", flush=True)


if __name__ == "__main__":
    main()
