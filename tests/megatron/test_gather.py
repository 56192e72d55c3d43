"""Runs with --lion-gather signs end in the ordinary run's checkpoint, bit for bit, and do send signs."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from megatron_lion.config import GATHERS
from megatron_lion.integration.exchange.metrics import METRICS
from tests.harness import (
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
from tests.versions import RELEASES, Megatron, since, started, until

SCRIPT = Path(__file__).with_name("gather.py")
SIGNS = "--lion-gather signs"
TENSOR_PARALLEL = "--tensor-model-parallel-size 2 --sequence-parallel"
INTERLEAVED = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
UNTIED = "--untie-embeddings-and-output-weights"
DECOUPLED = "--decoupled-lr 3e-4 --decoupled-min-lr 3e-5"
EVALUATED = "--eval-iters 1 --eval-interval 2"
ROUNDS = "--lion-telemetry --norm-ratio-interval 3 --norm-ratio-batches 2"

CASES = {
    "bf16, overlap, several buckets, evaluated": Row(2, f"--bf16 {BUCKETS} {EVALUATED} {DECOUPLED} --clip-grad 0.3"),
    "fp32, telemetry, rounds": Row(2, f"{ROUNDS} --clip-grad 0.3"),
    "remainders, int8 momentum, DP 2": Row(2, COMPACT),
}
SLOW_CASES = {
    "bf16, DP 4": Row(4, "--bf16 --micro-batch-size 1"),
    "bf16, DP 4, overlap, several buckets, rounds": Row(4, f"--bf16 {BUCKETS} {ROUNDS}"),
    "fp32, DP 4, overlap, untied, evaluated": Row(4, f"{OVERLAP} {UNTIED} {EVALUATED}"),
    "bf16, TP 2 x DP 2, overlap": Row(4, f"--bf16 {TENSOR_PARALLEL} {OVERLAP}"),
    "remainders, int8 momentum, PP 2 x DP 2, tied, overlap": Row(
        4, f"{COMPACT} --pipeline-model-parallel-size 2 {OVERLAP}"
    ),
    "bf16, interleaved PP 2 x DP 2, overlap, evaluated": Row(4, f"--bf16 {INTERLEAVED} {BUCKETS} {EVALUATED}"),
    "fp32, TP 2 x PP 2 x DP 2": Row(8, f"{TENSOR_PARALLEL} --pipeline-model-parallel-size 2"),
    "bf16, experts, EP 2 x expert DP 2": Row(4, f"--bf16 {MOE}"),
    "bf16, experts, EP 2 x expert DP 2, overlap, several buckets": Row(4, f"--bf16 {MOE} {BUCKETS}"),
    "fp32, frozen parameters": Row(2, UNTIED, "frozen"),
    "bf16, frozen parameters, overlap": Row(2, f"--bf16 {OVERLAP} {UNTIED}", "frozen"),
    "bf16, decoupled rate, untied, telemetry": Row(2, f"--bf16 {DECOUPLED} {UNTIED} --lion-telemetry"),
    "bf16, learning rates by parameter": Row(2, f"--bf16 {OVERLAP}", "learning-rates"),
    "bf16, multi-token prediction, overlap": Row(
        2, f"--bf16 --mtp-num-layers 1 --position-embedding-type rope {OVERLAP}", "multi-token"
    ),
    "bf16, two optimizer instances": Row(4, "--bf16 --micro-batch-size 1 --num-distributed-optimizer-instances 2"),
    "fp32, two optimizer instances, overlap": Row(4, f"{OVERLAP} --num-distributed-optimizer-instances 2"),
    "bf16 gradients, remainders, overlap": Row(2, f"{COMPACT} --grad-reduce-in-bf16 {OVERLAP}"),
    "bf16, reference kernel": Row(2, "--bf16 --lion-kernel reference"),
    "bf16, foreach kernel, overlap": Row(2, f"--bf16 --lion-kernel foreach {OVERLAP}"),
    "fp16, static loss scale": Row(2, "--fp16 --loss-scale 1024"),
}
# A pairwise selection, which also runs on the other releases: tests/versions.sh -- -m releases.
SELECTED = {
    *CASES,
    "bf16, DP 4, overlap, several buckets, rounds",
    "fp32, DP 4, overlap, untied, evaluated",
    "bf16, TP 2 x DP 2, overlap",
    "remainders, int8 momentum, PP 2 x DP 2, tied, overlap",
    "bf16, interleaved PP 2 x DP 2, overlap, evaluated",
    "bf16, experts, EP 2 x expert DP 2, overlap, several buckets",
    "bf16, frozen parameters, overlap",
    "bf16, two optimizer instances",
}
ONLY = {"multi-token": [since("0.19"), until("0.19")], "learning-rates": [since("0.19")]}
HOW = "every tensor of the final checkpoint equals the ordinary run's bit for bit; full gathers counted"
SUPPORTED = pytest.mark.supports("`--lion-gather signs`", HOW)


def marks_of(name: str, row: Row) -> list[pytest.MarkDecorator]:
    slow, selected = name in SLOW_CASES, name in SELECTED
    return [*ONLY.get(row.kind, []), *[pytest.mark.slow] * slow, *[pytest.mark.releases] * selected]


def run(
    text: Path, folder: Path, *flags: str, fault: str = "none", row: Row, steps: int = STEPS, saves: int = 0, **kwargs
) -> Run:
    """A run of the tiny model whose exchange is checked; it saves at its end."""
    first = [fault, row.kind] if row.kind else [fault]
    common = (MODEL, BATCH, RATE, CPU, text_flags(text), RUN, f"--train-iters {steps} --save {folder}")
    rounds = f"--norm-ratio-file {folder}/rounds.jsonl" if "norm-ratio" in row.flags else ""
    return run_ranks(
        *first,
        *common,
        row.flags,
        f"--save-interval {saves or steps}",
        rounds,
        *flags,
        ranks=row.ranks,
        script=SCRIPT,
        **kwargs,
    )


def exchanged(run: Run) -> list[dict[str, int]]:
    """What each rank said about its exchange."""
    lines = [line for line in run.output.splitlines() if line.startswith("exchanged:")]
    return [{name: int(number) for name, number in re.findall(r"(\w+) (\d+)", line)} for line in lines]


def assert_signs_were_sent(found: Iterable[dict[str, int]], *, full_gathers: int = 1) -> None:
    """Every step but the first was sent as signs, and replayed once, on each rank, which had its owners' parameters."""
    for rank in found:
        assert rank["mismatches"] == rank["differing"] == 0
        assert rank["full"] == full_gathers * rank["groups"]
        assert rank["replays"] == rank["signs"] > 0


