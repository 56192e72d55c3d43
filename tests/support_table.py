#!/usr/bin/env python3
"""Write the table of what is supported into a page of docs/results/, from the outcomes of the tests.

    OMP_NUM_THREADS=1 python -m pytest --support-file=support.json    # every test, the slow ones too
    python tests/support_table.py support.json docs/results/support.md    # between the marker lines; --check: only look
    python tests/support_table.py 0.18.2.json 0.19.2=support.json docs/results/versions.md    # one column per Megatron
    python -m pytest --entries --support-file=entries.json    # only the tests of rows "entry / feature"
    python tests/support_table.py --entries entries.json docs/frameworks.md    # their table; also from several files

A row is there if all of its tests that ran have passed: with their number, or as refused where that is what they prove.
One with a failure ends this with an error, one whose tests were all skipped is left out and named. Rows come in the
order of their tests' names.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN = "<!-- support table: made by tests/support_table.py, do not edit -->"
END = "<!-- end of the support table -->"
SEPARATOR = " / "
FEATURES = ("options", "refusals", "start-up line", "telemetry", "rounds", "resume", "reshard")

Rows = dict[str, dict[str, Any]]


def table(rows: Rows) -> str:
    """The Markdown table. Raises ValueError naming the rows that a failed test speaks against."""
    refuse_failed(rows)
    lines = ["| what | how it is tested | cases |", "|---|---|---|"]
    for row, entry in ordered(rows):
        if found := cell(entry):
            lines.append(f"| {row} | {entry['how']} | {found} |")
    return "\n".join(lines)


def by_version(versions: dict[str, Rows]) -> str:
    """A Markdown table with a column for each version, in their order; `-` where no test of a row ran.

    Raises as :func:`table`.
    """
    refuse_failed({f"{row} ({version})": entry for version, rows in versions.items() for row, entry in rows.items()})
    versions = dict(sorted(versions.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])]))
    lines = [f"| | {' | '.join(versions)} |", f"|---|{'---|' * len(versions)}"]
    for row, _ in ordered(merged(list(versions.values()))):
        cells = [cell(rows.get(row, {"tests": {}})) for rows in versions.values()]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(found or '-' for found in cells)} |")
    return "\n".join(lines)


def by_entry(rows: Rows) -> str:
    """A Markdown table of the rows with a name like ``entry / feature``: a line per entry, a column per feature.

    `-` where no test of a cell ran. Raises as :func:`table`.
    """
    cells = {tuple(row.split(SEPARATOR)): entry for row, entry in rows.items() if SEPARATOR in row}
    refuse_failed({SEPARATOR.join(names): entry for names, entry in cells.items()})
    entries = sorted({name for name, _ in cells})
    order = {feature: number for number, feature in enumerate(FEATURES)}
    features = sorted({feature for _, feature in cells}, key=lambda name: (order.get(name, len(order)), name))
    lines = [f"| | {' | '.join(features)} |", f"|---|{'---|' * len(features)}"]
    for name in entries:
        found = [cell(cells.get((name, feature), {"tests": {}})) for feature in features]
        lines.append(f"| {name} | {' | '.join(one or '-' for one in found)} |")
    return "\n".join(lines)


def merged(runs: list[Rows]) -> Rows:
    """The outcomes of several runs; of a test that ran in two, the later run's."""
    everything: Rows = {}
    for rows in runs:
        for row, entry in rows.items():
            everything.setdefault(row, {**entry, "tests": {}})["tests"].update(entry["tests"])
    return everything


def ordered(rows: Rows) -> list[tuple[str, dict[str, Any]]]:
    """Rows in the order of their tests' names, without those of :func:`by_entry`."""
    plain = {row: entry for row, entry in rows.items() if SEPARATOR not in row}
    return sorted(plain.items(), key=lambda item: min(item[1]["tests"]))


def refuse_failed(rows: Rows) -> None:
    """Raise ValueError naming every row that a failed test speaks against."""
    failed = [row for row, entry in rows.items() if "failed" in entry["tests"].values()]
    if failed:
        raise ValueError(f"failed tests speak against: {'; '.join(failed)}. Run them again, then this")


def cell(entry: dict[str, Any]) -> str:
    """How many of a row's tests passed, or that they prove a refusal; empty where none ran."""
    outcomes = list(entry["tests"].values())
    passed = outcomes.count("passed")
    return str(passed) if passed else "refused" if "refused" in outcomes else ""


def with_table(page: str, made: str) -> str:
    """``page`` with ``made`` between the marker lines. Raises ValueError where they are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no marker lines: put {BEGIN} and {END}, each on a line, where the table shall stand")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def rows_in(page: str) -> list[str]:
    """The first column of the table between the markers; empty where there are none."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in inside.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]]


def read(outcomes: list[str], *, entries: bool = False) -> str:
    """The table of one file of outcomes, or a column for each of several; with ``entries``, the one of all their
    entries."""
    loaded = {}
    for item in outcomes:
        version, _, file = item.rpartition("=")
        loaded[version or Path(file).stem] = json.loads(Path(file).read_text(encoding="utf-8"))
    if entries:
        return by_entry(merged(list(loaded.values())))
    if len(loaded) > 1:
        return by_version(loaded)
    (rows,) = loaded.values()
    for row, entry in rows.items():
        if not cell(entry):
            print(f"left out, its tests were skipped: {row}", file=sys.stderr)
    return table(rows)


def main() -> None:
    """Read the outcomes, write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", nargs="+", metavar="[VERSION=]JSON", help="what pytest --support-file wrote")
    parser.add_argument("page", type=Path, help="file to write the table into; - prints it")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the file's table is another")
    parser.add_argument("--entries", action="store_true", help="write the table of entries and features")
    options = parser.parse_args()
    try:
        made = read(options.outcomes, entries=options.entries)
        if str(options.page) == "-":
            print(made)
            return
        old = options.page.read_text(encoding="utf-8")
        new = with_table(old, made)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.check:
        sys.exit(0 if new == old else f"error: the table in {options.page} is not what the tests say; run this tool")
    options.page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
