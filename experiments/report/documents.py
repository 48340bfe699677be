"""What the repository itself says of the claims.

The table in docs/claims.md, how many have each verdict in README.md, and docs/notes.md.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.engine.config import UsageError
from experiments.engine.files import written
from experiments.report.evidence import Claim, Verdict
from experiments.report.page import Row

START, END = "<!-- claims -->", "<!-- /claims -->"
PAGE = "docs/claims.md"

PARTS = {
    "L": "The LSTM",
    "A": "Dot-product attention",
    "V": "Vision transformers",
    "P": "Positions",
}
"""What the letter of an id stands for, in the order of the notes."""

INTRODUCTION = """\
# The notes, statement by statement

rnnattn implements a set of worked answers about the LSTM, dot-product attention, vision
transformers and sinusoidal positions: equations, with a few sentences between them, which are
translated here. Each statement has an id that code, tests and experiments use, and stands as it is
printed; where the library has another one, that stands below it, with the verdict of the experiment
that compares the two. What the notes leave out and the library needs is listed as well.

This page is written by `python -m experiments report --full --readme`."""


def claims_table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """The table of docs/claims.md, from each claim's id, title, verdict and experiment."""
    lines = ["| | claim | verdict | tested by |", "|---|---|---|---|"]
    for id_, title, verdict, experiment in rows:
        config = f"[`{experiment}`](../configs/claims/{experiment}.toml)"
        lines.append(f"| {id_} | {title} | {verdict} | {config} |")
    return "\n".join([START, *lines, END])


def readme_counts(verdicts: Iterable[str]) -> str:
    """The line of README.md: how many claims have each verdict."""
    counts = Counter(verdicts).most_common()
    said = ", ".join(f"{count} *{verdict}*" for verdict, count in counts)
    return f"{START}\nOf {sum(count for _, count in counts)} claims: {said}.\n{END}"


def notes_page(claims: Iterable[tuple[str, Claim, Verdict]]) -> str:
    """docs/notes.md, from each claim with its title and verdict."""
    sections = [INTRODUCTION]
    parts: dict[str, list[str]] = {letter: [] for letter in PARTS}
    for title, claim, verdict in claims:
        if claim.id[0] in parts:
            parts[claim.id[0]].append(statement(title, claim, verdict))
    for letter, statements in parts.items():
        sections += [f"## {PARTS[letter]}", *statements]
    return "\n\n".join(sections) + "\n"


def statement(title: str, claim: Claim, verdict: Verdict) -> str:
    """The section of docs/notes.md on a claim."""
    formula = lambda latex: f"```math\n{latex}\n```"
    if not claim.in_notes:
        said = ["Not in the notes. As tested:", formula(claim.equation)]
    elif claim.printed_equation:
        said = ["As printed:", formula(claim.printed_equation)]
        said += ["**As tested:**", formula(claim.equation)]
    else:
        said = ["As printed and as tested:", formula(claim.equation)]
    lines = [f"### {claim.id} · {title}", *said, f"*{verdict.capitalize()}.* {claim.note}".strip()]
    return "\n\n".join(lines)


def update(root: Path, rows: Sequence[Row]) -> None:
    """Write the rows' verdicts into README.md and docs/claims.md, between markers, and the notes.

    Raises:
        UsageError: if the markers are not there, or a row has an error and hence no verdict.
    """
    claims = [(row.title, row.claim, row.verdict) for row in rows if row.claim]
    if len(claims) < len(rows):
        failed = ", ".join(row.id for row in rows if row.claim is None)
        raise UsageError(f"{root / PAGE}: stays as it is, as there is no verdict on {failed}")
    table = claims_table((row.id, row.title, row.verdict, row.study.experiment) for row in rows)
    said = {"README.md": readme_counts(verdict for *_, verdict in claims), PAGE: table}
    pages = {name: _between_markers(root / name, new) for name, new in said.items()}
    for name, text in {**pages, "docs/notes.md": notes_page(claims)}.items():
        with written(root / name) as file:
            file.write(text.encode())


def _between_markers(path, new):
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise UsageError(f"{path}: needs the markers {START} and {END}, once each")
    before, rest = text.split(START)
    return before + new + rest.split(END)[1]
