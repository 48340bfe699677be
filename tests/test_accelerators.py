"""Programs for accelerators, compiled to the end on a machine that has none: do they compile, and
how many kernels, registers and bytes do they take? `make accelerators` installs what this needs.

The bounds lie a little above what was counted with jax 0.11.2 and 0.12.0.1. A change that exceeds
one costs something. If it brings more than that, its author writes the bound again.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rnnattn import (
    KVCache,
    bidirectional_lstm,
    dot_product_attention,
    init_lstm,
    lstm,
    stacked_lstm,
    update_cache,
)
from rnnattn.recurrent.chunked import ELSEWHERE

MIB = 2**20

# As NVIDIA describes it, in the data sheet and under compute capability 9.0 in the programming
# guide of CUDA. The accelerated features are the instructions that only Hopper has.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 80000000000
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
"""


@pytest.fixture(scope="module")
def h100():
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("CUDA's plug-in for JAX is not installed: `make accelerators` installs it")
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")


@pytest.fixture(scope="module", params=["v5e", "v6e"])
def tpu(request):
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make accelerators` installs it")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no service is asked which TPU this machine has
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # by processes side by side: none holds a TPU
    name = f"{request.param}:2x2"
    return topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=[2, 2, 1])


def compiled(topology, function, *arrays) -> Any:
    """For one device of the topology, without what the suite has other than users."""
    place = NamedSharding(Mesh(np.array(topology.devices[:1]), "d"), PartitionSpec())
    there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    with jax.enable_x64(False):
        lowered = jax.jit(function).lower(*jax.tree.map(there, arrays))
        return lowered.compile({"xla_backend_optimization_level": "3"})


def temporaries(program):
    """MiB."""
    return program.memory_analysis().temp_size_in_bytes / MIB


def of_lstm(sizes, dtype, masks=False, **options):
    """The forward pass and training, each with the shapes of its arguments."""
    T, B, D, H = sizes
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(lambda: init_lstm(jax.random.key(0), D, H, dtype=dtype))
    marks: Any = {"lengths": array(B, dtype=jnp.int32), "resets": array(T, B, dtype=bool)}

    def forward(params, x, marks):
        return lstm(params, x, time_major=True, **marks, **options)[0]

    def training(params, x, marks, dy):
        y, pullback = jax.vjp(lambda params, x: forward(params, x, marks), params, x)
        return y, *pullback(dy)

    arguments = (params, array(T, B, D), marks if masks else {})
    return (forward, *arguments), (training, *arguments, array(T, B, H))


def of_attention(B, T):
    """The forward pass and the gradient, causal, of 8 heads of 64."""
    query = jax.ShapeDtypeStruct((B, T, 8, 64), jnp.bfloat16)

    def forward(*qkv):
        return dot_product_attention(*qkv, is_causal=True, implementation="xla")

    def gradient(*arguments):
        return jax.vjp(forward, *arguments[:3])[1](arguments[3])

    return (forward, *3 * [query]), (gradient, *4 * [query])


# ---- the LSTM on XLA: kernels of a step --------------------------------------------------------

NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done"}


def kernels_of_loops(program):
    """How many one turn of each innermost loop launches, in the order in which the loops run."""
    bodies = {}
    for text in re.split(r"\n(?=\S)", program.as_text()):
        if named := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", text):
            bodies[named[1]] = re.findall(r"(?m)^ .*? = .*? ([a-z][a-z\-]*)\((.*)$", text)
    (entry,) = re.findall(r"(?m)^ENTRY %?([\w.\-]+) \(", program.as_text())

    def within(name, loops):
        count = 0
        for operation, rest in bodies[name]:
            called = re.findall(r"(?:body|to_apply)=%?([\w.\-]+)", rest)
            if operation == "while":
                inner: list[int] = []
                own = within(called[0], inner)
                loops += inner or [own]
            elif operation == "call":
                count += within(called[0], loops)
            else:
                count += operation not in NO_KERNEL
        return count

    loops: list[int] = []
    within(entry, loops)
    return loops


@pytest.mark.parametrize(
    ("sizes", "dtype", "memory"),
    [
        ((512, 16, 128, 128), jnp.bfloat16, (20, 60)),
        ((512, 128, 512, 512), jnp.bfloat16, (220, 850)),
        ((784, 64, 1, 128), jnp.float32, (120, 350)),
    ],
)
def test_a_step_on_xla_is_few_kernels(sizes, dtype, memory, h100):
    forward, training = of_lstm(sizes, dtype, implementation="xla", residuals="states")
    programs = compiled(h100, *forward), compiled(h100, *training)
    for program, most in zip(programs, ([2.75], [3.25, 3.5]), strict=True):
        per_step = [n / ELSEWHERE.turn for n in kernels_of_loops(program)]
        within = [count <= bound for count, bound in zip(per_step, most, strict=True)]
        assert all(within), per_step
    made = [temporaries(program) for program in programs]
    assert made[0] <= memory[0] and made[1] <= memory[1], made


# ---- the LSTM by Pallas: registers and shared memory -------------------------------------------

SHARED_MEMORY = 227 * 1024  # of a block, on a Hopper GPU


@pytest.fixture
def kernels(h100, tmp_path, monkeypatch) -> Callable:
    """Of each kernel: registers of a thread, bytes spilled, bytes of a block's shared memory."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("jax 0.10 says nothing of the memory that its kernels take")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def of(function, *arguments):
        compiled(h100, function, *arguments)
        for log in sorted(tmp_path.glob("*.ptxas")):
            said = log.read_text()
            (registers,) = re.findall(r"Used (\d+) registers", said)
            spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)
            planned = log.with_suffix(".resources.txt").read_text()
            (shared,) = re.findall(r"smem_scratch_bytes=(\d+)", planned)
            yield int(registers), sum(map(int, spilled)), int(shared)

    return of


# H: registers without masks and with them, and KiB of the forward and of the backward kernel. A
# thread can have 255.
BOUNDS = {
    64: ((192, 216), (5, 25)),
    128: ((232, 240), (10, 42)),
    256: ((192, 216), (146, 98)),
    384: ((180, 224), (218, 162)),
    512: ((232, 245), (226, 210)),
}


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("H", BOUNDS)
def test_the_kernels_for_a_hopper_gpu_fit_into_it(H, masks, kernels):
    sizes = (64, 32, H, H)
    _, training = of_lstm(sizes, jnp.bfloat16, masks, implementation="pallas", residuals="states")
    made = list(kernels(*training))
    registers, memory = BOUNDS[H]
    assert len(made) == 2
    for (taken, spilled, shared), most in zip(made, memory, strict=True):
        assert spilled == 0 and taken <= registers[masks], made
        assert shared <= most * 1024 <= SHARED_MEMORY, made


# ---- attention by Pallas: registers and shared memory ------------------------------------------

# K, V and whether there is a bias: KiB of the forward kernel, and of those of the gradient of
# queries and of keys; and bytes spilled in all, where some of a block are hidden.
ATTENTION_BOUNDS = {
    (64, 64, False): ((83, 96, 66), 0),
    (128, 64, False): ((131, 104, 98), 0),
    (128, 128, False): ((163, 128, 130), 0),
    (64, 64, True): ((146, 192, 98), 40),
    (128, 64, True): ((194, 144, 130), 0),
    (128, 128, True): ((226, 176, 162), 40),
}


@pytest.mark.parametrize("sizes", ATTENTION_BOUNDS)
def test_the_kernels_of_attention_fit_into_a_hopper_gpu(sizes, kernels):
    """With segments or a bias, and a soft cap, which take the most registers: the widest has none
    for both.
    """
    K, V, biased = sizes
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((2, 256, *shape), dtype)
    q, k, v = (array(jnp.bfloat16, *shape) for shape in ((4, K), (2, K), (2, V)))
    bias = jax.ShapeDtypeStruct((1, 4, 256, 256), jnp.bfloat16) if biased else None

    def training(q, k, v, bias, ids, do):
        segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        cap = 30.0 if min(K, V) < 128 else None
        how: dict[str, Any] = {
            "is_causal": True,
            "logits_soft_cap": cap,
            "implementation": "pallas",
        }
        how |= {} if biased else segments
        attend = lambda *arrays: dot_product_attention(*arrays, **how)
        o, pullback = jax.vjp(attend, q, k, v, bias)
        return o, *pullback(do)

    do = array(jnp.bfloat16, 4, V)
    made = list(kernels(training, q, k, v, bias, array(jnp.int32), do))
    memory, most_spilled = ATTENTION_BOUNDS[sizes]
    assert len(made) == 3 and sum(spilled for _, spilled, _ in made) <= most_spilled, made
    taken = [shared for *_, shared in made]  # compiled side by side, and so in any order
    for shared, most in zip(sorted(taken), sorted(memory), strict=True):
        assert shared <= most * 1024 <= SHARED_MEMORY, made


# ---- attention on XLA: memory ------------------------------------------------------------------


@pytest.mark.parametrize(("B", "T"), [(32, 1024), (8, 4096), (2, 16384)])
def test_attention_in_16_bits_takes_no_more_than_its_blocks(B, T, h100):
    """The logits of all heads alone are 1, 4 and 16 GiB in bfloat16."""
    forward, gradient = of_attention(B, T)
    made = [temporaries(compiled(h100, *program)) for program in (forward, gradient)]
    assert made[0] <= 500 and made[1] <= 980, made


# ---- TPUs: memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_lstm_compiles_for_tpus(dtype, tpu):
    forward, training = of_lstm((512, 128, 512, 512), dtype, implementation="xla")
    made = [temporaries(compiled(tpu, *program)) for program in (forward, training)]
    assert made[0] <= 220 and made[1] <= 820, made


@pytest.mark.parametrize(
    ("sizes", "dtype", "masks", "memory"),
    [
        ((512, 128, 256, 256), jnp.bfloat16, False, (135, 740)),
        ((9, 200, 128, 1024), jnp.float32, True, (20, 130)),  # the widest, and tiles not full
    ],
)
def test_the_kernels_of_the_lstm_compile_for_tpus(sizes, dtype, masks, memory, tpu):
    """That they fit into VMEM is seen by this: they ask for less than a TPU has."""
    programs = of_lstm(sizes, dtype, masks, implementation="pallas", residuals="states")
    made = [compiled(tpu, *program) for program in programs]
    kernels = [program.as_text().count('custom_call_target="tpu_custom_call"') for program in made]
    assert kernels == [1, 2]
    taken = [temporaries(program) for program in made]
    assert taken[0] <= memory[0] and taken[1] <= memory[1], taken


@pytest.mark.parametrize(("K", "dtype"), [(64, jnp.bfloat16), (256, jnp.float32)])
def test_the_kernels_of_attention_compile_for_tpus(K, dtype, tpu):
    """With all that takes VMEM, which they ask for less of than a TPU has; tiles of two sizes."""
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((2, *shape), dtype)
    q, k, ids = array(1100, 4, K), array(1100, 2, K), array(1100, dtype=jnp.int32)

    def training(q, k, v, ids, do):
        segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        how: dict[str, Any] = segments | {"is_causal": True, "logits_soft_cap": 30.0}
        attend = partial(dot_product_attention, **how, implementation="pallas")
        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    made = compiled(tpu, training, q, k, k, ids, q)
    assert made.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert temporaries(made) <= 2, temporaries(made)


def test_attention_compiles_for_tpus(tpu):
    forward, gradient = of_attention(8, 4096)
    made = [temporaries(compiled(tpu, *program)) for program in (forward, gradient)]
    assert made[0] <= 410 and made[1] <= 1150, made


# ---- export: of what no other test exports ------------------------------------------------------


def test_layers_and_the_cache_export_for_gpu_and_tpu():
    x, tokens = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((2, 1, 2, 4), jnp.bfloat16)
    first, second = (init_lstm(jax.random.key(0), D, 4, dtype=x.dtype) for D in (4, 8))
    room = jnp.ones((2, 8, 2, 4), x.dtype)
    cache = KVCache(room, room, jnp.array([1, 5], jnp.int32))

    def layers(x, first, second):
        above = stacked_lstm([(first, first), second], x)[0]
        return above + bidirectional_lstm(first, first, x)[0][..., :4]

    def decoded(tokens, cache):
        cache, before = update_cache(cache, tokens, tokens), cache.length
        options = {"is_causal": True, "query_offset": before}
        return dot_product_attention(tokens, cache.key, cache.value, **options)

    def gradient(function, *arguments):
        y, pullback = jax.vjp(lambda x: function(x, *arguments[1:]), arguments[0])
        return pullback(y)

    for function, *arguments in ((layers, x, first, second), (decoded, tokens, cache)):
        for f in (function, partial(gradient, function)):
            jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*arguments)
