"""The reproduction report: every claim of the notes, tested, on one page.

An experiment with `CLAIMS` and `claims` (see `experiments.report.evidence`) is in the report
without further ado, and so is one that says `BESIDE = "<such an experiment>"`: its figure stands
beside that one's. The config is `configs/claims/<name>.toml`. A run is kept as
`<output>/<name>/report-<key>`, and its result is used again as long as the key is the same, which
`experiments.report.key` makes of all that decides the result. Verdicts and figures are made anew.

    <output>/report/index.html    the page, which needs no network
    <output>/report/report.json   the same for machines
    <output>/report/figures/, configs/
"""

import contextlib
import html
import io
import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.engine import runs
from experiments.engine.config import UsageError, read, to_table
from experiments.engine.experiment import ROOT, config_paths
from experiments.engine.files import locked, written
from experiments.report.evidence import FAMILY_LEVEL, TITLES, Claim, Verdict
from experiments.report.key import run_key

PAGE, DATA = "index.html", "report.json"
START, END = "<!-- claims -->", "<!-- /claims -->"

SIGNS: dict[Verdict, str] = {
    "holds": "✓",
    "holds as corrected": "✓",
    "holds only under a stated condition": "◐",
    "fails": "✗",
    "undecided": "?",
}
"""A sign for each verdict, so that none is told by colour alone."""


class Size(NamedTuple):
    """An experiment's config, and the file whose run it is."""

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
    claim: Claim | None = None
    study: Study | None = None

    @property
    def title(self) -> str:
        return TITLES[self.id]

    @property
    def verdict(self) -> Verdict:
        return self.claim.verdict if self.claim else "undecided"

    @property
    def experiment(self) -> str:
        return self.study.experiment if self.study else ""

    @property
    def error(self) -> str:
        return self.study.error if self.study else ""


class Findings(NamedTuple):
    """One row for each claim of the notes, and by experiment the one whose figure stands beside."""

    rows: Sequence[Row]
    beside: Mapping[str, Study] = MappingProxyType({})

    @property
    def errors(self) -> list[str]:
        """The experiments that failed, with what they said."""
        studies = [*(row.study for row in self.rows), *self.beside.values()]
        failed = {study.experiment: study.error for study in studies if study and study.error}
        return [f"{name}: {error}" for name, error in failed.items()]


def sizes(experiments: Mapping[str, Any], *, full: bool) -> dict[str, Size]:
    """The config of every experiment of the report: its file's if `full`, else its default."""
    types = {name: module.Config for name, module in experiments.items()}
    serving = [
        name
        for name, module in experiments.items()
        if hasattr(module, "CLAIMS") or hasattr(module, "BESIDE")
    ]
    if not full:
        return {name: Size(types[name](), None) for name in serving}
    paths = {name: config_paths()[name] for name in serving}
    return {
        name: Size(read(path, types)[1], path.relative_to(ROOT).as_posix())
        for name, path in paths.items()
    }


def measure(experiments: Mapping[str, Any], sizes: Mapping[str, Size], output: Path) -> Findings:
    """Run each experiment that has no result yet, and judge.

    An experiment that fails has its error in the rows of its claims, and the others go on.
    """
    rows: dict[str, Row] = {}
    beside: dict[str, Study] = {}
    with _progress() as progress:
        # a signal ends the process as it is, and the cursor should be there then
        progress.console.show_cursor(True)
        task = progress.add_task("", total=len(sizes))
        for name, size in sizes.items():
            progress.update(task, description=name)
            module = experiments[name]
            study, claims = _study(name, module, size, output)
            for id_ in getattr(module, "CLAIMS", ()):
                rows[id_] = Row(id_, claims.get(id_), study)
            if hasattr(module, "BESIDE"):
                beside[module.BESIDE] = study
            progress.advance(task)
        progress.update(task, description="done")
    return Findings([rows.get(id_, Row(id_)) for id_ in TITLES], beside)


def _study(name: str, module: Any, size: Size, output: Path) -> tuple[Study, dict[str, Claim]]:
    """The experiment as it ran, and what it says of the claims that it serves."""
    study = Study(name, to_table(name, size.config), size.path)
    claims: dict[str, Claim] = {}
    try:
        folder = _run(name, module, size.config, output)
        result = runs.read_result(folder, module.Result)
        if hasattr(module, "CLAIMS"):
            claims = {claim.id: claim for claim in module.claims(size.config, result)}
            differing = set(module.CLAIMS) ^ set(claims)
            if differing:
                listed = ", ".join(sorted(differing))
                raise ValueError(f"{name}: CLAIMS and claims() differ in {listed}")
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return study._replace(error=line, trace=traceback.format_exc()), {}
    return study._replace(folder=folder, seconds=result.scores["wall_seconds"]), claims


