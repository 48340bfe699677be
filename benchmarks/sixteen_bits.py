"""What attention in bfloat16 loses: its errors, over those of exact results rounded once.

    python benchmarks/sixteen_bits.py

First the errors of ours, by the kernels and on XLA. Then, simulated in NumPy, what they would be if
the products with weights or dS were of pairs of bfloat16, and so the weights and dS rounded. Root
mean square / largest, one head, against float64.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn


class Case(NamedTuple):
    """Normal numbers, but for these. The last query stands at the last key."""

    T: int
    S: int
    K: int
    mean: float = 0  # of keys
    size: float = 1  # of queries and keys
    causal: bool = False


CASES = [
    Case(256, 256, 64),
    Case(256, 256, 64, causal=True),
    Case(1024, 1024, 64),
    Case(512, 512, 32, size=2),
    Case(256, 256, 64, mean=4),
    Case(256, 256, 64, mean=16),
    Case(16, 1000, 64),
    Case(1000, 16, 64),
]
NAMES = ("o", "dq", "dk", "dv")


def rounded(x):
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)


def draw(case):
    """q, k, v and dO, of bfloat16."""
    rng = np.random.default_rng(0)
    normal = lambda length: rng.normal(size=(length, case.K))
    q, k = normal(case.T) * case.size, normal(case.S) * case.size + case.mean
    return [rounded(x) for x in (q, k, normal(case.S), normal(case.T))]


def exact_and_in_pairs(case, q, k, v, do):
    """O, dq, dk and dv in float64; and as products of rounded weights and dS would give them."""
    scale = case.K**-0.5
    s = scale * q @ k.T
    if case.causal:
        s = np.where(np.tri(case.T, case.S, case.S - case.T, dtype=bool), s, -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    total = e.sum(-1, keepdims=True)
    p, dp = e / total, do @ v.T
    ds_of = lambda o: scale * p * (dp - (do * o).sum(-1, keepdims=True))
    o, o_in_pairs = p @ v, rounded(e) @ v / total
    ds = ds_of(o)
    exact = (o, ds @ k, ds.T @ q, p.T @ do)
    pairs = (o_in_pairs, rounded(ds) @ k, rounded(ds).T @ q, rounded(p).T @ do)
    return exact, pairs, ds_of(o_in_pairs) @ k


def ours(case, how, *arrays):
    q, k, v, do = (jnp.asarray(x, jnp.bfloat16)[None, :, None] for x in arrays)
    attend = lambda q, k, v: rnnattn.dot_product_attention(
        q, k, v, is_causal=case.causal, query_offset=case.S - case.T, implementation=how
    )
    o, pullback = jax.vjp(attend, q, k, v)
    return [np.asarray(x, np.float64)[0, :, 0] for x in (o, *pullback(do))]


def show(results, exact):
    """Each error over that of the exact result, rounded."""
    cells = []
    for x, right in zip(results, exact, strict=True):
        error, once = (np.abs(rounded(y) - right) for y in (x, right))
        rms = np.sqrt(np.mean(error**2) / np.mean(once**2))
        cells.append(f"{rms:6.2f} / {error.max() / once.max():.2f}")
    return "  ".join(f"{cell:>14}" for cell in cells)


def main():
    print(__doc__.splitlines()[0])
    print(" " * 16 + "  ".join(f"{name:>14}" for name in NAMES))
    for case in CASES:
        arrays = draw(case)
        exact, in_pairs, dq_of_o_in_pairs = exact_and_in_pairs(case, *arrays)
        print(case)
        for how in ("native", "xla"):
            print(f"  {how:<14}{show(ours(case, how, *arrays), exact)}")
        print(f"  {'in pairs':<14}{show(in_pairs, exact)}")
        print(f"  {'dq of that o':<14}{' ' * 16}{show([dq_of_o_in_pairs], exact[1:2])}")


if __name__ == "__main__":
    main()
