"""The page of what the tests came to, from pytest's own records."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent / "outcome_table.py"
TESTS = """
import pytest
def test_good(): pass
def test_changes(): assert {good}
@pytest.mark.skip(reason="no GPU here")
def test_gpu(): pass
"""
PAGE = "before\n<!-- made by tests/outcome_table.py, do not edit -->\nold\n<!-- end -->\nafter\n"


def run_pytest(folder: Path, good: bool, commit: str) -> Path:
    """Pytest's record of three tests, one of which is as ``good`` says."""
    (folder / "test_some.py").write_text(TESTS.format(good=good))
    record = folder / f"{commit}.xml"
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={record}", "test_some.py"]
    subprocess.run([*line, "-o", f"junit_suite_name={commit}"], cwd=folder, capture_output=True, check=False)
    return record


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_latest_outcome_of_each_case_counts_and_every_run_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    bad, good = run_pytest(tmp_path, False, "aaaaaaa"), run_pytest(tmp_path, True, "bbbbbbb")
    assert run_tool(bad, page).returncode == 0
    assert "| test_some.py | 1 | 1 | 1 |" in page.read_text()
    assert run_tool(bad, good, page).returncode == 0
    text = page.read_text()
    assert "| test_some.py | 2 | 1 | 0 |" in text
    assert "at aaaaaaa" in text
    assert "at bbbbbbb" in text
    assert "- no GPU here (1)" in text
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")


@pytest.mark.parametrize(
    ("record", "page", "said"),
    [
        ("<testsuites><tests", PAGE, "Give what pytest --junitxml wrote"),
        ("<other/>", PAGE, "has no <testsuite>"),
        ("<testsuites><testsuite/></testsuites>", "no markers", "lacks the marker lines"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_page_stays(tmp_path: Path, record: str, page: str, said: str) -> None:
    (tmp_path / "run.xml").write_text(record)
    (tmp_path / "page.md").write_text(page)
    run = run_tool(tmp_path / "run.xml", tmp_path / "page.md")
    assert run.returncode == 1
    assert said in run.stderr
    assert (tmp_path / "page.md").read_text() == page
