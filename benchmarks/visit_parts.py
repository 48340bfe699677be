"""The parts of a visit, each run in a process of its own by `benchmarks/visit.py`.

A part is a list of cases. A case can hang or take its process with it, as a kernel may that was
never on such a device: what runs is written down before it does, so that `visit.py` can start the
part again with what comes after it.
"""

import contextlib
import faulthandler
import gc
import importlib.metadata
import itertools
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnnattn
from benchmarks import attention, lstm, timing

COMPILING, RUNNING = 100, 25  # seconds after which a program is taken to hang


class Order(NamedTuple):
    """What a process is to do."""

    part: str
    output: str
    until: float  # in seconds of the epoch: no case is begun that would end later
    dry: bool = False
    first: int = 0  # case
    without: Sequence[str] = ()  # peers


class Part:
    """Writes down what is found, and what is about to run."""

    def __init__(self, order: Order):
        self.order = order
        self.dry = order.dry
        self.folder = Path(order.output)
        self.case = order.first

    def row(self, **columns: Any) -> None:
        line = json.dumps({"part": self.order.part, **columns})
        with (self.folder / "rows.jsonl").open("a") as rows:
            rows.write(line + "\n")

    def about_to(self, seconds: float, peer: str | None = None, **labels: Any) -> None:
        """The process ends if that takes longer."""
        where = {"case": self.case, "peer": peer, "labels": labels}
        (self.folder / "running.json").write_text(json.dumps(where))
        faulthandler.dump_traceback_later(seconds, exit=True)

    def failed(self, error: BaseException, **labels: Any) -> None:
        """If the device does not work any more, the process ends, and another goes on."""
        self.row(**labels, error=said(error))
        traceback.print_exception(error)
        try:
            jax.block_until_ready(jnp.ones(8) + 1)
        except Exception:
            sys.exit(3)

    def takes(self, peer: str) -> bool:
        return peer not in self.order.without


class Case(NamedTuple):
    labels: dict[str, Any]
    measure: Callable[[], None]


def run(order: Order) -> None:
    part = Part(order)
    cases = CASES[order.part](part)
    longest = 0.0
    for part.case in range(order.first, len(cases)):
        start = time.time()
        if start + longest / 2 > order.until:
            part.row(left_out=f"{len(cases) - part.case} of {len(cases)} cases: out of time")
            break
        labels, measure = cases[part.case]
        part.about_to(COMPILING, **labels)
        try:
            measure()
        except Exception as error:
            part.failed(error, **labels)
        jax.clear_caches()
        gc.collect()
        longest = max(longest, time.time() - start)
    faulthandler.cancel_dump_traceback_later()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def compiled_in_parallel(
    part: Part, labels: Mapping[str, Any], jobs: Mapping[Any, Callable[[], Any]]
) -> dict[Any, Any]:
    """What the jobs return, by key; a row for each that cannot be had here."""
    results = {}
    with ThreadPoolExecutor(2 if part.dry else 8) as pool:
        futures = {key: pool.submit(job) for key, job in jobs.items()}
        for key, future in futures.items():
            peer = key[0] if isinstance(key, tuple) else key
            try:
                results[key] = future.result()
            except (ImportError, timing.Unavailable, ValueError) as error:
                part.row(**labels, peer=peer, left_out=said(error))
            except Exception as error:
                part.failed(error, **labels, peer=peer)
    return results


# ---- times ------------------------------------------------------------------------------------


def times_of(
    part: Part, labels: Mapping[str, Any], programs: Mapping[Any, timing.Program]
) -> dict[Any, list[float]]:
    """Seconds per call, one sample of each program a round; keys are (peer, …)."""
    batches: dict[Any, timing.Program] = {}
    calls = {}
    for key, program in programs.items():
        part.about_to(RUNNING, key[0], **labels)
        try:
            program.call()
            start = time.perf_counter()
            program.call()
            seconds = time.perf_counter() - start
        except Exception as error:
            part.failed(error, **labels, peer=key[0])
            continue
        calls[key] = max(1, min(50, int(0.006 / seconds)))
        batches[key] = program.in_a_row(calls[key])
    part.about_to(2 * RUNNING, **labels)
    times = timing.measure(batches, 2 if part.dry else 5, 1e-9)
    return {key: [t / calls[key] for t in each] for key, each in times.items()}


