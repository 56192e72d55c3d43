"""Steps of a rehearsal run Megatron's loop on random tokens."""

from pathlib import Path

import pytest

from tests.rehearse.rehearsals import FLAGS, LION, report

PARALLEL = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
EXPERTS = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 "
    "--moe-token-dispatcher-type alltoall"
)


def assert_steps(folder: Path, rank: int, *flags: str) -> None:
    steps = report(folder, FLAGS, LION, "--global-batch-size 16", *flags, rank=rank, ranks=8, steps=2).steps
    assert steps is not None
    assert steps["steps"] == 2
    assert steps["activations"] > 0


def test_steps_run_on_a_rank_that_receives_from_ranks_that_do_not_exist(tmp_path: Path) -> None:
    assert_steps(tmp_path, 7, PARALLEL)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("flags", ["", PARALLEL, EXPERTS, f"{PARALLEL} {EXPERTS}"])
def test_steps_run_in_every_layout(tmp_path: Path, rank: int, flags: str) -> None:
    assert_steps(tmp_path, rank, flags)