def compare_with_the_ordinary_run(text: Path, folder: Path, row: Row, **kwargs) -> list[dict[str, int]]:
    """Both runs; returns what each rank said about its exchange."""
    finished(run(text, folder / "params", row=row, **kwargs))
    signs = finished(run(text, folder / "signs", SIGNS, row=row, **kwargs))
    steps = kwargs.get("steps", STEPS)
    assert_same_checkpoint(read_checkpoint(folder / "params", steps), read_checkpoint(folder / "signs", steps))
    found = exchanged(signs)
    assert len(found) == row.ranks
    return found


@SUPPORTED
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=name, marks=marks_of(name, row)) for name, row in {**CASES, **SLOW_CASES}.items()],
)
def test_the_checkpoint_is_the_ordinary_runs(text: Path, tmp_path: Path, row: Row) -> None:
    found = compare_with_the_ordinary_run(text, tmp_path, row)
    assert_signs_were_sent(found)
    assert all(rank["signs"] >= rank["buckets"] * (STEPS - 1) for rank in found)


LINES = re.compile(r"step (\d+): gather of signs: (\S+) bits per parameter, (\S+)% exceptions, (\d+) full gathers")


@SUPPORTED
@pytest.mark.releases
def test_the_log_says_how_many_bits_are_sent(text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = Row(2, f"--bf16 --log-interval 2 --tensorboard-dir {tmp_path}/board")
    signs = finished(run(text, tmp_path, SIGNS, row=row))
    assert any("fused gather of signs (3.2" in line and "instead of 16" in line for line in signs.ours())
    found = [match.groups() for match in map(LINES.search, signs.ours()) if match]
    assert [(step, full) for step, *_, full in found] == [("2", "1"), ("4", "0"), ("6", "0")]
    assert float(found[0][1]) > 8 and all(3.2 < float(bits) < 4 for _, bits, *_ in found[1:])
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    logged = {name: [event.value for event in events.Scalars(f"lion/{name}")] for name in METRICS}
    assert logged["gather_full"] == [1.0, 0.0, 0.0]
    assert logged["gather_bits"] == pytest.approx([float(bits) for _, bits, *_ in found], abs=0.01)


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "least"), [("--bf16", 4.8), ("--bf16 --lr 1e-3", 4.4), ("--fp16 --loss-scale 1024", 4.8), ("", 19.0)]
)
def test_the_gather_sends_fewer_bytes(text: Path, tmp_path: Path, flags: str, least: float) -> None:
    """Bytes as the process group gets them, in runs that differ in nothing else; the first step is sent in full."""
    row = Row(2, flags)
    ordinary, signs = (exchanged(finished(run(text, tmp_path / g, f"--lion-gather {g}", row=row))) for g in GATHERS)
    assert_signs_were_sent(signs)
    for full, short in zip(ordinary, signs, strict=True):
        in_full = full["gathered"] / STEPS
        assert in_full == ordinary[0]["gathered"] / STEPS
        ratio = in_full / ((short["gathered"] - in_full) / (STEPS - 1))
        assert ratio >= least


