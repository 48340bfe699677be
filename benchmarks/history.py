"""The speed of each release beside its peers: a file for each, and a figure of all.

    python -m benchmarks history                 the figure, of what is in results/releases
    python -m benchmarks history --add 0.1.0     first the file of this release, from results/

Times of two machines, or of two days, are not comparable: what is kept is what each peer took over
what ours took in the same run, as geometric means over the shapes.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import figure

RELEASES = figure.RESULTS / "releases"
FIGURE = figure.FIGURES / "history.svg"
INK = "#808080"  # which is seen on white and on black


def releases():
    """What was written of each, the oldest first."""
    number = lambda path: tuple(map(int, path.stem.split(".")))
    paths = sorted(RELEASES.glob("*.json"), key=number)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def add(release):
    machine = figure.results("2-cores-lstm")["machine"]
    RELEASES.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine, "means": figure.means()}, indent=1)
    (RELEASES / f"{release}.json").write_text(text + "\n")


def draw():
    kept = releases()
    whats = list(dict.fromkeys(what for found in kept.values() for what in found["means"]))
    with plt.rc_context(figure.style(INK, INK)):
        picture, all_axes = plt.subplots(1, len(whats), figsize=(10, 2.4), layout="constrained")
        for axes, what in zip(all_axes, whats, strict=True):
            for name, colour in figure.COLOURS.items():
                ratios = {r: found["means"].get(what, {}).get(name) for r, found in kept.items()}
                points = [(r, ratio) for r, ratio in ratios.items() if ratio is not None]
                if points:
                    label = figure.NAMES[name]
                    axes.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=label)
            axes.axhline(1, color=INK, lw=0.5)
            axes.set_ylim(0)
            axes.set_title(what, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        all_axes[0].set_ylabel("their time over ours")
        return figure.save(picture, FIGURE)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", metavar="X.Y.Z", help="a release, of the results that there are")
    args = parser.parse_args(argv)
    if args.add:
        if not all(part.isdecimal() for part in args.add.split(".")):
            parser.error(f"--add: a release is numbers and points, as 0.1.0; got {args.add}")
        add(args.add)
    print(draw())


if __name__ == "__main__":
    main()
