"""``--lion-kernel`` reaches Lion in a real run, is said at the start, and changes no bit of what is trained."""

from pathlib import Path

import pytest

from tests.harness import HORIZON, assert_same_checkpoint, pretrain, read_checkpoint, relative_difference

# Parameter by parameter, instead of in buckets whose padding is never initialized.
CANONICAL = "--dist-ckpt-optim-fully-reshardable"


@pytest.mark.supports("the fused CPU kernel", "bit for bit the final checkpoint of a run with the reference kernel")
def test_the_fused_kernel_is_used_and_trains_what_the_reference_trains(text: Path, tmp_path: Path) -> None:
    flags = f"--optimizer lion --use-distributed-optimizer --bf16 {HORIZON} --train-iters 4"
    runs = {}
    for kernel in ("auto", "reference"):
        runs[kernel] = pretrain(
            text, flags, f"{CANONICAL} --lion-kernel {kernel} --save {tmp_path}/{kernel} --save-interval 4", ranks=2
        )
        said = "fused" if kernel == "auto" else kernel
        assert any(line.endswith(f"per rank, kernel {said}") for line in runs[kernel].ours())
    assert relative_difference(runs["auto"].log, runs["reference"].log) == 0.0
    assert_same_checkpoint(read_checkpoint(tmp_path / "auto", 4), read_checkpoint(tmp_path / "reference", 4))


@pytest.mark.parametrize(
    ("kernel", "environment", "said"),
    [("fusd", {}, "did you mean 'fused'"), ("fused", {"CXX": "/no/such"}, "no C++ compiler on PATH")],
)
def test_a_kernel_that_cannot_be_had_stops_the_run(
    text: Path, kernel: str, environment: dict[str, str], said: str
) -> None:
    run = pretrain(text, f"--optimizer lion --lion-kernel {kernel} --train-iters 2", environment=environment, kill_at=2)
    assert run.returncode not in (0, -9)
    assert said in run.output
