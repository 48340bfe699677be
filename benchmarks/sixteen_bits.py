"""What bfloat16 loses: errors against float64, over those of exact results rounded once.

    python benchmarks/sixteen_bits.py
    python benchmarks/sixteen_bits.py lstm

Root mean square / largest. Of attention, one head, first the errors of ours, by the kernels and on
XLA; then, simulated in NumPy, what they would be if the products with weights or dS were of pairs
of bfloat16, and so the weights and dS rounded. Of the LSTM the gradients by the kernels and on XLA,
whose products are of float32; h is rounded in every step of both, and not in what is exact.
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
    sigma: float = 0  # of log-normal sizes of the numbers in keys and values
    columns: bool = False  # these are of columns


CASES = [
    Case(256, 256, 64),
    Case(256, 256, 64, causal=True),
    Case(1024, 1024, 64),
    Case(512, 512, 32, size=2),
    Case(256, 256, 64, mean=4),
    Case(256, 256, 64, mean=16),
    Case(16, 1000, 64),
    Case(1000, 16, 64),
    Case(256, 256, 64, sigma=1.5),
    Case(256, 256, 64, sigma=1, columns=True),
    Case(256, 256, 64, size=4, sigma=1, columns=True),
]
NAMES = ("o", "dq", "dk", "dv")


def rounded(x):
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)


def draw(case):
    """q, k, v and dO, of bfloat16."""
    rng = np.random.default_rng(0)
    normal = lambda length: rng.normal(size=(length, case.K))
    q, k = normal(case.T) * case.size, normal(case.S) * case.size + case.mean
    v, do = normal(case.S), normal(case.T)
    sizes = rng.lognormal(0, case.sigma, (1 if case.columns else case.S, case.K))
    return [rounded(x) for x in (q, k * sizes, v * sizes, do)]


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


# ---- the LSTM ---------------------------------------------------------------------------------

GRADIENTS = ("w_x", "w_h", "b", "x", "h", "c")
D, H = 32, 64


def lstm_cases():
    """By name: parameters, x, the state and the cotangents of y and the last state."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape)
    uneven = lambda sigma, *shape: rng.lognormal(0, sigma, shape) * normal(*shape)

    def case(T, B, x, w_x, w_h, b, dy):
        state = lambda: rnnattn.LSTMState(normal(B, H), normal(B, H))
        params = rnnattn.LSTMParams(w_x / D**0.5, w_h / H**0.5, b)
        return params, x, state(), (dy, state())

    remembers = np.repeat([0, 4, 0, 0], H)
    return {
        "normal": case(
            64, 8, normal(8, 64, D), normal(D, 4 * H), normal(H, 4 * H), normal(4 * H) / 2,
            normal(8, 64, H),
        ),
        "outliers": case(
            64, 8, uneven(2, 8, 64, D), uneven(1, D, 4 * H), uneven(1, H, 4 * H) / 2,
            normal(4 * H) / 2, uneven(2, 8, 64, H),
        ),
        "rare tokens": case(
            64, 8, np.eye(D)[np.minimum(rng.zipf(1.3, (8, 64)), D) - 1], D**0.5 * normal(D, 4 * H),
            normal(H, 4 * H), np.zeros(4 * H), normal(8, 64, H),
        ),
        "remembers": case(
            512, 4, normal(4, 512, D), normal(D, 4 * H), normal(H, 4 * H) / 2, remembers,
            np.zeros((4, 512, H)),
        ),
    }  # fmt: skip


def gradients(function, params, x, state, cotangents):
    return jax.jit(lambda *given: jax.vjp(function, *given)[1](cotangents))(params, x, state)


def show_lstm():
    print("the LSTM" + " " * 8 + "  ".join(f"{name:>14}" for name in GRADIENTS))
    for name, given in lstm_cases().items():
        print(name)
        given = jax.tree.map(rounded, given)
        with jax.enable_x64(True):
            exact = gradients(rnnattn.reference.lstm, *jax.tree.map(jnp.asarray, given))
            exact = jax.tree.leaves(jax.tree.map(np.asarray, exact))
        params, x, state, (dy, last) = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), given)
        in_float32 = lambda state: state._replace(c=state.c.astype(jnp.float32))
        narrow = params, x, in_float32(state), (dy, in_float32(last))
        for how in ("native", "xla"):
            run = lambda *given: rnnattn.lstm(*given, implementation=how)  # noqa: B023
            print(f"  {how:<14}{show(jax.tree.leaves(gradients(run, *narrow)), exact)}")


def main():
    print(__doc__.splitlines()[0])
    if sys.argv[1:] == ["lstm"]:
        return show_lstm()
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
