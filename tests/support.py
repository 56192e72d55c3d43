"""What is supported, as the tests say it: ``@pytest.mark.supports(row, how)`` on a test, and one file of outcomes.

``@pytest.mark.refuses(row)`` is on a test that proves that something is refused with a message.

    python -m pytest ... --support-file=support.json

writes, or adds to, a JSON object: for every row of the table, how it is tested and the outcome of each of its tests,
``passed``, ``refused``, ``skipped`` or ``failed``. ``tests/support_table.py`` makes the table of
docs/results/support.md from it, and that of docs/results/versions.md from one for each Megatron. A run of some tests
updates the outcomes of only those. ``--entries`` runs only the tests of the table in docs/frameworks.md, whose rows are
``entry / feature``.
"""

import json
from pathlib import Path
from typing import Any

import pytest

OPTION = "--support-file"
ENTRIES = "--entries"
SEPARATOR = " / "
MARKS = (
    "supports(row, how): a row of the table of what is supported, which this test proves, and how it does",
    "refuses(row): a row of that table, of which this test proves that it is refused with a message",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, help="JSON file that receives the outcomes of tests marked with `supports`")
    parser.addoption(ENTRIES, action="store_true", help="run only tests with a row `entry / feature`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption(ENTRIES):
        rest = [item for item in items if not any(SEPARATOR in row for row, _, _ in rows_of(item, ""))]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if item not in rest]


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)
    if config.getoption(OPTION):
        config.pluginmanager.register(Recorder(config.getoption(OPTION)), "support-recorder")


def rows_of(item: pytest.Item, outcome: str) -> list[tuple[str, str | None, str]]:
    """The rows that a test with this outcome is about: each with how it is tested, and with what is found."""
    refused = "refused" if outcome == "passed" else outcome
    supports = [(*mark.args, outcome) for mark in item.iter_markers("supports")]
    return supports + [(mark.args[0], None, refused) for mark in item.iter_markers("refuses")]


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
            for row, how, found in rows_of(item, report.outcome):
                entry = self.rows.setdefault(row, {"tests": {}, "how": "refused with a message"})
                entry["how"] = how or entry["how"]
                entry["tests"][item.nodeid] = found
        return report

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
