"""Steps of a rehearsal run Megatron's loop on random tokens."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness import NO_DROPOUT
from tests.rehearse.rehearsals import FLAGS, LION, report

PARALLEL = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
# The groups of the buffers, in Megatron's words.
GROUPS = {"data parallel": "data parallel with cp", "expert data parallel": "expert data parallel"}
EXPERTS = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 "
    "--moe-token-dispatcher-type alltoall"
)


def assert_steps(folder: Path, rank: int, *flags: str) -> dict[str, Any]:
    """What two steps on ``rank`` of 8 took and sent."""
    built = report(folder, FLAGS, LION, "--global-batch-size 16", *flags, rank=rank, ranks=8, steps=2)
    assert built.steps is not None
    assert built.steps["steps"] == 2
    assert built.steps["activations"] > 0
    sent = {(each["group"], each["collective"]): each["bytes"] for each in built.steps["messages"]}
    # What the buffers say is sent over data-parallel groups is what was sent.
    for each in built.traffic:
        if each["group"] in GROUPS:
            found = sent[GROUPS[each["group"]], each["collective"].split(" of ")[0]]
            assert found == pytest.approx(each["bytes"], abs=64), (
                each,
                sent,
            )  # the clipping's and the log's few numbers
    return built.steps | {"sent": sent}


def test_steps_run_on_a_rank_that_receives_from_ranks_that_do_not_exist(tmp_path: Path) -> None:
    assert_steps(tmp_path, 7, PARALLEL)


@pytest.mark.slow
def test_a_stage_keeps_the_activations_of_all_micro_batches_in_flight(tmp_path: Path) -> None:
    """The first of two stages holds two micro-batches, and sends one message for each."""
    flags = f"--pipeline-model-parallel-size 2 {NO_DROPOUT}"
    one = assert_steps(tmp_path, 0, flags, "--global-batch-size 8")
    four = assert_steps(tmp_path, 0, flags, "--global-batch-size 32")
    assert four["activations"] == pytest.approx(2 * one["activations"], rel=0.05)
    sent = [steps["sent"]["pipeline model parallel", "send"] for steps in (one, four)]
    assert sent == [32 * 2 * 64 * 2, 4 * 32 * 2 * 64 * 2]  # sequence, micro-batch, hidden size, bf16


@pytest.mark.slow
def test_recomputed_activations_are_not_kept(tmp_path: Path) -> None:
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    assert assert_steps(tmp_path, 0, recompute)["activations"] < 0.7 * assert_steps(tmp_path, 0)["activations"]


@pytest.mark.slow
def test_steps_run_if_no_token_goes_to_the_experts_of_this_rank(tmp_path: Path) -> None:
    """The second chunk of the first stage gets only zeros, so all its tokens go to one expert."""
    interleaved = (
        "--num-layers 8 --num-layers-per-virtual-pipeline-stage 1 --overlap-param-gather --overlap-grad-reduce"
    )
    assert_steps(tmp_path, 0, PARALLEL, EXPERTS, interleaved)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("flags", ["", PARALLEL, EXPERTS, f"{PARALLEL} {EXPERTS}"])
def test_steps_run_in_every_layout(tmp_path: Path, rank: int, flags: str) -> None:
    assert_steps(tmp_path, rank, flags)
