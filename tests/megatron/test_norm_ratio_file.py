"""A run warns and continues if its norm-ratio file cannot be written."""

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_lion.config import NormRatioOptions
from megatron_lion.integration.reporting.norm_ratio import schedule
from megatron_lion.stats import full_gradient


def test_a_file_that_cannot_be_written_costs_its_round_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 writes it. An error there would leave the others waiting in their next collective."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    record = full_gradient(nn.Linear(2, 1), [torch.ones(4, 2)], lambda model, batch: model(batch).mean())
    written: list[tuple[float, int]] = []
    options = NormRatioOptions(interval=10, file=str(tmp_path / "gone" / "norm_ratio.jsonl"))
    schedule.report(
        record,
        options,
        10,
        {"tokens": 8},
        lambda values, iteration: written.append((values["norm-ratio/l1"], iteration)),
    )
    said = capsys.readouterr()
    (warning,) = said.err.splitlines()
    assert warning.startswith(f"megatron-lion: warning: --norm-ratio-file {options.file} cannot be written: ")
    assert "No such file or directory" in warning and "iteration 10" in warning
    assert schedule.line(record, 10) in said.out
    assert written == [(record.l1, 10)]
    assert not (tmp_path / "gone").exists()

    (tmp_path / "gone").mkdir()
    schedule.report(record, options, 20, {}, lambda values, iteration: None)
    assert Path(options.file).read_text().count("\n") == 1
