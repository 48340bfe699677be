"""Every benchmark by its name.

    python -m benchmarks                          what there is
    python -m benchmarks lstm --rounds 5          one of them, with its own options (--help)
    python -m benchmarks all --quick              the usual ones, one after another
    python -m benchmarks compare OLD.json NEW.json    what became slower, beyond the spread
    python -m benchmarks figure                   figures and tables of README, from results/
    python -m benchmarks history                  the figure of all releases, from results/releases

`--platform cpu`, `gpu` or `tpu`, before a name, says where JAX runs.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

USUAL = ("lstm", "attention", "rope", "vit", "units", "linear", "masks", "packed", "decoding")
MORE = ("sweep", "attention_gpu", "native", "sixteen_bits", "scaling", "devices", "visit", "tpu")
WITH_RESULTS = ("lstm", "attention", "rope", "vit", "decoding")  # which can write theirs
COMMANDS = ("all", "compare", "figure", "history")  # of all of these
QUICK = {
    "lstm": ["--shapes", "64,8,16,32"],
    "attention": ["--shapes", "2,128,2,32,causal"],
    "masks": ["--T", "256", "--heads", "2", "--rounds", "3", "--peers"],
    "packed": ["--T", "64", "--heads", "2"],
    "rope": ["--shapes", "2,128,2,32"],
    "vit": ["--shapes", "4,16,4,64,2"],
    "units": ["--shapes", "16,4,8,16"],
    "linear": ["--shapes", "1,256,16"],
    "decoding": ["--shapes", "2,128,2,1,16"],
}


def parse(argv=None):
    names = [*USUAL, *MORE]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"NAME: {', '.join(names)}; {', '.join(COMMANDS)}",
    )
    parser.add_argument("--platform", choices=["cpu", "gpu", "tpu"])
    parser.add_argument("name", choices=[*names, *COMMANDS], metavar="NAME")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="options of NAME")
    return parser, parser.parse_args(argv)


def run_all(parser, options):
    """Each in a process of its own: one that fails does not end the others."""
    quick = argparse.ArgumentParser(prog=f"{parser.prog} all")
    quick.add_argument("--quick", action="store_true", help="one round of small shapes")
    quick.add_argument("--output", type=Path, help="a folder for the results, as JSON")
    args = quick.parse_args(options)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in USUAL:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        command += ["--rounds", "1", *QUICK[name]] if args.quick else []
        if args.output and name in WITH_RESULTS:
            command += ["--output", str(args.output / f"{name}.json")]
        print(f"\n== {name}", flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def cells(results):
    """What each program took, by shape, kind and name."""
    return {
        (str(row["shape"]), kind, name): cell
        for row in results["speed"]["rows"]
        for kind, cells in row.items()
        if kind != "shape"
        for name, cell in cells.items()
    }


def slower(old, new):
    """(shape, kind, peer, before, now) where peers are relatively faster than they were.

    Times of two runs are not comparable, but the ratios within each are: against each peer, the
    whole quartile range has to lie below the one before.
    """
    before, now = cells(old), cells(new)
    for key in sorted(before.keys() & now.keys()):
        if key[2].startswith("ours"):
            continue
        a, b = before[key]["ratio"], now[key]["ratio"]
        if b["upper"] < a["lower"]:
            yield (*key, a["median"], b["median"])


def compare(parser, options):
    compared = argparse.ArgumentParser(prog=f"{parser.prog} compare")
    compared.add_argument("old", type=Path)
    compared.add_argument("new", type=Path)
    args = compared.parse_args(options)
    old, new = (_read(parser, path) for path in (args.old, args.new))
    found = list(slower(old, new))
    for shape, kind, peer, before, now in found:
        print(f"{shape} {kind}: {peer} took {before:.2f} times as long as ours, and {now:.2f} now")
    print(f"{len(found)} of {len(cells(old).keys() & cells(new).keys())} became slower")
    sys.exit(bool(found))


def _read(parser, path):
    try:
        results = json.loads(path.read_text())
        cells(results)
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"{path} has no results of {', '.join(WITH_RESULTS)}")
    return results


def main(argv=None):
    parser, args = parse(argv)
    if args.platform:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(args.platform, args.platform)
    if args.name == "all":
        return run_all(parser, args.options)
    if args.name == "compare":
        return compare(parser, args.options)
    sys.argv = [f"benchmarks/{args.name}.py", *args.options]
    import_module(f"benchmarks.{args.name}").main()


if __name__ == "__main__":
    main(sys.argv[1:] or ["--help"])
