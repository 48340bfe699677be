"""What the benchmarks are given is checked before anything is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as everything, attention, lstm, rope, sweep, tpu, visit, vit


@pytest.mark.parametrize("benchmark", [lstm, attention])
@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--rounds", "0"], "'0' is no whole number from 1"),
        (["--rounds", "-1"], "'-1' is no whole number from 1"),
        (["--rounds", "many"], "'many' is no whole number from 1"),
        (["--rounds", "9" * 5000], "999' is no whole number from 1"),
        (["--shapes", "bogus"], "'bogus' is not "),
        (["--shapes", "1,2,3"], "'1,2,3' is not "),
        (["--shapes", "1,2,3,4,5,6"], " is not "),
        (["--shapes", "1,0,3,4"], "'0' is no whole number from 1"),
        (["--shapes", "1,2,3,x"], "'x' is no whole number from 1"),
        (["--output", "/dev/null/x"], "/dev/null/x"),
        (["--output", "/"], "cannot be written as a file"),
    ],
)
def test_what_cannot_be_measured_is_one_line(benchmark, arguments, part, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.parse(arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert part in message and "lambda" not in message and "parse_shape" not in message
    assert len(message) < 300


def test_shapes_are_read():
    assert lstm.parse(["--shapes", "4,3,2,1"]).shapes == [(4, 3, 2, 1)]
    sees = ["1,2,3,4", "1,2,3,4,causal", "1,2,3,4,0"]
    shapes = attention.parse(["--shapes", *sees]).shapes
    assert [(shape.causal, shape.window) for shape in shapes] == [
        (False, None), (True, None), (False, 0)
    ]  # fmt: skip
    more = attention.parse(["--shapes", "1,2,6,4,causal,S=77,M=3", "1,2,3,4,mask"]).shapes
    assert more == [
        attention.Shape(1, 2, 6, 4, True, S=77, M=3), attention.Shape(1, 2, 3, 4, mask=True)
    ]  # fmt: skip
    assert str(more[0]) == "1, 2, 6, 4, causal, S=77, M=3"


@pytest.mark.parametrize(
    "shape", ["1,2,6,4,M=4", "1,2,6,4,S=0", "1,2,6,4,causal,3", "1,2,6,4,3,3", "1,2,6,4,masks"]
)
def test_shapes_that_are_none(shape, capsys):
    with pytest.raises(SystemExit):
        attention.parse(["--shapes", shape])


def test_a_seed_draws_the_same_problems_from_the_ranges():
    for what in sweep.BENCHMARKS:
        drawn = sweep.draw(what, 3, 40)
        assert drawn == sweep.draw(what, 3, 40) != sweep.draw(what, 4, 40)
    shapes = sweep.draw("attention", 3, 200)
    for shape in shapes:
        assert shape.keys > 1
        assert shape.N % shape.key_heads == 0 and shape.K % 8 == 0 and 16 <= shape.K <= 256
        assert shape.logits * shape.K * 2 <= sweep.MOST_WORK
    for seen in (
        [shape.causal for shape in shapes],
        [shape.mask for shape in shapes],
        [shape.T == 1 for shape in shapes],
        [shape.S is None for shape in shapes],
        [shape.M is None for shape in shapes],
    ):
        assert 0 < sum(seen) < len(shapes)


def test_a_small_sweep(monkeypatch, capsys, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setattr(sweep, "MOST_WORK", 2**16)
    file = tmp_path / "sweep.json"
    what = ["--what", "attention", "lstm", "gru"]
    sweep.main([*what, "--seed", "1", "--count", "2", "--rounds", "1", "--output", str(file)])
    printed = capsys.readouterr().out
    for kind in ("attention, gradient", "lstm, training", "gru, training"):
        assert f"{kind}: time of torch / ours over 2 problems" in printed
    assert '"seed": 1' in file.read_text()


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "--output"),
        (["--output", "/dev/null/x"], "/dev/null/x"),
        (["--output", ".", "--parts", "lstm,bogus"], "'bogus' is none of machine, values, lstm"),
        (["--output", ".", "--parts", ""], "'' is none of machine"),
        (["--output", ".", "--minutes", "0"], "'0' is no number from 0.25"),
        (["--output", ".", "--minutes", "nan"], "'nan' is no number"),
        (["--output", ".", "--minutes", "soon"], "'soon' is no number"),
    ],
)
def test_a_visit_that_cannot_be_made_is_one_line(arguments, part, capsys):
    with pytest.raises(SystemExit) as end:
        visit.parse(arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert part in message and len(message) < 300


# In place of a part: at first its case 1 dies of "worse", then its case 2 of itself.
DIES = """
import json, os, pathlib, sys
order = json.loads(sys.argv[1])
folder = pathlib.Path(order["output"])
def row(**columns):
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"part": order["part"], **columns}) + chr(10))
for case in range(order["first"], 4):
    for peer in ("ours", "worse"):
        if peer in order["without"]:
            continue
        where = {"case": case, "peer": None if case == 2 else peer, "labels": {"H": case}}
        (folder / "running.json").write_text(json.dumps(where))
        if case == 2 or peer == "worse" and case == 1:
            print("out of", "luck")
            os.abort()
        row(H=case, peer=peer, us_step=1.0)
