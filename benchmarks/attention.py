"""rnnattn.dot_product_attention against its peers: time, and temporary memory.

    python benchmarks/attention.py --output benchmarks/results/NAME.json     the table of speeds
    python benchmarks/attention.py --memory                                  memory; nothing is run
    python benchmarks/attention.py --choice                                  schedules and blocks

All programs get the same arrays, (B, T, N, K) as `jax.nn` has them, and must agree before they are
timed. "forward" is the output; "gradient" is the output and the gradients with respect to query,
key and value, from a cotangent that is an argument. On a GPU, torch runs on it too.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn
from benchmarks import timing
from rnnattn import native
from rnnattn.attention import blockwise, xla


class Shape(NamedTuple):
    """T queries of N heads, and as many keys of as many heads, if S and M do not say otherwise.

    `window`: a query sees so many keys before it, and its own; `mask`: a mask (T, S) hides a fifth
    of them.
    """

    B: int
    T: int
    N: int
    K: int
    causal: bool = False
    window: int | None = None
    S: int | None = None
    M: int | None = None
    mask: bool = False

    def __str__(self):
        sees = "causal" if self.causal else "full" if self.window is None else str(self.window)
        numbers = {"S": self.S, "M": self.M}
        more = [f", {name}={n}" for name, n in numbers.items() if n is not None]
        return f"{self.B}, {self.T}, {self.N}, {self.K}, {sees}{''.join(more)}" + (
            ", mask" if self.mask else ""
        )

    @property
    def keys(self):
        return self.T if self.S is None else self.S

    @property
    def key_heads(self):
        return self.N if self.M is None else self.M

    @property
    def logits(self):
        return self.B * self.N * self.T * self.keys

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `jax.nn.dot_product_attention`, and so of ours."""
        window = None if self.window is None else (self.window, 0)
        return {"is_causal": self.causal, "local_window_size": window}


