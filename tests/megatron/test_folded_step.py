"""The clip factor folded into the step, and bf16 parameters written by it, are what Megatron's own passes give."""

from pathlib import Path

import pytest

from tests.harness import (
    BATCH,
    CPU,
    HORIZON,
    MODEL,
    RATE,
    assert_same_checkpoint,
    read_checkpoint,
    run_ranks,
    text_flags,
)

SCRIPT = Path(__file__).with_name("unfolded.py")
# Parameter by parameter, instead of in buckets whose padding is never initialized.
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


@pytest.mark.supports(
    "clipping and the copy to bf16 folded into the step",
    "bit for bit a run in which Megatron does both",
)
@pytest.mark.parametrize("precision", ["--bf16", pytest.param("", marks=pytest.mark.slow)])
def test_a_run_equals_one_in_which_megatron_clips_and_copies(text: Path, tmp_path: Path, precision: str) -> None:
    common = (MODEL, BATCH, RATE, CPU, text_flags(text), f"--optimizer lion {DISTRIBUTED} {HORIZON} {precision}")
    for what, taken in (("folded", "clip 4, copy 4"), ("unfolded", "clip 0, copy 0")):
        # The norm of this model's gradient starts near 2: a limit of 0.3 clips every step.
        flags = f"--clip-grad 0.3 --train-iters 4 --save {tmp_path}/{what} --save-interval 4"
        run = run_ranks(what, *common, flags, ranks=2, script=SCRIPT)
        assert run.returncode == 0, run.output[-6000:]
        assert f"taken over: {taken}" in run.output
    assert_same_checkpoint(read_checkpoint(tmp_path / "folded", 4), read_checkpoint(tmp_path / "unfolded", 4))
