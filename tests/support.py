"""What is supported, as the tests say it: ``@pytest.mark.supports(row, how)`` on a test, and one file of outcomes.

    python -m pytest ... --support-file=support.json

writes, or adds to, a JSON object: for every row of the table, how it is tested and the outcome of each of its tests.
``tools/support_table.py`` makes the README's table from it. A run of some tests renews the outcomes of those alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest

OPTION = "--support-file"
MARK = "supports(row, how): a row of the table of what is supported, which this test proves, and how it does"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, help="JSON file that receives the outcomes of tests marked with `supports`")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)
    if config.getoption(OPTION):
        config.pluginmanager.register(Recorder(config.getoption(OPTION)), "support-recorder")


def rows_of(item: pytest.Item) -> dict[str, str]:
    """The rows that a test proves, each with how it is tested."""
    return {mark.args[0]: mark.args[1] for mark in item.iter_markers("supports")}


class Recorder:
    """Writes the outcome of each marked test under its row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        # A test that is skipped, or whose fixtures fail, ends before its call.
        if report.when == "call" or (report.when == "setup" and not report.passed):
            for row, how in rows_of(item).items():
                entry = self.rows.setdefault(row, {"tests": {}})
                entry["how"] = how
                entry["tests"][item.nodeid] = report.outcome
        return report

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
