"""What tools/paper/long_runs.py left, as findings by exhibit: figures 2, 3 and A3, table A1 and section 5."""

from collections.abc import Callable
from pathlib import Path

from tools.paper.reporting import (
    constant_findings,
    curve_findings,
    gap_findings,
    perplexity_findings,
    search_findings,
    size_findings,
)
from tools.paper.reporting.findings import Finding
from tools.paper.reporting.study_runs import StudyRuns, select
from tools.paper.studies import long_records

NONE = "Long runs {}: none is finished."
# By exhibit: the studies and families of models that say something of it, and what makes each finding.
MAKERS: dict[str, list[tuple[str, str, Callable[[StudyRuns], Finding]]]] = {
    "Figure 2": [("paper", "bert", curve_findings.curves)],
    "Figure 3": [
        ("paper", "gpt", curve_findings.curves),
        ("search", "gpt", search_findings.search),
        ("tuned", "gpt", curve_findings.curves),
    ],
    "Figure A3": [("paper", "gpt", constant_findings.constants), ("tuned", "gpt", constant_findings.constants)],
    "Table A1": [
        ("paper", "gpt", perplexity_findings.perplexities),
        ("tuned", "gpt", perplexity_findings.perplexities),
    ],
    "Section 5": [("sizes", "gpt", size_findings.exponents)],
}


def find(exhibit: str, folder: Path, hardware: str) -> list[Finding]:
    """The findings about ``exhibit`` from the records in ``folder``; none where the long runs say nothing of it.

    Raises LionError for a damaged record.
    """
    every = long_records.read(folder)
    found = []
    for study, model, make in MAKERS.get(exhibit, []):
        runs = select(every, study, model)
        one = make(runs) if runs.records else Finding(verdict=NONE.format(runs.where), made="")
        one.about = runs.where
        one.made = f"{runs.made()}; {hardware}" if runs.records else hardware
        one.missing = [*runs.missing, *one.missing]
        found.append(one)
    if exhibit == "Figure 3":
        gap = gap_findings.gap(select(every, "paper", "gpt"), select(every, "tuned", "gpt"))
        found += [gap] if gap else []
    return found
