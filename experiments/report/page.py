"""The reproduction report: every claim of the notes, tested, on one page.

Every experiment of `experiments/claims` is in the report, with the config of its name. A run is
kept as `<output>/<name>/report-<key>`, and its result is used again as long as the key is the same,
which `experiments.report.key` makes of all that decides the result. Verdicts and figures are made
anew.

    <output>/report/index.html    the page, which needs no network
    <output>/report/report.json   the same for machines
    <output>/report/report.pdf    the page as it is printed, if asked for
    <output>/report/figures/, configs/
"""

import contextlib
import html
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.engine import runs
from experiments.engine.config import UsageError, to_table
from experiments.engine.experiment import ROOT, Experiment, config_paths, find, names, read
from experiments.engine.files import locked, written
from experiments.report.evidence import LEVEL, NOTES, Claim, Verdict
from experiments.report.key import run_key

PAGE, DATA, PDF = "index.html", "report.json", "report.pdf"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

SIGNS: dict[Verdict, str] = {
    "holds": "✓",
    "holds as corrected": "✓",
    "holds only under a stated condition": "◐",
    "missing in the notes": "+",
    "fails": "✗",
    "undecided": "?",
}
"""A sign for each verdict, so that none is told by colour alone."""


class Size(NamedTuple):
    """An experiment with a config, and the file whose run it is."""

    experiment: Experiment
    config: Any
    path: str | None
    """In `configs/`, or None if the config is not that of a file."""


class Study(NamedTuple):
    """An experiment of the report, as it ran."""

    experiment: str
    config: Mapping[str, Any]
    config_path: str | None
    folder: Path | None = None
    seconds: float | None = None
    error: str = ""
    """In a line; empty if it ran."""
    trace: str = ""


class Row(NamedTuple):
    """What the report has to say of one claim."""

    id: str
    title: str
    study: Study
    claim: Claim | None = None

    @property
    def verdict(self) -> Verdict:
        return self.claim.verdict if self.claim else "undecided"


class Findings(NamedTuple):
    """A row for each claim, by id, and by experiment the one whose figure stands beside its own."""

    rows: Sequence[Row]
    beside: Mapping[str, Study] = MappingProxyType({})

    @property
    def errors(self) -> list[str]:
        """The experiments that failed, with what they said."""
        studies = [*(row.study for row in self.rows), *self.beside.values()]
        failed = {study.experiment: study.error for study in studies if study.error}
        return [f"{name}: {error}" for name, error in failed.items()]


def sizes(*, full: bool) -> list[Size]:
    """The config of every experiment of the report: its file's if `full`, else its default."""
    of_claims = [name for name, module in names().items() if ".claims." in module]
    if not full:
        return [Size(found, found.Config(), None) for found in map(find, of_claims)]
    paths = [config_paths()[name] for name in of_claims]
    return [Size(*read(path), path.relative_to(ROOT).as_posix()) for path in paths]


def measure(sizes: Sequence[Size], output: Path) -> Findings:
    """Run each experiment that has no result yet, and judge.

    An experiment that fails has its error in the rows of its claims, and the others go on.
    """
    rows: list[Row] = []
    beside: dict[str, Study] = {}
    with _progress() as progress:
        # a signal ends the process as it is, and the cursor should be there then
        progress.console.show_cursor(True)
        task = progress.add_task("", total=len(sizes))
        for size in sizes:
            experiment = size.experiment
            progress.update(task, description=experiment.name)
            study, claims = _study(size, output)
            rows += [
                Row(id_, title, study, claims.get(id_)) for id_, title in experiment.CLAIMS.items()
            ]
            if experiment.BESIDE:
                beside[experiment.BESIDE] = study
            progress.advance(task)
        progress.update(task, description="done")
    return Findings(sorted(rows, key=lambda row: (row.id[0], int(row.id[1:]))), beside)


def _study(size: Size, output: Path) -> tuple[Study, dict[str, Claim]]:
    """The experiment as it ran, and what it says of the claims that it serves."""
    experiment, config, path = size
    study = Study(experiment.name, to_table(experiment.name, config), path)
    try:
        folder = _run(experiment, config, output)
        result = runs.read_result(folder, experiment.Result)
        claims = {claim.id: claim for claim in experiment.claims(config, result)}
        differing = experiment.CLAIMS.keys() ^ claims.keys()
        if differing:
            listed = ", ".join(sorted(differing))
            raise ValueError(f"CLAIMS and claims() differ in {listed}")
        seconds = result.scores.get("wall_seconds")
        if not isinstance(seconds, int | float):
            raise UsageError(
                f"{folder / runs.SUMMARY}: has no wall_seconds; remove the folder to run it again"
            )
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return study._replace(error=line, trace=traceback.format_exc()), {}
    return study._replace(folder=folder, seconds=seconds), claims


