"""A step of decoding from a cache in pages, against the same step from a dense cache.

    python benchmarks/decoding.py --rounds 15

Rows have ragged lengths, drawn up to S, and pages lie in no order. "attention" is that of one query
of each row to all that the row has; "step" stores a token of each row as well, in a loop of 16
steps, as decoding does. Both caches have room for S tokens of each row.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from rnnattn import (
    KVCache,
    PagedCache,
    append,
    dot_product_attention,
    init_paged_cache,
    paged_attention,
    update_cache,
)

SHAPES = [(8, 4096, 8, 8, 64), (8, 4096, 8, 2, 128)]
KINDS = ("attention", "step")
PACKAGES = ["jax", "jaxlib", "numpy"]
PAGE, STEPS = 64, 16


class Problem(NamedTuple):
    query: jax.Array  # (steps, B, 1, N, K)
    token: jax.Array  # (steps, B, 1, M, K)
    dense: KVCache
    paged: PagedCache


def make_problem(B, S, N, M, K, *, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    lengths = jnp.asarray(rng.integers(1, S - STEPS, size=B), jnp.int32)
    key, value, of_row = draw(B, S, M, K), draw(B, S, M, K), -(-S // PAGE)
    paged = init_paged_cache(
        B,
        pages=B * of_row,
        page_size=PAGE,
        pages_per_row=of_row,
        num_heads=M,
        key_size=K,
        dtype=dtype,
    )
    paged = append(paged, key, value, lengths)
    order = jnp.asarray(rng.permutation(B * of_row), jnp.int32)  # page p goes to order[p]
    moved = lambda pages: jnp.zeros_like(pages).at[order].set(pages)
    paged = paged._replace(key=moved(paged.key), value=moved(paged.value), table=order[paged.table])
    return Problem(
        draw(STEPS, B, 1, N, K), draw(STEPS, B, 1, M, K), KVCache(key, value, lengths), paged
    )


def programs(grow, attend, cache, problem):
    def steps(cache, query, token):
        def step(cache, x):
            cache = grow(cache, x[1], x[1])
            return cache, attend(x[0], cache)

        return jax.lax.scan(step, cache, (query, token))[1]

    return {
        "attention": timing.compiled(attend, problem.query[0], cache),
        "step": timing.compiled(steps, cache, problem.query, problem.token),
    }


def paged(problem, **how):
    return programs(append, partial(paged_attention, **how), problem.paged, problem)


def dense(problem):
    def attend(query, cache):
        key, value, length = cache
        return dot_product_attention(query, key, value, is_causal=True, query_offset=length - 1)

    return programs(update_cache, attend, problem.dense, problem)


PEERS: dict[str, Any] = {
    "ours again": paged,
    "dense": dense,
    "ours, xla": partial(paged, implementation="xla"),
}


def outputs(programs):
    return {kind: programs[kind].call() for kind in KINDS}


def measure_speed(shapes, peers, rounds, dtype):
    def programs_of(shape):
        problem = make_problem(*shape, dtype=dtype)
        programs = timing.build(paged, {name: PEERS[name] for name in peers}, problem)
        timing.check(programs, outputs, dtype)
        return programs

    return timing.table(KINDS, shapes, programs_of, rounds)


def main():
    about = (__doc__, "B,S,N,M,K", 24, SHAPES, PEERS, PACKAGES)
    timing.report_speed(*about, measure_speed)


if __name__ == "__main__":
    main()
