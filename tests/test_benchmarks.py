"""What the benchmarks are given is checked before anything is timed."""

import pytest

from benchmarks import attention, lstm


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
