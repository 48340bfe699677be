"""What docs/claims.md and docs/notes.md say of the claims."""

import re
from typing import Any

from experiments.engine.experiment import ROOT
from experiments.report import documents
from experiments.report.evidence import Claim
from experiments.report.page import typeset


def rows_of_table() -> list[tuple[str, str, str, str]]:
    """Id, title, verdict and experiment of each row of the table of claims."""
    text = (ROOT / documents.PAGE).read_text()
    section = text.split(documents.START)[1].split(documents.END)[0]
    row = re.compile(r"\| (\w\d+) \| (.*) \| ([^|]+) \| \[`(\w+)`\]\(.*\) \|")
    return row.findall(section)


VERDICTS: dict[str, Any] = {id_: verdict for id_, _, verdict, _ in rows_of_table()}


def assert_stated(title: str, claim: Claim) -> None:
    """The claim stands in the notes as the code has it, and its equations can be typeset."""
    if claim.id[0] in documents.PARTS:
        notes = (ROOT / "docs" / "notes.md").read_text()
        assert documents.statement(title, claim, VERDICTS[claim.id]) in notes
    for latex in filter(None, (claim.equation, claim.printed_equation)):
        # what it does not know it leaves as it is
        assert "\\" not in re.sub(r'aria-label="[^"]*"', "", typeset(latex))