SHAPES = [
    Shape(8, 64, 4, 32),
    Shape(8, 256, 8, 64),
    Shape(4, 1024, 8, 64, True),
    Shape(1, 4096, 8, 64, True),
    Shape(1, 4096, 8, 64),
    Shape(1, 16384, 4, 64, True),
    Shape(1, 8192, 8, 64, False, 256),
]
GPU_SHAPES = [Shape(2**15 // T, T, 8, 64, True) for T in (1024, 2048, 4096, 8192, 16384, 32768)]
PACKAGES = ["jax", "jaxlib", "numpy", "torch", "tokamax"]
KINDS = ("forward", "gradient")


class Problem(NamedTuple):
    shape: Shape
    arrays: tuple[jax.Array, ...]  # query, key, value, or a bias too; the output's cotangent
    masks: tuple[jax.Array, ...] = ()  # (1, 1, T, S); none or one


def make_problem(shape, *, dtype) -> Problem:
    *keys, of_mask = jax.random.split(jax.random.key(0), 5)
    queries = (shape.B, shape.T, shape.N, shape.K)
    of_keys = (shape.B, shape.keys, shape.key_heads, shape.K)
    draw = lambda key, size: jax.random.normal(key, size, jnp.float32).astype(dtype)
    arrays = tuple(map(draw, keys, (queries, of_keys, of_keys, queries)))
    if not shape.mask:
        return Problem(shape, arrays, ())
    mask = jax.random.uniform(of_mask, (1, 1, shape.T, shape.keys)) < 0.8
    # what sees nothing is NaN in some libraries
    return Problem(shape, arrays, (mask.at[..., 0].set(True),))


# ---- the programs: forward and gradient of each peer ------------------------------------------
#
# Either returns the output first; a gradient program those of all operands behind it.


def gradient_of(apply: Callable) -> Callable:
    def gradient(*arrays):
        *operands, do = arrays
        o, pullback = jax.vjp(apply, *operands)
        return o, *pullback(do)

    return gradient


def jax_programs(attend: Callable, problem: Problem) -> timing.Programs:
    """`attend(query, key, value)`, with a bias as a fourth, and `mask`, returns the output."""
    *operands, do = problem.arrays
    apply = lambda masks: partial(attend, mask=masks[0]) if masks else attend
    forward = lambda operands, masks: apply(masks)(*operands)
    gradient = lambda operands, do, masks: gradient_of(apply(masks))(*operands, do)
    return {
        "forward": timing.compiled(forward, operands, problem.masks),
        "gradient": timing.compiled(gradient, operands, do, problem.masks),
    }


def ours(problem: Problem, **options) -> timing.Programs:
    options = problem.shape.options | options
    return jax_programs(partial(rnnattn.dot_product_attention, **options), problem)


def ours_jvp(problem: Problem) -> timing.Programs:
    apply = partial(rnnattn.attention.dot_product_attention_jvp, **problem.shape.options)
    return jax_programs(apply, problem)


def jax_nn(problem: Problem, most_logits: int = 2**29, **options) -> timing.Programs:
    if problem.shape.logits > most_logits:
        GiB = most_logits // 2**27  # of logits and their gradient, in float32
        raise timing.Unavailable(f"its gradient needs more than {GiB} GiB")
    options = problem.shape.options | {"implementation": "xla"} | options
    return jax_programs(partial(jax.nn.dot_product_attention, **options), problem)


def cudnn(problem: Problem, **options) -> timing.Programs:
    if jax.default_backend() != "gpu":
        raise timing.Unavailable("it needs a GPU")
    if problem.arrays[0].dtype != jnp.bfloat16:
        raise timing.Unavailable("it needs 16 bits")
    options = problem.shape.options | {"implementation": "cudnn"} | options
    return jax_programs(partial(jax.nn.dot_product_attention, **options), problem)


def tokamax(problem: Problem) -> timing.Programs:
    import tokamax

    options = problem.shape.options | {"implementation": "xla_chunked"}
    return jax_programs(partial(tokamax.dot_product_attention, **options), problem)


def torch(problem: Problem, backend: str | None = None) -> timing.Programs:
    """By the backend of that name in `torch.nn.attention.SDPBackend`, or the one torch chooses."""
    import torch
    from torch.nn import attention

    wait = timing.prepare_torch(torch)
    shape = problem.shape
    *leaves, do = (timing.to_torch(torch, array) for array in problem.arrays)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mask = None
    if shape.window is not None:
        t, s = (torch.arange(size, device=do.device) for size in (shape.T, shape.keys))
        distance = t[:, None] - s[None]
        mask = (distance >= 0) & (distance <= shape.window)
    for given in problem.masks:
        given = timing.to_torch(torch, given)
        mask = given if mask is None else mask & given
    options = {"is_causal": shape.causal, "enable_gqa": shape.N != shape.key_heads}
    chosen = getattr(attention.SDPBackend, backend) if backend else None
    by = lambda: attention.sdpa_kernel(chosen) if chosen else contextlib.nullcontext()

    def attend():
        q, k, v = (x.transpose(1, 2) for x in leaves[:3])  # heads before time
        bias = leaves[3] if len(leaves) > 3 else mask
        attend = torch.nn.functional.scaled_dot_product_attention
        with by():
            return attend(q, k, v, attn_mask=bias, **options).transpose(1, 2)

    def forward():
        with torch.no_grad():
            return (attend(),)

    def gradient():
        o = attend()
        return o, *torch.autograd.grad(o, leaves, do)

    program = partial(timing.Program, wait=wait)
    return {"forward": program(forward), "gradient": program(gradient)}


PEERS: dict[str, Callable[[Problem], timing.Programs]] = {
    "ours again": ours,
    "ours, xla": partial(ours, implementation="xla"),
    "dense": partial(ours, implementation="dense"),
    "blockwise": partial(ours, implementation="blockwise"),
    "ours, jvp": ours_jvp,
    "jax.nn": jax_nn,
    "cudnn": cudnn,
    "tokamax": tokamax,
    "torch": torch,
}
DEFAULT_PEERS = ["ours again", "ours, xla", "jax.nn", "cudnn", "tokamax", "torch"]


def outputs(programs: timing.Programs) -> dict[str, Any]:
    """What all peers must agree on: the output of both programs, and the gradients."""
    (o, *_), gradient = (jax.tree.leaves(programs[kind].call()) for kind in KINDS)
    names = ("output", "output with gradient", "dq", "dk", "dv")
    return dict(zip(names, (o, *gradient), strict=True))


# ---- speed ------------------------------------------------------------------------------------


def measure_speed(shapes, peers, rounds, dtype) -> dict[str, Any]:
    """For each shape and kind, the time of each peer over ours."""
    rows = []
    for shape in shapes:
        problem = make_problem(shape, dtype=dtype)
        programs = timing.build(ours, {name: PEERS[name] for name in peers}, problem, f"({shape}) ")
        timing.check(programs, outputs, dtype)
        rows.append({"shape": shape} | timing.compare(KINDS, programs, rounds))
        print(f"  ({shape}) done", flush=True)
    return timing.summarize(KINDS, rows)


def print_speed(speed):
    timing.print_ratios(speed, "B, T, N, K, sees", 24)
    print_bars(speed["rows"])
    timing.print_trust_and_compilation(speed)


def print_bars(rows):
    """What is asked of float32 on a CPU, over all of `SHAPES`; the means leave the window out."""
    if [row["shape"] for row in rows] != SHAPES or jax.default_backend() != "cpu":
        return
    window = [row for row in rows if row["shape"].window is not None]
    others = [row for row in rows if row["shape"].window is None]
    long = [row for row in rows if row["shape"].T >= 256]
    longest = [row for row in rows if row["shape"] == Shape(1, 4096, 8, 64, True)]
    mean = timing.geometric_mean
    medians = lambda rows, peer, *kinds: timing.medians(rows, peer, kinds or KINDS)
    # the last two: at least so much on XLA, and with the native kernels
    bars: list[tuple[str, list[float], Callable[[list[float]], float], float, float]] = [
        ("jax.nn, the least of all", medians(rows, "jax.nn"), min, 0.95, 0.95),
        ("jax.nn, mean", medians(others, "jax.nn"), mean, 1.8, 1.8),
        ("jax.nn, gradient, T 4096 causal", medians(longest, "jax.nn", "gradient"), min, 4.0, 8.0),
        ("torch, forward, least of T ≥ 256", medians(long, "torch", "forward"), min, 0.0, 1.0),
        ("torch, gradient, least of T ≥ 256", medians(long, "torch", "gradient"), min, 0.0, 1.2),
        ("torch, mean forward", medians(others, "torch", "forward"), mean, 0.85, 1.0),
        ("torch, mean gradient", medians(others, "torch", "gradient"), mean, 0.7, 1.4),
        ("torch, the least with a window", medians(window, "torch"), min, 1.5, 1.5),
    ]
    print("\nbars")
    for name, ratios, of_all, on_xla, natively in bars:
        least = natively if native.status().available else on_xla
        if ratios and least:
            value = of_all(ratios)
            print(f"  {name:<34}{value:6.2f}  ≥ {least:.2f}  {_met(value >= least)}")


def _met(holds):
    return "met" if holds else "NOT MET"


# ---- memory -----------------------------------------------------------------------------------


def hessian_product(attend: Callable, mode: str) -> Callable:
    """(query, key, value, and a direction of each) → the Hessian of Σ O² times the direction."""
    loss = lambda *operands: jnp.sum(attend(*operands) ** 2)
    gradient = jax.grad(loss, argnums=(0, 1, 2))

    def product(query, key, value, *direction):
        operands = query, key, value
        if mode == "forward over reverse":
            return jax.jvp(gradient, operands, direction)[1]
        return jax.vjp(gradient, *operands)[1](direction)

    return product


def measure_memory(dtype) -> dict[str, Any]:
    def arrays(T, count):
        return [jax.ShapeDtypeStruct((1, T, 4, 64), dtype)] * count

    functions: dict[str, Callable] = {
        "ours": rnnattn.dot_product_attention,
        "ours, jvp": rnnattn.attention.dot_product_attention_jvp,
        "jax.nn": jax.nn.dot_product_attention,
    }
    gradients: dict[str, dict[str, dict[int, float]]] = {}
    for name, function in functions.items():
        lengths = [1024, 4096] if name == "jax.nn" else [1024, 4096, 16384, 65536]
        for sees, causal in (("causal", True), ("full", False)):
            gradient = gradient_of(partial(function, is_causal=causal))
            of_T = {T: timing.temporary_mebibytes(gradient, *arrays(T, 4)) for T in lengths}
            gradients.setdefault(name, {})[sees] = of_T
    products: dict[str, dict[str, dict[int, float]]] = {}
    for name, function in functions.items():
        lengths = [2048] if name == "jax.nn" else [2048, 4096, 8192]
        for mode in ("forward over reverse", "reverse over reverse"):
            product = hessian_product(partial(function, is_causal=True), mode)
            of_T = {T: timing.temporary_mebibytes(product, *arrays(T, 6)) for T in lengths}
            products.setdefault(name, {})[mode] = of_T
    return {"shape": (1, "T", 4, 64), "gradient": gradients, "hessian_product": products}


def print_memory(memory):
    for what in ("gradient", "hessian_product"):
        print(f"\nMiB of temporary memory, {what} at (B, T, N, K) = {memory['shape']}")
        for name, cases in memory[what].items():
            for case, of_T in cases.items():
                cells = "".join(f"   T {T}: {size:.1f}" for T, size in of_T.items())
                print(f"  {name:<11}{case:<22}{cells}")
    gradient = max(of_T[4096] for of_T in memory["gradient"]["ours"].values())
    longest = memory["gradient"]["ours"]["causal"]
    product = max(of_T[2048] for of_T in memory["hessian_product"]["ours"].values())
    growth = [
        of_T[8192] / of_T[4096]
        for name in ("ours", "ours, jvp")
        for of_T in memory["hessian_product"][name].values()
    ]
    print("\nbars")
    for bar, value, most in (
        ("gradient at T 4096, MiB", gradient, 48.0),
        ("gradient, T 65536 over T 16384", longest[65536] / longest[16384], 4.0),
        ("Hessian product at T 2048, MiB", product, 90.0),
        ("Hessian product, T 8192 over T 4096", max(growth), 2.0),
    ):
        print(f"  {bar:<38}{value:6.2f}  ≤ {most:.2f}  {_met(value <= most)}")


# ---- how the schedule is chosen ---------------------------------------------------------------

BLOCKS = [(256, 256), (256, 512), (512, 256), (512, 512), (512, 1024), (1024, 256), (1024, 512)]
BLOCK_NAMES = {"forward": "FORWARD_BLOCK", "gradient": "BACKWARD_BLOCK"}


def measure_choice(rounds, dtype) -> dict[str, Any]:
    """Dense over blockwise as the length grows, and the size of the blocks as it is over others."""
    schedules = []
    for causal in (False, True):
        for T in (64, 128, 192, 256, 384, 512, 1024):
            problem = make_problem(Shape(8, T, 8, 64, causal), dtype=dtype)
            programs = {name: PEERS[name](problem) for name in ("dense", "blockwise")}
            row: dict[str, Any] = {"shape": problem.shape}
            for kind in KINDS:
                times = timing.measure({name: programs[name][kind] for name in programs}, rounds)
                row[kind] = timing.ratio(times["dense"], times["blockwise"])._asdict()
            schedules.append(row)
    present = {kind: getattr(blockwise, name) for kind, name in BLOCK_NAMES.items()}
    blocks = []
    for shape in (shape for shape in SHAPES if 1024 <= shape.T <= 8192):
        problem = make_problem(shape, dtype=dtype)
        row = {"shape": shape}
        for kind in KINDS:
            sizes = dict.fromkeys([present[kind], *BLOCKS])
            times = timing.measure({str(s): _with_blocks(problem, kind, s) for s in sizes}, rounds)
            as_it_is = times[str(present[kind])]
            row[kind] = {s: timing.ratio(as_it_is, each)._asdict() for s, each in times.items()}
        blocks.append(row)
    numbers = {"dense_logits": xla.DENSE_LOGITS, "blocks": present}
    return {"present": numbers, "schedules": schedules, "blocks": blocks}


def _with_blocks(problem, kind, size):
    jax.clear_caches()  # or what was traced with other blocks would be found again
    with mock.patch.object(blockwise, BLOCK_NAMES[kind], size):
        return PEERS["blockwise"](problem)[kind]


def print_choice(choice):
    print("\ndense / blockwise, median [quartiles]: above 1, blockwise is the faster")
    print(f"dense is chosen below {choice['present']['dense_logits']} logits of a head, T²")
    for row in choice["schedules"]:
        cells = "".join(f"   {kind} {timing.show_ratio(row[kind])}" for kind in KINDS)
        print(f"  {row['shape']!s:<24}{cells}")
    for kind, name in BLOCK_NAMES.items():
        print(f"\n{kind}, {name} as it is, {choice['present']['blocks'][kind]}, / another:")
        print("above 1, the other is the faster")
        for row in choice["blocks"]:
            cells = "".join(f"   {size} {r['median']:.2f}" for size, r in row[kind].items())
            print(f"  {row['shape']!s:<24}{cells}")


def parse_shape(text) -> Shape:
    sizes, sees = text.split(",")[:4], text.split(",")[4:]
    B, T, N, K = timing.counts(",".join(sizes), "B,T,N,K")
    options: dict[str, Any] = {}
    known = True
    for word in sees:
        name, _, number = word.partition("=")
        if word in ("causal", "mask"):
            options[word] = True
        elif name in ("S", "M") and number:
            options[name] = timing.count(number)
        elif re.fullmatch("[0-9]{1,9}", word):
            known = known and "window" not in options
            options["window"] = int(word)
        else:
            known = known and word == "full"
    if not known or {"causal", "window"} <= options.keys() or N % options.get("M", N):
        form = "B,T,N,K[,causal|full|window][,S=S][,M=M][,mask], with M a divisor of N"
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {form}")
    return Shape(B, T, N, K, **options)


def parse(argv=None):
    shapes = {
        "type": parse_shape,
        "default": GPU_SHAPES if jax.default_backend() == "gpu" else SHAPES,
        "metavar": "B,T,N,K[,SEES][,S=S][,M=M][,mask]",
        "help": "SEES: causal, full, or a number of keys to the left; S keys, M heads of these",
    }
    studies = {"memory": "temporary memory", "choice": "schedules and blocks"}
    parser = timing.parser(__doc__.splitlines()[0], shapes, PEERS, DEFAULT_PEERS, studies)
    return parser.parse_args(argv)


def main():
    args = parse()
    timing.report(
        *(args, PACKAGES),
        speed=timing.Study(
            lambda: measure_speed(args.shapes, args.peers, args.rounds, args.dtype), print_speed
        ),
        memory=timing.Study(lambda: measure_memory(args.dtype), print_memory),
        choice=timing.Study(lambda: measure_choice(args.rounds, args.dtype), print_choice),
    )


if __name__ == "__main__":
    main()
