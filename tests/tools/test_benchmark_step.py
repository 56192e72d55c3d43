"""The benchmark's shapes, its arithmetic, and one small run of it."""

import json
import sys

import benchmark_step
import pytest
import torch
from benchmark_step import Candidate

from megatron_lion.config import LionError


def test_gpt2_smalls_parameters_are_those_of_the_model() -> None:
    sizes = benchmark_step.shapes("gpt2-small")
    assert len(sizes) == 148
    assert sum(torch.Size(size).numel() for size in sizes) == 124_439_808


def test_share_and_ratio_are_counted_from_the_times() -> None:
    candidates = [
        Candidate("streaming limit", "-", 20, lambda: None),
        Candidate("megatron-lion fused", "fp32 momentum", 20, lambda: None),
        Candidate("megatron-lion foreach", "fp32 momentum", None, lambda: None),
        Candidate("peer", "fp32 momentum", 40, lambda: None),
    ]
    times = {"streaming limit": 10.0, "megatron-lion fused": 12.5, "megatron-lion foreach": 100.0, "peer": 25.0}
    table = {row.name: row for row in benchmark_step.rows(candidates, times, numel=10**6)}
    ours = table["megatron-lion fused"]
    assert (ours.share_of_limit, ours.ratio_to_fastest_peer, ours.gigabytes_per_second) == (0.8, 2.0, 1.6)
    assert table["megatron-lion foreach"].ratio_to_fastest_peer == 0.25
    assert table["megatron-lion foreach"].share_of_limit is None
    assert table["peer"].ratio_to_fastest_peer is None, "compared with ours, which is no peer"


def test_a_small_run_leaves_its_rows_and_a_chart(tmp_path, monkeypatch, capsys) -> None:
    files = ["--json", str(tmp_path / "step.json"), "--plot", str(tmp_path / "step.png")]
    peers = ["--peers", "torch SGD fused", "torch AdamW fused"]
    monkeypatch.setattr(sys, "argv", ["benchmark_step", "--numel", "5000", "--rounds", "2", *peers, *files])
    benchmark_step.main()
    names = {row["name"] for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert {"streaming limit", "megatron-lion fused", "torch SGD fused", "torch AdamW fused"} <= names
    assert "| megatron-lion fused | fp32 momentum |" in capsys.readouterr().out
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason(monkeypatch) -> None:
    gone = ("fp32 momentum", None, benchmark_step.external("no_such_package", "Lion"))
    monkeypatch.setitem(benchmark_step.PEERS, "gone", gone)
    made, missing = benchmark_step.peers(benchmark_step.parameters([(3,)]), ["gone"])
    assert not made
    assert "no_such_package" in missing["gone"]


def test_an_unknown_peer_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_step", "--peers", "tensorflow"])
    with pytest.raises(LionError, match="tensorflow: unknown"):
        benchmark_step.main()
