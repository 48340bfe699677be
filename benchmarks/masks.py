"""Masks and scores as functions beside what says the same without them.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/masks.py
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/masks.py --T 4096 --rounds 15
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/masks.py --T 8192 --only map

Attention forward and with its gradient, B 1, float32, on one thread: the least processor time of a
few calls, in turns, which other jobs disturb little. A row names a function and what it is compared
with: the ratio is the other's time over that by the function. Temporaries are those of the
gradient, in MiB. Forward, torch's flex attention is another peer, compiled, which has no gradient
on a CPU; it has to be there, with a C++ compiler, and is left out with a note otherwise.
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
    """By name, made when they are asked for: the options by a function, and those without one."""
    slopes = masks.alibi_slopes(N)
    t = jnp.arange(T, dtype=jnp.int32)
    distance = lambda: jnp.abs(t[:, None] - t[None]).astype(jnp.float32)
    window = masks.window(255, 0) | masks.sinks(4)
    near = lambda: (t[:, None] - t[None] < 256) | (t[None] < 4)
    of_head = lambda b, n, t, s: (s <= t) & (t - s < 64 * (n + 1))
    causal: dict[str, Any] = {"is_causal": True}
    as_mask = {"mask_function": masks.causal()}
    return {
        "causal, beside is_causal": lambda: (as_mask, causal),
        "prefix-LM, beside a mask": lambda: (
            {"mask_function": masks.causal() | masks.prefix(T // 8)},
            {"mask": (t[:, None] >= t[None]) | (t[None] < T // 8)},
        ),
        "window and sinks, beside a mask": lambda: (
            {"mask_function": masks.causal() & window},
            {"mask": near() & (t[:, None] >= t[None])},
        ),
        "ALiBi, beside a bias": lambda: (
            {**as_mask, "score_function": masks.alibi(slopes)},
            {**causal, "bias": -slopes[:, None, None] * distance()[None]},
        ),
        "T5, beside a bias, both constant": lambda: (
            {**as_mask, "score_function": masks.relative_bias(jnp.ones((32, N)))},
            {**causal, "bias": jnp.ones((N, T, T))},
        ),
        "dilated, beside a mask": lambda: (
            {"mask_function": masks.causal() & masks.dilated(2)},
            {"mask": (t[:, None] >= t[None]) & ((t[:, None] - t[None]) % 2 == 0)},
        ),
        "window of each head, with a map": lambda: (
            {"mask_function": masks.mapped(of_head, T, T, heads=N)},
            {"mask_function": of_head},
        ),
    }


def flex(name, T, N, q, k, v):
    """The same of torch: a compiled function of a mask and a score for each pair."""
    import torch
    from torch.nn.attention import flex_attention

    torch.set_num_threads(1)
    slopes = timing.to_torch(torch, masks.alibi_slopes(N))
    places = masks.relative_bias(jnp.arange(32.0, dtype=jnp.float32)[:, None]).by_distance
    buckets = timing.to_torch(torch, places[:, 0].astype(jnp.int32))
    table, farthest = torch.ones(32, N), buckets.shape[0] // 2

    def relative(logit, b, n, t, s):
        return logit + table[buckets[torch.clamp(s - t, -farthest, farthest) + farthest], n]

    causal = lambda b, n, t, s: s <= t
    shown, score = {
        "causal": (causal, None),
        "prefix-LM": (lambda b, n, t, s: (s <= t) | (s < T // 8), None),
        "window and sinks": (lambda b, n, t, s: (s <= t) & ((t - s < 256) | (s < 4)), None),
        "ALiBi": (causal, lambda logit, b, n, t, s: logit - slopes[n] * (t - s).abs()),
        "T5": (causal, relative),
        "dilated": (lambda b, n, t, s: (s <= t) & ((t - s) % 2 == 0), None),
        "window of each head": (lambda b, n, t, s: (s <= t) & (t - s < 64 * (n + 1)), None),
    }[name.partition(",")[0]]
    blocks = flex_attention.create_block_mask(shown, None, N, T, T, device="cpu")
    arrays = [timing.to_torch(torch, jnp.moveaxis(x, 2, 1)) for x in (q, k, v)]
    attend = torch.compile(flex_attention.flex_attention, dynamic=False)

    def launch():
        with torch.no_grad():
            return attend(*arrays, score_mod=score, block_mask=blocks)

    return timing.Program(launch, wait=lambda out: out.transpose(1, 2))


def beside_flex(name, args, ours, arrays):
    """The time of flex attention over ours, forward; why there is none, where it fails."""
    try:
        program = flex(name, args.T, args.heads, *arrays)
        found = program.call().numpy()
    except Exception as error:  # whatever a compiler that is not there leads to
        return f"without flex: {type(error).__name__}"
    assert jnp.abs(jnp.asarray(found) - ours.call()).max() < 1e-4, "flex: another result"
    times = processor_seconds({"ours": ours, "flex": program}, args.rounds)
    return f"flex {times['flex'] / times['ours']:5.2f}"


def forward(options, q, k, v):
    return dot_product_attention(q, k, v, **options)


def training(options, q, k, v):
    return jax.value_and_grad(lambda *args: forward(options, *args).sum(), (0, 1, 2))(q, k, v)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--T", type=timing.count, default=2048)
    parser.add_argument("--heads", type=timing.count, default=8)
    parser.add_argument("--width", type=timing.count, default=64)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--rounds", type=timing.count, default=5)
    parser.add_argument("--peers", nargs="*", choices=["flex"], default=["flex"])
    args = parser.parse_args()
    calls.threads = 1
    shape = (3, 1, args.T, args.heads, args.width)
    q, k, v = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    print(f"T {args.T}, {args.heads} heads of width {args.width}: the other's time over ours")
    for name, make in pairs(args.T, args.heads).items():
        if args.only not in name:
            continue
        (ours, other), shown, beside = make(), [], ""
        for run in (forward, training):
            programs = [timing.compiled(partial(run, of), q, k, v) for of in (ours, other)]
            times = processor_seconds(
                dict(zip(("ours", "other"), programs, strict=True)), args.rounds
            )
            shown.append(f"{times['other'] / times['ours']:5.2f} ({1e3 * times['ours']:.0f} ms)")
            if run is forward and args.peers:
                beside = beside_flex(name, args, programs[0], (q, k, v))
        memory = [
            timing.temporary_mebibytes(partial(training, of), q, k, v) for of in (ours, other)
        ]
        print(
            f"{name:<34}forward {shown[0]}  training {shown[1]}  "
            f"temporaries {memory[0]:.0f} beside {memory[1]:.0f} MiB  {beside}",
            flush=True,
        )


if __name__ == "__main__":
    main()
