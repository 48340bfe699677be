"""The report has every claim, outlives what fails, reuses what is unchanged; a browser shows it."""

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.claims import attention_averaging, subspace_projection
from experiments.engine import runs
from experiments.engine.config import UsageError
from experiments.engine.files import LOCK
from experiments.engine.training import TrainConfig, fit, make_optimizer
from experiments.figures import new_figure
from experiments.report import documents, evidence as claims, key, page as report
from experiments.report.intervals import Exact, Interval
from tests.experiments.claims.documents import rows_of_table

README = report.ROOT / "README.md"
FOUND = {size.experiment.name: size.experiment for size in report.sizes(full=False)}
SERVING = {name: experiment for name, experiment in FOUND.items() if experiment.CLAIMS}

AVERAGING = attention_averaging.Config(several_keys=(3,), betas=(1.0, 2.0, 12.0))
PROJECTION = subspace_projection.Config(draws=2, width=5, rank=2)


def broken(config, log):
    raise RuntimeError("no luck <today>")


AVERAGE, PROJECT = FOUND["attention_averaging"], FOUND["subspace_projection"]
BROKEN = replace(PROJECT, run=broken)
BESIDE = replace(AVERAGE, name="beside", CLAIMS={}, claims=lambda *_: (), BESIDE=AVERAGE.name)
"""An experiment whose figure stands beside that of another."""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A report of one experiment that runs and one that fails, in a folder with a space."""
    output = tmp_path_factory.mktemp("a report")
    sizes = [
        report.Size(BROKEN, PROJECTION, "configs/claims/subspace_projection.toml"),
        report.Size(AVERAGE, AVERAGING, None),
        report.Size(BESIDE, AVERAGING, None),
    ]
    report.write(report.measure(sizes, output), output / "report", full=False)
    return output / "report"


@pytest.fixture(scope="module")
def entries(written) -> dict[str, dict]:
    data = json.loads((written / report.DATA).read_text())
    return {entry["id"]: entry for entry in data["claims"]}


def test_there_is_one_entry_for_each_claim_with_all_that_a_reader_needs(written, entries):
    assert list(entries) == ["A5", "A6"]
    for entry in entries.values():
        assert {
            "id", "title", "verdict", "criterion", "predicted", "measured", "interval", "figure",
            "config", "command", "seconds",
        } <= set(entry)  # fmt: skip
    measured = entries["A6"]
    assert measured["verdict"] == "holds" and measured["seconds"] > 0
    assert measured["interval"][0] <= measured["predicted"] <= measured["interval"][1]
    assert (written / measured["figure"]).is_file()


def test_a_figure_that_no_claim_rests_on_stands_beside(written):
    about = json.loads((written / report.DATA).read_text())["beside"]["attention_averaging"]
    assert about["experiment"] == "beside" and (written / about["figure"]).is_file()
    page = (written / report.PAGE).read_text()
    section = page.split('id="A6"')[1].split("measurements</summary>")[0]
    assert "figures/beside.png" in section and "Beside it" in section


def test_an_experiment_beside_that_fails_is_told_and_loses_nothing(tmp_path):
    both = (AVERAGE, replace(BESIDE, run=broken))
    findings = report.measure([report.Size(each, AVERAGING, None) for each in both], tmp_path)
    assert findings.errors == ["beside: RuntimeError: no luck <today>"]
    report.write(findings, tmp_path / "report", full=False)
    page = (tmp_path / "report" / report.PAGE).read_text()
    assert "no luck &lt;today&gt;" in page and "figures/attention_averaging.png" in page


def test_the_command_of_a_row_runs(written, entries, tmp_path):
    # as a shell reads it: the folder has a space
    *program, config = shlex.split(entries["A6"]["command"])
    assert program == ["python", "-m", "experiments", "run"]
    assert config == entries["A6"]["config"] and Path(config).is_relative_to(written)
    assert main(["run", config, "--output", str(tmp_path)]) == 0


def test_a_failing_experiment_has_its_error_in_its_row(written, entries):
    assert entries["A5"]["verdict"] == "undecided"
    assert entries["A5"]["error"] == "RuntimeError: no luck <today>"
    page = (written / report.PAGE).read_text()
    assert "no luck &lt;today&gt;" in page and "in broken" in page


def test_a_failure_exits_with_one_at_the_end(tmp_path, monkeypatch, capsys):
    sizes = [report.Size(BROKEN, PROJECTION, None)]
    monkeypatch.setattr(report, "sizes", lambda *, full: sizes)
    assert main(["report", "--output", str(tmp_path)]) == 1
    assert "no luck" in capsys.readouterr().out
    assert (tmp_path / "report" / report.PAGE).is_file()


def test_a_second_report_into_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    codes: list[int | None] = []

    def plot(config, result):
        if not codes:
            codes.append(None)
            codes[0] = main(["report", "--output", str(tmp_path)])
        return new_figure(2, 2)

    report.measure([report.Size(AVERAGE, AVERAGING, None)], tmp_path)
    # the study is finished: its figure alone is drawn anew
    sizes = [report.Size(replace(AVERAGE, plot=plot), AVERAGING, None)]
    monkeypatch.setattr(report, "sizes", lambda *, full: sizes)
    assert main(["report", "--output", str(tmp_path)]) == 0
    assert codes == [2]
    message = capsys.readouterr().err
    assert message.startswith(f"{tmp_path / 'report'}: is running, as process")
    assert message.count("\n") == 1 and not (tmp_path / "report" / LOCK).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_training_of_the_report_ends_it(number, tmp_path, monkeypatch, capsys):
    def batch(step):
        if step == 6:
            os.kill(os.getpid(), number)
        return np.ones(2, np.float32)

    def loss(params, batch, key):
        return jnp.sum((params - batch) ** 2), {}

    def stopping(config, session):
        plan = TrainConfig(steps=100, log_every=100)
        start, optimizer, key = jnp.zeros(2, jnp.float32), make_optimizer(plan), jax.random.key(0)
        try:
            fit(loss, start, optimizer, batch, key, plan, evaluations={}, final={}, session=session)
        except Exception:
            return "as an experiment may take the errors of one of its trainings"

    sizes = [
        report.Size(replace(PROJECT, name=name, run=run), PROJECTION, None)
        for name, run in (("first", stopping), ("second", broken))
    ]
    monkeypatch.setattr(report, "sizes", lambda *, full: sizes)
    assert main(["report", "--output", str(tmp_path)]) == 75
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == "stopped after step 7 of 100; the same command goes on from there"
    assert {path.name for path in tmp_path.iterdir()} == {"first", "report"}
    assert not list((tmp_path / "report").iterdir())
    (folder,) = (tmp_path / "first").iterdir()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["7"]


def test_a_result_that_is_damaged_is_told_in_a_line(tmp_path):
    sizes = [report.Size(AVERAGE, AVERAGING, None)]
    (row,) = report.measure(sizes, tmp_path).rows
    folder = row.study.folder
    assert folder is not None
    for content in (b"", (folder / runs.RESULT).read_bytes()[:-99], b"PK\3\4" + bytes(99)):
        (folder / runs.RESULT).write_bytes(content)
        (error,) = report.measure(sizes, tmp_path).errors
        assert f"{folder}: its result cannot be read" in error and "remove the folder" in error


@pytest.mark.parametrize("rest", [{}, {"wall_seconds": "abc"}])
def test_a_summary_that_is_damaged_is_told_in_a_line_and_the_others_go_on(rest, tmp_path):
    sizes = [report.Size(AVERAGE, AVERAGING, None), report.Size(PROJECT, PROJECTION, None)]
    folder = report.measure(sizes, tmp_path).rows[1].study.folder
    assert folder is not None and folder.parent.name == AVERAGE.name
    (folder / runs.SUMMARY).write_text(json.dumps({"finished": True, **rest}))
    findings = report.measure(sizes, tmp_path)
    (error,) = findings.errors
    assert f"{folder / runs.SUMMARY}: has no wall_seconds; remove the folder" in error
    assert findings.rows[0].claim is not None
    report.write(findings, tmp_path / "report", full=False)


def test_claims_that_are_not_the_ones_announced_are_an_error(tmp_path):
    experiment = replace(AVERAGE, CLAIMS={"A6": "", "A7": ""})
    found = report.measure([report.Size(experiment, AVERAGING, None)], tmp_path)
    assert [row.id for row in found.rows if "A7" in row.study.error] == ["A6", "A7"]


def test_rows_are_in_the_order_of_ids(tmp_path):
    experiment = replace(BROKEN, CLAIMS=dict.fromkeys(("P2", "A10", "A9", "L1"), ""))
    found = report.measure([report.Size(experiment, PROJECTION, None)], tmp_path)
    assert [row.id for row in found.rows] == ["A9", "A10", "L1", "P2"]


def test_a_result_is_used_again_until_config_or_code_change(tmp_path, monkeypatch):
    count = []

    def counted(config, log):
        count.append(config)
        return attention_averaging.run(config, log)

    experiment = replace(AVERAGE, run=counted)

    def measure(config=AVERAGING):
        (row,) = report.measure([report.Size(experiment, config, None)], tmp_path).rows
        assert row.id == "A6" and row.verdict == "holds"
        return row.study.folder

    folder = measure()
    assert measure() == folder and len(count) == 1
    measure(attention_averaging.Config(several_keys=(3,), betas=(1.0, 12.0)))
    assert len(count) == 2
    # a run that was cut off has no summary, or one that does not say that it is finished
    (folder / runs.SUMMARY).unlink()
    measure()
    assert len(count) == 3
    code = tmp_path / "code.py"
    code.write_text("def run(config, session): ...")
    monkeypatch.setattr(key, "ROOT", tmp_path)
    experiment = replace(experiment, file=code)
    folder = measure()
    assert len(count) == 4
    # what is said and drawn of the result is that of the code as it is now
    code.write_text("def run(config, session): ...\ndef claims(config, result): return 'changed'")
    figure = (folder / runs.FIGURE).read_bytes()
    experiment = replace(experiment, plot=lambda config, result: new_figure(2, 2))
    assert measure() == folder and len(count) == 4
    assert (folder / runs.FIGURE).read_bytes() != figure


def test_the_full_report_has_the_configs_of_the_experiments():
    quick, full = report.sizes(full=False), report.sizes(full=True)
    names = [size.experiment.name for size in full]
    assert names == [size.experiment.name for size in quick]
    assert [size.path for size in full] == [f"configs/claims/{name}.toml" for name in names]
    assert all(size.config == size.experiment.Config() for size in quick)


def test_equations_are_typeset_and_keep_their_source():
    mathml = report.typeset(r"\operatorname{Var} w < \tfrac14 \lVert v \rVert")
    assert mathml.startswith("<math aria-label=") and "&lt;" in mathml and "<mfrac>" in mathml
    assert "\\" not in re.sub(r'aria-label="[^"]*"', "", mathml)
    with pytest.raises(ValueError, match="raw string"):
        report.typeset("\frac12")


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (0.0, "0"), (-0.00012345, "−0.0001234"), (1e-9, "1e−09")]
)
def test_numbers_have_four_digits(value, text):
    assert report.number(value) == text


STUDY = report.Study("x", {}, None)


class Between(Interval):
    """A measurement whose interval is the same at every level."""

    def interval(self, level: float) -> Interval:
        return self


def test_what_is_infinite_is_null():
    evidence = claims.equal("x", 1.0, Between(1.0, float("-inf"), float("inf")))
    row = report.Row("A1", "", STUDY, claims.Claim("A1", "x", "", (evidence,)))
    assert report.entry(row, Path("report"))["interval"] == [None, None]


def test_an_inequality_is_shown_as_one(tmp_path):
    gain = claims.above("gain", 0, Between(0.2, 0.1, 0.3))
    cost = claims.below("cost", 1, Exact(0.5))
    claim = claims.Claim("V3", "x", "", (gain, cost))
    findings = report.Findings([report.Row("V3", "", STUDY, claim)])
    report.write(findings, tmp_path, full=False)
    page = (tmp_path / report.PAGE).read_text()
    shown = re.findall(r'data-label="predicted">\s*(.*?)\s*</td>', page)
    assert [html.unescape(text) for text in shown] == [">\xa00", "<\xa01"]
    assert "gain: predicted &gt;&nbsp;0, measured 0.2" in " ".join(page.split())
    (entry,) = json.loads((tmp_path / report.DATA).read_text())["claims"]
    assert (entry["relation"], entry["predicted"]) == (">", 0)
    assert [e["relation"] for e in entry["evidence"]] == [">", "<"]


def test_the_table_has_every_claim_as_the_code_writes_it():
    found = rows_of_table()
    assert documents.claims_table(found) in (report.ROOT / documents.PAGE).read_text()
    assert documents.readme_counts(verdict for _, _, verdict, _ in found) in README.read_text()
    serving = {
        (id_, title, name)
        for name, experiment in SERVING.items()
        for id_, title in experiment.CLAIMS.items()
    }
    assert {(id_, title, name) for id_, title, _, name in found} == serving
    ids = [id_ for id_, *_ in found]
    assert ids == sorted(ids, key=lambda id_: (id_[0], int(id_[1:])))


def test_the_notes_have_a_statement_for_each_claim_of_theirs():
    notes = (report.ROOT / "docs" / "notes.md").read_text()
    assert notes.startswith(documents.INTRODUCTION)
    ids = re.findall(r"^### (\w\d+) · ", notes, re.MULTILINE)
    of_notes = [id_ for id_, *_ in rows_of_table() if id_[0] in documents.PARTS]
    assert ids == [id_ for part in documents.PARTS for id_ in of_notes if id_[0] == part]
    assert len(ids) == claims.NOTES


def test_pages_are_changed_between_their_markers_alone_and_the_notes_are_written(tmp_path):
    (tmp_path / "docs").mkdir()
    readme, notes = tmp_path / "README.md", tmp_path / "docs" / "notes.md"
    file = tmp_path / documents.PAGE
    for page in (file, readme):
        page.write_text(f"before\n{documents.START}\nstale\n{documents.END}\nafter\n")
    said = claims.Claim("A1", "x = 1", "", (claims.equal("x", 1, Exact(1)),), note="Mind this.")
    printed = replace(said, id="L2", printed_equation="x = 2")
    missing = replace(said, id="P3", in_notes=False)
    rows = [report.Row(each.id, each.id.lower(), STUDY, each) for each in (said, printed, missing)]
    documents.update(tmp_path, rows)
    text = file.read_text()
    assert text.startswith(f"before\n{documents.START}\n|")
    assert text.endswith(f"{documents.END}\nafter\n")
    assert "stale" not in text and "| A1 | a1 |" in text and "| L2 | l2 |" in text
    assert "Of 3 claims: 2 *holds*, 1 *missing in the notes*." in readme.read_text()
    section = {part[:2]: part for part in notes.read_text().split("\n### ")[1:]}
    assert "As printed and as tested" in section["A1"] and "*Holds.* Mind this." in section["A1"]
    assert section["L2"].index("x = 2") < section["L2"].index("As tested") < len(section["L2"])
    assert "Not in the notes" in section["P3"]
    assert "*Missing in the notes.*" in section["P3"]
    with pytest.raises(UsageError, match="no verdict on A1"):
        documents.update(tmp_path, [report.Row("A1", "", STUDY._replace(error="x"))])
    file.write_text("no markers")
    with pytest.raises(UsageError, match="markers"):
        documents.update(tmp_path, rows)


def test_the_readme_has_no_verdicts_of_the_quick_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.__main__.ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"{documents.START}\n{documents.END}\n")
    before = (tmp_path / "README.md").read_bytes()
    monkeypatch.setattr(report, "sizes", lambda *_, **__: {})
    assert main(["report", "--readme", "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--readme" in message and "--full" in message
    assert (tmp_path / "README.md").read_bytes() == before and not (tmp_path / "new").exists()


def test_the_page_asks_nothing_of_the_network(written):
    page = (written / report.PAGE).read_text()
    # the namespace of MathML is a name, and is not fetched
    page = page.replace('xmlns="http://www.w3.org/1998/Math/MathML"', "")
    assert "http:" not in page and "https:" not in page and "//" not in page.replace("*/", "")
    assert "<script" not in page


CHROMIUM = next(filter(None, map(shutil.which, report.BROWSERS)), None)

PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message || "failed: " + e.target.src), true);
addEventListener("load", () => {
  const folded = [...document.querySelectorAll("details.claim")].every(claim => !claim.open);
  document.querySelectorAll("details").forEach(each => each.open = true);
  const images = [...document.images];
  const shown = () => [...document.querySelectorAll("details.claim")]
    .filter(claim => claim.getBoundingClientRect().height > 0).map(claim => claim.id);
  const chosen = {};
  for (const choice of document.querySelectorAll('input[name="shown"]')) {
    choice.checked = true;
    chosen[choice.id] = shown();
  }
  document.querySelector('input[name="shown"]').checked = true;
  parent.postMessage(JSON.stringify({
    errors, folded, chosen,
    images: images.length,
    loaded: images.filter(image => image.complete && image.naturalWidth > 100).length,
    claims: [...document.querySelectorAll("details.claim")].map(claim => claim.id),
    dead: [...document.querySelectorAll('a[href^="#"]')]
      .filter(a => !document.getElementById(a.getAttribute("href").slice(1))).length,
    wide: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    math: [...document.querySelectorAll("math")].every(m => m.getBoundingClientRect().height > 10),
  }), "*");
});
</script>"""

