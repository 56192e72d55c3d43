"""Every layout computes what one process computes, started from one checkpoint: losses, gradient norms and noise."""

from pathlib import Path

import pytest

from tests.harness import HORIZON, NO_DROPOUT, Run, pretrain, record_difference, records, relative_difference

DISTRIBUTED = "--use-distributed-optimizer"
START = 2
END = 12
RUN = f"--optimizer lion --num-layers 4 --micro-batch-size 1 --train-iters {END} {HORIZON} {NO_DROPOUT}"

# fp32 sums over ranks are rounded in another order: 1e-7 in a gradient, now and then the sign of an element of c that
# is within that of zero, and then 2 lr in one weight. Over ten steps the loss moves by less than this.
FP32_TOLERANCE = 5e-6
# bf16 activations are rounded to 8 bits; a sum over tensor-parallel ranks in another order moves the loss by less.
BF16_TOLERANCE = 4e-3

LAYOUTS = {
    "DP 2": (2, DISTRIBUTED, FP32_TOLERANCE),
    "DP 2, not sharded": (2, "", FP32_TOLERANCE),
    "DP 4, overlap": (4, f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather", FP32_TOLERANCE),
    "TP 2": (2, f"{DISTRIBUTED} --tensor-model-parallel-size 2", FP32_TOLERANCE),
    "TP 2, sequence parallel": (2, f"{DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel", FP32_TOLERANCE),
    "PP 2": (2, f"{DISTRIBUTED} --pipeline-model-parallel-size 2", FP32_TOLERANCE),
    "PP 2, interleaved": (
        2,
        f"{DISTRIBUTED} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        FP32_TOLERANCE,
    ),
    "TP 2 x PP 2 x DP 2": (
        8,
        f"{DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
        FP32_TOLERANCE,
    ),
    "TP 2 x DP 2, bf16": (4, f"{DISTRIBUTED} --tensor-model-parallel-size 2 --bf16", BF16_TOLERANCE),
}

# What another case has as well goes to tests/full.sh.
SLOW = ("DP 2", "TP 2", "TP 2, sequence parallel")

# A round before the first step from the checkpoint, and one after the last.
ROUNDS = f"--norm-ratio-at-start --norm-ratio-interval {END} --norm-ratio-batches 4"
EXACT = ("iteration", "batches", "tokens", "d", "d_padding", "nonfinite")


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def one_process(
    request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Run]:
    """Flags for tied or untied embeddings, a checkpoint after two steps, and one process's run from it."""
    folder = tmp_path_factory.mktemp(request.param)
    # Equal padded vocabularies: it is padded to a multiple of 128 x TP.
    flags = "--make-vocab-size-divisible-by 256"
    if request.param == "untied":
        flags += " --untie-embeddings-and-output-weights"
    save = f"--save {folder} --save-interval {START} --exit-interval {START}"
    pretrain(text, RUN, flags, f"{DISTRIBUTED} --dist-ckpt-optim-fully-reshardable", save)
    rounds = f"{ROUNDS} --norm-ratio-file {folder}/norm_ratio.jsonl"
    return flags, folder, pretrain(text, RUN, flags, DISTRIBUTED, rounds, f"--load {folder}")


@pytest.mark.supports("Megatron's loop / start-up line", "on gloo ranks")
@pytest.mark.supports(
    "DP, TP, sequence parallel, PP, interleaved PP, TP 2 x PP 2 x DP 2; tied and untied; overlap",
    "loss curve of one process from one checkpoint, 10 steps, to 5e-6 relative in fp32 (bf16: 4e-3)",
)
@pytest.mark.parametrize(
    ("ranks", "layout", "tolerance"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in LAYOUTS.items()],
)
def test_a_layout_gives_the_one_process_loss_curve(
    text: Path,
    one_process: tuple[str, Path, Run],
    ranks: int,
    layout: str,
    tolerance: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    flags, folder, reference = one_process
    tied = "untie" not in flags
    if not tied and ("model-parallel" not in layout or "bf16" in layout):
        pytest.skip("untied embeddings matter to tensor and pipeline parallel, and are tried in fp32")
    optimizer_state = "" if DISTRIBUTED in layout else "--no-load-optim"
    if optimizer_state:
        reference = pretrain(text, RUN, flags, f"--load {folder} --no-load-optim")
    rounds = f"{ROUNDS} --norm-ratio-file {tmp_path}/norm_ratio.jsonl"
    run = pretrain(text, RUN, flags, layout, rounds, f"--load {folder} {optimizer_state} --no-load-rng", ranks=ranks)
    assert sorted(run.log.loss) == list(range(START + 1, END + 1))
    difference = relative_difference(reference.log, run.log)
    expected, measured = records(folder)[0], records(tmp_path)[0]
    in_round = record_difference(expected, measured)
    with capsys.disabled():
        print(
            f"\n{request.node.callspec.id}: differs from one process by {difference:.1e} in losses, {in_round:.1e} in "
        )
        print("the norms, loss and noise of a round")
    assert difference < tolerance
    assert [measured[key] for key in EXACT] == [expected[key] for key in EXACT]
    assert in_round < (FP32_TOLERANCE if "bf16" not in layout else 1.0)
    assert [record["iteration"] for record in records(tmp_path)] == [START, END]
    count = 52 if tied else 53
    assert any(f"lion on {count} of {count} parameters" in line for line in run.ours())