def _run(name: str, module: Any, config: Any, output: Path) -> Path:
    """The folder of the experiment's run with this config and this code, run if it is missing.

    One that was cut off goes on from its checkpoints.
    """
    key = run_key(name, Path(module.__file__), config)
    folder = output / name / f"report-{key}"
    if runs.finished(folder):
        # by other code than drew the one that is there, perhaps
        from experiments.figures import save

        figure = module.plot(runs.read_result(folder, module.Result))
        save(figure, folder / runs.FIGURE)
        return folder
    if hasattr(module, "check"):
        module.check(config)
    table = to_table(name, config)
    folder = runs.reopen(output, name, folder.name, table)
    # training shows its own progress on a terminal: here there is one display, ours
    with locked(folder), contextlib.redirect_stdout(io.StringIO()):
        runs.write_config(folder, table, "python -m experiments report")
        runs.record(module, config, folder)
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
        if study is None:
            continue
        text = tomli_w.dumps(study.config)
        with written(folder / "configs" / f"{study.experiment}.toml") as file:
            file.write(text.encode())
        if study.folder is not None:
            with written(folder / _figure(study)) as file:
                file.write((study.folder / runs.FIGURE).read_bytes())
    data = {
        "size": "full" if full else "quick",
        "family_level": FAMILY_LEVEL,
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
        "relation": None,
        "predicted": None,
        "measured": None,
        "interval": None,
        "evidence": [],
    }
    if row.claim:
        table |= row.claim.table()
    return _finite(table | _about(row.study, folder))


def _about(study: Study | None, folder: Path) -> dict[str, Any]:
    """How a figure or a verdict came about, as JSON."""
    if study is None:
        names = ("experiment", "figure", "config", "command", "seconds", "error")
        return dict.fromkeys(names)
    config = study.config_path or f"{folder.as_posix()}/configs/{study.experiment}.toml"
    return {
        "experiment": study.experiment,
        "figure": _figure(study) if study.folder else None,
        "config": config,
        "command": f"python -m experiments run {config}",
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
    environment.filters |= {"number": number, "math": typeset, "heading": heading}
    experiments: dict[str, list[dict[str, Any]]] = {}
    for row, table in zip(findings.rows, data["claims"], strict=True):
        trace = row.study.trace if row.study else ""
        experiments.setdefault(row.experiment, []).append(table | {"trace": trace})
    beside = {
        name: data["beside"][name] | {"trace": study.trace}
        for name, study in findings.beside.items()
    }
    return environment.get_template("page.html.jinja").render(
        data=data, experiments=experiments, beside=beside, signs=SIGNS
    )


def number(value: float | None) -> str:
    """A number for a reader: four digits, and none that are not there."""
    if value is None:
        return "–"
    return f"{value:.4g}".replace("-", "−")


def heading(experiment: str) -> str:
    """An experiment's name as a heading: lstm_gradient is LSTM gradient."""
    first, *rest = experiment.split("_")
    first = {"lstm": "LSTM", "vit": "ViT"}.get(first, first.capitalize())
    return " ".join([first, *rest])


def typeset(latex: str) -> str:
    """The equation as MathML, with its source for whoever cannot see it."""
    from latex2mathml.converter import convert
    from markupsafe import Markup

    # "\\frac" in a string that is not raw is a form feed and "rac"
    if not latex.isprintable():
        raise ValueError(f"equation with a control character, so not a raw string: {latex!r}")
    mathml = convert(latex, display="block")
    return Markup(mathml.replace("<math ", f'<math aria-label="{html.escape(latex)}" ', 1))


def readme_table(verdicts: Mapping[str, tuple[Verdict, str]]) -> str:
    """The table of claims for README.md, from each claim's verdict and experiment."""
    lines = ["| | claim of the notes | verdict | tested by |", "|---|---|---|---|"]
    for id_, title in TITLES.items():
        verdict, experiment = verdicts[id_]
        config = f"[`{experiment}`](configs/claims/{experiment}.toml)" if experiment else "not yet"
        lines.append(f"| {id_} | {title} | {verdict} | {config} |")
    return "\n".join([START, *lines, END])


def update_readme(path: Path, rows: Sequence[Row]) -> None:
    """Put the rows' verdicts between the markers of the file.

    Raises:
        UsageError: if the markers are not there, or a row has an error and hence no verdict.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise UsageError(f"{path}: needs the markers {START} and {END}, once each")
    failed = [row.id for row in rows if row.error]
    if failed:
        raise UsageError(f"{path}: stays as it is, as there is no verdict on {', '.join(failed)}")
    before, rest = text.split(START)
    _, after = rest.split(END)
    table = readme_table({row.id: (row.verdict, row.experiment) for row in rows})
    with written(path) as file:
        file.write((before + table + after).encode())


def _figure(study: Study) -> str:
    return f"figures/{study.experiment}.png"


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
