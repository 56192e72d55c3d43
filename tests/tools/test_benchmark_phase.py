"""The phase's benchmark builds Megatron's real optimizers, and its bytes are those that are claimed for them."""

import json
from pathlib import Path

import pytest

from tests.harness import ROOT, run_ranks
from tools.benchmark import phase

SCRIPT = ROOT / "tools" / "benchmark" / "phase.py"
GATHER = "all-gather of the bf16 parameters (gloo), not in the others"


def rows(path: Path, *flags: str) -> dict[str, dict[str, dict[str, float]]]:
    run = run_ranks(*flags, f"--rounds 1 --threads 1 --json {path}", script=SCRIPT)
    assert run.returncode == 0, run.output[-4000:]
    tables = json.loads(path.read_text())["tables"]
    return {title: {row["name"]: row for row in table} for title, table in tables.items()}


@pytest.mark.slow
def test_the_phase_moves_26_bytes_with_clipping_and_is_held_against_the_limit(tmp_path: Path) -> None:
    (table,) = rows(tmp_path / "rows.json", "--numel 262144 --peers adam-fused").values()
    ours = table["megatron-lion, fp32 master and momentum"]
    assert ours["bytes_per_parameter"] == pytest.approx(26, abs=0.01), "the norm's read, and one pass"
    assert ours["limit_milliseconds"] > 0
    adam = table["stock with Adam (torch AdamW, fused=True set by hand)"]
    assert adam["bytes_per_parameter"] == pytest.approx(4 + 16 + 28 + 6, abs=0.01), "norm, clip, update, copy"
    assert GATHER in table


@pytest.mark.slow
def test_the_hosts_time_is_measured_on_many_small_parameters(tmp_path: Path, monkeypatch) -> None:
    tables = rows(tmp_path / "rows.json", "--host --peers adam --wait-for-gather")
    assert list(tables) == ["300 parameters of 8 elements", "3,000 parameters of 8 elements"]
    assert all(row["milliseconds"] > 0 for table in tables.values() for row in table.values())
    assert not any(GATHER in table for table in tables.values()), "each step ends with its own"


def test_scaling_is_a_column_for_each_number_of_ranks() -> None:
    text = phase.table_of({1: {"a": 10.04, "b": 3.0}, 2: {"a": 6.0, "b": 2.0}}, "ms")
    assert text.splitlines()[2:] == ["| a | 10.0 | 6.0 |", "| b | 3.0 | 2.0 |"]
