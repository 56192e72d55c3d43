"""Layouts and precisions in which ``test_gather.py`` and ``test_reduce.py`` run real Megatron."""

from typing import NamedTuple

from tests.harness import HORIZON, Run

STEPS = 6
# Checkpoints hold each parameter. Whole buckets have padding that is never initialized.
RUN = f"--optimizer lion --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable {HORIZON}"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
BUCKETS = f"{OVERLAP} --ddp-bucket-size 20000"
COMPACT = "--bf16 --lion-momentum-dtype int8 --lion-master-weights remainder --ddp-pad-buckets-for-high-nccl-busbw"
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--moe-token-dispatcher-type allgather --disable-bias-linear --expert-model-parallel-size 2"
)
# Overflows in the first steps and, once the scale has grown again, in the middle of the run.
OVERFLOWS = "--fp16 --initial-loss-scale 4194304 --loss-scale-window 2 --hysteresis 1"


class Row(NamedTuple):
    """Ranks, flags, and the kind of ``kinds.py`` if it is one."""

    ranks: int
    flags: str
    kind: str = ""


def finished(run: Run) -> Run:
    assert run.returncode == 0, run.output[-6000:]
    return run
