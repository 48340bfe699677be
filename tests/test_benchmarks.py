"""What the benchmarks are given is checked before anything is timed."""

import pytest

from benchmarks import attention, lstm, sweep


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
    sweep.main(["--seed", "1", "--count", "2", "--rounds", "1", "--output", str(file)])
    printed = capsys.readouterr().out
    for kind in ("attention, gradient", "lstm, training"):
        assert f"{kind}: time of torch / ours over 2 problems" in printed
    assert '"seed": 1' in file.read_text()
