"""Absurd inputs, drawn from a seed, for the command line: configs, options, data, damaged runs and
environments.

    python -m tests.experiments.absurd --count 1000 --seed 0

Whatever comes in, it ends by itself, without a traceback, with a line or a few that a terminal can
show. Exit code 2 leaves every file as it was; 1, of a run that failed, all but the run's own. What
is drawn may also be no more than unusual: then it runs, and 0 is as good, or trains for years, and
is killed.

Each input is given to `main` in a child of its own, of which memory and time are limited; those of
the environment, to a new interpreter.
"""

import argparse
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.__main__ import main
from experiments.data.mnist import IDX_NAMES, NPZ_NAMES
from experiments.engine.experiment import ROOT, find, names
from tests.experiments.sizes import leaves

MEMORY = 40 * 2**30
"""Of addresses, of which a process of JAX reserves more than it uses."""
SECONDS = 150
RUN_NAME = "x"
TRACEBACK = 99


class Input(NamedTuple):
    """What is given to the command line, in a folder where its files have been written."""

    arguments: list[str]
    environment: Mapping[str, str] | None = None
    """None for this process' own."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


# ---- configs that run in a second or two ------------------------------------------------------


def tiny(experiment: str) -> dict[str, str]:
    """The dotted keys of the experiment's smallest config, with their values as TOML."""
    values = leaves(find(experiment).TINY)
    return {key: json.dumps(value) for key, value in values if value is not None}


TINY_OF = {experiment: tiny(experiment) for experiment in names()}


def toml(experiment: str, lines: Mapping[str, str]) -> str:
    return "\n".join([f'experiment = "{experiment}"', *(f"{k} = {v}" for k, v in lines.items())])


def write_config(folder: Path, experiment: str, lines: Mapping[str, str]) -> str:
    (folder / "absurd.toml").write_text(toml(experiment, lines), encoding="utf-8")
    return "absurd.toml"


# ---- what is drawn ----------------------------------------------------------------------------

NUMBERS = [
    "0", "-1", "-0", "1", "2147483647", "2147483648", "4294967296", "9223372036854775808",
    "99999999999999999999", "1000000000", "10000000000", "1048577", "-2147483649", "1e9", "1e30",
    "1e308", "1e400", "-1e400", "1e-320", "1e-400", "0.5", "0.999999999", "1.5", "nan", "-nan",
    "inf", "-inf", "1_0", "0x7fffffffffffffffff", "0b1", "9" * 30, "9" * 5000, "1." + "0" * 4000,
]  # fmt: skip
TEXTS = [
    "", " ", "banana", "None", "true", "\u202emnt", "ü" * 300, "../../..", "/", ".", "~", "%s%n",
    "\x1b[31mred\x1b[0m", "a\nb", "\r\n", "\x07", "\0", "\udcff", "x" * 5000, "x" * 10**7, "-",
    "--", "{}", "[1]", "$HOME", "a.b.c", "\U0001f9a0", "a\u3000b", "/dev/null", "/dev/zero",
    "/proc/self/mem",
]  # fmt: skip
LITERALS = [
    '""', '"banana"', "true", "false", "[]", "[1]", "[[1]]", "[[[[[[1]]]]]]", "{}", "{a = 1}",
    '["a"]', "2020-01-01", "12:30:00", "[1, 2.5]", '"\\u001b[31m"', '"\\n"', "[nan]", "[inf, -inf]",
    "0x" + "f" * 4000, "0o" + "7" * 6000, "[" * 2000 + "]" * 2000, "[" * 10**4, "{a=" * 2000,
    "[" + "1," * 9000 + "]", '"' + "é" * 9000 + '"', "'''" + "\n" * 100 + "'''", "[-1]", "[0]",
    "[1e9]", "[1e-9]", "[1e300, 1e301]", "[99999999999999999999]", "[1000000]", "[700.5]",
]  # fmt: skip


def option_of(key: str) -> str:
    return "--" + key.replace("_", "-")