def difference(results: Any, others: Any, last: Callable[[Any], Any]) -> float:
    """Of the last step of two outputs, over the largest value there."""
    x, y = (last(jax.tree.leaves(r)[0]) for r in (results, others))
    array = lambda a: np.asarray(a.detach().float().cpu() if hasattr(a, "detach") else a)
    a, b = (array(a).astype(np.float32) for a in (x, y))
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def allow_tf32(precision: str) -> None:
    """In JAX's products of float32 and in torch's: "tf32" says yes, "float32" no."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else None)
    with contextlib.suppress(ImportError):
        import torch

        torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def dtype_of(precision: str) -> str:
    return "float32" if precision == "tf32" else precision


# ---- machine ----------------------------------------------------------------------------------


def machine_cases(part: Part) -> list[Case]:
    n, copied = (256, 2**20) if part.dry else (8192, 2**28)

    def about():
        about = timing.machine([])
        packages = ("jax", "jaxlib", "torch", "numpy", "flax", "triton")
        about["versions"] = {
            name: installed.version
            for installed in importlib.metadata.distributions()
            if (name := installed.name) in packages or name.startswith(("jax-cuda", "nvidia-"))
        }
        about["platform"] = jax.devices()[0].client.platform_version.replace("\n", " ")
        with contextlib.suppress(ImportError):
            import torch

            about["torch"] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        about["driver"] = said_by(
            "nvidia-smi", "--format=csv,noheader",
            "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
        )  # fmt: skip
        about["commit"] = said_by("git", "rev-parse", "HEAD")
        part.row(about=about)

    def product(precision):
        allow_tf32(precision)
        a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype_of(precision))
        program = timing.compiled(lambda a, b: a @ b, a, a.T)
        ((seconds, *_),) = medians(times_of(part, {}, {("product", n): program})).values()
        part.row(what=f"product {n}³", precision=precision, tflops=2 * n**3 / seconds / 1e12)

    def copy():
        program = timing.compiled(lambda x: x + 1, jnp.zeros(copied))
        ((seconds, *_),) = medians(times_of(part, {}, {("copy", copied): program})).values()
        part.row(what=f"copy of {copied * 4 >> 20} MiB", gigabytes=8 * copied / seconds / 1e9)

    precisions = ("bfloat16", "float16", "tf32", "float32")
    products = [Case({"precision": p}, partial(product, p)) for p in precisions]
    return [Case({"what": "about"}, about), *products, Case({"what": "copy"}, copy)]


def medians(times: Mapping[Any, Sequence[float]]) -> dict[Any, tuple[float, float, float]]:
    """Median and quartiles of the seconds."""
    return {key: tuple(np.quantile(each, (0.5, 0.25, 0.75))) for key, each in times.items()}


def said_by(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---- values -----------------------------------------------------------------------------------

# The largest relative error (of a whole array, in the Euclidean norm) that is "ok": float64 gets
# the same rounded inputs, so it is what was rounded on the way.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
LSTM_SCHEDULES = (None, "xla", "cudnn", "pallas")
ATTENTION_SCHEDULES = (None, "dense", "blockwise", "cudnn", "pallas")  # "xla" is one of two here


class Values(NamedTuple):
    """A function of arrays with a gradient, and what it is compared with."""

    function: Callable[..., Any]  # (arrays, implementation) → outputs
    exact: Callable[..., Any]  # (arrays) → outputs
    arrays: Any  # float32, in the dtype that is asked for where they are passed
    schedules: Sequence[str | None]
    wide: Callable[[Any], Any] = lambda arrays: ()  # leaves of `arrays` that stay float32


def value_cases(part: Part) -> list[Case]:
    tiny = part.dry
    rope = {"halves": {}, "interleaved": {"interleaved": True}}
    makes: dict[str, dict[str, Callable[[], Values]]] = {
        "lstm": {name: partial(lstm_values, *v) for name, v in lstm_variants(tiny).items()},
        "attention": {
            name: partial(attention_values, *v) for name, v in attention_variants(tiny).items()
        },
        "rope": {name: partial(rope_values, 24 if tiny else 520, v) for name, v in rope.items()},
    }
    cases = [
        [
            Case({"what": what, "case": name}, partial(check_values, part, what, name, make))
            for name, make in of_kind.items()
        ]
        for what, of_kind in makes.items()
    ]
    if tiny:
        cases = [of_kind[-1:] for of_kind in cases]
    # in turns, so that none is left out for another where time is short
    return [case for turn in itertools.zip_longest(*cases) for case in turn if case]


def check_values(part: Part, what: str, name: str, make: Callable[[], Values]) -> None:
    problem = make()
    labels = {"what": what, "case": name}
    schedules = [s for s in problem.schedules if part.takes(str(s))]
    dtypes = ("float32", "bfloat16", "float16")
    wide = {id(x) for x in jax.tree.leaves(problem.wide(problem.arrays))}
    rounded = lambda dtype, x: x if id(x) in wide else x.astype(dtype)
    given = {dtype: jax.tree.map(partial(rounded, dtype), problem.arrays) for dtype in dtypes}
    results = lambda function: partial(outputs_and_gradients, function)

    def exactly():
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            right, wide = jax.jit(results(problem.exact)), lambda x: np.asarray(x, np.float64)
            return {
                dtype: jax.tree.map(np.asarray, right(jax.tree.map(wide, arrays)))
                for dtype, arrays in given.items()
            }

    def compiled(dtype, schedule):
        function = results(partial(problem.function, implementation=schedule))
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return jax.jit(function).lower(given[dtype]).compile()

    jobs: dict[Any, Callable[[], Any]] = {"exact": exactly}
    for s, dtype in itertools.product(schedules, dtypes):
        if dtype != "float16" or s in (None, "cudnn", "pallas"):  # as bfloat16 is, on XLA
            jobs[str(s), dtype] = partial(compiled, dtype, s)
    programs = compiled_in_parallel(part, labels, jobs)
    exact = programs.pop("exact")
    rows = []
    for (schedule, dtype), program in programs.items():
        row = labels | {"peer": schedule, "dtype": dtype}
        part.about_to(RUNNING, schedule, **labels, dtype=dtype)
        try:
            actual = jax.tree.map(np.asarray, program(given[dtype]))
        except Exception as error:
            part.failed(error, **row)
            continue
        worst, where = max(relative_errors(actual, exact[dtype]))
        ok = worst <= BOUNDS[dtype]
        rows.append(row | {"worst": worst, "of": where, "bound": BOUNDS[dtype], "ok": ok})
    for row in rows:
        part.row(**row)


def outputs_and_gradients(function: Callable, arrays: Any) -> Any:
    outputs, pullback = jax.vjp(function, arrays)

    def cotangent(y):  # numbers around ±1, the same in every dtype
        n = jnp.arange(y.size, dtype=jnp.int32) * 7919 % 1009
        return ((n - 504).astype(jnp.float32) / 512).reshape(y.shape).astype(y.dtype)

    return outputs, pullback(jax.tree.map(cotangent, outputs))[0]


def relative_errors(actual: Any, exact: Any) -> list[tuple[float, str]]:
    """By the name of each array; NaN is an infinite error."""
    errors = []
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(exact), strict=True
    )  # fmt: skip
    for (path, a), e in pairs:
        size = np.linalg.norm(e.ravel()) or 1.0
        error = float(np.linalg.norm((a.astype(np.float64) - e).ravel()) / size)
        names = ("output", "gradient")
        name = names[path[0].idx] + jax.tree_util.keystr(path[1:])
        errors.append((error if np.isfinite(error) else float("inf"), name))
    return errors


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def lstm_variants(tiny: bool) -> dict[str, Any]:
    """(T, B, H), what the weights have besides, and the arguments of `lstm`."""
    T, B, H = sizes = (5, 4, 8) if tiny else (33, 16, 128)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, B).astype(np.int32)
    resets = rng.random((T, B)) < 0.15
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "lengths": {"lengths": lengths},
        "lengths, NaN past them": {"lengths": lengths, "nan": True},
        "resets": {"resets": resets},
        "reverse": {"reverse": True},
        "reverse, lengths, resets": {"reverse": True, "lengths": lengths, "resets": resets},
        "residuals gates": {"residuals": "gates"},
        "residuals 8": {"residuals": 8},
        "clip, coupled": {"clip": 1.0, "coupled": True},
    }
    variants: dict[str, Any] = {name: (sizes, {}, given) for name, given in options.items()}
    variants["peephole"] = (sizes, {"peephole": True}, {})
    variants["projection"] = (sizes, {"projection_size": H // 2}, {})
    if not tiny:
        for sizes in ((40, 1, 64), (64, 40, 256), (24, 130, 512), (24, 16, 1024)):
            variants["T {}, B {}, H {}".format(*sizes)] = (sizes, {}, {})
    return variants


def lstm_values(sizes: tuple[int, int, int], weights: dict, options: dict) -> Values:
    T, B, H = sizes
    D = 6 if H < 64 else 48
    params = rnnattn.init_lstm(jax.random.key(0), D, H, **weights)
    if params.peephole is not None:
        params = params._replace(peephole=jnp.asarray(draw(3, H) / 4))
    x = draw(T, B, D)
    options = dict(options)
    if options.pop("nan", False):
        x[np.arange(T)[:, None] >= options["lengths"]] = np.nan
    state = rnnattn.LSTMState(jnp.asarray(draw(B, params.w_h.shape[0])), jnp.asarray(draw(B, H)))

    def call(function, arrays, **rest):
        params, x, state = arrays
        return function(params, x, state, time_major=True, **options, **rest)

    return Values(
        partial(call, rnnattn.lstm), partial(call, rnnattn.reference.lstm),
        (params, jnp.asarray(x), state), LSTM_SCHEDULES, wide=lambda arrays: arrays[2].c,
    )  # fmt: skip


def attention_variants(tiny: bool) -> dict[str, Any]:
    """(B, T, N, M, K) and the arguments of `dot_product_attention`."""
    T = 24 if tiny else 1088
    sizes, grouped, wide = (2, T, 4, 4, 64), (2, T, 4, 2, 64), (2, T, 2, 2, 128)
    lengths = np.asarray([T // 2 + 3, T], np.int32)
    segments = np.sort(np.random.default_rng(0).integers(0, 4, (2, T))).astype(np.int32)
    return {
        "full": (sizes, {}),
        "causal": (sizes, {"is_causal": True}),
        "causal, K 128": (wide, {"is_causal": True}),
        "causal, window": (sizes, {"is_causal": True, "local_window_size": (T // 5, 0)}),
        "window": (sizes, {"local_window_size": (T // 5, T // 7)}),
        "lengths": (sizes, {"key_value_seq_lengths": lengths, "query_seq_lengths": lengths}),
        "lengths, NaN past them": (sizes, {"key_value_seq_lengths": lengths, "nan": True}),
        "bias": (sizes, {"bias": draw(1, 4, T, T)}),
        "sinks": (sizes, {"sinks": draw(4), "is_causal": True}),
        "grouped heads": (grouped, {"is_causal": True}),
        "soft cap": (sizes, {"logits_soft_cap": 2.0}),
        "segments": (
            sizes, {"query_segment_ids": segments, "key_value_segment_ids": segments},
        ),
    }  # fmt: skip


def attention_values(sizes: tuple[int, ...], options: dict) -> Values:
    B, T, N, M, K = sizes
    arrays = {
        "query": draw(B, T, N, K),
        "key": draw(B, T, M, K, seed=1),
        "value": draw(B, T, M, K, seed=2),
    }
    options = dict(options)
    for name in ("bias", "sinks"):
        if name in options:
            arrays[name] = options.pop(name)
    if options.pop("nan", False):
        hidden = np.arange(T) >= options["key_value_seq_lengths"][:, None]
        arrays["key"][hidden] = arrays["value"][hidden] = np.nan
    arrays = jax.tree.map(jnp.asarray, arrays)
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    call = lambda function, arrays, **rest: function(**arrays, **options, **rest)
    return Values(
        partial(call, rnnattn.dot_product_attention),
        partial(call, rnnattn.reference.dot_product_attention),
        arrays, ATTENTION_SCHEDULES,
    )  # fmt: skip


def rope_values(T: int, options: dict) -> Values:
    positions = jnp.arange(T)
    return Values(
        lambda x, implementation: rnnattn.rope(x, positions, **options),
        lambda x: rnnattn.reference.rope(x, positions, **options),
        jnp.asarray(draw(2, T, 4, 64)), (None,),
    )  # fmt: skip


# ---- lstm -------------------------------------------------------------------------------------

# (precision, H, B, ragged), the most telling ones first: the last ones are left out when time is.
LSTM_SHAPES: list[tuple[str, int, int, bool]] = [
    ("bfloat16", 512, 128, False), ("bfloat16", 256, 64, True), ("bfloat16", 128, 16, False),
    ("bfloat16", 512, 64, False), ("bfloat16", 384, 64, False), ("bfloat16", 256, 64, False),
    ("bfloat16", 512, 64, True), ("bfloat16", 384, 128, False), ("bfloat16", 512, 16, False),
    ("tf32", 128, 128, False), ("float16", 256, 64, False), ("float16", 512, 128, False),
    ("bfloat16", 64, 16, False), ("bfloat16", 128, 128, False), ("float16", 128, 16, False),
    ("bfloat16", 1024, 64, False), ("float32", 256, 64, False), ("tf32", 512, 16, False),
    ("float16", 64, 128, False), ("float32", 128, 16, False), ("float16", 512, 16, True),
    ("bfloat16", 256, 1, False), ("bfloat16", 128, 256, False), ("float16", 1024, 256, False),
    ("bfloat16", 256, 256, False), ("tf32", 64, 64, False), ("float32", 512, 64, False),
    ("bfloat16", 1024, 1, False),
]  # fmt: skip


def lstm_cases(part: Part) -> list[Case]:
    shapes = LSTM_SHAPES
    if part.dry:
        shapes = [("bfloat16", 8, 2, False), ("float32", 16, 2, True)]
    return [
        Case(
            {"precision": precision, "H": H, "B": B, "ragged": ragged},
            partial(time_lstm, part, precision, H, B, ragged),
        )
        for precision, H, B, ragged in shapes
    ]


def time_lstm(part: Part, precision: str, H: int, B: int, ragged: bool) -> None:
    """Microseconds per step: the slope from short sequences to long ones."""
    allow_tf32(precision)
    labels = {"precision": precision, "H": H, "B": B, "ragged": ragged}
    short, whole, _ = lengths = (4, 8, 16) if part.dry else (256, 512, 1024)
    share = np.random.default_rng(0).uniform(0.3, 1.0, B)
    share[0] = 1.0
    limits = {T: np.ceil(share * T).astype(np.int32) if ragged else None for T in lengths}
    problems = {T: lstm.make_problem(T, B, H, H, dtype=dtype_of(precision)) for T in lengths}

    def ours(T, **options):
        limit = None if limits[T] is None else jnp.asarray(limits[T])
        return lstm.ours(problems[T], lengths=limit, **options)

    peers: dict[str, Callable[[int], timing.Programs]] = {
        "ours": ours,
        "ours, xla": partial(ours, implementation="xla"),
        "ours, pallas": partial(ours, implementation="pallas"),
    }
    if precision in ("tf32", "float32") and not ragged:
        peers["jax.experimental.rnn"] = lambda T: lstm.cudnn(problems[T])
    peers["torch"] = lambda T: lstm.torch(problems[T], limits[T])
    if precision == "bfloat16":  # in which cuDNN has no persistent kernels
        half = lambda T: jax.tree.map(lambda x: x.astype("float16"), problems[T])
        peers["torch, float16"] = lambda T: lstm.torch(half(T), limits[T])
    jobs = {
        (name, T): partial(peer, T)
        for name, peer in peers.items()
        if part.takes(name)
        for T in lengths
    }
    programs = compiled_in_parallel(part, labels, jobs)
    for kind in lstm.KINDS:
        of_kind = {key: each[kind] for key, each in programs.items()}
        times = times_of(part, labels | {"kind": kind}, of_kind)
        expected = of_kind.get(("ours, xla", short))
        for peer, slope in slopes(times, lengths).items():
            row = labels | {"kind": kind, "peer": peer} | slope
            row[f"ms_{whole}"] = 1e3 * float(np.median(times[peer, whole]))
            row["compile_seconds"] = of_kind[peer, whole].compile_seconds
            if expected and not ragged:
                actual = of_kind[peer, short].call()
                row["differs"] = difference(actual, expected.call(), lambda y: y[-1])
            part.row(**row)


def slopes(times: Mapping[Any, Sequence[float]], lengths: Sequence[int]) -> dict[str, Any]:
    """Microseconds per step of each peer, from the shortest length to the longest."""
    found = {}
    short, long = lengths[0], lengths[-1]
    for peer in dict.fromkeys(peer for peer, _ in times):
        if all((peer, T) in times for T in lengths):
            each = np.subtract(times[peer, long], times[peer, short]) * 1e6 / (long - short)
            median, *quartiles = map(float, np.quantile(each, (0.5, 0.25, 0.75)))
            found[peer] = {"us_step": median, "quartiles": quartiles}
    return found


# ---- attention --------------------------------------------------------------------------------


def attention_cases(part: Part) -> list[Case]:
    tokens = 32 if part.dry else 2**15
    heads = {64: 2, 128: 2} if part.dry else {64: 8, 128: 16}

    def shape(T, K, sees, window=None):
        return attention.Shape(tokens // T, T, heads[K], K, sees == "causal", window)

    if part.dry:
        plain = [(16, 64, "causal")]
        special = [(16, 64, "bias"), (16, 64, "segments"), (16, 64, "one")]
    else:
        plain = [
            (4096, 64, "causal"), (4096, 128, "causal"), (4096, 128, "full"), (1024, 64, "causal"),
            (16384, 128, "causal"), (16384, 64, "causal"), (1024, 128, "full"), (2048, 64, "full"),
            (32768, 64, "causal"), (8192, 128, "causal"), (32768, 128, "full"), (4096, 64, "full"),
            (2048, 128, "causal"), (1024, 128, "causal"), (8192, 64, "causal"),
        ]  # fmt: skip
        special = [
            (4096, 64, "bias"), (4096, 64, "window"), (4096, 64, "segments"), (4096, 128, "one"),
            (2048, 128, "bias"), (16384, 128, "window"), (16384, 64, "segments"),
            (32768, 64, "one"),
        ]  # fmt: skip
    head, tail = plain[:5], plain[5:]
    cases = []
    for T, K, sees in (*head, *special, *tail):
        window = max(T // 16, 4) if sees == "window" else None
        of = shape(T, K, sees, window)
        named = zip(("B", "T", "N", "K", "causal", "window"), of, strict=False)
        labels = dict(named) | {"sees": sees}
        cases.append(Case(labels, partial(time_attention, part, labels, of, sees)))
    return cases


def time_attention(part: Part, labels: dict, shape: attention.Shape, sees: str) -> None:
    allow_tf32("bfloat16")
    problem = attention.make_problem(shape, dtype="bfloat16")
    T, ids = shape.T, {}
    options_of_jax_nn: dict[str, Any] = {}
    if sees == "bias":
        bias = jax.random.normal(jax.random.key(4), (1, shape.N, T, T)).astype("bfloat16")
        *qkv, do = problem.arrays
        problem = problem._replace(arrays=(*qkv, bias, do))
    elif sees == "segments":
        segments = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) * 4 // T, (shape.B, T))
        ids = {"query_segment_ids": segments, "key_value_segment_ids": segments}
        mask = (segments[:, None, :, None] == segments[:, None, None, :])[:1]
        options_of_jax_nn = {"mask": mask}
    elif sees == "one":  # query for each row: decoding
        q, k, v, do = problem.arrays
        problem = problem._replace(arrays=(q[:, -1:], k, v, do[:, -1:]))
    if sees == "window":  # which jax.nn hands on to cuDNN only so
        options_of_jax_nn = {"is_causal": True}
    peers: dict[str, Callable[[], timing.Programs]] = {
        "ours": partial(attention.ours, problem, **ids),
        "ours, xla": partial(attention.ours, problem, implementation="xla", **ids),
        "ours, pallas": partial(attention.ours, problem, implementation="pallas", **ids),
        "cudnn": partial(attention.cudnn, problem, **options_of_jax_nn),
        "jax.nn": partial(attention.jax_nn, problem, 2**31, **options_of_jax_nn),
    }
    if sees == "one":  # the gradient may be served by fewer
        ours, jax_nn = rnnattn.dot_product_attention, jax.nn.dot_product_attention
        peers = {
            "ours": partial(forward_only, problem, ours, None),
            "ours, xla": partial(forward_only, problem, ours, "xla"),
            "ours, pallas": partial(forward_only, problem, ours, "pallas"),
            "jax.nn": partial(forward_only, problem, jax_nn, "xla"),
        }
        if jax.default_backend() == "gpu":
            peers["cudnn"] = partial(forward_only, problem, jax_nn, "cudnn")
    backends = {
        "torch, flash": "FLASH_ATTENTION",
        "torch, cudnn": "CUDNN_ATTENTION",
        "torch, efficient": "EFFICIENT_ATTENTION",
    }
    if jax.default_backend() == "cpu":
        backends = {"torch, flash": "FLASH_ATTENTION"}
    if sees == "bias":
        backends.pop("torch, flash")  # it takes none
    else:
        backends.pop("torch, efficient", None)
    if sees not in ("window", "segments"):
        peers |= {name: partial(attention.torch, problem, b) for name, b in backends.items()}
    jobs = {name: peer for name, peer in peers.items() if part.takes(name)}
    programs = compiled_in_parallel(part, labels, jobs)
    for kind in ("forward",) if sees == "one" else attention.KINDS:
        of_kind = {(name, T): each[kind] for name, each in programs.items()}
        times = medians(times_of(part, labels | {"kind": kind}, of_kind))
        for (peer, _), (median, low, high) in times.items():
            row = labels | {"kind": kind, "peer": peer, "ms": 1e3 * median}
            row["quartiles"] = [1e3 * low, 1e3 * high]
            row["compile_seconds"] = of_kind[peer, T].compile_seconds
            if sees == "one":
                row["gigabytes"] = 2 * sum(x.size for x in problem.arrays[1:3]) / median / 1e9
            else:
                row["tflops"] = products(shape, sees, kind) / median / 1e12
            if "ours, xla" in programs:
                actual, expected = (programs[p][kind].call() for p in (peer, "ours, xla"))
                row["differs"] = difference(actual, expected, lambda o: o[:, -1])
            part.row(**row)


def forward_only(
    problem: attention.Problem, function: Callable, implementation: str | None
) -> timing.Programs:
    apply = partial(function, implementation=implementation)
    return {"forward": timing.compiled(apply, *problem.arrays[:-1])}


def products(shape: attention.Shape, sees: str, kind: str) -> float:
    """The operations that are needed: two products forward, and five more in the gradient."""
    B, T, N, K, causal, window, *_ = shape
    pairs: float = T * (T + 1) / 2 if causal else T * T
    if window is not None:
        pairs = T * (window + 1) - window * (window + 1) / 2
    if sees == "segments":
        pairs = T * T / 4
    return (4 if kind == "forward" else 14) * B * N * K * pairs


# ---- scan -------------------------------------------------------------------------------------


def scan_cases(part: Part) -> list[Case]:
    shapes = [(128, 16), (512, 16), (128, 128), (512, 128)]
    unrolls: tuple[int, ...] = (1, 4, 8, 16)
    if part.dry:
        shapes, unrolls = [(8, 2)], (1, 4)
    if part.order.part == "scan with commands":
        shapes, unrolls = shapes[:2], unrolls[:1]
    return [Case({"H": H, "B": B}, partial(time_scan, part, H, B, unrolls)) for H, B in shapes]


def time_scan(part: Part, H: int, B: int, unrolls: Sequence[int]) -> None:
    """The plainest LSTM on XLA: inputs projected at once, and a loop over the rest."""
    labels = {"H": H, "B": B, "precision": "bfloat16"}
    lengths = (4, 16) if part.dry else (256, 1024)

    def programs(unroll, T):
        problem = lstm.make_problem(T, B, H, H, dtype="bfloat16")

        def apply(params, x):
            from_x = x @ params.w_x + params.b

            def step(carry, from_x):
                h, c = carry
                i, f, g, o = jnp.split(from_x + h @ params.w_h, 4, axis=-1)
                sigmoid, wide = jax.nn.sigmoid, jnp.float32
                c = sigmoid(f).astype(wide) * c + (sigmoid(i) * jnp.tanh(g)).astype(wide)
                h = sigmoid(o) * jnp.tanh(c).astype(h.dtype)
                return (h, c), h

            start = jnp.zeros((B, H), x.dtype), jnp.zeros((B, H), jnp.float32)
            carry, y = jax.lax.scan(step, start, from_x, unroll=unroll)
            return y, carry

        return lstm.jax_programs(apply, *problem)

    jobs = {(f"unroll {n}", T): partial(programs, n, T) for n in unrolls for T in lengths}
    made = compiled_in_parallel(part, labels, jobs)
    for kind in lstm.KINDS:
        of_kind = {key: each[kind] for key, each in made.items()}
        times = times_of(part, labels | {"kind": kind}, of_kind)
        for peer, slope in slopes(times, lengths).items():
            seconds = of_kind[peer, lengths[-1]].compile_seconds
            part.row(**labels, kind=kind, peer=peer, **slope, compile_seconds=seconds)


# ---- memory -----------------------------------------------------------------------------------


def memory_cases(part: Part) -> list[Case]:
    T, B, H = (16, 2, 8) if part.dry else (4096, 8, 256)
    cases = []
    function: Callable = rnnattn.lstm
    for residuals in ("gates",) if part.dry else ("gates", "states", 64):
        labels: dict[str, Any] = {"what": "lstm", "T": T, "B": B, "H": H, "residuals": residuals}
        functions = {
            str(s): partial(function, time_major=True, residuals=residuals, implementation=s)
            for s in (None, "xla", "pallas")
        }
        shaped = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
        params = jax.eval_shape(partial(rnnattn.init_lstm, input_size=H, hidden_size=H,
                                        dtype="bfloat16"), jax.random.key(0))  # fmt: skip

        def gradient(function, params, x, dy):
            _, pullback, _ = jax.vjp(function, params, x, has_aux=True)
            return pullback(dy)

        arrays = (params, shaped(T, B, H), shaped(T, B, H))
        cases.append(memory_case(part, labels, functions, gradient, arrays))
    for T in (16,) if part.dry else (4096, 16384):
        labels = {"what": "attention", "B": 1, "T": T, "N": 8, "K": 64, "sees": "causal"}
        schedules = [s for s in ATTENTION_SCHEDULES if s != "dense" or T <= 4096]
        functions = {
            str(s): partial(rnnattn.dot_product_attention, is_causal=True, implementation=s)
            for s in schedules
        }
        gradient = lambda function, *arrays: attention.gradient_of(function)(*arrays)
        cases.append(memory_case(part, labels, functions, gradient, [shaped(1, T, 8, 64)] * 4))
    return cases


def memory_case(part, labels, functions, gradient, arrays) -> Case:
    def measure():
        jobs = {
            name: partial(timing.temporary_mebibytes, partial(gradient, function), *arrays)
            for name, function in functions.items()
            if part.takes(name)
        }
        for name, size in compiled_in_parallel(part, labels, jobs).items():
            part.row(**labels, peer=name, mebibytes=size)

    return Case(labels, measure)


CASES: dict[str, Callable[[Part], list[Case]]] = {
    "machine": machine_cases,
    "values": value_cases,
    "lstm": lstm_cases,
    "attention": attention_cases,
    "scan": scan_cases,
    "scan with commands": scan_cases,
    "memory": memory_cases,
}

if __name__ == "__main__":
    run(Order(**json.loads(sys.argv[1])))
