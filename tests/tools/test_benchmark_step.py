"""The benchmark's shapes, its arithmetic, what it counts, and one small run of it."""

import dataclasses
import json
import sys

import pytest
import torch

from megatron_lion.config import LionError
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from tools.benchmark import measure, peers, queued, queued_rows, shapes, step, traffic
from tools.benchmark.measure import Candidate
from tools.benchmark.traffic import READ, UPDATE, WRITE, Stream


def streams(numel: int) -> list[Stream]:
    one, other, half = (torch.arange(numel, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16))
    return [Stream([one], READ), Stream([other], UPDATE), Stream([half], WRITE)]


def read_and_written(moved: list[Stream]) -> tuple[float, float]:
    """Bytes of each, by the streams' modes; an update in place is half of either."""
    sizes = [
        [stream.bytes / (1 + (stream.mode == UPDATE)) for stream in moved if stream.mode & way] for way in (READ, WRITE)
    ]
    return sum(sizes[0]), sum(sizes[1])


def test_gpt2_smalls_parameters_are_those_of_the_model() -> None:
    sizes = shapes.shapes("gpt2-small")
    assert len(sizes) == 148
    assert sum(torch.Size(size).numel() for size in sizes) == 124_439_808


def test_share_and_ratio_are_counted_from_the_times() -> None:
    moved = streams(1000)
    assert read_and_written(moved) == (8 * 1000, 6 * 1000)
    candidates = [
        Candidate("megatron-lion fused", "fp32 momentum", lambda: None, passes=[moved]),
        Candidate("megatron-lion foreach", "fp32 momentum", lambda: None, 28_000),
        Candidate("peer", "fp32 momentum", lambda: None, passes=[moved]),
        Candidate("hidden", "two moments", lambda: None),
    ]
    limits = measure.limits(candidates)
    assert len(limits) == 4, "two for each of the two that are one pass"
    names = [one.name for one in (*candidates, *limits)]
    times = dict(zip(names, (12.5, 100.0, 25.0, 1.0, 15.0, 10.0, 20.0, 30.0), strict=True))
    table = {row.name: row for row in measure.rows(candidates, times, numel=1000)}
    ours = table["megatron-lion fused"]
    assert (ours.bytes_per_parameter, ours.share_of_limit, ours.times_as_fast) == (14.0, 0.8, 2.0)
    assert (ours.limit_milliseconds, table["peer"].limit_milliseconds) == (10.0, 20.0), "the faster pass of its own two"
    assert ours.gigabytes_per_second == pytest.approx(14e3 / 12.5e-3 / 1e9)
    assert table["megatron-lion foreach"].share_of_limit == pytest.approx(0.2), (
        "twice the limit's bytes in 10 x its time"
    )
    assert table["megatron-lion foreach"].times_as_fast == 0.25
    assert table["peer"].times_as_fast is None, "compared with ours, which is no peer"
    assert table["hidden"].share_of_limit is None


@pytest.mark.parametrize("ahead", [0, 512])
def test_the_streaming_pass_reads_everything_and_changes_only_what_it_writes(ahead: int) -> None:
    moved = [*streams(300_001), Stream([torch.ones(9376, dtype=torch.int8)], UPDATE)]
    before = [stream.tensors[0].clone() for stream in moved]
    traffic.streaming_pass(moved, ahead)()
    for stream, old in zip(moved, before, strict=True):
        assert torch.equal(stream.tensors[0], torch.full_like(old, 0.011474609375) if stream.mode == WRITE else old)


def test_what_torchs_operations_move_is_counted() -> None:
    a, b = torch.ones(100), torch.ones(100)
    for operation, expected in (
        (lambda: a + b, 12),
        (lambda: a.add_(b), 12),
        (lambda: a.mul_(2.0), 8),
        (lambda: a.copy_(b), 8),
        (lambda: a.view(10, 10).t(), 0),
        (lambda: torch.empty_like(a), 0),
        (lambda: torch.zeros_like(a), 4),
        (lambda: torch._foreach_mul_([a, b], 2.0), 16),
        (lambda: torch._foreach_add([a], [b]), 12),
    ):
        assert traffic.counted(operation) == expected * 100


@pytest.mark.parametrize(("name", "expected"), [("torch SGD with momentum, fused", 20), ("torch AdamW fused", 28)])
def test_a_fused_step_of_torchs_is_counted_alike_by_its_streams_and_by_its_operation(name: str, expected: int) -> None:
    params = shapes.parameters([(1000,), (300, 10)])
    ((one,), _) = peers.build(params, [name], "cpu")
    assert one.bytes == traffic.counted(one.step) == expected * 4000


def test_ours_moves_the_bytes_that_its_state_has() -> None:
    params = shapes.parameters([(1000,)])
    optimizer = ShardedLion(params, kernel="reference")
    optimizer.step()
    assert sum(stream.bytes for stream in traffic.streams_of(optimizer)) == 20 * 1000
    assert read_and_written(traffic.streams_of(optimizer)) == (12 * 1000, 8 * 1000)
    optimizer.model_copies = {params[0]: params[0].detach().bfloat16()}
    assert sum(stream.bytes for stream in traffic.streams_of(optimizer)) == 22 * 1000
    assert read_and_written(traffic.streams_of(optimizer)) == (12 * 1000, 10 * 1000), "and Megatron's norm reads 4"


