#!/usr/bin/env python3
"""Write the table of what is supported into the README, from the outcomes of the tests that say so.

    OMP_NUM_THREADS=1 python -m pytest --support-file=support.json    # every test, the slow ones too
    python tools/support_table.py support.json README.md              # between the two marker lines; --check: only look

A row is there if all of its tests that ran have passed. One with a failure ends this with an error, one whose tests
were all skipped is left out and named. Rows come in the order of their tests' names.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

BEGIN = "<!-- support table: made by tools/support_table.py, do not edit -->"
END = "<!-- end of the support table -->"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table. Raises ValueError naming the rows that a failed test speaks against."""
    failed = [row for row, entry in rows.items() if "failed" in entry["tests"].values()]
    if failed:
        raise ValueError(f"failed tests speak against: {'; '.join(failed)}. Run them again, then this")
    lines = ["| what | how it is tested | cases |", "|---|---|---|"]
    for row, entry in sorted(rows.items(), key=lambda item: min(item[1]["tests"])):
        passed = list(entry["tests"].values()).count("passed")
        if passed:
            lines.append(f"| {row} | {entry['how']} | {passed} |")
    return "\n".join(lines)


def with_table(readme: str, made: str) -> str:
    """``readme`` with ``made`` between the marker lines. Raises ValueError where they are not there."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no marker lines: put {BEGIN} and {END}, each on a line, where the table shall stand")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def rows_in(readme: str) -> list[str]:
    """The first column of the table between the markers; empty where there are none."""
    inside = readme.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in inside.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]]


def main() -> None:
    """Read the outcomes, write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", type=Path, help="what pytest --support-file wrote")
    parser.add_argument("readme", type=Path, nargs="?", help="file to write the table into; without it, it is printed")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the file's table is another")
    options = parser.parse_args()
    rows = json.loads(options.outcomes.read_text(encoding="utf-8"))
    try:
        made = table(rows)
        for row, entry in rows.items():
            if "passed" not in entry["tests"].values():
                print(f"left out, its tests were skipped: {row}", file=sys.stderr)
        if options.readme is None:
            print(made)
            return
        old = options.readme.read_text(encoding="utf-8")
        new = with_table(old, made)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.check:
        sys.exit(0 if new == old else f"error: the table in {options.readme} is not what the tests say; run this tool")
    options.readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
