"""Megatron-LM's own pretrain_gpt.py, unmodified; runs where MEGATRON_LM_DIR names a checkout."""

import os
from pathlib import Path

import pytest

from tests.harness import BATCH, CPU, HORIZON, MODEL, RATE, ROOT, Run, text_flags, torchrun

CHECKOUT = os.environ.get("MEGATRON_LM_DIR")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM_DIR names no Megatron-LM checkout")

FLAGS = f"--optimizer lion --use-distributed-optimizer --tensor-model-parallel-size 2 --train-iters 4 {HORIZON}"


def run_checkout(text: Path, script: str, *arguments: str) -> Run:
    """Four iterations of the checkout's script on 2 ranks; its own megatron comes first on the path."""
    flags = (*arguments, MODEL, BATCH, RATE, CPU, text_flags(text), FLAGS)
    path = os.pathsep.join([str(CHECKOUT), str(ROOT)])
    return torchrun(*flags, ranks=2, script=script, environment={"PYTHONPATH": path})


@pytest.mark.supports("an unmodified Megatron-LM `pretrain_gpt.py`", "where `MEGATRON_LM_DIR` names a checkout")
def test_the_unmodified_script_trains_every_parameter_with_our_lion(text: Path) -> None:
    run = run_checkout(text, "-m megatron_lion.run", f"{CHECKOUT}/pretrain_gpt.py")
    assert run.returncode == 0, run.output[-6000:]
    assert sorted(run.log.loss) == [1, 2, 3, 4]
    assert any("lion on 28 of 28 parameters" in line for line in run.ours())


def test_our_script_gives_the_same_losses_as_the_unmodified_one(text: Path) -> None:
    theirs = run_checkout(text, "-m megatron_lion.run", f"{CHECKOUT}/pretrain_gpt.py")
    ours = run_checkout(text, str(ROOT / "launch" / "pretrain_gpt.py"))
    assert ours.log.loss == theirs.log.loss
