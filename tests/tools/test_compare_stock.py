"""tools/compare_stock.py: what it makes of ranks' answers; the ranks themselves are test_parameters.py's matter."""

import compare_stock
import pytest


def owner(optimizer: str, betas: list[float], elements: int) -> dict[str, object]:
    return {"optimizer": optimizer, "wrapper": "W", "betas": betas, "weight_decay": 0.1, "elements": elements}


def test_a_row_says_what_is_on_lion_what_is_not_and_the_state_of_each_rank() -> None:
    ranks = [
        {"owners": {"a": owner("Lion", [0.9, 0.999], 60), "b": owner("AdamW", [0.9, 0.95], 40)}, "state_bytes": 1200},
        {"owners": {"a": owner("ShardedLion", [0.9, 0.999], 60)}, "state_bytes": 300},
    ]
    made = compare_stock.row("--bf16", 2, "stock", ranks)
    assert (
        made == "| `--bf16` | 2 | stock | 1 of 2; 1 on AdamW (40% of the elements) | (0.9, 0.999) | 1,200 / 300 | W |"
    )


def test_a_run_that_failed_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_LION_DEVICE", "tpu")
    found = compare_stock.answers("ours", "--optimizer lion", 1)
    assert isinstance(found, str)
    assert "MEGATRON_LION_DEVICE 'tpu' is unknown" in compare_stock.row("--optimizer lion", 1, "ours", found)
