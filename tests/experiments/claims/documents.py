"""What README.md and docs/notes.md say of the claims."""

import re
from typing import Any

from experiments.engine.experiment import ROOT
from experiments.report import documents
from experiments.report.evidence import Claim
from experiments.report.page import typeset

ROW = re.compile(r"^\| (\w\d+) \| .* \| ([^|]+) \| \[`\w+`\]", re.MULTILINE)
VERDICTS: dict[str, Any] = dict(ROW.findall((ROOT / "README.md").read_text()))


def assert_stated(title: str, claim: Claim) -> None:
    """The claim stands in the notes as the code has it, and its equations can be typeset."""
    if claim.id[0] in documents.PARTS:
        notes = (ROOT / "docs" / "notes.md").read_text()
        assert documents.statement(title, claim, VERDICTS[claim.id]) in notes
    for latex in filter(None, (claim.equation, claim.printed_equation)):
        # what it does not know it leaves as it is
        assert "\\" not in re.sub(r'aria-label="[^"]*"', "", typeset(latex))
