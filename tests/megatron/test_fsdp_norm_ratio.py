"""The norm ratio under Megatron-FSDP: the distributed optimizer's rounds, and training does not notice them."""

from pathlib import Path

import pytest

from tests.harness import assert_same_checkpoint, pretrain, read_checkpoint, record_difference, records
from tests.megatron.fsdp_runs import FP32_GRADIENTS, FSDP, MOE, NO_SHARD, RUN, saving
from tests.versions import since

ROUNDS = "--norm-ratio-interval 2 --norm-ratio-at-start --norm-ratio-batches 4"
# Strategy, flags, and how far apart two rounds may be.
CASES = {
    "no_shard, fp32": ("no_shard", "", 1e-5),
    "optim, fp32, EP 2": ("optim", MOE, 1e-5),
    "optim_grads_params, fp32, TP 2": (
        "optim_grads_params",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        1e-5,
    ),
    "optim_grads_params, bf16": ("optim_grads_params", f"--bf16 {FP32_GRADIENTS}", 1e-3),
}


def marks(case: str) -> tuple[pytest.MarkDecorator, ...]:
    """On 0.17 neither no_shard nor, without Transformer Engine, TP works, with any optimizer."""
    return (*(NO_SHARD.marks * ("no_shard" in case)), *([since("0.18")] * ("TP" in case)))


@pytest.mark.slow
@since("0.17")
@pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case)) for case in CASES])
@pytest.mark.supports(
    "Megatron-FSDP: norm ratio rounds",
    "two ranks, DP, TP and EP: the distributed optimizer's to 1e-5 (fp32), 1e-3 (bf16); the checkpoint as without them",
)
def test_a_round_is_that_of_the_distributed_optimizer(text: Path, tmp_path: Path, case: str) -> None:
    strategy, flags, tolerance = CASES[case]
    run = f"{RUN} {flags} --train-iters 2"
    pretrain(text, run, f"--use-distributed-optimizer {ROUNDS} --norm-ratio-file {tmp_path / 'one.jsonl'}", ranks=2)
    sharded = f"{FSDP} {strategy} {run}"
    rounds = f"{ROUNDS} --norm-ratio-file {tmp_path / 'other.jsonl'} {saving(tmp_path / 'measured', 2)}"
    pretrain(text, sharded, rounds, ranks=2)
    found = [records(tmp_path, name) for name in ("one.jsonl", "other.jsonl")]
    differences = [record_difference(one, other) for one, other in zip(*found, strict=True)]
    assert len(differences) == 2
    assert max(differences) <= tolerance, differences
    pretrain(text, sharded, saving(tmp_path / "plain", 2), ranks=2)
    assert_same_checkpoint(*(read_checkpoint(tmp_path / name, 2) for name in ("plain", "measured")))
