"""Runs with --lion-reduce on real Megatron: what is sent and kept adds up, and a resume is exact."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration.exchange import levels, refusals
from tests.harness import (
    ASYNC_SAVE,
    BATCH,
    CPU,
    MODEL,
    RATE,
    Run,
    assert_same_checkpoint,
    read_checkpoint,
    run_ranks,
    text_flags,
)
from tests.megatron.exchange_runs import BUCKETS, COMPACT, MOE, OVERFLOWS, OVERLAP, RUN, STEPS, Row, finished

SCRIPT = Path(__file__).with_name("reduce.py")
INT4 = "--lion-reduce int4"
TERNARY = "--lion-reduce ternary"
HOW = "sent plus kept is the gradient in fp64, on each rank and in each step; a resume is exact"
SUPPORTED = pytest.mark.supports("`--lion-reduce` (experimental)", HOW)

ROWS = {
    "int4, bf16, signs, overlap, several buckets": Row(
        2, f"{INT4} --bf16 {BUCKETS} --lion-gather signs --clip-grad 0.3"
    ),
}
SLOW_ROWS = {
    "int4, fp32": Row(2, f"{INT4} --clip-grad 0.3"),
    "int8, bf16, DP 4": Row(4, "--lion-reduce int8 --bf16 --micro-batch-size 1"),
    "ternary, fp32, DP 4, overlap, untied": Row(4, f"{TERNARY} {OVERLAP} --untie-embeddings-and-output-weights"),
    "ternary, bf16 feedback, bf16 gradients": Row(
        2, f"{TERNARY} --lion-error-feedback bf16 {COMPACT} --grad-reduce-in-bf16"
    ),
    "int4, no feedback": Row(2, f"{INT4} --lion-error-feedback none --bf16"),
    "int4, per-token loss, overlap": Row(2, f"{INT4} --bf16 --calculate-per-token-loss {OVERLAP}"),
    "int4, average in the collective": Row(2, f"{INT4} --bf16 --ddp-average-in-collective {OVERLAP}"),
    "int4, TP 2 x DP 2, overlap": Row(4, f"{INT4} --bf16 --tensor-model-parallel-size 2 --sequence-parallel {OVERLAP}"),
    "int4, PP 2 x DP 2, tied, int8 momentum": Row(4, f"{INT4} {COMPACT} --pipeline-model-parallel-size 2 {OVERLAP}"),
    "int4, interleaved PP 2 x DP 2": Row(
        4,
        f"{INT4} --bf16 --num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        f"{BUCKETS}",
    ),
    "int4, experts, EP 2 x expert DP 2": Row(4, f"{INT4} --bf16 {MOE} {BUCKETS}"),
    "int4, fp16, overflows": Row(2, f"{INT4} {OVERFLOWS} {OVERLAP}"),
    "int4, frozen parameters": Row(2, f"{INT4} --bf16 --untie-embeddings-and-output-weights {OVERLAP}", "frozen"),
}


def run(
    text: Path,
    folder: Path,
    *flags: str,
    row: Row,
    steps: int = STEPS,
    saves: int = 0,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> Run:
    """A run of the tiny model whose reductions are checked; it saves at its end."""
    return run_ranks(
        *(MODEL, BATCH, RATE, CPU, text_flags(text), RUN, f"--train-iters {steps} --save {folder}"),
        row.flags,
        f"--save-interval {saves or steps}",
        *flags,
        ranks=row.ranks,
        script=SCRIPT,
        environment={"REDUCE_KIND": row.kind, **(environment or {})},
        **kwargs,
    )


def reduced(run: Run) -> list[dict[str, float]]:
    """What each rank found in its reductions."""
    lines = [line for line in run.output.splitlines() if line.startswith("reduced:")]
    return [{name: float(number) for name, number in re.findall(r"(\w+) (\S+)", line)} for line in lines]


def assert_adds_up(found: list[dict[str, float]], *, flushes: bool = True) -> None:
    """Every reduction and every flush was right to its rounding, on each rank."""
    for rank in found:
        assert rank["reductions"] >= STEPS
        assert rank["kept"] <= 1 and rank["received"] <= 1 and rank["flushed"] <= 1, rank
        assert (rank["flushes"] > 0) == flushes


LINE = re.compile(
    r"step (\d+): reduction of gradients: (\S+) bits per parameter, not sent (\S+) of the gradient's norm, (\S+)% of"
)


@SUPPORTED
@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, id=name) for name, row in ROWS.items()),
        *(pytest.param(row, id=name, marks=pytest.mark.slow) for name, row in SLOW_ROWS.items()),
    ],
)
def test_what_is_sent_and_what_is_kept_is_the_gradient(text: Path, tmp_path: Path, row: Row) -> None:
    done = finished(run(text, tmp_path, "--lion-telemetry --log-interval 2", row=row))
    feeds_back = "feedback none" not in row.flags
    found = reduced(done)
    assert len(found) == row.ranks
    assert_adds_up(found, flushes=feeds_back)
    assert not any("was repeated" in line or "inside a step" in line for line in done.ours())
    code = row.flags.split()[1]
    assert any(f"experimental {code} reduction of gradients" in line for line in done.ours())
    assert feeds_back or not any("not sent" in line for line in done.ours())
    if feeds_back and "fp16" not in row.flags:
        logged = [match.groups() for match in map(LINE.search, done.ours()) if match]
        assert [step for step, *_ in logged] == ["2", "4", "6"]
        least, most = {"int8": (8, 10), "int4": (4, 7), "ternary": (1.8, 5)}[code]
        for _, bits, kept, unlike in logged:
            assert least < float(bits) < most
            assert 0 < float(kept) < 2 and 0 <= float(unlike) < 40


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (4, f"{INT4} --bf16 --micro-batch-size 1 {BUCKETS} --lion-gather signs"),
        (4, f"{TERNARY} --micro-batch-size 1 --ddp-average-in-collective"),
        (8, f"{INT4} --bf16 --micro-batch-size 1 --pipeline-model-parallel-size 2"),
    ],
)
def test_ranks_of_a_node_are_summed_before_their_sum_is_packed(
    text: Path, tmp_path: Path, ranks: int, flags: str
) -> None:
    """Two nodes of two data-parallel ranks; with the pipeline, its stages have two such nodes each."""
    done = finished(run(text, tmp_path, row=Row(ranks, flags), environment={"REDUCE_NODE": "2"}))
    found = reduced(done)
    assert len(found) == ranks
    assert_adds_up(found)
    assert all(rank["nodes"] == rank["reductions"] for rank in found)
    assert any("reduction of gradients between nodes" in line for line in done.ours())


@pytest.mark.parametrize(
    ("ranks", "per_node", "nodes"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 2, 4, 6], 4, [[0, 2], [4, 6]]),
        ([0, 1, 2, 3], 4, [[0, 1, 2, 3]]),
        ([0, 4, 8], 4, [[0, 4, 8]]),
        ([0, 1, 2], 2, [[0, 1, 2]]),
        ([0, 2, 1, 3], 2, [[0, 2, 1, 3]]),
    ],
    ids=["two nodes", "with tensor parallelism", "one node", "one rank in each", "uneven", "out of order"],
)
def test_levels(ranks: list[int], per_node: int, nodes: list[list[int]]) -> None:
    assert levels.ranks_by_node(ranks, per_node) == nodes


@SUPPORTED
@pytest.mark.slow
def test_one_rank_sends_nothing(text: Path, tmp_path: Path) -> None:
    for folder, flags in (("stock", "--bf16"), ("int4", f"--bf16 {INT4}")):
        done = finished(run(text, tmp_path / folder, row=Row(1, flags)))
    assert any("no reduction (DP=1)" in line for line in done.ours())
    assert_same_checkpoint(*(read_checkpoint(tmp_path / folder, STEPS) for folder in ("stock", "int4")))


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        f"--bf16 {INT4} {BUCKETS} --clip-grad 0.3",
        f"{TERNARY} --lion-gather signs",
        f"{COMPACT} {INT4} --lion-gather signs {OVERLAP}",
        f"--bf16 --lion-momentum-dtype bf16 {TERNARY} --lion-error-feedback bf16",
        f"--bf16 {INT4} --calculate-per-token-loss",
        f"{COMPACT} {INT4} {ASYNC_SAVE}",
        f"--fp16 --initial-loss-scale 1024 --loss-scale-window 3 {INT4}",
    ],
)
def test_a_resumed_run_equals_one_with_as_many_saves(text: Path, tmp_path: Path, flags: str) -> None:
    row = Row(2, flags)
    finished(run(text, tmp_path / "whole", row=row, steps=8, saves=4))
    finished(run(text, tmp_path / "parts", "--exit-interval 4", row=row, steps=8, saves=4))
    resumed = finished(run(text, tmp_path / "parts", f"--load {tmp_path / 'parts'}", row=row, steps=8, saves=4))
    assert min(resumed.log.loss) == 5
    assert "is not at the save interval" not in resumed.output
    assert_same_checkpoint(*(read_checkpoint(tmp_path / folder, 8) for folder in ("whole", "parts")))


@SUPPORTED
@pytest.mark.slow
def test_a_save_at_another_moment_is_announced(text: Path, tmp_path: Path) -> None:
    done = finished(run(text, tmp_path, "--exit-interval 3", row=Row(2, f"--bf16 {INT4}"), saves=4))
    assert any("the save after step 3 is not at the save interval" in line for line in done.ours())


@SUPPORTED
@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks(text: Path, tmp_path: Path) -> None:
    """DP 4, then 2, then 1. Nothing that was kept is lost, and the checkpoints have no new key."""
    flags = f"--bf16 --micro-batch-size 1 {INT4} --clip-grad 0.3"
    for step, ranks in enumerate((4, 2, 1), start=1):
        load = f"--load {tmp_path / 'int4'}" if step > 1 else ""
        ends = f"--exit-interval {3 * step}"
        done = finished(run(text, tmp_path / "int4", ends, load, row=Row(ranks, flags), steps=9, saves=3))
        assert min(done.log.loss) == 3 * step - 2
        if ranks > 1:
            assert all(rank["flushed"] <= 1 and rank["flushes"] > 0 for rank in reduced(done))
    finished(run(text, tmp_path / "stock", row=Row(4, "--bf16 --micro-batch-size 1 --clip-grad 0.3"), steps=9, saves=3))
    mine, stock = (read_checkpoint(tmp_path / folder, 9) for folder in ("int4", "stock"))
    assert mine.keys() == stock.keys()


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", OVERLAP])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_on_all(text: Path, tmp_path: Path, overlap: str) -> None:
    row = Row(2, f"--bf16 --no-check-for-nan-in-loss-and-grad {INT4} {overlap}")
    done = finished(run(text, tmp_path, row=row, environment={"REDUCE_NAN": "3"}))
    found = reduced(done)
    assert_adds_up(found)
    assert [rank["cleared"] for rank in found] == [1.0] * 2
    assert sum("what earlier steps had not sent is dropped" in line for line in done.ours()) == 1
    assert all(loss == loss for loss in done.log.loss.values())


@SUPPORTED
@pytest.mark.slow
def test_residuals_follow_the_loss_scale_and_end_with_an_overflow(text: Path, tmp_path: Path) -> None:
    done = finished(run(text, tmp_path, row=Row(2, f"{OVERFLOWS} {INT4} {OVERLAP}"), steps=12))
    found = reduced(done)
    assert_adds_up(found)
    assert all(3 <= rank["cleared"] <= 10 for rank in found), "no step was skipped between others"


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", BUCKETS])
def test_signs_are_gathered_of_the_same_steps(text: Path, tmp_path: Path, overlap: str) -> None:
    for gather in ("params", "signs"):
        row = Row(2, f"--bf16 {INT4} --lion-gather {gather} {overlap}")
        finished(run(text, tmp_path / gather, row=row))
    assert_same_checkpoint(*(read_checkpoint(tmp_path / gather, STEPS) for gather in ("params", "signs")))


def rounds_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without times."""
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in one.items() if "second" not in key and "time" not in key} for one in rounds]


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", OVERLAP])
def test_rounds_measure_the_exact_gradient_and_change_nothing(text: Path, tmp_path: Path, overlap: str) -> None:
    """At the start both runs have the same parameters; later rounds do not change the compressed run."""
    rounds = "--norm-ratio-at-start --norm-ratio-interval 3 --norm-ratio-batches 2"
    for name, flags in (("stock", rounds), ("int4", f"{rounds} {INT4}"), ("without", INT4)):
        file = f"--norm-ratio-file {tmp_path}/{name}.jsonl" if flags.startswith(rounds) else ""
        row = Row(2, f"--bf16 --calculate-per-token-loss {flags} {overlap}")
        finished(run(text, tmp_path / name, file, row=row, saves=3))
    stock, mine = (rounds_of(tmp_path / f"{name}.jsonl") for name in ("stock", "int4"))
    assert stock[0] == mine[0] and len(mine) == 3
    assert_same_checkpoint(*(read_checkpoint(tmp_path / name, STEPS) for name in ("int4", "without")))


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--bf16 --overlap", "--bf16 --bf16-gradients", ""])
def test_a_loop_on_megatron_core_alone(text: Path, tmp_path: Path, flags: str) -> None:
    """With megatron_lion.Reports, which has what was not sent and the signs that it changed."""
    line = (f"--data {text}/train_text_document --iterations {STEPS} --reduce ternary --gather signs", flags)
    save = f"--save {tmp_path} --save-interval {STEPS} --telemetry-interval 3"
    done = finished(run_ranks(*line, save, ranks=2, script=SCRIPT, environment={"REDUCE_KIND": "core"}))
    assert_adds_up(reduced(done))
    logged = [match.groups() for match in map(LINE.search, done.ours()) if match]
    assert [step for step, *_ in logged] == ["3", "6"]
    assert all(0 < float(kept) < 2 and 0 < float(unlike) < 40 for _, _, kept, unlike in logged)


REFUSED = {
    "--ddp-reduce-scatter-with-fp32-accumulation": {"ddp_reduce_scatter_with_fp32_accumulation": True},
    "--use-megatron-fsdp": {"use_megatron_fsdp": True},
    "--fp8-param-gather": {"fp8_param_gather": True},
    "--cuda-graph-impl local": {"cuda_graph_impl": "local"},
    "--mtp-num-layers": {"mtp_num_layers": 1},
    "--num-distributed-optimizer-instances 2": {"num_distributed_optimizer_instances": 2},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_is_not_supported_is_refused(flag: str) -> None:
    with pytest.raises(
        LionError, match=rf"^--lion-reduce int4 is not supported with {flag}: .*Use --lion-reduce stock"
    ):
        refusals.refuse_settings(LionOptions(reduce="int4"), SimpleNamespace(**REFUSED[flag]))
    refusals.refuse_settings(LionOptions(), SimpleNamespace(**REFUSED[flag]))
