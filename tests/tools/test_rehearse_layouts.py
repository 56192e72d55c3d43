"""The page of rehearsed layouts."""

import datetime
from typing import Any

from tools.rehearsed import page
from tools.rehearsed.layouts import LAYOUTS

DATE = datetime.date(2026, 1, 2)


def row(megatron: str, weights: int, **changed: Any) -> dict[str, Any]:
    """A row of a layout with half a gibibyte of expected weights."""
    expected = {"weights": page.GIB / 2, "gradients": page.GIB, "state": page.GIB}
    return {
        "megatron": megatron, "table": "layouts", "name": "a", "rank": 0, "ranks": 64, "sizes": "TP 2",
        "storage": "fp32", "parameters": 7, "total": page.GIB, "built": {**expected, "weights": weights},
        "expected": expected, "seconds": 60.0, "cpu": 2.0, "host": page.GIB, **changed,
    }  # fmt: skip


def test_equal_rows_of_several_releases_are_one_row_with_all_their_costs() -> None:
    text = page.text([row("0.17", page.GIB // 2), row("0.19", page.GIB // 2, cpu=4.0, host=2 * page.GIB)], DATE)
    assert "| a | 0 of 64 | TP 2 | fp32 | 7 | 0.50 (+0.00 %) " in text
    assert text.count("0 of 64") == 1
    assert "| 2, 4 | 2.0 |" in text
    assert "0.17, 0.19: 2 rehearsals in 2 minutes" in text


def test_a_row_that_differs_names_its_release() -> None:
    rows = [row("0.17", page.GIB), row("0.17", page.GIB, name="b"), row("0.19", page.GIB // 2)]
    lines = [line[:10] for line in page.text(rows, DATE).splitlines() if "0 of 64" in line]
    assert lines == ["| a (0.17)", "| a (0.19)", "| b (0.17)"]


def test_a_refusal_has_its_message() -> None:
    refused = {"megatron": "0.19", "table": "refused", "name": "a, TP 3", "said": "AssertionError: no"}
    assert "| a, TP 3 | `AssertionError: no` |" in page.text([refused], DATE)


def test_the_architectures_have_the_published_numbers_of_parameters() -> None:
    """Of Llama 3 8B, from one rank that holds all of it but what tensor parallelism cuts."""
    dense, expert = LAYOUTS["llama3_8b"].parameters
    norms = 4096 * 65  # which both ranks hold
    assert (2 * (dense - norms) + norms, expert) == (8_030_261_248, 0)
