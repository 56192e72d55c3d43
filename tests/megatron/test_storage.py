"""Lion's state in fewer bits inside Megatron: the sharded step, resume, resharding, and Megatron's own flags for it."""

from pathlib import Path

import pytest

from tests.harness import (
    HORIZON,
    NO_DROPOUT,
    WORKERS,
    assert_same_checkpoint,
    pretrain,
    read_checkpoint,
    relative_difference,
)
from tests.megatron.test_parameters import DISTRIBUTED, probe

CANONICAL = "--dist-ckpt-optim-fully-reshardable"
REMAINDER = "--lion-master-weights remainder"


@pytest.mark.supports(
    "`--lion-momentum-dtype bf16` and `int8`, `--lion-master-weights remainder`, bf16 gradients",
    "the sharded step equals Lion on whole parameters bit for bit, DP 1, 2, 4; resumed bit for bit",
)
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, f"--bf16 --lion-momentum-dtype int8 {REMAINDER}"),
        (2, f"--bf16 --lion-momentum-dtype int8 {REMAINDER} --grad-reduce-in-bf16"),
        (4, f"--bf16 --lion-momentum-dtype int8 {REMAINDER} --overlap-grad-reduce --overlap-param-gather"),
        (2, f"--bf16 --lion-momentum-dtype bf16 {REMAINDER}"),
        pytest.param(4, "--bf16 --lion-momentum-dtype int8", marks=pytest.mark.slow),
        pytest.param(2, "--lion-momentum-dtype int8", marks=pytest.mark.slow),
        pytest.param(2, "--bf16 --grad-reduce-in-bf16", marks=pytest.mark.slow),
        (2, "--bf16 --use-precision-aware-optimizer --exp-avg-dtype bf16 --main-grads-dtype bf16"),
    ],
)
def test_a_sharded_step_equals_lion_on_whole_parameters_bit_for_bit(text: Path, ranks: int, flags: str) -> None:
    flags = f"--optimizer lion {DISTRIBUTED} --clip-grad 0 --ddp-bucket-size 20000 {flags}"
    for answer in probe(text, "sharded-step", flags, ranks=ranks):
        assert answer["parameters"] == 28
        assert answer["different"] == []


@pytest.mark.supports(
    "`--lion-momentum-dtype bf16` and `int8`, `--lion-master-weights remainder`, bf16 gradients",
    "the sharded step equals Lion on whole parameters bit for bit, DP 1, 2, 4; resumed bit for bit",
)
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, f"--lion-momentum-dtype int8 {REMAINDER} {CANONICAL}", marks=pytest.mark.slow),
        pytest.param(
            2,
            f"--lion-momentum-dtype bf16 {CANONICAL} --overlap-grad-reduce --overlap-param-gather",
            marks=pytest.mark.slow,
        ),
        (4, f"--lion-momentum-dtype int8 {REMAINDER} {CANONICAL} --tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(text: Path, tmp_path: Path, ranks: int, flags: str) -> None:
    run = f"--optimizer lion --bf16 {DISTRIBUTED} {flags} {WORKERS} {HORIZON} --train-iters 8 --save-interval 4"
    whole = pretrain(text, run, f"--save {tmp_path}/whole", ranks=ranks)
    pretrain(text, run, f"--save {tmp_path}/cut", ranks=ranks, kill_at=6)
    resumed = pretrain(text, run, f"--save {tmp_path}/cut --load {tmp_path}/cut", ranks=ranks)
    assert min(resumed.log.loss) == 5
    assert relative_difference(whole.log, resumed.log) == 0.0
    assert_same_checkpoint(read_checkpoint(tmp_path / "whole", 8), read_checkpoint(tmp_path / "cut", 8))


def test_remainders_train_as_fp32_masters_do(text: Path, tmp_path: Path) -> None:
    """The same losses, and the same masters in the checkpoint, where no bf16 weight met a tie; one run reads the
    other's checkpoint."""
    common = f"--optimizer lion --bf16 {DISTRIBUTED} {CANONICAL} {HORIZON} {NO_DROPOUT} --train-iters 6"
    runs = {}
    for master in ("fp32", "remainder"):
        flags = f"{common} --lion-master-weights {master} --save {tmp_path}/{master} --save-interval 3"
        runs[master] = pretrain(text, flags, ranks=2)
        line = "16 bits for each bf16 parameter" if master == "remainder" else "fp32 master"
        assert any(line in said for said in runs[master].ours())
    assert relative_difference(runs["fp32"].log, runs["remainder"].log) < 1e-4
    (tmp_path / "fp32/latest_checkpointed_iteration.txt").write_text("3")
    crossed = pretrain(text, f"{common} {REMAINDER} --load {tmp_path}/fp32", ranks=2)
    assert min(crossed.log.loss) == 4
    assert relative_difference(runs["fp32"].log, crossed.log) < 1e-4


@pytest.mark.supports(
    "`--use-precision-aware-optimizer`, `--exp-avg-dtype`, `--main-grads-dtype`",
    "the same losses as with Lion's own flags, without Transformer Engine",
)
def test_megatrons_own_flags_mean_the_same(text: Path) -> None:
    common = f"--optimizer lion --bf16 {DISTRIBUTED} --train-iters 4"
    theirs = pretrain(text, f"{common} --use-precision-aware-optimizer --exp-avg-dtype bf16", ranks=2)
    ours = pretrain(text, f"{common} --lion-momentum-dtype bf16 {REMAINDER}", ranks=2)
    assert theirs.ours() == ours.ours()
    assert any("bf16 momentum" in line and "16 bits for each" in line for line in ours.ours())
    assert relative_difference(theirs.log, ours.log) == 0.0
