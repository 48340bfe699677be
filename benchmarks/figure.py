"""The figure and the table of speeds in README, from the results that are committed.

    python -m benchmarks figure

The results are those of

    python benchmarks/lstm.py --rounds 5 --output benchmarks/results/cpu-2-cores-lstm.json
    python benchmarks/attention.py --rounds 3 --output benchmarks/results/cpu-2-cores-attention.json
    python benchmarks/attention.py --memory --output benchmarks/results/cpu-memory-attention.json

the last with RNNATTN_NATIVE=off in the environment, since XLA does not see what kernels allocate.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import geometric_mean, medians

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "assets"
START, END = "<!-- speed -->", "<!-- /speed -->"
NAMES = {"ours": "rnnattn", "jax.nn": "jax.nn", "torch": "torch", "flax": "Flax", "haiku": "Haiku"}
COLOURS = {"ours": "#4051b5", "jax.nn": "#d9822b", "torch": "#c23b3b"}
COLOURS |= {"flax": "#3a9a5b", "haiku": "#8a5bb5"}
SHADES = {"light": ("#222222", "#cccccc"), "dark": ("#dddddd", "#555555")}


def results(name):
    return json.loads((RESULTS / f"cpu-{name}.json").read_text())


def times():
    """Milliseconds of attention's gradient for each query, by T: causal, from 1024 on."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in results("2-cores-attention")["speed"]["rows"]:
        B, T, N, _, causal, *_ = row["shape"]
        if causal:
            for name, cell in row["gradient"].items():
                lines.setdefault(name, []).append((T, 1e3 * cell["milliseconds"] / (B * T * N)))
    return {name: lines[name] for name in ("ours", "jax.nn", "torch")}


def training():
    """Milliseconds of training an LSTM, by shape and library."""
    rows = results("2-cores-lstm")["speed"]["rows"]
    return {
        "T {}, B {}\nD {}, H {}".format(*row["shape"]): {
            name: row["training"][name]["milliseconds"] for name in ("ours", "torch", "flax")
        }
        for row in rows
        if row["shape"] in ([784, 64, 1, 128], [128, 32, 128, 128], [64, 64, 256, 512])
    }


def memory():
    """MiB of temporaries of attention's gradient, by T: causal."""
    gradient = results("memory-attention")["memory"]["gradient"]
    return {
        name: sorted((int(T), size) for T, size in gradient[name]["causal"].items())
        for name in ("ours", "jax.nn")
    }


def style(ink, edge) -> Any:
    """Matplotlib's settings of a figure without a ground, the same bytes each time."""
    names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    same = {"axes.edgecolor": edge, "font.size": 9, "svg.hashsalt": "rnnattn"}
    return {**dict.fromkeys(names, ink), **same}


def save(picture, path):
    picture.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(picture)
    return path


def draw(shade):
    ink, grid = SHADES[shade]
    with plt.rc_context(style(ink, grid)):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
        groups = training()
        for at, (name, offset) in enumerate(
            zip(("ours", "flax", "torch"), (-1, 0, 1), strict=True)
        ):
            heights = [group[name] / group["ours"] for group in groups.values()]
            places = [g + 0.27 * offset for g in range(len(groups))]
            left.bar(places, heights, 0.25, color=COLOURS[name], label=NAMES[name], zorder=2 + at)
        left.set_xticks(range(len(groups)), list(groups), fontsize=7.5)
        left.set_title("LSTM, training: time over ours", fontsize=10)
        for axes, lines in ((middle, times()), (right, memory())):
            for name, points in lines.items():
                axes.loglog(*zip(*points, strict=True), "o-", color=COLOURS[name], ms=4)
                axes.annotate(
                    *(NAMES[name], points[-1]),
                    (4, 4),
                    textcoords="offset points",
                    color=COLOURS[name],
                )
            axes.set_xlabel("T")
            axes.margins(x=0.22, y=0.15)
            ticks = sorted({T for points in lines.values() for T, _ in points})
            axes.set_xticks(ticks, [str(T) for T in ticks])
            axes.minorticks_off()
        middle.set_title("causal attention, gradient:\nμs for a query of a head", fontsize=10)
        right.set_title("causal attention, gradient:\nMiB of temporaries on XLA", fontsize=10)
        left.legend(frameon=False, fontsize=8)
        for axes in (left, middle, right):
            axes.grid(axis="y", color=grid, lw=0.5, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
        return save(figure, FIGURES / f"speed-{shade}.svg")


def means():
    """Geometric means of each peer's time over ours, by what was timed."""
    lstm = results("2-cores-lstm")["speed"]["rows"]
    # a window, at which ours skips what others compute, is not of the mean
    attention = [r for r in results("2-cores-attention")["speed"]["rows"] if r["shape"][5] is None]
    return {
        f"{what}, {kind}": {name: geometric_mean(medians(rows, name, [kind])) for name in peers}
        for what, rows, kinds, peers in [
            ("LSTM", lstm, ("forward", "training"), ("torch", "flax", "haiku")),
            ("attention", attention, ("forward", "gradient"), ("torch", "jax.nn")),
        ]
        for kind in kinds
    }


def table():
    """README's rows of speed."""
    sizes = results("memory-attention")["memory"]["gradient"]
    at_most = lambda name: max(of_T["4096"] for of_T in sizes[name].values())
    rows = [
        (
            what,
            ", ".join(f"{NAMES[name]} {ratio:.1f}" for name, ratio in ratios.items()),
            what.split(",")[0].lower(),
        )
        for what, ratios in means().items()
    ]
    rows += [
        (
            "its temporary memory at T 4096, on XLA",
            f"{at_most('ours'):.0f} MiB, where jax.nn takes {at_most('jax.nn'):.0f}",
            "attention --memory",
        ),
    ]
    lines = ["| two CPU cores, float32 | their time over ours | `python -m benchmarks …` |"]
    lines += ["|---|---|---|", *(f"| {a} | {b} | `{c}` |" for a, b, c in rows)]
    return "\n".join([START, *lines, END])


def main():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        sys.exit(f"{readme}: needs the markers {START} and {END}, once each")
    readme.write_text(text.split(START)[0] + table() + text.split(END)[1], encoding="utf-8")
    for shade in SHADES:
        print(draw(shade))


if __name__ == "__main__":
    main()