@pytest.mark.slow
def test_a_small_run_leaves_its_rows_and_a_chart(tmp_path, monkeypatch, capsys) -> None:
    files = ["--json", str(tmp_path / "step.json"), "--plot", str(tmp_path / "step.svg")]
    asked = ["--peers", "torch SGD with momentum, fused", "torch AdamW foreach"]
    monkeypatch.setattr(sys, "argv", ["benchmark_step", "--numel", "5000", "--rounds", "2", *asked, *files])
    step.main()
    record = json.loads((tmp_path / "step.json").read_text())
    names = {row["name"] for row in record["rows"]}
    assert {"megatron-lion fused", "torch SGD with momentum, fused", "torch AdamW foreach"} <= names
    assert all(row["limit_milliseconds"] > 0 for row in record["rows"])
    assert record["missing"]["DeepSpeed CPULion"].startswith("not asked for")
    assert "| megatron-lion fused | fp32 momentum |" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "step.svg").read_text()


def test_a_peer_that_is_not_installed_is_named_with_the_reason(monkeypatch) -> None:
    monkeypatch.setitem(peers.PEERS, "gone", peers.Peer("no_such_package", "Lion"))
    made, missing = peers.build(shapes.parameters([(3,)]), ["gone", "flashoptim FlashLion"], "cpu")
    assert not made
    assert missing["gone"] == "no_such_package is not installed: tools/benchmark/peers.txt"
    assert missing["flashoptim FlashLion"] == "it runs on cuda only"


def test_a_peer_that_fails_is_named_with_its_error(monkeypatch) -> None:
    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer("torch.optim", "AdamW", options=(("fused", 3.5), ("x", 1))))
    assert peers.build(shapes.parameters([(3,)]), ["broken"], "cpu")[1]["broken"].startswith("TypeError: ")


def test_state_that_a_peer_never_reads_is_not_counted(monkeypatch) -> None:
    peer = peers.Peer("torch.optim", "AdamW", peers.TWO_MOMENTS, peers.ONE_PASS, peers.FUSED)
    monkeypatch.setitem(peers.PEERS, "whole", peer)
    monkeypatch.setitem(peers.PEERS, "part", dataclasses.replace(peer, untouched=("exp_avg_sq",)))
    (whole, part), _ = peers.build(shapes.parameters([(100,)]), ["whole", "part"], "cpu")
    assert (whole.bytes, part.bytes) == (2800, 2000)


def test_an_unknown_peer_is_refused_with_the_nearest(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_step", "--peers", "timm Lion"])
    with pytest.raises(LionError, match="did you mean 'timm Lion foreach'"):
        step.main()


def test_each_queued_row_is_on_disk_before_the_next_candidate_is_built(tmp_path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    names = []

    def build(name: str) -> Candidate:
        names.append([json.loads(line)["name"] for line in rows.read_text().splitlines()] if rows.exists() else [])
        if name == "broken":
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return Candidate(name, "fp32 momentum", lambda: None, 2000)

    chosen = {name: (lambda name=name: build(name)) for name in ("one", "broken", "two")}
    table = queued.run("a title", chosen, 100, queued.Device("cpu"), rows)
    assert names == [[], ["one"], ["one", "broken"]]
    assert [row.error for row in table] == [None, "RuntimeError: CUDA error: an illegal memory access", None]
    record = json.loads(rows.read_text().splitlines()[0])
    assert (record["benchmark"], record["bytes_per_parameter"]) == ("a title", 20.0)
    assert record["share_of_copy"] == pytest.approx(
        record["gigabytes_per_second"] / record["copy_gigabytes_per_second"]
    )


def test_on_a_gpu_several_queued_steps_are_timed_between_two_events(monkeypatch) -> None:
    said = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert queued.Device("cuda").milliseconds(lambda: said.append("step"), 3) == 2.0
    assert said == ["record", "step", "step", "step", "record", "wait"]


def test_ratios_of_queued_rows_are_taken_within_one_run() -> None:
    table = [
        queued_rows.QueuedRow("torch AdamW fused", "two fp32 moments", 6.0),
        queued_rows.QueuedRow("megatron-lion fused", "fp32 momentum", 2.0, 0.5, 1.0, 20.0, 1000.0, 2000.0, 0.5),
        queued_rows.QueuedRow("their Lion", "fp32 momentum", 3.0),
        queued_rows.QueuedRow("gone", error="not installed"),
    ]
    lines = queued_rows.markdown(table).splitlines()
    assert lines[2] == "| megatron-lion fused | fp32 momentum | 2.00 | 0.50 | 20.0 | 1000 | 0.50 | 3.00 | 1.50 |"
    assert lines[3].endswith("| 2.00 | - |")
    assert lines[-1] == "- not measured: gone: not installed"


def test_a_rehearsed_queued_run_leaves_rows_and_fails_where_ours_fails(tmp_path, monkeypatch, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = ["--queued", "--numel", "500", "--tensors", "2", "--rows", str(rows), "--only", "lion foreach", "SGD"]
    monkeypatch.setattr(sys, "argv", ["benchmark_step", *asked, "--peers", "torch SGD with momentum, fused"])
    step.main()
    names = [json.loads(line)["name"] for line in rows.read_text().splitlines()]
    assert names[:2] == ["torch SGD with momentum, fused", "megatron-lion foreach"]
    assert "2 tensors, 1,000 elements" in capsys.readouterr().out

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr("tools.benchmark.ours.in_fp32", fail)
    with pytest.raises(SystemExit, match="not measured: megatron-lion foreach"):
        step.main()


def test_state_inside_an_object_is_counted() -> None:
    """FlashLion keeps its int8 momentum in an object with two tensors."""
    params = shapes.parameters([(320,)])
    optimizer = torch.optim.SGD(params)
    holder = type("Quantized", (), {})()
    holder.quantized, holder.scales = torch.zeros(320, dtype=torch.int8), torch.zeros(10, dtype=torch.float16)
    optimizer.state[params[0]]["exp_avg"] = holder
    assert sum(stream.bytes for stream in traffic.streams_of(optimizer)) == 320 * 12 + 2 * (320 + 20)
