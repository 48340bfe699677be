"""One visit to a machine with an accelerator: all that is to be known of it, in nine minutes.

    python -m benchmarks.visit --output DIR
    python -m benchmarks.visit --output DIR --parts lstm,attention --minutes 4
    python -m benchmarks.visit --output DIR --dry                       tiny sizes, on a CPU

Each part runs in a process of its own and has its share of the time that is left. What it finds is
appended to DIR/rows.jsonl at once; in the end come visit.json, visit.md and visit.svg. A process
that hangs or dies leaves a row with an "error", and another goes on without the peer it died of.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What runs for each part: its name in `visit_parts.py`, its share of the time, and XLA's flags.
PARTS: dict[str, list[tuple[str, int, str]]] = {
    "machine": [("machine", 30, "")],
    "values": [("values", 120, "")],
    "lstm": [("lstm", 165, "")],
    "attention": [("attention", 125, "")],
    "scan": [
        ("scan", 35, ""),
        ("scan with commands", 20, "--xla_gpu_enable_command_buffer=+WHILE"),
    ],
    "memory": [("memory", 40, "")],
}
PROCESS = [sys.executable, "-m", "benchmarks.visit_parts"]
LAST = 10  # seconds for the report
GRACE = 20  # seconds that a part's last case may take over its time

Row = Mapping[str, Any]


def visit(output: Path, parts: Sequence[str], minutes: float, dry: bool) -> list[Row]:
    """Runs the parts and returns all rows, those of earlier visits to the same folder too."""
    end = time.time() + 60 * minutes - LAST
    runs = [run for part in parts for run in PARTS[part]]
    rows = output / "rows.jsonl"
    kept = [row for row in read(rows) if row["part"] not in [name for name, *_ in runs]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
    while runs:
        name, share, flags = runs[0]
        left = end - time.time()
        seconds = left * share / sum(share for _, share, _ in runs)
        start = time.time()
        if left > 0:
            run_part(output, name, flags, min(start + seconds, end - GRACE / 2), end, dry)
        else:
            append(rows, {"part": name, "left_out": "out of time"})
        took = time.time() - start
        append(rows, {"part": name, "seconds": round(took, 1)})
        print(f"{name}: {took:.0f} s of {seconds:.0f}", flush=True)
        runs.pop(0)
    return read(rows)


def run_part(output: Path, name: str, flags: str, until: float, end: float, dry: bool) -> None:
    """A process for the part; another for the rest of it, if that one ends too early."""
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    if (platforms := os.getenv("JAX_PLATFORMS")) and "cpu" not in platforms:
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"  # where float64 is computed
    quickly = "--xla_backend_optimization_level=0" if dry else ""
    environment["XLA_FLAGS"] = f"{os.getenv('XLA_FLAGS') or quickly} {flags}".strip()
    running, log = output / "running.json", output / f"{name}.log".replace(" ", "_")
    first, without = 0, list[str]()
    log.write_text("")
    while time.time() < until - 5 or first == 0:
        order = {
            "part": name, "output": str(output), "until": until, "dry": dry,
            "first": first, "without": without,
        }  # fmt: skip
        running.unlink(missing_ok=True)
        with log.open("a") as said:
            process = subprocess.Popen(
                [*PROCESS, json.dumps(order)],
                cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(max(1.0, min(until + GRACE, end) - time.time()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code == 0:
            break
        why = "killed: out of time" if code is None else f"ended with {code}"
        where = json.loads(running.read_text()) if running.exists() else {}
        peer, case = where.get("peer"), where.get("case", first)
        last = " | ".join(log.read_text(errors="replace").splitlines()[-12:])[-800:]
        row = {"part": name, **where.get("labels", {}), "peer": peer, "error": f"{why}: {last}"}
        append(output / "rows.jsonl", row)
        if code is None or not where:
            break
        if peer is None or peer in without:
            first = case + 1
        else:
            first, without = case, [*without, peer]
    running.unlink(missing_ok=True)


def append(rows: Path, row: Row) -> None:
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(rows: Path) -> list[Row]:
    """The rows of a file; a line that was cut off is none."""
    found = []
    for line in rows.read_text().splitlines() if rows.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


# ---- the report -------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    about: dict[str, Any] = next((row["about"] for row in rows if "about" in row), {})
    of = lambda *parts: [row for row in rows if row["part"] in parts]
    sections = [
        "# A visit",
        "\n".join(
            f"- {key}: {about[key]}"
            for key in ("device", "driver", "torch", "platform", "processor", "commit")
            if about.get(key)
        ),
        "\n".join(
            f"- {row['what']}, {row['precision']}: {row['tflops']:.1f} TFLOP/s"
            if "tflops" in row
            else f"- {row['what']}: {row['gigabytes']:.0f} GB/s, read and written"
            for row in of("machine")
            if "tflops" in row or "gigabytes" in row
        ),
        values_table(of("values")),
        lstm_table(of("lstm"), rates(rows)),
        attention_table(of("attention"), rates(rows)),
        scan_table(of("scan", "scan with commands")),
        memory_table(of("memory")),
        "## Not measured\n\n" + (not_measured(rows) or "Nothing."),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def rates(rows: Iterable[Row]) -> dict[str, float]:
    """TFLOP/s of a product by its precision, and GB/s of a copy as "copy"."""
    found = {}
    for row in rows:
        if row["part"] == "machine" and "tflops" in row:
            found[row["precision"]] = row["tflops"]
        elif row["part"] == "machine" and "gigabytes" in row:
            found["copy"] = row["gigabytes"]
    return found


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    bar = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([bar(head), bar(["---"] * len(head)), *map(bar, lines)])


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in rows))


def values_table(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "ok" in row]
    if not measured:
        return ""
    schedules = names(measured)
    lines = []
    for (what, dtype), group in grouped(measured, "what", "dtype").items():
        cells = []
        for schedule in schedules:
            own = [row for row in group if row["peer"] == schedule]
            wrong = [f"{row['case']} ({row['of']} {row['worst']:.1e})"
                     for row in own if not row["ok"]]  # fmt: skip
            worst = max((row["worst"] for row in own if row["ok"]), default=math.nan)
            cell = f"{len(own) - len(wrong)} of {len(own)}, to {worst:.0e}" if own else "–"
            cells.append("; ".join([cell, *wrong]))
        lines.append([f"{what}, {dtype} (≤ {group[0]['bound']:.0e})", *cells])
    note = (
        "Cases in which outputs and gradients are within the bound of float64, and the largest "
        "relative error of these; then those that are not. By `implementation`."
    )
    return f"## Values\n\n{note}\n\n" + table(["", *schedules], lines)


def lstm_table(rows: Sequence[Row], rate: Mapping[str, float]) -> str:
    measured = [row for row in rows if "us_step" in row]
    if not measured:
        return ""
    peers = [name for name in names(measured) if name != "ours"]
    lines = []
    keys = ("precision", "H", "B", "ragged", "kind")
    for (precision, H, B, ragged, kind), group in grouped(measured, *keys).items():
        time_of = {row["peer"]: row["us_step"] for row in group}
        ours = time_of.get("ours", math.nan)
        training = kind == "training"
        size = 4 if precision in ("float32", "tf32") else 2
        operations = (3 if training else 1) * 16 * B * H * H
        moved = (4 if training else 2) * B * H * size  # x and y; in training dx and dy too
        lines.append([
            f"{precision}, {H}, {B}{', ragged' if ragged else ''}, {kind}",
            f"{ours:.2f}",
            *(ratio(time_of.get(peer, math.nan), ours) for peer in peers),
            share(operations / ours / 1e6, rate.get(precision)),
            share(moved / ours / 1e3, rate.get("copy")),
        ])  # fmt: skip
    note = (
        "Microseconds per step of ours, the slope over T; time of the peer / ours, above 1 ours is "
        "the faster; and the share of the rate of a product, and of a copy for x, y, dx and dy "
        "alone."
    )
    head = ["precision, H = D, B", "ours, μs", *peers, "of product", "of copy"]
    return f"## LSTM\n\n{note}\n\n" + table(head, lines) + differing(measured)


def attention_table(rows: Sequence[Row], rate: Mapping[str, float]) -> str:
    measured = [row for row in rows if "ms" in row]
    if not measured:
        return ""
    peers = names(measured)
    lines = []
    keys = ("B", "T", "N", "K", "sees", "kind")
    for (B, T, N, K, sees, kind), group in grouped(measured, *keys).items():
        of = {row["peer"]: row for row in group}
        cudnn = of.get("cudnn", of.get("torch, cudnn"))
        ours = of.get("ours", {"ms": math.nan})
        best, limit = (
            (ours.get("gigabytes", math.nan), "copy")
            if sees == "one"
            else (ours.get("tflops", math.nan), "bfloat16")
        )
        lines.append([
            f"{B}, {T}, {N}, {K}, {sees}, {kind}",
            *(f"{of[peer]['ms']:.3f}" if peer in of else "–" for peer in peers),
            ratio(cudnn["ms"] if cudnn else math.nan, ours["ms"]),
            f"{best:.1f}",
            share(best, rate.get(limit)),
        ])  # fmt: skip
    note = (
        "Milliseconds, bfloat16; the share of cuDNN's speed that ours has; TFLOP/s of ours "
        "(GB/s of keys and values for one query, which is decoding), and its share of the rate of "
        "a product (a copy). A gradient is the output and all gradients, seven products."
    )
    head = ["B, T, N, K, sees", *peers, "of cuDNN", "ours, TFLOP/s", "of limit"]
    return f"## Attention\n\n{note}\n\n" + table(head, lines) + differing(measured)


def differing(rows: Iterable[Row]) -> str:
    """A warning for results that are not those of the schedule on XLA."""
    wrong = [
        f"- {row['peer']}, {described(row)}: {row['differs']:.1e}"
        for row in rows
        if not row.get("differs", 0) <= 0.05
    ]
    if not wrong:
        return ""
    return "\n\nNot the results of ours, xla, at the last step:\n\n" + "\n".join(wrong)


def scan_table(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "us_step" in row]
    if not measured:
        return ""
    commands = lambda row: ", command buffers" * row["part"].endswith("commands")
    measured = [{**row, "peer": row["peer"] + commands(row)} for row in measured]
    peers = names(measured)
    lines = []
    for (H, B, kind), group in grouped(measured, "H", "B", "kind").items():
        of = {row["peer"]: f"{row['us_step']:.2f}" for row in group}
        lines.append([f"{H}, {B}, {kind}", *(of.get(peer, "–") for peer in peers)])
    note = "Microseconds per step of a plain LSTM in a `lax.scan`, bfloat16."
    return f"## Scan\n\n{note}\n\n" + table(["H = D, B", *peers], lines)


def memory_table(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "mebibytes" in row]
    if not measured:
        return ""
    peers = names(measured)
    lines = []
    for group in grouped(measured, "what", "T", "residuals").values():
        of = {row["peer"]: f"{row['mebibytes']:.1f}" for row in group}
        lines.append([described(group[0]), *(of.get(peer, "–") for peer in peers)])
    note = (
        "MiB of temporary memory of the gradient, bfloat16, as XLA plans it, by `implementation`."
    )
    return f"## Memory\n\n{note}\n\n" + table(["", *peers], lines)


MEASURES = {
    "part", "peer", "error", "left_out", "us_step", "quartiles", "ms", "tflops", "gigabytes",
    "differs", "compile_seconds", "mebibytes", "ms_512", "causal", "window",
}  # fmt: skip


def described(row: Row) -> str:
    return ", ".join(f"{k} {v}" for k, v in row.items() if k not in MEASURES and v is not False)


def not_measured(rows: Iterable[Row]) -> str:
    """Errors and what was left out; the same reason once, with how often."""
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        reason = row.get("error") or row.get("left_out")
        if reason:
            kind = "error" if "error" in row else "left out"
            key = row["part"], row.get("peer"), kind, " ".join(reason.split())
            lines.setdefault(key, []).append(described(row))
    return "\n".join(
        f"- {part}{f', {peer}' if peer else ''}, {len(where)} × {kind}"
        f"{f' (first: {where[0]})' if where[0] else ''}: {reason[:400].replace('|', '/')}"
        for (part, peer, kind, reason), where in lines.items()
    )


def ratio(theirs: float, ours: float) -> str:
    return "–" if math.isnan(theirs / ours) else f"{theirs / ours:.2f}"


def share(value: float, limit: float | None) -> str:
    return "–" if limit is None or math.isnan(value) else f"{value / limit:.1%}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """The LSTM on the left, attention on the right; forward above, with the gradient below."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot, panels = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    of: Callable[[str, str], list[Row]] = lambda part, y: [
        row for row in rows if row["part"] == part and y in row
    ]
    sixteen_bits = [row for row in of("lstm", "us_step") if row["precision"] == "bfloat16"]
    whole = [row for row in sixteen_bits if not row["ragged"]]
    causal = [row for row in of("attention", "tflops") if row["sees"] == "causal"]
    for column, (found, axes_of, y, title) in enumerate((
        (whole, ("H", "B"), "us_step", "LSTM, bfloat16, μs per step"),
        (causal, ("K", "T"), "tflops", "attention, bfloat16, causal, TFLOP/s"),
    )):  # fmt: skip
        for line, kinds in enumerate((("forward",), ("training", "gradient"))):
            axes = panels[line][column]
            of_panel = [row for row in found if row["kind"] in kinds]
            places = sorted(grouped(of_panel, *axes_of))
            for (peer,), group in grouped(of_panel, "peer").items():
                height = {tuple(row[x] for x in axes_of): row[y] for row in group}
                xs = [i for i, place in enumerate(places) if place in height]
                axes.plot(xs, [height[places[i]] for i in xs], marker="o", label=peer)
            axes.set(title=f"{title}, {kinds[-1]}", xlabel=", ".join(axes_of), yscale="log")
            axes.set_xticks(range(len(places)), [", ".join(map(str, p)) for p in places])
            if places:
                axes.legend(fontsize="small")
    plot.savefig(path)
    pyplot.close(plot)


# ---- the command line -------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.visit", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=folder, required=True, metavar="DIR")
    parser.add_argument("--parts", type=part_names, default=list(PARTS), metavar="A,B,…",
                        help=f"some of {', '.join(PARTS)}, in this order")  # fmt: skip
    parser.add_argument("--minutes", type=positive, default=9.0, help="for everything")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to try it on a CPU")
    return parser.parse_args(argv)


def part_names(text: str) -> list[str]:
    asked = text.split(",")
    for name in asked:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name[:80]!r} is none of {', '.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.25 <= number <= 600:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no number from 0.25 to 600")
    return number


def folder(text: str) -> Path:
    """A folder to write to, as an argument; made at once."""
    path = Path(text).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be written to")
    return path


def main() -> None:
    args = parse()
    rows = visit(args.output, args.parts, args.minutes, args.dry)
    about: dict[str, Any] = next((row["about"] for row in rows if "about" in row), {})
    results = {"device": about.get("device"), "versions": about.get("versions"), "rows": rows}
    (args.output / "visit.json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(rows)
    (args.output / "visit.md").write_text(text)
    print(text)
    figure(rows, args.output / "visit.svg")


if __name__ == "__main__":
    main()
