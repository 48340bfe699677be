"""What a measured claim of the notes is: evidence, and the verdict that follows from it.

A `Claim` holds evidence, not a verdict. It may be wrong with probability `LEVEL`, which it divides
among the measurements that its evidence rests on.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.report.intervals import Exact, Interval, Measurement

Verdict = Literal[
    "holds",
    "holds as corrected",
    "holds only under a stated condition",
    "missing in the notes",
    "fails",
    "undecided",
]

Status = Literal["supported", "contradicted", "undecided"]

Relation = Literal["=", ">", "<"]
"""What is predicted of the true number: that it is the predicted one, above it or below it."""

Number = float | np.ndarray | np.generic
"""A number, possibly as NumPy keeps it in a result: an array without axes."""

NOTES = 27
"""Statements of the notes that are claims."""

LEVEL = 0.01 / NOTES
"""Probability that any interval of a claim misses what it is an interval for. Those of all the
claims of the notes hold together with 99 % (Bonferroni)."""


class Evidence(NamedTuple):
    """One measurement beside what theory predicts and what a rival theory does."""

    name: str
    """What was measured, in a few words and with the conditions that it was measured under."""
    predicted: float
    """What the statement says, computed; of an inequality, the bound."""
    measured: Measurement
    rival: Measurement | None = None
    """What holds if the statement does not: the printed value, no effect, …"""
    rival_name: str = ""
    relation: Relation = "="

    def judged(self, level: float) -> "Judged":
        """With intervals of this level for what was measured, and for the rival if that was."""
        measured = self.measured.interval(level)
        rival = None if self.rival is None else self.rival.interval(level)
        status = _status(self.predicted, measured, rival, self.relation)
        value = None if rival is None else rival.value
        return Judged(
            self.name, self.predicted, *measured, value, self.rival_name, self.relation, status
        )


class Judged(NamedTuple):
    """Evidence with its interval, and what follows from it."""

    name: str
    predicted: float
    measured: float
    low: float
    high: float
    rival: float | None
    rival_name: str
    relation: Relation
    status: Status


def _status(
    predicted: float, measured: Interval, rival: Interval | None, relation: Relation
) -> Status:
    """Whether the prediction lies in the interval, and the rival does not.

    An inequality has no rival: all of the interval has to lie beyond the bound, and none of it if
    the inequality is wrong.
    """
    if any(map(math.isnan, (predicted, *measured, *(rival or ())))):
        return "undecided"
    over, under = measured.low > predicted, measured.high < predicted
    if relation == ">":
        right, wrong = over, under
    elif relation == "<":
        right, wrong = under, over
    else:
        apart = rival is None or rival.high < measured.low or measured.high < rival.low
        right, wrong = apart, over or under
    if wrong:
        return "contradicted"
    return "supported" if right else "undecided"


def equal(
    name: str,
    predicted: Number,
    measured: Measurement,
    rival: Number | Measurement | None = None,
    rival_name: str = "",
) -> Evidence:
    """Evidence that the true number is the predicted one, and not the rival."""
    if isinstance(rival, float | int | np.ndarray | np.generic):
        rival = Exact(float(rival))
    return Evidence(name, float(predicted), measured, rival, rival_name)


def above(name: str, bound: Number, measured: Measurement) -> Evidence:
    """Evidence that the true number is above a bound."""
    return Evidence(name, float(bound), measured, relation=">")


def below(name: str, bound: Number, measured: Measurement) -> Evidence:
    """Evidence that the true number is below a bound."""
    return Evidence(name, float(bound), measured, relation="<")


def each(
    name: str,
    values: Iterable[Any],
    predicted: Any,
    measured: Iterable[Measurement],
    rival: Any = None,
    rival_name: str = "",
) -> tuple[Evidence, ...]:
    """One piece of evidence for each value of a parameter, which stands as {} in the name.

    `predicted` and `rival` are one for all or one for each; a rival that is NaN is none.
    """
    values = tuple(values)
    all_predicted = np.broadcast_to(np.asarray(predicted, float), len(values))
    rivals = np.broadcast_to(np.nan if rival is None else np.asarray(rival, float), len(values))
    return tuple(
        equal(name.format(value), p, m, *(() if np.isnan(r) else (float(r), rival_name)))
        for value, p, m, r in zip(values, all_predicted, measured, rivals, strict=True)
    )


def judge(
    right: Sequence[Status],
    *,
    printed: Sequence[Status] = (),
    beyond: Sequence[Status] = (),
    in_notes: bool = True,
) -> Verdict:
    """The verdict that follows from what the evidence is.

    Args:
        right: for the statement as rnnattn has it: printed, or corrected, or under its condition.
        printed: for the statement as printed, where it was corrected.
        beyond: for the statement outside its condition, where it has one.
        in_notes: whether the notes make the statement.
    Returns:
        "fails" if any of `right` is contradicted, else "undecided" if any of it cannot tell, or if
        not all of `printed` and `beyond` is contradicted: then nothing shows that the correction or
        the condition is needed. Else it holds: "as corrected" if anything was printed, "only under
        a stated condition" if it has one; and it is "missing in the notes" if they do not say it.
    """
    if "contradicted" in right:
        return "fails"
    wrong = [*printed, *beyond]
    if not right or "undecided" in right or any(status != "contradicted" for status in wrong):
        return "undecided"
    if not in_notes:
        return "missing in the notes"
    if printed:
        return "holds as corrected"
    return "holds only under a stated condition" if beyond else "holds"


@dataclass(frozen=True)
class Claim:
    """One claim of the notes with the evidence for and against it.

    The first of `right` is the claim's headline: the numbers that its row of the report shows.
    """

    id: str
    equation: str
    """The statement that was tested, in LaTeX."""
    criterion: str
    """What the verdict rests on, in a sentence or two."""
    right: tuple[Evidence, ...]
    printed: tuple[Evidence, ...] = ()
    beyond: tuple[Evidence, ...] = ()
    note: str = ""
    """What a reader should take away that the numbers do not say: the correction, the condition."""
    beside: str = ""
    """What else was measured, in words; the verdict does not rest on it."""
    printed_equation: str = ""
    """The statement as the notes print it, in LaTeX, where it is not the one that was tested."""
    in_notes: bool = True
    """Whether the notes make the statement."""
    news: str = ""
    """A sentence for the head of the page, on what a reader who knows the field may not."""

    @property
    def level(self) -> float:
        """That of each interval: the claim's, divided among what was measured with an error."""
        several = (*self.right, *self.printed, *self.beyond)
        numbers = (number for e in several for number in (e.measured, e.rival))
        # two pieces of evidence may rest on one measurement
        measured = {id(number) for number in numbers if not isinstance(number, Exact | None)}
        return LEVEL / max(1, len(measured))

    @cached_property
    def evidence(self) -> dict[str, tuple[Judged, ...]]:
        """All evidence as it is judged, by what it is for."""
        groups = {"right": self.right, "printed": self.printed, "beyond": self.beyond}
        level = self.level
        return {
            group: tuple(evidence.judged(level) for evidence in several)
            for group, several in groups.items()
        }

    @property
    def verdict(self) -> Verdict:
        states = {group: [e.status for e in several] for group, several in self.evidence.items()}
        return judge(**states, in_notes=self.in_notes)

    def table(self) -> dict[str, Any]:
        """The claim as a JSON object."""
        first = self.evidence["right"][0]
        return {
            "id": self.id,
            "verdict": self.verdict,
            "equation": self.equation,
            "printed_equation": self.printed_equation,
            "in_notes": self.in_notes,
            "news": self.news,
            "criterion": self.criterion,
            "note": self.note,
            "beside": self.beside,
            "relation": first.relation,
            "predicted": first.predicted,
            "measured": first.measured,
            "interval": [first.low, first.high],
            "level": self.level,
            "evidence": [
                {"group": group, **judged._asdict()}
                for group, several in self.evidence.items()
                for judged in several
            ],
        }