"""


def test_a_part_goes_on_without_what_it_died_of(tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "PROCESS", [sys.executable, "-c", DIES])
    rows = visit.visit(tmp_path, ["memory"], 1, dry=True)
    assert [(row["H"], row["peer"]) for row in rows if "us_step" in row] == [
        (0, "ours"), (0, "worse"), (1, "ours"), (1, "ours"), (3, "ours")
    ]  # fmt: skip
    errors = [row for row in rows if "error" in row]
    assert [(row["H"], row["peer"]) for row in errors] == [(1, "worse"), (2, None)]
    assert all("ended with -6" in row["error"] and "out of luck" in row["error"] for row in errors)
    assert "memory, worse, 1 × error (first: H 1)" in visit.markdown(rows)


def test_a_part_that_takes_too_long_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "PROCESS", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(visit, "GRACE", 0)
    (tmp_path / "rows.jsonl").write_text('{"part": "lstm", "H": 1}\n{"part": "memory"}\n{"cut')
    rows = visit.visit(tmp_path, ["memory"], (visit.LAST + 1) / 60, dry=True)
    assert [row["part"] for row in rows] == ["lstm", "memory", "memory"]
    assert rows[1]["error"].startswith("killed: out of time")
    assert rows[2]["seconds"] < 10


@pytest.mark.slow
def test_a_visit_to_a_cpu(tmp_path):
    """Every part finds something, nothing fails, and all values are right."""
    root = Path(visit.__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks.visit", "--dry", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "visit.json").read_text())
    rows = results["rows"]
    assert rows == visit.read(tmp_path / "rows.jsonl") and results["versions"]["jax"]
    assert not [row for row in rows if "error" in row]
    found = {(row["part"], key) for row in rows for key in row}
    assert found >= {
        ("machine", "tflops"), ("machine", "gigabytes"), ("values", "ok"), ("lstm", "us_step"),
        ("attention", "tflops"), ("attention", "gigabytes"), ("scan", "us_step"),
        ("scan with commands", "us_step"), ("memory", "mebibytes"),
    }  # fmt: skip
    assert all(row["ok"] for row in rows if "ok" in row)
    assert all(row["differs"] < 0.05 for row in rows if "differs" in row)
    text = (tmp_path / "visit.md").read_text()
    for title in ("Values", "LSTM", "Attention", "Scan", "Memory", "Not measured"):
        assert f"## {title}\n" in text
    assert (tmp_path / "visit.svg").read_text().count("</svg>") == 1


def test_every_benchmark_has_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])  # which is set for the benchmark
    with pytest.raises(SystemExit) as end:
        everything.main(["bogus"])
    assert end.value.code == 2 and "'lstm', 'attention', 'rope'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        everything.main(["lstm", "--rounds", "0"])
    assert end.value.code == 2 and "--rounds" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark, shape", [(rope, (1, 8, 2, 4)), (vit, (1, 8, 4, 32, 1))])
def test_a_small_benchmark_runs(benchmark, shape):
    speed = benchmark.measure_speed([shape], ["ours again"], 1, "float32")
    assert set(speed["geometric_mean"]) == set(benchmark.KINDS)


def test_bundles_of_loops_and_pairs_of_tiles_are_counted():
    outer = ["0   :  { a }", "0x1 LB: > { b }", "0x2   : > { c }"]
    inner = ["0x3 LB: >> { d }", "0x4   :  { e }", "0x5   : >> { f }", "0x6 LB: >> { g }"]
    code = "\n".join(["LB: loop body", *outer, *inner, "0x7 PF: > { h }", "0x8   :  { i }"])
    assert tpu._loops(code) == [3, 2]
    assert tpu._tiles(2048, True, None) == (2, 4, 2)
    assert tpu._tiles(2048, False, None) == (8, 0, 0)


def test_what_became_slower_is_named(tmp_path, capsys):
    """Against a peer, and beyond the spread of both runs."""

    def results(lower, median, upper):
        ratio = {"median": median, "lower": lower, "upper": upper}
        cells = {"ours": {"ratio": ratio}, "torch": {"ratio": ratio}}
        return {"speed": {"rows": [{"shape": [1], "forward": cells}]}}

    old, slow, same = (tmp_path / f"{name}.json" for name in ("old", "slow", "same"))
    for path, numbers in {
        old: (1.9, 2.0, 2.1),
        slow: (1.4, 1.5, 1.6),
        same: (1.7, 1.9, 2.0),
    }.items():
        path.write_text(json.dumps(results(*numbers)))
    for new, code, count in ((slow, 1, "1 of 2"), (same, 0, "0 of 2")):
        with pytest.raises(SystemExit) as end:
            everything.main(["compare", str(old), str(new)])
        assert end.value.code == code and count in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        everything.main(["compare", str(old), str(tmp_path)])
    assert end.value.code == 2 and "has no results" in capsys.readouterr().err
