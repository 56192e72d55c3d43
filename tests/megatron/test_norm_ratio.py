"""The norm ratio inside Megatron's loop: the number is right on every layout, and training does not notice."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.integration.reporting.norm_ratio.schedule import METRICS
from tests.harness import (
    BATCH,
    CPU,
    HORIZON,
    MODEL,
    NO_DROPOUT,
    RATE,
    WORKERS,
    Run,
    assert_same_checkpoint,
    pretrain,
    read_checkpoint,
    record_difference,
    records,
    run_ranks,
    text_flags,
)

PROBE = Path(__file__).with_name("probe_round.py")
DISTRIBUTED = "--use-distributed-optimizer"
ONE_ROUND = "--optimizer lion --train-iters 1 --norm-ratio-at-start --norm-ratio-batches 4"
# Local layers have experts without biases only. No auxiliary loss, which each layout would take over other tokens.
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--moe-token-dispatcher-type allgather --disable-bias-linear"
)
TP2_EP2 = f"{DISTRIBUTED} --tensor-model-parallel-size 2 --expert-model-parallel-size 2 --sequence-parallel"


def look(text: Path, *flags: str, ranks: int, **environment: str) -> list[dict[str, Any]]:
    """What the probe found at the round before the first step, on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PROBE_OUTPUT": folder, **environment}
        where = f"--norm-ratio-file {folder}/norm_ratio.jsonl"
        lines = (MODEL, BATCH, RATE, CPU, text_flags(text), ONE_ROUND, NO_DROPOUT, where, *flags)
        run = run_ranks(*lines, ranks=ranks, script=PROBE, environment=environment)
        assert run.returncode == 0, run.output[-6000:]
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.supports("Megatron's loop / rounds", "on gloo ranks")
@pytest.mark.supports("the norm ratio: loss, l1, l2, r, noise of a round", "against float64 autograd")
@pytest.mark.parametrize("flags", ["", f"{DISTRIBUTED} --calculate-per-token-loss"])
def test_a_round_equals_float64_autograd_over_the_same_samples(
    text: Path, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (answer,) = look(text, flags, ranks=1, PROBE_REFERENCE="1")
    expected = answer["reference"]
    difference = {key: abs(answer["record"][key] / value - 1) for key, value in expected.items()}
    with capsys.disabled():
        print(f"\n{flags or 'mean of micro-batches'}: from float64 autograd {max(difference.values()):.1e}")
    assert max(difference.values()) < 1e-5, difference


# ---- a round over the whole split ----

WHOLE = "--norm-ratio-batches all"
SPLIT_LAYOUTS = {
    "DP 2": (2, DISTRIBUTED),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "PP 2 interleaved x DP 2": (
        4,
        f"{DISTRIBUTED} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}


def small_split(text: Path) -> str:
    """Train on the validation text: few samples, and no multiple of a batch."""
    return f"--train-data-path {text}/valid_text_document --make-vocab-size-divisible-by 256"


@pytest.mark.parametrize(
    "flags", ["", pytest.param(f"{DISTRIBUTED} --calculate-per-token-loss", marks=pytest.mark.slow)]
)
def test_a_round_over_the_whole_split_equals_float64_autograd(text: Path, flags: str) -> None:
    (answer,) = look(text, small_split(text), WHOLE, flags, ranks=1, PROBE_REFERENCE="1")
    record, expected = answer["record"], answer["reference"]
    assert record["samples"] == expected["samples"] and record["exact"] and record["converged"]
    assert record["samples"] % 8 and record["samples"] % 2, "the last batch must be filled up"
    difference = {key: abs(record[key] / expected[key] - 1) for key in ("loss", "l1", "l2", "kkt_residual")}
    assert max(difference.values()) < 1e-6, difference


@pytest.mark.slow
def test_a_round_over_the_whole_split_is_the_same_in_every_layout(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--optimizer lion --train-iters 2 --num-layers 4 {HORIZON} {NO_DROPOUT} {small_split(text)}"
    pretrain(text, flags, f"--save {tmp_path} --save-interval 1 --exit-interval 1")
    load = f"--load {tmp_path} --no-load-optim --no-load-rng"
    measured = []
    for ranks, layout in [(1, ""), *SPLIT_LAYOUTS.values()]:
        where = tmp_path / f"{len(measured)}.jsonl"
        rounds = f"--norm-ratio-at-start {WHOLE} --norm-ratio-file {where}"
        pretrain(text, flags, layout, rounds, load, ranks=ranks)
        measured += records(tmp_path, where.name)[:1]
    one, *others = measured
    assert one["exact"]
    for name, record in zip(SPLIT_LAYOUTS, others, strict=True):
        difference = record_difference(one, record)
        with capsys.disabled():
            print(f"\n{name}: a round over the split differs from one process's by {difference:.1e}")
        assert record["tokens"] == one["tokens"] and record["exact"]
        assert difference < 5e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("flags", [DISTRIBUTED, "--pipeline-model-parallel-size 2"])
def test_training_does_not_notice_rounds_over_the_whole_split(text: Path, tmp_path: Path, flags: str) -> None:
    flags = f"--optimizer lion {flags} {small_split(text)} {HORIZON} --train-iters 4 --save-interval 4"
    plain = pretrain(text, flags, f"--save {tmp_path}/without", ranks=2)
    rounds = f"--norm-ratio-interval 2 --norm-ratio-at-start {WHOLE}"
    measured = pretrain(text, flags, rounds, f"--save {tmp_path}/with", ranks=2)
    assert exactly(plain) == exactly(measured)
    assert_same_checkpoint(read_checkpoint(tmp_path / "without", 4), read_checkpoint(tmp_path / "with", 4))
    found = records(tmp_path / "with")
    assert [record["iteration"] for record in found] == [0, 2, 4]
    assert not any(record["exact"] for record in found), "dropout is on"
    assert len({record["tokens"] for record in found}) == 1


# ---- each parameter once: known integers in the buffers ----

TENSOR_PARALLEL_DEFECTS = ("tensor-parallel copies count", "no tensor-parallel sum")
COUNTS = {
    "dense, tied, TP 2 x PP 2": (
        "",
        4,
        f"{DISTRIBUTED} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        (
            "tied copy counts",
            "tensor-parallel copies count",
            "no tensor-parallel sum",
            "divided by the pipeline's size",
        ),
    ),
    "dense, DP 4, two instances of the distributed optimizer": (
        "",
        4,
        f"{DISTRIBUTED} --num-distributed-optimizer-instances 2",
        (),
    ),
    "experts, TP 2 x EP 2, expert TP 1": (
        MOE,
        2,
        f"{TP2_EP2} --expert-tensor-parallel-size 1",
        (*TENSOR_PARALLEL_DEFECTS, "dense rank for experts"),
    ),
    "experts, TP 2 x EP 2 x DP 2, expert TP 2": (
        MOE,
        4,
        f"{TP2_EP2} --expert-tensor-parallel-size 2",
        TENSOR_PARALLEL_DEFECTS,
    ),
    "experts, not sharded, DP 2 x EP 2": (MOE, 2, "--expert-model-parallel-size 2", ()),
}


@pytest.fixture(scope="module")
def one_process(text: Path) -> dict[str, dict[str, Any]]:
    """The count without anything sharded, for each of the models in ``COUNTS``."""
    same_vocabulary = "--make-vocab-size-divisible-by 256"
    return {model: look(text, model, same_vocabulary, ranks=1)[0] for model in ("", MOE)}


@pytest.mark.supports(
    "each parameter counted once",
    "known integers in the buffers: sums exact on every layout, known errors found",
)
@pytest.mark.parametrize(("model", "ranks", "layout", "defects"), COUNTS.values(), ids=COUNTS)
def test_each_parameter_is_counted_once_and_each_known_defect_is_noticed(
    text: Path,
    one_process: dict[str, dict[str, Any]],
    model: str,
    ranks: int,
    layout: str,
    defects: tuple[str, ...],
) -> None:
    expected = one_process[model]["counted"]
    answers = look(text, model, layout, ranks=ranks)
    for answer in answers:
        assert answer["counted"] == expected, "integers are summed exactly, on every rank"
        assert answer["record"]["d"] == expected[2]
        wrong = {name: answer["with_defect"][name] for name in defects}
        assert all(counted != expected for counted in wrong.values()), wrong


def test_frozen_parameters_are_left_out(text: Path, one_process: dict[str, dict[str, Any]]) -> None:
    """Position embeddings: 32 positions of 64 numbers."""
    answers = look(text, f"{DISTRIBUTED} --tensor-model-parallel-size 2", ranks=2, PROBE_FREEZE="position_embeddings")
    everything = one_process[""]["record"]
    for answer in answers:
        record = answer["record"]
        assert record["d"] == everything["d"] - 32 * 64
        assert record["parts"]["kinds"]["embedding"]["d"] == everything["parts"]["kinds"]["embedding"]["d"] - 32 * 64


# ---- experts: from one checkpoint, every layout the same number ----


def test_layouts_of_experts_measure_what_one_process_measures(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{MOE} --optimizer lion --train-iters 2 {HORIZON} {NO_DROPOUT} --make-vocab-size-divisible-by 256"
    pretrain(text, flags, f"--save {tmp_path} --save-interval 1 --exit-interval 1")
    layouts = {
        "one process": (1, ""),
        "EP 2": (2, f"{DISTRIBUTED} --expert-model-parallel-size 2"),
        "TP 2 x EP 2, expert TP 1": (2, f"{TP2_EP2} --expert-tensor-parallel-size 1"),
        "TP 2 x EP 2, expert TP 2": (4, f"{TP2_EP2} --expert-tensor-parallel-size 2"),
    }
    measured = {}
    for name, (ranks, layout) in layouts.items():
        where = tmp_path / f"{len(measured)}.jsonl"
        rounds = f"--norm-ratio-at-start --norm-ratio-batches 4 --norm-ratio-file {where}"
        pretrain(text, flags, layout, rounds, f"--load {tmp_path} --no-load-optim --no-load-rng", ranks=ranks)
        measured[name] = records(tmp_path, where.name)[0]
    reference = measured.pop("one process")
    for name, record in measured.items():
        difference = record_difference(reference, record)
        with capsys.disabled():
            print(f"\n{name}: a round differs from one process's by {difference:.1e}")
        assert (record["d"], record["d_padding"]) == (reference["d"], reference["d_padding"])
        assert difference < 5e-6


# ---- training does not notice ----

MOE_UNDISTURBED = "experts with a balancing bias and auxiliary loss, EP 2"
UNDISTURBED = {
    "TP 2 x DP 2, sequence parallel, bf16, overlap": (
        4,
        f"--optimizer lion {DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel --bf16 "
        "--overlap-grad-reduce --overlap-param-gather",
    ),
    "PP 2, fp32": (2, f"--optimizer lion {DISTRIBUTED} --pipeline-model-parallel-size 2"),
    "TP 2 x DP 2, fp32, overlap": (
        4,
        f"--optimizer lion {DISTRIBUTED} --tensor-model-parallel-size 2 --overlap-grad-reduce --overlap-param-gather",
    ),
    "PP 2 interleaved, bf16, aligned overlap": (
        4,
        f"--optimizer lion {DISTRIBUTED} --bf16 --pipeline-model-parallel-size 2 --num-layers 4 "
        "--num-layers-per-virtual-pipeline-stage 1 --overlap-grad-reduce --overlap-param-gather --micro-batch-size 1",
    ),
    "DP 2, not sharded, bf16": (2, "--optimizer lion --bf16"),
    "DP 2, fp16 with a loss scale": (2, f"--optimizer lion {DISTRIBUTED} --fp16 --initial-loss-scale 1024"),
    MOE_UNDISTURBED: (
        2,
        f"--optimizer lion {DISTRIBUTED} --num-experts 4 --expert-model-parallel-size 2 --disable-bias-linear "
        "--moe-token-dispatcher-type allgather --moe-router-enable-expert-bias --moe-router-score-function sigmoid",
    ),
    "sgd, DP 2, bf16": (2, f"--optimizer sgd {DISTRIBUTED} --bf16"),
    "adam, DP 2, fp32": (2, f"--optimizer adam {DISTRIBUTED}"),
}
# The rest goes to tests/full.sh.
IN_CI = ("DP 2, fp16 with a loss scale",)
STEPS, EVERY = 50, 10


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(*case, id=name, marks=[] if name in IN_CI else [pytest.mark.slow])
        for name, case in UNDISTURBED.items()
    ],
)
def test_a_run_with_rounds_equals_one_without_bit_for_bit_also_over_a_resume(
    text: Path, tmp_path: Path, ranks: int, flags: str
) -> None:
    canonical = "--dist-ckpt-optim-fully-reshardable" if DISTRIBUTED in flags else ""
    flags = f"{flags} {canonical} {WORKERS} --lr-decay-iters {STEPS} --train-iters {STEPS} --save-interval {STEPS // 2}"
    rounds = f"--norm-ratio-interval {EVERY} --norm-ratio-at-start --norm-ratio-batches 2"
    with_rounds = f"{flags} {rounds} --save {tmp_path}/with --load {tmp_path}/with"
    plain = pretrain(text, flags, f"--save {tmp_path}/without", ranks=ranks)
    killed = pretrain(text, with_rounds, ranks=ranks, kill_at=STEPS // 2 + EVERY)
    assert killed.returncode != 0
    assert exactly(plain) | exactly(killed) == exactly(plain), "the losses of every step, as logged"
    resumed = pretrain(text, with_rounds, ranks=ranks)
    assert exactly(plain) | exactly(resumed, first=STEPS // 2 + 3) == exactly(plain)
    assert_same_checkpoint(read_checkpoint(tmp_path / "without", STEPS), read_checkpoint(tmp_path / "with", STEPS))
    rounds_left = records(tmp_path / "with")
    assert [record["iteration"] for record in rounds_left] == list(range(0, STEPS + 1, EVERY))
    assert all(record["nonfinite"] == 0 for record in rounds_left)


def exactly(run: Run, first: int = 1) -> dict[int, float]:
    """The losses that a run logged from iteration ``first`` on."""
    return {iteration: loss for iteration, loss in run.log.loss.items() if iteration >= first}


def test_a_round_that_is_measured_again_after_a_resume_gives_the_same_numbers(text: Path, tmp_path: Path) -> None:
    """Batches follow the seed and the iteration, not where the training stream is."""
    rounds = "--norm-ratio-interval 2 --norm-ratio-batches 3"
    flags = f"--optimizer lion {HORIZON} --train-iters 4 --save-interval 2 {rounds}"
    pretrain(text, flags, f"--save {tmp_path}")
    first = records(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    run = pretrain(text, flags, f"--save {tmp_path} --load {tmp_path}")
    assert any("1 lines of" in line and "moved to" in line for line in run.ours())
    again = records(tmp_path)
    for record in first + again:
        del record["seconds"]
    assert [record["iteration"] for record in again] == [2, 4]
    assert again == first
    assert again[0]["loss"] != again[1]["loss"]


def test_rounds_are_in_tensorboard_under_their_names(text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = f"--optimizer sgd {DISTRIBUTED} --train-iters 2 --norm-ratio-interval 1 --norm-ratio-batches 2"
    pretrain(text, flags, f"--tensorboard-dir {tmp_path}", ranks=2)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, key in METRICS.items():
        assert [event.step for event in events.Scalars(name)] == [1, 2], name
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([record[key] for record in records(tmp_path)], rel=1e-6)
