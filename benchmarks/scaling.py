"""What a step of training holds and sends on each device, beside the formulas of docs/scaling.md.

Nothing runs: the step is compiled for eight devices of the CPU, and its HLO is read.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from experiments.data.images import Images
from experiments.data.text import Windows
from experiments.engine import devices as mesh
from experiments.engine.devices import ParallelConfig
from experiments.engine.training import TrainConfig, make_optimizer, shardings, start, train_step
from experiments.models import text as lstm_text, vit

ROWS, CHARACTERS = 64, 100
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def lstm(T: int):
    config = lstm_text.TextModelConfig(hidden_size=256, embedding_size=64, layers=2)
    params = jax.eval_shape(lambda key: lstm_text.init_text(key, CHARACTERS, config), key())
    carry = jax.eval_shape(lambda: lstm_text.zero_states(params, ROWS))
    batch = Windows(shape((ROWS, T + 1), jnp.int32), shape((), jnp.bool_))
    return lstm_text.loss_under("hand", 0.0), params, carry, batch


def transformer(side: int):
    config = vit.ViTConfig(patch_size=2, width=128, depth=4, num_heads=4)
    model = vit.build(config, (side, side, 1), 10)
    params, apply = vit.functional(model)
    batch = Images(shape((ROWS, side, side, 1), jnp.float32), shape((ROWS,), jnp.int32))
    return vit.loss_of(apply), params, None, batch


def shape(size, dtype, sharding=None):
    return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)


def key():
    return jax.random.key(0)


def compiled(task, data: int, fsdp: int):
    """The compiled step, and the bytes of its parameters: all, and of those cut among devices."""
    loss, params, carry, batch = task
    devices = mesh.make_mesh(ParallelConfig(data, fsdp))
    assert devices is not None
    optimizer = make_optimizer(TrainConfig())
    state = jax.eval_shape(lambda p, c: start(p, optimizer, c), params, carry)
    placed = lambda tree, places: jax.tree.map(
        lambda x, place: shape(x.shape, x.dtype, place), tree, places
    )
    state = placed(state, shardings(state, devices))
    step = train_step.lower(
        loss, optimizer, state, placed(batch, mesh.rows(batch, devices)), key(),
        skip=False, mesh=devices,
    ).compile()  # fmt: skip
    leaves = jax.tree.leaves(state.params)
    cut = sum(x.size * 4 for x in leaves if not x.sharding.is_fully_replicated)
    return step, sum(x.size * 4 for x in leaves), cut


def results_of_collectives(hlo: str) -> dict[str, float]:
    """Bytes of the results of each kind of collective; those in a loop as often as it turns."""
    times, inside = defaultdict(lambda: 1), ""
    found: list[tuple[str, str, int]] = []
    calls: list[tuple[str, str, int]] = []
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            inside = head[1]
        elif loop := re.search(r" while\(.*body=%([\w.-]+)", line):
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            calls.append((inside, loop[1], int(turns[1]) if turns else 1))
        elif op := re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", line):
            sizes = re.findall(r"f32\[([\d,]*)\]", op[1])
            numbers = [[int(n) for n in size.split(",") if n] for size in sizes]
            found.append((inside, op[2], sum(4 * math.prod(n) for n in numbers)))
    for outer, body, turns in reversed(calls):
        times[body] = turns * times[outer]
    total: dict[str, float] = defaultdict(float)
    for where, kind, size in found:
        total[kind] += size * times[where]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=timing.count, nargs="+", default=[64, 256])
    parser.add_argument("--sides", type=timing.count, nargs="+", default=[8, 16])
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    mib = lambda size: f"{size / 2**20:.2f}"
    print("| model | data × fsdp | P w | state (3 P w / fsdp) | temporaries | all-gather (P w) "
          "| all-reduce |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    tasks = {f"LSTM, T {T}": lstm(T) for T in options.lengths}
    tasks |= {f"ViT, T {side**2 // 4}": transformer(side) for side in options.sides}
    for name, task in tasks.items():
        for data, fsdp in MESHES:
            step, size, cut = compiled(task, data, fsdp)
            memory, moved = step.memory_analysis(), results_of_collectives(step.as_text())
            state = 3 * (size - cut + cut / fsdp)
            cells = [
                name, f"{data} × {fsdp}", mib(size),
                f"{mib(memory.output_size_in_bytes)} ({mib(state)})",
                mib(memory.temp_size_in_bytes),
                f"{mib(moved['all-gather'])} ({mib(cut if fsdp > 1 else 0)})",
                mib(moved["all-reduce"]),
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