def any_option(draw: random.Random, folder: Path) -> Input:
    """One or two options of an experiment."""
    experiment = draw.choice(list(TINY_OF))
    config = write_config(folder, experiment, TINY_OF[experiment])
    options = ["--name", RUN_NAME]
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(list(TINY_OF[experiment]))
        values = draw.choices(
            NUMBERS if draw.random() < 0.8 else TEXTS, k=draw.choice([1, 1, 1, 3])
        )
        options += [option_of(key), *values]
    return Input(["run", config, *options])


def any_value(draw: random.Random, folder: Path) -> Input:
    """One or two values of a config."""
    experiment = draw.choice(list(TINY_OF))
    lines = dict(TINY_OF[experiment])
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(list(lines))
        lines[key] = draw.choice(NUMBERS if draw.random() < 0.5 else LITERALS)
    return Input(["run", write_config(folder, experiment, lines), "--name", RUN_NAME])


def any_config(draw: random.Random, folder: Path) -> Input:
    """A file that is hardly a config."""
    experiment = draw.choice(list(TINY_OF))
    whole = toml(experiment, TINY_OF[experiment]).encode()
    words = [f'"{draw.choice(TEXTS[:16])}{n}" = {n}'.encode("utf-8", "replace") for n in range(9)]
    many = [9, 3000, 10**6]
    names = [b"", b"x" * 9000, b"os.system", b"\\u001b[31m"]
    content = draw.choice([
        lambda: whole[: draw.randrange(len(whole))],
        lambda: _flipped(draw, whole),
        lambda: b"\xef\xbb\xbf" + whole,
        lambda: whole.decode().encode(draw.choice(["utf-16", "utf-32", "utf-7", "cp500"])),
        lambda: whole + b"\n" + b"\n".join(words),
        lambda: whole + b"\n" + b"\n".join(b"u%d = 1" % n for n in range(draw.choice(many))),
        lambda: whole + b"\n" + b".".join([b"a"] * draw.choice([9, 5000, 30000])) + b" = 1",
        lambda: whole + b"\na = " + b"[" * 5000 + b"]" * 5000,
        lambda: whole + b"\na = " + b"{a = " * 5000 + b"1" + b"}" * 5000,
        lambda: whole + b'\n"\\u001b[2J\\u0007" = 1\n"a\\nb" = 2',
        lambda: whole.replace(experiment.encode(), draw.choice(names)),
        lambda: b"experiment = [" + b"[" * draw.randrange(90) + b"1" + b"]" * 90,
        lambda: b"",
        lambda: draw.randbytes(draw.choice([1, 100, 10**5])),
        lambda: whole + b"\n#" + b" " * 10**7,
    ])()  # fmt: skip
    (folder / "absurd.toml").write_bytes(content)
    return Input(["run", "absurd.toml", "--name", RUN_NAME])


def any_address(draw: random.Random, folder: Path) -> Input:
    """Where other processes are to be found."""
    config = write_config(folder, "lstm_adding", TINY_OF["lstm_adding"])
    hosts = [
        "localhost", "local host", "nohost.invalid", "", "[::1", "[::1]", "a..b", "x" * 64,
        "x" * 300, "-", "localhost:x", "ü", "127.0.0.1", "256.256.256.256", "[zz]", "\n",
    ]  # fmt: skip
    # none of them is one, or a process would be waited for; the last is a digit, in Arabic
    ports = ["0", "-1", "65536", "99999999999999999999", "", "http", "1.5", "\u0661"]
    address = f"{draw.choice(hosts)}:{draw.choice(ports)}"
    if draw.random() < 0.3:
        address = draw.choice(hosts[1:])
    options = ["--coordinator", address, "--processes", draw.choice(["2", *NUMBERS[:12]])]
    options += ["--process", draw.choice(["0", "1", "2", "-1", "99999999999999999999"])]
    return Input(["run", config, "--name", RUN_NAME, *options])