@SUPPORTED
@pytest.mark.releases
def test_a_skipped_step_is_not_replayed(text: Path, tmp_path: Path) -> None:
    """With overlap each forward pass asks for the parameters, also after a step that was not made."""
    row = Row(2, f"{OVERFLOWS} {OVERLAP}")
    found = compare_with_the_ordinary_run(text, tmp_path, row, steps=12)
    assert_signs_were_sent(found)
    assert all(3 <= rank["steps"] <= 10 for rank in found), "no step was skipped between others"


@SUPPORTED
@pytest.mark.releases
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", OVERLAP])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_on_all(text: Path, tmp_path: Path, overlap: str) -> None:
    row = Row(2, f"--bf16 --no-check-for-nan-in-loss-and-grad {overlap}")
    found = compare_with_the_ordinary_run(text, tmp_path, row, environment={"GATHER_NAN": "3"})
    assert_signs_were_sent(found)
    assert [rank["steps"] for rank in found] == [STEPS - 1] * 2


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", OVERLAP])
def test_more_exceptions_than_are_worth_a_message_are_gathered_in_full(
    text: Path, tmp_path: Path, overlap: str
) -> None:
    """Fresh tiny weights and a large rate: nearly every element leaves its binade."""
    row = Row(2, f"--bf16 --init-method-std 1e-9 --lr 0.03 --min-lr 1e-3 --lion-beta1 0 --weight-decay 0 {overlap}")
    found = compare_with_the_ordinary_run(text, tmp_path, row)
    assert all(rank["mismatches"] == rank["differing"] == 0 for rank in found)
    assert all(rank["full"] > rank["groups"] for rank in found)


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", OVERLAP])
def test_a_refresh_sends_the_parameters(text: Path, tmp_path: Path, overlap: str) -> None:
    row = Row(2, f"--bf16 {overlap}")
    refreshed = finished(run(text, tmp_path, f"{SIGNS} --lion-gather-refresh 3", row=row, steps=7))
    # The first step, the third and the sixth.
    assert_signs_were_sent(exchanged(refreshed), full_gathers=3)


@SUPPORTED
@pytest.mark.releases
def test_a_flipped_bit_is_named_and_healed(text: Path, tmp_path: Path) -> None:
    flipped = finished(run(text, tmp_path, SIGNS, row=Row(2, "--bf16"), fault="flipped_bit"))
    assert re.search(r"on rank 1 the parameters of rank 0 in bucket 0 of 1 \(\d+ elements per rank\)", flipped.output)
    first, last = sorted(exchanged(flipped), key=lambda rank: rank["mismatches"])
    assert (first["full"], last["full"]) == (2, 2)
    assert first["mismatches"] == 0 and last["mismatches"] == 1
    # Seen before the step that heals it, and no more at the end.
    assert last["differing"] == 1 and last["replays"] == STEPS - 2


@SUPPORTED
@pytest.mark.releases
@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", OVERLAP])
def test_a_checkpoint_loaded_after_a_step_is_followed_by_a_full_gather(
    text: Path, tmp_path: Path, overlap: str
) -> None:
    """The signs of the step before the load are dropped, also where they were not sent yet."""
    row = Row(2, f"--bf16 {overlap}")
    environment = {"GATHER_RELOAD": "4"}
    found = compare_with_the_ordinary_run(text, tmp_path, row, environment=environment, saves=2)
    assert_signs_were_sent(found, full_gathers=2)


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("flags", [f"--bf16 {BUCKETS}", "", COMPACT])
def test_large_shards_are_sent_in_parts(text: Path, tmp_path: Path, flags: str) -> None:
    """Made small here, with ends anywhere in a parameter."""
    found = compare_with_the_ordinary_run(text, tmp_path, Row(2, flags), environment={"GATHER_PARTS": "3"})
    assert_signs_were_sent(found)
    assert all(rank["parts"] == 3 * rank["signs"] for rank in found)


@SUPPORTED
@pytest.mark.releases
@pytest.mark.slow
@pytest.mark.parametrize("other_ranks", [1, 4])
def test_a_killed_run_resumes_at_another_dp_size(text: Path, tmp_path: Path, other_ranks: int) -> None:
    """Both runs are killed, and resume on another number of ranks, which the checkpoints of the ordinary one show."""
    flags = f"--bf16 --micro-batch-size 1 {OVERLAP}"
    for folder, gather in (("params", ""), ("signs", SIGNS)):
        row = Row(2, flags)
        killed = run(text, tmp_path / folder, gather, row=row, steps=8, saves=4, kill_at=6)
        assert killed.returncode != 0
        load = f"--load {tmp_path / folder}"
        resumed = finished(run(text, tmp_path / folder, gather, load, row=Row(other_ranks, flags), steps=8, saves=4))
        assert min(resumed.log.loss) == 5
    assert_same_checkpoint(read_checkpoint(tmp_path / "params", 8), read_checkpoint(tmp_path / "signs", 8))
    if other_ranks > 1:
        assert_signs_were_sent(exchanged(resumed))


