"""A vision transformer, rnnattn.nn.ViT, beside the same of Flax's own layers and of torch's.

    python benchmarks/vit.py --rounds 5

"forward" are the logits, "training" those and the gradients of all weights, from a cotangent that
is an argument. The three have as many parameters but not the same: they are drawn, and only the
finiteness of what comes out is checked.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from rnnattn.nn import ViT
from rnnattn.patches import patchify

SHAPES = [(64, 28, 4, 64, 4), (16, 64, 8, 192, 6)]
KINDS = ("forward", "training")
PACKAGES = ["jax", "jaxlib", "numpy", "torch", "flax"]
HEAD_WIDTH, CLASSES = 32, 10


class Problem(NamedTuple):
    """Square images (B, size, size, 1) in patches, D wide, so many blocks deep."""

    images: jax.Array
    cotangent: jax.Array
    patch: int
    width: int
    depth: int

    @property
    def heads(self):
        return self.width // HEAD_WIDTH

    @property
    def tokens(self):
        return (self.images.shape[1] // self.patch) ** 2


def make_problem(B, size, patch, width, depth, *, dtype):
    keys = jax.random.split(jax.random.key(0))
    shapes = ((B, size, size, 1), (B, CLASSES))
    draw = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
    images, cotangent = (x.astype(dtype) for x in draw)
    return Problem(images, cotangent, patch, width, depth)


def flax_programs(model, problem):
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    dtype = problem.images.dtype
    weights = jax.tree.map(lambda w: w.astype(dtype), weights)

    def forward(weights, images):
        return nnx.merge(graph, weights, rest)(images)

    def training(weights, images, cotangent):
        logits, pullback = jax.vjp(lambda weights: forward(weights, images), weights)
        return logits, pullback(cotangent.astype(logits.dtype))

    return {
        "forward": timing.compiled(forward, weights, problem.images),
        "training": timing.compiled(training, weights, problem.images, problem.cotangent),
    }


def ours(problem):
    model = ViT(
        patch_size=problem.patch, width=problem.width, depth=problem.depth,
        num_heads=problem.heads, classes=CLASSES, channels=1, image_size=problem.images.shape[1],
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    return flax_programs(model, problem)


class _FlaxBlock(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class _FlaxViT(nnx.Module):
    def __init__(self, problem, rngs):
        self.patch, width = problem.patch, problem.width
        self.embed = nnx.Linear(self.patch**2, width, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((problem.tokens, width)))
        blocks = [_FlaxBlock(width, problem.heads, rngs) for _ in range(problem.depth)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = self.embed(patchify(images, self.patch)) + self.position[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def flax(problem):
    return flax_programs(_FlaxViT(problem, nnx.Rngs(0)), problem)


def torch(problem):
    import torch
    from torch import nn

    wait = timing.prepare_torch(torch)
    images, cotangent = (timing.to_torch(torch, a) for a in (problem.images, problem.cotangent))
    options: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
    width, patch = problem.width, problem.patch
    block = nn.TransformerEncoderLayer(
        width, problem.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, **options
    )
    encoder = nn.TransformerEncoder(block, problem.depth, enable_nested_tensor=False)
    embed = nn.Conv2d(1, width, patch, patch, **options)
    position = nn.Parameter(torch.zeros(problem.tokens, width, **options))
    norm, head = nn.LayerNorm(width, **options), nn.Linear(width, CLASSES, **options)
    layers = [encoder, embed, norm, head]
    leaves = [position, *(p for layer in layers for p in layer.parameters())]

    def logits():
        x = embed(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2) + position
        return head(norm(encoder(x)).mean(1))

    def forward():
        with torch.no_grad():
            return logits()

    def training():
        y = logits()
        return y, torch.autograd.grad(y, leaves, cotangent)

    program = partial(timing.Program, wait=wait)
    return {"forward": program(forward), "training": program(training)}


PEERS: dict[str, Any] = {"ours again": ours, "flax": flax, "torch": torch}


def measure_speed(shapes, peers, rounds, dtype):
    def programs_of(shape):
        problem = make_problem(*shape, dtype=dtype)
        programs = timing.build(ours, {name: PEERS[name] for name in peers}, problem)
        for name, each in programs.items():
            y = each["forward"].call()
            y = np.asarray(y.float().cpu() if hasattr(y, "cpu") else y, np.float32)
            if not np.isfinite(y).all():
                raise AssertionError(f"{name}: logits are not finite")
        return programs

    return timing.table(KINDS, shapes, programs_of, rounds)


def main():
    about = (__doc__, "B,size,patch,D,depth", 28, SHAPES, PEERS, PACKAGES)
    timing.report_speed(*about, measure_speed)


if __name__ == "__main__":
    main()
