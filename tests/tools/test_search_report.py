"""What the report says of the search for learning rates: diverged rates, and best ones at an edge."""

import json
import math
from typing import Any

import pytest

from tests.tools import long_records_made_up as made_up
from tools.paper.reporting import search_findings, study_runs
from tools.paper.reporting.findings import Finding
from tools.paper.studies import plans

Record = dict[str, Any]


@pytest.fixture(scope="module")
def search() -> list[Record]:
    return made_up.planned("search")


def searched(search: list[Record], losses: dict[str, dict[str, float]]) -> Finding:
    """The finding of a search with these validation losses."""
    records = json.loads(json.dumps(search))
    for one in records:
        one["validation_loss"][str(plans.SHORT)] = losses.get(one["optimizer"], {}).get(
            f"{one['settings']['lr']:g}", 6.0
        )
    return search_findings.search(study_runs.select(records, "search", "gpt"))


def test_the_search_marks_diverged_rates_and_a_best_at_an_edge(search: list[Record]) -> None:
    losses = {"lion_paper": {"0.0003": 4.0, "0.001": math.nan}, "sgd_paper": {"1": 4.5}, "adamw": {"0.001": 7.7}}
    found = searched(search, losses)
    rows = {(row[0], row[1]): row[2:] for row in found.tables[0][1:]}
    assert rows["LION", "0.0003"] == ["4.000", "best"] and rows["LION", "0.001"] == ["-", "diverged"]
    assert rows["SGD (momentum 0.9)", "1"] == ["4.500", "best, at an edge"]
    assert rows["AdamW", "0.001"] == ["7.700", "diverged"]
    assert "LION 0.0003 (4.000), not at an edge" in found.verdict
    assert "SGD (momentum 0.9) 1 (4.500), the largest rate tried: a larger one may be better" in found.verdict
    assert found.judgements[0].verdict == "provisional: seen in one seed", "the search adds a rate after its edge"