def any_command(draw: random.Random, folder: Path) -> Input:
    """The commands, with arguments of which one makes no sense."""
    config = write_config(folder, "lstm_adding", TINY_OF["lstm_adding"])
    text = lambda: draw.choice(TEXTS)
    return Input(draw.choice([
        lambda: [text()],
        lambda: ["run"],
        lambda: ["run", text()],
        lambda: ["run", config, text()],
        lambda: ["run", config, "--name", draw.choice([*TEXTS[:14], *TEXTS[15:]])],
        lambda: ["run", config, "--resume"],
        lambda: ["run", config, "--overwrite"],
        lambda: ["run", config, "--name", RUN_NAME, "--overwrite", "--resume"],
        lambda: ["run", config, "--name", RUN_NAME, option_of(text()), text()],
        lambda: ["run", config, "--name", RUN_NAME, "--output", "absurd.toml"],
        lambda: ["sweep", config, "--grid", text()],
        lambda: ["sweep", config, "--grid", f"train.steps={draw.choice(NUMBERS[6:9])}"],
        lambda: ["sweep", config],
        lambda: ["export", text()],
        lambda: ["export"],
        lambda: ["compare", text(), text()],
        lambda: ["evaluate", text(), option_of(text())],
        lambda: ["sample", text(), "--temperature", text()],
        lambda: ["completion", text()],
        lambda: ["run", config, "--init", text()],
        lambda: ["report", f"x{text()}"],
        lambda: ["list", text()],
    ])())  # fmt: skip


def any_data(draw: random.Random, folder: Path) -> Input:
    """MNIST that is none."""
    experiment = draw.choice(["lstm_digits", "vit_digits"])
    lines = TINY_OF[experiment] | {"data.source": '"mnist"', "data.path": '"data"'}
    arrays = [
        values
        for count in (120, 20)
        for values in (np.full((count, 8, 8), 7, np.uint8), np.arange(count, dtype=np.uint8) % 10)
    ]
    place = draw.randrange(4)
    # the last of several is given to fewer than all
    arrays[place] = _strange_array(draw, arrays[place])
    draw.choice([_write_npz, _write_npz, _write_idx])(draw, folder, arrays)
    return Input(["run", write_config(folder, experiment, lines), "--name", RUN_NAME])


def _strange_array(draw: random.Random, array: np.ndarray) -> np.ndarray:
    floats = array.astype(np.float32)
    floats[tuple(draw.randrange(n) for n in array.shape)] = draw.choice(
        [np.nan, np.inf, -np.inf, -1, 255.5, 1e30, 1.5, 300]
    )
    return draw.choice([
        floats, array[:0], array[:1], array[..., None], array.astype(complex), array.astype(str),
        array.astype("datetime64[s]"), array.astype(object), array.astype(bool), array[:, :0]
        if array.ndim > 1 else array[: draw.randrange(len(array))], array.astype(np.int64) * 10**9,
        -array.astype(np.int8), np.array(3.0), np.zeros(len(array), "i4,f4"), array * 0,
    ])  # fmt: skip


