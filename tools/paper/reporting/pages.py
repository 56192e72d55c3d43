"""The report's content in the order of its pages: a summary, each exhibit, and how long the runs took."""

from dataclasses import dataclass

from tools.paper.reporting.findings import Finding, Judgement
from tools.paper.reporting.paper import Exhibit, Table

SUMMARY_HEAD = ("exhibit", "claim", "verdict", "made on", "numbers")


@dataclass(frozen=True, kw_only=True)
class Row:
    """An exhibit, with what was found of it, or why nothing was."""

    exhibit: Exhibit
    findings: list[Finding]
    problems: list[str]

    @property
    def was_run(self) -> bool:
        """Whether a run has finished that says something of it."""
        return any(found.tables or found.pictures for found in self.findings)

    @property
    def anchor(self) -> str:
        return self.exhibit.name.lower().replace(" ", "-")

    @property
    def judgements(self) -> list[Judgement]:
        """The exhibit's lines of the summary: one at least."""
        judged = [judgement for found in self.findings for judgement in found.judgements]
        if judged:
            return judged
        verdict = "its record is damaged" if self.problems else "not run here"
        if self.was_run:
            verdict = "see its section"
        return [Judgement(claim=self.exhibit.claim.rstrip("."), verdict=verdict, basis="-", numbers="-")]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of the report. Texts may have formulas in ``$...$``."""

    title: str
    intro: list[str]
    rows: list[Row]
    times: Table
    """of the long runs; without rows where none is finished"""
    hardware: str

    @property
    def main_results(self) -> list[str]:
        """The main results in sentences, before the table of all; none where they have no run."""
        return [judged.plain for row in self.rows for judged in row.judgements if judged.plain]

    @property
    def times_note(self) -> str:
        """What the table of times is about, or that it is empty."""
        if len(self.times) < 2:
            return "No long run is finished."
        return (
            f"CPU hours of the long runs, on {self.hardware}: the mean of the seeds (smallest to largest). Measuring "
            "is the exact rounds and the perplexities of the checkpoints. The report is made in seconds."
        )


def summary_cells(judgement: Judgement) -> list[str]:
    """A line of the summary, without the exhibit's name."""
    return [judgement.claim, judgement.verdict, judgement.basis, judgement.numbers]