# a window is never narrower than 500 pixels, but a frame is
FRAME = """<!DOCTYPE html><body><script>
addEventListener("message", event => document.body.dataset.probe = event.data);
</script><iframe src="index.html" style="width: {width}px; height: 900px; border: 0"></iframe>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_browser_shows_the_page_whole(written, tmp_path, width):
    copy = Path(shutil.copytree(written, tmp_path / "page"))
    page, frame = copy / report.PAGE, copy / "frame.html"
    page.write_text(page.read_text().replace("<head>", "<head>" + PROBE, 1))
    frame.write_text(FRAME.format(width=width))
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom",
         "--virtual-time-budget=5000", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert ":CONSOLE" not in done.stderr
    match = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert match is not None, done.stderr
    seen = json.loads(html.unescape(match[1]))
    assert seen["width"] == width
    assert seen["errors"] == [] and seen["dead"] == 0 and seen["math"]
    assert seen["images"] == seen["loaded"] == 2
    assert seen["claims"] == ["A5", "A6"] and seen["folded"]
    assert seen["chosen"] == {"": ["A5", "A6"], "only-holds": ["A6"], "only-undecided": ["A5"]}
    assert seen["wide"] <= 0, "the page is wider than the window"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_is_printed_with_every_claim_unfolded(written):
    report.print_pdf(written, report.browser())
    pdf = (written / report.PDF).read_bytes()
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Subtype /Image") >= 2


def test_no_browser_to_print_with_is_a_line_before_anything_is_measured(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(report, "BROWSERS", ("no-such-browser",))
    assert main(["report", "--pdf", "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--pdf" in message and "Chromium" in message
    assert not (tmp_path / "new").exists()
