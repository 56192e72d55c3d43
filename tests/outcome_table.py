#!/usr/bin/env python3
"""Write what each file of tests came to into a page, from what pytest recorded of one or several runs.

    ./tests/full.sh                                                # does both of these
    python -m pytest --junitxml=full.xml -o junit_suite_name=$(git rev-parse --short HEAD)
    python tests/outcome_table.py full.xml docs/results/tests.md              # between the two marker lines

Of several runs, as of a suite run in parts, the latest outcome and time of a case count. The page names the date and
commit of each run, and the reason of each case that was skipped.
"""

import argparse
import collections
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

BEGIN = "<!-- made by tests/outcome_table.py, do not edit -->"
END = "<!-- end -->"
OUTCOMES = ("passed", "skipped", "failed")


@dataclass(frozen=True)
class Case:
    """One test of one run."""

    file: str
    outcome: str
    seconds: float
    reason: str = ""


def read(path: Path) -> tuple[str, str, dict[str, Case]]:
    """A run's date, its commit and its cases by name. Raises ValueError for what pytest did not write to its end."""
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: {error}. Give what pytest --junitxml wrote") from error
    if suite is None:
        raise ValueError(f"{path} has no <testsuite>. Give what pytest --junitxml wrote")
    cases = {}
    for case in suite.iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if skipped is not None else "passed"
        reason = "" if skipped is None else skipped.get("message", "")
        module = case.get("classname", "")
        cases[f"{module}::{case.get('name')}"] = Case(module, outcome, float(case.get("time", 0)), reason)
    return suite.get("timestamp", "")[:10], suite.get("name", ""), cases


def page(runs: list[tuple[str, str, dict[str, Case]]]) -> str:
    """The Markdown of ``runs``, oldest first."""
    cases: dict[str, Case] = {}
    for _, _, outcomes in runs:
        cases.update(outcomes)
    files = collections.defaultdict(list)
    for case in cases.values():
        files[case.file].append(case)
    made = ", ".join(dict.fromkeys(f"{date} at {commit}" for date, commit, _ in runs))
    rows = [f"Run on {made}:", "", "| tests | passed | skipped | failed | seconds |", "|---|---|---|---|---|"]
    rows += [_row(name.replace(".", "/") + ".py", files[name]) for name in sorted(files)]
    rows.append(_row("all", list(cases.values())))
    reasons = collections.Counter(case.reason for case in cases.values() if case.outcome == "skipped")
    if reasons:
        rows += ["", "Skipped, with the reason:", ""]
        rows += [f"- {reason} ({count})" for reason, count in sorted(reasons.items())]
    return "\n".join(rows)


def _row(name: str, cases: list[Case]) -> str:
    counts = collections.Counter(case.outcome for case in cases)
    columns = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
    return f"| {name} | {columns} | {sum(case.seconds for case in cases):.0f} |"


def main() -> None:
    """Read the runs, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="what pytest --junitxml wrote, oldest first")
    parser.add_argument("page", type=Path, help="Markdown file with the marker lines, between which the table goes")
    options = parser.parse_args()
    try:
        made = page([read(path) for path in options.runs])
        before, begin, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{options.page} lacks the marker lines {BEGIN} and {END}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    options.page.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