@SUPPORTED
@pytest.mark.releases
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("--optimizer adam --bf16", "--lion-init-from adam --bf16"),
        # The owner's remainders round half away from zero, where the saved parameters were rounded to nearest even.
        ("--bf16", COMPACT),
        (COMPACT, f"--bf16 {OVERLAP}"),
    ],
    ids=["Adam's", "fp32 masters into remainders", "remainders into fp32 masters"],
)
def test_a_run_starts_from_another_kind_of_checkpoint(text: Path, tmp_path: Path, before: str, after: str) -> None:
    start = Row(2, before)
    finished(run(text, tmp_path / "start", "--exit-interval 2", row=start, saves=2))
    row = Row(2, f"{after} --load {tmp_path / 'start'}")
    found = compare_with_the_ordinary_run(text, tmp_path, row)
    assert_signs_were_sent(found)


@pytest.fixture(scope="module")
def megatron(request: pytest.FixtureRequest) -> Iterator[Megatron]:
    yield from started(request.param)


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("megatron", [RELEASES[0], RELEASES[-1]], indirect=True)
@pytest.mark.parametrize("flags", ["--bf16 --overlap", "--bf16 --bf16-gradients", ""])
def test_a_loop_on_megatron_core_alone(megatron: Megatron, text: Path, tmp_path: Path, flags: str) -> None:
    """Also where the wheel has no loop; the others run this file with tests/versions.sh."""
    for gather in GATHERS:
        folder = tmp_path / gather
        core = ("none", "core", f"--data {text}/train_text_document --iterations {STEPS} --gather {gather}")
        done = megatron.run(*core, f"{flags} --save {folder} --save-interval {STEPS}", ranks=2, script=SCRIPT)
        found = exchanged(finished(done))
    assert_same_checkpoint(*(read_checkpoint(tmp_path / gather, STEPS) for gather in GATHERS))
    assert len(found) == 2
    assert_signs_were_sent(found)


@SUPPORTED
@pytest.mark.slow
@pytest.mark.parametrize("megatron", [RELEASES[0], RELEASES[-1]], indirect=True)
@pytest.mark.parametrize("stale", ["", "--save-stale"])
def test_a_killed_loop_on_megatron_core_alone_resumes_at_another_dp_size(
    megatron: Megatron, text: Path, tmp_path: Path, stale: str
) -> None:
    """Also where the loop saved parameters that were older than the masters."""
    for gather in GATHERS:
        folder = tmp_path / gather
        core = ("none", "core", f"--data {text}/train_text_document --iterations 8 --gather {gather} --bf16 --overlap")
        loop = (*core, f"--save {folder} --save-interval 4 {stale}")
        assert megatron.run(*loop, ranks=2, script=SCRIPT, kill_at=6).returncode != 0
        resumed = finished(megatron.run(*loop, f"--load {folder}", ranks=4, script=SCRIPT))
        assert min(resumed.log.loss) == 5
    assert_same_checkpoint(*(read_checkpoint(tmp_path / gather, 8) for gather in GATHERS))
    assert_signs_were_sent(exchanged(resumed))


# Each mistake, and a run in which it does harm.
FAULTS = {
    "replay_twice_after_a_skip": Row(2, f"{OVERFLOWS} {OVERLAP}"),
    "next_steps_lr": Row(2, f"--bf16 {OVERLAP}"),
    "own_shard_replayed": Row(2, "--bf16"),
    "another_groups_weight_decay": Row(2, "--bf16"),
    "stale_signs_after_a_load": Row(2, f"--bf16 {OVERLAP}"),
    "overflow_ignored_on_one_rank": Row(2, "--bf16 --lr 1e-2 --min-lr 1e-3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_each_mistake_in_the_exchange_is_found(text: Path, tmp_path: Path, fault: str) -> None:
    """The checks above fail with a mistake in the exchange, and pass without."""
    is_load = fault.endswith("load")
    # The checkpoint of step 4 is loaded after step 5: the signs of step 5 do not belong to these parameters.
    options = {"environment": {"GATHER_RELOAD": "5"}, "saves": 2} if is_load else {}
    row = FAULTS[fault]
    right, wrong = (
        run(text, tmp_path / what, SIGNS, row=row, steps=12, fault=what, **options) for what in ("none", fault)
    )
    assert_signs_were_sent(exchanged(finished(right)), full_gathers=1 + is_load)
    found = exchanged(finished(wrong))
    assert any(rank["mismatches"] or rank["differing"] for rank in found)