def _write_npz(draw: random.Random, folder: Path, arrays: list[np.ndarray]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as members:
        damaged = draw.choice([None, *range(4)])
        for n, (name, array) in enumerate(zip(NPZ_NAMES[0], arrays, strict=True)):
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if n == damaged:
                shape = draw.choice(
                    ["(9999999999999,)", "(-1, 8)", "(True,)", "((),)", "(" * 90, "x"]
                )
                head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".encode()
                content = content[:10] + head.ljust(118)[:118] + content[128:]
            members.writestr(f"{name}.npy", content)
    content = file.getvalue()
    if draw.random() < 0.3:
        content = _flipped(draw, content[: draw.randrange(1, len(content))])
    (folder / "data").write_bytes(content)


def _write_idx(draw: random.Random, folder: Path, arrays: list[np.ndarray]) -> None:
    (folder / "data").mkdir()
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        axes = draw.choice([array.ndim] * 8 + [255, 0, 64])
        lengths = [*array.shape] + [1] * (axes - array.ndim)
        if draw.random() < 0.2:
            lengths = [2**32 - 1] * axes
        shape = b"".join(length.to_bytes(4, "big") for length in lengths[:axes])
        content = bytes([0, 0, draw.choice([8] * 9 + [13]), axes]) + shape
        with np.errstate(invalid="ignore"):
            content += (array if array.dtype.kind in "uif" else np.zeros(9)).astype("u1").tobytes()
        ending = draw.choice(["", ".gz"])
        if ending and draw.random() < 0.8:
            content = gzip.compress(content)
        (folder / "data" / f"{name}-idx{array.ndim}-ubyte{ending}").write_bytes(content)


def any_text(draw: random.Random, folder: Path) -> Input:
    """Text that is none, or too little, or a terabyte."""
    lines = TINY_OF["lstm_text"] | {"data.path": '"data"'}
    content = draw.choice([
        b"", b"a", b"a" * 1000, draw.randbytes(5000), b"\xff\xfe" * 500, b"\0" * 5000,
        "\U0001f9a0".encode() * 900, None, "/dev/zero", "/dev/null", "/proc/self/mem", "folder",
    ])  # fmt: skip
    if content is None:
        with (folder / "data").open("wb") as file:
            file.truncate(2**40)
    elif content == "folder":
        (folder / "data").mkdir()
    elif isinstance(content, str):
        lines["data.path"] = f'"{content}"'
    else:
        (folder / "data").write_bytes(content)
    return Input(["run", write_config(folder, "lstm_text", lines), "--name", RUN_NAME])


def make_run(folder: Path) -> None:
    """A finished run, for `any_damage`."""
    config = write_config(folder, "lstm_adding", TINY_OF["lstm_adding"])
    outcome = in_child(["run", config, "--name", RUN_NAME], folder, folder)
    if outcome.code:
        raise RuntimeError(outcome.err)


def any_damage(draw: random.Random, folder: Path) -> Input:
    """A run of which a file is damaged, and what may be asked of a run."""
    run = folder / "outputs" / "absurd" / RUN_NAME
    shutil.copytree(folder.parent / "done" / "outputs" / "absurd" / RUN_NAME, run)
    config = write_config(folder, "lstm_adding", TINY_OF["lstm_adding"])
    command = draw.choice([
        ["run", config, "--name", RUN_NAME, "--resume"],
        ["compare", str(run), "--output", "compare.png"],
        ["export", str(run)],
        ["evaluate", str(run)],
        ["sample", str(run)],
        ["run", config, "--init", str(run)],
    ])  # fmt: skip
    if "--resume" in command:
        (run / "summary.json").unlink()
    files = sorted(file for file in run.rglob("*") if file.is_file())
    file = draw.choice(files)
    content = file.read_bytes()
    draw.choice([
        lambda: file.unlink(),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(_flipped(draw, content or b" ")),
        lambda: file.write_bytes(content[: draw.randrange(len(content) + 1)]),
        lambda: file.write_bytes(b"null"),
        lambda: file.write_bytes(b"[1, 2]\n"),
        lambda: file.rename(run / "moved"),
        lambda: shutil.rmtree(file.parent) if file.parent != run else file.unlink(),
    ])()  # fmt: skip
    return Input(command)


def any_environment(draw: random.Random, folder: Path) -> Input:
    """Variables that ask for what there is not, and terminals that cannot show it."""
    config = write_config(folder, "lstm_adding", TINY_OF["lstm_adding"])
    shown = draw.choice([["list"], ["--help"], ["run", config, "--help"], ["run", "\xfc.toml"]])
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    one = ["run", config, "--name", RUN_NAME]
    return Input(*draw.choice([
        (shown, ascii_only),
        (shown, {"PYTHONIOENCODING": draw.choice(["latin-1", "ascii", "cp437"])}),
        (one, {"RNNATTN_NATIVE": draw.choice(["banana", "AVX2", "\xfc", "on"])}),
        (one, {"JAX_PLATFORMS": draw.choice(["cuda", "banana", "rocm", "tpu"])}),
    ]))  # fmt: skip


KINDS: dict[Callable[[random.Random, Path], Input], int] = {
    any_option: 25, any_value: 20, any_config: 15, any_data: 12, any_command: 8, any_address: 6,
    any_damage: 7, any_text: 5, any_environment: 2,
}  # fmt: skip
"""How many of a hundred are of each kind."""


def _flipped(draw: random.Random, content: bytes) -> bytes:
    """With a few bytes changed."""
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


# ---- what comes of it -------------------------------------------------------------------------


def in_child(arguments: list[str], folder: Path, logs: Path) -> Outcome:
    """`main` of the arguments, with the folder as the current one."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = TRACEBACK
        try:
            code = main(arguments)
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + SECONDS
    while not (waited := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    texts = [(logs / name).read_text("utf-8", "surrogateescape") for name in ("out", "err")]
    return Outcome(os.waitstatus_to_exitcode(waited[1]), *texts)


def in_new_interpreter(given: Input, folder: Path) -> Outcome:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "LC_"))}
    environment |= {"PYTHONPATH": str(ROOT), **(given.environment or {})}
    command = [sys.executable, "-m", "experiments", *given.arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS
    )
    texts = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return Outcome(done.returncode, *texts)


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in the folder; of a file of a terabyte its length, and of a run's config all but
    the line that says how it was last asked for."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = b"folder"
        if path.is_file():
            size = path.stat().st_size
            content = b"%d" % size if size > 2**30 else path.read_bytes()
        if path.name == "config.toml":
            content = content.partition(b"\n")[2]
        found[str(path.relative_to(folder))] = sha256(content).hexdigest()
    return found


def faults(outcome: Outcome, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is not as it should be."""
    found = []
    # whoever asks for a thousand million steps gets them
    trains = outcome.code == -signal.SIGKILL and f"outputs/absurd/{RUN_NAME}/metrics.jsonl" in after
    if trains:
        return []
    if outcome.code not in (0, 1, 2):
        found.append(f"exit code {outcome.code}")
    if "Traceback" in outcome.err + outcome.out:
        found.append("a traceback")
    if outcome.code and not outcome.err.strip():
        found.append("no message")
    if len(outcome.err.splitlines()) > 100 or len(outcome.err) > 20_000:
        found.append("a message of pages")
    said = outcome.out + outcome.err
    if strange := {c for c in said if c != "\n" and unicodedata.category(c) in ("Cc", "Cs")}:
        found.append(f"characters {strange}")
    if outcome.code == 2 and before != after:
        found.append(f"files {sorted(dict(before.items() ^ after.items()))}")
    lost = [name for name in before if before[name] != after.get(name) and "outputs" not in name]
    if lost:
        found.append(f"lost {lost}")
    return found


def judge(number: int, seed: int, folder: Path) -> tuple[str, Input, Outcome, list[str], float]:
    draw = random.Random(f"{seed}, {number}")
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    work, logs = folder / "work", folder / "logs"
    for each in (work, logs):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    given = kind(draw, work)
    before, clock = snapshot(work), time.monotonic()
    if given.environment is None:
        outcome = in_child(given.arguments, work, logs)
    else:
        outcome = in_new_interpreter(given, work)
    seconds = time.monotonic() - clock
    return kind.__name__, given, outcome, faults(outcome, before, snapshot(work)), seconds


def run(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first, to see one again"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    codes: Counter[tuple[str, int]] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "done").mkdir()
        make_run(folder / "done")
        for number in range(options.first, options.first + options.count):
            kind, given, outcome, wrong, seconds = judge(number, options.seed, folder)
            codes[kind, outcome.code] += 1
            failed += bool(wrong)
            if wrong or options.count == 1:
                said = " ".join(ascii(each)[:80] for each in given.arguments)
                print(f"{number}, {kind}, {seconds:.0f} s: {said}: {'; '.join(wrong) or 'right'}")
                print(f"    exit code {outcome.code}; {outcome.err[-600:]!a}", flush=True)
                if options.count == 1:
                    print(outcome.out + outcome.err)
    for (kind, code), times in sorted(codes.items()):
        print(f"{kind:16} exit code {code:3}: {times}")
    print(f"{options.count} inputs, {failed} of which did not end as they should")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run())
