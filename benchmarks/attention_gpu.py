"""Attention in bfloat16 on an NVIDIA GPU, beyond what cuDNN serves in our rule: times and errors.

    python benchmarks/attention_gpu.py
    python benchmarks/attention_gpu.py --output FILE.json --masks segments --shapes 2,1024,8,64

Ours as None chooses it, by the Pallas kernels and on XLA, beside cuDNN by way of `jax.nn`, which is
given a mask where it knows no better, causality where that is all, and no soft cap. A number is the
median of the rounds, in milliseconds; "gradient" has the output, too. Errors are of the output and
of the gradient of query, key and value, over all of their elements, beside float32.
"""

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention, timing
from rnnattn import dot_product_attention

SHAPES = [
    attention.Shape(8, 4096, 8, 64),
    attention.Shape(2, 16384, 8, 64),
    attention.Shape(8, 4096, 8, 128),
]
SMALL = attention.Shape(2, 1088, 4, 64, M=2)  # for errors
MASKS = ("segments", "segments, causal", "offset", "both sides", "soft cap")
PEERS = ("ours", "ours, pallas", "ours, xla", "cudnn")


def masks_of(name: str, B: int, T: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ours: those that are fixed, and arrays."""
    fixed: dict[str, Any] = {"is_causal": name in ("segments, causal", "offset", "soft cap")}
    if name.startswith("segments"):
        ids = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) * 4 // T, (B, T))
        return fixed, {"query_segment_ids": ids, "key_value_segment_ids": ids}
    if name == "offset":
        return fixed, {"query_offset": jnp.zeros(B, jnp.int32)}
    if name == "both sides":
        return fixed | {"local_window_size": T // 16}, {}
    return fixed | {"logits_soft_cap": 30.0}, {}


def of_jax_nn(fixed, arrays, T):
    """The same for `jax.nn`, of whose masks cuDNN is given a bias."""
    at, mask = jnp.arange(T, dtype=jnp.int32), None
    if "query_segment_ids" in arrays:
        ids = arrays["query_segment_ids"][:1]
        mask = (ids[:, :, None] == ids[:, None])[:, None]
    if "local_window_size" in fixed:
        mask = (jnp.abs(at[:, None] - at[None]) <= fixed["local_window_size"])[None, None]
    return {"is_causal": fixed["is_causal"]}, {} if mask is None else {"mask": mask}


def programs(peer: str, name: str, problem: attention.Problem) -> timing.Programs:
    shape, (*operands, do) = problem.shape, problem.arrays
    fixed, arrays = masks_of(name, shape.B, shape.T)
    function: Callable = dot_product_attention
    if peer == "cudnn":
        function, (fixed, arrays) = jax.nn.dot_product_attention, of_jax_nn(fixed, arrays, shape.T)
    implementation = {"ours": None}.get(peer, peer.removeprefix("ours, "))
    apply = partial(function, **fixed, implementation=implementation)
    with_masks = lambda arrays: lambda *operands: apply(*operands, **arrays)
    gradient_of = attention.gradient_of
    return {
        "forward": timing.compiled(lambda arrays, o: with_masks(arrays)(*o), arrays, operands),
        "gradient": timing.compiled(
            lambda arrays, all: gradient_of(with_masks(arrays))(*all), arrays, [*operands, do]
        ),
    }


def times(name: str, shape: attention.Shape, rounds: int) -> list[dict[str, Any]]:
    problem = attention.make_problem(shape, dtype="bfloat16")
    with ThreadPoolExecutor(len(PEERS)) as pool:
        made = dict(
            zip(PEERS, pool.map(lambda peer: programs(peer, name, problem), PEERS), strict=True)
        )
    rows = []
    for kind in attention.KINDS:
        measured = timing.measure({p: made[p][kind].in_a_row(10) for p in PEERS}, rounds)
        ms = {peer: 1e2 * float(np.median(each)) for peer, each in measured.items()}
        rows.append({"sees": name, "shape": shape[:4], "kind": kind, "ms": ms})
        text = "  ".join(f"{peer} {x:.3f}" for peer, x in ms.items())
        print(f"{name:18} {shape!s:24} {kind:9} {text}", flush=True)
    return rows


def errors(name: str) -> dict[str, Any]:
    problem = attention.make_problem(SMALL, dtype="bfloat16")
    fixed, masks = masks_of(name, SMALL.B, SMALL.T)

    def results(implementation, *arrays):
        apply = partial(dot_product_attention, **fixed, implementation=implementation)
        return attention.gradient_of(lambda *operands: apply(*operands, **masks))(*arrays)

    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(results, "xla"))(*(x.astype("float32") for x in problem.arrays))
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))
    row: dict[str, Any] = {"sees": name, "errors": {}}
    for how in ("pallas", "xla"):
        made = jax.jit(partial(results, how))(*problem.arrays)
        row["errors"][how] = [norm(a - b) / norm(b) for a, b in zip(made, exact, strict=True)]
        print(f"{name:18} error of {how:7}", *(f"{x:.2e}" for x in row["errors"][how]), flush=True)
    return row


def shape_of(text: str) -> attention.Shape:
    return attention.Shape(*timing.counts(text, "B,T,N,K"))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--masks", nargs="*", choices=MASKS, default=MASKS)
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=SHAPES, metavar="B,T,N,K")
    parser.add_argument("--rounds", type=timing.count, default=5)
    parser.add_argument("--output", type=timing.new_file)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def keep(*more):
        rows.extend(more)
        if args.output:  # at once: a machine may be taken back
            found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
            args.output.write_text(json.dumps(found, indent=1) + "\n")

    with ThreadPoolExecutor(len(MASKS)) as pool:  # compiling takes longer than all else
        keep(*pool.map(errors, args.masks))
    for shape in args.shapes:
        for name in args.masks:
            keep(*times(name, shape, args.rounds))


if __name__ == "__main__":
    main()
