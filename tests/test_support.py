"""The table of what is supported names nothing that no test proves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support_table
from tests.harness import ROOT


def test_every_row_of_the_support_page_is_a_mark_on_a_test() -> None:
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        marked.update(re.findall(r'(?:supports|refuses)\(\s*"([^"]+)"', path.read_text(encoding="utf-8")))
    rows = support_table.rows_in((ROOT / "docs/results/support.md").read_text(encoding="utf-8"))
    assert rows
    assert set(rows) <= marked


def test_every_cell_of_the_table_of_entries_is_a_mark_on_a_test() -> None:
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        marked.update(re.findall(r'(?:supports|refuses)\(\s*"([^"]+ / [^"]+)"', path.read_text(encoding="utf-8")))
    page = (ROOT / "docs/frameworks.md").read_text(encoding="utf-8")
    page = page.partition(support_table.BEGIN)[2].partition(support_table.END)[0]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    features, cells = lines[0], lines[1:]
    shown = {
        f"{name} / {feature}"
        for name, *found in cells
        for feature, one in zip(features, found, strict=True)
        if one != "-"
    }
    assert shown
    assert shown <= marked


# Two tests prove one row, one another, which does what it is told, one a refusal.
MARKED = """
import pytest

@pytest.mark.supports("rows", "counted")
@pytest.mark.parametrize("case", [1, 2])
def test_rows(case): pass

@pytest.mark.supports("more", "looked at")
def test_more(): {more}

@pytest.mark.refuses("nonsense")
def test_nonsense(): pass

@pytest.mark.supports("one entry / options", "counted")
def test_entry(): pass
"""


def outcomes(folder: Path, more: str, *options: str) -> Path:
    """What a run of ``MARKED`` writes."""
    folder.mkdir(exist_ok=True)
    (folder / "test_marked.py").write_text(MARKED.format(more=more))
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.support",
        "--support-file",
        "support.json",
        "test_marked.py",
        *options,
    ]
    subprocess.run([*line, "-p", "no:cacheprovider"], cwd=folder, capture_output=True, check=False)
    return folder / "support.json"


def test_the_table_is_made_from_outcomes(tmp_path: Path) -> None:
    rows = json.loads(outcomes(tmp_path, "pass").read_text())
    made = support_table.table(rows)
    nonsense = "| nonsense | refused with a message | refused |"
    assert made.splitlines()[2:] == ["| more | looked at | 1 |", nonsense, "| rows | counted | 2 |"]
    readme = f"before\n{support_table.BEGIN}\nold\n{support_table.END}\nafter\n"
    written = support_table.with_table(readme, made)
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert support_table.rows_in(written) == ["more", "nonsense", "rows"]
    assert support_table.with_table(written, made) == written
    with pytest.raises(ValueError, match="no marker lines"):
        support_table.with_table("no markers", made)


def test_entries_and_features_make_a_table_of_their_own() -> None:
    passed, refused = {"how": "run", "tests": {"a": "passed", "b": "passed"}}, {"how": "run", "tests": {"c": "refused"}}
    rows = {"core / resume": passed, "Bridge / refusals": refused, "Bridge / resume": passed, "BERT": passed}
    assert support_table.by_entry(rows).splitlines() == [
        "| | refusals | resume |",
        "|---|---|---|",
        "| Bridge | refused | 2 |",
        "| core | - | 2 |",
    ]
    assert [row for row, _ in support_table.ordered(rows)] == ["BERT"]
    failed_once = {"core / resume": {"how": "run", "tests": {"a": "failed"}}}
    assert support_table.by_entry(support_table.merged([failed_once, rows])) == support_table.by_entry(rows)
    with pytest.raises(ValueError, match="speak against: core / resume"):
        support_table.by_entry(rows | {"core / resume": {"how": "run", "tests": {"a": "failed"}}})


def test_only_the_tests_of_entries_run_if_asked_for(tmp_path: Path) -> None:
    assert list(json.loads(outcomes(tmp_path, "pass", "--entries").read_text())) == ["one entry / options"]


def test_a_failed_row_stops_the_table_and_a_skipped_one_is_left_out(tmp_path: Path) -> None:
    skipped = json.loads(outcomes(tmp_path, "pytest.skip('not here')").read_text())
    assert "more" not in support_table.table(skipped)
    whole = json.loads(outcomes(tmp_path / "whole", "pass").read_text())
    assert support_table.by_version({"2.0": whole, "1.0": skipped}).splitlines() == [
        "| | 1.0 | 2.0 |",
        "|---|---|---|",
        "| more | - | 1 |",
        "| nonsense | refused | refused |",
        "| rows | 2 | 2 |",
    ]
    failed = json.loads(outcomes(tmp_path, "assert False").read_text())
    with pytest.raises(ValueError, match="failed tests speak against: more"):
        support_table.table(failed)
    with pytest.raises(ValueError, match=r"failed tests speak against: more \(1\.0\)"):
        support_table.by_version({"1.0": failed, "2.0": whole})