def _run(experiment: Experiment, config: Any, output: Path) -> Path:
    """The folder of the experiment's run with this config and this code, run if it is missing.

    One that was cut off goes on from its checkpoints.
    """
    name = experiment.name
    folder = output / name / f"report-{run_key(name, experiment.file, config)}"
    if runs.finished(folder):
        # by other code than drew the one that is there, perhaps
        from experiments.figures import save

        result = runs.read_result(folder, experiment.Result)
        save(experiment.plot(config, result), folder / runs.FIGURE)
        return folder
    experiment.check(config)
    table = to_table(name, config)
    folder = runs.reopen(output, name, folder.name, table)
    # training shows its own progress on a terminal: here there is one display, ours
    with locked(folder), contextlib.redirect_stdout(io.StringIO()):
        runs.write_config(folder, table, "python -m experiments report")
        runs.record(experiment, config, folder)
    return folder


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=not (sys.stdout.isatty() and sys.stderr.isatty()),
    )  # fmt: skip


def write(findings: Findings, folder: Path, *, full: bool) -> None:
    """Write the page, the data, the figures and the configs."""
    for name in ("figures", "configs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for study in (*(row.study for row in findings.rows), *findings.beside.values()):
        text = tomli_w.dumps(study.config)
        with written(folder / "configs" / f"{study.experiment}.toml") as file:
            file.write(text.encode())
        if study.folder is not None:
            with written(folder / _figure(study)) as file:
                file.write((study.folder / runs.FIGURE).read_bytes())
    data = {
        "size": "full" if full else "quick",
        "family_level": LEVEL * NOTES,
        **runs.surroundings(),
        "claims": [entry(row, folder) for row in findings.rows],
        "beside": {name: _about(study, folder) for name, study in findings.beside.items()},
    }
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
    with written(folder / DATA) as file:
        file.write(f"{text}\n".encode())
    with written(folder / PAGE) as file:
        file.write(page(findings, data).encode())


def entry(row: Row, folder: Path) -> dict[str, Any]:
    """The row as JSON: the claim's table, and how it came about."""
    table: dict[str, Any] = {
        "id": row.id,
        "title": row.title,
        "verdict": row.verdict,
        "criterion": "",
        "news": "",
        "relation": None,
        "predicted": None,
        "measured": None,
        "interval": None,
        "evidence": [],
    }
    if row.claim:
        table |= row.claim.table()
    return _finite(table | _about(row.study, folder))


def _about(study: Study, folder: Path) -> dict[str, Any]:
    """How a figure or a verdict came about, as JSON."""
    config = study.config_path or f"{folder.as_posix()}/configs/{study.experiment}.toml"
    return {
        "experiment": study.experiment,
        "figure": _figure(study) if study.folder else None,
        "config": config,
        "command": shlex.join(["python", "-m", "experiments", "run", config]),
        "seconds": study.seconds,
        "error": study.error or None,
    }


def page(findings: Findings, data: Mapping[str, Any]) -> str:
    """The page, from the template beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "math": typeset}
    claims = [
        entry | {"trace": row.study.trace}
        for row, entry in zip(findings.rows, data["claims"], strict=True)
    ]
    beside = {
        name: data["beside"][name] | {"trace": study.trace}
        for name, study in findings.beside.items()
    }
    return environment.get_template("page.html.jinja").render(
        data={**data, "claims": claims}, beside=beside, signs=SIGNS
    )


def browser() -> str:
    """A Chromium or Chrome of this machine.

    Raises:
        UsageError: if there is none.
    """
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise UsageError(
        f"--pdf: prints with Chromium or Chrome, and there is no {' or '.join(BROWSERS)}"
    )


def print_pdf(folder: Path, browser: str) -> None:
    """The page as a PDF beside it, with every claim unfolded."""
    page, pdf = (folder.resolve() / name for name in (PAGE, PDF))
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
             f"--user-data-dir={profile}", f"--print-to-pdf={pdf}", page.as_uri()],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    if done.returncode or not pdf.is_file():
        raise UsageError(f"--pdf: {browser} has not printed {page}: {done.stderr.strip()[-300:]}")


def number(value: float | None) -> str:
    """A number for a reader: four digits, and none that are not there."""
    if value is None:
        return "–"
    return f"{value:.4g}".replace("-", "−")


def typeset(latex: str) -> str:
    """The equation as MathML, with its source for whoever cannot see it."""
    from latex2mathml.converter import convert
    from markupsafe import Markup

    # "\\frac" in a string that is not raw is a form feed and "rac"
    if not latex.isprintable():
        raise ValueError(f"equation with a control character, so not a raw string: {latex!r}")
    mathml = convert(latex, display="block")
    return Markup(mathml.replace("<math ", f'<math aria-label="{html.escape(latex)}" ', 1))


def _figure(study: Study) -> str:
    return f"figures/{study.experiment}.png"


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
