"""rnnattn.rope against the usual rotation by float32 angles, in JAX and in torch.

    python benchmarks/rope.py --rounds 9

"forward" is the rotated array, "gradient" that and the gradient of x from a cotangent that is an
argument. The angles are made anew in each call, in all of them.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn
from benchmarks import timing

SHAPES = [(8, 256, 8, 64), (4, 1024, 8, 64), (1, 16384, 4, 128)]
KINDS = ("forward", "gradient")
PACKAGES = ["jax", "jaxlib", "numpy", "torch"]


def make_problem(B, T, N, K, *, dtype):
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, (B, T, N, K), jnp.float32).astype(dtype) for key in keys)
    return x, dy


def jax_programs(rotate, problem):
    def gradient(x, dy):
        y, pullback = jax.vjp(rotate, x)
        return y, *pullback(dy)

    x, dy = problem
    forward = lambda x: (rotate(x),)
    return {"forward": timing.compiled(forward, x), "gradient": timing.compiled(gradient, x, dy)}


def ours(problem):
    return jax_programs(lambda x: rnnattn.rope(x, jnp.arange(x.shape[1])), problem)


def usual(problem):
    def rotate(x):
        T, half = x.shape[1], x.shape[-1] // 2
        frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = jnp.arange(T, dtype=jnp.float32)[:, None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        return turned.astype(x.dtype)

    return jax_programs(rotate, problem)


def torch(problem):
    import torch

    wait = timing.prepare_torch(torch)
    x, dy = (timing.to_torch(torch, array) for array in problem)
    x.requires_grad_()
    T, half = x.shape[1], x.shape[-1] // 2

    def rotate():
        frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(T, device=x.device)[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)

    def forward():
        with torch.no_grad():
            return (rotate(),)

    def gradient():
        y = rotate()
        return y, *torch.autograd.grad(y, x, dy)

    program = partial(timing.Program, wait=wait)
    return {"forward": program(forward), "gradient": program(gradient)}


PEERS: dict[str, Any] = {"ours again": ours, "usual": usual, "torch": torch}


def outputs(programs):
    y, dx = programs["gradient"].call()
    return {"y": y, "dx": dx}


def measure_speed(shapes, peers, rounds, dtype):
    def programs_of(shape):
        problem = make_problem(*shape, dtype=dtype)
        programs = timing.build(ours, {name: PEERS[name] for name in peers}, problem)
        # at T 16,384 the angles of the others are 1e-3 off
        timing.check(programs, outputs, "bfloat16")
        return programs

    return timing.table(KINDS, shapes, programs_of, rounds)


def main():
    about = (__doc__, "B,T,N,K", 22, SHAPES, PEERS, PACKAGES)
    timing.report_speed(*about, measure_speed)


if __name__ == "__main__":
    main()
